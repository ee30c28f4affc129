//! Open vSwitch with its DPDK datapath, in a directory of its own: no service, no root-owned state.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Found, Program};
use crate::process::{self, Process, Surroundings};

const LIMIT: Duration = Duration::from_secs(20);

/// A kind of vhost-user port of OVS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// OVS listens, at `<rundir>/<name>`; the front-end connects.
    VhostUser,
    /// OVS connects to `<rundir>/<name>.sock`; the front-end listens (`server=1`).
    VhostUserClient,
}

/// A running switch with one bridge, `br0`, that forwards by in_port flows alone.
pub struct Ovs {
    found: Found,
    run: PathBuf,
    ports: Vec<String>,
    // Dropped in this order: the switch before its database.
    vswitchd: Process,
    ovsdb: Process,
}

impl Ovs {
    /// Starts database and switch. `run` is an existing, empty directory with a short path; `hugetlbfs` an existing
    /// directory for the switch's own mount, without which it runs with `--no-huge`.
    pub fn start(found: &Found, run: &Path, hugetlbfs: Option<PathBuf>) -> Result<Self> {
        Self::start_with(found, run, hugetlbfs, None)
    }

    /// The same with a driver of DPDK's that it loads: a file.
    pub fn start_with(found: &Found, run: &Path, hugetlbfs: Option<PathBuf>, driver: Option<&Path>) -> Result<Self> {
        let schema = found.schema.as_ref().context("no vswitch.ovsschema")?;
        let mut create = program(&found.ovsdb_tool, "ovsdb-tool")?.command();
        create.arg("create").arg(run.join("conf.db")).arg(schema);
        process::run("ovsdb-tool", create, LIMIT)?;

        let mut server = environment(program(&found.ovsdb_server, "ovsdb-server")?, run);
        server.arg(run.join("conf.db"));
        server.arg(format!("--remote=punix:{}/db.sock", run.display()));
        server.arg(format!("--unixctl={}/ovsdb.ctl", run.display()));
        server
            .arg(format!("--pidfile={}/ovsdb.pid", run.display()))
            .arg("--no-chdir");
        let no_stdin = Surroundings {
            no_stdin: true,
            ..Default::default()
        };
        let mut ovsdb = Process::spawn("ovsdb-server", server, &no_stdin)?;
        wait_for_file(&run.join("db.sock"), &mut ovsdb)?;

        let memory = match &hugetlbfs {
            // The command line of OVS has no --huge-dir of its own: EAL's arguments pass through dpdk-extra.
            Some(dir) => format!("--no-pci --huge-dir={} --single-file-segments", dir.display()),
            None => "--no-pci --no-huge --legacy-mem -m 768".to_owned(),
        };
        let vswitchd = program(&found.vswitchd, "ovs-vswitchd-dpdk")?;
        let plugins = vswitchd
            .plugins()
            .map_or(String::new(), |dir| format!("-d {} ", dir.display()));
        let driver_name = driver.and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let driver_flag = if driver.is_some() {
            format!("-d {driver_name} ")
        } else {
            String::new()
        };
        let extra = format!(
            "{plugins}{driver_flag}{memory} --no-telemetry --file-prefix=xt{}ovs",
            std::process::id()
        );
        let mut settings = vec![
            "other_config:dpdk-init=true".to_owned(),
            "other_config:dpdk-lcore-mask=0x1".to_owned(),
            "other_config:pmd-cpu-mask=0x2".to_owned(),
            "other_config:vhost-sock-dir=.".to_owned(),
            // A pool for each port: with the shared pools, a port without hugepages silently gets none.
            "other_config:per-port-memory=true".to_owned(),
            format!("other_config:dpdk-extra=\"{extra}\""),
        ];
        if hugetlbfs.is_some() {
            settings.push("other_config:dpdk-socket-mem=\"64\"".to_owned());
        }
        vsctl(found, run, &["--no-wait", "init"])?;
        let mut set = vec!["--no-wait", "set", "Open_vSwitch", "."];
        set.extend(settings.iter().map(String::as_str));
        vsctl(found, run, &set)?;

        let mut vswitchd = vswitchd.clone();
        if let Some(folder) = driver.and_then(Path::parent) {
            // By its name alone: EAL refuses paths below /tmp.
            vswitchd.libraries.insert(0, folder.to_owned());
        }
        let mut switch = environment(&vswitchd, run);
        switch.env("XDG_RUNTIME_DIR", run).env("RUNTIME_DIRECTORY", run);
        switch.arg(format!("unix:{}/db.sock", run.display()));
        switch.arg(format!("--unixctl={}/vswitchd.ctl", run.display()));
        switch.arg(format!("--pidfile={}/vswitchd.pid", run.display()));
        switch
            .arg(format!("--log-file={}/vswitchd.log", run.display()))
            .arg("--no-chdir");
        let mut vswitchd = Process::spawn(
            "ovs-vswitchd",
            switch,
            &Surroundings {
                hugetlbfs,
                no_stdin: true,
                ..Default::default()
            },
        )?;
        wait_for_file(&run.join("vswitchd.ctl"), &mut vswitchd)?;

        let ovs = Ovs {
            found: found.clone(),
            run: run.to_owned(),
            ports: Vec::new(),
            vswitchd,
            ovsdb,
        };
        ovs.vsctl(&["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"])?;
        ovs.ofctl(&["del-flows"], &[])?;
        Ok(ovs)
    }

