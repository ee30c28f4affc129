//! Bursts: packets that move together, with an array of records that C reads and writes without a call.

use std::ptr::NonNull;

use usernic::Burst;

use crate::check;
use crate::frame::{Frame, describe, grant, settle};
use crate::status::{Fault, Outcome, Status, shield};
use crate::table::Table;

/// A burst, as a handle: not to be followed.
pub struct BurstHandle(());

/// Frames of a burst at the most.
pub const USERNIC_BURST_MAX: u32 = 32768;

/// What a burst holds: kept up to date by every call with the burst. To be read only.
#[repr(C)]
#[derive(Debug)]
pub struct Frames {
    /// The first of count records; they stay where they are until the burst is closed.
    pub frame: *mut Frame,
    /// Frames that are there.
    pub count: u32,
    /// Frames that there is room for.
    pub capacity: u32,
}

/// A burst and its records. Records are C's, too: they are reached by raw pointers alone.
pub(crate) struct Bundle {
    pub(crate) burst: Burst,
    view: NonNull<Frames>,
    frames: NonNull<Frame>,
    /// The port that the packets are of; 0 if there are none.
    pub(crate) home: u64,
}

// SAFETY: what the pointers lead to is the bundle's own.
unsafe impl Send for Bundle {}

pub(crate) static BURSTS: Table<Bundle> = Table::new(3, "burst");

impl Bundle {
    fn new(capacity: usize) -> Self {
        let burst = Burst::new(capacity);
        let capacity = burst.capacity();
        let none = Frame {
            data: std::ptr::null_mut(),
            len: 0,
            room: 0,
            headroom: 0,
            flags: 0,
            checksum_start: 0,
            checksum_offset: 0,
            segment_size: 0,
            segment_kind: 0,
            reserved: [0; 2],
        };
        let frames = NonNull::from(Box::leak(vec![none; capacity].into_boxed_slice())).cast();
        let view = Frames {
            frame: frames.as_ptr(),
            count: 0,
            capacity: capacity as u32,
        };
        Bundle {
            burst,
            view: NonNull::from(Box::leak(Box::new(view))),
            frames,
            home: 0,
        }
    }

    /// Writes the records from `start` on.
    #[inline(always)]
    pub(crate) fn refresh(&mut self, start: usize) {
        let count = self.burst.len();
        let mut at = self.frames.as_ptr().wrapping_add(start);
        for packet in &self.burst[start..] {
            // SAFETY: below the capacity, which the array has.
            unsafe { describe(packet, at) };
            at = at.wrapping_add(1);
        }
        if count == 0 {
            self.home = 0;
        }
        // SAFETY: the view is ours.
        unsafe { (&raw mut (*self.view.as_ptr()).count).write(count as u32) };
    }

    /// Lets in packets of a port: of one at a time.
    #[inline(always)]
    pub(crate) fn admit(&mut self, home: u64) -> Outcome<()> {
        if self.burst.room() == 0 {
            return Err(Fault::fixed(Status::Room, "the burst is full: send or clear it first"));
        }
        if self.home != 0 && self.home != home {
            return Err(Fault::fixed(
                Status::Argument,
                "the burst holds packets of another port: take a burst for each port, or clear it first",
            ));
        }
        self.home = home;
        Ok(())
    }

    fn record(&self, index: usize) -> Frame {
        debug_assert!(index < self.burst.len());
        // SAFETY: below the length, and so written; whatever C put there are valid numbers.
        unsafe { self.frames.add(index).read() }
    }

    /// Takes over what the program made of the records, and does what it asks for.
    #[inline(always)]
    pub(crate) fn settle(&mut self) -> Outcome<()> {
        let mut asks = 0;
        let frames = self.frames;
        for (index, packet) in self.burst.iter_mut().enumerate() {
            // SAFETY: below the length, and so written; whatever C put there are valid numbers.
            let frame = unsafe { frames.add(index).read() };
            asks |= settle(index, packet, &frame)?;
        }
        if asks == 0 { Ok(()) } else { self.grant() }
    }

    #[cold]
    #[inline(never)]
    fn grant(&mut self) -> Outcome<()> {
        let frames = self.frames;
        let granted = grant(&mut self.burst, |index| {
            // SAFETY: below the length, and so written.
            let frame = unsafe { frames.add(index).read() };
            (frame.flags, frame.segment_size)
        });
        if granted.is_ok() {
            self.refresh(0);
        }
        granted
    }

