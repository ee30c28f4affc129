//! Ports on virtual functions, against the model: what is sent by one arrives at the other, byte for byte and as asked.

mod vf_machine;

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pcap_file::pcap::PcapReader;
use usernic::offload::checksum::Verdict;
use usernic::{Burst, Checksum};
use vf_machine::{LIMIT, Machine, checksums_are_right, flush, frame, ipv4, receive, receive_with, send};
use vf_model::{Kind, Registers as _, Settings, Speed};

/// The frames of the demo's capture, readdressed.
fn capture(to: [u8; 6], from: [u8; 6]) -> Vec<Vec<u8>> {
    let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/data/demo.pcap")).unwrap();
    let mut reader = PcapReader::new(file).unwrap();
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet() {
        let mut frame = packet.unwrap().data.into_owned();
        // The device pads what is shorter.
        frame.resize(frame.len().max(60), 0);
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        if frame.len() <= 1514 && frame[12..14] != [0x81, 0] {
            frames.push(frame);
        }
    }
    assert!(frames.len() > 100, "{}", frames.len());
    frames
}

#[test]
fn a_capture_passes_both_ways_byte_for_byte() {
    for kind in Kind::ALL {
        let machine = Machine::new(Settings {
            kind,
            vfs: 2,
            hold: true,
            ..Settings::default()
        });
        let (a, b) = (machine.port(0, ""), machine.port(1, ",queue_size=64"));
        assert_eq!(
            (machine.maps(0), machine.maps(1)),
            (1, 1),
            "one mapping for rings and buffers"
        );
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let frames = capture(b.mac(), a.mac());
        for chunk in frames.chunks(200) {
            send(&mut qa, chunk);
            assert_eq!(receive(&mut qb, chunk.len()), chunk);
        }
        let frames = capture(a.mac(), b.mac());
        for chunk in frames.chunks(200) {
            send(&mut qb, chunk);
            assert_eq!(receive(&mut qa, chunk.len()), chunk);
        }
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let (stats, device) = (a.stats(), a.device_stats().unwrap());
        assert_eq!((stats.rx_packets, stats.rx_bytes), (frames.len() as u64, bytes as u64));
        assert_eq!(
            (device.rx_packets, device.tx_packets),
            (stats.rx_packets, stats.tx_packets)
        );
        assert_eq!((stats.rx_errors, stats.tx_errors, stats.anomalies), (0, 0, 0));
        assert!(qa.drain(LIMIT) && qb.drain(LIMIT));
        drop((qa, qb, a, b));
        machine.finish();
    }
}

/// What the registers of four pairs say: the rings lie in 2 MiB, of one mapping of the IOMMU that holds the buffers too.
#[test]
fn the_rings_of_four_pairs_of_512_fit_into_2_mib_of_one_mapping() {
    const PAIRS: u32 = 4;
    let machine = Machine::new(Settings {
        queues: PAIRS as usize,
        ..Settings::default()
    });
    let port = machine.port(0, ",queues=4,queue_size=512");
    assert_eq!(machine.maps(0), 1, "one mapping for the whole port");
    // VFRDBAL, VFRDBAH and VFRDLEN of the queues, and VFTDBAL and so on.
    let vf = machine.device.vf(0);
    let mut rings: Vec<(u64, u64)> = Vec::new();
    for queue in 0..PAIRS {
        for base in [0x1000, 0x2000] {
            let word = |offset| u64::from(vf.read32(base + 0x40 * queue + offset));
            assert_eq!(word(8), 512 * 16, "bytes of a ring");
            rings.push((word(0) | word(4) << 32, word(8)));
        }
    }
    rings.sort_unstable();
    for pair in rings.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "rings overlap: {rings:x?}");
    }
    let (first, last) = (rings[0], rings[rings.len() - 1]);
    let span = last.0 + last.1 - first.0;
    assert!(span <= 2 << 20, "the rings take {span} bytes");
    // None of it is waste: 8 rings of 8 KiB are 64 KiB.
    assert_eq!(span, 64 << 10);
    assert_eq!(
        machine.device.with(|nic| nic.dma(0).len()),
        1,
        "one window of the device's"
    );
    drop(port);
    machine.finish();
}

