//! Our programs alone: a front-end whose back-end is killed, ends by SIGINT beside a side that does not answer, a start before
//! the other side's, and frames that are all accounted for.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::Value;

use super::{FRAMES, RINGS, ROUNDS, STALL, connect, reflector};
use crate::pcap::Random;
use crate::process::{self, Process, sleep};
use crate::test::link::path;
use crate::test::{Case, Check, Ctx, Need, Outcome, Usernic, capture, passed};

/// Less than the time limit that the ports have here: what waits for the other side does not end within it.
const SOON: Duration = Duration::from_secs(20);

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, run: Check| {
        cases.push(Case::new(format!("reliability/{name}"), &[Need::Usernic], run));
    };
    for (name, keys) in RINGS {
        add(
            format!("killed-back-end/front-end-{name}"),
            Box::new(move |ctx| killed_under_a_front_end(ctx, keys)),
        );
        add(
            format!("account/cross-connect-{name}"),
            Box::new(move |ctx| account(ctx, keys, &["--connect", "0:1"], 1)),
        );
        add(
            format!("account/flood-{name}"),
            Box::new(move |ctx| account(ctx, keys, &[], 3)),
        );
    }
    add("early-start".into(), Box::new(early_start));
    add("kicks".into(), Box::new(kicks));
    add("sigint/nobody-connects".into(), Box::new(nobody_connects));
    add("sigint/silent-back-end".into(), Box::new(|ctx| silent_back_end(ctx, 5)));
    add("sigint/full-backlog".into(), Box::new(|ctx| silent_back_end(ctx, 0)));
    add("sigint/silent-front-end".into(), Box::new(silent_front_end));
    for (name, program, stopped) in [
        ("capture-beside-a-stopped-switch", CAPTURE, true),
        ("generate-beside-a-stopped-switch", GENERATE, true),
        ("switch-beside-a-stopped-front-end", GENERATE, false),
    ] {
        add(
            format!("sigint/{name}"),
            Box::new(move |ctx| beside_a_stopped(ctx, program, stopped)),
        );
    }
    cases
}

const CAPTURE: &[&str] = &["capture", "--pcap", "/dev/null"];
const GENERATE: &[&str] = &["generate", "--rate", "10K"];

/// A front-end port on this socket.
fn front(socket: &Path, keys: &str) -> String {
    format!("virtio-user,path={},memory=memfd,timeout=60000{keys}", socket.display())
}

/// The counters of a program's ports, by its control socket.
fn counters(ctx: &Ctx, control: &Path) -> Result<Vec<Value>> {
    let command = Usernic::command(ctx, &["stats", "--control", path(control)?]);
    let text = process::run("usernic stats", command, STALL)?;
    let mut stats: Value = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
    serde_json::from_value(stats["ports"].take()).context(text)
}

fn number(port: &Value, name: &str) -> Result<u64> {
    port[name].as_u64().with_context(|| format!("no {name} in {port}"))
}

/// The counters once they stand still.
fn settled(ctx: &Ctx, control: &Path) -> Result<Vec<Value>> {
    let end = Instant::now() + STALL;
    let mut before = counters(ctx, control)?;
    loop {
        sleep(Duration::from_millis(100))?;
        let now = counters(ctx, control)?;
        if now == before {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "the counters do not stand still");
        before = now;
    }
}

/// Waits until something holds of the counters.
fn until(ctx: &Ctx, control: &Path, what: &str, mut holds: impl FnMut(&[Value]) -> Result<bool>) -> Result<()> {
    let end = Instant::now() + STALL;
    loop {
        let now = counters(ctx, control)?;
        if holds(&now)? {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "not within {STALL:?}: {what}: {}",
            Value::from(now)
        );
        sleep(Duration::from_millis(10))?;
    }
}

