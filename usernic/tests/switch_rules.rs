//! What a switch does not let through: addresses of ports outside the bridge, runts, frames over a port's MTU, link-local
//! groups; and that every frame is in a counter.

mod common;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use common::until;
use usernic::spec::PortSpec;
use usernic::switch::{Join, Role, Switch, SwitchConfig, SwitchError, SwitchHandle, SwitchPortStats};
use usernic::{Burst, Port, Queue};

/// A switch that a thread runs, with ports named a, b, c, ...
struct Net<'a> {
    dir: &'a tempfile::TempDir,
    handle: SwitchHandle,
}

/// Runs a switch with ports of these keys and roles beside `test`; what it counted, with the sum of removed ports.
fn switched(ports: &[(&str, Role)], change: impl FnOnce(&mut SwitchConfig), test: impl FnOnce(&Net)) -> Counts {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = ports.iter().zip('a'..).map(|((keys, role), name)| {
        let spec = format!("vhost,path={}{keys}", dir.path().join(name.to_string()).display());
        (name.to_string(), spec.parse::<PortSpec>().unwrap(), *role)
    });
    let mut config = SwitchConfig {
        ports: ports.collect(),
        ..SwitchConfig::default()
    };
    change(&mut config);
    let mut switch = Switch::new(config).unwrap();
    let (handle, stop) = (switch.handle(), AtomicBool::new(false));
    let drained = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            switch.run(&stop).unwrap();
            switch.drain(std::time::Duration::from_millis(100))
        });
        let end = Stop(&stop);
        test(&Net { dir: &dir, handle });
        drop(end);
        thread.join().unwrap()
    });
    let mut ports = switch.stats();
    ports.extend(switch.removed().cloned());
    Counts(ports, drained)
}

/// What ports counted, and whether the switch said at its end that nothing was left.
struct Counts(Vec<SwitchPortStats>, bool);

impl Counts {
    fn of(&self, name: &str) -> &SwitchPortStats {
        self.0
            .iter()
            .find(|port| port.name == name)
            .expect("a port of this name")
    }

    /// Every frame that the switch took, and every copy that it made, was sent or is in a counter that says why not.
    fn close(&self) {
        let sum = |count: fn(&SwitchPortStats) -> u64| self.0.iter().map(count).sum::<u64>();
        let came = sum(|port| port.stats.rx_packets + port.copies);
        // A runt that `rx` handed out would be in both.
        let went = sum(|port| port.stats.tx_packets + port.dropped + port.filtered)
            + sum(|port| port.stats.tx_errors + port.stats.tx_filtered + port.stats.tx_oversize);
        assert_eq!(came, went, "{:?}", self.0);
    }
}

impl Net<'_> {
    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn up(&self, name: &str) -> bool {
        let report = self.handle.report().unwrap();
        report.ports.iter().any(|port| port.name == name && port.link_up)
    }

    /// A front-end on the port of this name, once the switch has seen it come.
    fn join(&self, name: &str, keys: &str) -> Host {
        let port = Port::open(&format!("virtio-user,path={}{keys}", self.socket(name).display())).unwrap();
        until("the switch sees the port come", || self.up(name));
        let queue = port.queue(0).unwrap();
        Host {
            queue,
            port,
            got: Vec::new(),
        }
    }
}

struct Host {
    queue: Queue,
    port: Port,
    got: Vec<Vec<u8>>,
}

impl Host {
    fn send(&mut self, bytes: &[u8]) {
        self.send_with(bytes, |_| {});
    }

    fn send_with(&mut self, bytes: &[u8], change: impl Fn(&mut usernic::Packet)) {
        until("room to send", || {
            let mut burst = Burst::new(1);
            let Some(mut packet) = self.queue.packet() else {
                return false;
            };
            if packet.copy_from(bytes).is_err() {
                return false;
            }
            change(&mut packet);
            assert!(burst.push(packet).is_ok());
            self.queue.tx(&mut burst) == 1
        });
    }

    /// All that came until this frame did, without it. Frames of one port stay in their order: what was sent before this
    /// one and is not there is not on its way either.
    fn until_came(&mut self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut burst = Burst::new(64);
        until("a frame comes", || {
            self.queue.rx(&mut burst);
            self.got.extend(burst.drain().map(usernic::Packet::into_private));
            self.got.iter().any(|bytes| bytes == last)
        });
        let mut got = std::mem::take(&mut self.got);
        let at = got.iter().position(|bytes| bytes == last).unwrap();
        self.got = got.split_off(at + 1);
        got.pop();
        got
    }
}

