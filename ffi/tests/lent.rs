//! Ports over memory of the caller, against a back-end of this library in the same process.

mod common;

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{null, null_mut};

use common::{Records, message, open, queue};
use usernic_ffi::*;

const PAGE: usize = 4096;
const SIZE: usize = 1 << 20;

/// A memfd, mapped.
struct Memory {
    fd: OwnedFd,
    address: *mut u8,
}

impl Memory {
    fn new() -> Self {
        // SAFETY: plain system calls; the descriptor is fresh, the mapping at an address of the kernel's choice.
        unsafe {
            let fd = OwnedFd::from_raw_fd(libc::memfd_create(c"lent".as_ptr(), libc::MFD_CLOEXEC));
            assert_eq!(libc::ftruncate(fd.as_raw_fd(), SIZE as i64), 0);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let address = libc::mmap(null_mut(), SIZE, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0);
            assert_ne!(address, libc::MAP_FAILED);
            Memory {
                fd,
                address: address.cast(),
            }
        }
    }

    fn region(&self) -> Lent {
        Lent {
            address: self.address.cast(),
            length: SIZE as u64,
            offset: 0,
            page_size: PAGE as u64,
            fd: self.fd.as_raw_fd(),
            reserved: 0,
        }
    }

    /// Buffer `index`, of 2048 bytes with its header.
    fn buffer(&self, index: usize, length: u32) -> Buffer {
        Buffer {
            // SAFETY: inside the mapping.
            address: unsafe { self.address.add(index * 2048 + 64) }.cast(),
            cookie: 0xC00C_1E00_0000_0000 | index as u64,
            length,
            reserved: 0,
        }
    }

    fn bytes(&self, index: usize, length: usize) -> Vec<u8> {
        // SAFETY: inside the mapping; the other side is done with the buffer.
        unsafe { std::slice::from_raw_parts(self.address.add(index * 2048 + 64), length) }.to_vec()
    }

    fn write(&self, index: usize, bytes: &[u8]) {
        assert!(bytes.len() <= 2048 - 64);
        // SAFETY: inside the mapping; nobody has the buffer.
        unsafe {
            self.address
                .add(index * 2048 + 64)
                .copy_from(bytes.as_ptr(), bytes.len())
        };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; ports over it are closed.
        unsafe { libc::munmap(self.address.cast(), SIZE) };
    }
}

fn try_open(spec: &str, regions: &[Lent]) -> Result<*mut LentPortHandle, i32> {
    let spec = CString::new(spec).unwrap();
    let mut port = null_mut();
    // SAFETY: a text, an array of that length (never null), a place for the handle.
    let status = unsafe {
        let regions = (regions.as_ptr(), regions.len() as u32);
        usernic_lent_port_open_abi(USERNIC_ABI_VERSION, spec.as_ptr(), regions.0, regions.1, &mut port)
    };
    if status == 0 { Ok(port) } else { Err(status) }
}

struct Both {
    memory: Memory,
    back: *mut PortHandle,
    back_queue: *mut QueueHandle,
    port: *mut LentPortHandle,
    pair: *mut LentPairHandle,
    _dir: tempfile::TempDir,
}

impl Both {
    fn open(keys: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let back = open(&format!("vhost,path={}", path.display()));
        let memory = Memory::new();
        let spec = format!("virtio-user,path={},memory=memfd{keys}", path.display());
        let port = try_open(&spec, &[memory.region()]).unwrap_or_else(|_| panic!("{}", message()));
        assert_eq!(usernic_port_wait_link(back, 10_000), 1);
        assert_eq!(usernic_lent_port_link(port), 1);
        let mut pair = null_mut();
        // SAFETY: a place for the handle.
        let status = unsafe { usernic_lent_port_pair(port, 0, &mut pair) };
        assert_eq!(status, 0, "{}", message());
        Both {
            memory,
            back,
            back_queue: queue(back),
            port,
            pair,
            _dir: dir,
        }
    }

    fn post(&self, buffers: &[Buffer]) -> i32 {
        // SAFETY: so many buffers, which nobody uses.
        unsafe { usernic_lent_pair_post(self.pair, buffers.as_ptr(), buffers.len() as u32) }
    }

    fn send(&self, buffers: &[Buffer]) -> i32 {
        // SAFETY: as above.
        unsafe { usernic_lent_pair_send(self.pair, buffers.as_ptr(), buffers.len() as u32) }
    }

    fn receive(&self, count: usize) -> Vec<Buffer> {
        let mut got = Vec::new();
        let mut out = [self.memory.buffer(0, 0); 8];
        for _ in 0..1000 {
            // SAFETY: 8 elements.
            let n = unsafe { usernic_lent_pair_receive(self.pair, out.as_mut_ptr(), 8) };
            assert!(n >= 0, "{}", message());
            got.extend_from_slice(&out[..n as usize]);
            if got.len() >= count {
                break;
            }
            assert!(usernic_lent_pair_wait(self.pair, 10) >= 0);
        }
        got
    }

