//! The registers, one line each: 82599 datasheet chapter 8.3 (device registers, VF), read together with the X540's and
//! the X550's, which put them at the same offsets.

use crate::access::{Access, Array, BAR_LEN, Letters, RC, RO, RW, Reg, WO};

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The name in the datasheet.
    pub name: &'static str,
    /// Offset in BAR 0 of the first.
    pub offset: u32,
    /// How many there are.
    pub count: u32,
    /// Bytes from one to the next.
    pub stride: u32,
    /// What may be done with it.
    pub access: Access,
    /// What it is.
    pub meaning: &'static str,
}

macro_rules! registers {
    (@type $letters:ident) => { Reg<$letters> };
    (@type $letters:ident $count:literal $stride:literal) => { Array<$letters> };
    (@new $offset:literal) => { Reg::new($offset) };
    (@new $offset:literal $count:literal $stride:literal) => { Array::new($offset, $stride, $count) };
    (@count) => { 1 };
    (@count $count:literal) => { $count };
    (@stride) => { 4 };
    (@stride $stride:literal) => { $stride };
    ($($name:ident $offset:literal $(+ $stride:literal * $count:literal)? $letters:ident $meaning:literal;)*) => {
        $(
            #[doc = $meaning]
            #[allow(dead_code, reason = "some rows are only dumped")]
            pub(crate) const $name: registers!(@type $letters $($count $stride)?) =
                registers!(@new $offset $($count $stride)?);
        )*

        /// Every register of a virtual function, by its offset.
        pub const TABLE: &[Row] = &[$(Row {
            name: stringify!($name),
            offset: $offset,
            count: registers!(@count $($count)?),
            stride: registers!(@stride $($stride)?),
            access: <$letters as Letters>::ACCESS,
            meaning: $meaning,
        }),*];
    };
}

registers! {
    // name        offset    array       access  meaning
    VFCTRL         0x00000               WO "Control: reset";
    VFSTATUS       0x00008               RO "Status: reading it flushes writes";
    VFLINKS        0x00010               RO "Link status and speed";
    VFFRTIMER      0x00048               RO "Free running timer";
    VTEICR         0x00100               RC "Interrupt causes";
    VTEICS         0x00104               WO "Interrupt causes, set";
    VTEIMS         0x00108               RW "Interrupt mask, set";
    VTEIMC         0x0010C               WO "Interrupt mask, clear";
    VTEIAC         0x00110               RW "Causes that clear by themselves";
    VTEIAM         0x00114               RW "Causes that mask themselves";
    VTIVAR         0x00120 + 0x04 * 4    RW "Vectors of two receive and two transmit queues";
    VTIVAR_MISC    0x00140               RW "Vector of the mailbox and of link changes";
    VTRSCINT       0x00180 + 0x04 * 3    RW "Receive side coalescing and interrupts";
    VFMBMEM        0x00200 + 0x04 * 16   RW "Mailbox memory";
    VFMAILBOX      0x002FC               RC "Mailbox status and control: PFSTS, PFACK, RSTD clear";
    VFPSRTYPE      0x00300               RW "Packet split types; queues that RSS spreads over";
    VTEITR         0x00820 + 0x04 * 3    RW "Moderation of a vector";
    VFRDBAL        0x01000 + 0x40 * 8    RW "Receive ring, address, low";
    VFRDBAH        0x01004 + 0x40 * 8    RW "Receive ring, address, high";
    VFRDLEN        0x01008 + 0x40 * 8    RW "Receive ring, bytes";
    VFDCA_RXCTRL   0x0100C + 0x40 * 8    RW "Receive: TLP attributes";
    VFRDH          0x01010 + 0x40 * 8    RW "Receive head";
    VFSRRCTL       0x01014 + 0x40 * 8    RW "Receive: descriptor type, buffer size, drop";
    VFRDT          0x01018 + 0x40 * 8    RW "Receive tail";
    VFGPRC         0x0101C               RO "Packets received, 32 bits";
    VFGORC_LSB     0x01020               RO "Octets received, low";
    VFGORC_MSB     0x01024               RO "Octets received, bits 35:32";
    VFRXDCTL       0x01028 + 0x40 * 8    RW "Receive: enable, VLAN strip";
    VFRSCCTL       0x0102C + 0x40 * 8    RW "Receive side coalescing";
    VFMPRC         0x01034               RO "Multicast packets received, 32 bits";
    VFTDBAL        0x02000 + 0x40 * 8    RW "Transmit ring, address, low";
    VFTDBAH        0x02004 + 0x40 * 8    RW "Transmit ring, address, high";
    VFTDLEN        0x02008 + 0x40 * 8    RW "Transmit ring, bytes";
    VFDCA_TXCTRL   0x0200C + 0x40 * 8    RW "Transmit: TLP attributes";
    VFTDH          0x02010 + 0x40 * 8    RW "Transmit head";
    VFTDT          0x02018 + 0x40 * 8    RW "Transmit tail";
    VFGPTC         0x0201C               RO "Packets sent, 32 bits";
    VFGOTC_LSB     0x02020               RO "Octets sent, low";
    VFGOTC_MSB     0x02024               RO "Octets sent, bits 35:32";
    VFTXDCTL       0x02028 + 0x40 * 8    RW "Transmit: enable, flush, thresholds";
    VFTDWBAL       0x02038 + 0x40 * 8    RW "Transmit head write-back address, low";
    VFTDWBAH       0x0203C + 0x40 * 8    RW "Transmit head write-back address, high";
    VFMRQC         0x03000               RW "RSS: enable, fields (X550 and later)";
    VFRSSRK        0x03100 + 0x04 * 10   RW "RSS key (X550 and later)";
    VFRXMEMWRAP    0x03190               RO "Receive memory wraps";
    VFRETA         0x03200 + 0x04 * 16   RW "RSS table, four entries each (X550 and later)";
}

