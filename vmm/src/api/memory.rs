//! `vm.resize` with `desired_ram`: how much memory the guest is to have, of that which comes and goes.

use devices::virtio::mem::BLOCK;

use super::{Desk, Refusal};
use crate::peripherals::{Handle, mem};

impl Desk<'_> {
    /// The guest is to have `bytes` of memory, with those that are there from the start. It gets there in its own time.
    pub(super) fn resize_memory(&mut self, bytes: u64) -> Result<(), Refusal> {
        let memory = &self.config.memory;
        let (size, hotplug) = (memory.size, memory.hotplug());
        if bytes == size && hotplug == 0 {
            return Ok(());
        }
        if hotplug == 0 {
            return Err(Refusal::unsupported(format!(
                "the machine has {size} bytes of memory, and none that can come and go (--memory \
                 hotplug_size=SIZE,hotplug_method=virtio-mem); a balloon can take some of it (desired_balloon)"
            )));
        }
        let most = size.saturating_add(hotplug);
        if !(size..=most).contains(&bytes) {
            return Err(Refusal::bad(format!(
                "the machine can have from {size} to {most} bytes of memory, not {bytes}"
            )));
        }
        let added = bytes - size;
        if !added.is_multiple_of(BLOCK) {
            return Err(Refusal::bad(format!(
                "memory comes and goes by 2 MiB, and {bytes} bytes are {added} more than there are from the start"
            )));
        }
        if let Some(vm) = self.vm {
            let Some(Handle::Memory(memory)) = vm.board().plug().handle(mem::NAME) else {
                return Err(Refusal::not_found(format!(
                    "there is no device {:?} any more",
                    mem::NAME
                )));
            };
            memory.resize(added).map_err(|error| {
                Refusal::failed("the memory could not be resized").because(&error)
            })?;
        }
        self.config.memory.hotplugged_size = Some(added);
        Ok(())
    }
}