    /// Takes over what the program made of one record.
    fn settle_one(&mut self, index: usize) -> Outcome<()> {
        let frame = self.record(index);
        settle(index, &mut self.burst[index], &frame).map(|_| ())
    }

    /// Writes one record anew, but for what the program asks.
    fn renew(&mut self, index: usize) {
        let old = self.record(index);
        let asks = old.flags & crate::frame::ASKS;
        // SAFETY: below the length.
        unsafe {
            let record = self.frames.add(index).as_ptr();
            describe(&self.burst[index], record);
            if asks != 0 {
                (*record).flags |= asks;
                (*record).segment_size = old.segment_size;
            }
        }
    }

    fn index(&self, index: u32) -> Outcome<usize> {
        let count = self.burst.len();
        if (index as usize) < count {
            Ok(index as usize)
        } else {
            Err(Fault::new(
                Status::Argument,
                format_args!("frame {index} of a burst of {count}"),
            ))
        }
    }

    /// Forgets the first packets: they are freed.
    pub(crate) fn drop_front(&mut self, count: usize) {
        let left = self.burst.len() - count;
        self.burst.rotate_left(count);
        self.burst.truncate(left);
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let capacity = self.burst.capacity();
        // SAFETY: both were leaked boxes, of these sizes.
        unsafe {
            drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(
                self.frames.as_ptr(),
                capacity,
            )));
            drop(Box::from_raw(self.view.as_ptr()));
        }
    }
}

fn id(burst: *const BurstHandle) -> u64 {
    burst as u64
}

/// Makes an empty burst for `capacity` frames, 1 to USERNIC_BURST_MAX.
///
/// # Safety
/// `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_burst_new(capacity: u32, out: *mut *mut BurstHandle) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_burst_new: out")?;
        if !(1..=USERNIC_BURST_MAX).contains(&capacity) {
            return Err(Fault::new(
                Status::Argument,
                format_args!("a burst of {capacity} frames: 1 to {USERNIC_BURST_MAX}"),
            ));
        }
        let handle = BURSTS.insert(Bundle::new(capacity as usize))?;
        // SAFETY: by the caller.
        unsafe { out.write(handle as *mut BurstHandle) };
        Ok(0)
    })
}

/// Closes a burst and frees what is in it. Its records are gone with it.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_burst_close(burst: *mut BurstHandle) -> i32 {
    shield(|| BURSTS.remove(id(burst)).map(|_| 0))
}

/// Where the burst's records are, until it is closed: to be asked once. Null if there is no such burst.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_burst_frames(burst: *mut BurstHandle) -> *const Frames {
    let mut view = std::ptr::null();
    shield(|| {
        BURSTS.with(id(burst), |bundle| {
            view = bundle.view.as_ptr().cast_const();
            Ok(0)
        })
    });
    view
}

/// Frees all frames of a burst, from any thread. usernic_queue_free() is cheaper.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_burst_clear(burst: *mut BurstHandle) -> i32 {
    usernic_burst_truncate(burst, 0)
}

/// Frees all frames of a burst but the first `count`.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_burst_truncate(burst: *mut BurstHandle, count: u32) -> i32 {
    shield(|| {
        BURSTS.with(id(burst), |bundle| {
            bundle.burst.truncate(count as usize);
            // The records that stay are as the program left them.
            bundle.refresh(bundle.burst.len());
            Ok(0)
        })
    })
}

/// Moves frames to the end of another burst: those at `indices`, which rise. As many as fit are moved, and their number
/// is returned; the others keep their order. What the program changed in records is kept.
///
/// # Safety
/// `indices` has `count` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_burst_move(
    from: *mut BurstHandle,
    indices: *const u32,
    count: u32,
    to: *mut BurstHandle,
) -> i32 {
    shield(|| {
        if count == 0 {
            return BURSTS.with(id(from), |_| BURSTS.with(id(to), |_| Ok(0)));
        }
        check::pointer(indices, "usernic_burst_move: indices")?;
        BURSTS.with(id(from), |from| {
            BURSTS.with(id(to), |to| {
                if count as usize > from.burst.len() {
                    return Err(Fault::new(
                        Status::Argument,
                        format_args!("{count} indices for a burst of {}", from.burst.len()),
                    ));
                }
                // SAFETY: by the caller: so many numbers.
                let indices = unsafe { std::slice::from_raw_parts(indices, count as usize) };
                move_frames(from, indices, to)
            })
        })
    })
}