// Rows by offset, whole dwords, inside the BAR, and no two registers at one place.
const _: () = {
    let mut i = 0;
    while i < TABLE.len() {
        let row = &TABLE[i];
        assert!(row.offset.is_multiple_of(4) && row.stride.is_multiple_of(4) && row.count > 0);
        assert!(row.offset + row.stride * (row.count - 1) < BAR_LEN);
        assert!(i == 0 || TABLE[i - 1].offset < row.offset);
        let mut j = 0;
        while j < i {
            let other = &TABLE[j];
            let mut n = 0;
            while n < row.count {
                let at = row.offset + n * row.stride;
                let past = at.wrapping_sub(other.offset);
                let hit = at >= other.offset && past.is_multiple_of(other.stride) && past / other.stride < other.count;
                assert!(!hit, "two registers at one offset");
                n += 1;
            }
            j += 1;
        }
        i += 1;
    }
};

/// Queues of one direction that a virtual function has at most.
pub const MAX_QUEUES: usize = 8;

/// Interrupt vectors of a virtual function.
pub const MAX_VECTORS: usize = 3;

/// VFCTRL.
pub(crate) mod ctrl {
    pub(crate) const RST: u32 = 1 << 26;
}

/// VFLINKS.
pub(crate) mod links {
    pub(crate) const UP: u32 = 1 << 30;
    pub(crate) const SPEED: u32 = 3 << 28;
    pub(crate) const SPEED_10G: u32 = 3 << 28;
    pub(crate) const SPEED_1G: u32 = 2 << 28;
    pub(crate) const SPEED_100M: u32 = 1 << 28;
    /// X550: 10G means 2.5G, 100M means 5G.
    pub(crate) const NON_STANDARD: u32 = 1 << 27;
}

/// VFMAILBOX.
pub(crate) mod mailbox {
    /// The VF wrote a message.
    pub(crate) const REQ: u32 = 1 << 0;
    /// The VF read the PF's message.
    pub(crate) const ACK: u32 = 1 << 1;
    /// The VF owns the memory.
    pub(crate) const VFU: u32 = 1 << 2;
    /// The PF wrote a message. Clears on read.
    pub(crate) const PFSTS: u32 = 1 << 4;
    /// The PF read the VF's message. Clears on read.
    pub(crate) const PFACK: u32 = 1 << 5;
    /// A reset of the PF is in progress.
    pub(crate) const RSTI: u32 = 1 << 6;
    /// A reset of the PF is done. Clears on read.
    pub(crate) const RSTD: u32 = 1 << 7;
    /// What clears on read.
    pub(crate) const READ_CLEARS: u32 = PFSTS | PFACK | RSTD;
}

/// VTEIMC and its siblings.
pub(crate) mod interrupt {
    /// A bit for each vector.
    pub(crate) const ALL: u32 = 7;
    /// VTIVAR: this byte is valid.
    pub(crate) const VALID: u32 = 0x80;
    /// VTEITR: the interval, in steps of 2.048 us, begins here.
    pub(crate) const INTERVAL_SHIFT: u32 = 3;
    /// VTEITR: steps at most.
    pub(crate) const INTERVAL_MAX: u32 = 0xff8 >> INTERVAL_SHIFT;
    /// VTEITR: leave the running counter alone.
    pub(crate) const CNT_WDIS: u32 = 1 << 31;
}

