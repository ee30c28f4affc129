//! The port that an orchestrator gave this container: what the spec `auto` stands for.
//!
//! | where | who leaves it there |
//! |---|---|
//! | `USERNIC_PORT` | whoever wants to say it all: a whole port spec, which is taken as it is |
//! | `port.json` in the folder `USERNIC_CONFIG` (`/run/usernic` if that is not set) and in the folders in it | the CNI plugin of the `usernic` program; see [`PortConfig`] |
//! | `PCIDEVICE_*` | SR-IOV device plugins: PCI addresses of virtual functions |
//! | `network-status` in `/etc/podnetinfo/annotations` | Multus, by Kubernetes' downward API: each network's device, as the [device information specification](https://github.com/k8snetworkplumbingwg/device-info-spec/blob/main/SPEC.md) has it |
//!
//! `auto` alone is right where there is one port. `auto,iface=net1` and `auto,network=fast` choose; all other keys go to
//! the port: `auto,queues=2`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file that the CNI plugin leaves for a container.
pub const FILE: &str = "port.json";

/// Where containers have the folder of their ports.
pub const FOLDER: &str = "/run/usernic";

/// Where the downward API puts a pod's annotations, as the network resources injector has it.
pub const ANNOTATIONS: &str = "/etc/podnetinfo/annotations";

/// A port, as a container is told of it.
///
/// ```
/// use usernic::auto::PortConfig;
///
/// let text = r#"{"schema": "usernic.port/1", "interface": "net1", "network": "fast", "path": "sock"}"#;
/// assert_eq!(serde_json::from_str::<PortConfig>(text)?.path, "sock");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortConfig {
    /// [`PortConfig::SCHEMA`].
    pub schema: String,
    /// The interface's name, as the orchestrator has it: `net1`.
    pub interface: String,
    /// The network's name.
    pub network: String,
    /// The vhost-user socket: absolute, or relative to the folder of the file.
    pub path: String,
    /// The container listens, and the switch connects.
    #[serde(default)]
    pub server: bool,
    /// Queue pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// The port's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The largest packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Addresses with their prefix lengths, for whoever runs an IP stack on the port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<String>,
    /// Other keys of the port spec.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, String>,
}

impl PortConfig {
    /// The form of the file that this version reads and writes.
    pub const SCHEMA: &str = "usernic.port/1";

    /// The port spec that this file stands for, where the file is in `folder`.
    ///
    /// # Errors
    /// [`AutoError::Separator`]: a value that would be taken for several keys of a spec.
    pub fn spec(&self, folder: &Path) -> Result<String, AutoError> {
        Ok(self.candidate(folder.join(&self.path))?.spec())
    }

    fn candidate(&self, path: PathBuf) -> Result<Candidate, AutoError> {
        let mut keys: Vec<(String, String)> = self.keys.clone().into_iter().collect();
        let mut add = |key: &str, value: Option<String>| {
            keys.extend(value.map(|value| (key.to_owned(), value)));
        };
        add("server", self.server.then(|| "1".to_owned()));
        add("queues", self.queues.map(|n| n.to_string()));
        add("mac", self.mac.clone());
        add("mtu", self.mtu.map(|n| n.to_string()));
        let device = path.display().to_string();
        let path = ("path".to_owned(), device.clone());
        let wrong = |(key, value): &&(String, String)| key.contains([',', '=']) || value.contains(',');
        if let Some((key, value)) = keys.iter().chain([&path]).find(wrong) {
            let (key, value) = (key.clone(), value.clone());
            return Err(AutoError::Separator { key, value });
        }
        Ok(Candidate {
            kind: "virtio-user",
            device,
            interface: Some(self.interface.clone()),
            network: Some(self.network.clone()),
            keys,
        })
    }
}

/// Why there is no such port, or none that can be told from another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AutoError {
    /// Nothing fits.
    #[error("no port was found{wanted}: {looked}")]
    Nothing {
        /// What was asked for, as a phrase, or nothing.
        wanted: String,
        /// Where was looked, and what was there.
        looked: String,
    },
    /// Several fit.
    #[error("there are {} ports: choose one by {}", among.len(), among.join(" or "))]
    Several {
        /// A spec for each.
        among: Vec<String>,
    },
    /// A key of `auto` without a value.
    #[error("{part:?}: write auto, or auto,KEY=VALUE with iface=, network= and keys of the port")]
    Part {
        /// What was written.
        part: String,
    },
    /// A key or a value that a port spec cannot have: it would be several.
    #[error("{key}={value}: a comma, or in a key an equals sign, separates the keys of a port spec")]
    Separator {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// `USERNIC_PORT` is `auto`.
    #[error("USERNIC_PORT={value}: write the port's spec there, as in virtio-user,path=/run/vhost.sock")]
    Circle {
        /// Its value.
        value: String,
    },
}

