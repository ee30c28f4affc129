//! The states of a `vhost` port's rings, and what becomes of a thread that sleeps while they change.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{LIMIT, Place, frame_of, until};
use raw::{GUEST, Raw, Setup, USER, event, memfd, state, words};
use usernic::{Burst, Port};

const BIT_30: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// A front-end with its rings running, and what it said.
struct Front {
    raw: Raw,
    file: OwnedFd,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Front {
    fn start(place: &Place) -> Self {
        Self::start_with(place, &Setup::default())
    }

    fn start_with(place: &Place, setup: &Setup) -> Self {
        let front = Front {
            raw: Raw::connect(&place.socket()),
            file: memfd(0x10_0000),
            kick: event(),
            call: event(),
        };
        let (file, kick, call) = (front.file.as_fd(), front.kick.as_fd(), front.call.as_fd());
        assert!(front.raw.set_up(setup, file, kick, call));
        assert!(
            front
                .raw
                .request(16, 0, &words(&[1 | 1 << 3 | 1 << 13 | 1 << 15 | 1 << 16]), &[])
        );
        front
    }

    /// All that was said has happened.
    fn sync(&self) {
        assert!(self.raw.request(1, 0, &[], &[]));
        assert_eq!(self.raw.read().expect("an answer").code, 1);
    }

    fn place_rings(&self) {
        for index in 0..2u32 {
            let at = USER + u64::from(index) * 0x1_0000;
            assert!(self.raw.request(8, 0, &state(index, 16), &[]));
            let addr = words(&[index.into(), at, at + 0x2000, at + 0x1000, 0]);
            assert!(self.raw.request(9, 0, &addr, &[]));
        }
    }

    fn kick_rings(&self) {
        for index in 0..2u64 {
            assert!(self.raw.request(13, 0, &words(&[index]), &[self.call.as_fd()]));
            assert!(self.raw.request(12, 0, &words(&[index]), &[self.kick.as_fd()]));
        }
        self.sync();
    }

    fn enable_rings(&self, on: u32) {
        for index in 0..2 {
            assert!(self.raw.request(18, 0, &state(index, on), &[]));
        }
        self.sync();
    }

    /// The flags in the transmit ring's used ring: 1 is VRING_USED_F_NO_NOTIFY.
    fn no_notify(&self) -> bool {
        let mut flags = [0; 2];
        rustix::io::pread(&self.file, &mut flags, 0x1_2000).unwrap();
        flags[0] & 1 != 0
    }

    /// The transmit ring's used index: so many frames the back-end has given back.
    fn used(&self) -> u16 {
        let mut index = [0; 2];
        rustix::io::pread(&self.file, &mut index, 0x1_2002).unwrap();
        u16::from_le_bytes(index)
    }

    /// A frame in the transmit ring; the driver notifies only if it is asked to.
    fn send(&self, number: u16) {
        let put = |offset: u64, bytes: &[u8]| {
            assert_eq!(rustix::io::pwrite(&self.file, bytes, offset).unwrap(), bytes.len());
        };
        let descriptor = [words(&[GUEST + 0x8_0000]), 72u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
        put(0x1_0000, &descriptor);
        put(0x1_1004 + 2 * u64::from(number % 16), &[0; 2]);
        put(0x1_1002, &(number + 1).to_le_bytes());
        std::sync::atomic::fence(Ordering::SeqCst);
        if !self.no_notify() {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

fn link_stays_down(back: &Port) -> bool {
    !back.wait_link(Duration::from_millis(300))
}

/// "reset all internal device state to the initial state, ready to be reinitialized"
#[test]
fn a_reset_device_is_set_up_anew() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    assert!(front.raw.request(39, 0, &words(&[15]), &[]));
    assert!(front.raw.request(34, 8, &[], &[]));
    assert_eq!(front.raw.read().unwrap().word(), 0);
    until("the link goes down", || !back.link().up);
    assert!(front.raw.request(40, 0, &[], &[]));
    assert_eq!(front.raw.read().unwrap().word(), 0, "the status is 0");
    // Rings that nobody enabled since are disabled.
    assert!(front.raw.request(2, 0, &words(&[VERSION_1 | BIT_30]), &[]));
    front.place_rings();
    front.kick_rings();
    assert!(link_stays_down(&back));
    front.enable_rings(1);
    assert!(back.wait_link(LIMIT));
    let mut queue = back.queue(0).unwrap();
    let mut burst = Burst::new(4);
    front.send(0);
    until("a frame comes", || queue.rx(&mut burst) == 1);
    // A status of 0 is a reset, too.
    assert!(front.raw.request(39, 0, &words(&[15]), &[]));
    front.sync();
    assert!(back.link().up);
    assert!(front.raw.request(39, 0, &words(&[0]), &[]));
    until("the link goes down", || !back.link().up);
}

/// Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled.
#[test]
fn without_protocol_features_rings_are_enabled() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    front.enable_rings(0);
    until("the link goes down", || !back.link().up);
    assert!(front.raw.request(2, 0, &words(&[VERSION_1]), &[]));
    assert!(back.wait_link(LIMIT));
    let mut queue = back.queue(0).unwrap();
    let mut burst = Burst::new(4);
    front.send(0);
    until("a frame comes", || queue.rx(&mut burst) == 1);
}

/// New addresses of a ring that runs, and other features, end the connection: they are not ignored.
#[test]
fn a_running_ring_is_not_changed_in_silence() {
    let at = USER + 0x4_0000;
    for (code, payload) in [
        (9, words(&[1, at, at + 0x2000, at + 0x1000, 0])),
        (8, state(1, 8)),
        (10, state(1, 3)),
        (2, words(&[VERSION_1 | BIT_30 | 1 << 15])),
    ] {
        let place = Place::new();
        let back = place.open("vhost", "").unwrap();
        let front = Front::start(&place);
        assert!(back.wait_link(LIMIT));
        assert!(front.raw.request(code, 0, &payload, &[]));
        front.raw.closed();
        until("it is counted", || back.stats().peers_refused == 1);
    }
}

/// A packed ring whose front-end does not send SET_VRING_BASE begins with wrap counters 1.
#[test]
fn a_packed_ring_without_a_base() {
    for told in [true, false] {
        let place = Place::new();
        let back = place.open("vhost", "").unwrap();
        let raw = Raw::connect(&place.socket());
        let (file, kick, call) = (memfd(0x10_0000), event(), event());
        let table = words(&[1, GUEST, 0x10_0000, USER, 0]);
        assert!(raw.request(2, 0, &words(&[VERSION_1 | 1 << 34]), &[]));
        assert!(raw.request(5, 0, &table, &[file.as_fd()]));
        for index in 0..2u32 {
            let at = USER + u64::from(index) * 0x1_0000;
            assert!(raw.request(8, 0, &state(index, 16), &[]));
            assert!(raw.request(9, 0, &words(&[index.into(), at, at + 0x2000, at + 0x1000, 0]), &[]));
            assert!(!told || raw.request(10, 0, &state(index, 0x8000_8000), &[]));
            assert!(raw.request(13, 0, &words(&[index.into()]), &[call.as_fd()]));
            assert!(raw.request(12, 0, &words(&[index.into()]), &[kick.as_fd()]));
        }
        assert!(back.wait_link(LIMIT));
        // Available in the first round: AVAIL is 1, USED is 0.
        let descriptor = [
            words(&[GUEST + 0x8_0000]),
            72u32.to_le_bytes().to_vec(),
            vec![0, 0],
            vec![0x80, 0],
        ];
        rustix::io::pwrite(&file, &descriptor.concat(), 0x1_0000).unwrap();
        let mut queue = back.queue(0).unwrap();
        let mut burst = Burst::new(4);
        until("the frame comes", || queue.rx(&mut burst) == 1);
    }
}

/// "in the disabled state the back-end must not supply any new RX packets, but must process and discard any TX packets"
#[test]
fn what_a_disabled_ring_sends_is_discarded() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    let mut queue = back.queue(0).unwrap();
    let mut burst = Burst::new(32);
    for round in 0..2 {
        let before = 4 * round;
        front.enable_rings(0);
        (0..3).for_each(|number| front.send(before + number));
        until("the ring is processed", || {
            assert_eq!(queue.rx(&mut burst), 0);
            front.used() == before + 3
        });
        front.enable_rings(1);
        front.send(before + 3);
        until("the frame comes", || queue.rx(&mut burst) > 0);
        assert_eq!((burst.len(), front.used()), (1, before + 4));
        burst.clear();
    }
    assert_eq!((back.stats().rx_packets, back.stats().rx_errors), (2, 6));
}

/// The same where the queue's thread sleeps: the front-end's notification wakes it.
#[test]
fn what_a_disabled_ring_sends_is_discarded_by_a_thread_that_sleeps() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    let frames = sleeper(&back);
    front.enable_rings(0);
    for number in 0..3 {
        until("the thread sleeps", || !front.no_notify());
        front.send(number);
        until("the ring is processed", || front.used() == number + 1);
    }
    assert!(frames.try_recv().is_err());
    front.enable_rings(1);
    until("the thread sleeps", || !front.no_notify());
    front.send(3);
    assert_eq!(frames.recv_timeout(LIMIT), Ok(1));
}

/// What a front-end had sent before it enabled its rings, for the back-end before this one, is not lost.
#[test]
fn what_a_ring_holds_before_it_is_first_enabled_is_kept() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    assert!(front.raw.request(34, 0, &[], &[]));
    assert!(front.raw.request(2, 0, &words(&[VERSION_1 | BIT_30]), &[]));
    front.place_rings();
    front.send(0);
    front.kick_rings();
    let mut queue = back.queue(0).unwrap();
    let mut burst = Burst::new(4);
    for _ in 0..100 {
        assert_eq!((queue.rx(&mut burst), front.used()), (0, 0));
    }
    front.enable_rings(1);
    until("the frame comes", || queue.rx(&mut burst) == 1);
    assert_eq!(front.used(), 1);
}

