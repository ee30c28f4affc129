//! `usernic doctor` as a program: what it prints, its status, and faults that are real.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use serde_json::Value;

fn doctor(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    command.arg("doctor").args(words);
    command
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let mut lines = text.lines();
    let value = serde_json::from_str(lines.next().unwrap_or_default()).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(lines.next(), None, "one object and no more");
    value
}

fn checks(report: &Value, level: &str) -> Vec<String> {
    let findings = report["findings"].as_array().unwrap();
    let at = findings.iter().filter(|f| f["level"] == level);
    at.map(|f| f["check"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_fault_is_told_with_its_mend_and_the_status() {
    let output = doctor(&["--port", "virtio-user,path=/nowhere/s.sock,memory=memfd"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("FAULT    no-back-end: /nowhere/s.sock"), "{text}");
    assert!(
        text.contains("-> start the switch first") && text.ends_with("not fit: 1 faults, 0 warnings\n"),
        "{text}"
    );
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));

    let output = doctor(&["--json", "--port", "virtio-user,path=/nowhere/s.sock,memory=memfd"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(
        (&report["schema"], &report["fit"]),
        (&"usernic.doctor/1".into(), &false.into())
    );
    assert_eq!(checks(&report, "fault"), ["no-back-end"]);
}

#[test]
fn a_port_that_can_be_opened_is_fit() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _back_end = usernic::Port::open(&format!("vhost,path={}", socket.display())).unwrap();
    let spec = format!("virtio-user,path={},memory=memfd", socket.display());
    let output = doctor(&["--json", "--port", &spec]).output().unwrap();
    let report = json(&output);
    assert_eq!(
        (output.status.code(), &report["fit"]),
        (Some(0), &true.into()),
        "{report:#}"
    );
    assert!(checks(&report, "ok").contains(&"back-end".to_owned()), "{report:#}");
    // The port is as it was: it serves the next one.
    let front = usernic::Port::open(&spec).unwrap();
    assert!(front.wait_link(std::time::Duration::from_secs(5)));
}

/// A path that is not whole begins where the program runs, as it does where a port is opened.
#[test]
fn a_relative_path_is_looked_for_where_the_program_runs() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sub/s");
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let _back_end = usernic::Port::open(&format!("vhost,path={}", socket.display())).unwrap();
    for (spec, check, path) in [
        ("virtio-user,path=sub/s,memory=memfd", "back-end", "sub/s"),
        ("vhost,path=sub/new", "socket", "sub/new"),
        ("vhost,path=new", "socket", "new"),
        ("virtio-user,path=./new,memory=memfd,server=1", "socket", "new"),
    ] {
        let output = doctor(&["--json", "--port", spec])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let report = json(&output);
        assert_eq!(output.status.code(), Some(0), "{spec}: {report:#}");
        let findings = report["findings"].as_array().unwrap();
        let told = findings.iter().find(|finding| finding["check"] == check).unwrap();
        let whole = dir.path().join(path).display().to_string();
        assert!(told["what"].as_str().unwrap().contains(&whole), "{spec}: {told}");
    }
}

#[test]
fn a_spinning_thread_is_measured() {
    let output = doctor(&["--json", "--spin", "0.05"]).output().unwrap();
    let report = json(&output);
    let jitter = report["jitter"].as_array().unwrap();
    assert!(
        !jitter.is_empty() && jitter.iter().all(|j| j["looks"].as_u64().unwrap() > 100),
        "{report:#}"
    );
}

#[test]
fn the_prepared_tree_is_read_in_place_of_the_machine() {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("proc/sys/kernel/osrelease", "3.10.0\n");
    write("proc/self/status", "Cpus_allowed_list:\t0-3,200\n");
    let tree = root.path().to_str().unwrap();
    let report = json(&doctor(&["--json", "--root", tree, "--cpu", "200,9"]).output().unwrap());
    assert_eq!(checks(&report, "fault"), ["kernel-too-old", "cpuset"], "{report:#}");

    let output = doctor(&["--root", tree, "--cpu", "200", "--cat", "2"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("mount -t resctrl"));
    write("sys/fs/resctrl/info/L3/cbm_mask", "ff\n");
    write("sys/fs/resctrl/info/L3/min_cbm_bits", "1\n");
    write("sys/fs/resctrl/schemata", "L3:0=ff\n");
    write("sys/devices/system/cpu/cpu200/cache/index3/id", "0\n");
    let output = doctor(&["--root", tree, "--cpu", "200", "--cat", "2"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("echo 'L3:0=c0' > /sys/fs/resctrl/usernic/schemata"),
        "{text}"
    );
    let cat = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
        assert!(
            command
                .arg("cat")
                .args(words)
                .args(["--root", tree])
                .status()
                .unwrap()
                .success()
        );
    };
    cat(&["--cpu", "200", "--ways", "2"]);
    let schemata = || std::fs::read_to_string(root.path().join("sys/fs/resctrl/schemata")).unwrap();
    assert_eq!(schemata(), "L3:0=3f\n");
    cat(&["--undo"]);
    assert_eq!(schemata(), "L3:0=ff\n");
}

/// Real: this program under a filter that refuses what a port needs.
#[test]
fn a_seccomp_filter_that_is_too_tight_is_named() {
    use seccompiler::{SeccompAction, SeccompFilter};
    let refused = [libc::SYS_memfd_create, libc::SYS_membarrier, libc::SYS_io_setup];
    let filter = SeccompFilter::new(
        refused.into_iter().map(|call| (call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    let mut command = doctor(&["--json"]);
    // SAFETY: between fork and exec two system calls are made; the program was made before.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into()));
    }
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(checks(&report, "fault"), ["seccomp-too-tight"; 2], "{report:#}");
    assert!(report["findings"].to_string().contains("allow io_setup"), "{report:#}");
    assert!(
        checks(&report, "warning").contains(&"seccomp-too-tight".to_owned()),
        "{report:#}"
    );
    assert!(
        report["findings"].to_string().contains("allow memfd_create"),
        "{report:#}"
    );
}

/// Real: a CPU that this process may not use.
#[test]
fn a_cpu_outside_of_the_affinity_is_a_fault() {
    let report = json(&doctor(&["--json", "--cpu", "8000"]).output().unwrap());
    assert_eq!(checks(&report, "fault"), ["cpuset"], "{report:#}");
}
