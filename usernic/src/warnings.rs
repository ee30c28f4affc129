//! Warnings about the other side, which can give reason for them as often as it likes.

use std::time::{Duration, Instant};

/// How often at the most the operator is told.
const WARNING: Duration = Duration::from_secs(10);

/// A warning that is repeated now and then only.
#[derive(Debug, Default)]
pub(crate) struct Warnings {
    last: Option<Instant>,
    unsaid: u64,
}

impl Warnings {
    /// Whether to say it now, and how it ends then: with how many were not said before. `None`: not now.
    pub(crate) fn due(&mut self) -> Option<String> {
        if self.last.is_some_and(|last| last.elapsed() < WARNING) {
            self.unsaid += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(match std::mem::take(&mut self.unsaid) {
            0 => String::new(),
            n => format!(" ({n} more since the last such line)"),
        })
    }
}