/// `generate` polls its port, and all its frames have 64 bytes: what is received besides, nobody sent.
fn killed_under_a_front_end(ctx: &Ctx, keys: &str) -> Result<Outcome> {
    let (socket, control) = (ctx.dir.join("s"), ctx.dir.join("c"));
    let port = front(&socket, &format!(",server=1{keys}"));
    let mut args = vec![
        "generate", "--port", &port, "--rate", "20K", "--stall", "600", "--wait", "60",
    ];
    args.extend(["--control", path(&control)?]);
    let mut front = Usernic::spawn(ctx, &args)?;
    capture::wait_for_socket(&socket, &mut front)?;
    let mut peer = reflector(ctx, &socket)?;
    capture::wait_for_socket(&control, &mut front)?;
    let mut random = Random(12);
    let rounds = ctx.rounds.unwrap_or(ROUNDS);
    for round in 0..rounds {
        let goal = number(&counters(ctx, &control)?[0], "rx_packets")? + FRAMES;
        until(ctx, &control, &format!("frames in round {round}"), |ports| {
            Ok(number(&ports[0], "rx_packets")? >= goal)
        })?;
        sleep(Duration::from_millis(random.draw() % 30))?;
        peer.kill();
        peer = reflector(ctx, &socket)?;
    }
    // Without a link nothing moves, and the counters agree with each other.
    peer.kill();
    let port = settled(ctx, &control)?.into_iter().next().context("no port")?;
    let (packets, bytes) = (number(&port, "rx_packets")?, number(&port, "rx_bytes")?);
    ensure!(
        bytes == 64 * packets,
        "{packets} packets of 64 bytes, and {bytes} bytes"
    );
    for name in ["rx_errors", "rx_runts", "rx_oversize", "anomalies"] {
        ensure!(number(&port, name)? == 0, "{port}");
    }
    Ok(Outcome::Passed(format!("{rounds} times, {packets} frames")))
}

/// Waits for the end of a program that was sent SIGINT.
fn ends(mut process: Process) -> Result<()> {
    process.signal(Signal::INT)?;
    process.wait(SOON).map(drop)
}

fn nobody_connects(ctx: &Ctx) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let port = front(&socket, ",server=1");
    let mut process = Usernic::spawn(ctx, &["generate", "--port", &port, "--wait", "60"])?;
    capture::wait_for_socket(&socket, &mut process)?;
    ends(process)?;
    passed()
}

/// A back-end that answers nothing, or whose backlog, of `room` connections, is full.
fn silent_back_end(ctx: &Ctx, room: i32) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let listener = UnixListener::bind(&socket)?;
    rustix::net::listen(&listener, room)?;
    let mut full = Vec::new();
    if room == 0 {
        loop {
            match connect(&socket) {
                Ok(connection) => full.push(connection),
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e).context("a connection"),
            }
        }
    }
    let process = Usernic::spawn(ctx, &["generate", "--port", &front(&socket, ""), "--wait", "60"])?;
    if room > 0 {
        // It has asked, and waits.
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(STALL))?;
        std::io::Read::read_exact(&mut stream, &mut [0; 12])?;
    } else {
        // It tries again and again, which nothing shows.
        sleep(Duration::from_millis(300))?;
    }
    ends(process)?;
    passed()
}

fn silent_front_end(ctx: &Ctx) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let port = format!("vhost,path={},timeout=60000", socket.display());
    let mut switch = Usernic::spawn(ctx, &["switch", "--port", &port])?;
    capture::wait_for_socket(&socket, &mut switch)?;
    let _silent = UnixStream::connect(&socket)?;
    ends(switch)?;
    passed()
}

/// One of the two is stopped, and the other one ends.
fn beside_a_stopped(ctx: &Ctx, program: &[&str], switch_stops: bool) -> Result<Outcome> {
    let (socket, control) = (ctx.dir.join("s"), ctx.dir.join("c"));
    let port = format!("vhost,path={},timeout=60000", socket.display());
    let args = [
        "switch",
        "--port",
        &port,
        "--reflect",
        "0",
        "--control",
        path(&control)?,
    ];
    let mut switch = Usernic::spawn(ctx, &args)?;
    capture::wait_for_socket(&control, &mut switch)?;
    let port = front(&socket, "");
    let other = Usernic::spawn(ctx, &[program, &["--port", &port]].concat())?;
    until(ctx, &control, "the link", |ports| Ok(ports[0]["link_up"] == true))?;
    let (mut stopped, runs) = match switch_stops {
        true => (switch, other),
        false => (other, switch),
    };
    stopped.signal(Signal::STOP)?;
    let ended = ends(runs);
    stopped.kill();
    ended?;
    passed()
}

/// The front-end is there first.
fn early_start(ctx: &Ctx) -> Result<Outcome> {
    let (socket, control) = (ctx.dir.join("s"), ctx.dir.join("c"));
    let mut args = vec![
        "generate",
        "--count",
        "100",
        "--wait",
        "60",
        "--control",
        path(&control)?,
    ];
    let port = front(&socket, "");
    args.extend(["--port", &port]);
    let mut front = Usernic::spawn(ctx, &args)?;
    sleep(Duration::from_millis(300))?;
    ensure!(front.exited()?.is_none(), "it does not wait: {}", front.output());
    let _switch = Usernic::spawn(ctx, &["switch", "--listen", path(&socket)?, "--reflect", "0"])?;
    front.wait_success(STALL)?;
    passed()
}

