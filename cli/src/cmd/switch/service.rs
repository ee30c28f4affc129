//! A running switch as its control socket knows it: ports are added and removed, and outlive a restart.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result};
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
    join: Joined,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    schema: String,
    ports: Vec<Added>,
}

/// Answers for a switch.
pub struct Service {
    switch: SwitchHandle,
    /// Ports of the command line: name and spec.
    given: Vec<(String, String)>,
    /// Where added ports are kept, if they are.
    state: Option<PathBuf>,
    /// Changes happen one after another.
    added: Mutex<Vec<Added>>,
    /// What the program has given up, once it has.
    confined: OnceLock<Confined>,
}

impl Service {
    /// For a switch that was started with the `given` ports.
    pub fn new(switch: SwitchHandle, given: Vec<(String, String)>, state: Option<PathBuf>) -> Self {
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

    /// Adds the ports that the state file has. What cannot be added any more is told, and forgotten.
    pub fn restore(&self) -> Result<()> {
        let Some(path) = &self.state else { return Ok(()) };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
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
        let mut added = self.lock();
        for port in saved.ports {
            match self.open(&port) {
                Ok(()) => added.push(port),
                Err(error) => tracing::warn!("port {} is gone: {}", port.name, crate::common::describe(&error)),
            }
        }
        self.save(&added)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Added>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, port: &Added) -> Result<()> {
        let spec: PortSpec = port.spec.parse()?;
        let join = match &port.join {
            Joined::Learn => Join::Learn,
            Joined::Reflect => Join::Reflect,
            Joined::Connect(to) => Join::Connect(to.clone()),
        };
        Ok(self.switch.add(&port.name, spec, join)?)
    }

    /// Written whole or not at all.
    fn save(&self, added: &[Added]) -> Result<()> {
        let Some(path) = &self.state else { return Ok(()) };
        let saved = Saved {
            schema: SCHEMA.into(),
            ports: added.to_vec(),
        };
        replace(path, &serde_json::to_vec_pretty(&saved)?)
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
            Request::Add { name, spec, join } => self.add(Added { name, spec, join }),
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
        Ok(json!({ "ports": ports }))
    }

    fn add(&self, port: Added) -> Result<Value> {
        anyhow::ensure!(!port.name.is_empty(), "a port needs a name");
        let mut added = self.lock();
        if added.contains(&port) {
            return Ok(json!({ "added": false }));
        }
        self.open(&port)?;
        added.push(port);
        if let Err(error) = self.save(&added) {
            // Not half done: who asked is told, and the port is not there.
            if let Some(port) = added.pop() {
                self.switch.remove(&port.name)?;
            }
            return Err(error);
        }
        Ok(json!({ "added": true }))
    }

    fn remove(&self, name: &str) -> Result<Value> {
        let mut added = self.lock();
        let removed = match self.switch.remove(name) {
            Ok(()) => true,
            Err(usernic::switch::SwitchError::NoPort { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        added.retain(|port| port.name != name);
        self.save(&added)?;
        Ok(json!({ "removed": removed }))
    }
}

/// Replaces a file, whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let mut file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))?;
        file.write_all(bytes)?;
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
                switch: Some([port.dropped, port.filtered, port.flooded]),
            })
            .collect(),
        addresses: Some(report.addresses.len()),
    }
}
