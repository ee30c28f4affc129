//! Our front-ends on DPDK's vhost PMD.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{DataPath, PATHS, RING_EVENT_IDX, frames, front, small_frames};
use crate::peers::testpmd::{self, Testpmd};
use crate::test::wire::{End, exchange, expect_silence, prove, wake};
use crate::test::{Case, Ctx, Need, Outcome, passed};

/// The group of cases that share a testpmd with one queue a port, and of those with eight.
const ONE: &str = "dpdk-vhost";
const EIGHT: &str = "dpdk-vhost-8";

/// A testpmd with two vhost ports, which it connects.
struct Peer {
    testpmd: Testpmd,
    sockets: [PathBuf; 2],
}

impl Peer {
    fn start(ctx: &Ctx, dir: &Path, queues: u16) -> Result<Self> {
        let sockets = [dir.join("a"), dir.join("b")];
        let mut config = testpmd::Config::new("be", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "be")?;
        // With eight queues the mbufs are small: frames are chains of them.
        config.jumbo = queues == 1;
        for (index, socket) in sockets.iter().enumerate() {
            config
                .vdevs
                .push(format!("net_vhost{index},iface={},queues={queues}", socket.display()));
        }
        config.extra = vec![format!("--rxq={queues}"), format!("--txq={queues}")];
        let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
        let mut testpmd = Testpmd::start(program, &config)?;
        testpmd.forward("io")?;
        Ok(Peer { testpmd, sockets })
    }

    /// Front-ends on its two ports, with frames coming through.
    fn connect(&self, keys: &str) -> Result<[End; 2]> {
        let mut a = End::open(&front(&self.sockets[0], keys))?;
        let mut b = End::open(&front(&self.sockets[1], keys))?;
        prove(&mut a, &mut b)?;
        Ok([a, b])
    }
}

pub fn cases() -> Vec<Case> {
    let needs = [Need::Testpmd];
    let mut cases = Vec::new();
    for path in PATHS {
        cases.push(
            Case::new(
                format!("dts/pvp_multi_paths/dpdk-vhost/{}", path.name),
                &needs,
                move |ctx| bytes(ctx, path),
            )
            .sharing(ONE),
        );
    }
    for path in PATHS {
        cases.push(
            Case::new(
                format!("dts/loopback_multi_paths_port_restart/dpdk-vhost/{}", path.name),
                &needs,
                move |ctx| restart(ctx, path),
            )
            .sharing(ONE),
        );
    }
    for size in [2u16, 4, 8, 32, 512, 4096, 32768] {
        cases.push(ring_size(false, size));
    }
    for size in [2u16, 3, 5, 7, 31, 33, 100, 255, 1000, 4095, 32767, 32768] {
        cases.push(ring_size(true, size));
    }
    for packed in [false, true] {
        for event_idx in [false, true] {
            let name = format!(
                "dts/virtio_event_idx_interrupt/dpdk-vhost/{}-event-idx-{}",
                if packed { "packed" } else { "split" },
                u8::from(event_idx)
            );
            cases.push(Case::new(name, &needs, move |ctx| interrupt(ctx, packed, event_idx)).sharing(ONE));
        }
    }
    for path in PATHS {
        cases.push(
            Case::new(
                format!("dts/loopback_multi_queues/dpdk-vhost/8-queues-{}", path.name),
                &needs,
                move |ctx| queues(ctx, path),
            )
            .sharing(EIGHT),
        );
    }
    cases
}

fn ring_size(packed: bool, size: u16) -> Case {
    let kind = if packed { "packed" } else { "split" };
    Case::new(
        format!("dts/vm2vm_virtio_user/dpdk-vhost/{kind}-ring-of-{size}"),
        &[Need::Testpmd],
        move |ctx| {
            let peer = ctx.shared(ONE, |dir| Peer::start(ctx, dir, 1))?;
            let keys = format!(",packed_vq={},queue_size={size}", u8::from(packed));
            let [mut a, mut b] = peer.connect(&keys)?;
            a.expect_features(super::RING_PACKED, if packed { super::RING_PACKED } else { 0 })?;
            // Around the ring several times, where that is short.
            exchange(&mut a, &mut b, &small_frames(400), usize::from(size) / 2)?;
            passed()
        },
    )
    .sharing(ONE)
}

