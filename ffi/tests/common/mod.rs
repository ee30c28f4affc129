//! Two ports of this process, joined, as C would hold them.
#![allow(dead_code, reason = "each test uses some of it")]

use std::ffi::{CStr, CString};
use std::path::Path;
use std::ptr::null_mut;

use usernic_ffi::*;

/// The text of the last failed call.
pub fn message() -> String {
    // SAFETY: a text that lives until the next failing call of this thread.
    unsafe { CStr::from_ptr(usernic_error()) }
        .to_string_lossy()
        .into_owned()
}

pub fn open(spec: &str) -> *mut PortHandle {
    let spec = CString::new(spec).unwrap();
    let mut port = null_mut();
    // SAFETY: a text, and a place for the handle.
    let status = unsafe { usernic_port_open_abi(USERNIC_ABI_VERSION, spec.as_ptr(), &mut port) };
    assert_eq!(status, 0, "{}", message());
    port
}

pub fn queue(port: *mut PortHandle) -> *mut QueueHandle {
    let mut queue = null_mut();
    // SAFETY: a place for the handle.
    let status = unsafe { usernic_port_queue(port, 0, &mut queue) };
    assert_eq!(status, 0, "{}", message());
    queue
}

/// A burst and its records.
pub struct Records {
    pub handle: *mut BurstHandle,
    view: *const Frames,
}

impl Records {
    pub fn new(capacity: u32) -> Self {
        let mut handle = null_mut();
        // SAFETY: a place for the handle.
        assert_eq!(unsafe { usernic_burst_new(capacity, &mut handle) }, 0, "{}", message());
        let view = usernic_burst_frames(handle);
        assert!(!view.is_null());
        Records { handle, view }
    }

    pub fn count(&self) -> usize {
        // SAFETY: lives until the burst is closed, which is in drop.
        unsafe { (*self.view).count as usize }
    }

    pub fn all(&mut self) -> &mut [Frame] {
        // SAFETY: as above; `count` records are there, and nobody else uses the burst.
        unsafe { std::slice::from_raw_parts_mut((*self.view).frame, (*self.view).count as usize) }
    }

    pub fn put(&mut self, index: usize, bytes: &[u8]) {
        let frame = &mut self.all()[index];
        assert!(bytes.len() <= frame.room as usize);
        frame.len = bytes.len() as u32;
        // SAFETY: room for them, as just checked; the frame is ours.
        unsafe { frame.data.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    pub fn bytes(&mut self, index: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.all()[index].len as usize];
        // SAFETY: so many bytes are there.
        let status = unsafe { usernic_burst_read(self.handle, index as u32, 0, bytes.as_mut_ptr(), bytes.len()) };
        assert_eq!(status, 0, "{}", message());
        bytes
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        usernic_burst_close(self.handle);
    }
}

/// A front-end and a back-end, with a queue of each.
pub struct Pair {
    pub ports: [*mut PortHandle; 2],
    pub queues: [*mut QueueHandle; 2],
}

impl Pair {
    pub fn open(dir: &Path, keys: [&str; 2]) -> Self {
        let path = dir.join("port.sock");
        let back = open(&format!("vhost,path={}{}", path.display(), keys[1]));
        let front = open(&format!("virtio-user,path={},memory=memfd{}", path.display(), keys[0]));
        assert_eq!(usernic_port_wait_link(back, 10_000), 1);
        Pair {
            ports: [front, back],
            queues: [queue(front), queue(back)],
        }
    }

    /// Receives exactly `count` frames.
    pub fn receive(&self, side: usize, burst: &Records, count: usize) {
        for _ in 0..1000 {
            if burst.count() == count {
                return;
            }
            let n = usernic_queue_rx(self.queues[side], burst.handle);
            assert!(n >= 0, "{}", message());
            if n == 0 {
                usernic_queue_wait(self.queues[side], 10);
            }
        }
        panic!("{} of {count} frames came", burst.count());
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for queue in self.queues {
            usernic_queue_close(queue);
        }
        for port in self.ports {
            usernic_port_close(port);
        }
    }
}
