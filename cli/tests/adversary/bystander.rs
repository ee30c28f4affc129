//! Two tenants that ask and answer all the time, and count what is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use usernic::{Burst, Port, Queue};

use super::LIMIT;

/// A front-end with an address.
pub struct Host {
    queue: Queue,
    port: Port,
    last: u8,
}

/// A frame with a number.
pub fn frame(to: [u8; 6], from: u8, number: u64, len: usize) -> Vec<u8> {
    let mut bytes = [&to[..], &[2, 0, 0, 0, 0, from], &[0x88, 0xb5], &number.to_be_bytes()].concat();
    bytes.resize(len.max(bytes.len()), from);
    bytes
}

fn address(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

impl Host {
    pub fn join(socket: &Path, last: u8) -> Self {
        let spec = format!("virtio-user,path={},mac=02:00:00:00:00:{last:02x}", socket.display());
        let port = Port::open(&spec).unwrap();
        let queue = port.queue(0).unwrap();
        Host { queue, port, last }
    }

    pub fn announce(&self) {
        self.port.announce().unwrap();
    }

    pub fn send(&mut self, bytes: &[u8]) {
        let mut burst = Burst::new(1);
        let start = Instant::now();
        while burst.is_empty() {
            self.queue.alloc(&mut burst, 1);
            assert!(start.elapsed() < LIMIT, "no buffer to send with");
        }
        burst[0].copy_from(bytes).unwrap();
        while self.queue.tx(&mut burst) == 0 {
            assert!(start.elapsed() < LIMIT, "nobody takes a frame");
            std::thread::yield_now();
        }
    }

    /// Waits for this frame. What others send to everybody comes in between; a frame of the pair that is not this one is
    /// a loss, and a runt is one that nobody may send on.
    fn expect(&mut self, expected: &[u8]) {
        let start = Instant::now();
        let mut burst = Burst::new(32);
        loop {
            self.queue.rx(&mut burst);
            for packet in burst.drain() {
                let bytes = packet.into_private();
                assert!(bytes.len() >= 14, "a runt of {} bytes", bytes.len());
                if bytes == expected {
                    return;
                }
                assert!(bytes[6..12] != expected[6..12], "a frame is lost before {bytes:02x?}");
            }
            assert!(start.elapsed() < LIMIT, "a frame is lost: {expected:02x?}");
            std::thread::yield_now();
        }
    }
}

/// Two hosts and the thread that has them talk.
pub struct Pair {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Pair {
    pub fn start(mut a: Host, mut b: Host) -> Self {
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (done, ended) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            // The switch may see the link of b after a's first frame.
            while !b.port.wait_link(LIMIT) || done.load(Ordering::Relaxed) == 0 {
                a.send(&frame(address(b.last), a.last, 0, 60));
                std::thread::sleep(std::time::Duration::from_millis(5));
                let mut burst = Burst::new(32);
                if b.queue.rx(&mut burst) > 0 {
                    done.store(1, Ordering::Relaxed);
                }
                assert!(start.elapsed() < LIMIT, "the pair does not meet");
            }
            // What is left of that.
            let mark = frame(address(b.last), a.last, 1, 61);
            a.send(&mark);
            while !b.takes(&mark) {
                assert!(start.elapsed() < LIMIT, "the pair does not meet");
            }
            let mut number = 2;
            while !ended.load(Ordering::Relaxed) {
                // Every fifth is for everybody, and reaches the other ports too.
                let to = if number % 5 == 0 { [0xff; 6] } else { address(b.last) };
                let ask = frame(to, a.last, number, 60 + number as usize % 1400);
                a.send(&ask);
                b.expect(&ask);
                let answer = frame(address(a.last), b.last, number, 60);
                b.send(&answer);
                a.expect(&answer);
                number += 1;
                done.store(number, Ordering::Relaxed);
            }
        });
        Pair { rounds, stop, thread }
    }

    /// Waits until they have asked and answered so many times more.
    pub fn talks(&self, rounds: u64) {
        let (begin, start) = (self.rounds.load(Ordering::Relaxed), Instant::now());
        while self.rounds.load(Ordering::Relaxed) < begin + rounds {
            let alive = !self.thread.is_finished() && start.elapsed() < LIMIT;
            assert!(alive, "the pair does not talk any more, after {begin} rounds");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the pair lost nothing");
    }
}

impl Host {
    fn takes(&mut self, expected: &[u8]) -> bool {
        let mut burst = Burst::new(32);
        self.queue.rx(&mut burst);
        burst.drain().any(|packet| packet.into_private() == expected)
    }
}
