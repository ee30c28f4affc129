//! The calls, as C makes them.

mod common;

use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Pair, Records, message, open, queue};
use usernic_ffi::*;

fn frame(number: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    frame.extend((0..).map(|i: usize| (i * 7 + number) as u8).take(len - 14));
    frame
}

#[test]
fn frames_go_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let [front, back] = pair.queues;
    let (mut out, mut arrived) = (Records::new(64), Records::new(64));
    for round in 0..50 {
        assert_eq!(usernic_queue_alloc(front, out.handle, 40), 40);
        for index in 0..40 {
            out.put(index, &frame(round + index, 60 + index * 30));
        }
        assert_eq!(usernic_queue_tx(front, out.handle), 40, "{}", message());
        assert_eq!(out.count(), 0);
        pair.receive(1, &arrived, 40);
        for index in 0..40 {
            assert_eq!(arrived.bytes(index), frame(round + index, 60 + index * 30));
        }
        assert_eq!(usernic_queue_tx(back, arrived.handle), 40, "{}", message());
        pair.receive(0, &out, 40);
        assert_eq!(out.bytes(39), frame(round + 39, 60 + 39 * 30));
        assert_eq!(usernic_queue_free(front, out.handle), 0);
    }
    let counts = Records::counts(pair.ports[0]);
    assert_eq!((counts.tx_packets, counts.rx_packets), (2000, 2000));
    assert_eq!(usernic_queue_drain(front, 1000), 1);
}

trait CountsOf {
    fn counts(port: *mut PortHandle) -> Counts;
}

impl CountsOf for Records {
    fn counts(port: *mut PortHandle) -> Counts {
        let mut counts = std::mem::MaybeUninit::<Counts>::zeroed();
        // SAFETY: a place of that size.
        let status = unsafe { usernic_port_counts(port, counts.as_mut_ptr(), size_of::<Counts>()) };
        assert_eq!(status, 0);
        // SAFETY: plain numbers, zeroed.
        unsafe { counts.assume_init() }
    }
}

#[test]
fn the_front_of_a_frame_moves_without_a_call() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let (mut out, mut arrived) = (Records::new(4), Records::new(4));
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 2), 2);
    let inner = frame(1, 100);
    for index in 0..2 {
        out.put(index, &inner);
    }
    let pushed = &mut out.all()[0];
    // SAFETY: 4 of the headroom's bytes, and 104 of the frame's.
    unsafe {
        pushed.data = pushed.data.sub(4);
        pushed.data.copy_from_nonoverlapping(b"tags".as_ptr(), 4);
    }
    pushed.len += 4;
    let pulled = &mut out.all()[1];
    // SAFETY: inside the frame.
    pulled.data = unsafe { pulled.data.add(14) };
    pulled.len -= 14;
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 2, "{}", message());
    pair.receive(1, &arrived, 2);
    assert_eq!(arrived.bytes(0), [b"tags", &inner[..]].concat());
    assert_eq!(arrived.bytes(1), inner[14..]);
}

/// What a program wrote before a frame, and took back, is not sent as a header.
#[test]
fn a_frame_that_was_pushed_and_pulled_has_no_header_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), [",csum=1,buffers=64,queue_size=16", ",csum=1"]);
    let (mut out, arrived) = (Records::new(1), Records::new(1));
    // Every buffer comes by several times, and had its header zeroed before.
    for round in 0..300 {
        while usernic_queue_alloc(pair.queues[0], out.handle, 1) == 0 {}
        out.put(0, &frame(round, 100));
        let frame = &mut out.all()[0];
        frame.flags |= USERNIC_FRAME_PUSHED;
        // As usernic_frame_push() and usernic_frame_pull() do it, 12 bytes each: the frame begins where it did.
        // SAFETY: bytes of the headroom.
        unsafe { frame.data.sub(12).write_bytes(0xEE, 12) };
        assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 1, "{}", message());
        pair.receive(1, &arrived, 1);
        assert_eq!(usernic_burst_clear(arrived.handle), 0);
    }
    let counts = Records::counts(pair.ports[1]);
    assert_eq!((counts.rx_packets, counts.rx_errors), (300, 0));
}

/// Frames of no length that Ethernet has do not arrive in C either.
#[test]
fn runts_and_oversize_frames_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), [",mtu=9000", ",mtu=1500"]);
    let (mut out, mut arrived) = (Records::new(8), Records::new(8));
    let lengths = [60, 0, 13, 14, 1519, 1518];
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 6), 6);
    for (index, len) in lengths.into_iter().enumerate() {
        out.put(index, &frame(index, len.max(14))[..len]);
    }
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 6, "{}", message());
    pair.receive(1, &arrived, 3);
    assert_eq!([0, 1, 2].map(|index| arrived.bytes(index).len()), [60, 14, 1518]);
    let counts = Records::counts(pair.ports[1]);
    assert_eq!((counts.rx_runts, counts.rx_oversize, counts.rx_errors), (2, 1, 0));
}

