//! testpmd's forwarding modes on the plugin's ports, each judged by what comes out; filters; offloads.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use usernic::Checksum;

use super::frames::{BROADCAST, ether, header_is_right, ipv4, is_right, receive, send, tagged, through};
use super::{back, start, vdev};
use crate::peers::testpmd::{Config, Testpmd};
use crate::test::wire::{End, prove};
use crate::test::{Case, Check, Ctx, Need, Outcome, passed};

const GROUP: &str = "pmd-modes";

/// Addresses of the ports.
const OURS: [[u8; 6]; 2] = [[2, 0xaa, 0, 0, 0, 1], [2, 0xaa, 0, 0, 0, 2]];

/// Somebody else's.
const OTHER: [u8; 6] = [2, 0xbb, 0, 0, 0, 1];
const GROUP_ADDRESS: [u8; 6] = [1, 0, 0x5e, 0, 0, 7];

/// A testpmd that connects a port of split rings and one of packed rings.
struct Peer {
    a: End,
    b: End,
    testpmd: Testpmd,
}

impl Peer {
    fn start(ctx: &Ctx, dir: &Path) -> Result<Self> {
        let mut config = Config::new("pmd", dir);
        config.huge_dir = ctx.hugetlbfs_in(dir, "pmd")?;
        let sockets = ["a", "b"].map(|name| dir.join(name));
        let ends = [back(&sockets[0], "")?, back(&sockets[1], "")?];
        let mac = OURS.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
        config.vdevs = vec![
            vdev(0, &sockets[0], &format!(",mac={}", mac[0])),
            vdev(1, &sockets[1], &format!(",packed_vq=1,speed=25000,mac={}", mac[1])),
        ];
        let testpmd = start(ctx, &mut config)?;
        let [a, b] = ends;
        let mut peer = Peer { a, b, testpmd };
        peer.io()?;
        Ok(peer)
    }

    /// Forwards as it comes, and frames come through.
    fn io(&mut self) -> Result<()> {
        self.testpmd.forward("io")?;
        prove(&mut self.a, &mut self.b)
    }

    /// Runs commands that want the ports stopped.
    fn reconfigure(&mut self, commands: &[&str]) -> Result<()> {
        self.testpmd.stop()?;
        self.testpmd.command("port stop all")?;
        for command in commands {
            self.testpmd.command(command)?;
        }
        self.testpmd.command("port start all")?;
        Ok(())
    }
}

pub fn cases() -> Vec<Case> {
    let needs = [&super::BUILD[..], &[Need::Testpmd]].concat();
    type Mode = fn(&mut Peer) -> Result<Outcome>;
    let cases: [(&str, Mode); 10] = [
        ("macswap", mac_swap),
        ("mac", mac),
        ("rxonly", rx_only),
        ("txonly", tx_only),
        ("flowgen", flow_gen),
        ("icmpecho", icmp_echo),
        ("csum", csum),
        ("tso", tso),
        ("filters", filters),
        ("vlan", vlan),
    ];
    cases
        .into_iter()
        .map(|(name, run)| {
            let check: Check = Box::new(move |ctx| {
                let mut peer = ctx.shared(GROUP, |dir| Peer::start(ctx, dir))?;
                run(&mut peer)
            });
            Case::new(format!("pmd/modes/{name}"), &needs, check).sharing(GROUP)
        })
        .collect()
}

/// Frames of some lengths.
fn some() -> Vec<Vec<u8>> {
    (0..50)
        .map(|i| {
            let mut frame = ether(OURS[0], OTHER, 0x88b5);
            frame.resize(60 + 29 * i, i as u8);
            frame
        })
        .collect()
}

fn swapped(frame: &[u8]) -> Vec<u8> {
    [&frame[6..12], &frame[..6], &frame[12..]].concat()
}

fn mac_swap(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.forward("macswap")?;
    let frames = some();
    let mark_is_swapped = through_swapped(peer, &frames)?;
    ensure!(mark_is_swapped == frames.len(), "{mark_is_swapped} frames came");
    passed()
}

