//! DPDK's virtio_user on our back-ends.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::{DataPath, IN_ORDER, MRG_RXBUF, PATHS, RING_INDIRECT_DESC, RING_PACKED, back, frames, small_frames};
use crate::pcap;
use crate::peers::testpmd::{self, Testpmd};
use crate::test::wire::{End, exchange, expect_silence, prove, wake};
use crate::test::{Case, Check, Ctx, Need, Outcome, passed};

/// The groups of cases that share a testpmd.
const ALL: &str = "virtio-user";
const RINGS: &str = "virtio-user-rings";
const EIGHT: &str = "virtio-user-8";
const CHAINS: &str = "virtio-user-chains";

/// mbufs of a pool in which each holds a whole frame.
const JUMBO: u32 = 16384;

/// Sizes of rings that virtio_user takes: its thresholds want some descriptors.
const SPLIT_RINGS: [u16; 5] = [8, 16, 64, 1024, 4096];
const PACKED_RINGS: [u16; 7] = [8, 11, 31, 33, 100, 1000, 4095];

/// Two ports to connect: keys of our back-ends, ring size and keys of theirs.
struct Pair {
    ours: String,
    queue_size: u16,
    theirs: String,
}

/// A testpmd with pairs of virtio_user ports on back-ends of ours, each pair connected.
struct Peer {
    ends: Vec<[End; 2]>,
    testpmd: Testpmd,
    started: String,
}

impl Peer {
    /// For each path a pair.
    fn paths(ctx: &Ctx, dir: &Path) -> Result<Self> {
        Self::start(ctx, dir, one_a_path(""), JUMBO, &[])
    }

    /// The same with eight queues. The mbufs are small: frames are chains of them.
    fn eight(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let mut pairs = one_a_path(",queues=8,indirect=0");
        for pair in &mut pairs {
            pair.theirs = pair.theirs.replace(",queues=1", ",queues=8");
        }
        Self::start(ctx, dir, pairs, 32768, &["--rxq=8", "--txq=8", "--rxd=128"])
    }

    /// For each size a pair.
    fn rings(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let pair = |packed, queue_size| Pair {
            ours: String::new(),
            queue_size,
            theirs: format!(",queues=1,packed_vq={packed}"),
        };
        let mut pairs: Vec<Pair> = SPLIT_RINGS.into_iter().map(|size| pair(0, size)).collect();
        pairs.extend(PACKED_RINGS.into_iter().map(|size| pair(1, size)));
        Self::start(ctx, dir, pairs, 32768, &["--rxfreet=4"])
    }

    /// For each way to send a chain of mbufs a pair.
    fn chains(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let pairs = Chain::all().into_iter().map(|chain| Pair {
            ours: format!(",queues=8,indirect={}", u8::from(chain.indirect)),
            queue_size: 256,
            theirs: format!(
                ",queues=8,packed_vq={},in_order={},mrg_rxbuf=1",
                u8::from(chain.packed),
                u8::from(chain.in_order)
            ),
        });
        // virtio_user keeps the mbufs of what it has sent until its ring is full: of a table of three mbufs for each of
        // 256 descriptors that is more than all ports receive into, and a pool of less than all of that stands still.
        Self::start(ctx, dir, pairs.collect(), 65536, &["--rxq=8", "--txq=8", "--rxd=128"])
    }

    fn start(ctx: &Ctx, dir: &Path, pairs: Vec<Pair>, mbufs: u32, extra: &[&str]) -> Result<Self> {
        let mut config = testpmd::Config::new("fe", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "fe")?;
        config.jumbo = mbufs == JUMBO;
        config.mbufs = mbufs;
        config.eal = vec![
            "--force-max-simd-bitwidth=512".to_owned(),
            "--log-level=pmd.net.virtio.init:info".to_owned(),
        ];
        config.extra = extra.iter().map(|&arg| arg.to_owned()).collect();
        let mut ends = Vec::new();
        for pair in pairs {
            let mut open = |side| {
                let socket = dir.join(format!("{}{side}", ends.len()));
                let index = config.vdevs.len();
                config.vdevs.push(format!(
                    "net_virtio_user{index},path={},queue_size={}{}",
                    socket.display(),
                    pair.queue_size,
                    pair.theirs
                ));
                End::open(&back(&socket, &pair.ours))
            };
            let both = [open("a")?, open("b")?];
            ends.push(both);
        }
        let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
        let mut testpmd = Testpmd::start(program, &config)?;
        let started = testpmd.process().output();
        testpmd.forward("io")?;
        Ok(Peer { ends, testpmd, started })
    }
}

fn one_a_path(ours: &str) -> Vec<Pair> {
    let pair = |path: DataPath| Pair {
        ours: ours.to_owned(),
        queue_size: path.queue_size,
        theirs: format!(",queues=1{}", path.theirs()),
    };
    PATHS.into_iter().map(pair).collect()
}

/// How a frame of several mbufs is sent.
#[derive(Clone, Copy)]
struct Chain {
    packed: bool,
    in_order: bool,
    indirect: bool,
}

