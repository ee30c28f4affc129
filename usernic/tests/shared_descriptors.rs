//! What a front-end can do with the descriptors that it passes and keeps: nobody on our side waits for it.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::{LIMIT, Place, both_ways, frame_of, until};
use raw::{GUEST, Raw, Setup, USER, event, memfd, state, words};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use usernic::{Burst, Port};

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1400) as usize)
}

fn serves(place: &Place, back: &Port) {
    until("the link of the last front-end goes down", || !back.link().up);
    let front = place.open("virtio-user", "timeout=5000").unwrap();
    assert!(back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 100, short);
}

/// Runs something that must not wait for a front-end.
fn promptly<T: Send + 'static>(what: &str, does: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(does()));
    receiver
        .recv_timeout(LIMIT)
        .unwrap_or_else(|_| panic!("{what} does not return"))
}

/// Makes the next write(2) sleep for ever.
fn fill(event: &OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(event).unwrap();
    rustix::fs::fcntl_setfl(event, flags | OFlags::NONBLOCK).unwrap();
    until("the counter is full", || {
        let _ = rustix::io::read(event, &mut [0; 8]);
        rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).is_ok()
    });
    rustix::fs::fcntl_setfl(event, flags & !OFlags::NONBLOCK).unwrap();
}

/// Writes into the front-end's memory.
fn put(file: &OwnedFd, offset: u64, bytes: &[u8]) {
    assert_eq!(rustix::io::pwrite(file, bytes, offset).unwrap(), bytes.len());
}

/// Frame `number` of the transmit ring, of 60 bytes; the driver wants to be called.
fn send_frame(file: &OwnedFd, number: u16) {
    let descriptor = [words(&[GUEST + 0x8_0000]), 72u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
    put(file, 0x1_0000, &descriptor);
    put(file, 0x1_1004 + 2 * u64::from(number % 16), &[0; 2]);
    put(file, 0x1_1002, &(number + 1).to_le_bytes());
}

/// A TCP socket which lingers for ten minutes when it is closed, and its other end, which reads nothing.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0u8; 1 << 16]).is_ok() {}
    ours.set_nonblocking(false).unwrap();
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(600))).unwrap();
    (ours.into(), theirs)
}

#[test]
fn a_full_call_eventfd_blocks_nobody() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let (_kick, call) = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
    fill(&call);
    send_frame(&file, 0);
    let mut queue = back.queue(0).unwrap();
    let queue = promptly("rx", move || {
        let mut burst = Burst::new(32);
        until("the frame comes", || queue.rx(&mut burst) == 1);
        burst.clear();
        queue.alloc(&mut burst, 4);
        burst.iter_mut().for_each(|packet| packet.copy_from(&[7; 60]).unwrap());
        queue.tx(&mut burst);
        queue
    });
    // A notification that found the counter full is one all the same.
    let mut bytes = [0; 8];
    rustix::io::read(&call, &mut bytes).unwrap();
    assert!(u64::from_ne_bytes(bytes) >= u64::MAX - 1);
    fill(&call);
    promptly("dropping the port", move || drop((back, queue)));
}

/// The front-end's eventfds stay as they are: no flag of the description that it shares is set.
#[test]
fn flags_of_shared_descriptions_are_left_alone() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let (kick, call) = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
    for fd in [&kick, &call] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
}

/// Seconds of CPU time of the threads that drive ports.
fn control_time() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let spent = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let spent = spent.split(' ').next()?.parse::<f64>().ok()?;
        (name.trim() == "usernic-control").then_some(spent)
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// A pair and a control queue, whose kick is `kick`.
fn with_control_queue(raw: &Raw, file: &OwnedFd, kick: BorrowedFd<'_>, call: BorrowedFd<'_>) {
    let setup = Setup {
        features: 1 << 32 | 1 << 30 | 1 << 17,
        ..Setup::default()
    };
    let data = event();
    assert!(raw.set_up(&setup, file.as_fd(), data.as_fd(), data.as_fd()));
    let at = USER + 0x2_0000;
    assert!(raw.request(8, 0, &state(2, 16), &[]));
    assert!(raw.request(9, 0, &words(&[2, at, at + 0x2000, at + 0x1000, 0]), &[]));
    assert!(raw.request(13, 0, &words(&[2]), &[call]));
    assert!(raw.request(12, 0, &words(&[2]), &[kick]));
    assert!(raw.request(18, 0, &state(2, 1), &[]));
    assert!(raw.request(1, 0, &[], &[]));
    assert_eq!(raw.read().unwrap().code, 1);
}

