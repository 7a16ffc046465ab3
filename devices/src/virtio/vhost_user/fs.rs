//! A file system of the host (virtio 1.3, section 5.11), served by virtiofsd or one of its kind.
//!
//! There is no DAX window: file contents go through the queues.

use std::{path::PathBuf, str::FromStr};

use vhost::vhost_user::VhostUserProtocolFeatures;

use super::{
    Error,
    backend::{Needs, Running},
    link::Link,
    watch::{Loss, Role},
};
use crate::virtio::{Activation, DeviceError, DeviceKind, VirtQueue, VirtioDevice, read_bytes};

/// The most bytes a tag has.
const TAG: usize = 36;

/// By which name the guest mounts a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag([u8; TAG]);

/// A tag that no driver can be told.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("a tag has 1 to 36 bytes, none of them zero")]
pub struct InvalidTag;

impl FromStr for Tag {
    type Err = InvalidTag;

    fn from_str(text: &str) -> Result<Self, InvalidTag> {
        if text.is_empty() || text.len() > TAG || text.contains('\0') {
            return Err(InvalidTag);
        }
        let mut tag = [0; TAG];
        tag[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self(tag))
    }
}

/// A file system.
pub struct Fs {
    link: Link<Files>,
    tag: Tag,
    request_queues: u16,
    queue_size: u16,
}

impl Fs {
    /// The file system that the back end at `socket` serves, with so many request queues.
    ///
    /// # Errors
    /// When there is no such back end, or it has not so many queues.
    pub fn connect(
        socket: PathBuf,
        tag: Tag,
        request_queues: u16,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let needs = Needs {
            // One more for what is urgent.
            queues: request_queues.saturating_add(1),
            protocol: VhostUserProtocolFeatures::empty(),
        };
        let (link, ()) = Link::new("fs", socket, needs, |_| Ok(()))?;
        Ok(Self {
            link,
            tag,
            request_queues,
            queue_size,
        })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 26,
            pci_class: 0x0180,
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn ring_features(&self) -> u64 {
        self.link.ring_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; usize::from(self.request_queues) + 1]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG + 4];
        config[..TAG].copy_from_slice(&self.tag.0);
        config[TAG..].copy_from_slice(&u32::from(self.request_queues).to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, driver: Activation) -> Result<(), DeviceError> {
        self.link.start(Running::all_queues(driver), Files)
    }

    fn reset(&mut self) {
        self.link.stop();
    }
}

struct Files;

impl Role for Files {
    /// What the driver has looked up and opened is known to that back end only.
    fn loss(&mut self, _queues: &[VirtQueue]) -> Loss {
        Loss::Reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_fit_the_configuration() {
        let longest = "x".repeat(TAG);
        assert_eq!(longest.parse(), Ok(Tag([b'x'; TAG])));
        for bad in ["", "a\0b", &"x".repeat(TAG + 1)] {
            assert_eq!(bad.parse::<Tag>(), Err(InvalidTag), "{bad:?}");
        }
    }
}
