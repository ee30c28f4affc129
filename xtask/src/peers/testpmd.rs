//! DPDK's testpmd, as a vhost back-end or as a virtio_user front-end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::Program;
use crate::process::{Process, Surroundings};

/// Up to this long for EAL to start: it takes 0.2 s, or seconds on a busy machine.
const START: Duration = Duration::from_secs(30);

/// Up to this long for the answer to a command.
const ANSWER: Duration = Duration::from_secs(10);

/// How a testpmd is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// For messages, and for EAL's file prefix: unique among those that run.
    pub name: String,
    /// The devices, as `--vdev` takes them: see [`vhost`] and [`virtio_user`].
    pub vdevs: Vec<String>,
    /// An existing directory for a hugetlbfs of its own; without it, testpmd runs with `--no-huge`.
    pub huge_dir: Option<PathBuf>,
    /// CPU of the thread that takes commands, and of the one that forwards.
    pub cpus: (usize, usize),
    /// Frames up to 9000 bytes, in mbufs of one piece.
    pub jumbo: bool,
    /// mbufs of its pool.
    pub mbufs: u32,
    /// EAL's run directory: not the machine's, where other users' are.
    pub runtime_dir: PathBuf,
    /// A driver to load.
    pub plugin: Option<PathBuf>,
    /// Further arguments before `--`, for EAL.
    pub eal: Vec<String>,
    /// Further arguments behind `--`.
    pub extra: Vec<String>,
}

impl Config {
    /// A testpmd that has no device yet.
    pub fn new(name: &str, runtime_dir: &Path) -> Self {
        Config {
            name: name.to_owned(),
            vdevs: Vec::new(),
            huge_dir: None,
            cpus: (0, 1),
            jumbo: false,
            mbufs: 16384,
            runtime_dir: runtime_dir.to_owned(),
            plugin: None,
            eal: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// The command line.
    pub fn command(&self, program: &Program) -> std::process::Command {
        let mut program = program.clone();
        if let Some(folder) = self.plugin.as_deref().and_then(Path::parent) {
            // By its name alone: EAL refuses paths below /tmp.
            program.libraries.insert(0, folder.to_owned());
        }
        let mut command = program.line_buffered();
        command
            .env("XDG_RUNTIME_DIR", &self.runtime_dir)
            .env("RUNTIME_DIRECTORY", &self.runtime_dir);
        command
            .arg("--lcores")
            .arg(format!("0@{},1@{}", self.cpus.0, self.cpus.1));
        command
            .arg("--no-pci")
            .arg("--no-telemetry")
            .arg(format!("--file-prefix={}", self.prefix()));
        match &self.huge_dir {
            Some(dir) => {
                // One file for each list of segments: more than 8 regions, and the memory table fails.
                command
                    .arg(format!("--huge-dir={}", dir.display()))
                    .arg("--single-file-segments");
            }
            None => {
                let mib = 96 + u64::from(self.mbufs) * if self.jumbo { 10 } else { 3 } / 1024;
                command.arg("--no-huge").arg("-m").arg(mib.to_string());
            }
        }
        if let Some(plugins) = program.plugins().filter(|_| program.drivers.is_empty()) {
            command.arg("-d").arg(plugins);
        }
        for driver in &program.drivers {
            command.arg("-d").arg(driver);
        }
        if let Some(name) = self.plugin.as_deref().and_then(Path::file_name) {
            command.arg("-d").arg(name);
        }
        for vdev in &self.vdevs {
            command.arg(format!("--vdev={vdev}"));
        }
        command.args(&self.eal);
        command
            .arg("--")
            .arg("-i")
            .arg(format!("--total-num-mbufs={}", self.mbufs));
        // Frames may be waiting already when forwarding starts: testpmd would throw them away.
        command
            .arg("--no-lsc-interrupt")
            .arg("--disable-link-check")
            .arg("--no-flush-rx");
        if self.jumbo {
            command.arg("--mbuf-size=9728").arg("--max-pkt-len=9018");
        }
        command.args(&self.extra);
        command
    }

    fn prefix(&self) -> String {
        format!("xt{}{}", std::process::id(), self.name)
    }
}

/// `--vdev` of a back-end that listens on `path`.
pub fn vhost(index: usize, path: &Path, more: &str) -> String {
    format!("net_vhost{index},iface={},queues=1{more}", path.display())
}

/// `--vdev` of a front-end that connects to `path`.
pub fn virtio_user(index: usize, path: &Path, queue_size: u16, more: &str) -> String {
    format!(
        "net_virtio_user{index},path={},queues=1,queue_size={queue_size}{more}",
        path.display()
    )
}

/// `--vdev` of our plugin's port that connects to `path`.
pub fn usernic(index: usize, path: &Path, queue_size: u16, more: &str) -> String {
    format!(
        "net_usernic{index},path={},queue_size={queue_size}{more}",
        path.display()
    )
}

/// `--vdev` of a memif port on `path`, of rings of 2 to the power of `ring_bits`: the server listens, the client owns the
/// memory.
pub fn memif(index: usize, path: &Path, server: bool, ring_bits: u32, more: &str) -> String {
    let role = if server { "server" } else { "client" };
    format!(
        "net_memif{index},role={role},socket={},socket-abstract=no,rsize={ring_bits}{more}",
        path.display()
    )
}

/// Counters of a port.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Packets received.
    pub rx: u64,
    /// Packets sent.
    pub tx: u64,
    /// Packets received a second since the statistics were last shown, by testpmd's own clock.
    pub rx_pps: f64,
    /// Packets sent a second, likewise.
    pub tx_pps: f64,
}

/// A running testpmd.
pub struct Testpmd {
    process: Process,
    runtime: PathBuf,
    forwarding: bool,
}

impl Testpmd {
    /// Starts it and waits until it takes commands.
    pub fn start(program: &Program, config: &Config) -> Result<Self> {
        let surroundings = Surroundings {
            hugetlbfs: config.huge_dir.clone(),
            ..Default::default()
        };
        let command = config.command(program);
        let line = super::shown(&command);
        let process = Process::spawn(&format!("testpmd {}", config.name), command, &surroundings)?;
        let runtime = config.runtime_dir.join("dpdk").join(config.prefix());
        let mut testpmd = Testpmd {
            process,
            runtime,
            forwarding: false,
        };
        testpmd.process.wait_for("testpmd> ", 0, START).with_context(|| {
            format!(
                "started as: {line} (with {} free hugepages)",
                crate::scratch::free_pages()
            )
        })?;
        Ok(testpmd)
    }

