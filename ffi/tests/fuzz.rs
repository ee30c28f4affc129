//! Random sequences of calls with arguments that are right, wrong, dead, null or mixed up, by one thread and by two at the
//! same handles: none crashes, none hangs, and the ports work afterwards.
//!
//! Not tried: pointers that are neither null nor misaligned and lead nowhere, which nobody can check. USERNIC_FUZZ gives
//! another number of sequences, USERNIC_FUZZ_SEED another beginning.

mod common;

use std::ffi::c_char;
use std::ptr::null_mut;

use common::{Pair, Records, message, open, queue};
use usernic_ffi::*;

struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }

    fn number(&mut self) -> u64 {
        match self.below(7) {
            0 => 0,
            1 => self.below(4),
            2 => self.below(100),
            3 => self.below(70_000),
            4 => u64::MAX - self.below(3),
            // The ends of each width, and what wraps there.
            5 => {
                let end = [1 << 7, 1 << 8, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 0][self.below(8) as usize];
                u64::wrapping_add(end, self.below(4)).wrapping_sub(2)
            }
            _ => self.draw(),
        }
    }

    /// A size to write a struct of: as much as there is, or more than any struct has.
    fn size(&mut self) -> usize {
        match self.number() {
            n @ 513..=4096 => n as usize % 512,
            n => n as usize,
        }
    }
}

/// What sequences draw from: handles of all kinds, alive and dead.
struct World {
    random: Random,
    handles: Vec<u64>,
    socket: std::path::PathBuf,
    /// 64 KiB for whatever is read and written, and a place for structs, aligned.
    bytes: Vec<u8>,
    place: Vec<u64>,
    opened: u32,
    /// Frames that were sent and received: the sequences are about something.
    moved: [u64; 3],
    /// Shared memory for ports that it is lent to.
    lent: Lent,
}

// SAFETY: the pointer is to shared memory that stays mapped.
unsafe impl Send for World {}

impl World {
    /// A handle, mostly one that is or was of this kind.
    fn handle<T>(&mut self, kind: u64) -> *mut T {
        let of_kind: Vec<u64> = self.handles.iter().copied().filter(|h| h & 0xF == kind).collect();
        let any = self.handles[self.random.below(self.handles.len() as u64) as usize];
        let right = match of_kind.len() as u64 {
            0 => any,
            // Those that were made last are the likeliest to be open.
            n => of_kind[(n - 1 - self.random.below(n).min(self.random.below(n))) as usize],
        };
        let handle = match self.random.below(30) {
            0 => 0,
            1 => self.random.draw(),
            2 => right ^ 1 << self.random.below(64),
            3 => any,
            _ => right,
        };
        handle as *mut T
    }

    fn port(&mut self) -> *mut PortHandle {
        self.handle(1)
    }

    fn queue(&mut self) -> *mut QueueHandle {
        self.handle(2)
    }

    fn burst(&mut self) -> *mut BurstHandle {
        self.handle(3)
    }

    fn lent_port(&mut self) -> *mut LentPortHandle {
        self.handle(4)
    }

    fn lent_pair(&mut self) -> *mut LentPairHandle {
        self.handle(5)
    }

    /// Buffers, most of them in lent memory.
    fn buffers(&mut self) -> Vec<Buffer> {
        (0..self.random.below(6))
            .map(|_| Buffer {
                address: match self.random.below(8) {
                    0 => self.random.number() as *mut _,
                    _ => self
                        .lent
                        .address
                        .wrapping_byte_add(self.random.below(LENT + 100) as usize),
                },
                cookie: self.random.draw(),
                length: if self.random.below(4) == 0 {
                    self.random.number()
                } else {
                    1514
                } as u32,
                reserved: 0,
            })
            .collect()
    }

    /// The number of elements that there are, or one that is refused whatever there is.
    fn count(&mut self, there: usize) -> u32 {
        match self.random.number() as u32 {
            beyond @ 40_000.. => beyond,
            _ => there as u32,
        }
    }

