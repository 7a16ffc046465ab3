//! Says on standard error what is being done and how long it took. Standard output belongs to what was asked for.

use std::io::IsTerminal;
use std::time::Instant;

use crate::error::Result;

/// Runs one long step with its name in front and its time behind.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    if terminal {
        eprint!("  {name} …");
    }
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    let outcome = if result.is_ok() { "" } else { "failed after " };
    let again = if terminal { "\r" } else { "" };
    eprintln!("{again}  {name}: {outcome}{seconds:.1} s");
    result
}
