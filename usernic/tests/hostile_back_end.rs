//! A back-end that is silent, slow, refuses, or plays with what it shares with a front-end: no call of the port waits longer
//! than one time limit, no thread sleeps on what the back-end holds, and the next back-end is served.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{LIMIT, Place, frame_of, until};
use raw::{Message, Raw, words};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use usernic::filter::Filter;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const NET_SET_MTU: u32 = 20;
const SET_STATUS: u32 = 39;

/// Of the device's status.
const DRIVER_OK: u64 = 4;

/// What a back-end of so many pairs answers that has VERSION_1, MQ and MTU, and acknowledges.
struct Answers {
    pairs: u64,
    status: u64,
}

impl Answers {
    fn new(pairs: u64) -> Self {
        Answers { pairs, status: 0 }
    }

    fn to(&mut self, message: &Message) -> Option<Vec<u8>> {
        let word = match message.code {
            GET_FEATURES => 1 << 32 | 1 << 30 | 1 << 22 | 1 << 3,
            // MQ, REPLY_ACK, MTU, STATUS.
            15 => 1 | 1 << 3 | 1 << 4 | 1 << 16,
            17 => self.pairs,
            39 => {
                self.status = message.word();
                if !message.needs_reply() {
                    return None;
                }
                0
            }
            40 => self.status,
            GET_VRING_BASE => message.word() & 0xffff_ffff,
            _ if message.needs_reply() => 0,
            _ => return None,
        };
        Some(words(&[word]))
    }
}

/// Serves front-ends, one after the other, `slow` saying how long each answer takes; the descriptors that came.
fn serve(
    place: &Place,
    pairs: u64,
    mut slow: impl FnMut(&Message) -> Duration + Send + 'static,
    refuse: u32,
) -> Receiver<(u32, OwnedFd)> {
    let listener = UnixListener::bind(place.socket()).unwrap();
    let (sender, fds) = channel();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let raw = Raw::new(stream);
            raw.0.set_read_timeout(None).unwrap();
            let mut answers = Answers::new(pairs);
            while let Some(message) = raw.read() {
                if let Some(answer) = answers.to(&message) {
                    std::thread::sleep(slow(&message));
                    let refused = words(&[1]);
                    raw.reply(message.code, if message.code == refuse { &refused } else { &answer });
                }
                for fd in message.fds {
                    let _ = sender.send((message.code, fd));
                }
            }
        }
    });
    fds
}

fn spec(place: &Place, more: &str) -> PortSpec {
    format!("virtio-user,path={},{more}", place.socket().display())
        .parse()
        .unwrap()
}

/// How long something takes.
fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let result = what();
    (result, begin.elapsed())
}

/// `what` on a thread of its own, within the limit.
fn in_time<T: Send + 'static>(why: &str, what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, done) = channel();
    std::thread::spawn(move || sender.send(what()));
    done.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{why}: blocked"))
}

