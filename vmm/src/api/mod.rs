//! The API: cloud-hypervisor's paths, bodies and status codes, over HTTP on a Unix socket.
//!
//! ```text
//! client ─▶ [server] a thread of its own: HTTP, limits, time limits
//!              │ [call] path and body become a Call
//!              ▼
//!         [queue] a channel and an eventfd ─▶ control thread ─▶ [desk] does it and answers
//! ```
//!
//! A client reaches no further than the server's thread: what it sends slowly, wrongly or not at all costs the control thread
//! nothing, and a machine without a socket has none of this. Whoever may open the socket may do all of it, so only the
//! user who started Rota may.

mod body;
mod call;
mod desk;
mod memory;
mod queue;
mod refusal;
mod server;
mod socket;

#[cfg(test)]
mod tests;

pub(crate) use desk::Desk;
pub(crate) use queue::{Asked, Queue, Reply, Wish};
pub use refusal::Refusal;
pub use server::ApiError;
pub(crate) use server::Server;
pub use socket::{ApiSocket, InvalidApiSocket};
