//! What the kernel tells about CPUs and cpusets, as descriptors to wait on.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    mem,
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// Files and directories that are watched for changes.
pub(crate) struct FileEvents(File);

impl FileEvents {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: creates a descriptor.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just created, owned by nobody else.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Told when somebody writes to `file`, or the kernel changes it and says so.
    pub(crate) fn watch_file(&self, file: &Path) -> io::Result<()> {
        self.watch(file, libc::IN_MODIFY)
    }

    /// Told when a file is renamed into `directory`.
    pub(crate) fn watch_directory(&self, directory: &Path) -> io::Result<()> {
        self.watch(directory, libc::IN_MOVED_TO)
    }

    fn watch(&self, path: &Path, events: u32) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a string that ends in zero.
        let watch = unsafe { libc::inotify_add_watch(self.fd(), path.as_ptr(), events) };
        if watch < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Forgets what was told: what exactly it was does not matter.
    pub(crate) fn drain(&self) {
        let mut events = [0; 4096];
        while (&self.0).read(&mut events).is_ok_and(|bytes| bytes > 0) {}
    }
}

/// CPUs that go offline and come back.
pub(super) struct CpuEvents(File);

impl CpuEvents {
    pub(super) fn new() -> io::Result<Self> {
        const KERNEL: u32 = 1;
        // SAFETY: creates a descriptor.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::NETLINK_KOBJECT_UEVENT,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just created, owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        // SAFETY: a plain structure of integers.
        let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = KERNEL;
        // SAFETY: the structure and its size.
        let bound = unsafe {
            libc::bind(
                fd,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(file))
    }

    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Forgets what was told. Was any of it about a CPU?
    pub(super) fn drain(&self) -> bool {
        const CPUS: &[u8] = b"@/devices/system/cpu/cpu";
        let mut message = [0; 8192];
        let mut any = false;
        while let Ok(length @ 1..) = (&self.0).read(&mut message) {
            any |= message[..length]
                .windows(CPUS.len())
                .any(|part| part == CPUS);
        }
        any
    }
}

/// The file that says which CPUs a thread of group `group` can have at all: its own, or that of the nearest group above that has one.
pub(crate) fn effective_cpus_file(group: &Path) -> Option<PathBuf> {
    group
        .ancestors()
        .flat_map(|directory| {
            ["cpuset.cpus.effective", "cpuset.effective_cpus"].map(|file| directory.join(file))
        })
        .find(|file| file.exists())
}

/// The files whose change may change that: on version 2 the groups above count too.
pub(super) fn cpuset_files(group: &Path) -> Vec<PathBuf> {
    group
        .ancestors()
        .take_while(|directory| directory.starts_with("/sys/fs/cgroup") || directory == &group)
        .flat_map(|directory| {
            [
                "cpuset.cpus",
                "cpuset.cpus.exclusive",
                "cpuset.cpus.partition",
                "cpuset.cpus.effective",
            ]
            .map(|file| directory.join(file))
        })
        .filter(|file| file.exists())
        .collect()
}