/// What a process sees of its container.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// What stands for `/`.
    pub root: PathBuf,
    /// The environment.
    pub variables: Vec<(String, String)>,
}

impl Surroundings {
    /// Those of this process. Variables that are no Unicode are left out.
    pub fn here() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Surroundings {
            root: PathBuf::from("/"),
            variables: std::env::vars_os().filter_map(text).collect(),
        }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        let found = self.variables.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }
}

/// A port that may be meant.
#[derive(Clone, Debug, Default)]
struct Candidate {
    kind: &'static str,
    /// The socket or the PCI address.
    device: String,
    interface: Option<String>,
    network: Option<String>,
    keys: Vec<(String, String)>,
}

/// Whether a spec is for this module.
pub(crate) fn is_auto(spec: &str) -> bool {
    spec.split(',').next().is_some_and(|kind| kind.trim() == "auto")
}

/// The spec of the port that `auto` (with its keys) stands for.
///
/// # Errors
/// [`AutoError`]: it lists where was looked.
pub fn find(spec: &str, here: &Surroundings) -> Result<String, AutoError> {
    let mut wanted = [("iface", None), ("network", None)];
    let mut keys = Vec::new();
    for part in spec.split(',').skip(1) {
        let pair = part.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
        let Some((key, value)) = pair.filter(|(_, value)| !value.is_empty()) else {
            return Err(AutoError::Part { part: part.to_owned() });
        };
        match wanted.iter_mut().find(|(name, _)| *name == key) {
            Some((_, place)) => *place = Some(value.to_owned()),
            None => keys.push((key.to_owned(), value.to_owned())),
        }
    }
    if let Some(value) = here.variable("USERNIC_PORT") {
        if is_auto(value) {
            let value = value.to_owned();
            return Err(AutoError::Circle { value });
        }
        return Ok(with(value, &keys));
    }
    let mut looked = vec!["USERNIC_PORT is not set".to_owned()];
    let mut found = configs(here, &mut looked);
    for candidate in devices(here, &mut looked) {
        // Of what several tell of, the one that knows most, with the names that any has.
        let same = found.iter_mut().find(|known| {
            known.device == candidate.device || (known.interface.is_some() && known.interface == candidate.interface)
        });
        match same {
            Some(known) => {
                known.interface = known.interface.take().or(candidate.interface);
                known.network = known.network.take().or(candidate.network);
            }
            None => found.push(candidate),
        }
    }
    let [(_, interface), (_, network)] = &wanted;
    let all = found.len();
    found.retain(|port| {
        let fits = |wanted: &Option<String>, has: &Option<String>| wanted.is_none() || wanted == has;
        fits(interface, &port.interface) && fits(network, &port.network)
    });
    match &found[..] {
        [one] => Ok(with(&one.spec(), &keys)),
        [] => {
            let mut phrase: Vec<String> = Vec::new();
            for (key, value) in &wanted {
                phrase.extend(value.as_ref().map(|value| format!("{key}={value}")));
            }
            let mut text = String::new();
            if !phrase.is_empty() {
                text = format!(" for {} (there are {all} others)", phrase.join(","));
            }
            Err(AutoError::Nothing {
                wanted: text,
                looked: looked.join("; "),
            })
        }
        several => {
            let among = several.iter().map(Candidate::choice).collect();
            Err(AutoError::Several { among })
        }
    }
}

impl Candidate {
    fn spec(&self) -> String {
        let key = if self.kind == "vf" { "pci" } else { "path" };
        let mut text = format!("{},{key}={}", self.kind, self.device);
        for (key, value) in &self.keys {
            text += &format!(",{key}={value}");
        }
        text
    }

    /// What to write to mean this one.
    fn choice(&self) -> String {
        match (&self.interface, &self.network) {
            (Some(interface), _) => format!("auto,iface={interface}"),
            (None, Some(network)) => format!("auto,network={network}"),
            (None, None) => self.spec(),
        }
    }
}