    /// The process, to stop and continue it and to read its threads' times.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The process's id.
    pub fn pid(&self) -> rustix::process::Pid {
        self.process.pid()
    }

    /// Runs a command and gives what it printed up to the next prompt.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let mark = self.process.mark();
        self.process.command(line)?;
        // The terminal library echoes the line after its prompt, so what was typed stands before the answer.
        let echoed = self.process.wait_for(line, mark, ANSWER)?;
        let end = self.process.wait_for("testpmd> ", echoed, ANSWER)?;
        let answer = self.process.output_since(echoed);
        let answer = answer[..answer.len().min(end - echoed)].to_owned();
        if answer.contains("Bad arguments") || answer.contains("Command not found") {
            bail!("testpmd does not know \"{line}\": {}", answer.trim());
        }
        Ok(answer)
    }

    /// Starts forwarding in a mode: `io`, `rxonly`, `txonly`, `macswap`.
    pub fn forward(&mut self, mode: &str) -> Result<()> {
        self.stop()?;
        self.command(&format!("set fwd {mode}"))?;
        self.command("start")?;
        self.forwarding = true;
        Ok(())
    }

    /// Starts forwarding, after sending `bursts` bursts of its own.
    pub fn forward_first(&mut self, mode: &str, bursts: u32) -> Result<()> {
        self.stop()?;
        self.command(&format!("set fwd {mode}"))?;
        self.command(&format!("start tx_first {bursts}"))?;
        self.forwarding = true;
        Ok(())
    }

    /// Stops forwarding.
    pub fn stop(&mut self) -> Result<()> {
        if self.forwarding {
            self.command("stop")?;
            self.forwarding = false;
        }
        Ok(())
    }

    /// Counters of a port.
    pub fn stats(&mut self, port: usize) -> Result<Stats> {
        let text = self.command(&format!("show port stats {port}"))?;
        parse_stats(&text).with_context(|| format!("testpmd's statistics: {text}"))
    }