#[test]
fn frames_that_do_not_fit_are_refused_and_nothing_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let mut out = Records::new(4);
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 2), 2);
    for index in 0..2 {
        out.put(index, &frame(index, 100));
    }
    let good = out.all()[1];
    let with = |change: fn(&mut Frame)| {
        let mut bad = good;
        change(&mut bad);
        bad
    };
    let bad = [
        with(|f| f.len = f.room + 1),
        with(|f| f.len = u32::MAX),
        with(|f| f.data = null_mut()),
        with(|f| f.data = f.data.wrapping_sub(usize::from(f.headroom) + 1)),
        with(|f| f.data = f.data.wrapping_add(f.room as usize + 1)),
        with(|f| f.data = f.data.wrapping_add(isize::MAX as usize)),
        // With what it was moved by, it is one byte too long.
        with(|f| (f.data, f.len) = (f.data.wrapping_add(10), f.room - 9)),
    ];
    for bad in bad {
        out.all()[1] = bad;
        assert_eq!(
            usernic_queue_tx(pair.queues[0], out.handle),
            Status::Room as i32,
            "{bad:?}"
        );
        assert!(message().starts_with("frame 1:"), "{}", message());
        assert_eq!(out.count(), 2);
    }
    out.all()[1] = good;
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 2, "{}", message());
    assert_eq!(Records::counts(pair.ports[0]).tx_packets, 2);
}

#[test]
fn frames_of_several_pieces_are_read_and_written_whole() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), [",mtu=9000", ",mtu=9000"]);
    let (mut out, mut arrived) = (Records::new(4), Records::new(4));
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 1), 1);
    let long = frame(3, 9000);
    assert_eq!(usernic_burst_set_len(out.handle, 0, 9000), 0, "{}", message());
    assert_ne!(out.all()[0].flags & USERNIC_FRAME_PIECES, 0);
    assert!(out.all()[0].room < 9000);
    // SAFETY: the bytes of the frame, and some that are too many.
    unsafe {
        assert_eq!(usernic_burst_write(out.handle, 0, 0, long.as_ptr(), 9000), 0);
        let status = usernic_burst_write(out.handle, 0, 1, long.as_ptr(), 9000);
        assert_eq!(status, Status::Room as i32);
        assert!(message().contains("9000 bytes from 1 on, of 9000"), "{}", message());
        let status = usernic_burst_write(out.handle, 0, usize::MAX, long.as_ptr(), 9000);
        assert_eq!(status, Status::Room as i32);
        let status = usernic_burst_read(out.handle, 1, 0, long.as_ptr().cast_mut(), 1);
        assert_eq!(status, Status::Argument as i32);
    }
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 1, "{}", message());
    pair.receive(1, &arrived, 1);
    assert_eq!(arrived.bytes(0), long);
}

#[test]
fn frames_of_another_port_are_sent_as_copies() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let from = Pair::open(dirs[0].path(), [",mtu=4000", ",mtu=4000"]);
    let to = Pair::open(dirs[1].path(), [",mtu=4000", ",mtu=4000"]);
    let (mut out, mut arrived) = (Records::new(100), Records::new(100));
    assert_eq!(usernic_queue_alloc(from.queues[1], out.handle, 70), 70);
    for index in 0..70 {
        out.put(index, &frame(index, 60 + index));
    }
    // Frames of two ports are not mixed.
    assert_eq!(
        usernic_queue_alloc(to.queues[1], out.handle, 1),
        Status::Argument as i32
    );
    assert_eq!(usernic_queue_tx(from.queues[1], out.handle), 70, "{}", message());
    from.receive(0, &out, 70);
    out.all()[3].flags |= USERNIC_FRAME_DROP;
    assert_eq!(usernic_queue_tx(to.queues[0], out.handle), 69, "{}", message());
    to.receive(1, &arrived, 69);
    for index in 0..69 {
        let number = if index < 3 { index } else { index + 1 };
        assert_eq!(arrived.bytes(index), frame(number, 60 + number));
    }
    // All buffers came home: as many as before can be had.
    assert_eq!(usernic_burst_clear(arrived.handle), 0);
    assert_eq!(usernic_queue_alloc(from.queues[0], out.handle, 100), 100);
}

