//! Queues on a back-end of ours, with mbufs of a pool that these tests play: what must hold of every mbuf, whatever the
//! other side does.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use usernic::{Burst, Port as OurPort};

mod back_end;
mod vf;

use crate::abi::{Calls, Config, Counts, Offload, Piece, Region, RxSetup, TxSetup, offload};
use crate::mbuf::Mbuf;
use crate::port::Port;
use crate::rx::{Handle, usernic_pmd_rx, usernic_pmd_rx_counts};
use crate::tx::{usernic_pmd_tx, usernic_pmd_tx_clean, usernic_pmd_tx_counts};

/// Bytes of an mbuf with its buffer, as a pktmbuf pool lays them out.
const MBUF: usize = 128;
const ROOM: usize = 128 + 2048;
const EACH: usize = 2368;
const COUNT: usize = 600;
const RINGS: usize = 1 << 20;

/// A pool in a memfd: the addresses that are free. One test at a time has it.
struct Pool {
    memory: NonNull<u8>,
    fd: std::os::fd::OwnedFd,
    free: Vec<usize>,
}

// SAFETY: it is behind a lock.
unsafe impl Send for Pool {}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);
static TURN: Mutex<()> = Mutex::new(());

fn with<T>(call: impl FnOnce(&mut Pool) -> T) -> T {
    let mut pool = POOL.lock().unwrap_or_else(|e| e.into_inner());
    call(pool.as_mut().expect("a pool"))
}

fn len() -> usize {
    (RINGS + COUNT * EACH).next_multiple_of(4096)
}

fn new_pool() {
    let fd = rustix::fs::memfd_create("pool", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, len() as u64).expect("its size");
    let file = std::fs::File::from(fd.try_clone().expect("a copy"));
    drop(file);
    // SAFETY: a fresh mapping.
    let memory = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            len(),
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::SHARED,
            &fd,
            0,
        )
    }
    .expect("a mapping");
    let memory = NonNull::new(memory.cast::<u8>()).expect("not null");
    let mut free = Vec::new();
    for index in 0..COUNT {
        let at = memory.as_ptr() as usize + RINGS + index * EACH;
        // SAFETY: in the mapping.
        unsafe {
            (at as *mut usize).write(at + MBUF);
            (at as *mut u64).add(7).write(1);
            Mbuf::new(at as *mut u8).received(0x0001_0001_0080, 0, 0);
        }
        free.push(at);
    }
    *POOL.lock().unwrap_or_else(|e| e.into_inner()) = Some(Pool { memory, fd, free });
}

unsafe extern "C" fn get(_: *mut c_void, out: *mut *mut u8, count: u32) -> i32 {
    with(|pool| {
        if pool.free.len() < count as usize {
            return 0;
        }
        for at in 0..count as usize {
            // SAFETY: there is room for so many.
            unsafe { *out.add(at) = pool.free.pop().expect("counted") as *mut u8 };
        }
        count as i32
    })
}

unsafe extern "C" fn put(_: *mut c_void, mbufs: *mut *mut u8, count: u32) {
    for at in 0..count as usize {
        // SAFETY: there are so many.
        unsafe { release(*mbufs.add(at)) };
    }
}

/// Where an mbuf of these tests has the next one of its frame.
const NEXT: usize = 64;
/// `nb_segs`.
const SEGMENTS: usize = 20;
/// `pkt_len`.
const LENGTH: usize = 36;

unsafe extern "C" fn release(mbuf: *mut u8) {
    let mut next = mbuf;
    // SAFETY: an mbuf, whose segments `append` has chained.
    for _ in 0..unsafe { mbuf.add(SEGMENTS).cast::<u16>().read() } {
        let mbuf = next;
        with(|pool| {
            assert!(!pool.free.contains(&(mbuf as usize)), "an mbuf came back twice");
            pool.free.push(mbuf as usize);
        });
        // SAFETY: as above.
        unsafe {
            next = mbuf.add(NEXT).cast::<*mut u8>().read();
            mbuf.add(SEGMENTS).cast::<u16>().write(1);
        }
    }
}

unsafe extern "C" fn append(frame: *mut u8, last: *mut u8, segment: *mut u8) {
    // SAFETY: all three are mbufs.
    unsafe {
        last.add(NEXT).cast::<*mut u8>().write(segment);
        *frame.add(SEGMENTS).cast::<u16>() += 1;
        *frame.add(LENGTH).cast::<u32>() += u32::from(Mbuf::new(segment).data_len());
    }
}

