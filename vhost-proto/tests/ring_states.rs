//! The states of a ring, as vhost-user.rst has them (Ring states, VHOST_USER_RESET_DEVICE), and what may change in them.

mod common;

use common::{NEED_REPLY, Open, Peer, addr, message, number, offer, state};
use vhost_proto::Error;

const FEATURES: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PACKED: u64 = 1 << 34;

const SET_FEATURES: u32 = 2;
const NUM: u32 = 8;
const BASE: u32 = 10;
const GET_BASE: u32 = 11;
const KICK: u32 = 12;
const SET_PROTOCOL_FEATURES: u32 = 16;
const ENABLE: u32 = 18;
const SET_MTU: u32 = 20;
const RESET_DEVICE: u32 = 34;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

/// A connection and the descriptors that went over it.
struct Session {
    peer: Peer,
    open: Open,
}

impl Session {
    /// All protocol features are agreed on, virtio features are not.
    fn new() -> Self {
        let mut session = Session {
            peer: Peer::new(offer()),
            open: Open::default(),
        };
        session.tell(&number(SET_PROTOCOL_FEATURES, 0, offer().protocol.bits()));
        session
    }

    fn try_tell(&mut self, bytes: &[u8], fds: usize) -> Result<Vec<String>, Error> {
        self.peer.give(bytes, self.open.fds(fds))?;
        Ok(self.peer.events())
    }

    fn tell(&mut self, bytes: &[u8]) -> Vec<String> {
        self.try_tell(bytes, 0).unwrap()
    }

    fn features(&mut self, bits: u64) {
        self.tell(&number(SET_FEATURES, 0, bits));
    }

    fn place(&mut self, ring: u32) {
        self.tell(&state(NUM, ring, 256));
        self.tell(&addr(ring, 0x1000, 0x3000, 0x2000));
    }

    /// Kicks; whether the ring is enabled then.
    fn kick(&mut self, ring: u32) -> bool {
        let events = self.try_tell(&number(KICK, 0, ring.into()), 1).unwrap();
        assert!(events[0].starts_with(&format!("start {ring} ")), "{events:?}");
        events[0].ends_with("enabled true")
    }

    /// Places and kicks.
    fn start(&mut self, ring: u32) -> bool {
        self.place(ring);
        self.kick(ring)
    }
}

/// Started or stopped, enabled or disabled: what each of the messages makes of a ring.
#[test]
fn enabled_and_disabled() {
    type Does = fn(&mut Session);
    let enable: Does = |s| {
        s.tell(&state(ENABLE, 0, 1));
    };
    let disable: Does = |s| {
        s.tell(&state(ENABLE, 0, 0));
    };
    let with: Does = |s| s.features(FEATURES | PROTOCOL_FEATURES);
    let without: Does = |s| s.features(FEATURES);
    let start: Does = |s| {
        s.start(0);
    };
    let stop: Does = |s| {
        s.tell(&state(GET_BASE, 0, 0));
    };
    let status_0: Does = |s| {
        s.tell(&number(SET_STATUS, 0, 0));
    };
    let reset: Does = |s| {
        s.tell(&message(RESET_DEVICE, 0, &[]));
    };
    // What happened, and whether the ring is enabled when it is kicked then.
    let table: [(&str, &[Does], bool); 20] = [
        ("nothing was negotiated", &[], false),
        ("with bit 30", &[with], false),
        ("without bit 30", &[without], true),
        ("with bit 30, enabled", &[with, enable], true),
        ("with bit 30, enabled and disabled", &[with, enable, disable], false),
        ("enabled, then bit 30 (QEMU)", &[enable, with], true),
        ("enabled, and never negotiated", &[enable], true),
        ("started, then without bit 30", &[with, start, without], true),
        ("started, then with bit 30", &[without, start, with], false),
        ("disabled, then without bit 30", &[with, start, disable, without], true),
        ("without bit 30, then disabled", &[without, disable], false),
        ("without bit 30, then with it", &[without, with], false),
        ("enabled, stopped, started", &[with, enable, start, stop], true),
        ("disabled, stopped, started", &[with, disable, start, stop], false),
        ("status 0 leaves it enabled", &[with, enable, start, status_0], true),
        ("with bit 30, reset", &[with, enable, start, reset], false),
        ("without bit 30, reset", &[without, start, reset], false),
        ("reset, then with bit 30", &[with, enable, reset, with], false),
        ("reset, then without bit 30", &[with, enable, reset, without], true),
        ("reset, then enabled", &[with, reset, with, enable], true),
    ];
    for (what, done, enabled) in table {
        let mut session = Session::new();
        done.iter().for_each(|does| does(&mut session));
        assert_eq!(session.start(0), enabled, "{what}");
    }
}

