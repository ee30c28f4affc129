//! A capture goes through each of the peers and arrives byte for byte and in order.
//!
//! Frames have 60 to 9000 bytes, queues 16 to 4096 entries. The peers poll on CPU 1. Where the `usernic` program is at
//! both ends the rate is low, since what lies between drops what its receiver has no room for, and three busy threads on
//! two CPUs make one wait for some milliseconds; elsewhere nobody sends what there may be no room for.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::link::path;
use super::wire::{End, exchange, prove};
use super::{Case, Ctx, Link, Need, Outcome, Usernic, passed};
use crate::pcap;
use crate::peers::Program;
use crate::peers::ovs::{Ovs, PortKind};
use crate::peers::testpmd::{self, Testpmd};
use crate::process::{Process, sleep};

const UP: Duration = Duration::from_secs(15);

/// Queue sizes that each peer is tried with.
const SIZES: [u16; 5] = [16, 64, 256, 1024, 4096];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for size in SIZES {
        cases.push(Case::new(
            format!("ours/switch-q{size}"),
            &[Need::Usernic],
            move |ctx| through_our_switch(ctx, size),
        ));
    }
    for size in [16, 256, 4096] {
        cases.push(Case::new(
            format!("ours/direct-q{size}"),
            &[Need::Usernic],
            move |ctx| without_a_switch(ctx, size),
        ));
    }
    for size in SIZES {
        let needs = [Need::Usernic, Need::Testpmd];
        cases.push(Case::new(format!("dpdk-vhost/q{size}"), &needs, move |ctx| {
            dpdk_vhost(ctx, size, "")
        }));
        cases.push(Case::new(format!("dpdk-virtio-user/q{size}"), &needs, move |ctx| {
            dpdk_virtio_user(ctx, size, "")
        }));
    }
    for (name, key) in [
        ("no-mergeable", ",mrg_rxbuf=0"),
        ("no-in-order", ",in_order=0"),
        ("packed", ",packed_vq=1"),
        ("packed-mergeable", ",packed_vq=1,mrg_rxbuf=1"),
        ("packed-no-in-order", ",packed_vq=1,in_order=0"),
    ] {
        let needs = [Need::Usernic, Need::Testpmd];
        cases.push(Case::new(format!("dpdk-vhost/{name}"), &needs, move |ctx| {
            dpdk_vhost(ctx, 256, key)
        }));
        cases.push(Case::new(format!("dpdk-virtio-user/{name}"), &needs, move |ctx| {
            dpdk_virtio_user(ctx, 256, key)
        }));
    }
    let needs = [Need::Usernic, Need::Testpmd];
    cases.push(Case::new(
        "dpdk-virtio-user/through-our-switch",
        &needs,
        dpdk_behind_our_switch,
    ));
    for kind in [PortKind::VhostUser, PortKind::VhostUserClient] {
        let name = if kind == PortKind::VhostUser {
            "dpdkvhostuser"
        } else {
            "dpdkvhostuserclient"
        };
        for size in [16, 256, 4096] {
            let needs = [Need::Ovs, Need::Root];
            cases.push(Case::new(format!("ovs/{name}-q{size}"), &needs, move |ctx| {
                through_ovs(ctx, kind, size)
            }));
        }
    }
    cases
}

/// Frames of every kind of length from 60 to `most` bytes. A small ring holds few of them: fewer, then, and slower.
fn frames(size: u16, most: usize) -> (Vec<Vec<u8>>, u32) {
    let mut random = pcap::Random(u64::from(size));
    let edges = [
        60, 61, 63, 64, 65, 127, 128, 129, 1514, 1518, 2036, 2048, 2049, 4095, 4096, 4097, 8999, 9000,
    ];
    let (count, rate) = if size < 256 { (300, 250) } else { (2000, 2000) };
    let some = (0..count).map(|i| match i % 3 {
        0 => 60 + random.draw() as usize % (most - 59),
        1 => 60 + random.draw() as usize % 200,
        _ => 60 + random.draw() as usize % 1455,
    });
    (pcap::frames(edges.into_iter().filter(|&l| l <= most).chain(some)), rate)
}

/// The largest frame that a port can take with buffers of 2048 bytes each.
fn most(key: &str) -> usize {
    if key.contains("mrg_rxbuf=0") { 1514 } else { 9000 }
}

