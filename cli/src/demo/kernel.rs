//! The kernel's way, for comparison: a veth pair between two network namespaces, measured in the same run.
//!
//! One process in a user namespace, two threads, each in a network namespace of its own with one end of the pair. The
//! client thread sends and measures; the peer thread receives, reflects or counts. Batches of 32 with sendmmsg(2) and
//! recvmmsg(2), which is the kernel's fast way without io_uring.

use std::io::{Error, ErrorKind, Result as IoResult};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hdrhistogram::Histogram;
use rustix::thread::UnshareFlags;

use super::channel::{Channel, KernelTest, Order, Percentiles, Rate, Report};
use super::isolate;
use super::netlink::Netlink;
use crate::common;
use crate::packets::{self, Mac};

const CLIENT: (Mac, Ipv4Addr) = ([0x02, 0, 0, 0, 1, 1], Ipv4Addr::new(192, 0, 2, 1));
const PEER: (Mac, Ipv4Addr) = ([0x02, 0, 0, 0, 1, 2], Ipv4Addr::new(192, 0, 2, 2));
const PORT: u16 = 9000;
/// An EtherType for experiments (IEEE 802): nothing else on the link has it.
const ETHERTYPE: u16 = 0x88b5;
/// Messages a system call.
const BATCH: usize = 32;
/// Bytes of Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 42;

/// What the peer thread does until the flag is set.
struct Job {
    test: KernelTest,
    cpu: Option<usize>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    ready: mpsc::Sender<Result<()>>,
}

/// The process's life: namespaces, the pair, then orders.
pub fn main(channel: &mut Channel) -> Result<()> {
    isolate::enter_user_namespace()?;
    new_network().context("a network namespace")?;
    let (give, take) = mpsc::channel();
    let (jobs, work) = mpsc::channel::<Job>();
    std::thread::Builder::new()
        .name("peer".into())
        .spawn(move || peer(&give, &work))?;
    let namespace: OwnedFd = take.recv().map_err(|_| anyhow!("the peer thread ended"))??;
    let mut netlink = Netlink::open().context("a netlink socket")?;
    netlink
        .create_veth(c"veth0", CLIENT.0, c"veth1", PEER.0, namespace.as_fd())
        .context("creating a veth pair (is the kernel's module veth there?)")?;
    configure(&mut netlink, "veth0", CLIENT.1, PEER).context("configuring veth0")?;
    let ready = job(&jobs, KernelTest::UdpSpin, None)?;
    ready.finish();
    channel.send(&Report::Ready)?;
    let never = AtomicBool::new(false);
    while let Some(order) = channel.receive::<Order>(None, &never)? {
        let Order::Kernel { test, millis, cpus } = order else {
            bail!("not an order for the kernel: {order:?}")
        };
        if let Some((client, _)) = cpus {
            common::pin(client)?;
        }
        let running = job(&jobs, test, cpus.map(|(_, peer)| peer))?;
        let limit = Duration::from_millis(millis);
        let report = match test {
            KernelTest::UdpThroughput(size) => udp_throughput(size, limit, &running.count).map(Report::Rate),
            KernelTest::UdpSpin => udp_latency(limit, true).map(Report::Latency),
            KernelTest::UdpBlock => udp_latency(limit, false).map(Report::Latency),
            KernelTest::PacketThroughput(size, window) => packet_throughput(size, window, limit).map(Report::Rate),
            KernelTest::PacketSpin => packet_latency(limit).map(Report::Latency),
        };
        running.finish();
        channel.send(&report.with_context(|| format!("{test:?}"))?)?;
    }
    Ok(())
}

/// A job that the peer is at; told to stop by [`Running::finish`].
struct Running {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
}

