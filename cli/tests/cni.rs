//! The CNI plugin as a process: hostile configurations and callers, and tenants that put what they like into their folders.
//!
//! It is for root, as container runtimes are; another user runs it in a user namespace of its own, where that is allowed.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_usernic");

/// More than any call takes, on a machine that does other things as well.
const LIMIT: Duration = Duration::from_secs(60);

/// A host: a switch, and a folder for ports.
struct Host {
    dir: tempfile::TempDir,
    switch: Child,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.switch.kill();
        let _ = self.switch.wait();
    }
}

struct Answer {
    code: Option<i32>,
    json: Value,
    stderr: String,
}

impl Answer {
    fn of(output: Output) -> Self {
        let text = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!stderr.contains("panicked"), "{stderr}");
        let mut lines = text.lines();
        let json = lines
            .next()
            .map_or(Value::Null, |line| serde_json::from_str(line).expect(line));
        assert_eq!(lines.next(), None, "one object and no more: {text}");
        let code = output.status.code();
        Answer { code, json, stderr }
    }

    #[track_caller]
    fn good(self) -> Value {
        assert_eq!(self.code, Some(0), "{}{}", self.json, self.stderr);
        self.json
    }

    /// It failed with this code, and says why.
    #[track_caller]
    fn refused(self, code: u64, text: &str) -> Value {
        let message = self.json["msg"].as_str().unwrap_or_default();
        assert!(
            self.code == Some(1) && self.json["code"] == code && message.contains(text),
            "code {code} with {text:?} expected: {:?} {}",
            self.code,
            self.json
        );
        self.json
    }
}

