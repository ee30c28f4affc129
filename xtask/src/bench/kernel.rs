//! The kernel's way between two containers, to compare with: a veth pair, UDP sockets or AF_PACKET sockets on it.
//!
//! One process, two threads on two CPUs, each in a network namespace of its own; both spin on non-blocking sockets,
//! which is the kernel's best. It speaks the lines of [`protocol`](super::protocol).

use std::io::{BufRead, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use rustix::thread::UnshareFlags;

use super::cores::pin;
use super::worker::monotonic;

/// The Ethernet type of local experiments.
const ETHERTYPE: u16 = 0x88b5;

/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 42;

/// Which sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sockets {
    /// UDP over IPv4.
    Udp,
    /// Raw frames.
    Packet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    Rest,
    Tx(usize),
    Latency(usize),
}

struct Shared {
    generation: AtomicU64,
    load: Mutex<Load>,
    received: AtomicU64,
    sent: AtomicU64,
    trips: Mutex<Histogram<u64>>,
    stop: AtomicBool,
}

/// One end: sends and receives frames of a size, never waiting.
enum End {
    Udp(UdpSocket),
    Packet(OwnedFd),
}

impl End {
    fn open(sockets: Sockets, interface: &str, from: &str, to: &str) -> Result<Self> {
        Ok(match sockets {
            Sockets::Udp => {
                let socket = UdpSocket::bind(from)?;
                socket.connect(to)?;
                socket.set_nonblocking(true)?;
                End::Udp(socket)
            }
            Sockets::Packet => End::Packet(raw_socket(interface)?),
        })
    }

    fn send(&self, bytes: &[u8]) -> bool {
        match self {
            End::Udp(socket) => socket.send(&bytes[HEADERS..]).is_ok(),
            End::Packet(socket) => rustix::io::write(socket, bytes).is_ok(),
        }
    }

    fn receive(&self, bytes: &mut [u8]) -> bool {
        match self {
            End::Udp(socket) => socket.recv(bytes).is_ok(),
            End::Packet(socket) => rustix::io::read(socket, bytes).is_ok(),
        }
    }
}

fn raw_socket(interface: &str) -> Result<OwnedFd> {
    let protocol = libc::c_int::from(ETHERTYPE.to_be());
    // SAFETY: socket(2) takes integers.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            protocol,
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("an AF_PACKET socket");
    }
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: a string that ends with a zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: sockaddr_ll is integers and arrays of them: all zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETHERTYPE.to_be();
    address.sll_ifindex = index as i32;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll and lives across the call; `len` is its size.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("binding to {interface}"));
    }
    Ok(socket)
}

fn ip(args: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(args.split_whitespace())
        .output()
        .context("ip")?;
    if !output.status.success() {
        bail!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The program.
pub fn main(sockets: Sockets, cpus: (usize, usize)) -> Result<()> {
    pin(cpus.0)?;
    let flags = if crate::peers::is_root() {
        UnshareFlags::NEWNET
    } else {
        UnshareFlags::NEWNET | UnshareFlags::NEWUSER
    };
    if flags.contains(UnshareFlags::NEWUSER) {
        become_root_of_our_own(flags)?;
    } else {
        // SAFETY: there is one thread yet, and nothing open that depends on the network namespace.
        unsafe { rustix::thread::unshare_unsafe(flags) }.context("a network namespace")?;
    }
    let shared = Arc::new(Shared {
        generation: AtomicU64::new(0),
        load: Mutex::new(Load::Rest),
        received: AtomicU64::new(0),
        sent: AtomicU64::new(0),
        trips: Mutex::new(Histogram::new_with_bounds(1, 10_000_000_000, 3)?),
        stop: AtomicBool::new(false),
    });
    ip("link add xt0 type veth peer name xt1")?;
    let (tell, hear) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let far = std::thread::spawn({
        let shared = Arc::clone(&shared);
        move || -> Result<()> {
            // SAFETY: the namespace is this thread's alone from here on, and it has nothing open yet.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            tell.send(rustix::thread::gettid())?;
            wait.recv()?;
            ip("addr add 192.0.2.2/24 dev xt1")?;
            ip("link set xt1 up")?;
            tell.send(rustix::thread::gettid())?;
            wait.recv()?;
            let end = End::open(sockets, "xt1", "192.0.2.2:9000", "192.0.2.1:9000")?;
            tell.send(rustix::thread::gettid())?;
            pin(cpus.1)?;
            answer(&end, &shared);
            Ok(())
        }
    });
    let limit = Duration::from_secs(10);
    let thread = hear.recv_timeout(limit).context("the second network namespace")?;
    ip(&format!("link set xt1 netns {}", thread.as_raw_nonzero()))?;
    ip("addr add 192.0.2.1/24 dev xt0")?;
    ip("link set xt0 up")?;
    go.send(())?;
    hear.recv_timeout(limit).context("the second interface")?;
    go.send(())?;
    hear.recv_timeout(limit).context("the second socket")?;
    let end = End::open(sockets, "xt0", "192.0.2.1:9000", "192.0.2.2:9000")?;
    let near = std::thread::spawn({
        let shared = Arc::clone(&shared);
        move || pin(cpus.0).map(|()| ask(&end, &shared))
    });
    serve(&shared)?;
    shared.stop.store(true, Ordering::Relaxed);
    near.join()
        .map_err(|_| anyhow::anyhow!("the sending thread panicked"))??;
    far.join()
        .map_err(|_| anyhow::anyhow!("the receiving thread panicked"))??;
    Ok(())
}

/// A user namespace in which we are root.
fn become_root_of_our_own(flags: UnshareFlags) -> Result<()> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // SAFETY: there is one thread yet.
    unsafe { rustix::thread::unshare_unsafe(flags) }.context("user and network namespaces")?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Shared) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["load", "rx"] => set(shared, Load::Rest),
            ["load", "tx", size] => set(shared, Load::Tx(size.parse()?)),
            ["load", "latency", size, "1"] => set(shared, Load::Latency(size.parse()?)),
            ["stats"] => {
                let (rx, tx) = (
                    shared.received.load(Ordering::Relaxed),
                    shared.sent.load(Ordering::Relaxed),
                );
                writeln!(out, "stats {rx} {tx} {}", monotonic())?;
                out.flush()?;
                continue;
            }
            ["latency"] => {
                let mut trips = lock(&shared.trips);
                let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| trips.value_at_quantile(q));
                writeln!(out, "latency {} {p50} {p99} {p999}", trips.len())?;
                trips.reset();
                out.flush()?;
                continue;
            }
            _ => bail!("what is \"{line}\"?"),
        }
        writeln!(out, "ok")?;
        out.flush()?;
    }
    Ok(())
}