#[test]
fn frames_move_between_bursts() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let (mut from, mut to) = (Records::new(8), Records::new(3));
    assert_eq!(usernic_queue_alloc(pair.queues[0], from.handle, 6), 6);
    for index in 0..6 {
        from.put(index, &frame(index, 60 + index));
    }
    let pick = |from: &Records, to: &Records, indices: &[u32]| {
        // SAFETY: so many numbers.
        unsafe { usernic_burst_move(from.handle, indices.as_ptr(), indices.len() as u32, to.handle) }
    };
    assert_eq!(pick(&from, &to, &[1, 1]), Status::Argument as i32);
    assert_eq!(pick(&from, &to, &[2, 1]), Status::Argument as i32);
    assert_eq!(pick(&from, &to, &[6]), Status::Argument as i32);
    assert_eq!(pick(&from, &from, &[0]), Status::Busy as i32);
    // What is not in the records yet goes along.
    from.all()[4].flags = USERNIC_FRAME_DROP;
    assert_eq!(pick(&from, &to, &[0, 2, 4, 5]), 3);
    assert_eq!(to.all()[2].flags, USERNIC_FRAME_DROP);
    assert_eq!(
        (0..3).map(|i| from.bytes(i)).collect::<Vec<_>>(),
        [frame(1, 61), frame(3, 63), frame(5, 65)]
    );
    assert_eq!(to.bytes(1), frame(2, 62));
    assert_eq!(pick(&from, &to, &[0]), Status::Room as i32);
    assert_eq!(usernic_burst_truncate(to.handle, 1), 0);
    assert_eq!(to.count(), 1);
    assert_eq!(usernic_queue_tx(pair.queues[0], to.handle), 1);
}

/// Ethernet, IPv4, UDP to port 9, without a checksum.
fn udp(payload: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let len = (20 + 8 + payload) as u16;
    frame.extend([0x45, 0, (len >> 8) as u8, len as u8, 0, 1, 0, 0, 64, 17, 0, 0]);
    frame.extend([192, 0, 2, 1, 192, 0, 2, 2, 0, 9, 0, 9]);
    frame.extend([((len - 20) >> 8) as u8, (len - 20) as u8, 0, 0]);
    frame.extend((0..payload).map(|i| i as u8));
    frame
}

#[test]
fn what_a_frame_asks_for_is_done() {
    let dir = tempfile::tempdir().unwrap();
    // Nothing is negotiated: all is done in software.
    let pair = Pair::open(dir.path(), ["", ",csum=0,tso=0,lro=0"]);
    let (mut out, mut arrived) = (Records::new(8), Records::new(8));
    assert_eq!(usernic_queue_alloc(pair.queues[0], out.handle, 3), 3);
    out.put(0, &udp(100));
    out.put(1, &udp(1000));
    out.put(2, &frame(0, 60));
    out.all()[0].flags |= USERNIC_FRAME_ASK_CHECKSUM;
    out.all()[1].flags |= USERNIC_FRAME_ASK_SEGMENTS;
    out.all()[1].segment_size = 400;
    out.all()[2].flags |= USERNIC_FRAME_ASK_CHECKSUM;
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), Status::Offload as i32);
    assert!(message().starts_with("frame 2:"), "{}", message());
    out.all()[2].flags = USERNIC_FRAME_DROP;
    assert_eq!(usernic_queue_tx(pair.queues[0], out.handle), 2, "{}", message());
    pair.receive(1, &arrived, 4);
    let lengths: Vec<u32> = arrived.all().iter().map(|f| f.len).collect();
    assert_eq!(lengths, [142, 442, 442, 242]);
    // The one's complement sums of the IPv4 header, and of UDP with its pseudo header, are all ones.
    for index in 0..4 {
        let bytes = arrived.bytes(index);
        let words = |bytes: &[u8]| -> u32 {
            bytes
                .chunks(2)
                .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
                .sum()
        };
        let fold = |mut sum: u32| {
            while sum > 0xFFFF {
                sum = (sum & 0xFFFF) + (sum >> 16);
            }
            sum
        };
        assert_eq!(fold(words(&bytes[14..34])), 0xFFFF);
        let pseudo = words(&bytes[26..34]) + 17 + (bytes.len() - 34) as u32;
        assert_eq!(fold(pseudo + words(&bytes[34..])), 0xFFFF);
        assert_ne!(bytes[40..42], [0, 0]);
    }
}

