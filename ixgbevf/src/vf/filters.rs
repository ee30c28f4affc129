//! What the PF is asked to let through: addresses, multicasts, VLANs, frame length, modes. All of it is remembered, since
//! the PF forgets it when the VF is reset.

use super::Vf;
use crate::access::Registers;
use crate::message::{
    Api, FAILURE, MAX_MULTICAST, Request, SUCCESS, WORDS, XcastMode, check_mac, mac_words, multicast_hash,
};
use crate::{Delay, Error, MAX_FRAME, Model, Reason};

/// Unicast addresses beside the first that are remembered.
const MAX_UNICAST: usize = 16;

/// What was asked for, to be asked for again.
#[derive(Clone, Debug)]
pub(super) struct Filters {
    /// Which bits of a multicast address the device hashes by.
    hash_kind: u8,
    /// Set by the caller.
    mac: Option<[u8; 6]>,
    unicast: [[u8; 6]; MAX_UNICAST],
    unicast_count: usize,
    multicast: [[u8; 6]; MAX_MULTICAST],
    multicast_count: usize,
    mode: Option<XcastMode>,
    vlans: [u32; 128],
}

impl Filters {
    pub(super) const fn new() -> Self {
        Self {
            hash_kind: 0,
            mac: None,
            unicast: [[0; 6]; MAX_UNICAST],
            unicast_count: 0,
            multicast: [[0; 6]; MAX_MULTICAST],
            multicast_count: 0,
            mode: None,
            vlans: [0; 128],
        }
    }

    pub(super) fn set_hash_kind(&mut self, kind: u32) {
        self.hash_kind = if kind <= 3 { kind as u8 } else { 0 };
    }

    fn multicast(&self) -> &[[u8; 6]] {
        &self.multicast[..self.multicast_count]
    }
}

impl<R: Registers, D: Delay> Vf<R, D> {
    /// Asks the PF for another address.
    ///
    /// # Errors
    /// [`Error::Mac`]; [`Error::Refused`] if the administrator set one; those of the mailbox. The old address stays.
    pub fn set_mac(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        check_mac(mac)?;
        // Setting an 82599 VF's address to what it is takes another filter entry of its PF.
        if mac != self.mac || !self.is_known() {
            self.tell_mac(mac)?;
        }
        self.mac = mac;
        self.filters.mac = Some(mac);
        Ok(())
    }

    pub(super) fn tell_mac(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let request = Request::SetMac;
        let [low, high] = mac_words(mac);
        self.ask(request, &[request.word(), low, high], &mut [0; 3])
    }

    /// Replaces the unicast addresses received beside the first, at most 16. Single ones cannot be taken back (SET_MACVLAN
    /// clears all of them), so the whole list goes each time.
    ///
    /// # Errors
    /// [`Error::TooManyAddresses`], [`Error::Mac`]; [`Error::Refused`] if the PF has no entry left, and then those before
    /// are set; those of the mailbox.
    pub fn set_unicast(&mut self, macs: &[[u8; 6]]) -> Result<(), Error> {
        if macs.len() > MAX_UNICAST {
            return Err(Error::TooManyAddresses {
                given: macs.len(),
                limit: MAX_UNICAST,
            });
        }
        for mac in macs {
            check_mac(*mac)?;
        }
        let request = Request::SetMacVlan;
        self.ask(request, &[request.with_info(0), 0, 0], &mut [0; 3])?;
        self.filters.unicast_count = 0;
        for (i, mac) in macs.iter().enumerate() {
            let [low, high] = mac_words(*mac);
            self.ask(request, &[request.with_info(i as u32 + 1), low, high], &mut [0; 3])?;
            self.filters.unicast[i] = *mac;
            self.filters.unicast_count = i + 1;
        }
        Ok(())
    }

    /// Replaces the multicast addresses received, at most 30. The PF is given hashes of 12 bits: others may come through
    /// as well.
    ///
    /// # Errors
    /// [`Error::TooManyAddresses`]: ask for [`XcastMode::AllMulticast`] then. [`Error::Mac`] for a unicast address;
    /// those of the mailbox.
    pub fn set_multicast(&mut self, macs: &[[u8; 6]]) -> Result<(), Error> {
        if macs.len() > MAX_MULTICAST {
            return Err(Error::TooManyAddresses {
                given: macs.len(),
                limit: MAX_MULTICAST,
            });
        }
        if let Some(mac) = macs.iter().find(|mac| mac[0] & 1 == 0) {
            return Err(Error::Mac(*mac));
        }
        let request = Request::SetMulticast;
        let mut message = [0; WORDS];
        message[0] = request.with_info(macs.len() as u32);
        for (i, mac) in macs.iter().enumerate() {
            let hash = u32::from(multicast_hash(self.filters.hash_kind, *mac));
            message[1 + i / 2] |= hash << (16 * (i % 2));
        }
        self.ask(request, &message, &mut [0; 1])?;
        self.filters.multicast[..macs.len()].copy_from_slice(macs);
        self.filters.multicast_count = macs.len();
        Ok(())
    }

