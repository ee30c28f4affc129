//! `ffi/dpdk/tests/exercise.c`: an application that does what testpmd does not, and judges for itself. Its other side is
//! a back-end of ours, which sends every frame back.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use usernic::Burst;

use super::{BOTH, Rings, back, plugin, vdev};
use crate::plugin::sdk::Dpdk;
use crate::process::{self, Process, Surroundings, check_interrupted};
use crate::test::wire::End;
use crate::test::{Case, Ctx, Need, Outcome, passed};

const LIMIT: Duration = Duration::from_secs(60);

pub fn cases() -> Vec<Case> {
    let scenarios: [(&str, &[Need]); 5] = [
        ("calls", &[]),
        ("shared", &[]),
        ("interrupts", &[]),
        ("link", &[]),
        ("memory", &[Need::Hugepages, Need::Root]),
    ];
    let mut cases = vec![Case::new("pmd/c-half", &super::BUILD, c_half)];
    for (scenario, more) in scenarios {
        for rings in BOTH {
            let needs = [&super::BUILD[..], &[Need::Testpmd], more].concat();
            let name = format!("pmd/{scenario}/{}", rings.name);
            cases.push(Case::new(name, &needs, move |ctx| exercise(ctx, scenario, rings)));
        }
    }
    cases
}

/// A program of `ffi/dpdk/tests`, built once a run.
fn program(ctx: &Ctx, name: &str, optimize: &str) -> Result<PathBuf> {
    let program = ctx.scratch.subdir("plugin")?.join(name);
    if !program.is_file() {
        let dpdk = Dpdk::find(None, true)?;
        let mut command = Command::new("gcc");
        command.args(["-std=gnu11", optimize, "-g", "-Wall", "-Wextra", "-Werror"]);
        command.args(dpdk.flags()?);
        command
            .arg(ctx.root.join("ffi/dpdk/tests").join(name).with_extension("c"))
            .arg("-o")
            .arg(&program);
        command.args(dpdk.libraries()?);
        process::run("gcc", command, LIMIT)?;
    }
    Ok(program)
}

/// The plugin's C half without the other: not optimized, since a compiler may make one read of two.
fn c_half(ctx: &Ctx) -> Result<Outcome> {
    let output = process::run("c_half", Command::new(program(ctx, "c_half", "-O0")?), LIMIT)?;
    ensure!(output.contains("the C half: done"), "{output}");
    passed()
}

fn start(ctx: &Ctx, scenario: &str, rings: Rings, socket: &Path) -> Result<Process> {
    let file = plugin(ctx)?;
    let mut command = Command::new(program(ctx, "exercise", "-O2")?);
    command
        .env("LD_LIBRARY_PATH", file.parent().unwrap_or(&file))
        .env("XDG_RUNTIME_DIR", &ctx.dir)
        .env("RUNTIME_DIRECTORY", &ctx.dir);
    command.args(["--lcores", "0@1", "--no-pci", "--no-telemetry"]);
    command.arg(format!("--file-prefix=xt{}ex", std::process::id()));
    let huge = ctx.hugetlbfs("ex")?;
    match &huge {
        Some(dir) => command
            .arg(format!("--huge-dir={}", dir.display()))
            .arg("--single-file-segments"),
        None => command.args(["--no-huge", "-m", "64"]),
    };
    command.arg("-d").arg(file.file_name().unwrap_or_default());
    command.arg(format!("--vdev={}", vdev(0, socket, rings.keys)));
    command.arg("--").arg(scenario);
    let surroundings = Surroundings {
        hugetlbfs: huge,
        no_stdin: true,
        ..Default::default()
    };
    Process::spawn(&format!("exercise {scenario}"), command, &surroundings)
}

/// Sends every frame back until `enough` says so.
fn reflect(end: &mut End, mut enough: impl FnMut() -> Result<bool>) -> Result<()> {
    let (queue, mut burst) = (&mut end.queues[0], Burst::new(32));
    let deadline = Instant::now() + LIMIT;
    let mut idle = 0u32;
    loop {
        if queue.rx(&mut burst) == 0 && burst.is_empty() {
            idle += 1;
            if idle.is_multiple_of(16) {
                if enough()? {
                    return Ok(());
                }
                check_interrupted()?;
                ensure!(Instant::now() < deadline, "it is not done within {LIMIT:?}");
                std::thread::sleep(Duration::from_micros(50));
            }
            continue;
        }
        idle = 0;
        queue.tx(&mut burst);
    }
}

fn exercise(ctx: &Ctx, scenario: &str, rings: Rings) -> Result<Outcome> {
    let socket = ctx.dir.join("s");
    let mut end = back(&socket, "")?;
    let mut process = start(ctx, scenario, rings, &socket)?;
    if scenario == "link" {
        reflect(&mut end, || Ok(process.output().contains("ready\n")))?;
        drop(end);
        process.wait_for("link down", 0, LIMIT)?;
        end = back(&socket, "")?;
    }
    reflect(&mut end, || Ok(process.exited()?.is_some()))?;
    process.wait_success(LIMIT)?;
    let output = process.output();
    ensure!(output.contains(&format!("{scenario}: done")), "{output}");
    let stats = end.port.stats();
    ensure!(stats.anomalies == 0 && stats.rx_errors == 0, "{stats:?}");
    if scenario == "link" {
        ensure!(output.contains("link up"), "{output}");
    }
    let slept = output
        .lines()
        .find(|line| line.starts_with("slept"))
        .context("it did not sleep");
    match slept {
        Ok(line) => Ok(Outcome::Passed(line.to_owned())),
        Err(_) => passed(),
    }
}
