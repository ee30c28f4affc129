//! `cargo xtask test`: every check of this project that needs more than one crate, by name.
//!
//! # To add a case
//!
//! A suite is a function that gives [`Case`]s; [`suites`] lists them. A case has a name (`suite/what`), what it needs
//! of the machine (what is lacking makes it SKIPPED, by that reason) and a function, which gets the [`Ctx`]: a
//! directory of its own, the peers, the built programs. It returns an [`Outcome`], or an error that says what was
//! expected and what was found. All that it starts is a [`Process`](crate::process::Process) or holds one, so that a
//! return of any kind ends it.

mod bad_input;
mod capture;
mod cni;
mod container;
mod ffi;
mod guest;
mod guest_device;
mod hwtest;
mod link;
mod machine;
mod paths;
mod pmd;
mod reliability;
mod startup;
mod unprivileged;
mod vf_dpdk;
mod vf_model;
mod wire;
mod workspace;
mod yardsticks;

use std::any::Any;
use std::cell::{OnceCell, RefCell, RefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::machine::{Machine, full};
use crate::peers::{Found, is_root, which};
use crate::process;
use crate::scratch::Scratch;

pub use hwtest::silicon;
pub use link::{Link, Usernic};

/// How a case ended, if not with an error.
pub enum Outcome {
    /// It holds; a remark for the report, or an empty one.
    Passed(String),
    /// It could not be tried here, and why.
    Skipped(String),
    /// Several results under one case, each with its name: of a test runner that ran below it.
    Parts(Vec<(String, Outcome)>),
}

/// It holds, without a remark.
pub fn passed() -> Result<Outcome> {
    Ok(Outcome::Passed(String::new()))
}

/// What a case needs of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// User id 0.
    Root,
    /// DPDK's testpmd.
    Testpmd,
    /// OVS with its DPDK datapath, and /dev/net/tun.
    Ovs,
    /// Hugepages of 2 MiB.
    Hugepages,
    /// QEMU, and what a guest is made of.
    Machine,
    /// The same with the kernel that has iommufd.
    FullKernel,
    /// testpmd with net_ixgbe, and all that they need, to put them into a guest.
    GuestTestpmd,
    /// A program on the PATH.
    Tool(&'static str),
    /// The `usernic` program, which the first case that needs it builds.
    Usernic,
}

/// What a case does.
type Check = Box<dyn Fn(&Ctx) -> Result<Outcome>>;

/// One check.
pub struct Case {
    /// `suite/what`.
    pub name: String,
    /// What it needs.
    pub needs: Vec<Need>,
    /// The check.
    pub run: Check,
    /// The name of what this case and its neighbours share, if anything: see [`Ctx::shared`].
    pub group: Option<String>,
}

impl Case {
    /// A case.
    pub fn new(name: impl Into<String>, needs: &[Need], run: impl Fn(&Ctx) -> Result<Outcome> + 'static) -> Self {
        Case {
            name: name.into(),
            needs: needs.to_vec(),
            run: Box::new(run),
            group: None,
        }
    }

    /// The case uses what [`Ctx::shared`] keeps under this name.
    pub fn sharing(mut self, group: &str) -> Self {
        self.group = Some(group.to_owned());
        self
    }
}

/// What a case may use.
pub struct Ctx {
    /// The repository.
    pub root: PathBuf,
    /// The run's directory and hugepages.
    pub scratch: Scratch,
    /// The peers.
    pub found: Found,
    /// A directory for this case alone, empty at its beginning.
    pub dir: PathBuf,
    /// The `usernic` program.
    pub usernic: PathBuf,
    /// Show output of long commands as it comes.
    pub verbose: bool,
    /// Rounds of what is done over and over, if not as many as each case thinks enough.
    pub rounds: Option<usize>,
    machine: OnceCell<Result<Machine, String>>,
    shared: RefCell<Option<(String, Box<dyn Any>)>>,
}

impl Ctx {
    /// QEMU and what a guest is made of.
    pub fn machine(&self) -> Result<&Machine> {
        let machine = self
            .machine
            .get_or_init(|| Machine::find().map_err(|e| format!("{e:#}")));
        machine.as_ref().map_err(|e| anyhow::anyhow!("{e}"))
    }

    /// The same with the kernel that has iommufd.
    pub fn full_machine(&self) -> Result<Machine> {
        let stock = self.machine()?;
        Ok(Machine {
            guest: full::find(&stock.guest)?,
            ..stock.clone()
        })
    }

    /// What the cases of a group share: a running peer. The first of them starts it, in a directory that lives as long;
    /// it ends before the first case of another group, and when a case failed: who comes next starts it anew.
    pub fn shared<T: 'static>(&self, group: &str, start: impl FnOnce(&Path) -> Result<T>) -> Result<RefMut<'_, T>> {
        let held = self.shared.borrow().as_ref().is_some_and(|(name, _)| name == group);
        if !held {
            self.end_shared();
            let dir = self.scratch.subdir(group)?;
            // The next case begins anew, also after one that did not get it started.
            let made = start(&dir).inspect_err(|_| drop(std::fs::remove_dir_all(&dir)))?;
            *self.shared.borrow_mut() = Some((group.to_owned(), Box::new(made)));
        }
        RefMut::filter_map(self.shared.borrow_mut(), |shared| {
            shared.as_mut().and_then(|(_, value)| value.downcast_mut())
        })
        .map_err(|_| anyhow::anyhow!("{group} is of another type"))
    }

    fn end_shared(&self) {
        let shared = self.shared.borrow_mut().take();
        if let Some((group, value)) = shared {
            drop(value);
            let _ = std::fs::remove_dir_all(self.scratch.dir().join(group));
        }
    }

    /// An existing directory below the case's own.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// A directory for a peer to mount a hugetlbfs of its own on; none where there are no hugepages or no root.
    pub fn hugetlbfs(&self, peer: &str) -> Result<Option<PathBuf>> {
        self.hugetlbfs_in(&self.dir, peer)
    }

    /// The same for a peer that outlives the case: in its own directory.
    pub fn hugetlbfs_in(&self, dir: &Path, peer: &str) -> Result<Option<PathBuf>> {
        if !is_root() || self.scratch.pages() == 0 {
            return Ok(None);
        }
        let dir = dir.join(format!("huge-{peer}"));
        std::fs::create_dir_all(&dir)?;
        Ok(Some(dir))
    }

    /// A cargo command on this repository.
    pub fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(args).current_dir(&self.root);
        // Of a failure the last lines are shown: they are to be what failed.
        command.env("RUST_BACKTRACE", "0");
        // Tests make sockets in their temporary folders, and a socket's path has 107 bytes at the most.
        if let Ok(dir) = self.scratch.subdir("tmp") {
            command.env("TMPDIR", dir);
        }
        // What `cargo xtask` set for us is not for other packages' builds.
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "CARGO_BIN_NAME" {
                command.env_remove(&key);
            }
        }
        command
    }
}

