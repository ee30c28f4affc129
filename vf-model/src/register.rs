//! The VF's registers in BAR 0: offsets and bits, as in chapter 8.3 of the 82599 datasheet ("Device Registers — VF").
//!
//! Written for this crate alone: nothing is shared with a driver, so that a wrong constant on either side shows.

/// Bytes of BAR 0.
pub const BAR0_BYTES: u64 = 0x4000;
/// Queue pairs that the register map has room for.
pub const QUEUES: usize = 8;
/// MSI-X vectors of a VF.
pub const VECTORS: usize = 3;
/// Dwords of mailbox memory.
pub const MAILBOX_WORDS: usize = 16;

/// A register, with its index where there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// VFCTRL (WO).
    Ctrl,
    /// VFSTATUS (RO).
    Status,
    /// VFLINKS (RO).
    Links,
    /// VFFRTIMER (RO).
    FreeTimer,
    /// VTEICR (RC, W1C).
    Eicr,
    /// VTEICS (WO).
    Eics,
    /// VTEIMS (RW1S).
    Eims,
    /// VTEIMC (WO).
    Eimc,
    /// VTEIAC (RW).
    Eiac,
    /// VTEIAM (RW).
    Eiam,
    /// VTIVAR: two queues each (RW).
    Ivar(usize),
    /// VTIVAR_MISC: the mailbox (RW).
    IvarMisc,
    /// VTRSCINT (RW).
    RscInterval(usize),
    /// VFMBMEM (RW).
    MailboxMemory(usize),
    /// VFMAILBOX.
    Mailbox,
    /// VFPSRTYPE (RW).
    PsrType,
    /// VTEITR (RW).
    Eitr(usize),
    /// One of a receive queue's registers.
    Rx(usize, RxRegister),
    /// One of a transmit queue's registers.
    Tx(usize, TxRegister),
    /// VFGPRC (RO).
    GoodRx,
    /// VFGORC, low 32 bits (RO).
    OctetsRxLow,
    /// VFGORC, high 4 bits (RO).
    OctetsRxHigh,
    /// VFMPRC (RO).
    MulticastRx,
    /// VFGPTC (RO).
    GoodTx,
    /// VFGOTC, low 32 bits (RO).
    OctetsTxLow,
    /// VFGOTC, high 4 bits (RO).
    OctetsTxHigh,
    /// VFMRQC (RW, X550).
    Mrqc,
    /// VFRSSRK (RW, X550).
    RssKey(usize),
    /// VFRXMEMWRAP (RO).
    RxMemWrap,
    /// VFRETA (RW, X550).
    Reta(usize),
}

/// A receive queue's registers, at 0x1000 + 0x40 q.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxRegister {
    /// VFRDBAL.
    BaseLow,
    /// VFRDBAH.
    BaseHigh,
    /// VFRDLEN.
    Length,
    /// VFDCA_RXCTRL.
    Dca,
    /// VFRDH.
    Head,
    /// VFSRRCTL.
    Srrctl,
    /// VFRDT.
    Tail,
    /// VFRXDCTL.
    Control,
    /// VFRSCCTL.
    Rsc,
}

/// A transmit queue's registers, at 0x2000 + 0x40 q.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxRegister {
    /// VFTDBAL.
    BaseLow,
    /// VFTDBAH.
    BaseHigh,
    /// VFTDLEN.
    Length,
    /// VFDCA_TXCTRL.
    Dca,
    /// VFTDH.
    Head,
    /// VFTDT.
    Tail,
    /// VFTXDCTL.
    Control,
    /// VFTDWBAL.
    WritebackLow,
    /// VFTDWBAH.
    WritebackHigh,
}