/// A spec with more keys, which replace its own.
fn with(spec: &str, keys: &[(String, String)]) -> String {
    let own = spec.split(',').filter(|part| {
        let key = part.split('=').next().unwrap_or_default().trim();
        !keys.iter().any(|(name, _)| name == key)
    });
    let more = keys.iter().map(|(key, value)| format!("{key}={value}"));
    own.map(str::to_owned).chain(more).collect::<Vec<_>>().join(",")
}

/// More than any of the files here has.
const MOST: u64 = 4 << 20;

/// The text of a regular file. Whatever else has its name, as a FIFO, is an error at once and is not waited for.
fn read(file: &Path) -> std::io::Result<String> {
    use std::io::{Error, ErrorKind, Read};
    use std::os::unix::fs::OpenOptionsExt;

    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(file)?;
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut text = String::new();
    // A file can grow while it is read.
    if file.take(MOST + 1).read_to_string(&mut text)? as u64 > MOST {
        return Err(Error::new(
            ErrorKind::InvalidData,
            format!("it has more than {MOST} bytes"),
        ));
    }
    Ok(text)
}

/// What the CNI plugin left.
fn configs(here: &Surroundings, looked: &mut Vec<String>) -> Vec<Candidate> {
    let folder = here.variable("USERNIC_CONFIG").unwrap_or(FOLDER);
    let dir = here.path(folder);
    let mut files = vec![dir.join(FILE)];
    match std::fs::read_dir(&dir) {
        Ok(entries) => files.extend(entries.flatten().map(|entry| entry.path().join(FILE))),
        Err(error) => {
            looked.push(format!("{folder}: {error}"));
            return Vec::new();
        }
    }
    files.sort();
    let mut found = Vec::new();
    for file in &files {
        let text = match read(file) {
            Ok(text) => text,
            Err(error) => {
                if !matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) {
                    looked.push(format!("{}: {error}", file.display()));
                }
                continue;
            }
        };
        match config(file, &text, here) {
            Ok(candidate) => found.push(candidate),
            Err(error) => looked.push(format!("{}: {error}", file.display())),
        }
    }
    if found.is_empty() {
        looked.push(format!("{folder} and the folders in it have no {FILE} of a port"));
    }
    found
}

fn config(file: &Path, text: &str, here: &Surroundings) -> Result<Candidate, String> {
    let config: PortConfig = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if config.schema != PortConfig::SCHEMA {
        return Err(format!("schema {:?}, not {}", config.schema, PortConfig::SCHEMA));
    }
    let path = match config.path.strip_prefix('/') {
        Some(absolute) => here.root.join(absolute),
        None => file.parent().unwrap_or(Path::new("/")).join(&config.path),
    };
    config.candidate(path).map_err(|e| e.to_string())
}

/// What device plugins and Multus tell.
fn devices(here: &Surroundings, looked: &mut Vec<String>) -> Vec<Candidate> {
    let mut found = status(here, looked);
    let before = found.len();
    for (name, value) in &here.variables {
        if !name.starts_with("PCIDEVICE_") || name.ends_with("_INFO") {
            continue;
        }
        for address in value.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            match address.parse::<crate::pci::Address>() {
                Ok(address) => found.push(Candidate {
                    kind: "vf",
                    device: address.to_string(),
                    ..Candidate::default()
                }),
                Err(_) => looked.push(format!("{name}={value}: {address:?} is no PCI address")),
            }
        }
    }
    if found.len() == before {
        looked.push("no PCIDEVICE_* variable has a PCI address".to_owned());
    }
    found
}

/// One network of Multus' annotation.
#[derive(Deserialize)]
struct Network {
    name: Option<String>,
    interface: Option<String>,
    mac: Option<String>,
    #[serde(rename = "device-info")]
    device: Option<Device>,
}

#[derive(Deserialize)]
struct Device {
    pci: Option<Pci>,
    #[serde(rename = "vhost-user")]
    vhost_user: Option<VhostUser>,
}

#[derive(Deserialize)]
struct Pci {
    #[serde(rename = "pci-address")]
    address: String,
}

#[derive(Deserialize)]
struct VhostUser {
    /// `client`: the host made the socket. `server`: the container is to (3.1.5.1).
    mode: String,
    path: String,
}

