//! The model of the virtual function (`vf-model`) in the hands of a driver that nobody here wrote: Linux's own ixgbevf in
//! a guest, to which QEMU attaches two VFs of the model over vfio-user.
//!
//! What the kernel dislikes here is the model's mistake; what the model notices is asserted beside it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use vf_model::message::{Api, Xcast};
use vf_model::server::{Machine as Model, stats};
use vf_model::{Kind, Mac, Nic, Settings, Speed};

use super::guest::{PROLOGUE, SETUP, intact, pings};
use super::hwtest::stage::programs;
use super::link::path;
use super::{Case, Ctx, Need, Outcome};
use crate::machine::{Config, Initramfs, Vm};
use crate::process;

/// The program that sends and hears frames in the guest.
const WIRE: &str = "hwtest-wire";

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
    for program in programs(ctx)?.iter().filter(|program| program.ends_with(WIRE)) {
        root.program(WIRE, program)?;
    }
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
    thousand(vm)?;
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

    groups(vm, model)?;
    // The PF of an X540 answers as that of an X550, and each mode costs a reset.
    let modes = if kind == Kind::X540 {
        ""
    } else {
        modes(vm, model, kind)?;
        "receive modes, "
    };
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
        "TCP with TSO at {speed:.0} Mb/s, 1000 of 1000 pings, jumbo frames, VLAN, groups, {modes}link changes, \
         a reset of the PF"
    ))
}

