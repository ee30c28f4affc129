//! Every mistake of an operator: a non-zero exit, one clear message, nothing left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder of its own for each test, in which nothing may be left but what the test put there.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Place {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_usernic"))
            .args(arguments)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    /// Runs, and checks the exit status, that the message holds `texts`, that it is one, and that no file was made.
    fn fails(&self, status: i32, arguments: &[&str], texts: &[&str]) {
        let before = files(self.dir.path());
        let output = self.run(arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
        for text in texts {
            assert!(message.contains(text), "{arguments:?}: {text:?} is not in: {message}");
        }
        let says = message
            .lines()
            .filter(|l| l.starts_with("usernic:") || l.starts_with("error:"))
            .count();
        assert_eq!(says, 1, "{arguments:?}: one message: {message}");
        assert!(!message.contains("panicked"), "{message}");
        assert_eq!(files(self.dir.path()), before, "{arguments:?} left something behind");
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

#[test]
fn no_such_socket() {
    let place = Place::new();
    for command in ["generate", "forward"] {
        let line = [command, "--wait", "0", "--port", "virtio-user,path=none.sock"];
        place.fails(1, &line, &["none.sock"]);
    }
    place.fails(
        1,
        &[
            "capture",
            "--wait",
            "0.1",
            "--port",
            "virtio-user,path=none.sock",
            "--pcap",
            "x.pcap",
        ],
        &["none.sock"],
    );
    place.fails(
        1,
        &["stats", "--control", "none"],
        &["cannot connect to none", "--control"],
    );
}

#[test]
fn a_socket_path_that_is_too_long() {
    let place = Place::new();
    let long = "x".repeat(120);
    place.fails(
        1,
        &["generate", "--port", &format!("virtio-user,path=/tmp/{long}")],
        &["107"],
    );
    place.fails(1, &["switch", "--listen", &format!("/tmp/{long}")], &["107"]);
}

#[test]
fn port_specs_that_are_none() {
    let place = Place::new();
    for (size, text) in [
        ("0", "from 2 to 32768"),
        ("3", "power of two"),
        ("65536", "from 2 to 32768"),
    ] {
        let spec = format!("virtio-user,path=s,queue_size={size}");
        place.fails(2, &["generate", "--port", &spec], &["queue_size", text]);
    }
    place.fails(
        2,
        &["generate", "--port", "virtio-user,path=s,queue_siz=2"],
        &["did you mean queue_size"],
    );
    place.fails(
        2,
        &["generate", "--port", "virtio-usr,path=s"],
        &["did you mean virtio-user"],
    );
    place.fails(
        2,
        &["generate", "--port", "virtio-user,path=s,queues"],
        &["queues=VALUE"],
    );
    place.fails(2, &["generate", "--port", "virtio-user"], &["needs path="]);
    place.fails(2, &["generate"], &["--port"]);
}

/// A capture of two frames, little-endian, microseconds.
fn capture(lengths: &[usize]) -> Vec<u8> {
    let mut bytes = vec![
        0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0,
    ];
    for len in lengths {
        for word in [1, 0, *len as u32, *len as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.resize(bytes.len() + len, 0x11);
    }
    bytes
}

#[test]
fn captures_that_are_none() {
    let place = Place::new();
    let good = capture(&[60, 60]);
    std::fs::write(place.path("cut.pcap"), &good[..good.len() - 7]).unwrap();
    std::fs::write(place.path("text.pcap"), "no capture at all").unwrap();
    std::fs::write(place.path("empty.pcap"), "").unwrap();
    let port = ["--port", "virtio-user,path=none.sock"];
    let fails = |file: &str, texts: &[&str]| {
        place.fails(1, &["replay", port[0], port[1], "--strict", "--pcap", file], texts);
        place.fails(1, &["demo", "--pcap", file], texts);
    };
    fails(
        "cut.pcap",
        &["cut.pcap", "truncated in frame 2", "offset 100 needs 76 bytes, 69"],
    );
    fails("text.pcap", &["text.pcap", "not a capture", "begins with"]);
    fails("empty.pcap", &["empty.pcap", "the file is empty"]);
    fails("none.pcap", &["none.pcap", "No such file"]);
}

#[test]
fn frames_that_are_too_long() {
    let place = Place::new();
    std::fs::write(place.path("long.pcap"), capture(&[60, 2000])).unwrap();
    std::fs::write(place.path("longer.pcap"), capture(&[60, 60, 12_000])).unwrap();
    // A back-end that nobody drives is enough: the link comes up, and nothing is sent.
    let socket = place.path("s");
    let port = usernic::Port::open(&format!("vhost,path={}", socket.display())).unwrap();
    let spec = format!("virtio-user,path={}", socket.display());
    place.fails(
        1,
        &["replay", "--port", &spec, "--strict", "--pcap", "long.pcap"],
        &["frame 2 has 2000 bytes", "mtu=1500 sends at most 1514", "larger mtu="],
    );
    place.fails(
        1,
        &["generate", "--port", &spec, "--size", "2000"],
        &["2000 bytes", "mtu=1500"],
    );
    place.fails(
        1,
        &["demo", "--pcap", "longer.pcap"],
        &["frame 3 has 12000 bytes", "at most 9724"],
    );
    drop(port);
    assert!(!socket.exists(), "a port that is closed takes its socket away");
}

#[test]
fn queues_that_the_back_end_has_not() {
    let place = Place::new();
    let socket = place.path("s");
    let port = usernic::Port::open(&format!("vhost,path={},queues=1", socket.display())).unwrap();
    let spec = format!("virtio-user,path={},queues=4", socket.display());
    place.fails(1, &["generate", "--port", &spec], &["queue"]);
    let spec = format!("virtio-user,path={}", socket.display());
    place.fails(
        1,
        &["replay", "--port", &spec, "--queue", "1", "--pcap", "x"],
        &["x: cannot read it"],
    );
    place.fails(
        1,
        &["capture", "--port", &spec, "--queue", "1", "--pcap", "x"],
        &["queue 1", "queues="],
    );
    drop(port);
}

#[test]
fn arguments_that_contradict_each_other() {
    let place = Place::new();
    let port = ["--port", "virtio-user,path=s"];
    place.fails(
        2,
        &["ping", port[0], port[1], "--from", "192.0.2.1", "--to", "2001:db8::1"],
        &["one family"],
    );
    place.fails(
        2,
        &["generate", port[0], port[1], "--ip", "192.0.2.1", "2001:db8::1"],
        &["one family"],
    );
    place.fails(2, &["forward", port[0], port[1], "--ip", "192.0.2.1"], &["icmpecho"]);
    place.fails(
        2,
        &["forward", port[0], port[1], port[0], port[1], port[0], port[1]],
        &["one or two"],
    );
    place.fails(
        2,
        &["switch", "--listen", "a,b", "--connect", "a:c"],
        &["no port \"c\"", "a, b"],
    );
    place.fails(2, &["switch", "--listen", "a,b", "--connect", "a:a"], &["--reflect"]);
    place.fails(2, &["switch"], &["--listen"]);
    place.fails(
        2,
        &["capture", port[0], port[1], "--pcap", "-", "--json"],
        &["standard output"],
    );
    place.fails(2, &["generate", port[0], port[1], "--size", "59"], &["60 to 9724"]);
    for rate in ["0", "-1", "nan", "1e999", "1Tbit", "1Gbps", "10%"] {
        let rate = format!("--rate={rate}");
        place.fails(
            2,
            &["generate", port[0], port[1], &rate],
            &["--rate", "10Gbit", "above 0"],
        );
    }
    for seconds in ["-1", "nan", "1e30", "31536001", "1s"] {
        let seconds = format!("--seconds={seconds}");
        place.fails(
            2,
            &["generate", port[0], port[1], &seconds],
            &["--seconds", "at the most"],
        );
    }
    for count in ["-1", "0.5", "99999999999G", "18446744073709551616"] {
        let count = format!("--count={count}");
        place.fails(2, &["generate", port[0], port[1], &count], &["--count", "whole number"]);
    }
    place.fails(2, &["demonstrate"], &["demonstrate"]);
}

#[test]
fn a_cpu_that_is_not_there() {
    let place = Place::new();
    place.fails(
        1,
        &["generate", "--port", "virtio-user,path=s", "--cpu", "1023"],
        &["CPU 1023", "may use"],
    );
}

#[test]
fn an_error_is_json_too_when_asked() {
    let place = Place::new();
    let output = place.run(&[
        "--json",
        "generate",
        "--wait",
        "0",
        "--port",
        "virtio-user,path=none.sock",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["error"].as_str().unwrap().contains("none.sock"));
}
