//! Whose turn it is, as a pure function of who there is: every process computes the same table from the ledger, and reads its own
//! row off by the clock. Nobody leads, and nobody's death stops the others.

use crate::CpuSet;

/// Something that gets its turn as a whole: a gang, or one vCPU of a VM whose vCPUs take turns one by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contender {
    /// The CPUs of each of its vCPUs.
    pub(crate) vcpus: Vec<CpuSet>,
    /// Share of turns.
    pub(crate) weight: u32,
}

impl Contender {
    fn cpus(&self) -> CpuSet {
        self.vcpus
            .iter()
            .fold(CpuSet::new(), |all, cpus| &all | cpus)
    }
}

/// Rows of a table: enough to divide among 1 to 6, 8, 10, 12 contenders without a rest.
const ROWS: usize = 240;

/// Who is on its turn, for one row after the other, and again from the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turns {
    rows: Vec<Vec<bool>>,
}

impl Turns {
    /// In each row, those who have had least of their share so far come first, and everybody who still fits beside them comes
    /// along: a CPU is one contender's at a time, and none that somebody waits for stays without.
    pub(crate) fn new(contenders: &[Contender]) -> Self {
        let mut served = vec![0.0; contenders.len()];
        let rows = (0..ROWS)
            .map(|_| {
                let mut order: Vec<usize> = (0..contenders.len()).collect();
                order.sort_by(|a, b| f64::total_cmp(&served[*a], &served[*b]).then(a.cmp(b)));
                let mut taken = CpuSet::new();
                let mut row = vec![false; contenders.len()];
                for index in order {
                    let contender = &contenders[index];
                    if let Some(with) = seat(contender, &taken) {
                        taken = with;
                        row[index] = true;
                        served[index] += 1.0 / f64::from(contender.weight.max(1));
                    }
                }
                row
            })
            .collect();
        Self { rows }
    }

    /// Is everybody always on its turn?
    pub(crate) fn is_trivial(&self) -> bool {
        self.rows.iter().flatten().all(|on| *on)
    }

    /// The row of the `epoch`th quantum.
    pub(crate) fn row(&self, epoch: u64) -> &[bool] {
        &self.rows[(epoch % ROWS as u64) as usize]
    }
}

/// Finds each vCPU of `contender` a CPU that is not in `taken`; all that are taken then. A contender that is wider than its CPUs
/// gets them all if it is the first there.
fn seat(contender: &Contender, taken: &CpuSet) -> Option<CpuSet> {
    let mut vcpus: Vec<&CpuSet> = contender.vcpus.iter().collect();
    vcpus.sort_by_key(|cpus| cpus.len());
    let mut with = taken.clone();
    for cpus in vcpus {
        match cpus.iter().find(|cpu| !with.contains(*cpu)) {
            Some(cpu) => {
                with.insert(cpu);
            }
            None => {
                let all = contender.cpus();
                return all.is_disjoint(taken).then(|| taken | &all);
            }
        }
    }
    Some(with)
}

