//! Front-ends that say nothing, stop in the middle, or come second: the port's real front-end is served all the same.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{LIMIT, Place, both_ways, frame_of, until};
use raw::{Raw, Setup, encode, event, memfd, state, words};
use usernic::Port;

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1400) as usize)
}

fn refused(back: &Port) -> u64 {
    back.stats().peers_refused
}

/// A front-end that is right comes and is served.
fn serves(place: &Place, back: &Port) {
    let front = place.open("virtio-user", "timeout=8000").unwrap();
    assert!(back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 100, short);
}

/// Asks for the features, and takes the answer.
fn asks(raw: &Raw) {
    assert!(raw.request(1, 0, &[], &[]));
    assert_eq!(raw.read().expect("an answer").code, 1);
}

/// Whoever has said nothing, or only asked, is in nobody's way, whatever the limit.
#[test]
fn silent_connections_keep_nobody_from_the_port() {
    for count in [1, 3, 20] {
        let place = Place::new();
        let back = place.open("vhost", "timeout=60000").unwrap();
        let silent: Vec<Raw> = (0..count).map(|_| Raw::connect(&place.socket())).collect();
        let asking: Vec<Raw> = (0..2).map(|_| Raw::connect(&place.socket())).collect();
        asking.iter().for_each(asks);
        serves(&place, &back);
        drop((silent, asking));
        until("the link goes down", || !back.link().up);
        serves(&place, &back);
    }
}

/// One that says nothing goes when the limit is over; so does one that says half a message, and however slowly it goes on.
#[test]
fn a_connection_that_does_not_get_on_is_ended() {
    let drip = |raw: &Raw, bytes: &[u8]| {
        // A byte each 20 ms, each of them well within the limit: the message as a whole is not.
        for byte in bytes.iter().cycle() {
            if !raw.send(&[*byte], &[]) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    type Does<'a> = &'a dyn Fn(&Raw);
    let cases: [(&str, Does<'_>); 5] = [
        ("nothing", &|_| ()),
        ("half a header", &|raw| assert!(raw.send(&encode(1, 1, &[])[..6], &[]))),
        ("half a payload, after a question", &|raw| {
            asks(raw);
            assert!(raw.send(&encode(2, 1, &words(&[1 << 32]))[..15], &[]));
        }),
        ("a message drips", &|raw| drip(raw, &encode(25, 1, &[0; 500])[..500])),
        ("a message drips, features are set", &|raw| {
            assert!(raw.request(2, 0, &words(&[1 << 32 | 1 << 30]), &[]));
            drip(raw, &encode(25, 1, &[0; 500])[..500]);
        }),
    ];
    for (what, does) in cases {
        let place = Place::new();
        let back = place.open("vhost", "timeout=300").unwrap();
        let raw = Raw::connect(&place.socket());
        let begin = Instant::now();
        does(&raw);
        raw.closed();
        assert!(begin.elapsed() >= Duration::from_millis(250), "{what}: too early");
        until(what, || refused(&back) == 1);
        serves(&place, &back);
        // The front-end that left is none that was sent away.
        until("the link goes down", || !back.link().up);
        assert_eq!(refused(&back), 1, "{what}");
    }
}

/// A guest that boots sets its features late: nobody ends a front-end that has begun, as long as no other one comes. Then it
/// gives way once the limit is over.
#[test]
fn a_front_end_without_features_gives_way_to_another() {
    let place = Place::new();
    let back = place.open("vhost", "timeout=400").unwrap();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let raw = Raw::connect(&place.socket());
        asks(&raw);
        // What QEMU does before its guest runs.
        let call = event();
        assert!(raw.request(13, 0, &words(&[0]), &[call.as_fd()]));
        assert!(raw.request(18, 0, &state(0, 1), &[]));
        waiting.push(raw);
    }
    asks(&waiting[0]);
    std::thread::sleep(Duration::from_millis(100));
    serves(&place, &back);
    until("the link goes down", || !back.link().up);

    let place = Place::new();
    let back = place.open("vhost", "timeout=200").unwrap();
    let raw = Raw::connect(&place.socket());
    asks(&raw);
    assert!(raw.request(18, 0, &state(0, 1), &[]));
    std::thread::sleep(Duration::from_millis(800));
    asks(&raw);
    assert_eq!(refused(&back), 0);
    // It goes on where it was.
    let file = memfd(0x10_0000);
    let _events = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
}

/// While a front-end is served another one is sent away, and that is counted; the first one notices nothing.
#[test]
fn a_second_front_end_is_sent_away() {
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let (mut a, mut b) = (front.queue(0).unwrap(), back.queue(0).unwrap());
    for round in 1..=3 {
        let second = Raw::connect(&place.socket());
        let _ = second.request(1, 0, &[], &[]);
        both_ways(&mut a, &mut b, 100, short);
        second.closed();
        until("it is counted", || refused(&back) == round);
        both_ways(&mut a, &mut b, 100, short);
    }
    let error = place
        .open("virtio-user", "timeout=5000")
        .expect_err("a second front-end");
    let text = error.to_string();
    assert!(
        text.contains("closed the connection") && text.contains("one at a time"),
        "{text}"
    );
    both_ways(&mut a, &mut b, 100, short);
}

/// A front-end that was restarted may be there before the end of its predecessor was noticed.
#[test]
fn a_successor_is_served_as_soon_as_its_predecessor_is_gone() {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    for _ in 0..10 {
        let old = Raw::connect(&place.socket());
        let file = memfd(0x10_0000);
        let _events = old.set_up_well(&file);
        assert!(back.wait_link(LIMIT));
        let new = Raw::connect(&place.socket());
        assert!(new.request(1, 0, &[], &[]));
        drop(old);
        assert_eq!(new.read().expect("the successor is served").code, 1);
        let _events = new.set_up_well(&file);
        until("the link is the successor's", || back.link().up);
        asks(&new);
        drop(new);
        until("the link goes down", || !back.link().up);
    }
    assert_eq!(refused(&back), 0);
}

/// A front-end that listens and says nothing: the port tries again, and a front-end that comes there is served.
#[test]
fn a_silent_front_end_that_listens() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let back = place.open("vhost", "client=1,timeout=200").unwrap();
    let _silent = listener.accept().unwrap();
    let raw = Raw::new(listener.accept().unwrap().0);
    let file = memfd(0x10_0000);
    let _events = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT));
}

/// A port that is closed, or asked for something, does not wait for a front-end that takes no answers.
#[test]
fn a_stuck_front_end_holds_nobody() {
    for set_up in [false, true] {
        let place = Place::new();
        let back = place.open("vhost", "timeout=60000").unwrap();
        let raw = Raw::connect(&place.socket());
        let (file, kick, call) = (memfd(0x10_0000), event(), event());
        if set_up {
            assert!(raw.set_up(&Setup::default(), file.as_fd(), kick.as_fd(), call.as_fd()));
            assert!(back.wait_link(LIMIT));
        }
        raw.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let question = encode(1, 1, &[]).repeat(1000);
        while raw.send(&question, &[]) {}
        let begin = Instant::now();
        back.set_filter(None).unwrap();
        drop(back);
        assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
    }
}
