//! Programs give up what they do not need once their ports are open, and say so.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A capture, ended when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn capture(dir: &Path, more: &[&str]) -> (Running, Value) {
    let control = dir.join("control");
    let child = Command::new(env!("CARGO_BIN_EXE_usernic"))
        .args([
            "capture",
            "--port",
            "virtio-user,memory=memfd,path=a",
            "--pcap",
            "out.pcap",
            "--control",
            "control",
        ])
        .args(more)
        .current_dir(dir)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let stats = Command::new(env!("CARGO_BIN_EXE_usernic"))
            .args(["--json", "stats"])
            .arg("--control")
            .arg(&control)
            .output()
            .unwrap();
        if stats.status.success() {
            return (running, serde_json::from_slice(&stats.stdout).unwrap());
        }
        assert!(Instant::now() < end, "{}", String::from_utf8_lossy(&stats.stderr));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn back_end(dir: &Path) -> usernic::Port {
    usernic::Port::open(&format!("vhost,path={}", dir.join("a").display())).unwrap()
}

/// The line of this key of each thread's status.
fn of_threads(child: &Child, key: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let line = |text: String| {
        text.lines()
            .find(|line| line.starts_with(key))
            .unwrap_or_default()
            .to_owned()
    };
    let status =
        |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("status"));
    tasks.map(|task| line(status(task).unwrap())).collect()
}

#[test]
fn a_running_program_is_confined_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let back_end = back_end(dir.path());
    let (running, stats) = capture(dir.path(), &[]);
    assert_eq!(stats["confined"]["calls"], true, "{stats}");
    if stats["confined"]["files"] == "no" {
        println!("SKIPPED confine/files: this kernel has no Landlock");
    } else {
        assert!(stats["confined"]["files"].is_string(), "{stats}");
    }
    for (key, value) in [("Seccomp:", "Seccomp:\t2"), ("NoNewPrivs:", "NoNewPrivs:\t1")] {
        let threads = of_threads(&running.0, key);
        assert!(
            threads.len() > 1 && threads.iter().all(|line| line == value),
            "{threads:?}"
        );
    }
    // It still works: its back-end goes, and comes again.
    assert!(back_end.wait_link(Duration::from_secs(5)));
    drop(back_end);
    assert!(self::back_end(dir.path()).wait_link(Duration::from_secs(10)));
}

#[test]
fn confinement_can_be_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let _back_end = back_end(dir.path());
    let (running, stats) = capture(dir.path(), &["--no-confine"]);
    assert_eq!(
        (&stats["confined"]["calls"], &stats["confined"]["files"]),
        (&false.into(), &Value::Null)
    );
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("Seccomp:")).unwrap();
    assert!(of_threads(&running.0, "Seccomp:").iter().all(|line| line == own));
}
