//! Hostile peers of the real programs, by hand over their sockets, and beside each a pair of tenants that loses nothing.
//!
//! `cargo xtask test adversary`, or `cargo test -p usernic-cli --test adversary`.

mod bystander;
#[path = "../../../usernic/tests/common/raw.rs"]
mod raw;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Signal;
use serde_json::Value;

use bystander::{Host, Pair};
use raw::{GUEST, Raw, event, memfd, words};

/// More than anything here takes, on a machine that does other things as well.
const LIMIT: Duration = Duration::from_secs(30);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A switch with ports a and b for the pair, c for the other one, d and e connected, and sockets for control and metrics.
struct Net {
    dir: tempfile::TempDir,
    switch: Child,
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.switch.kill();
        let _ = self.switch.wait();
    }
}

impl Net {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = program(&dir);
        command.args(["switch", "--listen", "a,b,c,d,e", "--connect", "d:e"]);
        command.args(["--control", "ctl", "--metrics", "told"]);
        let switch = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let net = Net { dir, switch };
        until("the switch is ready", || {
            net.path("ctl").exists() && net.stats().is_some()
        });
        net
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        program(&self.dir).args(args).output().unwrap()
    }

    fn stats(&self) -> Option<Value> {
        let output = self.run(&["--json", "stats", "--control", "ctl"]);
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// A counter of a port.
    fn count(&self, port: &str, counter: &str) -> u64 {
        let stats = self.stats().expect("the switch answers");
        let ports = stats["ports"].as_array().unwrap();
        let port = ports.iter().find(|p| p["name"] == port).unwrap();
        port[counter].as_u64().unwrap()
    }

    fn host(&self, port: &str, last: u8) -> Host {
        Host::join(&self.path(port), last)
    }

    /// Does `attack` while the pair talks; then the pair talks on, the switch answers and ends when it is told to.
    fn beside(mut self, attack: impl FnOnce(&Self, &Pair)) {
        let pair = Pair::start(self.host("a", 1), self.host("b", 2));
        pair.talks(10);
        attack(&self, &pair);
        pair.talks(30);
        assert!(self.stats().is_some(), "the switch does not answer");
        pair.end();
        let pid = rustix::process::Pid::from_child(&self.switch);
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        until("SIGTERM ends the switch", || self.switch.try_wait().unwrap().is_some());
        assert!(self.switch.wait().unwrap().success());
    }

    /// A front-end by hand on port c, with buffers to receive into.
    fn hostile(&self) -> Hostile {
        let raw = Raw::connect(&self.path("c"));
        let file = memfd(0x10_0000);
        let memory = std::fs::File::from(file.try_clone().unwrap());
        // Descriptors of the first ring: all to be written by the switch, all available.
        for n in 0..16u64 {
            let at = GUEST + 0x2_0000 + n * 0x800;
            memory.write_all_at(&words(&[at, 0x800 | 2 << 32]), n * 16).unwrap();
            memory.write_all_at(&(n as u16).to_le_bytes(), 0x1004 + 2 * n).unwrap();
        }
        memory.write_all_at(&16u16.to_le_bytes(), 0x1002).unwrap();
        let (kick, call) = raw.set_up_well(&file);
        until("the front-end by hand is served", || self.is_up("c", true));
        Hostile {
            raw,
            memory,
            kick,
            call,
        }
    }

    /// Whether the link of a port is up, or down.
    fn is_up(&self, port: &str, up: bool) -> bool {
        let stats = self.stats().expect("the switch answers");
        let ports = stats["ports"].as_array().unwrap();
        ports.iter().any(|p| p["name"] == port && p["link_up"] == up)
    }

    /// A real front-end comes to c, and is served.
    fn serves_c(&self) {
        let mut c = None;
        until("a front-end comes to a port that a hostile one had", || {
            let spec = format!("virtio-user,path={},timeout=2000", self.path("c").display());
            c = usernic::Port::open(&spec).ok();
            c.is_some()
        });
        until("its link comes up", || self.is_up("c", true));
    }
}

fn program(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    command
        .current_dir(dir.path())
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null());
    command
}

struct Hostile {
    raw: Raw,
    memory: std::fs::File,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Hostile {
    /// All buffers of the first ring that the switch has used are available again.
    fn gives_buffers_back(&self) {
        let mut used = [0; 2];
        self.memory.read_exact_at(&mut used, 0x2002).unwrap();
        let available = u16::from_le_bytes(used).wrapping_add(16);
        self.memory.write_all_at(&available.to_le_bytes(), 0x1002).unwrap();
    }
}

/// Makes an eventfd's shared description block, and its counter full.
fn fill(event: &OwnedFd) {
    rustix::fs::fcntl_setfl(event, OFlags::NONBLOCK).unwrap();
    // The switch adds to it at any moment.
    until("the counter is full", || {
        let _ = rustix::io::read(event, &mut [0u8; 8]);
        let _ = rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes());
        rustix::io::write(event, &1u64.to_ne_bytes()) == Err(rustix::io::Errno::AGAIN)
    });
    rustix::fs::fcntl_setfl(event, OFlags::empty()).unwrap();
}