/// 32 answers of 1 s each would be half a minute.
#[test]
fn closing_a_port_has_one_limit_however_many_rings_it_has() {
    let place = Place::new();
    let second = |message: &Message| Duration::from_secs(u64::from(message.code == GET_VRING_BASE));
    let _fds = serve(&place, 16, second, 0);
    let port = place.open("virtio-user", "queues=16,timeout=20000").unwrap();
    let ((), took) = timed(|| drop(port));
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn opening_a_port_has_one_limit_however_many_messages_it_takes() {
    let place = Place::new();
    let _fds = serve(&place, 1, |_| Duration::from_millis(700), 0);
    let (port, took) = timed(|| place.open("virtio-user", "timeout=1000"));
    let error = port.expect_err("the third answer is too late").to_string();
    assert!(error.contains("within 1000 ms"), "{error}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_port_whose_back_end_is_silent_closes_at_once() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let port = Port::open_unconnected(spec(&place, "timeout=60000")).unwrap();
    let (_silent, _) = listener.accept().unwrap();
    let ((), took) = timed(|| drop(port));
    assert!(took < Duration::from_secs(5), "{took:?}");
}

/// A listener whose backlog is full, and who fills it.
fn full(place: &Place) -> (OwnedFd, Vec<OwnedFd>) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
    let socket = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let address = SocketAddrUnix::new(place.socket()).unwrap();
    let listener = socket(SocketFlags::CLOEXEC);
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    let mut held = Vec::new();
    loop {
        let next = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        match connect(&next, &address) {
            Ok(()) => held.push(next),
            Err(rustix::io::Errno::AGAIN) => return (listener, held),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_port_whose_back_end_accepts_nobody_says_so_and_closes_at_once() {
    let place = Place::new();
    let _full = full(&place);
    let error = place.open("virtio-user", "timeout=50").err().unwrap().to_string();
    assert!(error.contains("nobody accepts connections"), "{error}");
    let port = Port::open_unconnected(spec(&place, "timeout=60000")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let ((), took) = timed(|| drop(port));
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_port_can_be_open_before_its_back_end_is() {
    let place = Place::new();
    let port = Port::open_unconnected(spec(&place, "reconnect=0")).unwrap();
    until("it says what is missing", || {
        port.link_error().is_some_and(|error| error.contains("no socket at"))
    });
    let back = place.open("vhost", "").unwrap();
    assert!(port.wait_link(LIMIT) && back.wait_link(LIMIT));
    until("nothing is missing", || port.link_error().is_none());
    let (mut a, mut b) = (port.queue(0).unwrap(), back.queue(0).unwrap());
    common::both_ways(&mut a, &mut b, 100, |number| frame_of(number, 60));
    drop((b, back));
    until("it says what is missing", || port.link_error().is_some());
}

/// Those that said nothing at all, and those that said what they offer and then nothing more.
#[test]
fn silent_connections_do_not_keep_a_listening_front_end_from_its_back_end() {
    let place = Place::new();
    let port = place.open("virtio-user", "server=1,timeout=60000").unwrap();
    for speaks in [false, true] {
        let silent: Vec<Raw> = (0..3).map(|_| Raw::connect(&place.socket())).collect();
        if speaks {
            for raw in &silent {
                let asked = |code| std::iter::from_fn(|| raw.read()).any(|message| message.code == code);
                assert!(asked(GET_FEATURES));
                raw.reply(GET_FEATURES, &words(&[1 << 32 | 1 << 30]));
            }
        }
        let ((), took) = timed(|| {
            let back = place.open("vhost", "client=1").unwrap();
            assert!(port.wait_link(LIMIT) && back.wait_link(LIMIT));
            drop(back);
        });
        assert!(took < LIMIT, "{took:?}");
        until("the link goes down", || !port.link().up);
        drop(silent);
    }
}

#[test]
fn two_front_ends_at_one_socket_are_told_so() {
    let place = Place::new();
    let _listens = place.open("virtio-user", "server=1").unwrap();
    let error = place.open("virtio-user", "timeout=5000").err().unwrap().to_string();
    assert!(error.contains("the other side is a front-end, too"), "{error}");
}

#[test]
fn a_back_end_that_closes_at_once_may_serve_another() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    std::thread::spawn(move || drop(listener.accept()));
    let error = place.open("virtio-user", "").err().unwrap().to_string();
    assert!(error.contains("serve another front-end already"), "{error}");
}

#[test]
fn a_link_that_is_lost_says_nothing_about_messages_of_long_ago() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    drop(back);
    until("the reason is known", || front.link_error().is_some());
    let error = front.link_error().unwrap();
    assert!(!error.contains("SET_") && !error.contains("GET_"), "{error}");
}

#[test]
fn a_refused_mtu_is_no_end_of_the_link() {
    let place = Place::new();
    let _fds = serve(&place, 1, |_| Duration::ZERO, NET_SET_MTU);
    let port = place.open("virtio-user", "").unwrap();
    assert!(port.link().up);
    port.announce().unwrap_err();
    port.set_queues(1).unwrap();
    assert!(port.link().up);
}

/// What the caller of `set_filter` is told holds for the back-ends to come, whatever the one of now does.
#[test]
fn a_filter_that_was_set_beside_a_slow_back_end_is_in_force() {
    let place = Place::new();
    let _fds = serve(&place, 1, |_| Duration::from_millis(300), 0);
    let port = Port::open_unconnected(spec(&place, "mac=02:00:00:00:00:01,timeout=500")).unwrap();
    let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
    filter.set_mode(virtio_ring::net::RxMode::Promiscuous, false);
    port.set_filter(Some(filter)).unwrap();
    std::fs::remove_file(place.socket()).unwrap();
    let back = place.open("vhost", "").unwrap();
    assert!(back.wait_link(LIMIT) && port.wait_link(LIMIT));
    let (mut a, mut b) = (port.queue(0).unwrap(), back.queue(0).unwrap());
    let mut burst = Burst::new(1);
    b.alloc(&mut burst, 1);
    burst[0]
        .copy_from(&[&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 7, 8, 0][..], &[0; 46]].concat())
        .unwrap();
    assert_eq!(b.tx(&mut burst), 1);
    let mut got = Burst::new(4);
    until("the frame is filtered", || {
        assert_eq!(a.rx(&mut got), 0);
        port.stats().rx_filtered + back.stats().tx_filtered == 1
    });
}

/// The other side holds the eventfd's description, too: it clears O_NONBLOCK and fills the counter.
fn block(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
    let flags = fcntl_getfl(event).unwrap();
    fcntl_setfl(event, flags - OFlags::NONBLOCK).unwrap();
    rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
}

fn send(queue: &mut Queue, count: usize) -> usize {
    let mut burst = Burst::new(32);
    queue.alloc(&mut burst, count);
    for packet in burst.iter_mut() {
        packet.copy_from(&frame_of(1, 60)).unwrap();
    }
    queue.tx(&mut burst)
}

#[test]
fn a_full_kick_blocks_nobody() {
    let place = Place::new();
    let fds = serve(&place, 1, |_| Duration::ZERO, 0);
    let port = place.open("virtio-user", "").unwrap();
    let kicks: Vec<OwnedFd> = fds
        .try_iter()
        .filter(|(code, _)| *code == SET_VRING_KICK)
        .map(|(_, fd)| fd)
        .collect();
    assert_eq!(kicks.len(), 2);
    kicks.iter().for_each(block);
    let kicked = in_time("a front-end that kicks", move || {
        let mut queue = port.queue(0).unwrap();
        for _ in 0..4 {
            assert_eq!(send(&mut queue, 8), 8);
            assert_eq!(queue.rx(&mut Burst::new(4)), 0);
        }
        drop(queue);
        // Nobody published the count but the bursts themselves.
        port.stats().kicks
    });
    assert!(kicked >= 4, "the back-end asked for {kicked} kicks");
}

/// An application's memory, lent to a port.
fn lent(place: &Place) -> usernic::LentPort {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    const LEN: usize = 1 << 20;
    let fd = raw::memfd(LEN as u64);
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a fresh mapping, at an address of the kernel's choice; it stays.
    let address = unsafe { mmap(std::ptr::null_mut(), LEN, protection, flags, &fd, 0) }.unwrap();
    let region = usernic::LentRegion {
        fd,
        offset: 0,
        address: std::ptr::NonNull::new(address.cast()).unwrap(),
        len: LEN,
        page: 4096,
    };
    let mut memory = usernic::memory::Automatic::from_spec(&spec(place, "queues=1"));
    // SAFETY: the region stays mapped.
    unsafe { usernic::LentPort::open(&spec(place, "queues=1"), &[region], &mut memory) }.unwrap()
}

#[test]
fn a_call_without_o_nonblock_blocks_nobody() {
    let place = Place::new();
    let fds = serve(&place, 1, |_| Duration::ZERO, 0);
    let mut port = lent(&place);
    let mut pair = port.queue(0).unwrap();
    let calls: Vec<OwnedFd> = fds
        .try_iter()
        .filter(|(code, _)| *code == SET_VRING_CALL)
        .map(|(_, fd)| fd)
        .collect();
    assert_eq!(calls.len(), 2);
    for call in &calls {
        fcntl_setfl(call, fcntl_getfl(call).unwrap() - OFlags::NONBLOCK).unwrap();
    }
    let pair = in_time("a pair that is disarmed", move || {
        pair.arm();
        pair.disarm();
        assert!(!pair.wait(Some(Duration::from_millis(10))).unwrap());
        pair
    });
    // Each call wakes, although nobody reads it.
    let mut pair = pair;
    for _ in 0..3 {
        rustix::io::write(&calls[0], &1u64.to_ne_bytes()).unwrap();
        pair = in_time("a pair that is called", move || {
            assert!(!pair.wait(None).unwrap());
            pair
        });
    }
    in_time("closing", move || drop(port));
    in_time("a pair whose port is closed", move || {
        for _ in 0..3 {
            assert!(pair.wait(None).is_err());
        }
    });
}

/// A pair that sleeps is told that its port is closed.
#[test]
fn a_lent_pair_that_sleeps_is_woken_by_the_end_of_its_port() {
    let place = Place::new();
    let _back = place.open("vhost", "").unwrap();
    let mut port = lent(&place);
    let mut pair = port.queue(0).unwrap();
    let (sender, told) = channel();
    std::thread::spawn(move || sender.send(pair.wait(None).map_err(|error| error.kind())));
    std::thread::sleep(Duration::from_millis(50));
    drop(port);
    assert_eq!(told.recv_timeout(LIMIT), Ok(Err(std::io::ErrorKind::NotConnected)));
}

/// Descriptors beside an answer are a violation, and none of them becomes this process's.
#[test]
fn descriptors_that_come_with_answers_are_not_taken() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let raw = Raw::new(listener.accept().unwrap().0);
        while let Some(message) = raw.read() {
            if message.code == GET_FEATURES {
                raw.send(&raw::encode(GET_FEATURES, 5, &words(&[1 << 32])), &[theirs.as_fd()]);
                drop(theirs);
                break;
            }
        }
        raw.closed();
    });
    let port = place.open("virtio-user", "");
    assert!(port.is_err());
    // The last of them is closed: with the message.
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(std::io::Read::read(&mut &ours, &mut [0; 1]).unwrap(), 0);
}

