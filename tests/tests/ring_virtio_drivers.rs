//! Our split device under `virtio-drivers`: its network driver, over a `Transport` and a `Hal` of plain memory, sends frames
//! of 60 to 9,000 bytes, our device reflects them, and it receives them. Every byte is compared.
//!
//! EVENT_IDX is not offered: the driver's test of the event index is wrong across the wrap, and it can lose a kick.

use std::alloc::{Layout as Alloc, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::rc::Rc;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use virtio_ring::net::{Config, Status, header_len};
use virtio_ring::split::{Device, Memory, Options, Verdict};
use virtio_ring::{Chain, Features, Head, Part, Popped, Translate};

/// What physical addresses are ahead of ours by, so that no pointer passes for one.
const OFFSET: u64 = 0x7000_0000_0000;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const FRAMES: usize = 500;

thread_local! {
    /// Everything that is shared with the device now: address and length. Also what `Translate` goes by.
    static SHARED: RefCell<BTreeMap<u64, u64>> = const { RefCell::new(BTreeMap::new()) };
}

struct PlainMemory;

fn pages(pages: usize) -> Alloc {
    Alloc::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap()
}

fn share(ptr: *mut u8, len: usize) -> PhysAddr {
    let addr = ptr as u64 + OFFSET;
    SHARED.with_borrow_mut(|shared| assert_eq!(shared.insert(addr, len as u64), None, "shared twice"));
    addr
}

fn unshare(addr: PhysAddr, len: usize) {
    SHARED.with_borrow_mut(|shared| assert_eq!(shared.remove(&addr), Some(len as u64), "not what was shared"));
}

// SAFETY: `dma_alloc` gives zeroed pages that nobody else has; buffers are shared in place.
unsafe impl Hal for PlainMemory {
    fn dma_alloc(count: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc_zeroed(pages(count)) }).unwrap();
        (share(ptr.as_ptr(), count * PAGE_SIZE), ptr)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, count: usize) -> i32 {
        unshare(paddr, count * PAGE_SIZE);
        // SAFETY: from `dma_alloc`, by the contract of this function.
        unsafe { dealloc(vaddr.as_ptr(), pages(count)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("there is no MMIO")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        share(buffer.as_ptr().cast(), buffer.len())
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, _direction: BufferDirection) {
        unshare(paddr, buffer.len());
    }
}

/// Translates what is shared, and nothing else.
struct Shared;

// SAFETY: memory that the driver has shared stays until it is unshared, which the driver does after completion.
unsafe impl Translate for Shared {
    fn translate(&self, addr: u64, len: u32) -> Option<NonNull<u8>> {
        SHARED.with_borrow(|shared| {
            let (start, size) = shared.range(..=addr).next_back()?;
            (addr - start + u64::from(len) <= *size).then(|| NonNull::new((addr - OFFSET) as *mut u8))?
        })
    }
}

#[derive(Default)]
struct Registers {
    status: DeviceStatus,
    features: u64,
    queues: [Option<(u32, [PhysAddr; 3])>; 2],
    notified: [u64; 2],
}

/// The device as the driver sees it.
#[derive(Clone)]
struct Plain {
    registers: Rc<RefCell<Registers>>,
    offered: Features,
    config: Config,
    size: u16,
}

impl Transport for Plain {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }
    fn read_device_features(&mut self) -> u64 {
        self.offered.bits()
    }
    fn write_driver_features(&mut self, driver_features: u64) {
        self.registers.borrow_mut().features = driver_features;
    }
    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        self.size.into()
    }
    fn notify(&mut self, queue: u16) {
        self.registers.borrow_mut().notified[usize::from(queue)] += 1;
    }
    fn get_status(&self) -> DeviceStatus {
        self.registers.borrow().status
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.registers.borrow_mut().status = status;
    }
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, queue: u16, size: u32, desc: PhysAddr, avail: PhysAddr, used: PhysAddr) {
        self.registers.borrow_mut().queues[usize::from(queue)] = Some((size, [desc, avail, used]));
    }
    fn queue_unset(&mut self, queue: u16) {
        self.registers.borrow_mut().queues[usize::from(queue)] = None;
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.registers.borrow().queues[usize::from(queue)].is_some()
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let bytes = self.config.to_bytes();
        let field = bytes
            .get(offset..offset + size_of::<T>())
            .ok_or(virtio_drivers::Error::ConfigSpaceTooSmall)?;
        Ok(T::read_from_bytes(field).unwrap())
    }
    fn write_config_space<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::Unsupported)
    }
}

/// Our side: reflects transmit into receive.
struct Reflector {
    tx: Device,
    rx: Device,
    chain: Chain<Vec<Part>>,
    frames: Vec<Vec<u8>>,
    calls: u64,
}

