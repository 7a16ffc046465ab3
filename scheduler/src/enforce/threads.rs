//! What a thread itself is told: where it may run, in which class, how long at a time, and with whom on a core.

use std::io;

use crate::{
    CpuSet, Deadline, Tid,
    sys::{self, Attributes},
};

const SCHED_OTHER: u32 = libc::SCHED_OTHER as u32;
const SCHED_FIFO: u32 = libc::SCHED_FIFO as u32;
const SCHED_DEADLINE: u32 = libc::SCHED_DEADLINE as u32;

/// How a thread competes for its CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Class {
    /// With everybody, by weight.
    #[default]
    Fair,
    /// Before everybody of a lower priority, until it blocks.
    Fifo(u8),
    /// With a guarantee.
    Deadline(Deadline),
}

/// What a thread is told.
#[derive(Clone, Debug, Default)]
pub(super) struct ThreadControls {
    pub(super) cpus: Option<CpuSet>,
    pub(super) class: Class,
    /// Fair class: what slice to ask for.
    pub(super) slice_us: Option<u32>,
    /// Fair class: nice value, where no group has a weight.
    pub(super) nice: Option<i32>,
}

impl ThreadControls {
    /// Tells the thread where it may run, and says where that is. `None` if that is left to the kernel.
    pub(super) fn place(&self, tid: Tid) -> io::Result<Option<CpuSet>> {
        let Some(cpus) = &self.cpus else {
            return Ok(None);
        };
        sys::set_affinity(tid, cpus)?;
        sys::affinity(tid).map(Some)
    }

    /// Tells the thread how it competes, and says what it has. `None` if that is left to the kernel.
    pub(super) fn classify(&self, tid: Tid) -> io::Result<Option<Attributes>> {
        if self.class == Class::Fair && self.slice_us.is_none() && self.nice.is_none() {
            return Ok(None);
        }
        let has = sys::attributes(tid)?;
        let wanted = self.attributes(has.nice);
        sys::set_attributes(tid, &wanted)?;
        let is = sys::attributes(tid)?;
        let same = is.policy == wanted.policy
            && is.priority == wanted.priority
            && (is.policy != SCHED_OTHER || is.nice == wanted.nice);
        if same {
            return Ok(Some(is));
        }
        Err(io::Error::other(
            "the kernel took it and reads back otherwise",
        ))
    }

    fn attributes(&self, nice: i32) -> Attributes {
        let none = Attributes {
            policy: SCHED_OTHER,
            flags: 0,
            nice,
            priority: 0,
            runtime_ns: 0,
            deadline_ns: 0,
            period_ns: 0,
        };
        match self.class {
            Class::Fair => Attributes {
                nice: self.nice.unwrap_or(nice),
                runtime_ns: self.slice_us.map_or(0, |us| u64::from(us) * 1000),
                ..none
            },
            Class::Fifo(priority) => Attributes {
                policy: SCHED_FIFO,
                priority: priority.into(),
                ..none
            },
            Class::Deadline(deadline) => Attributes {
                policy: SCHED_DEADLINE,
                runtime_ns: deadline.runtime_us * 1000,
                deadline_ns: deadline.deadline_us * 1000,
                period_ns: deadline.period_us * 1000,
                ..none
            },
        }
    }
}

/// What a thread had, to be given back.
#[derive(Clone, Debug)]
pub(super) struct Before {
    tid: Tid,
    cpus: CpuSet,
    attributes: Attributes,
}

impl Before {
    pub(super) fn of(tid: Tid) -> io::Result<Self> {
        let mut attributes = sys::attributes(tid)?;
        if attributes.policy == SCHED_OTHER {
            // The kernel tells its own slice too; set, it would stay.
            attributes.runtime_ns = 0;
        }
        Ok(Self {
            tid,
            cpus: sys::affinity(tid)?,
            attributes,
        })
    }

    /// The same place for another thread, which keeps how it competes.
    pub(super) fn placed(&self, tid: Tid) -> Self {
        Self {
            tid,
            cpus: self.cpus.clone(),
            attributes: sys::attributes(tid).unwrap_or(self.attributes),
        }
    }

    /// A thread that has ended needs nothing.
    pub(super) fn restore(&self) {
        let _ = sys::set_attributes(self.tid, &self.attributes);
        let _ = sys::set_affinity(self.tid, &self.cpus);
    }
}

/// The nice value whose weight is nearest to `weight` (100 is nice 0; each step is a factor of 1.25), and that weight.
pub(super) fn nice_for(weight: u32) -> (i32, f64) {
    let steps = (f64::from(weight) / 100.0).ln() / 1.25f64.ln();
    let nice = (-steps.round() as i32).clamp(-20, 19);
    (nice, 100.0 * 1.25f64.powi(-nice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_become_nice_values() {
        assert_eq!(nice_for(100).0, 0);
        assert_eq!(nice_for(300).0, -5);
        assert_eq!(nice_for(1).0, 19);
        assert_eq!(nice_for(10_000).0, -20);
        assert!((nice_for(300).1 - 305.2).abs() < 0.1);
    }

    #[test]
    fn a_slice_is_asked_for_and_read_back_where_the_kernel_has_them() {
        let sliced = std::thread::spawn(|| {
            let me = Tid::current();
            let before = Before::of(me).unwrap();
            let controls = ThreadControls {
                slice_us: Some(20_000),
                ..ThreadControls::default()
            };
            let is = controls.classify(me).unwrap().unwrap();
            before.restore();
            assert_ne!(sys::attributes(me).unwrap().runtime_ns, 20_000_000);
            is.runtime_ns == 20_000_000
        })
        .join()
        .unwrap();
        if !sliced {
            rota_tests::requires::skip("this kernel has no custom slices");
        }
    }
}
