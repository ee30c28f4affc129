//! The order of accesses to descriptor memory and the tail, as [`crate::dma`] recorded it.

use crate::dma::{Step, steps};
use crate::{Delay, Memory, Model, Registers, RxOptions, RxQueue, Segment, Slot, TxOptions, TxQueue, Vf};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::vec;
use std::vec::Vec;

/// Registers that keep what is written, and a PF that agrees to everything.
struct Plain(RefCell<Vec<u32>>);

impl Registers for Plain {
    fn read(&self, offset: u32) -> u32 {
        match offset {
            // VFMAILBOX: everything is always done, and there is always an answer.
            0x2fc => 0xb4,
            _ => self.0.borrow()[offset as usize / 4],
        }
    }

    fn write(&self, offset: u32, value: u32) {
        let mut words = self.0.borrow_mut();
        words[offset as usize / 4] = value;
        if offset == 0x2fc && value & 1 != 0 {
            words[0x200 / 4] |= 0x8000_0000;
            if words[0x200 / 4] == 0x8000_0001 {
                words[0x204 / 4] = 2;
            }
        }
    }
}

struct NoTime;

impl Delay for NoTime {
    fn delay_us(&mut self, _: u32) {}
}

#[repr(align(128))]
struct Block([[u64; 2]; 64]);

fn memory(block: &mut Block) -> Memory {
    Memory {
        ptr: NonNull::from(&mut block.0).cast(),
        addr: 0x1000,
    }
}

fn segment(i: u64) -> (Segment, u64) {
    (
        Segment {
            addr: 0x1_0000 + 2048 * i,
            len: 2048,
        },
        i,
    )
}

#[test]
fn receive_reads_status_first_and_writes_the_tail_last() {
    let registers = Plain(RefCell::new(vec![0; 4096]));
    let mut block = Block([[u64::MAX; 2]; 64]);
    let memory = memory(&mut block);
    // SAFETY: the block outlives the queue; only this test uses it.
    let queue = unsafe {
        RxQueue::new(
            &registers,
            0,
            memory,
            64,
            RxOptions::default(),
            vec![Slot::default(); 64],
        )
    };
    let mut queue = queue.unwrap();
    queue.set_running(true);
    steps();
    // SAFETY: there is no device.
    unsafe { queue.add_each((0..2).map(segment)) };
    queue.publish();
    assert_eq!(steps(), [Step::Post(0), Step::Post(1), Step::Release, Step::Tail]);
    queue.publish();
    assert_eq!(steps(), []);
    // SAFETY: in the block; the device of this test is this line.
    unsafe { memory.ptr.cast::<[u64; 2]>().write_volatile([0, 60 << 32 | 3]) };
    queue.poll_each(8, |_| ());
    assert_eq!(
        steps(),
        [Step::Status(0), Step::Acquire, Step::Rest(0), Step::Status(1)]
    );
}

#[test]
fn transmit_amends_before_the_tail_and_reads_one_status_a_report() {
    let registers = Plain(RefCell::new(vec![0; 4096]));
    let mut block = Block([[u64::MAX; 2]; 64]);
    let memory = memory(&mut block);
    // SAFETY: the block outlives the queue; only this test uses it.
    let queue = unsafe {
        TxQueue::new(
            &registers,
            0,
            memory,
            64,
            TxOptions::default(),
            vec![Slot::default(); 64],
        )
    };
    let mut queue = queue.unwrap();
    queue.set_running(true);
    steps();
    // SAFETY: there is no device.
    unsafe { queue.add_each((0..3).map(segment)) };
    queue.publish();
    // The context, three frames, the last again with RS.
    let posts = [0, 1, 2, 3, 3].map(Step::Post);
    assert_eq!(steps(), [&posts[..], &[Step::Release, Step::Tail]].concat());
    queue.poll_each(8, |_| ());
    assert_eq!(steps(), [Step::Status(3)]);
    // SAFETY: in the block.
    unsafe { memory.ptr.cast::<[u64; 2]>().add(3).write_volatile([0, 1 << 32]) };
    assert_eq!(queue.poll_each(8, |_| ()), 3);
    assert_eq!(steps(), [Step::Status(3), Step::Acquire]);
}

/// The tail is not written before the queue runs, and a start writes it after ENABLE.
#[test]
fn a_start_enables_and_then_writes_the_tail() {
    let registers = Plain(RefCell::new(vec![0; 4096]));
    let mut vf = Vf::new(&registers, NoTime, Model::X540, 1);
    // This PF's mailbox always shows RSTD: only the reset itself goes well.
    assert!(vf.reset().is_err());
    let mut block = Block([[0; 2]; 64]);
    // SAFETY: the block outlives the queue; only this test uses it.
    let queue = unsafe {
        RxQueue::new(
            &registers,
            0,
            memory(&mut block),
            64,
            RxOptions::default(),
            vec![Slot::default(); 64],
        )
    };
    let mut queue = queue.unwrap();
    // SAFETY: there is no device.
    unsafe { queue.add_each((0..2).map(segment)) };
    queue.publish();
    assert!(!steps().contains(&Step::Tail));
    assert_eq!(registers.read(0x1018), 0);
}
