//! The programs together: a switch, and everything that a port can be used for, over real sockets.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

struct Lab {
    dir: TempDir,
}

/// A running program, killed if the test fails.
struct Running(Option<Child>);

impl Running {
    /// Sends a signal.
    fn signal(&self, signal: i32) {
        let pid = self.0.as_ref().unwrap().id() as i32;
        // SAFETY: a signal to a child that was not waited for: the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end: exit status and JSON.
    fn end(mut self) -> (Option<i32>, Value) {
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        (output.status.code(), json(&output))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.trim())
        .unwrap_or_else(|e| panic!("{e}: {text:?}, stderr: {}", String::from_utf8_lossy(&output.stderr)))
}

impl Lab {
    fn new() -> Self {
        Lab {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
        command
            .arg("--json")
            .args(line.split_whitespace())
            .current_dir(self.dir.path());
        command
    }

    fn start(&self, line: &str) -> Running {
        let child = self
            .command(line)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running(Some(child))
    }

    fn run(&self, line: &str) -> Value {
        let output = self.command(line).output().unwrap();
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        json(&output)
    }

    /// Starts a switch with a control socket, and waits until it serves it.
    fn switch(&self, arguments: &str) -> Running {
        let switch = self.start(&format!("switch {arguments} --control ctl"));
        self.until("the switch serves its control socket", || self.path("ctl").exists());
        switch
    }

    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the switch says that the links of these ports are up.
    fn until_up(&self, ports: &[&str]) {
        self.until(&format!("{ports:?} are up"), || {
            let output = self.command("stats --control ctl").output().unwrap();
            let stats: Value = serde_json::from_slice(&output.stdout).unwrap();
            let list = stats["ports"].as_array().unwrap();
            ports
                .iter()
                .all(|name| list.iter().any(|p| p["name"] == *name && p["link_up"] == true))
        });
    }
}

fn port(value: &Value, name: &str) -> Value {
    value["ports"]
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["name"] == name)
        .unwrap()
        .clone()
}

#[test]
fn a_capture_goes_through_the_cross_connect() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --count 600 --timeout 20");
    lab.until_up(&["b"]);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/data/demo.pcap");
    let sent = lab.run(&format!("replay --port virtio-user,path=a --loop 2 --pcap {demo}"));
    assert_eq!(
        (sent["schema"].as_str(), sent["ended"].as_str()),
        (Some("usernic.replay/1"), Some("count"))
    );
    assert_eq!(sent["frames"], 600);
    let (status, got) = capture.end();
    assert_eq!(
        (status, got["frames"].as_u64(), got["ended"].as_str()),
        (Some(0), Some(600), Some("count")),
        "{got}"
    );
    // Record by record, but for the timestamps: the same lengths and bytes, twice.
    let frames = |bytes: &[u8]| {
        let mut frames = Vec::new();
        let mut at = 24;
        while at < bytes.len() {
            let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
            frames.push(bytes[at + 16..at + 16 + len].to_vec());
            at += 16 + len;
        }
        frames
    };
    let original = frames(&std::fs::read(demo).unwrap());
    let received = frames(&std::fs::read(lab.path("out.pcap")).unwrap());
    assert!(
        received == [original.clone(), original].concat(),
        "the capture changed on its way"
    );
    switch.signal(libc::SIGINT);
    let (status, totals) = switch.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("signal")));
    assert_eq!(
        (
            port(&totals, "a")["rx_packets"].as_u64(),
            port(&totals, "b")["tx_packets"].as_u64()
        ),
        (Some(600), Some(600))
    );
    for file in ["a", "b", "ctl"] {
        assert!(!lab.path(file).exists(), "{file} was left behind");
    }
}

#[test]
fn a_host_is_pinged_in_both_families() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b");
    let host = lab.start("forward --port virtio-user,path=b --mode icmpecho --ip 192.0.2.2 --ip 2001:db8::2");
    lab.until_up(&["b"]);
    for (from, to) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let pinged = lab.run(&format!(
            "ping --port virtio-user,path=a --from {from} --to {to} --count 3 -i 0.02"
        ));
        assert_eq!(
            (pinged["sent"].as_u64(), pinged["received"].as_u64()),
            (Some(3), Some(3)),
            "{pinged}"
        );
        assert!(pinged["max_us"].as_f64() >= pinged["min_us"].as_f64());
    }
    let nobody = lab
        .command("ping --port virtio-user,path=a --from 192.0.2.1 --to 192.0.2.9 -c 1")
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1), "an address that nobody has");
    host.signal(libc::SIGTERM);
    let (status, totals) = host.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("signal")));
    // Two questions for the address, six echoes; more when the machine is slow and a question was repeated.
    assert!(totals["forwarded"].as_u64() >= Some(8), "{totals}");
    switch.signal(libc::SIGTERM);
    assert_eq!(switch.end().0, Some(0));
}

