//! The options of the command line: `key=value,key=[value,value]`.

use super::ConfigError;

/// Splits `a=1,b=[2,3]` and hands back the values in the order of `names`.
pub(super) fn keys<'a, const N: usize>(
    text: &'a str,
    names: [&str; N],
    known: &'static str,
) -> Result<[Option<&'a str>; N], ConfigError> {
    let mut values = [None; N];
    for part in parts(text)? {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| ConfigError::NotKeyValue(part.to_owned()))?;
        let index =
            names
                .iter()
                .position(|name| *name == key)
                .ok_or_else(|| ConfigError::UnknownKey {
                    key: key.to_owned(),
                    known,
                })?;
        if values[index].replace(value).is_some() {
            return Err(ConfigError::Duplicate(key.to_owned()));
        }
    }
    Ok(values)
}

/// The parts between commas; a comma in brackets is none.
fn parts(text: &str) -> Result<Vec<&str>, ConfigError> {
    let mut parts = Vec::new();
    let (mut start, mut open) = (0, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' if !open => open = true,
            b']' if open => open = false,
            b'[' | b']' => return Err(ConfigError::Brackets(text.to_owned())),
            b',' if !open => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => (),
        }
    }
    if open {
        return Err(ConfigError::Brackets(text.to_owned()));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// The values in `[a,b]`, or the one that `a` is.
pub(super) fn list(text: &str) -> impl Iterator<Item = &str> {
    text.strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text)
        .split(',')
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

pub(super) fn number(key: &'static str, value: &str) -> Result<u32, ConfigError> {
    value.parse().map_err(|_| ConfigError::NotANumber {
        key,
        value: value.to_owned(),
    })
}

pub(super) fn switch(key: &'static str, value: Option<&str>) -> Result<bool, ConfigError> {
    match value {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(value) => Err(ConfigError::NotASwitch {
            key,
            value: value.to_owned(),
        }),
    }
}

/// Bytes in `text`: a number, or one with K, M, G or T behind it.
pub(super) fn size(text: &str) -> Result<u64, ConfigError> {
    let bad = || ConfigError::NotASize(text.to_owned());
    let (digits, shift) = match text.as_bytes().last().ok_or_else(bad)? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    // `parse` would take a sign, too.
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(bad());
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_brackets_do_not_split() {
        let values = keys("a=[1, 2],b=3", ["b", "a"], "a, b");
        assert_eq!(values, Ok([Some("3"), Some("[1, 2]")]));
        assert!(list("[1, 2]").eq(["1", "2"]));
        assert!(list("1").eq(["1"]));
        assert!(list("[]").next().is_none());
        for text in ["a=[1", "a=1]", "a=[[1]]", "]a=["] {
            let error = keys(text, ["a"], "a");
            assert_eq!(error, Err(ConfigError::Brackets(text.to_owned())));
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("2g", 2 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes));
        }
        for text in [
            "",
            "M",
            "-1",
            "+1",
            "1.5G",
            "12X",
            "99999999999999999999",
            "16777216T",
        ] {
            assert_eq!(
                size(text),
                Err(ConfigError::NotASize(text.to_owned())),
                "{text}"
            );
        }
    }
}