impl Chain {
    fn all() -> Vec<Chain> {
        let bit = |i: u8, n: u8| i >> n & 1 == 1;
        (0..8)
            .map(|i| Chain {
                packed: bit(i, 2),
                in_order: bit(i, 1),
                indirect: bit(i, 0),
            })
            .collect()
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, group: &str, run: Check| {
        cases.push(Case::new(name, &[Need::Testpmd], run).sharing(group));
    };
    for (suite, run) in [
        ("pvp_multi_paths", bytes as fn(&Ctx, usize, DataPath) -> Result<Outcome>),
        ("vhost_user_interrupt", interrupt),
        ("loopback_multi_paths_port_restart", restart),
    ] {
        for (index, path) in PATHS.into_iter().enumerate() {
            let name = format!("dts/{suite}/virtio-user/{}", path.name);
            add(name, ALL, Box::new(move |ctx| run(ctx, index, path)));
        }
    }
    let split = SPLIT_RINGS.into_iter().map(|size| ("split", size));
    let packed = PACKED_RINGS.into_iter().map(|size| ("packed", size));
    for (index, (kind, size)) in split.chain(packed).enumerate() {
        let name = format!("dts/vm2vm_virtio_user/virtio-user/{kind}-ring-of-{size}");
        add(name, RINGS, Box::new(move |ctx| ring_size(ctx, index, kind, size)));
    }
    for (index, path) in PATHS.into_iter().enumerate() {
        let name = format!("dts/loopback_multi_queues/virtio-user/8-queues-{}", path.name);
        add(name, EIGHT, Box::new(move |ctx| queues(ctx, index, path)));
    }
    for (index, chain) in Chain::all().into_iter().enumerate() {
        let name = format!(
            "dts/loopback_virtio_user_server_mode/virtio-user/payload-8-queues-{}{}-{}",
            if chain.packed { "packed" } else { "split" },
            if chain.in_order { "-in-order" } else { "" },
            if chain.indirect { "indirect" } else { "direct" },
        );
        add(name, CHAINS, Box::new(move |ctx| payload(ctx, index, chain)));
    }
    cases
}

fn bytes(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(ALL, |dir| Peer::paths(ctx, dir))?;
    let Peer { ends, started, .. } = &mut *peer;
    let [a, b] = &mut ends[index];
    let (mask, wanted) = path.features();
    for (port, end) in [(2 * index, &*a), (2 * index + 1, &*b)] {
        end.wait_link()?;
        end.expect_features(mask, wanted)?;
        let said = format!("{} on port {port}\n", path.rx_here());
        ensure!(
            started.contains(&said),
            "testpmd did not say \"{}\", but: {}",
            said.trim(),
            rx_paths(started)
        );
    }
    prove(a, b)?;
    exchange(a, b, &frames(500, 9000), path.window_theirs())?;
    path.passed()
}

fn ring_size(ctx: &Ctx, index: usize, kind: &str, size: u16) -> Result<Outcome> {
    let mut peer = ctx.shared(RINGS, |dir| Peer::rings(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    a.wait_link()?;
    a.expect_features(RING_PACKED, if kind == "packed" { RING_PACKED } else { 0 })?;
    prove(a, b)?;
    exchange(a, b, &small_frames(400), usize::from(size) / 2)?;
    passed()
}

/// Frames on each of eight queues.
fn queues(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(EIGHT, |dir| Peer::eight(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    let (mask, wanted) = path.features();
    a.expect_features(mask, wanted)?;
    let most = if path.mergeable { 9000 } else { 1514 };
    exchange(a, b, &frames(50, most), path.window_theirs())?;
    path.passed()
}

/// Frames of one to five mbufs, received as chains and sent on as such.
fn payload(ctx: &Ctx, index: usize, chain: Chain) -> Result<Outcome> {
    let mut peer = ctx.shared(CHAINS, |dir| Peer::chains(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    let mut wanted = MRG_RXBUF;
    for (bit, on) in [
        (RING_PACKED, chain.packed),
        (IN_ORDER, chain.in_order),
        (RING_INDIRECT_DESC, chain.indirect),
    ] {
        wanted |= if on { bit } else { 0 };
    }
    a.expect_features(MRG_RXBUF | RING_PACKED | IN_ORDER | RING_INDIRECT_DESC, wanted)?;
    let lengths = (0..100).map(|i| [8000, 2000 + i, 4000 + i, 6000 + i, 60 + i][i % 5]);
    exchange(a, b, &pcap::frames(lengths), 64)?;
    passed()
}

/// Our back-ends sleep until virtio_user kicks them, and are left alone while they poll.
fn interrupt(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(ALL, |dir| Peer::paths(ctx, dir))?;
    let [a, b] = &mut peer.ends[index];
    prove(a, b)?;
    wake(a, b, 600)?;
    exchange(a, b, &small_frames(200), path.window_theirs())?;
    expect_silence(a)?;
    expect_silence(b)?;
    path.passed()
}

/// What testpmd said of its paths.
fn rx_paths(log: &str) -> String {
    log.lines()
        .filter(|l| l.contains(" path on port "))
        .collect::<Vec<_>>()
        .join("; ")
}

/// testpmd stops its ports and starts them again, a hundred times, with frames between.
fn restart(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(ALL, |dir| Peer::paths(ctx, dir))?;
    let Peer { ends, testpmd, .. } = &mut *peer;
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
        exchange(a, b, &frames(0, 4096), path.window_theirs()).with_context(|| format!("round {round}"))?;
    }
    path.passed()
}
