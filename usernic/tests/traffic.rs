//! A front-end and a back-end port over a real socket, in one process: every frame arrives, byte for byte and in order.

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{LIMIT, Place, Stream, both_ways, frame, frame_of};
use usernic::{Burst, Packet, Queue};

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1455) as usize)
}

/// Frames of 60 to 9,000 bytes (or to 1,514 where `jumbo` is not), both ways.
fn crosses(front: &str, back: &str, count: u64, jumbo: bool) {
    let place = Place::new();
    let (front_port, back_port) = place.pair(front, back);
    let make = if jumbo { frame } else { short };
    both_ways(
        &mut front_port.queue(0).unwrap(),
        &mut back_port.queue(0).unwrap(),
        count,
        make,
    );
    for port in [&front_port, &back_port] {
        let stats = port.stats();
        assert_eq!(
            (stats.rx_packets, stats.tx_packets),
            (count, count),
            "{front}: {stats:?}"
        );
        assert_eq!(
            (stats.rx_errors, stats.tx_errors, stats.anomalies),
            (0, 0, 0),
            "{front}: {stats:?}"
        );
        assert_eq!(stats.rx_bytes, (0..count).map(|n| make(n).len() as u64).sum::<u64>());
    }
}

#[test]
fn queue_sizes() {
    for size in [2, 4, 8, 16, 64, 256, 1024, 4096, 32768] {
        // A frame of 9,000 bytes takes 5 buffers; in a ring of 2 or 4 there are not so many.
        let jumbo = size >= 8;
        // The back-end takes buffers for whole rings.
        let count = if size == 32768 { 40_000 } else { 3_000 };
        let mrg = u8::from(jumbo);
        crosses(&format!("queue_size={size},mrg_rxbuf={mrg}"), "", count, jumbo);
    }
}

#[test]
fn features_on_and_off() {
    for bits in 0..16 {
        let on = |bit: u32| bits >> bit & 1;
        // Without mergeable buffers a received frame fits one.
        let (mrg, size) = if on(0) == 1 { (1, 2048) } else { (0, 9216) };
        let front = format!(
            "mrg_rxbuf={mrg},buffer_size={size},in_order={},event_idx={},indirect={}",
            on(1),
            on(2),
            on(3)
        );
        crosses(&front, "", 2_000, true);
        // The back-end's side of the same: what it does not offer is not used.
        let back = format!("in_order={},event_idx={},indirect={}", on(1), on(2), on(3));
        crosses(&format!("mrg_rxbuf={mrg},buffer_size={size}"), &back, 500, true);
    }
}

#[test]
fn memory_and_buffers() {
    crosses("mem=4M", "", 2_000, false);
    crosses("queue_size=64,buffers=256,mrg_rxbuf=1", "buffers=256", 2_000, true);
    crosses("queue_size=16,buffers=64", "buffers=64", 2_000, false);
    crosses(
        "memory=memfd,buffer_size=16384,mtu=9000",
        "buffer_size=16384",
        2_000,
        true,
    );
    crosses("buffer_size=1024,mrg_rxbuf=1", "buffer_size=1024", 2_000, true);
}

/// Either side may listen.
#[test]
fn the_front_end_listens() {
    let place = Place::new();
    let front = place.open("virtio-user", "server=1,mrg_rxbuf=1").unwrap();
    assert!(!front.link().up);
    let back = place.open("vhost", "client=1").unwrap();
    assert!(front.wait_link(LIMIT) && back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 1_000, frame);
    drop(back);
    // And the other order: the back-end looks for a front-end that is not there yet.
    let place = Place::new();
    let back = place.open("vhost", "client=1").unwrap();
    let front = place.open("virtio-user", "server=1,mrg_rxbuf=1").unwrap();
    assert!(front.wait_link(LIMIT) && back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 1_000, frame);
}