/// Jiffies that the switch's control threads have run.
fn control_time(net: &Net) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", net.switch.id())).unwrap();
    let stats = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let times = stats.filter(|stat| stat.contains("(usernic-control)")).map(|stat| {
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        [11, 12]
            .map(|at| fields[at].parse::<u64>().unwrap())
            .iter()
            .sum::<u64>()
    });
    times.sum()
}

#[test]
fn a_full_call_that_blocks_holds_nobody() {
    Net::new().beside(|net, pair| {
        let c = net.hostile();
        fill(&c.call);
        let before = net.count("c", "tx_packets");
        // Broadcasts go to c, too, and c is to be notified of them. It may have had all that it had buffers for before.
        until("frames for c", || {
            c.gives_buffers_back();
            pair.talks(5);
            net.count("c", "tx_packets") > before + 4
        });
        // The kick is one that whoever reads it sleeps on.
        rustix::fs::fcntl_setfl(&c.kick, OFlags::empty()).unwrap();
        pair.talks(30);
        fill(&c.kick);
        pair.talks(30);
        drop(c.raw);
        // What it holds stays full.
        net.serves_c();
    });
}

#[test]
fn a_kick_that_counts_down_one_by_one_keeps_no_thread_busy() {
    use rustix::event::{EventfdFlags, eventfd};
    Net::new().beside(|net, pair| {
        let raw = Raw::connect(&net.path("c"));
        let file = memfd(0x10_0000);
        let kick = eventfd(0, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).unwrap();
        let call = event();
        assert!(raw.set_up(&raw::Setup::default(), file.as_fd(), kick.as_fd(), call.as_fd()));
        until("the front-end by hand is served", || net.is_up("c", true));
        rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        pair.talks(10);
        let before = control_time(net);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            pair.talks(1);
        }
        let (ran, wall) = (control_time(net) - before, start.elapsed());
        assert!(ran < 30, "the control threads ran for {ran}0 ms of {wall:?}");
    });
}

#[test]
fn memory_that_is_truncated_harms_its_owner_alone() {
    Net::new().beside(|net, pair| {
        for round in 0..5 {
            let c = net.hostile();
            pair.talks(5);
            rustix::fs::ftruncate(&c.memory, [0, 0x1000, 0x2000, 0x1_0000, 0x2_0000][round]).unwrap();
            pair.talks(20);
            rustix::io::write(&c.kick, &1u64.to_ne_bytes()).ok();
            drop(c.raw);
            until("c is gone", || net.is_up("c", false));
        }
        net.serves_c();
    });
}

#[test]
fn rings_that_lie_harm_their_owner_alone() {
    Net::new().beside(|net, pair| {
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        for round in 0..6u64 {
            let c = net.hostile();
            // The second ring is what the switch receives from: descriptors, available and used ring full of noise.
            for at in (0..0x3000).step_by(8) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let word = if round % 2 == 0 {
                    random
                } else {
                    random & 0x0003_0fff_0011_ffff
                };
                c.memory
                    .write_all_at(&word.to_le_bytes(), 0x1_0000 * (round % 3).min(1) + at)
                    .unwrap();
            }
            rustix::io::write(&c.kick, &1u64.to_ne_bytes()).ok();
            pair.talks(10);
        }
        net.serves_c();
    });
}

#[test]
fn an_address_that_is_announced_beside_the_bridge_stays_where_it_is() {
    Net::new().beside(|net, pair| {
        let d = net.host("d", 2);
        let e = net.host("e", 1);
        for _ in 0..20 {
            d.announce();
            e.announce();
            pair.talks(3);
        }
    });
}

#[test]
fn runts_reach_nobody() {
    Net::new().beside(|net, pair| {
        let mut c = net.host("c", 3);
        let frame = bystander::frame([0xff; 6], 3, 0, 60);
        for len in (1..14).chain(1..14) {
            c.send(&frame[..len]);
            pair.talks(1);
        }
        until("the runts are counted", || net.count("c", "rx_runts") == 26);
    });
}

#[test]
fn garbage_on_a_ports_socket_harms_nobody() {
    Net::new().beside(|net, pair| {
        let mut random = 0x2545_F491_4F6C_DD1Du64;
        for round in 0..60u32 {
            let Ok(mut stream) = UnixStream::connect(net.path("c")) else {
                continue;
            };
            let mut bytes = match round % 4 {
                // Headers of each message with nothing right behind them.
                0 => raw::encode(round, 1, &[0xff; 8]),
                1 => [raw::encode(3, 1, &[]), raw::encode(5, 1, &[round as u8; 40])].concat(),
                2 => [&round.to_le_bytes()[..], &1u32.to_le_bytes(), &u32::MAX.to_le_bytes()].concat(),
                _ => Vec::new(),
            };
            for _ in 0..round {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                bytes.extend(random.to_le_bytes());
            }
            let _ = stream.write_all(&bytes);
            pair.talks(1);
        }
        net.serves_c();
    });
}

