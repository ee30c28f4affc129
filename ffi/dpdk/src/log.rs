//! What the Rust half says goes to DPDK's log.

use std::io::Write;
use std::sync::OnceLock;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::abi::Calls;

struct Log(&'static Calls);

struct Line {
    calls: &'static Calls,
    level: u32,
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        self.make_writer_for_level(Level::INFO)
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        self.make_writer_for_level(*meta.level())
    }
}

impl Log {
    /// As rte_log.h numbers them.
    fn make_writer_for_level(&self, level: Level) -> Line {
        let level = match level {
            Level::ERROR => 4,
            Level::WARN => 5,
            Level::INFO => 7,
            _ => 8,
        };
        Line { calls: self.0, level }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = bytes.trim_ascii_end();
        // SAFETY: the call takes as many bytes as it is told.
        unsafe { (self.calls.log)(self.level, text.as_ptr(), text.len()) };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends what is traced to DPDK, from now on; once a process.
pub(crate) fn install(calls: &'static Calls) {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let subscriber = tracing_subscriber::fmt()
            .with_writer(Log(calls))
            .with_max_level(Level::DEBUG)
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_target(false)
            .finish();
        // Somebody else's stays, if there is one.
        let _ = tracing::subscriber::set_global_default(subscriber);
    });
}
