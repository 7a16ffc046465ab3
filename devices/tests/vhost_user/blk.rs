//! A disk that QEMU's storage daemon serves, driven by a guest's driver.

use std::{
    fs::{self, File},
    os::unix::net::UnixListener,
    path::PathBuf,
};

use crate::back_end::{Program, find, folder, quiet, wait_until};
use crate::peer::Peer;
use devices::virtio::{
    VirtioDevice,
    vhost_user::{Block, Error},
};
use driver::{Guest, Ring};
use vmm_sys_util::tempdir::TempDir;

const DAEMON: &[&str] = &["/usr/bin/qemu-storage-daemon"];
const SECTOR: usize = 512;
const SECTORS: u64 = 2048;
const QUEUES: u16 = 2;

/// `VIRTIO_BLK_T_*`.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

/// An image, and who serves it.
struct Served {
    folder: TempDir,
    daemon: PathBuf,
    program: Option<Program>,
}

impl Served {
    fn new(test: &str) -> Option<Self> {
        let daemon = find(test, DAEMON)?;
        let folder = folder();
        let image = File::create(folder.as_path().join("image")).unwrap();
        image.set_len(SECTORS * SECTOR as u64).unwrap();
        let mut served = Self {
            folder,
            daemon,
            program: None,
        };
        served.start();
        Some(served)
    }

    fn socket(&self) -> PathBuf {
        self.folder.as_path().join("socket")
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.folder.as_path().join("image")).unwrap()
    }

    fn start(&mut self) {
        let folder = self.folder.as_path().display();
        let _ = fs::remove_file(self.socket());
        let mut command = quiet(&self.daemon);
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={folder}/image,locking=off"
            ))
            .args(["--blockdev", "driver=raw,node-name=disk,file=file"])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={QUEUES},\
                 addr.type=unix,addr.path={folder}/socket"
            ));
        self.program = Some(Program::start(&mut command));
    }

    fn program(&mut self) -> &mut Program {
        self.program.as_mut().unwrap()
    }

    fn connect(&self) -> Block {
        Block::connect(self.socket(), QUEUES, 128).expect("a back end")
    }
}

/// Puts a request into `ring`, whose answer is to be the byte at the address returned.
fn ask(guest: &mut Guest<Block>, ring: &mut Ring, kind: u32, sector: u64, data: u64) -> u64 {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    let header = (guest.place(&header), 16);
    let answer = guest.place(&[0xff]);
    let (status, data) = ((answer, 1), (data, SECTOR as u32));
    match kind {
        IN => ring.add(&[header], &[data, status]),
        OUT => ring.add(&[header, data], &[status]),
        _ => ring.add(&[header], &[status]),
    };
    ring.kick();
    answer
}

#[track_caller]
fn request(guest: &mut Guest<Block>, ring: &mut Ring, kind: u32, sector: u64, data: u64) {
    let answer = ask(guest, ring, kind, sector, data);
    ring.wait();
    assert_eq!(guest.read(answer, 1), [0], "VIRTIO_BLK_S_OK");
}

fn capacity(guest: &Guest<Block>) -> u64 {
    u64::from_le_bytes(guest.config(0, 8).try_into().unwrap())
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_again() {
    let Some(served) = Served::new("what_is_written_is_on_the_disk_and_is_read_again") else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    assert_eq!(capacity(&guest), SECTORS);
    assert_eq!(guest.config(34, 2), QUEUES.to_le_bytes());
    for features in [0, 1 << 29 | 1 << 12] {
        guest.activate(features);
        for index in 0..QUEUES {
            let mut ring = guest.ring(index);
            let text = [features as u8 ^ 0x40 ^ index as u8; SECTOR];
            let (from, to) = (guest.place(&text), guest.allocate(SECTOR as u64));
            let sector = 5 + u64::from(index);
            request(&mut guest, &mut ring, OUT, sector, from);
            request(&mut guest, &mut ring, FLUSH, 0, 0);
            request(&mut guest, &mut ring, IN, sector, to);
            assert_eq!(guest.read(to, SECTOR), text);
            let at = sector as usize * SECTOR;
            assert_eq!(served.image()[at..at + SECTOR], text);
        }
        guest.device.reset();
    }
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn a_back_end_that_comes_back_goes_on_where_nothing_was_lost() {
    let Some(mut served) = Served::new("a_back_end_that_comes_back_goes_on_where_nothing_was_lost")
    else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    guest.activate(0);
    let mut ring = guest.ring(0);
    let from = guest.place(&[7; SECTOR]);
    request(&mut guest, &mut ring, OUT, 1, from);
    served.program().kill();
    wait_until("seen to be gone", || guest.interrupts().config_count() == 1);
    // Asked for while nobody is there.
    let answer = ask(&mut guest, &mut ring, OUT, 2, from);
    served.start();
    ring.wait();
    assert_eq!(guest.read(answer, 1), [0]);
    assert_eq!(served.image()[SECTOR..3 * SECTOR], [7; 2 * SECTOR]);
    assert_eq!(guest.interrupts().reset_count(), 0);
}

#[test]
fn a_back_end_that_goes_with_a_request_ends_in_a_request_for_a_reset() {
    let name = "a_back_end_that_goes_with_a_request_ends_in_a_request_for_a_reset";
    let Some(mut served) = Served::new(name) else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    guest.activate(0);
    let mut ring = guest.ring(0);
    served.program().signal("STOP");
    let from = guest.place(&[7; SECTOR]);
    ask(&mut guest, &mut ring, OUT, 1, from);
    served.program().kill();
    guest.wait_for_reset_request();
}

#[test]
fn a_stopped_back_end_does_not_hold_a_reset_up_for_ever() {
    let Some(mut served) = Served::new("a_stopped_back_end_does_not_hold_a_reset_up_for_ever")
    else {
        return;
    };
    let mut guest = Guest::shared(served.connect());
    guest.activate(0);
    served.program().signal("STOP");
    guest.device.reset();
}

#[test]
fn a_disk_that_grows_says_so() {
    let folder = folder();
    let peer = Peer::listen(&folder.as_path().join("socket"), SECTORS);
    let mut guest = Guest::shared(Block::connect(peer.socket.clone(), 1, 128).unwrap());
    assert_eq!(capacity(&guest), SECTORS);
    guest.activate(0);
    peer.resize(2 * SECTORS);
    wait_until("told", || guest.interrupts().config_count() > 0);
    assert_eq!(capacity(&guest), 2 * SECTORS);
}

#[test]
fn who_listens_and_does_not_answer_is_refused() {
    let folder = folder();
    let socket = folder.as_path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(matches!(
        Block::connect(socket, 1, 128),
        Err(Error::Refused { .. })
    ));
}
