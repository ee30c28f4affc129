//! testpmd in a guest has one function of the model (`vf-model`) through vfio-pci, and sends back what comes from the other
//! one, which Linux's ixgbevf has: by DPDK's own net_ixgbe, which shows that the model is true, and by our plugin
//! ([`plugin`]).
//!
//! What testpmd dislikes here is the model's mistake; what the model notices is asserted beside it. No frame may be lost, and
//! the model does nothing for that which hardware would not do (`hold` is off): the frames under way fit the rings.

mod plugin;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use vf_model::complaint::Complaint;
use vf_model::stats::{Counters, Offloads};
use vf_model::{Halt, Kind, Nic};

use super::hwtest::stage::{Stage, Wiring};
use super::{Case, Ctx, Need, Outcome};
use crate::machine::Initramfs;
use crate::peers::Program;

/// The functions: Linux's, and DPDK's.
const LINUX: usize = 0;
const DPDK: usize = 1;

/// Frames of a step.
const FRAMES: usize = 960;

/// Of each start.
const FEW: usize = 32;

/// DPDK's first release that sends every packet of a virtual function with a context (commit 85b7d47d56).
const WITH_CONTEXTS: (u32, u32) = (25, 7);

pub fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn(&Ctx) -> Result<String>| {
        let needs = [Need::Machine, Need::GuestTestpmd];
        Case::new(format!("vf-model/dpdk/{name}"), &needs, move |ctx| {
            run(ctx).map(Outcome::Passed)
        })
    };
    let mut cases = vec![
        case("82599", |ctx| forwards(ctx, Kind::I82599, 12)),
        case("x550", |ctx| forwards(ctx, Kind::X550, 2)),
        case("x550-malicious-driver-detection", detected),
    ];
    cases.extend(plugin::cases());
    cases
}

/// Whose driver testpmd has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Driver {
    Ixgbe,
    Ours,
}

impl Driver {
    /// How the device is named, and what else testpmd is told. It waits nine seconds for links when it stops a port, which are
    /// up then with net_ixgbe.
    fn arguments(self, kind: Kind) -> [&'static str; 2] {
        match (self, kind) {
            (Driver::Ixgbe, _) => ["-a $VF", ""],
            (Driver::Ours, Kind::X550) => [
                "--no-pci --vdev=net_usernic0,vf=$VF,queues=2",
                "--disable-link-check --rxq=2 --txq=2 --max-pkt-len=9018 --enable-scatter --tx-offloads=0x8000",
            ],
            (Driver::Ours, _) => [
                "--no-pci --vdev=net_usernic0,vf=$VF",
                "--disable-link-check --max-pkt-len=9018 --enable-scatter --tx-offloads=0x8000",
            ],
        }
    }

    /// As testpmd shows it.
    fn name(self) -> &'static str {
        match self {
            Driver::Ixgbe => "net_ixgbe_vf",
            Driver::Ours => "net_usernic",
        }
    }
}

/// What testpmd loads by name beside what it is linked with, in the version that it is linked with: none if it is linked
/// statically.
fn drivers(linked: &[String], driver: Driver) -> Vec<String> {
    let version = linked.iter().find_map(|name| name.strip_prefix("librte_mempool.so"));
    let drivers: &[&str] = match driver {
        Driver::Ixgbe => &["librte_mempool_ring.so", "librte_net_ixgbe.so", "librte_bus_pci.so"],
        Driver::Ours => &["librte_mempool_ring.so", "librte_bus_vdev.so"],
    };
    version
        .map(|version| drivers.iter().map(|name| format!("{name}{version}")).collect())
        .unwrap_or_default()
}

/// What is lacking to put testpmd into a guest.
pub fn lacking(program: Option<&Program>) -> Option<String> {
    let Some(program) = program else {
        return Some("dpdk-testpmd is missing: cargo xtask peers".into());
    };
    let linked = match program.linked(&[]) {
        Ok(linked) => names(&linked),
        Err(error) => return Some(format!("{error:#}")),
    };
    let wanted = drivers(&linked, Driver::Ixgbe);
    let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
    let there = names(&program.linked(&wanted).ok()?);
    let missing = wanted.into_iter().find(|name| !there.iter().any(|n| n == name));
    missing
        .map(|name| format!("{name} of DPDK is missing: cargo xtask peers"))
        .or_else(|| line_buffering().err().map(|error| format!("{error:#}")))
}

fn names(libraries: &[PathBuf]) -> Vec<String> {
    let name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    libraries.iter().filter_map(name).collect()
}

