//! Vector instructions, where they win: a packed ring's descriptors four at a time.
//!
//! Whoever makes a ring says what the processor has; nothing is detected here. The scalar code is what the others are
//! tested against, and what handles whatever they do not: the ends of a burst, other regions, anything unusual.

/// Which vector instructions may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors(Level);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Level {
    #[default]
    None,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    /// None of them.
    pub const NONE: Self = Self(Level::None);

    /// AVX2.
    ///
    /// # Safety
    /// The processor has it, and the system saves its registers.
    #[cfg(target_arch = "x86_64")]
    pub const unsafe fn avx2() -> Self {
        Self(Level::Avx2)
    }

    /// AVX-512F.
    ///
    /// # Safety
    /// The processor has it, and the system saves its registers.
    #[cfg(target_arch = "x86_64")]
    pub const unsafe fn avx512() -> Self {
        Self(Level::Avx512)
    }

    /// For people.
    pub const fn name(self) -> &'static str {
        match self.0 {
            Level::None => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
        }
    }

    /// Whether [`peek`](Vectors::peek) does anything.
    #[inline(always)]
    pub(crate) const fn peeks(self) -> bool {
        !matches!(self.0, Level::None)
    }

    /// Whether [`mark`](Vectors::mark) does anything. With AVX2, storing single words costs more than it saves.
    #[inline(always)]
    pub(crate) const fn marks(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, Level::Avx512);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

/// Descriptors to a group.
pub(crate) const GROUP: usize = 4;

/// What the descriptors of a burst must be: flags in their second words, and memory inside one region.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only vectors look at it"))]
pub(crate) struct Pattern {
    /// Of the second word, the bits that matter, and how they must be.
    pub(crate) mask: u64,
    pub(crate) word: u64,
    /// The region: where it begins for the other side, its bytes (below 2^63), and what leads from there to here.
    pub(crate) theirs: u64,
    pub(crate) len: u64,
    pub(crate) delta: u64,
}

/// Of a descriptor's second word: length and ID.
#[cfg(target_arch = "x86_64")]
const LEN_ID: u64 = (1 << 48) - 1;

#[cfg(target_arch = "x86_64")]
impl Vectors {
    /// Reads up to `groups` groups of four descriptors, from `src` on, as long as whole groups are as `pattern` says, and
    /// writes to `dst` what [`Single`](crate::Single)s consist of: where the memory is here, length and ID. How many
    /// groups that were.
    ///
    /// # Safety
    /// `src` is valid for reads of 64 bytes a group, and nobody writes there but atomically or from outside this process;
    /// `dst` is valid for writes of as many.
    #[inline(always)]
    pub(crate) unsafe fn peek(self, src: *const u8, dst: *mut u8, groups: usize, pattern: &Pattern) -> usize {
        // SAFETY: whoever made the value vouched for the instructions; the rest is this function's contract.
        unsafe {
            match self.0 {
                Level::None => 0,
                Level::Avx2 => x86::peek_avx2(src, dst, groups, pattern),
                Level::Avx512 => x86::peek_avx512(src, dst, groups, pattern),
            }
        }
    }

    /// Writes length and ID of up to `groups` groups of four from `src`, with `flags` above, into the second words of
    /// the descriptors from `dst` on, as long as no length is 0. How many groups that were.
    ///
    /// # Safety
    /// `src` is valid for reads of 64 bytes a group, `dst` for writes of as many, and there nobody reads or writes but
    /// atomically or from outside this process, and nobody looks before a descriptor in front of them is published.
    #[inline(always)]
    pub(crate) unsafe fn mark(self, src: *const u8, dst: *mut u8, groups: usize, flags: u64) -> usize {
        // SAFETY: as above.
        unsafe {
            match self.0 {
                Level::None | Level::Avx2 => 0,
                Level::Avx512 => x86::mark_avx512(src, dst, groups, flags),
            }
        }
    }
}

/// Room for NEON; today the scalar code is all there is.
#[cfg(not(target_arch = "x86_64"))]
impl Vectors {
    /// # Safety
    /// None.
    pub(crate) unsafe fn peek(self, _src: *const u8, _dst: *mut u8, _groups: usize, _pattern: &Pattern) -> usize {
        0
    }

    /// # Safety
    /// None.
    pub(crate) unsafe fn mark(self, _src: *const u8, _dst: *mut u8, _groups: usize, _flags: u64) -> usize {
        0
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LEN_ID, Pattern};
    use core::arch::x86_64::*;

    /// First and second words of four descriptors in eight lanes.
    const FIRST: __mmask8 = 0b0101_0101;
    const SECOND: __mmask8 = 0b1010_1010;

