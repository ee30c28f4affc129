//! Where addresses were last seen: a fixed table, whatever addresses a hostile port makes up.

use std::time::Duration;

/// An Ethernet address, as a number: the first byte is the most significant of 48 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(u64);

impl Mac {
    /// From the six bytes of a frame.
    #[inline(always)]
    pub fn new(bytes: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = bytes;
        Mac(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// The six bytes.
    pub fn bytes(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// A group address: broadcast or multicast.
    #[inline(always)]
    pub fn is_group(self) -> bool {
        self.0 >> 40 & 1 == 1
    }

    /// One of the groups 01:80:c2:00:00:00 to 01:80:c2:00:00:0f, whose frames stay on their link (IEEE 802.1Q, table 8-1).
    #[inline]
    pub fn is_link_local(self) -> bool {
        self.0 >> 4 == 0x0180_c200_0000 >> 4
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.bytes();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[derive(Clone, Copy)]
struct Entry {
    mac: Mac,
    port: u16,
    /// Milliseconds of the table's clock; 0: free.
    seen: u32,
}

const WAYS: usize = 4;
const FREE: Entry = Entry {
    mac: Mac(0),
    port: 0,
    seen: 0,
};

/// The MAC table: sets of four, the entry seen longest ago makes room.
///
/// A port that makes up addresses can push others' entries out, and their frames are then flooded until they speak
/// again, as in any bridge; it cannot make the table grow.
pub struct MacTable {
    sets: Box<[[Entry; WAYS]]>,
    ageing: u32,
    /// Mixed into the hash, so that a port cannot aim at one set.
    key: u64,
}

impl MacTable {
    /// The most addresses that a table is made for: 256 MiB of entries.
    pub const MOST: usize = 1 << 24;

    /// A table of about `entries` addresses, [`MOST`](MacTable::MOST) at the most, each forgotten when not seen for
    /// `ageing`.
    pub fn new(entries: usize, ageing: Duration, key: u64) -> Self {
        let sets = entries.min(Self::MOST).div_ceil(WAYS).next_power_of_two();
        let ageing = u32::try_from(ageing.as_millis()).unwrap_or(u32::MAX).max(1);
        MacTable {
            sets: vec![[FREE; WAYS]; sets].into_boxed_slice(),
            ageing,
            key: key | 1,
        }
    }

    #[inline(always)]
    fn set(&self, mac: Mac) -> usize {
        let hash = u128::from(mac.0 ^ self.key.rotate_left(17)).wrapping_mul(u128::from(self.key) << 32 | 0x9E37_79B9);
        ((hash >> 61) as usize ^ (hash as usize >> 17)) & (self.sets.len() - 1)
    }

    #[inline(always)]
    fn fresh(&self, entry: &Entry, now: u32) -> bool {
        entry.seen != 0 && now.wrapping_sub(entry.seen) <= self.ageing
    }

    /// Notes that `mac` was seen on `port` at `now` (milliseconds, not 0).
    #[inline]
    pub fn learn(&mut self, mac: Mac, port: u16, now: u32) {
        if mac.is_group() || mac.0 == 0 {
            return;
        }
        let at = self.set(mac);
        let set = &mut self.sets[at];
        let way = match set.iter().position(|e| e.mac == mac && e.seen != 0) {
            Some(way) => way,
            None => (0..WAYS)
                .max_by_key(|&w| {
                    if set[w].seen == 0 {
                        u32::MAX
                    } else {
                        now.wrapping_sub(set[w].seen)
                    }
                })
                .unwrap_or(0),
        };
        set[way] = Entry { mac, port, seen: now };
    }

    /// The port on which `mac` was last seen, if that is not too long ago.
    #[inline]
    pub fn lookup(&self, mac: Mac, now: u32) -> Option<u16> {
        let set = &self.sets[self.set(mac)];
        set.iter().find(|e| e.mac == mac && self.fresh(e, now)).map(|e| e.port)
    }

    /// Forgets what was seen on `port`: its link went down.
    pub fn forget(&mut self, port: u16) {
        for entry in self.sets.iter_mut().flatten().filter(|e| e.port == port) {
            *entry = FREE;
        }
    }

    /// Forgets what was seen on `port`, which is taken out: the ports behind it move up by one.
    pub fn remove(&mut self, port: u16) {
        self.forget(port);
        for entry in self.sets.iter_mut().flatten().filter(|e| e.port > port) {
            entry.port -= 1;
        }
    }

    /// All entries that are not too old: address, port, milliseconds since it was seen.
    pub fn entries(&self, now: u32) -> impl Iterator<Item = (Mac, u16, u32)> + '_ {
        self.sets
            .iter()
            .flatten()
            .filter(move |e| self.fresh(e, now))
            .map(move |e| (e.mac, e.port, now.wrapping_sub(e.seen)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(n: u32) -> Mac {
        let [a, b, c, d] = n.to_be_bytes();
        Mac::new([2, 0, a, b, c, d])
    }

    #[test]
    fn learns_moves_ages_and_forgets() {
        let mut table = MacTable::new(64, Duration::from_secs(300), 12345);
        table.learn(mac(1), 3, 1000);
        assert_eq!(table.lookup(mac(1), 1000), Some(3));
        assert_eq!(table.lookup(mac(2), 1000), None);
        table.learn(mac(1), 4, 2000);
        assert_eq!(table.lookup(mac(1), 2000), Some(4), "the station moved");
        assert_eq!(table.lookup(mac(1), 302_000), Some(4));
        assert_eq!(table.lookup(mac(1), 302_001), None, "aged out");
        table.learn(mac(1), 4, 400_000);
        table.forget(4);
        assert_eq!(table.lookup(mac(1), 400_000), None);
        assert_eq!(table.entries(400_000).count(), 0);
    }

    #[test]
    fn ports_behind_a_removed_one_move_up() {
        let mut table = MacTable::new(64, Duration::from_secs(300), 5);
        for port in 0..4 {
            table.learn(mac(port.into()), port, 1000);
        }
        table.remove(1);
        let found: Vec<_> = (0..4).map(|n| table.lookup(mac(n), 1000)).collect();
        assert_eq!(found, [Some(0), None, Some(1), Some(2)]);
    }

    #[test]
    fn group_and_zero_sources_are_not_learned() {
        let mut table = MacTable::new(64, Duration::from_secs(300), 1);
        table.learn(Mac::new([0xff; 6]), 1, 1);
        table.learn(Mac::new([1, 0, 0x5e, 0, 0, 1]), 1, 1);
        table.learn(Mac::new([0; 6]), 1, 1);
        assert_eq!(table.entries(1).count(), 0);
    }

    #[test]
    fn a_flood_of_addresses_stays_inside() {
        let mut table = MacTable::new(256, Duration::from_secs(300), 99);
        for n in 0..100_000 {
            table.learn(mac(n), 1, 1 + n / 100);
        }
        let now = 1 + 99_999 / 100;
        let left = table.entries(now).count();
        assert!((200..=256).contains(&left), "{left} of 256 entries in use");
        assert_eq!(table.lookup(mac(99_999), now), Some(1), "the one seen last is there");
    }

    #[test]
    fn the_clock_may_wrap() {
        let mut table = MacTable::new(64, Duration::from_secs(300), 7);
        table.learn(mac(1), 2, u32::MAX - 10);
        assert_eq!(table.lookup(mac(1), 50), Some(2));
        assert_eq!(table.lookup(mac(1), 300_000), None);
    }

    #[test]
    fn sixteen_groups_are_link_local() {
        let group = |last: u8| Mac::new([0x01, 0x80, 0xc2, 0, 0, last]);
        assert_eq!((0..=255).filter(|n| group(*n).is_link_local()).count(), 16);
        assert!(group(0).is_link_local() && group(15).is_link_local());
        for other in [[0xff; 6], [0, 0x80, 0xc2, 0, 0, 0], [0x01, 0x80, 0xc2, 0, 1, 0]] {
            assert!(!Mac::new(other).is_link_local());
        }
    }

    #[test]
    fn prints_as_it_is_written() {
        assert_eq!(Mac::new([2, 0xab, 0, 1, 2, 0xff]).to_string(), "02:ab:00:01:02:ff");
        assert_eq!(Mac::new([2, 0xab, 0, 1, 2, 0xff]).bytes(), [2, 0xab, 0, 1, 2, 0xff]);
    }
}