    fn sent(&self, count: usize) -> Vec<u64> {
        let mut got = Vec::new();
        let mut out = [0; 8];
        for _ in 0..1000 {
            // SAFETY: 8 elements.
            let n = unsafe { usernic_lent_pair_sent(self.pair, out.as_mut_ptr(), 8) };
            assert!(n >= 0, "{}", message());
            got.extend_from_slice(&out[..n as usize]);
            if got.len() >= count {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        got
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        usernic_lent_port_close(self.port);
        usernic_lent_pair_close(self.pair);
        usernic_queue_close(self.back_queue);
        usernic_port_close(self.back);
    }
}

fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 3 + number) as u8).collect()
}

fn there_and_back(keys: &str) {
    let both = Both::open(keys);
    let mut arrived = Records::new(32);
    let mut rounds = 0;
    // More rounds than the ring has entries.
    for round in 0..300 {
        let posted: Vec<Buffer> = (100..104).map(|index| both.memory.buffer(index, 1500)).collect();
        assert_eq!(both.post(&posted), 4, "{}", message());
        let sending: Vec<Buffer> = (0..4)
            .map(|index| {
                let bytes = frame(round + index, 60 + round + index);
                both.memory.write(index, &bytes);
                both.memory.buffer(index, bytes.len() as u32)
            })
            .collect();
        assert_eq!(both.send(&sending), 4, "{}", message());
        while arrived.count() < 4 {
            if usernic_queue_rx(both.back_queue, arrived.handle) == 0 {
                usernic_queue_wait(both.back_queue, 10);
            }
        }
        for index in 0..4 {
            assert_eq!(arrived.bytes(index), frame(round + index, 60 + round + index));
        }
        assert_eq!(both.sent(4), sending.iter().map(|b| b.cookie).collect::<Vec<_>>());
        assert_eq!(usernic_queue_tx(both.back_queue, arrived.handle), 4);
        let back = both.receive(4);
        assert_eq!(back.len(), 4);
        for (index, buffer) in back.iter().enumerate() {
            assert_eq!(buffer.cookie, posted[index].cookie);
            assert_eq!(buffer.length as usize, 60 + round + index);
            let bytes = both.memory.bytes(100 + index, buffer.length as usize);
            assert_eq!(bytes, frame(round + index, 60 + round + index));
        }
        rounds += 4;
    }
    let mut counts = std::mem::MaybeUninit::<Counts>::zeroed();
    // SAFETY: a place of that size, zeroed, of plain numbers.
    let counts = unsafe {
        let size = size_of::<Counts>();
        assert_eq!(usernic_lent_pair_counts(both.pair, counts.as_mut_ptr(), size), 0);
        counts.assume_init()
    };
    assert_eq!(
        (counts.rx_packets, counts.tx_packets, counts.anomalies),
        (rounds, rounds, 0)
    );
}

/// A buffer comes back, and what came into it is no frame: too short, or too long for the port.
#[test]
fn runts_and_oversize_frames_have_no_length() {
    let both = Both::open(",queue_size=64,mtu=600");
    let posted: Vec<Buffer> = (0..8).map(|index| both.memory.buffer(index, 1900)).collect();
    assert_eq!(both.post(&posted), 8, "{}", message());
    let mut out = Records::new(8);
    let lengths = [60, 5, 14, 0, 13, 618, 700, 1514];
    assert_eq!(usernic_queue_alloc(both.back_queue, out.handle, 8), 8);
    for (index, len) in lengths.into_iter().enumerate() {
        out.put(index, &frame(index, len));
    }
    assert_eq!(usernic_queue_tx(both.back_queue, out.handle), 8, "{}", message());
    let arrived: Vec<u32> = both.receive(8).iter().map(|buffer| buffer.length).collect();
    assert_eq!(arrived, [60, 0, 14, 0, 0, 618, 0, 0]);
    let mut counts = std::mem::MaybeUninit::<Counts>::zeroed();
    // SAFETY: a place of that size, zeroed, of plain numbers.
    let counts = unsafe {
        let size = size_of::<Counts>();
        assert_eq!(usernic_lent_pair_counts(both.pair, counts.as_mut_ptr(), size), 0);
        counts.assume_init()
    };
    assert_eq!((counts.rx_runts, counts.rx_oversize, counts.rx_errors), (3, 2, 0));
    assert_eq!((counts.rx_packets, counts.rx_bytes), (3, 60 + 14 + 618));
}

#[test]
fn buffers_go_there_and_back_split() {
    there_and_back(",queue_size=64");
}

#[test]
fn buffers_go_there_and_back_packed() {
    there_and_back(",queue_size=64,packed_vq=1");
}

