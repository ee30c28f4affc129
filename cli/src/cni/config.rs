//! What a runtime tells the plugin: environment and network configuration (CNI 1.1, "Execution Protocol").

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use usernic::auto::PortConfig;
use usernic::needs::Needs;
use usernic::spec::PortSpec;

use super::failure::{Code, Failure, fail};

/// Versions of the specification, the newest last.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A network configuration, as the plugin gets it. Keys that it does not know (`capabilities`) are for others. A key that
/// is null counts as missing ([`Config::read`]).
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
    #[serde(default)]
    pub prev_result: Previous,
    /// GC: the attachments that stay; `None` if the runtime gave no list.
    #[serde(skip)]
    pub valid: Option<Vec<Attached>>,
}

/// The result of the plugin before, as far as ours is added to it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Previous {
    #[serde(default)]
    pub interfaces: Vec<Map<String, Value>>,
    #[serde(default)]
    pub ips: Vec<Map<String, Value>>,
    #[serde(default)]
    pub routes: Vec<Value>,
    /// Addresses as CNI 0.2.0 and older have them.
    pub ip4: Option<OldAddress>,
    pub ip6: Option<OldAddress>,
    /// `dns` and whatever else there is.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

/// An address of CNI 0.1.0 and 0.2.0.
#[derive(Clone, Debug, Deserialize)]
pub struct OldAddress {
    pub ip: String,
    pub gateway: Option<String>,
    #[serde(default)]
    pub routes: Vec<Value>,
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
    mac: Option<String>,
}

/// The keys of the container's port spec that the plugin writes, and where the operator sets them instead.
const OWN_KEYS: [(&str, &str); 7] = [
    ("path", "it is the plugin's"),
    ("server", "it follows from backend"),
    ("socket_mode", "it is the plugin's"),
    ("socket_owner", "it is the plugin's"),
    (
        "queues",
        "write queues beside keys, so that the switch's port has them, too",
    ),
    ("mtu", "write mtu beside keys, so that the switch's port has it, too"),
    ("mac", "the runtime gives it: the capability mac, or MAC in CNI_ARGS"),
];

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
    /// `CNI_ARGS`, as it is written.
    args: String,
    /// Folders of plugins.
    pub path: String,
}

/// What `CNI_ARGS` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// The address that the port is to have.
    pub mac: Option<String>,
    /// The pod's number.
    pod: Option<String>,
}

impl Environment {
    /// That of this process. Bytes that are no Unicode become a character that no name may have.
    pub fn here() -> Self {
        let get = |name: &str| std::env::var_os(name).map_or(String::new(), |text| text.to_string_lossy().into_owned());
        Environment {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            interface: get("CNI_IFNAME"),
            netns: get("CNI_NETNS"),
            args: get("CNI_ARGS"),
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
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && !"/:,\u{fffd}".contains(c);
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

    /// An error if ADD or CHECK lack the network namespace, which the specification demands there.
    pub fn has_netns(&self) -> Result<(), Failure> {
        if self.netns.is_empty() {
            let what = format!("CNI_NETNS is not set: {} needs it", self.command);
            return Err(fail(Code::Environment, what));
        }
        Ok(())
    }

    /// `CNI_ARGS`: `KEY=VALUE`, separated by semicolons. As with the reference plugins, a key that is not known is an error
    /// unless `IgnoreUnknown` is true.
    pub fn arguments(&self) -> Result<Arguments, Failure> {
        let wrong = |what: String| fail(Code::Environment, format!("CNI_ARGS={:?}: {what}", self.args));
        let mut values: BTreeMap<&str, &str> = BTreeMap::new();
        for pair in self.args.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong(format!("{pair:?} is no KEY=VALUE")))?;
            if values.insert(key, value).is_some() {
                return Err(wrong(format!("{key} is given twice")));
            }
        }
        let ignore = match values.remove("IgnoreUnknown").map(str::to_ascii_lowercase).as_deref() {
            Some("1" | "true") => true,
            None | Some("0" | "false") => false,
            Some(other) => return Err(wrong(format!("IgnoreUnknown={other}: write 1, true, 0 or false"))),
        };
        let mut take = |key: &str| values.remove(key).filter(|value| !value.is_empty()).map(str::to_owned);
        let arguments = Arguments {
            mac: take("MAC"),
            pod: take("K8S_POD_UID"),
        };
        if let Some(unknown) = values.keys().next().filter(|_| !ignore) {
            return Err(wrong(format!(
                "{unknown} is not known: this plugin knows MAC, K8S_POD_UID and IgnoreUnknown, which lets others pass"
            )));
        }
        if let Some(pod) = arguments.pod.as_ref().filter(|pod| !is_name(pod)) {
            return Err(wrong(format!("K8S_POD_UID={pod:?} is no name")));
        }
        Ok(arguments)
    }

