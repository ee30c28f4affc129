//! A back-end that these tests play themselves, on the rings of a port that one of ours has set up: whatever it writes there,
//! applications get frames, and are woken.

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use usernic::{Burst, Port as OurPort};
use virtio_ring::any::{Device, Layout};
use virtio_ring::{Chain, Options, Part, Translate, packed};

use super::*;
use crate::abi::FilterSetup;
use crate::rx::{RxQueue, usernic_pmd_rx_arm, usernic_pmd_rx_fd};
use crate::setup::Plan;

const LIMIT: Duration = Duration::from_secs(10);

/// Addresses are what they are here.
struct Here;

// SAFETY: what the port posts is memory of the pool.
unsafe impl Translate for Here {
    fn translate(&self, addr: u64, _: u32) -> Option<NonNull<u8>> {
        NonNull::new(addr as *mut u8)
    }
}

/// A port on a back-end that leaves its rings alone, and the device side of its receive ring.
struct Played {
    pair: Pair,
    _back: OurPort,
    device: Device,
    layouts: [Layout; 2],
    blocks: [NonNull<u8>; 2],
    _dir: tempfile::TempDir,
}

impl Played {
    fn new(keys: &str, mergeable: bool) -> Self {
        new_pool();
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let back = OurPort::open(&format!("vhost,path={}", socket.display())).expect("a back-end");
        let mut setup = setups(false);
        setup.0.mergeable = mergeable.into();
        let pair = start_as(&socket, keys, setup);
        assert!(back.wait_link(LIMIT));
        let spec = format!("virtio-user,path=/s{keys}").parse().expect("a spec");
        let plan = Plan::new(&spec, &setup.0, &[setup.1], &[setup.2]).expect("a plan");
        let memory = with(|pool| pool.memory);
        let layouts = plan.layouts[0];
        let [rx, tx, _] = plan.at[0];
        // SAFETY: inside the memory, by the plan.
        let blocks = unsafe { [memory.add(rx), memory.add(tx)] };
        let base = match layouts[0] {
            Layout::Split(_) => 0,
            Layout::Packed(_) => packed::Base::START.encode(),
        };
        let options = Options {
            in_order: true,
            ..Options::default()
        };
        // SAFETY: the block is the ring's; nobody else plays its device, since nobody polls the back-end.
        let device = unsafe { Device::new(layouts[0].place(blocks[0]), layouts[0].size(), options, base) };
        Played {
            pair,
            _back: back,
            device: device.expect("a device"),
            layouts,
            blocks,
            _dir: dir,
        }
    }

    /// Uses a buffer for each of these lengths, the header included, as one frame.
    fn frame(&mut self, lens: &[u32]) {
        for &len in lens {
            let mut chain = Chain::new([Part::default(); 4]);
            let head = self.device.pop(&Here, &mut chain).expect("a ring").expect("a buffer");
            let at = chain.writable()[0].ptr;
            // SAFETY: the buffer is the device's.
            unsafe { at.add(10).cast::<u16>().write_unaligned(lens.len() as u16) };
            self.device.push(head, len);
        }
        self.device.publish();
    }

    /// The lengths of what comes, whole and of the first mbuf.
    fn receive(&mut self) -> Vec<(u32, u16)> {
        let mut mbufs = [std::ptr::null_mut::<u8>(); 32];
        let mut lens = Vec::new();
        // SAFETY: the queue is of a started port.
        unsafe {
            let n = usernic_pmd_rx(self.pair.queues.rx(), mbufs.as_mut_ptr(), 32);
            for &mbuf in &mbufs[..n.into()] {
                lens.push((Mbuf::new(mbuf).pkt_len(), Mbuf::new(mbuf).data_len()));
                release(mbuf);
            }
        }
        lens
    }

    fn stop(mut self) {
        self.pair.port.stop();
        assert_eq!(with(|pool| pool.free.len()), COUNT, "mbufs in the pool");
    }
}

const KEYS: [&str; 2] = ["", ",packed_vq=1"];

