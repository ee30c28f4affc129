//! Ports over memory of the caller: buffers by address, length and cookie.

use std::ffi::{c_char, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use usernic::memory::Automatic;
use usernic::spec::PortSpec;
use usernic::{Buffer as RingBuffer, LentMemory, LentPair, LentPort, LentRegion, Stats};

use crate::check;
use crate::port::{Counts, time};
use crate::status::{Fault, Outcome, Status, USERNIC_ABI_VERSION, shield};
use crate::table::Table;

/// A port over lent memory, as a handle: not to be followed.
pub struct LentPortHandle(());

/// A pair of rings of such a port, as a handle: not to be followed.
pub struct LentPairHandle(());

/// Bytes before each buffer's address that belong to the library and the other side while it is posted or sent.
pub const USERNIC_LENT_HEADER: u32 = 12;

/// Buffers of a call, and regions of a port, at the most.
pub const USERNIC_LENT_MAX: u32 = 32768;

/// A piece of shared memory that the program lends to a port.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Lent {
    /// Where it is mapped.
    pub address: *mut c_void,
    /// Bytes of it.
    pub length: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes of a page of the file: address, length and offset are multiples of it.
    pub page_size: u64,
    /// The file: a memfd, or one of tmpfs or hugetlbfs. The library makes a copy of the descriptor.
    pub fd: i32,
    /// Zero.
    pub reserved: u32,
}

/// A buffer in lent memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The frame's first byte, with USERNIC_LENT_HEADER bytes before it. Null in what comes back.
    pub address: *mut c_void,
    /// Whatever the program knows it by.
    pub cookie: u64,
    /// Bytes of the frame; of a buffer to receive into, bytes that it holds.
    pub length: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Lent>() == 40 && size_of::<Buffer>() == 24);
const _: () = assert!(USERNIC_LENT_HEADER as usize == LentPair::HEADER);

struct Pair {
    pair: LentPair,
    memory: LentMemory,
    counts: Stats,
}

static PORTS: Table<LentPort> = Table::new(4, "port over lent memory");
static PAIRS: Table<Pair> = Table::new(5, "pair of rings");

/// A buffer that was checked, on its way into a ring.
struct Checked(Buffer);

// SAFETY: the caller gives the buffer to the ring until its cookie comes back; its address was found in a lent region.
unsafe impl RingBuffer for Checked {
    #[inline(always)]
    fn address(&self) -> u64 {
        self.0.address as u64
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.length
    }

    #[inline(always)]
    fn write_header(&mut self, len: usize) {
        debug_assert_eq!(len, LentPair::HEADER);
        // SAFETY: `holds` found these bytes in a region that the caller keeps mapped.
        unsafe { self.0.address.cast::<u8>().sub(len).write_bytes(0, len) };
    }

    #[inline(always)]
    fn next(&self) -> Option<Self> {
        None
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.0.cookie
    }
}

fn count_of(count: u32) -> Outcome<usize> {
    if count > USERNIC_LENT_MAX {
        return Err(Fault::new(
            Status::Argument,
            format_args!("{count} at a time: {USERNIC_LENT_MAX} at the most"),
        ));
    }
    Ok(count as usize)
}

/// The caller's array, each element read once.
///
/// # Safety
/// `buffers` has `count` elements.
#[inline(always)]
unsafe fn each(buffers: *const Buffer, count: usize) -> impl Iterator<Item = Buffer> {
    // SAFETY: by the caller.
    (0..count).map(move |at| unsafe { buffers.add(at).read() })
}