/// How many came out swapped, and as they went in otherwise.
fn through_swapped(peer: &mut Peer, frames: &[Vec<u8>]) -> Result<usize> {
    for frame in frames {
        send(&mut peer.a, frame)?;
    }
    let mut came = 0;
    let mut wrong = None;
    receive(&mut peer.b, |_, frame| {
        if frames.get(came).is_none_or(|sent| frame != swapped(sent)) && wrong.is_none() {
            wrong = Some((came, frame));
        }
        came += 1;
        came == frames.len()
    })?;
    ensure!(wrong.is_none(), "it is not what was sent: {wrong:02x?}");
    Ok(came)
}

fn mac(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.forward("mac")?;
    let frames = some();
    for frame in &frames {
        send(&mut peer.a, frame)?;
    }
    let mut came = Vec::new();
    receive(&mut peer.b, |_, frame| {
        came.push(frame);
        came.len() == frames.len()
    })?;
    for (sent, got) in frames.iter().zip(&came) {
        // To testpmd's idea of who is behind port 1, from port 1.
        let expected = [&[2, 0, 0, 0, 0, 1][..], &OURS[1], &sent[12..]].concat();
        ensure!(*got == expected, "{:02x?}", &got[..20]);
    }
    passed()
}

fn rx_only(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.stop()?;
    peer.testpmd.command("clear port stats all")?;
    peer.testpmd.forward("rxonly")?;
    let frames = some();
    let bytes: usize = frames.iter().map(Vec::len).sum();
    for frame in &frames {
        send(&mut peer.a, frame)?;
    }
    let mut text = String::new();
    for _ in 0..500 {
        text = peer.testpmd.command("show port stats 0")?;
        if text.contains(&format!("RX-packets: {}", frames.len())) {
            ensure!(text.contains(&format!("RX-bytes:  {bytes}\n")), "{bytes} bytes: {text}");
            let more = peer.testpmd.command("show port xstats 0")?;
            let label = format!("rx_q0_packets: {}", frames.len());
            ensure!(more.contains(&label) && more.contains("rx_q0_malformed: 0"), "{more}");
            return passed();
        }
        crate::process::sleep(std::time::Duration::from_millis(10))?;
    }
    anyhow::bail!("{} frames were sent: {text}", frames.len());
}

fn tx_only(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.stop()?;
    for pieces in ["200", "64", "100,300,61"] {
        peer.testpmd.command(&format!("set txpkts {pieces}"))?;
        peer.testpmd.forward("txonly")?;
        let len: usize = pieces.split(',').filter_map(|n| n.parse::<usize>().ok()).sum();
        for end in [&mut peer.a, &mut peer.b] {
            let (mut count, mut wrong) = (0, None);
            receive(end, |_, frame| {
                count += 1;
                let fine = frame.len() == len && frame[12..14] == [8, 0] && header_is_right(&frame);
                if !fine && frame.len() != 60 && count > 600 {
                    wrong = Some(frame);
                }
                // What was sent before lies in the ring yet.
                count == 3000
            })?;
            ensure!(wrong.is_none(), "{pieces}: {wrong:02x?}");
        }
        peer.testpmd.stop()?;
        for end in [&mut peer.a, &mut peer.b] {
            drain(end)?;
        }
    }
    peer.testpmd.command("set txpkts 64")?;
    passed()
}

