//! The control thread changes a port while another thread polls its queue, sleeps on it, or is about to: the polling thread
//! sees no frame that nobody sent, no sleep outlasts what it waits for, and a queue without a port says so.

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::{LIMIT, Place, frame_of, until};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use usernic::filter::Filter;
use usernic::{Burst, Port, Queue};

/// Sends frame `number`; whether there was room.
fn send(queue: &mut Queue, number: u64) -> bool {
    let Some(mut packet) = queue.packet() else { return false };
    packet.copy_from(&frame_of(number, 60)).unwrap();
    let mut burst = Burst::new(1);
    assert!(burst.push(packet).is_ok());
    queue.tx(&mut burst) == 1
}

/// The back-end returns again and again while a thread polls the front-end's queue as fast as it can. In every round so
/// many frames come that the ring is in its second lap, where a packed ring in its initial state looks full.
fn polled_while_the_back_end_returns(front: &str) {
    const SIZE: u64 = 512;
    let place = Place::new();
    let front = place
        .open(
            "virtio-user",
            &format!("server=1,timeout=60000,queue_size={SIZE},{front}"),
        )
        .unwrap();
    let (stop, received) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut queue = front.queue(0).unwrap();
    std::thread::scope(|scope| {
        let polling = scope.spawn(|| {
            let mut burst = Burst::new(32);
            let mut last = None;
            while !stop.load(Ordering::Relaxed) {
                queue.rx(&mut burst);
                for packet in burst.iter() {
                    let number = packet.header().map_or(u64::MAX, u64::from_le_bytes);
                    let mut bytes = vec![0; packet.len()];
                    packet.copy_to(&mut bytes);
                    if bytes != frame_of(number, 60) || last.is_some_and(|last| last >= number) {
                        stop.store(true, Ordering::Relaxed);
                        panic!("a frame of {} bytes, {number} after {last:?}", packet.len());
                    }
                    last = Some(number);
                    received.fetch_add(1, Ordering::Relaxed);
                }
                burst.clear();
            }
        });
        let mut next = 0;
        for round in 0..60 {
            let back = place.open("vhost", "client=1").unwrap();
            let mut sender = back.queue(0).unwrap();
            // Between one and two laps, another place each time.
            let goal = received.load(Ordering::Relaxed) + SIZE + 1 + round * 7 % SIZE;
            until("frames arrive", || {
                if stop.load(Ordering::Relaxed) {
                    return true;
                }
                for _ in 0..32 {
                    next += u64::from(send(&mut sender, next));
                }
                received.load(Ordering::Relaxed) >= goal
            });
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        polling.join().unwrap();
    });
    let stats = front.stats();
    assert_eq!((stats.rx_errors, stats.anomalies), (0, 0), "{stats:?}");
}

#[test]
fn a_packed_ring_that_begins_anew_shows_no_frame_that_nobody_sent() {
    polled_while_the_back_end_returns("packed_vq=1");
    polled_while_the_back_end_returns("packed_vq=1,in_order=0");
}

#[test]
fn a_split_ring_that_begins_anew_shows_no_frame_that_nobody_sent() {
    polled_while_the_back_end_returns("packed_vq=0");
}

/// A thread that does what the documentation of `Port` says; the errors of its waits.
fn sleeper(mut queue: Queue) -> std::sync::mpsc::Receiver<std::io::ErrorKind> {
    let (sender, told) = channel();
    std::thread::spawn(move || {
        let mut burst = Burst::new(32);
        let mut errors = 0;
        while errors < 3 {
            if queue.rx(&mut burst) == 0
                && let Err(error) = queue.wait(None)
            {
                errors += 1;
                let _ = sender.send(error.kind());
            }
            burst.clear();
        }
        assert!(!queue.is_open());
        assert_eq!(queue.rx(&mut burst), 0);
    });
    told
}

#[test]
fn a_wait_on_a_queue_whose_port_is_gone_reports_that_each_time() {
    for ours in ["virtio-user", "vhost"] {
        let place = Place::new();
        let (front, back) = place.pair("", "");
        let (ours, theirs) = match ours {
            "vhost" => (back, front),
            _ => (front, back),
        };
        let queue = ours.queue(0).unwrap();
        assert!(queue.is_open());
        let told = sleeper(queue);
        drop(ours);
        for _ in 0..3 {
            let kind = told
                .recv_timeout(LIMIT)
                .expect("the thread sleeps on a queue without a port");
            assert_eq!(kind, std::io::ErrorKind::NotConnected);
        }
        drop(theirs);
    }
}

#[test]
fn a_wait_that_begins_after_the_port_is_gone_reports_that() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let mut burst = Burst::new(1);
    assert_eq!(a.alloc(&mut burst, 1), 1);
    drop((front, back));
    for queue in [&mut a, &mut b] {
        for _ in 0..3 {
            assert!(queue.wait(None).is_err());
            // Whoever sleeps by other means is told, too.
            queue.arm();
            let mut fds = [PollFd::from_borrowed_fd(queue.as_fd(), PollFlags::IN)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            assert_eq!(
                poll(&mut fds, Some(&now)),
                Ok(1),
                "a queue without a port is not readable"
            );
            queue.disarm();
        }
        assert_eq!(queue.tx(&mut burst), 0);
        assert_eq!(burst.len(), 1, "what was not sent stays");
    }
}

/// One thread sends a frame every now and then, one changes something about the receiving port without pause, and one sleeps
/// until each frame comes.
fn every_sleep_ends(from: &Port, to: &Port, change: impl Fn() + Sync) {
    const FRAMES: u64 = 1000;
    let (mut a, mut b) = (from.queue(0).unwrap(), to.queue(0).unwrap());
    let (stop, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                change();
            }
        });
        let sleeping = scope.spawn(|| {
            let mut burst = Burst::new(32);
            while !stop.load(Ordering::Relaxed) {
                // A limit so that the test ends when it fails.
                b.wait(Some(2 * LIMIT)).unwrap();
                b.rx(&mut burst);
                seen.fetch_add(burst.len() as u64, Ordering::Relaxed);
                burst.clear();
            }
        });
        let mut late = false;
        for number in 0..FRAMES {
            // The other thread begins to sleep meanwhile, or has begun.
            std::thread::sleep(Duration::from_micros(50 + 7 * (number % 40)));
            let end = Instant::now() + LIMIT;
            while !late && !send(&mut a, number) {
                late = Instant::now() > end;
            }
            while !late && seen.load(Ordering::Relaxed) <= number {
                late = Instant::now() > end;
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        to.set_filter(None).unwrap();
        changing.join().unwrap();
        sleeping.join().unwrap();
        assert!(!late, "a frame is there and nobody wakes");
    });
}