/// Multus' annotation, `key="value"` a line, the value quoted.
fn status(here: &Surroundings, looked: &mut Vec<String>) -> Vec<Candidate> {
    let text = match read(&here.path(ANNOTATIONS)) {
        Ok(text) => text,
        Err(error) => {
            looked.push(format!("{ANNOTATIONS}: {error}"));
            return Vec::new();
        }
    };
    let line = text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        // The second is the name that older versions had.
        [
            "k8s.v1.cni.cncf.io/network-status",
            "k8s.v1.cni.cncf.io/networks-status",
        ]
        .contains(&key.trim())
        .then_some(value)
    });
    let Some(quoted) = line else {
        looked.push(format!("{ANNOTATIONS} has no network-status"));
        return Vec::new();
    };
    let networks = serde_json::from_str::<String>(quoted).and_then(|text| serde_json::from_str::<Vec<Network>>(&text));
    let networks = match networks {
        Ok(networks) => networks,
        Err(error) => {
            looked.push(format!("{ANNOTATIONS}: network-status: {error}"));
            return Vec::new();
        }
    };
    let found: Vec<Candidate> = networks.into_iter().filter_map(Network::candidate).collect();
    if found.is_empty() {
        looked.push(format!(
            "network-status in {ANNOTATIONS} tells of no PCI or vhost-user device"
        ));
    }
    found
}