/// Hands buffers to a ring, up to the first that is not in lent memory or that the ring does not take: an error if that is
/// the first of all. How many the ring took, and their bytes.
#[inline(always)]
fn feed<const SEND: bool>(
    pair: &mut LentPair,
    memory: &LentMemory,
    mut buffers: impl Iterator<Item = Buffer>,
) -> Outcome<(usize, u64)> {
    let mut bad = None;
    let least = pair.least_room();
    let device = least > 1;
    let checked = std::iter::from_fn(|| {
        let buffer = buffers.next()?;
        let len = buffer.length;
        let fits = len > 0
            && len <= i32::MAX as u32
            && (!device
                || if SEND {
                    LentPair::device_takes(len)
                } else {
                    len >= least
                })
            && memory.holds(buffer.address as u64, len);
        if !fits {
            bad = Some(buffer);
            return None;
        }
        Some(Checked(buffer))
    })
    .fuse();
    let (taken, bytes) = if SEND {
        pair.send(checked)
    } else {
        (pair.post(checked), 0)
    };
    match bad {
        Some(buffer) if taken == 0 => Err(not_taken(buffer, memory, least)),
        _ => Ok((taken, bytes)),
    }
}

#[cold]
fn not_taken(buffer: Buffer, memory: &LentMemory, least: u32) -> Fault {
    if buffer.length > 0 && memory.holds(buffer.address as u64, buffer.length) {
        let text = format_args!(
            "{} bytes at {:p}: a device receives into buffers of {least} bytes at least, and sends frames of 17 to 9728",
            buffer.length, buffer.address
        );
        return Fault::new(Status::Room, text);
    }
    Fault::new(
        Status::Room,
        format_args!(
            "{} bytes at {:p}, and {USERNIC_LENT_HEADER} before them, are not in lent memory",
            buffer.length, buffer.address
        ),
    )
}

/// Opens a port over memory that the program lends: `count` regions. C programs call usernic_lent_port_open(). The spec is of
/// kind virtio-user, without server=1, mrg_rxbuf=1 and offloads, or of kind vf, without csum=1 and vlan_strip=1. A
/// device finds the regions at the addresses that they have here; buffers that it receives into have buffer_size bytes at
/// least, and frames that do not fit one are dropped. A link that is lost stays lost: close the port and open it anew.
///
/// # Safety
/// `spec` is a text, `regions` has `count` elements, `out` can be written. The regions stay mapped until the port is
/// closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_port_open_abi(
    abi: u32,
    spec: *const c_char,
    regions: *const Lent,
    count: u32,
    out: *mut *mut LentPortHandle,
) -> i32 {
    shield(|| {
        if abi != USERNIC_ABI_VERSION {
            return Err(Fault::new(
                Status::Abi,
                format_args!(
                    "the program was made for version {abi} of the interface, this library has {USERNIC_ABI_VERSION}"
                ),
            ));
        }
        check::pointer(out, "usernic_lent_port_open: out")?;
        check::pointer(regions, "usernic_lent_port_open: regions")?;
        // SAFETY: by the caller.
        let text = unsafe { check::text(spec, "usernic_lent_port_open: spec") }?;
        let spec: PortSpec = text.parse().map_err(|e| Fault::from(usernic::Error::Spec(e)))?;
        let lent = (0..count_of(count)?)
            // SAFETY: by the caller.
            .map(|at| region(at, unsafe { regions.add(at).read() }))
            .collect::<Outcome<Vec<_>>>()?;
        let mut memory = Automatic::from_spec(&spec);
        // SAFETY: the caller keeps the regions mapped.
        let port = unsafe { LentPort::open(&spec, &lent, &mut memory) }?;
        let handle = PORTS.insert(port)?;
        // SAFETY: by the caller.
        unsafe { out.write(handle as *mut LentPortHandle) };
        Ok(0)
    })
}

fn region(index: usize, lent: Lent) -> Outcome<LentRegion> {
    let bad = |why: &str| Err(Fault::new(Status::Argument, format_args!("region {index}: {why}")));
    let Some(address) = NonNull::new(lent.address.cast::<u8>()) else {
        return bad("its address is null");
    };
    let (Ok(len), Ok(page)) = (usize::try_from(lent.length), usize::try_from(lent.page_size)) else {
        return bad("it is too long");
    };
    if lent.fd < 0 {
        return bad("its fd is below 0");
    }
    // SAFETY: borrowed for the copying alone; a number that is no open descriptor is an error of that.
    let fd = unsafe { BorrowedFd::borrow_raw(lent.fd) }
        .try_clone_to_owned()
        .map_err(|e| Fault::new(Status::Argument, format_args!("region {index}: fd {}: {e}", lent.fd)))?;
    Ok(LentRegion {
        fd,
        offset: lent.offset,
        address,
        len,
        page,
    })
}