#[test]
fn generated_frames_are_counted_everywhere() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect 0:1");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --timeout 30");
    lab.until_up(&["b"]);
    let made = lab.run("generate --port virtio-user,path=a --count 1000 --rate 20K --size 60-100");
    assert_eq!(
        (made["frames"].as_u64(), made["ended"].as_str()),
        (Some(1000), Some("count"))
    );
    assert!(
        made["seconds"].as_f64() >= Some(0.04),
        "1000 at 20 K a second take 50 ms: {made}"
    );
    // The captured file is whole even though a signal ends it.
    lab.until("all frames are captured", || {
        std::fs::metadata(lab.path("out.pcap")).is_ok_and(|m| m.len() >= 24 + 1000 * 76)
    });
    std::thread::sleep(Duration::from_millis(100));
    capture.signal(libc::SIGINT);
    let (status, got) = capture.end();
    assert_eq!((status, got["frames"].as_u64()), (Some(0), Some(1000)), "{got}");
    // What was written is a capture; and since nobody is behind b now, the cross-connect holds it, and the sender ends.
    let line = "replay --port virtio-user,path=a --pcap out.pcap --stall 0.3";
    let held = lab.command(line).output().unwrap();
    let message = String::from_utf8_lossy(&held.stderr);
    assert_eq!(held.status.code(), Some(1), "{message}");
    assert!(
        message.contains("taken no frame for 0.3 s") && message.contains("of 1000 frames"),
        "{message}"
    );
    drop(switch);
}

#[test]
fn a_reflector_returns_frames_and_a_timer_ends_programs() {
    let lab = Lab::new();
    let switch = lab.switch("--listen r --reflect r --seconds 3");
    let begun = Instant::now();
    let made = lab.run("generate --port virtio-user,path=r --seconds 0.3");
    assert_eq!(made["ended"], "time");
    assert!(
        made["frames"].as_u64() > Some(100) && made["ports"][0]["rx_packets"].as_u64() > Some(0),
        "{made}"
    );
    let (status, totals) = switch.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("time")));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn two_ports_are_joined_by_forward() {
    let lab = Lab::new();
    let left = lab.switch("--listen a,b --connect a:b");
    std::fs::rename(lab.path("ctl"), lab.path("ctl-left")).unwrap();
    let right = lab.switch("--listen c,d --connect c:d");
    let forward = lab.start("forward --port virtio-user,path=b --port virtio-user,path=c --mode macswap");
    let capture = lab.start("capture --port virtio-user,path=d --pcap out.pcap --count 100 --timeout 20");
    lab.until_up(&["c", "d"]);
    lab.run(
        "generate --port virtio-user,path=a --count 100 --rate 10K --dst 02:00:00:00:00:0b --src 02:00:00:00:00:0a",
    );
    let (status, got) = capture.end();
    assert_eq!((status, got["frames"].as_u64()), (Some(0), Some(100)), "{got}");
    let bytes = std::fs::read(lab.path("out.pcap")).unwrap();
    assert_eq!(
        bytes[40..52],
        [2, 0, 0, 0, 0, 0x0a, 2, 0, 0, 0, 0, 0x0b],
        "addresses have changed places"
    );
    forward.signal(libc::SIGINT);
    assert_eq!(forward.end().1["forwarded"], 100);
    drop((left, right));
}

#[test]
fn a_capture_to_the_standard_output() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    let line = "capture --port virtio-user,path=b --pcap - --count 3 --timeout 20";
    command.args(line.split_whitespace()).current_dir(lab.dir.path());
    let capture = Running(Some(
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(),
    ));
    lab.until_up(&["b"]);
    lab.run("generate --port virtio-user,path=a --count 3");
    let mut capture = capture;
    let output = capture.0.take().unwrap().wait_with_output().unwrap();
    assert_eq!(output.stdout.len(), 24 + 3 * (16 + 64));
    assert_eq!(output.stdout[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
    drop(switch);
}
