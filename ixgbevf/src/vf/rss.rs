//! Receive side scaling: the VF's own on the X550 and later, the PF's before.

use super::Vf;
use crate::access::Registers;
use crate::message::{Api, Request};
use crate::regs::{VFMRQC, VFRETA, VFRSSRK, mrqc};
use crate::{Delay, Error, Reason};
use bitflags::bitflags;
use static_assertions::const_assert_eq;

bitflags! {
    /// The packets that are spread, and the fields that are hashed (VFMRQC). The bits are the register's.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HashFields: u32 {
        /// TCP over IPv4: addresses and ports.
        const IPV4_TCP = 1 << 16;
        /// IPv4: addresses.
        const IPV4 = 1 << 17;
        /// TCP over IPv6 with extension headers.
        const IPV6_EX_TCP = 1 << 18;
        /// IPv6 with extension headers.
        const IPV6_EX = 1 << 19;
        /// IPv6: addresses.
        const IPV6 = 1 << 20;
        /// TCP over IPv6: addresses and ports.
        const IPV6_TCP = 1 << 21;
        /// UDP over IPv4: addresses and ports.
        const IPV4_UDP = 1 << 22;
        /// UDP over IPv6: addresses and ports.
        const IPV6_UDP = 1 << 23;
        /// UDP over IPv6 with extension headers.
        const IPV6_EX_UDP = 1 << 24;
    }
}

/// Entries of the VF's table.
pub(crate) const TABLE_LEN: usize = 64;
/// Bytes of the key.
pub(crate) const KEY_LEN: usize = 40;

const_assert_eq!(TABLE_LEN, VFRETA.len() * 4);
const_assert_eq!(KEY_LEN, VFRSSRK.len() * 4);

/// Key, table and fields of receive side scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rss {
    /// The key of the Toeplitz hash.
    pub key: [u8; KEY_LEN],
    /// A queue for each value of the hash's low 6 bits.
    pub table: [u8; TABLE_LEN],
    /// What is hashed.
    pub fields: HashFields,
}

impl Rss {
    /// An even spread over `queues` by addresses and TCP ports, with a key that is all but periodic. Not by UDP ports:
    /// fragments, which have none, would overtake.
    pub const fn spread(queues: u8) -> Self {
        let mut key = [0; KEY_LEN];
        // The hash only needs bits without pattern: SplitMix64's increment, multiplied out.
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut i = 0;
        while i < KEY_LEN {
            x = x
                .wrapping_mul(0xbf58_476d_1ce4_e5b9)
                .wrapping_add(0x94d0_49bb_1331_11eb);
            key[i] = (x >> 56) as u8;
            i += 1;
        }
        let mut table = [0; TABLE_LEN];
        let mut i = 0;
        while i < TABLE_LEN && queues > 0 {
            table[i] = (i % queues as usize) as u8;
            i += 1;
        }
        let fields = HashFields::IPV4
            .union(HashFields::IPV4_TCP)
            .union(HashFields::IPV6)
            .union(HashFields::IPV6_TCP);
        Self { key, table, fields }
    }
}

impl<R: Registers, D: Delay> Vf<R, D> {
    /// Sets key, table and fields, also while queues run.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with [`Reason::RssIsThePfs`] on an 82599 or X540; [`Error::RssTable`] for an entry that is
    /// not below `rx_queues`; [`Error::QueueCount`].
    pub fn set_rss(&mut self, rss: &Rss, rx_queues: u8) -> Result<(), Error> {
        if !self.model.has_own_rss() {
            return Err(Error::Unsupported(Reason::RssIsThePfs));
        }
        self.check_queues(rx_queues)?;
        self.check_standing()?;
        if let Some((entry, queue)) = (0..).zip(rss.table).find(|(_, queue)| *queue >= rx_queues) {
            return Err(Error::RssTable { entry, queue });
        }
        for (i, bytes) in rss.key.as_chunks::<4>().0.iter().enumerate() {
            self.regs.write(VFRSSRK.at(i), u32::from_le_bytes(*bytes));
        }
        for (i, bytes) in rss.table.as_chunks::<4>().0.iter().enumerate() {
            self.regs.write(VFRETA.at(i), u32::from_le_bytes(*bytes));
        }
        self.regs.write(VFMRQC, mrqc::RSSEN | rss.fields.bits());
        Ok(())
    }