impl Running {
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Starts a job on the peer and waits until it is ready to receive.
fn job(jobs: &mpsc::Sender<Job>, test: KernelTest, cpu: Option<usize>) -> Result<Running> {
    let (ready, started) = mpsc::channel();
    let running = Running {
        stop: Arc::new(AtomicBool::new(false)),
        count: Arc::new(AtomicU64::new(0)),
    };
    let job = Job {
        test,
        cpu,
        stop: Arc::clone(&running.stop),
        count: Arc::clone(&running.count),
        ready,
    };
    jobs.send(job).map_err(|_| anyhow!("the peer thread ended"))?;
    started
        .recv_timeout(Duration::from_secs(5))
        .map_err(|_| anyhow!("the peer thread does not answer"))??;
    Ok(running)
}

/// Moves the calling thread into a network namespace of its own.
fn new_network() -> IoResult<()> {
    // SAFETY: a network namespace belongs to the thread; nothing else is unshared.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

fn configure(netlink: &mut Netlink, name: &str, ip: Ipv4Addr, other: (Mac, Ipv4Addr)) -> IoResult<()> {
    let index = netlink.index(name)?;
    netlink.add_address(index, ip)?;
    netlink.set_up(index)?;
    netlink.add_neighbour(index, other.1, other.0)
}

/// The peer thread: its namespace, then jobs until the client thread is gone.
fn peer(give: &mpsc::Sender<Result<OwnedFd>>, work: &mpsc::Receiver<Job>) {
    let namespace = || -> Result<OwnedFd> {
        new_network().context("a second network namespace")?;
        let file = std::fs::File::open("/proc/thread-self/ns/net").context("opening /proc/thread-self/ns/net")?;
        Ok(file.into())
    };
    if give.send(namespace()).is_err() {
        return;
    }
    let mut configured = false;
    while let Ok(job) = work.recv() {
        let mut start = || -> Result<Peer> {
            if !configured {
                configure(&mut Netlink::open()?, "veth1", PEER.1, CLIENT).context("configuring veth1")?;
                configured = true;
            }
            job.cpu.map_or(Ok(()), common::pin)?;
            Peer::new(job.test)
        };
        match start() {
            Ok(mut peer) => {
                let _ = job.ready.send(Ok(()));
                while !job.stop.load(Ordering::Relaxed) {
                    peer.turn(job.test, &job.count);
                }
            }
            Err(error) => drop(job.ready.send(Err(error))),
        }
    }
}

struct Peer {
    udp: Option<UdpSocket>,
    batch: Batch,
    packet: Option<OwnedFd>,
}

impl Peer {
    fn new(test: KernelTest) -> Result<Self> {
        let mut peer = Peer {
            udp: None,
            batch: Batch::new(2048),
            packet: None,
        };
        match test {
            KernelTest::PacketThroughput(..) | KernelTest::PacketSpin => peer.packet = Some(packet_socket("veth1")?),
            KernelTest::UdpThroughput(_) | KernelTest::UdpSpin | KernelTest::UdpBlock => {
                let socket = UdpSocket::bind((PEER.1, PORT)).context("the peer's UDP socket")?;
                socket.set_nonblocking(test != KernelTest::UdpBlock)?;
                socket.set_read_timeout(Some(Duration::from_millis(20)))?;
                peer.udp = Some(socket);
            }
        }
        Ok(peer)
    }

    /// Receives once, and does what the test wants done with it.
    fn turn(&mut self, test: KernelTest, count: &AtomicU64) {
        if let Some(socket) = &self.packet {
            let n = self.batch.receive(socket.as_raw_fd()).unwrap_or(0);
            for i in 0..n {
                packets::swap_macs(self.batch.buffer(i));
            }
            if n > 0 {
                // What does not fit into the sender's buffer is lost, as in any bridge.
                let _ = self.batch.send(socket.as_raw_fd(), n);
            }
        } else if let Some(socket) = &self.udp {
            if matches!(test, KernelTest::UdpThroughput(_)) {
                let n = self.batch.receive(socket.as_raw_fd()).unwrap_or(0);
                count.fetch_add(n as u64, Ordering::Relaxed);
            } else {
                let mut bytes = [0; 2048];
                if let Ok((n, from)) = socket.recv_from(&mut bytes) {
                    let _ = socket.send_to(&bytes[..n], from);
                }
            }
        }
    }
}

fn udp_client() -> Result<UdpSocket> {
    let socket = UdpSocket::bind((CLIENT.1, 0)).context("the client's UDP socket")?;
    socket.connect((PEER.1, PORT))?;
    Ok(socket)
}

fn udp_throughput(size: usize, limit: Duration, received: &AtomicU64) -> Result<Rate> {
    let socket = udp_client()?;
    let mut batch = Batch::new(size - HEADERS);
    let start = Instant::now();
    let mut sent = 0u64;
    while start.elapsed() < limit {
        match batch.send(socket.as_raw_fd(), BATCH) {
            Ok(n) => sent += n as u64,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock) || e.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(e) => return Err(e).context("sendmmsg(2)"),
        }
    }
    let nanos = start.elapsed().as_nanos() as u64;
    // What is still queued at the receiver is not counted: the time is over.
    let frames = received.load(Ordering::Relaxed);
    Ok(Rate {
        frames,
        nanos,
        wrong: sent.saturating_sub(frames),
    })
}

fn udp_latency(limit: Duration, spin: bool) -> Result<Percentiles> {
    let socket = udp_client()?;
    socket.set_nonblocking(spin)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let payload = [0x5au8; 64 - HEADERS];
    let mut bytes = [0; 2048];
    ping_pong(
        limit,
        || socket.send(&payload).map(drop),
        || match socket.recv(&mut bytes) {
            Ok(n) => Ok(n == payload.len()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        },
    )
}

fn packet_throughput(size: usize, window: usize, limit: Duration) -> Result<Rate> {
    let socket = packet_socket("veth0")?;
    let mut out = Batch::new(size);
    (0..BATCH).for_each(|i| out.buffer(i).copy_from_slice(&packet_frame(size)));
    let mut back = Batch::new(2048);
    let (mut sent, mut frames, mut written_off, mut wrong) = (0u64, 0u64, 0u64, 0u64);
    let start = Instant::now();
    let (mut last, mut nanos) = (start, None);
    loop {
        let now = Instant::now();
        if now - start >= limit {
            // The time is over for the rate; what is still on its way is waited for, to tell late from lost.
            nanos.get_or_insert(((now - start).as_nanos() as u64, frames));
            if frames >= sent || now - last > Duration::from_millis(20) {
                break;
            }
        }
        let in_flight = sent.saturating_sub(frames + written_off);
        if nanos.is_none() && in_flight as usize + BATCH <= window {
            for i in 0..BATCH {
                out.buffer(i)[14..22].copy_from_slice(&(sent + i as u64).to_be_bytes());
            }
            match out.send(socket.as_raw_fd(), BATCH) {
                Ok(n) => sent += n as u64,
                Err(e) if e.kind() == ErrorKind::WouldBlock || e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => return Err(e).context("sendmmsg(2)"),
            }
        }
        let n = back.receive(socket.as_raw_fd()).unwrap_or(0);
        for i in 0..n {
            let mut number = [0; 8];
            number.copy_from_slice(&back.buffer(i)[14..22]);
            wrong += u64::from(back.len(i) != size || u64::from_be_bytes(number) >= sent);
        }
        frames += n as u64;
        if n > 0 {
            last = now;
        } else if nanos.is_none() && now - last > Duration::from_millis(20) {
            // So long without a frame: those in flight were dropped by a full buffer. Go on without them.
            written_off += in_flight;
            last = now;
        }
    }
    let (nanos, in_time) = nanos.unwrap_or((limit.as_nanos() as u64, frames));
    Ok(Rate {
        frames: in_time,
        nanos,
        wrong: wrong + sent.saturating_sub(frames),
    })
}

fn packet_latency(limit: Duration) -> Result<Percentiles> {
    let socket = packet_socket("veth0")?;
    let mut out = Batch::new(64);
    out.buffer(0).copy_from_slice(&packet_frame(64));
    let mut back = Batch::new(2048);
    let fd = socket.as_raw_fd();
    ping_pong(
        limit,
        || out.send(fd, 1).map(drop),
        || Ok(back.receive(fd).unwrap_or(0) > 0),
    )
}

/// Sends one and waits for it, again and again.
fn ping_pong(
    limit: Duration,
    mut send: impl FnMut() -> IoResult<()>,
    mut receive: impl FnMut() -> IoResult<bool>,
) -> Result<Percentiles> {
    let mut times = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    let start = Instant::now();
    while start.elapsed() < limit {
        let before = Instant::now();
        send().context("sending")?;
        while !receive().context("receiving")? {
            if before.elapsed() > Duration::from_secs(1) {
                bail!("nothing came back within a second");
            }
        }
        times.saturating_record(before.elapsed().as_nanos() as u64);
    }
    Ok(Percentiles::of(&times))
}

fn packet_frame(size: usize) -> Vec<u8> {
    packets::ethernet(PEER.0, CLIENT.0, ETHERTYPE, &vec![0x5a; size - packets::ETHER_LEN])
}

/// A non-blocking AF_PACKET socket on an interface of this namespace, for our EtherType alone.
fn packet_socket(name: &str) -> Result<OwnedFd> {
    let index = Netlink::open()?.index(name)?;
    let protocol = ETHERTYPE.to_be();
    // SAFETY: socket(2) takes numbers.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if fd < 0 {
        return Err(Error::last_os_error()).context("an AF_PACKET socket");
    }
    // SAFETY: just opened, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: a whole sockaddr_ll and its size.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
        return Err(Error::last_os_error()).context(format!("binding an AF_PACKET socket to {name}"));
    }
    Ok(socket)
}

