//! Offloads between a front-end and a back-end in one process: what is asked for is done, whoever does it.

mod common;

use std::time::Duration;

use common::{LIMIT, Place, until};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use usernic::filter::Filter;
use usernic::offload::checksum::{Partial, Verdict};
use usernic::offload::segment::Segmenter;
use usernic::switch::{Role, Switch, SwitchConfig};
use usernic::{Burst, Checksum, Packet, Port, Queue};
use virtio_ring::Features;
use virtio_ring::net::{GsoType, RxMode};

/// A frame that etherparse made, checksums and all.
fn frame(six: bool, tcp: bool, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let with_ip = if six {
        builder.ipv6([1; 16], [2; 16], 64)
    } else {
        builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
    };
    let payload: Vec<u8> = (0..payload).map(|at| (at * 31 % 253) as u8).collect();
    let mut frame = Vec::new();
    if tcp {
        with_ip.tcp(80, 81, 1000, 500).write(&mut frame, &payload).unwrap();
    } else {
        with_ip.udp(80, 81).write(&mut frame, &payload).unwrap();
    }
    frame
}

fn bytes_of(packet: &Packet) -> Vec<u8> {
    let mut bytes = vec![0; packet.len()];
    packet.copy_to(&mut bytes);
    bytes
}

fn send(queue: &mut Queue, bytes: &[u8], ask: impl Fn(&mut Packet)) {
    let mut packet = queue.packet().expect("a buffer");
    packet.copy_from(bytes).unwrap();
    ask(&mut packet);
    let mut burst = Burst::new(1);
    burst.push(packet).unwrap();
    assert_eq!(queue.tx(&mut burst), 1);
}

/// All that comes, as soon as `count` have come.
fn receive(queue: &mut Queue, other: &mut Queue, count: usize) -> Vec<Packet> {
    let mut burst = Burst::new(256);
    until("frames arrive", || {
        queue.rx(&mut burst);
        // What was cut goes on with the sender's calls.
        other.rx(&mut Burst::new(1));
        burst.len() >= count
    });
    burst.drain().collect()
}

/// Whether the frame is right, checksums too, by etherparse and by us.
fn is_right(bytes: &[u8]) -> bool {
    let sliced = SlicedPacket::from_ethernet(bytes).unwrap();
    let header = match sliced.net.as_ref().unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            header.calc_header_checksum() == header.header_checksum
        }
        _ => true,
    };
    let headers = usernic::offload::headers::Headers::parse(bytes, bytes.len()).unwrap();
    assert!(matches!(
        sliced.transport,
        Some(TransportSlice::Tcp(_) | TransportSlice::Udp(_))
    ));
    header && usernic::offload::checksum::verify(&headers, [bytes]) == Verdict::Right
}

fn payload_of(bytes: &[u8]) -> &[u8] {
    let headers = usernic::offload::headers::Headers::parse(bytes, bytes.len()).unwrap();
    &bytes[headers.payload_at..]
}

fn negotiated(port: &Port) -> Features {
    Features::from_bits_retain(port.link().features)
}