#[test]
fn no_frame_leaves_that_is_none_of_ethernets() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for (keys, mergeable) in KEYS.iter().flat_map(|&keys| [(keys, false), (keys, true)]) {
        let mut played = Played::new(keys, mergeable);
        for len in [0, 1, 13, 14, 60, 1518, 1519, 2048] {
            played.frame(&[12 + len]);
        }
        assert_eq!(
            played.receive(),
            [(14, 14), (60, 60), (1518, 1518)],
            "{keys} {mergeable}"
        );
        let counts = played.pair.queues.counts();
        assert_eq!(
            (counts.runts, counts.oversize, counts.errors),
            (3, 2, 0),
            "{keys} {mergeable}"
        );
        assert_eq!(
            (counts.packets, counts.bytes),
            (3, 14 + 60 + 1518),
            "{keys} {mergeable}"
        );
        // Not even a header.
        for len in [0, 11] {
            played.frame(&[len]);
        }
        assert_eq!(played.receive(), [], "{keys} {mergeable}");
        assert_eq!(played.pair.queues.counts().errors, 2, "{keys} {mergeable}");
        // A burst of nothing else, and one that follows.
        for _ in 0..40 {
            played.frame(&[12 + 13]);
        }
        played.frame(&[12 + 64]);
        let mut came = Vec::new();
        for _ in 0..3 {
            came.extend(played.receive());
        }
        assert_eq!(came, [(64, 64)], "{keys} {mergeable}");
        assert_eq!(played.pair.queues.counts().runts, 43, "{keys} {mergeable}");
        played.stop();
    }
}

#[test]
fn frames_of_several_buffers_are_judged_as_a_whole() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for keys in KEYS {
        let mut played = Played::new(keys, true);
        let frames: [&[u32]; 6] = [
            &[12 + 1000, 18],
            &[12 + 1000, 519],
            // An Ethernet header in two pieces.
            &[12 + 5, 100],
            &[12, 5, 8],
            &[12 + 14, 0, 100],
            &[12 + 60],
        ];
        for frame in frames {
            played.frame(frame);
        }
        assert_eq!(played.receive(), [(1018, 1000), (114, 14), (60, 60)], "{keys}");
        let counts = played.pair.queues.counts();
        assert_eq!(
            (counts.runts, counts.oversize, counts.errors, counts.chains),
            (1, 1, 1, 2)
        );
        played.stop();
    }
}

#[test]
fn another_mtu_counts_at_once() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for keys in KEYS {
        let mut played = Played::new(keys, false);
        played.pair.port.set_mtu(1600).expect("an MTU");
        played.frame(&[12 + 1618]);
        played.frame(&[12 + 1619]);
        assert_eq!(played.receive(), [(1618, 1618)], "{keys}");
        played.pair.port.set_mtu(68).expect("an MTU");
        played.frame(&[12 + 86]);
        played.frame(&[12 + 87]);
        assert_eq!(played.receive(), [(86, 86)], "{keys}");
        assert_eq!(played.pair.queues.counts().oversize, 2, "{keys}");
        played.stop();
    }
}

#[test]
fn what_the_back_end_does_wrong_shows_while_it_is_polled() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for keys in KEYS {
        let mut played = Played::new(keys, false);
        assert_eq!(played.pair.queues.counts().anomalies, 0);
        // More than the buffer holds.
        played.frame(&[12 + 2049]);
        assert_eq!(played.receive(), [], "{keys}");
        assert_eq!(played.pair.queues.counts().anomalies, 1, "{keys}");
        if let Layout::Split(_) = played.layouts[1] {
            let used = played.layouts[1].areas()[2];
            // The transmit ring's index runs ahead.
            // SAFETY: inside the ring's memory, which nobody else uses: the back-end is not polled.
            unsafe { played.blocks[1].add(used + 2).cast::<u16>().write_volatile(999) };
            // SAFETY: the queue is of a started port.
            unsafe {
                usernic_pmd_tx_clean(played.pair.queues.tx(), 0);
                usernic_pmd_tx(played.pair.queues.tx(), std::ptr::null_mut(), 0);
            }
            assert_eq!(played.pair.queues.tx_counts().anomalies, 1);
        }
        played.stop();
    }
}

