//! A file system that virtiofsd serves, driven by a guest's driver that knows a little FUSE.

use std::{fs, path::PathBuf};

use crate::back_end::{Program, find, folder, quiet, wait_until};
use devices::virtio::{
    DeviceError, VirtioDevice,
    vhost_user::{Error, Fs},
};
use driver::{Guest, Ring};
use vmm_sys_util::tempdir::TempDir;

const VIRTIOFSD: &[&str] = &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
const TEXT: &[u8] = b"from the host's side\n";

/// `fuse_opcode` in `linux/fuse.h`.
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const ROOT: u64 = 1;

/// A host folder with a file in it, and who serves it.
struct Served {
    folder: TempDir,
    virtiofsd: PathBuf,
    program: Option<Program>,
}

impl Served {
    fn new(test: &str) -> Option<Self> {
        let virtiofsd = find(test, VIRTIOFSD)?;
        let folder = folder();
        fs::create_dir(folder.as_path().join("tree")).unwrap();
        fs::write(folder.as_path().join("tree/hello"), TEXT).unwrap();
        let mut served = Self {
            folder,
            virtiofsd,
            program: None,
        };
        served.start();
        Some(served)
    }

    fn socket(&self) -> PathBuf {
        self.folder.as_path().join("socket")
    }

    fn start(&mut self) {
        let tree = self.folder.as_path().join("tree");
        let mut command = quiet(&self.virtiofsd);
        command.arg(format!("--socket-path={}", self.socket().display()));
        if self.virtiofsd.ends_with("libexec/virtiofsd") {
            command.arg("--shared-dir").arg(tree);
            command.args(["--sandbox", "chroot"]);
        } else {
            command.arg("-o").arg(format!(
                "source={},sandbox=chroot,cache=none",
                tree.display()
            ));
        }
        self.program = Some(Program::start(&mut command));
    }

    fn connect(&self) -> Fs {
        Fs::connect(self.socket(), "files".parse().unwrap(), 1, 64).expect("a back end")
    }
}

/// What a FUSE client does, on one queue.
struct Client<'a> {
    guest: &'a mut Guest<Fs>,
    ring: Ring,
    unique: u64,
}

impl<'a> Client<'a> {
    /// On the first request queue, with the session opened.
    fn new(guest: &'a mut Guest<Fs>) -> Self {
        let ring = guest.ring(1);
        let mut client = Self {
            guest,
            ring,
            unique: 0,
        };
        let version: Vec<u8> = [7_u32, 31, 0, 0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let answer = client.ask(INIT, ROOT, &version).expect("a session");
        assert_eq!(answer[..4], 7_u32.to_le_bytes(), "the major version");
        client
    }

    /// One request; its answer without the header, or the error number.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        const HEADER: usize = 40;
        self.unique += 2;
        let mut request = Vec::new();
        request.extend((HEADER as u32 + body.len() as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.resize(HEADER, 0);
        request.extend(body);
        let at = self.guest.place(&request);
        let answer = self.guest.allocate(8192);
        self.ring.add(
            &[(at, HEADER as u32), (at + HEADER as u64, body.len() as u32)],
            &[(answer, 16), (answer + 16, 8192 - 16)],
        );
        self.ring.kick();
        let (_, written) = self.ring.wait();
        let bytes = self.guest.read(answer, written as usize);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), written);
        match word(4) as i32 {
            0 => Ok(bytes[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn read_file(&mut self, name: &str) -> Result<Vec<u8>, i32> {
        let entry = self.ask(LOOKUP, ROOT, format!("{name}\0").as_bytes())?;
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        let open = self.ask(OPEN, node, &[0; 8])?;
        let mut read = open[..8].to_vec();
        read.extend(0_u64.to_le_bytes());
        read.extend(4096_u32.to_le_bytes());
        read.resize(40, 0);
        self.ask(READ, node, &read)
    }
}

#[test]
fn a_file_of_the_host_is_read() {
    let Some(served) = Served::new("a_file_of_the_host_is_read") else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    let mut config = b"files".to_vec();
    config.resize(36, 0);
    config.extend(1_u32.to_le_bytes());
    assert_eq!(guest.config(0, 40), config);
    guest.activate(0);
    let mut client = Client::new(&mut guest);
    assert_eq!(client.read_file("hello"), Ok(TEXT.to_vec()));
    assert_eq!(client.read_file("nothing"), Err(2), "ENOENT");
}

#[test]
fn a_device_that_was_reset_starts_again() {
    let Some(served) = Served::new("a_device_that_was_reset_starts_again") else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    for _ in 0..3 {
        // As drivers do before they begin. This virtiofsd does not take a second connection.
        guest.device.reset();
        guest.activate(0);
        let mut client = Client::new(&mut guest);
        assert_eq!(client.read_file("hello"), Ok(TEXT.to_vec()));
        guest.device.reset();
    }
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn a_driver_hears_of_a_back_end_that_is_gone_and_starts_anew_with_the_next() {
    let name = "a_driver_hears_of_a_back_end_that_is_gone_and_starts_anew_with_the_next";
    let Some(mut served) = Served::new(name) else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    guest.activate(0);
    Client::new(&mut guest);
    served.program.as_mut().unwrap().kill();
    guest.wait_for_reset_request();
    guest.device.reset();
    assert!(guest.try_activate(0).is_err(), "without a back end");

    served.start();
    wait_until("activated", || {
        guest.device.reset();
        guest.try_activate(0).is_ok()
    });
    let mut client = Client::new(&mut guest);
    assert_eq!(client.read_file("hello"), Ok(TEXT.to_vec()));
}

#[test]
fn memory_that_cannot_be_shared_is_refused() {
    let Some(served) = Served::new("memory_that_cannot_be_shared_is_refused") else {
        return;
    };
    let mut guest = Guest::new(served.connect());
    let Err(DeviceError::Host { source, .. }) = guest.try_activate(0) else {
        panic!("private memory taken");
    };
    let text = source.to_string();
    assert!(text.contains("--memory shared=on"), "{text}");
}

#[test]
fn a_back_end_with_too_few_queues_is_refused() {
    let Some(served) = Served::new("a_back_end_with_too_few_queues_is_refused") else {
        return;
    };
    let error = Fs::connect(served.socket(), "files".parse().unwrap(), 60_000, 64);
    assert!(matches!(error, Err(Error::Queues { .. })));
}

#[test]
fn a_back_end_that_is_not_there_is_named() {
    let error = Fs::connect("/nowhere/socket".into(), "files".parse().unwrap(), 1, 64);
    let Err(error) = error else {
        panic!("connected to nothing");
    };
    assert!(error.to_string().contains("/nowhere/socket"), "{error}");
}
