//! The network device of a `vhost` port as a front-end of ours sees it: configuration space, control queue, link; and
//! devices and drivers that are wrong or hostile.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{LIMIT, Place, alone, both_ways, frame_of, until};
use raw::{GUEST, Raw, USER, encode, event, memfd, state, words};
use usernic::filter::Filter;
use usernic::offload::hash::{KEY, Toeplitz};
use usernic::{Burst, Checksum, Port, Queue};
use virtio_ring::net::{HashReport, HashTypes, RxMode};

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

const CTRL_VQ: u64 = 1 << 17;
const VERSION_1: u64 = 1 << 32;
const F_PROTOCOL: u64 = 1 << 30;

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1400) as usize)
}

fn send(queue: &mut Queue, to: [u8; 6], vlan: Option<u16>) {
    let mut frame = [&to[..], &OTHER].concat();
    if let Some(id) = vlan {
        frame.extend([0x81, 0]);
        frame.extend(id.to_be_bytes());
    }
    frame.resize(60, 8);
    let mut packet = queue.packet().unwrap();
    packet.copy_from(&frame).unwrap();
    let mut burst = Burst::new(1);
    assert!(burst.push(packet).is_ok());
    assert_eq!(queue.tx(&mut burst), 1);
}

fn receive(queue: &mut Queue) -> usize {
    let mut burst = Burst::new(32);
    queue.rx(&mut burst)
}

/// A front-end and a back-end that are joined by a control queue.
fn joined(place: &Place, front: &str, back: &str) -> (Port, Port) {
    let (front, back) = place.pair(front, back);
    assert_ne!(front.link().features & CTRL_VQ, 0);
    (front, back)
}

#[test]
fn the_filter_is_the_device_s() {
    let _alone = alone();
    for packed in ["packed_vq=0", "packed_vq=1"] {
        let place = Place::new();
        let (front, back) = joined(&place, &format!("mac=02:00:00:00:00:01,{packed}"), "");
        let (mut to, mut from) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let mut filter = Filter::new(OWN);
        filter.set_mode(RxMode::Promiscuous, false);
        front.set_filter(Some(filter.clone())).unwrap();
        send(&mut from, OTHER, None);
        send(&mut from, OWN, None);
        assert_eq!(receive(&mut to), 1);
        assert_eq!((back.stats().tx_filtered, front.stats().rx_filtered), (1, 0));
        // VLANs are looked at by the queue.
        filter.set_vlan(7, true);
        front.set_filter(Some(filter)).unwrap();
        for (address, vlan) in [(OWN, 7), (OWN, 8), (OTHER, 7)] {
            send(&mut from, address, Some(vlan));
        }
        assert_eq!(receive(&mut to), 1);
        assert_eq!((back.stats().tx_filtered, front.stats().rx_filtered), (2, 1));
        front.set_filter(None).unwrap();
        send(&mut from, OTHER, Some(8));
        assert_eq!(receive(&mut to), 1);
        drop((to, from));
        both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 100, short);
    }
}

#[test]
fn a_filter_outlives_the_back_end() {
    let _alone = alone();
    let place = Place::new();
    let (front, back) = joined(&place, "mac=02:00:00:00:00:01", "");
    let mut filter = Filter::new(OWN);
    filter.set_mode(RxMode::Promiscuous, false);
    front.set_filter(Some(filter)).unwrap();
    drop(back);
    until("the link goes down", || !front.link().up);
    let back = place.open("vhost", "").unwrap();
    until("the link comes up", || front.link().up && back.link().up);
    let (mut to, mut from) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    send(&mut from, OTHER, None);
    send(&mut from, OWN, None);
    assert_eq!(receive(&mut to), 1);
    assert_eq!(back.stats().tx_filtered, 1);
}

#[test]
fn queue_pairs_by_the_control_queue() {
    let _alone = alone();
    let place = Place::new();
    // The control queue lies behind all pairs that the back-end has.
    let (front, back) = joined(&place, "queues=2", "queues=4");
    until("both pairs", || back.link().queues == 2);
    for count in [1, 2] {
        front.set_queues(count).unwrap();
        until("the number is told", || {
            (front.link().queues, back.link().queues) == (count, count)
        });
        for index in 0..count {
            both_ways(
                &mut front.queue(index).unwrap(),
                &mut back.queue(index).unwrap(),
                50,
                short,
            );
        }
    }
}

