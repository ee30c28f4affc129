//! What the tests share: ports on a socket of their own, frames that say who they are, and what a process has open.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use usernic::{Burst, Port, Queue};

/// Nothing here takes longer than this.
pub const LIMIT: Duration = Duration::from_secs(10);

static SERIAL: Mutex<()> = Mutex::new(());

/// Tests that count what the process has open run one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    SERIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// File descriptors and control threads of this process.
pub fn held() -> (usize, usize) {
    // What the first port of a process makes for all of them is nothing that is left behind.
    usernic::notify::prepare().unwrap();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .filter(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.trim() == "usernic-control"
        })
        .count();
    (fds, threads)
}

/// A folder with a socket in it.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Place {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("port.sock")
    }

    /// A port of this kind, with more keys. Where they do not say, it takes the frames of [`frame`], if it has the buffers.
    pub fn open(&self, kind: &str, more: &str) -> Result<Port, usernic::Error> {
        let comma = if more.is_empty() { "" } else { "," };
        let large = !more.contains("mtu=") && (kind == "vhost" || more.contains("mrg_rxbuf="));
        let mtu = if large { ",mtu=9000" } else { "" };
        Port::open(&format!("{kind},path={}{comma}{more}{mtu}", self.socket().display()))
    }

    /// A front-end and a back-end with the link up.
    pub fn pair(&self, front: &str, back: &str) -> (Port, Port) {
        let back = self.open("vhost", back).unwrap();
        let front = self.open("virtio-user", front).unwrap();
        assert!(back.wait_link(LIMIT), "the link stays down");
        (front, back)
    }
}

/// Lengths and bytes from a seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Frame `number`: as long as captures have them, every byte its own.
pub fn frame(number: u64) -> Vec<u8> {
    let mut random = Random::new((number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let len = match random.below(8) {
        0 => 60,
        1 => 1514,
        2 => 9000,
        3 => 2048,
        4 => 2049,
        _ => 60 + random.below(8941),
    } as usize;
    frame_of(number, len)
}

/// Frame `number` with `len` bytes, at least 8.
pub fn frame_of(number: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    let mut bytes = number.to_le_bytes().to_vec();
    while bytes.len() < len {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A one-way stream of frames, compared byte for byte and in order.
pub struct Stream {
    make: fn(u64) -> Vec<u8>,
    count: u64,
    made: u64,
    pub seen: u64,
    out: Burst,
    got: Burst,
}

impl Stream {
    pub fn new(count: u64, make: fn(u64) -> Vec<u8>) -> Self {
        Stream {
            make,
            count,
            made: 0,
            seen: 0,
            out: Burst::new(32),
            got: Burst::new(32),
        }
    }

    pub fn done(&self) -> bool {
        self.seen == self.count
    }

    /// Sends what there is room for; what moved.
    pub fn send(&mut self, from: &mut Queue) -> usize {
        while self.made < self.count && self.out.room() > 0 {
            let Some(mut packet) = from.packet() else { break };
            if packet.copy_from(&(self.make)(self.made)).is_err() {
                // Buffers are short: try again when some came home.
                drop(packet);
                from.reclaim();
                break;
            }
            self.made += 1;
            assert!(self.out.push(packet).is_ok());
        }
        from.tx(&mut self.out)
    }

    /// Receives and compares what has come; what moved.
    pub fn receive(&mut self, to: &mut Queue) -> usize {
        let n = to.rx(&mut self.got);
        for packet in self.got.iter() {
            let expected = (self.make)(self.seen);
            let mut bytes = vec![0; packet.len()];
            packet.copy_to(&mut bytes);
            assert_eq!(bytes.len(), expected.len(), "length of frame {}", self.seen);
            assert!(bytes == expected, "bytes of frame {}", self.seen);
            self.seen += 1;
        }
        self.got.clear();
        n
    }
}

/// `count` frames each way at once, by one thread.
pub fn both_ways(a: &mut Queue, b: &mut Queue, count: u64, make: fn(u64) -> Vec<u8>) {
    let (mut there, mut back) = (Stream::new(count, make), Stream::new(count, make));
    let mut last = Instant::now();
    while !there.done() || !back.done() {
        let moved = there.send(a) + there.receive(b) + back.send(b) + back.receive(a);
        if moved > 0 {
            last = Instant::now();
        } else if last.elapsed() > LIMIT / 4 {
            panic!(
                "nothing moves: {} and {} of {count}; {:?} {:?}",
                there.seen,
                back.seen,
                a.stats(),
                b.stats()
            );
        }
    }
}

/// Waits until `what` is so.
pub fn until(why: &str, mut what: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !what() {
        assert!(Instant::now() < end, "{why}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