/// Closes a port over lent memory: the other side stops. When this returns, all buffers are the program's again. Its pairs
/// are still to be closed.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_port_close(port: *mut LentPortHandle) -> i32 {
    shield(|| PORTS.remove(port as u64).map(|_| 0))
}

/// Whether the other side is there: 1, or 0. On a port of kind vf to be called a few times a second: it is then that the
/// device is looked after.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_port_link(port: *mut LentPortHandle) -> i32 {
    shield(|| PORTS.with(port as u64, |port| Ok(port.link().into())))
}

/// Pairs of rings of the port.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_port_pair_count(port: *mut LentPortHandle) -> i32 {
    shield(|| PORTS.with(port as u64, |port| Ok(port.queue_count().into())))
}

/// Takes pair `index`, from 0: once.
///
/// # Safety
/// `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_port_pair(
    port: *mut LentPortHandle,
    index: u16,
    out: *mut *mut LentPairHandle,
) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_lent_port_pair: out")?;
        let pair = PORTS.with(port as u64, |port| Ok(port.queue(index)?))?;
        let handle = PAIRS.insert(Pair {
            memory: pair.memory(),
            pair,
            counts: Stats::default(),
        })?;
        // SAFETY: by the caller.
        unsafe { out.write(handle as *mut LentPairHandle) };
        Ok(0)
    })
}

/// Gives up a pair. What it has posted or sent stays the other side's until the port is closed.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_pair_close(pair: *mut LentPairHandle) -> i32 {
    shield(|| PAIRS.remove(pair as u64).map(|_| 0))
}

fn open(pair: *mut LentPairHandle, call: impl FnOnce(&mut Pair) -> Outcome<i32>) -> Outcome<i32> {
    PAIRS.with(pair as u64, |pair| {
        if !pair.pair.is_open() {
            return Err(Fault::fixed(Status::Closed, "the pair's port was closed"));
        }
        call(pair)
    })
}

/// Posts buffers to receive into, from the front, as far as the ring has room; how many. At a buffer that is not in lent
/// memory it stops: an error if that is the first.
///
/// # Safety
/// `buffers` has `count` elements. Nobody else uses their bytes until their cookies come back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_pair_post(pair: *mut LentPairHandle, buffers: *const Buffer, count: u32) -> i32 {
    shield(|| {
        check::pointer(buffers, "usernic_lent_pair_post: buffers")?;
        let count = count_of(count)?;
        open(pair, |Pair { pair, memory, .. }| {
            // SAFETY: by the caller.
            let buffers = unsafe { each(buffers, count.min(pair.rx_free())) };
            let (posted, _) = feed::<false>(pair, memory, buffers)?;
            Ok(posted as i32)
        })
    })
}

/// Sends frames, from the front, as far as the ring has room; how many. At a frame that is not in lent memory it stops: an
/// error if that is the first.
///
/// # Safety
/// `buffers` has `count` elements. Nobody else uses their bytes until their cookies come back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_pair_send(pair: *mut LentPairHandle, buffers: *const Buffer, count: u32) -> i32 {
    shield(|| {
        check::pointer(buffers, "usernic_lent_pair_send: buffers")?;
        let count = count_of(count)?;
        open(pair, |Pair { pair, memory, counts }| {
            // SAFETY: by the caller.
            let buffers = unsafe { each(buffers, count.min(pair.tx_free())) };
            let (sent, bytes) = feed::<true>(pair, memory, buffers)?;
            counts.tx_packets += sent as u64;
            counts.tx_bytes += bytes;
            Ok(sent as i32)
        })
    })
}

