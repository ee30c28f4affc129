//! The switch between front-end ports: what it learns, forgets, connects, reflects, and who may go away.

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{LIMIT, Stream, frame, until};
use usernic::spec::PortSpec;
use usernic::switch::{Role, Switch, SwitchConfig};
use usernic::{Burst, Port, Queue};

/// A switch with ports of these roles.
struct Net {
    dir: tempfile::TempDir,
    roles: Vec<Role>,
    ageing: Duration,
}

impl Net {
    fn new(roles: &[Role]) -> Self {
        Net {
            dir: tempfile::tempdir().unwrap(),
            roles: roles.to_vec(),
            ageing: Duration::from_secs(300),
        }
    }

    fn socket(&self, port: usize) -> PathBuf {
        self.dir.path().join(format!("{port}.sock"))
    }

    fn switch(&self) -> Switch {
        let ports = self.roles.iter().enumerate();
        Switch::new(SwitchConfig {
            ports: ports
                .map(|(port, &role)| {
                    let mut spec = PortSpec::vhost(self.socket(port));
                    spec.mtu = 9000;
                    (port.to_string(), spec, role)
                })
                .collect(),
            ageing: self.ageing,
            ..SwitchConfig::default()
        })
        .unwrap()
    }

    /// Connects a front-end to a port of a switch that runs.
    fn join(&self, port: usize) -> Host {
        let spec = format!("virtio-user,path={},mrg_rxbuf=1,mtu=9000", self.socket(port).display());
        let port = Port::open(&spec).unwrap();
        let queue = port.queue(0).unwrap();
        Host {
            queue,
            port,
            burst: Burst::new(64),
        }
    }
}

/// A front-end.
struct Host {
    queue: Queue,
    port: Port,
    burst: Burst,
}

impl Host {
    fn send(&mut self, bytes: &[u8]) {
        let mut packet = self.queue.packet().expect("a buffer");
        packet.copy_from(bytes).unwrap();
        let mut burst = Burst::new(1);
        assert!(burst.push(packet).is_ok());
        assert_eq!(self.queue.tx(&mut burst), 1);
    }

    /// All that has come.
    fn take(&mut self) -> Vec<Vec<u8>> {
        while self.queue.rx(&mut self.burst) > 0 {}
        self.burst
            .drain()
            .map(|packet| {
                let mut bytes = vec![0; packet.len()];
                packet.copy_to(&mut bytes);
                bytes
            })
            .collect()
    }
}

/// Runs a switch beside `test`.
fn running(mut switch: Switch, test: impl FnOnce()) -> Switch {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            switch.run(&stop).unwrap();
        });
        let end = Stop(&stop);
        test();
        drop(end);
        thread.join().unwrap();
    });
    switch
}

fn addressed(to: u8, from: u8, number: u64) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
    bytes.extend(frame(number));
    bytes
}

/// The frames of the capture that comes with the project.
fn capture() -> Vec<Vec<u8>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/data/demo.pcap");
    let bytes = std::fs::read(path).unwrap();
    let mut frames = Vec::new();
    // 24 bytes of file header; of each record 16, the third word its length (little-endian, as it was written).
    let mut at = 24;
    while let Some(word) = bytes.get(at + 8..at + 12) {
        let len = u32::from_le_bytes(word.try_into().unwrap()) as usize;
        frames.push(bytes[at + 16..at + 16 + len].to_vec());
        at += 16 + len;
    }
    frames
}

