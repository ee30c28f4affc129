//! Packets of other ports, and of ports that are closed, on a virtual function of the model: the device knows the memory of
//! its own port alone, so they are sent as copies, or stay with the caller. And a switch whose uplink is such a function.

mod vf_machine;

use std::sync::atomic::{AtomicBool, Ordering};

use usernic::offload::checksum::Verdict;
use usernic::switch::{Join, Role, Switch, SwitchConfig};
use usernic::{Burst, Port, Queue};
use vf_machine::{LIMIT, Machine, flush, frame, ipv4, receive, receive_with, send, until};

fn fill(queue: &mut Queue, frames: &[Vec<u8>]) -> Burst {
    let mut burst = Burst::new(frames.len());
    assert_eq!(queue.alloc(&mut burst, frames.len()), frames.len());
    for (packet, frame) in burst.iter_mut().zip(frames) {
        packet.copy_from(frame).unwrap();
    }
    burst
}

fn bytes(burst: &Burst) -> Vec<Vec<u8>> {
    let copy = |packet: &usernic::Packet| {
        let mut bytes = vec![0; packet.len()];
        packet.copy_to(&mut bytes);
        bytes
    };
    burst.iter().map(copy).collect()
}

/// Two functions that take long frames, and a `vhost` port that has nothing to do with them.
fn three(keys: &str) -> (Machine, Port, Port, Port, tempfile::TempDir) {
    let machine = Machine::two();
    machine.device.with(|nic| nic.pf().mtu = 9710);
    let keys = format!(",mtu=9000{keys}");
    let (a, b) = (machine.port(0, &keys), machine.port(1, &keys));
    let dir = tempfile::tempdir().unwrap();
    let other = Port::open(&format!("vhost,path={},mtu=9000", dir.path().join("s").display())).unwrap();
    (machine, a, b, other, dir)
}

#[test]
fn packets_of_other_ports_are_sent_as_copies() {
    for keys in ["", ",buffer_size=1024,queue_size=64"] {
        let (machine, a, b, other, _dir) = three(keys);
        let (mut qa, mut qb, mut qo) = (a.queue(0).unwrap(), b.queue(0).unwrap(), other.queue(0).unwrap());
        let frames = |from: usize| -> Vec<Vec<u8>> {
            let lengths = [60, 1514, 2048, 2049, 9014, 61, 4096];
            let made = lengths.iter().zip(from..);
            made.map(|(&len, number)| frame(b.mac(), a.mac(), len, number))
                .collect()
        };
        // Of the other function, whose memory this device cannot reach; of a port of another kind; its own; by turns, and
        // each of them first.
        for first in 0..21 {
            let mut burst = Burst::new(21);
            for mut from in [
                fill(&mut qb, &frames(0)),
                fill(&mut qo, &frames(10)),
                fill(&mut qa, &frames(20)),
            ] {
                from.move_to(&mut burst);
            }
            for at in 0..7 {
                burst.swap(3 * at, (at * 8 + 5) % 21);
            }
            burst.rotate_left(first);
            let sent = bytes(&burst);
            flush(&mut qa, &mut burst);
            assert!(receive(&mut qb, 21) == sent, "{keys:?}, {first}");
        }
        assert!(qa.drain(LIMIT));
        let stats = a.stats();
        assert_eq!((stats.tx_packets, stats.tx_errors), (21 * 21, 0), "{keys:?}");
        drop((qa, qb, qo, a, b, other));
        // No access of the device to what is not mapped for it, among others.
        machine.finish();
    }
}

#[test]
fn packets_of_closed_ports_are_sent_as_copies() {
    let (machine, a, b, other, _dir) = three("");
    let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
    let (from, to) = (a.mac(), b.mac());
    let made = |number| vec![frame(to, from, 60, number), frame(to, from, 3000, number + 1)];
    let mut burst = fill(&mut other.queue(0).unwrap(), &made(0));
    drop(other);
    flush(&mut qa, &mut burst);
    assert_eq!(receive(&mut qb, 2), made(0));
    // Of this very function, driven by the port before this one: the memory is another.
    let mut burst = fill(&mut qa, &made(7));
    drop((qa, a));
    let a = machine.port(0, ",mtu=9000");
    assert!(b.wait_link(LIMIT));
    let mut qa = a.queue(0).unwrap();
    flush(&mut qa, &mut burst);
    assert_eq!(receive(&mut qb, 2), made(7));
    assert!(qa.drain(LIMIT));
    assert_eq!((a.stats().tx_packets, a.stats().tx_errors), (2, 0));
    drop((qa, qb, a, b));
    machine.finish();
}