/// The register at `offset` of BAR 0, if there is one.
#[must_use]
pub fn decode(offset: u32) -> Option<Register> {
    use Register as R;
    if !offset.is_multiple_of(4) {
        return None;
    }
    let index = |first: u32| ((offset - first) / 4) as usize;
    Some(match offset {
        0x0000 => R::Ctrl,
        0x0008 => R::Status,
        0x0010 => R::Links,
        0x0048 => R::FreeTimer,
        0x0100 => R::Eicr,
        0x0104 => R::Eics,
        0x0108 => R::Eims,
        0x010c => R::Eimc,
        0x0110 => R::Eiac,
        0x0114 => R::Eiam,
        0x0120..=0x012c => R::Ivar(index(0x120)),
        0x0140 => R::IvarMisc,
        0x0180..=0x0188 => R::RscInterval(index(0x180)),
        0x0200..=0x023c => R::MailboxMemory(index(0x200)),
        0x02fc => R::Mailbox,
        0x0300 => R::PsrType,
        0x0820..=0x0828 => R::Eitr(index(0x820)),
        0x101c => R::GoodRx,
        0x1020 => R::OctetsRxLow,
        0x1024 => R::OctetsRxHigh,
        0x1034 => R::MulticastRx,
        0x201c => R::GoodTx,
        0x2020 => R::OctetsTxLow,
        0x2024 => R::OctetsTxHigh,
        0x1000..0x1200 => R::Rx(((offset - 0x1000) / 0x40) as usize, decode_rx(offset % 0x40)?),
        0x2000..0x2200 => R::Tx(((offset - 0x2000) / 0x40) as usize, decode_tx(offset % 0x40)?),
        0x3000 => R::Mrqc,
        0x3100..=0x3124 => R::RssKey(index(0x3100)),
        0x3190 => R::RxMemWrap,
        0x3200..=0x323c => R::Reta(index(0x3200)),
        _ => return None,
    })
}

fn decode_rx(offset: u32) -> Option<RxRegister> {
    Some(match offset {
        0x00 => RxRegister::BaseLow,
        0x04 => RxRegister::BaseHigh,
        0x08 => RxRegister::Length,
        0x0c => RxRegister::Dca,
        0x10 => RxRegister::Head,
        0x14 => RxRegister::Srrctl,
        0x18 => RxRegister::Tail,
        0x28 => RxRegister::Control,
        0x2c => RxRegister::Rsc,
        _ => return None,
    })
}

fn decode_tx(offset: u32) -> Option<TxRegister> {
    Some(match offset {
        0x00 => TxRegister::BaseLow,
        0x04 => TxRegister::BaseHigh,
        0x08 => TxRegister::Length,
        0x0c => TxRegister::Dca,
        0x10 => TxRegister::Head,
        0x18 => TxRegister::Tail,
        0x28 => TxRegister::Control,
        0x38 => TxRegister::WritebackLow,
        0x3c => TxRegister::WritebackHigh,
        _ => return None,
    })
}

/// Bits of VFCTRL.
pub mod ctrl {
    /// RST: reset this VF.
    pub const RST: u32 = 1 << 26;
}

/// Bits of VFSTATUS.
pub mod status {
    /// The link is up.
    pub const LINK_UP: u32 = 1 << 7;
    /// The function may master the bus.
    pub const MASTER: u32 = 1 << 19;
}

/// Bits of VFLINKS.
pub mod links {
    /// The link is up.
    pub const UP: u32 = 1 << 30;
    /// 10 Gb/s.
    pub const SPEED_10G: u32 = 3 << 28;
    /// 1 Gb/s.
    pub const SPEED_1G: u32 = 2 << 28;
    /// 100 Mb/s.
    pub const SPEED_100M: u32 = 1 << 28;
    /// X550: 10 Gb/s means 2.5, 100 Mb/s means 5.
    pub const NON_STANDARD: u32 = 1 << 27;
}

/// Bits of VTIVAR and VTIVAR_MISC, of each byte.
pub mod ivar {
    /// The entry counts.
    pub const VALID: u8 = 0x80;
    /// The vector.
    pub const VECTOR: u8 = 0x03;
}

/// Bits of VTEITR.
pub mod eitr {
    /// Least time between two interrupts, in steps of 2 us from bit 3 on.
    pub const INTERVAL: u32 = 0x0ff8;
    /// The counter and the credits are not written.
    pub const KEEP_COUNTER: u32 = 1 << 31;
}

