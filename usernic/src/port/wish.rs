//! What an application asks a port's control thread to do while the port is in use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Port;
use crate::error::Error;
use crate::filter::Filter;
use crate::spec::Kind;
use crate::stats::DeviceStats;

/// Something to be done by the thread that owns the connection and the control sides of the gates.
#[derive(Debug)]
pub(super) enum Wish {
    /// Receive only what the filter lets in.
    Filter(Option<Box<Filter>>),
    /// Use so many queue pairs.
    Queues(u16),
    /// Have the link up, or down.
    Link(bool),
    /// Tell the other side where the port's address is.
    Announce,
    /// For the device of a `vf` port.
    Vf(VfWish),
}

/// What only a device can do.
#[derive(Debug)]
pub(super) enum VfWish {
    /// Take another address.
    Mac([u8; 6]),
    /// Take packets of so many bytes.
    Mtu(u16),
    /// Read the counters.
    Count,
}

/// The answer of ports without a device.
pub(super) const NO_DEVICE: Error = Error::NotGranted {
    why: "only a vf port has a device that could do it",
};

/// Where the answer goes.
type Answer = SyncSender<Result<(), Error>>;

/// A wish on its way. Whoever sets the flag first decides: the control thread takes the wish, or the caller gives it up.
struct Sent {
    wish: Wish,
    answer: Answer,
    decided: Arc<AtomicBool>,
}

/// Wishes on their way.
pub(super) struct Wishes {
    sender: Sender<Sent>,
    receiver: Mutex<Option<Receiver<Sent>>>,
}

