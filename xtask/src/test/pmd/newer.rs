//! The plugin built for, and loaded by, releases of DPDK that are newer than this system's.

use anyhow::{Context as _, Result, ensure};

use super::testpmd::frames;
use super::{BOTH, back, vdev};
use crate::peers::newer::{Newer, RELEASES, Unpacked};
use crate::peers::testpmd::{Config, Testpmd};
use crate::plugin;
use crate::test::wire::{End, exchange, prove};
use crate::test::{Case, Ctx, Outcome};

/// Those that are there: a mirror may lack what the plugin is compiled with, which `cargo xtask peers` says.
pub fn cases() -> Vec<Case> {
    let there = RELEASES.iter().filter(|newer| newer.find().is_ok());
    there
        .map(|newer| {
            Case::new(format!("pmd/newer/{}", newer.name()), &super::BUILD, |ctx| {
                run(ctx, newer)
            })
        })
        .collect()
}

fn run(ctx: &Ctx, newer: &Newer) -> Result<Outcome> {
    let Unpacked { dpdk, testpmd, .. } = newer.find()?;
    let file = plugin::build(&ctx.root, &ctx.dir, &dpdk, ctx.verbose)?;
    let mut config = Config::new("pmd", &ctx.dir);
    config.huge_dir = ctx.hugetlbfs("pmd")?;
    config.mbufs = 8192;
    config.plugin = Some(file);
    let mut ends = Vec::new();
    for (index, rings) in BOTH.iter().enumerate() {
        let socket = ctx.dir.join(format!("s{index}"));
        ends.push(back(&socket, "")?);
        config.vdevs.push(vdev(index, &socket, rings.keys));
    }
    let mut running = Testpmd::start(&testpmd, &config)?;
    running.forward("io")?;
    let [a, b] = &mut ends[..] else {
        anyhow::bail!("two ends")
    };
    prove(a, b)?;
    exchange(a, b, &frames(200, 1514), 128)?;
    callbacks(&mut running, a)?;
    // Down and up again, as another configuration.
    running.stop()?;
    for command in ["port stop all", "port config all rxd 128", "port start all"] {
        running.command(command)?;
    }
    running.forward("io")?;
    prove(a, b)?;
    exchange(a, b, &frames(100, 1514), 128)?;
    Ok(Outcome::Passed(format!("DPDK {}", dpdk.version)))
}

/// What differs between releases: statistics, of queues too, and lists of packet types.
fn callbacks(testpmd: &mut Testpmd, end: &End) -> Result<()> {
    let sent = end.port.stats().tx_packets;
    let stats = testpmd.stats(0)?;
    ensure!(
        stats.rx == sent,
        "{sent} frames were sent, testpmd received {}",
        stats.rx
    );
    let more = testpmd.command("show port xstats 0")?;
    let value = |name: &str| -> Option<u64> {
        let rest = more.split(&format!("{name}: ")).nth(1)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    for name in ["rx_good_packets", "rx_q0_packets"] {
        let found = value(name).with_context(|| format!("no {name}: {more}"))?;
        ensure!(found == sent, "{name}: {found} of {sent}");
    }
    ensure!(value("rx_q0_back_end_faults") == Some(0), "{more}");
    testpmd.command("show port 0 ptypes")?;
    for command in [
        "set promisc 0 off",
        "mac_addr add 0 02:bb:00:00:00:01",
        "set promisc 0 on",
    ] {
        testpmd.command(command)?;
    }
    Ok(())
}