/// Eight queue pairs, a thread for each side of each.
#[test]
fn eight_queues() {
    let place = Place::new();
    let (front, back) = place.pair("queues=8,mrg_rxbuf=1", "queues=8");
    // The link is up with the first pair that runs.
    common::until("all pairs run", || back.link().queues == 8);
    // VIRTIO_NET_F_MQ: without it DPDK's back-end serves the first pair alone.
    assert_ne!(back.link().features & 1 << 22, 0);
    std::thread::scope(|scope| {
        for index in 0..8 {
            let (mut a, mut b) = (front.queue(index).unwrap(), back.queue(index).unwrap());
            let go = |queue: &mut Queue| {
                let (mut there, mut here) = (Stream::new(1_000, frame), Stream::new(1_000, frame));
                let end = Instant::now() + 3 * LIMIT;
                // The other side may need what this one still has to send.
                let mut sent = 0;
                while !here.done() || sent < 1_000 {
                    let n = there.send(queue);
                    sent += n;
                    if n + here.receive(queue) == 0 {
                        assert!(
                            Instant::now() < end,
                            "queue {}: {sent} sent, {} seen",
                            queue.index(),
                            here.seen
                        );
                        std::thread::yield_now();
                    }
                }
                assert!(queue.drain(LIMIT));
            };
            scope.spawn(move || go(&mut a));
            scope.spawn(move || go(&mut b));
        }
    });
    for index in 0..8 {
        assert_eq!(back.queue_stats(index).unwrap().rx_packets, 1_000);
        assert_eq!(front.queue_stats(index).unwrap().rx_packets, 1_000);
    }
}

/// Fewer queues than the back-end has: the others stay down.
#[test]
fn fewer_queues_than_offered() {
    let place = Place::new();
    let (front, back) = place.pair("queues=2", "queues=4");
    common::until("both pairs run", || (front.link().queues, back.link().queues) == (2, 2));
    assert!(front.queue(2).is_err());
    both_ways(&mut front.queue(1).unwrap(), &mut back.queue(1).unwrap(), 500, short);
}

/// One frame there and back, both sides asleep while they wait: a notification that gets lost ends the test.
fn ping_pong(front: &str, back: &str, rounds: u64) {
    let place = Place::new();
    let (front, back) = place.pair(front, back);
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    let stop = AtomicBool::new(false);
    let next = |queue: &mut Queue, burst: &mut Burst, stop: &AtomicBool, round: u64| -> bool {
        let end = Instant::now() + LIMIT;
        while queue.rx(burst) == 0 {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            // Long: were a wake-up lost, the wait would be seen to last.
            let begin = Instant::now();
            let there = queue.wait(Some(Duration::from_secs(5))).unwrap();
            let waited = begin.elapsed();
            if waited >= Duration::from_secs(5) && !stop.load(Ordering::Relaxed) {
                panic!(
                    "round {round}: a lost wake-up (frames there: {there}, {:?})",
                    queue.stats()
                );
            }
            assert!(Instant::now() < end);
        }
        true
    };
    std::thread::scope(|scope| {
        let stop = &stop;
        let echo = scope.spawn(move || {
            let mut burst = Burst::new(4);
            let mut round = 0;
            while round < rounds && next(&mut b, &mut burst, stop, round) {
                assert_eq!(burst.len(), 1);
                assert_eq!(b.tx(&mut burst), 1);
                round += 1;
            }
            round
        });
        let mut burst = Burst::new(4);
        let mut done = || {
            for round in 0..rounds {
                let mut packet: Packet = a.packet().expect("one frame is under way at a time");
                packet.copy_from(&frame_of(round, 60)).unwrap();
                assert!(burst.push(packet).is_ok());
                assert_eq!(a.tx(&mut burst), 1);
                assert!(next(&mut a, &mut burst, stop, round));
                assert_eq!(burst[0].header::<8>(), Some(round.to_le_bytes()));
                burst.clear();
            }
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut done));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(echo.join().unwrap(), rounds);
        result.unwrap();
    });
}

#[test]
fn no_wake_up_is_lost() {
    ping_pong("event_idx=0", "event_idx=0", 50_000);
    ping_pong("event_idx=1", "event_idx=1", 50_000);
    ping_pong("event_idx=1,in_order=0,queue_size=2", "event_idx=1", 20_000);
    ping_pong("event_idx=0,in_order=0,indirect=0,queue_size=4", "", 20_000);
}

