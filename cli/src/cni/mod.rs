//! The CNI plugin: a port on a switch for a container, and a file in its folder that says so (CNI 1.1).
//!
//! ADD makes, in this order: the record of the [`folder`], the folder, the addresses, the file for the container, the
//! folder's owner, the switch's port, the file for the device information. DEL undoes each, whichever are there. Both may
//! be called again at any time, also after one that was killed; an ADD that fails undoes what it did.
//!
//! There is no other memory: what is to be undone is told by the runtime's names, in the records, in the switch's port
//! names and in OVS' `external_ids`. GC compares these with what is to stay.

mod backend;
pub(crate) mod config;
mod failure;
mod folder;
mod ipam;
mod ovsdb;
mod result;

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use usernic::auto::PortConfig;

use crate::{note, output};
use anyhow::Context as _;
use backend::Switch;
use config::{Attachment, Backend, Config, Environment, VERSIONS};
use failure::{Code, Failure, OrFail, fail};
use folder::{Folder, Record};

const HELP: &str = "\
usernic-cni: the CNI plugin of usernic. A container runtime calls it: it reads CNI_COMMAND and the other CNI_* variables
and a network configuration on the standard input, and writes its answer on the standard output. It has no arguments.
Configuration keys, error codes and examples: docs/orchestrators.md; what runs a plugin by hand: cnitool.
";

/// The longest configuration.
const MOST: usize = 4 << 20;

/// How long the switch may take, whatever it is asked.
const SWITCH: Duration = Duration::from_secs(30);

/// How long the runtime may take to write the configuration, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The plugin by its own name.
pub fn main_by_name() -> ExitCode {
    let argument = std::env::args_os().nth(1).unwrap_or_default();
    match argument.to_str() {
        Some("-h" | "--help" | "help") => write_out(HELP.into()),
        Some("-V" | "--version") => write_out(concat!("usernic-cni ", env!("CARGO_PKG_VERSION"), "\n").into()),
        _ => main(),
    }
}

/// A call of the plugin: the answer on the standard output, errors too.
pub fn main() -> ExitCode {
    // The runtime's mask would keep the container and the switch out of their folders.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let environment = Environment::here();
    let text = configuration();
    let version = text.as_deref().ok().and_then(version);
    let late = || {
        std::thread::sleep(SWITCH);
        backend::LATE.store(true, Ordering::Relaxed);
    };
    // It ends with the process. Without it each question has a limit of its own.
    let _ = std::thread::Builder::new().spawn(late);
    match text.and_then(|text| call(&environment, &text, version)) {
        Ok(Value::Null) => ExitCode::SUCCESS,
        Ok(answer) => write_out(format!("{answer}\n")),
        Err(failure) => {
            let command: String = environment.command.chars().take(100).collect();
            note!("usernic-cni: {command}: {failure}");
            write_out(format!("{}\n", failure.json(version.unwrap_or(newest()))));
            ExitCode::FAILURE
        }
    }
}

/// Writes to the standard output. A runtime that does not read, or has closed it, is an error, and is not waited for.
fn write_out(text: String) -> ExitCode {
    match within(move || output::write_results(&text)) {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => {
            note!("usernic-cni: {error}");
            ExitCode::FAILURE
        }
        None => ExitCode::FAILURE,
    }
}

/// What `work` gives within the runtime's time. It may go on after that: the process is about to end.
fn within<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (send, receive) = mpsc::channel();
    let thread = std::thread::Builder::new().spawn(move || send.send(work()));
    thread.ok().and_then(|_| receive.recv_timeout(PATIENCE).ok())
}

