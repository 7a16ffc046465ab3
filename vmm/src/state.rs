//! The states of a VM and the ways between them.

use std::fmt;

use serde::Serialize;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum State {
    /// Configured; nothing of it exists on the hypervisor.
    Created,
    /// Its partition, memory and devices are being set up and its kernel is being loaded.
    Booting,
    /// Its VPs run.
    Running,
    /// It has ended in good order.
    Shutdown,
    /// Its guest could not go on.
    Crashed,
}

/// A transition that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {from} cannot become {to}")]
pub struct TransitionError {
    /// The state the VM is in.
    pub from: State,
    /// The state it was to go to.
    pub to: State,
}

impl State {
    /// Goes to `to`.
    ///
    /// # Errors
    /// When no way leads there from here; the state stays.
    pub fn advance(&mut self, to: Self) -> Result<(), TransitionError> {
        use State::{Booting, Crashed, Created, Running, Shutdown};
        let allowed = matches!(
            (*self, to),
            (Created | Shutdown, Booting)
                | (Booting, Running)
                | (Created | Booting | Running, Shutdown)
                | (Running, Crashed)
        );
        if !allowed {
            return Err(TransitionError { from: *self, to });
        }
        *self = to;
        Ok(())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Shutdown => "shut down",
            Self::Crashed => "crashed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_and_what_does_not_fit_into_one() {
        let mut state = State::Created;
        for next in [
            State::Booting,
            State::Running,
            State::Shutdown,
            State::Booting,
            State::Running,
        ] {
            state.advance(next).unwrap();
        }
        let error = state.advance(State::Booting).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a VM that is running cannot become booting"
        );
        state.advance(State::Crashed).unwrap();
        assert!(state.advance(State::Shutdown).is_err());
        assert_eq!(state, State::Crashed);
    }
}
