//! What a runtime tells the plugin: environment and network configuration (CNI 1.1, "Execution Protocol").

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::failure::{Code, Failure, fail};

/// Versions of the specification, the newest last.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A network configuration, as the plugin gets it. What it does not know (`prevResult`, `capabilities`) is for others.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// The version of the specification.
    #[serde(default)]
    pub cni_version: String,
    /// The network's name.
    #[serde(default)]
    pub name: String,
    /// Which switch gets the port.
    #[serde(default)]
    pub backend: Backend,
    /// The control socket of our switch.
    #[serde(default = "control")]
    pub control: PathBuf,
    /// The socket of OVS' database.
    #[serde(default = "ovsdb")]
    pub ovsdb: PathBuf,
    /// The bridge of OVS.
    #[serde(default = "bridge")]
    pub bridge: String,
    /// The access VLAN of the port, for OVS.
    pub vlan: Option<u16>,
    /// Where ports have their folders, on the host.
    #[serde(default = "dir")]
    pub dir: PathBuf,
    /// The user, by its number on the host, that the container's process is.
    #[serde(default)]
    pub uid: u32,
    /// Queue pairs.
    pub queues: Option<u16>,
    /// The largest packet.
    pub mtu: Option<u16>,
    /// More keys of the container's port spec.
    #[serde(default)]
    pub keys: BTreeMap<String, String>,
    /// Who gives addresses, if anybody.
    pub ipam: Option<Ipam>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: Args,
    /// The result of a plugin that ran before.
    pub prev_result: Option<Value>,
    /// GC: what is to stay.
    #[serde(rename = "cni.dev/valid-attachments", alias = "cni.dev/attachments")]
    pub valid: Option<Vec<Attached>>,
}

fn control() -> PathBuf {
    "/run/usernic/switch.sock".into()
}

fn ovsdb() -> PathBuf {
    "/var/run/openvswitch/db.sock".into()
}

fn bridge() -> String {
    "br0".into()
}

fn dir() -> PathBuf {
    "/run/usernic-cni".into()
}

/// Which switch gets the ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `usernic switch`.
    #[default]
    Switch,
    /// OVS with its DPDK datapath.
    Ovs,
}

/// The plugin that gives addresses; its own keys are for itself.
#[derive(Clone, Debug, Deserialize)]
pub struct Ipam {
    /// Its name; none if empty, as some runtimes write.
    #[serde(rename = "type", default)]
    pub kind: String,
}

/// What a runtime fills in for plugins that have the capability.
#[derive(Clone, Debug, Default, Deserialize)]
struct RuntimeConfig {
    mac: Option<String>,
    #[serde(rename = "CNIDeviceInfoFile")]
    device_info: Option<PathBuf>,
}

/// `args.cni`: what a pod's annotation may say of its own attachment.
#[derive(Clone, Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: CniArgs,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct CniArgs {
    uid: Option<u32>,
}

/// A container and its interface. The container's name is the runtime's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    #[serde(rename = "containerID")]
    pub container: String,
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// An attachment of a network: what ADD makes and DEL undoes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub network: String,
    #[serde(flatten)]
    pub to: Attached,
}

impl Attachment {
    /// Its name in our switch.
    pub fn switch_name(&self) -> String {
        format!("cni/{}/{}/{}", self.network, self.to.container, self.to.interface)
    }

    /// 56 bits that tell it from others, on every machine and in every version: they name ports of OVS, which are to be
    /// found again (FNV-1a).
    pub fn number(&self) -> u64 {
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let hash = self.switch_name().bytes().fold(0xcbf2_9ce4_8422_2325, fold);
        (hash ^ (hash >> 56)) & ((1 << 56) - 1)
    }
}

/// The environment of a call.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub command: String,
    container: String,
    interface: String,
    /// The network namespace, for the result.
    pub netns: String,
    /// The pod's number, if the runtime tells.
    pod: Option<String>,
    /// Folders of plugins.
    pub path: String,
}

impl Environment {
    /// That of this process.
    pub fn here() -> Self {
        let get = |name: &str| std::env::var(name).unwrap_or_default();
        let args = get("CNI_ARGS");
        let pod = args.split(';').find_map(|pair| pair.strip_prefix("K8S_POD_UID="));
        Environment {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            interface: get("CNI_IFNAME"),
            netns: get("CNI_NETNS"),
            pod: pod.filter(|pod| !pod.is_empty()).map(str::to_owned),
            path: get("CNI_PATH"),
        }
    }

    /// The attachment that the call is about.
    pub fn attachment(&self, config: &Config) -> Result<Attachment, Failure> {
        let wrong =
            |name: &str, value: &str, what: &str| Err(fail(Code::Environment, format!("{name}={value:?}: {what}")));
        if !is_name(&self.container) {
            return wrong(
                "CNI_CONTAINERID",
                &self.container,
                "letters and digits, then also . _ and -",
            );
        }
        let interface = &self.interface;
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && !"/:,".contains(c);
        if interface.is_empty() || interface.len() > 15 || interface.starts_with('.') || !interface.chars().all(plain) {
            return wrong(
                "CNI_IFNAME",
                interface,
                "up to 15 bytes, without / : , and spaces, and no . at the beginning",
            );
        }
        Ok(Attachment {
            network: config.name.clone(),
            to: Attached {
                container: self.container.clone(),
                interface: interface.clone(),
            },
        })
    }