    /// The name of the folder that the pod's interfaces have in common.
    pub fn folder(&self) -> Result<String, Failure> {
        Ok(self.arguments()?.pod.unwrap_or_else(|| self.container.clone()))
    }
}

/// As the specification has it for networks and containers.
fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.len() <= 128 && text.bytes().all(inner) && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

/// Removes the keys of objects that are null, in objects inside of them, too.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// GC's list, which runtimes send under either of two names or, as libcni does, under both. A null is Go's empty list. What
/// one of the lists names stays.
fn valid(config: &Value) -> Result<Option<Vec<Attached>>, serde_json::Error> {
    let lists = ["cni.dev/valid-attachments", "cni.dev/attachments"].map(|key| config.get(key));
    if lists.iter().all(Option::is_none) {
        return Ok(None);
    }
    let mut all = Vec::new();
    for list in lists.into_iter().flatten() {
        all.extend(Option::<Vec<Attached>>::deserialize(list)?.unwrap_or_default());
    }
    Ok(Some(all))
}

impl Config {
    /// Reads a configuration, and checks what every command needs: DEL undoes what an earlier, laxer version made.
    pub fn read(bytes: &[u8]) -> Result<Self, Failure> {
        let decode = |error: serde_json::Error| fail(Code::Decode, format!("the network configuration: {error}"));
        let mut value: Value = serde_json::from_slice(bytes).map_err(decode)?;
        let valid = valid(&value).map_err(decode)?;
        without_nulls(&mut value);
        let mut config: Config = serde_json::from_value(value).map_err(decode)?;
        config.valid = valid;
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
        Ok(config)
    }

    /// Checks what is for new ports, before anything is made.
    pub fn check(&self) -> Result<(), Failure> {
        let invalid = |text: String| Err(fail(Code::Config, text));
        let within = |value: Option<u16>, least, most| value.is_none_or(|n| (least..=most).contains(&n));
        if !within(self.queues, 1, 128) || !within(self.mtu, 68, 9710) || !within(self.vlan, 1, 4094) {
            return invalid("queues is 1 to 128, mtu 68 to 9710, vlan 1 to 4094".into());
        }
        if self.vlan.is_some() && self.backend == Backend::Switch {
            return invalid("vlan is for backend ovs: our switch has none".into());
        }
        if self.uid() == u32::MAX {
            return invalid(format!("uid {} is nobody", u32::MAX));
        }
        for (key, path) in [("control", &self.control), ("ovsdb", &self.ovsdb)] {
            if !path.is_absolute() {
                return invalid(format!(
                    "{key} {path:?}: an absolute path: a plugin runs in whatever folder its runtime is"
                ));
            }
        }
        if let Some((key, why)) = OWN_KEYS.iter().find(|(key, _)| self.keys.contains_key(*key)) {
            return invalid(format!("keys: {key}: {why}"));
        }
        Ok(())
    }