#[test]
fn a_sleep_beside_changes_of_the_filter_ends_with_the_next_frame() {
    let place = Place::new();
    let (front, back) = place.pair("mrg_rxbuf=0", "");
    every_sleep_ends(&front, &back, || back.set_filter(None).unwrap());
    every_sleep_ends(&back, &front, || front.set_filter(None).unwrap());
}

#[test]
fn a_sleep_beside_changes_of_the_number_of_queues_ends_with_the_next_frame() {
    let place = Place::new();
    let (front, back) = place.pair("queues=2", "queues=2");
    let other = AtomicBool::new(false);
    let change = || {
        let two = other.fetch_xor(true, Ordering::Relaxed);
        front.set_queues(1 + u16::from(two)).unwrap();
    };
    every_sleep_ends(&back, &front, change);
}

/// The back-end is replaced under a thread that sleeps: it receives what the next one sends.
#[test]
fn a_sleep_outlasts_the_back_end_and_ends_with_a_frame_of_the_next() {
    let place = Place::new();
    let front = place.open("virtio-user", "server=1,packed_vq=1").unwrap();
    let queue = front.queue(0).unwrap();
    let (sender, received) = channel();
    let thread = std::thread::spawn(move || {
        let mut queue = queue;
        let mut burst = Burst::new(32);
        while queue.wait(None).is_ok() {
            queue.rx(&mut burst);
            for packet in burst.drain() {
                let number = packet.header().map_or(u64::MAX, u64::from_le_bytes);
                sender.send(number).unwrap();
            }
        }
    });
    for number in 0..20 {
        let back = place.open("vhost", "client=1").unwrap();
        assert!(back.wait_link(LIMIT));
        let mut b = back.queue(0).unwrap();
        until("there is room", || send(&mut b, number));
        assert_eq!(
            received.recv_timeout(LIMIT),
            Ok(number),
            "a frame is there and nobody wakes"
        );
    }
    drop(front);
    thread.join().unwrap();
}

#[test]
fn drain_says_that_frames_are_left_while_the_rings_are_changed() {
    let place = Place::new();
    let (front, back) = place.pair("mrg_rxbuf=0", "");
    let mut queue = front.queue(0).unwrap();
    for number in 0..32 {
        assert!(send(&mut queue, number));
    }
    let (stop, drained) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let mut filter = Filter::new([2, 0, 0, 0, 0, 1]);
            filter.set_mode(virtio_ring::net::RxMode::Promiscuous, false);
            for _ in 0..500 {
                front.set_filter(Some(filter.clone())).unwrap();
                front.set_filter(None).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        while !stop.load(Ordering::Relaxed) {
            drained.fetch_add(u64::from(queue.drain(Duration::ZERO)), Ordering::Relaxed);
        }
        changing.join().unwrap();
    });
    assert_eq!(drained.into_inner(), 0, "the back-end has taken no frame");
    let mut taken = Burst::new(32);
    let mut b = back.queue(0).unwrap();
    until("the back-end takes the frames", || {
        b.rx(&mut taken);
        taken.len() == 32
    });
    assert!(queue.drain(LIMIT));
}

#[test]
fn drain_says_that_frames_are_left_when_the_link_or_the_port_is_gone() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let mut queue = front.queue(0).unwrap();
    assert!(queue.drain(Duration::ZERO));
    assert!(send(&mut queue, 0));
    drop(back);
    until("the link goes down", || !front.link().up);
    let begin = Instant::now();
    assert!(!queue.drain(10 * LIMIT));
    drop(front);
    assert!(!queue.drain(10 * LIMIT));
    assert!(begin.elapsed() < LIMIT);
}