impl Host {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["switch", "--control"]).arg(dir.path().join("ctl"));
        let switch = command.stderr(Stdio::null()).spawn().unwrap();
        let host = Host { dir, switch };
        let end = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(host.path("ctl")).is_err() {
            assert!(Instant::now() < end, "the switch does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The configuration with more keys, or others.
    fn config(&self, more: Value) -> Value {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "fast", "type": "usernic-cni",
            "control": self.path("ctl"), "dir": self.path("cni"), "uid": rustix::process::geteuid().as_raw(),
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn command(&self, command: &str, container: &str) -> Command {
        let mut line = Command::new(PROGRAM);
        line.arg("cni").env_remove("CNI_ARGS");
        line.env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "net1")
            .env("CNI_NETNS", "/proc/self/ns/net")
            .env("CNI_PATH", self.dir.path());
        line
    }

    fn call(&self, command: &str, container: &str, more: Value) -> Answer {
        run(
            &mut self.command(command, container),
            self.config(more).to_string().as_bytes(),
        )
    }

    fn with_args(&self, command: &str, container: &str, args: &str) -> Answer {
        let mut line = self.command(command, container);
        run(
            line.env("CNI_ARGS", args),
            self.config(json!({})).to_string().as_bytes(),
        )
    }

    fn ports(&self) -> Vec<String> {
        let mut line = Command::new(PROGRAM);
        line.args(["switch", "ctl", "--control"])
            .arg(self.path("ctl"))
            .arg("list");
        let list: Value = serde_json::from_slice(&line.output().unwrap().stdout).unwrap();
        let ports = list["ports"].as_array().unwrap().iter();
        let mut names: Vec<String> = ports.map(|port| port["name"].as_str().unwrap().into()).collect();
        names.sort();
        names
    }

    #[track_caller]
    fn nothing_left(&self) {
        assert_eq!(self.ports(), [""; 0]);
        if let Ok(entries) = std::fs::read_dir(self.path("cni")) {
            let left: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// Runs it with this input, and not for longer than the limit.
fn run(line: &mut Command, input: &[u8]) -> Answer {
    let line = line.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = line.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // It need not read all of it.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = finished(child);
    writer.join().unwrap();
    Answer::of(output)
}

#[track_caller]
fn finished(mut child: Child) -> Output {
    let end = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("the plugin does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: the plugin is for root");
    }
    root
}

#[test]
fn gc_takes_its_list_under_each_name_and_under_both() {
    let host = Host::start();
    let (first, second) = ("cni.dev/valid-attachments", "cni.dev/attachments");
    let aa = json!([{ "containerID": "aa", "ifname": "net1" }]);
    let cases = [
        (json!({ first: aa }), "aa"),
        (json!({ second: aa }), "aa"),
        (json!({ first: aa, second: aa }), "aa"),
        (json!({ first: [], second: aa }), "aa"),
        (json!({ first: aa, second: null }), "aa"),
        (json!({ first: null }), ""),
        (json!({ first: null, second: null }), ""),
        (json!({ first: [], second: [] }), ""),
    ];
    for (lists, stays) in cases {
        for container in ["aa", "bb"] {
            host.call("ADD", container, json!({})).good();
        }
        host.call("GC", "", lists.clone()).good();
        let left: Vec<String> = host.ports();
        let expected: Vec<String> = stays
            .split_terminator(',')
            .map(|c| format!("cni/fast/{c}/net1"))
            .collect();
        assert_eq!(left, expected, "{lists}");
        assert!(!host.path("cni/bb").exists() && host.path("cni/aa").exists() == (stays == "aa"));
    }
    host.call("GC", "", json!({})).refused(7, "valid-attachments");
    host.nothing_left();
}

#[test]
fn every_answer_has_the_version_that_was_asked_in() {
    let host = Host::start();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let answer = host.call("VERSION", "", json!({ "cniVersion": version })).good();
        assert_eq!(answer["cniVersion"], version);
        assert!(
            answer["supportedVersions"]
                .as_array()
                .unwrap()
                .contains(&version.into())
        );
        for (command, more) in [
            ("ADD", json!({ "mtu": 1 })),
            ("ADD", json!({ "mtu": "x" })),
            ("SING", json!({})),
            ("", json!({})),
            ("CHECK", json!({})),
        ] {
            let mut config = more.clone();
            config["cniVersion"] = version.into();
            let answer = host.call(command, "c", config);
            assert_eq!(
                (answer.code, &answer.json["cniVersion"]),
                (Some(1), &version.into()),
                "{command} {more}"
            );
        }
        assert_eq!(
            host.call("ADD", "c", json!({ "cniVersion": version })).good()["cniVersion"],
            version
        );
        host.call("DEL", "c", json!({ "cniVersion": version })).good();
    }
    // Of an unknown one the newest that is known.
    for config in [
        "",
        "{}",
        "[]",
        "x",
        r#"{"cniVersion":"7.0.0"}"#,
        r#"{"cniVersion":null}"#,
    ] {
        let answer = run(&mut host.command("VERSION", ""), config.as_bytes()).good();
        assert_eq!(answer["cniVersion"], "1.1.0", "{config}");
        let answer = run(&mut host.command("ADD", "c"), config.as_bytes());
        assert_eq!(
            (answer.code, &answer.json["cniVersion"]),
            (Some(1), &"1.1.0".into()),
            "{config}"
        );
    }
    host.nothing_left();
}

#[test]
fn the_address_of_cni_args_is_taken_and_unknown_arguments_are_not_passed_over() {
    let host = Host::start();
    let mac = "02:11:22:33:44:55";
    let taken = |answer: Answer| answer.good()["interfaces"][0]["mac"].clone();
    for (container, args) in [
        ("c1", format!("MAC={mac}")),
        ("c2", format!("IgnoreUnknown=1;K8S_POD_NAME=x;MAC={mac}")),
        ("c3", format!("MAC={mac};IP=192.0.2.1;IgnoreUnknown=true")),
    ] {
        assert_eq!(taken(host.with_args("ADD", container, &args)), mac, "{args}");
        let port = std::fs::read(host.path(&format!("cni/{container}/net1/port.json"))).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&port).unwrap()["mac"], mac);
        host.with_args("DEL", container, &args).good();
    }
    // The capability goes before.
    let config = host.config(json!({ "runtimeConfig": { "mac": "02:00:00:00:00:09" } }));
    let mut line = host.command("ADD", "c4");
    let answer = run(
        line.env("CNI_ARGS", format!("MAC={mac}")),
        config.to_string().as_bytes(),
    );
    assert_eq!(taken(answer), "02:00:00:00:00:09");
    host.call("DEL", "c4", json!({})).good();
    for (args, code, what) in [
        ("K8S_POD_NAME=x", 4, "K8S_POD_NAME"),
        ("MAC", 4, "MAC"),
        ("MAC=zz", 7, "zz"),
        ("MAC=01:00:00:00:00:01", 7, "multicast"),
        ("MAC=02:00:00:00:00:01,server=1", 7, "separates"),
        ("K8S_POD_UID=../x", 4, "K8S_POD_UID"),
    ] {
        host.with_args("ADD", "c5", args).refused(code, what);
        // A runtime takes back what failed, with the same arguments.
        host.with_args("DEL", "c5", args).good();
        host.nothing_left();
    }
}