/// A switch that sleeps is woken, and the sender counts that.
fn kicks(ctx: &Ctx) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let args = ["switch", "--listen", path(&socket)?, "--reflect", "0", "--idle", "0"];
    let mut switch = Usernic::spawn(ctx, &args)?;
    capture::wait_for_socket(&socket, &mut switch)?;
    let port = front(&socket, "");
    let args = ["generate", "--port", &port, "--rate", "200", "--count", "200", "--json"];
    let text = process::run("usernic generate", Usernic::command(ctx, &args), STALL)?;
    let line = text.lines().find(|line| line.starts_with('{')).context(text.clone())?;
    let results: Value = serde_json::from_str(line)?;
    let kicks = number(&results["ports"][0], "kicks")?;
    // One for a frame that is sent, and one for buffers that are posted to receive it into again.
    ensure!((1..=400).contains(&kicks), "200 frames one by one, and {kicks} kicks");
    Ok(Outcome::Passed(format!("{kicks} kicks for 200 frames")))
}

/// Every frame that was sent is received, or in a counter of the switch. `receivers` get a copy each.
fn account(ctx: &Ctx, keys: &str, roles: &[&str], receivers: usize) -> Result<Outcome> {
    const COUNT: u64 = 50_000;
    let control = ctx.dir.join("c");
    let sockets: Vec<_> = (0..=receivers).map(|n| ctx.dir.join(format!("s{n}"))).collect();
    let listen = sockets
        .iter()
        .map(|socket| path(socket))
        .collect::<Result<Vec<_>>>()?
        .join(",");
    let mut switch = Usernic::spawn(
        ctx,
        &[&["switch", "--listen", &listen, "--control", path(&control)?], roles].concat(),
    )?;
    capture::wait_for_socket(&control, &mut switch)?;
    let mut captures = Vec::new();
    for (index, socket) in sockets[1..].iter().enumerate() {
        let (port, told) = (front(socket, keys), ctx.dir.join(format!("c{index}")));
        let args = ["capture", "--pcap", "/dev/null", "--json", "--port", &port];
        let mut capture = Usernic::spawn(ctx, &[&args[..], &["--control", path(&told)?]].concat())?;
        capture::wait_for_socket(&told, &mut capture)?;
        captures.push((capture, told));
    }
    until(ctx, &control, "the receivers", |ports| {
        Ok(ports[1..].iter().all(|port| port["link_up"] == true))
    })?;
    let port = front(&sockets[0], keys);
    let count = COUNT.to_string();
    let args = [
        "generate",
        "--port",
        &port,
        "--count",
        &count,
        "--dst",
        "ff:ff:ff:ff:ff:ff",
    ];
    let mut sender = Usernic::spawn(ctx, &args)?;
    sender.wait_success(2 * STALL)?;
    // Not once the counters stand still: where pollers are more than cores, they do so while the switch waits for one.
    until(ctx, &control, "every frame is in a counter", |ports| {
        let mut all = number(&ports[0], "rx_packets")? == COUNT;
        for port in &ports[1..] {
            all &= number(port, "tx_packets")? + number(port, "dropped")? == COUNT;
        }
        Ok(all)
    })?;
    let ports = settled(ctx, &control)?;
    let mut received = 0;
    for ((mut capture, told), port) in captures.into_iter().zip(&ports[1..]) {
        let (sent, dropped) = (number(port, "tx_packets")?, number(port, "dropped")?);
        ensure!(
            sent + dropped == COUNT,
            "{COUNT} frames are due, and not one more: {port}"
        );
        until(ctx, &told, "all that was sent", |ports| {
            Ok(number(&ports[0], "rx_packets")? == sent)
        })?;
        capture.signal(Signal::INT)?;
        capture.wait_success(STALL)?;
        let text = capture.output();
        let line = text.lines().find(|line| line.starts_with('{')).context(text.clone())?;
        let results: Value = serde_json::from_str(line)?;
        ensure!(
            number(&results["ports"][0], "rx_packets")? == sent,
            "{sent} were sent: {results}"
        );
        ensure!(number(&results, "frames")? == sent, "{sent} were received: {results}");
        received += sent;
    }
    Ok(Outcome::Passed(format!(
        "{received} of {} received",
        COUNT * receivers as u64
    )))
}
