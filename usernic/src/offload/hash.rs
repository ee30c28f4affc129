//! The Toeplitz hash of receive-side scaling, over the fields that virtio has for it (virtio 1.3, 5.1.6.4.3), and the
//! indirection table.
//!
//! ```
//! use usernic::offload::hash::{KEY, Toeplitz};
//!
//! // 66.9.149.187:2794 to 161.142.100.80:1766, the first of the values that Microsoft gives for RSS.
//! let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
//! assert_eq!(Toeplitz::new(&KEY).hash(&input), 0x51cc_c178);
//! ```

use virtio_ring::net::{HashReport, HashTypes};

use super::headers::{Headers, Network, Transport};

/// Bytes of a key: what 36 bytes of input need (virtio 1.3, 5.1.4.1: `rss_max_key_size` is at least 40).
pub const KEY_LEN: usize = 40;

/// Bytes that are hashed at the most: two IPv6 addresses and two ports.
pub const MAX_INPUT: usize = 36;

/// The key that Microsoft gives for checking an implementation of RSS, and that most drivers use.
pub const KEY: [u8; KEY_LEN] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b,
    0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac,
    0x01, 0xfa,
];

/// Words of input.
const WORDS: usize = MAX_INPUT / 4;

/// The hash under one key: every input bit that is set adds the 32 bits of the key from its place on.
///
/// With carry-less multiplication, where the machine has it, a word of input costs one multiplication; without, eight
/// look-ups in a table of 4.5 KiB.
#[derive(Clone)]
pub struct Toeplitz {
    /// For each word of input the 64 bits of key that it meets, first bit lowest.
    windows: [u64; WORDS],
    /// For each half byte of input, what it adds.
    table: Box<[[u32; 16]; 2 * MAX_INPUT]>,
    /// The machine has PCLMULQDQ.
    multiply: bool,
}

