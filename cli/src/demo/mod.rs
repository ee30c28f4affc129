//! `usernic demo`: the main job in ten seconds, with nothing installed and no root.
//!
//! ```text
//!    container a                    this process                   container b
//!  virtio-user port  ---socket a--- switch: a:b  ---socket b---  virtio-user port      the capture, byte for byte
//!  virtio-user port  ---socket r--- switch: reflector                                  throughput and latency
//!
//!    one process, two network namespaces: veth0 ------------- veth1                    the kernel's, in alternation
//! ```

mod channel;
mod chart;
mod container;
mod isolate;
mod kernel;
mod netlink;
mod report;

use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{MemfdFlags, SealFlags};
use usernic::spec::PortSpec;
use usernic::switch::{Role, Switch, SwitchConfig};

use crate::capture_file::{Capture, Chain};
use crate::{common, note, output, result};
use channel::{Channel, Container, KernelTest, Order, Report};
use report::{Isolation, Replay, Results, Rounds};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Replay this capture in place of the one that ships with the program
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Measure for about so many seconds in all
    #[arg(long, value_name = "S", default_value = "6", value_parser = common::seconds)]
    seconds: Duration,
    /// The folder for usernic-demo.json and usernic-demo.svg
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
}

/// Arguments of the process in a container.
#[derive(clap::Args)]
pub struct ContainerArgs {
    /// The empty folder to mount the new root on; without it, this is the process with the veth pair
    #[arg(long)]
    pub root: Option<PathBuf>,
    /// A socket to show inside as /run/NAME
    #[arg(long)]
    pub socket: Vec<PathBuf>,
}

pub use container::main as container_main;

/// Rounds of measurements; every figure is a median over them.
const ROUNDS: usize = 3;
/// Frames in flight when throughput is measured, ours and AF_PACKET's alike.
const WINDOW: usize = 64;

/// A switch on a thread of its own.
struct Running {
    stop: Arc<AtomicBool>,
    tid: Arc<AtomicI32>,
    thread: Option<JoinHandle<Result<Switch>>>,
}

impl Running {
    fn start(mut switch: Switch, cpu: Option<usize>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let tid = Arc::new(AtomicI32::new(0));
        let own = Arc::clone(&tid);
        let thread = std::thread::Builder::new().name("switch".into()).spawn(move || {
            own.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
            cpu.map_or(Ok(()), common::pin)?;
            switch.run(&flag)?;
            Ok(switch)
        })?;
        Ok(Running {
            stop,
            tid,
            thread: Some(thread),
        })
    }

