//! Rota's device models: what the guest sees on its ports and in its address space, and what the host does for it.
//!
//! Devices know nothing of the hypervisor. They sit on a [`Bus`], take interrupts as an [`EventFd`](vmm_sys_util::eventfd::EventFd)
//! or through [`ioapic::InterruptRoutes`], and ask for resets and power-off through [`power::PowerSwitch`]: the VMM
//! gives them these when it builds the machine.
//!
//! ```
//! use devices::{Bus, post::PostPort};
//! use std::sync::Arc;
//!
//! let mut ports = Bus::new("port");
//! ports.insert(0x80, 1, "post", Arc::new(PostPort)).unwrap();
//!
//! let mut nothing = [0; 4];
//! ports.read(0x2f8, &mut nothing);
//! assert_eq!(nothing, [0xff; 4]);
//! assert_eq!(ports.unclaimed(), 1);
//! ```

pub mod bus;
pub mod cmos;
pub mod hotplug;
pub mod i8042;
pub mod ioapic;
pub mod modules;
pub mod pci;
pub mod post;
pub mod power;
pub mod processors;
pub mod serial;
pub mod virtio;

pub use bus::{Bus, BusDevice, BusError};