unsafe extern "C" fn received(_: *mut u8, _: *const u8, _: u32) -> i32 {
    0
}

unsafe extern "C" fn pieces(_: *mut *mut u8, _: u32, _: *mut u8, _: *mut Piece) -> u32 {
    0
}

/// One segment, and a VLAN tag where the frame asks for one.
unsafe extern "C" fn describe(frame: *mut u8, offload: *mut Offload, pieces: *mut Piece) -> u32 {
    // SAFETY: the frame is an mbuf, and there is room for what is written.
    unsafe {
        let mbuf = Mbuf::new(frame);
        offload.write(Offload {
            what: if mbuf.flags() & TX_VLAN != 0 { offload::VLAN } else { 0 },
            tag: 0x2064,
            ..Offload::default()
        });
        pieces.write(Piece {
            address: mbuf.address(),
            length: mbuf.data_len().into(),
            reserved: 0,
        });
    }
    1
}

/// Memory cannot be told of: -ENOTSUP.
static NO_REGIONS: AtomicBool = AtomicBool::new(false);

unsafe extern "C" fn regions(out: *mut Region, _: u32, _: u32) -> i32 {
    use std::os::fd::AsRawFd;
    if NO_REGIONS.load(Ordering::SeqCst) {
        return -95;
    }
    with(|pool| {
        let region = Region {
            address: pool.memory.as_ptr() as u64,
            length: len() as u64,
            offset: 0,
            fd: pool.fd.as_raw_fd(),
            grain: 0,
        };
        // SAFETY: there is room for one.
        unsafe { out.write(region) };
        1
    })
}

unsafe extern "C" fn log(_: u32, _: *const u8, _: usize) {}

static CALLS: Calls = Calls {
    get,
    put,
    release,
    append,
    received,
    pieces,
    describe,
    regions,
    log,
};

/// What DPDK knows the queues of a started port by.
struct Handles(Box<[Handle; 2]>);

impl Handles {
    fn new(queues: [*mut c_void; 2]) -> Self {
        let handle = |queue| Handle {
            running: NonNull::new(queue),
        };
        Handles(Box::new(queues.map(handle)))
    }

    fn of(&self, which: usize) -> *mut c_void {
        (&raw const self.0[which]).cast_mut().cast()
    }

    fn rx(&self) -> *mut c_void {
        self.of(0)
    }

    fn tx(&self) -> *mut c_void {
        self.of(1)
    }

    fn tx_counts(&self) -> Counts {
        let mut counts = Counts::default();
        let queue = self.0[1].running.expect("a queue").as_ptr();
        // SAFETY: the queue is of a started port.
        unsafe { usernic_pmd_tx_counts(queue, &mut counts) };
        counts
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        let queue = self.0[0].running.expect("a queue").as_ptr();
        // SAFETY: the queue is of a started port.
        unsafe { usernic_pmd_rx_counts(queue, &mut counts) };
        counts
    }
}

/// A started port and its far end.
struct Pair {
    port: Port,
    queues: Handles,
}

/// RTE_MBUF_F_TX_VLAN.
const TX_VLAN: u64 = 1 << 57;

/// One pair of queues of 256.
fn setups(fast_free: bool) -> (Config, RxSetup, TxSetup) {
    let config = Config {
        features: 0,
        pairs: 1,
        mtu: 1500,
        port: 3,
        mergeable: 0,
        extras: 0,
        hash: 0,
        rx_pairs: 1,
        reserved: 0,
    };
    let rx = RxSetup {
        pool: NonNull::<c_void>::dangling().as_ptr(),
        flags: 0,
        shift: MBUF as u32,
        room: (ROOM - 128) as u32,
        size: 256,
        batch: 32,
        headroom: 128,
        reserved: 0,
    };
    let tx = TxSetup {
        odd: 0,
        size: 256,
        keep: 64,
        fast_free: fast_free.into(),
        reserved: [0; 3],
    };
    (config, rx, tx)
}

fn start(path: &std::path::Path, keys: &str, fast_free: bool) -> Pair {
    start_as(path, keys, setups(fast_free))
}

fn start_as(path: &std::path::Path, keys: &str, (config, rx, tx): (Config, RxSetup, TxSetup)) -> Pair {
    let text = format!("virtio-user,path={}{keys}", path.display());
    let mut port = Port::open(&text, &CALLS).expect("a port");
    assert!(port.memory(&config, &[rx], &[tx]).expect("a plan") <= RINGS);
    let memory = with(|pool| pool.memory);
    let mut queues = [std::ptr::null_mut(); 2];
    // SAFETY: the memory is as long, and stays.
    unsafe { port.start(&config, &[rx], &[tx], memory, &mut queues) }.expect("a start");
    Pair {
        port,
        queues: Handles::new(queues),
    }
}