#[test]
fn every_length_and_jumbo_in_several_buffers() {
    // An 82599 takes long frames only where the PF does.
    let machine = Machine::two();
    machine.device.with(|nic| nic.pf().mtu = 9710);
    for keys in [
        ",mtu=9710",
        ",mtu=9710,buffer_size=1024",
        ",mtu=9710,buffer_size=16384,queue_size=64",
    ] {
        let (a, b) = (machine.port(0, keys), machine.port(1, keys));
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let lengths = [60, 61, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4097, 8999, 9014, 9724];
        let frames: Vec<_> = (0..200)
            .map(|i| frame(b.mac(), a.mac(), lengths[i % lengths.len()], i))
            .collect();
        for chunk in frames.chunks(16) {
            send(&mut qa, chunk);
            let got = receive(&mut qb, chunk.len());
            assert!(
                got == chunk,
                "{keys}: {:?}",
                got.iter().map(Vec::len).collect::<Vec<_>>()
            );
        }
        // One byte more fits nowhere: it leaves the burst, counted.
        let mut burst = Burst::new(4);
        qa.alloc(&mut burst, 2);
        burst[0].copy_from(&frame(b.mac(), a.mac(), 9729, 0)).unwrap();
        burst[1].copy_from(&[1; 16]).unwrap();
        flush(&mut qa, &mut burst);
        assert_eq!(a.stats().tx_errors, 2);
        assert_eq!(b.stats().rx_errors, 0);
    }
    machine.finish();
}

#[test]
fn a_pf_without_long_frames_says_what_to_do() {
    let machine = Machine::two();
    let error = machine.try_port(0, ",mtu=9000").map(drop).unwrap_err().to_string();
    assert!(error.contains("ip link set PF mtu"), "{error}");
    let port = machine.port(0, "");
    assert!(port.set_mtu(9000).is_err());
    assert_eq!(port.mtu(), 1500);
    machine.device.with(|nic| nic.pf().mtu = 9000);
    port.set_mtu(9000).unwrap();
    assert_eq!(port.mtu(), 9000);
    assert!(port.set_mtu(9711).is_err());
    drop(port);
    machine.finish();
}

#[test]
fn checksums_are_made_and_their_state_is_told() {
    let machine = Machine::two();
    for keys in ["", ",csum=0,tso=0"] {
        let (a, b) = (machine.port(0, keys), machine.port(1, ""));
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let before = machine.device.with(|nic| nic.offloads(0).checksums);
        let mut burst = Burst::new(32);
        qa.alloc(&mut burst, 20);
        let mut sent = Vec::new();
        for (i, packet) in burst.iter_mut().enumerate() {
            let right = ipv4(b.mac(), a.mac(), i % 2 == 0, (1000, 2000), &vec![i as u8; 100 + 60 * i]);
            let mut wrong = right.clone();
            let field = 34 + if i % 2 == 0 { 16 } else { 6 };
            wrong[24..26].fill(0x55);
            wrong[field..field + 2].fill(0xaa);
            packet.copy_from(&wrong).unwrap();
            packet.request_checksum().unwrap();
            sent.push(right);
        }
        flush(&mut qa, &mut burst);
        let got = receive_with(&mut qb, 20, |packet| {
            assert_eq!(packet.checksum(), Checksum::Right);
            packet.into_private()
        });
        assert_eq!(got, sent);
        let made = machine.device.with(|nic| nic.offloads(0).checksums) - before;
        assert_eq!(made, if keys.is_empty() { 20 } else { 0 }, "{keys:?}");

        // What is wrong comes all the same, and is not told to be right; of what is not IP nothing is known.
        let mut wrong = ipv4(b.mac(), a.mac(), true, (1, 2), &[7; 100]);
        wrong[50] ^= 1;
        send(&mut qa, &[wrong.clone(), frame(b.mac(), a.mac(), 100, 0)]);
        let got = receive_with(&mut qb, 2, |packet| packet);
        assert_eq!([got[0].checksum(), got[1].checksum()], [Checksum::Unknown; 2]);
        assert_eq!(got[0].verify_checksum(), Verdict::Wrong);
        drop(got);
    }
    machine.finish();
}

