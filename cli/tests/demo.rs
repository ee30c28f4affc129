//! The demo as a newcomer runs it, and its end by force.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The processes whose command line has `text` in it.
fn processes(text: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let holds = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
    };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(holds)
        .collect()
}

fn demo(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    command
        .args(["demo", "--json", "--out"])
        .arg(folder)
        .env("TMPDIR", folder);
    command
}

/// The folder must be passable for nobody, as /tmp is: the container's user enters its sockets' folder through it.
fn open_folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    dir
}

#[test]
fn a_folder_for_temporary_files_that_will_not_do_is_named_with_its_variable() {
    let dir = open_folder();
    let long = dir.path().join("x".repeat(100));
    std::fs::create_dir(&long).unwrap();
    for folder in [long, dir.path().join("missing")] {
        let output = demo(dir.path()).env("TMPDIR", &folder).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{message}");
        let named = message.contains(&*folder.to_string_lossy()) && message.contains("TMPDIR");
        assert!(named, "{message}");
    }
}

#[test]
fn the_capture_arrives_and_everything_is_measured() {
    let dir = open_folder();
    let output = demo(dir.path()).args(["--seconds", "1"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["schema"], "usernic.demo/1");
    assert_eq!(
        (value["replay"]["frames"].as_u64(), value["replay"]["received"].as_u64()),
        (Some(300), Some(300))
    );
    assert_eq!(value["replay"]["chain_sent"], value["replay"]["chain_received"]);
    assert!(value["replay"]["difference"].is_null());
    for container in value["containers"].as_array().unwrap() {
        let proof = &container["proof"];
        assert_eq!(proof["uid"], "65534 65534 65534 65534");
        assert_eq!(proof["interfaces"], serde_json::json!(["lo"]));
        assert_eq!(proof["no_new_privs"], "1");
        for set in proof["capabilities"].as_array().unwrap() {
            assert_eq!(set[1], "0000000000000000", "{set}");
        }
    }
    assert_eq!(value["rows"].as_array().unwrap().len(), 4, "{}", value["missing"]);
    for row in value["rows"].as_array().unwrap() {
        assert!(row["p50_ns"]["median"].as_f64() > Some(0.0), "{row}");
        assert!(
            row["p50_ns"]["median"].as_f64() <= row["p99_ns"]["median"].as_f64(),
            "{row}"
        );
    }
    let file = std::fs::read_to_string(dir.path().join("usernic-demo.json")).unwrap();
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&file).unwrap()["schema"],
        "usernic.demo/1"
    );
    assert!(
        std::fs::read_to_string(dir.path().join("usernic-demo.svg"))
            .unwrap()
            .contains("Mpps")
    );
    // The two files, and nothing else.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    assert!(processes(&dir.path().display().to_string()).is_empty());
}

/// Starts a demo and waits until a container runs: the demo itself, the container's waiting process and the isolated
/// one. That lasts for seconds; both containers at once only for the replay, which may pass between two looks.
fn started(folder: &Path) -> Child {
    let mut child = demo(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let text = folder.display().to_string();
    let start = Instant::now();
    while processes(&text).len() < 3 {
        if start.elapsed() > Duration::from_secs(30) || child.try_wait().unwrap().is_some() {
            let seen = processes(&text);
            let _ = child.kill();
            let output = child.wait_with_output().unwrap();
            panic!(
                "no container in {:?}; processes {seen:?}; {}: {}",
                start.elapsed(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

#[test]
fn nothing_survives_a_killed_demo() {
    let dir = open_folder();
    let mut child = started(dir.path());
    child.kill().unwrap();
    child.wait().unwrap();
    let text = dir.path().display().to_string();
    let start = Instant::now();
    while !processes(&text).is_empty() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "still there: {:?}",
            processes(&text)
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_ends_the_demo_and_leaves_nothing() {
    let dir = open_folder();
    let child = started(dir.path());
    // SAFETY: a signal to a child that was not waited for: the number is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ended by a signal"));
    assert!(processes(&dir.path().display().to_string()).is_empty());
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "a socket was left behind"
    );
}
