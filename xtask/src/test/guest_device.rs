//! Linux's own virtio-net on all of our back-end's network device: configuration space and control queue.
//!
//! QEMU's `vhost-user` netdev answers the control queue itself. Its generic vhost-user device knows nothing of networks:
//! every feature, every byte of the configuration space and every ring is our back-end's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use usernic::switch::{Role, Switch, SwitchConfig};
use usernic::{Port, Stats};

use super::guest::{PROLOGUE, SETUP, intact, pings};
use super::link::path;
use super::{Case, Ctx, Need, Outcome};
use crate::machine::{Config, Initramfs, Vm};
use crate::process;

/// For what takes a moment.
const SHORT: Duration = Duration::from_secs(30);

/// Queue pairs of each device.
const PAIRS: u16 = 2;

/// Features that the guest is to have negotiated (virtio 1.3, 5.1.3).
const FEATURES: [(&str, usize); 14] = [
    ("MTU", 3),
    ("MAC", 5),
    ("MRG_RXBUF", 15),
    ("STATUS", 16),
    ("CTRL_VQ", 17),
    ("CTRL_RX", 18),
    ("CTRL_VLAN", 19),
    ("GUEST_ANNOUNCE", 21),
    ("MQ", 22),
    ("CTRL_MAC_ADDR", 23),
    ("VERSION_1", 32),
    ("HASH_REPORT", 57),
    ("RSS", 60),
    ("SPEED_DUPLEX", 63),
];

const RING_PACKED: usize = 34;

pub fn cases() -> Vec<Case> {
    let case = |(name, packed): (&str, bool)| {
        let name = format!("guest/device-{name}");
        Case::new(name, &[Need::Machine], move |ctx| device(ctx, packed))
    };
    [("split", false), ("packed", true)].into_iter().map(case).collect()
}

/// What is asked of the switch's thread.
type Wish = Box<dyn FnOnce(&Switch) + Send>;

