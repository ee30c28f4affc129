//! The CNI plugin: a port on a switch for a container, and a file in its folder that says so (CNI 1.1).
//!
//! ADD makes, in this order: the [`folder`] (whose it is stands in it from the beginning), the addresses, the file for the
//! container, the folder's owner, the switch's port, the file for the device information. DEL undoes each, whichever are
//! there. Both may be called again at any time, also after one that was killed; an ADD that fails undoes what it did.
//!
//! There is no other memory: what is to be undone is told by the runtime's names, in the folder, in the switch's port
//! names and in OVS' `external_ids`. GC compares these with what is to stay.

mod backend;
mod config;
mod failure;
mod folder;
mod ipam;
mod ovsdb;

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use usernic::auto::PortConfig;

use anyhow::Context as _;
use backend::Switch;
use config::{Attachment, Backend, Config, Environment, VERSIONS};
use failure::{Code, Failure, OrFail, fail};
use folder::Folder;

/// A call of the plugin: the answer on the standard output, errors too.
pub fn main() -> ExitCode {
    let environment = Environment::here();
    let mut text = Vec::new();
    let read = std::io::stdin().take(4 << 20).read_to_end(&mut text);
    let read = read.map_err(anyhow::Error::from).or_fail(Code::Io);
    let version = serde_json::from_slice::<Value>(&text).ok();
    let version = version.as_ref().and_then(|config| config["cniVersion"].as_str());
    let version = version.filter(|version| VERSIONS.contains(version));
    let newest = VERSIONS[VERSIONS.len() - 1];
    match read.and_then(|_| call(&environment, &text)) {
        Ok(Value::Null) => ExitCode::SUCCESS,
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("usernic-cni: {}: {failure}", environment.command);
            println!("{}", failure.json(version.unwrap_or(newest)));
            ExitCode::FAILURE
        }
    }
}

