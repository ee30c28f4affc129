//! Setting up, starting and stopping: what happens between a reset and the first packet, in the order that the device
//! wants.

use super::{Setup, Vf};
use crate::access::{RW, Reg, Registers};
use crate::regs::{
    VFDCA_TXCTRL, VFMRQC, VFPSRTYPE, VFRDBAH, VFRDBAL, VFRDH, VFRDLEN, VFRDT, VFRSCCTL, VFRXDCTL, VFSRRCTL, VFSTATUS,
    VFTDBAH, VFTDBAL, VFTDH, VFTDLEN, VFTDT, VFTDWBAH, VFTDWBAL, VFTXDCTL, dca, dctl, psrtype, srrctl,
};
use crate::ring::ring_len;
use crate::{Delay, Error, Rss, RxQueue, Slot, TxQueue};

/// Looks at ENABLE, and the microseconds between.
const ENABLE_TRIES: u32 = 10;
const ENABLE_INTERVAL_US: u32 = 1000;

impl<R: Registers, D: Delay> Vf<R, D> {
    /// Sets the VF up after a reset, before queues start: the frame length, always, since a PF whose MTU is above 1,500
    /// keeps the receiver off until it is told; RSS; and all that was asked for before the reset, addresses, VLANs, modes.
    ///
    /// # Errors
    /// [`Error::MaxFrame`], [`Error::QueueCount`], those of [`Vf::set_rss`] and of the mailbox.
    pub fn configure(&mut self, setup: &Setup) -> Result<(), Error> {
        self.check_standing()?;
        self.check_queues(setup.rx_queues)?;
        if setup.rss.is_some() && !self.model.has_own_rss() {
            return Err(Error::Unsupported(crate::Reason::RssIsThePfs));
        }
        self.set_max_frame(setup.max_frame)?;
        self.regs
            .write(VFPSRTYPE, u32::from(setup.rx_queues >> 1) << psrtype::RQPL_SHIFT);
        match &setup.rss {
            Some(rss) => self.set_rss(rss, setup.rx_queues)?,
            None if !self.model.has_own_rss() => {}
            None if setup.rx_queues > 1 => self.set_rss(&Rss::spread(setup.rx_queues), setup.rx_queues)?,
            None => self.regs.write(VFMRQC, 0),
        }
        self.replay()
    }

    /// Starts a transmit queue.
    ///
    /// # Errors
    /// [`Error::PfReset`] before a reset; [`Error::QueueIndex`] for a queue that the PF did not give;
    /// [`Error::NotDetached`]; [`Error::QueueTimeout`]: the device was told of the queue's memory and may still begin to use
    /// it, so that [`Vf::reset`] must come before the memory is used for something else; [`Error::Gone`].
    pub fn start_tx<Q: Registers, S: AsMut<[Slot]>>(&mut self, queue: &mut TxQueue<Q, S>) -> Result<(), Error> {
        self.check_standing()?;
        queue.check_unused()?;
        if queue.index() >= self.limits.tx {
            return Err(Error::QueueIndex(queue.index()));
        }
        let q = usize::from(queue.index());
        let regs = &self.regs;
        regs.write(VFTDBAL.at(q), queue.address() as u32);
        regs.write(VFTDBAH.at(q), (queue.address() >> 32) as u32);
        regs.write(VFTDLEN.at(q), ring_len(queue.size()) as u32);
        regs.write(VFTDH.at(q), 0);
        regs.write(VFTDT.at(q), 0);
        // Done descriptors are written back in place, in order, and their head nowhere else.
        regs.write(VFTDWBAH.at(q), 0);
        regs.write(VFTDWBAL.at(q), 0);
        regs.update(VFDCA_TXCTRL.at(q), dca::TX_DESC_WRO, 0);
        // Reports come by RS, one by one: WTHRESH, which gathers them, is 0.
        let thresholds = dctl::thresholds(32, 1, 0);
        regs.write(VFTXDCTL.at(q), thresholds);
        regs.write(VFTXDCTL.at(q), thresholds | dctl::ENABLE);
        self.wait_enabled(VFTXDCTL.at(q), true, queue.index())?;
        queue.set_running(true);
        queue.publish();
        Ok(())
    }

