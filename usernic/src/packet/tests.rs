use std::sync::Arc;

use hugemem::{PageSize, Segment};
use proptest::prelude::*;

use super::*;
use crate::pool::{Cache, HEADROOM, Pool};

pub(crate) fn pool(count: u32, room: u32, private: bool) -> Arc<Pool> {
    let len = Pool::stride(room) * count as usize;
    let segment = Arc::new(Segment::anonymous(len, PageSize::BASE, None).unwrap());
    Pool::new(segment, 0, count, room, 0, private).unwrap()
}

pub(crate) fn fresh(cache: &mut Cache) -> Packet {
    assert!(cache.reserve(1) > 0);
    // SAFETY: just taken.
    unsafe { Packet::from_meta(cache.pop().unwrap()) }
}

pub(crate) fn bytes_of(packet: &Packet) -> Vec<u8> {
    let mut bytes = vec![0xEE; packet.len()];
    assert_eq!(packet.copy_to(&mut bytes), bytes.len());
    bytes
}

#[derive(Clone, Debug)]
enum Step {
    CopyFrom(Vec<u8>),
    SetLen(usize),
    WriteAt(usize, Vec<u8>),
    Prepend(Vec<u8>),
    TrimFront(usize),
    MoveStart(isize),
    CopyPacket,
}

/// The ends of what a number can be, and of what 16 and 32 bits of it can be.
fn extreme() -> impl Strategy<Value = usize> {
    let ends = [0, 1 << 16, 1 << 31, 1 << 32, 1 << 63];
    (prop::sample::select(ends.to_vec()), -300isize..300).prop_map(|(end, by)| usize::wrapping_add_signed(end, by))
}

fn number(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..most, 1 => extreme()]
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = |most| proptest::collection::vec(any::<u8>(), 0..most);
    prop_oneof![
        bytes(5000).prop_map(Step::CopyFrom),
        number(5000).prop_map(Step::SetLen),
        (number(5000), bytes(300)).prop_map(|(at, b)| Step::WriteAt(at, b)),
        bytes(150).prop_map(Step::Prepend),
        number(200).prop_map(Step::TrimFront),
        (-150isize..150).prop_map(Step::MoveStart),
        extreme().prop_map(|by| Step::MoveStart(by as isize)),
        Just(Step::CopyPacket),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A packet is a vector of bytes with headroom, however many segments it takes.
    #[test]
    fn a_packet_is_its_bytes(steps in proptest::collection::vec(step(), 1..20)) {
        let pool = pool(64, 1024, true);
        let mut cache = Cache::new(Arc::clone(&pool));
        let mut packet = fresh(&mut cache);
        let mut model: Vec<u8> = Vec::new();
        for step in steps {
            match step {
                Step::CopyFrom(bytes) => {
                    packet.copy_from(&bytes).unwrap();
                    model = bytes;
                }
                Step::SetLen(len) => {
                    let kept = len.min(model.len());
                    let set = packet.set_len(len);
                    // 64 buffers of 1 KiB, one of which may be a copy's that is not home yet; each has headroom.
                    prop_assert!(set.is_ok() || len > 62 * 1024, "{len}");
                    prop_assert!(set.is_err() || len <= 64 * 1152, "{len}");
                    let now = bytes_of(&packet);
                    // What is new may be anything; what was there stays.
                    if set.is_ok() {
                        prop_assert_eq!(&now[..kept], &model[..kept]);
                    } else {
                        prop_assert!(now.is_empty());
                    }
                    model = now;
                }
                Step::WriteAt(at, bytes) => {
                    let fits = at.checked_add(bytes.len()).is_some_and(|end| end <= model.len());
                    let mut there = vec![0; bytes.len()];
                    prop_assert_eq!(packet.read_at(at, &mut there).is_ok(), fits);
                    prop_assert_eq!(packet.write_at(at, &bytes).is_ok(), fits);
                    if fits {
                        model[at..at + bytes.len()].copy_from_slice(&bytes);
                    }
                }
                Step::Prepend(bytes) => {
                    let fits = bytes.len() <= packet.headroom();
                    prop_assert_eq!(packet.prepend(&bytes).is_ok(), fits);
                    if fits {
                        model.splice(0..0, bytes);
                    }
                }
                Step::TrimFront(count) => {
                    let fits = count <= packet.meta().len as usize;
                    prop_assert_eq!(packet.trim_front(count).is_ok(), fits);
                    if fits {
                        model.drain(..count);
                    }
                }
                Step::MoveStart(by) => {
                    let fits = by <= packet.meta().len as isize && by >= -(packet.headroom() as isize);
                    prop_assert_eq!(packet.move_start(by).is_ok(), fits);
                    if fits && by >= 0 {
                        model.drain(..by as usize);
                    } else if fits {
                        let mut front = vec![0; by.unsigned_abs()];
                        packet.read_at(0, &mut front).unwrap();
                        model.splice(0..0, front);
                    }
                }
                Step::CopyPacket => {
                    let mut copy = fresh(&mut cache);
                    copy.copy_packet(&packet).unwrap();
                    packet = copy;
                }
            }
            prop_assert_eq!(packet.len(), model.len());
            prop_assert_eq!(&bytes_of(&packet), &model);
            for at in [0, model.len() / 2, model.len()] {
                let mut part = vec![0; model.len() - at];
                packet.read_at(at, &mut part).unwrap();
                prop_assert_eq!(&part, &model[at..]);
            }
            prop_assert!(packet.read_at(model.len(), &mut [0]).is_err());
            prop_assert_eq!(packet.bytes().is_some(), packet.segment_count() == 1);
            let place = packet.place();
            prop_assert_eq!(place.len as usize, packet.len());
            prop_assert_eq!(place.whole, packet.segment_count() == 1);
            prop_assert_eq!(usize::from(place.headroom), packet.headroom());
            if place.whole {
                prop_assert_eq!(place.room as usize, packet.len() + packet.tailroom());
            }
            // SAFETY: private memory, which nobody else has.
            let first = unsafe { packet.as_slice() };
            prop_assert_eq!(first.as_ptr(), place.data.as_ptr().cast_const());
            prop_assert!(place.whole || place.room as usize == first.len());
        }
        drop(packet);
        drop(cache);
        crate::pool::flush_this_thread();
        prop_assert_eq!(pool.available(), pool.capacity());
    }
}

