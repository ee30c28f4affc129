//! A front-end whose back-end was lost without a word, and who therefore has no base to say: rings go on all the same.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use common::{LIMIT, Place, frame_of, until};
use raw::{GUEST, Raw, Setup, event, memfd};
use rustix::mm::{MapFlags, ProtFlags};
use usernic::Burst;
use virtio_ring::any::{Driver, Format, Memory};
use virtio_ring::{Options, Segment, Slot, packed};

const LEN: usize = 0x10_0000;
const SIZE: u16 = 16;
const NET_HEADER: usize = 12;

/// The front-end's memory, mapped here: its transmit ring where [`Setup::default`] has the second ring, then frames.
struct Front {
    file: OwnedFd,
    base: NonNull<u8>,
    driver: Driver<Vec<Slot>>,
}

impl Front {
    fn new(format: Format) -> Self {
        let file = memfd(LEN as u64);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice, never unmapped.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), LEN, protection, flags, &file, 0) };
        let base = NonNull::new(base.unwrap().cast::<u8>()).unwrap();
        // SAFETY: inside the mapping.
        let areas = [0x1_0000, 0x1_1000, 0x1_2000].map(|at| unsafe { base.add(at) });
        let memory = Memory::from_areas(format, areas);
        // SAFETY: the areas are mapped for ever and large enough; no device is on the ring yet.
        let driver = unsafe { Driver::new(memory, SIZE, Options::default(), vec![Slot::default(); SIZE.into()]) };
        Front {
            file,
            base,
            driver: driver.unwrap(),
        }
    }

    /// Sends frame `number`.
    fn send(&mut self, number: u64) {
        let offset = 0x2_0000 + (number as usize % 64) * 2048;
        let frame = frame_of(number, 100);
        // SAFETY: 64 places of 2048 bytes behind the rings; the last use of this one is 64 frames ago.
        unsafe {
            let at = self.base.add(offset);
            at.write_bytes(0, NET_HEADER);
            at.add(NET_HEADER)
                .copy_from(NonNull::from(&frame[..]).cast(), frame.len());
        }
        let chain = [Segment {
            addr: GUEST + offset as u64,
            len: (NET_HEADER + frame.len()) as u32,
        }];
        // SAFETY: in the memory of the test, which outlives the back-ends.
        unsafe { self.driver.add(&chain, 1, number) }.unwrap();
        self.driver.publish();
    }
}

fn goes_on(format: Format) {
    let place = Place::new();
    let mut front = Front::new(format);
    let (mut sent, mut came) = (0, 0);
    // Not a multiple of the ring's size: each connection begins somewhere else in it.
    for connection in 0..12 {
        let back = place.open("vhost", "").unwrap();
        let raw = Raw::connect(&place.socket());
        let (kick, call) = (event(), event());
        let setup = match format {
            // As the used index in memory says; that of the receive ring, which is not used, keeps up.
            Format::Split => {
                for at in [0x1002, 0x2002] {
                    // SAFETY: inside the mapping and aligned; no device is on the ring.
                    unsafe { front.base.add(at).cast::<u16>().write(sent as u16) };
                }
                Setup {
                    base: sent as u32,
                    ..Setup::default()
                }
            }
            Format::Packed => Setup {
                features: 1 << 34 | 1 << 32 | 1 << 30,
                base: packed::Base::START.encode(),
                ..Setup::default()
            },
        };
        assert!(raw.set_up(&setup, front.file.as_fd(), kick.as_fd(), call.as_fd()));
        assert!(back.wait_link(LIMIT), "connection {connection}");
        if connection > 0 {
            let called = rustix::io::read(&call, &mut [0; 8]);
            assert_eq!(called, Ok(8), "who was on the ring before may have owed a call");
        }
        let mut queue = back.queue(0).unwrap();
        let mut burst = Burst::new(32);
        for _ in 0..connection % 3 * 7 + 3 {
            front.send(sent);
            sent += 1;
            until("the frame comes", || {
                queue.rx(&mut burst);
                !burst.is_empty()
            });
            for packet in burst.iter() {
                let mut bytes = vec![0; packet.len()];
                packet.copy_to(&mut bytes);
                assert!(bytes == frame_of(came, 100), "frame {came} of connection {connection}");
                came += 1;
            }
            burst.clear();
            front.driver.poll_each(usize::MAX, |_| {});
            assert_eq!(front.driver.in_flight(), 0, "after frame {came}");
        }
        // Without GET_VRING_BASE.
        drop(raw);
        until("the link goes down", || !back.link().up);
    }
    assert_eq!(front.driver.anomalies().total(), 0);
}

#[test]
fn split_rings_go_on() {
    goes_on(Format::Split);
}

#[test]
fn packed_rings_go_on() {
    goes_on(Format::Packed);
}
