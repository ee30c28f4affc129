//! Packets are sent on any port, whichever port they are of.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{LIMIT, Place, frame_of, until};
use usernic::offload::checksum::Verdict;
use usernic::switch::{Role, Switch, SwitchConfig};
use usernic::{Burst, Checksum, Port, Queue};

fn fill(queue: &mut Queue, frames: &[Vec<u8>]) -> Burst {
    let mut burst = Burst::new(frames.len());
    for frame in frames {
        let mut packet = queue.packet().unwrap();
        packet.copy_from(frame).unwrap();
        assert!(burst.push(packet).is_ok());
    }
    burst
}

/// What `from` sends, `at` receives: all of it, in order.
fn receive(at: &mut Queue, count: usize) -> Vec<Vec<u8>> {
    let mut got = Burst::new(count);
    until("the frames have come", || {
        at.rx(&mut got);
        got.len() == count
    });
    got.drain().map(|packet| packet.into_private()).collect()
}

fn frames(lengths: &[usize]) -> Vec<Vec<u8>> {
    let numbered = lengths.iter().zip(0..);
    numbered.map(|(&len, n)| frame_of(n, len)).collect()
}

/// The smallest forwarder: what is received on one port is sent on another.
#[test]
fn what_one_front_end_received_another_one_sends() {
    for keys in ["packed_vq=0,mtu=9000", "packed_vq=1,mtu=9000"] {
        let (left, right) = (Place::new(), Place::new());
        let (a, host_a) = left.pair(keys, "mtu=9000");
        let (b, host_b) = right.pair(keys, "mtu=9000");
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let (mut ha, mut hb) = (host_a.queue(0).unwrap(), host_b.queue(0).unwrap());
        let frames = frames(&[60, 1514, 2048, 2049, 9000, 60, 61, 4096, 62]);
        let mut burst = fill(&mut ha, &frames);
        assert_eq!(ha.tx(&mut burst), frames.len());
        let mut got = Burst::new(32);
        until("the frames have come", || {
            qa.rx(&mut got);
            got.len() == frames.len()
        });
        // One of its own among those of the other port.
        let mut own = fill(&mut qb, &[frame_of(99, 100)]);
        got.swap(3, 4);
        got.push(own.pop().unwrap()).unwrap();
        got.swap(1, frames.len());
        let expected: Vec<Vec<u8>> = got
            .iter()
            .map(|packet| {
                let mut bytes = vec![0; packet.len()];
                packet.copy_to(&mut bytes);
                bytes
            })
            .collect();
        assert_eq!(qb.tx(&mut got), expected.len(), "{keys}");
        assert!(got.is_empty());
        assert_eq!(receive(&mut hb, expected.len()), expected, "{keys}");
        hb.disarm();
        let (sent, seen) = (b.stats(), host_b.stats());
        assert_eq!((sent.tx_packets, sent.tx_errors), (expected.len() as u64, 0));
        assert_eq!((seen.rx_errors, seen.anomalies), (0, 0));
    }
}

#[test]
fn packets_of_a_closed_port_are_sent() {
    let (gone, there) = (Place::new(), Place::new());
    let (a, _host_a) = gone.pair("", "");
    let (b, host_b) = there.pair("", "");
    let frames = frames(&[60, 100, 1000]);
    let mut qa = a.queue(0).unwrap();
    let mut burst = fill(&mut qa, &frames);
    drop((qa, a));
    let (mut qb, mut hb) = (b.queue(0).unwrap(), host_b.queue(0).unwrap());
    assert_eq!(qb.tx(&mut burst), 3);
    assert_eq!(receive(&mut hb, 3), frames);
}