fn program(program: &Option<Program>) -> Result<&Program> {
    program.as_ref().context("a peer that was there is gone")
}

pub(super) fn wait_for_socket(socket: &std::path::Path, process: &mut Process) -> Result<()> {
    let end = std::time::Instant::now() + UP;
    while !socket.exists() {
        if let Some(status) = process.exited()? {
            anyhow::bail!(
                "{}: {}{}",
                process.name(),
                crate::process::describe(status),
                process.tail()
            );
        }
        anyhow::ensure!(
            std::time::Instant::now() < end,
            "no {} within {UP:?}{}",
            socket.display(),
            process.tail()
        );
        sleep(Duration::from_millis(5))?;
    }
    Ok(())
}

/// Ours on both sides: front-ends that replay and capture, our switch between them.
fn through_our_switch(ctx: &Ctx, size: u16) -> Result<Outcome> {
    let (a, b) = (ctx.dir.join("a"), ctx.dir.join("b"));
    let listen = format!("{},{}", a.display(), b.display());
    let mut switch = Usernic::spawn(
        ctx,
        &["switch", "--listen", &listen, "--mtu", "9000", "--connect", "0:1"],
    )?;
    wait_for_socket(&a, &mut switch)?;
    wait_for_socket(&b, &mut switch)?;
    let (frames, rate) = frames(size, 9000);
    let spec = |socket| format!("virtio-user,path={socket},queue_size={size},mtu=9000");
    let link = Link {
        capture: &spec(b.display()),
        replay: &spec(a.display()),
        rate,
    };
    link.transfer(ctx, "t", &frames, || Ok(()))?;
    switch.signal(rustix::process::Signal::INT)?;
    switch.wait_success(UP)?;
    passed()
}

/// Ours on both sides and nothing between: a back-end captures what a front-end replays, split and packed; and a front-end
/// that listens what a back-end replays. Nobody drops anything, so that nobody need be slow.
fn without_a_switch(ctx: &Ctx, size: u16) -> Result<Outcome> {
    let (frames, _) = frames(size, 9000);
    let front = format!("virtio-user,queue_size={size},mtu=9000");
    for (tag, capture, replay) in [
        ("split", "vhost,mtu=9000", front.clone()),
        ("packed", "vhost,mtu=9000", format!("{front},packed_vq=1")),
        (
            "back",
            &*format!("{front},server=1"),
            "vhost,mtu=9000,client=1".to_owned(),
        ),
    ] {
        let socket = ctx.dir.join(tag);
        let at = |spec: &str| format!("{spec},path={}", socket.display());
        let link = Link {
            capture: &at(capture),
            replay: &at(&replay),
            rate: 20_000,
        };
        let mut capturing = link.start(ctx, tag, &frames).context(tag)?;
        wait_for_socket(&socket, capturing.process())?;
        link.replay(ctx, &capturing)?.wait_success(UP).context(tag)?;
        capturing.finish(ctx).context(tag)?;
    }
    passed()
}

