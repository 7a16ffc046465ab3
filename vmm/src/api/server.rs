//! HTTP on a Unix socket, on a thread of its own.

use std::{
    convert::Infallible,
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, RawFd},
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    ext::ReasonPhrase,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixSocket},
    runtime::{self, Runtime},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    ApiSocket, Queue, Refusal,
    call::Call,
    queue::{self, Answer, Asker},
    socket::inherited,
};

/// Connections at the same time. More wait until one of these ends.
const CONNECTIONS: u32 = 64;
/// Bytes of a body.
const MOST_BODY: usize = 64 << 10;
/// How long a client may take to send the head of a request, and the body.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection lasts, whatever is going on on it.
const LIFETIME: Duration = Duration::from_secs(300);
/// How long the last answers may take to go out.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The socket.
    #[error("api-socket: cannot listen at {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A socket that was handed over.
    #[error("api-socket: cannot listen at the descriptor {fd}")]
    Inherited {
        /// Its number.
        fd: RawFd,
        /// What the host said.
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("api-socket: {0} is in use by another process")]
    InUse(PathBuf),
    /// The thread and what goes with it.
    #[error("api-socket: cannot start the server")]
    Start(#[source] io::Error),
}

/// The server, as long as it is kept. At its end the last answers go out, and the socket goes.
pub(crate) struct Server {
    /// Of the socket, where it was made for this.
    path: Option<PathBuf>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens at `socket` from now on. What is asked for comes out of the queue.
    pub(crate) fn start(socket: &ApiSocket) -> Result<(Self, Queue), ApiError> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ApiError::Start)?;
        let (listener, path) = match socket {
            ApiSocket::Path(path) => {
                remove_stale(path)?;
                let listener = listen(&runtime, path).map_err(|source| ApiError::Listen {
                    path: path.clone(),
                    source,
                })?;
                (listener, Some(path.clone()))
            }
            ApiSocket::Fd(fd) => {
                let _context = runtime.enter();
                let listener = inherited(*fd)
                    .and_then(UnixListener::from_std)
                    .map_err(|source| ApiError::Inherited { fd: *fd, source })?;
                (listener, None)
            }
        };
        let (asker, queue) = queue::queue().map_err(ApiError::Start)?;
        let (stop, stopping) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("api".into())
            .spawn(move || runtime.block_on(serve(listener, asker, stopping)))
            .map_err(ApiError::Start)?;
        let server = Self {
            path,
            stop,
            thread: Some(thread),
        };
        Ok((server, queue))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Removes the socket of a process that is no more.
fn remove_stale(path: &Path) -> Result<(), ApiError> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|source| ApiError::Listen {
                path: path.to_owned(),
                source,
            }),
        _ => Err(ApiError::InUse(path.to_owned())),
    }
}

/// A socket at `path` that is the user's alone from the beginning: its file gets the mode that the socket has.
fn listen(runtime: &Runtime, path: &Path) -> io::Result<UnixListener> {
    let _context = runtime.enter();
    let socket = UnixSocket::new_stream()?;
    File::from(socket.as_fd().try_clone_to_owned()?)
        .set_permissions(Permissions::from_mode(0o600))?;
    socket.bind(path)?;
    socket.listen(CONNECTIONS)
}

async fn serve(listener: UnixListener, asker: Asker, mut stopping: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS as usize));
    let accepting = {
        let (places, stopping) = (Arc::clone(&places), stopping.clone());
        tokio::spawn(async move {
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                let stream = loop {
                    match listener.accept().await {
                        Ok((stream, _)) => break stream,
                        // No descriptors left, perhaps: there may be some later.
                        Err(_) => sleep(Duration::from_millis(100)).await,
                    }
                };
                let (asker, stopping) = (asker.clone(), stopping.clone());
                tokio::spawn(async move {
                    let _ = timeout(LIFETIME, connection(stream, asker, stopping)).await;
                    drop(place);
                });
            }
        })
    };
    let _ = stopping.wait_for(|stop| *stop).await;
    accepting.abort();
    let _ = timeout(LAST_ANSWERS, places.acquire_many(CONNECTIONS)).await;
}

async fn connection(
    stream: tokio::net::UnixStream,
    asker: Asker,
    mut stopping: watch::Receiver<bool>,
) {
    let service = service_fn(|request| {
        let asker = asker.clone();
        async move { Ok::<_, Infallible>(response(answer(request, &asker).await)) }
    });
    let connection = http1::Builder::new()
        // Clients look for the headers' names as they are usually written.
        .title_case_headers(true)
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stop| *stop) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn answer(request: Request<Incoming>, asker: &Asker) -> Answer {
    let (head, body) = request.into_parts();
    let body = timeout(PATIENCE, Limited::new(body, MOST_BODY).collect())
        .await
        .map_err(|_| Refusal::bad("the body of the request does not come"))?
        .map_err(|_| {
            Refusal::bad(format!(
                "the body of the request is longer than {MOST_BODY} bytes or does not come whole"
            ))
        })?
        .to_bytes();
    let call = Call::parse(head.method.as_str(), head.uri.path(), &body)?;
    asker.ask(call).await
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let (status, body) = match answer {
        Ok(None) => (StatusCode::NO_CONTENT, None),
        Ok(Some(value)) => (StatusCode::OK, Some(value.to_string())),
        Err(refusal) => (
            StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            Some(serde_json::Value::from(refusal.messages).to_string()),
        ),
    };
    let has_body = body.is_some();
    let mut response = Response::new(Full::from(body.unwrap_or_default()));
    *response.status_mut() = status;
    // Clients take all that follows the version for the number.
    response
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b""));
    if has_body {
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
    }
    response
}