/// Command `number` of the control queue: one that no device knows. Its answer is 1 byte.
fn command(file: &OwnedFd, number: u16) {
    let table = [
        [words(&[GUEST + 0x9_0000]), vec![2, 0, 0, 0, 1, 0, 1, 0]].concat(),
        [words(&[GUEST + 0x9_1000]), vec![1, 0, 0, 0, 2, 0, 0, 0]].concat(),
    ];
    put(file, 0x9_0000, &[0xee, 0xee]);
    put(file, 0x2_0000, &table.concat());
    put(file, 0x2_1004 + 2 * u64::from(number % 16), &[0; 2]);
    put(file, 0x2_1002, &(number + 1).to_le_bytes());
}

fn commands_done(file: &OwnedFd) -> u16 {
    let mut index = [0; 2];
    rustix::io::pread(file, &mut index, 0x2_2002).unwrap();
    u16::from_le_bytes(index)
}

/// The control queue's kick and call, whatever the front-end does to them.
#[test]
fn a_control_queue_with_hostile_eventfds() {
    for flags in [EventfdFlags::empty(), EventfdFlags::SEMAPHORE] {
        let place = Place::new();
        let back = place.open("vhost", "").unwrap();
        let raw = Raw::connect(&place.socket());
        let file = memfd(0x10_0000);
        let (kick, call) = (eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap(), event());
        with_control_queue(&raw, &file, kick.as_fd(), call.as_fd());
        for number in 0..3 {
            command(&file, number);
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            until("the command is answered", || commands_done(&file) == number + 1);
        }
        // Full counters. Readable for ever is no reason to be awake.
        fill(&kick);
        fill(&call);
        command(&file, 3);
        rustix::io::read(&kick, &mut [0; 8]).unwrap();
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        until("the command is answered", || commands_done(&file) == 4);
        let before = control_time();
        std::thread::sleep(Duration::from_secs(1));
        let spent = control_time() - before;
        assert!(spent < 0.5, "the control thread spent {spent} s of a second");
        promptly("dropping the port", move || drop(back));
    }
}

/// A kick that the front-end keeps wakes nobody any more once it was replaced, or the front-end is gone.
#[test]
fn an_old_kick_is_forgotten() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let (old, _call) = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
    let mut queue = back.queue(0).unwrap();
    let mut wakes = |kick: &OwnedFd| {
        queue.disarm();
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
        let mut fds = [rustix::event::PollFd::new(&queue, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).unwrap() > 0
    };
    assert!(wakes(&old), "a kick wakes");
    let new = event();
    assert!(raw.request(12, 0, &words(&[1]), &[new.as_fd()]));
    assert!(raw.request(1, 0, &[], &[]));
    raw.read().unwrap();
    assert!(!wakes(&old) && wakes(&new));
    drop(raw);
    until("the link goes down", || !back.link().up);
    until("what woke it is over", || !wakes(&new));
    assert!(!wakes(&old));
}

/// Sends a message whose descriptor the port holds until the rest of the message comes, and gives that rest.
fn begin(raw: &Raw, fd: BorrowedFd<'_>, code: u32, payload: &[u8]) -> Option<Vec<u8>> {
    let message = raw::encode(code, 1, payload);
    raw.send(&message[..6], &[fd]);
    Some(message[6..].to_vec())
}

