//! `--net tap=NAME,mac=…` and the other ways to a network.

use std::{net::IpAddr, path::PathBuf, str::FromStr};

use devices::virtio::net::mac::MacAddr;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError,
    options::{keys, list, number, switch},
    rate_limiter::RateLimiterConfig,
};

/// Queues there may be: each pair has a thread.
const MOST_QUEUES: u32 = 64;
/// The shortest and the longest MTU of Ethernet.
const MTU: std::ops::RangeInclusive<u16> = 68..=65535;

/// A network device. The host's side is a tap interface, by name or by descriptors, unless a socket or passt is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// The tap interface; one is made if there is none, and gets a name if it has none.
    pub tap: Option<String>,
    /// Descriptors of queues of a tap interface, in place of a name.
    pub fds: Option<Vec<i32>>,
    /// The socket of a program that takes frames as QEMU's `-netdev stream` sends them.
    pub socket: Option<PathBuf>,
    /// Another process, a vhost-user back end, works on the queues.
    pub vhost_user: bool,
    /// Where that back end listens.
    pub vhost_socket: Option<PathBuf>,
    /// Which of the two waits for the other.
    pub vhost_mode: VhostMode,
    /// Runs passt, which needs no privileges.
    pub passt: Option<PasstConfig>,
    /// The host's address on a tap interface that is made.
    pub ip: IpAddr,
    /// The mask of its network.
    pub mask: IpAddr,
    /// The guest's Ethernet address; a random one if not said.
    pub mac: Option<String>,
    /// The host's Ethernet address on a tap interface that is made.
    pub host_mac: Option<String>,
    /// The longest IP packet in bytes.
    pub mtu: Option<u16>,
    /// Queues: two for each pair.
    pub num_queues: u32,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Whether the host's kernel works on the queues (`/dev/vhost-net`).
    pub vhost: bool,
    /// What it is called.
    pub id: Option<String>,
    /// How much it may do.
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// TCP segments may be left to the other side.
    pub offload_tso: bool,
    /// UDP fragments and segments may be.
    pub offload_ufo: bool,
    /// Checksums may be.
    pub offload_csum: bool,
}

/// Who of a VMM and a vhost-user back end listens at the socket, seen from the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The back end listens.
    #[default]
    Client,
    /// The VMM would, which Rota does not.
    Server,
}

/// What passt lets in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PasstConfig {
    /// TCP ports of the host that lead to the guest, as passt's `--tcp-ports`.
    pub tcp_ports: Vec<String>,
    /// UDP ports likewise.
    pub udp_ports: Vec<String>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            fds: None,
            socket: None,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            passt: None,
            ip: IpAddr::from([192, 168, 249, 1]),
            mask: IpAddr::from([255, 255, 255, 0]),
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            vhost: false,
            id: None,
            rate_limiter_config: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

