//! `virtio-ring`: both sides of a ring of each format over memory of this program.

use core::cell::UnsafeCell;
use core::ptr::NonNull;

use virtio_ring::any::{Device, Driver, Format, Layout, Memory};
use virtio_ring::{Chain, Direction, Options, Part, Segment, Slot, Translate};

use crate::{Outcome, check};

const SIZE: u16 = 64;
const ROUNDS: u64 = 10;

#[repr(C, align(128))]
struct Shared(UnsafeCell<[u8; 16384]>);

// SAFETY: this program has one thread.
unsafe impl Sync for Shared {}

static RING: Shared = Shared(UnsafeCell::new([0; 16384]));
static BYTES: Shared = Shared(UnsafeCell::new([0; 16384]));

/// Device addresses are offsets into `BYTES`.
struct Offsets;

// SAFETY: what is returned lies in `BYTES`, whole, which lives for ever and which nothing holds a reference to.
unsafe impl Translate for Offsets {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        let end = addr.checked_add(u64::from(len))?;
        if end > 16384 {
            return None;
        }
        // SAFETY: within the array, as was just checked.
        NonNull::new(unsafe { BYTES.0.get().cast::<u8>().add(addr as usize) })
    }
}

fn memory(layout: &Layout) -> Option<Memory> {
    let block = NonNull::new(RING.0.get().cast::<u8>())?;
    // SAFETY: the static is aligned to 128 and larger than a layout of 64 entries, which the caller checks.
    Some(unsafe { layout.place(block) })
}

/// Checks 20 to 39 of a split ring, 100 to 119 of a packed one.
///
/// # Errors
/// The number of the check.
pub fn run(seed: u64) -> Outcome {
    exchange(seed, Format::Split)?;
    exchange(seed, Format::Packed).map_err(|number| number + 80)
}

fn exchange(seed: u64, format: Format) -> Outcome {
    let layout = Layout::new(format, SIZE).map_err(|_| 20u8)?;
    check(layout.block_len() <= 16384, 21)?;
    let options = Options {
        event_idx: true,
        in_order: seed & 1 == 1,
        indirect: false,
    };
    let mut slots = [Slot::default(); SIZE as usize];
    let ring = memory(&layout).ok_or(22)?;
    // SAFETY: the memory is valid for ever, aligned, and used by this driver and the device below alone.
    let mut driver = unsafe { Driver::new(ring, SIZE, options, &mut slots[..]) }.map_err(|_| 23u8)?;
    let ring = memory(&layout).ok_or(24)?;
    let base = format.start_base();
    // SAFETY: as above; this is the only device.
    let mut device = unsafe { Device::new(ring, SIZE, options, base) }.map_err(|_| 25u8)?;
    let mut chain = Chain::new([Part::default(); 8]);
    let mut sum = 0u64;
    for round in 0..ROUNDS {
        let buffers = (0..8u64).map(|i| (Segment { addr: i * 256, len: 64 }, seed.wrapping_add(round * 8 + i)));
        // SAFETY: places in BYTES, which live for ever and are looked at by the device below only.
        check(unsafe { driver.add_each(Direction::Writable, buffers) } == 8, 26)?;
        driver.publish();
        let mut served = 0u8;
        while let Some(head) = device.pop(&Offsets, &mut chain).map_err(|_| 27u8)? {
            let part = chain.writable().first().ok_or(28)?;
            // SAFETY: translated, so valid for its length, which is not 0.
            unsafe { part.ptr.as_ptr().write_volatile(served) };
            device.push(head, 1 + u32::from(served));
            served += 1;
        }
        check(served == 8, 29)?;
        device.publish();
        let polled = driver.poll_each(32, |done| sum = sum.wrapping_add(done.cookie ^ u64::from(done.len)));
        check(polled == 8, 30)?;
    }
    let expected = (0..ROUNDS * 8).fold(0u64, |sum, i| sum.wrapping_add(seed.wrapping_add(i) ^ (1 + i % 8)));
    check(sum == expected, 31)?;
    check(!driver.is_broken() && !device.is_broken(), 32)?;
    check(driver.in_flight() == 0, 33)
}