/// The standard input, whole.
fn configuration() -> Result<Vec<u8>, Failure> {
    if std::io::stdin().is_terminal() {
        // Somebody looks what this is: an answer is worth more than to wait.
        return Ok(Vec::new());
    }
    let read = within(|| {
        let mut text = Vec::new();
        std::io::stdin()
            .take(MOST as u64 + 1)
            .read_to_end(&mut text)
            .map(|_| text)
    });
    match read {
        None => Err(fail(
            Code::Io,
            format!("the network configuration: the standard input did not end within {PATIENCE:?}"),
        )),
        Some(Err(error)) => Err(fail(Code::Io, format!("the network configuration: {error}"))),
        Some(Ok(text)) if text.len() > MOST => Err(fail(
            Code::Decode,
            format!("the network configuration has more than {MOST} bytes"),
        )),
        Some(Ok(text)) => Ok(text),
    }
}

fn newest() -> &'static str {
    VERSIONS[VERSIONS.len() - 1]
}

/// The version that the runtime speaks, if it is one that is known; whatever else the configuration is.
fn version(text: &[u8]) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct Version {
        #[serde(rename = "cniVersion")]
        version: String,
    }
    let asked = serde_json::from_slice::<Version>(text).ok()?.version;
    VERSIONS.into_iter().find(|known| *known == asked)
}