#[test]
fn what_a_packet_asks_for_goes_with_its_copy() {
    for keys in ["", ",csum=0,tso=0"] {
        let (machine, a, b, other, _dir) = three(keys);
        let (mut qa, mut qb, mut qo) = (a.queue(0).unwrap(), b.queue(0).unwrap(), other.queue(0).unwrap());
        let mut wrong = ipv4(b.mac(), a.mac(), true, (1000, 2000), &[5; 3000]);
        let right = ipv4(b.mac(), a.mac(), true, (1000, 2000), &[5; 3000]);
        wrong[50..52].fill(0xaa);
        let mut burst = fill(&mut qo, &[wrong.clone(), wrong]);
        burst[0].request_checksum().unwrap();
        burst[1].request_segmentation(1000).unwrap();
        flush(&mut qa, &mut burst);
        let got = receive_with(&mut qb, 4, |packet| (packet.verify_checksum(), packet.into_private()));
        assert!(got.iter().all(|(verdict, _)| *verdict == Verdict::Right), "{keys:?}");
        assert!(got[0].1 == right);
        let lengths: Vec<usize> = got.iter().map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(lengths, [3054, 1054, 1054, 1054]);
        drop((qa, qb, qo, a, b, other));
        machine.finish();
    }
}

#[test]
fn what_cannot_be_copied_stays_or_is_counted() {
    let (machine, a, b, other, _dir) = three(",queue_size=64,buffers=256");
    let (mut qa, mut qb, mut qo) = (a.queue(0).unwrap(), b.queue(0).unwrap(), other.queue(0).unwrap());
    // Without buffers for copies they stay in the burst.
    let mut held = Burst::new(256);
    while qa.alloc(&mut held, 32) > 0 {}
    assert!(held.len() > 32 && held.room() > 0);
    let frames: Vec<_> = (0..3).map(|number| frame(b.mac(), a.mac(), 100, number)).collect();
    let mut burst = fill(&mut qo, &frames);
    assert_eq!((qa.tx(&mut burst), burst.len()), (0, 3));
    held.truncate(held.len() - 2);
    qa.reclaim();
    assert_eq!((qa.tx(&mut burst), burst.len()), (2, 1));
    held.clear();
    qa.reclaim();
    flush(&mut qa, &mut burst);
    assert_eq!(receive(&mut qb, 3), frames);
    assert_eq!((a.stats().tx_packets, a.stats().tx_errors), (3, 0));
    // What the device never sends leaves the burst, counted, and does not keep the next one.
    let long = vec![0; 20_000];
    let mut burst = fill(&mut qo, &[long, frames[0].clone()]);
    flush(&mut qa, &mut burst);
    assert_eq!(receive(&mut qb, 1), frames[..1]);
    assert_eq!((a.stats().tx_packets, a.stats().tx_errors), (4, 1));
    drop((held, qa, qb, qo, a, b, other));
    machine.finish();
}

/// A switch with a virtual function for an uplink, and a tenant behind it that has the function's address.
#[test]
fn a_switch_forwards_to_a_function_and_back() {
    let machine = Machine::two();
    let (up, far) = (machine.port(0, ""), machine.port(1, ""));
    let (tenant, wire) = (up.mac(), far.mac());
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("t");
    let mut switch = Switch::new(SwitchConfig {
        ports: vec![("t".into(), usernic::spec::PortSpec::vhost(&socket), Role::Learn)],
        ..SwitchConfig::default()
    })
    .unwrap();
    let handle = switch.handle();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| switch.run(&stop).unwrap());
        // The switch is to end, whatever fails here.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let end = Stop(&stop);
        handle.add_port("up", up, Join::Learn).unwrap();
        let a = Port::open(&format!("virtio-user,path={},memory=memfd", socket.display())).unwrap();
        assert!(a.wait_link(LIMIT));
        let (mut qa, mut qf) = (a.queue(0).unwrap(), far.queue(0).unwrap());
        for round in 0..4 {
            let there: Vec<_> = (0..64).map(|n| frame(wire, tenant, 60 + 20 * n, n + round)).collect();
            send(&mut qa, &there);
            assert!(receive(&mut qf, 64) == there);
            let back: Vec<_> = (0..64).map(|n| frame(tenant, wire, 60 + 20 * n, n + round)).collect();
            send(&mut qf, &back);
            assert!(receive(&mut qa, 64) == back);
            // It sleeps in between.
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let report = handle.report().unwrap();
        let of = |name: &str| report.ports.iter().find(|port| port.name == name).unwrap().clone();
        assert_eq!((of("up").stats.tx_packets, of("up").stats.rx_packets), (256, 256));
        assert_eq!((of("up").dropped, of("t").dropped, of("up").stats.tx_errors), (0, 0, 0));
        // A name that is taken: the port is closed, and the function is free again.
        drop((qf, far));
        until("it is closed", || machine.try_port(1, "").is_ok());
        let again = machine.port(1, "");
        assert!(handle.add_port("up", again, Join::Learn).is_err());
        drop(machine.port(1, ""));
        handle.remove("up").unwrap();
        drop(end);
        running.join().unwrap();
    });
    drop(switch);
    machine.finish();
}