/// What stdbuf(1) has a program load: without it testpmd's answers stay in its buffer.
fn line_buffering() -> Result<PathBuf> {
    let places = [
        "/usr/libexec/coreutils",
        "/usr/lib/x86_64-linux-gnu/coreutils",
        "/usr/lib/coreutils",
    ];
    let mut places = places.iter().map(|folder| PathBuf::from(folder).join("libstdbuf.so"));
    places
        .find(|path| path.is_file())
        .context("libstdbuf.so of coreutils is missing")
}

/// testpmd and all that it loads.
fn testpmd(ctx: &Ctx, root: &mut Initramfs, driver: Driver) -> Result<()> {
    let program = ctx.found.testpmd.as_ref().context("no testpmd")?;
    let mut loads = drivers(&names(&program.linked(&[])?), driver);
    // pthread_exit(3) loads it.
    let mut more: Vec<String> = loads.iter().cloned().chain(["libgcc_s.so.1".to_owned()]).collect();
    if driver == Driver::Ours {
        let plugin = super::pmd::plugin(ctx)?;
        more.push(plugin.to_string_lossy().into_owned());
        loads.push(crate::plugin::NAME.to_owned());
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    root.host_program(program, &more)?;
    root.file("usr/lib/libstdbuf.so", 0o755, &std::fs::read(line_buffering()?)?)?;
    let loads: String = loads.iter().map(|name| format!(" -d {name}")).collect();
    root.file("etc/dpdk-drivers", 0o644, loads.as_bytes())?;
    root.file("usr/bin/pmd", 0o755, include_bytes!("pmd.sh"))
}

fn wiring(kind: Kind, detection: bool, driver: Driver) -> Wiring {
    Wiring {
        hold: false,
        detection,
        no_posted_writes: true,
        more: match driver {
            Driver::Ixgbe => |ctx, root| testpmd(ctx, root, Driver::Ixgbe),
            Driver::Ours => |ctx, root| testpmd(ctx, root, Driver::Ours),
        },
        ..Wiring::plain(kind)
    }
}

/// A guest in which testpmd has the second function.
struct Forwarder {
    stage: Stage,
    driver: Driver,
    kind: Kind,
    /// DPDK's release.
    version: (u32, u32),
    /// The function's address.
    mac: String,
    /// Frames that Linux's driver sent from the function before testpmd had it.
    sent_before: u32,
}

impl Forwarder {
    fn start(ctx: &Ctx, kind: Kind, detection: bool, driver: Driver) -> Result<Self> {
        let mut stage = Stage::start(ctx, &ctx.dir, &wiring(kind, detection, driver))?;
        let [device, more] = driver.arguments(kind);
        let script = "set -e
mkdir -p /dev/hugepages /var/run
mount -t hugetlbfs none /dev/hugepages
echo 40 >/proc/sys/vm/nr_hugepages
mkfifo /tmp/testpmd.in
>/tmp/testpmd.out
sleep 100000 >/tmp/testpmd.in &
_STDBUF_O=L LD_PRELOAD=libstdbuf.so dpdk-testpmd -l 0,1 -v DEVICE $(cat /etc/dpdk-drivers) --no-telemetry -- -i MORE \
    --total-num-mbufs=4096 --port-topology=loop --no-lsc-interrupt --enable-rx-cksum \
    --eth-peer=0,$(cat /sys/class/net/eth0/address) </tmp/testpmd.in >/tmp/testpmd.out 2>&1 &
for i in $(seq 600); do
    grep -q '^testpmd> ' /tmp/testpmd.out && break
    kill -0 $! || break
    usleep 50000
done
cat /tmp/testpmd.out
kill -0 $!";
        let script = script.replace("DEVICE", device).replace("MORE", more);
        let said = stage.script("testpmd", &script)?;
        let version = release(&said).with_context(|| format!("testpmd does not say which DPDK it is:\n{said}"))?;
        let mut forwarder = Forwarder {
            stage,
            driver,
            kind,
            version,
            mac: String::new(),
            sent_before: 0,
        };
        forwarder.sent_before = forwarder.look(|nic| nic.counters(DPDK).packets_tx);
        forwarder.link(kind)?;
        Ok(forwarder)
    }

    /// That the link is up, with a speed, on a function that net_ixgbe has.
    fn link(&mut self, kind: Kind) -> Result<()> {
        let info = self.pmd(&["show port info 0"])?;
        let value = |label: &str| info.lines().find_map(|line| line.strip_prefix(label)).map(str::trim);
        ensure!(
            value("Driver name:") == Some(self.driver.name()),
            "another driver:\n{info}"
        );
        ensure!(
            value("Link status:") == Some("up") && value("Link speed:") == Some("10 Gbps"),
            "no link of 10 Gb/s:\n{info}"
        );
        // Where functions have a table of their own, testpmd is told of it.
        let table = value("Redirection table size:");
        ensure!(
            (kind == Kind::X550) == (table == Some("64")),
            "a redirection table of {table:?} entries on an {kind}"
        );
        self.mac = value("MAC address:").context("no address")?.to_owned();
        let [a, b, c, d, e, f] = self.look(|nic| nic.policy(DPDK).mac);
        let known = format!("{a:02X}:{b:02X}:{c:02X}:{d:02X}:{e:02X}:{f:02X}");
        ensure!(
            self.mac == known,
            "the address is {}, and the PF knows {known}",
            self.mac
        );
        Ok(())
    }

    fn look<T>(&self, look: impl FnOnce(&mut Nic) -> T) -> T {
        self.stage.model().act(look)
    }

    /// Commands of testpmd's, and what it answers to all of them.
    fn pmd(&mut self, commands: &[&str]) -> Result<String> {
        let lines: String = commands.iter().map(|line| format!("pmd '{line}'\n")).collect();
        self.stage.script(commands[0], &format!("set -e\n{lines}"))
    }

    /// Commands between which the port does not work.
    fn configure(&mut self, commands: &[&str]) -> Result<()> {
        let all = [&["port stop 0"], commands, &["port start 0"]].concat();
        self.pmd(&all).map(drop)
    }

    /// Frames out of `out`, which testpmd sends back to `back`, each compared.
    fn wire(&mut self, kind: &str, out: &str, back: &str, more: &str) -> Result<()> {
        let mac = &self.mac;
        let script = format!("hwtest-wire echo --out {out} --back {back} --to {mac} --frames {kind} {more}");
        self.stage.script(kind, &script).map(drop)
    }

    /// A step: forwarding in `mode` while frames are sent. What the device did meanwhile, and testpmd's own summary.
    fn step(&mut self, mode: &str, kind: &str, [out, back]: [&str; 2], more: &str) -> Result<(Offloads, String)> {
        let what = format!("{kind} frames in mode {mode}, out of {out}, back to {back}");
        self.pmd(&["clear port stats 0", &format!("set fwd {mode}"), "start"])?;
        let before = self.look(|nic| (*nic.counters(DPDK), nic.offloads(DPDK)));
        self.wire(kind, out, back, &format!("--count {FRAMES} {more}"))
            .with_context(|| what.clone())?;
        let after = self.look(|nic| (*nic.counters(DPDK), nic.offloads(DPDK)));
        let stats = self.pmd(&["show port stats 0"])?;
        agree(&stats, before.0, after.0).with_context(|| what.clone())?;
        let summary = self.pmd(&["stop"])?;
        for label in ["RX-total:", "TX-total:"] {
            let counted = number(&summary, label).unwrap_or_default();
            ensure!(
                counted == FRAMES as u64,
                "{what}: {label} {counted}, {FRAMES} were sent:\n{summary}"
            );
        }
        Ok((difference(before.1, after.1), summary))
    }

    /// That DPDK did nothing that the model holds to be wrong, but what DPDK of this version is known for; that no access
    /// went astray, no queue was stopped and nothing was lost.
    fn flawless(&mut self) -> Result<()> {
        let contexts = self.driver == Driver::Ours || self.version >= WITH_CONTEXTS;
        let sent_before = self.sent_before;
        self.look(|nic| {
            for vf in [LINUX, DPDK] {
                let faults = nic.dma(vf).take_faults();
                ensure!(
                    faults.is_empty(),
                    "VF {vf}: accesses outside of what is mapped: {faults:?}"
                );
                let halts = nic.halts(vf);
                ensure!(halts.is_empty(), "VF {vf}: queues were stopped: {halts:?}");
                let drops = nic.drops(vf);
                let lost = drops.no_descriptor + drops.queue_off + drops.receive_off + drops.too_long;
                ensure!(lost + drops.spoofed + drops.no_crc == 0, "VF {vf}: {drops:?}");
                let known = if vf == LINUX || contexts {
                    0
                } else {
                    // No packet has CC set, not even those with a context.
                    u64::from(nic.counters(vf).packets_tx - sent_before)
                };
                let complaints = unexpected(nic.complaints(vf), known);
                ensure!(complaints.is_empty(), "VF {vf}: the model complains: {complaints:?}");
            }
            Ok(())
        })?;
        self.stage.kernel_is_content()
    }

    /// testpmd ends in order, and the function is left as it should be.
    fn quit(mut self) -> Result<()> {
        let script = "echo quit >/tmp/testpmd.in
for i in $(seq 400); do
    pidof dpdk-testpmd >/dev/null || exit 0
    usleep 50000
done
tail -n 20 /tmp/testpmd.out
exit 1";
        self.stage.script("quit", script)?;
        self.stage.kernel_is_content()?;
        let faults = self.look(|nic| nic.dma(DPDK).take_faults());
        ensure!(faults.is_empty(), "at its end: {faults:?}");
        self.stage.power_off()
    }
}

/// What the model complains of, beside packets without a context as many as are known.
fn unexpected(complaints: &vf_model::Complaints, known: u64) -> Vec<(Complaint, u64)> {
    let unknown = |&(what, count): &(Complaint, u64)| (what, count) != (Complaint::NoContext, known);
    complaints.iter().filter(unknown).collect()
}

/// Year and month of "EAL: RTE Version: 'DPDK 22.11.11'".
fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text
        .split("RTE Version: 'DPDK ")
        .nth(1)?
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The number behind a label.
fn number(text: &str, label: &str) -> Option<u64> {
    text.split(label).nth(1)?.split_whitespace().next()?.parse().ok()
}

/// That testpmd counted what the device did; its numbers are those of the device's registers.
fn agree(stats: &str, before: Counters, after: Counters) -> Result<()> {
    let counted = ["RX-packets:", "RX-bytes:", "TX-packets:", "TX-bytes:"].map(|label| number(stats, label));
    let device = [
        u64::from(after.packets_rx - before.packets_rx),
        after.octets_rx - before.octets_rx,
        u64::from(after.packets_tx - before.packets_tx),
        after.octets_tx - before.octets_tx,
    ];
    ensure!(
        counted == device.map(Some),
        "testpmd counts {counted:?} packets and bytes, in and out, the device {device:?}:\n{stats}"
    );
    let frames = FRAMES as u64;
    ensure!(
        [device[0], device[2]] == [frames; 2],
        "{FRAMES} frames were sent: {device:?}"
    );
    Ok(())
}

fn difference(before: Offloads, after: Offloads) -> Offloads {
    Offloads {
        segmented: after.segmented - before.segmented,
        checksums: after.checksums - before.checksums,
        tagged: after.tagged - before.tagged,
        gathered: after.gathered - before.gathered,
    }
}

fn forwards(ctx: &Ctx, kind: Kind, starts: usize) -> Result<String> {
    let mut forwarder = Forwarder::start(ctx, kind, false, Driver::Ixgbe)?;
    // Without offloads, which DPDK's vectors do.
    let (done, _) = forwarder.step("macswap", "plain", ["eth0"; 2], "")?;
    ensure!(done == Offloads::default(), "nobody asked for {done:?}");
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
    let (year, month) = forwarder.version;
    forwarder.quit()?;
    Ok(format!(
        "DPDK {year}.{month:02}: checksums, tags, {starts} starts, {} frames sent back",
        7 * FRAMES + starts * FEW
    ))
}

/// Wrong checksums are noticed, and right ones made, by the device.
fn checksums(forwarder: &mut Forwarder) -> Result<()> {
    let on = ["csum set ip hw 0", "csum set udp hw 0", "csum set tcp hw 0"];
    forwarder.configure(&on)?;
    let (done, summary) = forwarder.step("csum", "checksums", ["eth0"; 2], "")?;
    let wrong = FRAMES as u64 / 2;
    // What an 82599 calls wrong of UDP may have no checksum at all (erratum 44), so that our driver does not repeat it.
    let timid = forwarder.driver == Driver::Ours && forwarder.kind == Kind::I82599;
    for (label, wrong) in [
        ("Bad-ipcsum:", wrong),
        ("Bad-l4csum:", if timid { wrong / 2 } else { wrong }),
    ] {
        let noticed = number(&summary, label);
        ensure!(noticed == Some(wrong), "{wrong} frames had wrong checksums:\n{summary}");
    }
    ensure!(done.checksums == FRAMES as u64, "the device made checksums of {done:?}");
    // Behind a tag.
    forwarder.pmd(&["vlan set filter on 0", "rx_vlan add 100 0"])?;
    let (done, _) = forwarder.step("csum", "checksums", ["eth0.100"; 2], "")?;
    ensure!(
        (done.checksums, done.tagged) == (FRAMES as u64, 0),
        "behind a tag the device made checksums of {done:?}"
    );
    let off = ["csum set ip sw 0", "csum set udp sw 0", "csum set tcp sw 0"];
    forwarder.configure(&off)
}

/// Tags stripped and inserted, each alone and both.
fn tags(forwarder: &mut Forwarder) -> Result<()> {
    let frames = FRAMES as u64;
    let quiet = "--quiet eth0.100";
    for (strip, insert, [out, back], more) in [
        (false, false, ["eth0.100", "eth0.100"], ""),
        (true, false, ["eth0.100", "eth0"], quiet),
        (true, true, ["eth0.100", "eth0.100"], ""),
        (false, true, ["eth0", "eth0.100"], ""),
    ] {
        let strips = if strip {
            "vlan set strip on 0"
        } else {
            "vlan set strip off 0"
        };
        let inserts = if insert { "tx_vlan set 0 100" } else { "tx_vlan reset 0" };
        forwarder.configure(&[inserts])?;
        forwarder.pmd(&[strips])?;
        let (done, _) = forwarder.step("macswap", "plain", [out, back], more)?;
        ensure!(
            done.tagged == if insert { frames } else { 0 },
            "tags were inserted into {} packets, with insertion {insert}",
            done.tagged
        );
    }
    forwarder.configure(&["tx_vlan reset 0"])?;
    // A VLAN that DPDK is not in.
    forwarder.pmd(&["rx_vlan rm 100 0", "start"])?;
    forwarder.wire("lost", "eth0.100", "eth0.100", &format!("--count {FEW}"))?;
    forwarder.pmd(&["stop", "vlan set strip off 0"]).map(drop)
}

/// A PF that stops queues which send without a context: before 25.07 DPDK sends nothing there, as its documentation says
/// ("DPDK VF will not work"); from then on it does not notice.
fn detected(ctx: &Ctx) -> Result<String> {
    let mut forwarder = Forwarder::start(ctx, Kind::X550, true, Driver::Ixgbe)?;
    let (year, month) = forwarder.version;
    if forwarder.version >= WITH_CONTEXTS {
        forwarder.step("macswap", "plain", ["eth0"; 2], "")?;
        forwarder.flawless()?;
        forwarder.quit()?;
        return Ok(format!("DPDK {year}.{month:02} sends each packet with a context"));
    }
    forwarder.pmd(&["set fwd macswap", "start"])?;
    forwarder.wire("lost", "eth0", "eth0", &format!("--count {FEW}"))?;
    let stats = forwarder.pmd(&["stop", "show port stats 0"])?;
    ensure!(
        number(&stats, "TX-packets:") == Some(0) && number(&stats, "RX-packets:") == Some(FEW as u64),
        "{stats}"
    );
    forwarder.look(|nic| {
        let halts = nic.halts(DPDK);
        ensure!(halts == [Halt::Malicious], "halts: {halts:?}");
        let complaints = unexpected(nic.complaints(DPDK), 1);
        ensure!(
            complaints.is_empty(),
            "beside one packet without a context: {complaints:?}"
        );
        // What the administrator of such a PF does: ixgbe's MDD=0,0.
        nic.pf().malicious_detection = false;
        Ok(())
    })?;
    // A stopped queue goes on after a reset of the function alone.
    forwarder.configure(&[])?;
    forwarder.step("macswap", "plain", ["eth0"; 2], "")?;
    forwarder.quit()?;
    Ok(format!(
        "DPDK {year}.{month:02} sends without a context: its queue is stopped, and goes on once detection is off"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_testpmd_says() {
        assert_eq!(release("EAL: RTE Version: 'DPDK 22.11.11'\n"), Some((22, 11)));
        assert_eq!(release("EAL: RTE Version: 'DPDK 25.07.0-rc1'\n"), Some((25, 7)));
        assert_eq!(release("EAL: Detected CPU lcores: 2\n"), None);
        let summary = "  RX-packets: 3   RX-dropped: 0   RX-total: 3\n  Bad-ipcsum: 1   Bad-l4csum: 2\n";
        assert_eq!(number(summary, "RX-total:"), Some(3));
        assert_eq!(number(summary, "Bad-l4csum:"), Some(2));
        assert_eq!(number(summary, "TX-total:"), None);
    }

    #[test]
    fn drivers_are_of_the_version_that_is_linked() {
        let linked = ["libc.so.6", "librte_mempool.so.23"].map(str::to_owned);
        assert_eq!(drivers(&linked, Driver::Ixgbe)[0], "librte_mempool_ring.so.23");
        assert!(drivers(&linked[..1], Driver::Ours).is_empty());
    }
}