    /// An error unless the container can open this port: its spec goes through the port's own parser.
    pub fn check_port(port: &PortConfig) -> Result<(), Failure> {
        let invalid = |text: String| fail(Code::Config, format!("the container's port: {text}"));
        let folder = std::path::Path::new(usernic::auto::FOLDER).join(&port.interface);
        let spec = port.spec(&folder).map_err(|e| invalid(e.to_string()))?;
        let spec: PortSpec = spec.parse().map_err(|e| invalid(format!("{e}")))?;
        Needs::of(&spec).map(drop).map_err(|e| invalid(e.to_string()))
    }

    /// Who the container's process is.
    pub fn uid(&self) -> u32 {
        self.args.cni.uid.unwrap_or(self.uid)
    }

    /// The port's address, if somebody chose one: the capability before `args.cni` before `CNI_ARGS`, as the reference
    /// plugins have it.
    pub fn mac(&self, arguments: &Arguments) -> Option<String> {
        let chosen = [&self.runtime_config.mac, &self.args.cni.mac, &arguments.mac];
        chosen.into_iter().flatten().find(|mac| !mac.is_empty()).cloned()
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
            (r#"{"cniVersion":null,"name":"a"}"#, "cniVersion"),
            (r#"{"cniVersion":"9.0.0","name":"a"}"#, "9.0.0"),
            (r#"{"cniVersion":"1.1.0","name":null}"#, "name"),
            (r#"{"cniVersion":"1.1.0","name":"../a"}"#, "name"),
            (r#"{"cniVersion":"1.1.0","name":"a","dir":"run"}"#, "absolute"),
            (r#"{"cniVersion":"1.1.0","name":"a","mtu":10}"#, "mtu"),
            (r#"{"cniVersion":"1.1.0","name":"a","vlan":1}"#, "vlan"),
            (r#"{"cniVersion":"1.1.0","name":"a","uid":4294967295}"#, "nobody"),
            (r#"{"cniVersion":"1.1.0","name":"a","backend":"vpp"}"#, "vpp"),
            (
                r#"{"cniVersion":"1.1.0","name":"a","keys":{"queues":"2"}}"#,
                "beside keys",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","prevResult":[1]}"#,
                "network configuration",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","cni.dev/attachments":[null]}"#,
                "network configuration",
            ),
        ] {
            let checked = Config::read(bad.as_bytes()).and_then(|config| config.check());
            let error = checked.unwrap_err().to_string();
            assert!(error.contains(what), "{bad}: {error}");
        }
    }

    #[test]
    fn a_key_that_is_null_counts_as_missing() {
        let keys = [
            "backend",
            "control",
            "ovsdb",
            "bridge",
            "vlan",
            "dir",
            "uid",
            "queues",
            "mtu",
            "keys",
            "ipam",
            "runtimeConfig",
            "args",
            "prevResult",
            "type",
            "capabilities",
        ];
        let plain = read(r#"{"cniVersion":"1.1.0","name":"a"}"#).unwrap();
        let debug = |config: &Config| format!("{config:?}");
        for key in keys {
            let config = read(&format!(r#"{{"cniVersion":"1.1.0","name":"a","{key}":null}}"#)).expect(key);
            assert_eq!(debug(&config), debug(&plain), "{key}");
        }
        for inner in [
            r#""args":{"cni":null}"#,
            r#""args":{"cni":{"uid":null,"mac":null}}"#,
            r#""runtimeConfig":{"mac":null,"CNIDeviceInfoFile":null}"#,
            r#""keys":{"packed_vq":null}"#,
            r#""prevResult":{"interfaces":null,"ips":null,"routes":null,"dns":null}"#,
        ] {
            let config = read(&format!(r#"{{"cniVersion":"1.1.0","name":"a",{inner}}}"#)).expect(inner);
            assert_eq!(debug(&config), debug(&plain), "{inner}");
        }
        let ipam = read(r#"{"cniVersion":"1.1.0","name":"a","ipam":{"type":null}}"#).unwrap();
        assert_eq!(ipam.ipam.unwrap().kind, "");
    }

    #[test]
    fn both_names_of_the_list_are_one_list() {
        let valid = |keys: &str| {
            let config = read(&format!(r#"{{"cniVersion":"1.1.0","name":"a"{keys}}}"#)).unwrap();
            let names = |list: Vec<Attached>| list.into_iter().map(|a| a.container).collect::<Vec<_>>().join(",");
            config.valid.map(names)
        };
        let one = r#"[{"containerID":"aa","ifname":"net1"}]"#;
        let two = r#"[{"containerID":"bb","ifname":"net1"}]"#;
        let (first, second) = (r#""cni.dev/valid-attachments""#, r#""cni.dev/attachments""#);
        assert_eq!(valid(""), None);
        for key in [first, second] {
            assert_eq!(valid(&format!(",{key}:{one}")).as_deref(), Some("aa"));
            assert_eq!(valid(&format!(",{key}:null")).as_deref(), Some(""));
        }
        assert_eq!(
            valid(&format!(",{first}:{one},{second}:{two}")).as_deref(),
            Some("aa,bb")
        );
        assert_eq!(valid(&format!(",{first}:null,{second}:{two}")).as_deref(), Some("bb"));
        assert_eq!(valid(&format!(",{first}:[],{second}:null")).as_deref(), Some(""));
    }

    #[test]
    fn environments() {
        let config = read(r#"{"cniVersion":"1.1.0","name":"fast"}"#).unwrap();
        let environment = |container: &str, interface: &str, args: &str| Environment {
            container: container.into(),
            interface: interface.into(),
            args: args.into(),
            ..Environment::default()
        };
        let good = environment("c0ffee", "net1", "");
        let attachment = good.attachment(&config).unwrap();
        assert_eq!(attachment.switch_name(), "cni/fast/c0ffee/net1");
        // Never another one: who deletes may be a newer version than who added.
        assert_eq!(format!("{:014x}", attachment.number()), NUMBER);
        assert_eq!(good.folder().unwrap(), "c0ffee");
        let folder = |args: &str| environment("c0ffee", "net1", args).folder();
        assert_eq!(folder("K8S_POD_UID=1-2").unwrap(), "1-2");
        assert_eq!(folder("K8S_POD_UID=").unwrap(), "c0ffee");
        assert!(folder("K8S_POD_UID=../..").is_err());
        for (container, interface) in [
            ("", "a"),
            ("a/b", "a"),
            ("..", "a"),
            ("a", ""),
            ("a", ".."),
            ("a", "a/b"),
            ("a", "a,b"),
            ("a", "\u{fffd}"),
            ("a", "0123456789abcdef"),
        ] {
            assert!(
                environment(container, interface, "").attachment(&config).is_err(),
                "{container} {interface}"
            );
        }
    }

    #[test]
    fn cni_args_are_read_whole() {
        let arguments = |args: &str| {
            let environment = Environment {
                args: args.into(),
                ..Environment::default()
            };
            environment.arguments().map_err(|e| e.to_string())
        };
        let all = arguments("IgnoreUnknown=1;K8S_POD_NAME=x;MAC=02:00:00:00:00:01;K8S_POD_UID=7;").unwrap();
        assert_eq!(
            (all.mac.as_deref(), all.pod.as_deref()),
            (Some("02:00:00:00:00:01"), Some("7"))
        );
        assert_eq!(
            arguments("K8S_POD_NAME=x;IgnoreUnknown=TRUE").unwrap(),
            Arguments::default()
        );
        assert_eq!(arguments("").unwrap(), Arguments::default());
        for (bad, what) in [
            ("K8S_POD_NAME=x", "K8S_POD_NAME is not known"),
            ("IgnoreUnknown=0;IP=192.0.2.1", "IP is not known"),
            ("IgnoreUnknown=perhaps", "IgnoreUnknown=perhaps"),
            ("IgnoreUnknown=1;MAC", "no KEY=VALUE"),
            ("MAC=02:00:00:00:00:01;MAC=02:00:00:00:00:02", "twice"),
        ] {
            let error = arguments(bad).unwrap_err();
            assert!(error.contains("CNI_ARGS") && error.contains(what), "{bad}: {error}");
        }
    }

    const NUMBER: &str = "577765a070bf45";
}