    /// Whether it counts its polls by the packets that they moved; counting begins anew.
    pub fn record_polls(&mut self, on: bool) -> Result<()> {
        let on = if on { "on" } else { "off" };
        self.command(&format!("set record-burst-stats {on}"))?;
        self.command("clear fwd stats all").map(drop)
    }

    /// The share of polls that moved packets since [`Testpmd::record_polls`], of sending or of receiving, to a hundredth;
    /// none if it polled nothing.
    pub fn busy(&mut self, sending: bool) -> Result<Option<f64>> {
        let text = self.command("show fwd stats all")?;
        Ok(parse_busy(&text, if sending { "TX-bursts :" } else { "RX-bursts :" }))
    }

    /// What it printed while it started.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // The end of its input ends it in order, which removes its socket; then no more patience.
        self.process.close_stdin();
        let _ = self.process.signal(rustix::process::Signal::CONT);
        self.process.stop(Duration::from_secs(3));
        let _ = std::fs::remove_dir_all(&self.runtime);
    }
}

fn parse_stats(text: &str) -> Option<Stats> {
    let value = |label: &str| -> Option<f64> {
        let rest = &text[text.find(label)? + label.len()..];
        rest.split_whitespace().next()?.parse().ok()
    };
    Some(Stats {
        rx: value("RX-packets:")? as u64,
        tx: value("TX-packets:")? as u64,
        rx_pps: value("Rx-pps:")?,
        tx_pps: value("Tx-pps:")?,
    })
}

/// The rest of "97% of 0 pkts", the first class that testpmd shows.
fn parse_busy(text: &str, label: &str) -> Option<f64> {
    let rest = &text[text.find(label)? + label.len()..];
    let classes = rest.lines().next()?.split_once('[')?.1;
    let (percent, of) = classes.split_once("% of ")?;
    let empty: f64 = percent.trim().parse().ok()?;
    let empty = if of.starts_with("0 pkts") { empty } else { 0.0 };
    Some(1.0 - empty / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read() {
        let text = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 17728832   RX-missed: 0          RX-bytes:  1134645248
  RX-errors: 0
  RX-nombuf:  0         
  TX-packets: 12          TX-errors: 0          TX-bytes:  0

  Throughput (since last show)
  Rx-pps:      4243835          Rx-bps:   2172843688
  Tx-pps:            3          Tx-bps:            0
";
        let stats = parse_stats(text).unwrap();
        assert_eq!((stats.rx, stats.tx), (17_728_832, 12));
        assert_eq!((stats.rx_pps, stats.tx_pps), (4_243_835.0, 3.0));
        assert!(parse_stats("RX-packets: x").is_none());
    }

    #[test]
    fn busy_polls_are_what_is_not_empty() {
        let text = "  TX-packets: 157216  TX-total: 5616992\n  TX-bursts : 175531 [97% of 0 pkts + 3% of 32 pkts]\n";
        assert!((parse_busy(text, "TX-bursts :").unwrap() - 0.03).abs() < 1e-9);
        assert_eq!(parse_busy(text, "RX-bursts :"), None);
        let all = |classes: &str| parse_busy(&format!("RX-bursts : 9 [{classes}]"), "RX-bursts :");
        assert_eq!(all("100% of 0 pkts"), Some(0.0));
        assert_eq!(all("0% of 0 pkts + 100% of 32 pkts"), Some(1.0));
        assert_eq!(all("100% of 32 pkts"), Some(1.0));
    }

    #[test]
    fn without_hugepages_it_says_so() {
        let mut config = Config::new("be", Path::new("/tmp/r"));
        config.vdevs.push(vhost(0, Path::new("/tmp/s"), ""));
        let program = Program::new("/usr/bin/dpdk-testpmd".into(), Vec::new());
        let line = super::super::shown(&config.command(&program));
        assert!(
            line.contains("--no-huge -m 144") && line.contains("net_vhost0,iface=/tmp/s,queues=1"),
            "{line}"
        );
        config.huge_dir = Some("/tmp/h".into());
        let line = super::super::shown(&config.command(&program));
        assert!(
            line.contains("--huge-dir=/tmp/h --single-file-segments") && !line.contains("--no-huge"),
            "{line}"
        );
    }
}
