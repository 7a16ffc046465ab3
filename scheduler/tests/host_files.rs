//! A host read from files: a small tree written here, and this machine.

use std::fs;

use scheduler::{CpuSet, Host};

fn tree(files: &[(&str, &str)]) -> tempdir::Tree {
    let tree = tempdir::Tree::new();
    for (path, text) in files {
        let path = tree.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    }
    tree
}

/// A folder that goes away with the test.
mod tempdir {
    use std::{
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
    };

    pub(crate) struct Tree(PathBuf);

    impl Tree {
        pub(crate) fn new() -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("rota-host-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&path).expect("made");
            Self(path)
        }

        pub(crate) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// Two sockets, a node each, two cores of two threads under one cache; CPU 7 is offline.
fn two_sockets() -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = [
        ("sys/devices/system/cpu/present", "0-7\n"),
        ("sys/devices/system/cpu/online", "0-6\n"),
        ("sys/devices/system/cpu/isolated", "5-6\n"),
        ("sys/devices/system/cpu/nohz_full", " (null)\n"),
        ("sys/devices/system/node/online", "0-1\n"),
        ("sys/devices/system/node/node0/cpulist", "0-1,4-5\n"),
        ("sys/devices/system/node/node1/cpulist", "2-3,6\n"),
        ("sys/devices/system/node/node0/distance", "10 21\n"),
        ("sys/devices/system/node/node1/distance", "21 10\n"),
        (
            "sys/devices/system/node/node0/meminfo",
            "Node 0 MemTotal:       8388608 kB\nNode 0 MemFree:  4194304 kB\nNode 0 Inactive(file): 1048576 kB\n",
        ),
        (
            "sys/devices/system/node/node1/meminfo",
            "Node 1 MemTotal:       4194304 kB\nNode 1 MemFree:  2097152 kB\n",
        ),
        (
            "proc/self/status",
            "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-7\nMems_allowed_list:\t0\n",
        ),
        ("proc/self/cgroup", "0::/system.slice/a.service\n"),
        (
            "proc/self/mountinfo",
            "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        ),
        ("sys/fs/cgroup/system.slice/cpuset.cpus.effective", "0-6\n"),
        ("sys/fs/cgroup/cpuset.cpus.isolated", "6\n"),
        ("proc/sys/kernel/osrelease", "6.12.1-test\n"),
        ("boot/config-6.12.1-test", "CONFIG_HZ_1000=y\nCONFIG_HZ=1000\n"),
    ]
    .into_iter()
    .map(|(path, text)| (path.to_owned(), text.to_owned()))
    .collect();
    for cpu in 0..7 {
        let (core, socket) = (cpu % 4, cpu % 4 / 2);
        let siblings = if core == 3 {
            "3".to_owned()
        } else {
            format!("{core},{}", core + 4)
        };
        let package = if socket == 0 { "0-1,4-5" } else { "2-3,6" };
        for (file, text) in [
            ("topology/core_cpus_list", siblings.as_str()),
            (
                "topology/physical_package_id",
                if socket == 0 { "0" } else { "1" },
            ),
            ("topology/package_cpus_list", package),
            ("topology/cluster_cpus_list", siblings.as_str()),
            ("cache/index0/level", "1"),
            ("cache/index0/shared_cpu_list", siblings.as_str()),
            ("cache/index3/level", "3"),
            ("cache/index3/shared_cpu_list", package),
        ] {
            files.push((
                format!("sys/devices/system/cpu/cpu{cpu}/{file}"),
                format!("{text}\n"),
            ));
        }
    }
    files
}

fn read(files: &[(String, String)]) -> Result<Host, String> {
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(path, text)| (&**path, &**text))
        .collect();
    Host::read_tree(tree(&files).path()).map_err(|error| error.to_string())
}

#[test]
fn a_recorded_machine() {
    let host = read(&two_sockets()).expect("a host");
    let set = |text: &str| text.parse::<CpuSet>().expect("a list");
    assert_eq!(host.online, set("0-6"));
    assert_eq!(host.allowed, set("0-6"), "the cpuset of the group above");
    assert_eq!(host.isolated, set("5-6"));
    assert_eq!(host.nohz_full, CpuSet::new());
    let cpu = host.cpu(6).expect("there");
    assert_eq!((cpu.node, cpu.socket, cpu.llc, cpu.thread), (1, 1, 1, 1));
    assert_eq!(host.cpu(2).map(|cpu| cpu.core), Some(cpu.core));
    assert_ne!(host.cpu(3).map(|cpu| cpu.core), Some(cpu.core));
    let offline = host.cpu(7).expect("present");
    assert!(
        host.cpus
            .iter()
            .all(|cpu| cpu.id == 7 || cpu.core != offline.core)
    );
    assert_eq!(host.nodes[0].total_mib, 8192);
    assert_eq!(host.nodes[0].free_mib, 5120);
    assert_eq!(host.nodes[1].distance, [21, 10]);
    assert!(host.nodes[0].allowed && !host.nodes[1].allowed);
    assert_eq!(
        (host.tick_ns, host.tick_source.as_str()),
        (1_000_000, "CONFIG_HZ in /boot/config-6.12.1-test")
    );
    assert!(!host.abilities.custom_slice.yes, "nothing was tried");
    let json = serde_json::to_string(&host).expect("writes");
    assert_eq!(serde_json::from_str::<Host>(&json).expect("reads"), host);
}

#[test]
fn a_cpuset_of_version_1() {
    let mut files = two_sockets();
    for (path, text) in &mut files {
        match path.as_str() {
            "proc/self/cgroup" => "3:cpuset:/pods\n0::/x\n".clone_into(text),
            "proc/self/mountinfo" => {
                "31 30 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
                    .clone_into(text);
            }
            _ => {}
        }
    }
    files.push((
        "sys/fs/cgroup/cpuset/pods/cpuset.effective_cpus".to_owned(),
        "1-2\n".to_owned(),
    ));
    assert_eq!(read(&files).expect("a host").allowed.to_string(), "1-2");
}

#[test]
fn less_than_everything_is_enough() {
    let least = vec![(
        "sys/devices/system/cpu/online".to_owned(),
        "0-1\n".to_owned(),
    )];
    let host = read(&least).expect("a host");
    assert_eq!((host.cpus.len(), host.nodes.len()), (2, 1));
    assert_eq!(host.usable().to_string(), "0-1");
}

#[test]
fn nonsense_is_an_error_or_left_out() {
    assert!(read(&[]).is_err());
    let mut files = two_sockets();
    for (path, text) in &mut files {
        if !path.ends_with("present") && !path.ends_with("mountinfo") {
            *text = "99999999999999999999-x\u{0}".to_owned();
        }
    }
    let host = read(&files).expect("a host of what is present");
    assert_eq!(host.usable(), CpuSet::first(8));
}

#[test]
fn this_machine() {
    let host = Host::read().expect("this is Linux");
    assert!(!host.usable().is_empty());
    assert!(host.nodes.iter().any(|node| node.total_mib > 0));
    assert!(!host.abilities.custom_slice.why.is_empty());
    let again = host.reread().expect("it is still there");
    assert_eq!(
        (again.cpus, again.abilities, again.tick_ns),
        (host.cpus, host.abilities, host.tick_ns)
    );
}
