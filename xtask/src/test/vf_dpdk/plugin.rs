//! The same with our plugin for DPDK, `vf=ADDRESS`: nothing that the model holds to be wrong is excused, and the PF stops
//! queues that send without a context.

use anyhow::{Context as _, Result, ensure};
use vf_model::Kind;

use super::super::pmd::BUILD;
use super::super::{Case, Ctx, Need, Outcome};
use super::{DPDK, Driver, FEW, FRAMES, Forwarder, checksums, tags};

pub fn cases() -> Vec<Case> {
    let needs = [&BUILD[..], &[Need::Machine, Need::GuestTestpmd]].concat();
    let case = |name: &str, kind: Kind, starts: usize| {
        Case::new(format!("pmd/vf/{name}"), &needs, move |ctx| {
            forwards(ctx, kind, starts).map(Outcome::Passed)
        })
    };
    vec![case("82599", Kind::I82599, 10), case("x550", Kind::X550, 2)]
}

fn forwards(ctx: &Ctx, kind: Kind, starts: usize) -> Result<String> {
    let mut forwarder = Forwarder::start(ctx, kind, true, Driver::Ours)?;
    for frames in ["capture", "plain", "jumbo"] {
        let (done, _) = forwarder.step("macswap", frames, ["eth0"; 2], "")?;
        ensure!(
            (done.checksums, done.tagged, done.segmented) == (0, 0, 0),
            "nobody asked for {done:?}"
        );
        // Long frames are chains of mbufs, both ways.
        ensure!((done.gathered > 0) == (frames == "jumbo"), "{frames}: {done:?}");
    }
    checksums(&mut forwarder)?;
    tags(&mut forwarder)?;
    for start in 0..starts {
        forwarder
            .configure(&[])
            .and_then(|()| forwarder.pmd(&["start"]))
            .and_then(|_| forwarder.wire("plain", "eth0", "eth0", &format!("--count {FEW}")))
            .and_then(|()| forwarder.pmd(&["stop"]))
            .with_context(|| format!("start {start} of the port"))?;
    }
    forwarder.flawless()?;
    reset(&mut forwarder)?;
    forwarder.quit()?;
    Ok(format!(
        "a capture, 60 to 9,014 bytes, checksums, tags, {starts} starts, a reset of the PF: {} frames sent back",
        9 * FRAMES + (starts + 1) * FEW
    ))
}

/// Waits until Linux says that the link of its function is up, or down.
fn peer(forwarder: &mut Forwarder, up: bool) -> Result<()> {
    let carrier = u8::from(up);
    let script = format!(
        "for i in $(seq 400); do [ $(cat /sys/class/net/eth0/carrier) = {carrier} ] && exit 0; usleep 50000; done
exit 1"
    );
    forwarder.stage.script("the peer's link", &script).map(drop)
}

/// The PF is reset under a port that is started: the link goes, comes back, and frames pass.
fn reset(forwarder: &mut Forwarder) -> Result<()> {
    forwarder.pmd(&["set fwd macswap", "start"])?;
    let status = |up: &str| {
        format!(
            "for i in $(seq 100); do pmd 'show port info 0' | grep -q 'Link status: {up}' && exit 0; usleep 50000; done
pmd 'show port info 0'
exit 1"
        )
    };
    forwarder.look(|nic| nic.begin_reset());
    forwarder.stage.script("link down", &status("down"))?;
    // Linux looks every other second, and would send into queues that do not work any more.
    peer(forwarder, false)?;
    forwarder.look(|nic| nic.end_reset());
    forwarder.stage.script("link up", &status("up"))?;
    peer(forwarder, true)?;
    forwarder.pmd(&["stop"])?;
    let before = forwarder.look(|nic| nic.counters(DPDK).packets_tx);
    forwarder.pmd(&["start"])?;
    forwarder.wire("plain", "eth0", "eth0", &format!("--count {FEW}"))?;
    forwarder.pmd(&["stop"])?;
    let sent = forwarder.look(|nic| nic.counters(DPDK).packets_tx).wrapping_sub(before);
    ensure!(sent as usize == FEW, "{sent} frames were sent after the reset");
    // Of what was posted in the moment of the reset nothing is known; no access went astray.
    let faults = forwarder.look(|nic| nic.dma(DPDK).take_faults());
    ensure!(faults.is_empty(), "accesses outside of what is mapped: {faults:?}");
    Ok(())
}