    /// Lets a VLAN through, or not any more.
    ///
    /// # Errors
    /// [`Error::Vlan`]; [`Error::Refused`] if the administrator set one; those of the mailbox.
    pub fn set_vlan(&mut self, id: u16, on: bool) -> Result<(), Error> {
        if id > 4095 {
            return Err(Error::Vlan(id));
        }
        self.tell_vlan(id, on)?;
        let (word, bit) = (usize::from(id / 32), 1 << (id % 32));
        if on {
            self.filters.vlans[word] |= bit;
        } else {
            self.filters.vlans[word] &= !bit;
        }
        Ok(())
    }

    fn tell_vlan(&mut self, id: u16, on: bool) -> Result<(), Error> {
        let request = Request::SetVlan;
        self.ask(request, &[request.with_info(on.into()), id.into()], &mut [0; 2])
    }

    /// Sets the largest frame, with its CRC. A PF whose own MTU is above 1,500 keeps the VF's receiver off until it is
    /// told one; on an 82599 the PF and all of its VFs share one.
    ///
    /// # Errors
    /// [`Error::MaxFrame`]; [`Error::Refused`], as an 82599 PF does with jumbo frames unless its own MTU has them; those
    /// of the mailbox.
    pub fn set_max_frame(&mut self, len: u16) -> Result<(), Error> {
        if !(64..=MAX_FRAME).contains(&len) {
            return Err(Error::MaxFrame(len));
        }
        let request = Request::SetLpe;
        self.ask(request, &[request.word(), len.into()], &mut [0; 2])
    }

    /// [`Vf::set_max_frame`] by what an operator calls it: Ethernet header and CRC come on top, 18 bytes.
    ///
    /// # Errors
    /// As [`Vf::set_max_frame`].
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        self.set_max_frame(mtu.saturating_add(18))
    }

    /// What is received beyond the VF's addresses.
    ///
    /// # Errors
    /// [`Error::Unsupported`] before API 1.2, for promiscuous mode before 1.3 and on an 82599; [`Error::Refused`] if the
    /// PF does not trust the VF (it then grants less, and says so), or is not promiscuous itself; those of the mailbox. The
    /// mode of before is asked for again then.
    pub fn set_mode(&mut self, mode: XcastMode) -> Result<(), Error> {
        if mode == XcastMode::Promiscuous {
            if self.model == Model::I82599 {
                return Err(Error::Unsupported(Reason::Promiscuous82599));
            }
            self.need(Api::V1_3)?;
        }
        self.need(Api::V1_2)?;
        if self.tell_mode(mode)? != mode as u32 {
            // Granted in part, which is what a PF does with functions that it does not trust.
            let before = self.filters.mode.unwrap_or_default();
            self.tell_mode(before)?;
            return Err(Error::Refused(Request::UpdateXcastMode));
        }
        self.filters.mode = Some(mode);
        Ok(())
    }

    /// Asks for a mode; the one that the PF says it has set.
    fn tell_mode(&mut self, mode: XcastMode) -> Result<u32, Error> {
        let request = Request::UpdateXcastMode;
        let mut answer = [0; 2];
        self.ask(request, &[request.word(), mode as u32], &mut answer)?;
        Ok(answer[1])
    }

    /// Asks for everything again that was set, after a reset.
    pub(super) fn replay(&mut self) -> Result<(), Error> {
        if let Some(mac) = self.filters.mac
            && mac != self.mac
        {
            self.tell_mac(mac)?;
            self.mac = mac;
        }
        for word in 0..self.filters.vlans.len() {
            let mut bits = self.filters.vlans[word];
            while bits != 0 {
                self.tell_vlan((word * 32) as u16 + bits.trailing_zeros() as u16, true)?;
                bits &= bits - 1;
            }
        }
        if let Some(mode) = self.filters.mode {
            self.set_mode(mode)?;
        }
        if self.filters.multicast_count > 0 {
            let (all, count) = (self.filters.multicast, self.filters.multicast().len());
            self.set_multicast(&all[..count])?;
        }
        if self.filters.unicast_count > 0 {
            let (all, count) = (self.filters.unicast, self.filters.unicast_count);
            self.set_unicast(&all[..count])?;
        }
        Ok(())
    }
}

// The messages' lengths, in one place: word 0 and what it announces.
const _: () = assert!(MAX_MULTICAST == 30 && SUCCESS & FAILURE == 0);