#[test]
fn tcp_is_cut_by_the_device() {
    let machine = Machine::two();
    let payload: Vec<u8> = (0..60_000u32).map(|i| ((i * 31) >> 3) as u8).collect();
    for keys in ["", ",tso=0", ",buffer_size=16384,queue_size=64"] {
        let (a, b) = (machine.port(0, keys), machine.port(1, ""));
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let before = machine.device.with(|nic| nic.offloads(0).segmented);
        let count = payload.len().div_ceil(1448);
        for tag in [None, Some(0x2005)] {
            let mut burst = Burst::new(1);
            qa.alloc(&mut burst, 1);
            burst[0]
                .copy_from(&ipv4(b.mac(), a.mac(), true, (1000, 2000), &payload))
                .unwrap();
            burst[0].request_segmentation(1448).unwrap();
            if let Some(tag) = tag {
                machine.device.with(|nic| nic.policy(0).spoof_check = false);
                joins(&b, tag & 0xfff);
                burst[0].set_vlan_tag(Some(tag));
            }
            flush(&mut qa, &mut burst);
            let mut joined: Vec<u8> = Vec::new();
            for (i, mut got) in receive(&mut qb, count).into_iter().enumerate() {
                if let Some(tag) = tag {
                    let inserted: Vec<u8> = got.drain(12..16).collect();
                    assert_eq!(inserted, [&[0x81, 0][..], &tag.to_be_bytes()].concat());
                }
                assert!(checksums_are_right(&got), "{keys}: frame {i}");
                let sequence = u32::from_be_bytes(got[38..42].try_into().unwrap());
                assert_eq!(sequence, 1 + joined.len() as u32);
                assert_eq!(got[47] & 8 != 0, i + 1 == count, "PSH is the last one's");
                joined.extend(&got[54..]);
            }
            assert!(joined == payload, "{keys}");
        }
        let cut = machine.device.with(|nic| nic.offloads(0).segmented) - before;
        assert_eq!(cut, if keys == ",tso=0" { 0 } else { 2 }, "{keys:?}");
        let mut filter = usernic::filter::Filter::new(b.mac());
        filter.set_mode(virtio_ring::net::RxMode::Promiscuous, false);
        b.set_filter(Some(filter)).unwrap();
    }
    machine.finish();
}

/// Has a port receive a VLAN besides frames without a tag.
fn joins(port: &usernic::Port, id: u16) {
    let mut filter = usernic::filter::Filter::new(port.mac());
    filter.set_mode(virtio_ring::net::RxMode::Promiscuous, false);
    filter.set_vlan(id, true);
    port.set_filter(Some(filter)).unwrap();
}

#[test]
fn tags_are_inserted_stripped_and_filtered() {
    let machine = Machine::two();
    machine.device.with(|nic| nic.policy(0).spoof_check = false);
    let a = machine.port(0, "");
    for (keys, strip) in [(",vlan=100+4095", false), (",vlan=100+4095,vlan_strip=1", true)] {
        let b = machine.port(1, keys);
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let mut burst = Burst::new(4);
        qa.alloc(&mut burst, 4);
        let plain = frame(b.mac(), a.mac(), 200, 1);
        for (packet, tag) in burst.iter_mut().zip([None, Some(100), Some(101), Some(0xffff)]) {
            packet.copy_from(&plain).unwrap();
            packet.set_vlan_tag(tag);
        }
        flush(&mut qa, &mut burst);
        // VLAN 101 is not for this port.
        let got = receive_with(&mut qb, 3, |packet| (packet.vlan_tag(), packet.into_private()));
        let tagged = |tag: u16| [&plain[..12], &[0x81, 0], &tag.to_be_bytes(), &plain[12..]].concat();
        if strip {
            assert_eq!(got, [None, Some(100), Some(0xffff)].map(|tag| (tag, plain.clone())));
        } else {
            assert_eq!(got[0], (None, plain.clone()));
            assert_eq!(got[1], (None, tagged(100)));
            assert_eq!(got[2], (None, tagged(0xffff)));
        }
        // A stripped tag goes with the packet, and is put in again.
        if strip {
            let mut burst = Burst::new(1);
            qa.alloc(&mut burst, 1);
            burst[0].copy_from(&frame(b.mac(), a.mac(), 60, 2)).unwrap();
            burst[0].set_vlan_tag(Some(100));
            flush(&mut qa, &mut burst);
            let mut back = receive_with(&mut qb, 1, |packet| packet);
            back[0].write_at(0, &a.mac()).unwrap();
            back[0].write_at(6, &b.mac()).unwrap();
            let mut burst = Burst::new(1);
            burst.push(back.remove(0)).unwrap();
            flush(&mut qb, &mut burst);
            assert!(qb.drain(LIMIT));
        }
    }
    assert_eq!(machine.device.with(|nic| nic.offloads(1).tagged), 1);
    drop(a);
    machine.finish();
}