/// Takes up to `count` buffers that frames have come into; how many. Cookie and length are given, 0 for what was no frame, or
/// one that is too short or too long for the port.
///
/// # Safety
/// `out` has `count` elements that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_pair_receive(pair: *mut LentPairHandle, out: *mut Buffer, count: u32) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_lent_pair_receive: out")?;
        let count = count_of(count)?;
        open(pair, |Pair { pair, counts, .. }| {
            let mut at = out;
            let received = pair.receive(count, |cookie, length| {
                counts.rx_packets += u64::from(length > 0);
                counts.rx_errors += u64::from(length == 0);
                counts.rx_bytes += u64::from(length);
                // SAFETY: no more than `count` come, and so many can be written.
                unsafe {
                    at.write(Buffer {
                        address: std::ptr::null_mut(),
                        cookie,
                        length,
                        reserved: 0,
                    });
                    at = at.add(1);
                }
            });
            Ok(received as i32)
        })
    })
}

/// Takes the cookies of up to `count` frames that the other side has taken; how many.
///
/// # Safety
/// `out` has `count` elements that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_pair_sent(pair: *mut LentPairHandle, out: *mut u64, count: u32) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_lent_pair_sent: out")?;
        let count = count_of(count)?;
        open(pair, |Pair { pair, .. }| {
            let mut at = out;
            let sent = pair.sent(count, |cookie| {
                // SAFETY: no more than `count` come, and so many can be written.
                unsafe {
                    at.write(cookie);
                    at = at.add(1);
                }
            });
            Ok(sent as i32)
        })
    })
}

/// A file descriptor that is readable when the other side has notified of frames since usernic_lent_pair_arm(). It is the
/// pair's: neither read nor close it.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_pair_fd(pair: *mut LentPairHandle) -> i32 {
    shield(|| open(pair, |Pair { pair, .. }| Ok(pair.as_fd().as_raw_fd())))
}

/// Asks the other side to notify at the next frame. 1: frames are there already, do not sleep. Undone by
/// usernic_lent_pair_disarm().
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_pair_arm(pair: *mut LentPairHandle) -> i32 {
    shield(|| open(pair, |Pair { pair, .. }| Ok(pair.arm().into())))
}

/// Asks for no more notifications, and takes those that came. 1: frames are there.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_pair_disarm(pair: *mut LentPairHandle) -> i32 {
    shield(|| open(pair, |Pair { pair, .. }| Ok(pair.disarm().into())))
}

/// Sleeps until frames have come or `milliseconds` are over (below 0: without end). 1: frames are there. It does not see
/// that the link was lost: usernic_lent_port_link() does.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_lent_pair_wait(pair: *mut LentPairHandle, milliseconds: i64) -> i32 {
    shield(|| {
        open(pair, |Pair { pair, .. }| {
            let there = pair.wait(time(milliseconds));
            there
                .map(i32::from)
                .map_err(|error| Fault::new(Status::System, format_args!("waiting for frames: {error}")))
        })
    })
}

/// What the pair has done, in a struct of `size` bytes (sizeof *out).
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_lent_pair_counts(pair: *mut LentPairHandle, out: *mut Counts, size: usize) -> i32 {
    shield(|| {
        PAIRS.with(pair as u64, |Pair { pair, counts, .. }| {
            counts.anomalies = pair.anomalies();
            counts.kicks = pair.kicks();
            let mut told = *counts;
            (told.rx_runts, told.rx_oversize) = (pair.runts(), pair.oversize());
            // Each of those came back with a length of 0, as what was no frame at all.
            told.rx_errors -= told.rx_runts + told.rx_oversize;
            // SAFETY: by the caller; the struct has no padding.
            unsafe { check::put(told.into(), out, size, "usernic_lent_pair_counts") }?;
            Ok(0)
        })
    })
}