/// Sends a frame that asks for its checksum, one that asks for nothing, and large ones, from one side to the other.
/// `takes`: the checksum and the segmentation that the receiver was promised to get as they are.
fn check(from: &mut Queue, to: &mut Queue, takes: (bool, bool), what: &str) {
    for (six, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
        let whole = frame(six, tcp, 700);
        let headers = usernic::offload::headers::Headers::parse(&whole, whole.len()).unwrap();
        let mut blank = whole.clone();
        blank[headers.transport_at + headers.checksum_offset().unwrap()] ^= 0xff;
        send(from, &blank, |packet| packet.request_checksum().unwrap());
        send(from, &blank, |_| ());
        let mut got = receive(to, from, 2).into_iter();
        let (mut asked, plain) = (got.next().unwrap(), got.next().unwrap());
        assert_eq!(matches!(asked.checksum(), Checksum::Open(_)), takes.0, "{what}");
        assert_eq!(asked.verify_checksum(), Verdict::Right, "{what}");
        assert!(asked.complete_checksum());
        assert_eq!(bytes_of(&asked), whole, "{what}");
        // What asks for nothing is left as it is.
        assert_eq!(
            (plain.checksum(), bytes_of(&plain)),
            (Checksum::Unknown, blank),
            "{what}"
        );

        let large = frame(six, tcp, 30_000);
        send(from, &large, |packet| packet.request_segmentation(1400).unwrap());
        let count = if takes.1 { 1 } else { 30_000usize.div_ceil(1400) };
        let got = receive(to, from, count);
        assert_eq!(got.len(), count, "{what}");
        if takes.1 {
            let segmentation = got[0].segmentation().unwrap();
            assert_eq!(segmentation.size, 1400);
            let kind = match (six, tcp) {
                (_, false) => GsoType::UDP_L4,
                (true, true) => GsoType::TCPV6,
                (false, true) => GsoType::TCPV4,
            };
            assert_eq!(segmentation.kind, kind);
            // Cut now, it is what it would have been.
            let bytes = bytes_of(&got[0]);
            assert_eq!(payload_of(&bytes), payload_of(&large), "{what}");
            let mut segmenter = Segmenter::new(&bytes, bytes.len(), kind, 1400).unwrap();
            while let Some(cut) = segmenter.next() {
                let payload = &bytes[cut.payload()];
                assert!(is_right(&[cut.headers_with(payload), payload].concat()), "{what}");
            }
        } else {
            let mut joined = Vec::new();
            for packet in &got {
                let bytes = bytes_of(packet);
                assert!(is_right(&bytes), "{what}");
                assert_eq!(packet.checksum(), Checksum::Unknown);
                joined.extend_from_slice(payload_of(&bytes));
            }
            assert_eq!(joined, payload_of(&large), "{what}");
        }
    }
}

/// Every combination of what either side is told to do, split and packed.
#[test]
fn every_combination() {
    for bits in 0..256u32 {
        let on = |bit: u32| bits >> bit & 1;
        let [fc, ft, fl, bc, bt, bl, packed, mergeable] = [0, 1, 2, 3, 4, 5, 6, 7].map(on);
        let mergeable = mergeable | fl;
        // A key that needs another.
        if (ft | fl) > fc {
            continue;
        }
        // A frame of 30,000 bytes that is not to be cut is received in several buffers.
        let front = format!("csum={fc},tso={ft},lro={fl},packed_vq={packed},mrg_rxbuf={mergeable},buffers=1200");
        let back = format!("csum={bc},tso={bt},lro={bl}");
        let what = format!("front {front}, back {back}");
        let place = Place::new();
        let (front_port, back_port) = place.pair(&front, &back);
        let both = |a: u32, b: u32| a & b == 1;
        let (csum, tso, lro) = (both(fc, bc), both(fc & ft, bc & bt), both(fc & fl, bc & bl));
        let features = negotiated(&front_port);
        assert_eq!(features | Features::PROTOCOL_FEATURES, negotiated(&back_port));
        assert_eq!(
            features.contains(Features::NET_CSUM | Features::NET_GUEST_CSUM),
            csum,
            "{what}"
        );
        assert_eq!(
            features.contains(Features::NET_HOST_TSO4 | Features::NET_HOST_USO),
            tso,
            "{what}"
        );
        assert_eq!(
            features.contains(Features::NET_GUEST_TSO6 | Features::NET_GUEST_USO6),
            lro,
            "{what}"
        );
        let (mut a, mut b) = (front_port.queue(0).unwrap(), back_port.queue(0).unwrap());
        check(&mut a, &mut b, (csum, tso), &format!("to the back-end: {what}"));
        check(&mut b, &mut a, (csum, lro), &format!("to the front-end: {what}"));
        for port in [&front_port, &back_port] {
            let stats = port.stats();
            assert_eq!(
                (stats.rx_errors, stats.tx_errors, stats.anomalies),
                (0, 0, 0),
                "{what}: {stats:?}"
            );
        }
    }
}

