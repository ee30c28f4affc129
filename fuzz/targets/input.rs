//! Numbers off the front of the fuzzer's bytes; 0 behind their end.

/// The fuzzer's bytes.
pub struct Input<'a>(pub &'a [u8]);

#[allow(dead_code, reason = "not every target takes all kinds")]
impl<'a> Input<'a> {
    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        (0..8).fold(0, |sum, at| sum | u64::from(self.u8()) << (8 * at))
    }
}
