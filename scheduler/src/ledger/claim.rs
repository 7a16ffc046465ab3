//! A VM's entry in the ledger, from the plan to the end of the VM.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use super::{Ledger, LedgerEntry, LedgerError, LedgerState, Owner, Rotation};
use crate::{Plan, Rejection, VmId, VmPlan};

/// Why there is no claim.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// There is no such plan.
    #[error("the request cannot be met: {}", reasons(.0))]
    Rejected(Box<Rejection>),
    /// There is a VM of that name already.
    #[error("process {pid} runs a VM named {vm}: give this one another name (--name NAME)")]
    Taken {
        /// The name.
        vm: VmId,
        /// Who runs it.
        pid: u32,
    },
    /// The plan is for several VMs, or none.
    #[error("a claim is for one VM, and the plan has {0}")]
    NotOne(usize),
}

fn reasons(rejection: &Rejection) -> String {
    let reasons: Vec<&str> = rejection
        .reasons
        .iter()
        .map(|reason| reason.detail.as_str())
        .collect();
    reasons.join("; ")
}

/// What one VM has been given. It is given back when this is dropped, or when the process ends in whatever way.
#[derive(Debug)]
pub struct Claim {
    entry: Entry,
    plan: Mutex<VmPlan>,
}

/// Where a VM's entry is.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    ledger: Ledger,
    owner: Owner,
    vm: VmId,
}

impl Ledger {
    /// Plans one VM and writes its plan down, with nobody else doing so at the same time. `plan` gets what the others have; it
    /// may be called again by another process only after the result is in the file.
    ///
    /// # Errors
    /// What `plan` rejects, or a ledger that cannot be used. Then nothing is written.
    pub fn claim(
        &self,
        owner: Owner,
        plan: impl FnOnce(&LedgerState) -> Result<Plan, Rejection>,
    ) -> Result<Claim, ClaimError> {
        let plan = self.update(|state| {
            let plan =
                plan(state).map_err(|rejection| ClaimError::Rejected(Box::new(rejection)))?;
            write_down(state, &owner, plan)
        })?;
        Ok(Claim {
            entry: Entry {
                ledger: self.clone(),
                owner,
                vm: plan.request.vm.clone(),
            },
            plan: Mutex::new(plan),
        })
    }
}

/// Writes down what a plan makes of the plans of others.
fn adjust(state: &mut LedgerState, adjusted: Vec<VmPlan>) {
    for plan in adjusted {
        let mut entries = state.entries.iter_mut();
        if let Some(entry) = entries.find(|entry| entry.plan.request.vm == plan.request.vm) {
            entry.plan = plan;
        }
    }
}

/// Puts the plan of `owner`'s VM in the place of the one it had, and what that changes for others in theirs. How the VM takes turns
/// stays.
fn write_down(
    state: &mut LedgerState,
    owner: &Owner,
    mut plan: Plan,
) -> Result<VmPlan, ClaimError> {
    let Some(own) = plan.vms.pop().filter(|_| plan.vms.is_empty()) else {
        return Err(ClaimError::NotOne(plan.vms.len()));
    };
    let had = state.entry(&own.request.vm);
    if let Some(entry) = had
        && entry.owner != *owner
    {
        return Err(ClaimError::Taken {
            vm: own.request.vm,
            pid: entry.owner.pid,
        });
    }
    let rotation = had.and_then(|entry| entry.rotation.clone());
    let groups = had.map_or_else(Vec::new, |entry| entry.groups.clone());
    adjust(state, plan.adjusted);
    state
        .entries
        .retain(|entry| entry.plan.request.vm != own.request.vm);
    state.entries.push(LedgerEntry {
        owner: owner.clone(),
        plan: own.clone(),
        rotation,
        groups,
    });
    Ok(own)
}

impl Claim {
    /// The plan as this process made it last.
    #[must_use]
    pub fn plan(&self) -> VmPlan {
        self.plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Plans the VM again, which is to be another now, and writes that down. `plan` gets what all VMs have, also this one.
    ///
    /// # Errors
    /// What `plan` rejects, or a ledger that cannot be used. Then the VM has what it had.
    pub fn replan(
        &self,
        plan: impl FnOnce(&LedgerState) -> Result<Plan, Rejection>,
    ) -> Result<VmPlan, ClaimError> {
        let plan = self.entry.ledger.update(|state| {
            let plan =
                plan(state).map_err(|rejection| ClaimError::Rejected(Box::new(rejection)))?;
            write_down(state, &self.entry.owner, plan)
        })?;
        self.plan
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&plan);
        Ok(plan)
    }

    /// The ledger it is in.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.entry.ledger
    }

    /// Who holds it.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.entry.owner
    }

    /// The plan as it is now: others may have changed it on making theirs.
    ///
    /// # Errors
    /// The ledger cannot be used.
    pub fn current(&self) -> Result<Option<VmPlan>, LedgerError> {
        self.entry.plan()
    }

    pub(crate) fn entry(&self) -> &Entry {
        &self.entry
    }
}

impl Entry {
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Is it this one?
    pub(crate) fn is(&self, entry: &LedgerEntry) -> bool {
        entry.owner == self.owner && entry.plan.request.vm == self.vm
    }

    pub(crate) fn plan(&self) -> Result<Option<VmPlan>, LedgerError> {
        let state = self.ledger.read()?;
        Ok(state
            .entries
            .into_iter()
            .find(|entry| self.is(entry))
            .map(|entry| entry.plan))
    }

    /// Plans this VM anew, with nobody else doing so at the same time, unless `plan` finds that there is no need. Was there?
    pub(crate) fn replan(
        &self,
        plan: impl FnOnce(&LedgerState, &VmPlan) -> Option<Plan>,
    ) -> Result<bool, LedgerError> {
        self.ledger.update(|state| {
            let own = state.entries.iter().position(|entry| self.is(entry));
            let Some(index) = own else {
                return Ok(false);
            };
            let Some(plan) = plan(state, &state.entries[index].plan) else {
                return Ok(false);
            };
            adjust(state, plan.adjusted);
            if let Some(own) = plan.vms.into_iter().next() {
                state.entries[index].plan = own;
            }
            Ok(true)
        })
    }

    /// Tells the others how this VM takes turns with them.
    pub(crate) fn set_rotation(&self, rotation: Option<Rotation>) -> Result<(), LedgerError> {
        self.change(|entry| entry.rotation = rotation)
    }

    /// Tells the others what to remove should this process not be able to.
    pub(crate) fn set_groups(&self, groups: Vec<PathBuf>) -> Result<(), LedgerError> {
        self.change(|entry| entry.groups = groups)
    }

    /// Tells the others what turns have gained.
    pub(crate) fn set_gain(&self, gain_milli: i32) -> Result<(), LedgerError> {
        self.change(|entry| {
            if let Some(rotation) = &mut entry.rotation {
                rotation.gain_milli = Some(gain_milli);
            }
        })
    }

    fn change(&self, change: impl FnOnce(&mut LedgerEntry)) -> Result<(), LedgerError> {
        self.ledger.update(|state| {
            if let Some(entry) = state.entries.iter_mut().find(|entry| self.is(entry)) {
                change(entry);
            }
            Ok(())
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // A ledger that cannot be changed now will be by the next one that can, which finds this process gone.
        let _ = self.entry.ledger.update::<_, LedgerError>(|state| {
            state.entries.retain(|entry| !self.entry.is(entry));
            Ok(())
        });
    }
}
