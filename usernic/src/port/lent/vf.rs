//! Lent memory on a virtual function.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hugemem::Segment as Memory;
use ixgbevf::{RxOptions, Segment, Setup, ring_len};
use virtio_ring::Features;

use super::{Far, Lengths, LentPair, LentPort, LentRegion, Rings as AnyRings, check};
use crate::error::{Error, Tried};
use crate::memory::{MemorySource, Request};
use crate::queue::Buffer;
use crate::spec::PortSpec;
use crate::vf::{self, Function, Hardware, Health, Tx};

/// The control of the device. Dropping it ends every access of the device's.
pub(super) struct Device {
    function: Function,
    /// It was reset, by its PF, or is wanted back: nothing runs any more.
    lost: bool,
    /// Keeps the rings mapped until the device is gone.
    _rings: Arc<Memory>,
}

/// A pair of rings.
pub(super) struct Rings(vf::Rings);

impl Device {
    /// Whether the link is up.
    pub(super) fn link(&mut self) -> bool {
        if self.lost {
            return false;
        }
        match self.function.service() {
            Health::Well => {
                self.function.unmask_mailbox();
                self.function.link().is_some()
            }
            Health::Reset => {
                self.lost = true;
                false
            }
            Health::Gone(why) => {
                tracing::error!("{}: {why}: close the port", self.function.name());
                self.function.stop();
                self.lost = true;
                false
            }
        }
    }
}

impl Rings {
    pub(super) fn buffer_len(&self) -> u32 {
        self.0.rx.buffer_len()
    }

    pub(super) fn takes(len: u32) -> bool {
        Tx::takes(len)
    }

    pub(super) fn rx_free(&self) -> usize {
        self.0.rx.free().into()
    }

    /// One less: for a context.
    pub(super) fn tx_free(&self) -> usize {
        usize::from(self.0.tx.free()).saturating_sub(1)
    }

    #[inline]
    pub(super) fn post<B: Buffer>(&mut self, buffers: impl Iterator<Item = B>) -> usize {
        let least = self.0.rx.buffer_len();
        let buffers = buffers.map_while(|buffer| {
            let len = buffer.len();
            (len >= least).then(|| (segment(&buffer), buffer.cookie()))
        });
        // SAFETY: what a `Buffer` promises.
        let posted = unsafe { self.0.rx.add_each(buffers) };
        self.0.rx.publish();
        posted
    }

    #[inline]
    pub(super) fn send<B: Buffer>(&mut self, frames: impl Iterator<Item = B>) -> (usize, u64) {
        let mut bytes = 0;
        let frames = frames.map_while(|frame| {
            if !Tx::takes(frame.len()) || frame.next().is_some() {
                return None;
            }
            bytes += u64::from(frame.len());
            Some((segment(&frame), frame.cookie()))
        });
        // SAFETY: as above.
        let sent = unsafe { self.0.tx.add_each(frames) };
        self.0.tx.publish();
        (sent, bytes)
    }

    #[inline]
    pub(super) fn receive(&mut self, max: usize, mut each: impl FnMut(u64, u32)) -> usize {
        self.0.rx.poll_each(max, |received| {
            // A piece of a frame that one buffer does not hold is none.
            let len = if received.is_whole() { received.len } else { 0 };
            each(received.cookie, len);
        })
    }

    #[inline]
    pub(super) fn sent(&mut self, max: usize, each: impl FnMut(u64)) -> usize {
        self.0.tx.poll_each(max, each)
    }

    pub(super) fn arm(&mut self) -> bool {
        self.0.interrupts.enable(self.0.vector);
        self.has_done()
    }

    pub(super) fn has_done(&self) -> bool {
        self.0.rx.has_done()
    }

    pub(super) fn anomalies(&self) -> u64 {
        vf::anomalies(&self.0.rx)
    }
}

#[inline(always)]
fn segment<B: Buffer>(buffer: &B) -> Segment {
    Segment {
        addr: buffer.address(),
        len: buffer.len(),
    }
}