/// A thousand echoes, 2 ms apart, all of which the kernel has an answer to. (busybox's ping does not read all of them: it
/// has its socket hold few.)
fn thousand(vm: &mut Vm) -> Result<()> {
    let script = "count() { awk '/^Icmp:/ { if (n) { for (i in name) if (name[i] == \"InEchoReps\") print $i } \
else n = split($0, name, \" \") }' /proc/net/snmp; }
before=$(count)
ping -q -c 1000 -i 0.002 -W 5 10.0.0.2
for i in $(seq 60); do
    came=$(($(count) - before))
    [ $came = 1000 ] && exit
    sleep 0.05
done
echo $came of 1000 answers came
exit 1";
    vm.ok("1000 pings", script, LONG).map(drop)
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

/// A group, another one, and an address that is nobody's.
const GROUP: Mac = [1, 0, 0x5e, 1, 2, 3];
const OTHER: Mac = [1, 0, 0x5e, 1, 0x42, 0x53];
const STRANGER: Mac = [2, 0, 0, 0, 0, 0x77];

/// Bits 47 to 36 of the address, which the PF has its VFs take (MCSTCTRL.MO 0; datasheet 8.2.3.7.7).
const HASH_OF_GROUP: u16 = 0x030;

/// Frames of a look at what is heard.
const FRAMES: usize = 20;

/// The second function listens for frames to an address, perhaps in a group.
fn listen(vm: &mut Vm, model: &Model, to: Mac, join: Option<Mac>) -> Result<()> {
    let from = text(model.act(|nic| nic.policy(0).mac));
    let join = join.map_or_else(String::new, |group| format!("--join {}", text(group)));
    let to = text(to);
    let script = format!(
        "{PROLOGUE}rm -f /tmp/sent
there {WIRE} hear --by eth1 --from {from} --to {to} {join} --until /tmp/sent >/tmp/heard 2>&1 &
echo $! >/tmp/hear
for i in $(seq 100); do grep -q listening /tmp/heard && exit; sleep 0.05; done
cat /tmp/heard
exit 1"
    );
    vm.ok("listen", &script, SHORT).map(drop)
}

/// How many frames of those that the first function sends to an address are heard.
fn heard(vm: &mut Vm, to: Mac) -> Result<usize> {
    let to = text(to);
    let script = format!(
        "set -e
{WIRE} send --out eth0 --to {to} --count {FRAMES} >/dev/null
touch /tmp/sent
while kill -0 $(cat /tmp/hear) 2>/dev/null; do sleep 0.02; done
cat /tmp/heard"
    );
    let said = vm.ok("hear", &script, SHORT)?;
    let count = said.lines().find_map(|line| line.strip_prefix("heard ")?.parse().ok());
    count.with_context(|| said.clone())
}

/// What comes of frames to an address.
fn expect(vm: &mut Vm, model: &Model, to: Mac, all: bool, what: &str) -> Result<()> {
    listen(vm, model, to, None)?;
    let count = heard(vm, to)?;
    ensure!(
        count == if all { FRAMES } else { 0 },
        "{what}: {count} of {FRAMES} frames to {} were heard",
        text(to)
    );
    Ok(())
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A group that is joined: its hash is in the PF's filter, its frames come, and those of another group do not.
fn groups(vm: &mut Vm, model: &Model) -> Result<()> {
    let in_filter = || model.act(|nic| nic.policy(1).agreed().hashes.contains(&HASH_OF_GROUP));
    expect(vm, model, GROUP, false, "without the group")?;
    ensure!(!in_filter(), "the filter has a group that nobody has joined");
    listen(vm, model, GROUP, Some(GROUP))?;
    ensure!(in_filter(), "the filter has not the group");
    let before = model.act(|nic| nic.counters(1).multicast_rx);
    let count = heard(vm, GROUP)?;
    ensure!(count == FRAMES, "{count} of {FRAMES} frames to the group were heard");
    let counted = model.act(|nic| nic.counters(1).multicast_rx) - before;
    ensure!(counted >= FRAMES as u32, "the device counted {counted}");
    listen(vm, model, OTHER, Some(GROUP))?;
    let count = heard(vm, OTHER)?;
    ensure!(count == 0, "{count} frames to another group were heard");
    ensure!(!in_filter(), "the group is left, and the filter has it still");
    Ok(())
}

/// All-multicast and promiscuous modes, where mailbox, trust and chip allow them, and what becomes of them elsewhere: a
/// PF gives to an untrusted VF less than it asks for, and says so; the rest it refuses.
fn modes(vm: &mut Vm, model: &Model, kind: Kind) -> Result<()> {
    let may_be_promiscuous = kind != Kind::I82599;
    let every = [
        (Api::V13, false, true),
        (Api::V11, true, true),
        (Api::V12, true, true),
        (Api::V13, true, false),
        (Api::V13, true, true),
    ];
    // What is refused by mailbox and trust is so on every chip: where the chip refuses, too, it does so last.
    let cases = if may_be_promiscuous { &every[..] } else { &every[4..] };
    for &(api, trusted, pf_promiscuous) in cases {
        model.act(|nic| {
            nic.pf().newest_api = api;
            nic.pf().promiscuous = pf_promiscuous;
            nic.set_trusted(1, trusted);
        });
        known_again(vm, model, api)?;
        let what = format!("{api:?}, trusted: {trusted}, promiscuous PF: {pf_promiscuous}");
        let all = trusted && api >= Api::V12;
        let any = all && api >= Api::V13 && pf_promiscuous && may_be_promiscuous;
        // Refused: as it was.
        let all_multi = if all { Xcast::AllMulti } else { Xcast::Multi };
        let promiscuous = if any { Xcast::Promiscuous } else { Xcast::Multi };
        // (busybox's ip does not know allmulticast.)
        for (flag, wanted, to, come) in [
            ("ifconfig eth1 allmulti", all_multi, OTHER, all),
            ("ifconfig eth1 -allmulti", Xcast::Multi, OTHER, false),
            ("ip link set eth1 promisc on", promiscuous, STRANGER, any),
            ("ip link set eth1 promisc off", Xcast::Multi, STRANGER, false),
        ] {
            vm.ok(flag, &format!("{PROLOGUE}there {flag}"), SHORT)?;
            let mode = model.act(|nic| nic.policy(1).agreed().xcast);
            ensure!(mode == wanted, "{what}: {flag}: the mode is {mode:?}, not {wanted:?}");
            expect(vm, model, to, come, &format!("{what}, {flag}"))?;
        }
    }
    pings(vm).context("after the changes of mode")
}

/// Waits until the driver of the second function has been through the reset that it was told of.
fn known_again(vm: &mut Vm, model: &Model, api: Api) -> Result<()> {
    let end = Instant::now() + LONG;
    while model.act(|nic| {
        let agreed = nic.policy(1).agreed();
        !agreed.clear_to_send || agreed.api != api || agreed.max_frame == 0
    }) {
        ensure!(Instant::now() < end, "the driver does not reset its function");
        process::sleep(Duration::from_millis(20))?;
    }
    links(vm, true)
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
