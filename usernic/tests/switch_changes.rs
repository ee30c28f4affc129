//! A switch whose ports come and go while it runs.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::until;
use usernic::spec::PortSpec;
use usernic::switch::{Join, Role, Switch, SwitchConfig, SwitchError, SwitchHandle};
use usernic::{Burst, Port, Queue};

/// Runs an empty switch beside `test`.
fn beside(test: impl FnOnce(&SwitchHandle, &Path)) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut switch = Switch::new(SwitchConfig::default()).unwrap();
    let handle = switch.handle();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            switch.run(&stop).unwrap();
            drop(switch);
        });
        let end = Stop(&stop);
        test(&handle, dir.path());
        drop(end);
        thread.join().unwrap();
    });
    assert!(
        matches!(handle.report(), Err(SwitchError::NotRunning)),
        "nobody answers for a switch that is gone"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "sockets are left");
}

fn spec(dir: &Path, name: &str) -> PortSpec {
    PortSpec::vhost(dir.join(name))
}

struct Host {
    queue: Queue,
    _port: Port,
    burst: Burst,
    number: u8,
}

impl Host {
    /// On the port of this name, once the switch has seen it come: what is sent to a port that is down is dropped.
    fn join(handle: &SwitchHandle, socket: PathBuf, number: u8) -> Self {
        let port = Port::open(&format!("virtio-user,path={}", socket.display())).unwrap();
        let name = socket.file_name().unwrap().to_string_lossy();
        until("the switch to see a port come", || {
            let report = handle.report().unwrap();
            report.ports.iter().any(|port| port.name == name && port.link_up)
        });
        Host {
            queue: port.queue(0).unwrap(),
            _port: port,
            burst: Burst::new(32),
            number,
        }
    }

    fn send(&mut self, to: u8, number: u32) {
        let mut bytes = [0u8; 64];
        bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, self.number, 8, 0]);
        bytes[14..18].copy_from_slice(&number.to_be_bytes());
        until("room to send", || {
            let mut burst = Burst::new(1);
            self.queue.alloc(&mut burst, 1);
            burst.first_mut().is_some_and(|packet| packet.copy_from(&bytes).is_ok()) && self.queue.tx(&mut burst) == 1
        });
    }

    /// The number of the next frame, which is to be this one.
    fn next(&mut self, number: u32) -> u32 {
        self.burst.clear();
        until(&format!("frame {number} at host {}", self.number), || {
            self.queue.rx(&mut self.burst) > 0
        });
        assert_eq!(self.burst.len(), 1);
        let mut bytes = [0u8; 18];
        self.burst[0].copy_to(&mut bytes);
        u32::from_be_bytes([bytes[14], bytes[15], bytes[16], bytes[17]])
    }
}

#[test]
fn ports_come_and_go_beside_traffic() {
    beside(|handle, dir| {
        for name in ["x", "a", "b"] {
            handle.add(name, spec(dir, name), Join::Learn).unwrap();
        }
        let (mut a, mut b) = (
            Host::join(handle, dir.join("a"), 1),
            Host::join(handle, dir.join("b"), 2),
        );
        // Each learns the other's place.
        a.send(2, 0);
        assert_eq!(b.next(0), 0);
        b.send(1, 0);
        assert_eq!(a.next(0), 0);
        for round in 1..200u32 {
            match round % 4 {
                0 => handle.add("c", spec(dir, "c"), Join::Learn).unwrap(),
                // In front of those two: their places move.
                1 => handle.remove("x").unwrap(),
                2 => handle.add("x", spec(dir, "x"), Join::Reflect).unwrap(),
                _ if round > 3 => handle.remove("c").unwrap(),
                _ => {}
            }
            a.send(2, round);
            assert_eq!(b.next(round), round);
            b.send(1, round);
            assert_eq!(a.next(round), round);
        }
        let report = handle.report().unwrap();
        let seen = |name: &str| report.ports.iter().find(|port| port.name == name).unwrap();
        assert_eq!((seen("a").stats.rx_packets, seen("b").stats.rx_packets), (200, 200));
        assert_eq!((seen("a").dropped, seen("b").dropped), (0, 0));
        let place = |mac: &str| {
            report
                .addresses
                .iter()
                .find(|entry| entry.0.to_string() == mac)
                .unwrap()
                .1
        };
        assert_eq!(report.ports[place("02:00:00:00:00:01")].name, "a");
        assert_eq!(report.ports[place("02:00:00:00:00:02")].name, "b");
    });
}