/// Frames there and back, and every mbuf is in the pool afterwards, whether the port was stopped, or its other side went.
#[test]
fn no_mbuf_is_lost() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().expect("a folder");
    for (round, keys) in ["", ",packed_vq=1", ",in_order=0", ",packed_vq=1,in_order=0"]
        .iter()
        .enumerate()
    {
        for gone in [false, true] {
            new_pool();
            let socket = dir.path().join(format!("s{round}{gone}"));
            let back = OurPort::open(&format!("vhost,path={}", socket.display())).expect("a back-end");
            let mut far = back.queue(0).expect("its queue");
            let mut pair = start(&socket, keys, round % 2 == 0);
            assert!(back.wait_link(std::time::Duration::from_secs(5)));
            let mut burst = Burst::new(32);
            let mut mbufs = [std::ptr::null_mut::<u8>(); 32];
            for turn in 0..200u32 {
                // SAFETY: the queues are of a started port.
                unsafe {
                    assert_eq!(get(std::ptr::null_mut(), mbufs.as_mut_ptr(), 32), 32, "turn {turn}");
                    for (index, &mbuf) in mbufs.iter().enumerate() {
                        let mbuf = Mbuf::new(mbuf);
                        mbuf.received(0x0001_0001_0080, 0, 60 + index as u32);
                        let data = mbuf.address() as *mut u8;
                        data.sub(12).write_bytes(0xee, 12);
                        data.write_bytes(turn as u8, 60 + index);
                    }
                    let headers = mbufs.map(|mbuf| (Mbuf::new(mbuf).address() - 12) as *const [u8; 12]);
                    assert_eq!(
                        usernic_pmd_tx(pair.queues.tx(), mbufs.as_mut_ptr(), 32),
                        32,
                        "turn {turn}"
                    );
                    for header in headers {
                        assert_eq!(header.read(), [0; 12], "a header that asks for nothing");
                    }
                }
                while far.rx(&mut burst) == 0 {}
                for (index, packet) in burst.iter().enumerate() {
                    assert_eq!(packet.bytes(), Some(&vec![turn as u8; 60 + index][..]));
                }
                while !burst.is_empty() {
                    far.tx(&mut burst);
                }
                let mut count = 0;
                while count < 32 {
                    // SAFETY: as above.
                    unsafe {
                        let n = usernic_pmd_rx(pair.queues.rx(), mbufs.as_mut_ptr(), 32);
                        for &mbuf in &mbufs[..n.into()] {
                            let frame = Mbuf::new(mbuf);
                            assert_eq!(frame.pkt_len(), 60 + count, "turn {turn}");
                            assert_eq!(frame.rearm(), 0x0003_0001_0001_0080);
                            assert_eq!(*(frame.address() as *const u8), turn as u8);
                            release(mbuf);
                            count += 1;
                        }
                    }
                }
            }
            if gone {
                drop((far, back));
                while pair.port.service() {}
                // SAFETY: as above: nothing is sent, and nothing comes.
                unsafe {
                    assert_eq!(usernic_pmd_tx(pair.queues.tx(), mbufs.as_mut_ptr(), 32), 0);
                    assert_eq!(usernic_pmd_rx(pair.queues.rx(), mbufs.as_mut_ptr(), 32), 0);
                }
            } else {
                // SAFETY: as above.
                unsafe { usernic_pmd_tx_clean(pair.queues.tx(), 0) };
            }
            pair.port.stop();
            assert_eq!(with(|pool| pool.free.len()), COUNT, "{keys} {gone}");
        }
    }
}

/// Regions that nobody takes, memory that is too small, a back-end that is not there: errors that say so.
#[test]
fn errors_say_what_to_do() {
    let missing = Port::open("virtio-user,path=/nonexistent/s", &CALLS)
        .err()
        .expect("an error");
    assert!(missing.text.contains("/nonexistent/s"), "{}", missing.text);
    assert_eq!(missing.errno, rustix::io::Errno::NOENT);
    let unknown = Port::open("virtio-user,path=/s,queue=2", &CALLS)
        .err()
        .expect("an error");
    assert!(unknown.text.contains("queue"), "{}", unknown.text);
    assert_eq!(unknown.errno, rustix::io::Errno::INVAL);
}
