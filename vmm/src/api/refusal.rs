//! Why a request is not done: a status, and a message with its causes.

use std::error::Error;

/// A request that is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, and why, from the outside in.
    pub messages: Vec<String>,
}

impl Refusal {
    fn new(status: u16, message: impl Into<String>) -> Self {
        Self {
            status,
            messages: vec![message.into()],
        }
    }

    /// The request makes no sense.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(400, message)
    }

    /// What is asked for is not there.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, message)
    }

    /// It does not fit the state that the machine is in.
    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::new(409, message)
    }

    /// It could not be done.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(500, message)
    }

    /// The machine that was to start does not.
    pub(crate) fn not_started(error: &dyn Error) -> Self {
        Self::failed("the machine could not be started").because(error)
    }

    /// Rota cannot do it.
    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(501, message)
    }

    /// With the reasons that `error` and what is behind it give.
    pub(super) fn because(mut self, error: &dyn Error) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            let message = error.to_string();
            // Transparent errors, and those that quote their cause, have said it already.
            if self
                .messages
                .last()
                .is_none_or(|last| !last.ends_with(&message))
            {
                self.messages.push(message);
            }
            next = error.source();
        }
        self
    }
}
