//! Our split driver against rust-vmm's `virtio-queue`: its `Queue` takes frames of 60 to 9,000 bytes from a transmit queue
//! and puts them into a receive queue, in guest memory of `vm-memory`, with our layout of the rings. Every byte is compared.

use std::ptr::NonNull;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtio_ring::net::Header;
use virtio_ring::split::{Driver, Layout, Memory, Options, Table};
use virtio_ring::{Direction, Error, Segment, Slot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Guest addresses begin here, so that they are neither offsets nor pointers.
const START: u64 = 0x4_0000_0000;
const FRAMES: usize = 1000;
const SIZES: [u16; 5] = [16, 64, 256, 1024, 4096];

/// How a frame is posted for transmit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    /// Header and frame in one descriptor.
    Single,
    /// The header apart and the frame in pieces.
    Chain,
    /// The same behind an indirect table.
    Indirect,
}

/// The frame of a number: 60 to 9,000 bytes that say which it is.
fn frame(number: usize) -> Vec<u8> {
    let len = match number % 5 {
        0 => 60,
        1 => 1514,
        2 => 9000,
        _ => 60 + (number * 7919) % 8941,
    };
    (0..len)
        .map(|i| (number.wrapping_mul(31) ^ (i * 7) ^ (i >> 8)) as u8)
        .collect()
}

struct Guest {
    memory: GuestMemoryMmap,
    next: u64,
}

impl Guest {
    fn new(len: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(START), len)]).unwrap();
        Self { memory, next: START }
    }

    fn alloc(&mut self, len: usize) -> u64 {
        let addr = self.next;
        self.next += (len as u64).next_multiple_of(128);
        addr
    }

    fn ptr(&self, addr: u64) -> NonNull<u8> {
        NonNull::new(self.memory.get_host_address(GuestAddress(addr)).unwrap()).unwrap()
    }
}

/// A ring in guest memory: our driver and their queue.
struct Pair {
    driver: Driver<Vec<Slot>>,
    queue: Queue,
}

impl Pair {
    fn new(guest: &mut Guest, size: u16, options: Options) -> Self {
        let layout = Layout::new(size).unwrap();
        let base = guest.alloc(layout.len);
        let (desc, avail, used) = (
            base + layout.desc as u64,
            base + layout.avail as u64,
            base + layout.used as u64,
        );
        let memory = Memory {
            desc: guest.ptr(desc),
            avail: guest.ptr(avail),
            used: guest.ptr(used),
        };
        // SAFETY: the guest's memory outlives the pair, and the two sides of this test take turns on one thread.
        let driver = unsafe { Driver::new(memory, size, options, vec![Slot::default(); size.into()]).unwrap() };
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
        queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
        queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        queue.set_event_idx(options.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&guest.memory));
        Self { driver, queue }
    }
}

fn read(chain: DescriptorChain<&GuestMemoryMmap>) -> Vec<u8> {
    let memory = chain.memory().clone();
    let mut bytes = vec![];
    for desc in chain.readable() {
        let mut piece = vec![0; desc.len() as usize];
        memory.read_slice(&mut piece, desc.addr()).unwrap();
        bytes.extend(piece);
    }
    bytes
}

/// Writes as much as fits; returns how much that is.
fn write(chain: DescriptorChain<&GuestMemoryMmap>, bytes: &[u8]) -> usize {
    let memory = chain.memory().clone();
    let mut done = 0;
    for desc in chain.writable() {
        let n = (bytes.len() - done).min(desc.len() as usize);
        memory.write_slice(&bytes[done..done + n], desc.addr()).unwrap();
        done += n;
    }
    done
}

