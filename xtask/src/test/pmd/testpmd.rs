//! testpmd with the plugin's ports on back-ends of ours: frames of all lengths, eight queues, chains, restarts.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{BOTH, JUMBO, RINGS, Rings, back, start, vdev};
use crate::pcap;
use crate::peers::testpmd::{Config, Testpmd};
use crate::test::wire::{End, exchange, expect_silence, prove, wake};
use crate::test::{Case, Check, Ctx, Need, Outcome, passed};

/// The groups of cases that share a testpmd.
const ONE: &str = "pmd";
const EIGHT: &str = "pmd-8";

/// Feature bits (virtio 1.3, 5.1.3 and 6).
const MRG_RXBUF: u64 = 1 << 15;
const RING_INDIRECT_DESC: u64 = 1 << 28;
const RING_PACKED: u64 = 1 << 34;
const IN_ORDER: u64 = 1 << 35;

/// A testpmd with a pair of ports for each kind of rings, which it connects.
struct Peer {
    ends: Vec<[End; 2]>,
    testpmd: Testpmd,
}

impl Peer {
    fn one(ctx: &Ctx, dir: &Path) -> Result<Self> {
        Self::start(ctx, dir, &RINGS, "", JUMBO, &[])
    }

    /// Eight queues; the mbufs are small, so that long frames are chains of them.
    fn eight(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let extra = [
            "--rxq=8",
            "--txq=8",
            "--rxd=256",
            "--txd=256",
            "--max-pkt-len=9018",
            "--enable-scatter",
            "--tx-offloads=0x8000",
        ];
        Self::start(ctx, dir, &BOTH, ",queues=8", 32768, &extra)
    }

    fn start(ctx: &Ctx, dir: &Path, rings: &[Rings], keys: &str, mbufs: u32, extra: &[&str]) -> Result<Self> {
        let mut config = Config::new("pmd", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "pmd")?;
        config.jumbo = mbufs == JUMBO;
        config.mbufs = mbufs;
        config.extra = extra.iter().map(|&arg| arg.to_owned()).collect();
        let mut ends = Vec::new();
        for rings in rings {
            let mut open = |side| {
                let socket = dir.join(format!("{}{side}", ends.len()));
                let index = config.vdevs.len();
                config
                    .vdevs
                    .push(vdev(index, &socket, &format!("{keys}{}", rings.keys)));
                let direct = if queues_of(keys) && rings.packed {
                    ",indirect=0"
                } else {
                    ""
                };
                back(&socket, &format!("{keys}{direct}"))
            };
            let both = [open("a")?, open("b")?];
            ends.push(both);
        }
        let mut testpmd = start(ctx, &mut config)?;
        testpmd.forward("io")?;
        Ok(Peer { ends, testpmd })
    }
}

/// Whether the keys ask for several queues.
fn queues_of(keys: &str) -> bool {
    !keys.is_empty()
}

