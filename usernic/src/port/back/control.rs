//! The control queue of a `vhost` port, from the device side: the control thread reads commands off it and answers them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vhost_proto::channel::notice;
use vhost_proto::message::BackendRequest;
use virtio_ring::any::Device;
use virtio_ring::net::Ack;
use virtio_ring::{Chain, Head, Part};

use super::{LOOK, Served};
use crate::copy::copy;
use crate::packet::Marks;
use crate::queue::drain;
use crate::regions::Regions;

/// How often a control queue without a kick is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Commands of a control queue that are obeyed at a time, before the connection is looked at again.
const COMMANDS: usize = 64;

/// Segments of one command at the most.
const MAX_PARTS: usize = 256;

/// Bytes of one command that are read: the tables of ten thousand addresses.
const MAX_COMMAND: usize = 64 << 10;

/// The ring.
pub(super) struct ControlRing {
    /// Which virtqueue it is.
    pub(super) index: usize,
    pub(super) call: Option<OwnedFd>,
    device: Device,
    memory: Arc<Regions>,
    chain: Chain<Box<[Part]>>,
}

// SAFETY: the ring's memory is reached through this value alone on our side; the parts in `chain` are read only after they
// were written for the chain that was popped last, and `memory` keeps what they point to mapped.
unsafe impl Send for ControlRing {}

impl ControlRing {
    /// A ring in `memory`.
    pub(super) fn new(
        index: usize,
        mut device: Device,
        memory: Arc<Regions>,
        call: Option<OwnedFd>,
        unused: bool,
    ) -> Self {
        device.set_notify(true);
        let mut ring = ControlRing {
            index,
            call,
            device,
            memory,
            chain: Chain::new(vec![Part::default(); MAX_PARTS].into_boxed_slice()),
        };
        // Whoever was on the ring before may have ended between an answer and saying so.
        if !unused {
            ring.signal();
        }
        ring
    }

    fn signal(&mut self) {
        if self.device.publish()
            && let Some(call) = &self.call
        {
            // Without a signal the front-end waits in vain, and that is all.
            let _ = crate::notify::signal(call);
        }
    }

    /// The next command, copied out of the front-end's memory; one that cannot be read is empty, which is no command.
    /// `None`: there is none, and a kick was asked for.
    pub(super) fn next(&mut self) -> Option<(Head, Vec<u8>)> {
        // Bound, against a front-end that changes its mind without end.
        for _ in 0..4 {
            if let Ok(Some(head)) = self.device.pop(&*self.memory, &mut self.chain) {
                return Some((head, self.read()));
            }
            if self.device.is_broken() || !self.device.set_notify(true) {
                break;
            }
        }
        None
    }

    fn read(&self) -> Vec<u8> {
        let len = self.chain.readable_len() as usize;
        let mut bytes = Vec::new();
        if self.chain.fault().is_some() || len > MAX_COMMAND {
            return bytes;
        }
        bytes.reserve(len);
        for part in self.chain.readable() {
            let at = bytes.len();
            bytes.resize(at + part.len as usize, 0);
            // SAFETY: the part is valid for reads of its length; the place is so long.
            unsafe { copy(part.ptr.as_ptr(), bytes[at..].as_mut_ptr(), part.len as usize) };
        }
        bytes
    }

    /// Answers the command that [`next`](ControlRing::next) gave.
    pub(super) fn answer(&mut self, head: Head, ack: Ack) {
        let place = self.chain.writable().first().filter(|_| self.chain.fault().is_none());
        let mut written = 0;
        if let Some(part) = place {
            // SAFETY: the part is valid for writes of its length, which is not 0.
            unsafe { part.ptr.as_ptr().write_volatile(ack.0) };
            written = 1;
        }
        self.device.push(head, written);
        self.signal();
    }

    /// Where whoever goes on with the ring is to begin.
    pub(super) fn base(&self) -> u32 {
        self.device.base()
    }
}

impl Served {
    /// Tells the front-end that the configuration space is another one.
    pub(super) fn config_changed(&mut self) {
        let Some(channel) = &self.channel else { return };
        let message = notice(BackendRequest::ConfigChangeMsg, None, false);
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        if rustix::net::send(channel, message.bytes(), flags) != Ok(message.bytes().len()) {
            // A part of a message is the end of a stream. Who does not read does not want to know.
            tracing::debug!("the front-end does not read its channel of back-end requests");
            self.set_channel(None);
        }
    }

    /// The device as it is before a driver has set it up.
    pub(super) fn reset_net(&mut self) {
        self.net.reset(self.features, self.inner.mac());
        self.use_net();
    }

    /// Has the queues do what the driver said.
    pub(super) fn use_net(&mut self) {
        let takes = Marks::guest(self.net.offloads());
        let (admits, hasher) = (self.net.admits(), self.net.hasher());
        self.change_all(|pair| {
            pair.admits = admits.clone();
            pair.hasher = hasher.clone();
            pair.offloads.takes = takes;
        });
        self.inner.set_steering(self.net.steering());
    }

    /// What to sleep on for the control queue, and for how long at the most.
    pub(super) fn control_kick(&self) -> (Option<BorrowedFd<'_>>, Duration) {
        let Some(control) = &self.control else {
            return (None, LOOK);
        };
        match self.rings[control.index].kick {
            Some(_) => (Some(self.kicks.as_fd()), LOOK),
            None => (None, POLL),
        }
    }

    /// Obeys what the control queue has. What a command says is so before it is answered.
    pub(super) fn serve_control(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        drain(&self.kicks);
        self.again = false;
        for turn in 0.. {
            if turn == COMMANDS {
                // The rest comes after a look at the connection.
                self.again = true;
                break;
            }
            let Some((head, bytes)) = control.next() else { break };
            let (ack, changed) = self.net.obey(&bytes);
            if changed {
                self.use_net();
            }
            control.answer(head, ack);
        }
        self.control = Some(control);
    }

    pub(super) fn is_control(&self, index: usize) -> bool {
        self.net.control_index() == Some(index)
    }
}
