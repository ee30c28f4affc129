//! What the programs do when what they say cannot be written, and what they say on a terminal.

mod lab;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, Running};

/// A file to which nothing can be written.
fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader has left.
fn left() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn plain(lab: &Lab, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    command.args(line.split_whitespace()).current_dir(lab.folder());
    command
}

fn text(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    assert_ne!(output.status.code(), Some(101), "{text}");
    text
}

#[test]
fn results_that_are_lost_are_a_failure() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let _host = lab.start("forward --port virtio-user,path=b --mode icmpecho");
    lab.until_up(&["b"]);
    let ping = "ping --port virtio-user,path=a --from 192.0.2.1 --to 192.0.2.2 -c 2 -i 0";
    std::fs::write(lab.path("one.pcap"), lab::pcap([(0, &[2; 60][..])])).unwrap();
    for line in [
        ping,
        "--json generate --port virtio-user,path=a --count 9",
        "--json replay --port virtio-user,path=a --pcap one.pcap",
        "--json replay --port virtio-user,path=a --pcap none.pcap",
        "--json switch --listen zz --seconds 0.1",
        "--json ping --port virtio-user,path=a --from 192.0.2.1 --to 192.0.2.2 -c 1",
        "--json doctor",
        "--json devices",
        "container --format podman --port virtio-user,path=/run/usernic/a/s",
        "stats --control ctl",
        "stats --control ctl --metrics",
        "switch ctl --control ctl list",
        "switch ctl --control ctl metrics",
        "cni",
        "--help",
        "--version",
        "help generate",
    ] {
        let output = plain(&lab, line)
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::null())
            .stdout(full())
            .output()
            .unwrap();
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{line}: {message}");
        // A pipe's reader that left has what it wants: the end is quiet, but for a program's own error.
        let output = plain(&lab, line)
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::null())
            .stdout(left())
            .output();
        let message = text(&output.unwrap());
        assert!(!message.contains("Broken pipe") || line == "cni", "{line}: {message}");
    }
    let output = plain(&lab, ping).stdout(full()).output().unwrap();
    let message = text(&output);
    assert!(
        message.contains("standard output") && message.contains("echoes,"),
        "{message}"
    );
}

#[test]
fn a_standard_output_that_is_closed_is_a_failure() {
    let lab = Lab::new();
    for words in ["doctor --json", "--version"] {
        let line = format!("exec '{}' {words} >&-", env!("CARGO_BIN_EXE_usernic"));
        let output = Command::new("sh").args(["-c", &line]).output().unwrap();
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{words}: {message}");
    }
    drop(lab);
}

#[test]
fn a_log_that_is_lost_stops_no_traffic() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b,c,d --connect a:b --connect c:d");
    for log in [full as fn() -> Stdio, left] {
        for line in [
            "-v forward --port virtio-user,path=c --seconds 1.3",
            "-v switch --listen e --seconds 0.2",
            "-v capture --port virtio-user,path=d --pcap x.pcap --timeout 1.3",
            "-vv generate --port virtio-user,path=a --rate 10 --seconds 1.3 --stall 0",
        ] {
            let output = plain(&lab, line).stderr(log()).output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{line}: {}", text(&output));
        }
    }
}

/// A log whose reader does not read: a program that waited for it would stand still with all its ports.
#[test]
fn a_log_that_nobody_reads_stops_no_traffic() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let (reader, mut writer) = std::io::pipe().unwrap();
    // All of its room.
    rustix_nonblocking(&writer, true);
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix_nonblocking(&writer, false);
    let mut command = plain(&lab, "--json -vv forward --port virtio-user,path=b --seconds 2.5");
    let mut child = command.stdout(Stdio::piped()).stderr(writer).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "it waits for its log's reader"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(lab::json(&output)["ended"], "time");
    drop(reader);
}

fn rustix_nonblocking(fd: &impl std::os::fd::AsRawFd, on: bool) {
    let mut value = i32::from(on);
    // SAFETY: FIONBIO reads an int.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &mut value) }, 0);
}