impl Toeplitz {
    /// Prepares a key.
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        let window = |bit: usize| {
            // 64 bits from bit `bit` on; behind the key's end there are none.
            let byte = |at: usize| u128::from(key.get(at).copied().unwrap_or(0));
            let bytes = (0..9).fold(0u128, |bits, at| bits << 8 | byte(bit / 8 + at));
            (bytes >> (8 - bit % 8)) as u64
        };
        let mut table = Box::new([[0; 16]; 2 * MAX_INPUT]);
        for (place, entries) in table.iter_mut().enumerate() {
            for (value, entry) in entries.iter_mut().enumerate() {
                for bit in (0..4).filter(|bit| value >> (3 - bit) & 1 == 1) {
                    *entry ^= (window(4 * place + bit) >> 32) as u32;
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        let multiply = std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(not(target_arch = "x86_64"))]
        let multiply = false;
        Toeplitz {
            windows: std::array::from_fn(|word| window(32 * word).reverse_bits()),
            table,
            multiply,
        }
    }

    /// The hash of up to [`MAX_INPUT`] bytes; what is behind them is left out.
    #[inline]
    pub fn hash(&self, input: &[u8]) -> u32 {
        let input = &input[..input.len().min(MAX_INPUT)];
        #[cfg(target_arch = "x86_64")]
        if self.multiply {
            // SAFETY: the machine has the instruction, as `new` found.
            return unsafe { self.hash_multiplied(input) };
        }
        self.hash_looked_up(input)
    }

    fn hash_looked_up(&self, input: &[u8]) -> u32 {
        input
            .iter()
            .zip(self.table.as_chunks().0)
            .fold(0, |hash, (byte, [high, low])| {
                hash ^ high[usize::from(byte >> 4)] ^ low[usize::from(byte & 0xf)]
            })
    }

    /// A word w of input, bit 0 its last, and the key from there on, k: the hash is the sum of k << j for every bit j of w
    /// counted from the first, and so bits 32 to 63 of the carry-less product of k and w reversed. Of the product of both
    /// reversed, whose bits have the reverse order, these are bits 31 to 62: only the key is to be reversed before, and
    /// the hash after.
    ///
    /// # Safety
    /// The machine has PCLMULQDQ.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "pclmulqdq,sse2")]
    unsafe fn hash_multiplied(&self, input: &[u8]) -> u32 {
        use std::arch::x86_64::{
            _mm_clmulepi64_si128, _mm_cvtsi64_si128, _mm_cvtsi128_si64, _mm_setzero_si128, _mm_xor_si128,
        };
        let (words, rest) = input.as_chunks::<4>();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        let words = words.iter().chain((!rest.is_empty()).then_some(&last));
        let mut product = _mm_setzero_si128();
        for (word, window) in words.zip(&self.windows) {
            let word = i64::from(u32::from_be_bytes(*word));
            let term = _mm_clmulepi64_si128::<0>(_mm_cvtsi64_si128(word), _mm_cvtsi64_si128(*window as i64));
            product = _mm_xor_si128(product, term);
        }
        ((_mm_cvtsi128_si64(product) as u64 >> 31) as u32).reverse_bits()
    }

    /// The hash of a frame, and over what it is: the most that `types` has for it, by the order of virtio 1.3,
    /// 5.1.6.4.3.1 to 5.1.6.4.3.3. `bytes` begin with the headers.
    ///
    /// A fragment is hashed over its addresses alone, so that all of them have one hash.
    #[inline]
    pub fn report(&self, headers: &Headers, bytes: &[u8], types: HashTypes) -> (u32, HashReport) {
        let Some((fields, report)) = choose(headers, types) else {
            return (0, HashReport::NONE);
        };
        let len = headers.address_len();
        let (from, to) = match fields.extended {
            true => (headers.source_at, headers.destination_at),
            false => {
                let (from, to) = if len == 4 { (12, 16) } else { (8, 24) };
                // Whoever made the headers, no sum of theirs wraps.
                (
                    headers.network_at.saturating_add(from),
                    headers.network_at.saturating_add(to),
                )
            }
        };
        let mut input = [0; MAX_INPUT];
        let ports = if fields.ports { 4 } else { 0 };
        let mut parts = [(0, from, len), (len, to, len), (2 * len, headers.transport_at, ports)].into_iter();
        let complete = parts.all(|(at, place, len)| match bytes.get(place..place.saturating_add(len)) {
            Some(part) => {
                input[at..at + len].copy_from_slice(part);
                true
            }
            None => false,
        });
        if !complete {
            return (0, HashReport::NONE);
        }
        (self.hash(&input[..2 * len + ports]), report)
    }
}

struct Fields {
    ports: bool,
    /// Addresses of extension headers, where there are.
    extended: bool,
}

fn choose(headers: &Headers, types: HashTypes) -> Option<(Fields, HashReport)> {
    // Types of a transport, of its extended form, and of addresses alone: in the order of preference.
    let choices: [(HashTypes, HashReport, bool, bool); 4] = match (headers.network, headers.transport) {
        (Network::Ipv4, transport) => {
            let (l4, report) = match transport {
                Transport::Tcp => (HashTypes::TCPV4, HashReport::TCPV4),
                Transport::Udp => (HashTypes::UDPV4, HashReport::UDPV4),
                _ => (HashTypes::empty(), HashReport::NONE),
            };
            let none = (HashTypes::empty(), HashReport::NONE, false, false);
            [
                (l4, report, true, false),
                (HashTypes::IPV4, HashReport::IPV4, false, false),
                none,
                none,
            ]
        }
        (Network::Ipv6, transport) => {
            let (ex, ex_report, l4, report) = match transport {
                Transport::Tcp => (
                    HashTypes::TCP_EX,
                    HashReport::TCPV6_EX,
                    HashTypes::TCPV6,
                    HashReport::TCPV6,
                ),
                Transport::Udp => (
                    HashTypes::UDP_EX,
                    HashReport::UDPV6_EX,
                    HashTypes::UDPV6,
                    HashReport::UDPV6,
                ),
                _ => (
                    HashTypes::empty(),
                    HashReport::NONE,
                    HashTypes::empty(),
                    HashReport::NONE,
                ),
            };
            // Without extension headers the plain types come first: they are the same then.
            let (first, second) = ((ex, ex_report, true, true), (l4, report, true, false));
            let ip = (HashTypes::IPV6, HashReport::IPV6, false, false);
            let ip_ex = (HashTypes::IP_EX, HashReport::IPV6_EX, false, true);
            if headers.extended {
                [first, second, ip_ex, ip]
            } else {
                [second, first, ip, ip_ex]
            }
        }
        (Network::Other, _) => return None,
    };
    choices
        .into_iter()
        .find(|(kind, ..)| !kind.is_empty() && types.contains(*kind))
        .map(|(_, report, ports, extended)| (Fields { ports, extended }, report))
}

/// The table that turns a hash into a queue pair (virtio 1.3, 5.1.6.5.7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indirection {
    pairs: [u16; Self::MAX],
    mask: u32,
    /// Of packets without a hash.
    pub unclassified: u16,
}

