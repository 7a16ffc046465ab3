//! A client of the API at `rota run --api-socket`: one request a connection, as simple as HTTP gets.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::child::patience;

/// Where a VMM listens.
#[derive(Debug)]
pub struct Api(PathBuf);

impl Api {
    /// A path for the socket of the test `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let name = format!("rota-{name}-{}.sock", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    /// What follows `--api-socket`.
    #[must_use]
    pub fn option(&self) -> String {
        format!("path={}", self.0.display())
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Sends a request, and returns the status and the body of the answer.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn ask(&self, method: &str, name: &str, body: &Value) -> (u16, Value) {
        let mut stream = UnixStream::connect(&self.0).expect("a connection");
        stream
            .set_read_timeout(Some(patience()))
            .expect("a timeout");
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        write!(
            stream,
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .expect("an end of the headers");
        let status = head.split(' ').nth(1).and_then(|text| text.parse().ok());
        let body = serde_json::from_str(body).unwrap_or_default();
        (status.expect("a status"), body)
    }

    /// Asks for something that must be done.
    ///
    /// # Panics
    /// When it is refused.
    pub fn put(&self, name: &str, body: &Value) -> Value {
        let (status, answer) = self.ask("PUT", name, body);
        assert!(matches!(status, 200 | 204), "{name}: {status} {answer}");
        answer
    }

    /// What `vm.info` says.
    ///
    /// # Panics
    /// When it says nothing.
    #[must_use]
    pub fn info(&self) -> Value {
        let (status, info) = self.ask("GET", "vm.info", &Value::Null);
        assert_eq!(status, 200, "{info}");
        info
    }
}
