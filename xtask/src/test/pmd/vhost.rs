//! The plugin on DPDK's vhost PMD: ours, vhost, the plugin, and back to ours by another pair of vhost ports.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::testpmd::frames;
use super::{BOTH, Rings, front, start, vdev};
use crate::peers::testpmd::{Config, Testpmd};
use crate::test::wire::{End, exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

/// vhost ports 0 and 1, 2 and 3 are connected; on 1 and 2 comes the plugin.
struct Peer {
    _testpmd: Testpmd,
    sockets: [PathBuf; 4],
}

impl Peer {
    fn start(ctx: &Ctx, dir: &Path, queues: u16) -> Result<Self> {
        let sockets = ["a", "p", "q", "b"].map(|name| dir.join(name));
        let mut config = Config::new("be", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "be")?;
        config.jumbo = queues == 1;
        config.mbufs = if queues == 1 { 8192 } else { 32768 };
        for (index, socket) in sockets.iter().enumerate() {
            config
                .vdevs
                .push(format!("net_vhost{index},iface={},queues={queues}", socket.display()));
        }
        config.extra = vec![format!("--rxq={queues}"), format!("--txq={queues}")];
        let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
        let mut testpmd = Testpmd::start(program, &config)?;
        testpmd.forward("io")?;
        Ok(Peer {
            _testpmd: testpmd,
            sockets,
        })
    }
}

pub fn cases() -> Vec<Case> {
    let needs = [&super::BUILD[..], &[Need::Testpmd]].concat();
    let mut cases = Vec::new();
    for queues in [1, 8] {
        for rings in BOTH {
            let name = format!("pmd/dpdk-vhost/{}-{queues}-queues", rings.name);
            let group = format!("pmd-vhost-{queues}");
            let run = {
                let group = group.clone();
                move |ctx: &Ctx| through(ctx, &group, rings, queues)
            };
            cases.push(Case::new(name, &needs, run).sharing(&group));
        }
    }
    cases
}

fn through(ctx: &Ctx, group: &str, rings: Rings, queues: u16) -> Result<Outcome> {
    let peer = ctx.shared(group, |dir| Peer::start(ctx, dir, queues))?;
    let [a, p, q, b] = &peer.sockets;
    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    config.jumbo = queues == 1;
    config.mbufs = if queues == 1 { 8192 } else { 32768 };
    let keys = format!(",queues={queues}{}", rings.keys);
    config.vdevs = vec![vdev(0, p, &keys), vdev(1, q, &keys)];
    config.extra = vec![format!("--rxq={queues}"), format!("--txq={queues}")];
    if queues > 1 {
        let more = ["--max-pkt-len=9018", "--enable-scatter", "--tx-offloads=0x8000"];
        config.extra.extend(more.map(String::from));
    }
    let mut testpmd = start(ctx, &mut config)?;
    testpmd.forward("io")?;
    let keys = format!(",queues={queues},packed_vq={}", u8::from(rings.packed));
    let mut ends: [End; 2] = [front(a, &keys)?, front(b, &keys)?];
    let [a, b] = &mut ends;
    prove(a, b)?;
    let count = if queues == 1 { 200 } else { 20 };
    exchange(a, b, &frames(count, 9000), 64)?;
    passed()
}
