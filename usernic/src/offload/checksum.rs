//! The internet checksum (RFC 1071): sums, completion of what an application or a driver left open, verification.
//!
//! ```
//! use usernic::offload::checksum::Sum;
//!
//! // An IPv4 header with its checksum sums up to nothing.
//! let header = [0x45, 0, 0, 20, 0, 0, 0x40, 0, 0x40, 0x11, 0x82, 0xbc, 10, 1, 2, 3, 172, 16, 0, 9];
//! assert_eq!(Sum::of(&header).checksum(), [0, 0]);
//! // In pieces too, wherever they are cut.
//! let mut sum = Sum::new();
//! sum.add(&header[..7]);
//! sum.add(&header[7..]);
//! assert_eq!(sum.checksum(), [0, 0]);
//! ```

use super::headers::{Headers, Network, Transport, be16};
use crate::copy::barrier;

/// A one's complement sum of 16-bit words, still growing.
///
/// Words are added as they lie in memory: the sum's byte order is that of the packet, whatever the machine's (RFC 1071,
/// 2.B), and so results are bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// With the carries not folded in. Below 2^63: see `fold`.
    words: u64,
    /// An odd number of bytes went in: the next one is a word's second.
    odd: bool,
}

impl Sum {
    /// Nothing.
    pub const fn new() -> Self {
        Sum { words: 0, odd: false }
    }

    /// The sum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        let mut sum = Sum::new();
        sum.add(bytes);
        sum
    }

    /// Adds the bytes that follow those added before.
    #[inline]
    pub fn add(&mut self, bytes: &[u8]) {
        // SAFETY: the bytes of a slice.
        unsafe { self.add_raw(bytes.as_ptr(), bytes.len()) }
    }

    /// Adds the bytes that follow those added before, in memory that others may write meanwhile: each byte is read once.
    ///
    /// # Safety
    /// `bytes` is valid for reads of `len` bytes.
    #[inline]
    pub(crate) unsafe fn add_raw(&mut self, bytes: *const u8, len: usize) {
        // SAFETY: the caller's promise.
        let words = fold(unsafe { words(bytes, len) });
        // Behind an odd byte, the words' bytes have each other's place (RFC 1071, 2.B).
        let words = if self.odd { words.swap_bytes() } else { words };
        self.words = u64::from(fold(self.words)) + u64::from(words);
        self.odd ^= len % 2 == 1;
    }

    /// Adds the sum of the bytes that follow. Only behind whole words.
    #[inline]
    pub fn join(&mut self, next: Sum) {
        debug_assert!(!self.odd);
        self.words = u64::from(fold(self.words)) + u64::from(fold(next.words));
        self.odd = next.odd;
    }

    /// Adds a number, as it would stand in a packet. Only behind whole words.
    #[inline]
    pub fn add_u16(&mut self, value: u16) {
        debug_assert!(!self.odd);
        self.words += u64::from(value.to_be());
    }

    /// The sum itself: what a checksum field holds whose checksum is to be completed.
    #[inline]
    pub fn partial(self) -> [u8; 2] {
        fold(self.words).to_ne_bytes()
    }

    /// The checksum: the sum's complement.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        (!fold(self.words)).to_ne_bytes()
    }

    /// The checksum as UDP and TCP send it: never zero, which in UDP says that there is none (RFC 768), and which means
    /// the same as its complement.
    #[inline]
    pub fn checksum_not_zero(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// Whether bytes that have their checksum in them were summed, and it is right.
    #[inline]
    pub fn is_right(self) -> bool {
        self.checksum() == [0, 0]
    }
}

/// 16 bits of a sum, its carries added in.
#[inline]
fn fold(words: u64) -> u16 {
    let words = (words & 0xffff_ffff) + (words >> 32);
    let words = (words & 0xffff) + (words >> 16 & 0xffff) + (words >> 32);
    let words = (words & 0xffff) + (words >> 16);
    ((words & 0xffff) + (words >> 16)) as u16
}

/// The sum of the 16-bit words of `len` bytes, a last odd one taken as a word's first.
///
/// # Safety
/// `bytes` is valid for reads of `len` bytes.
#[inline]
unsafe fn words(bytes: *const u8, len: usize) -> u64 {
    // SAFETY: the caller's promise; AVX2 only where the machine has it.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if len >= 256 && std::arch::is_x86_feature_detected!("avx2") {
            return words_avx2(bytes, len);
        }
        words_in_blocks(bytes, len)
    }
}

