//! What the program says, and where: results on the standard output, all else on the standard error.
//!
//! | what | how | when it cannot be written |
//! |---|---|---|
//! | a result | [`result!`], or [`stdout`] for many lines | [`Lost`]: exit status 1; without a message if a pipe's reader has left |
//! | a message | [`note!`]: one line, one write(2) | it is dropped: no message is worth the traffic |
//! | the log | [`Log`], as messages | it is dropped, also while its reader is stuck: a log never blocks a polling thread |
//!
//! The print macros panic where these do not; clippy denies them in this crate.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::ProgressDrawTarget;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Results that could not be written.
#[derive(Debug)]
pub struct Lost(io::Error);

impl Lost {
    /// The reader of a pipe has left, as `| head` does: nobody misses what follows.
    fn is_quiet(&self) -> bool {
        self.0.kind() == ErrorKind::BrokenPipe
    }

    /// Whether `error` says that the reader of the standard output has left.
    pub fn quietly(error: &anyhow::Error) -> bool {
        error.chain().any(|cause| {
            let inner = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let lost = inner.and_then(|inner| inner.downcast_ref::<Lost>());
            lost.or(cause.downcast_ref::<Lost>()).is_some_and(Lost::is_quiet)
        })
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to the standard output: {}", self.0)
    }
}

impl std::error::Error for Lost {}

/// Whether the program was started without a standard output.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Runs before Rust's runtime, which opens /dev/null in place of standard streams that are closed: results would be lost
/// in it without an error.
extern "C" fn look() {
    // SAFETY: the call takes a number and changes nothing.
    if unsafe { libc::fcntl(1, libc::F_GETFD) } == -1 {
        CLOSED.store(true, Ordering::Relaxed);
    }
}

// SAFETY: an entry of .init_array is a function of the C ABI; glibc's and musl's extra arguments are ignored by it.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// The standard output, whose errors are [`Lost`].
pub struct Stdout(io::Stdout);

/// The standard output, for results of several lines. A line is written when it ends, the rest by `flush`.
pub fn stdout() -> Stdout {
    Stdout(io::stdout())
}

/// Whether there is a standard output to write to.
pub fn check() -> io::Result<()> {
    if CLOSED.load(Ordering::Relaxed) {
        return Err(lost(rustix::io::Errno::BADF.into()));
    }
    Ok(())
}

/// The standard output as a file of its own, for bytes that are no lines.
pub fn stdout_file() -> io::Result<File> {
    check()?;
    Ok(io::stdout().as_fd().try_clone_to_owned()?.into())
}

/// An error of the standard output, however it was written to.
pub fn lost(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::Interrupted => error,
        kind => io::Error::new(kind, Lost(error)),
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        check()?;
        self.0.write(bytes).map_err(lost)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(lost)
    }
}

/// Writes results that have their line ends.
pub fn write_results(text: &str) -> io::Result<()> {
    let mut out = stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a line of results; [`result!`] formats it.
pub fn write_result(line: fmt::Arguments<'_>) -> io::Result<()> {
    write_results(&format!("{line}\n"))
}

/// A line of results on the standard output: an error that the caller hands on if it cannot be written.
#[macro_export]
macro_rules! result {
    ($($arguments:tt)*) => {
        $crate::output::write_result(::std::format_args!($($arguments)*))
    };
}

/// `text` as one line. Names and values that others chose may have control characters, which would begin a line of their
/// own or command the terminal: they are escaped as in Rust. `keep` is one that stays.
fn one_line(text: &str, keep: Option<char>) -> Cow<'_, str> {
    let escaped = |c: char| c.is_control() && Some(c) != keep;
    if !text.contains(escaped) {
        return text.into();
    }
    let mut line = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if escaped(c) {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line.into()
}

/// Writes a message in one piece, whatever becomes of it; [`note!`] formats it.
pub fn write_note(line: fmt::Arguments<'_>) {
    let line = line.to_string();
    let _ = io::stderr().write_all(format!("{}\n", one_line(&line, None)).as_bytes());
}

/// A line on the standard error.
#[macro_export]
macro_rules! note {
    ($($arguments:tt)*) => {
        $crate::output::write_note(::std::format_args!($($arguments)*))
    };
}

/// The standard error as the log's and the progress lines' writer, a line a call: what cannot be written at once is dropped.
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if would_take(rustix::stdio::stderr()) {
            let text = String::from_utf8_lossy(bytes);
            // The log's own colours are escape sequences; it escapes those in values itself.
            let line = one_line(text.strip_suffix('\n').unwrap_or(&text), Some('\x1b'));
            let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a line can be written without waiting: a pipe has room for a page, a terminal is not stopped.
fn would_take(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1))
}

/// Whether `stream` is for colours and moving lines: a terminal that can, and nobody who said no (<https://no-color.org>).
pub fn has_escapes(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Where progress is drawn: nowhere, if lines cannot move.
pub fn progress(hz: u8) -> ProgressDrawTarget {
    if has_escapes(&io::stderr()) {
        ProgressDrawTarget::stderr_with_hz(hz)
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// Whether the locale's characters are UTF-8, as setlocale(3) decides it: by the first of these that is set.
pub fn is_utf8() -> bool {
    let value = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .filter_map(std::env::var_os)
        .find(|value| !value.is_empty());
    value.is_some_and(|value| {
        let value = value.to_string_lossy().to_ascii_lowercase();
        value.contains("utf-8") || value.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pipe_takes_no_line() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(would_take(writer.as_fd()));
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        assert!(!would_take(writer.as_fd()), "this write would wait for ever");
    }

    #[test]
    fn a_reader_that_left_is_told_apart_from_a_full_disk() {
        let wrapped = |kind| anyhow::Error::from(lost(io::Error::from(kind))).context("while it ran");
        assert!(Lost::quietly(&wrapped(ErrorKind::BrokenPipe)));
        assert!(!Lost::quietly(&wrapped(ErrorKind::StorageFull)));
        assert!(
            wrapped(ErrorKind::StorageFull)
                .chain()
                .any(|c| c.to_string().contains("standard output"))
        );
        // A socket's broken pipe is no reader of ours.
        assert!(!Lost::quietly(&anyhow::Error::from(io::Error::from(
            ErrorKind::BrokenPipe
        ))));
    }
}
