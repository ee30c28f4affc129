//! The front-end listens, and the back-end connects, goes and comes again: DPDK's back-end to our front-end, and ours
//! to DPDK's.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{DataPath, PATHS, back, frames, front};
use crate::peers::testpmd::{self, Testpmd};
use crate::process::sleep;
use crate::test::wire::{End, exchange, prove};
use crate::test::{Case, Ctx, Need, Outcome, passed};

const FRONT: &str = "server-front";
const BACK: &str = "server-back";

/// For DPDK to look at its sockets again.
const UP: Duration = Duration::from_secs(20);

/// Ports of ours, a pair for each path, and the testpmd on the other side, if it runs.
struct Peer {
    ends: Vec<[Option<End>; 2]>,
    testpmd: Option<Testpmd>,
    config: testpmd::Config,
}

impl Peer {
    /// `ours`: the spec of a port of a path at a socket; `theirs`: the device.
    fn start(
        ctx: &Ctx,
        dir: &Path,
        ours: impl Fn(DataPath, &Path) -> String,
        theirs: impl Fn(DataPath, usize, &Path) -> String,
    ) -> Result<Self> {
        let mut config = testpmd::Config::new("sm", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "sm")?;
        config.jumbo = true;
        config.eal.push("--force-max-simd-bitwidth=512".to_owned());
        // What it says of connections would come between the letters of its answers.
        config.eal.push("--log-level=lib.vhost.config:warning".to_owned());
        config.eal.push("--log-level=pmd.net.virtio.*:critical".to_owned());
        config.extra = ["queue_state", "intr_lsc"]
            .map(|event| format!("--mask-event={event}"))
            .to_vec();
        let mut ends = Vec::new();
        for path in PATHS {
            let mut open = |side| {
                let socket = dir.join(format!("{}{side}", ends.len()));
                let index = config.vdevs.len();
                config.vdevs.push(theirs(path, index, &socket));
                End::open(&ours(path, &socket)).map(Some)
            };
            let both = [open("a")?, open("b")?];
            ends.push(both);
        }
        let mut peer = Peer {
            ends,
            testpmd: None,
            config,
        };
        peer.launch(ctx)?;
        Ok(peer)
    }

    fn launch(&mut self, ctx: &Ctx) -> Result<()> {
        let program = ctx.found.testpmd.as_ref().context("testpmd is gone")?;
        let mut testpmd = Testpmd::start(program, &self.config)?;
        testpmd.forward("io")?;
        self.testpmd = Some(testpmd);
        Ok(())
    }

    /// Frames both ways through a pair.
    fn check(&mut self, index: usize, path: DataPath) -> Result<()> {
        let [Some(a), Some(b)] = &mut self.ends[index] else {
            anyhow::bail!("a port is missing")
        };
        if let Err(error) = prove(a, b) {
            let testpmd = self.testpmd.as_mut().context("no testpmd")?;
            let counted = [2 * index, 2 * index + 1].map(|port| testpmd.command(&format!("show port stats {port}")));
            return Err(error.context(format!("testpmd counted: {counted:?}")));
        }
        let (mask, wanted) = path.features();
        a.expect_features(mask, wanted)?;
        exchange(a, b, &frames(50, 9000), path.window_theirs())
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (index, path) in PATHS.into_iter().enumerate() {
        let name = format!(
            "dts/loopback_virtio_user_server_mode/dpdk-vhost/reconnect-{}",
            path.name
        );
        cases.push(Case::new(name, &[Need::Testpmd], move |ctx| their_back_end(ctx, index, path)).sharing(FRONT));
    }
    for (index, path) in PATHS.into_iter().enumerate() {
        let name = format!(
            "dts/loopback_virtio_user_server_mode/virtio-user/reconnect-{}",
            path.name
        );
        cases.push(Case::new(name, &[Need::Testpmd], move |ctx| our_back_end(ctx, index, path)).sharing(BACK));
    }
    cases
}

/// Our front-ends stay while testpmd is killed and another one connects.
fn their_back_end(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(FRONT, |dir| {
        Peer::start(
            ctx,
            dir,
            |path, socket| front(socket, &format!("{},server=1", path.ours())),
            |_, index, socket| format!("net_vhost{index},iface={},queues=1,client=1", socket.display()),
        )
    })?;
    peer.check(index, path).context("before")?;
    if let Some(mut testpmd) = peer.testpmd.take() {
        testpmd.process().kill();
    }
    peer.launch(ctx)?;
    peer.check(index, path).context("after another testpmd came")?;
    passed()
}

/// testpmd's front-ends stay while our back-ends go and come.
fn our_back_end(ctx: &Ctx, index: usize, path: DataPath) -> Result<Outcome> {
    let mut peer = ctx.shared(BACK, |dir| {
        Peer::start(
            ctx,
            dir,
            |_, socket| back(socket, ",client=1"),
            |path, index, socket| {
                testpmd::virtio_user(index, socket, path.queue_size, &format!("{},server=1", path.theirs()))
            },
        )
    })?;
    for round in 0..3 {
        peer.check(index, path).with_context(|| format!("round {round}"))?;
        let Peer { ends, testpmd, .. } = &mut *peer;
        let testpmd = testpmd.as_mut().context("no testpmd")?;
        let specs = ends[index]
            .each_ref()
            .map(|end| end.as_ref().map(|e| e.port.spec().path.clone()));
        ends[index] = [None, None];
        // It resets packed rings one millisecond after it told its forwarding thread to keep out, whether that has
        // noticed or not: a thread that waits for its CPU does not, and goes on in rings that are not there any more.
        if path.packed {
            testpmd.stop()?;
        }
        for port in [2 * index, 2 * index + 1] {
            link(testpmd, port, "down")?;
        }
        for (end, socket) in ends[index].iter_mut().zip(specs) {
            *end = Some(End::open(&back(&socket.context("no socket")?, ",client=1"))?);
        }
        // Each look at a socket whose other end is gone has it closed a little later, in another thread: two looks may
        // close the next connection, too, and nothing but a further look takes up the one after that.
        for _ in 0..2 {
            for port in [2 * index, 2 * index + 1] {
                link(testpmd, port, "up")?;
            }
            sleep(Duration::from_millis(50))?;
        }
        if path.packed {
            testpmd.forward("io")?;
        }
    }
    peer.check(index, path).context("at the end")?;
    path.passed()
}

/// Asks for a port's link until it is so: without its interrupts, that is when virtio_user looks at its socket.
fn link(testpmd: &mut Testpmd, port: usize, wanted: &str) -> Result<()> {
    let end = Instant::now() + UP;
    loop {
        let said = testpmd.command(&format!("show port info {port}"))?;
        if said.contains(&format!("Link status: {wanted}")) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "port {port}: the link is not {wanted} after {UP:?}"
        );
        sleep(Duration::from_millis(20))?;
    }
}
