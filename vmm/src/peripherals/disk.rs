//! Disks: from their configuration to a device on its image, or on the back end that has the image.

use devices::pci::Slot;
use devices::virtio::{
    block::{
        Block, BlockConfig,
        backend::{Access, Unmap},
        image::{self, Backing, Cache, Engine, Format, ImageOptions},
    },
    rate_limiter::{Limits, RateLimiter},
    vhost_user,
};

use super::{Handle, PeripheralError, Plug};
use crate::config::{DiskConfig, ImageType, name};

/// Plugs in the disk that is number `index`, after which its threads are named.
pub(super) fn plug(
    plug: &Plug,
    index: usize,
    config: &DiskConfig,
) -> Result<Slot, PeripheralError> {
    let name = name(&config.id);
    let device = || name.to_owned();
    if let Some(socket) = &config.vhost_socket {
        let block =
            vhost_user::Block::connect(socket.clone(), config.num_queues, config.queue_size)
                .map_err(|source| PeripheralError::BackEnd {
                    device: device(),
                    source,
                })?;
        return plug.virtio(name, Box::new(block));
    }
    let image = image::open(&options(config)).map_err(|source| PeripheralError::Image {
        device: device(),
        source,
    })?;
    let limits = match &config.rate_limit_group {
        Some(group) => plug.limits.get(group).cloned().unwrap_or_default(),
        None => {
            let limits = config.rate_limiter_config.as_ref().map(Limits::from);
            RateLimiter::new(&limits.unwrap_or_default())
        }
    };
    let block = BlockConfig {
        name: format!("blk{index}"),
        queues: config.num_queues,
        queue_size: config.queue_size,
        serial: config.serial.clone().unwrap_or_else(device),
        unmap: if config.sparse {
            Unmap::Allowed
        } else {
            Unmap::Forbidden
        },
        limits,
    };
    let block = Block::new(image, block).map_err(|source| PeripheralError::Host {
        device: device(),
        source,
    })?;
    let handle = Handle::Disk(block.resizer());
    plug.virtio_with(name, Box::new(block), handle)
}

fn options(config: &DiskConfig) -> ImageOptions {
    ImageOptions {
        path: config.path.clone().unwrap_or_default(),
        access: if config.readonly {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        },
        cache: if config.direct {
            Cache::Direct
        } else {
            Cache::Buffered
        },
        format: match config.image_type {
            ImageType::Raw => Some(Format::Raw),
            ImageType::Qcow2 => Some(Format::Qcow2),
            ImageType::Unknown => None,
        },
        backing: if config.backing_files {
            Backing::Open
        } else {
            Backing::Refuse
        },
        engine: Engine::Best,
    }
}
