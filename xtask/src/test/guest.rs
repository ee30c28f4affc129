//! Linux's own virtio-net in a QEMU guest, on our back-end and switch.
//!
//! One guest has two network devices, each in a network namespace of the guest, and our switch joins them: what the
//! kernel sends on one comes in on the other by way of the switch alone. A boot takes some seconds, so a case is a boot
//! with all that is tried on its rings.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::link::path;
use super::{Case, Ctx, Need, Outcome, Usernic};
use crate::machine::{Config, Initramfs, Vm};
use crate::process::Process;

/// For what takes a moment.
const SHORT: Duration = Duration::from_secs(30);

/// For a transfer, in emulation, on cores that others use.
const LONG: Duration = Duration::from_secs(120);

/// Bits of the device's features (virtio 1.3, 5.1.3 and 6).
const CSUM: usize = 0;
const HOST_TSO4: usize = 11;
const MRG_RXBUF: usize = 15;
const MQ: usize = 22;
const VERSION_1: usize = 32;
const RING_PACKED: usize = 34;

/// What differs from case to case.
#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    packed: bool,
    queues: u16,
    /// The guest may leave checksums and segmentation to the other side.
    offloads: bool,
    /// QEMU listens and the switch connects, rather than the other way round.
    reversed: bool,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        name: "split",
        packed: false,
        queues: 1,
        offloads: true,
        reversed: false,
    },
    Variant {
        name: "packed",
        packed: true,
        queues: 1,
        offloads: true,
        reversed: true,
    },
    Variant {
        name: "split-q2-no-offloads",
        packed: false,
        queues: 2,
        offloads: false,
        reversed: true,
    },
    Variant {
        name: "packed-q2-no-offloads",
        packed: true,
        queues: 2,
        offloads: false,
        reversed: false,
    },
];

pub fn cases() -> Vec<Case> {
    let case = |variant: Variant| {
        let name = format!("guest/{}", variant.name);
        Case::new(name, &[Need::Usernic, Need::Machine], move |ctx| traffic(ctx, variant))
    };
    VARIANTS.into_iter().map(case).collect()
}

