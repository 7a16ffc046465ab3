//! `vm.resize` with `desired_ram`: how much memory the guest is to have, of that which comes and goes.

use devices::virtio::mem::BLOCK;

use super::{Desk, Refusal};
use crate::{
    config::HotplugMethod,
    modules::UNIT,
    peripherals::{Handle, mem},
    vm::Vm,
};

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
                 hotplug_size=SIZE); a balloon can take some of it (desired_balloon)"
            )));
        }
        let most = size.saturating_add(hotplug);
        if !(size..=most).contains(&bytes) {
            return Err(Refusal::bad(format!(
                "the machine can have from {size} to {most} bytes of memory, not {bytes}"
            )));
        }
        let added = bytes - size;
        if memory.hotplug_method == HotplugMethod::Acpi {
            return self.add_modules(added);
        }
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

    /// The guest is to have `added` bytes in memory modules. What has come stays.
    fn add_modules(&mut self, added: u64) -> Result<(), Refusal> {
        let memory = &mut self.config.memory;
        let before = memory.hotplugged();
        let running = self.vm.map(Vm::board);
        let Some(more) = added.checked_sub(before) else {
            if running.is_none() {
                memory.hotplugged_size = Some(added);
                return Ok(());
            }
            return Err(Refusal::unsupported(format!(
                "the guest has {before} bytes in memory modules, which stay; memory goes again with \
                 --memory hotplug_method=virtio-mem, and a balloon can take some of it (desired_balloon)"
            )));
        };
        if !more.is_multiple_of(UNIT) {
            return Err(Refusal::bad(format!(
                "memory modules have multiples of {} MiB, not the {more} bytes that would be more",
                UNIT >> 20
            )));
        }
        if let (Some(board), true) = (running, more > 0) {
            let area = board.modules();
            let came = area.map(|area| area.add(more)).transpose();
            came.map_err(|error| {
                Refusal::failed("the memory module could not be added").because(&error)
            })?;
        }
        self.config.memory.hotplugged_size = Some(added);
        Ok(())
    }
}