/// What `wait` says: nothing came, a frame came, the link went down.
#[test]
fn waiting() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    a.wait(Some(Duration::ZERO)).unwrap();
    let begin = Instant::now();
    assert!(!a.wait(Some(Duration::from_millis(50))).unwrap());
    assert!(
        begin.elapsed() >= Duration::from_millis(50),
        "a wait without cause lasts"
    );
    let mut burst = Burst::new(4);
    assert_eq!(b.alloc(&mut burst, 2), 2);
    burst.iter_mut().for_each(|packet| packet.copy_from(&[1; 60]).unwrap());
    assert_eq!(b.tx(&mut burst), 2);
    assert!(a.wait(Some(LIMIT)).unwrap());
    assert_eq!(a.rx(&mut burst), 2);
    burst.clear();
    // By hand, on the descriptor.
    assert!(!a.arm());
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        a.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&zero)).unwrap(), 0);
    assert!(!a.disarm());

    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            drop((b, back));
        });
        while front.link().up {
            a.wait(Some(LIMIT)).unwrap();
            assert!(
                begin.elapsed() < LIMIT,
                "nobody woke the sleeper when the link went down"
            );
        }
    });
}

#[test]
fn a_queue_is_taken_once_at_a_time() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let mut b = back.queue(0).unwrap();
    for _ in 0..10 {
        let mut a = front.queue(0).unwrap();
        assert!(matches!(front.queue(0), Err(usernic::Error::QueueTaken { index: 0 })));
        assert!(matches!(
            front.queue(1),
            Err(usernic::Error::NoSuchQueue { index: 1, count: 1 })
        ));
        both_ways(&mut a, &mut b, 300, short);
    }
    // What came while nobody had the queue is there for the next.
    let mut burst = Burst::new(8);
    assert_eq!(b.alloc(&mut burst, 8), 8);
    burst.iter_mut().for_each(|packet| packet.copy_from(&[3; 60]).unwrap());
    assert_eq!(b.tx(&mut burst), 8);
    assert_eq!(front.queue(0).unwrap().rx(&mut burst), 8);
}

/// Ports go while threads hold their queues and packets: those stay valid, and move nothing any more.
#[test]
fn ports_go_first() {
    for front_first in [true, false] {
        let place = Place::new();
        let (front, back) = place.pair("", "");
        let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
        let (mut out, mut got) = (Burst::new(32), Burst::new(32));
        assert_eq!(a.alloc(&mut out, 16), 16);
        for (number, packet) in (0..).zip(out.iter_mut()) {
            packet.copy_from(&frame_of(number, 600)).unwrap();
        }
        let kept = Vec::from_iter(out.drain());
        let mut more = Burst::new(32);
        assert_eq!(a.alloc(&mut more, 16), 16);
        more.iter_mut().for_each(|packet| packet.copy_from(&[9; 60]).unwrap());
        assert_eq!(a.tx(&mut more), 16);
        assert_eq!(b.rx(&mut got), 16);
        if front_first {
            drop(front);
            drop(back);
        } else {
            drop(back);
            drop(front);
        }
        for _ in 0..3 {
            assert_eq!((a.rx(&mut more), b.rx(&mut more)), (0, 0));
            assert_eq!(b.tx(&mut got), 0, "the link is down");
        }
        let closed = a.wait(Some(Duration::from_millis(1))).unwrap_err();
        assert_eq!(closed.kind(), std::io::ErrorKind::NotConnected);
        assert!(got.iter().all(|packet| packet.bytes() == Some(&[9; 60][..])));
        let kept = std::thread::spawn(move || {
            for (number, packet) in (0..).zip(&kept) {
                let mut bytes = [0; 600];
                assert_eq!(packet.copy_to(&mut bytes), 600);
                assert!(bytes[..] == frame_of(number, 600)[..]);
            }
            kept
        })
        .join()
        .unwrap();
        drop((a, b));
        drop(kept);
    }
}
