//! Ethernet addresses.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    str::FromStr,
};

use thiserror::Error;

/// An address of an Ethernet interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MacAddr(pub [u8; 6]);

/// Text that is not an address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not an Ethernet address such as 2e:0f:aa:12:34:56")]
pub struct InvalidMacAddr(String);

impl MacAddr {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A random address of those that nobody has been given (locally administered).
    ///
    /// # Errors
    /// When the host has no randomness.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }

    /// Whether it names a group of stations; all of them are one.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMacAddr;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| {
                    part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit())
                })
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| InvalidMacAddr(text.to_owned()))?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(InvalidMacAddr(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let address: MacAddr = "2E:0f:aa:12:34:56".parse().unwrap();
        assert_eq!(address, MacAddr([0x2e, 0x0f, 0xaa, 0x12, 0x34, 0x56]));
        assert_eq!(address.to_string(), "2e:0f:aa:12:34:56");
        for wrong in [
            "",
            "2e",
            "2e:0f:aa:12:34",
            "2e:0f:aa:12:34:56:78",
            "2e:0f:aa:12:34:5",
            "2e:0f:aa:12:34:+5",
            "2e-0f-aa-12-34-56",
        ] {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_random_address_is_one_station_and_nobodys() {
        for _ in 0..64 {
            let address = MacAddr::random().unwrap();
            assert!(!address.is_group());
            assert_eq!(address.0[0] & 2, 2);
        }
    }
}
