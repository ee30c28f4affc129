//! Queues on a model of a virtual function, against a port of `usernic`'s on another one.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use usernic::spec::PortSpec;
use usernic::{Burst, Queue};

use super::{CALLS, COUNT, Handles, Mbuf, NO_REGIONS, RINGS, TURN, TX_VLAN, get, new_pool, release, setups, with};
use crate::abi::FilterSetup;
use crate::port::Port;
use crate::rx::usernic_pmd_rx;
use crate::tx::{usernic_pmd_tx, usernic_pmd_tx_clean};
use crate::vf;

#[path = "../../../../tests/tests/vf_machine/mod.rs"]
mod vf_machine;

use vf_machine::{LIMIT, Machine, receive, send};

/// A started port of the plugin on the first function, and a port on the second.
struct Pair {
    port: Port,
    queues: Handles,
    mac: [u8; 6],
}

fn start(machine: &Machine, odd: u64, extras: u8) -> Pair {
    let spec: PortSpec = "vf".parse().expect("a spec");
    let port = vf::Port::on(machine.hardware(0), spec, &CALLS).expect("a port");
    let mut port = Port::Vf(port);
    let (mut config, rx, mut tx) = setups(odd == 0);
    config.extras = extras;
    tx.odd = odd;
    assert!(port.memory(&config, &[rx], &[tx]).expect("a plan") <= RINGS);
    let memory = with(|pool| pool.memory);
    let mut queues = [std::ptr::null_mut(); 2];
    // SAFETY: the memory is as long, and stays.
    unsafe { port.start(&config, &[rx], &[tx], memory, &mut queues) }.expect("a start");
    let mac = port.info().mac;
    let mut pair = Pair {
        port,
        queues: Handles::new(queues),
        mac,
    };
    pair.up();
    pair
}

impl Pair {
    fn up(&mut self) {
        let end = Instant::now() + LIMIT;
        while !self.port.service() {
            assert!(Instant::now() < end, "the link comes up");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends frames, all of them, with these flags.
    fn send(&self, frames: &[Vec<u8>], flags: u64) {
        let end = Instant::now() + LIMIT;
        for frame in frames {
            let mut mbuf = [std::ptr::null_mut::<u8>()];
            // SAFETY: the queue is of a started port; the mbuf has room for the frame.
            unsafe {
                while get(std::ptr::null_mut(), mbuf.as_mut_ptr(), 1) == 0 {
                    usernic_pmd_tx_clean(self.queues.tx(), 0);
                    assert!(Instant::now() < end, "mbufs come back");
                }
                let one = Mbuf::new(mbuf[0]);
                one.received(0x0001_0001_0080, flags, frame.len() as u32);
                std::ptr::copy_nonoverlapping(frame.as_ptr(), one.address() as *mut u8, frame.len());
                while usernic_pmd_tx(self.queues.tx(), mbuf.as_mut_ptr(), 1) == 0 {
                    assert!(Instant::now() < end, "what is sent is taken");
                }
            }
        }
    }

    /// So many frames, and what is said of them: flags, headers, tag.
    fn receive(&self, count: usize) -> Vec<(Vec<u8>, u64, u32, u16)> {
        let end = Instant::now() + LIMIT;
        let mut frames = Vec::new();
        let mut mbufs = [std::ptr::null_mut::<u8>(); 32];
        while frames.len() < count {
            // SAFETY: the queue is of a started port.
            let n = unsafe { usernic_pmd_rx(self.queues.rx(), mbufs.as_mut_ptr(), 32) };
            for &mbuf in &mbufs[..n.into()] {
                // SAFETY: it was received.
                unsafe {
                    let one = Mbuf::new(mbuf);
                    let bytes = std::slice::from_raw_parts(one.address() as *const u8, one.data_len().into()).to_vec();
                    let (ptype, tag) = (*mbuf.add(32).cast::<u32>(), *mbuf.add(42).cast::<u16>());
                    assert_eq!(one.rearm(), 0x0003_0001_0001_0080);
                    frames.push((bytes, one.flags(), ptype, tag));
                    release(mbuf);
                }
            }
            assert!(Instant::now() < end, "{} of {count} frames came", frames.len());
        }
        frames
    }

    /// Stops the port: every mbuf is in the pool again.
    fn stop(mut self) {
        self.port.stop();
        assert_eq!(with(|pool| pool.free.len()), COUNT, "mbufs in the pool");
    }
}

fn frames(to: [u8; 6], from: [u8; 6], count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| vf_machine::frame(to, from, 60 + i * 13 % 1400, i))
        .collect()
}

#[test]
fn frames_both_ways_over_a_function() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    let far = machine.port(1, "");
    let mut queue: Queue = far.queue(0).expect("its queue");
    for _ in 0..10 {
        new_pool();
        let pair = start(&machine, 0, 0);
        let out = frames(far.mac(), pair.mac, 500);
        for chunk in out.chunks(50) {
            pair.send(chunk, 0);
            assert_eq!(receive(&mut queue, chunk.len()), chunk);
        }
        let back = frames(pair.mac, far.mac(), 500);
        for chunk in back.chunks(50) {
            send(&mut queue, chunk);
            let came: Vec<_> = pair.receive(chunk.len()).into_iter().map(|frame| frame.0).collect();
            assert_eq!(came, chunk);
        }
        pair.stop();
    }
    drop((queue, far));
    machine.finish();
}