    /// Adds a port that takes frames of up to `mtu` bytes of payload, and gives its socket's path.
    pub fn add_port(&mut self, name: &str, kind: PortKind, mtu: u32) -> Result<PathBuf> {
        let path = match kind {
            PortKind::VhostUser => {
                self.add(name, &["type=dpdkvhostuser"], mtu)?;
                self.run.join(name)
            }
            PortKind::VhostUserClient => {
                let path = self.run.join(format!("{name}.sock"));
                self.add_client_port(name, &path, mtu)?;
                path
            }
        };
        Ok(path)
    }

    /// Adds a port that connects to `path`, where a front-end listens or will.
    pub fn add_client_port(&mut self, name: &str, path: &Path, mtu: u32) -> Result<()> {
        let server = format!("options:vhost-server-path={}", path.display());
        self.add(name, &["type=dpdkvhostuserclient", &server], mtu)
    }

    /// Adds a port that is a device of DPDK's.
    pub fn add_device(&mut self, name: &str, device: &str, mtu: u32) -> Result<()> {
        let device = format!("options:dpdk-devargs=\"{device}\"");
        self.add(name, &["type=dpdk", &device], mtu)
    }

    fn add(&mut self, name: &str, settings: &[&str], mtu: u32) -> Result<()> {
        let mtu = format!("mtu_request={mtu}");
        let number = format!("ofport_request={}", self.ports.len() + 1);
        let mut args = vec!["add-port", "br0", name, "--", "set", "Interface", name];
        args.extend(settings);
        args.extend([mtu.as_str(), &number]);
        self.vsctl(&args)?;
        let error = self.vsctl(&["get", "Interface", name, "error"])?;
        if error.trim() != "[]" {
            anyhow::bail!("OVS port {name}: {}{}", error.trim(), self.vswitchd.tail());
        }
        self.ports.push(name.to_owned());
        Ok(())
    }

    /// Forwards everything from one port to another (numbers from 1, in the order of [`Ovs::add_port`]).
    pub fn connect(&mut self, from: usize, to: usize) -> Result<()> {
        self.ofctl(&["add-flow"], &[format!("in_port={from},actions=output:{to}")])
    }

    /// Forwards as a learning bridge does.
    pub fn learn(&mut self) -> Result<()> {
        self.ofctl(&["add-flow"], &["actions=NORMAL".to_owned()])
    }

    /// The socket of its database.
    pub fn database(&self) -> PathBuf {
        self.run.join("db.sock")
    }

