//! Statistics: counters that cannot be cleared and that wrap, and what they moved by.

use crate::access::{RO, Reg, Registers, Regs};
use crate::regs::{VFGORC_LSB, VFGORC_MSB, VFGOTC_LSB, VFGOTC_MSB, VFGPRC, VFGPTC, VFMPRC};

/// What the VF moved since it was opened. There is no count of packets that found no buffer: a VF has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received, with CRC.
    pub rx_bytes: u64,
    /// Of the packets received, those to multicast addresses.
    pub rx_multicast: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent, with CRC.
    pub tx_bytes: u64,
}

const BITS_32: u64 = (1 << 32) - 1;
const BITS_36: u64 = (1 << 36) - 1;

/// One counter: what was added up, and where it stood when it was last read.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    total: u64,
    last: u64,
}

impl Counter {
    /// `mask` is the counter's width.
    fn update(&mut self, now: u64, mask: u64) {
        self.total += now.wrapping_sub(self.last) & mask;
        self.last = now;
    }
}

/// All of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Where they stood is known: the VF was reset once.
    based: bool,
    rx_packets: Counter,
    rx_bytes: Counter,
    rx_multicast: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
}

impl Counters {
    /// Adds what they moved.
    pub(crate) fn update<R: Registers>(&mut self, regs: &Regs<R>) {
        if !self.based {
            return;
        }
        self.rx_packets.update(regs.read(VFGPRC).into(), BITS_32);
        self.rx_multicast.update(regs.read(VFMPRC).into(), BITS_32);
        self.rx_bytes.update(wide(regs, VFGORC_LSB, VFGORC_MSB), BITS_36);
        self.tx_packets.update(regs.read(VFGPTC).into(), BITS_32);
        self.tx_bytes.update(wide(regs, VFGOTC_LSB, VFGOTC_MSB), BITS_36);
    }

    /// The last look before a reset, which may or may not clear them.
    pub(crate) fn before_reset<R: Registers>(&mut self, regs: &Regs<R>) {
        self.update(regs);
    }

    /// Where they stand after it counts as the beginning.
    pub(crate) fn after_reset<R: Registers>(&mut self, regs: &Regs<R>) {
        self.based = true;
        self.rx_packets.last = regs.read(VFGPRC).into();
        self.rx_multicast.last = regs.read(VFMPRC).into();
        self.rx_bytes.last = wide(regs, VFGORC_LSB, VFGORC_MSB);
        self.tx_packets.last = regs.read(VFGPTC).into();
        self.tx_bytes.last = wide(regs, VFGOTC_LSB, VFGOTC_MSB);
    }

    pub(crate) fn total(&self) -> Statistics {
        Statistics {
            rx_packets: self.rx_packets.total,
            rx_bytes: self.rx_bytes.total,
            rx_multicast: self.rx_multicast.total,
            tx_packets: self.tx_packets.total,
            tx_bytes: self.tx_bytes.total,
        }
    }
}

/// A counter of 36 bits. If its low half wraps between the two reads, the high half is read again.
fn wide<R: Registers>(regs: &Regs<R>, low: Reg<RO>, high: Reg<RO>) -> u64 {
    let before = regs.read(low);
    let mut top = regs.read(high);
    let after = regs.read(low);
    if after < before {
        top = regs.read(high);
    }
    u64::from(top & 0xf) << 32 | u64::from(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    #[test]
    fn wraps() {
        let mut counter = Counter {
            total: 0,
            last: BITS_32 - 1,
        };
        counter.update(3, BITS_32);
        assert_eq!((counter.total, counter.last), (5, 3));
        counter.update(3, BITS_32);
        assert_eq!(counter.total, 5);
        let mut counter = Counter {
            total: 7,
            last: BITS_36,
        };
        counter.update(0, BITS_36);
        assert_eq!(counter.total, 8);
    }

    /// A counter that moves by 16 with every read.
    struct Moving(Cell<u64>);

    impl Registers for Moving {
        fn read(&self, offset: u32) -> u32 {
            let now = self.0.replace(self.0.get() + 16);
            if offset == 0x1020 {
                now as u32
            } else {
                (now >> 32) as u32 & 0xf
            }
        }

        fn write(&self, _: u32, _: u32) {
            unreachable!("statistics are read-only");
        }
    }

    #[test]
    fn the_halves_belong_together() {
        for start in (0..256).map(|i| 0x2_ffff_ff00 + i) {
            let read = wide(&Regs(Moving(Cell::new(start))), VFGORC_LSB, VFGORC_MSB);
            assert!((start..start + 64).contains(&read), "{start:#x}: {read:#x}");
        }
    }
}
