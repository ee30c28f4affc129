//! A machine with a model's virtual functions: ports drive them in this process, through nothing but registers, eventfds
//! and the memory that they mapped.

// Each test binary uses a part of it.
#![allow(dead_code, unused_imports)]

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use hwtest::frames::{checksums_are_right, frame, ipv4};
use rustix::event::{EventfdFlags, eventfd};
use usernic::memory::Automatic;
use usernic::spec::PortSpec;
use usernic::vf::{Hardware, Mapped, Reach};
use usernic::{Burst, Error, Port, Queue, vfio};
use vf_model::{Access, Complaint, Registers, Settings, Shared, VfHandle};

/// Longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The device, and a thread that moves its packets and raises its interrupts.
pub struct Machine {
    pub device: Shared,
    functions: Vec<Arc<Function>>,
    stop: Arc<AtomicBool>,
    frozen: Arc<AtomicBool>,
    pump: Option<JoinHandle<()>>,
}

/// What outlives a `Hardware` of one function.
#[derive(Default)]
struct Function {
    vectors: Mutex<Vec<OwnedFd>>,
    open: AtomicBool,
    maps: AtomicUsize,
    /// The device may reach memory.
    master: AtomicBool,
    /// Times that memory was taken while the device could still reach it.
    violations: AtomicU64,
    /// Looks at VFMAILBOX that a reset takes, those that are left, and what they hide.
    slow_resets: AtomicU32,
    slow: AtomicU32,
    hidden: AtomicU32,
    /// Writes to the mailbox before the end of a reset was told.
    early: AtomicU64,
}

impl Machine {
    pub fn new(settings: Settings) -> Self {
        let device = Shared::new(settings);
        let functions: Vec<Arc<Function>> = (0..settings.vfs).map(|_| Arc::default()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let frozen = Arc::new(AtomicBool::new(false));
        let pump = {
            let (device, functions) = (device.clone(), functions.clone());
            let (stop, frozen) = (Arc::clone(&stop), Arc::clone(&frozen));
            std::thread::spawn(move || pump(&device, &functions, &stop, &frozen))
        };
        Machine {
            device,
            functions,
            stop,
            frozen,
            pump: Some(pump),
        }
    }

    /// Two functions of which nothing is lost.
    pub fn two() -> Self {
        Self::new(Settings {
            vfs: 2,
            hold: true,
            ..Settings::default()
        })
    }

    pub fn hardware(&self, index: usize) -> Box<dyn Hardware> {
        self.functions[index].open.store(true, Ordering::SeqCst);
        Box::new(ModelVf {
            vf: self.device.vf(index),
            function: Arc::clone(&self.functions[index]),
        })
    }

    /// A port on a function, opened; its link is up.
    pub fn port(&self, index: usize, keys: &str) -> Port {
        let port = self.try_port(index, keys).unwrap();
        assert!(port.wait_link(LIMIT), "the link comes up");
        port
    }

    pub fn try_port(&self, index: usize, keys: &str) -> Result<Port, Error> {
        let spec: PortSpec = format!("vf,memory=memfd{keys}").parse()?;
        let mut memory = Automatic::from_spec(&spec);
        Port::open_vf(spec, self.hardware(index), &mut memory)
    }

    /// Mappings made for a function so far.
    pub fn maps(&self, index: usize) -> usize {
        self.functions[index].maps.load(Ordering::SeqCst)
    }

    /// From now on a reset of the function takes so many looks at VFMAILBOX.
    pub fn slow_resets(&self, index: usize, looks: u32) {
        self.functions[index].slow_resets.store(looks, Ordering::SeqCst);
    }

    /// Nothing moves, or again.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::SeqCst);
    }

    /// That the drivers did nothing that they should not have done, and gave everything back. With no port open.
    pub fn finish(self) {
        self.finish_but_for(&[]);
    }

    /// The same after a reset of the PF, of which a driver is told later than it happens: tails are written meanwhile.
    pub fn finish_after_pf_reset(self) {
        self.finish_but_for(&[Complaint::TailOfStoppedQueue]);
    }