    /// Ports of the bridge, and all interfaces of the database but the bridge's own, as names.
    pub fn names(&self) -> Result<Vec<String>> {
        let ports = self.vsctl(&["list-ports", "br0"])?;
        let interfaces = self.vsctl(&["--bare", "--columns=name", "list", "Interface"])?;
        let lines = ports.lines().chain(interfaces.lines());
        Ok(lines
            .map(str::trim)
            .filter(|n| !n.is_empty() && *n != "br0")
            .map(str::to_owned)
            .collect())
    }

    /// An interface's statistics, as OVS prints them, for messages.
    pub fn statistics(&mut self, port: &str) -> String {
        self.vsctl(&["get", "Interface", port, "statistics"])
            .unwrap_or_else(|e| format!("{e:#}"))
    }

    /// Waits until the switch's log has said `text` so many times.
    pub fn wait_log(&mut self, text: &str, times: usize, limit: Duration) -> Result<()> {
        let path = self.run.join("vswitchd.log");
        let end = std::time::Instant::now() + limit;
        loop {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            if log.matches(text).count() >= times {
                return Ok(());
            }
            if std::time::Instant::now() >= end {
                let last: Vec<&str> = log.lines().rev().take(10).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                anyhow::bail!(
                    "OVS did not log \"{text}\" {times} times within {limit:?}:\n    {}",
                    last.join("\n    ")
                );
            }
            process::sleep(Duration::from_millis(20))?;
        }
    }

    fn vsctl(&self, args: &[&str]) -> Result<String> {
        vsctl(&self.found, &self.run, args)
    }

    fn ofctl(&self, command: &[&str], more: &[String]) -> Result<()> {
        let mut ofctl = environment(program(&self.found.ofctl, "ovs-ofctl")?, &self.run);
        ofctl.args(command).arg(self.run.join("br0.mgmt")).args(more);
        process::run("ovs-ofctl", ofctl, LIMIT).map(drop)
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        if let Some(appctl) = &self.found.appctl {
            for (control, args) in [("vswitchd.ctl", &["exit", "--cleanup"][..]), ("ovsdb.ctl", &["exit"])] {
                let running = if control == "ovsdb.ctl" {
                    self.ovsdb.exited()
                } else {
                    self.vswitchd.exited()
                };
                if matches!(running, Ok(None)) {
                    let mut command = environment(appctl, &self.run);
                    command
                        .arg("-T")
                        .arg("5")
                        .arg("-t")
                        .arg(self.run.join(control))
                        .args(args);
                    let _ = process::run("ovs-appctl", command, Duration::from_secs(6));
                }
            }
        }
        self.vswitchd.stop(Duration::from_secs(2));
        self.ovsdb.stop(Duration::from_secs(2));
    }
}

fn program<'a>(program: &'a Option<Program>, name: &str) -> Result<&'a Program> {
    program
        .as_ref()
        .with_context(|| format!("{name} is missing: cargo xtask peers"))
}

fn environment(program: &Program, run: &Path) -> Command {
    let mut command = program.command();
    command
        .env("OVS_RUNDIR", run)
        .env("OVS_LOGDIR", run)
        .env("OVS_DBDIR", run);
    command
}

fn vsctl(found: &Found, run: &Path, args: &[&str]) -> Result<String> {
    let mut command = environment(program(&found.vsctl, "ovs-vsctl")?, run);
    command
        .arg("--timeout=15")
        .arg(format!("--db=unix:{}/db.sock", run.display()))
        .args(args);
    process::run("ovs-vsctl", command, LIMIT)
}

fn wait_for_file(path: &Path, process: &mut Process) -> Result<()> {
    let end = std::time::Instant::now() + LIMIT;
    while !path.exists() {
        if let Some(status) = process.exited()? {
            anyhow::bail!(
                "{} ended: {}{}",
                process.name(),
                process::describe(status),
                process.tail()
            );
        }
        if std::time::Instant::now() >= end {
            anyhow::bail!(
                "{} made no {} within {LIMIT:?}{}",
                process.name(),
                path.display(),
                process.tail()
            );
        }
        process::sleep(Duration::from_millis(5))?;
    }
    Ok(())
}