impl Reflector {
    fn new(registers: &Registers) -> Self {
        let device = |queue: u16| {
            let (size, [desc, avail, used]) = registers.queues[usize::from(queue)].expect("the queue is set up");
            let part = |addr: PhysAddr, len: usize| Shared.translate(addr, len as u32).expect("shared ring memory");
            let size = size as u16;
            let memory = Memory {
                desc: part(desc, virtio_ring::split::Layout::desc_len(size)),
                avail: part(avail, virtio_ring::split::Layout::avail_len(size)),
                used: part(used, virtio_ring::split::Layout::used_len(size)),
            };
            let options = Options::from(Features::from_bits_retain(registers.features));
            // SAFETY: the parts are shared as long as the driver lives, which the tests drop last; one thread.
            unsafe { Device::new(memory, size, options, 0).unwrap() }
        };
        Self {
            tx: device(TRANSMIT),
            rx: device(RECEIVE),
            chain: Chain::new(vec![Part::default(); 4096]),
            frames: vec![],
            calls: 0,
        }
    }

    fn run(&mut self, max: usize) {
        let frames = &mut self.frames;
        self.tx
            .pop_each(&Shared, &mut self.chain, max, |popped| {
                assert_eq!((popped.fault, popped.writable.len()), (None, 0));
                frames.push(popped.readable.iter().flat_map(bytes_of).collect());
                Verdict::Done(0)
            })
            .unwrap();
        self.calls += u64::from(self.tx.publish());
        while !self.frames.is_empty() {
            let Some(head) = self.rx.pop(&Shared, &mut self.chain).unwrap() else {
                break;
            };
            self.fill(head);
        }
        self.calls += u64::from(self.rx.publish());
    }

    fn fill(&mut self, head: Head) {
        let frame = self.frames.remove(0);
        assert_eq!((self.chain.fault(), self.chain.readable().len()), (None, 0));
        let mut at = 0;
        for part in self.chain.writable() {
            let n = (frame.len() - at).min(part.len as usize);
            // SAFETY: translated, `n` is not above the part's length, and on this thread alone.
            unsafe { part.ptr.as_ptr().copy_from_nonoverlapping(frame[at..].as_ptr(), n) };
            at += n;
        }
        assert_eq!(at, frame.len(), "the receive buffer is large enough");
        self.rx.push(head, at as u32);
    }
}

fn bytes_of(part: &Part) -> Vec<u8> {
    // SAFETY: translated, and on this thread alone.
    unsafe { std::slice::from_raw_parts(part.ptr.as_ptr(), part.len as usize) }.to_vec()
}

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

fn reflect<const SIZE: usize>(offered: Features) {
    let config = Config {
        mac: [2, 0, 0, 0, 0, 7],
        status: Status::LINK_UP,
        ..Config::default()
    };
    let registers = Rc::new(RefCell::new(Registers::default()));
    let transport = Plain {
        registers: registers.clone(),
        offered,
        config,
        size: SIZE as u16,
    };
    let mut net = VirtIONetRaw::<PlainMemory, Plain, SIZE>::new(transport).unwrap();
    assert_eq!(net.mac_address(), config.mac);
    assert!(registers.borrow().status.contains(DeviceStatus::DRIVER_OK));
    let header = header_len(Features::from_bits_retain(registers.borrow().features));
    let mut device = Reflector::new(&registers.borrow());

    // Buffers by the token of the driver, which has them until it hands them back.
    let (mut tx, mut rx) = (BTreeMap::new(), BTreeMap::new());
    let (mut sent, mut received) = (0, 0);
    for round in 0.. {
        assert!(round < 100 * FRAMES, "no progress: {sent} sent, {received} received");
        device.tx.set_notify(round % 4 == 0);
        device.rx.set_notify(round % 4 == 0);
        while rx.len() < SIZE.min(1 + round % 100) {
            let mut buffer = vec![0u8; 9216];
            // SAFETY: the buffer stays where it is, untouched, until `receive_complete`.
            let token = unsafe { net.receive_begin(&mut buffer) }.unwrap();
            assert!(rx.insert(token, buffer).is_none());
        }
        for _ in 0..1 + round % 29 {
            if sent == FRAMES || tx.len() == SIZE {
                break;
            }
            let mut buffer = vec![0u8; header];
            assert_eq!(net.fill_buffer_header(&mut buffer).unwrap(), header);
            buffer.extend(frame(sent));
            // SAFETY: the buffer stays where it is, untouched, until `transmit_complete`.
            let token = unsafe { net.transmit_begin(&buffer) }.unwrap();
            assert!(tx.insert(token, buffer).is_none());
            sent += 1;
        }
        device.run(1 + round % 50);
        while let Some(token) = net.poll_transmit() {
            let buffer = tx.remove(&token).expect("a token in flight");
            // SAFETY: the buffer of this token.
            assert_eq!(unsafe { net.transmit_complete(token, &buffer) }.unwrap(), 0);
        }
        while let Some(token) = net.poll_receive() {
            let mut buffer = rx.remove(&token).expect("a token in flight");
            // SAFETY: the buffer of this token.
            let (start, len) = unsafe { net.receive_complete(token, &mut buffer) }.unwrap();
            assert_eq!(start, header);
            assert!(
                buffer[start..start + len] == frame(received),
                "frame {received} of {len} bytes"
            );
            received += 1;
        }
        if received == FRAMES && tx.is_empty() {
            break;
        }
    }
    assert_eq!((sent, received), (FRAMES, FRAMES));
    assert_eq!((device.tx.anomalies().total(), device.rx.anomalies().total()), (0, 0));
    assert_eq!((device.tx.outstanding(), device.rx.outstanding()), (0, 0));
    let notified = registers.borrow().notified;
    assert!(notified.iter().all(|count| *count > 0) && device.calls > 0);
    // The driver keeps its receive buffers until the end: give them back before they go.
    drop(net);
    drop(rx);
    SHARED.with_borrow_mut(BTreeMap::clear);
}

