//! What reaches an application is a frame: no shorter than an Ethernet header, no longer than the port's MTU allows.

mod common;

use std::time::Duration;

use common::{Place, frame_of, until};
use usernic::offload::checksum::Verdict;
use usernic::{Burst, Queue};

/// Sends frames of these lengths, then one that says that no more come; the lengths that arrive before it.
fn arrive(from: &mut Queue, to: &mut Queue, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    const LAST: [u8; 60] = [0xEE; 60];
    let (mut burst, mut got, mut arrived) = (Burst::new(1), Burst::new(8), Vec::new());
    for frame in frames.iter().map(Vec::as_slice).chain([&LAST[..]]) {
        until("a frame can be sent", || {
            if burst.is_empty() {
                let Some(mut packet) = from.packet() else { return false };
                packet.copy_from(frame).unwrap();
                burst.push(packet).unwrap();
            }
            from.tx(&mut burst);
            burst.is_empty()
        });
        to.rx(&mut got);
        arrived.extend(got.drain().map(|packet| packet.into_private()));
    }
    until("the last one has come", || {
        to.rx(&mut got);
        arrived.extend(got.drain().map(|packet| packet.into_private()));
        arrived.last().is_some_and(|frame| frame[..] == LAST)
    });
    arrived.pop();
    arrived
}

fn frames(lengths: &[usize]) -> Vec<Vec<u8>> {
    lengths.iter().map(|&len| frame_of(7, len)).collect()
}

/// A frame with two VLAN tags.
fn double_tagged(len: usize) -> Vec<u8> {
    let mut frame = frame_of(7, len);
    frame[12..20].copy_from_slice(&[0x88, 0xa8, 0, 5, 0x81, 0x00, 0, 6]);
    frame
}

const FRONT_ENDS: [&str; 8] = [
    "packed_vq=0",
    "packed_vq=1",
    "mrg_rxbuf=1",
    "mrg_rxbuf=1,packed_vq=1",
    "csum=1",
    "csum=1,lro=1,tso=1",
    "rss=1,csum=1",
    "mtu=576",
];

#[test]
fn nothing_shorter_than_an_ethernet_header_leaves_a_port() {
    for keys in FRONT_ENDS {
        let place = Place::new();
        let (front, back) = place.pair(keys, "rss=1");
        let (mut f, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let all = frames(&[0, 1, 60, 12, 13, 14, 15, 5, 100]);
        let expected = frames(&[60, 14, 15, 100]);
        assert_eq!(arrive(&mut b, &mut f, &all), expected, "{keys}: to the front-end");
        assert_eq!(arrive(&mut f, &mut b, &all), expected, "{keys}: to the back-end");
        for (stats, side) in [(front.stats(), "front-end"), (back.stats(), "back-end")] {
            assert_eq!(
                (stats.rx_runts, stats.rx_errors, stats.rx_oversize),
                (5, 0, 0),
                "{keys}: {side}"
            );
            assert_eq!(
                (stats.rx_packets, stats.rx_bytes),
                (5, 60 + 14 + 15 + 100 + 60),
                "{keys}: {side}"
            );
        }
    }
}

#[test]
fn nothing_longer_than_the_mtu_leaves_a_back_end() {
    for keys in &FRONT_ENDS[..7] {
        let place = Place::new();
        let (front, back) = place.pair(&format!("{keys},mtu=9000"), "rss=1,mtu=1500");
        let (mut f, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let mut all = frames(&[1514, 1518, 1519, 4000, 60, 9014, 1522]);
        let mut expected = frames(&[1514, 1518, 60]);
        for len in [1522, 1523] {
            all.push(double_tagged(len));
        }
        expected.push(double_tagged(1522));
        assert_eq!(arrive(&mut f, &mut b, &all), expected, "{keys}");
        let stats = back.stats();
        assert_eq!(
            (stats.rx_oversize, stats.rx_errors, stats.rx_runts),
            (5, 0, 0),
            "{keys}"
        );
        assert_eq!(stats.rx_packets, 5, "{keys}");
    }
}

#[test]
fn nothing_longer_than_the_mtu_leaves_a_front_end() {
    for (keys, mtu) in [
        ("packed_vq=0", 1500),
        ("packed_vq=1,buffer_size=16384", 1500),
        ("mrg_rxbuf=1", 1500),
        ("mrg_rxbuf=1,packed_vq=1,buffer_size=1024", 1500),
        ("csum=1,lro=1", 1500),
        ("rss=1,buffer_size=8192", 1500),
        ("packed_vq=0", 576),
        ("mrg_rxbuf=1", 576),
        ("csum=1", 68),
    ] {
        let place = Place::new();
        let (front, back) = place.pair(&format!("{keys},mtu={mtu}"), "rss=1,mtu=9000");
        let (mut f, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let mtu = usize::from(front.mtu());
        let all = frames(&[mtu + 14, mtu + 18, mtu + 23, 4000, 60, 9014]);
        let expected = frames(&[mtu + 14, mtu + 18, 60]);
        assert_eq!(arrive(&mut b, &mut f, &all), expected, "{keys}, {mtu}");
        // Each is in one counter: at the receiver, or, where that has no room for it, at the sender.
        assert_eq!(front.stats().rx_oversize + back.stats().tx_errors, 3, "{keys}, {mtu}");
        assert_eq!(front.stats().rx_errors, 0, "{keys}, {mtu}");
        if keys.contains("mrg_rxbuf") || keys.contains("lro") {
            assert_eq!(front.stats().rx_oversize, 3, "{keys}, {mtu}");
        }
        assert_eq!(
            arrive(&mut b, &mut f, &[double_tagged(mtu + 22)]),
            [double_tagged(mtu + 22)],
            "{keys}, {mtu}"
        );
    }
}

/// A packet that is to be cut, or was joined, is as long as it likes: its pieces are not.
#[test]
fn packets_that_carry_a_segment_size_are_judged_by_their_pieces() {
    let place = Place::new();
    let (front, back) = place.pair("tso=1,lro=1", "mtu=1500");
    let (mut f, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let mut tcp = frame_of(3, 54 + 20_000);
    tcp[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6]);
    tcp[46] = 0x50;
    for turn in 0..2 {
        let (from, to) = if turn == 0 { (&mut f, &mut b) } else { (&mut b, &mut f) };
        let mut burst = Burst::new(2);
        for size in [1460, 1600] {
            let mut packet = from.packet().unwrap();
            packet.copy_from(&tcp).unwrap();
            packet.request_segmentation(size).unwrap();
            burst.push(packet).unwrap();
        }
        assert_eq!(from.tx(&mut burst), 2);
        let mut got = Burst::new(2);
        until("one has come", || {
            to.rx(&mut got);
            to.stats().rx_oversize == 1
        });
        assert_eq!(got.len(), 1);
        assert_eq!((got[0].len(), got[0].segmentation().unwrap().size), (tcp.len(), 1460));
        assert_eq!(got[0].verify_checksum(), Verdict::Right);
    }
}

/// A limit that no clock can add is none.
#[test]
fn waits_without_an_end_do_not_overflow() {
    let place = Place::new();
    let (front, _back) = place.pair("", "");
    assert!(front.wait_link(Duration::MAX));
    let mut queue = front.queue(0).unwrap();
    assert!(queue.drain(Duration::MAX));
    assert!(!queue.wait(Some(Duration::ZERO)).unwrap());
    assert!(format!("{front:?} {queue:?}").contains("virtio-user"));
}
