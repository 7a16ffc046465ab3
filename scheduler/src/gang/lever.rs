//! What holds a VM's vCPUs back while it is not their turn, and lets them go: three levers, of which the first that works is used.
//!
//! All three leave a CPU to them that nobody else wants, so no time is wasted; and held back is not stopped.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use crate::{
    Tid,
    sys::{self, Attributes},
};

/// Which lever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeverKind {
    /// `cpu.idle` of the group: one write, no privilege in a delegated subtree.
    GroupIdle,
    /// `SCHED_IDLE` for each thread. To leave it again takes a privilege.
    ThreadIdle,
    /// Nice 19 for each thread; the same.
    ThreadNice,
}

impl LeverKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GroupIdle => "cpu.idle",
            Self::ThreadIdle => "SCHED_IDLE",
            Self::ThreadNice => "nice 19",
        }
    }

    /// Does it work on a thread, there and back?
    pub(crate) fn rehearse(self, tid: Tid) -> io::Result<()> {
        let before = sys::attributes(tid)?;
        self.set(tid, &before, true)?;
        self.set(tid, &before, false)
    }

    fn set(self, tid: Tid, normal: &Attributes, held_back: bool) -> io::Result<()> {
        let wanted = match (self, held_back) {
            (Self::GroupIdle, _) => return Ok(()),
            (_, false) => *normal,
            (Self::ThreadIdle, true) => Attributes {
                policy: libc::SCHED_IDLE as u32,
                ..*normal
            },
            (Self::ThreadNice, true) => Attributes {
                nice: 19,
                ..*normal
            },
        };
        sys::set_attributes(tid, &wanted)
    }
}

/// A lever on one group of vCPUs.
pub(crate) enum Lever {
    /// On a group.
    Group {
        /// `cpu.idle`.
        idle: File,
        /// The weight, and what it is to be: `cpu.idle` forgets it.
        weight: File,
        /// What to write there.
        weight_text: String,
    },
    /// On threads, with what they are when it is their turn.
    Threads {
        /// How.
        kind: LeverKind,
        /// Whom.
        threads: Vec<(Tid, Attributes)>,
    },
}

impl Lever {
    /// On the group at `path`, whose weight is `weight` (100 is everybody's).
    pub(crate) fn on_group(path: &Path, version: u8, weight: u32) -> io::Result<Self> {
        let open = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path.join(name))
        };
        let (name, value) = match version {
            1 => ("cpu.shares", (u64::from(weight) * 1024 + 50) / 100),
            _ => ("cpu.weight", weight.into()),
        };
        Ok(Self::Group {
            idle: open("cpu.idle")?,
            weight: open(name)?,
            weight_text: value.to_string(),
        })
    }

    /// On threads, which ask for slices of `slice_us`.
    pub(crate) fn on_threads(kind: LeverKind, threads: &[Tid], slice_us: Option<u32>) -> Self {
        let normal = |tid: &Tid| {
            let attributes = Attributes {
                runtime_ns: slice_us.map_or(0, |us| u64::from(us) * 1000),
                ..sys::attributes(*tid).ok()?
            };
            Some((*tid, attributes))
        };
        let threads = threads.iter().filter_map(normal).collect();
        Self::Threads { kind, threads }
    }

    /// Holds back, or lets go.
    pub(crate) fn set(&self, held_back: bool) -> io::Result<()> {
        match self {
            Self::Group {
                idle,
                weight,
                weight_text,
            } => {
                idle.write_all_at(if held_back { b"1" } else { b"0" }, 0)?;
                if !held_back {
                    weight.write_all_at(weight_text.as_bytes(), 0)?;
                }
                Ok(())
            }
            Self::Threads { kind, threads } => {
                for (tid, normal) in threads {
                    match kind.set(*tid, normal, held_back) {
                        // It has ended.
                        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                        result => result?,
                    }
                }
                Ok(())
            }
        }
    }
}
