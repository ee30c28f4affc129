//! The calls that open, start, stop and look after a port.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi::{Calls, Config, FilterSetup, Info, MAX_PAIRS, Rss, RxSetup, TxSetup};
use crate::port::Port;
use crate::setup::Fault;

thread_local! {
    static ERROR: RefCell<CString> = RefCell::default();
}

/// Runs a call: a fault's negative errno, whose text is kept. Panics stop here.
fn shield(call: impl FnOnce() -> Result<i32, Fault>) -> i32 {
    let result = catch_unwind(AssertUnwindSafe(call));
    let fault = match result {
        Ok(Ok(value)) => return value,
        Ok(Err(fault)) => fault,
        Err(_) => Fault::new(Errno::FAULT, "a fault of the driver itself: please report it"),
    };
    let text = CString::new(fault.text.replace('\0', " ")).unwrap_or_default();
    ERROR.with(|error| *error.borrow_mut() = text);
    -fault.errno.raw_os_error()
}

/// The text of the thread's last error.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_pmd_error() -> *const c_char {
    ERROR.with(|error| error.borrow().as_ptr())
}

/// Opens a port.
///
/// # Safety
/// `spec` is a text, `calls` stays for ever, `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_open(spec: *const c_char, calls: *const Calls, out: *mut *mut c_void) -> i32 {
    shield(|| {
        // SAFETY: by the caller.
        let (spec, calls) = unsafe { (CStr::from_ptr(spec), &*calls) };
        crate::log::install(calls);
        let port = Port::open(&spec.to_string_lossy(), calls)?;
        // SAFETY: by the caller.
        unsafe { out.write(Box::into_raw(Box::new(port)).cast()) };
        Ok(0)
    })
}

/// Closes a port.
///
/// # Safety
/// It is one, and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_close(port: *mut c_void) {
    // SAFETY: by the caller.
    shield(|| unsafe {
        drop(Box::from_raw(port.cast::<Port>()));
        Ok(0)
    });
}

/// # Safety
/// It is a port, which nobody else uses during the call.
unsafe fn with(port: *mut c_void, call: impl FnOnce(&mut Port) -> Result<i32, Fault>) -> i32 {
    // SAFETY: by the caller.
    shield(|| call(unsafe { &mut *port.cast::<Port>() }))
}

/// What is known of a port.
///
/// # Safety
/// It is a port, which nobody else uses during the call; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_info(port: *mut c_void, out: *mut Info) {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            out.write(port.info());
            Ok(0)
        })
    };
}

/// The arrays of a call.
///
/// # Safety
/// They have as many elements as the configuration has pairs.
unsafe fn setups<'a>(
    config: *const Config,
    rx: *const RxSetup,
    tx: *const TxSetup,
) -> Result<(&'a Config, &'a [RxSetup], &'a [TxSetup]), Fault> {
    // SAFETY: by the caller.
    let config = unsafe { &*config };
    let n = usize::from(config.pairs);
    if n == 0 || n > MAX_PAIRS {
        return Err(Fault::new(Errno::INVAL, format!("{n} queue pairs: 1 to {MAX_PAIRS}")));
    }
    // SAFETY: by the caller.
    unsafe {
        Ok((
            config,
            std::slice::from_raw_parts(rx, n),
            std::slice::from_raw_parts(tx, n),
        ))
    }
}

/// Bytes of memory that a started port needs; 0: the configuration is none.
///
/// # Safety
/// It is a port, which nobody else uses during the call; the arrays have an element for each pair.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_memory(
    port: *mut c_void,
    config: *const Config,
    rx: *const RxSetup,
    tx: *const TxSetup,
) -> u64 {
    let mut len = 0;
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            let (config, rx, tx) = setups(config, rx, tx)?;
            len = port.memory(config, rx, tx)? as u64;
            Ok(0)
        })
    };
    len
}

/// Starts a port.
///
/// # Safety
/// As [`usernic_pmd_memory`]; the memory is as long as that said, and stays until the port is stopped, as do the pools;
/// `queues` has two elements for each pair.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_start(
    port: *mut c_void,
    config: *const Config,
    rx: *const RxSetup,
    tx: *const TxSetup,
    memory: *mut u8,
    queues: *mut *mut c_void,
) -> i32 {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            let (config, rx, tx) = setups(config, rx, tx)?;
            let memory = NonNull::new(memory).ok_or_else(|| Fault::new(Errno::NOMEM, "no memory for the rings"))?;
            let queues = std::slice::from_raw_parts_mut(queues, 2 * usize::from(config.pairs));
            port.start(config, rx, tx, memory, queues)?;
            Ok(0)
        })
    }
}

/// Stops a port.
///
/// # Safety
/// It is a port, which nobody else uses during the call; no burst function runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_stop(port: *mut c_void) {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            port.stop();
            Ok(0)
        })
    };
}

/// Shares memory anew.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_share(port: *mut c_void) -> i32 {
    // SAFETY: by the caller.
    unsafe { with(port, |port| port.share().map(|()| 0)) }
}

/// Looks after the connection.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_service(port: *mut c_void) -> i32 {
    // SAFETY: by the caller.
    unsafe { with(port, |port| Ok(port.service().into())) }
}

/// Which frames to receive.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_filter(port: *mut c_void, filter: *const FilterSetup) -> i32 {
    // SAFETY: by the caller.
    unsafe { with(port, |port| port.set_filter(&*filter).map(|()| 0)) }
}

/// Whether VLAN tags are taken out.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_vlan_strip(port: *mut c_void, on: u8) {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            port.set_vlan_strip(on != 0);
            Ok(0)
        })
    };
}

/// Takes packets of so many bytes.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_mtu(port: *mut c_void, mtu: u16) -> i32 {
    // SAFETY: by the caller.
    unsafe { with(port, |port| port.set_mtu(mtu).map(|()| 0)) }
}

/// Key, table and fields of receive side scaling.
///
/// # Safety
/// It is a port, which nobody else uses during the call; `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_rss(port: *mut c_void, out: *mut Rss) -> i32 {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            let rss = port.vf()?.rss()?;
            out.write(Rss {
                key: rss.key,
                table: rss.table,
                fields: rss.fields.bits(),
            });
            Ok(0)
        })
    }
}

/// Sets them.
///
/// # Safety
/// It is a port, which nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_pmd_set_rss(port: *mut c_void, rss: *const Rss) -> i32 {
    // SAFETY: by the caller.
    unsafe {
        with(port, |port| {
            let Rss { key, table, fields } = *rss;
            let rss = ixgbevf::Rss {
                key,
                table,
                fields: ixgbevf::HashFields::from_bits_truncate(fields),
            };
            port.vf()?.set_rss(&rss)?;
            Ok(0)
        })
    }
}
