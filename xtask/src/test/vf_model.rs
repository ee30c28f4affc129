//! The model of the virtual function (`vf-model`) in the hands of a driver that nobody here wrote: Linux's own ixgbevf in
//! a guest, to which QEMU attaches two VFs of the model over vfio-user.
//!
//! What the kernel dislikes here is the model's mistake; what the model notices is asserted beside it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vf_model::server::{Machine as Model, stats};
use vf_model::{Kind, Nic, Settings, Speed};

use super::guest::{PROLOGUE, SETUP, intact, pings};
use super::link::path;
use super::{Case, Ctx, Need, Outcome};
use crate::machine::{Config, Initramfs, Vm};

const SHORT: Duration = Duration::from_secs(30);

/// For what the driver does when its watchdog comes round, and for transfers.
const LONG: Duration = Duration::from_secs(120);

pub fn cases() -> Vec<Case> {
    let case = |kind: Kind| {
        Case::new(format!("vf-model/{kind}"), &[Need::Machine], move |ctx| {
            linux(ctx, kind)
        })
    };
    Kind::ALL.into_iter().map(case).collect()
}

/// Until both links are up, or both are down.
fn links(vm: &mut Vm, up: bool) -> Result<()> {
    let script = format!(
        "{PROLOGUE}here() {{ cat /sys/class/net/eth0/carrier; }}
there_too() {{ there sh -c 'ip link show eth1 | grep -q LOWER_UP && echo 1 || echo 0'; }}
until [ $(here)$(there_too) = {0}{0} ]; do sleep 0.05; done",
        u8::from(up)
    );
    let what = if up { "links up" } else { "links down" };
    vm.ok(what, &script, LONG).map(drop)
}

fn device(index: usize, socket: &Path) -> Result<[String; 2]> {
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": path(socket)? },
        "bus": "pcie.0",
        "addr": format!("{:02x}.0", 5 + index),
    });
    Ok(["-device".into(), device.to_string()])
}

fn linux(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let machine = ctx.machine()?;
    let initramfs = ctx.dir.join("initramfs");
    let mut root = Initramfs::new(&machine.guest)?;
    root.modules(&["ixgbevf", "8021q"])?;
    root.tool("ethtool")?;
    root.tool("iperf3")?;
    root.write(&initramfs)?;

    // Nothing may be lost: frames wait for descriptors, although the driver would have them dropped.
    let model = Model::new(Settings {
        kind,
        vfs: 2,
        queues: 4,
        hold: true,
        ..Settings::default()
    })?;
    model.act(|nic| {
        nic.pf().mtu = 9000;
        nic.pf().malicious_detection = true;
    });
    let mut config = Config {
        cpus: 2,
        devices: ["-device", "intel-iommu,intremap=on,caching-mode=on"]
            .map(str::to_owned)
            .to_vec(),
        // An emulated timer behind the IOMMU may come too late for the kernel's taste where others want the cores.
        append: "intel_iommu=on no_timer_check".into(),
        echo: ctx.verbose,
        ..Default::default()
    };
    for vf in 0..2 {
        let socket = ctx.dir.join(format!("vf{vf}"));
        model.serve(vf, &socket)?;
        config.devices.extend(device(vf, &socket)?);
    }
    let mut vm = Vm::boot(machine, &config, &initramfs, &ctx.dir)?;
    let remark = steps(&mut vm, &model, kind).map_err(|e| {
        let stats = model.act(stats);
        e.context(format!("console:\n{}model: {stats:#}\n", vm.console()))
    })?;
    vm.power_off()?;
    Ok(Outcome::Passed(remark))
}