/// # Safety
/// `bytes` is valid for reads of `len` bytes, and the machine has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn words_avx2(bytes: *const u8, len: usize) -> u64 {
    // SAFETY: the caller's promise. The same code, in wider registers.
    unsafe { words_in_blocks(bytes, len) }
}

/// # Safety
/// `bytes` is valid for reads of `len` bytes.
#[inline(always)]
unsafe fn words_in_blocks(bytes: *const u8, len: usize) -> u64 {
    /// Accumulators: independent, so that the compiler has them in vector registers.
    const LANES: usize = 16;
    const BLOCK: usize = LANES * 4;
    let mut sum = 0u64;
    let mut at = 0;
    // SAFETY: every read ends at or before `len`.
    unsafe {
        if len >= BLOCK {
            let mut lanes = [0u64; LANES];
            while len - at >= BLOCK {
                let block = bytes.add(at).cast::<[u32; LANES]>().read_unaligned();
                for lane in 0..LANES {
                    // 2^32 blocks before this overflows: more than a frame's 2^32 bytes have.
                    lanes[lane] += u64::from(block[lane]);
                }
                at += BLOCK;
            }
            for lane in lanes {
                sum += (lane & 0xffff_ffff) + (lane >> 32);
            }
        }
        while len - at >= 4 {
            sum += u64::from(bytes.add(at).cast::<u32>().read_unaligned());
            at += 4;
        }
        if len - at >= 2 {
            sum += u64::from(bytes.add(at).cast::<u16>().read_unaligned());
            at += 2;
        }
        if at < len {
            sum += u64::from(u16::from_ne_bytes([bytes.add(at).read(), 0]));
        }
    }
    barrier();
    sum
}

/// A checksum whose words changed from `old` to `new`, of the same, even length and at an even place (RFC 1624, 3).
///
/// # Panics
/// If the lengths differ or are odd.
pub fn update(checksum: [u8; 2], old: &[u8], new: &[u8]) -> [u8; 2] {
    assert!(old.len() == new.len() && old.len().is_multiple_of(2), "words for words");
    // HC' = ~(~HC + ~m + m')
    let [old, new] = [old, new].map(|bytes| fold(Sum::of(bytes).words));
    let words = u64::from(!u16::from_ne_bytes(checksum)) + u64::from(!old) + u64::from(new);
    Sum { words, odd: false }.checksum()
}

/// The sum of the pseudo header (RFC 9293, 3.1; RFC 8200, 8.1) for a transport header with its payload of `len` bytes.
/// `None`: there is no TCP or UDP header, or its receiver is not known.
#[inline]
pub fn pseudo(headers: &Headers, bytes: &[u8], len: usize) -> Option<Sum> {
    let protocol = match headers.transport {
        Transport::Tcp => 6,
        Transport::Udp => 17,
        _ => return None,
    };
    if headers.routed {
        return None;
    }
    let address = headers.address_len();
    let mut sum = Sum::of(bytes.get(headers.source_at..)?.get(..address)?);
    sum.add(bytes.get(headers.destination_at..)?.get(..address)?);
    sum.add_u16(protocol);
    // 32 bits in IPv6, 16 in IPv4, whose packets are no longer.
    sum.add_u16((len >> 16) as u16);
    sum.add_u16(len as u16);
    Some(sum)
}

/// What a look at a frame's checksums says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every checksum that is there is right, and there is one of the transport header.
    Right,
    /// One is wrong.
    Wrong,
    /// None is wrong, but there is none of the transport header: another protocol, a fragment, UDP without one.
    Unknown,
}

/// Verifies the checksums of a frame that is in `pieces`, of which the first has the headers: that of the IPv4 header,
/// that of TCP or UDP.
pub fn verify<'a>(headers: &Headers, pieces: impl IntoIterator<Item = &'a [u8]>) -> Verdict {
    let mut pieces = pieces.into_iter();
    let first = pieces.next().unwrap_or_default();
    let Some(mut check) = Check::new(headers, first) else {
        return Verdict::Wrong;
    };
    check.add(first);
    pieces.for_each(|piece| check.add(piece));
    check.verdict()
}

/// A verification, piece by piece.
pub(crate) struct Check {
    /// Without a transport checksum: nothing.
    sum: Option<Sum>,
    /// Bytes before those that are summed.
    skip: usize,
    left: usize,
}