    /// Starts a receive queue, and gives it what was posted before. Packets that find no buffer are dropped, so that a
    /// VF that nobody polls does not stop its port.
    ///
    /// # Errors
    /// As [`Vf::start_tx`].
    pub fn start_rx<Q: Registers, S: AsMut<[Slot]>>(&mut self, queue: &mut RxQueue<Q, S>) -> Result<(), Error> {
        self.check_standing()?;
        queue.check_unused()?;
        if queue.index() >= self.limits.rx {
            return Err(Error::QueueIndex(queue.index()));
        }
        let q = usize::from(queue.index());
        let regs = &self.regs;
        regs.write(VFRDBAL.at(q), queue.address() as u32);
        regs.write(VFRDBAH.at(q), (queue.address() >> 32) as u32);
        regs.write(VFRDLEN.at(q), ring_len(queue.size()) as u32);
        regs.write(VFRDH.at(q), 0);
        regs.write(VFRDT.at(q), 0);
        let units = queue.buffer_len() / srrctl::PACKET_UNIT;
        regs.write(VFSRRCTL.at(q), units | srrctl::DESCTYPE_ADV_ONEBUF | srrctl::DROP_EN);
        regs.write(VFRSCCTL.at(q), 0);
        let strip = if queue.options().vlan_strip { dctl::VME } else { 0 };
        regs.write(VFRXDCTL.at(q), strip | dctl::ENABLE);
        self.wait_enabled(VFRXDCTL.at(q), true, queue.index())?;
        queue.set_running(true);
        // Not before the queue is enabled (§4.6.7.1).
        queue.publish();
        Ok(())
    }

    /// Has the device take VLAN tags out of what the queue receives, or leave them in, also while it runs: frames that have
    /// come already are as they were.
    pub fn set_vlan_strip<Q: Registers, S: AsMut<[Slot]>>(&mut self, queue: &mut RxQueue<Q, S>, on: bool) {
        queue.set_vlan_strip(on);
        if queue.is_running() && self.is_known() {
            let (clear, set) = if on { (0, dctl::VME) } else { (dctl::VME, 0) };
            self.regs.update(VFRXDCTL.at(queue.index().into()), clear, set);
        }
    }

    /// Stops a transmit queue. What is not sent yet is not sent any more; its buffers come back by
    /// [`TxQueue::detach_each`].
    ///
    /// # Errors
    /// [`Error::QueueTimeout`]: the device may still use its memory, and [`Vf::reset`] must come before the memory is used for
    /// something else. [`Error::Gone`].
    pub fn stop_tx<Q: Registers, S: AsMut<[Slot]>>(&mut self, queue: &mut TxQueue<Q, S>) -> Result<(), Error> {
        queue.set_running(false);
        let register = VFTXDCTL.at(queue.index().into());
        self.regs.write(register, dctl::SWFLSH);
        self.wait_enabled(register, false, queue.index())
    }

    /// Stops a receive queue; its buffers come back by [`RxQueue::poll_each`] and then [`RxQueue::detach_each`].
    ///
    /// # Errors
    /// As [`Vf::stop_tx`].
    pub fn stop_rx<Q: Registers, S: AsMut<[Slot]>>(&mut self, queue: &mut RxQueue<Q, S>) -> Result<(), Error> {
        queue.set_running(false);
        let register = VFRXDCTL.at(queue.index().into());
        self.regs.update(register, dctl::ENABLE, 0);
        self.wait_enabled(register, false, queue.index())?;
        // What was under way still arrives (§4.6.7.1).
        self.delay.delay_us(100);
        Ok(())
    }

    /// Masks all interrupts and stops all queues at once, without waiting for each: before the VF is given back. After it,
    /// only [`Vf::reset`] starts anything again.
    pub fn stop(&mut self) {
        self.silence();
        if self.is_known() {
            self.standing = super::Standing::Lost;
        }
    }

    fn wait_enabled(&mut self, register: Reg<RW>, on: bool, index: u8) -> Result<(), Error> {
        for _ in 0..ENABLE_TRIES {
            let value = self.regs.read(register);
            if value == u32::MAX && self.regs.read(VFSTATUS) == u32::MAX {
                return Err(self.note(Error::Gone));
            }
            if (value & dctl::ENABLE != 0) == on {
                return Ok(());
            }
            self.delay.delay_us(ENABLE_INTERVAL_US);
        }
        Err(Error::QueueTimeout(index))
    }
}