#[test]
fn link_and_speed_by_the_configuration_space() {
    let _alone = alone();
    let place = Place::new();
    let (front, back) = joined(&place, "", "speed=25000");
    assert_eq!(front.link().speed, 25000);
    for _ in 0..3 {
        back.set_link_up(false).unwrap();
        until("the link is down", || !front.link().up && !back.link().up);
        let mut queue = front.queue(0).unwrap();
        let mut burst = Burst::new(1);
        queue.alloc(&mut burst, 1);
        burst[0].copy_from(&[0; 60]).unwrap();
        assert_eq!(queue.tx(&mut burst), 0);
        drop(queue);
        back.set_link_up(true).unwrap();
        until("the link is up", || front.link().up && back.link().up);
        both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 50, short);
    }
    assert!(front.set_link_up(false).is_err());
    // Also for who comes later.
    back.set_link_up(false).unwrap();
    drop(front);
    let front = place.open("virtio-user", "").unwrap();
    assert!(!front.link().up);
    back.set_link_up(true).unwrap();
    assert!(front.wait_link(LIMIT) && back.wait_link(LIMIT));
}

/// virtio 1.3, 5.1.6.5.4: asked by the status bit, the driver sends a gratuitous packet and acknowledges.
#[test]
fn a_port_announces_itself_when_it_is_asked() {
    let _alone = alone();
    for packed in ["packed_vq=0", "packed_vq=1"] {
        let place = Place::new();
        let (front, back) = joined(&place, &format!("{packed},mac=02:00:00:00:00:01"), "");
        let (mut ours, mut queue) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let mut burst = Burst::new(4);
        // More than once: the acknowledgement took the bit away.
        for _ in 0..3 {
            back.announce().unwrap();
            until("an announcement", || queue.rx(&mut burst) > 0);
            let mut frame = [0; 60];
            assert_eq!((burst.len(), burst[0].copy_to(&mut frame)), (1, 60));
            let head = [&[0xff; 6][..], &OWN, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], &OWN].concat();
            assert_eq!(frame[..28], head);
            assert_eq!(
                (&frame[28..32], &frame[32..38], &frame[38..42]),
                (&[0; 4][..], &OWN[..], &[0; 4][..])
            );
            burst.clear();
        }
        // Nothing more comes by itself.
        both_ways(&mut ours, &mut queue, 50, short);
    }
}

/// A UDP packet from this port, of so many bytes.
fn datagram(port: u16, len: usize) -> Vec<u8> {
    let mut frame = [&OWN[..], &OTHER, &[8, 0, 0x45, 0]].concat();
    frame.extend((len as u16 - 14).to_be_bytes());
    frame.extend([0, 0, 0, 0, 9, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 7]);
    frame.extend((len as u16 - 34).to_be_bytes());
    frame.resize(len, 5);
    frame
}

#[test]
fn hashes_are_reported_and_frames_spread() {
    let _alone = alone();
    let software = Toeplitz::new(&KEY);
    for (queues, packed) in [(1, 0), (1, 1), (4, 0), (4, 1)] {
        let place = Place::new();
        let keys = format!("queues={queues},rss=1,mtu=9000");
        let (front, back) = joined(&place, &format!("{keys},packed_vq={packed}"), &keys);
        let (hash_report, rss) = (1 << 57, 1 << 60);
        let wanted = if queues > 1 { hash_report | rss } else { hash_report };
        assert_eq!(front.link().features & (hash_report | rss), wanted);
        let mut to: Vec<Queue> = (0..queues).map(|index| front.queue(index).unwrap()).collect();
        let mut from: Vec<Queue> = (0..queues).map(|index| back.queue(index).unwrap()).collect();
        let (mut sent, mut got) = (Burst::new(1), Burst::new(4));
        let mut used = vec![0; queues.into()];
        assert_eq!(back.steering().is_some(), queues > 1);
        for port in 0..200 {
            // Of one buffer, and of several.
            let frame = datagram(port, [60, 1514, 5000][usize::from(port) % 3]);
            let mut packet = from[0].packet().unwrap();
            packet.copy_from(&frame).unwrap();
            let index = back
                .steering()
                .map_or(0, |steering| usize::from(steering.pair(&packet)));
            used[index] += 1;
            assert!(sent.push(packet).is_ok());
            assert_eq!(from[index].tx(&mut sent), 1);
            assert_eq!(to[index].rx(&mut got), 1, "port {port}");
            let packet = got.pop().unwrap();
            let mut bytes = vec![0; packet.len()];
            packet.copy_to(&mut bytes);
            assert!(bytes == frame, "port {port}");
            let expected = packet.hash(&software, HashTypes::all());
            assert_eq!(packet.received_hash(), Some(expected));
            assert_eq!(
                (expected.1, usize::from(queues > 1) * expected.0 as usize % 4),
                (HashReport::UDPV4, index)
            );
        }
        assert!(used.iter().all(|count| *count > 20), "{used:?}");
        // No IP: no hash, the first queue.
        send(&mut from[0], OWN, None);
        assert_eq!(to[0].rx(&mut got), 1);
        assert_eq!(got.pop().unwrap().received_hash(), None);
        drop((to, from));
        for index in 0..queues {
            both_ways(
                &mut front.queue(index).unwrap(),
                &mut back.queue(index).unwrap(),
                200,
                common::frame,
            );
        }
    }
}