/// "reset all internal device state to the initial state, ready to be reinitialized"
#[test]
fn a_reset_leaves_nothing_of_the_device() {
    let mut session = Session::new();
    session.features(FEATURES | PROTOCOL_FEATURES);
    session.tell(&number(SET_STATUS, 0, 0x0f));
    session.tell(&state(BASE, 0, 77));
    session.tell(&state(ENABLE, 0, 1));
    assert!(session.start(0));
    assert_eq!(session.tell(&message(RESET_DEVICE, 0, &[])), ["reset"]);
    session.peer.answers();
    session.tell(&message(GET_STATUS, 0, &[]));
    assert_eq!(session.peer.answers()[0][12..], [0; 8], "the status is 0");

    // Addresses of before are none.
    let error = session.try_tell(&number(KICK, 0, 0), 1).unwrap_err();
    let (name, before) = ("SET_VRING_KICK", "SET_VRING_ADDR");
    assert_eq!(error, Error::Untimely { name, before });

    // Nor is the base; and what was running may be set up anew, with other features.
    let mut session = Session::new();
    session.features(FEATURES | PROTOCOL_FEATURES);
    session.tell(&state(BASE, 0, 77));
    session.start(0);
    session.tell(&message(RESET_DEVICE, 0, &[]));
    session.features(FEATURES | PACKED | PROTOCOL_FEATURES);
    session.place(0);
    let events = session.try_tell(&number(KICK, 0, 0), 1).unwrap();
    assert!(events[0].contains("base 0x80008000 "), "{events:?}");
}

/// A status of 0 is a reset (virtio 1.3, 2.1): a kick alone does not bring the rings back.
#[test]
fn a_status_of_0_stops_the_rings() {
    let mut session = Session::new();
    session.features(FEATURES | PROTOCOL_FEATURES);
    session.start(0);
    session.tell(&number(SET_STATUS, 0, 0));
    assert!(matches!(
        session.try_tell(&number(KICK, 0, 0), 1),
        Err(Error::Untimely { .. })
    ));
}

/// A front-end that does not send SET_VRING_BASE: its rings begin at their beginning.
#[test]
fn a_ring_without_a_base_begins_at_its_beginning() {
    for (features, base) in [(FEATURES, "0x0"), (FEATURES | PACKED, "0x80008000")] {
        let mut session = Session::new();
        session.features(features);
        session.place(0);
        let events = session.try_tell(&number(KICK, 0, 0), 1).unwrap();
        assert!(events[0].contains(&format!("base {base} ")), "{events:?}");
        // What was said counts, 0 among it.
        session.place(1);
        session.tell(&state(BASE, 1, 0));
        let events = session.try_tell(&number(KICK, 0, 1), 1).unwrap();
        assert!(events[0].contains("base 0x0 "), "{events:?}");
        // And so does what a stop said.
        session.tell(&state(GET_BASE, 0, 0));
        let events = session.try_tell(&number(KICK, 0, 0), 1).unwrap();
        assert!(events[0].contains("base 0x100 "), "{events:?}");
    }
}

/// What a ring is made of does not change while it runs, and is not ignored either.
#[test]
fn a_running_ring_is_not_changed() {
    let changes = [
        ("SET_VRING_NUM", state(NUM, 0, 128)),
        ("SET_VRING_BASE", state(BASE, 0, 5)),
        ("SET_VRING_ADDR", addr(0, 0x8000, 0x3000, 0x2000)),
        ("SET_VRING_ADDR", addr(0, 0x1000, 0x8000, 0x2000)),
        ("SET_VRING_ADDR", addr(0, 0x1000, 0x3000, 0x8000)),
        ("SET_FEATURES", number(SET_FEATURES, 0, FEATURES | PACKED)),
        ("SET_FEATURES", number(SET_FEATURES, 0, 0)),
    ];
    for (name, change) in &changes {
        let mut session = Session::new();
        session.features(FEATURES);
        session.start(0);
        let error = session.try_tell(change, 0).unwrap_err();
        assert_eq!(error, Error::Running { name, index: 0 });
        assert!(error.to_string().contains("while it runs"), "{error}");

        // Before it starts, and when it was stopped, it may.
        let mut session = Session::new();
        session.features(FEATURES);
        session.place(0);
        session.tell(change);
        let mut session = Session::new();
        session.features(FEATURES);
        session.start(0);
        session.tell(&state(GET_BASE, 0, 0));
        session.tell(change);
    }
    // Another ring may.
    let mut session = Session::new();
    session.features(FEATURES);
    session.start(0);
    session.start(1);
    session.tell(&state(GET_BASE, 1, 0));
    session.tell(&addr(1, 0x8000, 0xa000, 0x9000));
    // The same once more is no change: what a front-end says when it switches the log on.
    session.tell(&state(NUM, 0, 256));
    session.tell(&addr(0, 0x1000, 0x3000, 0x2000));
    session.features(FEATURES);
    session.features(FEATURES | PROTOCOL_FEATURES);
    session.kick(0);
}

/// VHOST_USER_NET_SET_MTU: "respond with zero in case the specified MTU is valid, or non-zero otherwise".
#[test]
fn an_mtu_that_is_not_valid_is_refused() {
    let mut session = Session::new();
    for (mtu, refused) in [(67, true), (68, false), (65535, false), (65536, true), (u64::MAX, true)] {
        session.peer.answers();
        let events = session.tell(&number(SET_MTU, NEED_REPLY, mtu));
        assert_eq!(session.peer.answers()[0][12], u8::from(refused), "{mtu}");
        assert_eq!(events.is_empty(), refused);
    }
}