#[test]
fn what_is_not_lent_is_refused() {
    let both = Both::open("");
    let good = both.memory.buffer(3, 100);
    let begin = both.memory.address;
    // SAFETY: addresses alone, of which nobody reads or writes anything.
    let end = unsafe { begin.add(SIZE) };
    let at = |address: *mut u8, length| Buffer {
        address: address.cast(),
        length,
        ..good
    };
    for bad in [
        at(null_mut(), 100),
        at(begin, 100),
        at(begin.wrapping_add(11), 100),
        at(end.wrapping_sub(99), 100),
        at(end, 1),
        at(end.wrapping_add(12), 1),
        at(begin.wrapping_add(12), 0),
        at(begin.wrapping_add(12), SIZE as u32 - 11),
        at(begin.wrapping_add(12), u32::MAX),
        at(usize::MAX as *mut u8, 100),
    ] {
        assert_eq!(both.post(&[bad]), Status::Room as i32, "{bad:?}");
        assert!(message().contains("not in lent memory"), "{}", message());
        assert_eq!(both.send(&[bad]), Status::Room as i32, "{bad:?}");
        // Those before it are taken.
        assert_eq!(both.post(&[good, bad, good]), 1);
    }
    assert_eq!(both.post(&[at(begin.wrapping_add(12), SIZE as u32 - 12)]), 1);
    // SAFETY: null is refused.
    unsafe {
        assert_eq!(usernic_lent_pair_post(both.pair, null(), 1), Status::Pointer as i32);
        assert_eq!(usernic_lent_pair_sent(both.pair, null_mut(), 1), Status::Pointer as i32);
        let status = usernic_lent_pair_receive(both.pair, (&raw const good).cast_mut(), u32::MAX);
        assert_eq!(status, Status::Argument as i32);
    }
    // A full ring takes no more.
    let many = vec![good; 300];
    assert_eq!(both.post(&many), 256 - 11);
    assert_eq!(both.post(&many), 0);
}

#[test]
fn regions_that_cannot_be_lent_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let back = open(&format!("vhost,path={}", path.display()));
    let memory = Memory::new();
    let good = memory.region();
    let spec = format!("virtio-user,path={},memory=memfd", path.display());
    type Change = fn(&mut Lent);
    let cases: [(Change, &str); 10] = [
        (|r| r.address = null_mut(), "null"),
        (|r| r.length = 0, "0 bytes"),
        (|r| r.length += 1, "multiples"),
        (|r| r.address = r.address.wrapping_byte_add(1), "multiples"),
        (|r| r.offset = 7, "multiples"),
        (|r| r.page_size = 0, "pages of 0"),
        (|r| r.page_size = 5000, "pages of 5000"),
        (|r| r.offset = PAGE as u64, "of a file of 1048576 bytes"),
        (|r| r.fd = -1, "below 0"),
        (|r| r.fd = 100_000, "fd 100000"),
    ];
    for (change, text) in cases {
        let mut bad = good;
        change(&mut bad);
        assert_eq!(
            try_open(&spec, &[good, bad]).err(),
            Some(Status::Argument as i32),
            "{text}"
        );
        assert!(
            message().contains("region 1") && message().contains(text),
            "{}",
            message()
        );
    }
    assert_eq!(try_open(&spec, &[good, good]).err(), Some(Status::Argument as i32));
    assert!(message().contains("overlaps region 0"), "{}", message());
    assert_eq!(try_open(&spec, &[]).err(), Some(Status::Argument as i32));
    for key in ["server=1", "mrg_rxbuf=1", "csum=1"] {
        let status = try_open(&format!("{spec},{key}"), &[good]).err();
        assert_eq!(status, Some(Status::Unsupported as i32), "{key}: {}", message());
    }
    let status = try_open(&format!("vhost,path={}2", path.display()), &[good]).err();
    assert_eq!(status, Some(Status::Unsupported as i32));
    assert_eq!(usernic_port_close(back), 0);
}

#[test]
fn a_port_that_is_closed_or_lost_says_so() {
    let both = Both::open("");
    let buffer = both.memory.buffer(0, 100);
    assert_eq!(both.post(&[buffer]), 1);
    let mut again = null_mut();
    // SAFETY: a place for the handle.
    unsafe {
        assert_eq!(usernic_lent_port_pair(both.port, 0, &mut again), Status::Taken as i32);
        assert_eq!(
            usernic_lent_port_pair(both.port, 1, &mut again),
            Status::Argument as i32
        );
    }
    // Kinds of handles are told apart.
    assert_eq!(usernic_lent_port_close(both.back.cast()), Status::Handle as i32);
    assert_eq!(usernic_port_close(both.port.cast()), Status::Handle as i32);
    assert_eq!(usernic_lent_pair_close(both.back_queue.cast()), Status::Handle as i32);

    assert_eq!(usernic_port_close(both.back), 0);
    assert_eq!(usernic_lent_port_link(both.port), 0);
    assert_eq!(usernic_lent_pair_wait(both.pair, 0), 0);
    assert_eq!(usernic_lent_port_close(both.port), 0);
    assert_eq!(both.post(&[buffer]), Status::Closed as i32);
    assert_eq!(both.send(&[buffer]), Status::Closed as i32);
    assert_eq!(usernic_lent_pair_fd(both.pair), Status::Closed as i32);
    assert_eq!(usernic_lent_pair_close(both.pair), 0);
    assert_eq!(both.post(&[buffer]), Status::Handle as i32);
}