/// Descriptors whose close(2) blocks, in each place that takes one, and in messages that nobody reads.
#[test]
fn descriptors_that_block_when_they_are_closed() {
    type Passes = fn(&Raw, BorrowedFd<'_>) -> Option<Vec<u8>>;
    let places: [(&str, Passes); 9] = [
        ("SET_VRING_KICK", |raw, fd| {
            raw.request(8, 0, &state(1, 16), &[]);
            raw.request(9, 0, &words(&[1, USER, USER + 0x2000, USER + 0x1000, 0]), &[]);
            begin(raw, fd, 12, &words(&[1]))
        }),
        ("SET_VRING_CALL", |raw, fd| begin(raw, fd, 13, &words(&[0]))),
        ("SET_VRING_ERR", |raw, fd| {
            let rest = begin(raw, fd, 14, &words(&[0]))?;
            Some([rest, raw::encode(77, 1, &[])].concat())
        }),
        ("SET_MEM_TABLE", |raw, fd| {
            begin(raw, fd, 5, &words(&[1, GUEST, 0x1000, USER, 0]))
        }),
        ("ADD_MEM_REG", |raw, fd| {
            raw.request(16, 0, &words(&[1 << 15]), &[]);
            begin(raw, fd, 37, &words(&[0, GUEST, 0x1000, USER, 0]))
        }),
        ("SET_BACKEND_REQ_FD", |raw, fd| {
            raw.request(16, 0, &words(&[1 << 5]), &[]);
            let rest = begin(raw, fd, 21, &[])?;
            Some([rest, raw::encode(77, 1, &[])].concat())
        }),
        ("a message that never ends", |raw, fd| {
            begin(raw, fd, 5, &[0; 100]).map(|_| Vec::new())
        }),
        ("a message that takes none", |raw, fd| {
            raw.request(1, 0, &[], &[fd; 30]);
            None
        }),
        ("a message that nobody reads", |raw, fd| {
            raw.request(77, 0, &[], &[]);
            raw.request(13, 0, &words(&[0]), &[fd]);
            None
        }),
    ];
    for (what, passes) in places {
        let place = Place::new();
        let back = place.open("vhost", "timeout=1000").unwrap();
        let raw = Raw::connect(&place.socket());
        let (socket, peer) = lingering();
        let rest = passes(&raw, socket.as_fd());
        match rest {
            Some(rest) => {
                // The port's descriptor is the last one.
                drop(socket);
                raw.send(&rest, &[]);
            }
            // Whoever is the last to close it is held.
            None => drop(std::thread::spawn(move || drop(socket))),
        }
        raw.closed();
        serves(&place, &back);
        promptly(what, move || drop(back));
        drop(peer);
    }
    // A connection that waits, which nobody read from at all.
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (socket, peer) = lingering();
    let raw = Raw::connect(&place.socket());
    raw.request(13, 0, &words(&[0]), &[socket.as_fd()]);
    std::thread::spawn(move || drop(socket));
    promptly("dropping the port", move || drop(back));
    drop((front, peer));
}

/// A channel for our own requests that is a socket of another family, whose lock the front-end can hold, is not taken.
#[test]
fn a_channel_is_a_unix_socket() {
    let place = Place::new();
    let _back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    assert!(raw.request(16, 0, &words(&[1 << 5 | 1 << 3]), &[]));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let unix = UnixStream::pair().unwrap().0;
    for (channel, refused) in [(tcp.as_fd(), 1), (unix.as_fd(), 0), (event().as_fd(), 1)] {
        assert!(raw.request(21, 8, &[], &[channel]));
        assert_eq!(raw.read().unwrap().word(), refused);
    }
}

/// Address space is what a front-end could have for nothing: sparse files.
#[test]
fn a_front_end_does_not_use_up_the_address_space() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let size = 1u64 << 40;
    let file = memfd(size);
    assert!(raw.request(16, 0, &words(&[1 << 15 | 1 << 3]), &[]));
    let answers: Vec<Option<u64>> = (0..6)
        .map(|at| {
            raw.request(37, 8, &words(&[0, at * size, size, at * size, 0]), &[file.as_fd()]);
            raw.read().map(|answer| answer.word())
        })
        .collect();
    assert_eq!(answers[..4], [Some(0); 4], "as much as the largest machines have");
    assert!(!answers[4..].contains(&Some(0)), "{answers:?}");
    serves(&place, &back);
}
