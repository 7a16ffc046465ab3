//! What can be asked for, and how it is asked for.

use super::{Refusal, body};
use crate::config::{DiskConfig, FsConfig, NetConfig, PmemConfig, VsockConfig};

const ROOT: &str = "/api/v1/";

/// A request that is understood.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Ping,
    Leave,
    Info,
    Counters,
    Boot,
    ShutDown,
    Reboot,
    PowerButton,
    Resize(body::Resize),
    ResizeDisk(body::ResizeDisk),
    AddDisk(Box<DiskConfig>),
    AddNet(Box<NetConfig>),
    AddFs(FsConfig),
    AddPmem(PmemConfig),
    AddVsock(VsockConfig),
    RemoveDevice(body::RemoveDevice),
}

/// Paths of cloud-hypervisor's API that Rota has nothing for.
const UNSUPPORTED: &[&str] = &[
    "vm.create",
    "vm.delete",
    "vm.pause",
    "vm.resume",
    "vm.resize-zone",
    "vm.add-device",
    "vm.add-user-device",
    "vm.add-generic-vhost-user",
    "vm.add-vdpa",
    "vm.snapshot",
    "vm.restore",
    "vm.coredump",
    "vm.nmi",
    "vm.receive-migration",
    "vm.send-migration",
];

impl Call {
    /// What `method` on `path` with `body` asks for.
    pub(super) fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, Refusal> {
        let unknown = || Refusal::not_found(format!("there is no {path:?} in the API"));
        let name = path.strip_prefix(ROOT).ok_or_else(unknown)?;
        if UNSUPPORTED.contains(&name) {
            return Err(Refusal::unsupported(format!("{name} is not supported")));
        }
        let right = match name {
            "vmm.ping" | "vm.info" | "vm.counters" => "GET",
            _ => "PUT",
        };
        if method != right {
            return Err(Refusal::bad(format!("{path} is asked for by {right}")));
        }
        Ok(match name {
            "vmm.ping" => Self::Ping,
            "vmm.shutdown" => Self::Leave,
            "vm.info" => Self::Info,
            "vm.counters" => Self::Counters,
            "vm.boot" => Self::Boot,
            "vm.shutdown" => Self::ShutDown,
            "vm.reboot" => Self::Reboot,
            "vm.power-button" => Self::PowerButton,
            "vm.resize" => Self::Resize(body::parse(body)?),
            "vm.resize-disk" => Self::ResizeDisk(body::parse(body)?),
            "vm.add-disk" => Self::AddDisk(body::device(body)?),
            "vm.add-net" => Self::AddNet(without_descriptors(body::device(body)?)?),
            "vm.add-fs" => Self::AddFs(body::device(body)?),
            "vm.add-pmem" => Self::AddPmem(body::device(body)?),
            "vm.add-vsock" => Self::AddVsock(body::device(body)?),
            "vm.remove-device" => Self::RemoveDevice(body::parse(body)?),
            _ => return Err(unknown()),
        })
    }
}

/// Numbers of descriptors mean nothing here: they would be Rota's own.
fn without_descriptors(net: Box<NetConfig>) -> Result<Box<NetConfig>, Refusal> {
    if net.fds.is_some() {
        return Err(Refusal::bad(
            "descriptors cannot be passed to a running machine; name the tap interface",
        ));
    }
    Ok(net)
}
