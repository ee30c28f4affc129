//! The peers among themselves: if one of these fails, a failure of ours against that peer says nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Case, Ctx, Need, Outcome};
use crate::peers::ovs::{Ovs, PortKind};
use crate::peers::testpmd::{self, Config, Testpmd};
use crate::process::sleep;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("peers/dpdk-pair", &[Need::Testpmd], dpdk_pair),
        Case::new(
            "peers/dpdk-through-ovs",
            &[Need::Testpmd, Need::Ovs, Need::Root],
            dpdk_through_ovs,
        ),
    ]
}

/// testpmd's virtio_user on testpmd's vhost PMD: packets go round.
fn dpdk_pair(ctx: &Ctx) -> Result<Outcome> {
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    let socket = ctx.dir.join("s");
    let mut back = Config::new("b", &ctx.dir);
    back.huge_dir = ctx.hugetlbfs("b")?;
    back.vdevs = vec![testpmd::vhost(0, &socket, "")];
    let mut back = Testpmd::start(program, &back)?;
    back.forward("io")?;
    let mut front = Config::new("f", &ctx.dir);
    front.huge_dir = ctx.hugetlbfs("f")?;
    front.cpus = (1, 0);
    front.vdevs = vec![testpmd::virtio_user(0, &socket, 256, "")];
    let mut front = Testpmd::start(program, &front)?;
    front.forward_first("io", 1)?;
    sleep(Duration::from_millis(300))?;
    let (front, back) = (front.stats(0)?, back.stats(0)?);
    ensure!(
        front.rx > 32 && back.rx > 32 && back.tx > 32,
        "front-end: {front:?}, back-end: {back:?}"
    );
    Ok(Outcome::Passed(format!("{} packets went round", back.tx)))
}

/// testpmd's virtio_user on two ports of OVS: what it sends on either comes back on the other.
fn dpdk_through_ovs(ctx: &Ctx) -> Result<Outcome> {
    let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
    let mut ovs = Ovs::start(&ctx.found, &ctx.dir, ctx.hugetlbfs("ovs")?)?;
    let a = ovs.add_port("p1", PortKind::VhostUser, 9000)?;
    let b = ovs.add_port("p2", PortKind::VhostUserClient, 9000)?;
    ovs.connect(1, 2)?;
    ovs.connect(2, 1)?;
    let mut front = Config::new("f", &ctx.dir);
    front.huge_dir = ctx.hugetlbfs("f")?;
    front.cpus = (0, 0);
    front.vdevs = vec![
        testpmd::virtio_user(0, &a, 256, ""),
        testpmd::virtio_user(1, &b, 256, ",server=1"),
    ];
    let mut front = Testpmd::start(program, &front)?;
    ovs.wait_log("has been added", 2, Duration::from_secs(15))?;
    // The first frames may come before OVS polls a port, and are lost: then nothing goes round on that side.
    let (mut first, mut second) = (front.stats(0)?, front.stats(1)?);
    for _ in 0..10 {
        front.forward_first("io", 1)?;
        sleep(Duration::from_millis(500))?;
        (first, second) = (front.stats(0)?, front.stats(1)?);
        if first.rx > 32 && second.rx > 32 {
            break;
        }
    }
    ensure!(
        first.rx > 32 && second.rx > 32,
        "{first:?}, {second:?}; p1: {}",
        ovs.statistics("p1")
    );
    Ok(Outcome::Passed(format!(
        "{} packets came through",
        first.rx + second.rx
    )))
}