    /// Reads the VF's own back.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with [`Reason::RssIsThePfs`] on an 82599 or X540.
    pub fn rss(&self) -> Result<Rss, Error> {
        if !self.model.has_own_rss() {
            return Err(Error::Unsupported(Reason::RssIsThePfs));
        }
        self.check_standing()?;
        let mut rss = Rss {
            key: [0; KEY_LEN],
            table: [0; TABLE_LEN],
            fields: HashFields::from_bits_truncate(self.regs.read(VFMRQC)),
        };
        for (i, bytes) in rss.key.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *bytes = self.regs.read(VFRSSRK.at(i)).to_le_bytes();
        }
        for (i, bytes) in rss.table.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *bytes = self.regs.read(VFRETA.at(i)).to_le_bytes();
        }
        Ok(rss)
    }

    /// The key that an 82599 or X540 VF shares with its PF.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with [`Reason::RssIsTheVfs`] on later devices, and before API 1.2; [`Error::Refused`] unless
    /// the administrator lets the VF ask; those of the mailbox.
    pub fn pf_rss_key(&mut self) -> Result<[u8; KEY_LEN], Error> {
        self.check_shared()?;
        let request = Request::GetRssKey;
        let mut answer = [0; 1 + KEY_LEN / 4];
        self.ask(request, &[request.word()], &mut answer)?;
        let mut key = [0; KEY_LEN];
        for (bytes, word) in key.as_chunks_mut::<4>().0.iter_mut().zip(&answer[1..]) {
            *bytes = word.to_le_bytes();
        }
        Ok(key)
    }

    /// The 128 entries of the table that an 82599 or X540 VF shares with its PF. The PF packs them into two bits each.
    ///
    /// # Errors
    /// As [`Vf::pf_rss_key`].
    pub fn pf_rss_table(&mut self) -> Result<[u8; 128], Error> {
        self.check_shared()?;
        let request = Request::GetReta;
        let mut answer = [0; 9];
        self.ask(request, &[request.word()], &mut answer)?;
        let mut table = [0; 128];
        for (i, entry) in table.iter_mut().enumerate() {
            *entry = (answer[1 + i / 16] >> (2 * (i % 16)) & 3) as u8;
        }
        Ok(table)
    }

    fn check_shared(&self) -> Result<(), Error> {
        if self.model.has_own_rss() {
            return Err(Error::Unsupported(Reason::RssIsTheVfs));
        }
        self.need(Api::V1_2)
    }

    /// A power of two, and not more than the PF gives.
    pub(super) fn check_queues(&self, queues: u8) -> Result<(), Error> {
        if queues.is_power_of_two() && queues <= self.limits.rx {
            return Ok(());
        }
        Err(Error::QueueCount {
            asked: queues.into(),
            limit: self.limits.rx,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_even() {
        for queues in [1, 2, 4, 8] {
            let rss = Rss::spread(queues);
            for queue in 0..queues {
                let entries = rss.table.iter().filter(|entry| **entry == queue).count();
                assert_eq!(entries, TABLE_LEN / usize::from(queues));
            }
        }
        assert_eq!(Rss::spread(0).table, [0; TABLE_LEN]);
    }

    #[test]
    fn the_key_has_no_pattern() {
        let Rss { key, fields, .. } = Rss::spread(4);
        let ones: u32 = key.iter().map(|byte| byte.count_ones()).sum();
        assert!((120..200).contains(&ones), "{ones}");
        for period in 1..KEY_LEN / 2 {
            assert_ne!(key[..KEY_LEN - period], key[period..]);
        }
        assert_eq!(fields.bits(), 0x33_0000);
    }
}
