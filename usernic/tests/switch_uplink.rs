//! A switch with an uplink: a `virtio-user` port on somebody else's back-end, beside `vhost` ports for containers.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::{LIMIT, Place, Stream, frame_of, until};
use usernic::spec::PortSpec;
use usernic::switch::{Role, Switch, SwitchConfig, SwitchPortStats};
use usernic::{Burst, Port, Queue};

/// Runs a switch with an uplink and two ports, a and b, beside `test`, which gets the uplink's back-end and its place.
fn switched(
    uplink: &str,
    roles: [Role; 3],
    test: impl FnOnce(Port, &Place, &tempfile::TempDir),
) -> Vec<SwitchPortStats> {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (place, dir) = (Place::new(), tempfile::tempdir().unwrap());
    let back = place.open("vhost", "").unwrap();
    let spec = format!("virtio-user,path={}{uplink}", place.socket().display());
    let specs = [
        ("up", spec.parse::<PortSpec>().unwrap()),
        ("a", PortSpec::vhost(dir.path().join("a"))),
        ("b", PortSpec::vhost(dir.path().join("b"))),
    ];
    let ports = specs.into_iter().zip(roles);
    let config = SwitchConfig {
        ports: ports
            .map(|((name, spec), role)| (name.to_owned(), spec, role))
            .collect(),
        ..SwitchConfig::default()
    };
    let mut switch = Switch::new(config).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| switch.run(&stop).unwrap());
        let end = Stop(&stop);
        test(back, &place, &dir);
        drop(end);
        thread.join().unwrap();
    });
    switch.stats()
}

fn join(dir: &tempfile::TempDir, name: &str, keys: &str) -> (Port, Queue) {
    let port = Port::open(&format!("virtio-user,path={}{keys}", dir.path().join(name).display())).unwrap();
    let queue = port.queue(0).unwrap();
    (port, queue)
}

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1400) as usize)
}

const COUNT: u64 = 5_000;

/// Every frame, byte for byte and in order, both ways: its buffers are one port's, its rings the other's.
#[test]
fn an_uplink_and_a_port_hand_on_each_others_frames() {
    let roles = [Role::Connect(1), Role::Connect(0), Role::Learn];
    for (uplink, keys) in [
        ("", ""),
        (",packed_vq=1", ",packed_vq=1"),
        (",mrg_rxbuf=1", ",mrg_rxbuf=1"),
        (",csum=1", ""),
    ] {
        let stats = switched(uplink, roles, |back, _, dir| {
            let (_port, mut a) = join(dir, "a", keys);
            let mut up = back.queue(0).unwrap();
            assert!(back.wait_link(LIMIT));
            let (mut there, mut home) = (Stream::new(COUNT, short), Stream::new(COUNT, short));
            let mut last = Instant::now();
            while !there.done() || !home.done() {
                let moved = there.send(&mut a) + home.send(&mut up) + there.receive(&mut up) + home.receive(&mut a);
                if moved > 0 {
                    last = Instant::now();
                }
                assert!(
                    last.elapsed() < LIMIT,
                    "{uplink:?}: nothing moves: {} {}",
                    there.seen,
                    home.seen
                );
            }
        });
        for port in &stats[..2] {
            assert_eq!(
                (port.stats.rx_packets, port.stats.tx_packets),
                (COUNT, COUNT),
                "{uplink:?} {}",
                port.name
            );
            assert_eq!((port.dropped, port.stats.tx_errors, port.stats.anomalies), (0, 0, 0));
        }
    }
}

fn addressed(to: u8, from: u8, number: u64) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
    bytes.extend(short(number));
    bytes
}

fn send(queue: &mut Queue, bytes: &[u8]) {
    let mut burst = Burst::new(1);
    until("a buffer", || queue.alloc(&mut burst, 1) == 1);
    burst[0].copy_from(bytes).unwrap();
    until("room", || queue.tx(&mut burst) == 1);
}

/// Sends until it comes: a port whose link is not seen yet gets nothing.
fn crosses(what: &str, bytes: &[u8], from: &mut Queue, to: &mut Queue) {
    let mut burst = Burst::new(32);
    until(what, || {
        send(from, bytes);
        std::thread::sleep(std::time::Duration::from_millis(2));
        to.rx(&mut burst);
        burst.drain().any(|packet| packet.into_private() == bytes)
    });
}

/// The uplink learns and floods as any port, and comes back with its back-end.
#[test]
fn an_uplink_is_a_port_of_the_bridge() {
    switched("", [Role::Learn; 3], |back, place, dir| {
        let (_a, mut a) = join(dir, "a", "");
        let (_b, mut b) = join(dir, "b", "");
        let mut up = back.queue(0).unwrap();
        crosses("a flood from the uplink", &addressed(9, 3, 1), &mut up, &mut a);
        crosses("a flood from the uplink", &addressed(9, 3, 2), &mut up, &mut b);
        crosses("an answer to it", &addressed(3, 1, 3), &mut a, &mut up);
        crosses("a frame for a known port", &addressed(1, 3, 4), &mut up, &mut a);
        crosses("a frame between containers", &addressed(1, 2, 5), &mut b, &mut a);
        drop((up, back));
        let back = place.open("vhost", "").unwrap();
        assert!(back.wait_link(LIMIT), "the uplink comes back");
        let mut up = back.queue(0).unwrap();
        crosses("a frame from the new back-end", &addressed(2, 3, 6), &mut up, &mut b);
        crosses("a frame to it", &addressed(3, 2, 7), &mut b, &mut up);
    });
}