impl Wishes {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel();
        Wishes {
            sender,
            receiver: Mutex::new(Some(receiver)),
        }
    }

    /// The next one; by the control thread.
    pub(super) fn next(&self) -> Option<(Wish, Answer)> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = receiver.as_ref()?;
        loop {
            let Sent { wish, answer, decided } = receiver.try_recv().ok()?;
            if !decided.swap(true, Ordering::AcqRel) {
                return Some((wish, answer));
            }
        }
    }

    /// Nobody grants wishes any more: who waits is told so.
    pub(super) fn close(&self) {
        *self.receiver.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Port {
    fn wish(&self, wish: Wish) -> Result<(), Error> {
        let inner = &self.inner;
        let (answer, answered) = sync_channel(1);
        let decided = Arc::new(AtomicBool::new(false));
        let dead = Error::NotGranted {
            why: "the port is dead",
        };
        let sent = Sent {
            wish,
            answer,
            decided: Arc::clone(&decided),
        };
        if inner.wishes.sender.send(sent).is_err() {
            return Err(dead);
        }
        inner.wake();
        // The thread may be in the middle of an operation of its own, which has this limit, and more.
        let limit = Duration::from_millis(u64::from(inner.spec.timeout_ms)) * 2 + Duration::from_secs(1);
        match answered.recv_timeout(limit) {
            Ok(granted) => granted,
            Err(RecvTimeoutError::Disconnected) => Err(dead),
            // Not taken, and never will be.
            Err(RecvTimeoutError::Timeout) if !decided.swap(true, Ordering::AcqRel) => Err(Error::NotGranted {
                why: "the port's control thread is busy with the other side",
            }),
            // Taken: whatever the thread does with it has a limit.
            Err(RecvTimeoutError::Timeout) => answered.recv().unwrap_or(Err(dead)),
        }
    }

    /// Receives only the frames that `filter` lets in, on all queues; `None`: all frames. When this returns it is so, and
    /// after an error it is not, and will not be later. The others are dropped by [`Queue::rx`](crate::Queue::rx), counted in [`Stats::rx_filtered`](crate::Stats::rx_filtered).
    ///
    /// The PF of a `vf` port is asked to let through what the filter lets in: its address, stations, groups, VLANs, and
    /// modes; `None` then stands for what came before the first filter. What the PF lets through besides (it knows groups by a
    /// hash only) is dropped in software.
    ///
    /// # Errors
    /// [`Error::NotGranted`]; [`Error::Vf`] if the PF or the device refuses: promiscuous mode, for one, is never granted by
    /// an 82599, and by others to functions only that are trusted. The filter of before is in force then.
    pub fn set_filter(&self, filter: Option<Filter>) -> Result<(), Error> {
        // A virtual function must be asked for promiscuous mode; for other ports that is no filter.
        let kept = |filter: &Filter| filter.is_active() || self.inner.spec.kind == Kind::Vf;
        self.wish(Wish::Filter(filter.filter(kept).map(Box::new)))
    }

    /// Uses the first `count` queue pairs of a front-end port and lets the others rest: the back-end sends nothing on
    /// them, and what is sent there stays with the application. It holds for later back-ends, too.
    ///
    /// # Errors
    /// [`Error::NotGranted`]: the port has fewer, is a `vhost` port (whose front-end decides), or the back-end cannot.
    pub fn set_queues(&self, count: u16) -> Result<(), Error> {
        let why = match self.inner.spec.kind {
            Kind::VirtioUser => None,
            Kind::Vhost => Some("the front-end decides how many queues a vhost port uses"),
            Kind::Vf => Some("the queues of a virtual function are set up when it starts: pass queues="),
        };
        if let Some(why) = why {
            return Err(Error::NotGranted { why });
        }
        if !(1..=self.queue_count()).contains(&count) {
            return Err(Error::NotGranted {
                why: "the port has no such number of queue pairs",
            });
        }
        self.wish(Wish::Queues(count))
    }

    /// Takes the link of a `vhost` port down, or up again. While it is down nothing is received or sent; the front-end
    /// is told, if it negotiated VIRTIO_NET_F_STATUS. It holds for later front-ends, too.
    ///
    /// # Errors
    /// [`Error::NotGranted`]: this is no `vhost` port, or the port is dead.
    pub fn set_link_up(&self, up: bool) -> Result<(), Error> {
        self.wish(Wish::Link(up))
    }

    /// Has the other side tell the network that the port's address is here: after the port moved, before anything is sent
    /// by itself. A front-end asks its back-end (VHOST_USER_SEND_RARP); a `vhost` port asks the driver on the other side
    /// for gratuitous packets (VIRTIO_NET_F_GUEST_ANNOUNCE).
    ///
    /// # Errors
    /// [`Error::NotGranted`]: the link is down, or the other side cannot.
    pub fn announce(&self) -> Result<(), Error> {
        self.wish(Wish::Announce)
    }

    /// Asks the PF of a `vf` port for another address.
    ///
    /// # Errors
    /// [`Error::Vf`]: the PF refuses, for its administrator set one; the old one stays. [`Error::NotGranted`]: this is no
    /// `vf` port.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<(), Error> {
        self.wish(Wish::Vf(VfWish::Mac(mac)))
    }

    /// Has a `vf` port take packets of up to `mtu` bytes, 68 to 9710. On an 82599 the PF and its functions share the largest
    /// frame, and the PF's own MTU must be above 1500 for one above 1500.
    ///
    /// # Errors
    /// [`Error::Vf`]: the PF refuses; the old one stays. [`Error::NotGranted`]: this is no `vf` port, or not such a size.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), Error> {
        if !(68..=9710).contains(&mtu) {
            return Err(Error::NotGranted {
                why: "an MTU has 68 to 9710 bytes",
            });
        }
        self.wish(Wish::Vf(VfWish::Mtu(mtu)))
    }

    /// What the device of a `vf` port counted since the port was opened.
    ///
    /// # Errors
    /// [`Error::NotGranted`]: this is no `vf` port, or it is dead.
    pub fn device_stats(&self) -> Result<DeviceStats, Error> {
        self.wish(Wish::Vf(VfWish::Count))?;
        Ok(*super::lock(&self.inner.device))
    }

    /// Addresses that the front-end of a `vhost` port said were moved here, since this was asked last: at most
    /// [`Port::ANNOUNCEMENTS`].
    pub fn take_announcements(&self) -> Vec<[u8; 6]> {
        std::mem::take(&mut *super::lock(&self.inner.announced))
    }

    /// Announced addresses that are kept until they are taken.
    pub const ANNOUNCEMENTS: usize = 16;
}