/// Both ends of a pseudo-terminal.
fn terminal() -> (File, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: two numbers are written; name, termios and window size are left out.
    let made = unsafe {
        libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(made, 0);
    // SAFETY: open, and nobody else's.
    unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}

/// What a program writes to a terminal that is its standard output and error, with these variables.
fn on_terminal(lab: &Lab, line: &str, variables: &[(&str, &str)]) -> String {
    let (mut master, slave) = terminal();
    let mut command = plain(lab, line);
    command.env_clear().envs(variables.iter().copied());
    let output = slave.try_clone().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(slave)
        .spawn()
        .unwrap();
    drop(command);
    let mut seen = Vec::new();
    // A terminal whose other end has left ends with an error.
    let mut room = [0; 4096];
    while let Ok(n @ 1..) = master.read(&mut room) {
        seen.extend_from_slice(&room[..n]);
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(seen).unwrap()
}

#[test]
fn counters_are_text_on_a_terminal() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a");
    let seen = on_terminal(&lab, "stats --control ctl", &[]);
    assert!(seen.starts_with("a: link down, rx_packets 0, "), "{seen}");
    assert!(on_terminal(&lab, "--json stats --control ctl", &[]).starts_with('{'));
}

#[test]
fn colours_and_moving_lines_are_for_terminals_that_want_them() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let line = "-v forward --port virtio-user,path=b --seconds 0.1";
    let coloured = on_terminal(&lab, line, &[("TERM", "xterm")]);
    assert!(
        coloured.contains("\x1b[") && coloured.contains("link up"),
        "{coloured:?}"
    );
    for variables in [&[("TERM", "xterm"), ("NO_COLOR", "1")][..], &[("TERM", "dumb")], &[]] {
        let seen = on_terminal(&lab, line, variables);
        assert!(
            !seen.contains('\x1b') && seen.contains("link up"),
            "{variables:?}: {seen:?}"
        );
    }
    // An empty value says nothing.
    assert!(on_terminal(&lab, line, &[("TERM", "xterm"), ("NO_COLOR", "")]).contains('\x1b'));
}

#[test]
fn progress_is_seen_on_every_terminal() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let line = "forward --port virtio-user,path=b --seconds 1.5";
    let seen = on_terminal(&lab, line, &[]);
    assert!(
        seen.contains(" s  tx ") && !seen.contains('\x1b'),
        "without TERM: {seen:?}"
    );
    let seen = on_terminal(&lab, line, &[("TERM", "xterm"), ("LANG", "C")]);
    assert!(seen.contains("forward 00:00:01") && seen.is_ascii(), "LANG=C: {seen:?}");
    let seen = on_terminal(&lab, line, &[("TERM", "xterm"), ("LANG", "C.UTF-8")]);
    assert!(seen.contains("forward 00:00:01") && !seen.is_ascii(), "UTF-8: {seen:?}");
}

/// Each line on the standard error is one write: on a socket that keeps borders, each is one message.
#[test]
fn a_line_is_one_write() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let (ours, theirs) = datagrams();
    for line in [
        "-vv forward --port virtio-user,path=b --seconds 1.5",
        "-v switch --listen c,d --control e --seconds 0.1",
    ] {
        let theirs = theirs.try_clone().unwrap();
        assert!(plain(&lab, line).stderr(theirs).status().unwrap().success());
    }
    let mut early = plain(&lab, "capture --port virtio-user,path=nowhere --pcap x --wait 0.1");
    assert!(!early.stderr(theirs).status().unwrap().success());
    let mut lines = 0;
    let mut room = [0; 4096];
    rustix_nonblocking(&ours, true);
    let mut ours = File::from(ours);
    while let Ok(n @ 1..) = ours.read(&mut room) {
        let line = std::str::from_utf8(&room[..n]).unwrap();
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
        lines += 1;
    }
    assert!(
        lines >= 10,
        "links, progress, totals, ports, waiting, an error: {lines}"
    );
}

/// A name or value that somebody else chose makes no line of its own on the standard error, and commands no terminal.
#[test]
fn no_value_breaks_a_line() {
    let lab = Lab::new();
    let _switch = lab.switch("");
    let spec = "virtio-user,path=x\n ERROR of another\x1b[2J";
    let forged = |seen: &str| seen.matches('\n').count() != 1 || seen.contains('\x1b');
    for line in [
        "switch ctl --control ctl add NAME vhost,path=s",
        "-v capture --pcap x --wait 0 --port SPEC",
        "cni",
    ] {
        let words = line.split(' ').map(|word| match word {
            "NAME" => "a\n ERROR of another\x1b[2J",
            "SPEC" => spec,
            word => word,
        });
        let mut command = plain(&lab, "");
        command.args(words).env("CNI_COMMAND", "ADD\n ERROR of another\x1b[2J");
        let output = command.stdin(Stdio::null()).output().unwrap();
        let seen = text(&output);
        assert!(!output.status.success() && !forged(&seen), "{line}: {seen:?}");
    }
}