fn move_frames(from: &mut Bundle, indices: &[u32], to: &mut Bundle) -> Outcome<i32> {
    let mut least = 0;
    for &index in indices {
        if from.index(index)? < least {
            return Err(Fault::new(
                Status::Argument,
                format_args!("indices must rise: {index} stands behind {}", least - 1),
            ));
        }
        least = index as usize + 1;
    }
    to.admit(from.home)?;
    let mut moved = 0;
    for &index in indices.iter().take(to.burst.room()) {
        // So many that stood before it are gone. C may have changed the number meanwhile.
        let Some(at) = (index as usize).checked_sub(moved).filter(|&at| at < from.burst.len()) else {
            break;
        };
        let record = from.record(at);
        let behind = from.burst.len() - at - 1;
        from.burst[at..].rotate_left(1);
        let Some(packet) = from.burst.pop() else { break };
        let place = to.burst.len();
        // There is room: no more are taken.
        let _ = to.burst.push(packet);
        // SAFETY: `at` and `behind` more were below the old length, `place` is below the other's capacity.
        unsafe {
            let gap = from.frames.add(at).as_ptr();
            gap.copy_from(gap.add(1), behind);
            to.frames.add(place).write(record);
        }
        moved += 1;
    }
    // The records are as the program left them.
    from.refresh(from.burst.len());
    to.refresh(to.burst.len());
    Ok(moved as i32)
}

/// Copies `len` bytes from `offset` on out of a frame, whatever pieces it is in.
///
/// # Safety
/// `out` has `len` bytes that can be written, outside of the port's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_burst_read(
    burst: *mut BurstHandle,
    index: u32,
    offset: usize,
    out: *mut u8,
    len: usize,
) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_burst_read: out")?;
        let len = check::length(len, "usernic_burst_read: len")?;
        BURSTS.with(id(burst), |bundle| {
            let index = bundle.index(index)?;
            bundle.settle_one(index)?;
            let packet = &bundle.burst[index];
            if offset.checked_add(len).is_none_or(|end| end > packet.len()) {
                return Err(outside(index, offset, len, packet.len()));
            }
            // SAFETY: by the caller.
            let out = unsafe { std::slice::from_raw_parts_mut(out, len) };
            packet.read_at(offset, out).map_err(|e| Fault::new(Status::Room, e))?;
            Ok(0)
        })
    })
}

/// Copies `len` bytes into a frame, from `offset` on, whatever pieces it is in.
///
/// # Safety
/// `bytes` has `len` bytes, outside of the port's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_burst_write(
    burst: *mut BurstHandle,
    index: u32,
    offset: usize,
    bytes: *const u8,
    len: usize,
) -> i32 {
    shield(|| {
        check::pointer(bytes, "usernic_burst_write: bytes")?;
        let len = check::length(len, "usernic_burst_write: len")?;
        BURSTS.with(id(burst), |bundle| {
            let index = bundle.index(index)?;
            bundle.settle_one(index)?;
            let packet = &mut bundle.burst[index];
            if offset.checked_add(len).is_none_or(|end| end > packet.len()) {
                return Err(outside(index, offset, len, packet.len()));
            }
            // SAFETY: by the caller.
            let bytes = unsafe { std::slice::from_raw_parts(bytes, len) };
            packet
                .write_at(offset, bytes)
                .map_err(|e| Fault::new(Status::Room, e))?;
            Ok(0)
        })
    })
}

/// Makes a frame `len` bytes long, with as many pieces as that takes. What is new is whatever was there before: write it.
/// Without buffers for it the frame is empty afterwards.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_burst_set_len(burst: *mut BurstHandle, index: u32, len: u32) -> i32 {
    shield(|| {
        BURSTS.with(id(burst), |bundle| {
            let index = bundle.index(index)?;
            if len > USERNIC_FRAME_MAX {
                return Err(Fault::new(
                    Status::Room,
                    format_args!("a frame of {len} bytes: {USERNIC_FRAME_MAX} at the most"),
                ));
            }
            bundle.settle_one(index)?;
            let set = bundle.burst[index].set_len(len as usize);
            bundle.renew(index);
            set.map_err(|e| Fault::new(Status::Room, e))?;
            Ok(0)
        })
    })
}

/// Bytes of a frame at the most: what segmentation takes, with its headers.
pub const USERNIC_FRAME_MAX: u32 = 65536 + 64;

fn outside(index: usize, offset: usize, len: usize, of: usize) -> Fault {
    Fault::new(
        Status::Room,
        format_args!("frame {index}: {len} bytes from {offset} on, of {of}"),
    )
}
