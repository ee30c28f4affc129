//! A folder with programs of ours in it, over real sockets.

// Each test file is a program of its own, and none uses all of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A folder with programs of ours that run in it.
pub struct Lab {
    dir: TempDir,
}

/// A running program, killed if the test fails.
pub struct Running(pub Option<Child>);

impl Running {
    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = self.0.as_ref().unwrap().id() as i32;
        // SAFETY: a signal to a child that was not waited for: the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end: exit status and JSON.
    pub fn end(mut self) -> (Option<i32>, Value) {
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

/// The one JSON object on the standard output.
pub fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.trim())
        .unwrap_or_else(|e| panic!("{e}: {text:?}, stderr: {}", String::from_utf8_lossy(&output.stderr)))
}

impl Lab {
    /// An empty folder.
    pub fn new() -> Self {
        Lab {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program with `--json`, its words split at blanks.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
        command
            .arg("--json")
            .args(line.split_whitespace())
            .current_dir(self.dir.path());
        command
    }

    /// Starts one.
    pub fn start(&self, line: &str) -> Running {
        let child = self
            .command(line)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running(Some(child))
    }

    /// Runs one that succeeds.
    pub fn run(&self, line: &str) -> Value {
        let output = self.command(line).output().unwrap();
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        json(&output)
    }

    /// Starts a switch with a control socket, and waits until it serves it.
    pub fn switch(&self, arguments: &str) -> Running {
        let switch = self.start(&format!("switch {arguments} --control ctl"));
        self.until("the switch serves its control socket", || self.path("ctl").exists());
        switch
    }

    /// Waits for a condition.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the switch says that the links of these ports are up.
    pub fn until_up(&self, ports: &[&str]) {
        self.until(&format!("{ports:?} are up"), || {
            let output = self.command("stats --control ctl").output().unwrap();
            let stats: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let Some(list) = stats["ports"].as_array() else {
                return false;
            };
            ports
                .iter()
                .all(|name| list.iter().any(|p| p["name"] == *name && p["link_up"] == true))
        });
    }
}

/// A port of a switch's totals.
pub fn port(value: &Value, name: &str) -> Value {
    value["ports"]
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["name"] == name)
        .unwrap()
        .clone()
}

/// An Ethernet frame of `kind`, padded to 60 bytes.
pub fn ethernet(dst: [u8; 6], src: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [&dst[..], &src, &kind.to_be_bytes(), body].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A capture of little-endian microseconds: the time of each frame in microseconds, and the frame.
pub fn pcap<'a>(frames: impl IntoIterator<Item = (u32, &'a [u8])>) -> Vec<u8> {
    let mut bytes = vec![
        0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0,
    ];
    for (at, frame) in frames {
        for word in [at / 1_000_000, at % 1_000_000, frame.len() as u32, frame.len() as u32] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(frame);
    }
    bytes
}

/// The records of a little-endian capture: the time in nanoseconds of the second, and the frame.
pub fn records(bytes: &[u8]) -> Vec<(Duration, Vec<u8>)> {
    let (mut records, mut at) = (Vec::new(), 24);
    while at < bytes.len() {
        let word = |n: usize| u32::from_le_bytes(bytes[at + n..at + n + 4].try_into().unwrap());
        let (time, len) = (Duration::new(word(0).into(), word(4)), word(8) as usize);
        records.push((time, bytes[at + 16..at + 16 + len].to_vec()));
        at += 16 + len;
    }
    records
}