/// Whether what an application sleeps on is readable, now or soon.
fn is_woken(pair: &Pair, wait: Duration) -> bool {
    let queue = pair.queues.0[0].running.expect("a queue").as_ptr();
    // SAFETY: the queue is of a started port, and keeps the descriptor.
    let fd = unsafe { BorrowedFd::borrow_raw(usernic_pmd_rx_fd(queue)) };
    let wait = Timespec::try_from(wait).expect("a time");
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&wait)).expect("poll(2)") == 1
}

/// Asks for a notification, or not; whether frames are there.
fn arm(pair: &Pair, on: bool) -> bool {
    // SAFETY: the queue is of a started port.
    unsafe { usernic_pmd_rx_arm(pair.queues.rx(), on.into()) == 1 }
}

/// Sends a frame from the other side.
fn send_one(far: &mut usernic::Queue) {
    let end = Instant::now() + LIMIT;
    let mut burst = Burst::new(1);
    loop {
        if burst.is_empty()
            && let Some(mut packet) = far.packet()
        {
            packet.copy_from(&[7; 60]).expect("room");
            assert!(burst.push(packet).is_ok());
        }
        if far.tx(&mut burst) == 1 {
            return;
        }
        assert!(Instant::now() < end, "a frame is sent");
    }
}

fn drain(pair: &Pair) -> usize {
    let mut mbufs = [std::ptr::null_mut::<u8>(); 32];
    // SAFETY: the queue is of a started port.
    let n = unsafe { usernic_pmd_rx(pair.queues.rx(), mbufs.as_mut_ptr(), 32) };
    for &mbuf in &mbufs[..n.into()] {
        // SAFETY: it was received.
        unsafe { release(mbuf) };
    }
    n.into()
}

/// Arms as an application does, until nothing is there.
fn sleep(pair: &Pair) {
    loop {
        drain(pair);
        arm(pair, false);
        if !arm(pair, true) {
            return;
        }
    }
}

#[test]
fn whoever_sleeps_is_woken() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().expect("a folder");
    for (round, keys) in KEYS.iter().enumerate() {
        new_pool();
        let socket = dir.path().join(format!("s{round}"));
        let open = || OurPort::open(&format!("vhost,path={}", socket.display())).expect("a back-end");
        let back = open();
        let mut far = back.queue(0).expect("its queue");
        let mut pair = start(&socket, keys, false);
        assert!(back.wait_link(LIMIT));

        sleep(&pair);
        assert!(!is_woken(&pair, Duration::ZERO), "nothing came");
        send_one(&mut far);
        assert!(is_woken(&pair, LIMIT), "by a frame");
        // Not read by anybody, it stays.
        assert!(is_woken(&pair, Duration::ZERO));
        assert_eq!(drain(&pair), 1);
        sleep(&pair);
        assert!(!is_woken(&pair, Duration::ZERO), "it was taken");

        // Frames that are there when it arms.
        send_one(&mut far);
        while !arm(&pair, true) {}
        assert!(is_woken(&pair, Duration::ZERO), "by a frame that was there");
        sleep(&pair);

        // What arms while the queue is kept out would be forgotten.
        let filter = FilterSetup {
            mac: [2, 0, 0, 0, 0, 1],
            promiscuous: 1,
            all_multicast: 0,
            vlan: 0,
            stations: 0,
            groups: 0,
            vlans: [0; 64],
            addresses: [[0; 6]; 2 * crate::abi::MAX_ADDRESSES],
        };
        pair.port.set_filter(&filter).expect("a filter");
        assert!(is_woken(&pair, Duration::ZERO), "by a change of the filter");
        sleep(&pair);

        // A ring that begins anew asks for nothing.
        drop((far, back));
        while pair.port.service() {}
        sleep(&pair);
        let back = open();
        let mut far = back.queue(0).expect("its queue");
        let end = Instant::now() + LIMIT;
        while !pair.port.service() {
            assert!(Instant::now() < end, "the link comes up");
        }
        assert!(back.wait_link(LIMIT));
        assert!(is_woken(&pair, Duration::ZERO), "by a back-end that came back");
        sleep(&pair);
        send_one(&mut far);
        assert!(is_woken(&pair, LIMIT), "by a frame of the new back-end's");
        pair.port.stop();
    }
}

