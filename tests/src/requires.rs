//! What a test needs before it can say anything: a device, a processor mode, a limit on its time.

use std::io::Write as _;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::guest::Guest;
use crate::message::Exit;
use crate::payload;
use crate::vm::Device;

/// Declares tests of a `/dev/mshv`: each gets the open device, is skipped with a reason where there is none, and fails when it hangs.
///
/// ```ignore
/// on_mshv! {
///     fn a_partition_can_be_created(device) { device.create_partition().unwrap(); }
/// }
/// ```
#[macro_export]
macro_rules! on_mshv {
    ($($(#[$attribute:meta])* fn $name:ident($device:ident) $body:block)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            $crate::requires::run(stringify!($name), |$device: &$crate::vm::Device| $body);
        }
    )*};
}

/// Ends the test with a `SKIP` line unless the requirement holds.
#[macro_export]
macro_rules! require {
    ($requirement:expr) => {
        if let Err(reason) = $requirement {
            $crate::requires::skip(&reason);
            return;
        }
    };
}

/// Runs one test body on its own thread, for at most `ROTA_TEST_TIMEOUT` seconds (default 30).
///
/// # Panics
/// With the body's panic, or when the time is over: the body is then left behind, as nothing can end a thread that hangs in a call.
pub fn run(name: &str, body: fn(&Device)) {
    let device = match Device::open() {
        Ok(device) => device,
        Err(error) => {
            let missing = Err(format!("no /dev/mshv ({error:?})"));
            if let Err(reason) = demanded("device", missing) {
                print_skip(name, &reason);
            }
            return;
        }
    };
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(name.to_string())
        .spawn(move || {
            body(&device);
            drop(device);
            let _ = sender.send(());
        })
        .expect("a thread for the test");
    let limit = limit();
    if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        panic!("{name} still runs after {limit:?}");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The longest time a test may take.
#[must_use]
pub fn limit() -> Duration {
    let seconds = std::env::var("ROTA_TEST_TIMEOUT")
        .ok()
        .and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

/// Reports the calling test as skipped.
pub fn skip(reason: &str) {
    print_skip(std::thread::current().name().unwrap_or("?"), reason);
}

/// Reports the named test as skipped, past the test harness's capture of output.
pub fn print_skip(name: &str, reason: &str) {
    let _ = std::io::stderr().write_all(format!("SKIP {name}: {reason}\n").as_bytes());
}

/// A requirement as found, made a failure when `ROTA_REQUIRE` names it (or says `all`).
///
/// # Errors
/// The reason why the requirement is missing.
///
/// # Panics
/// When it is missing and demanded.
pub fn demanded(requirement: &str, found: Result<(), String>) -> Result<(), String> {
    if let Err(reason) = &found {
        let demands = std::env::var("ROTA_REQUIRE").unwrap_or_default();
        let wanted = demands
            .split(',')
            .any(|name| name == requirement || name == "all");
        assert!(
            !wanted,
            "ROTA_REQUIRE asks for {requirement}, but: {reason}"
        );
    }
    found
}

/// The guest can run 64-bit code with paging.
///
/// # Errors
/// What happened instead.
pub fn long_mode(device: &Device) -> Result<(), String> {
    demanded(
        "long_mode",
        probe(
            "64-bit paged code",
            &Guest::long_mode(device, &payload::DONE),
        ),
    )
}

/// The guest can run 32-bit protected-mode code with paging.
///
/// # Errors
/// What happened instead.
pub fn protected_mode(device: &Device) -> Result<(), String> {
    demanded(
        "protected_mode",
        probe(
            "32-bit paged code",
            &Guest::protected_mode(device, &payload::DONE),
        ),
    )
}

/// The device stands on a KVM that stands on AMD's virtualization: some of what the hypervisor does cannot be had there, and the
/// tests concerned say so instead of failing, if they find exactly that.
#[must_use]
pub fn amd_kvm() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    flags
        .lines()
        .any(|line| line.starts_with("flags") && line.split_whitespace().any(|flag| flag == "svm"))
}

/// The guest can run SSE instructions (a KVM that emulates every instruction cannot).
///
/// # Errors
/// What happened instead.
pub fn sse(device: &Device) -> Result<(), String> {
    let guest = Guest::long_mode(
        device,
        &payload::code(&[&payload::MOVD_XMM0_EAX, &payload::DONE]),
    );
    guest.vp.set64(&[(crate::reg::CR4, 0x220)]);
    demanded("sse", probe("SSE", &guest))
}

/// The VPs of this device have a register page (a hypervisor may be without: mmap says `ENODEV`).
///
/// # Errors
/// What mmap said.
pub fn register_page(guest: &Guest) -> Result<(), String> {
    demanded(
        "register_page",
        guest
            .vp
            .map_page(0)
            .map(drop)
            .map_err(|e| format!("no register page: {e:?}")),
    )
}

fn probe(what: &str, guest: &Guest) -> Result<(), String> {
    match guest.try_run() {
        Ok(Exit::Port(port)) if port.port == payload::DONE_PORT => Ok(()),
        other => Err(format!("{what} does not run here: {other:x?}")),
    }
}