    fn finish_but_for(self, excused: &[Complaint]) {
        for (index, function) in self.functions.iter().enumerate() {
            assert!(!function.open.load(Ordering::SeqCst), "VF {index} is still open");
            assert_eq!(
                function.violations.load(Ordering::SeqCst),
                0,
                "memory taken from a device that could reach it"
            );
            let early = function.early.load(Ordering::SeqCst);
            assert_eq!(early, 0, "VF {index} used the mailbox before the end of a reset");
            self.device.with(|nic| {
                let complaints = nic.complaints(index).clone();
                let mut others = complaints.iter().filter(|(complaint, _)| !excused.contains(complaint));
                assert!(others.next().is_none(), "VF {index}: {complaints}");
                assert_eq!(
                    nic.dma(index).fault_count(),
                    0,
                    "VF {index}: {:?}",
                    nic.dma(index).faults()
                );
                assert!(nic.dma(index).is_empty(), "VF {index} is still mapped");
                assert_eq!(nic.halts(index), [], "VF {index}");
            });
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(pump) = self.pump.take() {
            let ended = pump.join();
            assert!(std::thread::panicking() || ended.is_ok());
        }
    }
}

fn pump(device: &Shared, functions: &[Arc<Function>], stop: &AtomicBool, frozen: &AtomicBool) {
    let mut last = Instant::now();
    while !stop.load(Ordering::SeqCst) {
        let moved = !frozen.load(Ordering::SeqCst) && device.step();
        let now = Instant::now();
        device.with(|nic| nic.advance(now - last));
        last = now;
        for (index, function) in functions.iter().enumerate() {
            let fired = device.with(|nic| nic.take_interrupts(index));
            let vectors = function.vectors.lock().unwrap();
            for (vector, fd) in vectors.iter().enumerate() {
                if fired >> vector & 1 == 1 {
                    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
                }
            }
        }
        if !moved {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

struct ModelVf {
    vf: VfHandle,
    function: Arc<Function>,
}

/// The registers, with resets that take as long as a test wants.
struct ModelRegisters(VfHandle, Arc<Function>);

impl ixgbevf::Registers for ModelRegisters {
    fn read(&self, offset: u32) -> u32 {
        let value = self.0.read32(offset);
        if offset != 0x2fc {
            return value;
        }
        let Function { slow, hidden, .. } = &*self.1;
        if slow.load(Ordering::SeqCst) > 0 {
            // RSTD comes later; it clears when it is read, so that it is kept.
            slow.fetch_sub(1, Ordering::SeqCst);
            hidden.fetch_or(value & 0x80, Ordering::SeqCst);
            return value & !0xc0;
        }
        value | hidden.swap(0, Ordering::SeqCst)
    }

    fn write(&self, offset: u32, value: u32) {
        let Function {
            slow,
            slow_resets,
            early,
            ..
        } = &*self.1;
        if offset == 0 {
            slow.store(slow_resets.load(Ordering::SeqCst), Ordering::SeqCst);
        } else if matches!(offset, 0x200..=0x2fc) && slow.load(Ordering::SeqCst) > 0 {
            early.fetch_add(1, Ordering::SeqCst);
        }
        self.0.write32(offset, value);
    }
}

struct Guard {
    vf: VfHandle,
    function: Arc<Function>,
    address: u64,
    len: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.function.open.load(Ordering::SeqCst) && self.function.master.load(Ordering::SeqCst) {
            self.function.violations.fetch_add(1, Ordering::SeqCst);
        }
        let index = self.vf.index();
        self.vf
            .device()
            .with(|nic| nic.dma(index).unmap(self.address, self.len));
    }
}

impl Hardware for ModelVf {
    fn name(&self) -> String {
        format!("model {}", self.vf.index())
    }

    fn ids(&self) -> Result<(u16, u16), vfio::Error> {
        Ok((0x8086, self.vf.device().with(|nic| nic.pf().kind.device_id())))
    }

    fn registers(&self) -> Result<Reach, vfio::Error> {
        let function = Arc::clone(&self.function);
        Ok(Reach::other(ModelRegisters(self.vf.clone(), function)))
    }

    fn enable_vectors(&self, most: usize) -> Result<Vec<OwnedFd>, vfio::Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fds: Vec<OwnedFd> = (0..most.min(3)).map(|_| eventfd(0, flags).unwrap()).collect();
        *self.function.vectors.lock().unwrap() = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        Ok(fds)
    }

    unsafe fn map(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, vfio::Error> {
        let index = self.vf.index();
        // Neither ours nor below 4 GiB, so that no half of an address is left out unseen.
        let address = 0x12_0000_0000 + ((index as u64) << 36);
        // SAFETY: the caller's promise.
        unsafe { self.map_at(address, addr, len) }
    }

    unsafe fn map_in_place(&self, addr: NonNull<u8>, len: usize) -> Result<Mapped, vfio::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.map_at(addr.as_ptr() as u64, addr, len) }
    }

    fn set_bus_master(&self, on: bool) -> Result<(), vfio::Error> {
        self.function.master.store(on, Ordering::SeqCst);
        Ok(())
    }

    fn pause(&self) -> Box<dyn FnMut(u32) + Send> {
        // The model works between two accesses: nothing is gained by waiting.
        Box::new(|_| std::thread::yield_now())
    }
}

impl ModelVf {
    unsafe fn map_at(&self, address: u64, addr: NonNull<u8>, len: usize) -> Result<Mapped, vfio::Error> {
        self.function.maps.fetch_add(1, Ordering::SeqCst);
        let index = self.vf.index();
        self.vf.device().with(|nic| {
            // SAFETY: the caller's promise; the guard takes it back.
            unsafe { nic.dma(index).map(address, addr, len as u64, Access::ReadWrite) }.unwrap()
        });
        Ok(Mapped {
            address,
            guard: Box::new(Guard {
                vf: self.vf.clone(),
                function: Arc::clone(&self.function),
                address,
                len: len as u64,
            }),
        })
    }
}

impl Drop for ModelVf {
    fn drop(&mut self) {
        let index = self.vf.index();
        self.vf.device().with(|nic| nic.reset_vf(index));
        self.function.vectors.lock().unwrap().clear();
        self.function.open.store(false, Ordering::SeqCst);
    }
}

/// Sends frames, all of them.
pub fn send(queue: &mut Queue, frames: &[Vec<u8>]) {
    let deadline = Instant::now() + LIMIT;
    let mut burst = Burst::new(32);
    for chunk in frames.chunks(32) {
        while burst.len() < chunk.len() {
            let missing = chunk.len() - burst.len();
            queue.alloc(&mut burst, missing);
            assert!(Instant::now() < deadline, "buffers come back");
        }
        for (packet, frame) in burst.iter_mut().zip(chunk) {
            packet.copy_from(frame).unwrap();
        }
        flush(queue, &mut burst);
    }
}

/// Sends the packets of a burst, all of them.
pub fn flush(queue: &mut Queue, burst: &mut Burst) {
    let deadline = Instant::now() + LIMIT;
    while !burst.is_empty() {
        queue.tx(burst);
        assert!(Instant::now() < deadline, "what is sent is taken");
    }
}

/// Receives so many frames.
pub fn receive(queue: &mut Queue, count: usize) -> Vec<Vec<u8>> {
    receive_with(queue, count, |packet| packet.into_private())
}

pub fn receive_with<T>(queue: &mut Queue, count: usize, mut each: impl FnMut(usernic::Packet) -> T) -> Vec<T> {
    let deadline = Instant::now() + LIMIT;
    let mut received = Vec::new();
    let mut burst = Burst::new(32);
    while received.len() < count {
        queue.rx(&mut burst);
        received.extend(burst.drain().map(&mut each));
        assert!(Instant::now() < deadline, "{} of {count} frames came", received.len());
        if received.len() < count {
            std::thread::yield_now();
        }
    }
    received
}

/// Waits until something is so.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