impl Rings {
    fn features(&self) -> u64 {
        let bits = [
            (MRG_RXBUF, self.mergeable),
            (RING_PACKED, self.packed),
            (IN_ORDER, self.in_order),
        ];
        bits.iter().map(|(bit, on)| if *on { *bit } else { 0 }).sum()
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let needs = [&super::BUILD[..], &[Need::Testpmd]].concat();
    let mut add = |name: String, group: &str, run: Check| {
        cases.push(Case::new(name, &needs, run).sharing(group));
    };
    for (index, rings) in RINGS.into_iter().enumerate() {
        add(
            format!("pmd/testpmd/{}", rings.name),
            ONE,
            Box::new(move |ctx| bytes(ctx, index, rings)),
        );
    }
    for (index, rings) in BOTH.into_iter().enumerate() {
        add(
            format!("pmd/kicks/{}", rings.name),
            ONE,
            Box::new(move |ctx| kicks(ctx, index)),
        );
    }
    for (index, rings) in BOTH.into_iter().enumerate() {
        add(
            format!("pmd/restart/{}", rings.name),
            ONE,
            Box::new(move |ctx| restart(ctx, index)),
        );
    }
    for (index, rings) in BOTH.into_iter().enumerate() {
        add(
            format!("pmd/testpmd/8-queues-{}", rings.name),
            EIGHT,
            Box::new(move |ctx| queues(ctx, index)),
        );
    }
    for (index, rings) in BOTH.into_iter().enumerate() {
        add(
            format!("pmd/reconfigure/{}", rings.name),
            EIGHT,
            Box::new(move |ctx| reconfigure(ctx, index)),
        );
    }
    cases
}

/// Frames of `least` to `most` bytes: the edges of buffers and of sizes, and some between.
pub(super) fn frames(count: usize, most: usize) -> Vec<Vec<u8>> {
    let edges = [
        60, 61, 63, 64, 65, 127, 128, 1514, 1518, 2035, 2036, 2037, 2047, 2048, 2049, 2060, 4084, 4096, 4097, 8999,
        9000,
    ];
    let mut random = pcap::Random(count as u64 + 7);
    let some = (0..count).map(|i| match i % 2 {
        0 => 60 + random.draw() as usize % (most - 59),
        _ => 60 + random.draw() as usize % 200,
    });
    pcap::frames(edges.into_iter().filter(|&l| l <= most).chain(some))
}

fn bytes(ctx: &Ctx, index: usize, rings: Rings) -> Result<Outcome> {
    let mut peer = ctx.shared(ONE, |dir| Peer::one(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    for end in [&*a, &*b] {
        end.expect_features(MRG_RXBUF | RING_PACKED | IN_ORDER, rings.features())?;
    }
    exchange(a, b, &frames(500, 9000), 128)?;
    passed()
}

/// Our back-ends sleep until the plugin kicks them, and are left alone while they poll.
fn kicks(ctx: &Ctx, index: usize) -> Result<Outcome> {
    let mut peer = ctx.shared(ONE, |dir| Peer::one(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    wake(a, b, 400)?;
    exchange(a, b, &frames(200, 1514), 64)?;
    expect_silence(a)?;
    expect_silence(b)?;
    passed()
}

/// testpmd stops its ports and starts them again, a hundred times, with frames between.
fn restart(ctx: &Ctx, index: usize) -> Result<Outcome> {
    let mut peer = ctx.shared(ONE, |dir| Peer::one(ctx, dir))?;
    let Peer { ends, testpmd } = &mut *peer;
    let [a, b] = &mut ends[index];
    for round in 0..100 {
        testpmd.stop()?;
        for action in ["stop", "start"] {
            for port in [2 * index, 2 * index + 1] {
                testpmd.command(&format!("port {action} {port}"))?;
            }
        }
        testpmd.forward("io")?;
        prove(a, b).with_context(|| format!("round {round}"))?;
        exchange(a, b, &frames(0, 4096), 64).with_context(|| format!("round {round}"))?;
    }
    passed()
}

/// Frames of one to five mbufs on each of eight queues.
fn queues(ctx: &Ctx, index: usize) -> Result<Outcome> {
    let mut peer = ctx.shared(EIGHT, |dir| Peer::eight(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    // Long frames go by way of indirect tables, where the back-end has such: one does.
    let indirect = if index == 0 { RING_INDIRECT_DESC } else { 0 };
    a.expect_features(MRG_RXBUF | RING_INDIRECT_DESC, MRG_RXBUF | indirect)?;
    exchange(a, b, &frames(100, 9000), 64)?;
    passed()
}

/// Fewer queues, more queues, other descriptors, in the same process on the same connection.
fn reconfigure(ctx: &Ctx, index: usize) -> Result<Outcome> {
    let mut peer = ctx.shared(EIGHT, |dir| Peer::eight(ctx, dir))?;
    let Peer { ends, testpmd } = &mut *peer;
    let [a, b] = &mut ends[index];
    for (queues, descriptors) in [(1, 128), (4, 64), (8, 256)] {
        let describe = || format!("{queues} queues of {descriptors}");
        testpmd.stop()?;
        testpmd.command("port stop all")?;
        for what in ["rxq", "txq"] {
            testpmd.command(&format!("port config all {what} {queues}"))?;
        }
        for what in ["rxd", "txd"] {
            testpmd.command(&format!("port config all {what} {descriptors}"))?;
        }
        testpmd.command("port start all")?;
        testpmd.forward("io")?;
        // Of the back-end's eight queues the first so many.
        let mut some = [take(a, queues), take(b, queues)];
        let result = {
            let [a, b] = &mut some;
            prove(a.0, b.0).and_then(|()| exchange(a.0, b.0, &frames(30, 4096), 32))
        };
        for part in some {
            let (end, rest) = part;
            end.queues.extend(rest);
        }
        result.with_context(describe)?;
    }
    passed()
}

/// An end with its first queues alone, and the others.
fn take(end: &mut End, queues: usize) -> (&mut End, Vec<usernic::Queue>) {
    let rest = end.queues.split_off(queues);
    (end, rest)
}