fn call(environment: &Environment, text: &[u8], version: Option<&str>) -> Result<Value, Failure> {
    if environment.command == "VERSION" {
        return Ok(json!({ "cniVersion": version.unwrap_or(newest()), "supportedVersions": VERSIONS }));
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
        "DEL" => call.delete().map(|()| Value::Null),
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
        Folder::of(&self.config.dir, &self.environment.folder()?, attachment).or_fail(Code::Config)
    }

    fn add(&self) -> Result<Value, Failure> {
        let attachment = self.attachment()?;
        self.environment.has_netns()?;
        let folder = self.folder(&attachment)?;
        self.config.check()?;
        let port = self.port(&attachment)?;
        Config::check_port(&port)?;
        // Before anything is made.
        ipam::check(&self.config, &self.environment.path)?;
        let mut switch = Switch::connect(&self.config)?;
        // A pod's interface that an earlier container of the pod had.
        if let Some(before) = folder.record().filter(|before| before.attachment != attachment) {
            self.undo(&before.attachment)?;
        }
        self.make(&mut switch, &attachment, &folder, port).inspect_err(|_| {
            // The first error is the one to tell.
            if let Err(error) = self.undo(&attachment) {
                note!("usernic-cni: undoing it: {error}");
            }
        })
    }

    /// The port as the container is told of it, but for its addresses.
    fn port(&self, attachment: &Attachment) -> Result<PortConfig, Failure> {
        let arguments = self.environment.arguments()?;
        let server = self.config.backend == Backend::Ovs;
        let mut keys = self.config.keys.clone();
        if server {
            // Who may go into the folder is who may connect.
            keys.insert("socket_mode".into(), "0666".into());
        }
        Ok(PortConfig {
            schema: PortConfig::SCHEMA.into(),
            interface: attachment.to.interface.clone(),
            network: attachment.network.clone(),
            path: folder::SOCKET.into(),
            server,
            queues: self.config.queues,
            mac: Some(self.config.mac(&arguments).unwrap_or_else(|| mac(attachment))),
            mtu: self.config.mtu,
            ips: Vec::new(),
            keys,
        })
    }

    fn make(
        &self,
        switch: &mut Switch,
        attachment: &Attachment,
        folder: &Folder,
        mut port: PortConfig,
    ) -> Result<Value, Failure> {
        let mut record = folder.record().unwrap_or(Record {
            attachment: attachment.clone(),
            given: None,
        });
        folder.keep(&record).or_fail(Code::Io)?;
        let opened = folder.make().or_fail(Code::Io)?;
        if record.given.is_none() {
            record.given = self.ipam("ADD", Some(attachment))?;
            if record.given.is_some() {
                folder.keep(&record).or_fail(Code::Io)?;
            }
        }
        let given = record.given.unwrap_or_else(|| json!({}));
        let ips = given["ips"].as_array().into_iter().flatten();
        port.ips = ips.filter_map(|ip| ip["address"].as_str().map(str::to_owned)).collect();
        opened.write_config(&port).or_fail(Code::Io)?;
        opened
            .hand_over(self.config.uid(), switch.group()?, port.server)
            .or_fail(Code::Io)?;
        switch.add(&self.config, attachment, &folder.socket())?;
        self.write_device_info(&port, &folder.socket()).or_fail(Code::Io)?;
        Ok(result::of(
            &self.config,
            &self.environment.netns,
            &port,
            &given,
            &folder.socket(),
        ))
    }

    fn delete(&self) -> Result<(), Failure> {
        let attachment = self.attachment()?;
        self.undo(&attachment)?;
        // What an ADD left that was killed while it wrote its record. Where the name is wrong, nothing was made.
        let half = self.folder(&attachment).ok().filter(|folder| folder.record().is_none());
        half.map_or(Ok(()), |folder| folder.forget()).or_fail(Code::Io)
    }

    /// What DEL does: all that is there of an attachment goes. Every part is tried; the first error is told.
    fn undo(&self, attachment: &Attachment) -> Result<(), Failure> {
        let port = Switch::connect_to_remove(&self.config)
            .and_then(|switch| switch.map_or(Ok(()), |mut switch| switch.remove(attachment)));
        let addresses = self.ipam("DEL", Some(attachment)).map(drop);
        let info = self.remove_device_info().or_fail(Code::Io);
        // As long as something else is left, the record tells of it.
        port.and(addresses).and(info)?;
        for (folder, record) in folder::all(&self.config.dir).or_fail(Code::Io)? {
            if record.attachment == *attachment {
                folder.remove().or_fail(Code::Io)?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        let attachment = self.attachment()?;
        self.environment.has_netns()?;
        let folder = self.folder(&attachment)?;
        let amiss = |what: String| Err(fail(Code::Check, what));
        let ours = folder.record().is_some_and(|record| record.attachment == attachment);
        if !ours || !folder.has(&folder.config(), false) {
            return amiss(format!("{} is not there", folder.config().display()));
        }
        let mut switch = Switch::connect(&self.config)?;
        if !switch.has(&attachment)? {
            return amiss(format!("the switch has no port of {}", attachment.switch_name()));
        }
        if !switch.connects() && !folder.has(&folder.socket(), true) {
            return amiss(format!("{} is not there", folder.socket().display()));
        }
        self.ipam("CHECK", Some(&attachment)).map(drop)
    }

    fn status(&self) -> Result<(), Failure> {
        self.config.check()?;
        Switch::connect(&self.config)?.check(&self.config)?;
        self.ipam("STATUS", None).map(drop)
    }

    /// Removes whatever is of this network and not of the attachments that are to stay.
    fn collect(&self) -> Result<(), Failure> {
        let Some(valid) = &self.config.valid else {
            // Without the list everything would go.
            return Err(fail(Code::Config, "GC without cni.dev/valid-attachments"));
        };
        let goes = |attachment: &Attachment| attachment.network == self.config.name && !valid.contains(&attachment.to);
        let mut switch = Switch::connect(&self.config)?;
        // What cannot be removed of one keeps nobody else's.
        let mut results = Vec::new();
        for attachment in switch.list(&self.config.name)?.iter().filter(|a| goes(a)) {
            results.push(switch.remove(attachment));
        }
        for (folder, record) in folder::all(&self.config.dir).or_fail(Code::Io)? {
            if goes(&record.attachment) {
                results.push(folder.remove().or_fail(Code::Io));
            }
        }
        results.push(self.ipam("GC", None).map(drop));
        results.into_iter().collect()
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
}

/// An address that is always the attachment's: unicast, locally administered.
fn mac(attachment: &Attachment) -> String {
    let [_, _, _, a, b, c, d, e] = attachment.number().to_be_bytes();
    usernic::switch::Mac::new([0x02, a, b, c, d, e]).to_string()
}
