//! CPUs shared with others: each vCPU gets a part of a pool, no two vCPUs of a VM the same part, so that they cannot be
//! stacked on one CPU and Linux is still free to balance within each part. More vCPUs than CPUs get the whole pool: pinned one
//! by one, some would have half of what the others have.

use super::space::{Full, Space, Vcpu, WHOLE};
use crate::{Cpu, CpuSet};

/// Why `count` vCPUs cannot share a pool.
#[derive(Clone, Debug)]
pub(super) struct Crowded {
    /// What ran out first.
    pub(super) full: Full,
    /// Where.
    pub(super) cpus: CpuSet,
}

/// A set for each of `count` vCPUs out of `pool`, which is in topological order and not empty.
pub(super) fn share(
    space: &Space<'_>,
    pool: &[Cpu],
    count: u32,
    vcpu: Vcpu,
) -> Result<Vec<CpuSet>, Crowded> {
    if count as usize > pool.len() {
        return whole(space, pool, count, vcpu);
    }
    let mut left = pool.to_vec();
    let mut crowded = None;
    // What a round refuses makes the parts of the next round smaller, and their load higher.
    while left.len() >= count as usize {
        let parts = cut(space, &left, count, vcpu);
        let mut full = CpuSet::new();
        for part in &parts {
            for cpu in *part {
                if let Err(why) = space.accepts(cpu.id, vcpu, 1, part.len() as u32) {
                    full.insert(cpu.id);
                    crowded.get_or_insert(why);
                }
            }
        }
        if full.is_empty() {
            return Ok(parts.into_iter().map(numbers).collect());
        }
        left.retain(|cpu| !full.contains(cpu.id));
    }
    // Cutting in topological order may waste room that pins find.
    if let Ok(pins) = pin_least_loaded(space, pool, count, vcpu) {
        return Ok(pins);
    }
    Err(Crowded {
        full: crowded.unwrap_or(Full::Overcommit),
        cpus: numbers(pool),
    })
}

/// The whole pool for each vCPU, less what is full.
fn whole(space: &Space<'_>, pool: &[Cpu], count: u32, vcpu: Vcpu) -> Result<Vec<CpuSet>, Crowded> {
    let mut left = pool.to_vec();
    let mut crowded = Full::Overcommit;
    while !left.is_empty() {
        let before = left.len();
        left.retain(
            |cpu| match space.accepts(cpu.id, vcpu, count, before as u32) {
                Ok(()) => true,
                Err(why) => {
                    crowded = why;
                    false
                }
            },
        );
        if left.len() == before {
            return Ok(vec![numbers(&left); count as usize]);
        }
    }
    Err(Crowded {
        full: crowded,
        cpus: numbers(pool),
    })
}

/// One CPU each, those with the least load.
fn pin_least_loaded(
    space: &Space<'_>,
    pool: &[Cpu],
    count: u32,
    vcpu: Vcpu,
) -> Result<Vec<CpuSet>, ()> {
    let mut free: Vec<u32> = pool
        .iter()
        .map(|cpu| cpu.id)
        .filter(|cpu| space.accepts(*cpu, vcpu, 1, 1).is_ok())
        .collect();
    if free.len() < count as usize {
        return Err(());
    }
    free.sort_by_key(|cpu| space.load(*cpu));
    free.truncate(count as usize);
    Ok(free.into_iter().map(CpuSet::one).collect())
}

/// Cuts `pool` into `count` runs of neighbours with about the same room each; between cores where there are enough of them.
fn cut<'p>(space: &Space<'_>, pool: &'p [Cpu], count: u32, vcpu: Vcpu) -> Vec<&'p [Cpu]> {
    if count == 1 {
        return vec![pool];
    }
    let cores = pool.chunk_by(|a, b| a.core == b.core).count();
    let units: Vec<&[Cpu]> = if cores >= count as usize {
        pool.chunk_by(|a, b| a.core == b.core).collect()
    } else {
        pool.chunks(1).collect()
    };
    let room = |unit: &[Cpu]| -> u64 {
        let room = |cpu: &Cpu| space.limit(cpu.id, vcpu).saturating_sub(space.load(cpu.id));
        unit.iter()
            .map(|cpu| u64::from(room(cpu).max(WHOLE / 100)))
            .sum()
    };
    let total: u64 = units.iter().map(|unit| room(unit)).sum();
    let mut parts = Vec::with_capacity(count as usize);
    let (mut start, mut end, mut before) = (0, 0, 0);
    for (index, unit) in units.iter().enumerate() {
        let open = u64::from(count) - parts.len() as u64;
        let room = room(unit);
        let must = (units.len() - index) as u64 == open - 1;
        let boundary = total * (parts.len() as u64 + 1) / u64::from(count);
        if end > start && open > 1 && (must || before + room / 2 > boundary) {
            parts.push(&pool[start..end]);
            start = end;
        }
        end += unit.len();
        before += room;
    }
    parts.push(&pool[start..end]);
    parts
}

/// The sets a VM had, made to fit a pool that has changed: what is gone is left out, what is new goes to the smallest sets.
/// `None` if a vCPU would be left without a CPU or the parts would become very unequal.
pub(super) fn refit(
    space: &Space<'_>,
    had: &[&CpuSet],
    pool: &CpuSet,
    vcpu: Vcpu,
) -> Option<Vec<CpuSet>> {
    let count = had.len();
    if count > pool.len() as usize {
        return None;
    }
    let mut sets: Vec<CpuSet> = had.iter().map(|set| *set & pool).collect();
    let mut sizes: Vec<u32> = sets.iter().map(CpuSet::len).collect();
    let mut seen = CpuSet::new();
    for set in &sets {
        if set.is_empty() || !set.is_disjoint(&seen) {
            return None;
        }
        seen.add(set);
    }
    let new = pool - &seen;
    if !new.is_empty() {
        for cpu in space.ordered(&new).iter() {
            let least = (0..count).min_by_key(|index| sizes[*index])?;
            sets[least].insert(cpu.id);
            sizes[least] += 1;
        }
    }
    let (least, most) = (sizes.iter().min()?, sizes.iter().max()?);
    let fits = sets.iter().zip(&sizes).all(|(set, size)| {
        set.iter()
            .all(|cpu| space.accepts(cpu, vcpu, 1, *size).is_ok())
    });
    (*most <= 2 * least + 1 && fits).then_some(sets)
}

pub(super) fn numbers(cpus: &[Cpu]) -> CpuSet {
    cpus.iter().map(|cpu| cpu.id).collect()
}
