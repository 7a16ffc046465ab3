//! What devices are called: by the configuration, or by their kind and a number.
//!
//! Names are given once, before the machine starts, and stay: a disk that goes does not rename those behind it.

use std::collections::HashSet;

use super::{ConfigError, VmConfig};

/// Characters in a name.
const LONGEST: usize = 64;

impl VmConfig {
    /// Gives every device a name that has none: its kind and the first number that is free.
    pub fn name_devices(&mut self) {
        let mut taken: HashSet<String> = self.names().map(str::to_owned).collect();
        let disks = self.disks.iter_mut().map(|disk| (&mut disk.id, "_disk"));
        let nets = self.net.iter_mut().map(|net| (&mut net.id, "_net"));
        let folders = self.fs.iter_mut().map(|fs| (&mut fs.id, "_fs"));
        let pmem = self.pmem.iter_mut().map(|pmem| (&mut pmem.id, "_pmem"));
        let vsock = self.vsock.iter_mut().map(|it| (&mut it.id, "_vsock"));
        let all = disks.chain(nets).chain(folders).chain(pmem).chain(vsock);
        for (id, kind) in all {
            if id.is_none() {
                let name = (0u64..)
                    .map(|number| format!("{kind}{number}"))
                    .find(|name| !taken.contains(name))
                    .unwrap_or_default();
                taken.insert(name.clone());
                *id = Some(name);
            }
        }
    }

    /// Takes the devices out that `is_there` does not know.
    pub fn keep_devices(&mut self, is_there: impl Fn(&str) -> bool) {
        let keep = |id: &Option<String>| id.as_deref().is_none_or(&is_there);
        self.disks.retain(|disk| keep(&disk.id));
        self.net.retain(|net| keep(&net.id));
        self.fs.retain(|fs| keep(&fs.id));
        self.pmem.retain(|pmem| keep(&pmem.id));
        self.vsock.take_if(|vsock| !keep(&vsock.id));
    }

    /// The names of all devices that have one.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().map(|disk| &disk.id);
        let nets = self.net.iter().map(|net| &net.id);
        let folders = self.fs.iter().map(|fs| &fs.id);
        let pmem = self.pmem.iter().map(|pmem| &pmem.id);
        let vsock = self.vsock.iter().map(|vsock| &vsock.id);
        let all = disks.chain(nets).chain(folders).chain(pmem).chain(vsock);
        all.filter_map(Option::as_deref)
    }
}

/// What a device is called. [`VmConfig::name_devices`] has seen to it that it is called something.
pub(crate) fn name(id: &Option<String>) -> &str {
    id.as_deref().unwrap_or_default()
}

/// Checks that names can be told apart, and told at all.
pub(super) fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for name in config.names() {
        let length = name.chars().count();
        if !(1..=LONGEST).contains(&length) || name.chars().any(char::is_control) {
            return Err(ConfigError::BadId(name.to_owned()));
        }
        if !seen.insert(name) {
            return Err(ConfigError::SameId(name.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

    #[test]
    fn names_are_given_once_and_stay() {
        let mut config = config();
        for text in ["path=a", "path=b,id=_disk0", "path=c"] {
            config.disks.push(text.parse().unwrap());
        }
        config.net.push("tap=x".parse().unwrap());
        config.pmem.push("file=p".parse().unwrap());
        config.vsock = Some("cid=3,socket=/x".parse().unwrap());
        config.name_devices();
        let named: Vec<&str> = config.names().collect();
        assert_eq!(
            named,
            ["_disk1", "_disk0", "_disk2", "_net0", "_pmem0", "_vsock0"]
        );

        config.keep_devices(|name| !matches!(name, "_disk0" | "_pmem0" | "_vsock0"));
        config.disks.push("path=d".parse().unwrap());
        config.name_devices();
        let named: Vec<&str> = config.names().collect();
        assert_eq!(named, ["_disk1", "_disk2", "_disk0", "_net0"]);
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        let mut config = config();
        config.disks.push("path=a,id=x".parse().unwrap());
        assert_eq!(validate(&config), Ok(()));
        config.net.push("tap=t,id=x".parse().unwrap());
        assert_eq!(validate(&config), Err(ConfigError::SameId("x".into())));
        for name in [String::new(), "a\nb".into(), "x".repeat(65)] {
            config.net[0].id = Some(name.clone());
            assert_eq!(validate(&config), Err(ConfigError::BadId(name)));
        }
    }
}