/// Our switch with a port for each of the guest's devices.
fn switch(ctx: &Ctx, sockets: &[PathBuf; 2], variant: Variant) -> Result<Process> {
    let client = if variant.reversed { ",client=1" } else { "" };
    let mut args = vec!["-v".to_owned(), "switch".to_owned()];
    for socket in sockets {
        let socket = path(socket)?;
        args.push("--port".into());
        args.push(format!(
            "vhost,path={socket},queues={},mtu=9000{client}",
            variant.queues
        ));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Usernic::spawn(ctx, &args)
}

/// QEMU's arguments for a device on a socket.
fn device(index: usize, socket: &Path, variant: Variant) -> Result<Vec<String>> {
    let (socket, queues) = (path(socket)?, variant.queues);
    let connection = if variant.reversed {
        "server=on,wait=off"
    } else {
        "reconnect-ms=200"
    };
    let mut device = format!("virtio-net-pci,netdev=n{index},mac=02:00:00:00:00:0{}", index + 1);
    if variant.packed {
        device += ",packed=on";
    }
    if queues > 1 {
        // A vector for each ring, for the control queue and for changes of the configuration.
        device += &format!(",mq=on,vectors={}", 2 * queues + 2);
    }
    if !variant.offloads {
        device += ",csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off";
        device += ",guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off";
    }
    let args = [
        "-chardev",
        &format!("socket,id=c{index},path={socket},{connection}"),
        "-netdev",
        &format!("vhost-user,id=n{index},chardev=c{index},vhostforce=on,queues={queues}"),
        "-device",
        &device,
    ];
    Ok(args.map(str::to_owned).to_vec())
}

/// What runs in the second device's namespace: `there COMMAND`.
pub(super) const PROLOGUE: &str = "there() { nsenter -t $(cat /tmp/ns) -n \"$@\"; }\n";

/// The second device in a namespace of its own, addresses, and frames of 9000 bytes.
pub(super) const SETUP: &str = "set -e
unshare -n sleep 100000 </dev/null >/dev/null 2>&1 &
echo $! >/tmp/ns
while [ \"$(readlink /proc/$!/ns/net)\" = \"$(readlink /proc/self/ns/net)\" ]; do sleep 0.01; done
ip link set eth1 netns $!
ip addr add 10.0.0.1/24 dev eth0
ip link set eth0 mtu 9000 up
there ip addr add 10.0.0.2/24 dev eth1
there ip link set eth1 mtu 9000 up
";

/// Echoes of all kinds of sizes, none of which is lost or fragmented.
const PINGS: &str = "set -e
for size in 8 56 1472 1473 2020 4000 8972; do
    ping -q -c 10 -i 0.02 -W 5 -s $size 10.0.0.2 | grep ' 0% packet loss' || { echo size $size; false; }
done
grep -h '^Ip:' /proc/net/snmp
";

fn traffic(ctx: &Ctx, variant: Variant) -> Result<Outcome> {
    let machine = ctx.machine()?;
    let initramfs = ctx.dir.join("initramfs");
    let mut root = Initramfs::new(&machine.guest)?;
    root.modules(&["virtio_pci", "virtio_net"])?;
    root.tool("ethtool")?;
    root.tool("iperf3")?;
    root.write(&initramfs)?;

    let sockets = [ctx.dir.join("a"), ctx.dir.join("b")];
    let mut running = switch(ctx, &sockets, variant)?;
    let mut config = Config {
        cpus: variant.queues.into(),
        echo: ctx.verbose,
        ..Default::default()
    };
    for (index, socket) in sockets.iter().enumerate() {
        config.devices.extend(device(index, socket, variant)?);
    }
    let mut vm = Vm::boot(machine, &config, &initramfs, &ctx.dir)?;
    let result = steps(ctx, &mut vm, &mut running, &sockets, variant);
    let remark = result.map_err(|e| {
        let switch = running.tail();
        e.context(format!("console:\n{}switch{switch}\n", vm.console()))
    })?;
    vm.power_off()?;
    running.signal(Signal::INT)?;
    running.wait_success(SHORT)?;
    Ok(Outcome::Passed(remark))
}

fn steps(ctx: &Ctx, vm: &mut Vm, running: &mut Process, sockets: &[PathBuf; 2], variant: Variant) -> Result<String> {
    features(vm, variant)?;
    vm.ok("set-up", &format!("{PROLOGUE}{SETUP}"), SHORT)?;
    pings(vm)?;
    if variant.queues > 1 {
        let channels = vm.ok("channels", "ethtool -l eth0", SHORT)?;
        let combined = channels.lines().rfind(|l| l.starts_with("Combined:"));
        let wanted = variant.queues.to_string();
        ensure!(
            combined.is_some_and(|l| l.split_whitespace().last() == Some(wanted.as_str())),
            "the guest does not use {wanted} queue pairs:\n{channels}"
        );
    }
    start_tcp(vm, 100, variant)?;
    let speed = finish_tcp(vm, 100)?;
    intact(vm, (16 << 20) + 1)?;
    kept(running)?;

    restart(ctx, vm, running, sockets, variant)?;
    let oddities = vm.ok(
        "kernel log",
        "dmesg | grep -iE 'virtio|eth[01]|BUG|WARNING' || true",
        SHORT,
    )?;
    for word in ["BUG", "WARNING", "not a head", "out of range", "timed out", "bad gso"] {
        ensure!(!oddities.contains(word), "the guest's kernel complains:\n{oddities}");
    }
    let offloaded = if variant.offloads {
        "checksums and TSO"
    } else {
        "no offloads"
    };
    Ok(format!("100 MiB of TCP at {speed:.0} Mb/s, {offloaded}"))
}

/// The switch dies in the middle of a transfer, with buffers of all rings in its hands, and another one goes on.
fn restart(ctx: &Ctx, vm: &mut Vm, running: &mut Process, sockets: &[PathBuf; 2], variant: Variant) -> Result<()> {
    start_tcp(vm, 60, variant)?;
    let progress = "until [ $(cat /sys/class/net/eth0/statistics/tx_bytes) -gt $(($(cat /tmp/tx_bytes) + 10000000)) ]
do sleep 0.01; done; kill -0 $(cat /tmp/client)";
    vm.ok("the beginning of a transfer", progress, SHORT)?;
    running.kill();
    *running = switch(ctx, sockets, variant)?;
    finish_tcp(vm, 60).context("the switch was killed and started again")?;
    pings(vm).context("after the switch was started again")?;
    intact(vm, (1 << 20) + 1).context("after the switch was started again")?;
    kept(running)
}

/// That the features that both devices negotiated are those of the variant; bit by bit.
fn features(vm: &mut Vm, variant: Variant) -> Result<()> {
    let text = vm.ok(
        "features",
        "cat /sys/class/net/eth0/device/features /sys/class/net/eth1/device/features",
        SHORT,
    )?;
    let mut both = text
        .lines()
        .map(|line| line.chars().map(|c| c == '1').collect::<Vec<bool>>());
    let bits = both.next().context("no device eth0")?;
    ensure!(
        both.next().as_ref() == Some(&bits),
        "the devices differ in their features:\n{text}"
    );
    ensure!(bits.len() >= 64, "the features are {text}");
    for (name, bit, wanted) in [
        ("VERSION_1", VERSION_1, true),
        ("MRG_RXBUF", MRG_RXBUF, true),
        ("RING_PACKED", RING_PACKED, variant.packed),
        ("MQ", MQ, variant.queues > 1),
        ("CSUM", CSUM, variant.offloads),
        ("HOST_TSO4", HOST_TSO4, variant.offloads),
    ] {
        ensure!(bits[bit] == wanted, "{name} is {}: {text}", bits[bit]);
    }
    Ok(())
}

/// Echo requests from 8 to 8972 bytes, in frames of up to 9000: none lost, none cut to pieces.
pub(super) fn pings(vm: &mut Vm) -> Result<()> {
    let output = vm.ok("ping", PINGS, LONG)?;
    let mut lines = output.lines().filter(|l| l.starts_with("Ip:"));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let created = names
        .split(' ')
        .zip(values.split(' '))
        .find(|(name, _)| *name == "FragCreates");
    ensure!(
        created.is_some_and(|(_, value)| value == "0"),
        "fragments were sent:\n{output}"
    );
    Ok(())
}

/// That no connection to the guest's devices ended: QEMU would make another, and hide what went wrong.
fn kept(switch: &Process) -> Result<()> {
    ensure!(
        !switch.output().contains("front-end gone"),
        "a connection was lost{}",
        switch.tail()
    );
    Ok(())
}

/// Starts a TCP transfer from the first device to the second.
fn start_tcp(vm: &mut Vm, mebibytes: u32, variant: Variant) -> Result<()> {
    let streams = variant.queues * 2 - 1;
    let script = format!(
        "{PROLOGUE}there iperf3 -s -1 >/dev/null 2>&1 &
for i in $(seq 200); do there netstat -tln | grep -q :5201 && break; sleep 0.05; done
cat /sys/class/net/eth0/statistics/tx_bytes >/tmp/tx_bytes
iperf3 -c 10.0.0.2 -n {mebibytes}M -P {streams} -J >/tmp/client.json 2>&1 &
echo $! >/tmp/client"
    );
    vm.ok("start of a transfer", &script, SHORT).map(drop)
}

/// Waits for the transfer's end; megabits a second.
fn finish_tcp(vm: &mut Vm, mebibytes: u32) -> Result<f64> {
    let script = "while kill -0 $(cat /tmp/client); do sleep 0.05; done 2>/dev/null; cat /tmp/client.json";
    let output = vm.ok("end of a transfer", script, LONG)?;
    let json: serde_json::Value = serde_json::from_str(&output).with_context(|| output.clone())?;
    ensure!(json["error"].is_null(), "iperf3: {}", json["error"]);
    let (sent, received) = (&json["end"]["sum_sent"]["bytes"], &json["end"]["sum_received"]["bytes"]);
    let wanted = u64::from(mebibytes) << 20;
    // The receiver counts what it has read when the sender says that it is done: all but what the sockets hold.
    ensure!(
        sent.as_u64() >= Some(wanted) && received.as_u64() >= Some(wanted / 2),
        "{sent} bytes sent, {received} received"
    );
    let speed = &json["end"]["sum_received"]["bits_per_second"];
    Ok(speed.as_f64().context("iperf3 gives no speed")? / 1e6)
}

/// A file that arrives as it was, from the second device to the first. The receiver's own input stays open: at its end
/// busybox's nc would close the connection.
pub(super) fn intact(vm: &mut Vm, bytes: u32) -> Result<()> {
    let script = format!(
        "{PROLOGUE}head -c {bytes} /dev/urandom >/tmp/file
[ -e /tmp/silent ] || mkfifo /tmp/silent
exec 4<>/tmp/silent
nc -l -p 7000 <&4 >/tmp/copy &
for i in $(seq 100); do netstat -tln | grep -q :7000 && break; sleep 0.05; done
there nc -w 20 10.0.0.1 7000 </tmp/file
wait
cmp /tmp/file /tmp/copy && rm /tmp/file /tmp/copy"
    );
    vm.ok("a file over TCP, compared", &script, LONG).map(drop)
}
