//! The switch as a service: changed while it runs, counted, restarted.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use usernic::{Burst, Port, Queue};

struct Place(tempfile::TempDir);

/// A switch that is ended when the test is.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn signal(&mut self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
        assert!(signal == rustix::process::Signal::KILL || self.0.wait().unwrap().success());
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
        command
            .args(args)
            .current_dir(self.0.path())
            .env_remove("NOTIFY_SOCKET");
        command
    }

    /// Starts a switch that keeps its ports, and waits until it says that it is ready.
    fn switch(&self, more: &[&str]) -> Running {
        let notify = self.path("notify");
        let _ = std::fs::remove_file(&notify);
        let told = UnixDatagram::bind(&notify).unwrap();
        told.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut command = self.command(&["switch", "--control", "ctl", "--state", "state"]);
        command.args(more).env("NOTIFY_SOCKET", &notify);
        let running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let mut text = [0; 64];
        let n = told.recv(&mut text).expect("READY of a switch that started");
        assert_eq!(text[..n].trim_ascii(), b"READY=1");
        running
    }

    fn ctl(&self, args: &[&str]) -> Output {
        let mut command = self.command(&["switch", "ctl", "--control", "ctl"]);
        command.args(args).output().unwrap()
    }

    fn ask(&self, args: &[&str]) -> Value {
        let output = self.ctl(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

struct Host {
    port: Port,
    queue: Queue,
}

impl Host {
    fn join(socket: &Path) -> Self {
        let port = Port::open(&format!("virtio-user,path={}", socket.display())).unwrap();
        let queue = port.queue(0).unwrap();
        Host { port, queue }
    }

    fn send(&mut self, frame: &[u8]) {
        let mut burst = Burst::new(1);
        self.queue.alloc(&mut burst, 1);
        burst[0].copy_from(frame).unwrap();
        until("room", || self.queue.tx(&mut burst) == 1 || burst.is_empty());
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut burst = Burst::new(1);
        self.queue.rx(&mut burst);
        let packet = burst.first()?;
        let mut bytes = vec![0; packet.len()];
        packet.copy_to(&mut bytes);
        Some(bytes)
    }
}

const FRAME: &[u8] =
    b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x01\x08\x00 for everybody who is there ........................";

fn crosses(from: &mut Host, to: &mut Host) {
    until("a frame crosses", || {
        from.send(FRAME);
        std::thread::sleep(Duration::from_millis(2));
        to.receive().is_some_and(|bytes| bytes == FRAME)
    });
}

#[test]
fn ports_are_added_counted_and_removed() {
    let place = Place::new();
    let _switch = place.switch(&["--metrics", "told"]);
    let spec = |name: &str| format!("vhost,path={name},socket_mode=0666");
    for name in ["a", "b"] {
        assert_eq!(place.ask(&["add", name, &spec(name)])["added"], true);
        assert_eq!(
            place.ask(&["add", name, &spec(name)])["added"],
            false,
            "the same port again is no change"
        );
    }
    let other = place.ctl(&["add", "a", &spec("c")]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("there is a port a"));
    assert!(!place.path("c").exists());
    let wrong = place.ctl(&["add", "d", "vhost"]);
    assert_eq!(wrong.status.code(), Some(2));

    let (mut a, mut b) = (Host::join(&place.path("a")), Host::join(&place.path("b")));
    crosses(&mut a, &mut b);
    let list = place.ask(&["list"]);
    assert_eq!(list["ports"][1]["name"], "b");
    assert_eq!(list["ports"][1]["spec"], spec("b"));
    assert_eq!(
        (&list["ports"][0]["role"], &list["ports"][0]["link_up"]),
        (&"learn".into(), &true.into())
    );
    let metrics = String::from_utf8(place.ctl(&["metrics"]).stdout).unwrap();
    assert!(metrics.contains("usernic_link_up{port=\"b\"} 1\n"), "{metrics}");
    assert!(
        !metrics.contains("usernic_rx_packets_total{port=\"a\"} 0\n"),
        "{metrics}"
    );
    let same = place
        .command(&["stats", "--control", "ctl", "--metrics"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&same.stdout).contains("usernic_switch_addresses 1\n"));
    // The socket for everybody tells, and changes nothing.
    let told = place
        .command(&["stats", "--control", "told", "--metrics"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("usernic_switch_addresses 1\n"));
    let refused = place
        .command(&["switch", "ctl", "--control", "told", "remove", "a"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("nothing is changed"));
    let addresses = String::from_utf8(place.ctl(&["addresses"]).stdout).unwrap();
    assert!(addresses.starts_with("02:00:00:00:00:01 a "), "{addresses}");

    assert_eq!(place.ask(&["remove", "a"])["removed"], true);
    assert!(!place.path("a").exists());
    until("the link is seen to be down", || !a.port.link().up);
    assert!(!place.ctl(&["remove", "a"]).status.success());
    assert_eq!(place.ask(&["remove", "a", "--if-exists"])["removed"], false);
}

#[test]
fn ports_and_their_front_ends_outlive_a_restart() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::KILL] {
        let place = Place::new();
        let mut switch = place.switch(&["--listen", "given"]);
        place.ask(&["add", "a", "vhost,path=a"]);
        place.ask(&["add", "gone", "vhost,path=gone"]);
        place.ask(&["add", "b", "vhost,path=b", "--connect", "a"]);
        place.ask(&["remove", "gone"]);
        let (mut a, mut b) = (Host::join(&place.path("a")), Host::join(&place.path("b")));
        crosses(&mut a, &mut b);
        switch.signal(signal);
        if signal == rustix::process::Signal::TERM {
            assert!(
                !place.path("a").exists() && !place.path("ctl").exists(),
                "sockets are left"
            );
        }
        until("the link is down", || !a.port.link().up && !b.port.link().up);
        let _switch = place.switch(&["--listen", "given"]);
        assert!(a.port.wait_link(Duration::from_secs(10)) && b.port.wait_link(Duration::from_secs(10)));
        crosses(&mut a, &mut b);
        let list = place.ask(&["list"]);
        let names: Vec<_> = list["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["given", "a", "b"]);
        assert_eq!(list["ports"][2]["role"]["connect"], "a");
    }
}

#[test]
fn a_port_that_cannot_be_kept_is_not_added() {
    let place = Place::new();
    let _switch = place.switch(&[]);
    std::fs::create_dir(place.path("state")).unwrap();
    assert!(!place.ctl(&["add", "a", "vhost,path=a"]).status.success());
    assert!(!place.path("a").exists());
    assert_eq!(place.ask(&["list"])["ports"].as_array().unwrap().len(), 0);
}