fn set(shared: &Shared, load: Load) {
    *lock(&shared.load) = load;
    shared.generation.fetch_add(1, Ordering::Release);
}

/// The sending thread.
fn ask(end: &End, shared: &Shared) {
    let mut bytes = vec![0u8; 2048];
    bytes[..14].copy_from_slice(&[
        2,
        0,
        0,
        0,
        0,
        2,
        2,
        0,
        0,
        0,
        0,
        1,
        (ETHERTYPE >> 8) as u8,
        ETHERTYPE as u8,
    ]);
    let mut buffer = vec![0u8; 2048];
    while !shared.stop.load(Ordering::Relaxed) {
        let generation = shared.generation.load(Ordering::Acquire);
        let load = *lock(&shared.load);
        let same = || shared.generation.load(Ordering::Relaxed) == generation && !shared.stop.load(Ordering::Relaxed);
        match load {
            Load::Rest => std::thread::sleep(Duration::from_millis(1)),
            Load::Tx(size) => {
                // The first byte of the payload says that no answer is wanted.
                bytes[HEADERS] = 0;
                while same() {
                    if end.send(&bytes[..size]) {
                        shared.sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            Load::Latency(size) => {
                bytes[HEADERS] = 1;
                while end.receive(&mut buffer) {}
                while same() {
                    let start = Instant::now();
                    while !end.send(&bytes[..size]) && same() {}
                    let mut came = false;
                    while !came && start.elapsed() < Duration::from_millis(20) {
                        came = end.receive(&mut buffer);
                    }
                    if came {
                        lock(&shared.trips).saturating_record(start.elapsed().as_nanos() as u64);
                    }
                }
            }
        }
    }
}

/// The receiving thread: counts, and answers what wants an answer.
fn answer(end: &End, shared: &Shared) {
    let mut buffer = vec![0u8; 2048];
    let mut bytes = vec![0u8; 2048];
    bytes[..14].copy_from_slice(&[
        2,
        0,
        0,
        0,
        0,
        1,
        2,
        0,
        0,
        0,
        0,
        2,
        (ETHERTYPE >> 8) as u8,
        ETHERTYPE as u8,
    ]);
    // Where the payload begins in what a socket gives.
    let first = if matches!(end, End::Udp(_)) { 0 } else { HEADERS };
    let mut count = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if end.receive(&mut buffer) {
            count += 1;
            shared.received.store(count, Ordering::Relaxed);
            if buffer[first] == 1 {
                let size = match *lock(&shared.load) {
                    Load::Latency(size) => size,
                    _ => 64,
                };
                while !end.send(&bytes[..size]) && !shared.stop.load(Ordering::Relaxed) {}
            }
        }
    }
}