    /// A call about lent memory.
    fn lent_step(&mut self) {
        let number = self.random.number();
        // SAFETY: as for `step`.
        unsafe {
            match self.random.below(12) {
                0 => {
                    let mut regions = [self.lent; 2];
                    match self.random.below(8) {
                        0 => regions[0].length = number,
                        1 => regions[0].offset = number,
                        2 => regions[0].page_size = number,
                        3 => regions[0].address = number as *mut _,
                        4 => regions[0].fd = number as i32,
                        _ => {}
                    }
                    let spec = self.spec();
                    let out = self.out();
                    let count = 1 + u32::from(number == 1);
                    let status = usernic_lent_port_open_abi(1, spec.as_ptr().cast(), regions.as_ptr(), count, out);
                    self.keep(status);
                }
                1 if number == 0 => _ = usernic_lent_port_close(self.lent_port()),
                2 => _ = usernic_lent_port_link(self.lent_port()),
                3 => {
                    let (port, out) = (self.lent_port(), self.out());
                    let status = usernic_lent_port_pair(port, self.random.below(2) as u16, out);
                    self.keep(status);
                }
                4 if number == 0 => _ = usernic_lent_pair_close(self.lent_pair()),
                5 => {
                    let buffers = self.buffers();
                    let count = self.count(buffers.len());
                    _ = usernic_lent_pair_post(self.lent_pair(), buffers.as_ptr(), count);
                }
                6 => {
                    let buffers = self.buffers();
                    let count = self.count(buffers.len());
                    let sent = usernic_lent_pair_send(self.lent_pair(), buffers.as_ptr(), count);
                    self.moved[2] += u64::from(sent.max(0).unsigned_abs());
                }
                7 => {
                    let count = self.count(number as usize % 20);
                    _ = usernic_lent_pair_receive(self.lent_pair(), self.out(), count);
                }
                8 => {
                    let count = self.count(number as usize % 40);
                    _ = usernic_lent_pair_sent(self.lent_pair(), self.out(), count);
                }
                9 => _ = usernic_lent_pair_wait(self.lent_pair(), (number % 2) as i64),
                10 => _ = usernic_lent_pair_counts(self.lent_pair(), self.out(), self.random.size()),
                _ => {
                    usernic_lent_port_pair_count(self.lent_port());
                    usernic_lent_pair_fd(self.lent_pair());
                    usernic_lent_pair_arm(self.lent_pair());
                    usernic_lent_pair_disarm(self.lent_pair());
                }
            }
        }
    }

    /// A place for a struct or a handle: right, null or misaligned. The bytes behind it are there in any case.
    fn out<T>(&mut self) -> *mut T {
        match self.random.below(8) {
            0 => null_mut(),
            1 => self.place.as_mut_ptr().wrapping_byte_add(1).cast(),
            _ => self.place.as_mut_ptr().cast(),
        }
    }

    /// Keeps the handle that a call wrote, if it did.
    fn keep(&mut self, status: i32) {
        if status == 0 {
            let handle = self.place[0];
            if self.handles.len() < 200 {
                self.handles.push(handle);
            } else {
                let at = self.random.below(200) as usize;
                self.handles[at] = handle;
            }
        }
    }

    fn spec(&mut self) -> Vec<u8> {
        let mut spec = match self.random.below(12) {
            // Few of those that open something: it costs a thread and memory.
            0 if self.opened < 40 => {
                self.opened += 1;
                format!("vhost,path={}-{}", self.socket.display(), self.opened).into_bytes()
            }
            1 => format!("virtio-user,path={}-none,memory=memfd", self.socket.display()).into_bytes(),
            2 => vec![b'a'; 5000],
            3 => b"virtio-user".to_vec(),
            4 => b"vhost,path=/dev/null/x".to_vec(),
            _ => (0..self.random.below(40))
                .map(|_| b"virtio-user,path=vhost\xff0189"[self.random.below(27) as usize])
                .collect(),
        };
        spec.push(0);
        spec
    }