#[test]
fn connected_ports_know_where_their_neighbour_is() {
    beside(|handle, dir| {
        handle.add("x", spec(dir, "x"), Join::Learn).unwrap();
        handle.add("a", spec(dir, "a"), Join::Learn).unwrap();
        handle.add("b", spec(dir, "b"), Join::Connect("a".into())).unwrap();
        let other = handle.add("c", spec(dir, "c"), Join::Connect("a".into()));
        assert!(matches!(other, Err(SwitchError::Taken { .. })), "{other:?}");
        handle.remove("x").unwrap();
        assert_eq!(handle.report().unwrap().roles, [Role::Connect(1), Role::Connect(0)]);

        let (mut a, mut b) = (
            Host::join(handle, dir.join("a"), 1),
            Host::join(handle, dir.join("b"), 2),
        );
        // To an address that a bridge would send elsewhere.
        a.send(1, 7);
        assert_eq!(b.next(7), 7);
        handle.remove("b").unwrap();
        // Nowhere to go: the frame is held, and not lost when another neighbour comes.
        a.send(1, 8);
        drop(b);
        handle.add("d", spec(dir, "d"), Join::Learn).unwrap();
        let mut d = Host::join(handle, dir.join("d"), 3);
        handle.add("e", spec(dir, "e"), Join::Connect("a".into())).unwrap();
        let mut e = Host::join(handle, dir.join("e"), 4);
        assert_eq!(e.next(8), 8);
        d.burst.clear();
        assert_eq!(
            d.queue.rx(&mut d.burst),
            0,
            "a frame of a connected port is in the bridge"
        );
    });
}

#[test]
fn what_cannot_be_is_said_and_leaves_nothing() {
    beside(|handle, dir| {
        handle.add("a", spec(dir, "a"), Join::Learn).unwrap();
        let twice = handle.add("a", spec(dir, "other"), Join::Learn);
        assert!(matches!(twice, Err(SwitchError::NameTaken { .. })), "{twice:?}");
        assert!(!dir.join("other").exists());
        let same_socket = handle.add("b", spec(dir, "a"), Join::Learn);
        assert!(matches!(same_socket, Err(SwitchError::Port { .. })), "{same_socket:?}");
        let nobody = handle.add("b", spec(dir, "b"), Join::Connect("c".into()));
        assert!(matches!(nobody, Err(SwitchError::NoPort { .. })), "{nobody:?}");
        let gone = handle.remove("b");
        assert!(matches!(gone, Err(SwitchError::NoPort { .. })), "{gone:?}");
        assert_eq!(handle.report().unwrap().ports.len(), 1);
    });
}

#[test]
fn a_socket_has_the_mode_and_group_that_were_asked_for() {
    beside(|handle, dir| {
        let group = rustix::process::getgid().as_raw();
        let text = format!("vhost,path={}/a,socket_mode=0620,socket_owner=:{group}", dir.display());
        handle.add("a", text.parse().unwrap(), Join::Learn).unwrap();
        let mode = std::fs::metadata(dir.join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o620);
        if !rustix::process::getuid().is_root() {
            let text = format!("vhost,path={}/b,socket_owner=0", dir.display());
            let refused = handle.add("b", text.parse().unwrap(), Join::Learn);
            assert!(refused.is_err());
            assert!(!dir.join("b").exists(), "a socket that not all may reach is not left");
        }
    });
}
