//! What holds while peers are killed or say nothing, with DPDK's programs beside ours. `--rounds N` for more of it.

mod ours;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::{Case, Ctx, Need, Outcome, Usernic, pmd};
use crate::pcap::Random;
use crate::peers::testpmd::{self, Config, Testpmd};
use crate::process::{Process, sleep};

/// Nothing comes for so long: it will not any more.
const STALL: Duration = Duration::from_secs(30);

/// How often a peer is killed, unless `--rounds` says so.
const ROUNDS: usize = 20;

/// Frames that must come between.
const FRAMES: u64 = 400;

/// The rings: a name, and the keys that ask for them.
const RINGS: [(&str, &str); 2] = [("split", ""), ("packed", ",packed_vq=1")];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, keys) in RINGS {
        let needs = [&pmd::BUILD[..], &[Need::Usernic, Need::Testpmd]].concat();
        cases.push(Case::new(
            format!("reliability/killed-back-end/plugin-{name}"),
            &needs,
            move |ctx| killed_under_the_plugin(ctx, keys),
        ));
    }
    for count in [1, 20] {
        cases.push(Case::new(
            format!("reliability/silent-peers/{count}"),
            &[Need::Usernic, Need::Testpmd],
            move |ctx| silent(ctx, count),
        ));
    }
    cases.extend(ours::cases());
    cases
}

/// A switch that connects to a front-end and sends every frame back.
fn reflector(ctx: &Ctx, socket: &Path) -> Result<Process> {
    let port = format!("vhost,path={},client=1", socket.display());
    Usernic::spawn(ctx, &["switch", "--port", &port, "--reflect", "0"])
}

/// What testpmd says of a port's statistics.
fn counted(text: &str, label: &str) -> Result<u64> {
    let rest = text.split(label).nth(1).with_context(|| format!("no {label} {text}"))?;
    Ok(rest.split_whitespace().next().unwrap_or_default().parse()?)
}

/// testpmd polls a port of the plugin's, and all frames have 60 bytes: what is received besides, nobody sent.
fn killed_under_the_plugin(ctx: &Ctx, keys: &str) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    config.mbufs = 4096;
    config.vdevs = vec![pmd::vdev(0, &socket, &format!(",server=1{keys}"))];
    // What it says of the link would come between the letters of testpmd's answers.
    config.eal.push("--log-level=pmd.net.usernic:critical".into());
    let mut testpmd = pmd::start(ctx, &mut config)?;
    testpmd.forward("flowgen")?;
    let mut peer = reflector(ctx, &socket)?;
    let mut random = Random(11);
    let rounds = ctx.rounds.unwrap_or(ROUNDS);
    for round in 0..rounds {
        let (goal, limit) = (testpmd.stats(0)?.rx + FRAMES, Instant::now() + STALL);
        while testpmd.stats(0)?.rx < goal {
            ensure!(Instant::now() < limit, "round {round}: no frames come any more");
            sleep(Duration::from_millis(5))?;
        }
        sleep(Duration::from_millis(random.draw() % 30))?;
        peer.kill();
        peer = reflector(ctx, &socket)?;
    }
    testpmd.stop()?;
    let (text, more) = (
        testpmd.command("show port stats 0")?,
        testpmd.command("show port xstats 0")?,
    );
    let (packets, bytes) = (counted(&text, "RX-packets:")?, counted(&text, "RX-bytes:")?);
    ensure!(
        bytes == 60 * packets,
        "{packets} packets of 60 bytes, and {bytes} bytes"
    );
    for label in ["malformed:", "runts:", "oversize:", "back_end_faults:"] {
        let found = counted(&more, &format!("rx_q0_{label}"))?;
        ensure!(found == 0, "rx_q0_{label} {found}");
    }
    Ok(Outcome::Passed(format!("{rounds} times, {packets} frames")))
}

/// Connects without waiting for a listener whose backlog is full.
fn connect(socket: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connection = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&connection, &SocketAddrUnix::new(socket)?)?;
    Ok(connection)
}

/// Connections that say nothing come before DPDK's front-end does, which is served all the same.
fn silent(ctx: &Ctx, count: usize) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let listen = super::link::path(&socket)?.to_owned();
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", &listen, "--reflect", "0"])?;
    super::capture::wait_for_socket(&socket, &mut switch)?;
    let mut silent = Vec::new();
    while silent.len() < count {
        match connect(&socket) {
            Ok(connection) => silent.push(connection),
            // As many as the listener lets wait.
            Err(Errno::AGAIN) => break,
            Err(e) => return Err(e).context("a connection that says nothing"),
        }
    }
    ensure!(!silent.is_empty(), "no connection");
    let start = Instant::now();
    let mut config = Config::new("fe", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("fe")?;
    config.mbufs = 4096;
    config.vdevs = vec![testpmd::virtio_user(0, &socket, 256, "")];
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    let mut testpmd = Testpmd::start(program, &config)?;
    testpmd.forward_first("io", 1)?;
    while testpmd.stats(0)?.rx == 0 {
        ensure!(start.elapsed() < STALL, "behind {count} silent connections: not served");
        sleep(Duration::from_millis(10))?;
    }
    Ok(Outcome::Passed(format!(
        "served after {:.1} s, behind {}",
        start.elapsed().as_secs_f64(),
        silent.len()
    )))
}
