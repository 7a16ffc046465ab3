//! Rota's virtual machine: from a configuration to a running guest and its end.
//!
//! ```text
//! VmConfig ──▶ control::run ──▶ Vm::prepare ──▶ memory, boot (kernel, ACPI), Partition, Board (devices), VP threads
//!                  │                                                                     │
//!                  └── waits for signals, console input, power requests, crashes ◀───────┘
//! ```
//!
//! [`control::run`] is the whole life of a machine and the place to start reading. [`config`] is what it is made of, [`layout`]
//! where everything lies, [`boot`] how a kernel gets going, [`board`] which devices every machine has, [`peripherals`] which
//! the configuration adds, [`api`] what can be asked of it while it runs, and [`partition`] every request made to the hypervisor.

pub mod acpi;
pub mod api;
pub mod board;
pub mod boot;
pub mod config;
pub mod console;
pub mod control;
mod hole;
pub mod hvc;
mod interrupts;
pub mod layout;
pub mod memory;
pub mod metrics;
pub mod modules;

pub mod partition;
pub mod peripherals;
mod processors;
pub mod report;
pub mod scheduling;
pub mod signals;
pub mod state;
pub mod terminal;
pub mod vm;