#[test]
fn silent_connections_keep_nobody_from_a_port() {
    Net::new().beside(|net, pair| {
        let silent: Vec<_> = (0..4).filter_map(|_| UnixStream::connect(net.path("c")).ok()).collect();
        pair.talks(10);
        net.serves_c();
        drop(silent);
    });
}

#[test]
fn clients_of_the_control_sockets_keep_nobody_out() {
    Net::new().beside(|net, pair| {
        let mut clients = Vec::new();
        for n in 0..60 {
            for socket in ["ctl", "told"] {
                let mut stream = UnixStream::connect(net.path(socket)).unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
                // One says nothing, one half a line, one half a head; one asks again and again and reads no answer.
                let text: &[u8] = match n % 4 {
                    0 => b"",
                    1 => b"{\"op\":",
                    2 => b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
                    _ => &b"{\"op\":\"metrics\"}\n".repeat(200),
                };
                let _ = stream.write_all(text);
                clients.push(stream);
            }
            if n % 10 == 9 {
                pair.talks(3);
                let start = Instant::now();
                assert!(net.stats().is_some(), "the control socket answers");
                let metrics = net.run(&["stats", "--control", "told", "--metrics"]);
                assert!(String::from_utf8_lossy(&metrics.stdout).contains("usernic_rx_packets_total"));
                assert!(start.elapsed() < LIMIT / 3, "{:?} for two answers", start.elapsed());
            }
            // Each drips on.
            for stream in &mut clients {
                let _ = stream.shutdown(Shutdown::Read);
                let _ = stream.write(b" ");
            }
        }
    });
}

#[test]
fn back_ends_that_lie_end_the_program_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("x");
    let cases: [(&str, &[u8]); 5] = [
        ("says nothing", b""),
        ("answers noise", &[0x5a; 4096]),
        ("answers a message without an end", &raw::encode(1, 5, &[])[..8]),
        (
            "answers too long a message",
            &[1, 0, 0, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        ),
        ("offers nothing", &raw::encode(1, 5, &[0; 8])),
    ];
    for (what, bytes) in cases {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = program(&dir);
        command.args([
            "generate",
            "--port",
            "virtio-user,path=x,timeout=300",
            "--count",
            "1",
            "--wait",
            "1",
        ]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let bytes = bytes.to_vec();
        let peer = std::thread::spawn(move || {
            listener.set_nonblocking(true).unwrap();
            let start = Instant::now();
            let mut held = Vec::new();
            while start.elapsed() < Duration::from_secs(2) {
                if let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.write_all(&bytes);
                    held.push(stream);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        until(what, || child.try_wait().unwrap().is_some());
        let mut told = String::new();
        child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "a back-end that {what}: {told}");
        assert!(!told.contains("panicked"), "a back-end that {what}: {told}");
        peer.join().unwrap();
    }
}

#[test]
fn a_caller_of_the_cni_plugin_that_lies_changes_nothing() {
    Net::new().beside(|net, pair| {
        let deep = "[".repeat(100_000);
        let long = format!("{{\"cniVersion\":\"1.0.0\",\"name\":\"{}\"}}", "x".repeat(1 << 20));
        let config = |name: &str| {
            format!(
                "{{\"cniVersion\":\"1.0.0\",\"name\":{name},\"type\":\"usernic-cni\",\"control\":\"{}\",\"dir\":\"{}\"}}",
                net.path("ctl").display(),
                net.path("../../../etc").display()
            )
        };
        let texts = [String::new(), "null".into(), "{".into(), deep, long, config("\"../x\""), config("7")];
        for text in &texts {
            for command in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "", "NONSENSE"] {
                let mut plugin = program(&net.dir);
                plugin.arg("cni").env("CNI_COMMAND", command).env("CNI_CONTAINERID", "../../x");
                plugin.env("CNI_NETNS", "/proc/self/ns/net").env("CNI_IFNAME", "a/b").env("CNI_PATH", "/");
                plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
                let mut child = plugin.spawn().unwrap();
                let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
                until("the plugin answers", || child.try_wait().unwrap().is_some());
                let output = child.wait_with_output().unwrap();
                let told = String::from_utf8_lossy(&output.stderr);
                assert!(matches!(output.status.code(), Some(0 | 1)), "{command} {:.60}: {told}", text);
                assert!(!told.contains("panicked"), "{command} {text:.60}: {told}");
            }
            pair.talks(1);
        }
        let list: Value = serde_json::from_slice(&net.run(&["switch", "ctl", "--control", "ctl", "list"]).stdout).unwrap();
        assert_eq!(list["ports"].as_array().unwrap().len(), 5, "{list}");
    });
}