impl Network {
    fn candidate(self) -> Option<Candidate> {
        let device = self.device?;
        let mut keys = Vec::new();
        let (kind, device) = match (device.pci, device.vhost_user) {
            (Some(pci), _) => ("vf", pci.address.parse::<crate::pci::Address>().ok()?.to_string()),
            (None, Some(socket)) => {
                if socket.mode == "server" {
                    keys.push(("server".to_owned(), "1".to_owned()));
                }
                keys.extend(self.mac.map(|mac| ("mac".to_owned(), mac)));
                ("virtio-user", socket.path)
            }
            (None, None) => return None,
        };
        Some(Candidate {
            kind,
            device,
            interface: self.interface,
            // Of namespace/name, the name.
            network: self
                .name
                .map(|name| name.rsplit('/').next().unwrap_or_default().to_owned()),
            keys,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Container(tempfile::TempDir, Vec<(String, String)>);

    impl Container {
        fn new() -> Self {
            Container(tempfile::tempdir().unwrap(), Vec::new())
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn port(&self, interface: &str, more: &str) {
            let text = format!(
                r#"{{"schema":"usernic.port/1","interface":"{interface}","network":"n-{interface}","path":"sock"{more}}}"#
            );
            self.file(&format!("run/usernic/{interface}/port.json"), &text);
        }

        fn status(&self, json: &str) {
            let quoted = serde_json::to_string(json).unwrap();
            self.file(
                "etc/podnetinfo/annotations",
                &format!("a=\"b\"\nk8s.v1.cni.cncf.io/network-status={quoted}\nz=\"\"\n"),
            );
        }

        fn variable(&mut self, name: &str, value: &str) {
            self.1.push((name.into(), value.into()));
        }

        fn find(&self, spec: &str) -> Result<String, String> {
            let root = self.0.path().to_owned();
            let found = find(
                spec,
                &Surroundings {
                    root: root.clone(),
                    variables: self.1.clone(),
                },
            );
            let plain = |text: String| text.replace(&root.display().to_string(), "");
            found.map(plain).map_err(|e| plain(e.to_string()))
        }
    }

    const STATUS: &str = r#"[
        {"name": "kindnet", "interface": "eth0", "ips": ["10.244.0.9"], "default": true},
        {"name": "ns/slice", "interface": "net2", "device-info":
            {"type": "pci", "version": "1.1.0", "pci": {"pci-address": "0000:18:02.5"}}},
        {"name": "ns/share", "interface": "net3", "mac": "02:00:00:00:00:03", "device-info":
            {"type": "vhost-user", "version": "1.1.0", "vhost-user": {"mode": "server", "path": "/var/run/net3/vhost.sock"}}}
    ]"#;

    #[test]
    fn the_plugins_file_is_read() {
        let container = Container::new();
        container.port(
            "net1",
            r#","queues":2,"mac":"02:00:00:00:00:01","mtu":9000,"keys":{"packed_vq":"1"}"#,
        );
        let all = "virtio-user,path=/run/usernic/net1/sock,packed_vq=1,queues=2,mac=02:00:00:00:00:01,mtu=9000";
        assert_eq!(container.find("auto").unwrap(), all);
        assert_eq!(
            container.find("auto,iface=net1,queues=4").unwrap(),
            all.replace(",queues=2", "") + ",queues=4"
        );
        all.parse::<crate::spec::PortSpec>().unwrap();
        container.port("net2", r#","server":true"#);
        let several = container.find("auto").unwrap_err();
        assert!(several.contains("auto,iface=net1 or auto,iface=net2"), "{several}");
        assert_eq!(
            container.find("auto,network=n-net2").unwrap(),
            "virtio-user,path=/run/usernic/net2/sock,server=1"
        );
        assert!(
            container
                .find("auto,iface=net7")
                .unwrap_err()
                .contains("for iface=net7 (there are 2 others)")
        );
    }

    #[test]
    fn device_plugins_and_multus_are_understood() {
        let mut container = Container::new();
        container.variable("PCIDEVICE_INTEL_COM_SRIOV", "0000:18:02.5");
        container.variable("PCIDEVICE_INTEL_COM_SRIOV_INFO", "{\"0000:18:02.5\":{}}");
        assert_eq!(container.find("auto").unwrap(), "vf,pci=0000:18:02.5");
        container.status(STATUS);
        // The same function under two names is one.
        assert_eq!(container.find("auto,iface=net2").unwrap(), "vf,pci=0000:18:02.5");
        assert_eq!(
            container.find("auto,network=share").unwrap(),
            "virtio-user,path=/var/run/net3/vhost.sock,server=1,mac=02:00:00:00:00:03"
        );
        assert!(container.find("auto").unwrap_err().contains("there are 2 ports"));
        // What the plugin says of an interface is nearer than the host's path.
        container.port("net3", "");
        assert_eq!(
            container.find("auto,iface=net3").unwrap(),
            "virtio-user,path=/run/usernic/net3/sock"
        );
    }

    #[test]
    fn a_variable_says_it_all() {
        let mut container = Container::new();
        container.port("net1", "");
        container.variable("USERNIC_PORT", "vhost,path=/x,queues=1");
        assert_eq!(container.find("auto,queues=2").unwrap(), "vhost,path=/x,queues=2");
        container.1[0].1 = "auto".into();
        assert!(container.find("auto").unwrap_err().contains("USERNIC_PORT=auto"));
    }

    /// A tenant's neighbour in the pod, or whoever else may write there.
    #[test]
    fn a_file_that_is_no_regular_one_is_not_waited_for() {
        let container = Container::new();
        container.port("net1", "");
        let folder = container.0.path().join("run/usernic/net2");
        std::fs::create_dir_all(&folder).unwrap();
        let fifo = folder.join("port.json");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
        container.file("run/usernic/net3/port.json", &" ".repeat(MOST as usize + 1));
        assert_eq!(
            container.find("auto").unwrap(),
            "virtio-user,path=/run/usernic/net1/sock"
        );
        let text = container.find("auto,iface=net7").unwrap_err();
        assert!(text.contains("net2/port.json: it is no regular file"), "{text}");
        assert!(text.contains("net3/port.json: it has more than"), "{text}");
    }

    #[test]
    fn a_value_is_never_several_keys() {
        let container = Container::new();
        for more in [
            r#","mac":"02:00:00:00:00:01,memory=hugetlbfs""#,
            r#","keys":{"packed_vq":"1,queues=2"}"#,
            r#","keys":{"packed_vq=1,queues":"2"}"#,
        ] {
            container.port("net1", more);
            let text = container.find("auto").unwrap_err();
            assert!(text.contains("separates the keys"), "{more}: {text}");
        }
    }

    #[test]
    fn who_finds_nothing_says_where() {
        let mut container = Container::new();
        let text = container.find("auto").unwrap_err();
        for place in [
            "USERNIC_PORT",
            "/run/usernic",
            "PCIDEVICE_",
            "/etc/podnetinfo/annotations",
        ] {
            assert!(text.contains(place), "{place}: {text}");
        }
        container.file("run/usernic/a/port.json", "{");
        container.file(
            "run/usernic/b/port.json",
            r#"{"schema":"x/9","interface":"","network":"","path":""}"#,
        );
        container.file("run/usernic/readme", "");
        container.status("[{]");
        container.variable("PCIDEVICE_A", "nonsense,0000");
        let text = container.find("auto").unwrap_err();
        for what in [
            "a/port.json: EOF",
            "schema \"x/9\"",
            "network-status: key must be",
            "\"nonsense\" is no PCI",
        ] {
            assert!(text.contains(what), "{what}: {text}");
        }
        for bad in ["auto,", "auto,iface", "auto,iface="] {
            assert!(container.find(bad).unwrap_err().contains("KEY=VALUE"), "{bad}");
        }
    }
}
