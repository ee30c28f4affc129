//! Ports: opening, asking, closing.

use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use usernic::{Port, Stats};

use crate::check;
use crate::queue::{self, QueueHandle};
use crate::status::{Fault, Outcome, Status, USERNIC_ABI_VERSION, shield};
use crate::table::Table;

/// A port, as a handle: not to be followed.
pub struct PortHandle(());

/// An open port, and a number that no other port of this process ever has.
#[derive(Clone)]
pub(crate) struct Open {
    pub(crate) port: Arc<Port>,
    pub(crate) home: u64,
}

static PORTS: Table<Open> = Table::new(1, "port");
static HOMES: AtomicU64 = AtomicU64::new(1);

/// The state of a link.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LinkState {
    /// The virtio features that were negotiated.
    pub features: u64,
    /// Mb/s, 0 if unknown.
    pub speed: u32,
    /// Queue pairs that are running.
    pub queues: u16,
    /// 1: the other side is there and the rings are running.
    pub up: u16,
}

/// What a queue, or all queues of a port, have done since the port was opened.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Frames received and handed to the program.
    pub rx_packets: u64,
    /// Their bytes, without FCS.
    pub rx_bytes: u64,
    /// Frames sent: handed to the other side.
    pub tx_packets: u64,
    /// Their bytes, without FCS.
    pub tx_bytes: u64,
    /// Frames of the other side that were malformed, did not fit the port's buffers, or came from a ring that it had
    /// disabled, and were dropped.
    pub rx_errors: u64,
    /// Frames that the receive filter kept out.
    pub rx_filtered: u64,
    /// Frames to send that were dropped since the other side can never take them.
    pub tx_errors: u64,
    /// Times that there was no buffer to receive into.
    pub rx_no_buffer: u64,
    /// Violations of the protocol by the other side that were caught.
    pub anomalies: u64,
    /// Notifications sent: each a system call.
    pub kicks: u64,
    /// Frames of the other side with fewer bytes than an Ethernet header has, which were dropped.
    pub rx_runts: u64,
    /// Frames of the other side that are longer than the port's MTU allows, and were dropped.
    pub rx_oversize: u64,
    /// Frames to send that are longer than the port's MTU allows, and were dropped.
    pub tx_oversize: u64,
    /// Frames to send that the other side's receive filter keeps out, and that were dropped.
    pub tx_filtered: u64,
}

const _: () = assert!(size_of::<LinkState>() == 16 && size_of::<Counts>() == 112);

impl From<Stats> for Counts {
    fn from(stats: Stats) -> Self {
        Counts {
            rx_packets: stats.rx_packets,
            rx_bytes: stats.rx_bytes,
            tx_packets: stats.tx_packets,
            tx_bytes: stats.tx_bytes,
            rx_errors: stats.rx_errors,
            rx_filtered: stats.rx_filtered,
            tx_errors: stats.tx_errors,
            rx_no_buffer: stats.rx_no_buffer,
            anomalies: stats.anomalies,
            kicks: stats.kicks,
            rx_runts: stats.rx_runts,
            rx_oversize: stats.rx_oversize,
            tx_oversize: stats.tx_oversize,
            tx_filtered: stats.tx_filtered,
        }
    }
}

fn open(port: *const PortHandle) -> Outcome<Open> {
    PORTS.copy(port as u64)
}

/// The time in milliseconds; below 0: no end.
pub(crate) fn time(milliseconds: i64) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// As long as nobody who waits would see the end of it.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Opens a port from a spec, such as "virtio-user,path=/run/vhost.sock,queues=2". C programs call usernic_port_open(),
/// which fills in `abi`: the USERNIC_ABI_VERSION of the header that the caller was made with.
///
/// A front-end connects, negotiates and starts its rings before this returns; with "server=1", and for "vhost" ports, the
/// socket listens when this returns.
///
/// # Safety
/// `spec` is a text, `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_open_abi(abi: u32, spec: *const c_char, out: *mut *mut PortHandle) -> i32 {
    shield(|| {
        if abi != USERNIC_ABI_VERSION {
            return Err(Fault::new(
                Status::Abi,
                format_args!(
                    "the program was made for version {abi} of the interface, this library has {USERNIC_ABI_VERSION}: \
                     compile it anew with this library's usernic.h"
                ),
            ));
        }
        check::pointer(out, "usernic_port_open: out")?;
        // SAFETY: by the caller.
        let spec = unsafe { check::text(spec, "usernic_port_open: spec") }?;
        let port = Arc::new(Port::open(spec)?);
        let home = HOMES.fetch_add(1, Ordering::Relaxed);
        let handle = PORTS.insert(Open { port, home })?;
        // SAFETY: by the caller.
        unsafe { out.write(handle as *mut PortHandle) };
        Ok(0)
    })
}

/// Closes a port. Its queues move nothing any more and are to be closed, too, in any order; packets in bursts stay valid.
/// What was sent and not yet taken is lost: usernic_queue_drain() first.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_close(port: *mut PortHandle) -> i32 {
    shield(|| {
        // A copy of it may be in use by another thread, which waits: retried until that is over would be a wait without
        // end. What is removed here goes when the last call ends.
        loop {
            match PORTS.remove(port as u64) {
                Err(fault) if fault.status() == Status::Busy => std::thread::yield_now(),
                other => return other.map(|_| 0),
            }
        }
    })
}