#[test]
fn long_headers_carry_offloads() {
    let _alone = alone();
    let place = Place::new();
    let (front, back) = joined(&place, "rss=1,csum=1", "rss=1");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    for there in [true, false] {
        let (from, to) = if there { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let mut packet = from.packet().unwrap();
        packet.copy_from(&datagram(7, 200)).unwrap();
        packet.request_checksum().unwrap();
        let mut burst = Burst::new(1);
        assert!(burst.push(packet).is_ok());
        assert_eq!(from.tx(&mut burst), 1);
        assert_eq!(to.rx(&mut burst), 1);
        assert!(matches!(burst[0].checksum(), Checksum::Open(_)));
        assert!(burst[0].complete_checksum());
        assert_eq!(burst[0].received_hash().is_some(), !there);
    }
}

/// A back-end with a control queue, which gives this configuration space and never looks at its rings: the error of
/// opening a port on it, if any.
fn silent(pairs: u16, config: impl Fn(u32) -> Option<Vec<u8>> + Sync) -> Option<String> {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let raw = Raw::new(listener.accept().unwrap().0);
            while let Some(message) = raw.read() {
                let word = match message.code {
                    1 => VERSION_1 | F_PROTOCOL | CTRL_VQ | 1 << 23 | 1 << 22 | 1 << 16,
                    15 => 1 | 1 << 3 | 1 << 9,
                    17 => 2,
                    11 => message.word() & 0xffff_ffff,
                    24 => {
                        let size = u32::from_le_bytes(*message.payload[4..].first_chunk().unwrap());
                        if let Some(payload) = config(size) {
                            raw.send(&encode(24, 5, &payload), &[]);
                        }
                        continue;
                    }
                    _ if message.needs_reply() => 0,
                    _ => continue,
                };
                raw.reply(message.code, &words(&[word]));
            }
        });
        let begin = Instant::now();
        let result = place.open("virtio-user", &format!("timeout=200,reconnect=0,queues={pairs}"));
        assert!(
            begin.elapsed() < Duration::from_secs(2),
            "it took {:?}",
            begin.elapsed()
        );
        let error = result.err().map(|e| e.to_string());
        served.join().unwrap();
        error
    })
}

/// An answer to GET_CONFIG with these bytes.
fn space(size: u32, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut payload = [0, size, 0].map(u32::to_le_bytes).concat();
    payload.extend(bytes);
    Some(payload)
}

#[test]
fn devices_that_are_wrong() {
    let _alone = alone();
    let config = |pairs: u16| [&OWN[..], &[1, 0], &pairs.to_le_bytes()].concat();
    // Nobody answers on the control queue.
    let error = silent(1, |size| space(size, &config(1))).unwrap();
    assert!(error.contains("no answer to a command of the control queue"), "{error}");
    let error = silent(2, |size| space(size, &config(2))).unwrap();
    assert!(error.contains("no answer to a command of the control queue"), "{error}");
    // A control queue that cannot be, or no configuration space: none is used.
    for pairs in [0, 1, 128, 0x8000, 0xffff] {
        assert_eq!(silent(2, |size| space(size, &config(pairs))), None, "{pairs} pairs");
    }
    assert_eq!(silent(1, |_| Some(Vec::new())), None);
    for wrong in [
        space(10, &config(1)[..9]),
        space(11, &config(1)),
        space(10, &[0; 11]),
        Some(vec![0; 5]),
        Some(words(&[1])),
    ] {
        let error = silent(1, |_| wrong.clone()).unwrap();
        assert!(error.contains("GET_CONFIG"), "{error}");
    }
    let error = silent(1, |_| None).unwrap();
    assert!(error.contains("no answer to GET_CONFIG"), "{error}");
}

/// A command of a driver: its descriptors, as (address, length, flags, next), and its bytes.
type Chain = (&'static [(u64, u32, u16, u16)], &'static [u8]);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Where a command's bytes are, and where its answer.
const COMMAND: u64 = 0x4_0000;
const ANSWER: u64 = 0x5_0000;