    /// Nanoseconds that the thread has run, and that it was ready to and had no CPU (/proc/PID/task/TID/schedstat).
    fn schedule(&self) -> Option<(u64, u64)> {
        let path = format!("/proc/self/task/{}/schedstat", self.tid.load(Ordering::Acquire));
        let text = std::fs::read_to_string(path).ok()?;
        let mut numbers = text.split_whitespace().map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    fn finish(mut self) -> Result<Switch> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => bail!("the switch's thread ended in a panic"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs the demo.
pub fn run(args: Args, json: bool) -> Result<()> {
    let begin = Instant::now();
    let stop = common::stop_flag()?;
    let (name, capture) = load(args.pcap.as_deref())?;
    let mtu = mtu_for(&name, &capture)?;
    let bar = progress();
    let result = Demo::new(&stop, &capture, mtu, bar.clone()).and_then(|demo| demo.run(name, args.seconds));
    bar.finish_and_clear();
    let mut results = match result {
        Err(_) if stop.load(Ordering::Relaxed) => bail!("ended by a signal; containers and sockets are gone"),
        other => other?,
    };
    results.seconds = begin.elapsed().as_secs_f64();
    // Before anything is printed: who reads the tables may leave early.
    let folder = write_files(&args.out, &results)?;
    note!(
        "{}/usernic-demo.json and usernic-demo.svg written, {:.1} s",
        folder.display(),
        results.seconds
    );
    if json {
        result!("{}", serde_json::to_string(&results)?)?;
    } else {
        let boxed = std::io::stdout().is_terminal() && output::is_utf8();
        output::write_results(&results.tables(boxed))?;
    }
    if !results.replay.is_exact() {
        let difference = results.replay.difference.unwrap_or_else(|| "the hashes differ".into());
        bail!("the capture did not arrive as it was sent: {difference}");
    }
    if results.rows.iter().any(|row| row.ours && row.lost > 0) {
        bail!("frames came back from the reflector wrong or not at all");
    }
    Ok(())
}

fn load(path: Option<&Path>) -> Result<(String, Capture)> {
    match path {
        Some(path) => {
            let name = path.display().to_string();
            let capture = Capture::open(path, false).with_context(|| name.clone())?;
            Ok((name, capture))
        }
        None => {
            let capture = Capture::from_bytes(crate::sample::DEMO_PCAP.to_vec(), false)?;
            Ok(("the capture that ships with usernic".into(), capture))
        }
    }
}

/// The MTU that the capture's longest frame needs: at least 1500.
fn mtu_for(name: &str, capture: &Capture) -> Result<usize> {
    let (number, longest) = capture.longest();
    let mtu = longest.saturating_sub(14).max(1500);
    if mtu > 9710 {
        bail!("{name}: frame {number} has {longest} bytes, and a port carries at most 9724");
    }
    Ok(mtu)
}

fn progress() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(100), output::progress(10));
    if let Ok(style) = ProgressStyle::with_template("{bar:30.cyan/dim} {percent:>3}%  {msg}") {
        bar.set_style(style.progress_chars(if output::is_utf8() { "━━─" } else { "=> " }));
    }
    bar
}

/// Writes both files to `out`, or, when that cannot be, to the folder for temporary files; which it was.
fn write_files(out: &Path, results: &Results) -> Result<PathBuf> {
    let json = serde_json::to_string_pretty(results)? + "\n";
    let svg = chart::draw(results)?;
    let write = |folder: &Path| -> std::io::Result<()> {
        std::fs::write(folder.join("usernic-demo.json"), &json)?;
        std::fs::write(folder.join("usernic-demo.svg"), &svg)
    };
    match write(out) {
        Ok(()) => Ok(out.to_owned()),
        Err(e) => {
            // A new folder: names in a folder for everybody could be links that somebody else put there.
            let folder = tempfile::Builder::new().prefix("usernic-demo-").tempdir()?.keep();
            note!("cannot write to {}: {e}", out.display());
            write(&folder).with_context(|| format!("cannot write to {} either", folder.display()))?;
            Ok(folder)
        }
    }
}

struct Demo<'a> {
    stop: &'a Arc<AtomicBool>,
    capture: &'a Capture,
    mtu: usize,
    bar: ProgressBar,
    // Removed last, after the switches that listen in it.
    folder: tempfile::TempDir,
}