/// The capture's hosts are split across three ports. A model says where each frame must go: flooded to both other ports
/// before its destination was heard of, to that one's port alone after.
#[test]
fn learning() {
    let net = Net::new(&[Role::Learn; 3]);
    let mut switch = net.switch();
    let mut hosts: Vec<Host> = (0..3).map(|port| net.join(port)).collect();
    until("all links are up", || switch.ports().all(|(_, port)| port.link().up));

    let frames = capture();
    let mut home: HashMap<[u8; 6], usize> = HashMap::new();
    let mut heard: HashMap<[u8; 6], usize> = HashMap::new();
    let (mut flooded, mut filtered, mut direct) = ([0; 3], [0; 3], 0);
    for (number, bytes) in frames.iter().enumerate() {
        let to: [u8; 6] = bytes[..6].try_into().unwrap();
        let from: [u8; 6] = bytes[6..12].try_into().unwrap();
        let count = home.len();
        let port = *home.entry(from).or_insert(count % 3);
        heard.insert(from, port);
        let known = if to[0] & 1 == 1 { None } else { heard.get(&to).copied() };
        let expected: Vec<usize> = match known {
            Some(other) if other == port => {
                filtered[port] += 1;
                vec![]
            }
            Some(other) => {
                direct += 1;
                vec![other]
            }
            None => {
                flooded[port] += 1;
                (0..3).filter(|&other| other != port).collect()
            }
        };
        hosts[port].send(bytes);
        while switch.turn() > 0 {}
        for (at, host) in hosts.iter_mut().enumerate() {
            let got = host.take();
            if expected.contains(&at) {
                assert!(
                    got.len() == 1 && got[0] == *bytes,
                    "frame {number}: not whole at port {at}"
                );
            } else {
                assert!(got.is_empty(), "frame {number} is none of port {at}'s");
            }
        }
    }
    let count = home.len();
    assert!(
        count >= 3 && direct > 0 && flooded.iter().sum::<u64>() > 0,
        "the capture has too little"
    );
    for (at, stats) in switch.stats().iter().enumerate() {
        assert_eq!(
            (stats.flooded, stats.filtered, stats.dropped),
            (flooded[at], filtered[at], 0),
            "port {at}"
        );
    }
    let mut learned: Vec<_> = switch
        .addresses()
        .iter()
        .map(|(mac, port, _)| (mac.bytes(), *port))
        .collect();
    let mut expected: Vec<_> = home.into_iter().collect();
    learned.sort();
    expected.sort();
    assert_eq!(learned, expected);
}

/// Who was not heard of for a while is forgotten: frames to it are flooded again.
#[test]
fn ageing() {
    let mut net = Net::new(&[Role::Learn; 3]);
    net.ageing = Duration::from_secs(2);
    running(net.switch(), || {
        let [mut a, mut b, mut c] = [0, 1, 2].map(|port| net.join(port));
        // Every link must be up in the switch before a flood reaches all.
        let mut round = 0;
        until("a flood reaches both others", || {
            round += 1;
            a.send(&addressed(9, 1, round));
            std::thread::sleep(Duration::from_millis(5));
            !b.take().is_empty() & !c.take().is_empty()
        });
        a.send(&addressed(9, 1, 0));
        until("the flood arrives", || !b.take().is_empty());
        std::thread::sleep(Duration::from_millis(20));
        c.take();
        b.send(&addressed(1, 2, 100));
        until("it goes to a", || a.take() == [addressed(1, 2, 100)]);
        std::thread::sleep(Duration::from_millis(20));
        assert!(c.take().is_empty(), "a is known");
        std::thread::sleep(Duration::from_millis(2500));
        b.send(&addressed(1, 2, 101));
        until("it goes to c too", || c.take() == [addressed(1, 2, 101)]);
        until("and to a", || a.take() == [addressed(1, 2, 101)]);
    });
}

/// A cross-connect loses nothing and keeps the order, also when the receiver is slow or not there yet.
#[test]
fn cross_connect() {
    const COUNT: u64 = 20_000;
    let net = Net::new(&[Role::Connect(1), Role::Connect(0)]);
    let switch = running(net.switch(), || {
        let mut a = net.join(0);
        let (mut there, mut back) = (Stream::new(COUNT, frame), Stream::new(COUNT, frame));
        // Nobody is on the other port: what was sent waits.
        let mut waiting = 0;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(200) {
            waiting += there.send(&mut a.queue);
        }
        assert!(waiting > 30, "{waiting}");
        let mut b = net.join(1);
        let mut turn = 0u64;
        let mut last = Instant::now();
        while !there.done() || !back.done() {
            turn += 1;
            let mut moved = there.send(&mut a.queue) + back.send(&mut b.queue);
            // Slow: rings fill up.
            if turn.is_multiple_of(50) {
                moved += there.receive(&mut b.queue);
            }
            if turn.is_multiple_of(70) {
                moved += back.receive(&mut a.queue);
            }
            if moved > 0 {
                last = Instant::now();
            }
            assert!(
                last.elapsed() < LIMIT,
                "nothing moves: {} and {}",
                there.seen,
                back.seen
            );
        }
    });
    for stats in switch.stats() {
        assert_eq!(stats.dropped, 0);
        assert_eq!((stats.stats.rx_packets, stats.stats.tx_packets), (COUNT, COUNT));
        assert_eq!(
            (stats.stats.rx_errors, stats.stats.tx_errors, stats.stats.anomalies),
            (0, 0, 0)
        );
    }
}