#[test]
fn frames_spread_over_queues_with_their_hash() {
    for kind in Kind::ALL {
        let machine = Machine::new(Settings {
            kind,
            vfs: 2,
            queues: 4,
            hold: true,
            ..Settings::default()
        });
        let (a, b) = (machine.port(0, ",queues=4"), machine.port(1, ",queues=4"));
        let mut qa = a.queue(3).unwrap();
        let frames: Vec<_> = (0..256u16)
            .map(|i| ipv4(b.mac(), a.mac(), true, (1000 + i, 2000), &[i as u8; 40]))
            .collect();
        send(&mut qa, &frames);
        vf_machine::until("all arrive", || {
            machine.device.with(|nic| nic.counters(1).packets_rx) == frames.len() as u32
        });
        let mut all = Vec::new();
        for index in 0..4 {
            let mut queue = b.queue(index).unwrap();
            let mut burst = Burst::new(256);
            while queue.rx(&mut burst) > 0 {}
            assert!(burst.len() > 20, "{kind}: queue {index} got {} of 256", burst.len());
            let mut hashes: Vec<_> = burst.iter().map(|packet| packet.received_hash().unwrap().0).collect();
            hashes.sort_unstable();
            hashes.dedup();
            assert!(hashes.len() > 10, "{kind}: {hashes:?}");
            all.extend(burst.drain().map(usernic::Packet::into_private));
        }
        all.sort();
        let mut sent = frames.clone();
        sent.sort();
        assert!(all == sent);
        drop((qa, a, b));
        machine.finish();
    }
}

#[test]
fn an_interrupt_wakes_a_wait() {
    let machine = Machine::new(Settings {
        vfs: 2,
        queues: 4,
        hold: true,
        ..Settings::default()
    });
    let (a, b) = (machine.port(0, ""), machine.port(1, ",queues=4,moderation=500"));
    let mut qa = a.queue(0).unwrap();
    let mut queues: Vec<_> = (0..4).map(|i| b.queue(i).unwrap()).collect();
    assert!(
        !queues[0].wait(Some(Duration::from_millis(1))).unwrap(),
        "nothing there"
    );
    for round in 0..20u16 {
        let frame = ipv4(b.mac(), a.mac(), false, (1, 2), &round.to_be_bytes());
        let mut padded = frame.clone();
        padded.resize(60, 0);
        let done = AtomicBool::new(false);
        let woken = std::thread::scope(|scope| {
            let done = &done;
            let waiting: Vec<_> = queues
                .iter_mut()
                .map(|queue| {
                    scope.spawn(move || {
                        let mut burst = Burst::new(4);
                        // Queues share vectors: a wait may end early for another one's frame. None ends by its limit.
                        while !done.load(Ordering::SeqCst) {
                            let start = Instant::now();
                            queue.wait(Some(LIMIT)).unwrap();
                            assert!(start.elapsed() < LIMIT, "nobody woke queue {}", queue.index());
                            if queue.rx(&mut burst) > 0 {
                                done.store(true, Ordering::SeqCst);
                            }
                        }
                        burst.drain().map(usernic::Packet::into_private).collect::<Vec<_>>()
                    })
                })
                .collect();
            if round % 2 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            send(&mut qa, &[frame]);
            vf_machine::until("somebody is woken", || done.load(Ordering::SeqCst));
            // The others are woken by the link.
            machine.device.with(|nic| nic.set_link(None));
            vf_machine::until("the link goes down", || !b.link().up);
            machine.device.with(|nic| nic.set_link(Some(Speed::G10)));
            assert!(a.wait_link(LIMIT) && b.wait_link(LIMIT));
            waiting.into_iter().flat_map(|w| w.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(woken, [padded], "round {round}");
    }
    // Nobody is told who does not wait.
    let before = machine.device.with(|nic| nic.interrupts_sent(1));
    for round in 0..4 {
        send(&mut qa, &[frame(b.mac(), a.mac(), 100, round)]);
        receive(&mut queues[0], 1);
    }
    let after = machine.device.with(|nic| nic.interrupts_sent(1));
    assert!(after[1] <= before[1] + 1, "{before:?} {after:?}");
    drop((qa, queues, a, b));
    machine.finish();
}