impl<'a> Demo<'a> {
    fn new(stop: &'a Arc<AtomicBool>, capture: &'a Capture, mtu: usize, bar: ProgressBar) -> Result<Self> {
        Ok(Demo {
            stop,
            capture,
            mtu,
            bar,
            folder: isolate::socket_folder()?,
        })
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(self, name: String, measure: Duration) -> Result<Results> {
        let cpus = common::cpus();
        self.step(2, "starting the switch");
        let port = |name: &str, role| -> Result<_> {
            let spec: PortSpec = format!("vhost,path={},mtu={}", self.socket(name).display(), self.mtu).parse()?;
            Ok((name.to_owned(), spec, role))
        };
        let cross = vec![port("a.sock", Role::Connect(1))?, port("b.sock", Role::Connect(0))?];
        let cross = Switch::new(SwitchConfig {
            ports: cross,
            ..SwitchConfig::default()
        })?;
        let reflector = vec![port("r.sock", Role::Reflect)?];
        let reflector = Switch::new(SwitchConfig {
            ports: reflector,
            ..SwitchConfig::default()
        })?;
        for name in ["a.sock", "b.sock", "r.sock"] {
            isolate::give_to_container(&self.socket(name))?;
        }
        self.step(5, "isolating two containers");
        let (mut a, proof_a) = self.container("a", &["a.sock", "r.sock"])?;
        let (mut b, proof_b) = self.container("b", &["b.sock"])?;

        let cross = Running::start(cross, None)?;
        self.step(10, "opening their ports");
        let open = |container: &mut Container, proof: (String, channel::Proof), socket: &str| -> Result<Isolation> {
            let spec = format!("virtio-user,path=/run/{socket},mtu={}", self.mtu);
            match container.ask(&Order::Open { spec })? {
                Report::Opened { memory, bytes, nanos } => Ok(Isolation {
                    name: container.name,
                    uid_outside: proof.0,
                    proof: proof.1,
                    memory,
                    memory_bytes: bytes,
                    open_us: nanos as f64 / 1e3,
                }),
                other => Err(unexpected(&other)),
            }
        };
        let containers = vec![open(&mut a, proof_a, "a.sock")?, open(&mut b, proof_b, "b.sock")?];
        let replay = self.replay(name, &mut a, &mut b)?;
        for container in [&mut a, &mut b] {
            container.ask(&Order::Close)?;
        }
        drop(cross.finish()?);
        drop(b);

        // One CPU for the switch, one for the container: both threads are busy.
        let pair = (cpus.len() > 1).then(|| (cpus[1], cpus[0]));
        let reflector = Running::start(reflector, pair.map(|(_, switch)| switch))?;
        let spec = format!("virtio-user,path=/run/r.sock,mtu={}", self.mtu);
        a.ask(&Order::Open { spec })?;
        self.step(22, "making a veth pair");
        let (mut veth, missing) = match self.veth() {
            Ok(veth) => (Some(veth), None),
            Err(e) if self.stop.load(Ordering::Relaxed) => return Err(e),
            Err(e) => (None, Some(format!("the kernel's veth: {}", common::describe(&e)))),
        };
        let window = Duration::from_secs_f64(measure.as_secs_f64() / (ROUNDS * 9) as f64);
        let before = reflector.schedule();
        let rows = self.measure(&mut a, veth.as_mut(), pair, window)?;
        let waited = before
            .zip(reflector.schedule())
            .map(|((run, wait), (run_now, wait_now))| {
                let (run, wait) = ((run_now - run) as f64, (wait_now - wait) as f64);
                wait / (run + wait).max(1.0)
            });
        a.ask(&Order::Close)?;
        drop(reflector.finish()?);
        self.step(100, "done");
        Ok(Results {
            schema: "usernic.demo/1",
            version: env!("CARGO_PKG_VERSION"),
            date: report::date(std::time::SystemTime::now()),
            cpu: report::cpu(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpus,
            containers,
            replay,
            rounds: ROUNDS,
            window_ms: window.as_millis() as u64,
            rows,
            waited,
            missing,
            seconds: 0.0,
        })
    }

    fn step(&self, percent: u64, what: &str) {
        self.bar.set_position(percent);
        self.bar.set_message(what.to_owned());
        // A terminal that cannot move its cursor has the steps as lines.
        if self.bar.is_hidden() && std::io::stderr().is_terminal() {
            note!("{percent:>3}%  {what}");
        }
        tracing::info!("{what}");
    }

    /// Starts this program again, with one end of a socket pair as its standard input.
    fn spawn(&self, name: &'static str, arguments: &[PathBuf], output: Stdio) -> Result<Container> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("demo-container")
            .args(arguments)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(output)
            // Ctrl-C on the terminal is for the demo, which ends its containers.
            .process_group(0)
            .spawn()
            .context("cannot start this program again as /proc/self/exe")?;
        Ok(Container {
            name,
            child,
            channel: Channel::new(ours)?,
            stop: Arc::clone(self.stop),
        })
    }

    /// Starts a container and checks its proof; its user as seen from here, and the proof.
    fn container(&self, name: &'static str, sockets: &[&str]) -> Result<(Container, (String, channel::Proof))> {
        let root = self.folder.path().join(format!("{name}-root"));
        std::fs::create_dir(&root)?;
        isolate::give_to_container(&root)?;
        let mut arguments = vec!["--root".into(), root];
        for socket in sockets {
            arguments.push("--socket".into());
            arguments.push(self.socket(socket));
        }
        let mut container = self.spawn(name, &arguments, Stdio::from(self.capture_fd()?))?;
        let proof = match container.report(Duration::from_secs(20))? {
            Report::Isolated(proof) => proof,
            other => return Err(unexpected(&other)),
        };
        let outside = isolate::namespaces();
        let names: Vec<String> = sockets.iter().map(|s| (*s).to_owned()).collect();
        isolate::verify(&proof, &outside, &names).map_err(|e| anyhow!("container {name} is not isolated: {e}"))?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", container.child.id())).unwrap_or_default();
        let uid = status
            .lines()
            .find_map(|l| l.strip_prefix("Uid:"))
            .and_then(|l| l.split_whitespace().next());
        let uid = uid.unwrap_or("?").to_owned();
        match container.report(Duration::from_secs(20))? {
            Report::Ready => Ok((container, (uid, proof))),
            other => Err(unexpected(&other)),
        }
    }

    /// The capture as a sealed file without a name.
    fn capture_fd(&self) -> Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("usernic-capture", flags).context("memfd_create(2)")?;
        let mut file = std::fs::File::from(fd);
        file.write_all(self.capture.file_bytes())
            .context("writing the capture to a memfd")?;
        rustix::fs::fcntl_add_seals(
            &file,
            SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
        )
        .context("sealing a memfd")?;
        Ok(file.into())
    }

    fn veth(&self) -> Result<Container> {
        let mut veth = self.spawn("veth", &[], Stdio::null())?;
        match veth.report(Duration::from_secs(20))? {
            Report::Ready => Ok(veth),
            other => Err(unexpected(&other)),
        }
    }

    fn replay(&self, name: String, a: &mut Container, b: &mut Container) -> Result<Replay> {
        self.step(14, &format!("replaying {} frames from a to b", self.capture.len()));
        let mut chain = Chain::default();
        self.capture.frames().for_each(|frame| chain.add(frame));
        b.order(&Order::Receive)?;
        match b.report(Duration::from_secs(5))? {
            Report::Ready => {}
            other => return Err(unexpected(&other)),
        }
        a.order(&Order::Replay)?;
        let total = self.capture.len() as u64;
        let (received, hash, difference) = loop {
            match b.report(Duration::from_secs(60))? {
                Report::Progress(frames) => self.bar.set_position(14 + 8 * frames.min(total) / total),
                Report::Received {
                    frames,
                    chain,
                    difference,
                    ..
                } => break (frames, chain, difference),
                other => return Err(unexpected(&other)),
            }
        };
        let (sent, bytes, nanos) = match a.report(Duration::from_secs(10))? {
            Report::Sent { frames, bytes, nanos } => (frames, bytes, nanos),
            other => return Err(unexpected(&other)),
        };
        Ok(Replay {
            capture: name,
            frames: sent,
            bytes,
            received,
            chain_sent: format!("{:016x}", chain.value()),
            chain_received: format!("{hash:016x}"),
            difference,
            rate: sent as f64 / (nanos.max(1) as f64 / 1e9),
        })
    }

    fn measure(
        &self,
        a: &mut Container,
        mut veth: Option<&mut Container>,
        pair: Option<(usize, usize)>,
        window: Duration,
    ) -> Result<Vec<report::Row>> {
        let millis = (window.as_millis() as u64).max(1);
        let cpu = pair.map(|(container, _)| container);
        let [mut ours, mut udp, mut packet, mut blocking]: [Rounds; 4] = Default::default();
        let mut percent = 25;
        for round in 1..=ROUNDS {
            let mut tell = |what: &str| {
                self.step(percent, &format!("round {round} of {ROUNDS}: {what}"));
                percent += 75 / (ROUNDS as u64 * 9);
            };
            for size in [64, 1514] {
                tell(&format!("usernic, frames of {size} bytes"));
                let report = a.ask(&Order::Throughput {
                    size,
                    window: WINDOW,
                    millis,
                    cpu,
                })?;
                let Report::Rate(rate) = report else {
                    return Err(unexpected(&report));
                };
                if size == 64 { &mut ours.small } else { &mut ours.large }.push(rate);
                let Some(veth) = &mut veth else { continue };
                for (test, name, rounds) in [
                    (KernelTest::PacketThroughput(size, WINDOW), "AF_PACKET", &mut packet),
                    (KernelTest::UdpThroughput(size), "UDP", &mut udp),
                ] {
                    tell(&format!("veth, {name}, frames of {size} bytes"));
                    let report = veth.ask(&Order::Kernel {
                        test,
                        millis,
                        cpus: pair,
                    })?;
                    let Report::Rate(rate) = report else {
                        return Err(unexpected(&report));
                    };
                    if size == 64 {
                        &mut rounds.small
                    } else {
                        &mut rounds.large
                    }
                    .push(rate);
                }
            }
            tell("usernic, latency");
            let report = a.ask(&Order::Latency { millis, cpu })?;
            let Report::Latency(time) = report else {
                return Err(unexpected(&report));
            };
            ours.latency.push(time);
            let Some(veth) = &mut veth else { continue };
            for (test, rounds) in [
                (KernelTest::PacketSpin, &mut packet),
                (KernelTest::UdpSpin, &mut udp),
                (KernelTest::UdpBlock, &mut blocking),
            ] {
                tell("veth, latency");
                let report = veth.ask(&Order::Kernel {
                    test,
                    millis,
                    cpus: pair,
                })?;
                let Report::Latency(time) = report else {
                    return Err(unexpected(&report));
                };
                rounds.latency.push(time);
            }
        }
        let mut rows = vec![ours.row("usernic, reflected", true)];
        if veth.is_some() {
            rows.push(packet.row("veth, AF_PACKET, reflected", false));
            rows.push(udp.row("veth, UDP, one way", false));
            rows.push(blocking.row("veth, UDP, blocking", false));
        }
        Ok(rows)
    }
}

fn unexpected(report: &Report) -> anyhow::Error {
    anyhow!("an unexpected report from a container: {report:?}")
}