#[test]
fn what_the_device_says_and_does() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    let far = machine.port(1, ",vlan=100");
    let mut queue = far.queue(0).expect("its queue");
    new_pool();
    let mut pair = start(&machine, TX_VLAN, 2);
    let mut filter = FilterSetup {
        mac: pair.mac,
        promiscuous: 0,
        all_multicast: 0,
        vlan: 0,
        stations: 0,
        groups: 0,
        vlans: [0; 64],
        addresses: [[0; 6]; 2 * crate::abi::MAX_ADDRESSES],
    };
    filter.vlans[100 / 64] |= 1 << (100 % 64);
    pair.port.set_filter(&filter).expect("a VLAN");

    // A tag that the device inserts, one that it takes out.
    let plain = vf_machine::frame(far.mac(), pair.mac, 100, 1);
    pair.send(std::slice::from_ref(&plain), TX_VLAN);
    pair.send(std::slice::from_ref(&plain), 0);
    let came = receive(&mut queue, 2);
    let tagged = [&plain[..12], &[0x81, 0, 0x20, 0x64], &plain[12..]].concat();
    assert_eq!(came, [tagged, plain]);
    let inner = vf_machine::frame(pair.mac, far.mac(), 100, 2);
    let tagged = [&inner[..12], &[0x81, 0, 0x60, 0x64], &inner[12..]].concat();
    send(&mut queue, std::slice::from_ref(&tagged));
    let (bytes, flags, ptype, tag) = pair.receive(1).remove(0);
    assert_eq!((bytes, flags & 0x41, ptype, tag), (inner, 0x41, 0x1, 0x6064));
    // The same with the stripping switched off.
    pair.port.set_vlan_strip(false);
    send(&mut queue, std::slice::from_ref(&tagged));
    let (bytes, flags, _, tag) = pair.receive(1).remove(0);
    assert_eq!((bytes, flags & 0x41, tag), (tagged, 0, 0));

    // UDP over IPv4, as the device sees it, right and wrong.
    let mut udp = vf_machine::ipv4(pair.mac, far.mac(), false, (17, 7), &[1; 40]);
    send(&mut queue, &[udp.clone()]);
    let (bytes, flags, ptype, _) = pair.receive(1).remove(0);
    assert_eq!((&bytes, flags & 0x198, ptype), (&udp, 0x180, 0x211));
    let last = udp.len() - 1;
    udp[last] ^= 1;
    send(&mut queue, &[udp.clone()]);
    let (bytes, flags, _, _) = pair.receive(1).remove(0);
    // What an 82599 calls wrong of UDP may have no checksum at all.
    assert_eq!((&bytes, flags & 0x188), (&udp, 0x80));
    let mut tcp = vf_machine::ipv4(pair.mac, far.mac(), true, (17, 7), &[1; 40]);
    let last = tcp.len() - 1;
    tcp[last] ^= 1;
    send(&mut queue, &[tcp.clone()]);
    let (bytes, flags, ptype, _) = pair.receive(1).remove(0);
    assert_eq!((&bytes, flags & 0x188, ptype), (&tcp, 0x88, 0x111));
    pair.stop();
    drop((queue, far));
    machine.finish();
}

