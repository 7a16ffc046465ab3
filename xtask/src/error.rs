//! The one error type of these commands: a sentence for the person at the terminal.
//!
//! Nothing here is handled by code, only read, so an error is its message, with the message of what caused it after a
//! colon.

use std::fmt;

/// What went wrong, in words.
#[derive(Debug)]
pub(crate) struct Error(String);

/// The result of every step.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that says `message`.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Says what was being done when an error came up.
pub(crate) trait Context<T> {
    /// Puts `what()` and a colon in front of the error.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error(format!("{}: {cause}", what().into())))
    }
}