/// Buffers for sendmmsg(2) and recvmmsg(2).
struct Batch {
    bytes: Vec<u8>,
    size: usize,
    messages: Vec<libc::mmsghdr>,
    // Pointed to by `messages`. A Vec's elements stay where they are as long as it does not grow.
    parts: Vec<libc::iovec>,
}

impl Batch {
    /// [`BATCH`] buffers of `size` bytes.
    fn new(size: usize) -> Self {
        let mut bytes = vec![0u8; size * BATCH];
        let base = bytes.as_mut_ptr();
        let mut parts: Vec<libc::iovec> = (0..BATCH)
            .map(|i| libc::iovec {
                iov_base: base.wrapping_add(i * size).cast(),
                iov_len: size,
            })
            .collect();
        let first = parts.as_mut_ptr();
        let messages = (0..BATCH)
            .map(|i| {
                // SAFETY: mmsghdr is numbers and pointers, for which zero is a value.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_iov = first.wrapping_add(i);
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        Batch {
            bytes,
            size,
            messages,
            parts,
        }
    }

    fn buffer(&mut self, i: usize) -> &mut [u8] {
        &mut self.bytes[i * self.size..(i + 1) * self.size]
    }

    /// Bytes of message `i`, as last received.
    fn len(&self, i: usize) -> usize {
        self.messages[i].msg_len as usize
    }

    fn send(&mut self, fd: RawFd, count: usize) -> IoResult<usize> {
        let lens: [usize; BATCH] = std::array::from_fn(|i| self.len(i));
        for (part, len) in self.parts.iter_mut().zip(lens).take(count) {
            // What was received goes back with its own length; a batch that only sends sends whole buffers.
            part.iov_len = if len > 0 { len } else { self.size };
        }
        // SAFETY: `count` messages, each with one iovec within `bytes`, all alive.
        let n = unsafe {
            libc::sendmmsg(
                fd,
                self.messages.as_mut_ptr(),
                count.min(BATCH) as u32,
                libc::MSG_DONTWAIT,
            )
        };
        if n < 0 {
            Err(Error::last_os_error())
        } else {
            Ok(n as usize)
        }
    }

    fn receive(&mut self, fd: RawFd) -> IoResult<usize> {
        for part in &mut self.parts {
            part.iov_len = self.size;
        }
        let (messages, none) = (self.messages.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: BATCH messages, each with one iovec of `size` bytes within `bytes`, all alive; no timeout.
        let n = unsafe { libc::recvmmsg(fd, messages, BATCH as u32, libc::MSG_DONTWAIT, none) };
        if n < 0 {
            Err(Error::last_os_error())
        } else {
            Ok(n as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cross_a_socket_and_return() {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        b.connect(a.local_addr().unwrap()).unwrap();
        let mut out = Batch::new(100);
        (0..BATCH).for_each(|i| out.buffer(i).fill(i as u8));
        assert_eq!(out.send(a.as_raw_fd(), BATCH).unwrap(), BATCH);
        let mut back = Batch::new(2048);
        assert_eq!(back.receive(b.as_raw_fd()).unwrap(), BATCH);
        for i in 0..BATCH {
            assert_eq!(back.len(i), 100);
            assert_eq!(back.buffer(i)[..100], [i as u8; 100]);
        }
        assert_eq!(back.send(b.as_raw_fd(), 3).unwrap(), 3);
        let mut bytes = [0; 2048];
        assert_eq!(
            a.recv(&mut bytes).unwrap(),
            100,
            "what was received is sent with its own length"
        );
        assert!(back.receive(b.as_raw_fd()).is_err());
    }
}
