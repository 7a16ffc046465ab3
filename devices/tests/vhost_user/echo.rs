//! A back end of vhost-user for a network card: what the driver sends comes back to it, on the same pair of queues.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Duration,
};

use vhost::vhost_user::{Listener, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_queue::{QueueOwnedT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The back end, until it is dropped.
pub(crate) struct Echo {
    /// Where it listens.
    pub(crate) socket: PathBuf,
    shutdown: Arc<Mutex<Option<ShutdownHandle>>>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// One that listens at `socket` for one front end, with so many pairs of queues.
    pub(crate) fn listen(socket: &Path, pairs: usize) -> Self {
        let _ = fs::remove_file(socket);
        let mut listener = Listener::new(socket, true).unwrap();
        let shutdown = Arc::new(Mutex::new(None));
        let handle = Arc::clone(&shutdown);
        let thread = thread::spawn(move || {
            let memory = Memory::new(GuestMemoryMmap::new());
            let card = Card {
                pairs,
                memory: memory.clone(),
                event_idx: false,
            };
            let card = Arc::new(Mutex::new(card));
            let mut daemon = VhostUserDaemon::new("echo".into(), card, memory).unwrap();
            daemon.start(&mut listener).unwrap();
            *handle.lock().unwrap() = daemon.shutdown_handle();
            let _ = daemon.wait();
        });
        Self {
            socket: socket.to_owned(),
            shutdown,
            thread: Some(thread),
        }
    }

    /// Ends it.
    pub(crate) fn end(mut self) {
        let shutdown = loop {
            if let Some(shutdown) = self.shutdown.lock().unwrap().take() {
                break shutdown;
            }
            thread::sleep(Duration::from_millis(1));
        };
        shutdown.shutdown();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Card {
    pairs: usize,
    memory: Memory,
    event_idx: bool,
}

impl Card {
    /// Moves what has been sent on `sender` to `receiver`, as far as there is room.
    fn echo(&self, sender: &VringRwLock, receiver: &VringRwLock) {
        let memory = self.memory.memory();
        let (mut sender, mut receiver) = (sender.get_mut(), receiver.get_mut());
        while let Some(sent) = sender.get_queue_mut().iter(&*memory).unwrap().next() {
            let Some(room) = receiver.get_queue_mut().iter(&*memory).unwrap().next() else {
                sender.get_queue_mut().go_to_previous_position();
                break;
            };
            let (from, to) = (sent.head_index(), room.head_index());
            let mut packet = Vec::new();
            let mut reader = Reader::new(&*memory, sent).unwrap();
            io::Read::read_to_end(&mut reader, &mut packet).unwrap();
            let mut writer = Writer::new(&*memory, room).unwrap();
            io::Write::write_all(&mut writer, &packet).unwrap();
            receiver.add_used(to, packet.len() as u32).unwrap();
            sender.add_used(from, 0).unwrap();
        }
        for vring in [&mut sender, &mut receiver] {
            if vring.needs_notification().unwrap() {
                vring.signal_used_queue().unwrap();
            }
        }
    }
}

impl VhostUserBackendMut for Card {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2 * self.pairs
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        // `VIRTIO_F_VERSION_1`, `VIRTIO_F_EVENT_IDX`.
        1 << 32 | 1 << 29 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let pair = usize::from(event / 2);
        self.echo(&vrings[2 * pair + 1], &vrings[2 * pair]);
        Ok(())
    }
}