impl LentPort {
    /// The same on a device that the caller has: a model of one, for example.
    ///
    /// # Errors
    /// Those of [`open`](LentPort::open).
    ///
    /// # Safety
    /// As for [`open`](LentPort::open).
    pub unsafe fn open_vf(
        spec: &PortSpec,
        hardware: Box<dyn Hardware>,
        regions: &[LentRegion],
        memory: &mut dyn MemorySource,
    ) -> Result<Self, Error> {
        spec.check()?;
        spec.check_vf()?;
        if spec.csum == Some(true) || spec.vlan_strip {
            return Err(Error::NotGranted {
                why: "with lent memory there are no offloads: leave csum=1 and vlan_strip=1 out",
            });
        }
        let mut spec = spec.clone();
        super::super::place(&crate::vfio::Host::default(), &mut spec)?;
        let lent = check(regions)?;
        let each = ring_len(spec.queue_size);
        let request = Request {
            len: 2 * usize::from(spec.queues) * each,
            name: "usernic-rings",
            numa: spec.numa,
        };
        let pause = hardware.pause();
        let mut function = Function::on(hardware, pause, &spec)?;
        let rings = Arc::new(crate::memory::allocate(memory, &request)?.segment);
        let mut pieces = vec![(rings.base().as_ptr() as u64, rings.len() as u64)];
        pieces.extend(
            regions
                .iter()
                .map(|region| (region.address.as_ptr() as u64, region.len as u64)),
        );
        // SAFETY: the regions stay mapped, by the caller; the rings' segment is held by the device, and goes after it.
        unsafe { function.lend(&pieces) }?;
        function.set_bus_master(true)?;
        function.begin(&spec)?;
        let setup = Setup {
            max_frame: vf::frame_of(spec.mtu),
            rx_queues: spec.queues as u8,
            rss: None,
        };
        function.set_up(&setup)?;
        let open = Arc::new(AtomicBool::new(true));
        let (mut pairs, mut wakers) = (Vec::new(), Vec::new());
        for index in 0..spec.queues as u8 {
            let mut made = ring_pair(&function, &spec, index, &rings)?;
            function.start(Some(&mut made.0.rx), Some(&mut made.0.tx))?;
            let (events, waker) = super::events(&event(&function, index)?)?;
            wakers.push(Arc::clone(&waker));
            pairs.push(Some(LentPair {
                events,
                waker,
                rings: AnyRings::Device(made),
                memory: lent.clone(),
                open: Arc::clone(&open),
                lengths: Lengths::of(spec.mtu),
                _rings: Arc::clone(&rings),
            }));
        }
        function.unmask_mailbox();
        Ok(LentPort {
            far: Far::Device(Some(Device {
                function,
                lost: false,
                _rings: rings,
            })),
            up: true,
            features: Features::empty(),
            mtu: spec.mtu,
            wakers,
            pairs,
            open,
        })
    }
}

fn ring_pair(function: &Function, spec: &PortSpec, index: u8, rings: &Memory) -> Result<Rings, Error> {
    let size = spec.queue_size;
    let memory = |which: usize| {
        let at = (2 * usize::from(index) + which) * ring_len(size);
        // SAFETY: the segment was asked for with room for all rings.
        let ptr = unsafe { rings.base().add(at) };
        // Lent memory is where the device finds it.
        ixgbevf::Memory {
            ptr,
            addr: ptr.as_ptr() as u64,
        }
    };
    let options = RxOptions {
        buffer_len: spec.buffer_size,
        vlan_strip: false,
    };
    // SAFETY: the rings are inside the segment, which the pair and the device keep mapped, and are nobody else's.
    unsafe { function.rings(index, [memory(0), memory(1)], [size; 2], options) }.map(Rings)
}

fn event(function: &Function, queue: u8) -> Result<OwnedFd, Error> {
    let event = function.event_of(queue).ok_or(Error::NotGranted {
        why: "the device has no interrupts",
    })?;
    event.try_clone().tried("dup(2) of an interrupt's eventfd")
}
