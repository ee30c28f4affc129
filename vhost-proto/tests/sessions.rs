//! Sessions as peers hold them, byte by byte; and mistakes that other implementations make.

mod common;

use common::{NEED_REPLY, Open, Peer, addr, message, number, offer, state, table};
use vhost_proto::Error;

const KICK: u32 = 12;
const CALL: u32 = 13;
const ENABLE: u32 = 18;

/// DPDK's virtio_user with one queue pair, split, as seen on the wire: CALL comes before the features, the status goes
/// 0x0b then 0x0f, and both the status and the memory table want an answer.
#[test]
fn dpdk_virtio_user() -> Result<(), Error> {
    let open = Open::default();
    let mut peer = Peer::new(offer());

    peer.give(&message(3, 0, &[]), vec![])?;
    peer.give(&message(1, 0, &[]), vec![])?;
    peer.give(&message(15, 0, &[]), vec![])?;
    let answers = peer.answers();
    assert_eq!(
        answers[0],
        [
            1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0xcb, 0xe7, 0x66, 0x7c, 0x0d, 0, 0, 0
        ],
        "bit 30 is among the features"
    );
    assert_eq!(answers[1][..8], [15, 0, 0, 0, 5, 0, 0, 0]);
    peer.give(&number(16, 0, 0x10009), vec![])?;

    for ring in 0..2 {
        peer.give(&number(CALL, 0, ring), open.fds(1))?;
    }
    peer.give(&number(2, 0, 0x9_5000_8000), vec![])?;
    assert_eq!(peer.events(), ["call 0 fd", "call 1 fd", "features 0x950008000"]);
    assert_eq!(peer.answers(), Vec::<Vec<u8>>::new(), "nobody asked");

    peer.give(&number(39, NEED_REPLY, 0x0b), vec![])?;
    assert_eq!(
        peer.answers(),
        [[39, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    );
    for _ in 0..2 {
        peer.give(&message(40, 0, &[]), vec![])?;
        assert_eq!(
            peer.answers(),
            [[40, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0x0b, 0, 0, 0, 0, 0, 0, 0]]
        );
    }

    let base = 0x1_0020_0000;
    peer.give(&table(NEED_REPLY, &[[base, 0x1000_0000, base, 0]]), open.fds(1))?;
    assert_eq!(
        peer.answers(),
        [[5, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    );
    for ring in 0..2 {
        let at = base + 0x4000 * u64::from(ring);
        peer.give(&state(8, ring, 256), vec![])?;
        peer.give(&state(10, ring, 0), vec![])?;
        peer.give(&addr(ring, at, at + 0x2000, at + 0x1000), vec![])?;
        peer.give(&number(KICK, 0, ring.into()), open.fds(1))?;
    }
    for ring in 0..2 {
        peer.give(&state(ENABLE, ring, 1), vec![])?;
    }
    peer.give(&number(39, NEED_REPLY, 0x0f), vec![])?;
    assert_eq!(
        peer.events(),
        [
            "status 0xb",
            "memory 0x100200000+0x10000000@0x100200000:0x0",
            "start 0 num 256 base 0x0 at 0x100200000 0x100201000 0x100202000 kick fd enabled false",
            "start 1 num 256 base 0x0 at 0x100204000 0x100205000 0x100206000 kick fd enabled false",
            "enable 0 true",
            "enable 1 true",
            "status 0xf",
        ]
    );
    peer.answers();

    // Its heap grows: off, the whole table again, on. Then it closes.
    for ring in 0..2 {
        peer.give(&state(ENABLE, ring, 0), vec![])?;
    }
    peer.give(
        &table(
            NEED_REPLY,
            &[
                [base, 0x1000_0000, base, 0],
                [0x9_0000_0000, 0x20_0000, 0x9_0000_0000, 0x1000_0000],
            ],
        ),
        open.fds(2),
    )?;
    for ring in 0..2 {
        peer.give(&state(ENABLE, ring, 1), vec![])?;
    }
    peer.answers();
    for ring in 0..2 {
        peer.give(&state(ENABLE, ring, 0), vec![])?;
    }
    for ring in 0..2 {
        peer.give(&state(11, ring, 0), vec![])?;
    }
    assert_eq!(
        peer.answers(),
        [
            [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
            [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0],
        ]
    );
    peer.back.closed()?;
    assert_eq!(open.count(), 0);
    Ok(())
}

/// QEMU with Linux's virtio-net: it enables rings before anything else, asks for features twice, sets an error
/// descriptor and a channel that wants an answer, sends CALL again after KICK, and enables again after the stop.
#[test]
fn qemu() -> Result<(), Error> {
    let open = Open::default();
    let mut peer = Peer::new(offer());

    for _ in 0..2 {
        peer.give(&message(1, 0, &[]), vec![])?;
    }
    peer.give(&message(15, 0, &[]), vec![])?;
    // MQ, LOG_SHMFD, RARP, REPLY_ACK, MTU, BACKEND_REQ, BACKEND_SEND_FD, HOST_NOTIFIER, STATUS; CONFIG is left out.
    peer.give(&number(16, 0, 0x10c3f), vec![])?;
    peer.give(&message(17, 0, &[]), vec![])?;
    assert_eq!(
        peer.answers().last().map(Vec::as_slice),
        Some(&[17, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0][..])
    );
    peer.give(&message(3, 0, &[]), vec![])?;
    peer.give(&message(21, NEED_REPLY, &[]), open.fds(1))?;
    assert_eq!(
        peer.answers().last().map(Vec::as_slice),
        Some(&[21, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..])
    );
    for ring in 0..2 {
        peer.give(&number(CALL, 0, ring), open.fds(1))?;
        peer.give(&number(14, 0, ring), open.fds(1))?;
    }
    for _ in 0..3 {
        for ring in 0..2 {
            peer.give(&state(ENABLE, ring, 1), vec![])?;
        }
    }
    peer.events();
    // Bits 0, 1, 7 to 10, 13, 14 (HOST_UFO), 15, 16, 21, 28, 29, 30, 32 without those that this offer lacks.
    peer.give(&number(2, 0, 0x1_7020_e783 & offer().features), vec![])?;
    peer.give(&number(39, 0, 0x08), vec![])?;
    peer.give(&message(40, 0, &[]), vec![])?;
    // The guest's memory: at guest address 0, at a user address that is no huge page's.
    peer.give(
        &table(NEED_REPLY, &[[0, 0x1000_0000, 0x7f12_3456_7000, 0]]),
        open.fds(1),
    )?;
    let user = 0x7f12_3456_7000 + 0x10_0000;
    for ring in 0..2 {
        peer.give(&state(8, ring, 256), vec![])?;
        peer.give(&state(10, ring, 0), vec![])?;
        peer.give(&addr(ring, user, user + 0x2000, user + 0x1000), vec![])?;
        peer.give(&number(KICK, 0, ring.into()), open.fds(1))?;
        peer.give(&number(CALL, 0, ring.into()), open.fds(1))?;
    }
    peer.give(&number(39, 0, 0x0f), vec![])?;
    let events = peer.events();
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("start 1") && e.ends_with("kick fd enabled true")),
        "what was enabled before SET_FEATURES stays so: {events:?}"
    );
    // At the guest's stop.
    for ring in 0..2 {
        peer.give(&state(11, ring, 0), vec![])?;
    }
    peer.give(&number(39, 0, 0), vec![])?;
    for ring in 0..2 {
        peer.give(&state(ENABLE, ring, 1), vec![])?;
    }
    assert_eq!(
        peer.events(),
        ["stop 0", "stop 1", "status 0x0", "enable 0 true", "enable 1 true"]
    );
    drop(peer);
    assert_eq!(open.count(), 0);
    Ok(())
}

/// QEMU's base of a packed ring: wrap counters in bits 15 and 31. It must come out whole; so must DPDK's, which has
/// bit 15 alone. (A published back-end cuts the base to 16 bits.)
#[test]
fn a_packed_base_is_not_cut() -> Result<(), Error> {
    for base in [0x8000_8000, 0x8000] {
        let open = Open::default();
        let mut peer = Peer::new(offer());
        peer.give(&state(8, 0, 256), vec![])?;
        peer.give(&state(10, 0, base), vec![])?;
        peer.give(&addr(0, 0x1000, 0x2000, 0x3000), vec![])?;
        peer.give(&number(KICK, 0, 0), open.fds(1))?;
        assert!(peer.events()[0].contains(&format!("base {base:#x} ")));
    }
    Ok(())
}

/// A published back-end disables rings at SET_FEATURES, another at SET_VRING_KICK.
#[test]
fn features_and_kicks_disable_nothing() -> Result<(), Error> {
    let open = Open::default();
    let mut peer = Peer::new(offer());
    peer.give(&number(2, 0, 1 << 32 | 1 << 30), vec![])?;
    peer.give(&state(8, 0, 256), vec![])?;
    peer.give(&addr(0, 0x1000, 0x2000, 0x3000), vec![])?;
    peer.give(&state(ENABLE, 0, 1), vec![])?;
    peer.give(&number(2, 0, 1 << 32 | 1 << 30), vec![])?;
    for _ in 0..2 {
        peer.give(&number(KICK, 0, 0), open.fds(1))?;
    }
    let events = peer.events();
    let starts: Vec<_> = events.iter().filter(|e| e.starts_with("start")).collect();
    assert_eq!(starts.len(), 2);
    assert!(starts.iter().all(|e| e.ends_with("enabled true")), "{events:?}");
    Ok(())
}

/// A published back-end wants SET_FEATURES before GET_PROTOCOL_FEATURES; the specification has it the other way.
#[test]
fn protocol_features_come_before_features() -> Result<(), Error> {
    let mut peer = Peer::new(offer());
    peer.give(&message(15, 0, &[]), vec![])?;
    assert_eq!(peer.answers().len(), 1);
    Ok(())
}

/// Without protocol features a ring starts enabled (vhost-user.rst, Ring states).
#[test]
fn without_protocol_features_rings_start_enabled() -> Result<(), Error> {
    for (features, enabled) in [(1u64 << 32, true), (1 << 32 | 1 << 30, false)] {
        let open = Open::default();
        let mut peer = Peer::new(offer());
        peer.give(&number(2, 0, features), vec![])?;
        peer.give(&state(8, 3, 2), vec![])?;
        peer.give(&addr(3, 0x1000, 0x2000, 0x3000), vec![])?;
        peer.give(&number(KICK, 0, 3), open.fds(1))?;
        assert!(peer.events()[1].ends_with(&format!("enabled {enabled}")));
    }
    Ok(())
}

/// Bit 8 of a kick says that there is no descriptor: the ring is polled, and starts all the same.
#[test]
fn a_kick_without_descriptor_starts_the_ring() -> Result<(), Error> {
    let mut peer = Peer::new(offer());
    peer.give(&state(8, 1, 64), vec![])?;
    peer.give(&addr(1, 0x1000, 0x2000, 0x3000), vec![])?;
    peer.give(&number(KICK, 0, 0x101), vec![])?;
    assert!(peer.events()[0].contains("kick none"));
    Ok(())
}

/// The answer of a message's own is the only one: NEED_REPLY on top of it does not make a second.
#[test]
fn one_answer_a_message() -> Result<(), Error> {
    let mut peer = Peer::new(offer());
    peer.give(&number(16, 0, 0x10009), vec![])?;
    peer.give(&message(1, NEED_REPLY, &[]), vec![])?;
    assert_eq!(peer.answers().len(), 1);
    // And none without REPLY_ACK, whatever the flag says.
    let mut peer = Peer::new(offer());
    peer.give(&message(3, NEED_REPLY, &[]), vec![])?;
    assert_eq!(peer.answers().len(), 0);
    Ok(())
}

/// A memory table may be padded to its 8 regions, as a C structure is; it may not be shorter than it says.
#[test]
fn a_padded_table() {
    let open = Open::default();
    let mut padded = table(0, &[[0x1000, 0x2000, 0x3000, 0]]);
    padded.extend([0; 7 * 32]);
    padded[8..12].copy_from_slice(&(8u32 + 8 * 32).to_le_bytes());
    let mut peer = Peer::new(offer());
    assert_eq!(peer.give(&padded, open.fds(1)), Ok(()));
    assert_eq!(peer.events(), ["memory 0x1000+0x2000@0x3000:0x0"]);

    let mut short = table(0, &[[0x1000, 0x2000, 0x3000, 0]]);
    short[12] = 2;
    let mut peer = Peer::new(offer());
    assert_eq!(
        peer.give(&short, open.fds(2)),
        Err(Error::Size {
            name: "SET_MEM_TABLE",
            size: 40
        })
    );
    assert_eq!(open.count(), 0);
}