/// A ring with less room than the packet has pieces: they go as room comes.
#[test]
fn a_small_ring_takes_a_large_packet() {
    for lro in [0, 1] {
        let place = Place::new();
        let (front, back) = place.pair(&format!("queue_size=16,buffers=512,lro={lro}"), "csum=0");
        let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let large = frame(false, true, 60_000);
        for back in [false, true] {
            let (from, to) = if back { (&mut b, &mut a) } else { (&mut a, &mut b) };
            send(from, &large, |packet| packet.request_segmentation(1000).unwrap());
            let mut burst = Burst::new(64);
            let mut joined = Vec::new();
            until("all pieces arrive", || {
                to.rx(&mut burst);
                for packet in burst.drain() {
                    joined.extend_from_slice(payload_of(&bytes_of(&packet)));
                }
                from.rx(&mut Burst::new(1));
                joined.len() >= 60_000
            });
            assert_eq!(joined, payload_of(&large));
            assert!(from.drain(LIMIT));
        }
    }
}

/// From a port that leaves checksums open and sends large packets, through the switch, to one that takes neither; and
/// between two that do.
#[test]
fn the_switch_translates() {
    for role in [Role::Learn, Role::Connect(1)] {
        for takes in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let sockets = ["a", "b"].map(|name| dir.path().join(name));
            let mut config = SwitchConfig::learning(sockets.clone());
            if let Role::Connect(_) = role {
                config.ports[0].2 = Role::Connect(1);
                config.ports[1].2 = Role::Connect(0);
            }
            let mut switch = Switch::new(config).unwrap();
            let keys = |on: bool| if on { "tso=1,lro=1" } else { "mrg_rxbuf=1" };
            let open = |index: usize, on: bool| {
                let socket = sockets[index].display();
                Port::open(&format!("virtio-user,path={socket},buffers=1200,{}", keys(on))).unwrap()
            };
            let (a, b) = (open(0, true), open(1, takes));
            until("both links are up", || switch.ports().all(|(_, port)| port.link().up));
            let (mut from, mut to) = (a.queue(0).unwrap(), b.queue(0).unwrap());
            for tcp in [true, false] {
                let large = frame(false, tcp, 20_000);
                send(&mut from, &large, |packet| packet.request_segmentation(1448).unwrap());
                let count = if takes { 1 } else { 20_000usize.div_ceil(1448) };
                let mut burst = Burst::new(64);
                until("it arrives", || {
                    switch.turn();
                    to.rx(&mut burst);
                    burst.len() >= count
                });
                assert_eq!(burst.len(), count);
                let joined: Vec<u8> = burst.iter().flat_map(|p| payload_of(&bytes_of(p)).to_vec()).collect();
                assert_eq!(joined, payload_of(&large));
                assert!(burst.iter().all(|packet| packet.segmentation().is_some() == takes));
                assert!(burst.iter().all(|packet| packet.verify_checksum() == Verdict::Right));
                assert!(takes || burst.iter().all(|packet| is_right(&bytes_of(packet))));
            }
        }
    }
}

/// A place that is not in the packet never leaves.
#[test]
fn nonsense_is_not_sent() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let mut queue = front.queue(0).unwrap();
    let mut burst = Burst::new(4);
    for start in [10, 60_000, 20] {
        let mut packet = queue.packet().unwrap();
        packet.copy_from(&frame(false, true, 10)).unwrap();
        packet.set_checksum(Partial { start, offset: 40 });
        burst.push(packet).unwrap();
    }
    // The first one has its place: 50 of 64.
    assert_eq!(queue.tx(&mut burst), 2);
    assert!(burst.is_empty());
    assert_eq!((front.stats().tx_packets, front.stats().tx_errors), (2, 1));
    let got = receive(&mut back.queue(0).unwrap(), &mut queue, 2);
    assert_eq!(got.len(), 2);
}

