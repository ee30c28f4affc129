//! The main parts again as an ordinary user: no capability, no hugepages, a home of its own.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::link::path;
use super::{Case, Ctx, Need, Outcome, passed};
use crate::pcap;
use crate::peers::is_root;
use crate::process::{Process, Surroundings, sleep};

/// The user of nobody.
const NOBODY: &str = "65534";

const LIMIT: Duration = Duration::from_secs(120);

pub fn cases() -> Vec<Case> {
    let needs = [Need::Usernic, Need::Tool("setpriv")];
    vec![
        Case::new("unprivileged/capture", &needs, capture),
        Case::new("unprivileged/demo", &needs, demo),
        Case::new("unprivileged/really-has-no-privileges", &needs, no_privileges),
    ]
}

/// `usernic` as nobody, without any capability or a way to get one, with a writable home.
fn command(ctx: &Ctx, args: &[&str]) -> Result<Command> {
    let home = ctx.subdir("home")?;
    let mut command = if is_root() {
        std::os::unix::fs::chown(&home, Some(65534), Some(65534))?;
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]);
        command
            .args(["--inh-caps=-all", "--bounding-set=-all"])
            .arg(&ctx.usernic);
        command
    } else {
        Command::new(&ctx.usernic)
    };
    command
        .args(args)
        .env("HOME", &home)
        .env("TMPDIR", &home)
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir(&home);
    Ok(command)
}

fn spawn(ctx: &Ctx, args: &[&str]) -> Result<Process> {
    let surroundings = Surroundings {
        no_stdin: true,
        ..Default::default()
    };
    Process::spawn(
        &format!("usernic {}", args.iter().find(|a| !a.starts_with('-')).unwrap_or(&"")),
        command(ctx, args)?,
        &surroundings,
    )
}

/// A capture through our switch.
fn capture(ctx: &Ctx) -> Result<Outcome> {
    let home = ctx.subdir("home")?;
    let (a, b) = (home.join("a"), home.join("b"));
    let listen = format!("{},{}", path(&a)?, path(&b)?);
    let mut switch = spawn(
        ctx,
        &["switch", "--listen", &listen, "--mtu", "9000", "--connect", "0:1"],
    )?;
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !b.exists() {
        ensure!(std::time::Instant::now() < end, "no sockets{}", switch.tail());
        sleep(Duration::from_millis(5))?;
    }
    let sent = pcap::frames((0..1000).map(|i| 60 + i * 8));
    let (input, output) = (ctx.dir.join("in.pcap"), home.join("out.pcap"));
    pcap::write(&input, &sent)?;
    let port = |socket| format!("virtio-user,path={socket},mtu=9000");
    let count = sent.len().to_string();
    let to = port(b.display());
    let mut capture = spawn(
        ctx,
        &[
            "-v",
            "capture",
            "--port",
            &to,
            "--pcap",
            path(&output)?,
            "--count",
            &count,
        ],
    )?;
    capture.wait_for("link up", 0, Duration::from_secs(10))?;
    let from = port(a.display());
    spawn(
        ctx,
        &["replay", "--port", &from, "--pcap", path(&input)?, "--rate", "5K"],
    )?
    .wait_success(LIMIT)?;
    capture.wait_success(LIMIT)?;
    pcap::same(&sent, &pcap::read(&output)?)?;
    switch.signal(rustix::process::Signal::INT)?;
    switch.wait_success(LIMIT)?;
    passed()
}

/// The demo, whole: containers, capture, measurement, chart.
fn demo(ctx: &Ctx) -> Result<Outcome> {
    let home = ctx.subdir("home")?;
    let mut process = spawn(ctx, &["demo", "--json"])?;
    process.wait_success(LIMIT)?;
    let output = process.output();
    let start = output.find('{').with_context(|| format!("no JSON{}", process.tail()))?;
    let end = output.rfind('}').context("the JSON does not end")?;
    let _: serde_json::Value = serde_json::from_str(&output[start..=end])?;
    let chart = std::fs::read_dir(&home)?
        .flatten()
        .any(|e| e.path().extension().is_some_and(|e| e == "svg"));
    ensure!(chart, "no chart in {}{}", home.display(), process.tail());
    passed()
}

/// That `setpriv` did what the two cases above rest on.
fn no_privileges(ctx: &Ctx) -> Result<Outcome> {
    if !is_root() {
        return Ok(Outcome::Passed("this user is an ordinary one".into()));
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs"]);
    command
        .args(["--inh-caps=-all", "--bounding-set=-all", "cat", "/proc/self/status"])
        .current_dir(&ctx.dir);
    let status = crate::process::run("setpriv", command, Duration::from_secs(10))?;
    for line in [
        "Uid:\t65534",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        ensure!(status.contains(line), "{line} is not in: {status}");
    }
    passed()
}
