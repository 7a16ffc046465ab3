//! Folders of the host: from their configuration to a device on a back end.

use std::str::FromStr;

use devices::{
    pci::Slot,
    virtio::vhost_user::{Fs, Tag},
};

use super::{PeripheralError, Plug};
use crate::config::{FsConfig, name};

/// Plugs in the folder.
pub(super) fn plug(plug: &Plug, config: &FsConfig) -> Result<Slot, PeripheralError> {
    let name = name(&config.id);
    let tag = Tag::from_str(&config.tag).map_err(|source| PeripheralError::Tag {
        device: name.to_owned(),
        source,
    })?;
    let socket = config.socket.clone();
    let device =
        Fs::connect(socket, tag, config.num_queues, config.queue_size).map_err(|source| {
            PeripheralError::BackEnd {
                device: name.to_owned(),
                source,
            }
        })?;
    plug.virtio(name, Box::new(device))
}
