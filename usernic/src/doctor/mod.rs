//! Is this machine, or this container, fit for a port? What is not, and the command that mends it.
//!
//! ```
//! use usernic::doctor::{Level, Question, examine};
//! use usernic::vfio::Host;
//!
//! let question = Question::about("virtio-user,path=/nowhere/at/all.sock".parse()?);
//! let findings = examine(&Host::default(), &question);
//! let fault = findings.iter().find(|f| f.level == Level::Fault).expect("there is no such socket");
//! assert_eq!(fault.check, "no-back-end");
//! # Ok::<(), usernic::spec::SpecError>(())
//! ```
//!
//! All files are read below a [`Host`]'s root, which a test prepares. What no file tells is tried: a connection to a
//! socket, and, where the root is that of the machine, the system calls that a port makes.

mod cores;
mod device;
mod memory;
mod socket;
mod system;
#[cfg(test)]
mod tests;

use crate::error::Error;
use crate::needs::{Memory, Needs};
use crate::spec::{Kind, PortSpec};
use crate::vfio::Host;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// The port works, and could work better.
    Warning,
    /// The port does not work.
    Fault,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The check's name; a fault's own where it has one, as `no-hugepages`.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it, or nothing.
    pub mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Finding {
            check,
            level: Level::Ok,
            what: what.into(),
            mend: None,
        }
    }

    fn bad(level: Level, check: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Finding {
            check,
            level,
            what: what.into(),
            mend: Some(mend.into()),
        }
    }

    fn fault(check: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(Level::Fault, check, what, mend)
    }

    fn warning(check: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(Level::Warning, check, what, mend)
    }
}

/// What is to be known.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// A port that is to be opened here; without one, what most ports need is looked at.
    pub spec: Option<PortSpec>,
    /// A virtual function that is to be driven here, by address or interface.
    pub function: Option<String>,
    /// The CPUs of polling threads.
    pub cpus: Vec<u32>,
    /// Do not connect to a socket: the other side would take it for a front-end.
    pub quiet: bool,
}

impl Question {
    /// A question about a port.
    pub fn about(spec: PortSpec) -> Self {
        Question {
            spec: Some(spec),
            ..Self::default()
        }
    }
}

/// Looks at everything that matters for the question.
pub fn examine(host: &Host, question: &Question) -> Vec<Finding> {
    let process = Process::read(host);
    let mut question = question.clone();
    if let Some(spec) = &mut question.spec {
        // Paths are looked up below the host's root, not in the folder of this process.
        for path in [Some(&mut spec.path), spec.huge_dir.as_mut()].into_iter().flatten() {
            // An empty one is none.
            *path = std::path::absolute(&*path).unwrap_or_default();
        }
        question.cpus.extend(&spec.cpus);
        question.cpus.sort_unstable();
        question.cpus.dedup();
    }
    let question = &question;
    let mut all = system::examine(host, question);
    if let Some(spec) = &question.spec {
        let needs = match spec.kind {
            Kind::Vf => Memory::of(spec).map(drop),
            _ => Needs::of(spec).map(drop),
        };
        match needs {
            Ok(()) => {}
            // Told with the socket.
            Err(Error::VhostUser(_)) => {}
            Err(error) => all.push(Finding::fault("port", error.to_string(), "change the port spec")),
        }
        all.extend(socket::examine(host, spec, &process, question.quiet));
    }
    all.extend(memory::examine(host, question, &process));
    all.extend(device::examine(host, question, &process));
    all.extend(cores::examine(host, question));
    all
}

/// Who this process is, from `/proc/self/status`.
struct Process {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// CapEff, a bit each.
    capabilities: u64,
}

/// `include/uapi/linux/capability.h`.
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_SYS_RAWIO: u32 = 17;

impl Process {
    fn read(host: &Host) -> Self {
        let status = host.read("proc/self/status").unwrap_or_default();
        let line = |key: &str| {
            let found = status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            found.unwrap_or_default().trim().to_owned()
        };
        // Real, effective, saved, file system.
        let effective = |text: String| {
            text.split_whitespace()
                .nth(1)
                .and_then(|id| id.parse().ok())
                .unwrap_or(0)
        };
        let capabilities = u64::from_str_radix(&line("CapEff"), 16).unwrap_or(0);
        Process {
            uid: effective(line("Uid")),
            gid: effective(line("Gid")),
            groups: line("Groups")
                .split_whitespace()
                .filter_map(|id| id.parse().ok())
                .collect(),
            capabilities,
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & 1 << capability != 0
    }

    /// Whether a file of this owner and mode grants `bits` of rwx. See path_resolution(7).
    fn may(&self, uid: u32, gid: u32, mode: u32, bits: u32) -> bool {
        let shift = if self.uid == uid {
            6
        } else if self.gid == gid || self.groups.contains(&gid) {
            3
        } else {
            0
        };
        self.has(CAP_DAC_OVERRIDE) || mode >> shift & bits == bits
    }
}
