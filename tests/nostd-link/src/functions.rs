//! `ixgbevf`: a VF from its reset to a frame that was received and one that was sent, over registers that are an array.

use core::cell::{Cell, UnsafeCell};
use core::ptr::NonNull;

use ixgbevf::{Memory, Model, Registers, RxQueue, Segment, Setup, Slot, TxQueue, Vf, ring_len};

use crate::{Outcome, check};

const SIZE: u16 = 64;

/// The registers, and a PF that agrees to everything.
struct Agreeing([Cell<u32>; 4096]);

impl Agreeing {
    fn at(&self, offset: u32) -> &Cell<u32> {
        &self.0[offset as usize / 4 % 4096]
    }
}

impl Registers for Agreeing {
    fn read(&self, offset: u32) -> u32 {
        self.at(offset).get()
    }

    fn write(&self, offset: u32, value: u32) {
        match (offset, value & 1) {
            // VFCTRL, VFMAILBOX with a request, VFMAILBOX.
            (0x000, _) => self.at(0x2fc).set(0x80),
            (0x2fc, 1) => {
                let request = self.at(0x200).get();
                self.at(0x200).set(request | 0x8000_0000);
                if request == 1 {
                    self.at(0x204).set(0x0000_0002);
                }
                self.at(0x2fc).set(0x30);
            }
            (0x2fc, _) => self.at(0x2fc).set(value & 4),
            _ => self.at(offset).set(value),
        }
    }
}

#[repr(C, align(128))]
struct Ring(UnsafeCell<[[u64; 2]; SIZE as usize]>);

// SAFETY: this program has one thread.
unsafe impl Sync for Ring {}

static RX: Ring = Ring(UnsafeCell::new([[0; 2]; SIZE as usize]));
static TX: Ring = Ring(UnsafeCell::new([[0; 2]; SIZE as usize]));

fn memory(ring: &'static Ring) -> Option<Memory> {
    let ptr = NonNull::new(ring.0.get().cast::<u8>())?;
    Some(Memory { ptr, addr: 0x1000 })
}

/// Checks 80 to 99. `seed` is not known at compile time.
///
/// # Errors
/// The number of the check.
pub fn run(seed: u64) -> Outcome {
    check(ring_len(SIZE) == size_of::<Ring>(), 80)?;
    let registers = Agreeing([const { Cell::new(0) }; 4096]);
    let model = Model::identify(0x8086, 0x1565).map_err(|_| 81u8)?;
    let mut vf = Vf::new(&registers, |_: u32| (), model, seed);
    vf.reset().map_err(|_| 82u8)?;
    check(vf.mac() == [2, 0, 0, 0, 0, 0], 83)?;
    vf.configure(&Setup::default()).map_err(|_| 84u8)?;
    let (rx_memory, tx_memory) = (memory(&RX).ok_or(85)?, memory(&TX).ok_or(85)?);
    let (mut rx_slots, mut tx_slots) = ([Slot::default(); SIZE as usize], [Slot::default(); SIZE as usize]);
    // SAFETY: the static is aligned, long enough, valid for ever, and this queue's and this function's alone.
    let rx = unsafe { RxQueue::new(&registers, 0, rx_memory, SIZE, Default::default(), &mut rx_slots[..]) };
    // SAFETY: as above.
    let tx = unsafe { TxQueue::new(&registers, 0, tx_memory, SIZE, Default::default(), &mut tx_slots[..]) };
    let (mut rx, mut tx) = (rx.map_err(|_| 86u8)?, tx.map_err(|_| 87u8)?);
    vf.start_rx(&mut rx).map_err(|_| 88u8)?;
    vf.start_tx(&mut tx).map_err(|_| 89u8)?;

    let segment = |len| Segment {
        addr: 0x10_0000 + seed,
        len,
    };
    // SAFETY: nobody follows these addresses: there is no device.
    check(
        unsafe { rx.add_each((0..3).map(|i| (segment(2048), seed + i))) } == 3,
        90,
    )?;
    rx.publish();
    check(registers.read(0x1018) == 3, 91)?;
    // SAFETY: in the ring: the device's part is this function's.
    unsafe { rx_memory.ptr.cast::<[u64; 2]>().write_volatile([0, 60 << 32 | 3]) };
    let mut got = None;
    rx.poll_each(32, |received| {
        got = Some((received.cookie, received.len, received.is_whole()))
    });
    check(got == Some((seed, 60, true)), 92)?;
    // SAFETY: as above.
    check(unsafe { tx.add_each([(segment(60), seed)]) } == 1, 93)?;
    tx.publish();
    check(registers.read(0x2018) == 2, 94)?;
    // SAFETY: as above.
    unsafe { tx_memory.ptr.cast::<[u64; 2]>().add(1).write_volatile([0, 1 << 32]) };
    let mut sent = None;
    tx.poll_each(32, |cookie| sent = Some(cookie));
    check(sent == Some(seed), 95)?;
    check(vf.statistics() == Default::default(), 96)
}
