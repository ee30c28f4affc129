//! The device side of rings that a driver writes as it likes.
#![no_main]

mod arena;
mod input;

use std::ptr::NonNull;

use arena::Arena;
use input::Input;
use libfuzzer_sys::fuzz_target;
use virtio_ring::any::{Device, Memory};
use virtio_ring::{Chain, Direction, Head, Options, Part, Single, Vectors, Verdict, packed};

/// What the processor has.
fn vectors(which: u8) -> Vectors {
    #[cfg(target_arch = "x86_64")]
    {
        if which & 1 != 0 && is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { Vectors::avx512() };
        }
        if which & 2 != 0 && is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            return unsafe { Vectors::avx2() };
        }
    }
    let _ = which;
    Vectors::NONE
}

/// Reads the ends of what a part names, or writes them.
fn poke(ptr: NonNull<u8>, len: u32, write: bool) {
    for at in [0, len as usize - 1] {
        // SAFETY: what `translate` vouched for; AddressSanitizer looks whether that was right.
        unsafe {
            let place = ptr.as_ptr().add(at);
            let byte = place.read_volatile();
            if write {
                place.write_volatile(byte);
            }
        }
    }
}

fn touch(chain: &Chain<[Part; 8]>) {
    for (parts, write) in [(chain.readable(), false), (chain.writable(), true)] {
        parts.iter().for_each(|part| poke(part.ptr, part.len, write));
    }
}

/// Where a device that takes the ring over begins.
fn found_base(memory: Memory, size: u16, options: Options) -> Option<u32> {
    // SAFETY: the ring is in the arena.
    unsafe {
        // Whatever it says: it looks at all of the ring.
        memory.is_unused(size);
        match memory {
            Memory::Split(ring) => Some(ring.used_index().into()),
            Memory::Packed(ring) => packed::recover(ring, size, options).ok().map(packed::Base::encode),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let arena = Arena::new();
    let Some((memory, size, options)) = arena.ring(&mut input) else {
        return;
    };
    let base = u32::from(input.u16()) | 0x8000_0000;
    // SAFETY: the ring is in the arena, which outlives the device; no other device is on it.
    let Ok(mut device) = (unsafe { Device::new(memory, size, options, base) }) else {
        return;
    };
    device.set_vectors(vectors(input.u8()));
    let mut chain = Chain::new([Part::default(); 8]);
    let mut held: Vec<Head> = Vec::new();
    while !input.is_empty() {
        match input.u8() % 11 {
            0..=2 => {
                let (at, len) = (input.u16(), input.u8());
                arena.write(at.into(), input.bytes(usize::from(len & 63)));
            }
            3 => {
                if let Ok(Some(head)) = device.pop(&arena, &mut chain) {
                    touch(&chain);
                    held.push(head);
                }
            }
            4 => {
                let keep = input.u8();
                let _ = device.pop_each(&arena, &mut chain, 4, |popped| {
                    for (parts, write) in [(popped.readable, false), (popped.writable, true)] {
                        parts.iter().for_each(|part| poke(part.ptr, part.len, write));
                    }
                    match keep & 3 {
                        0 => Verdict::Stop,
                        1 => {
                            held.push(popped.head);
                            Verdict::Keep
                        }
                        _ => Verdict::Done(popped.writable_len()),
                    }
                });
            }
            5 => {
                let write = input.u8() & 1 == 1;
                let direction = if write {
                    Direction::Writable
                } else {
                    Direction::Readable
                };
                let mut singles = [Single::default(); 9];
                let n = device.peek_singles(&arena, direction, &mut singles);
                assert!(n <= singles.len());
                for single in &singles[..n] {
                    poke(single.ptr, single.len, write);
                }
                match write {
                    true => device.use_written(&singles[..n]),
                    false => device.use_read(&singles[..n]),
                };
            }
            6 => {
                // In the order in which they came.
                if !held.is_empty() {
                    device.push(held.remove(0), u32::from(input.u16()));
                }
            }
            7 => {
                if let Some(head) = held.pop()
                    && !device.undo(head)
                {
                    held.push(head);
                }
            }
            8 => {
                device.publish();
            }
            9 => {
                // The device is lost, and another one goes on with the ring.
                let Some(base) = found_base(memory, size, options) else {
                    return;
                };
                // SAFETY: as above; the device before is gone.
                let Ok(next) = (unsafe { Device::new(memory, size, options, base) }) else {
                    return;
                };
                device = next;
                device.needs_call();
                held.clear();
            }
            _ => {
                device.set_notify(input.u8() & 1 == 1);
                device.has_available();
            }
        }
        assert!(usize::from(device.outstanding()) >= held.len().min(1));
    }
    let _ = (device.base(), device.anomalies().total());
});