/// Frames of all lengths, both ways.
fn bytes(ctx: &Ctx, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(ONE, |dir| Peer::start(ctx, dir, 1))?;
    let mark = peer.testpmd.process().mark();
    let [mut a, mut b] = peer.connect(&path.ours())?;
    let (mask, wanted) = path.features();
    let log = peer.testpmd.process().output_since(mark);
    for (end, socket) in [&a, &b].into_iter().zip(&peer.sockets) {
        end.expect_features(mask, wanted)?;
        let said = negotiated(&log, socket)?;
        ensure!(
            said & mask == wanted,
            "testpmd negotiated {said:#x}, of {mask:#x} {wanted:#x} were expected"
        );
    }
    exchange(&mut a, &mut b, &frames(500, 9728), path.window())?;
    passed()
}

/// The features that testpmd says it negotiated at a socket.
fn negotiated(log: &str, socket: &Path) -> Result<u64> {
    let label = format!("({}) negotiated Virtio features: 0x", socket.display());
    let at = log
        .rfind(&label)
        .with_context(|| format!("testpmd did not say \"{label}\""))?
        + label.len();
    let digits = log[at..].split_whitespace().next().unwrap_or_default();
    Ok(u64::from_str_radix(digits, 16)?)
}

/// Ports are opened and closed a hundred times, with frames between.
fn restart(ctx: &Ctx, path: DataPath) -> Result<Outcome> {
    let peer = ctx.shared(ONE, |dir| Peer::start(ctx, dir, 1))?;
    for round in 0..100 {
        let [mut a, mut b] = peer.connect(&path.ours()).with_context(|| format!("round {round}"))?;
        exchange(&mut a, &mut b, &frames(0, 4096), path.window()).with_context(|| format!("round {round}"))?;
    }
    passed()
}

/// Our front-ends sleep until testpmd notifies them, and are left alone while they poll.
fn interrupt(ctx: &Ctx, packed: bool, event_idx: bool) -> Result<Outcome> {
    let peer = ctx.shared(ONE, |dir| Peer::start(ctx, dir, 1))?;
    let keys = format!(",packed_vq={},event_idx={}", u8::from(packed), u8::from(event_idx));
    let [mut a, mut b] = peer.connect(&keys)?;
    let wanted = if event_idx { RING_EVENT_IDX } else { 0 };
    a.expect_features(RING_EVENT_IDX, wanted)?;
    // Further than a ring is long: the indices wrap around.
    wake(&mut a, &mut b, 600)?;
    // testpmd polls, and has said so by now.
    let kicks = a.port.stats().kicks;
    wake(&mut a, &mut b, 100)?;
    exchange(&mut a, &mut b, &small_frames(200), 128)?;
    if !event_idx {
        expect_silence(&a)?;
        expect_silence(&b)?;
    }
    let more = a.port.stats().kicks - kicks;
    ensure!(more == 0, "{more} kicks of one that polls");
    passed()
}

/// Frames on each of eight queues.
fn queues(ctx: &Ctx, path: DataPath) -> Result<Outcome> {
    let peer = ctx.shared(EIGHT, |dir| Peer::start(ctx, dir, 8))?;
    let [mut a, mut b] = peer.connect(&format!("{},queues=8", path.ours()))?;
    let (mask, wanted) = path.features();
    a.expect_features(mask, wanted)?;
    exchange(&mut a, &mut b, &frames(50, 9728), path.window())?;
    for end in [&a, &b] {
        for (index, queue) in end.queues.iter().enumerate() {
            let stats = queue.stats();
            ensure!(stats.rx_packets > 0 && stats.tx_packets > 0, "queue {index}: {stats:?}");
        }
    }
    passed()
}
