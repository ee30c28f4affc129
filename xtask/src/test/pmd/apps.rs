//! DPDK's examples, unmodified: l2fwd and l3fwd, built from their sources with DPDK's own makefiles.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::frames::{ipv4, is_right, receive, send};
use super::testpmd::frames;
use super::{BOTH, Rings, back, plugin, vdev};
use crate::plugin::sdk::Dpdk;
use crate::process::{self, Process, Surroundings};
use crate::test::wire::{End, exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

const LIMIT: Duration = Duration::from_secs(120);

pub fn cases() -> Vec<Case> {
    let needs = [&super::BUILD[..], &[Need::Testpmd, Need::Tool("make")]].concat();
    let mut cases = Vec::new();
    for rings in BOTH {
        cases.push(Case::new(format!("pmd/l2fwd/{}", rings.name), &needs, move |ctx| {
            l2fwd(ctx, rings)
        }));
    }
    for rings in BOTH {
        cases.push(Case::new(format!("pmd/l3fwd/{}", rings.name), &needs, move |ctx| {
            l3fwd(ctx, rings)
        }));
    }
    cases
}

/// Builds an example in a folder of this run, once; `None`: its source is not to be had.
fn build(ctx: &Ctx, name: &str) -> Result<Option<PathBuf>> {
    let Some(examples) = Dpdk::find(None, true)?.examples else {
        return Ok(None);
    };
    let dir = ctx.scratch.subdir("examples")?;
    let program = dir.join(name).join("build").join(name);
    if program.exists() {
        return Ok(Some(program));
    }
    for folder in ["common", name] {
        if !dir.join(folder).is_dir() {
            let mut command = Command::new("cp");
            command.arg("-r").arg(examples.join(folder)).arg(&dir);
            process::run("cp", command, LIMIT)?;
        }
    }
    let mut make = Command::new("make");
    make.arg("-C").arg(dir.join(name));
    process::run("make", make, LIMIT)?;
    Ok(Some(program))
}

/// Starts an example with two ports on back-ends of ours.
fn start(ctx: &Ctx, program: &Path, rings: Rings, arguments: &[&str]) -> Result<(Process, [End; 2])> {
    let sockets = ["a", "b"].map(|name| ctx.dir.join(name));
    let ends = [back(&sockets[0], "")?, back(&sockets[1], "")?];
    let file = plugin(ctx)?;
    let mut command = Command::new("stdbuf");
    command.arg("-oL").arg(program);
    command
        .env("LD_LIBRARY_PATH", file.parent().unwrap_or(&file))
        .env("XDG_RUNTIME_DIR", &ctx.dir)
        .env("RUNTIME_DIRECTORY", &ctx.dir);
    command.args(["--lcores", "0@1", "--no-pci", "--no-telemetry"]);
    command.arg(format!("--file-prefix=xt{}app", std::process::id()));
    let huge = ctx.hugetlbfs("app")?;
    match &huge {
        Some(dir) => command
            .arg(format!("--huge-dir={}", dir.display()))
            .arg("--single-file-segments"),
        None => command.args(["--no-huge", "-m", "192"]),
    };
    command.arg("-d").arg(file.file_name().unwrap_or_default());
    for (index, socket) in sockets.iter().enumerate() {
        command.arg(format!("--vdev={}", vdev(index, socket, rings.keys)));
    }
    command.arg("--").args(arguments);
    let surroundings = Surroundings {
        hugetlbfs: huge,
        no_stdin: true,
        ..Default::default()
    };
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let process = Process::spawn(&name, command, &surroundings)?;
    Ok((process, ends))
}

/// Ends it in order: ports that cannot be stopped are seen.
fn end(mut process: Process) -> Result<()> {
    process.signal(rustix::process::Signal::INT)?;
    process.wait_success(Duration::from_secs(20))
}

fn l2fwd(ctx: &Ctx, rings: Rings) -> Result<Outcome> {
    let Some(program) = build(ctx, "l2fwd")? else {
        return Ok(Outcome::Skipped("DPDK came without the source of l2fwd".into()));
    };
    let (process, mut ends) = start(
        ctx,
        &program,
        rings,
        &["-p", "3", "-q", "2", "-P", "-T", "0", "--no-mac-updating"],
    )?;
    let [a, b] = &mut ends;
    prove(a, b)?;
    exchange(a, b, &frames(500, 1514), 128)?;
    end(process)?;
    passed()
}

fn l3fwd(ctx: &Ctx, rings: Rings) -> Result<Outcome> {
    let Some(program) = build(ctx, "l3fwd")? else {
        return Ok(Outcome::Skipped("DPDK came without the source of l3fwd".into()));
    };
    let source = program
        .ancestors()
        .nth(2)
        .context("the example lies in its folder")?
        .to_owned();
    let rules = |version: u8| {
        format!(
            "--rule_ipv{version}={}",
            source.join(format!("lpm_default_v{version}.cfg")).display()
        )
    };
    let (v4, v6) = (rules(4), rules(6));
    let arguments = [
        "-p",
        "3",
        "-P",
        "--config=(0,0,0),(1,0,0)",
        "--lookup=lpm",
        "--parse-ptype",
        "--no-numa",
        &v4,
        &v6,
    ];
    let (mut process, mut ends) = start(ctx, &program, rings, &arguments)?;
    process.wait_for("L3FWD: entering main loop", 0, Duration::from_secs(30))?;
    let [a, b] = &mut ends;
    // Network 198.18.1.0/24 is behind port 1, 198.18.0.0/24 behind port 0.
    for (from, to, network) in [(0, 1, 1u8), (1, 0, 0)] {
        for host in 1..60u8 {
            let frame = ipv4([2, 0, 0, 0, 0, 7], [198, 18, network, host], 17, &[host; 200], true);
            let (sender, receiver) = if from == 0 {
                (&mut *a, &mut *b)
            } else {
                (&mut *b, &mut *a)
            };
            send(sender, &frame)?;
            let mut got = Vec::new();
            receive(receiver, |_, frame| {
                got = frame;
                got[30..34] == [198, 18, network, host]
            })
            .with_context(|| format!("from port {from} to {to}, host {host}"))?;
            ensure!(
                got.len() == frame.len() && got[34..] == frame[34..] && got[22] == 63 && is_right(&got),
                "from port {from}: {got:02x?}"
            );
        }
    }
    end(process)?;
    passed()
}