#[test]
fn rings_do_not_change_under_a_burst_when_a_back_end_comes_back() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().expect("a folder");
    for (round, keys) in KEYS.iter().enumerate() {
        new_pool();
        let socket = dir.path().join(format!("s{round}"));
        let back = OurPort::open(&format!("vhost,path={}", socket.display())).expect("a back-end");
        let Pair { mut port, queues } = start(&socket, keys, false);
        assert!(back.wait_link(LIMIT));
        drop(back);
        while port.service() {}
        let back = OurPort::open(&format!("vhost,path={}", socket.display())).expect("a back-end");

        let memory = with(|pool| pool.memory).as_ptr() as usize;
        // The receive ring is first, and all of its descriptors are posted.
        let bytes = || -> Vec<u8> {
            (memory..memory + 4096)
                // SAFETY: in the mapping; the ring's words may be written meanwhile.
                .map(|at| unsafe { (at as *const u8).read_volatile() })
                .collect()
        };
        let mut queue = queues.0[0].running.expect("a queue").cast::<RxQueue>();
        let (entered, wait) = std::sync::mpsc::channel();
        let looks_after = std::thread::spawn(move || {
            wait.recv().expect("somebody is inside");
            let end = Instant::now() + LIMIT;
            while !port.service() {
                assert!(Instant::now() < end, "the link comes up");
            }
            port
        });
        // SAFETY: the queue is of a started port, and this thread is the one that polls it.
        let inside = unsafe { queue.as_mut() }.inside(|| {
            let before = bytes();
            assert!(before.iter().any(|&byte| byte != 0));
            entered.send(()).expect("a thread");
            // Long enough for the other thread to come to the rings.
            let end = Instant::now() + Duration::from_millis(500);
            while Instant::now() < end {
                assert!(bytes() == before, "the ring changed under a burst ({keys})");
            }
        });
        assert!(inside, "what has come can still be received");
        let mut port = looks_after.join().expect("a port");
        assert!(back.wait_link(LIMIT));
        port.stop();
        assert_eq!(with(|pool| pool.free.len()), COUNT, "mbufs in the pool");
    }
}

/// Those that say nothing at all, and those that say what they offer and then nothing more.
#[test]
fn silent_connections_do_not_keep_a_listening_port_from_its_back_end() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().expect("a folder");
    // GET_FEATURES, a reply of version 1, VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
    let offer: Vec<u8> = [1u32, 5, 8, 1 << 30, 1]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    for (round, bytes) in [&[][..], &offer].into_iter().enumerate() {
        new_pool();
        let socket = dir.path().join(format!("s{round}"));
        let mut pair = start(&socket, ",server=1,timeout=60000", false);
        let silent: Vec<_> = (0..3)
            .map(|_| {
                let mut stream = UnixStream::connect(&socket).expect("a connection");
                stream.write_all(bytes).expect("room");
                stream
            })
            .collect();
        let begin = Instant::now();
        let back = OurPort::open(&format!("vhost,path={},client=1", socket.display())).expect("a back-end");
        while !pair.port.service() {
            assert!(
                begin.elapsed() < LIMIT,
                "the back-end waits for silent connections ({round})"
            );
        }
        assert!(back.wait_link(LIMIT));
        assert_eq!(Vec::len(&silent), 3);
        pair.port.stop();
    }
}

#[test]
fn a_stopped_port_has_no_queues() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let queues = Handles::new([std::ptr::null_mut(); 2]);
    let mut mbufs = [std::ptr::null_mut::<u8>(); 1];
    // SAFETY: as while a port is stopped.
    unsafe {
        assert_eq!(usernic_pmd_rx(queues.rx(), mbufs.as_mut_ptr(), 1), 0);
        assert_eq!(usernic_pmd_tx(queues.tx(), mbufs.as_mut_ptr(), 1), 0);
        assert_eq!(usernic_pmd_tx_clean(queues.tx(), 0), 0);
        assert_eq!(usernic_pmd_rx_arm(queues.rx(), 1), 0);
    }
}