fn every_size(offered: Features) {
    reflect::<16>(offered);
    reflect::<64>(offered);
    reflect::<256>(offered);
    reflect::<1024>(offered);
    reflect::<4096>(offered);
}

#[test]
fn modern() {
    every_size(Features::VERSION_1 | Features::NET_MAC | Features::NET_STATUS);
}

#[test]
fn legacy_header() {
    every_size(Features::NET_MAC | Features::NET_STATUS);
}

/// Its queue by itself: chains of several readable and writable buffers, which our device fills with what it read.
fn echo<const SIZE: usize>(indirect: bool) {
    let registers = Rc::new(RefCell::new(Registers::default()));
    let offered = if indirect {
        Features::RING_INDIRECT_DESC
    } else {
        Features::empty()
    };
    registers.borrow_mut().features = offered.bits();
    let mut transport = Plain {
        registers: registers.clone(),
        offered,
        config: Config::default(),
        size: SIZE as u16,
    };
    let mut queue = VirtQueue::<PlainMemory, SIZE>::new(&mut transport, TRANSMIT, indirect, false).unwrap();
    let mut other = VirtQueue::<PlainMemory, SIZE>::new(&mut transport, RECEIVE, indirect, false).unwrap();
    let mut device = Reflector::new(&registers.borrow());
    let mut flight = VecDeque::new();
    let (mut sent, mut back) = (0, 0);
    while back < FRAMES {
        while sent < FRAMES && queue.available_desc() >= 5 && flight.len() < SIZE / 5 {
            let frame = frame(sent);
            let pieces = [frame[..12].to_vec(), frame[12..26].to_vec(), frame[26..].to_vec()];
            let mut room = [vec![0u8; 1 + frame.len() / 3], vec![0u8; frame.len()]];
            let [first, second] = &mut room;
            // SAFETY: the buffers stay where they are, untouched, until `pop_used`.
            let token = unsafe {
                queue.add(
                    &[&pieces[0], &pieces[1], &pieces[2]],
                    &mut [first.as_mut_slice(), second.as_mut_slice()],
                )
            };
            flight.push_back((token.unwrap(), pieces, room));
            sent += 1;
        }
        let done = |popped: Popped<'_>| {
            assert_eq!(
                (popped.fault, popped.readable.len(), popped.writable.len()),
                (None, 3, 2)
            );
            let read: Vec<u8> = popped.readable.iter().flat_map(bytes_of).collect();
            let mut at = 0;
            for part in popped.writable {
                let n = (read.len() - at).min(part.len as usize);
                // SAFETY: translated, `n` is not above the part's length, and on this thread alone.
                unsafe { part.ptr.as_ptr().copy_from_nonoverlapping(read[at..].as_ptr(), n) };
                at += n;
            }
            Verdict::Done(at as u32)
        };
        device.tx.pop_each(&Shared, &mut device.chain, 7, done).unwrap();
        device.tx.publish();
        while let Some(token) = queue.peek_used() {
            let (expected, pieces, mut room) = flight.pop_front().unwrap();
            assert_eq!(token, expected);
            let [first, second] = &mut room;
            let inputs = [pieces[0].as_slice(), &pieces[1], &pieces[2]];
            // SAFETY: the buffers of this token.
            let len = unsafe { queue.pop_used(token, &inputs, &mut [first.as_mut_slice(), second.as_mut_slice()]) };
            let frame = frame(back);
            assert_eq!(len.unwrap() as usize, frame.len());
            assert!(room.concat()[..frame.len()] == frame, "frame {back}");
            back += 1;
        }
    }
    assert_eq!((device.tx.anomalies().total(), device.tx.outstanding()), (0, 0));
    // One more, so that the other queue is not only there to be set up.
    let mut last = [0u8; 64];
    // SAFETY: the buffer stays until `pop_used`.
    let token = unsafe { other.add(&[], &mut [&mut last]) }.unwrap();
    device.frames.push(vec![9; 64]);
    device.run(1);
    // SAFETY: the buffer of this token.
    assert_eq!(unsafe { other.pop_used(token, &[], &mut [&mut last]) }, Ok(64));
    assert_eq!(last, [9; 64]);
}

#[test]
fn chains() {
    for indirect in [false, true] {
        echo::<16>(indirect);
        echo::<64>(indirect);
        echo::<256>(indirect);
        echo::<1024>(indirect);
        echo::<4096>(indirect);
    }
}