impl NetConfig {
    /// Pairs of queues.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.num_queues as usize / 2
    }

    /// Checks what the types alone cannot.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: &str| Err(ConfigError::Net(what.to_owned()));
        let ways = [
            self.tap.is_some(),
            self.fds.is_some(),
            self.socket.is_some(),
            self.passt.is_some(),
            self.vhost_user,
        ];
        if ways.iter().filter(|way| **way).count() > 1 {
            return wrong(
                "only one of tap, fd, socket, passt and vhost_user can be the host's side",
            );
        }
        if self.vhost_user != self.vhost_socket.is_some() {
            return wrong("vhost_user=on and the socket of its back end go together");
        }
        if self.vhost_mode == VhostMode::Server {
            return wrong("vhost_mode=server: Rota connects to the back end; let that one listen");
        }
        if self.vhost_user && (self.vhost || self.rate_limiter_config.is_some()) {
            return wrong("vhost_user=on goes neither with vhost=on nor with limits to the rate");
        }
        if self.num_queues == 0
            || !self.num_queues.is_multiple_of(2)
            || self.num_queues > MOST_QUEUES
        {
            return wrong("num_queues counts both directions: an even number from 2 to 64");
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > 32768 {
            return wrong("queue_size is a power of two, at most 32768");
        }
        if self
            .fds
            .as_ref()
            .is_some_and(|fds| fds.len() != self.pairs())
        {
            return wrong("fd has one descriptor for each pair of queues");
        }
        let is_stream = self.socket.is_some() || self.passt.is_some();
        if is_stream && self.pairs() > 1 {
            return wrong("a socket has one pair of queues");
        }
        if self.vhost && (is_stream || self.rate_limiter_config.is_some()) {
            return wrong("vhost=on is for a tap interface, without limits to the rate");
        }
        if self.mtu.is_some_and(|mtu| !MTU.contains(&mtu)) {
            return wrong("mtu is 68 to 65535");
        }
        if self.ip.is_ipv4() != self.mask.is_ipv4() {
            return wrong("ip and mask are of one family");
        }
        for address in [&self.mac, &self.host_mac].into_iter().flatten() {
            let address: MacAddr = address.parse()?;
            if address.is_group() {
                return wrong("an Ethernet address of a group cannot be that of a device");
            }
        }
        Ok(())
    }
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        // The one word that is no pair of key and value.
        let (passt, text) = match text.strip_prefix("passt") {
            Some("") => {
                return Ok(Self {
                    passt: Some(PasstConfig::default()),
                    ..Self::default()
                });
            }
            Some(rest) if rest.starts_with(',') => (true, &rest[1..]),
            _ => (false, text),
        };
        let known = "passt, tap, fd, socket, vhost_user, vhost_mode, ip, mask, mac, host_mac, mtu, num_queues, queue_size, vhost, id, bw_size, \
            bw_one_time_burst, bw_refill_time, ops_size, ops_one_time_burst, ops_refill_time, offload_tso, offload_ufo, \
            offload_csum, tcp_ports, udp_ports";
        let [
            tap,
            fd,
            socket,
            vhost_user,
            vhost_mode,
            ip,
            mask,
            mac,
            host_mac,
            mtu,
            num_queues,
            queue_size,
            vhost,
            id,
            bw_size,
            bw_burst,
            bw_time,
            ops_size,
            ops_burst,
            ops_time,
            tso,
            ufo,
            csum,
            tcp_ports,
            udp_ports,
        ] = keys(
            text,
            [
                "tap",
                "fd",
                "socket",
                "vhost_user",
                "vhost_mode",
                "ip",
                "mask",
                "mac",
                "host_mac",
                "mtu",
                "num_queues",
                "queue_size",
                "vhost",
                "id",
                "bw_size",
                "bw_one_time_burst",
                "bw_refill_time",
                "ops_size",
                "ops_one_time_burst",
                "ops_refill_time",
                "offload_tso",
                "offload_ufo",
                "offload_csum",
                "tcp_ports",
                "udp_ports",
            ],
            known,
        )?;
        if !passt && (tcp_ports.is_some() || udp_ports.is_some()) {
            return Err(ConfigError::Net(
                "tcp_ports and udp_ports are passt's: `--net passt,…`".to_owned(),
            ));
        }
        let owned = |value: Option<&str>| value.map(str::to_owned);
        let ports = |value: Option<&str>| {
            value.map_or(Vec::new(), |ports| list(ports).map(str::to_owned).collect())
        };
        let passt = passt.then(|| PasstConfig {
            tcp_ports: ports(tcp_ports),
            udp_ports: ports(udp_ports),
        });
        let address = |key, value: Option<&str>, otherwise| {
            value.map_or(Ok(otherwise), |value| {
                value
                    .parse()
                    .map_err(|_| ConfigError::Net(format!("{key}: '{value}' is not an IP address")))
            })
        };
        let small = |key, value: Option<&str>| {
            value
                .map(|value| {
                    value.parse().map_err(|_| ConfigError::NotANumber {
                        key,
                        value: value.to_owned(),
                    })
                })
                .transpose()
        };
        let fds = fd
            .map(|fds| {
                list(fds)
                    .map(|fd| {
                        fd.parse().map_err(|_| ConfigError::NotANumber {
                            key: "fd",
                            value: fd.to_owned(),
                        })
                    })
                    .collect::<Result<Vec<i32>, _>>()
            })
            .transpose()?;
        let unless_off = |key, value: Option<&str>| switch(key, value.or(Some("on")));
        let rate_limiter_config = RateLimiterConfig::from_options(
            [bw_size, bw_burst, bw_time],
            [ops_size, ops_burst, ops_time],
        )?;
        let default = Self::default();
        let vhost_user = switch("vhost_user", vhost_user)?;
        let vhost_mode = match vhost_mode {
            None | Some("client") => VhostMode::Client,
            Some("server") => VhostMode::Server,
            Some(other) => {
                return Err(ConfigError::Net(format!(
                    "vhost_mode: '{other}' is neither client nor server"
                )));
            }
        };
        let socket = socket.map(PathBuf::from);
        let (socket, vhost_socket) = if vhost_user {
            (None, socket)
        } else {
            (socket, None)
        };
        let config = Self {
            tap: owned(tap),
            // A queue for each descriptor, unless it is said.
            num_queues: match (num_queues, &fds) {
                (Some(count), _) => number("num_queues", count)?,
                (None, Some(fds)) => 2 * fds.len() as u32,
                (None, None) => default.num_queues,
            },
            fds,
            socket,
            vhost_user,
            vhost_socket,
            vhost_mode,
            passt,
            ip: address("ip", ip, default.ip)?,
            mask: address("mask", mask, default.mask)?,
            mac: owned(mac),
            host_mac: owned(host_mac),
            mtu: small("mtu", mtu)?,
            queue_size: small("queue_size", queue_size)?.unwrap_or(default.queue_size),
            vhost: switch("vhost", vhost)?,
            id: owned(id),
            rate_limiter_config,
            offload_tso: unless_off("offload_tso", tso)?,
            offload_ufo: unless_off("offload_ufo", ufo)?,
            offload_csum: unless_off("offload_csum", csum)?,
        };
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetConfig, String> {
        text.parse::<NetConfig>().map_err(|error| error.to_string())
    }

    #[test]
    fn the_ways_to_a_network() {
        let tap =
            parse("tap=tap0,mac=2e:00:00:00:00:01,num_queues=4,queue_size=512,offload_tso=off")
                .unwrap();
        assert_eq!(tap.tap.as_deref(), Some("tap0"));
        assert_eq!((tap.pairs(), tap.queue_size), (2, 512));
        assert!(!tap.offload_tso && tap.offload_csum && tap.offload_ufo);
        let fds = parse("fd=[3,4],id=uplink").unwrap();
        assert_eq!((fds.fds.clone(), fds.pairs()), (Some(vec![3, 4]), 2));
        assert_eq!(parse("fd=3").unwrap().fds, Some(vec![3]));
        assert_eq!(parse("passt").unwrap().passt, Some(PasstConfig::default()));
        let passt = parse("passt,mtu=9000,tcp_ports=[2222:22,8080]").unwrap();
        assert_eq!(passt.mtu, Some(9000));
        assert_eq!(passt.passt.unwrap().tcp_ports, ["2222:22", "8080"]);
        let socket = parse("socket=/run/net.sock,bw_size=1000,bw_refill_time=100").unwrap();
        assert_eq!(socket.socket, Some("/run/net.sock".into()));
        assert_eq!(
            socket.rate_limiter_config.unwrap().bandwidth.unwrap().size,
            1000
        );
        let v6 = parse("tap=t,ip=fd00::1,mask=ffff:ffff:ffff:ffff::").unwrap();
        assert!(v6.ip.is_ipv6());
    }

    #[test]
    fn what_cannot_be() {
        for (text, part) in [
            ("", "key=value"),
            ("tap=a,socket=/b", "only one of"),
            ("passt,tap=a", "only one of"),
            ("tap=a,num_queues=1", "both directions"),
            ("tap=a,num_queues=0", "both directions"),
            ("tap=a,num_queues=66", "both directions"),
            ("tap=a,queue_size=100", "power of two"),
            ("tap=a,queue_size=65536", "not a number"),
            ("fd=[3,4],num_queues=2", "one descriptor for each"),
            ("fd=x", "not a number"),
            ("fd=[3", "bracket"),
            ("passt,num_queues=4", "one pair"),
            ("socket=/a,vhost=on", "vhost"),
            ("tap=a,vhost=on,ops_size=1,ops_refill_time=1", "vhost"),
            ("tap=a,mtu=67", "mtu"),
            ("tap=a,mac=01:00:00:00:00:01", "group"),
            ("tap=a,mac=zz", "not an Ethernet address"),
            ("tap=a,ip=fd00::1", "one family"),
            ("tap=a,ip=1.2.3", "not an IP address"),
            ("tap=a,tcp_ports=22", "passt"),
            ("tap=a,iface=b", "unknown key"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_json_form() {
        let config: NetConfig =
            serde_json::from_str(r#"{"tap":"tap0","num_queues":4,"mac":"2e:00:00:00:00:01"}"#)
                .unwrap();
        assert_eq!(config.pairs(), 2);
        assert_eq!(config.queue_size, 256);
        assert!(serde_json::from_str::<NetConfig>(r#"{"tapp":"x"}"#).is_err());
    }
    #[test]
    fn another_process_can_work_on_the_queues() {
        let config = parse("vhost_user=on,socket=/run/net.sock,num_queues=4").unwrap();
        assert!(config.vhost_user && config.socket.is_none());
        assert_eq!(config.vhost_socket, Some("/run/net.sock".into()));
        for (text, why) in [
            ("vhost_user=on", "go together"),
            ("vhost_user=on,socket=/s,tap=tap0", "only one of"),
            ("vhost_user=on,socket=/s,vhost=on", "neither with vhost=on"),
            (
                "vhost_user=on,socket=/s,vhost_mode=server",
                "let that one listen",
            ),
            (
                "vhost_user=on,socket=/s,vhost_mode=x",
                "neither client nor server",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
