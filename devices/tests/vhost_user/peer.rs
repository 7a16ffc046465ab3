//! A back end of vhost-user that does what no back end in Debian does: it has a disk that grows, and nothing else.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests of the front end, by the numbers of the protocol.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
/// Of the back end.
const CONFIG_CHANGE: u32 = 2;

const VERSION: u32 = 1;
const REPLY: u32 = 4;

/// `VIRTIO_F_VERSION_1` and `VHOST_USER_F_PROTOCOL_FEATURES`.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// `BACKEND_REQ` and `CONFIG`.
const PROTOCOL_FEATURES: u64 = 1 << 5 | 1 << 9;

/// The back end.
pub(crate) struct Peer {
    /// Where it listens.
    pub(crate) socket: PathBuf,
    disk: Arc<Mutex<Disk>>,
}

struct Disk {
    sectors: u64,
    /// The way to the front end.
    news: Option<File>,
}

impl Peer {
    /// One that listens at `socket` for one front end.
    pub(crate) fn listen(socket: &Path, sectors: u64) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let disk = Arc::new(Mutex::new(Disk {
            sectors,
            news: None,
        }));
        let served = Arc::clone(&disk);
        thread::spawn(move || serve(&listener.accept().unwrap().0, &served));
        Self {
            socket: socket.to_owned(),
            disk,
        }
    }

    /// Makes the disk larger or smaller, and says so.
    pub(crate) fn resize(&self, sectors: u64) {
        let mut disk = self.disk.lock().unwrap();
        disk.sectors = sectors;
        let news = disk.news.as_mut().expect("a way to the front end");
        news.write_all(&header(CONFIG_CHANGE, VERSION, 0)).unwrap();
    }
}

fn serve(mut socket: &UnixStream, disk: &Mutex<Disk>) {
    loop {
        let mut head = [0; 12];
        let Ok((12, file)) = socket.recv_with_fd(&mut head) else {
            return;
        };
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        socket.read_exact(&mut body).unwrap();
        let answer = match word(0) {
            GET_FEATURES => FEATURES.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL_FEATURES.to_le_bytes().to_vec(),
            GET_VRING_BASE => body,
            GET_CONFIG => {
                // Behind offset, size and flags.
                let sectors = disk.lock().unwrap().sectors;
                body[12..20].copy_from_slice(&sectors.to_le_bytes());
                body
            }
            SET_BACKEND_REQ_FD => {
                disk.lock().unwrap().news = file;
                continue;
            }
            _ => continue,
        };
        let mut message = header(word(0), VERSION | REPLY, answer.len()).to_vec();
        message.extend(answer);
        socket.write_all(&message).unwrap();
    }
}

fn header(request: u32, flags: u32, size: usize) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&(size as u32).to_le_bytes());
    bytes
}
