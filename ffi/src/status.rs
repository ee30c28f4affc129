//! Error codes, the text behind the last one of each thread, and the shield that panics do not pass.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The interface that a header describes. It changes when a program that was compiled with an older header would not
/// work any more.
pub const USERNIC_ABI_VERSION: u32 = 1;

/// What calls return that fail: below 0. What succeeds returns 0 or a count.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It worked.
    Ok = 0,
    /// A pointer is null, or not aligned for its type.
    Pointer = -1,
    /// A handle is null, was never made, was closed, or is of another kind.
    Handle = -2,
    /// Another thread is in a call with this handle.
    Busy = -3,
    /// An argument is out of its range: a length, an index, a size of a struct, a text without end.
    Argument = -4,
    /// The port spec is wrong.
    Spec = -5,
    /// The port's memory could not be had.
    Memory = -6,
    /// The other side could not be reached, or does not speak as it should.
    Connection = -7,
    /// The other side, or the kind of port, lacks what was asked for.
    Unsupported = -8,
    /// Somebody has the queue.
    Taken = -9,
    /// A frame does not fit: into its buffer, its bounds, the burst.
    Room = -10,
    /// A frame cannot be asked for this offload.
    Offload = -11,
    /// The port was closed.
    Closed = -12,
    /// A system call failed.
    System = -13,
    /// Header and library do not belong together.
    Abi = -14,
    /// A fault of this library: what the handle stands for can only be closed.
    Internal = -15,
}

/// A call that failed: the code, and the text for who asks.
pub(crate) struct Fault {
    status: Status,
    text: Text,
}

enum Text {
    Fixed(&'static str),
    Made(String),
}

pub(crate) type Outcome<T> = Result<T, Fault>;

impl Fault {
    /// With a text that costs nothing.
    pub(crate) const fn fixed(status: Status, text: &'static str) -> Self {
        Fault {
            status,
            text: Text::Fixed(text),
        }
    }

    /// With a text that is put together.
    pub(crate) fn new(status: Status, text: impl Display) -> Self {
        Fault {
            status,
            text: Text::Made(text.to_string()),
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.status
    }
}

impl From<usernic::Error> for Fault {
    fn from(error: usernic::Error) -> Self {
        use usernic::Error;
        let status = match &error {
            Error::Spec(_) => Status::Spec,
            Error::Memory(_) | Error::Segment(_) | Error::TooSmall { .. } => Status::Memory,
            Error::VhostUser(_) => Status::Connection,
            Error::Feature { .. } | Error::TooManyQueues { .. } | Error::NotGranted { .. } => Status::Unsupported,
            Error::NoSuchQueue { .. } | Error::Region { .. } => Status::Argument,
            Error::QueueTaken { .. } => Status::Taken,
            _ => Status::System,
        };
        Fault::new(status, error)
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

#[cold]
#[inline(never)]
fn report(fault: Fault) -> i32 {
    let text = match fault.text {
        Text::Fixed(text) => text.to_owned(),
        Text::Made(text) => text,
    };
    let mut bytes = text.into_bytes();
    bytes.retain(|&b| b != 0);
    // At the end of a thread there may be no place for it any more.
    let _ = MESSAGE.try_with(|message| {
        if let Ok(mut message) = message.try_borrow_mut() {
            *message = CString::new(bytes).unwrap_or_default();
        }
    });
    fault.status as i32
}

/// Runs a call: its result as a number, a panic as [`Status::Internal`].
#[inline(always)]
pub(crate) fn shield(call: impl FnOnce() -> Outcome<i32>) -> i32 {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => value,
        Ok(Err(fault)) => report(fault),
        Err(panic) => {
            // What a panic carries may panic when it is dropped.
            std::mem::forget(panic);
            report(Fault::fixed(
                Status::Internal,
                "a panic inside the library: this is a fault of usernic, please report what it printed",
            ))
        }
    }
}

/// The text of the last call of this thread that failed: what was tried, what was found, what to do. Empty if none did.
/// It stays as it is until another call of this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_error() -> *const c_char {
    MESSAGE
        .try_with(|message| message.try_borrow().map_or(c"".as_ptr(), |message| message.as_ptr()))
        .unwrap_or(c"".as_ptr())
}

/// A status in words, for any number.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_status_text(status: i32) -> *const c_char {
    let text: &CStr = match status {
        0.. => c"it worked",
        -1 => c"a pointer is null or misaligned",
        -2 => c"no such handle: null, closed, or of another kind",
        -3 => c"the handle is in use by another thread",
        -4 => c"an argument is out of range",
        -5 => c"the port spec is wrong",
        -6 => c"no memory for the port",
        -7 => c"no connection to the other side",
        -8 => c"not supported",
        -9 => c"the queue is taken",
        -10 => c"the frame does not fit",
        -11 => c"the offload cannot be asked for",
        -12 => c"the port was closed",
        -13 => c"a system call failed",
        -14 => c"header and library do not belong together",
        -15 => c"a fault of the library",
        _ => c"no status of usernic",
    };
    text.as_ptr()
}

/// The library's USERNIC_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_abi_version() -> u32 {
    USERNIC_ABI_VERSION
}

/// The library's version, as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn usernic_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version has no NUL"),
    };
    VERSION.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: a text that lives until the next failing call of this thread.
        unsafe { CStr::from_ptr(usernic_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_stop_at_the_shield() {
        assert_eq!(shield(|| Ok(7)), 7);
        assert_eq!(shield(|| panic!("on purpose")), Status::Internal as i32);
        assert!(message().contains("fault of usernic"));
    }

    #[test]
    fn messages_are_the_threads_own() {
        assert_eq!(shield(|| Err(Fault::fixed(Status::Room, "here"))), -10);
        std::thread::spawn(|| {
            assert_eq!(message(), "");
            shield(|| Err(Fault::new(Status::Room, "the\0re")));
            assert_eq!(message(), "there");
        })
        .join()
        .unwrap();
        assert_eq!(message(), "here");
    }

    #[test]
    fn every_status_has_its_words() {
        for status in (Status::Internal as i32..=0).chain([1, i32::MAX]) {
            // SAFETY: a static text.
            let text = unsafe { CStr::from_ptr(usernic_status_text(status)) };
            assert_ne!(text, c"no status of usernic", "{status}");
        }
        // SAFETY: a static text.
        let text = unsafe { CStr::from_ptr(usernic_status_text(i32::MIN)) };
        assert_eq!(text, c"no status of usernic");
    }
}