impl Check {
    /// Looks at the headers, which `bytes` begin with. `None`: they are wrong already.
    pub(crate) fn new(headers: &Headers, bytes: &[u8]) -> Option<Check> {
        let unknown = Some(Check {
            sum: None,
            skip: 0,
            left: 0,
        });
        if headers.network == Network::Ipv4 {
            let header = bytes.get(headers.network_at..headers.transport_at)?;
            if !Sum::of(header).is_right() {
                return None;
            }
        }
        if headers.wrong_length {
            return unknown;
        }
        let mut len = headers.end.checked_sub(headers.transport_at)?;
        if headers.transport == Transport::Udp {
            let header = bytes.get(headers.transport_at..)?;
            let (told, checksum) = (usize::from(be16(header, 4)?), be16(header, 6)?);
            if checksum == 0 {
                // None was made; IPv6 demands one (RFC 8200, 8.1).
                return unknown.filter(|_| headers.network == Network::Ipv4);
            }
            if told < 8 || told > len {
                return None;
            }
            len = told;
        }
        match pseudo(headers, bytes, len) {
            None => unknown,
            sum => Some(Check {
                sum,
                skip: headers.transport_at,
                left: len,
            }),
        }
    }

    /// What of the next `len` bytes of the frame is summed.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let from = self.skip.min(len);
        self.skip -= from;
        let n = self.left.min(len - from);
        self.left -= n;
        from..from + n
    }

    /// Takes the frame's next bytes.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let range = self.range(bytes.len());
        if let Some(sum) = &mut self.sum {
            sum.add(&bytes[range]);
        }
    }

    /// As [`Check::add`], of memory that others may write meanwhile.
    ///
    /// # Safety
    /// `bytes` is valid for reads of `len` bytes.
    pub(crate) unsafe fn add_raw(&mut self, bytes: *const u8, len: usize) {
        let range = self.range(len);
        if let Some(sum) = &mut self.sum {
            // SAFETY: the range is inside of 0..len.
            unsafe { sum.add_raw(bytes.add(range.start), range.len()) };
        }
    }

    /// All bytes went in.
    pub(crate) fn verdict(&self) -> Verdict {
        match &self.sum {
            None => Verdict::Unknown,
            Some(sum) if self.left == 0 && sum.is_right() => Verdict::Right,
            Some(_) => Verdict::Wrong,
        }
    }
}

/// A checksum that is still to be made: over all bytes from `start` on, to stand `offset` bytes behind `start`, where now
/// the sum of what is not in the packet stands (virtio 1.3, 5.1.6.2: `VIRTIO_NET_HDR_F_NEEDS_CSUM`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// The first byte that is summed.
    pub start: u16,
    /// Where the checksum stands, from `start`.
    pub offset: u16,
}

impl Partial {
    /// Whether the field is in a frame of `len` bytes.
    pub fn fits(self, len: usize) -> bool {
        self.field() + 2 <= len
    }

    /// Where the field is.
    pub fn field(self) -> usize {
        usize::from(self.start) + usize::from(self.offset)
    }

    /// Completes the checksum of a frame in one piece. `false`, and nothing done: its place is not in there.
    pub fn complete(self, frame: &mut [u8]) -> bool {
        if !self.fits(frame.len()) {
            return false;
        }
        let checksum = Sum::of(&frame[usize::from(self.start)..]).checksum_not_zero();
        frame[self.field()..][..2].copy_from_slice(&checksum);
        true
    }

    /// Leaves the checksum of a frame's TCP or UDP header open: puts the pseudo header's sum where it stands. `bytes`
    /// begin with the headers. `None`: there is no such header, or no checksum can be made over all bytes from it on,
    /// since some are padding.
    pub fn open(headers: &Headers, bytes: &mut [u8], frame_len: usize) -> Option<Partial> {
        if headers.end != frame_len {
            return None;
        }
        let partial = Partial {
            start: u16::try_from(headers.transport_at).ok()?,
            offset: headers.checksum_offset()? as u16,
        };
        let sum = pseudo(headers, bytes, frame_len.checked_sub(headers.transport_at)?)?;
        let field = bytes.get_mut(partial.field()..)?.get_mut(..2)?;
        field.copy_from_slice(&sum.partial());
        Some(partial)
    }
}

/// Makes the checksum of a frame's IPv4 header, if it has one. `bytes` begin with the headers.
pub fn set_ipv4(headers: &Headers, bytes: &mut [u8]) {
    if headers.network == Network::Ipv4
        && let Some(header) = bytes.get_mut(headers.network_at..headers.transport_at)
        && header.len() >= 20
    {
        header[10..12].fill(0);
        let checksum = Sum::of(header).checksum();
        header[10..12].copy_from_slice(&checksum);
    }
}

#[cfg(test)]
#[path = "checksum_tests.rs"]
pub(crate) mod tests;