/// Those of `contenders` that `own` has to do with: they share CPUs with it, or with somebody who does. In their order.
pub(crate) fn neighbours(contenders: &[Contender], own: impl Fn(usize) -> bool) -> Vec<usize> {
    let mut near: Vec<bool> = (0..contenders.len()).map(own).collect();
    let mut cpus = CpuSet::new();
    for (contender, _) in contenders.iter().zip(&near).filter(|(_, near)| **near) {
        cpus.add(&contender.cpus());
    }
    loop {
        let more: Vec<usize> = (0..contenders.len())
            .filter(|index| !near[*index] && !contenders[*index].cpus().is_disjoint(&cpus))
            .collect();
        if more.is_empty() {
            return (0..contenders.len()).filter(|index| near[*index]).collect();
        }
        for index in more {
            near[index] = true;
            cpus.add(&contenders[index].cpus());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gang(vcpus: &[&str]) -> Contender {
        Contender {
            vcpus: vcpus.iter().map(|cpus| cpus.parse().unwrap()).collect(),
            weight: 100,
        }
    }

    fn share(turns: &Turns, index: usize) -> f64 {
        let on = turns.rows.iter().filter(|row| row[index]).count();
        on as f64 / ROWS as f64
    }

    #[test]
    fn gangs_on_the_same_cpus_alternate() {
        let turns = Turns::new(&[gang(&["0", "1"]), gang(&["0", "1"])]);
        assert_eq!(turns.row(0), [true, false]);
        assert_eq!(turns.row(1), [false, true]);
        assert_eq!(turns.row(ROWS as u64), turns.row(0));
        assert!(!turns.is_trivial());
    }

    #[test]
    fn gangs_beside_each_other_need_no_turns() {
        assert!(Turns::new(&[gang(&["0", "1"]), gang(&["2", "3"])]).is_trivial());
        assert!(Turns::new(&[]).is_trivial());
    }

    #[test]
    fn a_chain_is_fair_to_its_middle() {
        let turns = Turns::new(&[gang(&["0", "1"]), gang(&["1", "2"]), gang(&["2", "3"])]);
        assert_eq!([0, 1, 2].map(|index| share(&turns, index)), [0.5; 3]);
    }

    #[test]
    fn three_vcpus_on_two_cpus_have_two_thirds_each() {
        let single = || gang(&["0-1"]);
        let turns = Turns::new(&[single(), single(), single()]);
        for index in 0..3 {
            assert!((share(&turns, index) - 2.0 / 3.0).abs() < 0.01);
        }
    }

    #[test]
    fn weights_are_shares_of_turns() {
        let heavy = Contender {
            weight: 300,
            ..gang(&["0"])
        };
        let turns = Turns::new(&[heavy, gang(&["0"])]);
        assert!((share(&turns, 0) - 0.75).abs() < 0.01);
    }

    #[test]
    fn a_gang_wider_than_its_cpus_has_them_to_itself() {
        let turns = Turns::new(&[gang(&["0-1", "0-1", "0-1"]), gang(&["0"])]);
        assert_eq!([share(&turns, 0), share(&turns, 1)], [0.5; 2]);
    }

    #[test]
    fn strangers_are_left_out() {
        let all = [gang(&["0"]), gang(&["4"]), gang(&["0", "1"]), gang(&["1"])];
        assert_eq!(neighbours(&all, |index| index == 0), [0, 2, 3]);
        assert_eq!(neighbours(&all, |index| index == 1), [1]);
    }

    fn contenders() -> impl Strategy<Value = Vec<Contender>> {
        let cpus = proptest::collection::btree_set(0u32..6, 1..4);
        let vcpus = proptest::collection::vec(cpus, 1..4);
        let weight = prop_oneof![Just(100u32), 50u32..400];
        proptest::collection::vec((vcpus, weight), 1..7).prop_map(|contenders| {
            contenders
                .into_iter()
                .map(|(vcpus, weight)| Contender {
                    vcpus: vcpus
                        .into_iter()
                        .map(|cpus| cpus.into_iter().collect())
                        .collect(),
                    weight,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn nobody_starves_and_no_row_is_overfull(contenders in contenders()) {
            let turns = Turns::new(&contenders);
            for row in &turns.rows {
                let on: Vec<&Contender> = contenders
                    .iter()
                    .zip(row)
                    .filter_map(|(contender, on)| on.then_some(contender))
                    .collect();
                prop_assert!(!on.is_empty());
                let all = on.iter().fold(CpuSet::new(), |all, one| &all | &one.cpus());
                let seats: usize = on
                    .iter()
                    .map(|one| one.vcpus.len().min(one.cpus().len() as usize))
                    .sum();
                prop_assert!(seats <= all.len() as usize);
            }
            for index in 0..contenders.len() {
                prop_assert!(share(&turns, index) > 0.0);
            }
        }
    }
}