/// Counters move while a queue is polled: nobody sleeps, and nobody asks.
#[test]
fn counters_of_queues_that_are_polled_move() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let mut got = Burst::new(32);
    let before = front.stats().kicks;
    for number in 1..=100 {
        assert!(!b.arm());
        assert_eq!(send(&mut a, 1), 1);
        b.disarm();
        assert_eq!(b.rx(&mut got), 1);
        got.clear();
        assert_eq!(front.stats().kicks, before + number);
    }
    let before = back.stats().kicks;
    for number in 1..=100 {
        assert!(!a.arm());
        assert_eq!(send(&mut b, 1), 1);
        a.disarm();
        assert_eq!(a.rx(&mut got), 1);
        got.clear();
        assert_eq!(back.stats().kicks, before + number);
    }
}

/// A descriptor that points outside of the front-end's memory is counted, though nobody but a poller is there.
#[test]
fn violations_are_counted_while_a_queue_is_polled() {
    use raw::{GUEST, memfd};
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let mut queue = back.queue(0).unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let _events = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
    let at = |offset: u64, bytes: &[u8]| assert_eq!(rustix::io::pwrite(&file, bytes, offset).unwrap(), bytes.len());
    let outside = [words(&[GUEST + 0x80_0000]), 72u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
    assert_eq!(back.stats().anomalies, 0);
    at(0x1_0000, &outside);
    at(0x1_1000, &[0, 0, 1, 0, 0, 0]);
    let mut burst = Burst::new(32);
    until("the violation is counted", || {
        assert_eq!(queue.rx(&mut burst), 0);
        back.stats().anomalies == 1
    });
}

/// A back-end's view of a session: the memory, and where the receive ring's descriptor table and used ring are in it.
struct Seen {
    memory: OwnedFd,
    desc: u64,
    used: u64,
}

impl Seen {
    /// Serves a front-end on split rings until its device is ready, and then on in a thread.
    fn accept(listener: &UnixListener) -> (UnixStream, Self) {
        let (stream, _) = listener.accept().unwrap();
        let raw = Raw::new(stream.try_clone().unwrap());
        raw.0.set_read_timeout(None).unwrap();
        let mut answers = Answers::new(1);
        let (mut memory, mut table, mut ring) = (None, Vec::new(), Vec::new());
        let mut answer = move |raw: &Raw, message: &Message| {
            if let Some(answer) = answers.to(message) {
                raw.reply(message.code, &answer);
            }
        };
        loop {
            let mut message = raw.read().expect("a front-end");
            answer(&raw, &message);
            let words: Vec<u64> = message
                .payload
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            match message.code {
                SET_MEM_TABLE => {
                    memory = message.fds.pop();
                    table = words;
                }
                SET_VRING_ADDR if words[0] == 0 => ring = words,
                SET_STATUS if message.word() & DRIVER_OK != 0 => break,
                _ => {}
            }
        }
        std::thread::spawn(move || {
            while let Some(message) = raw.read() {
                answer(&raw, &message);
            }
        });
        // One region: guest address, size, user address, offset. A ring: index, descriptors, used, available.
        let at = |address: u64| address - table[3] + table[4];
        let seen = Seen {
            memory: memory.expect("memory"),
            desc: at(ring[1]),
            used: at(ring[2]),
        };
        (stream, seen)
    }

    /// Writes there that `count` buffers were used, each for a frame of 60 bytes.
    fn use_buffers(&self, count: u16) {
        let file = std::fs::File::from(self.memory.try_clone().unwrap());
        let mut table = [0; 16];
        file.read_exact_at(&mut table, self.desc).unwrap();
        assert!(table.iter().any(|&byte| byte != 0), "buffers were posted");
        for index in 0..count {
            let entry = words(&[u64::from(index) | (12 + 60) << 32]);
            file.write_all_at(&entry, self.used + 4 + 8 * u64::from(index)).unwrap();
        }
        file.write_all_at(&count.to_le_bytes(), self.used + 2).unwrap();
    }
}

#[test]
fn a_back_end_that_wakes_up_behind_its_successor_is_not_listened_to() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let first = std::thread::spawn({
        let listener = listener.try_clone().unwrap();
        move || Seen::accept(&listener)
    });
    // Files of huge pages cannot be written by write(2).
    let port = place.open("virtio-user", "in_order=0,memory=memfd").unwrap();
    let (stream, first) = first.join().unwrap();
    let mut queue = port.queue(0).unwrap();
    let mut burst = Burst::new(32);
    until("the link is up", || port.link().up);
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    until("the link goes down", || !port.link().up);
    let (_stream, second) = Seen::accept(&listener);
    second.use_buffers(2);
    until("its frames come", || {
        queue.rx(&mut burst);
        burst.len() == 2
    });
    first.use_buffers(3);
    assert_eq!(queue.rx(&mut burst), 0, "a frame that nobody sent");
    let stats = port.stats();
    assert_eq!((stats.rx_errors, stats.anomalies), (0, 0), "{stats:?}");
}
