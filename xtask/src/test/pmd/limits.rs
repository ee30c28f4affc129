//! Memory: plain pages, no files, too many of them; two applications at once; back-ends that go and come.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::testpmd::frames;
use super::{BOTH, Rings, back, plugin, start, vdev};
use crate::peers::testpmd::{Config, Testpmd, vhost};
use crate::process::{Process, Surroundings};
use crate::test::wire::{exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

const START: Duration = Duration::from_secs(30);

pub fn cases() -> Vec<Case> {
    let needs = |more: &[Need]| [&super::BUILD[..], &[Need::Testpmd], more].concat();
    let mut cases = vec![
        Case::new("pmd/memory/no-huge", &needs(&[]), |ctx| {
            memory(ctx, false, |_| true, &[])
        }),
        Case::new("pmd/memory/in-memory", &needs(&[Need::Hugepages, Need::Root]), |ctx| {
            memory(ctx, true, |arg| !arg.starts_with("--huge-dir"), &["--in-memory"])
        }),
        Case::new(
            "pmd/memory/many-regions",
            &needs(&[Need::Hugepages, Need::Root]),
            |ctx| memory(ctx, true, |arg| arg != "--single-file-segments", &[]),
        ),
        Case::new(
            "pmd/memory/too-many-regions",
            &needs(&[Need::Hugepages, Need::Root]),
            too_many,
        ),
        Case::new("pmd/two-applications", &needs(&[]), two),
    ];
    for rings in BOTH {
        for server in [false, true] {
            let name = format!("pmd/reconnect/{}{}", rings.name, if server { "-server" } else { "" });
            cases.push(Case::new(name, &needs(&[]), move |ctx| reconnect(ctx, rings, server)));
        }
    }
    cases
}

/// Memory of other kinds than hugepages in one file: with some of the usual arguments only, and others besides. Our
/// back-ends take more regions than a memory table holds.
fn memory(ctx: &Ctx, huge: bool, keep: fn(&str) -> bool, eal: &[&str]) -> Result<Outcome> {
    let sockets = ["a", "b"].map(|name| ctx.dir.join(name));
    let mut config = Config::new("pmd", &ctx.dir);
    config.mbufs = 8192;
    config.huge_dir = if huge { ctx.hugetlbfs("pmd")? } else { None };
    config.eal = eal.iter().map(|&arg| arg.to_owned()).collect();
    let (mut a, mut b) = (back(&sockets[0], "")?, back(&sockets[1], "")?);
    config.vdevs = vec![vdev(0, &sockets[0], ""), vdev(1, &sockets[1], ",packed_vq=1")];
    config.plugin = Some(plugin(ctx)?);
    let mut testpmd = start_with(ctx, &config, keep)?;
    testpmd.wait_for("testpmd> ", 0, START)?;
    testpmd.command("start")?;
    prove(&mut a, &mut b)?;
    exchange(&mut a, &mut b, &frames(200, 1514), 128)?;
    passed()
}

/// A testpmd with some of its usual arguments only.
fn start_with(ctx: &Ctx, config: &Config, keep: fn(&str) -> bool) -> Result<Process> {
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    let whole = config.command(program);
    let mut command = std::process::Command::new(whole.get_program());
    command.args(whole.get_args().filter(|arg| arg.to_str().is_none_or(keep)));
    for (key, value) in whole.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let surroundings = Surroundings {
        hugetlbfs: config.huge_dir.clone(),
        ..Default::default()
    };
    Process::spawn("testpmd", command, &surroundings)
}

/// A file for each hugepage, and a back-end that takes eight. The start fails, and says what to do.
fn too_many(ctx: &Ctx) -> Result<Outcome> {
    let socket = ctx.dir.join("a");
    let dir = ctx.subdir("be")?;
    let mut config = Config::new("be", &dir);
    config.huge_dir = ctx.hugetlbfs("be")?;
    config.mbufs = 4096;
    config.vdevs = vec![vhost(0, &socket, "")];
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    let _back = Testpmd::start(program, &config)?;

    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    config.vdevs = vec![vdev(0, &socket, "")];
    config.plugin = Some(plugin(ctx)?);
    let mut process = start_with(ctx, &config, |arg| arg != "--single-file-segments")?;
    process.wait_for("net_usernic0: not started: ", 0, START)?;
    process.wait_for("Fail to start port 0", 0, START)?;
    let said = process.output();
    ensure!(
        said.contains("regions of memory, and the back-end takes 8")
            && said.contains("start DPDK with --single-file-segments"),
        "{said}"
    );
    passed()
}

/// Two processes with a port each, which loop what comes.
fn two(ctx: &Ctx) -> Result<Outcome> {
    let mut running = Vec::new();
    for (name, rings) in ["x", "y"].into_iter().zip(BOTH) {
        let sockets = ["a", "b"].map(|side| ctx.dir.join(format!("{name}{side}")));
        let dir = ctx.subdir(name)?;
        let mut config = Config::new(name, &dir);
        config.huge_dir = ctx.hugetlbfs(name)?;
        config.mbufs = 8192;
        let ends = [back(&sockets[0], "")?, back(&sockets[1], "")?];
        config.vdevs = vec![vdev(0, &sockets[0], rings.keys), vdev(1, &sockets[1], rings.keys)];
        let mut testpmd = start(ctx, &mut config)?;
        testpmd.forward("io")?;
        running.push((testpmd, ends));
    }
    for _ in 0..2 {
        for (_, [a, b]) in &mut running {
            prove(a, b)?;
            exchange(a, b, &frames(100, 1514), 128)?;
        }
    }
    passed()
}

/// The back-end goes away, comes back, and frames go through as before; no mbuf is lost.
fn reconnect(ctx: &Ctx, rings: Rings, server: bool) -> Result<Outcome> {
    let sockets = ["a", "b"].map(|name| ctx.dir.join(name));
    let (theirs, ours) = if server { (",server=1", ",client=1") } else { ("", "") };
    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    // A round of a ring's mbufs that were lost would be missed.
    config.mbufs = 3000;
    config.vdevs = vec![
        vdev(0, &sockets[0], &format!("{}{theirs}", rings.keys)),
        vdev(1, &sockets[1], &format!("{}{theirs}", rings.keys)),
    ];
    config.extra = vec!["--mbcache=64".into()];
    let open = || -> Result<_> { Ok([back(&sockets[0], ours)?, back(&sockets[1], ours)?]) };
    let mut ends = if server { None } else { Some(open()?) };
    let mut testpmd = start(ctx, &mut config)?;
    testpmd.forward("io")?;
    if server {
        ensure!(
            testpmd.command("show port summary 0")?.contains("down"),
            "nobody is on the other side"
        );
    }
    for round in 0..12 {
        let both = match ends.take() {
            Some(ends) => ends,
            None => open()?,
        };
        let [mut a, mut b] = both;
        prove(&mut a, &mut b).with_context(|| format!("round {round}"))?;
        exchange(&mut a, &mut b, &frames(50, 1514), 128).with_context(|| format!("round {round}"))?;
        let mark = testpmd.process().mark();
        drop((a, b));
        for port in 0..2 {
            testpmd
                .process()
                .wait_for(&format!("net_usernic{port}: link down"), mark, START)
                .with_context(|| format!("round {round}"))?;
        }
    }
    passed()
}
