//! Virtual machines and a control group that do nothing, for as long as the lab lives, so that the lab's kernel is not
//! rewritten.
//!
//! Linux has switches in its code (static keys): a jump or nothing, changed by rewriting instructions on running processors,
//! with a breakpoint in their place meanwhile. KVM switches one in the scheduler when the first machine comes and when the
//! last one goes, another while a local APIC is off, a third while a processor has none, and Linux itself some in the memory
//! allocator and the scheduler while there are control groups. QEMU 7.2, emulating several processors at once, sometimes keeps a
//! translation of the breakpoint when it is gone. Linux takes such a breakpoint for one that was just removed and runs the
//! instruction again, with interrupts off and for ever, on each processor that gets there. With one machine
//! held whose local APIC is never on, one that has none, and a control group with a limit, none of these is switched any more.
//! Loading KVM rewrites hundreds of calls; the lab does that, and makes these machines, while only one of its processors is on.

use std::ffi::{c_int, c_ulong};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::io::counts;
use crate::error::{Context, Result};

const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_CREATE_IRQCHIP: c_ulong = 0xae60;

/// There if system calls will be counted, for which the kernel is rewritten, too.
pub(crate) const SYSCALLS: &str = "/lab/syscalls";

/// The control group. It limits nobody.
const GROUP: &str = "/sys/fs/cgroup/steady";
const LIMIT: &str = "100000 100000";

/// Makes the machines and the group, says nothing, and returns in the caller only; a process in the background keeps them.
pub(crate) fn run() -> Result<i32> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context(|| "cannot open /dev/kvm")?;
    let _machines = [true, false]
        .into_iter()
        .map(|apic| machine(&kvm, apic))
        .collect::<io::Result<Vec<_>>>()
        .context(|| "cannot make a virtual machine")?;
    fs::create_dir(GROUP)
        .and_then(|()| fs::write(format!("{GROUP}/cpu.max"), LIMIT))
        .context(|| format!("cannot make {GROUP}"))?;
    if Path::new(SYSCALLS).exists() {
        counts::hold_system_calls()?;
    }
    // SAFETY: this process has one thread.
    if unsafe { libc::daemon(0, 0) } != 0 {
        return Err(io::Error::last_os_error()).context(|| "cannot go to the background");
    }
    loop {
        thread::sleep(Duration::MAX);
    }
}

/// A machine with one processor, which has a local APIC or none.
fn machine(kvm: &File, apic: bool) -> io::Result<[OwnedFd; 2]> {
    let vm = descriptor(call(kvm, KVM_CREATE_VM)?);
    if apic {
        call(&vm, KVM_CREATE_IRQCHIP)?;
    }
    let vcpu = descriptor(call(&vm, KVM_CREATE_VCPU)?);
    Ok([vm, vcpu])
}

/// Makes a request whose argument is 0.
fn call(on: &impl AsRawFd, request: c_ulong) -> io::Result<c_int> {
    // SAFETY: these requests take a number and touch no memory of this process.
    match unsafe { libc::ioctl(on.as_raw_fd(), request, 0) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn descriptor(number: c_int) -> OwnedFd {
    // SAFETY: the kernel has just made it, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(number) }
}
