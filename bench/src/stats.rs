//! Medians, their confidence, and fairness.

/// Numbers that look random and are the same every time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Puts `items` in another order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// A median and the interval that it is in with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Median {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    pub(crate) runs: usize,
}

const RESAMPLES: usize = 2000;

impl Median {
    /// Of these values, with a percentile bootstrap; `None` of none.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        let value = middle(&mut sorted)?;
        let mut random = Random(values.len() as u64);
        let mut again = vec![0.0; values.len()];
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                for slot in &mut again {
                    *slot = values[random.below(values.len())];
                }
                middle(&mut again)
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        Some(Self {
            value,
            low: quantile(&medians, 0.025)?,
            high: quantile(&medians, 0.975)?,
            least: *sorted.first()?,
            most: *sorted.last()?,
            runs: values.len(),
        })
    }
}

/// The median; `values` are sorted afterwards.
pub(crate) fn middle(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[half]),
        _ => Some(f64::midpoint(values[half - 1], values[half])),
    }
}

/// The value below which a `part` of the sorted values is.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * part).round() as usize).copied()
}

/// Jain's index: 1 where everybody has the same, 1/n where one has everything.
pub(crate) fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    if squares == 0.0 {
        return 0.0;
    }
    sum * sum / (shares.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_lies_in_its_interval() {
        let values: Vec<f64> = (1..=15).map(f64::from).collect();
        let median = Median::of(&values).unwrap();
        assert_eq!(median.value, 8.0);
        assert!(median.low < 8.0 && median.high > 8.0, "{median:?}");
        assert!(median.low >= 3.0 && median.high <= 13.0, "{median:?}");
        assert_eq!(Median::of(&[]), None);
    }

    #[test]
    fn fairness_is_one_among_equals() {
        assert_eq!(jain(&[2.0, 2.0, 2.0]), 1.0);
        assert_eq!(jain(&[1.0, 0.0]), 0.5);
    }

    #[test]
    fn a_shuffle_loses_nothing() {
        let mut items = [1, 2, 3, 4, 5];
        Random(1).shuffle(&mut items);
        items.sort_unstable();
        assert_eq!(items, [1, 2, 3, 4, 5]);
    }
}