#[test]
fn what_the_container_would_refuse_is_refused_at_add() {
    let host = Host::start();
    let key = |key: &str, value: &str| json!({ "keys": { key: value } });
    for (more, what) in [
        (json!({ "runtimeConfig": { "mac": "01:00:00:00:00:01" } }), "multicast"),
        (json!({ "runtimeConfig": { "mac": "zz" } }), "six bytes"),
        (json!({ "args": { "cni": { "mac": "zz" } } }), "six bytes"),
        (key("packed", "1"), "packed_vq"),
        (key("path", "/etc"), "path"),
        (key("server", "1"), "server"),
        (key("mac", "02:00:00:00:00:01"), "mac"),
        (key("queues", "many"), "queues"),
        (key("mtu", "9000"), "mtu"),
        (key("queue_size", "1000"), "power of two"),
        (key("packed_vq", "1,queue_size=512"), "separates"),
        (key("packed_vq", ""), "VALUE"),
        (key("mem", "64K"), "too small"),
        (json!({ "keys": { "lro": "1", "mrg_rxbuf": "0" } }), "mrg_rxbuf"),
        (
            json!({ "keys": { "memory": "memfd", "huge_dir": "/dev/hugepages" } }),
            "huge_dir",
        ),
        (json!({ "keys": { "cpus": "1+2" } }), "queue pairs"),
        (json!({ "mtu": 67 }), "mtu"),
        (json!({ "queues": 129 }), "queues"),
    ] {
        let mut both = more.clone();
        both["mtu"] = both.get("mtu").cloned().unwrap_or(1500.into());
        for more in [more, both] {
            host.call("ADD", "c", more.clone()).refused(7, what);
            host.nothing_left();
            host.call("DEL", "c", more).good();
        }
    }
    let good = json!({ "keys": { "packed_vq": "1" }, "runtimeConfig": { "mac": "02:00:00:00:00:09" } });
    host.call("ADD", "c", good.clone()).good();
    host.call("DEL", "c", good).good();
    host.nothing_left();
}

/// An address plugin that cannot be called has given nothing, and its DEL cannot be called, either.
#[test]
fn an_address_plugin_that_cannot_be_called_is_refused_before_anything_is_made() {
    if !is_root() {
        return;
    }
    let host = Host::start();
    std::fs::write(host.path("plain"), "no program").unwrap();
    for kind in ["nosuch", "../bin/sh", "plain"] {
        let answer = host.call("ADD", "c1", json!({ "ipam": { "type": kind } }));
        answer.refused(102, "address plugin");
        host.nothing_left();
    }
}