/// An application that takes the link down discards nothing: that is not the front-end's doing.
#[test]
fn with_the_link_taken_down_frames_wait() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    back.set_link_up(false).unwrap();
    front.send(0);
    let mut queue = back.queue(0).unwrap();
    let mut burst = Burst::new(4);
    for _ in 0..100 {
        assert_eq!((queue.rx(&mut burst), front.used()), (0, 0));
    }
    back.set_link_up(true).unwrap();
    until("the frame comes", || queue.rx(&mut burst) == 1);
}

/// A thread that sleeps until a frame is there; what it says when it has one.
fn sleeper(back: &Port) -> Receiver<usize> {
    let mut queue = back.queue(0).unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut burst = Burst::new(32);
        loop {
            let n = queue.rx(&mut burst);
            if n > 0 {
                sender.send(n).unwrap();
                burst.clear();
            }
            if queue.wait(None).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Whatever the front-end changes under a thread that sleeps: the next frame wakes it.
#[test]
fn no_change_of_the_front_end_loses_a_wake_up() {
    type Change = fn(&Front, &Port);
    let changes: [(&str, Change); 9] = [
        ("SET_MEM_TABLE", |front, _| {
            let table = words(&[1, GUEST, 0x10_0000, USER, 0]);
            assert!(front.raw.request(5, 0, &table, &[front.file.as_fd()]));
        }),
        ("ADD_MEM_REG", |front, _| {
            let region = words(&[0, GUEST + 0x100_0000, 0x1000, USER + 0x100_0000, 0]);
            assert!(front.raw.request(37, 0, &region, &[front.file.as_fd()]));
        }),
        ("ADD_MEM_REG, REM_MEM_REG", |front, _| {
            let region = words(&[0, GUEST + 0x200_0000, 0x1000, USER + 0x200_0000, 0]);
            assert!(front.raw.request(37, 0, &region, &[front.file.as_fd()]));
            assert!(front.raw.request(38, 0, &region, &[]));
        }),
        ("GET_VRING_BASE and again", |front, _| {
            assert!(front.raw.request(11, 0, &state(1, 0), &[]));
            assert_eq!(front.raw.read().unwrap().code, 11);
            front.kick_rings();
        }),
        ("another kick", |front, _| {
            assert!(front.raw.request(12, 0, &words(&[1]), &[front.kick.as_fd()]));
        }),
        ("another call", |front, _| {
            assert!(front.raw.request(13, 0, &words(&[1]), &[front.call.as_fd()]));
        }),
        ("disabled and enabled", |front, _| {
            front.enable_rings(0);
            front.enable_rings(1);
        }),
        ("a filter", |_, back| back.set_filter(None).unwrap()),
        ("the link down and up", |_, back| {
            back.set_link_up(false).unwrap();
            back.set_link_up(true).unwrap();
        }),
    ];
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let front = Front::start(&place);
    assert!(back.wait_link(LIMIT));
    let frames = sleeper(&back);
    let mut number = 0;
    let mut next = |what: &str| {
        until("the thread sleeps", || !front.no_notify());
        front.send(number);
        number += 1;
        let n = frames.recv_timeout(LIMIT);
        assert_eq!(n, Ok(1), "{what}");
    };
    next("nothing");
    for (what, change) in changes {
        until("the thread sleeps", || !front.no_notify());
        change(&front, &back);
        front.sync();
        next(what);
    }
}

/// A thread that goes to sleep at the very moment of a change arms itself in vain: it is woken.
#[test]
fn arming_beside_changes_loses_no_wake_up() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (mut sender, mut receiver) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut burst = Burst::new(1);
                if sender.alloc(&mut burst, 1) == 1 && burst[0].copy_from(&frame_of(1, 60)).is_ok() {
                    sender.tx(&mut burst);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let changing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                back.set_filter(None).unwrap();
            }
        });
        let mut late = 0;
        let mut got = Burst::new(32);
        let end = Instant::now() + Duration::from_secs(4);
        while Instant::now() < end {
            let begin = Instant::now();
            receiver.wait(Some(LIMIT)).unwrap();
            late += u32::from(begin.elapsed() >= LIMIT);
            receiver.rx(&mut got);
            got.clear();
        }
        stop.store(true, Ordering::Relaxed);
        sending.join().unwrap();
        changing.join().unwrap();
        assert_eq!(late, 0, "a frame comes each 2 ms");
    });
}