fn call(environment: &Environment, text: &[u8]) -> Result<Value, Failure> {
    if environment.command == "VERSION" {
        return Ok(json!({ "cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS }));
    }
    if environment.command.is_empty() {
        let what = "CNI_COMMAND is not set: this is a plugin that a container runtime calls (docs/orchestrators.md)";
        return Err(fail(Code::Environment, what));
    }
    let config = Config::read(text)?;
    let call = Call {
        config,
        text,
        environment,
    };
    match environment.command.as_str() {
        "ADD" => call.add(),
        "DEL" => call
            .attachment()
            .and_then(|attachment| call.undo(&attachment))
            .map(|()| Value::Null),
        "CHECK" => call.check().map(|()| Value::Null),
        "GC" => call.collect().map(|()| Value::Null),
        "STATUS" => call.status().map(|()| Value::Null),
        other => Err(fail(Code::Environment, format!("CNI_COMMAND={other:?} is not known"))),
    }
}

struct Call<'a> {
    config: Config,
    text: &'a [u8],
    environment: &'a Environment,
}

impl Call<'_> {
    fn attachment(&self) -> Result<Attachment, Failure> {
        self.environment.attachment(&self.config)
    }

    fn ipam(&self, command: &str, attachment: Option<&Attachment>) -> Result<Option<Value>, Failure> {
        ipam::call(
            &self.config,
            self.text,
            &self.environment.path,
            command,
            attachment.map(|a| &a.to),
        )
    }

    fn folder(&self, attachment: &Attachment) -> Result<Folder, Failure> {
        Folder::of(&self.config.dir, self.environment.folder()?, attachment).or_fail(Code::Config)
    }

    fn add(&self) -> Result<Value, Failure> {
        let attachment = self.attachment()?;
        let folder = self.folder(&attachment)?;
        // Before anything is made.
        let mut switch = Switch::connect(&self.config)?;
        // A pod's interface that an earlier container of the pod had.
        if let Some(before) = folder.whose().filter(|before| *before != attachment) {
            self.undo(&before)?;
        }
        self.make(&mut switch, &attachment, &folder).inspect_err(|_| {
            // The first error is the one to tell.
            if let Err(error) = self.undo(&attachment) {
                eprintln!("usernic-cni: undoing it: {error}");
            }
        })
    }

    fn make(&self, switch: &mut Switch, attachment: &Attachment, folder: &Folder) -> Result<Value, Failure> {
        folder.make(attachment).or_fail(Code::Io)?;
        let mut port = folder.config().unwrap_or(PortConfig {
            schema: PortConfig::SCHEMA.into(),
            interface: attachment.to.interface.clone(),
            network: attachment.network.clone(),
            path: folder
                .socket()
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            server: false,
            queues: None,
            mac: None,
            mtu: None,
            ips: Vec::new(),
            keys: Default::default(),
        });
        let mut given = json!({});
        if port.ips.is_empty()
            && let Some(answer) = self.ipam("ADD", Some(attachment))?
        {
            let ips = answer["ips"].as_array().into_iter().flatten();
            port.ips = ips.filter_map(|ip| ip["address"].as_str().map(str::to_owned)).collect();
            given = answer;
        }
        port.mac = Some(self.config.mac().map_or_else(|| mac(attachment), str::to_owned));
        (port.queues, port.mtu) = (self.config.queues, self.config.mtu);
        port.server = switch.connects();
        port.keys = self.config.keys.clone();
        if port.server {
            // Who may go into the folder is who may connect.
            port.keys.insert("socket_mode".into(), "0666".into());
        }
        folder.write_config(&port).or_fail(Code::Io)?;
        folder
            .hand_over(self.config.uid(), switch.group()?, port.server)
            .or_fail(Code::Io)?;
        switch.add(&self.config, attachment, &folder.socket())?;
        self.write_device_info(&port, &folder.socket()).or_fail(Code::Io)?;
        Ok(self.result(&port, &given, &folder.socket()))
    }

    /// What DEL does: all that is there of an attachment goes. Every part is tried; the first error is told.
    fn undo(&self, attachment: &Attachment) -> Result<(), Failure> {
        let port = match Switch::connect(&self.config) {
            Ok(mut switch) => switch.remove(attachment),
            // Ours has its ports in its process alone: one that is started later cannot make this one's socket any more.
            Err(_) if self.config.backend == Backend::Switch => Ok(()),
            Err(error) => Err(error),
        };
        let addresses = self.ipam("DEL", Some(attachment)).map(drop);
        let info = self.remove_device_info().or_fail(Code::Io);
        // As long as something else is left, the folder tells of it.
        port.and(addresses).and(info)?;
        folder::remove(&self.config.dir, attachment).or_fail(Code::Io)
    }

    fn check(&self) -> Result<(), Failure> {
        let attachment = self.attachment()?;
        let folder = self.folder(&attachment)?;
        let amiss = |what: String| Err(fail(Code::Check, what));
        if folder.whose().as_ref() != Some(&attachment) || folder.config().is_none() {
            return amiss(format!(
                "{} is not there",
                folder.socket().with_file_name(usernic::auto::FILE).display()
            ));
        }
        let mut switch = Switch::connect(&self.config)?;
        if !switch.has(&attachment)? {
            return amiss(format!("the switch has no port of {}", attachment.switch_name()));
        }
        if !switch.connects() && !folder.socket().exists() {
            return amiss(format!("{} is not there", folder.socket().display()));
        }
        self.ipam("CHECK", Some(&attachment)).map(drop)
    }

    fn status(&self) -> Result<(), Failure> {
        Switch::connect(&self.config)?.check(&self.config)?;
        self.ipam("STATUS", None).map(drop)
    }

    /// Removes whatever is of this network and not of the attachments that are to stay.
    fn collect(&self) -> Result<(), Failure> {
        let Some(valid) = &self.config.valid else {
            // Without the list everything would go.
            return Err(fail(Code::Config, "GC without cni.dev/valid-attachments"));
        };
        let stays = |attachment: &Attachment| valid.contains(&attachment.to);
        let mut switch = Switch::connect(&self.config)?;
        for attachment in switch.list(&self.config.name)?.iter().filter(|a| !stays(a)) {
            switch.remove(attachment)?;
        }
        let ours = |attachment: &Attachment| attachment.network == self.config.name;
        for (folder, attachment) in folder::all(&self.config.dir).or_fail(Code::Io)? {
            if ours(&attachment) && !stays(&attachment) {
                folder.remove().or_fail(Code::Io)?;
            }
        }
        folder::remove_abandoned(&self.config.dir).or_fail(Code::Io)?;
        self.ipam("GC", None).map(drop)
    }

    fn write_device_info(&self, port: &PortConfig, socket: &Path) -> anyhow::Result<()> {
        let Some(path) = self.config.device_info() else {
            return Ok(());
        };
        let mode = if port.server { "server" } else { "client" };
        let info = json!({
            "type": "vhost-user",
            "version": "1.1.0",
            "vhost-user": { "mode": mode, "path": socket },
        });
        let write = || -> std::io::Result<()> {
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            std::fs::write(path, info.to_string())
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    fn remove_device_info(&self) -> anyhow::Result<()> {
        let Some(path) = self.config.device_info() else {
            return Ok(());
        };
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// ADD's answer: that of the plugin before, with our interface and our addresses.
    fn result(&self, port: &PortConfig, given: &Value, socket: &Path) -> Value {
        let version = self.config.cni_version.as_str();
        let mut result = self
            .config
            .prev_result
            .clone()
            .filter(Value::is_object)
            .unwrap_or_else(|| json!({}));
        let mut interface = json!({
            "name": port.interface,
            "mac": port.mac,
            "sandbox": self.environment.netns,
        });
        if version == "1.1.0" {
            interface["socketPath"] = json!(socket);
            if let Some(mtu) = port.mtu {
                interface["mtu"] = mtu.into();
            }
        }
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut interfaces = list(&result["interfaces"]);
        let (mut ips, mut routes) = (list(&result["ips"]), list(&result["routes"]));
        let mut ours = list(&given["ips"]);
        if ours.is_empty() {
            ours = port.ips.iter().map(|address| json!({ "address": address })).collect();
        }
        for mut ip in ours {
            ip["interface"] = interfaces.len().into();
            if version.starts_with("0.") && ip["version"].is_null() {
                let six = ip["address"].as_str().is_some_and(|address| address.contains(':'));
                ip["version"] = if six { "6".into() } else { "4".into() };
            }
            ips.push(ip);
        }
        interfaces.push(interface);
        routes.extend(list(&given["routes"]));
        result["cniVersion"] = version.into();
        result["interfaces"] = interfaces.into();
        result["ips"] = ips.into();
        result["routes"] = routes.into();
        if result["dns"].is_null() {
            result["dns"] = if given["dns"].is_object() {
                given["dns"].clone()
            } else {
                json!({})
            };
        }
        result
    }
}

/// An address that is always the attachment's: unicast, locally administered.
fn mac(attachment: &Attachment) -> String {
    let [_, _, _, a, b, c, d, e] = attachment.number().to_be_bytes();
    usernic::switch::Mac::new([0x02, a, b, c, d, e]).to_string()
}