    /// Writes nonsense into a burst's records, where there are any.
    fn scribble(&mut self) {
        let view = usernic_burst_frames(self.burst());
        if view.is_null() {
            return;
        }
        // SAFETY: an open burst's records, which nobody else uses.
        let frames = unsafe { std::slice::from_raw_parts_mut((*view).frame, (*view).count as usize) };
        if frames.is_empty() {
            return;
        }
        let at = self.random.below(frames.len() as u64) as usize;
        let frame = &mut frames[at];
        match self.random.below(10) {
            0 => frame.len = self.random.number() as u32,
            1..=3 => frame.len = (self.random.below(u64::from(frame.room) + 2)) as u32,
            4 => frame.data = frame.data.wrapping_offset(self.random.below(400) as isize - 200),
            5 => frame.data = self.random.number() as *mut u8,
            6 => frame.flags = self.random.draw() as u16,
            7 => frame.flags |= USERNIC_FRAME_DROP,
            8 => {
                frame.flags |= USERNIC_FRAME_ASK_SEGMENTS | USERNIC_FRAME_ASK_CHECKSUM;
                frame.segment_size = self.random.number() as u16;
            }
            _ => {
                frame.room = self.random.number() as u32;
                frame.headroom = self.random.number() as u16;
                frame.reserved = [self.random.number() as u16; 2];
            }
        }
    }

    fn step(&mut self) {
        let number = self.random.number();
        let choice = self.random.below(43);
        if choice > 36 {
            return self.lent_step();
        }
        // SAFETY: every pointer that is neither null nor misaligned has as much memory behind it as the call is told,
        // but for sizes beyond it, which are kept to what is there.
        unsafe {
            match choice {
                0 => {
                    let spec = self.spec();
                    let spec = if number == 0 {
                        null_mut()
                    } else {
                        spec.as_ptr().cast_mut()
                    };
                    let abi = if self.random.below(8) == 0 { number as u32 } else { 1 };
                    let out = self.out();
                    let status = usernic_port_open_abi(abi, spec.cast::<c_char>(), out);
                    self.keep(status);
                }
                1 if self.random.below(10) == 0 => _ = usernic_port_close(self.port()),
                2 => {
                    let (port, out) = (self.port(), self.out());
                    let status = usernic_port_queue(port, self.random.below(2) as u16, out);
                    self.keep(status);
                }
                3 => _ = usernic_port_queue_count(self.port()),
                4 => _ = usernic_port_set_queues(self.port(), number as u16),
                5 => _ = usernic_port_link(self.port(), self.out(), self.random.size()),
                6 => _ = usernic_port_wait_link(self.port(), (number % 2) as i64),
                7 => _ = usernic_port_mac(self.port(), self.out()),
                8 => _ = usernic_port_mtu(self.port()),
                9 => _ = usernic_port_counts(self.port(), self.out(), self.random.size()),
                10 => {
                    let size = self.random.size();
                    _ = usernic_port_queue_counts(self.port(), self.random.below(3) as u16, self.out(), size);
                }
                11 => _ = usernic_port_memory(self.port(), self.out(), self.random.size()),
                12 if self.random.below(4) == 0 => _ = usernic_queue_close(self.queue()),
                13..=15 => {
                    let n = usernic_queue_rx(self.queue(), self.burst());
                    self.moved[0] += u64::from(n.max(0).unsigned_abs());
                }
                16..=18 => {
                    let n = usernic_queue_tx(self.queue(), self.burst());
                    self.moved[1] += u64::from(n.max(0).unsigned_abs());
                }
                19..=21 => _ = usernic_queue_alloc(self.queue(), self.burst(), number as u32),
                22 => _ = usernic_queue_free(self.queue(), self.burst()),
                23 => _ = usernic_queue_wait(self.queue(), (number % 2) as i64),
                24 => _ = usernic_queue_fd(self.queue()),
                25 => _ = usernic_queue_arm(self.queue()),
                26 => _ = usernic_queue_disarm(self.queue()),
                27 => _ = usernic_queue_drain(self.queue(), (number % 2) as i64),
                28 => _ = usernic_queue_counts(self.queue(), self.out(), self.random.size()),
                29 => {
                    let capacity = if number > 100 && number < 1 << 16 {
                        64
                    } else {
                        number as u32
                    };
                    let status = usernic_burst_new(capacity, self.out());
                    self.keep(status);
                }
                30 if self.random.below(4) == 0 => _ = usernic_burst_close(self.burst()),
                31 => _ = usernic_burst_truncate(self.burst(), number as u32),
                32 => {
                    let indices: Vec<u32> = (0..self.random.below(8)).map(|_| self.random.number() as u32).collect();
                    let mut sorted = indices.clone();
                    sorted.sort_unstable();
                    sorted.dedup();
                    let chosen = if number.is_multiple_of(4) { &indices } else { &sorted };
                    let count = self.count(chosen.len());
                    _ = usernic_burst_move(self.burst(), chosen.as_ptr(), count, self.burst());
                }
                33 => {
                    let len = self.random.number();
                    let len = if len > 65536 && len < u64::MAX / 2 { 65536 } else { len } as usize;
                    let at = self.random.below(8) as u32;
                    let bytes = if number == 0 {
                        null_mut()
                    } else {
                        self.bytes.as_mut_ptr()
                    };
                    if self.random.below(2) == 0 {
                        _ = usernic_burst_read(self.burst(), at, number as usize, bytes, len);
                    } else {
                        _ = usernic_burst_write(self.burst(), at, number as usize, bytes, len);
                    }
                }
                35 if number < 4 => {
                    _ = usernic_burst_clear(self.burst());
                    _ = usernic_port_announce(self.port());
                    _ = usernic_install_sigbus_guard();
                    assert_eq!(usernic_abi_version(), USERNIC_ABI_VERSION);
                    assert!(!usernic_version().is_null() && !usernic_error().is_null());
                }
                34 => _ = usernic_burst_set_len(self.burst(), self.random.below(8) as u32, number as u32),
                _ => self.scribble(),
            }
        }
        // The text is there whatever happened.
        assert!(message().len() < 10_000);
        usernic_status_text(number as i32);
    }
}