#[test]
fn handles_are_told_apart_and_die() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let [front, back] = pair.ports;
    let mut second = null_mut();
    // SAFETY: a place for the handle.
    let status = unsafe { usernic_port_queue(front, 0, &mut second) };
    assert_eq!(status, Status::Taken as i32);
    // SAFETY: as above.
    let status = unsafe { usernic_port_queue(front, 1, &mut second) };
    assert_eq!(status, Status::Argument as i32);
    assert!(message().contains("the port has 1"), "{}", message());
    assert!(second.is_null());
    assert_eq!(usernic_queue_close(front.cast()), Status::Handle as i32);
    assert_eq!(usernic_queue_close(null_mut()), Status::Handle as i32);
    assert_eq!(message(), "the queue is null");
    assert_eq!(usernic_port_mtu(back), 1500);
    assert_eq!(usernic_queue_close(pair.queues[1]), 0);
    assert_eq!(usernic_queue_close(pair.queues[1]), Status::Handle as i32);
    let again = queue(back);
    assert_ne!(again, pair.queues[1]);
    let burst = Records::new(1);
    assert_eq!(usernic_queue_rx(pair.queues[1], burst.handle), Status::Handle as i32);
    assert_eq!(usernic_queue_rx(again, burst.handle), 0);
    // A closed port's queue says so, and is still to be closed.
    assert_eq!(usernic_port_close(back), 0);
    assert_eq!(usernic_port_mtu(back), Status::Handle as i32);
    assert_eq!(usernic_queue_rx(again, burst.handle), 0);
    assert_eq!(usernic_queue_wait(again, 1000), Status::Closed as i32);
    assert_eq!(usernic_queue_close(again), 0);
    assert_eq!(usernic_port_wait_link(front, 0), usernic_port_wait_link(front, 0));
}

#[test]
fn what_opens_no_port_says_why() {
    let mut port = null_mut();
    let mut try_open = |abi: u32, spec: *const std::ffi::c_char| {
        // SAFETY: a text or null, and a place for the handle.
        unsafe { usernic_port_open_abi(abi, spec, &mut port) }
    };
    assert_eq!(try_open(0, c"vhost,path=/x".as_ptr()), Status::Abi as i32);
    assert_eq!(try_open(USERNIC_ABI_VERSION, null()), Status::Pointer as i32);
    assert_eq!(try_open(USERNIC_ABI_VERSION, c"vhots".as_ptr()), Status::Spec as i32);
    assert!(message().contains("did you mean vhost"), "{}", message());
    let nobody = c"virtio-user,path=/nonexistent/socket,memory=memfd";
    assert_eq!(
        try_open(USERNIC_ABI_VERSION, nobody.as_ptr()),
        Status::Connection as i32
    );
    assert!(message().contains("/nonexistent/socket"), "{}", message());
    assert!(port.is_null());
}

#[test]
fn one_thread_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::open(dir.path(), ["", ""]);
    let sleeping = pair.queues[0] as usize;
    let burst = Records::new(1);
    let closing = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A change of the link ends a wait, too: the first is that it came up.
            while !closing.load(Ordering::Acquire) {
                assert_eq!(usernic_queue_wait(sleeping as *mut QueueHandle, 60_000), 0);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        while usernic_queue_rx(pair.queues[0], burst.handle) != Status::Busy as i32 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        // As long as the other thread sleeps, which it does until the link goes down.
        let refused = usernic_queue_close(pair.queues[0]);
        closing.store(true, Ordering::Release);
        assert_eq!(usernic_port_close(pair.ports[1]), 0);
        assert_eq!(refused, Status::Busy as i32, "{}", message());
    });
    assert_eq!(usernic_queue_rx(pair.queues[0], burst.handle), 0);
}

#[test]
fn ports_tell_of_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let port = open(&format!("vhost,path={},mac=02:00:00:00:00:07,mtu=2000", path.display()));
    let mut mac = [0; 6];
    // SAFETY: 6 bytes.
    assert_eq!(unsafe { usernic_port_mac(port, mac.as_mut_ptr()) }, 0);
    assert_eq!(mac, [2, 0, 0, 0, 0, 7]);
    assert_eq!(usernic_port_mtu(port), 2000);
    assert_eq!(usernic_port_queue_count(port), 1);
    assert_eq!(usernic_port_set_queues(port, 1), Status::Unsupported as i32);
    assert_eq!(usernic_port_announce(port), Status::Unsupported as i32);
    assert_eq!(usernic_port_wait_link(port, 0), 0);
    let mut text = [0x7F as std::ffi::c_char; 5];
    // SAFETY: places of these sizes.
    let whole = unsafe {
        assert_eq!(usernic_port_memory(port, null_mut(), 1), Status::Pointer as i32);
        let whole = usernic_port_memory(port, null_mut(), 0);
        assert_eq!(usernic_port_memory(port, text.as_mut_ptr(), 5), whole);
        whole
    };
    assert!(whole > 4 && text[4] == 0 && text[..4].iter().all(|&c| c != 0));
    let mut link = std::mem::MaybeUninit::<LinkState>::uninit();
    // SAFETY: a place of that size; all of it is written.
    let link = unsafe {
        assert_eq!(usernic_port_link(port, link.as_mut_ptr(), size_of::<LinkState>()), 0);
        link.assume_init()
    };
    assert_eq!((link.up, link.queues), (0, 0));
    assert_eq!(usernic_port_close(port), 0);
}