/// Takes what is in the ring.
fn drain(end: &mut End) -> Result<()> {
    let mut burst = usernic::Burst::new(64);
    let mut idle = 0;
    while idle < 50 {
        idle = if end.queues[0].rx(&mut burst) == 0 { idle + 1 } else { 0 };
        end.queues[0].free(&mut burst);
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    Ok(())
}

fn flow_gen(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.forward("flowgen")?;
    let mut flows = std::collections::BTreeSet::new();
    let mut count = 0;
    let mut wrong = None;
    receive(&mut peer.b, |_, frame| {
        count += 1;
        // Of 64 bytes with their FCS.
        if frame.len() == 60 && frame[12..14] == [8, 0] {
            if !header_is_right(&frame) {
                wrong = Some(frame.clone());
            }
            flows.insert(frame[26..34].to_vec());
        }
        count == 3000
    })?;
    peer.testpmd.stop()?;
    for end in [&mut peer.a, &mut peer.b] {
        drain(end)?;
    }
    ensure!(wrong.is_none(), "{wrong:02x?}");
    ensure!(flows.len() > 100, "{} flows", flows.len());
    passed()
}

fn icmp_echo(peer: &mut Peer) -> Result<Outcome> {
    peer.io()?;
    peer.testpmd.forward("icmpecho")?;
    let mut request = ether(BROADCAST, OTHER, 0x0806);
    request.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(OTHER);
    request.extend([198, 18, 0, 9]);
    request.extend([0; 6]);
    request.extend([198, 18, 0, 1]);
    request.resize(60, 0);
    send(&mut peer.a, &request)?;
    let mut answer = Vec::new();
    receive(&mut peer.a, |_, frame| {
        answer = frame;
        answer[12..14] == [8, 6]
    })?;
    ensure!(
        answer[..6] == OTHER && answer[20..22] == [0, 2] && answer[28..32] == [198, 18, 0, 1],
        "an ARP answer: {answer:02x?}"
    );
    // An echo request, whose checksum the answer keeps up.
    let mut ping = ipv4(OURS[0], [198, 18, 0, 1], 1, &[0; 44], true);
    ping[34..42].copy_from_slice(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
    ping[42..].fill(0);
    send(&mut peer.a, &ping)?;
    receive(&mut peer.a, |_, frame| {
        answer = frame;
        answer[12..14] == [8, 0] && answer[23] == 1
    })?;
    ensure!(
        answer[34] == 0 && answer[30..34] == [198, 18, 0, 9],
        "an echo: {answer:02x?}"
    );
    passed()
}

/// Checksums, made by testpmd and left to the back-end.
fn csum(peer: &mut Peer) -> Result<Outcome> {
    for hardware in [false, true] {
        let kind = if hardware { "hw" } else { "sw" };
        let set: Vec<String> = ["udp", "tcp"]
            .iter()
            .map(|l4| format!("csum set {l4} {kind} 1"))
            .collect();
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        peer.reconfigure(&set)?;
        peer.io()?;
        peer.testpmd.forward("csum")?;
        for protocol in [17, 6] {
            let frame = ipv4(OURS[0], [198, 18, 1, 1], protocol, &[0x77; 333], false);
            send(&mut peer.a, &frame)?;
            let mut result = Ok(());
            receive(&mut peer.b, |packet, got| {
                result = judge(packet, &got, &frame, hardware);
                true
            })?;
            result.with_context(|| format!("{kind}, protocol {protocol}"))?;
        }
    }
    peer.reconfigure(&["csum set udp sw 1", "csum set tcp sw 1"])?;
    passed()
}

fn judge(packet: &usernic::Packet, got: &[u8], sent: &[u8], hardware: bool) -> Result<()> {
    let open = matches!(packet.checksum(), Checksum::Open(_));
    ensure!(open == hardware, "its checksum is {:?}", packet.checksum());
    ensure!(
        got.len() == sent.len() && got[42 + 12..] == sent[42 + 12..],
        "{got:02x?}"
    );
    if hardware {
        let Checksum::Open(partial) = packet.checksum() else {
            return Ok(());
        };
        // What whoever completes it makes.
        let mut whole = got.to_vec();
        let (start, at) = (usize::from(partial.start), usize::from(partial.start + partial.offset));
        let mut sum = 0u32;
        for pair in whole[start..].chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        whole[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        ensure!(is_right(&whole), "not right when completed: {whole:02x?}");
    } else {
        ensure!(is_right(got), "not right: {got:02x?}");
    }
    Ok(())
}

/// A TCP frame that the back-end is to cut.
fn tso(peer: &mut Peer) -> Result<Outcome> {
    peer.reconfigure(&["csum set tcp hw 1", "csum set ip sw 1", "tso set 700 1"])?;
    peer.io()?;
    peer.testpmd.forward("csum")?;
    let frame = ipv4(OURS[0], [198, 18, 1, 1], 6, &[0x55; 1400], false);
    send(&mut peer.a, &frame)?;
    let mut found = None;
    receive(&mut peer.b, |packet, got| {
        found = Some((packet.segmentation(), packet.checksum(), got.len()));
        true
    })?;
    peer.reconfigure(&["tso set 0 1", "csum set tcp sw 1"])?;
    let (cut, checksum, len) = found.context("nothing came")?;
    let cut = cut.context("it is not to be cut")?;
    ensure!(
        cut.size == 700 && len == frame.len() && matches!(checksum, Checksum::Open(_)),
        "{cut:?} {checksum:?} {len}"
    );
    passed()
}

/// Which of some frames come out at the other port, by their index.
fn let_in(peer: &mut Peer, frames: &[Vec<u8>]) -> Result<Vec<usize>> {
    let came = through(&mut peer.a, &mut peer.b, frames)?;
    Ok(came
        .iter()
        .filter_map(|got| frames.iter().position(|sent| sent == got))
        .collect())
}

fn filters(peer: &mut Peer) -> Result<Outcome> {
    let frames: Vec<Vec<u8>> = [OURS[0], OTHER, GROUP_ADDRESS, BROADCAST]
        .iter()
        .map(|to| {
            let mut frame = ether(*to, OTHER, 0x88b8);
            frame.resize(70, to[5]);
            frame
        })
        .collect();
    peer.reconfigure(&[])?;
    peer.io()?;
    let steps: [(&str, &[usize]); 9] = [
        ("set promisc 0 on", &[0, 1, 2, 3]),
        ("set promisc 0 off", &[0, 3]),
        ("mac_addr add 0 02:bb:00:00:00:01", &[0, 1, 3]),
        ("mac_addr remove 0 02:bb:00:00:00:01", &[0, 3]),
        ("mcast_addr add 0 01:00:5e:00:00:07", &[0, 2, 3]),
        ("mcast_addr remove 0 01:00:5e:00:00:07", &[0, 3]),
        ("set allmulti 0 on", &[0, 2, 3]),
        ("set allmulti 0 off", &[0, 3]),
        ("mac_addr set 0 02:bb:00:00:00:01", &[1, 3]),
    ];
    for (step, expected) in steps {
        peer.testpmd.command(step)?;
        let got = let_in(peer, &frames)?;
        ensure!(got == expected, "after {step}: of {expected:?} came {got:?}");
    }
    peer.testpmd.command("mac_addr set 0 02:aa:00:00:00:01")?;
    peer.testpmd.command("set promisc 0 on")?;
    let more = peer.testpmd.command("show port xstats 0")?;
    ensure!(
        !more.contains("rx_q0_filtered: 0\n"),
        "what was kept out is not counted: {more}"
    );
    passed()
}

fn vlan(peer: &mut Peer) -> Result<Outcome> {
    let mut plain = ether(OURS[0], OTHER, 0x88b8);
    plain.resize(90, 0x42);
    let frames = vec![plain.clone(), tagged(&plain, 100), tagged(&plain, 200)];
    peer.reconfigure(&[])?;
    peer.io()?;
    peer.testpmd.command("vlan set filter on 0")?;
    ensure!(let_in(peer, &frames)? == [0], "no VLAN is listed");
    peer.testpmd.command("rx_vlan add 100 0")?;
    ensure!(let_in(peer, &frames)? == [0, 1], "VLAN 100 is listed");
    peer.testpmd.command("rx_vlan rm 100 0")?;
    ensure!(let_in(peer, &frames)? == [0], "VLAN 100 was listed");
    peer.testpmd.command("vlan set filter off 0")?;
    ensure!(let_in(peer, &frames)? == [0, 1, 2], "nothing is filtered");
    peer.testpmd.command("vlan set strip on 0")?;
    let came = through(&mut peer.a, &mut peer.b, &frames)?;
    ensure!(came == vec![plain.clone(); 3], "tags were to be taken out: {came:02x?}");
    peer.testpmd.command("vlan set strip off 0")?;
    // Port 1 puts a tag into what it sends.
    peer.reconfigure(&["tx_vlan set 1 300"])?;
    peer.testpmd.forward("mac")?;
    send(&mut peer.a, &plain)?;
    let mut got = Vec::new();
    receive(&mut peer.b, |_, frame| {
        got = frame;
        true
    })?;
    peer.reconfigure(&["tx_vlan reset 1"])?;
    ensure!(
        got.len() == plain.len() + 4 && got[12..16] == [0x81, 0, 1, 0x2c] && got[16..] == plain[12..],
        "a tag of 300 was to be put in: {got:02x?}"
    );
    passed()
}
