//! A running switch as its control socket knows it: ports are added and removed, and outlive a restart.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use usernic::spec::PortSpec;
use usernic::switch::{Join, Role, SwitchHandle, SwitchReport};

use crate::common::Confined;
use crate::control::{Joined, Request};
use crate::metrics::{self, Metrics, PortMetrics};

const SCHEMA: &str = "usernic.switch.ports/1";

/// A port that was added, as the state file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Added {
    name: String,
    spec: String,
    /// How it was to be joined when it was added.
    join: Joined,
    /// How it is joined, where a change of another port made that something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    now: Option<Joined>,
    /// Why it could not be opened when the switch started: it is kept, and opened when it is added again, or at the next
    /// start.
    #[serde(skip)]
    failed: Option<String>,
}

impl Added {
    fn joined(&self) -> &Joined {
        self.now.as_ref().unwrap_or(&self.join)
    }

    fn neighbour(&self) -> Option<&str> {
        match self.joined() {
            Joined::Connect(to) => Some(to),
            _ => None,
        }
    }

    fn is_connected_to(&self, name: &str) -> bool {
        self.neighbour() == Some(name)
    }

    /// Whether a request asks for just this port, as it is.
    fn is(&self, asked: &Added) -> bool {
        let joined = match &asked.join {
            Joined::Connect(to) => self.is_connected_to(to),
            _ => true,
        };
        self.failed.is_none() && self.spec == asked.spec && self.join == asked.join && joined
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    schema: String,
    ports: Vec<Added>,
}

/// The state file, of which this process is the only owner while this lives.
pub struct State {
    path: PathBuf,
    /// Locked. The state file itself is replaced at each change, so that a lock on it would be lost.
    _lock: File,
}

impl State {
    /// Becomes the owner of `path`.
    pub fn own(path: &Path) -> Result<Self> {
        // A link to it is the same file, which `replace` would put another one in the place of.
        let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut beside = path.as_os_str().to_owned();
        beside.push(".lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&beside)
            .with_context(|| format!("opening {}", Path::new(&beside).display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(State {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "another switch keeps its ports in {}: end it, or take another --state",
                    path.display()
                )
            }
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("locking {}", Path::new(&beside).display())),
        }
    }

    fn read(&self) -> Result<Vec<Added>> {
        let path = &self.path;
        let read = || {
            // Opening a FIFO waits for a writer, whatever signal comes.
            let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            if !file.metadata()?.is_file() {
                return Err(std::io::Error::other("it is no regular file"));
            }
            let mut text = String::new();
            file.read_to_string(&mut text).map(|_| text)
        };
        let text = match read() {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        let saved: Saved =
            serde_json::from_str(&text).with_context(|| format!("{} is no list of ports", path.display()))?;
        anyhow::ensure!(
            saved.schema == SCHEMA,
            "{}: schema {:?}, not {SCHEMA}",
            path.display(),
            saved.schema
        );
        Ok(saved.ports)
    }

    /// Written whole or not at all.
    fn write(&self, added: &[Added]) -> Result<()> {
        let saved = Saved {
            schema: SCHEMA.into(),
            ports: added.to_vec(),
        };
        replace(&self.path, &serde_json::to_vec_pretty(&saved)?)
    }
}

/// Answers for a switch.
pub struct Service {
    switch: SwitchHandle,
    /// Ports of the command line: name and spec.
    given: Vec<(String, String)>,
    /// Where added ports are kept, if they are.
    state: Option<State>,
    /// Changes happen one after another.
    added: Mutex<Vec<Added>>,
    /// What the program has given up, once it has.
    confined: OnceLock<Confined>,
}

impl Service {
    /// For a switch that was started with the `given` ports.
    pub fn new(switch: SwitchHandle, given: Vec<(String, String)>, state: Option<State>) -> Self {
        Service {
            switch,
            given,
            state,
            added: Mutex::default(),
            confined: OnceLock::new(),
        }
    }

    /// What is told of what the program has given up, from now on.
    pub fn set_confined(&self, confined: Confined) {
        let _ = self.confined.set(confined);
    }

    /// Adds the ports that the state file has. One that cannot be opened now is told, and kept for the next time: nothing
    /// is written. The names and specs of those that are there.
    pub fn restore(&self) -> Result<Vec<String>> {
        let Some(state) = &self.state else {
            return Ok(Vec::new());
        };
        let mut ports = state.read()?;
        let specs: Vec<PortSpec> = ports.iter().filter_map(|port| port.spec.parse().ok()).collect();
        crate::descriptors::check(&specs);
        // Both ends of a connection say so, whatever the file says.
        for at in 0..ports.len() {
            let Some(to) = ports[at].neighbour().map(str::to_owned) else {
                continue;
            };
            let name = ports[at].name.clone();
            if let Some(other) = ports.iter_mut().find(|other| other.name == to)
                && other.neighbour().is_none()
            {
                other.now = Some(Joined::Connect(name));
            }
        }
        // The first port of a pair is opened alone, the second is connected to it: their order is no matter.
        for at in 0..ports.len() {
            let port = &ports[at];
            let join = match port.joined() {
                Joined::Connect(to) if !self.is_there(&ports[..at], &port.name, to) => &Joined::Alone,
                join => join,
            };
            if let Err(error) = self.open(port, join) {
                let why = crate::common::describe(&error);
                tracing::warn!("port {} is not there, and kept for the next start: {why}", port.name);
                ports[at].failed = Some(why);
            }
        }
        let there = ports.iter().filter(|port| port.failed.is_none());
        let there = there.map(|port| format!("{} ({})", port.name, port.spec)).collect();
        *self.lock() = ports;
        Ok(there)
    }

    /// Whether a port can be connected to its neighbour `to`, of the command line or among those that were opened `before`.
    fn is_there(&self, before: &[Added], name: &str, to: &str) -> bool {
        let opened = |port: &&Added| port.name == to && port.failed.is_none();
        match before.iter().find(opened) {
            Some(other) => other.is_connected_to(name),
            None => self.given.iter().any(|(given, _)| given == to),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Added>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, port: &Added, join: &Joined) -> Result<()> {
        let spec: PortSpec = port.spec.parse()?;
        let join = match join {
            Joined::Learn => Join::Learn,
            Joined::Reflect => Join::Reflect,
            Joined::Alone => Join::Alone,
            Joined::Connect(to) => Join::Connect(to.clone()),
        };
        Ok(self.switch.add(&port.name, spec, join)?)
    }

    fn save(&self, added: &[Added]) -> Result<()> {
        self.state.as_ref().map_or(Ok(()), |state| state.write(added))
    }

    /// Answers a request.
    pub fn answer(&self, request: Request) -> Result<Value> {
        match request {
            Request::Stats => {
                let confined = self.confined.get().copied().unwrap_or_default();
                Ok(serde_json::to_value(super::Snapshot::of(
                    &self.switch.report()?,
                    confined,
                ))?)
            }
            Request::Metrics => Ok(metrics::render(metrics_of(&self.switch.report()?))?.into()),
            Request::List => self.list(),
            Request::Add { name, spec, join } => self.add(Added {
                name,
                spec,
                join,
                now: None,
                failed: None,
            }),
            Request::Remove { name } => self.remove(&name),
        }
    }

    fn list(&self) -> Result<Value> {
        let added = self.lock();
        let report = self.switch.report()?;
        let ports: Vec<Value> = (report.ports.iter().zip(&report.roles))
            .map(|(port, role)| {
                let added = added.iter().find(|a| a.name == port.name).map(|a| &a.spec);
                let given = self.given.iter().find(|g| g.0 == port.name).map(|g| &g.1);
                let role = match role {
                    Role::Learn => json!("learn"),
                    Role::Reflect => json!("reflect"),
                    Role::Connect(to) => json!({ "connect": report.ports.get(*to).map(|p| &p.name) }),
                };
                json!({ "name": port.name, "spec": added.or(given), "role": role, "link_up": port.link_up })
            })
            .collect();
        let failed = added.iter().filter(|port| port.failed.is_some());
        let failed = failed.map(|port| {
            json!({ "name": port.name, "spec": port.spec, "role": port.joined(), "link_up": false, "error": port.failed })
        });
        Ok(json!({ "ports": ports.into_iter().chain(failed).collect::<Vec<_>>() }))
    }

    fn add(&self, port: Added) -> Result<Value> {
        if let Ok(PortSpec { path, .. }) = port.spec.parse()
            && path.is_relative()
            && !path.as_os_str().is_empty()
        {
            bail!(
                "path={}: this switch runs in another folder than whoever asks: begin with /",
                path.display()
            );
        }
        let mut added = self.lock();
        if added.iter().any(|other| other.name == port.name && other.is(&port)) {
            return Ok(json!({ "added": false }));
        }
        self.open(&port, &port.join)?;
        let name = port.name.clone();
        let mut after = added.clone();
        if let Some(to) = port.neighbour()
            && let Some(other) = after.iter_mut().find(|other| other.name == to)
        {
            other.now = Some(Joined::Connect(name.clone()));
        }
        // In the place of one that could not be opened.
        match after.iter_mut().find(|other| other.name == name) {
            Some(failed) => *failed = port,
            None => after.push(port),
        }
        if let Err(error) = self.save(&after) {
            // Not half done: who asked is told, and the port is not there.
            self.switch.remove(&name)?;
            return Err(error);
        }
        *added = after;
        Ok(json!({ "added": true }))
    }

    fn remove(&self, name: &str) -> Result<Value> {
        let mut added = self.lock();
        let mut after = added.clone();
        after.retain(|port| port.name != name);
        for port in after.iter_mut().filter(|port| port.is_connected_to(name)) {
            port.now = Some(Joined::Alone);
        }
        // First the file: what it has comes back at the next start.
        let known = *added != after;
        if known {
            self.save(&after)?;
        }
        let there = match self.switch.remove(name) {
            Ok(()) => true,
            Err(usernic::switch::SwitchError::NoPort { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        let failed = added.len() != after.len();
        *added = after;
        Ok(json!({ "removed": there || failed }))
    }
}

/// Replaces a file, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let mut file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
        // Else the name could be there without the bytes after the machine stopped.
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn metrics_of(report: &SwitchReport) -> Metrics {
    Metrics {
        ports: (report.ports.iter())
            .map(|port| PortMetrics {
                name: port.name.clone(),
                link_up: port.link_up,
                stats: port.stats,
                switch: Some([port.dropped, port.filtered, port.flooded, port.copies]),
            })
            .collect(),
        addresses: Some(report.addresses.len()),
    }
}
