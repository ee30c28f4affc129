//! A driver and a device over the same memory, step by step.

use std::ptr::NonNull;
use virtio_ring::split::{Device, Driver, Layout, Memory, Options, Verdict};
use virtio_ring::{Chain, Direction, Part, Segment, Slot, Translate};

/// Device addresses are addresses of this process.
struct Identity;

// SAFETY: the tests pass addresses of buffers that they own.
unsafe impl Translate for Identity {
    fn translate(&self, addr: u64, _len: u32) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }
}

#[repr(align(128))]
struct Block([u8; 4096]);

#[test]
fn there_and_back() {
    for in_order in [false, true] {
        for event_idx in [false, true] {
            let options = Options {
                event_idx,
                in_order,
                indirect: true,
            };
            let layout = Layout::new(8).unwrap();
            let mut block = Block([0; 4096]);
            // SAFETY: the block is large and aligned enough.
            let memory: Memory = unsafe { layout.place(NonNull::from(&mut block.0).cast()) };
            // SAFETY: the rings are used by these two alone.
            let mut driver = unsafe { Driver::new(memory, 8, options, [Slot::default(); 8]).unwrap() };
            // SAFETY: as above.
            let mut device = unsafe { Device::new(memory, 8, options, 0).unwrap() };
            let mut chain = Chain::new([Part::default(); 8]);
            for round in 0..100u64 {
                let data = [round as u8; 64];
                let segment = Segment {
                    addr: data.as_ptr() as u64,
                    len: 64,
                };
                let added = driver.add_each(Direction::Readable, (0..5).map(|i| (segment, round * 10 + i)));
                assert_eq!(added, 5);
                assert!(driver.publish());
                device
                    .pop_each(&Identity, &mut chain, 64, |popped| {
                        assert_eq!(popped.readable_len(), 64);
                        Verdict::Done(0)
                    })
                    .unwrap();
                assert!(device.publish());
                let mut cookies = Vec::new();
                assert_eq!(driver.poll_each(64, |done| cookies.push(done.cookie)), 5);
                assert_eq!(cookies, (0..5).map(|i| round * 10 + i).collect::<Vec<_>>());
                driver.set_notify(true);
                device.set_notify(true);
            }
            assert_eq!(driver.free(), 8);
            assert_eq!(driver.anomalies().total() + device.anomalies().total(), 0);
        }
    }
}
