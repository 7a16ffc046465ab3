//! A set of CPU numbers, written and read the way the kernel writes and reads it: `0-3,8`.
//!
//! Every placement is made of these, so the operations are word-wise and a set that fits the first 64 CPUs is one word.
//! Nothing here trusts its input: a number beyond [`CpuSet::LIMIT`] is an error, never an allocation.

use std::{
    fmt,
    ops::{BitAnd, BitOr, Sub},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A set of CPU numbers below [`CpuSet::LIMIT`].
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct CpuSet {
    /// Bit `n % 64` of word `n / 64`; never ends with a zero word, so that equal sets are equal words.
    words: Vec<u64>,
}

/// A CPU list that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{part}' is no CPU list: {why} (as in 0-3,8)")]
pub struct CpuSetError {
    part: String,
    why: &'static str,
}

impl CpuSet {
    /// One more than the highest CPU number a set can hold.
    pub const LIMIT: u32 = 4096;

    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { words: Vec::new() }
    }

    /// The set of one CPU; empty if there can be no such CPU.
    #[must_use]
    pub fn one(cpu: u32) -> Self {
        Self::from_iter([cpu])
    }

    /// The CPUs from `0` to `count - 1`.
    #[must_use]
    pub fn first(count: u32) -> Self {
        (0..count.min(Self::LIMIT)).collect()
    }

    /// Adds `cpu`; `false` if it was there, or is [`Self::LIMIT`] or more.
    pub fn insert(&mut self, cpu: u32) -> bool {
        if cpu >= Self::LIMIT {
            return false;
        }
        let (word, bit) = (cpu as usize / 64, 1 << (cpu % 64));
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes `cpu` out; `false` if it was not there.
    pub fn remove(&mut self, cpu: u32) -> bool {
        let was = self.contains(cpu);
        if was {
            self.words[cpu as usize / 64] &= !(1 << (cpu % 64));
            self.trim();
        }
        was
    }

    /// Is `cpu` in the set?
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        self.words
            .get(cpu as usize / 64)
            .is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }

    /// How many CPUs are in the set.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Is nothing in the set?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The lowest CPU.
    #[must_use]
    pub fn lowest(&self) -> Option<u32> {
        self.iter().next()
    }

    /// The highest CPU.
    #[must_use]
    pub fn highest(&self) -> Option<u32> {
        let word = self.words.last()?;
        Some(self.words.len() as u32 * 64 - 1 - word.leading_zeros())
    }

    /// Is every CPU of this set in `other`?
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        self.words.len() <= other.words.len()
            && self
                .words
                .iter()
                .zip(&other.words)
                .all(|(a, b)| a & !b == 0)
    }

    /// Is no CPU of this set in `other`?
    #[must_use]
    pub fn is_disjoint(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).all(|(a, b)| a & b == 0)
    }

    /// Adds every CPU of `other`.
    pub fn add(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    /// Takes every CPU of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
        self.trim();
    }

    /// Keeps only what is in `other` too.
    pub fn retain(&mut self, other: &Self) {
        self.words.truncate(other.words.len());
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= b;
        }
        self.trim();
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            words: &self.words,
            index: 0,
            rest: self.words.first().copied().unwrap_or(0),
        }
    }

    /// As the kernel's `cpu_set_t` lies in memory, for `sched_setaffinity`: 64 CPUs a word, lowest first, no trailing zeros.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// From such words; what lies beyond [`Self::LIMIT`] is left out.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Self {
        let mut set = Self {
            words: words[..words.len().min(Self::LIMIT as usize / 64)].to_vec(),
        };
        set.trim();
        set
    }

    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }
}

/// The CPUs of a set, ascending.
#[derive(Clone, Debug)]
pub struct Iter<'a> {
    words: &'a [u64],
    index: usize,
    rest: u64,
}

impl Iterator for Iter<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        while self.rest == 0 {
            self.index += 1;
            self.rest = *self.words.get(self.index)?;
        }
        let bit = self.rest.trailing_zeros();
        self.rest &= self.rest - 1;
        Some(self.index as u32 * 64 + bit)
    }
}

impl<'a> IntoIterator for &'a CpuSet {
    type Item = u32;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut set = Self::new();
        set.extend(cpus);
        set
    }
}

impl Extend<u32> for CpuSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, cpus: I) {
        for cpu in cpus {
            self.insert(cpu);
        }
    }
}

impl BitAnd for &CpuSet {
    type Output = CpuSet;

    fn bitand(self, other: Self) -> CpuSet {
        let mut set = self.clone();
        set.retain(other);
        set
    }
}

impl BitOr for &CpuSet {
    type Output = CpuSet;

    fn bitor(self, other: Self) -> CpuSet {
        let mut set = self.clone();
        set.add(other);
        set
    }
}

impl Sub for &CpuSet {
    type Output = CpuSet;

    fn sub(self, other: Self) -> CpuSet {
        let mut set = self.clone();
        set.subtract(other);
        set
    }
}