fn address(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

/// A frame of `len` bytes that has a number.
fn frame(to: [u8; 6], from: u8, number: u8, len: usize) -> Vec<u8> {
    let mut bytes = [&to[..], &address(from), &[0x88, 0xb5, number]].concat();
    bytes.resize(len, number);
    bytes
}

const ALL: [u8; 6] = [0xff; 6];

/// a and b are in the bridge; c is not, and says that b's address is its own.
fn stays_with_its_owner(roles: &[(&str, Role)], change: impl FnOnce(&Net)) {
    switched(
        roles,
        |_| {},
        |net| {
            change(net);
            let mut a = net.join("a", ",mac=02:00:00:00:00:01");
            let mut b = net.join("b", ",mac=02:00:00:00:00:02");
            let mut c = net.join("c", ",mac=02:00:00:00:00:02");
            b.send(&frame(ALL, 2, 1, 60));
            a.until_came(&frame(ALL, 2, 1, 60));
            c.port.announce().unwrap();
            c.send(&frame(ALL, 2, 2, 60));
            // The back-end has it now; the switch looks at it at the latest between these two reports.
            net.handle.report().unwrap();
            let report = net.handle.report().unwrap();
            let known = report.addresses.iter().find(|entry| entry.0.bytes() == address(2));
            assert_eq!(
                known.map(|entry| entry.1),
                Some(1),
                "the address is learned where it was announced"
            );
            for number in 10..30 {
                a.send(&frame(address(2), 1, number, 60));
                assert!(b.until_came(&frame(address(2), 1, number, 60)).is_empty());
            }
            // c's neighbour, or c itself, hands on what c sent and nothing of the bridge's.
            assert!(c.got.iter().all(|bytes| bytes[6..12] != address(1)));
        },
    )
    .close();
}

#[test]
fn an_address_that_a_port_outside_the_bridge_announces_is_not_learned() {
    let learn = ("", Role::Learn);
    stays_with_its_owner(&[learn, learn, ("", Role::Reflect)], |_| {});
    stays_with_its_owner(&[learn, learn, ("", Role::Connect(3)), ("", Role::Connect(2))], |_| {});
    // Its role changes: it was in the bridge.
    stays_with_its_owner(&[learn, learn, learn], |net| {
        let spec = PortSpec::vhost(net.socket("d"));
        net.handle.add("d", spec, Join::Connect("c".into())).unwrap();
    });
    // The neighbour is gone: it is in the bridge no more for that.
    stays_with_its_owner(&[learn, learn, learn], |net| {
        let spec = PortSpec::vhost(net.socket("d"));
        net.handle.add("d", spec, Join::Connect("c".into())).unwrap();
        net.handle.remove("d").unwrap();
    });
}

#[test]
fn an_address_that_a_port_of_the_bridge_announces_is_learned() {
    switched(
        &[("", Role::Learn); 2],
        |_| {},
        |net| {
            let _a = net.join("a", "");
            let b = net.join("b", ",mac=02:00:00:00:00:02");
            b.port.announce().unwrap();
            until("the address is in the table", || {
                let report = net.handle.report().unwrap();
                report
                    .addresses
                    .iter()
                    .any(|entry| entry.0.bytes() == address(2) && entry.1 == 1)
            });
        },
    );
}

#[test]
fn runts_cross_nowhere() {
    for roles in [
        &[("", Role::Learn), ("", Role::Learn)][..],
        &[("", Role::Connect(1)), ("", Role::Connect(0))],
        &[("", Role::Reflect)],
    ] {
        let counts = switched(
            roles,
            |_| {},
            |net| {
                let mut a = net.join("a", "");
                let mut b = (roles.len() > 1).then(|| net.join("b", ""));
                for len in 1..=13 {
                    a.send(&frame(ALL, 1, 0, 60)[..len]);
                }
                a.send(&frame(ALL, 1, 1, 14));
                let got = match &mut b {
                    Some(b) => b.until_came(&frame(ALL, 1, 1, 14)),
                    None => {
                        let mut back = frame(ALL, 1, 1, 14);
                        back[..12].rotate_left(6);
                        a.until_came(&back)
                    }
                };
                assert!(got.is_empty(), "{roles:?}: a runt of {} bytes", got[0].len());
            },
        );
        let a = counts.of("a");
        assert_eq!(a.stats.rx_runts, 13, "{roles:?}");
        assert!(a.stats.tx_packets <= 1, "{roles:?}");
    }
}

#[test]
fn no_frame_over_a_ports_mtu_is_sent_to_it() {
    let (wide, narrow) = (",mtu=9000", ",mtu=1500");
    for (what, roles) in [
        (
            "flooded",
            &[(wide, Role::Learn), (narrow, Role::Learn), (wide, Role::Learn)][..],
        ),
        (
            "known",
            &[(wide, Role::Learn), (narrow, Role::Learn), (wide, Role::Learn)],
        ),
        ("connected", &[(wide, Role::Connect(1)), (narrow, Role::Connect(0))]),
        ("reflected", &[(narrow, Role::Reflect)]),
    ] {
        for keys in ["", ",mrg_rxbuf=1", ",mtu=9000", ",mtu=9000,packed_vq=1"] {
            let counts = switched(
                roles,
                |_| {},
                |net| {
                    let mut a = net.join("a", ",mtu=9000");
                    let mut c = (what == "flooded").then(|| net.join("c", ",mtu=9000"));
                    let mut b = (what != "reflected").then(|| net.join("b", keys));
                    if let ("known", Some(b)) = (what, &mut b) {
                        b.send(&frame(ALL, 2, 1, 60));
                        a.until_came(&frame(ALL, 2, 1, 60));
                    }
                    let sent = |number: u8, len: usize| frame(address(2), 1, number, len);
                    for (number, len) in [(2, 1515), (3, 4000), (4, 1514), (5, 9014), (6, 1000)] {
                        a.send(&sent(number, len));
                    }
                    // As long as a frame may be with one VLAN tag, and with two, and longer.
                    for (number, tags, len) in [(7, 1, 1518), (8, 1, 1519), (9, 2, 1522), (10, 2, 1523), (11, 0, 60)] {
                        let mut bytes = sent(number, len);
                        for tag in 0..tags {
                            bytes[12 + 4 * tag..16 + 4 * tag].copy_from_slice(&[0x81, 0, 0, 1]);
                        }
                        a.send(&bytes);
                    }
                    let mut last = sent(11, 60);
                    let got = match &mut b {
                        Some(b) => b.until_came(&last),
                        None => {
                            last[..12].rotate_left(6);
                            a.until_came(&last)
                        }
                    };
                    let lens: Vec<usize> = got.iter().map(Vec::len).collect();
                    assert_eq!(lens, [1514, 1000, 1518, 1522], "{what}, front-end {keys:?}");
                    if let Some(c) = &mut c {
                        assert_eq!(c.until_came(&last).len(), 9, "the other receiver gets all");
                    }
                },
            );
            let receiver = counts.of(if what == "reflected" { "a" } else { "b" });
            // What is too long for any tagging is kept out where it enters a port, if the port is the sender's own.
            let (entering, leaving) = (receiver.stats.rx_oversize, receiver.stats.tx_oversize);
            let expected = if what == "reflected" { (4, 1) } else { (0, 5) };
            assert_eq!((entering, leaving), expected, "{what}, front-end {keys:?}");
            assert_eq!((receiver.stats.tx_errors, receiver.dropped), (0, 0));
            counts.close();
        }
    }
}

/// What is to be cut is as long as its pieces.
#[test]
fn a_frame_that_is_to_be_cut_is_judged_by_its_pieces() {
    let keys = ",mtu=1500,tso=1,lro=1";
    for role in [[Role::Learn, Role::Learn], [Role::Connect(1), Role::Connect(0)]] {
        for taker in [",tso=1,lro=1,mrg_rxbuf=1", ""] {
            let counts = switched(
                &[(keys, role[0]), (keys, role[1])],
                |_| {},
                |net| {
                    let mut a = net.join("a", ",tso=1,lro=1,mrg_rxbuf=1");
                    let mut b = net.join("b", taker);
                    let payload = 8000u16;
                    let mut bytes = [&ALL[..], &address(1), &[8, 0]].concat();
                    bytes.extend([0x45, 0]);
                    bytes.extend((40 + payload).to_be_bytes());
                    bytes.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
                    bytes.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
                    bytes.resize(54 + usize::from(payload), 7);
                    a.send_with(&bytes, |packet| packet.request_segmentation(1460).unwrap());
                    // Each piece has a byte too many.
                    a.send_with(&bytes, |packet| packet.request_segmentation(1461).unwrap());
                    a.send(&frame(ALL, 1, 9, 60));
                    let got = b.until_came(&frame(ALL, 1, 9, 60));
                    let len: usize = got.iter().map(|bytes| bytes.len() - 54).sum();
                    assert_eq!(len, usize::from(payload), "{role:?} {taker:?}");
                    assert_eq!(got.len(), if taker.is_empty() { 6 } else { 1 });
                },
            );
            assert_eq!(counts.of("b").stats.tx_oversize, 1, "{role:?} {taker:?}");
        }
    }
}

#[test]
fn link_local_groups_stay_on_their_link() {
    let group = |last: u8| [0x01, 0x80, 0xc2, 0, 0, last];
    let run = |roles: &[Role], forward: bool| {
        let mut passed = Vec::new();
        let ports: Vec<_> = roles.iter().map(|role| ("", *role)).collect();
        let counts = switched(
            &ports,
            |config| config.forward_link_local = forward,
            |net| {
                let [mut a, mut b] = ["a", "b"].map(|name| net.join(name, ""));
                for last in 0..=0x21 {
                    a.send(&frame(group(last), 1, last, 60));
                }
                a.send(&frame(ALL, 1, 99, 60));
                passed = b
                    .until_came(&frame(ALL, 1, 99, 60))
                    .iter()
                    .map(|bytes| bytes[5])
                    .collect();
                if roles[0] == Role::Learn {
                    let report = net.handle.report().unwrap();
                    assert_eq!(report.addresses.len(), 1, "the sender is learned all the same");
                }
            },
        );
        counts.close();
        (passed, counts.of("a").filtered)
    };
    let all: Vec<u8> = (0..=0x21).collect();
    let learn = [Role::Learn, Role::Learn];
    assert_eq!(run(&learn, false), ((0x10..=0x21).collect(), 16));
    assert_eq!(run(&learn, true), (all.clone(), 0));
    assert_eq!(run(&[Role::Connect(1), Role::Connect(0)], false), (all, 0));
}

#[test]
fn names_are_unique_by_every_way_in() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str, path: &str| (name.to_owned(), PortSpec::vhost(dir.path().join(path)), Role::Learn);
    let mut config = SwitchConfig {
        ports: vec![port("a", "1"), port("b", "2"), port("a", "3")],
        ..SwitchConfig::default()
    };
    let twice = Switch::new(config.clone()).map(drop);
    assert!(
        matches!(&twice, Err(SwitchError::NameTaken { name }) if name == "a"),
        "{twice:?}"
    );
    for none in ["a\nERROR of another", "\x1b[2J", ""] {
        config.ports[2].0 = none.into();
        assert!(matches!(config.check(), Err(SwitchError::NoName { .. })), "{none:?}");
    }
    assert!(matches!(Switch::new(config).map(drop), Err(SwitchError::NoName { .. })));
    for (to, ports) in [(0, 1), (1, 1), (0, 2), (2, 2), (usize::MAX, 2)] {
        let mut ports = vec![port("a", "1"), port("b", "2")][..ports].to_vec();
        ports[0].2 = Role::Connect(to);
        let config = SwitchConfig {
            ports,
            ..SwitchConfig::default()
        };
        let refused = Switch::new(config).map(drop);
        assert!(
            matches!(refused, Err(SwitchError::Connect { port: 0, .. })),
            "{to}: {refused:?}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was opened");
    switched(
        &[("", Role::Learn)],
        |_| {},
        |net| {
            for (name, what) in [("a", "there is a port a"), ("", "needs a name")] {
                let refused = net
                    .handle
                    .add(name, PortSpec::vhost(net.socket("x")), Join::Learn)
                    .unwrap_err();
                assert!(refused.to_string().contains(what), "{refused}");
                assert!(!net.socket("x").exists());
            }
        },
    );
}

/// A frame is flooded to the ports of the bridge that are up, but for its own, and to no other; one whose destination is
/// behind its own port goes nowhere.
#[test]
fn frames_stay_in_the_bridge_and_come_back_to_nobody() {
    let roles = [
        ("", Role::Learn),
        ("", Role::Learn),
        ("", Role::Reflect),
        ("", Role::Learn),
    ];
    let counts = switched(
        &roles,
        |_| {},
        |net| {
            let (mut a, mut b, mut c) = (net.join("a", ""), net.join("b", ""), net.join("c", ""));
            // Two stations are behind a.
            a.send(&frame(ALL, 1, 1, 60));
            a.send(&frame(ALL, 7, 2, 60));
            a.send(&frame(address(7), 1, 3, 60));
            a.send(&frame(address(9), 1, 4, 60));
            let came = b.until_came(&frame(address(9), 1, 4, 60));
            assert_eq!(came, [frame(ALL, 1, 1, 60), frame(ALL, 7, 2, 60)]);
            b.send(&frame(ALL, 2, 5, 60));
            assert!(a.until_came(&frame(ALL, 2, 5, 60)).is_empty());
            c.send(&frame(address(1), 3, 6, 60));
            assert!(c.until_came(&frame(address(3), 1, 6, 60)).is_empty());
        },
    );
    counts.close();
    let of = |name| {
        let port = counts.of(name);
        (port.flooded, port.copies, port.filtered)
    };
    assert_eq!((of("a"), of("b"), of("c")), ((3, 0, 1), (1, 0, 0), (0, 0, 0)));
    assert_eq!((counts.of("d").stats.tx_packets, counts.of("d").dropped), (0, 0));
}

/// Addresses keep to their ports when a port before them is removed, and go with a port that leaves the bridge.
#[test]
fn addresses_follow_their_ports() {
    let counts = switched(
        &[("", Role::Learn); 3],
        |_| {},
        |net| {
            let (mut a, mut b, mut c) = (net.join("a", ""), net.join("b", ""), net.join("c", ""));
            for (host, n) in [(&mut a, 1), (&mut b, 2), (&mut c, 3)] {
                host.send(&frame(ALL, n, n, 60));
            }
            let known = || {
                let report = net.handle.report().unwrap();
                let all = report.addresses.iter().map(|entry| (entry.0.bytes(), entry.1));
                let mut all: Vec<_> = all.collect();
                all.sort_unstable();
                all
            };
            until("all are known", || known().len() == 3);
            net.handle.remove("a").unwrap();
            assert_eq!(known(), [(address(2), 0), (address(3), 1)]);
            b.send(&frame(address(3), 2, 9, 60));
            c.until_came(&frame(address(3), 2, 9, 60));
            let connected = Join::Connect("b".to_owned());
            net.handle
                .add("d", PortSpec::vhost(net.socket("d")), connected)
                .unwrap();
            assert_eq!(known(), [(address(3), 1)]);
        },
    );
    assert_eq!(counts.of("b").flooded, 1, "the frame to c is not flooded");
}

/// Receivers that are slow, full, leave or are removed; ports with no receiver.
#[test]
fn every_frame_is_in_a_counter() {
    let learn = ("", Role::Learn);
    switched(
        &[learn; 3],
        |_| {},
        |net| {
            let mut a = net.join("a", "");
            // Nobody else is there.
            (0..50).for_each(|n| a.send(&frame(ALL, 1, n, 60)));
            let b = net.join("b", ",queue_size=64");
            let mut c = net.join("c", "");
            // b never takes a frame: its ring fills up.
            for n in 0..200 {
                a.send(&frame(ALL, 1, n, 60));
                c.until_came(&frame(ALL, 1, n, 60));
            }
            drop(b);
            (0..50).for_each(|n| a.send(&frame(ALL, 1, n, 60)));
            net.handle.remove("b").unwrap();
            a.send(&frame(address(1), 1, 1, 60));
            a.send(&frame(ALL, 1, 255, 60));
            c.until_came(&frame(ALL, 1, 255, 60));
        },
    )
    .close();
    // A cross-connect holds what its receiver does not take; the ends of it are removed in either order, or not at all.
    for gone in ["a", "b", "ab", "ba", ""] {
        let counts = switched(
            &[("", Role::Connect(1)), ("", Role::Connect(0))],
            |_| {},
            |net| {
                let mut a = net.join("a", "");
                let held = |net: &Net| net.handle.report().unwrap().ports[0].stats.rx_packets;
                (0..10).for_each(|n| a.send(&frame(ALL, 1, n, 60)));
                until("the switch takes them", || held(net) == 10);
                gone.chars()
                    .for_each(|name| net.handle.remove(&name.to_string()).unwrap());
            },
        );
        counts.close();
        let went: u64 = counts.0.iter().map(|port| port.dropped + port.filtered).sum();
        assert_eq!(went, 10, "removed: {gone:?}");
        // What a removed port held was dropped then, and is not left at the end.
        assert_eq!(counts.1, gone.contains('a'), "removed: {gone:?}");
    }
}
