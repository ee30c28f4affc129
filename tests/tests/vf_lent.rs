//! Ports over lent memory on a virtual function of the model: the application's own buffers, in place.

mod vf_machine;

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::time::Duration;

use usernic::memory::Automatic;
use usernic::spec::PortSpec;
use usernic::{Buffer, Error, LentPair, LentPort, LentRegion};
use vf_machine::{Machine, frame, receive, send, until};

const EACH: usize = 4096;
const COUNT: usize = 512;

/// Memory of the application: a memfd.
struct Mine {
    base: NonNull<u8>,
    fd: OwnedFd,
}

impl Mine {
    fn new() -> Self {
        let fd = rustix::fs::memfd_create("lent", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, (EACH * COUNT) as u64).unwrap();
        // SAFETY: a fresh mapping, which stays.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                EACH * COUNT,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &fd,
                0,
            )
        };
        Mine {
            base: NonNull::new(base.unwrap().cast()).unwrap(),
            fd,
        }
    }

    fn region(&self) -> LentRegion {
        LentRegion {
            fd: self.fd.try_clone().unwrap(),
            offset: 0,
            address: self.base,
            len: EACH * COUNT,
            page: 4096,
        }
    }

    /// Where buffer `index` begins.
    fn at(&self, index: usize) -> *mut u8 {
        assert!(index < COUNT);
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(index * EACH + 128) }
    }
}

struct Lent {
    address: u64,
    len: u32,
    cookie: u64,
}

// SAFETY: the test leaves a buffer alone until its cookie is back.
unsafe impl Buffer for Lent {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u32 {
        self.len
    }

    fn write_header(&mut self, _: usize) {}

    fn next(&self) -> Option<Self> {
        None
    }

    fn cookie(&self) -> u64 {
        self.cookie
    }
}

fn open(machine: &Machine, mine: &Mine, keys: &str) -> Result<LentPort, Error> {
    let spec: PortSpec = format!("vf,memory=memfd{keys}").parse()?;
    let mut memory = Automatic::from_spec(&spec);
    // SAFETY: the region stays mapped.
    unsafe { LentPort::open_vf(&spec, machine.hardware(0), &[mine.region()], &mut memory) }
}

fn post(pair: &mut LentPair, mine: &Mine, indices: impl Iterator<Item = usize>) -> usize {
    pair.post(indices.map(|index| Lent {
        address: mine.at(index) as u64,
        len: 2048,
        cookie: index as u64,
    }))
}

#[test]
fn the_applications_own_buffers_both_ways() {
    let machine = Machine::two();
    let far = machine.port(1, "");
    let mut queue = far.queue(0).unwrap();
    let mine = Mine::new();
    let mut port = open(&machine, &mine, "").unwrap();
    until("the link", || port.link());
    let mut pair = port.queue(0).unwrap();
    let mac = machine.device.with(|nic| nic.policy(0).mac);

    assert_eq!(post(&mut pair, &mine, 0..100), 100);
    let frames: Vec<_> = (0..100).map(|i| frame(mac, far.mac(), 60 + i * 14, i)).collect();
    send(&mut queue, &frames);
    let mut came = Vec::new();
    until("frames", || {
        pair.receive(100, |cookie, len| {
            // SAFETY: the buffer is ours again.
            let bytes = unsafe { std::slice::from_raw_parts(mine.at(cookie as usize), len as usize) };
            came.push(bytes.to_vec());
        });
        came.len() == 100
    });
    assert_eq!(came, frames);

    for (index, frame) in frames.iter().enumerate() {
        let mut out = frame.clone();
        out[..6].copy_from_slice(&far.mac());
        out[6..12].copy_from_slice(&mac);
        // SAFETY: the buffer is nobody's.
        unsafe { std::ptr::copy_nonoverlapping(out.as_ptr(), mine.at(200 + index), out.len()) };
    }
    let (sent, bytes) = pair.send((0..100).map(|index| Lent {
        address: mine.at(200 + index) as u64,
        len: frames[index].len() as u32,
        cookie: index as u64,
    }));
    assert_eq!((sent, bytes), (100, frames.iter().map(|f| f.len() as u64).sum()));
    let received = receive(&mut queue, 100);
    assert!(received.iter().zip(&frames).all(|(a, b)| a[12..] == b[12..]));
    let mut back = Vec::new();
    until("cookies", || {
        pair.sent(100, |cookie| back.push(cookie));
        back.len() == 100
    });
    assert_eq!(back, (0..100).collect::<Vec<_>>());

    // A sleeping thread is woken by the vector of the queue.
    post(&mut pair, &mine, 0..32);
    assert!(!pair.wait(Some(Duration::from_millis(20))).unwrap(), "nothing was sent");
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        send(&mut queue, &frames[..1]);
        (queue, far)
    });
    assert!(pair.wait(Some(vf_machine::LIMIT)).unwrap());
    let others = waker.join().unwrap();

    drop(port);
    assert!(!pair.is_open());
    drop((pair, others));
    machine.finish();
}

#[test]
fn a_frame_that_its_buffer_does_not_hold_is_none() {
    let machine = Machine::two();
    machine.device.with(|nic| nic.pf().mtu = 9000);
    let far = machine.port(1, ",mtu=4000");
    let mut queue = far.queue(0).unwrap();
    let mine = Mine::new();
    let mut port = open(&machine, &mine, ",mtu=4000").unwrap();
    until("the link", || port.link());
    let mut pair = port.queue(0).unwrap();
    assert_eq!(pair.least_room(), 2048);
    let mac = machine.device.with(|nic| nic.policy(0).mac);
    // Too short for the device: nothing of it is taken.
    let short = Lent {
        address: mine.at(0) as u64,
        len: 2047,
        cookie: 0,
    };
    assert_eq!(pair.post(std::iter::once(short)), 0);
    assert!(!LentPair::device_takes(16) && LentPair::device_takes(17) && !LentPair::device_takes(9729));
    post(&mut pair, &mine, 0..32);
    send(
        &mut queue,
        &[frame(mac, far.mac(), 3000, 1), frame(mac, far.mac(), 100, 2)],
    );
    let mut lens = Vec::new();
    until("three buffers", || {
        pair.receive(100, |_, len| lens.push(len));
        lens.len() == 3
    });
    assert_eq!(lens, [0, 0, 100]);
    drop((pair, port, queue, far));
    machine.finish();
}

#[test]
fn a_reset_of_the_pf_takes_the_link_for_good_and_offloads_are_refused() {
    let machine = Machine::two();
    let mine = Mine::new();
    for keys in [",csum=1", ",vlan_strip=1"] {
        let error = open(&machine, &mine, keys).err().unwrap();
        assert!(error.to_string().contains("offloads"), "{error}");
    }
    let mut port = open(&machine, &mine, "").unwrap();
    until("the link", || port.link());
    machine.device.with(|nic| nic.begin_reset());
    until("a link that is gone", || !port.link());
    machine.device.with(|nic| nic.end_reset());
    std::thread::sleep(Duration::from_millis(20));
    assert!(!port.link());
    drop(port);
    let mut port = open(&machine, &mine, "").unwrap();
    until("the link of a new port", || port.link());
    drop(port);
    machine.finish_after_pf_reset();
}