/// Headers that make no sense, from a side that is trusted to make them: their frames are dropped, the others arrive.
#[test]
fn nonsense_is_not_received() {
    for packed in [0, 1] {
        let place = Place::new();
        let (front, back) = place.pair(&format!("tso=1,lro=1,packed_vq={packed}"), "");
        let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        for toward_back in [true, false] {
            let (from, to, port) = if toward_back {
                (&mut a, &mut b, &back)
            } else {
                (&mut b, &mut a, &front)
            };
            let mut out = Burst::new(32);
            let mut got = Burst::new(32);
            let (mut sent, mut seen) = (0u64, Vec::new());
            until("all were looked at", || {
                while sent < 400 && out.room() > 0 {
                    let Some(mut packet) = from.packet() else { break };
                    packet.copy_from(&frame(false, true, sent as usize)).unwrap();
                    // Two of three are bad.
                    if sent % 3 > 0 {
                        packet.set_checksum(Partial {
                            start: 60_000,
                            offset: 0,
                        });
                    }
                    out.push(packet).unwrap();
                    sent += 1;
                }
                from.tx(&mut out);
                to.rx(&mut got);
                seen.extend(got.drain().map(|packet| packet.len() as u64 - 54));
                seen.len() as u64 + port.stats().rx_errors == 400
            });
            assert!(seen.iter().copied().eq((0..400).step_by(3)), "{seen:?}");
            let stats = port.stats();
            assert_eq!((stats.rx_packets, stats.rx_errors), (134, 266));
            assert_eq!(stats.rx_bytes, seen.iter().map(|payload| payload + 54).sum::<u64>());
            // A front-end counts them as its back-end's violations, too.
            let anomalies = if toward_back { 0 } else { 266 };
            until("anomalies are shown", || {
                to.rx(&mut got);
                port.stats().anomalies == anomalies
            });
        }
    }
}

/// Frames that are dropped had buffers; one without a byte had none: those that follow still have theirs.
#[test]
fn dropped_frames_do_not_take_the_buffers_of_others() {
    let place = Place::new();
    let (front, back) = place.pair("csum=1", "buffers=64");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let mut out = Burst::new(64);
    for number in 0..41 {
        let mut packet = a.packet().unwrap();
        if number != 10 {
            packet.copy_from(&frame(false, true, number)).unwrap();
        }
        if number < 10 {
            packet.set_checksum(Partial {
                start: 60_000,
                offset: 0,
            });
        }
        out.push(packet).unwrap();
    }
    assert_eq!(a.tx(&mut out), 41);
    let mut got = Burst::new(32);
    until("all were looked at", || {
        b.rx(&mut got);
        got.len() as u64 + back.stats().rx_errors + back.stats().rx_runts == 41
    });
    let lens: Vec<usize> = got.iter().map(|packet| packet.len() - 54).collect();
    assert_eq!(lens, (11..41).collect::<Vec<_>>());
    assert_eq!((back.stats().rx_errors, back.stats().rx_runts), (10, 1));
}