/// Bytes that are lent.
const LENT: u64 = 1 << 20;

/// Shared memory that stays until the process ends.
fn lend() -> Lent {
    // SAFETY: plain system calls; the mapping is at an address of the kernel's choice.
    unsafe {
        let fd = libc::memfd_create(c"lent".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(fd, LENT as i64), 0);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let address = libc::mmap(null_mut(), LENT as usize, protection, libc::MAP_SHARED, fd, 0);
        assert_ne!(address, libc::MAP_FAILED);
        Lent {
            address,
            length: LENT,
            offset: 0,
            page_size: 4096,
            fd,
            reserved: 0,
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// A pair of ports, and one over lent memory with its back-end, each with what it has; and the socket's number.
fn add_ports(world: &mut World, dir: &std::path::Path, number: u32) {
    let socket = dir.join(format!("s{number}"));
    let back = open(&format!("vhost,path={}", socket.display()));
    let front = open(&format!(
        "virtio-user,path={},memory=memfd,queue_size=64",
        socket.display()
    ));
    assert_eq!(usernic_port_wait_link(back, 10_000), 1);
    let queues = [queue(front), queue(back)];
    let socket = dir.join(format!("l{number}"));
    let other = open(&format!("vhost,path={}", socket.display()));
    let spec = format!("virtio-user,path={},memory=memfd,queue_size=64\0", socket.display());
    let (mut port, mut pair) = (null_mut(), null_mut());
    // SAFETY: a text, a region that stays mapped, places for the handles.
    unsafe {
        let status = usernic_lent_port_open_abi(1, spec.as_ptr().cast(), &world.lent, 1, &mut port);
        assert_eq!(status, 0, "{}", message());
        assert_eq!(usernic_lent_port_pair(port, 0, &mut pair), 0);
    }
    let reflecting = queue(other);
    world
        .handles
        .extend([other as u64, reflecting as u64, port as u64, pair as u64]);
    world.handles.extend([front as u64, back as u64]);
    world.handles.extend(queues.map(|q| q as u64));
}

fn add_bursts(world: &mut World) {
    for _ in 0..4 {
        let mut burst = null_mut();
        // SAFETY: a place for the handle.
        assert_eq!(unsafe { usernic_burst_new(16, &mut burst) }, 0);
        world.handles.push(burst as u64);
    }
}

/// Closes everything, whatever it is; how much was open.
fn close_all(handles: Vec<u64>) -> u32 {
    let mut closed = 0;
    for handle in handles {
        closed += u32::from(usernic_queue_close(handle as *mut QueueHandle) == 0);
        closed += u32::from(usernic_lent_pair_close(handle as *mut LentPairHandle) == 0);
        closed += u32::from(usernic_lent_port_close(handle as *mut LentPortHandle) == 0);
        closed += u32::from(usernic_burst_close(handle as *mut BurstHandle) == 0);
        closed += u32::from(usernic_port_close(handle as *mut PortHandle) == 0);
    }
    closed
}

impl World {
    fn new(seed: u64, socket: std::path::PathBuf) -> Self {
        World {
            random: Random(seed),
            handles: vec![0],
            socket,
            bytes: vec![0; 1 << 17],
            place: vec![0; 64],
            opened: 0,
            moved: [0; 3],
            lent: lend(),
        }
    }
}

#[test]
fn every_function_is_called() {
    let (header, source) = (include_str!("../include/usernic.h"), include_str!("fuzz.rs"));
    let words = header.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    let functions: std::collections::BTreeSet<&str> = words
        .filter(|word| word.starts_with("usernic_") && header.contains(&format!(" {word}(")))
        .collect();
    assert!(functions.len() > 40, "{functions:?}");
    // Of these the header has the bodies.
    let inline = [
        "usernic_port_open",
        "usernic_lent_port_open",
        "usernic_frame_push",
        "usernic_frame_pull",
        "usernic_frame_copy",
    ];
    let missing = functions
        .iter()
        .filter(|name| !inline.contains(name) && !source.contains(&format!("{name}(")));
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Ports, queues and pairs of rings may be in the hands of two threads: the second is told so. Bursts are of one thread.
#[test]
fn two_threads_at_the_same_handles() {
    let rounds = setting("USERNIC_FUZZ", 20_000) / 500;
    let mut moved = [0; 3];
    for round in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let mut first = World::new(round, dir.path().join("a"));
        add_ports(&mut first, dir.path(), 1);
        let mut second = World::new(!round, dir.path().join("b"));
        second.handles = first.handles.clone();
        let run = |mut world: World| {
            add_bursts(&mut world);
            (0..1500).for_each(|_| world.step());
            (world.handles, world.moved)
        };
        let (a, b) = std::thread::scope(|scope| {
            let second = scope.spawn(move || run(second));
            (run(first), second.join().unwrap())
        });
        for (handles, counts) in [a, b] {
            close_all(handles);
            (0..3).for_each(|at| moved[at] += counts[at]);
        }
    }
    assert!(moved.iter().all(|&n| n > rounds), "{moved:?}");
}

/// The ends of a time, where the call has nothing to wait for.
#[test]
fn calls_take_all_times() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let (mut out, arrived) = (Records::new(4), Records::new(4));
    for time in [i64::MAX, i64::MAX - 1, i64::from(u32::MAX) + 1, i64::MIN, -1] {
        assert_eq!(usernic_port_wait_link(pair.ports[0], time), 1);
        assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 1), 1, "{}", message());
        out.put(0, &[7; 60]);
        assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 1, "{}", message());
        assert_eq!(usernic_queue_wait(pair.queues[1], time), 1);
        pair.receive(1, &arrived, 1);
        usernic_burst_clear(arrived.handle);
        assert_eq!(usernic_queue_drain(pair.queues[0], time), 1);
    }
}

