//! The driver side of rings that a device writes as it likes.
#![no_main]

mod arena;
mod input;

use std::collections::BTreeMap;

use arena::Arena;
use input::Input;
use libfuzzer_sys::fuzz_target;
use virtio_ring::any::Driver;
use virtio_ring::{Direction, Segment, Slot};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let arena = Arena::new();
    let Some((memory, size, options)) = arena.ring(&mut input) else {
        return;
    };
    let slots = vec![Slot::default(); size.into()];
    // SAFETY: the ring is in the arena, which outlives the driver; no other driver is on it.
    let Ok(mut driver) = (unsafe { Driver::new(memory, size, options, slots) }) else {
        return;
    };
    // What is in flight: cookies, and bytes for writing.
    let mut flight = BTreeMap::new();
    let mut cookie = 0u64;
    while !input.is_empty() {
        match input.u8() % 8 {
            0..=2 => {
                let (at, len) = (input.u16(), input.u8());
                arena.write(at.into(), input.bytes(usize::from(len & 63)));
            }
            3 => {
                let shape = input.u8();
                let chain: Vec<Segment> = (0..1 + usize::from(shape & 3))
                    .map(|_| Segment {
                        addr: input.u64(),
                        len: u32::from(input.u16()) + 1,
                    })
                    .collect();
                let readable = usize::from(shape >> 2 & 3).min(chain.len());
                // SAFETY: there is no device, only bytes that may be its.
                if unsafe { driver.add(&chain, readable, cookie) }.is_ok() {
                    flight.insert(cookie, chain[readable..].iter().map(|segment| segment.len).sum());
                    cookie += 1;
                }
            }
            4 => {
                let (count, len) = (u64::from(input.u8() & 7), u32::from(input.u16()) + 1);
                let buffers = (cookie..cookie + count).map(|cookie| (Segment { addr: cookie, len }, cookie));
                // SAFETY: as above.
                let n = unsafe { driver.add_each(Direction::Writable, buffers) } as u64;
                flight.extend((cookie..cookie + n).map(|cookie| (cookie, len)));
                cookie += n;
            }
            5 => {
                driver.publish();
            }
            6 => {
                driver.poll_each(usize::from(input.u8() & 7), |done| {
                    let posted = flight.remove(&done.cookie).expect("in flight");
                    assert!(done.len <= posted);
                });
            }
            _ => {
                driver.set_notify(input.u8() & 1 == 1);
            }
        }
        assert_eq!(usize::from(driver.in_flight()), flight.len());
    }
    // SAFETY: there is no device.
    unsafe {
        driver.detach_each(|cookie| {
            flight.remove(&cookie).expect("in flight");
        });
    }
    assert!(flight.is_empty());
});