/// The other port asked for something, and what it asked for is done, where the frame goes now.
#[test]
fn what_a_packet_asks_for_goes_with_its_copy() {
    for csum in ["csum=0", "csum=1"] {
        let (left, right) = (Place::new(), Place::new());
        let (a, _host_a) = left.pair("", "");
        let (b, host_b) = right.pair(csum, csum);
        let (mut qa, mut qb, mut hb) = (a.queue(0).unwrap(), b.queue(0).unwrap(), host_b.queue(0).unwrap());
        let mut udp = frame_of(1, 60);
        udp[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17]);
        udp[38..40].copy_from_slice(&[0, 26]);
        let mut burst = fill(&mut qa, &[frame_of(0, 60), udp.clone(), frame_of(2, 60), udp]);
        burst[1].request_checksum().unwrap();
        burst[3].request_checksum().unwrap();
        burst[3].set_vlan_tag(Some(7));
        assert_eq!(qb.tx(&mut burst), 4, "{csum}");
        let mut got = Burst::new(4);
        until("the frames have come", || {
            hb.rx(&mut got);
            got.len() == 4
        });
        assert_eq!(
            got.iter().map(usernic::Packet::len).collect::<Vec<_>>(),
            [60, 60, 60, 64]
        );
        assert_eq!(matches!(got[1].checksum(), Checksum::Open(_)), csum == "csum=1");
        for asked in [1, 3] {
            assert!(got[asked].complete_checksum());
            assert_eq!(got[asked].verify_checksum(), Verdict::Right, "{csum}");
        }
        assert_eq!(got[3].header::<16>().unwrap()[12..], [0x81, 0, 0, 7]);
    }
}

/// Nothing is lost for want of buffers: what cannot be copied now stays in the burst.
#[test]
fn without_buffers_for_copies_packets_stay_in_the_burst() {
    let (left, right) = (Place::new(), Place::new());
    let (a, _host_a) = left.pair("", "");
    let (b, host_b) = right.pair("queue_size=64,buffers=192", "");
    let (mut qa, mut qb, mut hb) = (a.queue(0).unwrap(), b.queue(0).unwrap(), host_b.queue(0).unwrap());
    let mut held = Vec::new();
    while let Some(packet) = qb.packet() {
        held.push(packet);
    }
    let frames = frames(&[60, 61, 62]);
    let mut burst = fill(&mut qa, &frames);
    assert_eq!((qb.tx(&mut burst), burst.len()), (0, 3));
    held.truncate(held.len() - 2);
    qb.reclaim();
    assert_eq!((qb.tx(&mut burst), burst.len()), (2, 1));
    held.clear();
    qb.reclaim();
    assert_eq!(qb.tx(&mut burst), 1);
    assert_eq!(receive(&mut hb, 3), frames);
    assert_eq!(b.stats().tx_packets, 3);
}

/// The switch's uplink is a front-end of another switch.
#[test]
fn a_switch_forwards_to_an_uplink_and_back() {
    let (tenant, uplink) = (Place::new(), Place::new());
    let far = uplink.open("vhost", "").unwrap();
    let spec = |kind: &str, place: &Place| format!("{kind},path={}", place.socket().display()).parse().unwrap();
    let mut switch = Switch::new(SwitchConfig {
        ports: vec![
            ("a".into(), spec("vhost", &tenant), Role::Learn),
            ("up".into(), spec("virtio-user", &uplink), Role::Learn),
        ],
        ..SwitchConfig::default()
    })
    .unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| switch.run(&stop).unwrap());
        // The switch is to end, whatever fails here.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        let a = Port::open(&format!("virtio-user,path={}", tenant.socket().display())).unwrap();
        assert!(a.wait_link(LIMIT) && far.wait_link(LIMIT));
        let (mut qa, mut qf) = (a.queue(0).unwrap(), far.queue(0).unwrap());
        let ethernet = |from: u8, to: u8| {
            let mut frame = frame_of(0, 60);
            frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5]);
            frame
        };
        for back in [false, true] {
            let (from, to, out, into) = match back {
                false => (1, 2, &mut qa, &mut qf),
                true => (2, 1, &mut qf, &mut qa),
            };
            let frames = vec![ethernet(from, to); 32];
            let mut burst = fill(out, &frames);
            until("all are sent", || {
                out.tx(&mut burst);
                burst.is_empty()
            });
            assert_eq!(receive(into, 32), frames);
        }
    });
}