#[test]
fn no_sequence_of_calls_crashes() {
    let sequences = setting("USERNIC_FUZZ", 20_000);
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(setting("USERNIC_FUZZ_SEED", 1), dir.path().join("f"));
    let mut pairs = 0;
    let mut closed = 0;
    for sequence in 0..sequences {
        // Now and then a pair that works, for the calls to be about something.
        if sequence % 100 == 0 {
            pairs += 1;
            world.handles.truncate(100);
            add_ports(&mut world, dir.path(), pairs);
            add_bursts(&mut world);
        }
        for _ in 0..1 + world.random.below(40) {
            world.step();
        }
        if sequence % 100 == 99 {
            // All that the sequences opened is closed, whatever it is.
            closed += close_all(std::mem::take(&mut world.handles));
            world.handles.push(0);
            world.opened = 0;
        }
    }
    assert!(closed > pairs);
    assert!(world.moved.iter().all(|&n| n > sequences / 100), "{:?}", world.moved);
    // And a pair of ports works as ever.
    let pair = Pair::open(dir.path(), ["", ""]);
    let (mut out, mut arrived) = (Records::new(4), Records::new(4));
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 1), 1, "{}", message());
    out.put(0, &[7; 60]);
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 1, "{}", message());
    pair.receive(1, &arrived, 1);
    assert_eq!(arrived.bytes(0), [7; 60]);
}
