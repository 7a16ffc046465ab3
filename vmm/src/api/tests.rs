//! The server as clients find it, with this thread in place of the control thread; and what requests are taken for.

use std::{
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use super::{call::Call, *};
use crate::config::VmConfig;
use crate::state::State;

/// A server with a machine that is shut down behind it.
struct Api {
    server: Option<Server>,
    queue: Queue,
    path: PathBuf,
    config: VmConfig,
}

impl Api {
    fn start(test: &str) -> Self {
        let name = format!("rota-api-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        Self::start_at(&ApiSocket::Path(path.clone()), path)
    }

    fn start_at(socket: &ApiSocket, path: PathBuf) -> Self {
        let (server, queue) = Server::start(socket).unwrap();
        let config = r#"{"payload":{"kernel":"vmlinuz"},"disks":[{"path":"a","id":"first"}],
            "cpus":{"boot_vcpus":1,"max_vcpus":4}}"#;
        Self {
            server: Some(server),
            queue,
            path,
            config: serde_json::from_str(config).unwrap(),
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream
    }

    /// Serves requests until `done`, and returns what is wished.
    fn serve_until(&mut self, done: impl Fn() -> bool) -> Option<(Wish, Reply)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "nothing comes");
            let mut desk = Desk {
                config: &mut self.config,
                vm: None,
                placed: None,
                scheduling: None,
                state: State::Shutdown,
                address_bits: 48,
            };
            if let Some(asked) = self.queue.next()
                && let Some(wish) = desk.serve(asked)
            {
                return Some(wish);
            }
            thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Sends `request` and returns status, headers and body of the answer.
    fn ask(&mut self, request: &str) -> (u16, String, String) {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let client = thread::spawn(move || read_answer(&mut stream));
        self.serve_until(|| client.is_finished());
        client.join().unwrap()
    }

    fn call(&mut self, method: &str, name: &str, body: &str) -> (u16, String) {
        let (status, _, body) = self.ask(&request(method, name, body));
        (status, body)
    }
}

fn request(method: &str, name: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn read_answer(stream: &mut UnixStream) -> (u16, String, String) {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with("\r\n\r\n") && stream.read(&mut byte).unwrap() > 0 {
        text.push(byte[0] as char);
    }
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, text, String::from_utf8(body).unwrap())
}

#[test]
fn answers_are_what_clients_of_cloud_hypervisor_expect() {
    let mut api = Api::start("answers");
    let mode = std::fs::metadata(&api.path).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let (status, head, body) = api.ask(&request("GET", "vmm.ping", ""));
    assert_eq!(status, 200);
    // They read the status up to the end of the line.
    assert!(head.starts_with("HTTP/1.1 200 \r\n"), "{head}");
    assert!(head.contains("Content-Type: application/json\r\n"));
    let ping: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(ping["pid"], std::process::id());
    let (status, info) = api.call("GET", "vm.info", "");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((status, &info["state"]), (200, &"Shutdown".into()));
    assert_eq!(info["config"]["disks"][0]["id"], "first");

    let disk = r#"{"path":"b","pci_segment":0,"iommu":false,"lock_granularity":"ByteRange"}"#;
    assert_eq!(api.call("PUT", "vm.add-disk", disk), (204, String::new()));
    assert_eq!(api.config.disks[1].id.as_deref(), Some("_disk0"));
    let remove = r#"{"id":"first"}"#;
    assert_eq!(api.call("PUT", "vm.remove-device", remove).0, 204);
    assert_eq!(api.config.disks.len(), 1);
    for (method, name, body, status, message) in [
        ("PUT", "vm.remove-device", remove, 404, "no device"),
        (
            "PUT",
            "vm.add-disk",
            r#"{"path":"c","id":"_disk0"}"#,
            409,
            "'_disk0'",
        ),
        (
            "PUT",
            "vm.add-disk",
            r#"{"path":"c","num_queues":9}"#,
            400,
            "9 queues",
        ),
        (
            "PUT",
            "vm.add-disk",
            r#"{"path":"c","iommu":true}"#,
            400,
            "iommu=true",
        ),
        (
            "PUT",
            "vm.add-disk",
            r#"{"path":"c","rubbish":1}"#,
            400,
            "rubbish",
        ),
        ("PUT", "vm.add-disk", "[1]", 400, "not valid"),
        ("PUT", "vm.add-disk", "", 400, "not valid"),
        ("PUT", "vm.add-net", r#"{"fds":[0]}"#, 400, "descriptors"),
        ("PUT", "vm.resize", r#"{"desired_vcpus":5}"#, 400, "1 to 4"),
        ("PUT", "vm.resize", r#"{"desired_vcpus":0}"#, 400, "1 to 4"),
        (
            "PUT",
            "vm.resize",
            r#"{"desired_vcpus":-1}"#,
            400,
            "not valid",
        ),
        ("PUT", "vm.resize", r#"{"desired_ram":1}"#, 501, "none that"),
        (
            "PUT",
            "vm.add-pmem",
            r#"{"file":"x","size":1}"#,
            400,
            "2 MiB",
        ),
        (
            "PUT",
            "vm.resize",
            r#"{"desired_balloon":1}"#,
            400,
            "no balloon",
        ),
        (
            "PUT",
            "vm.resize-disk",
            r#"{"id":"x","desired_size":1}"#,
            404,
            "shut down",
        ),
        ("PUT", "vm.power-button", "", 404, "shut down"),
        ("PUT", "vm.pause", "", 501, "vm.pause"),
        ("PUT", "vm.nothing", "", 404, "vm.nothing"),
        ("PUT", "vmm.ping", "", 400, "GET"),
        ("DELETE", "vm.info", "", 400, "GET"),
    ] {
        let (found, body) = api.call(method, name, body);
        let messages: Vec<String> = serde_json::from_str(&body).unwrap();
        assert_eq!(found, status, "{name}: {messages:?}");
        assert!(messages.join(": ").contains(message), "{messages:?}");
    }
}

#[test]
fn memory_is_resized_within_what_there_is() {
    let mut api = Api::start("memory");
    api.config.memory = "size=512M,hotplug_method=virtio-mem,hotplug_size=1G"
        .parse()
        .unwrap();
    let resize = |api: &mut Api, mib: u64| {
        let body = format!(r#"{{"desired_ram":{}}}"#, mib << 20);
        api.call("PUT", "vm.resize", &body)
    };
    assert_eq!(resize(&mut api, 1024).0, 204);
    assert_eq!(api.config.memory.hotplugged_size, Some(512 << 20));
    for (mib, why) in [(510, "from 536870912"), (1538, "from "), (1025, "2 MiB")] {
        let (status, body) = resize(&mut api, mib);
        assert_eq!(status, 400);
        assert!(body.contains(why), "{body}");
    }
    assert_eq!(resize(&mut api, 512).0, 204);
    assert_eq!(api.config.memory.hotplugged_size, Some(0));
    // As modules, which is what is meant where nothing is said.
    api.config.memory = "size=512M,hotplug_size=1G".parse().unwrap();
    for (mib, status, why) in [
        (640, 204, ""),
        (641, 400, "128 MiB"),
        (1664, 400, "from "),
        (512, 204, ""),
    ] {
        let (found, body) = resize(&mut api, mib);
        assert_eq!(found, status, "{body}");
        assert!(body.contains(why), "{body}");
    }
    // What ch-remote sends.
    let net = r#"{"tap":"t","vhost_user":false,"vhost_socket":null,"vhost_mode":"Client"}"#;
    assert_eq!(api.call("PUT", "vm.add-net", net).0, 204);
    let disk = r#"{"vhost_user":true,"vhost_socket":"/run/d"}"#;
    let (status, body) = api.call("PUT", "vm.add-disk", disk);
    assert!(status == 400 && body.contains("shared=on"), "{body}");
    let pmem = r#"{"file":"/x","size":null,"iommu":false,"discard_writes":true,"id":null,"pci_segment":0}"#;
    assert_eq!(api.call("PUT", "vm.add-pmem", pmem).0, 204);
    assert_eq!(api.config.pmem[0].id.as_deref(), Some("_pmem0"));
}

#[test]
fn clients_that_misbehave_are_told_or_left() {
    let mut api = Api::start("misbehaviour");
    // One that says nothing, and one that goes away in the middle.
    let silent = api.connect();
    api.connect()
        .write_all(b"PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-")
        .unwrap();
    let (status, _, _) = api.ask("what?\r\n\r\n");
    assert_eq!(status, 400);
    let long = "x".repeat(70_000);
    assert_eq!(api.call("PUT", "vm.add-disk", &long).0, 400);
    let deep = "[".repeat(50_000);
    assert_eq!(api.call("PUT", "vm.add-disk", &deep).0, 400);
    // One that asks and does not wait for the answer.
    api.connect()
        .write_all(request("GET", "vm.info", "").as_bytes())
        .unwrap();
    assert_eq!(api.call("GET", "vmm.ping", "").0, 200);
    // Two requests on one connection.
    let mut stream = api.connect();
    let both = request("GET", "vmm.ping", "").repeat(2);
    stream.write_all(both.as_bytes()).unwrap();
    let client = thread::spawn(move || [read_answer(&mut stream).0, read_answer(&mut stream).0]);
    api.serve_until(|| client.is_finished());
    assert_eq!(client.join().unwrap(), [200, 200]);
    drop(silent);
}

#[test]
fn the_last_answer_goes_out_and_the_socket_goes() {
    let mut api = Api::start("end");
    let mut stream = api.connect();
    let silent = api.connect();
    stream
        .write_all(request("PUT", "vmm.shutdown", "").as_bytes())
        .unwrap();
    let (wish, reply) = api.serve_until(|| false).unwrap();
    assert_eq!(wish, Wish::Leave);
    reply.done();
    let begun = Instant::now();
    api.server = None;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(read_answer(&mut stream).0, 204);
    assert!(!api.path.exists());
    drop(silent);
}

#[test]
fn a_socket_that_nobody_listens_at_any_more_is_replaced() {
    let api = Api::start("stale");
    let Err(error) = Server::start(&ApiSocket::Path(api.path.clone())) else {
        panic!("two servers at one socket");
    };
    assert!(matches!(error, ApiError::InUse(_)));
    let path: PathBuf = api.path.with_extension("stale");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = ApiSocket::Path(path.clone());
    drop(Server::start(&socket).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(
        Server::start(&socket),
        Err(ApiError::Listen { .. })
    ));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_socket_that_is_listened_at_already_is_taken_and_left() {
    let path = std::env::temp_dir().join(format!("rota-api-handed-{}", std::process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut api = Api::start_at(&ApiSocket::Fd(listener.as_raw_fd()), path.clone());
    assert_eq!(api.call("GET", "vmm.ping", "").0, 200);
    drop(api);
    assert!(path.exists());
    std::fs::remove_file(path).unwrap();
}

#[test]
fn requests_become_calls() {
    let parse =
        |name: &str, body: &str| Call::parse("PUT", &format!("/api/v1/{name}"), body.as_bytes());
    assert_eq!(parse("vm.reboot", ""), Ok(Call::Reboot));
    let vsock = r#"{"pci_segment":0,"cid":3,"socket":"/x"}"#;
    let wanted = "cid=3,socket=/x".parse().unwrap();
    assert_eq!(parse("vm.add-vsock", vsock), Ok(Call::AddVsock(wanted)));
    assert_eq!(
        Call::parse("PUT", "/vm.reboot", b"").unwrap_err().status,
        404
    );
}