/// A driver that makes these chains available on its control queue: the answers.
fn commands(chains: &[Chain]) -> Vec<u8> {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let put = |at: u64, bytes: &[u8]| assert_eq!(rustix::io::pwrite(&file, bytes, at).unwrap(), bytes.len());
    let (kick, call) = (event(), event());
    let features = VERSION_1 | F_PROTOCOL | CTRL_VQ | 1 << 18 | 1 << 23;
    assert!(raw.request(3, 0, &[], &[]) && raw.request(16, 0, &words(&[1 | 8]), &[]));
    assert!(raw.request(2, 0, &words(&[features]), &[]));
    let table = words(&[1, GUEST, 0x10_0000, USER, 0]);
    assert!(raw.request(5, 0, &table, &[file.as_fd()]));
    // Ring 2, of 16 descriptors.
    assert!(raw.request(8, 0, &state(2, 16), &[]) && raw.request(10, 0, &state(2, 0), &[]));
    assert!(raw.request(9, 0, &words(&[2, USER, USER + 0x2000, USER + 0x1000, 0]), &[]));
    assert!(raw.request(13, 0, &words(&[2]), &[call.as_fd()]) && raw.request(12, 0, &words(&[2]), &[kick.as_fd()]));
    assert!(raw.request(18, 0, &state(2, 1), &[]));
    let mut answers = Vec::new();
    for (turn, (chain, bytes)) in (1u16..).zip(chains) {
        put(COMMAND, bytes);
        put(ANSWER, &[0xaa]);
        for (at, (addr, len, flags, next)) in (0..).zip(*chain) {
            let mut desc = words(&[GUEST.wrapping_add(*addr)]);
            desc.extend(len.to_le_bytes());
            desc.extend([flags.to_le_bytes(), next.to_le_bytes()].concat());
            put(16 * at, &desc);
        }
        put(0x1000 + 4 + 2 * u64::from((turn - 1) % 16), &[0, 0]);
        put(0x1000 + 2, &turn.to_le_bytes());
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        let mut used = [0; 2];
        until("the command is used", || {
            rustix::io::pread(&file, &mut used, 0x2000 + 2).unwrap();
            u16::from_le_bytes(used) == turn
        });
        let mut answer = [0];
        rustix::io::pread(&file, &mut answer, ANSWER).unwrap();
        answers.push(answer[0]);
    }
    drop(raw);
    until("the front-end is gone", || !back.link().up);
    let front = place.open("virtio-user", "").unwrap();
    assert!(back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 50, short);
    answers
}

#[test]
fn drivers_that_are_wrong() {
    let _alone = alone();
    let plain: &[_] = &[(COMMAND, 3, NEXT, 1), (ANSWER, 1, WRITE, 0)];
    let answers = commands(&[
        // Promiscuous mode on: as it should be.
        (plain, &[0, 0, 1]),
        // Class, command and data in a descriptor each.
        (
            &[
                (COMMAND, 1, NEXT, 1),
                (COMMAND + 1, 1, NEXT, 2),
                (COMMAND + 2, 1, NEXT, 3),
                (ANSWER, 1, WRITE, 0),
            ],
            &[0, 0, 1],
        ),
        // No such mode, no such class, a command that is not negotiated, too short, nothing at all.
        (plain, &[0, 9, 1]),
        (plain, &[77, 0, 1]),
        (plain, &[2, 0, 1]),
        (&[(COMMAND, 1, NEXT, 1), (ANSWER, 1, WRITE, 0)], &[0]),
        (&[(ANSWER, 1, WRITE, 0)], &[]),
        // No place for an answer; an answer of no byte; a command outside the memory; a chain without end.
        (&[(COMMAND, 3, 0, 0)], &[0, 0, 1]),
        (&[(COMMAND, 3, NEXT, 1), (ANSWER, 0, WRITE, 0)], &[0, 0, 1]),
        (&[(0x10_0000, 3, NEXT, 1), (ANSWER, 1, WRITE, 0)], &[0, 0, 1]),
        (&[(COMMAND, 3, NEXT, 0)], &[0, 0, 1]),
        // More bytes than a command has.
        (&[(COMMAND, 0x1_0001, NEXT, 1), (ANSWER, 1, WRITE, 0)], &[0, 0, 1]),
        // Still served.
        (plain, &[0, 0, 0]),
    ]);
    const OK: u8 = 0;
    const ERR: u8 = 1;
    const NONE: u8 = 0xaa;
    assert_eq!(
        answers,
        [OK, OK, ERR, ERR, ERR, ERR, ERR, NONE, NONE, NONE, NONE, ERR, OK]
    );
}

#[test]
fn a_back_end_knows_the_mtu_of_its_front_end() {
    let place = Place::new();
    let back = place.open("vhost", "mtu=9000").unwrap();
    assert_eq!(back.mtu(), 9000);
    let front = place.open("virtio-user", "mtu=1400").unwrap();
    assert!(front.wait_link(LIMIT) && back.wait_link(LIMIT));
    until("the back-end is told", || back.mtu() == 1400);
}