/// Bits of VFMAILBOX.
pub mod mailbox {
    /// The VF has written a message (WO).
    pub const REQ: u32 = 1 << 0;
    /// The VF has read the PF's message (WO).
    pub const ACK: u32 = 1 << 1;
    /// The VF owns the memory.
    pub const VFU: u32 = 1 << 2;
    /// The PF owns the memory (RO).
    pub const PFU: u32 = 1 << 3;
    /// The PF has written a message (RC).
    pub const PFSTS: u32 = 1 << 4;
    /// The PF has read the VF's message (RC).
    pub const PFACK: u32 = 1 << 5;
    /// A reset of the PF is under way (RO).
    pub const RSTI: u32 = 1 << 6;
    /// A reset is done (RC).
    pub const RSTD: u32 = 1 << 7;
}

/// Bits of VFRXDCTL.
pub mod rxdctl {
    /// RLPML: longest frame, X540 on.
    pub const RLPML: u32 = 0x3fff;
    /// RLPML counts.
    pub const RLPML_ENABLE: u32 = 1 << 15;
    /// The queue works.
    pub const ENABLE: u32 = 1 << 25;
    /// VLAN tags are taken off.
    pub const VLAN_STRIP: u32 = 1 << 30;
}

/// Bits of VFTXDCTL.
pub mod txdctl {
    /// The queue works.
    pub const ENABLE: u32 = 1 << 25;
    /// Write back what is done; clears itself.
    pub const FLUSH: u32 = 1 << 26;
}

/// Bits of VFSRRCTL.
pub mod srrctl {
    /// Buffer size in KiB.
    pub const PACKET_SIZE: u32 = 0x7f;
    /// The kind of descriptors.
    pub const DESCRIPTOR: u32 = 7 << 25;
    /// Advanced descriptors, one buffer.
    pub const ADVANCED_ONE_BUFFER: u32 = 1 << 25;
    /// Frames without a descriptor are dropped.
    pub const DROP: u32 = 1 << 28;
    /// What a reset leaves: 2 KiB packets, 256 B headers.
    pub const RESET: u32 = 0x0402;
}

/// Bits of VFTDWBAL.
pub mod tdwba {
    /// The head is written back to memory, and no descriptor is.
    pub const ENABLE: u32 = 1;
}

/// Bits of VFMRQC, and of the PF's.
pub mod mrqc {
    /// RSS is on.
    pub const ENABLE: u32 = 1;
    /// TCP over IPv4.
    pub const IPV4_TCP: u32 = 1 << 16;
    /// IPv4.
    pub const IPV4: u32 = 1 << 17;
    /// TCP over IPv6 with extension headers.
    pub const IPV6_EX_TCP: u32 = 1 << 18;
    /// IPv6 with extension headers.
    pub const IPV6_EX: u32 = 1 << 19;
    /// IPv6.
    pub const IPV6: u32 = 1 << 20;
    /// TCP over IPv6.
    pub const IPV6_TCP: u32 = 1 << 21;
    /// UDP over IPv4.
    pub const IPV4_UDP: u32 = 1 << 22;
    /// UDP over IPv6.
    pub const IPV6_UDP: u32 = 1 << 23;
    /// UDP over IPv6 with extension headers.
    pub const IPV6_EX_UDP: u32 = 1 << 24;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_has_its_block() {
        assert_eq!(decode(0x1000), Some(Register::Rx(0, RxRegister::BaseLow)));
        assert_eq!(decode(0x11e8), Some(Register::Rx(7, RxRegister::Control)));
        assert_eq!(decode(0x2058), Some(Register::Tx(1, TxRegister::Tail)));
        assert_eq!(decode(0x1200), None);
        assert_eq!(decode(0x105c), None, "VFGPRC is beside queue 0 alone");
    }

    #[test]
    fn counters_lie_between_the_queues_registers() {
        assert_eq!(decode(0x101c), Some(Register::GoodRx));
        assert_eq!(decode(0x1034), Some(Register::MulticastRx));
        assert_eq!(decode(0x2024), Some(Register::OctetsTxHigh));
    }

    #[test]
    fn nothing_beyond_the_bar_or_between_dwords() {
        assert_eq!(decode(0x4000), None);
        assert_eq!(decode(0x1001), None);
        assert_eq!(decode(u32::MAX), None);
    }
}
