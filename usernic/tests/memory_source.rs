//! Memory sources are safe to write: what they give is looked at.

mod common;

use common::Place;
use hugemem::{PageSize, Segment};
use usernic::memory::{Allocation, Choice, Error, MemorySource, Request};
use usernic::{LentPort, LentRegion, Port};

/// Gives a page, whatever it is asked for.
struct Short;

impl MemorySource for Short {
    fn allocate(&mut self, _request: &Request<'_>) -> Result<Allocation, Error> {
        let segment = Segment::memfd(c"short", 4096, PageSize::BASE, None).map_err(Error::source)?;
        let choice = Choice::new("short", segment.page_size());
        Ok(Allocation { choice, segment })
    }
}

#[test]
fn a_port_is_not_put_into_less_memory_than_it_asked_for() {
    let place = Place::new();
    let _back = place.open("vhost", "").unwrap();
    let spec = || format!("virtio-user,path={},queue_size=4096", place.socket().display()).parse();
    let port = Port::open_with(spec().unwrap(), &mut Short);
    let error = port.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("4096 bytes where"), "{error}");
}

#[test]
fn rings_over_lent_memory_are_not_either() {
    let place = Place::new();
    let _back = place.open("vhost", "").unwrap();
    let memory = Segment::memfd(c"lent", 1 << 20, PageSize::BASE, None).unwrap();
    // SAFETY: the segment's own descriptor, open as long as it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(memory.fd().unwrap()) };
    let region = LentRegion {
        fd: fd.try_clone_to_owned().unwrap(),
        offset: 0,
        address: memory.base(),
        len: memory.len(),
        page: 4096,
    };
    let spec = format!("virtio-user,path={},queue_size=32768", place.socket().display());
    // SAFETY: the region stays mapped until the test is over.
    let port = unsafe { LentPort::open(&spec.parse().unwrap(), &[region], &mut Short) };
    let error = port.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("4096 bytes where"), "{error}");
}