/// The whole way: posts frames, lets the device carry them over, and compares what comes back.
fn exchange(size: u16, options: Options, shape: Shape, mergeable: bool) {
    let mut guest = Guest::new(256 << 20);
    let mut tx = Pair::new(&mut guest, size, options);
    let mut rx = Pair::new(&mut guest, size, options);
    let rx_len: u32 = if mergeable { 2048 } else { 9216 };
    // A place for each descriptor: 9,216 bytes for a frame behind its header, 256 bytes for a table.
    let tx_base = guest.alloc(usize::from(size) * 9216);
    let tables = guest.alloc(usize::from(size) * 256);
    let rx_base = guest.alloc(usize::from(size) * rx_len as usize);

    let mut tx_free: Vec<u64> = (0..size.into()).collect();
    let mut rx_free: Vec<u64> = (0..size.into()).collect();
    let (mut sent, mut received, mut kicks, mut calls) = (0, 0, 0u64, 0u64);
    let mut carried: Vec<Vec<u8>> = vec![];
    // The pieces of a frame that came in several buffers, and how many are to come.
    let (mut partial, mut missing) = (Vec::new(), 0);
    for round in 0.. {
        assert!(round < 100 * FRAMES, "no progress: {sent} sent, {received} received");
        // Our side refills and sends, in bursts of differing size.
        let fill = rx_free.len().min(1 + round % 37);
        let buffers: Vec<_> = rx_free.drain(rx_free.len() - fill..).collect();
        let segments = buffers.iter().map(|id| {
            let addr = rx_base + id * u64::from(rx_len);
            (Segment { addr, len: rx_len }, *id)
        });
        // SAFETY: guest memory, which lives longer than the rings.
        let posted = unsafe { rx.driver.add_each(Direction::Writable, segments) };
        assert_eq!(posted, fill);
        kicks += u64::from(rx.driver.publish());
        for _ in 0..1 + round % 23 {
            if sent == FRAMES {
                break;
            }
            let Some(id) = tx_free.pop() else { break };
            let bytes = frame(sent);
            let addr = tx_base + id * 9216;
            let mut header = [0; Header::LEN];
            assert!(
                Header {
                    num_buffers: 0,
                    ..Header::default()
                }
                .emit(&mut header)
            );
            guest.memory.write_slice(&header, GuestAddress(addr)).unwrap();
            guest.memory.write_slice(&bytes, GuestAddress(addr + 12)).unwrap();
            let len = bytes.len() as u32;
            let pieces = [
                Segment { addr, len: 12 },
                Segment {
                    addr: addr + 12,
                    len: 14,
                },
                Segment {
                    addr: addr + 26,
                    len: len - 14,
                },
            ];
            let added = match shape {
                Shape::Single => {
                    let one = (Segment { addr, len: 12 + len }, id);
                    // SAFETY: guest memory, which lives longer than the rings.
                    if unsafe { tx.driver.add_each(Direction::Readable, [one]) } == 1 {
                        Ok(())
                    } else {
                        Err(Error::Full)
                    }
                }
                // SAFETY: as above.
                Shape::Chain => unsafe { tx.driver.add(&pieces, 3, id) },
                Shape::Indirect => {
                    let table = tables + id * 256;
                    let table = Table {
                        ptr: guest.ptr(table),
                        addr: table,
                        entries: 16,
                    };
                    // SAFETY: the table belongs to this buffer id, which is in no other chain in flight.
                    unsafe { tx.driver.add_indirect(table, &pieces, 3, id) }
                }
            };
            match added {
                Ok(()) => sent += 1,
                Err(error) => {
                    assert_eq!(error, Error::Full);
                    tx_free.push(id);
                    break;
                }
            }
        }
        kicks += u64::from(tx.driver.publish());

        // Their side: takes what is there, completes it in another order, and fills what was posted for receive.
        let mut heads = vec![];
        while let Some(chain) = tx.queue.pop_descriptor_chain(&guest.memory) {
            heads.push(chain.head_index());
            carried.push(read(chain));
        }
        if round % 2 == 0 && !options.in_order {
            heads.reverse();
        }
        for head in heads {
            tx.queue.add_used(&guest.memory, head, 0).unwrap();
        }
        calls += u64::from(tx.queue.needs_notification(&guest.memory).unwrap());
        while let Some(bytes) = carried.first() {
            let payload = &bytes[12..];
            let buffers = if mergeable {
                bytes.len().div_ceil(rx_len as usize)
            } else {
                1
            };
            let mut chains = vec![];
            while chains.len() < buffers {
                let Some(chain) = rx.queue.pop_descriptor_chain(&guest.memory) else {
                    break;
                };
                chains.push(chain);
            }
            if chains.len() < buffers {
                for _ in chains {
                    rx.queue.go_to_previous_position();
                }
                break;
            }
            let mut header = [0; Header::LEN];
            Header {
                num_buffers: buffers as u16,
                ..Header::default()
            }
            .emit(&mut header);
            let whole = [&header[..], payload].concat();
            let mut at = 0;
            for chain in chains {
                let head = chain.head_index();
                let n = write(chain, &whole[at..]);
                rx.queue.add_used(&guest.memory, head, n as u32).unwrap();
                at += n;
            }
            assert_eq!(at, whole.len());
            carried.remove(0);
        }
        calls += u64::from(rx.queue.needs_notification(&guest.memory).unwrap());
        tx.queue.enable_notification(&guest.memory).unwrap();
        rx.queue.enable_notification(&guest.memory).unwrap();

        // Our side collects.
        tx.driver.poll_each(64, |done| {
            assert_eq!(done.len, 0);
            tx_free.push(done.cookie);
        });
        rx.driver.poll_each(64, |done| {
            let mut bytes = vec![0; done.len as usize];
            let addr = GuestAddress(rx_base + done.cookie * u64::from(rx_len));
            guest.memory.read_slice(&mut bytes, addr).unwrap();
            rx_free.push(done.cookie);
            if missing == 0 {
                missing = Header::parse(&bytes[..12]).unwrap().num_buffers;
                partial = bytes.split_off(12);
            } else {
                partial.append(&mut bytes);
            }
            missing -= 1;
            if missing == 0 {
                assert!(
                    partial == frame(received),
                    "frame {received} of {} bytes",
                    partial.len()
                );
                received += 1;
            }
        });
        tx.driver.set_notify(round % 3 == 0);
        rx.driver.set_notify(round % 3 == 0);
        if received == FRAMES && tx.driver.in_flight() == 0 {
            break;
        }
    }
    assert_eq!((sent, received), (FRAMES, FRAMES));
    assert_eq!((tx.driver.anomalies().total(), rx.driver.anomalies().total()), (0, 0));
    assert!(kicks > 0 && calls > 0);
}

#[test]
fn one_descriptor_a_frame() {
    for size in SIZES {
        exchange(size, Options::default(), Shape::Single, false);
    }
}

#[test]
fn chains() {
    for size in SIZES {
        exchange(size, Options::default(), Shape::Chain, false);
    }
}

#[test]
fn indirect_tables() {
    for size in SIZES {
        exchange(
            size,
            Options {
                indirect: true,
                ..Options::default()
            },
            Shape::Indirect,
            false,
        );
    }
}

#[test]
fn mergeable_receive() {
    for size in SIZES {
        exchange(size, Options::default(), Shape::Single, true);
    }
}

#[test]
fn event_index() {
    for size in SIZES {
        exchange(
            size,
            Options {
                event_idx: true,
                ..Options::default()
            },
            Shape::Chain,
            true,
        );
    }
}

#[test]
fn in_order() {
    // Their queue knows nothing of it; one that works in order is right all the same (one element a buffer).
    for size in SIZES {
        exchange(
            size,
            Options {
                in_order: true,
                ..Options::default()
            },
            Shape::Single,
            true,
        );
        exchange(
            size,
            Options {
                in_order: true,
                ..Options::default()
            },
            Shape::Chain,
            false,
        );
    }
}