    /// # Safety
    /// As for `Vectors::peek`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn peek_avx512(src: *const u8, dst: *mut u8, groups: usize, pattern: &Pattern) -> usize {
        let words = |value: u64, lanes| _mm512_maskz_set1_epi64(lanes, value as i64);
        let (word, mask) = (words(pattern.word, SECOND), words(pattern.mask, SECOND));
        let (theirs, delta) = (words(pattern.theirs, FIRST), words(pattern.delta, FIRST));
        let region = _mm512_set1_epi64(pattern.len as i64);
        let keep = _mm512_or_si512(words(u64::MAX, FIRST), words(LEN_ID, SECOND));
        let low = _mm512_set1_epi64(u32::MAX.into());
        for group in 0..groups {
            // SAFETY: inside `groups` groups.
            let (from, to) = unsafe {
                (
                    src.add(64 * group).cast::<__m512i>(),
                    dst.add(64 * group).cast::<__m512i>(),
                )
            };
            // SAFETY: valid, by the contract; read as it is, once for each time that is written here.
            let seen = unsafe { load(from) };
            if _mm512_test_epi64_mask(_mm512_xor_si512(seen, word), mask) != 0 {
                return group;
            }
            // 64 bytes need not be read at once. After the flags of all four were seen, what they publish is complete, and
            // loads stay in order on this architecture: this one takes it.
            // SAFETY: as above.
            let descs = unsafe { load(from) };
            let len = _mm512_and_si512(_mm512_unpackhi_epi64(descs, descs), low);
            let offset = _mm512_sub_epi64(descs, theirs);
            let end = _mm512_add_epi64(offset, len);
            let inside = _mm512_mask_cmple_epu64_mask(FIRST, offset, region)
                & _mm512_cmple_epu64_mask(end, region)
                & _mm512_test_epi64_mask(len, len);
            if inside != FIRST {
                return group;
            }
            let singles = _mm512_and_si512(_mm512_add_epi64(descs, delta), keep);
            // SAFETY: valid, by the contract.
            unsafe { _mm512_storeu_si512(to, singles) };
        }
        groups
    }

    /// # Safety
    /// As for `Vectors::mark`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn mark_avx512(src: *const u8, dst: *mut u8, groups: usize, flags: u64) -> usize {
        let keep = _mm512_set1_epi64(LEN_ID as i64);
        let low = _mm512_set1_epi64(u32::MAX.into());
        let flags = _mm512_set1_epi64(flags as i64);
        for group in 0..groups {
            // SAFETY: inside `groups` groups, valid by the contract.
            let singles = unsafe { _mm512_loadu_si512(src.add(64 * group).cast()) };
            if _mm512_mask_test_epi64_mask(SECOND, singles, low) != SECOND {
                return group;
            }
            let words = _mm512_or_si512(_mm512_and_si512(singles, keep), flags);
            // The first words stay as they are.
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_epi64(dst.add(64 * group).cast(), SECOND, words) };
        }
        groups
    }

    /// # Safety
    /// As for `Vectors::peek`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn peek_avx2(src: *const u8, dst: *mut u8, groups: usize, pattern: &Pattern) -> usize {
        let pair =
            |first: u64, second: u64| _mm256_set_epi64x(second as i64, first as i64, second as i64, first as i64);
        let (word, mask) = (pair(0, pattern.word), pair(0, pattern.mask));
        let (theirs, delta) = (pair(pattern.theirs, 0), pair(pattern.delta, 0));
        let region = pair(pattern.len, 0);
        let keep = pair(u64::MAX, LEN_ID);
        let low = pair(u32::MAX.into(), u32::MAX.into());
        let zero = _mm256_setzero_si256();
        for group in 0..groups {
            // SAFETY: inside `groups` groups.
            let (from, to) = unsafe {
                (
                    src.add(64 * group).cast::<__m256i>(),
                    dst.add(64 * group).cast::<__m256i>(),
                )
            };
            // SAFETY: valid, by the contract.
            let seen = unsafe { [load(from), load(from.add(1))] };
            let strange = _mm256_or_si256(_mm256_xor_si256(seen[0], word), _mm256_xor_si256(seen[1], word));
            if _mm256_testz_si256(strange, mask) == 0 {
                return group;
            }
            // As with AVX-512.
            // SAFETY: as above.
            let descs = unsafe { [load(from), load(from.add(1))] };
            let mut singles = [zero; 2];
            for (single, desc) in singles.iter_mut().zip(descs) {
                let len = _mm256_and_si256(_mm256_unpackhi_epi64(desc, desc), low);
                let offset = _mm256_sub_epi64(desc, theirs);
                let end = _mm256_add_epi64(offset, len);
                let left = _mm256_sub_epi64(region, end);
                // None is negative: the region has less than 2^63 bytes, and an end beyond that is.
                let outside = _mm256_or_si256(_mm256_or_si256(offset, end), left);
                let empty = _mm256_cmpeq_epi64(len, zero);
                let bad = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_or_si256(outside, empty)));
                if bad & 0b0101 != 0 {
                    return group;
                }
                *single = _mm256_and_si256(_mm256_add_epi64(desc, delta), keep);
            }
            // SAFETY: valid, by the contract.
            unsafe {
                _mm256_storeu_si256(to, singles[0]);
                _mm256_storeu_si256(to.add(1), singles[1]);
            }
        }
        groups
    }

    /// Reads shared memory: as often as it is written, and not at other times.
    ///
    /// # Safety
    /// `from` is valid for reads.
    #[inline(always)]
    unsafe fn load<T: Copy>(from: *const T) -> T {
        #[repr(C, packed(8))]
        struct Unaligned<T>(T);
        // SAFETY: valid, by the contract; descriptors are aligned to 16, and this to 8.
        unsafe { from.cast::<Unaligned<T>>().read_volatile() }.0
    }
}
