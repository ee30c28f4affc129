//! Our front-ends through OVS-DPDK.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{DataPath, PATHS, frames, front};
use crate::peers::ovs::{Ovs, PortKind};
use crate::test::wire::{End, exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

const GROUP: &str = "ovs-paths";

/// A switch with two ports, joined by flows.
struct Peer {
    ovs: Ovs,
    sockets: [PathBuf; 2],
}

impl Peer {
    fn start(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let mut ovs = Ovs::start(&ctx.found, dir, ctx.hugetlbfs_in(dir, "ovs")?)?;
        let a = ovs.add_port("p1", PortKind::VhostUser, 9000)?;
        let b = ovs.add_port("p2", PortKind::VhostUser, 9000)?;
        ovs.connect(1, 2)?;
        ovs.connect(2, 1)?;
        Ok(Peer { ovs, sockets: [a, b] })
    }
}

pub fn cases() -> Vec<Case> {
    PATHS
        .into_iter()
        .map(|path| {
            Case::new(
                format!("dts/pvp_multi_paths/ovs/{}", path.name),
                &[Need::Ovs, Need::Root],
                move |ctx| bytes(ctx, path),
            )
            .sharing(GROUP)
        })
        .collect()
}

fn bytes(ctx: &Ctx, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(GROUP, |dir| Peer::start(ctx, dir))?;
    let keys = path.ours();
    let mut a = End::open(&front(&peer.sockets[0], &keys))?;
    let mut b = End::open(&front(&peer.sockets[1], &keys))?;
    let (mask, wanted) = path.features();
    a.expect_features(mask, wanted)?;
    b.expect_features(mask, wanted)?;
    prove(&mut a, &mut b)?;
    exchange(&mut a, &mut b, &frames(300, 9000), path.window()).with_context(|| {
        format!(
            "p1: {} p2: {}",
            peer.ovs.statistics("p1").trim(),
            peer.ovs.statistics("p2").trim()
        )
    })?;
    passed()
}
