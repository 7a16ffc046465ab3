//! Network devices, from what the configuration says: the host's side first, and the device at it.

use std::{io, path::PathBuf};

use devices::pci::Slot;
use devices::virtio::{
    net::{
        Net, Settings,
        backend::Cable,
        features,
        mac::MacAddr,
        stream::{
            self,
            passt::{self, PasstError},
        },
        tap::{Tap, TapError, TapSettings},
        vhost::{self, Vhost},
    },
    rate_limiter::Limits,
    vhost_user,
};

use super::{PeripheralError, Plug};
use crate::config::{NetConfig, PasstConfig, name};

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// An Ethernet address that is none.
    #[error(transparent)]
    Mac(#[from] devices::virtio::net::mac::InvalidMacAddr),
    /// No randomness for an Ethernet address.
    #[error("cannot choose an Ethernet address")]
    RandomMac(#[source] io::Error),
    /// No tap interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// No passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// Nobody listens at the socket.
    #[error("cannot connect to {path}; start the program that is to take the frames first")]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host's kernel does not work on queues, or not for us.
    #[error(
        "cannot use /dev/vhost-net; load the kernel's module (`modprobe vhost_net`) and run as a user who may open it, or \
         leave vhost=on away"
    )]
    Vhost(#[source] io::Error),
}

/// Plugs in the network device that is number `index`, after which its threads are named.
pub(super) fn plug(plug: &Plug, index: usize, config: &NetConfig) -> Result<Slot, PeripheralError> {
    let name = name(&config.id);
    let no_network = |source| PeripheralError::Net {
        device: name.to_owned(),
        source,
    };
    if let Some(socket) = &config.vhost_socket {
        let device = vhost_user::Net::connect(
            socket.clone(),
            mac(config).map_err(no_network)?.0,
            config.mtu,
            config.pairs() as u16,
            config.queue_size,
        )
        .map_err(|source| PeripheralError::BackEnd {
            device: name.to_owned(),
            source,
        })?;
        return plug.virtio(name, Box::new(device));
    }
    let device = device(&format!("net{index}"), config).map_err(no_network)?;
    plug.virtio(name, Box::new(device))
}

/// The guest's Ethernet address.
fn mac(config: &NetConfig) -> Result<MacAddr, NetworkError> {
    match &config.mac {
        Some(text) => Ok(text.parse()?),
        None => MacAddr::random().map_err(NetworkError::RandomMac),
    }
}

/// The device that `config` describes; its threads are named after `name`.
fn device(name: &str, config: &NetConfig) -> Result<Net, NetworkError> {
    let mac = mac(config)?;
    let mut offloads = 0;
    for (wanted, features) in [
        (config.offload_csum, features::CHECKSUM),
        (config.offload_tso, features::TSO),
        (config.offload_ufo, features::UFO | features::USO),
    ] {
        offloads |= if wanted { features } else { 0 };
    }
    let settings = Settings {
        name: name.to_owned(),
        mac,
        mtu: config.mtu,
        queue_size: config.queue_size,
        offloads,
        limits: config
            .rate_limiter_config
            .as_ref()
            .map_or_else(Limits::default, Into::into),
    };
    if let Some(path) = &config.socket {
        let cable = stream::connect(path).map_err(|source| NetworkError::Socket {
            path: path.clone(),
            source,
        })?;
        return Ok(Net::new(settings, cable));
    }
    if let Some(passt) = &config.passt {
        return Ok(Net::new(settings, start_passt(passt, config)?));
    }
    if config.vhost {
        vhost::is_available().map_err(NetworkError::Vhost)?;
        return Ok(Net::with_vhost(settings, Vhost::new(tap(config)?)));
    }
    Ok(Net::new(settings, tap(config)?.cable()))
}

fn tap(config: &NetConfig) -> Result<Tap, NetworkError> {
    if let Some(descriptors) = &config.fds {
        return Ok(Tap::from_descriptors(descriptors)?);
    }
    let settings = TapSettings {
        name: config.tap.clone(),
        address: Some(config.ip),
        mask: Some(config.mask),
        mac: config
            .host_mac
            .as_ref()
            .map(|text| text.parse())
            .transpose()?,
        mtu: config.mtu,
    };
    Ok(Tap::open(&settings, config.pairs())?)
}

fn start_passt(passt: &PasstConfig, config: &NetConfig) -> Result<Cable, NetworkError> {
    let mut arguments = Vec::new();
    let mut argue = |option: &str, value: &str| {
        arguments.extend([option.to_owned(), value.to_owned()]);
    };
    for ports in &passt.tcp_ports {
        argue("--tcp-ports", ports);
    }
    for ports in &passt.udp_ports {
        argue("--udp-ports", ports);
    }
    if let Some(mtu) = config.mtu {
        argue("--mtu", &mtu.to_string());
    }
    Ok(passt::start(&arguments)?)
}