#[test]
fn configurations_without_an_end_or_a_bottom_are_refused() {
    let host = Host::start();
    let config = host.config(json!({})).to_string();
    let inside = |more: &str| format!("{},{more}}}", &config[..config.len() - 1]);
    let deep = |open: &str, close: &str| open.repeat(100_000) + &close.repeat(100_000);
    for (input, code, what) in [
        (" ".repeat(5 << 20) + &config, 6, "more than"),
        (config.clone() + &" ".repeat(64 << 20), 6, "more than"),
        (inside(&format!(r#""x":{}"#, deep("[", "]"))), 6, "recursion limit"),
        (
            inside(&format!(
                r#""prevResult":{}1{}"#,
                r#"{"a":"#.repeat(100_000),
                "}".repeat(100_000)
            )),
            6,
            "recursion",
        ),
        (inside(r#""args":{"cni":{"uid":-1}}"#), 6, "configuration"),
        (inside(r#""vlan":1e400"#), 6, "configuration"),
        (config.clone() + "x", 6, "trailing"),
        (config.replace("1.1.0", "\u{0}"), 6, "configuration"),
    ] {
        let answer = run(&mut host.command("ADD", "c"), input.as_bytes());
        assert!(answer.stderr.len() < 10_000);
        answer.refused(code, what);
        host.nothing_left();
    }
    let answer = run(&mut host.command("ADD", "c"), b"\xff\xfe{}").refused(6, "configuration");
    assert_eq!(answer["cniVersion"], "1.1.0");
    // What is asked for in one version is refused in it, whatever else is wrong.
    let mut old = inside(&format!(r#""x":{}"#, deep("[", "]")));
    old = old.replace("1.1.0", "0.4.0");
    assert_eq!(
        run(&mut host.command("ADD", "c"), old.as_bytes()).refused(6, "")["cniVersion"],
        "0.4.0"
    );
}

#[test]
fn a_caller_that_never_ends_its_input_is_not_waited_for() {
    let host = Host::start();
    for (command, input) in [("ADD", host.config(json!({})).to_string()), ("DEL", String::new())] {
        let mut line = host.command(command, "c");
        let line = line.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = line.spawn().unwrap();
        // Held open until the plugin is gone.
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        Answer::of(finished(child)).refused(5, "did not end");
        drop(stdin);
        host.nothing_left();
    }
}

#[test]
fn a_caller_that_does_not_read_the_answer_gets_no_panic_and_holds_nobody() {
    let host = Host::start();
    // More than a pipe holds.
    let previous: Vec<Value> = (0..5000)
        .map(|n| json!({ "name": format!("a-long-name-{n}") }))
        .collect();
    let config = host
        .config(json!({ "prevResult": { "interfaces": previous } }))
        .to_string();
    for closed in [false, true] {
        let mut line = host.command("ADD", "c");
        let line = line.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = line.spawn().unwrap();
        let mut stdout = child.stdout.take();
        if closed {
            drop(stdout.take());
        }
        child.stdin.take().unwrap().write_all(config.as_bytes()).unwrap();
        let output = finished(child);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(!error.contains("panicked"), "{error}");
        drop(stdout);
        host.call("DEL", "c", json!({})).good();
        host.nothing_left();
    }
    // Nor does a standard error that nobody reads.
    let mut line = host.command("ADD", "c");
    let mut child = line
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    child.stdin.take().unwrap().write_all(b"{").unwrap();
    Answer::of(finished(child)).refused(6, "configuration");
}

#[test]
fn wrong_and_missing_variables_are_named() {
    let host = Host::start();
    let config = host.config(json!({})).to_string();
    let with = |command: &str, variable: &str, value: Option<&str>| {
        let mut line = host.command(command, "c");
        match value {
            Some(value) => line.env(variable, value),
            None => line.env_remove(variable),
        };
        run(&mut line, config.as_bytes())
    };
    for (variable, values) in [
        (
            "CNI_CONTAINERID",
            vec!["", "..", "../x", "a/b", "/etc", ".a", "a b", "a\n", "a:b"],
        ),
        (
            "CNI_IFNAME",
            vec![
                "",
                ".",
                "..",
                "../x",
                "a/b",
                "a b",
                "a,b=c",
                "a:b",
                "0123456789abcdef",
                "\u{7f}",
            ],
        ),
    ] {
        for command in ["ADD", "DEL", "CHECK"] {
            with(command, variable, None).refused(4, variable);
            for value in &values {
                with(command, variable, Some(value)).refused(4, variable);
            }
        }
        let long = "a".repeat(100_000);
        assert!(with("ADD", variable, Some(&long)).stderr.len() < 10_000);
        let mut line = host.command("ADD", "c");
        let bytes: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(vec![b'a', 0xff]);
        run(line.env(variable, bytes), config.as_bytes()).refused(4, variable);
    }
    for command in ["ADD", "CHECK"] {
        with(command, "CNI_NETNS", None).refused(4, "CNI_NETNS");
    }
    with("ADD", "CNI_COMMAND", None).refused(4, "CNI_COMMAND");
    with("DEL", "CNI_NETNS", None).good();
    with("DEL", "CNI_PATH", None).good();
    host.nothing_left();
}

#[test]
fn the_plugin_by_its_name_explains_itself() {
    for (argument, text) in [
        ("--help", "CNI_COMMAND"),
        ("-h", "CNI_COMMAND"),
        ("--version", "usernic-cni "),
    ] {
        let mut line = Command::new(PROGRAM);
        line.arg0("/opt/cni/bin/usernic-cni")
            .arg(argument)
            .env_remove("CNI_COMMAND");
        let output = line.stdin(Stdio::null()).output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && out.contains(text) && !out.starts_with('{'),
            "{argument}: {out}"
        );
    }
}

#[test]
fn many_calls_at_the_same_time() {
    let host = Host::start();
    std::thread::scope(|scope| {
        for pod in 0..8 {
            for interface in 0..4 {
                let host = &host;
                scope.spawn(move || {
                    for command in ["ADD", "CHECK", "DEL"] {
                        let mut line = host.command(command, &format!("c{pod}"));
                        line.env("CNI_IFNAME", format!("net{interface}"));
                        run(&mut line, host.config(json!({})).to_string().as_bytes()).good();
                    }
                });
            }
        }
    });
    host.nothing_left();
}

#[test]
fn folders_can_be_entered_whatever_mask_the_runtime_has() {
    let host = Host::start();
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 077; exec \"$0\" cni", PROGRAM]);
    let line = host.command("ADD", "c");
    for (key, value) in line.get_envs() {
        match value {
            Some(value) => shell.env(key, value),
            None => shell.env_remove(key),
        };
    }
    run(&mut shell, host.config(json!({})).to_string().as_bytes()).good();
    for folder in ["cni", "cni/c"] {
        let mode = std::fs::metadata(host.path(folder)).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o755, "{folder}");
    }
    let mode = std::fs::metadata(host.path("cni/c/net1/port.json")).unwrap().mode() & 0o777;
    assert_eq!(mode, 0o644);
    host.call("DEL", "c", json!({})).good();
    host.nothing_left();
}

/// A switch that is stopped, or is none: it takes connections and says nothing, or takes none.
#[test]
fn a_switch_that_does_not_answer_is_not_waited_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let silent = dir.path().join("silent");
    let full = dir.path().join("full");
    let _silent = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&full).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let gone = json!({
        "cniVersion": "1.0.0", "name": "fast", "dir": dir.path().join("cni"), "control": dir.path().join("gone"),
    });
    let mut line = Command::new(PROGRAM);
    line.arg("cni").env_remove("CNI_ARGS").env("CNI_COMMAND", "DEL");
    line.env("CNI_CONTAINERID", "c").env("CNI_IFNAME", "net1");
    run(&mut line, gone.to_string().as_bytes()).good();
    let _held = std::os::unix::net::UnixStream::connect(&full).unwrap();
    std::thread::scope(|scope| {
        for path in [&silent, &full] {
            for backend in ["switch", "ovs"] {
                let config = json!({
                    "cniVersion": "1.0.0", "name": "fast", "dir": dir.path().join("cni"),
                    "backend": backend, "control": path, "ovsdb": path,
                });
                // DEL fails as well: the switch has the port still.
                for command in ["ADD", "DEL"] {
                    let config = config.clone();
                    scope.spawn(move || {
                        let mut line = Command::new(PROGRAM);
                        line.arg("cni").env_remove("CNI_ARGS").env("CNI_COMMAND", command);
                        line.env("CNI_CONTAINERID", backend)
                            .env("CNI_IFNAME", "net1")
                            .env("CNI_NETNS", "/x");
                        let answer = run(&mut line, config.to_string().as_bytes());
                        let code = answer.json["code"].as_u64();
                        assert!(
                            answer.code == Some(1) && matches!(code, Some(50 | 100)),
                            "{command}: {}",
                            answer.json
                        );
                    });
                }
            }
        }
    });
}

/// The container owns its folder: it can write there, if only after a chmod(2).
#[test]
fn a_tenant_that_forges_its_folder_reaches_nobody_else() {
    if !is_root() {
        return;
    }
    let host = Host::start();
    host.call("ADD", "victim", json!({})).good();
    let ours = host.call("ADD", "evil", json!({})).good();
    let folder = host.path("cni/evil/net1");
    let (shadow, secret) = (host.path("shadow"), "secret");
    std::fs::write(&shadow, secret).unwrap();
    std::fs::set_permissions(&shadow, std::fs::Permissions::from_mode(0o600)).unwrap();
    // It says that it is its neighbour.
    let victim = json!({ "network": "fast", "containerID": "victim", "ifname": "net1" });
    std::fs::write(folder.join("attachment.json"), victim.to_string()).unwrap();
    // It writes what the plugin would answer next time, and leads it elsewhere.
    let port = folder.join("port.json");
    let mut forged: Value = serde_json::from_slice(&std::fs::read(&port).unwrap()).unwrap();
    for (key, value) in [
        ("interface", json!("eth0")),
        ("ips", json!(["192.0.2.66/24"])),
        ("path", json!("/etc/x")),
    ] {
        forged[key] = value;
    }
    std::fs::write(&port, forged.to_string()).unwrap();
    symlink(&shadow, folder.join(".port.json")).unwrap();
    assert_eq!(
        host.call("ADD", "evil", json!({})).good(),
        ours,
        "a forged file is answered"
    );
    std::fs::remove_file(&port).unwrap();
    symlink(&shadow, &port).unwrap();
    host.call("CHECK", "evil", json!({})).refused(101, "port.json");
    assert_eq!(host.call("ADD", "evil", json!({})).good(), ours);
    host.call("CHECK", "evil", json!({})).good();
    // Another container of the same name takes its place, as after a restart of the pod.
    let mut line = host.command("ADD", "evil2");
    let again = run(
        line.env("CNI_ARGS", "K8S_POD_UID=evil"),
        host.config(json!({})).to_string().as_bytes(),
    );
    again.good();
    assert_eq!(host.ports(), ["cni/fast/evil2/net1", "cni/fast/victim/net1"]);
    host.call("CHECK", "victim", json!({})).good();
    let data = std::fs::metadata(&shadow).unwrap();
    assert_eq!(
        (data.mode() & 0o777, std::fs::read_to_string(&shadow).unwrap().as_str()),
        (0o600, secret)
    );
}

#[test]
fn fifos_links_and_depth_in_a_tenants_folder_hold_nobody_up() {
    if !is_root() {
        return;
    }
    let host = Host::start();
    for container in ["victim", "evil", "gone"] {
        host.call("ADD", container, json!({})).good();
    }
    let outside = host.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "x").unwrap();
    let fifo = |path: PathBuf| {
        let _ = std::fs::remove_file(&path);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
    };
    for container in ["evil", "gone"] {
        let folder = host.path(&format!("cni/{container}/net1"));
        fifo(folder.join("attachment.json"));
        fifo(folder.join("port.json"));
        symlink(&outside, folder.join("link")).unwrap();
        let mut deep = Command::new("sh");
        // Deeper than the plugin may have files open.
        deep.args([
            "-c",
            "i=0; while [ $i -lt 1500 ]; do mkdir d && cd -P d 2>/dev/null || exit 0; i=$((i+1)); done",
        ]);
        assert!(deep.current_dir(&folder).status().unwrap().success());
    }
    let valid = json!([{ "containerID": "victim", "ifname": "net1" }, { "containerID": "evil", "ifname": "net1" }]);
    host.call("GC", "", json!({ "cni.dev/attachments": valid })).good();
    assert!(!host.path("cni/gone").exists());
    host.call("CHECK", "evil", json!({})).refused(101, "port.json");
    host.call("DEL", "victim", json!({})).good();
    host.call("DEL", "evil", json!({})).good();
    host.nothing_left();
    assert!(outside.join("file").exists(), "a link was followed");
}

/// A container that is root owns the pod's folder, too.
#[test]
fn a_link_in_place_of_a_ports_folder_leads_nowhere() {
    if !is_root() {
        return;
    }
    let host = Host::start();
    host.call("ADD", "evil", json!({})).good();
    let outside = host.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::set_permissions(&outside, std::fs::Permissions::from_mode(0o751)).unwrap();
    std::fs::write(outside.join("file"), "x").unwrap();
    let folder = host.path("cni/evil/net1");
    for command in ["ADD", "DEL"] {
        if folder.exists() {
            std::fs::rename(&folder, host.path(&format!("moved-{command}"))).unwrap();
        }
        symlink(&outside, &folder).unwrap();
        let answer = host.call(command, "evil", json!({ "uid": 6622 }));
        if command == "DEL" {
            answer.good();
        }
        let data = std::fs::metadata(&outside).unwrap();
        assert_eq!((data.mode() & 0o777, data.uid()), (0o751, 0), "{command}");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "{command}");
    }
    host.nothing_left();
}

/// Folders of somebody else below `dir` are not the plugin's to collect.
#[test]
fn gc_leaves_folders_that_the_plugin_did_not_make() {
    let host = Host::start();
    host.call("ADD", "c", json!({})).good();
    let foreign = host.path("cni/somebody/data");
    std::fs::create_dir_all(&foreign).unwrap();
    std::fs::write(foreign.join("file"), "x").unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(100_000);
    std::fs::File::open(&foreign).unwrap().set_modified(old).unwrap();
    host.call("GC", "", json!({ "cni.dev/attachments": [] })).good();
    assert_eq!(host.ports(), [""; 0]);
    let mut text = String::new();
    std::fs::File::open(foreign.join("file"))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "x");
}