/// Our front-ends on two ports of DPDK's vhost PMD, which testpmd connects: both ways, and again on new connections.
fn dpdk_vhost(ctx: &Ctx, size: u16, key: &str) -> Result<Outcome> {
    let sockets = [ctx.dir.join("a"), ctx.dir.join("b")];
    let mut config = testpmd::Config::new("be", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("be")?;
    config.cpus = (1, 1);
    config.jumbo = true;
    config.vdevs = vec![testpmd::vhost(0, &sockets[0], ""), testpmd::vhost(1, &sockets[1], "")];
    let mut testpmd = Testpmd::start(program(&ctx.found.testpmd)?, &config)?;
    testpmd.forward("io")?;
    let (frames, _) = frames(size, most(key));
    for _ in 0..2 {
        let [mut a, mut b] = ends(&sockets, |socket| {
            format!("virtio-user,path={socket},queue_size={size},mtu=9000{key}")
        })?;
        through(&mut a, &mut b, &frames, size, &mut testpmd)?;
    }
    passed()
}

/// DPDK's virtio_user on two ports of our back-end, connected by testpmd.
fn dpdk_virtio_user(ctx: &Ctx, size: u16, key: &str) -> Result<Outcome> {
    let sockets = [ctx.dir.join("a"), ctx.dir.join("b")];
    let [mut a, mut b] = ends(&sockets, |socket| format!("vhost,path={socket},mtu=9000"))?;
    let mut config = testpmd::Config::new("fe", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("fe")?;
    config.cpus = (1, 1);
    config.jumbo = !key.contains("mrg_rxbuf=0");
    config.vdevs = vec![
        testpmd::virtio_user(0, &sockets[0], size, key),
        testpmd::virtio_user(1, &sockets[1], size, key),
    ];
    let mut testpmd = Testpmd::start(program(&ctx.found.testpmd)?, &config)?;
    testpmd.forward("io")?;
    let (frames, _) = frames(size, most(key));
    through(&mut a, &mut b, &frames, size, &mut testpmd)?;
    passed()
}

/// A port of ours on each socket.
fn ends(sockets: &[std::path::PathBuf; 2], spec: impl Fn(std::path::Display<'_>) -> String) -> Result<[End; 2]> {
    Ok([
        End::open(&spec(sockets[0].display()))?,
        End::open(&spec(sockets[1].display()))?,
    ])
}

/// The frames go both ways, never more at a time than half of what the smallest ring holds.
fn both_ways(a: &mut End, b: &mut End, frames: &[Vec<u8>], size: u16) -> Result<()> {
    a.wait_link()?;
    b.wait_link()?;
    prove(a, b)?;
    exchange(a, b, frames, usize::from(size / 2).min(128))
}

fn through(a: &mut End, b: &mut End, frames: &[Vec<u8>], size: u16, testpmd: &mut Testpmd) -> Result<()> {
    both_ways(a, b, frames, size).with_context(|| {
        testpmd
            .stats(0)
            .map_or(String::new(), |s| format!("testpmd's first port received {}", s.rx))
    })
}

/// Our front-ends and DPDK's on one switch of ours: replay, switch, testpmd, switch, capture.
fn dpdk_behind_our_switch(ctx: &Ctx) -> Result<Outcome> {
    let sockets: Vec<_> = ["a", "b", "c", "d"].iter().map(|n| ctx.dir.join(n)).collect();
    let listen = sockets.iter().map(|s| path(s)).collect::<Result<Vec<_>>>()?.join(",");
    let mut switch = Usernic::spawn(
        ctx,
        &[
            "switch",
            "--listen",
            &listen,
            "--mtu",
            "9000",
            "--connect",
            "0:1",
            "--connect",
            "2:3",
        ],
    )?;
    for socket in &sockets {
        wait_for_socket(socket, &mut switch)?;
    }
    let mut config = testpmd::Config::new("fe", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("fe")?;
    config.cpus = (1, 1);
    config.jumbo = true;
    config.vdevs = vec![
        testpmd::virtio_user(0, &sockets[1], 1024, ""),
        testpmd::virtio_user(1, &sockets[2], 1024, ""),
    ];
    let mut testpmd = Testpmd::start(program(&ctx.found.testpmd)?, &config)?;
    testpmd.forward("io")?;
    let (frames, rate) = frames(1024, 9000);
    let spec = |socket: &std::path::Path| format!("virtio-user,path={},queue_size=1024,mtu=9000", socket.display());
    let link = Link {
        capture: &spec(&sockets[3]),
        replay: &spec(&sockets[0]),
        rate,
    };
    link.transfer(ctx, "t", &frames, || Ok(()))?;
    passed()
}

/// Our front-ends on two ports of OVS-DPDK, with a flow for each direction: as many frames under way as the rings hold.
fn through_ovs(ctx: &Ctx, kind: PortKind, size: u16) -> Result<Outcome> {
    let mut ovs = Ovs::start(&ctx.found, &ctx.dir, ctx.hugetlbfs("ovs")?)?;
    let sockets = [ovs.add_port("p1", kind, 9000)?, ovs.add_port("p2", kind, 9000)?];
    ovs.connect(1, 2)?;
    ovs.connect(2, 1)?;
    let server = if kind == PortKind::VhostUserClient {
        ",server=1"
    } else {
        ""
    };
    let [mut a, mut b] = ends(&sockets, |socket| {
        format!("virtio-user,path={socket},queue_size={size},mtu=9000,timeout=30000{server}")
    })?;
    both_ways(&mut a, &mut b, &frames(size, 9000).0, size)
        .with_context(|| format!("p1: {}p2: {}", ovs.statistics("p1").trim(), ovs.statistics("p2").trim()))?;
    passed()
}