/// A back-end that comes and breaks the protocol, again and again, fills no log.
#[test]
fn a_back_end_that_is_lost_again_and_again_is_told_of_now_and_then() {
    const SESSIONS: usize = 40;
    let lab = Lab::new();
    let mut command = plain(&lab, "capture --port virtio-user,path=x,server=1 --pcap o --wait 60");
    let mut capture = Running(Some(command.stderr(Stdio::piped()).spawn().unwrap()));
    lab.until("it listens", || lab.path("x").exists());
    for _ in 0..SESSIONS {
        let mut stream = UnixStream::connect(lab.path("x")).unwrap();
        let (mut head, mut body, mut asked) = ([0; 12], [0; 4096], 0);
        while stream.read_exact(&mut head).is_ok() {
            let size = u32::from_le_bytes(head[8..].try_into().unwrap()) as usize;
            stream.read_exact(&mut body[..size]).unwrap();
            // GET_FEATURES: at the beginning, and when the rings are set up.
            if head[0] == 1 {
                asked += 1;
                stream
                    .write_all(&[&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0][..], &(1u64 << 32).to_le_bytes()].concat())
                    .unwrap();
            }
            if asked == 2 {
                // It has no more to say.
                let _ = stream.write_all(&[7; 12]);
                asked = 0;
            }
        }
    }
    capture.signal(libc::SIGINT);
    let output = capture.0.take().unwrap().wait_with_output().unwrap();
    let message = text(&output);
    let lines = message.matches("link down").count();
    assert!((1..SESSIONS / 4).contains(&lines), "{lines} of {SESSIONS}: {message}");
}

/// A listening front-end has one back-end: the operator is told of a second one.
#[test]
fn a_second_back_end_of_a_listening_front_end_is_told_of() {
    let lab = Lab::new();
    let told = || std::fs::read_to_string(lab.path("told")).unwrap_or_default();
    let mut command = plain(&lab, "capture --port virtio-user,path=x,server=1 --pcap o --wait 60");
    let _capture = Running(Some(
        command.stderr(File::create(lab.path("told")).unwrap()).spawn().unwrap(),
    ));
    lab.until("it listens", || lab.path("x").exists());
    let _switch = lab.switch("--port vhost,path=x,client=1");
    lab.until_up(&["x"]);
    let _second = UnixStream::connect(lab.path("x")).unwrap();
    lab.until("the second is told of", || {
        told().contains("another back-end connected")
    });
}

/// A pair of sockets that keep the borders of what is written.
fn datagrams() -> (OwnedFd, OwnedFd) {
    let (a, b) = std::os::unix::net::UnixDatagram::pair().unwrap();
    (a.into(), b.into())
}

#[test]
fn totals_are_told_whatever_ends_a_program() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b,c --connect a:b");
    std::fs::write(lab.path("many.pcap"), lab::pcap((0..3000).map(|n| (n, &[2; 60][..])))).unwrap();
    for (line, word) in [
        (
            "generate --port virtio-user,path=a --stall 0.2",
            "taken no frame for 0.2 s",
        ),
        (
            "replay --port virtio-user,path=a --pcap many.pcap --stall 0.2",
            "taken no frame for 0.2 s",
        ),
        (
            "ping --port virtio-user,path=c --from 192.0.2.1 --to 192.0.2.2 -c 1",
            "three questions",
        ),
    ] {
        let output = lab.command(line).output().unwrap();
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{line}: {message}");
        assert!(message.contains(word), "{line}: {message}");
        let totals = lab::json(&output);
        assert_eq!(totals["ended"], "error", "{line}");
        assert!(
            totals["error"].as_str().unwrap().contains(word) && totals["ports"][0]["tx_packets"].is_u64(),
            "{totals}"
        );
    }
}

/// A limit on the size of files stands for a disk that is full.
#[test]
fn a_capture_that_is_cut_by_a_full_disk_can_be_read() {
    for (name, overhead) in [("x.pcap", 24), ("x.pcapng", 60)] {
        let lab = Lab::new();
        let _switch = lab.switch("--listen a,b,r --connect a:b --reflect r");
        // Of the signal that the limit is told by, the error is what a full disk has in common.
        let script = format!(
            "trap '' XFSZ; exec '{}' --json capture --port virtio-user,path=b --pcap {name} --timeout 30",
            env!("CARGO_BIN_EXE_usernic")
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script]).current_dir(lab.folder());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        let capture = lab::Running(Some(child));
        lab.until_up(&["b"]);
        lab.until("the capture has begun", || lab.path(name).exists());
        let limit = libc::rlimit {
            rlim_cur: 8192,
            rlim_max: 8192,
        };
        // SAFETY: one limit is read, none written, of a child that was not waited for.
        let set = unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
        assert_eq!(set, 0);
        // It stalls when the capture is gone.
        let line = "generate --port virtio-user,path=a --count 1000 --rate 20K --size 61-99 --stall 0.3";
        lab.command(line).output().unwrap();
        let mut capture = capture;
        let output = capture.0.take().unwrap().wait_with_output().unwrap();
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains(name) && message.contains("File too large"),
            "{message}"
        );
        let totals = lab::json(&output);
        let frames = totals["frames"].as_u64().unwrap();
        let len = std::fs::metadata(lab.path(name)).unwrap().len();
        assert!(frames > 10 && len <= 8 * 1024 && len > overhead, "{totals} {len}");
        // Whole: strict reading finds as many frames as were told.
        let sent = lab.run(&format!("replay --port virtio-user,path=r --strict --pcap {name}"));
        assert_eq!(sent["frames"].as_u64(), Some(frames));
    }
}
