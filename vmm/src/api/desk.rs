//! What the control thread does about a request.

use std::collections::BTreeMap;

use devices::pci::Slot;
use serde_json::{Value, json};

use super::{
    Asked, Refusal, Wish,
    body::{RemoveDevice, Resize, ResizeDisk},
    call::Call,
    queue::{Answer, Reply},
};
use crate::{
    config::{ConfigError, CpusConfig, VmConfig},
    modules::ModuleArea,
    peripherals::{Handle, PeripheralError, Plug, mem},
    scheduling::{Placed, Scheduling, SchedulingError},
    state::State,
    vm::{Totals, Vm, VmError},
};

/// The machine as requests find it.
pub(crate) struct Desk<'a> {
    /// What it is made of, and will be made of at its next start.
    pub(crate) config: &'a mut VmConfig,
    /// The machine itself, while it runs.
    pub(crate) vm: Option<&'a Vm>,
    /// Where its vCPUs are, while it runs and if that was asked for.
    pub(crate) placed: Option<&'a Placed<'a>>,
    /// Where they are to be, likewise.
    pub(crate) scheduling: Option<&'a Scheduling>,
    /// The state it is in.
    pub(crate) state: State,
    /// Width of a physical address on this host.
    pub(crate) address_bits: u32,
}

impl Desk<'_> {
    /// Does what is asked for and answers. What is left for the control thread to do, and to answer, is returned.
    pub(crate) fn serve(&mut self, asked: Asked) -> Option<(Wish, Reply)> {
        self.forget_ejected();
        let Asked { call, reply } = asked;
        let wish = match call {
            Call::Reboot => Wish::Reboot,
            Call::ShutDown => Wish::ShutDown,
            Call::Boot => Wish::Boot,
            Call::Leave => Wish::Leave,
            call => {
                reply.send(self.answer(call));
                return None;
            }
        };
        match (wish, self.vm) {
            (Wish::Reboot | Wish::ShutDown, None) => reply.send(Err(self.not_running())),
            (Wish::Boot, Some(_)) => {
                let text = format!("the machine is {} already", self.state);
                reply.send(Err(Refusal::conflict(text)));
            }
            _ => return Some((wish, reply)),
        }
        None
    }

    /// What the guest has ejected does not come back at the next start.
    pub(crate) fn forget_ejected(&mut self) {
        if let Some(vm) = self.vm {
            let plug = vm.board().plug();
            self.config.keep_devices(|name| plug.slot(name).is_some());
        }
    }

    fn answer(&mut self, call: Call) -> Answer {
        match call {
            Call::Ping => Ok(Some(json!({
                "build_version": concat!("v", env!("CARGO_PKG_VERSION")),
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "features": [],
            }))),
            Call::Info => self.info(),
            Call::Counters => self.counters(),
            Call::PowerButton => {
                if let Some(events) = self.running()?.board().hotplug() {
                    events.press_power_button();
                }
                Ok(None)
            }
            Call::Resize(resize) => self.resize(&resize),
            Call::ResizeDisk(resize) => self.resize_disk(&resize),
            Call::AddDisk(disk) => self.add(
                |config| config.disks.push(*disk),
                |config, plug| {
                    let (last, disk) = config.disks.iter().enumerate().next_back()?;
                    Some(plug.disk(last, disk))
                },
            ),
            Call::AddNet(net) => self.add(
                |config| config.net.push(*net),
                |config, plug| {
                    let (last, net) = config.net.iter().enumerate().next_back()?;
                    Some(plug.net(last, net))
                },
            ),
            Call::AddFs(fs) => self.add(
                |config| config.fs.push(fs),
                |config, plug| Some(plug.fs(config.fs.last()?)),
            ),
            Call::AddPmem(pmem) => self.add(
                |config| config.pmem.push(pmem),
                |config, plug| Some(plug.pmem(config.pmem.last()?)),
            ),
            Call::AddVsock(_) if self.config.vsock.is_some() => {
                Err(Refusal::conflict("the machine has a vsock device already"))
            }
            Call::AddVsock(vsock) => self.add(
                |config| config.vsock = Some(vsock),
                |config, plug| Some(plug.vsock(config.vsock.as_ref()?)),
            ),
            Call::RemoveDevice(device) => self.remove(&device),
            Call::Reboot | Call::ShutDown | Call::Boot | Call::Leave => Ok(None),
        }
    }

    fn not_running(&self) -> Refusal {
        Refusal::not_found(format!(
            "the machine is {}: it has to run for this",
            self.state
        ))
    }

    fn running(&self) -> Result<&Vm, Refusal> {
        self.vm.ok_or_else(|| self.not_running())
    }

    fn info(&self) -> Answer {
        let mut memory = self.config.memory.size;
        let mut devices = BTreeMap::new();
        if let Some(vm) = self.vm {
            let plug = vm.board().plug();
            if let Some(Handle::Memory(added)) = plug.handle(mem::NAME) {
                memory += added.plugged();
            }
            memory += vm.board().modules().map_or(0, ModuleArea::used);
            if let Some(Handle::Balloon(balloon)) = plug.handle("balloon") {
                memory = memory.saturating_sub(balloon.actual());
            }
            for (name, slot) in plug.list() {
                let node = json!({
                    "id": &name, "resources": [], "children": [], "pci_bdf": bdf(slot),
                });
                devices.insert(name, node);
            }
        }
        Ok(Some(json!({
            "config": &*self.config,
            "state": self.state,
            "memory_actual_size": memory,
            "device_tree": devices,
        })))
    }

    /// The exits of all VPs by kind, and what devices have counted by their names.
    fn counters(&self) -> Answer {
        let vm = self.running()?;
        let mut totals = Totals::default();
        vm.add_to(&mut totals);
        let mut counters = json!(vm.board().plug().counts());
        counters["_exits"] = json!(totals.exits);
        Ok(Some(counters))
    }

    /// Adds a device to the configuration by `extend`, and, while the machine runs, to it by `plug_in`.
    fn add(
        &mut self,
        extend: impl FnOnce(&mut VmConfig),
        plug_in: impl FnOnce(&VmConfig, &Plug) -> Option<Result<Slot, PeripheralError>>,
    ) -> Answer {
        let mut config = self.config.clone();
        extend(&mut config);
        config.name_devices();
        config
            .validate(self.address_bits)
            .map_err(|error| match error {
                ConfigError::SameId(_) => Refusal::conflict(error.to_string()),
                _ => Refusal::bad(error.to_string()),
            })?;
        let Some(vm) = self.vm else {
            *self.config = config;
            return Ok(None);
        };
        let board = vm.board();
        let plugged = plug_in(&config, board.plug()).transpose();
        let slot = plugged.map_err(|error| {
            let text = "the device could not be added";
            let refusal = match error {
                PeripheralError::SameName { .. } => Refusal::conflict(text),
                _ => Refusal::failed(text),
            };
            refusal.because(&error)
        })?;
        let (Some(slot), Some(events)) = (slot, board.hotplug()) else {
            return Ok(None);
        };
        events.arrived(slot.device);
        *self.config = config;
        let id = board.plug().name(slot);
        Ok(Some(json!({ "id": id, "bdf": bdf(slot) })))
    }

    /// Asks the guest to let go of a device. It goes when the guest ejects it.
    fn remove(&mut self, device: &RemoveDevice) -> Answer {
        let unknown = || Refusal::not_found(format!("there is no device {:?}", device.id));
        let Some(vm) = self.vm else {
            let found = self.config.names().any(|name| name == device.id);
            self.config.keep_devices(|name| name != device.id);
            return found.then_some(None).ok_or_else(unknown);
        };
        let slot = vm.board().plug().slot(&device.id).ok_or_else(unknown)?;
        if let Some(events) = vm.board().hotplug() {
            events.ask_to_leave(slot.device);
        }
        Ok(None)
    }

    fn resize(&mut self, resize: &Resize) -> Answer {
        let Resize {
            desired_vcpus: vcpus,
            desired_ram: ram,
            desired_balloon: balloon,
        } = *resize;
        let max = self.config.cpus.max_vcpus;
        if let Some(vcpus) = vcpus.filter(|vcpus| !(1..=max).contains(vcpus)) {
            return Err(Refusal::bad(format!(
                "{vcpus} vCPUs asked for; the machine can have 1 to {max} (--cpus max=)"
            )));
        }
        if let Some(bytes) = ram {
            self.resize_memory(bytes)?;
        }
        if let Some(vcpus) = vcpus {
            self.resize_vcpus(vcpus)?;
        }
        let size = self.config.memory.size;
        let Some(bytes) = balloon else {
            return Ok(None);
        };
        if bytes > size {
            let memory = size;
            let balloon = bytes;
            let error = ConfigError::BalloonTooLarge { balloon, memory };
            return Err(Refusal::bad(error.to_string()));
        }
        let Some(config) = &mut self.config.balloon else {
            return Err(Refusal::bad("the machine has no balloon (--balloon)"));
        };
        if let Some(vm) = self.vm
            && let Some(Handle::Balloon(balloon)) = vm.board().plug().handle("balloon")
        {
            balloon.resize(bytes).map_err(|error| {
                Refusal::failed("the balloon could not be resized").because(&error)
            })?;
        }
        config.size = bytes;
        Ok(None)
    }

    /// Plans them, and, while the machine runs, starts those that come and asks the guest to let go of those that go.
    fn resize_vcpus(&mut self, vcpus: u32) -> Result<(), Refusal> {
        let resized = match (self.vm, self.scheduling) {
            (Some(vm), _) => vm.resize(vcpus, self.placed),
            (None, Some(scheduling)) => scheduling.resize(vcpus).map_err(VmError::from),
            (None, None) => Ok(()),
        };
        resized.map_err(|error| {
            let CpusConfig { boot_vcpus, .. } = self.config.cpus;
            let text = format!("the machine keeps its {boot_vcpus} vCPUs");
            let refusal = match &error {
                VmError::Scheduling(SchedulingError::Claim(_) | SchedulingError::Refused(_)) => {
                    Refusal::conflict(text)
                }
                _ => Refusal::failed(text),
            };
            refusal.because(&error)
        })?;
        self.config.cpus.boot_vcpus = vcpus;
        Ok(())
    }

    fn resize_disk(&self, resize: &ResizeDisk) -> Answer {
        let ResizeDisk { id, desired_size } = resize;
        match self.running()?.board().plug().handle(id) {
            Some(Handle::Disk(disk)) => {
                disk.resize(*desired_size).map_err(|error| {
                    Refusal::failed(format!("the disk {id:?} could not be resized")).because(&error)
                })?;
                Ok(None)
            }
            _ => Err(Refusal::not_found(format!("there is no disk {id:?}"))),
        }
    }
}

fn bdf(slot: Slot) -> Value {
    format!("0000:00:{:02x}.{:x}", slot.device, slot.function).into()
}
