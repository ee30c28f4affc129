//! What a sleeping application waits for, in the place of an eventfd that the other side holds as well.
//!
//! O_NONBLOCK belongs to the open file description, which the back-end shares: it can clear the flag, and it can empty or
//! fill the counter at any time. A read or a write of such an eventfd may therefore sleep for ever, and DPDK's own read of it
//! (`eal_intr_proc_rxtx_intr`) would sleep or spin in the application's thread. So nobody reads it. DPDK gets an epoll
//! instance, which is this process's alone: edge-triggered, it becomes readable with each notification, whatever the counter
//! says. A second eventfd, which nobody else has, stands for notifications that will not come.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use crate::setup::{Fault, Outcome};

/// See the module.
pub(crate) struct Wake {
    epoll: OwnedFd,
    own: OwnedFd,
    /// Kept open as long as it is watched.
    _call: Arc<OwnedFd>,
}

impl Wake {
    /// Watches `call`.
    pub(crate) fn new(call: Arc<OwnedFd>) -> Outcome<Self> {
        let fault = |what: &str| {
            let what = what.to_owned();
            move |e: rustix::io::Errno| Fault::new(e, format!("{what}: {e}"))
        };
        let own = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(fault("eventfd(2)"))?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(fault("epoll_create1(2)"))?;
        for event in [&*call, &own] {
            let data = EventData::new_u64(0);
            epoll::add(&epoll, event, data, EventFlags::IN | EventFlags::ET).map_err(fault("epoll_ctl(2)"))?;
        }
        Ok(Wake {
            epoll,
            own,
            _call: call,
        })
    }

    /// What becomes readable.
    pub(crate) fn fd(&self) -> i32 {
        self.epoll.as_raw_fd()
    }

    /// Wakes who waits.
    pub(crate) fn signal(&self) {
        // It does not block, and it is nobody else's; a full counter is readable anyway.
        let _ = rustix::io::write(&self.own, &1u64.to_ne_bytes());
    }

    /// Forgets notifications so far.
    pub(crate) fn clear(&self) {
        let mut events = [MaybeUninit::uninit(); 2];
        // Without a timeout it does not wait. What it says is of no interest.
        let _ = epoll::wait(&self.epoll, &mut events[..], Some(&Timespec::default()));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may end so")]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

    fn is_readable(wake: &Wake) -> bool {
        poll(
            &mut [PollFd::new(&wake.epoll, PollFlags::IN)],
            Some(&Timespec::default()),
        )
        .unwrap()
            == 1
    }

    /// What a back-end can do to the eventfd that it shares: each of these calls would sleep for ever.
    #[test]
    fn nothing_that_the_other_side_does_to_its_eventfd_makes_it_wait() {
        let call = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let theirs = rustix::io::dup(&*call).unwrap();
        let wake = Wake::new(call).unwrap();
        assert!(!is_readable(&wake));

        let flags = fcntl_getfl(&theirs).unwrap();
        fcntl_setfl(&theirs, flags - OFlags::NONBLOCK).unwrap();
        // Empty, and whoever reads sleeps.
        wake.clear();
        wake.signal();
        assert!(is_readable(&wake));
        wake.clear();
        assert!(!is_readable(&wake));

        // Full, and whoever writes sleeps.
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert!(is_readable(&wake));
        wake.clear();
        assert!(!is_readable(&wake), "the counter is full, and was seen");
        wake.signal();
        assert!(is_readable(&wake));
        wake.clear();

        // Each notification counts, whether somebody emptied the counter or not.
        rustix::io::read(&theirs, &mut [0u8; 8]).unwrap();
        for _ in 0..3 {
            rustix::io::write(&theirs, &1u64.to_ne_bytes()).unwrap();
            assert!(is_readable(&wake));
            wake.clear();
            assert!(!is_readable(&wake));
        }
    }
}
