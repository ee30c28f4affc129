//! The switch that gets the ports, one of two.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use super::config::{Attached, Attachment, Backend, Config};
use super::failure::{Code, Failure, OrFail};
use super::ovsdb::Ovsdb;
use crate::control::{Client, Joined, Request};

/// A connection to the switch.
pub enum Switch {
    Ours(Client),
    Ovs(Ovsdb),
}

/// The switch has had its time, over all that this call asks of it.
pub static LATE: AtomicBool = AtomicBool::new(false);

/// How long our switch is asked again that hangs up: it serves so many clients at a time, and a runtime can start more pods
/// than that at once.
const BUSY: Duration = Duration::from_secs(20);

pub fn is_late() -> bool {
    LATE.load(Ordering::Relaxed)
}

/// Asks our switch. Every request can be made twice.
fn ask(client: &mut Client, request: &Request) -> Result<Value> {
    let end = Instant::now() + BUSY;
    loop {
        match client.ask(request, &LATE) {
            Err(error) if error.root_cause().is::<std::io::Error>() && Instant::now() < end && !is_late() => {}
            result => return result,
        }
        // Not all at once.
        let wait = std::process::id() % 64 + 10;
        std::thread::sleep(Duration::from_millis(wait.into()));
        *client = client.again()?;
    }
}

impl Switch {
    /// Connects.
    pub fn connect(config: &Config) -> Result<Self, Failure> {
        match config.backend {
            Backend::Switch => Client::connect(&config.control).map(Switch::Ours),
            Backend::Ovs => Ovsdb::connect(&config.ovsdb).map(Switch::Ovs),
        }
        .or_fail(Code::Unavailable)
    }

    /// Connects to remove ports. `None`: our switch does not run, and its ports are gone with it: one that is started later
    /// cannot make their sockets any more. One that runs and does not answer has them still.
    pub fn connect_to_remove(config: &Config) -> Result<Option<Self>, Failure> {
        if config.backend == Backend::Ovs {
            return Self::connect(config).map(Some);
        }
        match Client::connect(&config.control) {
            Ok(client) => Ok(Some(Switch::Ours(client))),
            Err(error) => match error.root_cause().downcast_ref::<std::io::Error>().map(|e| e.kind()) {
                Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
                _ => Err(error).or_fail(Code::Unavailable),
            },
        }
    }

    /// The group that it runs as.
    pub fn group(&self) -> Result<u32, Failure> {
        match self {
            Switch::Ours(client) => client.group(),
            Switch::Ovs(ovsdb) => ovsdb.group(),
        }
        .or_fail(Code::Unavailable)
    }

    /// Whether containers listen, and it connects.
    pub fn connects(&self) -> bool {
        matches!(self, Switch::Ovs(_))
    }

    /// Makes an attachment's port, unless it is there.
    pub fn add(&mut self, config: &Config, attachment: &Attachment, socket: &Path) -> Result<(), Failure> {
        match self {
            Switch::Ours(client) => add(client, config, attachment, socket),
            Switch::Ovs(ovsdb) => ovsdb.add(config, attachment, socket),
        }
        .or_fail(Code::Switch)
    }

    /// Removes an attachment's port, if it is there.
    pub fn remove(&mut self, attachment: &Attachment) -> Result<(), Failure> {
        match self {
            Switch::Ours(client) => {
                let name = attachment.switch_name();
                ask(client, &Request::Remove { name }).map(drop)
            }
            Switch::Ovs(ovsdb) => ovsdb.remove(attachment).map(drop),
        }
        .or_fail(Code::Switch)
    }

    /// Whether an attachment has its port.
    pub fn has(&mut self, attachment: &Attachment) -> Result<bool, Failure> {
        match self {
            // A port that could not be opened is listed, and is not there.
            Switch::Ours(client) => ports(client).map(|ports| {
                let there = |port: &Value| port["name"] == attachment.switch_name() && port["error"].is_null();
                ports.iter().any(there)
            }),
            Switch::Ovs(ovsdb) => ovsdb.has(attachment),
        }
        .or_fail(Code::Switch)
    }

    /// Who has ports of a network.
    pub fn list(&mut self, network: &str) -> Result<Vec<Attachment>, Failure> {
        match self {
            Switch::Ours(client) => names(client).map(|names| names.iter().filter_map(|n| named(n, network)).collect()),
            Switch::Ovs(ovsdb) => ovsdb.list(network),
        }
        .or_fail(Code::Switch)
    }

    /// Whether it would take a port.
    pub fn check(&mut self, config: &Config) -> Result<(), Failure> {
        match self {
            Switch::Ours(client) => names(client).map(drop),
            Switch::Ovs(ovsdb) => ovsdb.check(&config.bridge),
        }
        .or_fail(Code::Unavailable)
    }
}

fn add(client: &mut Client, config: &Config, attachment: &Attachment, socket: &Path) -> Result<()> {
    // Who may go into the folder is who may connect.
    let mut spec = format!("vhost,path={},socket_mode=0666", socket.display());
    for (key, value) in [("queues", config.queues), ("mtu", config.mtu)] {
        spec += &value.map_or(String::new(), |value| format!(",{key}={value}"));
    }
    let name = attachment.switch_name();
    let request = Request::Add {
        name: name.clone(),
        spec: spec.clone(),
        join: Joined::Learn,
    };
    if ask(client, &request).is_ok() {
        return Ok(());
    }
    // Of another configuration, or the error comes again.
    ask(client, &Request::Remove { name })?;
    ask(client, &request).map(drop)
}

fn ports(client: &mut Client) -> Result<Vec<Value>> {
    let mut list = ask(client, &Request::List)?;
    match list["ports"].take() {
        Value::Array(ports) => Ok(ports),
        _ => bail!("no list of ports"),
    }
}

fn names(client: &mut Client) -> Result<Vec<String>> {
    Ok(ports(client)?
        .iter()
        .filter_map(|port| port["name"].as_str().map(str::to_owned))
        .collect())
}

fn named(name: &str, network: &str) -> Option<Attachment> {
    let mut parts = name.strip_prefix("cni/")?.split('/');
    let attachment = Attachment {
        network: parts.next()?.to_owned(),
        to: Attached {
            container: parts.next()?.to_owned(),
            interface: parts.next()?.to_owned(),
        },
    };
    (attachment.network == network && attachment.switch_name() == name).then_some(attachment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_ports_are_read_again() {
        let found = named("cni/fast/c0ffee/net1", "fast").unwrap();
        assert_eq!(
            (found.to.container.as_str(), found.to.interface.as_str()),
            ("c0ffee", "net1")
        );
        for other in [
            "cni/slow/c0ffee/net1",
            "cni/fast/c0ffee",
            "cni/fast/c0ffee/net1/x",
            "a",
            "cni/fast",
        ] {
            assert!(named(other, "fast").is_none(), "{other}");
        }
    }
}
