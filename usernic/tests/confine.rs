//! A confined process: what it can no longer do, and that its port still works and reconnects.
//!
//! What is given up does not come back, so that a test runs itself again as another process.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use usernic::confine::{Enforced, Files, calls};
use usernic::{Burst, Port, Queue};

const CHILD: &str = "USERNIC_TEST_CONFINED";
const WAIT: Duration = Duration::from_secs(10);

/// A back-end that sends frames of this number back, until another comes: then the confined process has its answer.
fn answer(port: &Port, number: u8) {
    let mut queue = port.queue(0).unwrap();
    let mut burst = Burst::new(8);
    let end = Instant::now() + WAIT;
    loop {
        assert!(Instant::now() < end, "no frame after {number}");
        if queue.rx(&mut burst) == 0 {
            // What wakes up a queue may be a change of its link.
            queue.wait(Some(Duration::from_millis(100))).unwrap();
            continue;
        }
        let mut frame = [0; 60];
        if burst.iter().any(|p| p.copy_to(&mut frame) == 60 && frame[0] != number) {
            return;
        }
        queue.tx(&mut burst);
        queue.free(&mut burst);
    }
}

#[test]
fn a_confined_port_reconnects_and_nothing_else_can_be_done() {
    let dir = tempfile::tempdir().unwrap();
    let ports = dir.path().join("ports");
    fs::create_dir(&ports).unwrap();
    fs::write(dir.path().join("secret"), "x").unwrap();
    let (client, server) = (ports.join("client"), ports.join("server"));
    let back = || Port::open(&format!("vhost,path={}", client.display())).unwrap();
    let first = back();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    answer(&first, 1);
    drop(first);
    let second = back();
    answer(&second, 2);
    drop(second);
    // The other port listens: it takes one peer after the other, too.
    for number in [1, 2] {
        let peer = loop {
            match Port::open(&format!("vhost,client=1,path={}", server.display())) {
                Ok(peer) if peer.wait_link(Duration::from_millis(500)) => break peer,
                _ => assert!(child.try_wait().unwrap().is_none(), "the child ended"),
            }
        };
        answer(&peer, number);
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    for line in text.lines().filter(|line| line.contains("SKIPPED")) {
        println!("{line}");
    }
    assert!(text.contains("all refused"), "{text}");
}

/// Asks with this number until it comes back, or, without an answer to come, until the link is down: what is sent to a
/// back-end that goes is lost.
fn ask(port: &Port, queue: &mut Queue, number: u8, answered: bool) {
    let end = Instant::now() + WAIT;
    let (mut sent, mut received) = (Burst::new(8), Burst::new(8));
    while answered || port.link().up {
        assert!(Instant::now() < end, "no answer to {number}: {:?}", port.link());
        if queue.alloc(&mut sent, 1) == 1 {
            sent[0].copy_from(&[number; 60]).unwrap();
            queue.tx(&mut sent);
            queue.free(&mut sent);
        }
        queue.wait(Some(Duration::from_millis(20))).unwrap();
        while queue.rx(&mut received) > 0 {
            let mut frame = [0; 60];
            if received
                .iter()
                .any(|p| p.copy_to(&mut frame) == 60 && frame[0] == number)
            {
                return;
            }
            queue.free(&mut received);
        }
    }
}

/// Errno of a failed call.
fn refused<T>(result: std::io::Result<T>, what: &str) -> i32 {
    match result {
        Ok(_) => panic!("{what} is allowed"),
        Err(error) => error.raw_os_error().unwrap_or(0),
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child() {
    let Some(dir) = std::env::var_os(CHILD).map(std::path::PathBuf::from) else {
        return;
    };
    let ports = dir.join("ports");
    let client = format!("virtio-user,memory=memfd,path={}", ports.join("client").display());
    let server = format!(
        "virtio-user,memory=memfd,server=1,path={}",
        ports.join("server").display()
    );
    let specs = [client.parse().unwrap(), server.parse().unwrap()];
    let files = specs.iter().fold(Files::new(), Files::port).apply().unwrap();
    let [client, server] = specs.map(|spec| Port::open_spec(spec).unwrap());
    let mut queues = [client.queue(0).unwrap(), server.queue(0).unwrap()];
    if std::env::var_os("NOCALLS").is_none() {
        calls().unwrap();
    }

    // Each by a back-end of its own, which goes when it sees the next number.
    for (port, queue) in [&client, &server].into_iter().zip(&mut queues) {
        ask(port, queue, 1, true);
        ask(port, queue, 2, true);
        ask(port, queue, 3, false);
    }
    // Threads can be had, and have their names.
    let name = std::thread::Builder::new()
        .name("named".into())
        .spawn(|| std::thread::current().name().map(str::to_owned));
    assert_eq!(name.unwrap().join().unwrap().as_deref(), Some("named"));

    let (eperm, eacces) = (libc::EPERM, libc::EACCES);
    assert_eq!(refused(std::net::UdpSocket::bind("127.0.0.1:0"), "a network"), eperm);
    assert!(matches!(refused(Command::new("/bin/true").status(), "a program"), e if e == eperm || e == eacces));
    // SAFETY: no memory is touched; the calls are refused.
    let (map, ptrace) = unsafe {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
        let map = (map != libc::MAP_FAILED)
            .then_some(())
            .ok_or_else(std::io::Error::last_os_error);
        let ptrace = libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0);
        (
            map,
            if ptrace == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            },
        )
    };
    assert_eq!(refused(map, "executable memory"), eperm);
    assert_eq!(refused(ptrace, "ptrace"), eperm);
    if files == Enforced::No {
        println!("SKIPPED confine/files: this kernel has no Landlock");
    } else {
        assert_eq!(refused(fs::read(dir.join("secret")), "another's file"), eacces);
        assert_eq!(refused(fs::write(dir.join("new"), "x"), "a new file"), eacces);
        assert!(!fs::read_to_string("/proc/self/status").unwrap().is_empty());
    }
    println!("all refused");
}