impl Indirection {
    /// Entries at the most.
    pub const MAX: usize = 128;

    /// A table of these queue pairs. `None`: their number is no power of two, or more than [`Indirection::MAX`].
    pub fn new(pairs: impl ExactSizeIterator<Item = u16>, unclassified: u16) -> Option<Self> {
        let len = pairs.len();
        if !len.is_power_of_two() || len > Self::MAX {
            return None;
        }
        let mut table = [0; Self::MAX];
        table.iter_mut().zip(pairs).for_each(|(entry, pair)| *entry = pair);
        Some(Indirection {
            pairs: table,
            mask: len as u32 - 1,
            unclassified,
        })
    }

    /// As many entries as there can be, over the first `pairs` queue pairs in turn.
    ///
    /// # Panics
    /// If `pairs` is 0.
    pub fn even(pairs: u16) -> Self {
        Indirection {
            pairs: std::array::from_fn(|entry| entry as u16 % pairs),
            mask: Self::MAX as u32 - 1,
            unclassified: 0,
        }
    }

    /// The queue pair of a packet.
    #[inline]
    pub fn pair(&self, hash: u32, report: HashReport) -> u16 {
        match report {
            HashReport::NONE => self.unclassified,
            _ => self.pairs[(hash & self.mask) as usize & (Self::MAX - 1)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Destination, source, hash of the addresses, hash with ports.
    type Published<A> = (A, u16, A, u16, u32, u32);

    /// Microsoft, "Verifying the RSS Hash Calculation".
    const V4: [Published<[u8; 4]>; 5] = [
        (
            [161, 142, 100, 80],
            1766,
            [66, 9, 149, 187],
            2794,
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            [65, 69, 140, 83],
            4739,
            [199, 92, 111, 2],
            14230,
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            [12, 22, 207, 184],
            38024,
            [24, 19, 198, 95],
            12898,
            0xd2d0_a5de,
            0x5c2b_394a,
        ),
        (
            [209, 142, 163, 6],
            2217,
            [38, 27, 205, 30],
            48228,
            0x8298_9176,
            0xafc7_327f,
        ),
        (
            [202, 188, 127, 2],
            1303,
            [153, 39, 163, 191],
            44251,
            0x5d18_09c5,
            0x10e8_28a2,
        ),
    ];

    const V6: [Published<[u16; 8]>; 3] = [
        (
            [0x3ffe, 0x2501, 0x200, 3, 0, 0, 0, 1],
            1766,
            [0x3ffe, 0x2501, 0x200, 0x1fff, 0, 0, 0, 7],
            2794,
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            [0xff02, 0, 0, 0, 0, 0, 0, 1],
            4739,
            [0x3ffe, 0x501, 8, 0, 0x260, 0x97ff, 0xfe40, 0xefab],
            14230,
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
        (
            [0xfe80, 0, 0, 0, 0x200, 0xf8ff, 0xfe21, 0x67cf],
            38024,
            [0x3ffe, 0x1900, 0x4545, 3, 0x200, 0xf8ff, 0xfe21, 0x67cf],
            44251,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    fn both(toeplitz: &Toeplitz, input: &[u8]) -> u32 {
        let hash = toeplitz.hash(input);
        assert_eq!(hash, toeplitz.hash_looked_up(input));
        hash
    }

    fn bytes(address: [u16; 8]) -> Vec<u8> {
        address.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    fn frame(to: &[u8], to_port: u16, from: &[u8], from_port: u16, protocol: u8) -> Vec<u8> {
        let mut frame = vec![0; 12];
        if to.len() == 4 {
            frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 9, protocol, 0, 0]);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 9]);
        }
        frame.extend([from, to].concat());
        frame.extend([from_port.to_be_bytes(), to_port.to_be_bytes()].concat());
        frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0]);
        frame
    }

    fn report(frame: &[u8], types: HashTypes) -> (u32, HashReport) {
        let headers = Headers::parse(frame, frame.len()).unwrap();
        Toeplitz::new(&KEY).report(&headers, frame, types)
    }

    #[test]
    fn the_published_values() {
        let toeplitz = Toeplitz::new(&KEY);
        let mut all = Vec::new();
        for (to, to_port, from, from_port, addresses, ports) in V4 {
            all.push((to.to_vec(), to_port, from.to_vec(), from_port, addresses, ports));
        }
        for (to, to_port, from, from_port, addresses, ports) in V6 {
            all.push((bytes(to), to_port, bytes(from), from_port, addresses, ports));
        }
        for (to, to_port, from, from_port, addresses, ports) in all {
            let mut input = [&from[..], &to[..]].concat();
            assert_eq!(both(&toeplitz, &input), addresses);
            input.extend([from_port.to_be_bytes(), to_port.to_be_bytes()].concat());
            assert_eq!(both(&toeplitz, &input), ports);
            // And as frames.
            let four = to.len() == 4;
            for (protocol, expected) in [
                (6, if four { HashReport::TCPV4 } else { HashReport::TCPV6 }),
                (17, if four { HashReport::UDPV4 } else { HashReport::UDPV6 }),
            ] {
                let frame = frame(&to, to_port, &from, from_port, protocol);
                assert_eq!(report(&frame, HashTypes::all()), (ports, expected));
                let ip = HashTypes::IPV4 | HashTypes::IPV6;
                let expected = if four { HashReport::IPV4 } else { HashReport::IPV6 };
                assert_eq!(report(&frame, ip), (addresses, expected));
                assert_eq!(report(&frame, HashTypes::empty()), (0, HashReport::NONE));
            }
            let icmp = frame(&to, to_port, &from, from_port, 1);
            assert_eq!(report(&icmp, HashTypes::all()).0, addresses);
            assert_eq!(
                report(&icmp, HashTypes::TCPV4 | HashTypes::UDPV6),
                (0, HashReport::NONE)
            );
        }
    }

    #[test]
    fn fragments_have_the_hash_of_their_addresses() {
        let (to, _, from, _, addresses, ports) = V4[0];
        let mut frame = frame(&to, 1766, &from, 2794, 6);
        assert_eq!(report(&frame, HashTypes::all()), (ports, HashReport::TCPV4));
        frame[20] = 0x20;
        assert_eq!(report(&frame, HashTypes::all()), (addresses, HashReport::IPV4));
    }

    #[test]
    fn addresses_of_extension_headers() {
        let (to, to_port, from, from_port, addresses, ports) = V6[0];
        let whole = frame(&[9; 16], to_port, &[8; 16], from_port, 6);
        let mut routed = whole[..54].to_vec();
        routed[20] = 60;
        routed[19] = 68;
        routed.extend([43, 2, 0, 1, 0, 0, 201, 16]);
        routed.extend(bytes(from));
        routed.extend([6, 2, 2, 1, 0, 0, 0, 0]);
        routed.extend(bytes(to));
        routed.extend(&whole[54..]);
        assert_eq!(report(&routed, HashTypes::all()), (ports, HashReport::TCPV6_EX));
        assert_eq!(
            report(&routed, HashTypes::IP_EX | HashTypes::IPV6),
            (addresses, HashReport::IPV6_EX)
        );
        let plain = report(&routed, HashTypes::TCPV6);
        assert_eq!(plain.1, HashReport::TCPV6);
        assert_eq!(plain.0, report(&whole, HashTypes::TCPV6).0);
    }

    #[test]
    fn the_table_is_indexed_by_the_lowest_bits() {
        let table = Indirection::new([3, 1, 2, 0].into_iter(), 7).unwrap();
        let pairs: Vec<u16> = (0..6)
            .map(|hash| table.pair(hash | 0xffff_fff0, HashReport::IPV4))
            .collect();
        assert_eq!(pairs, [3, 1, 2, 0, 3, 1]);
        assert_eq!(table.pair(1, HashReport::NONE), 7);
        for len in [0, 3, 129, 256] {
            assert_eq!(Indirection::new(vec![0; len].into_iter(), 0), None);
        }
        let even = Indirection::even(3);
        assert_eq!(
            [0, 1, 2, 3, 127].map(|hash| even.pair(hash, HashReport::UDPV6)),
            [0, 1, 2, 0, 1]
        );
    }

    proptest! {
        /// Bit by bit, as the hash is defined.
        #[test]
        fn any_key_and_input(first: [u8; 32], second: [u8; 8], input in prop::collection::vec(any::<u8>(), 0..=MAX_INPUT)) {
            let key: [u8; KEY_LEN] = [&first[..], &second].concat().try_into().unwrap();
            let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1 == 1;
            let mut hash = 0u32;
            for at in (0..8 * input.len()).filter(|at| bit(&input, *at)) {
                for offset in (0..32).filter(|offset| bit(&key, at + offset)) {
                    hash ^= 1 << (31 - offset);
                }
            }
            prop_assert_eq!(both(&Toeplitz::new(&key), &input), hash);
        }
    }
}