/// A switch on a thread of this process, so that its ports are at hand.
struct Bridge {
    wishes: Sender<Wish>,
    pause: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    fn start(sockets: &[PathBuf; 2], packed: bool) -> Result<Self> {
        let mut config = SwitchConfig::default();
        for (index, socket) in sockets.iter().enumerate() {
            let spec = format!(
                "vhost,path={},packed_vq={},queues={PAIRS},mtu=9000,speed=10000,rss=1,mac=02:00:00:00:00:0{}",
                path(socket)?,
                u8::from(packed),
                index + 1
            );
            config.ports.push((index.to_string(), spec.parse()?, Role::Learn));
        }
        let mut switch = Switch::new(config)?;
        let (wishes, receiver) = channel::<Wish>();
        let (pause, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let flags = (Arc::clone(&pause), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("bridge".into()).spawn(move || {
            let (pause, stop) = flags;
            while !stop.load(Ordering::Acquire) && switch.run(&pause).is_ok() {
                pause.store(false, Ordering::Release);
                for wish in receiver.try_iter() {
                    wish(&switch);
                }
            }
        })?;
        Ok(Bridge {
            wishes,
            pause,
            stop,
            thread: Some(thread),
        })
    }

    /// What `f` says of a port.
    fn port<T: Send + 'static>(&self, index: usize, f: impl FnOnce(&Port) -> T + Send + 'static) -> Result<T> {
        let (sender, receiver) = channel();
        let wish = move |switch: &Switch| {
            if let Some((_, port)) = switch.ports().nth(index) {
                let _ = sender.send(f(port));
            }
        };
        self.wishes.send(Box::new(wish)).ok().context("the switch has ended")?;
        self.pause.store(true, Ordering::Release);
        receiver.recv_timeout(SHORT).context("the switch does not answer")
    }

    fn stats(&self, index: usize) -> Result<Stats> {
        self.port(index, Port::stats)
    }

    /// Frames sent to the guest's first device, by queue.
    fn sent(&self) -> Result<[u64; PAIRS as usize]> {
        self.port(0, |port| {
            [0, 1].map(|queue| port.queue_stats(queue).map_or(0, |stats| stats.tx_packets))
        })
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.pause.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// QEMU's arguments for a device on a socket: every ring is passed through, the control queue behind the pairs.
fn arguments(index: usize, socket: &Path) -> Result<Vec<String>> {
    let socket = path(socket)?;
    let device = format!(
        "vhost-user-test-device-pci,chardev=c{index},virtio-id=1,num_vqs={},vq_size=256,config_size=24",
        2 * PAIRS + 1
    );
    let chardev = format!("socket,id=c{index},path={socket}");
    Ok(["-chardev", &chardev, "-device", &device].map(str::to_owned).to_vec())
}

fn device(ctx: &Ctx, packed: bool) -> Result<Outcome> {
    let machine = ctx.machine()?;
    let initramfs = ctx.dir.join("initramfs");
    let mut root = Initramfs::new(&machine.guest)?;
    root.modules(&["virtio_pci", "virtio_net", "8021q"])?;
    root.tool("ethtool")?;
    root.tool("iperf3")?;
    root.write(&initramfs)?;

    let sockets = [ctx.dir.join("a"), ctx.dir.join("b")];
    let bridge = Bridge::start(&sockets, packed)?;
    let mut config = Config {
        cpus: PAIRS.into(),
        echo: ctx.verbose,
        ..Default::default()
    };
    for (index, socket) in sockets.iter().enumerate() {
        config.devices.extend(arguments(index, socket)?);
    }
    let mut vm = Vm::boot(machine, &config, &initramfs, &ctx.dir)?;
    let result = steps(&mut vm, &bridge, packed);
    result.map_err(|e| e.context(format!("console:\n{}", vm.console())))?;
    vm.power_off()?;
    Ok(Outcome::Passed(
        "MQ, RSS, hash reports, filters, link, announcement".into(),
    ))
}

fn steps(vm: &mut Vm, bridge: &Bridge, packed: bool) -> Result<()> {
    features(vm, packed)?;
    vm.ok("set-up", &format!("{PROLOGUE}{SETUP}"), SHORT)?;
    pings(vm)?;
    shown(vm)?;
    channels(vm, bridge)?;
    scaling(vm, bridge)?;
    modes(vm, bridge)?;
    vlans(vm, bridge)?;
    address(vm)?;
    link(vm, bridge)?;
    announcement(bridge)?;
    pings(vm)?;
    intact(vm, (4 << 20) + 1)?;
    for index in [0, 1] {
        let stats = bridge.stats(index)?;
        ensure!(
            stats.anomalies == 0 && stats.rx_errors == 0,
            "the guest broke the protocol: {stats:?}"
        );
    }
    let oddities = vm.ok(
        "kernel log",
        "dmesg | grep -iE 'virtio|eth[01]|BUG|WARN' || true",
        SHORT,
    )?;
    for word in ["BUG", "WARNING", "not a head", "timed out", "bad gso", "Failed", "fail"] {
        ensure!(!oddities.contains(word), "the guest's kernel complains:\n{oddities}");
    }
    Ok(())
}

fn features(vm: &mut Vm, packed: bool) -> Result<()> {
    let text = vm.ok("features", "cat /sys/class/net/eth0/device/features", SHORT)?;
    let has = |bit: usize| text.as_bytes().get(bit) == Some(&b'1');
    for (name, bit) in FEATURES {
        ensure!(has(bit), "{name} was not negotiated: {text}");
    }
    ensure!(has(RING_PACKED) == packed, "RING_PACKED: {text}");
    Ok(())
}

/// What the configuration space says.
fn shown(vm: &mut Vm) -> Result<()> {
    let script = "cat /sys/class/net/eth0/address; ethtool eth0 | grep -E 'Speed|Duplex'
ip link set eth0 mtu 9001 2>&1 && echo too large; ip link set eth0 mtu 1500 && ip link set eth0 mtu 9000 && echo set";
    let output = vm.ok("what is shown", script, SHORT)?;
    for word in ["02:00:00:00:00:01", "10000Mb/s", "Full", "set"] {
        ensure!(output.contains(word), "{word} is missing:\n{output}");
    }
    ensure!(!output.contains("too large"), "an MTU of 9001 was accepted:\n{output}");
    Ok(())
}

/// Waits until a port says something.
fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + SHORT;
    while !holds()? {
        ensure!(Instant::now() < end, "{what}: not within {SHORT:?}");
        process::sleep(Duration::from_millis(10))?;
    }
    Ok(())
}

/// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
fn channels(vm: &mut Vm, bridge: &Bridge) -> Result<()> {
    for count in [1, 2] {
        let script = format!("ethtool -L eth0 combined {count} && ethtool -l eth0");
        let output = vm.ok("channels", &script, SHORT)?;
        let numbers: Vec<&str> = output
            .lines()
            .filter_map(|line| line.strip_prefix("Combined:"))
            .map(str::trim)
            .collect();
        ensure!(numbers == ["2", &count.to_string()], "of 2 pairs {count}: {output}");
        until("the number of queue pairs", || {
            Ok(bridge.port(0, |port| port.link().queues)? == count)
        })?;
        pings(vm)?;
    }
    Ok(())
}

/// Streams of TCP to the first device; the frames that each of its queues got.
fn streams(vm: &mut Vm, bridge: &Bridge) -> Result<[u64; 2]> {
    let script = format!(
        "{PROLOGUE}iperf3 -s -1 -D >/dev/null 2>&1
for i in $(seq 100); do netstat -tln | grep -q :5201 && break; sleep 0.05; done
there iperf3 -c 10.0.0.1 -n 8M -P 16 >/dev/null"
    );
    let before = bridge.sent()?;
    vm.ok("sixteen streams", &script, SHORT * 2)?;
    let after = bridge.sent()?;
    Ok([after[0] - before[0], after[1] - before[1]])
}

/// VIRTIO_NET_CTRL_MQ_RSS_CONFIG: key and table as they were set, frames where they say.
fn scaling(vm: &mut Vm, bridge: &Bridge) -> Result<()> {
    // The number of queue pairs was set last, and ended what the driver had set up at first.
    vm.ok("table", "ethtool -X eth0 equal 2", SHORT)?;
    let spread = streams(vm, bridge)?;
    ensure!(
        spread[0] > 50 && spread[1] > 50,
        "sixteen streams on two queues: {spread:?}"
    );
    for queue in [0, 1] {
        let weights = ["1 0", "0 1"][queue];
        let script = format!("ethtool -X eth0 weight {weights} && ethtool -x eth0");
        let output = vm.ok("table", &script, SHORT)?;
        let entries: Vec<&str> = output
            .lines()
            .filter_map(|line| line.trim_start().split_once(':'))
            .filter(|(at, _)| at.trim().parse::<u32>().is_ok_and(|at| at % 8 == 0))
            .flat_map(|(_, entries)| entries.split_whitespace())
            .collect();
        ensure!(
            entries.len() == 128 && entries.iter().all(|entry| *entry == queue.to_string()),
            "the table is not {queue}:\n{output}"
        );
        let spread = streams(vm, bridge)?;
        let (all, others) = (spread[queue], spread[1 - queue]);
        // What has no hash, as ARP, goes to queue 0.
        ensure!(all > 100 && others < 20, "a table of {queue}: {spread:?}");
    }
    // A key of zeroes gives the hash 0, the table's first entry.
    let zeroes = ["00"; 40].join(":");
    let script = format!("ethtool -X eth0 equal 2 hkey {zeroes} && ethtool -x eth0");
    let output = vm.ok("key", &script, SHORT)?;
    ensure!(output.contains(&zeroes), "the key is not zeroes:\n{output}");
    let spread = streams(vm, bridge)?;
    ensure!(spread[0] > 100 && spread[1] == 0, "a key of zeroes: {spread:?}");
    let key: Vec<String> = usernic::offload::hash::KEY.iter().map(|b| format!("{b:02x}")).collect();
    let key = key.join(":");
    let output = vm.ok("key", &format!("ethtool -X eth0 hkey {key} && ethtool -x eth0"), SHORT)?;
    ensure!(output.contains(&key), "the key is not {key}:\n{output}");
    let spread = streams(vm, bridge)?;
    ensure!(spread[0] > 50 && spread[1] > 50, "the usual key: {spread:?}");
    Ok(())
}

/// Pings into the void from the second device, with options for the first: whether the first one sees the frames.
fn void(vm: &mut Vm, bridge: &Bridge, address: &str, options: &str) -> Result<bool> {
    let rx = "cat /sys/class/net/eth0/statistics/rx_packets";
    let script = format!(
        "{PROLOGUE}ifconfig eth0 {options}
there arp -s 10.0.0.77 {address}
before=$({rx}); there ping -q -c 5 -i 0.02 -W 1 10.0.0.77 >/dev/null
there arp -d 10.0.0.77
echo $(($({rx}) - before))"
    );
    let filtered = bridge.stats(0)?.tx_filtered;
    let output = vm.ok(options, &script, SHORT)?;
    let count: u64 = output.trim().parse().with_context(|| output.clone())?;
    let filtered = bridge.stats(0)?.tx_filtered - filtered;
    ensure!(
        (count >= 5) != (filtered >= 5),
        "{options}: of five frames for {address} {count} came and {filtered} were filtered"
    );
    Ok(count >= 5)
}

/// VIRTIO_NET_CTRL_RX: frames for stations and groups that the guest did not ask for.
fn modes(vm: &mut Vm, bridge: &Bridge) -> Result<()> {
    let (station, group) = ("02:00:00:00:00:77", "01:00:5e:01:02:03");
    for (address, options, expected) in [
        (station, "-promisc", false),
        (station, "promisc", true),
        (group, "-promisc", false),
        (group, "allmulti", true),
        (group, "-allmulti", false),
    ] {
        let seen = void(vm, bridge, address, options)?;
        ensure!(seen == expected, "{options}: frames for {address} came: {seen}");
    }
    Ok(())
}

/// VIRTIO_NET_CTRL_VLAN: VLANs that the guest listed, and no other.
fn vlans(vm: &mut Vm, bridge: &Bridge) -> Result<()> {
    let script = format!(
        "{PROLOGUE}set -e
ip link add link eth0 name v5 type vlan id 5
ip addr add 10.0.5.1/24 dev v5
ip link set v5 up
for id in 5 6; do
    there ip link add link eth1 name v$id type vlan id $id
    there ip addr add 10.0.$id.2/24 dev v$id
    there ip link set v$id up
done
there ping -q -c 5 -i 0.02 -W 5 10.0.5.1 | grep ' 0% packet loss'"
    );
    vm.ok("a VLAN", &script, SHORT)?;
    let before = bridge.stats(0)?.tx_filtered;
    vm.ok(
        "another VLAN",
        &format!("{PROLOGUE}! there ping -q -c 3 -i 0.2 -W 1 10.0.6.1"),
        SHORT,
    )?;
    let after = bridge.stats(0)?.tx_filtered;
    ensure!(after > before, "frames of a VLAN that was not listed were sent");
    vm.ok(
        "no VLAN",
        &format!("{PROLOGUE}ip link del v5; there ip link del v5; there ip link del v6"),
        SHORT,
    )
    .map(drop)
}

/// VIRTIO_NET_CTRL_MAC_ADDR_SET: the filter lets the new address in, and the configuration space shows it.
fn address(vm: &mut Vm) -> Result<()> {
    let script = "ip link set eth0 address 02:00:00:00:00:aa && cat /sys/class/net/eth0/address";
    let output = vm.ok("another address", script, SHORT)?;
    ensure!(output.contains("02:00:00:00:00:aa"), "the address is {output}");
    pings(vm)
}

/// VIRTIO_NET_F_STATUS, by a change of the configuration space.
fn link(vm: &mut Vm, bridge: &Bridge) -> Result<()> {
    for (up, carrier) in [(false, 0), (true, 1)] {
        bridge.port(0, move |port| port.set_link_up(up))??;
        let script = format!(
            "for i in $(seq 200); do [ $(cat /sys/class/net/eth0/carrier) = {carrier} ] && exit 0; sleep 0.05; done; exit 1"
        );
        vm.ok(if up { "link up" } else { "link down" }, &script, SHORT)?;
        ensure!(
            bridge.port(0, |port| port.link().up)? == up,
            "the port's link is not {up}"
        );
    }
    pings(vm)
}

/// VIRTIO_NET_S_ANNOUNCE: gratuitous packets come; and again, since the guest acknowledged.
fn announcement(bridge: &Bridge) -> Result<()> {
    for round in 0..2 {
        let before = bridge.stats(0)?.rx_packets;
        bridge.port(0, Port::announce)??;
        until("gratuitous packets", || Ok(bridge.stats(0)?.rx_packets > before))
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}