impl fmt::Display for CpuSet {
    /// The kernel's list format; the empty set is the empty string, as in the kernel's files.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut before = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{before}{first}")?,
                _ => write!(f, "{before}{first}-{last}")?,
            }
            before = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    /// Reads `a`, `a-b` and the kernel's strides `a-b:used/group` (the first `used` of every `group` CPUs), separated by commas.
    /// White space around the whole is ignored; the empty string is the empty set.
    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let mut set = Self::new();
        let text = text.trim();
        if text.is_empty() {
            return Ok(set);
        }
        for part in text.split(',') {
            let error = |why| CpuSetError {
                part: part.chars().take(40).collect(),
                why,
            };
            let (range, stride) = match part.split_once(':') {
                Some((range, stride)) => (range, Some(stride)),
                None => (part, None),
            };
            let (first, last) = match range.split_once('-') {
                Some((first, last)) => (number(first), number(last)),
                None if stride.is_some() => return Err(error("a stride needs a range")),
                None => (number(range), number(range)),
            };
            let (first, last) = first.zip(last).ok_or_else(|| error("not a number"))?;
            if last >= Self::LIMIT {
                return Err(error("CPU numbers end at 4095"));
            }
            if first > last {
                return Err(error("the range ends before it begins"));
            }
            let (used, group) = match stride {
                None => (1, 1),
                Some(stride) => stride
                    .split_once('/')
                    .and_then(|(used, group)| number(used).zip(number(group)))
                    .ok_or_else(|| error("a stride is used/group"))?,
            };
            if used == 0 || used > group {
                return Err(error("a stride uses 1 to group CPUs of each group"));
            }
            set.extend((first..=last).filter(|cpu| (cpu - first) % group < used));
        }
        Ok(set)
    }
}

/// A decimal number of digits alone: no sign, no space.
fn number(text: &str) -> Option<u32> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then_some(())?;
    text.parse().ok()
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().expect("a list")
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        assert_eq!(set("0-3,8").iter().collect::<Vec<_>>(), [0, 1, 2, 3, 8]);
        assert_eq!(set("0-10:2/4").to_string(), "0-1,4-5,8-9");
        assert_eq!(set(" 5\n").to_string(), "5");
        assert_eq!(set("\n"), CpuSet::new());
        assert_eq!(set("3,1,2,2").to_string(), "1-3");
        assert_eq!(set("4095").highest(), Some(4095));
    }

    #[test]
    fn refuses_the_rest_and_says_which_part() {
        for bad in [
            ",",
            "1,,2",
            "-1",
            "1-",
            "+1",
            "3-1",
            "4096",
            "0-4294967295",
            "99999999999999999999",
            "1:1/2",
            "0-3:0/2",
            "0-3:3/2",
            "0-3:1/0",
            "0-3:1",
            "0x1",
            "1 2",
            "٣",
        ] {
            assert!(bad.parse::<CpuSet>().is_err(), "{bad}");
        }
        let error = "0-1,7-5".parse::<CpuSet>().expect_err("backwards");
        assert!(error.to_string().contains("7-5"), "{error}");
    }

    #[test]
    fn serde_is_the_list() {
        let json = serde_json::to_string(&set("0-2,9")).expect("writes");
        assert_eq!(json, "\"0-2,9\"");
        assert_eq!(
            serde_json::from_str::<CpuSet>(&json).expect("reads"),
            set("0-2,9")
        );
        assert!(serde_json::from_str::<CpuSet>("\"9-\"").is_err());
        assert!(serde_json::from_str::<CpuSet>("[1]").is_err());
    }

    #[test]
    fn numbers_past_the_limit_are_never_members() {
        let mut cpus = CpuSet::new();
        assert!(!cpus.insert(CpuSet::LIMIT));
        assert!(!cpus.contains(u32::MAX));
        assert!(!cpus.remove(u32::MAX));
        assert!(cpus.is_empty());
        assert_eq!(CpuSet::first(u32::MAX).len(), CpuSet::LIMIT);
        assert_eq!(CpuSet::from_words(&[u64::MAX; 100]).len(), CpuSet::LIMIT);
    }

    proptest! {
        #[test]
        fn any_text_is_a_set_or_an_error(text in "[0-9,:/ \\-x]{0,40}") {
            if let Ok(cpus) = text.parse::<CpuSet>() {
                prop_assert_eq!(set(&cpus.to_string()), cpus);
            }
        }

        #[test]
        fn behaves_as_a_set(a in proptest::collection::btree_set(0u32..300, 0..40),
                            b in proptest::collection::btree_set(0u32..300, 0..40)) {
            let (x, y) = (a.iter().copied().collect::<CpuSet>(), b.iter().copied().collect::<CpuSet>());
            let model = |cpus: &CpuSet| cpus.iter().collect::<std::collections::BTreeSet<_>>();
            prop_assert_eq!(model(&x), a.clone());
            prop_assert_eq!(model(&(&x | &y)), &a | &b);
            prop_assert_eq!(model(&(&x & &y)), &a & &b);
            prop_assert_eq!(model(&(&x - &y)), &a - &b);
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert_eq!(x.is_disjoint(&y), a.is_disjoint(&b));
            prop_assert_eq!(x.len() as usize, a.len());
            prop_assert_eq!(x.highest(), a.last().copied());
            prop_assert_eq!(set(&x.to_string()), x.clone());
            prop_assert_eq!(&(&x - &y) | &(&x & &y), x);
        }
    }
}