/// What the command line asked for.
pub struct Options {
    /// What the names begin with; empty: any.
    pub suite: &'static str,
    /// Those of a guest with the kernel that has iommufd, and no others.
    pub full: bool,
    /// A skip is a failure.
    pub require_all: bool,
    /// Only the names.
    pub list: bool,
    /// Part of the names to run; all if none.
    pub filter: Vec<String>,
    /// Output of long commands.
    pub verbose: bool,
    /// Rounds of the reliability cases.
    pub rounds: Option<usize>,
    /// The `usernic` program, if it is not to be built.
    pub usernic: Option<PathBuf>,
}

fn suites() -> Vec<Case> {
    let mut cases = workspace::cases();
    cases.extend(yardsticks::cases());
    cases.extend(capture::cases());
    cases.extend(paths::cases());
    cases.extend(ffi::cases());
    cases.extend(pmd::cases());
    cases.extend(reliability::cases());
    cases.extend(machine::cases());
    cases.extend(guest::cases());
    cases.extend(guest_device::cases());
    cases.extend(vf_model::cases());
    cases.extend(vf_dpdk::cases());
    cases.extend(hwtest::cases());
    cases.extend(bad_input::cases());
    cases.extend(unprivileged::cases());
    cases.extend(cni::cases());
    cases.extend(startup::cases());
    cases.extend(container::cases());
    cases
}

/// Hugepages that the peers need at most at a time: OVS with four ports for jumbo frames (a pool of 100 MiB each), and three
/// programs of ours with long rings of such frames.
const PAGES: usize = 512;

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// What is said once more at the end, where nobody has to search for it.
    wrong: Vec<String>,
}

/// Lines of a failure that are said once more.
const LAST_LINES: usize = 12;

