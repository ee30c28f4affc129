//! The switch as a service: changed while it runs, counted, restarted.

use std::os::unix::net::{UnixDatagram, UnixListener};
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
    let whole = place.path("b");
    assert_eq!(list["ports"][1]["spec"], spec(whole.to_str().unwrap()));
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

/// The folder of whoever asks, not the switch's: also after a restart of the switch elsewhere.
#[test]
fn a_relative_path_begins_where_the_port_is_asked_for() {
    let place = Place::new();
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    let _switch = place.switch(&[]);
    let mut command = place.command(&["switch", "ctl", "--control", "../ctl", "add", "a", "vhost,path=a"]);
    let output = command.current_dir(place.path("elsewhere")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.path("elsewhere/a").exists() && !place.path("a").exists());
    let saved: Value = serde_json::from_slice(&std::fs::read(place.path("state")).unwrap()).unwrap();
    let whole = place.path("elsewhere/a").canonicalize().unwrap();
    assert_eq!(saved["ports"][0]["spec"], format!("vhost,path={}", whole.display()));
    // Other clients than ours are told so.
    let mut socket = std::os::unix::net::UnixStream::connect(place.path("ctl")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = br#"{"op":"add","name":"b","spec":"vhost,path=b"}"#;
    std::io::Write::write_all(&mut socket, &[&request[..], b"\n"].concat()).unwrap();
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(socket), &mut answer).unwrap();
    assert!(
        answer.contains("path=b: ") && answer.contains("begin with /"),
        "{answer}"
    );
    assert!(!place.path("b").exists());
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

/// Name and role of each port, and whether it could be opened.
fn roles(place: &Place) -> Vec<String> {
    let list = place.ask(&["list"]);
    let ports = list["ports"].as_array().unwrap().iter();
    let mut roles: Vec<_> = ports
        .map(|p| format!("{} {} {}", p["name"], p["role"], p["error"].is_null()))
        .collect();
    roles.sort();
    roles
}

#[test]
fn a_second_switch_with_the_same_state_changes_nothing() {
    let place = Place::new();
    let mut first = place.switch(&[]);
    for name in ["a", "b"] {
        place.ask(&["add", name, &format!("vhost,path={name}")]);
    }
    let before = std::fs::read(place.path("state")).unwrap();
    std::os::unix::fs::symlink("state", place.path("link")).unwrap();
    for args in [
        &["switch", "--control", "ctl", "--state", "state"][..],
        &["switch", "--control", "other", "--state", "link"],
        // Another control socket, and another name of the same file.
        &["switch", "--control", "other", "--state", "./state"],
        &["switch", "--control", "ctl"],
    ] {
        let mut second = Running(place.command(args).stderr(Stdio::piped()).spawn().unwrap());
        until("the second switch ends", || second.0.try_wait().unwrap().is_some());
        assert_eq!(second.0.wait().unwrap().code(), Some(1), "{args:?}");
        let mut told = String::new();
        std::io::Read::read_to_string(second.0.stderr.as_mut().unwrap(), &mut told).unwrap();
        assert!(told.contains("state") || told.contains("ctl"), "{args:?}: {told}");
        assert_eq!(std::fs::read(place.path("state")).unwrap(), before, "{args:?}");
        assert!(place.path("a").exists() && place.path("ctl").exists());
    }
    first.signal(rustix::process::Signal::KILL);
    let _third = place.switch(&[]);
    assert_eq!(roles(&place), [r#""a" "learn" true"#, r#""b" "learn" true"#]);
}

#[test]
fn one_of_many_that_start_together_on_a_stale_socket_serves() {
    let place = Place::new();
    drop(UnixListener::bind(place.path("ctl")).unwrap());
    let start = |_| {
        let mut command = place.command(&["switch", "--control", "ctl"]);
        Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let mut all: Vec<Running> = (0..6).map(start).collect();
    let mut ended = Vec::new();
    until("all but one have ended", || {
        for at in (0..all.len()).rev() {
            if all[at].0.try_wait().unwrap().is_some() {
                ended.push(all.remove(at));
            }
        }
        all.len() <= 1
    });
    until("it answers", || place.ctl(&["list"]).status.success());
    assert_eq!(all.len(), 1);
    assert!(all[0].0.try_wait().unwrap().is_none());
    for mut other in ended {
        let mut told = String::new();
        std::io::Read::read_to_string(other.0.stderr.as_mut().unwrap(), &mut told).unwrap();
        assert_eq!(other.0.wait().unwrap().code(), Some(1), "{told}");
        assert!(told.contains("somebody listens at ctl already"), "{told}");
    }
    drop(all);
}

#[test]
fn a_state_file_that_is_none_is_refused_at_once() {
    let place = Place::new();
    let fifo = place.path("state");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let args = ["switch", "--control", "ctl", "--state", "state"];
    let mut switch = Running(place.command(&args).stderr(Stdio::piped()).spawn().unwrap());
    until("the switch ends", || switch.0.try_wait().unwrap().is_some());
    assert_eq!(switch.0.wait().unwrap().code(), Some(1));
}

#[test]
fn what_is_listed_before_a_restart_is_listed_after_it() {
    let place = Place::new();
    let mut switch = place.switch(&["--listen", "given"]);
    let mut check = |changes: &[&[&str]], expected: &[&str]| {
        for change in changes {
            place.ask(change);
        }
        assert_eq!(roles(&place), expected, "{changes:?}");
        switch.signal(rustix::process::Signal::TERM);
        switch = place.switch(&["--listen", "given"]);
        assert_eq!(roles(&place), expected, "{changes:?}, after a restart");
    };
    check(
        &[
            &["add", "a", "vhost,path=a"],
            &["add", "b", "vhost,path=b", "--connect", "a"],
            &["remove", "a"],
        ],
        &[r#""b" {"connect":null} true"#, r#""given" "learn" true"#],
    );
    let pair = [
        r#""a" {"connect":"b"} true"#,
        r#""b" {"connect":"a"} true"#,
        r#""given" "learn" true"#,
    ];
    check(&[&["add", "a", "vhost,path=a", "--connect", "b"]], &pair);
    // The same port again is no change; it is there as it was asked for.
    check(&[&["add", "a", "vhost,path=a", "--connect", "b"]], &pair);
    check(
        &[&["remove", "b"], &["add", "c", "vhost,path=c", "--connect", "given"]],
        &[
            r#""a" {"connect":null} true"#,
            r#""c" {"connect":"given"} true"#,
            r#""given" {"connect":"c"} true"#,
        ],
    );
    check(
        &[&["add", "r", "vhost,path=r", "--reflect"], &["remove", "a"]],
        &[
            r#""c" {"connect":"given"} true"#,
            r#""given" {"connect":"c"} true"#,
            r#""r" "reflect" true"#,
        ],
    );
}

#[test]
fn a_port_that_cannot_be_opened_once_is_not_forgotten() {
    let place = Place::new();
    std::fs::create_dir(place.path("sub")).unwrap();
    let mut switch = place.switch(&[]);
    place.ask(&["add", "a", "vhost,path=sub/a"]);
    place.ask(&["add", "b", "vhost,path=b", "--connect", "a"]);
    place.ask(&["add", "c", "vhost,path=sub/c"]);
    let saved = std::fs::read(place.path("state")).unwrap();
    switch.signal(rustix::process::Signal::TERM);
    std::fs::remove_dir(place.path("sub")).unwrap();
    let mut switch = place.switch(&[]);
    let without = [
        r#""a" {"connect":"b"} false"#,
        r#""b" {"connect":null} true"#,
        r#""c" "learn" false"#,
    ];
    assert_eq!(roles(&place), without);
    assert_eq!(
        std::fs::read(place.path("state")).unwrap(),
        saved,
        "a restore writes nothing"
    );
    // Another change keeps them, too. One of them is given up, one is opened since it can be.
    place.ask(&["add", "d", "vhost,path=d"]);
    assert_eq!(place.ask(&["remove", "c"])["removed"], true);
    switch.signal(rustix::process::Signal::KILL);
    std::fs::create_dir(place.path("sub")).unwrap();
    let mut switch = place.switch(&[]);
    let all = [
        r#""a" {"connect":"b"} true"#,
        r#""b" {"connect":"a"} true"#,
        r#""d" "learn" true"#,
    ];
    assert_eq!(roles(&place), all);
    switch.signal(rustix::process::Signal::KILL);
    std::fs::remove_file(place.path("sub/a")).unwrap();
    std::fs::remove_dir(place.path("sub")).unwrap();
    let _switch = place.switch(&[]);
    std::fs::create_dir(place.path("sub")).unwrap();
    assert_eq!(
        place.ask(&["add", "a", "vhost,path=sub/a", "--connect", "b"])["added"],
        true
    );
    assert_eq!(roles(&place), all);
}

#[test]
fn a_state_that_cannot_be_owned_ends_the_start() {
    let place = Place::new();
    let command = |state: &str| {
        let args = ["switch", "--control", "ctl", "--listen", "a", "--state", state];
        place.command(&args).output().unwrap()
    };
    let nowhere = command("none/state");
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("none/state.lock"));
    std::fs::write(place.path("state"), "{").unwrap();
    let broken = command("state");
    assert_eq!(broken.status.code(), Some(1));
    assert_eq!(
        std::fs::read(place.path("state")).unwrap(),
        b"{",
        "what is not understood stays"
    );
    assert!(!place.path("a").exists() && !place.path("ctl").exists());
}

#[test]
fn two_sockets_of_one_name_are_refused() {
    let place = Place::new();
    for name in ["1", "2"] {
        std::fs::create_dir(place.path(name)).unwrap();
    }
    let refused = place.command(&["switch", "--listen", "1/net,2/net"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("net"));
    let _switch = place.switch(&["--listen", "1/net"]);
    let twice = place.ctl(&["add", "net", "vhost,path=2/net"]);
    assert!(String::from_utf8_lossy(&twice.stderr).contains("there is a port net"));
    assert!(!place.path("2/net").exists());
    assert!(!place.ctl(&["add", "", "vhost,path=2/x"]).status.success());
}

#[test]
fn the_start_is_told_and_the_counters_are_json_for_whoever_is_no_terminal() {
    let place = Place::new();
    let mut command = place.command(&["switch", "--listen", "a", "--control", "ctl"]);
    let mut switch = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let mut told = std::io::BufReader::new(switch.0.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut told, &mut line).unwrap();
    assert!(line.contains("a (vhost,path=a)") && line.contains("ctl"), "{line}");
    let stats = |json: &[&str]| {
        let output = place
            .command(&[json, &["stats", "--control", "ctl"]].concat())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    for json in [&[][..], &["--json"]] {
        assert!(serde_json::from_str::<Value>(&stats(json)).is_ok());
    }
}

/// A limit of descriptors that is low: it is raised as far as it may be, and what it does not suffice for is told.
#[test]
fn the_limit_of_descriptors_is_raised_and_told() {
    let place = Place::new();
    let names: Vec<String> = (0..100).map(|n| format!("p{n}")).collect();
    let listen = names.join(",");
    for (soft, hard, told) in [(256, 256, true), (256, 4096, false)] {
        let mut command = place.command(&["switch", "--listen", &listen, "--seconds", "0"]);
        command.stderr(Stdio::piped());
        let text = format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$@\"");
        let mut shell = Command::new("sh");
        shell
            .args(["-c", &text, "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        let output = shell.current_dir(place.0.path()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(stderr.contains("RLIMIT_NOFILE"), told, "{soft} of {hard}: {stderr}");
    }
}