fn steps(vm: &mut Vm, model: &Arc<Model>, kind: Kind) -> Result<String> {
    let script = "ethtool -i eth0 | grep -x 'driver: ixgbevf'; ethtool -i eth1 | grep -x 'driver: ixgbevf'; dmesg";
    let log = vm.ok("driver", script, SHORT)?;
    let name = match kind {
        Kind::I82599 => "82599 Virtual Function",
        Kind::X540 => "X540 Virtual Function",
        Kind::X550 => "X550 Virtual Function",
    };
    ensure!(log.starts_with("driver: ixgbevf\ndriver: ixgbevf\n"), "{log}");
    ensure!(log.contains(name), "the kernel does not speak of an {name}:\n{log}");
    vm.ok("set-up", &format!("{PROLOGUE}{SETUP}"), SHORT)?;
    links(vm, true)?;
    pings(vm)?;
    intact(vm, (8 << 20) + 1)?;
    let speed = streams(vm)?;
    model.act(offloads)?;
    vlan(vm, model)?;
    model.act(flawless)?;

    // The driver's own test of registers and link.
    let test = vm.ok("self-test", "ethtool -t eth0 offline", LONG)?;
    ensure!(test.contains("PASS"), "the driver's self-test fails:\n{test}");
    links(vm, true)?;
    pings(vm).context("after the driver's self-test")?;

    model.act(|nic| nic.set_link(None));
    links(vm, false)?;
    model.act(|nic| nic.set_link(Some(Speed::G1)));
    links(vm, true)?;
    let speeds = vm.ok("speed", "ethtool eth0 | grep Speed", SHORT)?;
    ensure!(
        speeds.contains(" 1000Mb/s"),
        "the link is at 1 Gb/s, ethtool says {speeds}"
    );
    pings(vm).context("after the link was down")?;

    model.act(Nic::begin_reset);
    links(vm, false)?;
    model.act(Nic::end_reset);
    links(vm, true)?;
    pings(vm).context("after a reset of the PF")?;
    let oddities = vm.ok(
        "kernel log",
        "dmesg | grep -E 'BUG:|WARNING:|DMAR:.*fault|Hang|timed out' || true",
        SHORT,
    )?;
    ensure!(oddities.is_empty(), "the guest's kernel complains:\n{oddities}");
    for vf in 0..2 {
        let faults = model.act(|nic| nic.dma(vf).take_faults());
        ensure!(faults.is_empty(), "VF {vf}: {faults:?}");
    }
    Ok(format!(
        "TCP with TSO at {speed:.0} Mb/s, jumbo frames, VLAN, link changes, a reset of the PF"
    ))
}

/// Sixteen TCP streams, which both receive queues get a share of: megabits a second.
fn streams(vm: &mut Vm) -> Result<f64> {
    let script = format!(
        "{PROLOGUE}there iperf3 -s -1 >/dev/null 2>&1 &
for i in $(seq 200); do there netstat -tln | grep -q :5201 && break; sleep 0.05; done
iperf3 -c 10.0.0.2 -n 32M -P 16 -J"
    );
    let output = vm.ok("16 streams", &script, LONG)?;
    let json: serde_json::Value = serde_json::from_str(&output).with_context(|| output.clone())?;
    ensure!(json["error"].is_null(), "iperf3: {}", json["error"]);
    let queues = vm.ok(
        "queues",
        &format!("{PROLOGUE}there ethtool -S eth1 | grep -E 'rx_queue_[0-9]+_packets'"),
        SHORT,
    )?;
    let used = queues.lines().filter(|line| !line.ends_with(": 0")).count();
    ensure!(used == 2, "not both receive queues were used:\n{queues}");
    let speed = &json["end"]["sum_received"]["bits_per_second"];
    Ok(speed.as_f64().context("iperf3 gives no speed")? / 1e6)
}

/// That the driver left to the device what it may.
fn offloads(nic: &mut Nic) -> Result<()> {
    let done = nic.offloads(0);
    ensure!(
        done.segmented > 0 && done.checksums > 0 && done.gathered > 0,
        "the device was not asked for all offloads: {done:?}"
    );
    Ok(())
}

/// Both ends of a VLAN, whose tags the device inserts.
fn vlan(vm: &mut Vm, model: &Arc<Model>) -> Result<()> {
    let script = format!(
        "{PROLOGUE}set -e
vconfig add eth0 5
there vconfig add eth1 5
ip addr add 10.5.0.1/24 dev eth0.5
ip link set eth0.5 up
there ip addr add 10.5.0.2/24 dev eth1.5
there ip link set eth1.5 up
ping -q -c 20 -i 0.02 -W 5 10.5.0.2 | grep ' 0% packet loss'"
    );
    vm.ok("VLAN", &script, SHORT)?;
    for vf in 0..2 {
        let (vlans, tagged) = model.act(|nic| (nic.policy(vf).agreed().vlans, nic.offloads(vf).tagged));
        ensure!(vlans.contains(&5), "VF {vf} has asked for the VLANs {vlans:?}");
        ensure!(tagged >= 20, "VF {vf} let the device insert {tagged} tags");
    }
    Ok(())
}

/// That the driver did nothing that the model holds to be wrong, and that nothing was lost.
fn flawless(nic: &mut Nic) -> Result<()> {
    for vf in 0..2 {
        let complaints = nic.complaints(vf);
        ensure!(complaints.is_empty(), "VF {vf}: {complaints}");
        let drops = nic.drops(vf);
        ensure!(
            drops.no_descriptor + drops.too_long + drops.spoofed + drops.no_crc == 0,
            "VF {vf}: {drops:?}"
        );
        let halts = nic.halts(vf);
        ensure!(halts.is_empty(), "VF {vf}: {halts:?}");
    }
    Ok(())
}
