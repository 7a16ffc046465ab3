//! cloud-hypervisor's way of saying which vCPU runs where: `affinity=[0@[0-3,8],1@2]` and `core_scheduling=vm|vcpu|off`.
//!
//! Everything cloud-hypervisor reads is read here and means the same, and a little more (white space after commas, as its
//! own documentation writes it, and a single vCPU without the outer brackets). What differs: a vCPU named twice is refused,
//! where cloud-hypervisor silently takes the last.

use std::fmt;

use super::SmtIsolation;
use crate::CpuSet;

/// Reads an affinity list.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn parse(text: &str) -> Result<Vec<(u32, CpuSet)>, String> {
    let text = text.trim();
    let body = match text.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .ok_or("the list has no end: [0@[0-1],1@[2,3]]")?,
        None => text,
    };
    let mut map: Vec<(u32, CpuSet)> = Vec::new();
    for pair in split(body)? {
        let pair = pair.trim();
        let (vcpu, cpus) = pair
            .split_once('@')
            .ok_or_else(|| format!("'{pair}' is not VCPU@[CPUS]"))?;
        let vcpu: u32 = vcpu
            .trim()
            .parse()
            .map_err(|_| format!("'{vcpu}' is not the number of a vCPU"))?;
        if map.iter().any(|(named, _)| *named == vcpu) {
            return Err(format!("vCPU {vcpu} is named twice"));
        }
        let list: String = cpus
            .trim()
            .trim_matches(['[', ']'])
            .chars()
            .filter(|c| !c.is_whitespace())
            .collect();
        let cpus: CpuSet = list
            .parse()
            .map_err(|error| format!("vCPU {vcpu}: {error}"))?;
        if cpus.is_empty() {
            return Err(format!("vCPU {vcpu} has no CPU"));
        }
        map.push((vcpu, cpus));
    }
    Ok(map)
}

/// Reads `core_scheduling=`.
///
/// # Errors
///
/// What is allowed.
pub fn parse_core_scheduling(text: &str) -> Result<SmtIsolation, String> {
    match text.to_ascii_lowercase().as_str() {
        "vm" => Ok(SmtIsolation::Vm),
        "vcpu" => Ok(SmtIsolation::Vcpu),
        "off" => Ok(SmtIsolation::Off),
        _ => Err(format!("'{text}' is not vm, vcpu or off")),
    }
}

/// Splits at the commas that are not inside brackets.
pub(crate) fn split(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0u32, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' => depth += 1,
            b']' => depth = depth.checked_sub(1).ok_or("a ] without its [")?,
            b',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err("a [ without its ]".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// Prints a map as [`parse`] reads it.
pub(super) struct Map<'a>(pub(super) &'a [(u32, CpuSet)]);

impl fmt::Display for Map<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = "[";
        for (vcpu, cpus) in self.0 {
            write!(f, "{before}{vcpu}@[{cpus}]")?;
            before = ",";
        }
        f.write_str(if self.0.is_empty() { "[]" } else { "]" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> String {
        parse(text).map_or_else(|why| format!("error: {why}"), |map| Map(&map).to_string())
    }

    #[test]
    fn reads_what_cloud_hypervisor_reads() {
        for (text, expected) in [
            ("[0@[0,2],1@[1,3]]", "[0@[0,2],1@[1,3]]"),
            ("[0@[0-4]]", "[0@[0-4]]"),
            ("[2@[0-99,255]]", "[2@[0-99,255]]"),
            ("[7@5]", "[7@[5]]"),
            ("[0@[2,3], 1@[0,1] ,\t2@[4]]", "[0@[2-3],1@[0-1],2@[4]]"),
        ] {
            assert_eq!(map(text), expected, "{text}");
        }
    }

    #[test]
    fn reads_what_its_documentation_writes() {
        assert_eq!(map("0@[0-4]"), "[0@[0-4]]");
        assert_eq!(map("[0@[2, 3], 1@[0, 1]]"), "[0@[2-3],1@[0-1]]");
    }

    #[test]
    fn refuses_the_rest() {
        for bad in [
            "",
            "[]",
            "[0]",
            "[0@]",
            "[0@[]]",
            "[@[1]]",
            "[x@[1]]",
            "[0@[1]",
            "[0@[1]]]",
            "[0@[1],0@[2]]",
            "[0@1@2]",
            "[0@[5-3]]",
            "[0@[0-18446744073709551615]]",
            "[-1@[0]]",
        ] {
            assert!(parse(bad).is_err(), "{bad}: {}", map(bad));
        }
    }

    #[test]
    fn core_scheduling_words() {
        assert_eq!(parse_core_scheduling("vm"), Ok(SmtIsolation::Vm));
        assert_eq!(parse_core_scheduling("Vcpu"), Ok(SmtIsolation::Vcpu));
        assert!(parse_core_scheduling("core").is_err());
    }
}