/// Takes queue pair `index`, from 0. Closing it gives it back.
///
/// # Safety
/// `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_queue(port: *mut PortHandle, index: u16, out: *mut *mut QueueHandle) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_port_queue: out")?;
        let handle = queue::take(&open(port)?, index)?;
        // SAFETY: by the caller.
        unsafe { out.write(handle as *mut QueueHandle) };
        Ok(0)
    })
}

/// Queue pairs of the port, running or not.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_queue_count(port: *mut PortHandle) -> i32 {
    shield(|| Ok(open(port)?.port.queue_count().into()))
}

/// Uses the first `count` queue pairs of a front-end port and lets the others rest.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_set_queues(port: *mut PortHandle, count: u16) -> i32 {
    shield(|| {
        open(port)?.port.set_queues(count)?;
        Ok(0)
    })
}

/// The link, in a struct of `size` bytes (sizeof *out).
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_link(port: *mut PortHandle, out: *mut LinkState, size: usize) -> i32 {
    shield(|| {
        let link = open(port)?.port.link();
        let state = LinkState {
            features: link.features,
            speed: link.speed,
            queues: link.queues,
            up: link.up.into(),
        };
        // SAFETY: by the caller; the struct has no padding.
        unsafe { check::put(state, out, size, "usernic_port_link") }?;
        Ok(0)
    })
}

/// Waits until the link is up, `milliseconds` at the most (below 0: without end). 1: it is up. 0: it is not.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_wait_link(port: *mut PortHandle, milliseconds: i64) -> i32 {
    shield(|| {
        let time = time(milliseconds).unwrap_or(FOR_EVER).min(FOR_EVER);
        Ok(open(port)?.port.wait_link(time).into())
    })
}

/// Has the other side tell the network that this port's address is here, as after a move.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_announce(port: *mut PortHandle) -> i32 {
    shield(|| {
        open(port)?.port.announce()?;
        Ok(0)
    })
}

/// The port's address: 6 bytes.
///
/// # Safety
/// `out` has 6 bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_mac(port: *mut PortHandle, out: *mut u8) -> i32 {
    shield(|| {
        check::pointer(out, "usernic_port_mac: out")?;
        let mac = open(port)?.port.mac();
        // SAFETY: by the caller.
        unsafe { out.cast::<[u8; 6]>().write(mac) };
        Ok(0)
    })
}

/// The largest packet, in bytes, without its Ethernet header.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_port_mtu(port: *mut PortHandle) -> i32 {
    shield(|| Ok(open(port)?.port.mtu().into()))
}

/// What the port has done: the sum over its queues, in a struct of `size` bytes (sizeof *out).
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_counts(port: *mut PortHandle, out: *mut Counts, size: usize) -> i32 {
    shield(|| {
        let counts = open(port)?.port.stats().into();
        // SAFETY: by the caller; the struct has no padding.
        unsafe { check::put(counts, out, size, "usernic_port_counts") }?;
        Ok(0)
    })
}

/// What queue pair `index` has done, whoever has it, in a struct of `size` bytes (sizeof *out).
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_queue_counts(
    port: *mut PortHandle,
    index: u16,
    out: *mut Counts,
    size: usize,
) -> i32 {
    shield(|| {
        let port = open(port)?.port;
        let stats = port.queue_stats(index).ok_or_else(|| {
            Fault::new(
                Status::Argument,
                format_args!("queue {index}: the port has {}", port.queue_count()),
            )
        })?;
        // SAFETY: by the caller; the struct has no padding.
        unsafe { check::put(stats.into(), out, size, "usernic_port_queue_counts") }?;
        Ok(0)
    })
}

/// Where the port's memory comes from, in words: cut to `size` bytes, the NUL at its end included. Returns the bytes of
/// the whole text without the NUL, as snprintf() does; with `size` 0, `out` may be null.
///
/// # Safety
/// `out` has `size` bytes that can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn usernic_port_memory(port: *mut PortHandle, out: *mut c_char, size: usize) -> i32 {
    shield(|| {
        let port = open(port)?.port;
        let text = port.memory().as_bytes();
        if size > 0 {
            check::pointer(out, "usernic_port_memory: out")?;
            let most = text.len().min(check::length(size, "usernic_port_memory: size")? - 1);
            // SAFETY: by the caller: `most` bytes and the NUL are no more than `size`.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr(), out.cast::<u8>(), most);
                out.add(most).write(0);
            }
        }
        Ok(text.len() as i32)
    })
}

/// Installs a handler of SIGBUS that keeps the process alive when the other side truncates a file that is mapped here:
/// the port goes down instead. For programs, before they open ports; libraries leave it to their program.
#[unsafe(no_mangle)]
pub extern "C" fn usernic_install_sigbus_guard() -> i32 {
    shield(|| {
        usernic::install_sigbus_guard()?;
        Ok(0)
    })
}