#[test]
fn without_buffers_a_long_frame_is_refused_and_none_is_lost() {
    let pool = pool(4, 1024, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    let mut packet = fresh(&mut cache);
    cache.flush(0);
    assert!(matches!(
        packet.copy_from(&[1; 4097]),
        Err(PacketError::NoBuffers { len: 4097 })
    ));
    assert!(packet.is_empty());
    packet.copy_from(&[2; 4096]).unwrap();
    assert_eq!(packet.segment_count(), 4);
    drop(packet);
    crate::pool::flush_this_thread();
    assert_eq!(pool.available(), 4);
}

/// A length that wraps around the buffer's offset, as safe code can ask for.
#[test]
fn a_length_that_wraps_is_refused() {
    let pool = pool(4, 1024, true);
    let mut cache = Cache::new(Arc::clone(&pool));
    for len in [
        usize::MAX,
        usize::MAX - 100,
        usize::MAX - usize::from(HEADROOM),
        1 << 32,
        1 << 63,
    ] {
        let mut packet = fresh(&mut cache);
        packet.copy_from(&[1; 60]).unwrap();
        assert_eq!(packet.set_len(len), Err(PacketError::NoBuffers { len }));
        assert_eq!((packet.len(), packet.segment_count(), packet.tailroom()), (0, 1, 1024));
        assert!(packet.read_at(0, &mut [0]).is_err());
        assert_eq!(packet.bytes(), Some(&[][..]));
    }
    cache.flush(0);
    crate::pool::flush_this_thread();
    assert_eq!(pool.available(), 4);
}

/// As a back-end writes it that fills no buffer: pieces of any length.
#[test]
fn a_frame_in_short_pieces_keeps_its_bytes_whatever_length_it_is_given() {
    let pool = pool(8, 1024, true);
    let mut cache = Cache::new(pool);
    for (len, kept) in [
        (50, 50),
        (100, 100),
        (150, 150),
        (300, 300),
        (1000, 300),
        (3000, 300),
        (0, 0),
    ] {
        let mut packet = fresh(&mut cache);
        cache.flush(0);
        packet.set_len(1324).unwrap();
        packet.meta_mut().len = 100;
        let bytes: Vec<u8> = (0..400u32).map(|n| n as u8).collect();
        packet.write_at(0, &bytes).unwrap();
        packet.set_len(300).unwrap();
        packet.set_len(len).unwrap();
        assert_eq!(packet.len(), len);
        assert_eq!(bytes_of(&packet)[..kept], bytes[..kept], "{len}");
    }
}

/// What lies before a frame is no zeroed header once the frame begins elsewhere.
#[test]
fn a_frame_whose_beginning_moved_has_no_header_before_it() {
    let pool = pool(2, 1024, false);
    let mut cache = Cache::new(pool);
    let moves: [fn(&mut Packet); 4] = [
        |p| p.trim_front(50).unwrap(),
        |p| p.move_start(50).unwrap(),
        |p| p.move_start(-50).unwrap(),
        |p| p.prepend(&[0x11; 50]).unwrap(),
    ];
    for (n, change) in moves.into_iter().enumerate() {
        let mut packet = fresh(&mut cache);
        packet.copy_from(&[0x11; 110]).unwrap();
        change(&mut packet);
        // Sent once: a header was zeroed there. The buffer's next frame is changed alike.
        packet.meta_mut().zeroed_at = packet.meta().offset;
        // SAFETY: given up by the packet.
        unsafe { cache.returning().put(packet.into_meta()) };
        let mut packet = fresh(&mut cache);
        packet.copy_from(&[0x11; 110]).unwrap();
        change(&mut packet);
        assert_ne!(packet.meta().zeroed_at, packet.meta().offset, "{n}");
    }
}

#[test]
fn packets_outlive_their_port_and_the_memory_goes_with_the_last() {
    let segment = Arc::new(Segment::anonymous(Pool::stride(1024) * 8, PageSize::BASE, None).unwrap());
    let weak = Arc::downgrade(&segment);
    let pool = Pool::new(segment, 0, 8, 1024, 0, true).unwrap();
    let mut cache = Cache::new(Arc::clone(&pool));
    let mut packets: Vec<Packet> = (0..3).map(|_| fresh(&mut cache)).collect();
    drop((cache, pool));
    assert!(weak.upgrade().is_some());
    packets[0].copy_from(b"still here").unwrap();
    assert_eq!(packets[0].bytes(), Some(&b"still here"[..]));
    let last = packets.pop().unwrap();
    drop(packets);
    assert!(weak.upgrade().is_some());
    // From another thread, which ends.
    std::thread::spawn(move || drop(last)).join().unwrap();
    assert!(weak.upgrade().is_none(), "the segment was not given back");
}

#[test]
fn shared_bytes_are_no_slice() {
    let pool = pool(2, 1024, false);
    let mut cache = Cache::new(pool);
    let mut packet = fresh(&mut cache);
    packet.copy_from(&[7; 100]).unwrap();
    assert_eq!(packet.bytes(), None);
    assert_eq!(packet.into_private(), vec![7; 100]);
}

#[test]
fn threads_that_free_each_others_packets_lose_none() {
    let pool = pool(512, 1024, true);
    let (to, from) = std::sync::mpsc::sync_channel::<Burst>(4);
    std::thread::scope(|scope| {
        scope.spawn({
            let pool = Arc::clone(&pool);
            move || {
                let mut cache = Cache::new(pool);
                for round in 0..5_000usize {
                    let mut burst = Burst::new(32);
                    for n in 0..cache.reserve(32).min(32) {
                        let mut packet = fresh(&mut cache);
                        packet.copy_from(&[(round + n) as u8; 60]).unwrap();
                        burst.push(packet).unwrap();
                    }
                    if to.send(burst).is_err() {
                        return;
                    }
                }
            }
        });
        scope.spawn(move || {
            let mut cache = Cache::new(Arc::clone(&pool));
            for (round, mut burst) in from.into_iter().enumerate() {
                for (n, packet) in burst.iter().enumerate() {
                    assert_eq!(packet.header::<60>(), Some([(round + n) as u8; 60]));
                }
                if round % 2 == 0 {
                    burst.clear();
                } else {
                    for packet in burst.drain() {
                        // SAFETY: given up by the packet.
                        unsafe { cache.returning().put(packet.into_meta()) };
                    }
                }
            }
            drop(cache);
            crate::pool::flush_this_thread();
            assert_eq!(pool.available(), pool.capacity());
        });
    });
}

#[test]
fn headroom_is_what_prepend_takes() {
    let pool = pool(2, 1024, true);
    let mut cache = Cache::new(pool);
    let mut packet = fresh(&mut cache);
    assert_eq!(packet.headroom(), usize::from(HEADROOM - RESERVED));
    assert_eq!(packet.tailroom(), 1024);
    packet.prepend(&vec![1; packet.headroom()]).unwrap();
    assert_eq!(packet.headroom(), 0);
    assert!(matches!(
        packet.prepend(&[1]),
        Err(PacketError::NoHeadroom { asked: 1, left: 0 })
    ));
}