/// VFRXDCTL and VFTXDCTL.
pub(crate) mod dctl {
    pub(crate) const ENABLE: u32 = 1 << 25;
    /// VFTXDCTL: flush.
    pub(crate) const SWFLSH: u32 = 1 << 26;
    /// VFRXDCTL: strip VLAN tags.
    pub(crate) const VME: u32 = 1 << 30;
    /// VFTXDCTL: prefetch, host and write-back thresholds.
    pub(crate) const fn thresholds(prefetch: u32, host: u32, write_back: u32) -> u32 {
        prefetch | host << 8 | write_back << 16
    }
}

/// VFSRRCTL.
pub(crate) mod srrctl {
    /// Buffers, in units of 1 KiB from bit 0.
    pub(crate) const PACKET_UNIT: u32 = 1024;
    pub(crate) const DESCTYPE_ADV_ONEBUF: u32 = 1 << 25;
    /// Drop when no buffer is posted, instead of stopping the port for everybody.
    pub(crate) const DROP_EN: u32 = 1 << 28;
    /// What a reset leaves: buffers of 2,048 bytes, headers of 256.
    pub(crate) const DEFAULT: u32 = 2 | 256 << 2;
}

/// VFPSRTYPE.
pub(crate) mod psrtype {
    pub(crate) const RQPL_SHIFT: u32 = 29;
}

/// VFDCA_RXCTRL and VFDCA_TXCTRL.
pub(crate) mod dca {
    /// Receive: descriptor reads, data writes and header writes may be relaxed.
    pub(crate) const RX_DEFAULT: u32 = 1 << 9 | 1 << 13 | 1 << 15;
    /// Transmit: descriptor write-backs may be relaxed, and so overtake each other. The driver takes this out.
    pub(crate) const TX_DESC_WRO: u32 = 1 << 11;
    /// Transmit: descriptor reads, write-backs and data reads may be relaxed.
    pub(crate) const TX_DEFAULT: u32 = 1 << 9 | TX_DESC_WRO | 1 << 13;
}

/// VFMRQC.
pub(crate) mod mrqc {
    pub(crate) const RSSEN: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> &'static Row {
        TABLE.iter().find(|row| row.name == name).unwrap()
    }

    /// Some rows written a second time, as formulas.
    #[test]
    fn offsets() {
        for q in 0..8u32 {
            let at = |array: Array<RW>| array.at(q as usize).offset();
            assert_eq!(at(VFRDBAL), 0x1000 + 64 * q);
            assert_eq!(at(VFRDT), 0x1018 + 64 * q);
            assert_eq!(at(VFRXDCTL), 0x1028 + 64 * q);
            assert_eq!(at(VFTDBAL), 0x2000 + 64 * q);
            assert_eq!(at(VFTDT), 0x2018 + 64 * q);
            assert_eq!(at(VFTXDCTL), 0x2028 + 64 * q);
            assert_eq!(at(VFTDWBAH), 0x203c + 64 * q);
        }
        assert_eq!(VFMBMEM.at(15).offset(), 0x23c);
        assert_eq!(VFMAILBOX.offset(), 764);
        assert_eq!(VTIVAR.at(3).offset(), 0x12c);
        assert_eq!(VTEITR.at(2).offset(), 0x828);
        assert_eq!(VFRSSRK.at(9).offset(), 0x3124);
        assert_eq!(VFRETA.at(15).offset(), 0x323c);
        assert_eq!((row("VFRETA").count, row("VFRETA").stride), (16, 4));
        assert_eq!((row("VFCTRL").count, row("VFCTRL").stride), (1, 4));
    }

    #[test]
    fn letters() {
        for (name, access) in [
            ("VTEICR", Access::ReadClears),
            ("VFMAILBOX", Access::ReadClears),
            ("VFCTRL", Access::WriteOnly),
            ("VTEIMC", Access::WriteOnly),
            ("VFGPRC", Access::ReadOnly),
            ("VFRDT", Access::ReadWrite),
        ] {
            assert_eq!(row(name).access, access, "{name}");
        }
    }

    #[test]
    fn bits() {
        assert_eq!(ctrl::RST, 0x0400_0000);
        assert_eq!(mailbox::READ_CLEARS, 0xb0);
        assert_eq!(
            (dctl::ENABLE, dctl::SWFLSH, dctl::VME),
            (0x0200_0000, 0x0400_0000, 0x4000_0000)
        );
        assert_eq!(
            (srrctl::DESCTYPE_ADV_ONEBUF, srrctl::DROP_EN),
            (0x0200_0000, 0x1000_0000)
        );
        assert_eq!(
            (links::UP, links::SPEED, links::NON_STANDARD),
            (0x4000_0000, 0x3000_0000, 0x0800_0000)
        );
        assert_eq!(interrupt::INTERVAL_MAX << interrupt::INTERVAL_SHIFT, 0xff8);
    }
}