    /// The name of the folder that the pod's interfaces have in common.
    pub fn folder(&self) -> Result<&str, Failure> {
        let name = self.pod.as_deref().unwrap_or(&self.container);
        if is_name(name) {
            Ok(name)
        } else {
            Err(fail(
                Code::Environment,
                format!("K8S_POD_UID={name:?} of CNI_ARGS is no name"),
            ))
        }
    }
}

/// As the specification has it for networks and containers.
fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.len() <= 128 && text.bytes().all(inner) && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

impl Config {
    /// Reads and checks a configuration.
    pub fn read(bytes: &[u8]) -> Result<Self, Failure> {
        let config: Config =
            serde_json::from_slice(bytes).map_err(|e| fail(Code::Decode, format!("the network configuration: {e}")))?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            let text = format!(
                "cniVersion {:?}: this plugin knows {}",
                config.cni_version,
                VERSIONS.join(", ")
            );
            return Err(fail(Code::Version, text));
        }
        let invalid = |text: String| Err(fail(Code::Config, text));
        if !is_name(&config.name) {
            return invalid(format!(
                "name {:?}: letters and digits, then also . _ and -",
                config.name
            ));
        }
        if !config.dir.is_absolute() || config.dir.as_os_str().to_string_lossy().contains(',') {
            return invalid(format!("dir {:?}: an absolute path without commas", config.dir));
        }
        let within = |value: Option<u16>, least, most| value.is_none_or(|n| (least..=most).contains(&n));
        if !within(config.queues, 1, 128) || !within(config.mtu, 68, 9710) || !within(config.vlan, 1, 4094) {
            return invalid("queues is 1 to 128, mtu 68 to 9710, vlan 1 to 4094".into());
        }
        if config.vlan.is_some() && config.backend == Backend::Switch {
            return invalid("vlan is for backend ovs: our switch has none".into());
        }
        if config.uid() == u32::MAX {
            return invalid(format!("uid {} is nobody", u32::MAX));
        }
        Ok(config)
    }

    /// Who the container's process is.
    pub fn uid(&self) -> u32 {
        self.args.cni.uid.unwrap_or(self.uid)
    }

    /// The port's address, if the runtime chose one.
    pub fn mac(&self) -> Option<&str> {
        self.runtime_config.mac.as_deref().filter(|mac| !mac.is_empty())
    }

    /// Where device information is wanted.
    pub fn device_info(&self) -> Option<&std::path::Path> {
        self.runtime_config.device_info.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Config, String> {
        Config::read(json.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn configurations() {
        let config =
            read(r#"{"cniVersion":"1.1.0","name":"fast","type":"usernic-cni","args":{"cni":{"uid":1000}}}"#).unwrap();
        assert_eq!(
            (config.backend, config.uid(), config.mtu),
            (Backend::Switch, 1000, None)
        );
        for (bad, what) in [
            ("{}", "cniVersion"),
            ("[]", "network configuration"),
            (r#"{"cniVersion":"9.0.0","name":"a"}"#, "9.0.0"),
            (r#"{"cniVersion":"1.1.0","name":"../a"}"#, "name"),
            (r#"{"cniVersion":"1.1.0","name":"a","dir":"run"}"#, "absolute"),
            (r#"{"cniVersion":"1.1.0","name":"a","mtu":10}"#, "mtu"),
            (r#"{"cniVersion":"1.1.0","name":"a","vlan":1}"#, "vlan"),
            (r#"{"cniVersion":"1.1.0","name":"a","backend":"vpp"}"#, "vpp"),
        ] {
            let error = read(bad).unwrap_err();
            assert!(error.contains(what), "{bad}: {error}");
        }
    }

    #[test]
    fn environments() {
        let config = read(r#"{"cniVersion":"1.1.0","name":"fast"}"#).unwrap();
        let environment = |container: &str, interface: &str, pod: Option<&str>| Environment {
            container: container.into(),
            interface: interface.into(),
            pod: pod.map(str::to_owned),
            ..Environment::default()
        };
        let good = environment("c0ffee", "net1", None);
        let attachment = good.attachment(&config).unwrap();
        assert_eq!(attachment.switch_name(), "cni/fast/c0ffee/net1");
        // Never another one: who deletes may be a newer version than who added.
        assert_eq!(format!("{:014x}", attachment.number()), NUMBER);
        assert_eq!(good.folder().unwrap(), "c0ffee");
        assert_eq!(environment("c0ffee", "net1", Some("1-2")).folder().unwrap(), "1-2");
        assert!(environment("c0ffee", "net1", Some("../..")).folder().is_err());
        for (container, interface) in [
            ("", "a"),
            ("a/b", "a"),
            ("..", "a"),
            ("a", ""),
            ("a", ".."),
            ("a", "a/b"),
            ("a", "a,b"),
            ("a", "0123456789abcdef"),
        ] {
            assert!(
                environment(container, interface, None).attachment(&config).is_err(),
                "{container} {interface}"
            );
        }
    }

    const NUMBER: &str = "577765a070bf45";
}
