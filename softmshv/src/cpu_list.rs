//! Lists of CPUs as the kernel writes them: "0-3,8".

/// More CPUs than Linux can have.
const LIMIT: usize = 8192;

/// The CPUs of a list, in its order; `None` when it is not one, or empty.
pub(crate) fn parse(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= LIMIT {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_what_is_none() {
        assert_eq!(parse("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse("5"), Some(vec![5]));
        for none in ["", "3-1", "a", "0-99999999", "1,,2", "-1"] {
            assert_eq!(parse(none), None, "{none:?}");
        }
    }
}