impl Tally {
    fn add(&mut self, name: &str, result: Result<Outcome>, time: Duration) {
        match result {
            Ok(Outcome::Passed(remark)) => {
                self.passed += 1;
                let remark = if remark.is_empty() {
                    String::new()
                } else {
                    format!(": {remark}")
                };
                println!("PASSED {name} ({:.1} s){remark}", time.as_secs_f64());
            }
            Ok(Outcome::Skipped(reason)) => {
                self.skipped += 1;
                println!("SKIPPED {name}: {reason}");
                self.wrong.push(format!("SKIPPED {name}"));
            }
            Ok(Outcome::Parts(parts)) => {
                for (part, outcome) in parts {
                    self.add(&format!("{name}/{part}"), Ok(outcome), time);
                }
            }
            Err(error) => {
                self.failed += 1;
                let error = format!("{error:#}");
                println!("FAILED {name}: {error}");
                let lines: Vec<_> = error.lines().collect();
                let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
                self.wrong.push(format!("FAILED {name}: {}", last.join("\n    ")));
            }
        }
    }

    /// The last lines: whatever did not pass, and the numbers.
    fn print(&self) {
        if !self.wrong.is_empty() {
            println!("\nNot passed:");
            self.wrong.iter().for_each(|what| println!("{what}"));
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        );
    }
}

/// Runs what is asked for; whether that is a success.
pub fn command(root: &Path, options: &Options) -> Result<bool> {
    let mut cases = if options.full { hwtest::full_cases() } else { suites() };
    cases.retain(|c| c.name.starts_with(options.suite));
    cases.retain(|c| options.filter.is_empty() || options.filter.iter().any(|f| c.name.contains(f.as_str())));
    if options.list {
        cases.iter().for_each(|c| println!("{}", c.name));
        return Ok(true);
    }
    if cases.is_empty() {
        bail!(
            "no case has a name with {} in it: see cargo xtask test --list",
            options.filter.join(" or ")
        );
    }
    let huge = is_root()
        && cases.iter().any(|c| {
            c.needs
                .iter()
                .any(|n| matches!(n, Need::Testpmd | Need::Ovs | Need::Hugepages))
        });
    let scratch = Scratch::new(if huge { PAGES } else { 0 })?;
    let mut ctx = Ctx {
        root: root.to_owned(),
        dir: scratch.dir().to_owned(),
        scratch,
        found: Found::search(root),
        usernic: PathBuf::new(),
        verbose: options.verbose,
        rounds: options.rounds,
        machine: OnceCell::new(),
        shared: RefCell::new(None),
    };
    if cases.iter().any(|c| c.needs.contains(&Need::Usernic)) {
        ctx.usernic = workspace::usernic(&ctx, options.usernic.as_deref())?;
    }
    let mut tally = Tally::default();
    for (index, case) in cases.iter().enumerate() {
        if process::interrupted() {
            println!("interrupted before {}", case.name);
            tally.failed += 1;
            break;
        }
        let held = ctx.shared.borrow().as_ref().map(|(name, _)| name.clone());
        if held != case.group {
            ctx.end_shared();
        }
        let start = Instant::now();
        if let Some(reason) = case.needs.iter().find_map(|&need| lacking(&ctx, need)) {
            tally.add(&case.name, Ok(Outcome::Skipped(reason)), start.elapsed());
            continue;
        }
        ctx.dir = ctx.scratch.subdir(&format!("{index}"))?;
        let result = catch_unwind(AssertUnwindSafe(|| (case.run)(&ctx))).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or(panic.downcast_ref::<&str>().copied());
            bail!("panicked: {}", text.unwrap_or("?"))
        });
        if result.is_err() {
            ctx.end_shared();
        }
        tally.add(&case.name, result, start.elapsed());
        let _ = std::fs::remove_dir_all(&ctx.dir);
    }
    ctx.end_shared();
    tally.print();
    Ok(tally.failed == 0 && (tally.skipped == 0 || !options.require_all))
}

fn lacking(ctx: &Ctx, need: Need) -> Option<String> {
    let missing = |what: &str| Some(format!("{what} is missing: cargo xtask peers"));
    match need {
        Need::Hugepages if ctx.scratch.pages() == 0 => Some("no hugepages of 2 MiB can be reserved here".into()),
        Need::Root if !is_root() => Some("needs root".into()),
        Need::Testpmd if ctx.found.testpmd.is_none() => missing("dpdk-testpmd"),
        Need::Ovs if ctx.found.vswitchd.is_none() || ctx.found.ovsdb_server.is_none() => missing("ovs-vswitchd-dpdk"),
        Need::Ovs
            if std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .is_err() =>
        {
            Some("OVS needs /dev/net/tun".into())
        }
        Need::GuestTestpmd => vf_dpdk::lacking(ctx.found.testpmd.as_ref()),
        Need::FullKernel => ctx.full_machine().err().map(|e| format!("{e:#}")),
        Need::Machine => ctx.machine().err().map(|e| format!("{e:#}")),
        Need::Tool(tool) if which(tool).is_none() => missing(tool),
        _ => None,
    }
}