#[test]
fn cross_connects_that_cannot_be() {
    for roles in [
        &[Role::Connect(0)][..],
        &[Role::Connect(1)],
        &[Role::Learn, Role::Connect(2)],
    ] {
        let net = Net::new(roles);
        let ports = roles.iter().enumerate();
        let result = Switch::new(SwitchConfig {
            ports: ports
                .map(|(port, &role)| (port.to_string(), PortSpec::vhost(net.socket(port)), role))
                .collect(),
            ..SwitchConfig::default()
        });
        let error = result.err().expect("it cannot be connected").to_string();
        assert!(error.contains("cannot be connected"), "{error}");
        assert_eq!(
            std::fs::read_dir(net.dir.path()).unwrap().count(),
            0,
            "no socket is left"
        );
    }
}

/// The reflector sends each frame back, in order, with its two addresses swapped and nothing else changed.
#[test]
fn reflector() {
    const COUNT: u64 = 5_000;
    let net = Net::new(&[Role::Reflect]);
    let switch = running(net.switch(), || {
        let mut a = net.join(0);
        let mut there = Stream::new(COUNT, frame);
        let (mut seen, mut last) = (0, Instant::now());
        while seen < COUNT {
            there.send(&mut a.queue);
            for bytes in a.take() {
                let mut expected = frame(seen);
                expected[..12].rotate_left(6);
                assert!(bytes == expected, "frame {seen}");
                seen += 1;
                last = Instant::now();
            }
            assert!(last.elapsed() < LIMIT, "{seen} came back");
        }
    });
    assert_eq!(switch.stats()[0].dropped, 0);
}

/// A port of the bridge goes away and comes back: the others go on, its addresses are forgotten, and it is served again.
#[test]
fn a_port_that_goes_away() {
    let net = Net::new(&[Role::Learn; 3]);
    running(net.switch(), || {
        let [mut a, mut b, c] = [0, 1, 2].map(|port| net.join(port));
        let mut c = Some(c);
        for round in 0..10u64 {
            let mut host = c.take().unwrap_or_else(|| net.join(2));
            assert!(host.port.wait_link(LIMIT));
            let mut number = round * 1000;
            until("c is heard of", || {
                number += 1;
                host.send(&addressed(1, 3, number));
                std::thread::sleep(Duration::from_millis(2));
                !a.take().is_empty()
            });
            until("c is answered", || {
                a.send(&addressed(3, 1, number));
                std::thread::sleep(Duration::from_millis(2));
                host.take().contains(&addressed(3, 1, number))
            });
            b.take();
            drop(host);
            // To nobody: flooded, now that it is forgotten, so that b sees it.
            until("c is forgotten", || {
                a.send(&addressed(3, 1, number));
                std::thread::sleep(Duration::from_millis(5));
                b.take().contains(&addressed(3, 1, number))
            });
            // And the others talk.
            b.send(&addressed(1, 2, number));
            until("a hears b", || a.take().contains(&addressed(1, 2, number)));
        }
    });
}

/// A neighbour of a cross-connect goes away in mid-traffic and comes back: order is kept, nothing comes twice, nothing is
/// stuck.
#[test]
fn a_neighbour_that_goes_away() {
    let net = Net::new(&[Role::Connect(1), Role::Connect(0)]);
    running(net.switch(), || {
        let mut a = net.join(0);
        let (mut next, mut last) = (0u64, None);
        for round in 0..10 {
            let mut b = net.join(1);
            let mut seen = 0;
            until("frames cross", || {
                for _ in 0..32 {
                    let Some(mut packet) = a.queue.packet() else { break };
                    packet.copy_from(&frame(next)).unwrap();
                    let mut burst = Burst::new(1);
                    assert!(burst.push(packet).is_ok());
                    next += a.queue.tx(&mut burst) as u64;
                }
                for bytes in b.take() {
                    let number = u64::from_le_bytes(*bytes.first_chunk().unwrap());
                    assert!(
                        last.is_none_or(|last| last < number),
                        "round {round}: {number} after {last:?}"
                    );
                    assert!(bytes == frame(number), "frame {number}");
                    last = Some(number);
                    seen += 1;
                }
                seen > 300
            });
            drop(b);
        }
    });
}
