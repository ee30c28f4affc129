//! Time, which the caller has and this crate does not.

/// Waiting. Every wait of this crate is a bounded number of delays.
pub trait Delay {
    /// Returns after at least `us` microseconds. A test may return at once.
    fn delay_us(&mut self, us: u32);
}

impl<F: FnMut(u32)> Delay for F {
    fn delay_us(&mut self, us: u32) {
        self(us);
    }
}