#[test]
fn a_reset_of_the_pf_and_a_device_that_goes() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    new_pool();
    let far = machine.port(1, "");
    let mut queue = far.queue(0).expect("its queue");
    let mut pair = start(&machine, 0, 0);
    let out = frames(far.mac(), pair.mac, 40);
    pair.send(&out, 0);
    assert_eq!(receive(&mut queue, 40), out);
    machine.device.with(|nic| nic.begin_reset());
    while pair.port.service() {}
    let mut mbufs = [std::ptr::null_mut::<u8>(); 32];
    // SAFETY: the queues are of a started port: nothing is sent, and nothing comes.
    unsafe {
        assert_eq!(usernic_pmd_rx(pair.queues.rx(), mbufs.as_mut_ptr(), 32), 0);
        assert_eq!(usernic_pmd_tx(pair.queues.tx(), mbufs.as_mut_ptr(), 0), 0);
    }
    assert_eq!(with(|pool| pool.free.len()), COUNT, "mbufs in the pool");
    machine.device.with(|nic| nic.end_reset());
    pair.up();
    // The other port comes back at its own time, and what it is sent before that is lost.
    let mut burst = Burst::new(32);
    let mut sent = 0;
    vf_machine::until("a frame after the reset", || {
        if sent % 20 == 0 {
            pair.send(&out[..1], 0);
        }
        sent += 1;
        queue.rx(&mut burst) > 0
    });
    burst.clear();
    pair.stop();
    drop((queue, far));
    machine.finish_after_pf_reset();
}

#[test]
fn memory_that_the_device_cannot_be_told_of_takes_the_link_down() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    let far = machine.port(1, "");
    let mut queue = far.queue(0).expect("its queue");
    new_pool();
    let mut pair = start(&machine, 0, 0);
    let out = frames(far.mac(), pair.mac, 40);
    NO_REGIONS.store(true, Ordering::SeqCst);
    pair.port.share().expect_err("memory that cannot be told of");
    assert_eq!(with(|pool| pool.free.len()), COUNT, "mbufs in the pool");
    let mut mbufs = [std::ptr::null_mut::<u8>(); 1];
    // SAFETY: the queue is of a started port: nothing comes.
    assert_eq!(unsafe { usernic_pmd_rx(pair.queues.rx(), mbufs.as_mut_ptr(), 1) }, 0);
    assert!(!pair.port.service(), "the link stays down");
    NO_REGIONS.store(false, Ordering::SeqCst);
    pair.up();
    pair.send(&out, 0);
    assert_eq!(receive(&mut queue, 40), out);
    pair.stop();
    drop((queue, far));
    machine.finish();
}

/// Descriptors are written here as a device writes them back (82599 datasheet, 7.1.6.2): it knows no runts, but nothing of
/// what it says is believed.
#[test]
fn no_frame_of_a_device_leaves_that_is_none_of_ethernets() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    new_pool();
    let pair = start(&machine, 0, 0);
    let ring = with(|pool| pool.memory).as_ptr().cast::<u64>();
    // DD and EOP; or a frame that goes on.
    let descriptors = [
        (3, 0),
        (3, 13),
        (3, 14),
        (3, 1518),
        (3, 1519),
        (1, 2048),
        (3, 100),
        (3, 60),
    ];
    for (at, (status, len)) in descriptors.into_iter().enumerate() {
        // SAFETY: the receive ring is first in the memory, of 256 descriptors.
        unsafe {
            ring.add(2 * at).write_volatile(0);
            ring.add(2 * at + 1).write_volatile(status | len << 32);
        }
    }
    let came: Vec<_> = pair.receive(3).into_iter().map(|frame| frame.0.len()).collect();
    assert_eq!(came, [14, 1518, 60]);
    let counts = pair.queues.counts();
    // A length of 0 is the ring's to find.
    assert_eq!((counts.runts, counts.oversize, counts.errors), (1, 2, 1));
    pair.stop();
}

#[test]
fn what_a_device_does_not_have_is_refused() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::two();
    new_pool();
    let spec: PortSpec = "vf,queues=2".parse().expect("a spec");
    let mut port = Port::Vf(vf::Port::on(machine.hardware(0), spec, &CALLS).expect("a port"));
    let (mut config, rx, tx) = setups(false);
    config.pairs = 4;
    let error = port.memory(&config, &[rx; 4], &[tx; 4]).expect_err("four queues");
    assert!(
        error.text.contains("4 queue pairs") && error.text.contains("queues="),
        "{}",
        error.text
    );
    let error = port
        .vf()
        .and_then(|vf| vf.rss().map(drop))
        .expect_err("RSS of an 82599");
    assert!(error.text.contains("its PF's"), "{}", error.text);
    drop(port);
    let missing = Port::open("vf,pci=0000:7f:1f.7", &CALLS).err().expect("an error");
    assert!(missing.text.contains("0000:7f:1f.7"), "{}", missing.text);
    machine.finish();
}