#[test]
fn a_filter_keeps_frames_out() {
    let place = Place::new();
    for mrg in [0, 1] {
        let (front, back) = place.pair(&format!("mac=02:00:00:00:00:07,mrg_rxbuf={mrg}"), "");
        let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let to = |mac: [u8; 6]| [&mac[..], &[2; 6], &[8, 0], &[7; 46]].concat();
        let all = [[2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 8], [1, 0, 0x5e, 0, 0, 9], [0xff; 6]];
        let seen = |a: &mut Queue, b: &mut Queue, port: &Port, sender: &Port| {
            // The back-end keeps out what its front-end told it to.
            let filtered = || port.stats().rx_filtered + sender.stats().tx_filtered;
            let (before, filtered_before) = (port.stats(), filtered());
            for mac in all {
                send(b, &to(mac), |_| ());
            }
            let mut burst = Burst::new(8);
            until("all were looked at", || {
                a.rx(&mut burst);
                let now = port.stats();
                now.rx_packets - before.rx_packets + filtered() - filtered_before == 4
            });
            assert_eq!(burst.len() as u64, port.stats().rx_packets - before.rx_packets);
            assert_eq!(60 * burst.len() as u64, port.stats().rx_bytes - before.rx_bytes);
            burst
                .iter()
                .map(|packet| packet.header::<6>().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(seen(&mut a, &mut b, &front, &back), all);
        let mut filter = Filter::new(front.mac());
        filter.set_mode(RxMode::Promiscuous, false);
        front.set_filter(Some(filter.clone())).unwrap();
        assert_eq!(seen(&mut a, &mut b, &front, &back), [all[0], all[3]]);
        filter.set_addresses(&[], &[all[2]]);
        filter.set_mode(RxMode::NoBroadcast, true);
        front.set_filter(Some(filter.clone())).unwrap();
        assert_eq!(seen(&mut a, &mut b, &front, &back), [all[0], all[2]]);
        front.set_filter(None).unwrap();
        assert_eq!(seen(&mut a, &mut b, &front, &back), all);
        // The other side's port has one too.
        back.set_filter(Some(filter)).unwrap();
        assert_eq!(seen(&mut b, &mut a, &back, &front), [all[0], all[2]]);
    }
}

#[test]
fn some_queue_pairs_rest() {
    let place = Place::new();
    let (front, back) = place.pair("queues=4", "queues=4");
    until("all pairs run", || (front.link().queues, back.link().queues) == (4, 4));
    front.set_queues(2).unwrap();
    assert_eq!(front.link().queues, 2);
    until("the back-end knows", || back.link().queues == 2);
    let mut burst = Burst::new(1);
    let mut rests = front.queue(3).unwrap();
    rests.alloc(&mut burst, 1);
    burst[0].copy_from(&frame(false, true, 10)).unwrap();
    assert_eq!(rests.tx(&mut burst), 0);
    let mut runs = front.queue(1).unwrap();
    assert_eq!(runs.tx(&mut burst), 1);
    front.set_queues(4).unwrap();
    until("the back-end knows", || back.link().queues == 4);
    rests.alloc(&mut burst, 1);
    burst[0].copy_from(&frame(false, true, 10)).unwrap();
    assert_eq!(rests.tx(&mut burst), 1);
    for bad in [0, 5] {
        assert!(
            front
                .set_queues(bad)
                .unwrap_err()
                .to_string()
                .contains("number of queue pairs")
        );
    }
    assert!(
        back.set_queues(1)
            .unwrap_err()
            .to_string()
            .contains("front-end decides")
    );
    // It holds for the next back-end.
    front.set_queues(3).unwrap();
    drop(back);
    until("the link goes", || !front.link().up);
    let back = place.open("vhost", "queues=4").unwrap();
    assert!(front.wait_link(LIMIT));
    until("three run", || back.link().queues == 3 && front.link().queues == 3);
}

#[test]
fn mtu_and_announcements_reach_the_back_end() {
    let place = Place::new();
    let (front, back) = place.pair("mtu=1400,mac=02:00:00:00:00:07", "");
    until("the MTU is known", || back.mtu() == 1400);
    assert!(back.take_announcements().is_empty());
    front.announce().unwrap();
    until("it is announced", || back.take_announcements() == [[2, 0, 0, 0, 0, 7]]);
    // And the other way round: this front-end takes the control queue from its back-end.
    back.announce().unwrap();
    drop(back);
    until("the link goes", || !front.link().up);
    assert!(front.announce().unwrap_err().to_string().contains("link is down"));
    std::thread::sleep(Duration::from_millis(1));
}

#[test]
fn an_announced_address_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a");
    let mut switch = Switch::new(SwitchConfig::learning([socket.clone()])).unwrap();
    let spec = format!("virtio-user,path={},mac=02:00:00:00:00:07", socket.display());
    let front = Port::open(&spec).unwrap();
    front.announce().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(400));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        switch.run(&stop).unwrap();
    });
    let learned: Vec<usize> = switch.addresses().into_iter().map(|(_, port, _)| port).collect();
    assert_eq!(learned, [0]);
}
