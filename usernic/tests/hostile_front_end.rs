//! Front-ends that are wrong or hostile, against a `vhost` port: the connection ends, and the port serves the next one.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use common::{LIMIT, Place, alone, both_ways, frame_of, held, until};
use raw::{GUEST, Raw, Setup, USER, event, memfd, state, words};
use usernic::{Burst, Port};

fn short(number: u64) -> Vec<u8> {
    frame_of(number, 60 + (number % 1400) as usize)
}

/// A front-end that is right is served.
fn serves(place: &Place, back: &Port) {
    until("the link of the last front-end goes down", || !back.link().up);
    let front = place.open("virtio-user", "timeout=5000").unwrap();
    assert!(back.wait_link(LIMIT));
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 100, short);
}

/// Connects a front-end that does as `does`; the port ends the connection, keeps nothing, and serves the next.
fn survives(what: &str, does: impl FnOnce(&Raw)) {
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    // A thread takes its name itself, some time after it was started.
    until("the port's thread has its name", || held().1 == 1);
    let before = held();
    {
        let raw = Raw::connect(&place.socket());
        does(&raw);
        raw.closed();
    }
    until(&format!("{what}: all is given back"), || held() == before);
    assert!(!back.link().up, "{what}");
    serves(&place, &back);
}

/// A front-end with this set-up.
fn with(what: &str, setup: Setup, file: impl FnOnce() -> OwnedFd) {
    survives(what, |raw| {
        let file = file();
        let (kick, call) = (event(), event());
        raw.set_up(&setup, file.as_fd(), kick.as_fd(), call.as_fd());
    });
}

#[test]
fn the_set_up_is_right() {
    let _alone = alone();
    let place = Place::new();
    let back = place.open("vhost", "").unwrap();
    let raw = Raw::connect(&place.socket());
    let file = memfd(0x10_0000);
    let _events = raw.set_up_well(&file);
    assert!(back.wait_link(LIMIT), "the set-up that the other tests spoil is good");
    drop(raw);
    serves(&place, &back);
}

#[test]
fn memory_that_is_none() {
    let _alone = alone();
    let good = Setup::default;
    with("a pipe as memory", good(), || rustix::pipe::pipe().unwrap().0);
    with("an eventfd as memory", good(), event);
    with("a file that is too short", good(), || memfd(0xf_ffff));
    with("an empty file", good(), || memfd(0));
    with("a socket as memory", good(), || UnixStream::pair().unwrap().0.into());
    with("a folder as memory", good(), || File::open("/dev/shm").unwrap().into());

    let disk = || tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let magic = rustix::fs::fstatfs(disk()).unwrap().f_type as u64;
    if magic == 0x0102_1994 {
        eprintln!("SKIPPED a disk file as memory: the target folder is a tmpfs");
        return;
    }
    with("a disk file as memory", good(), || {
        let disk = disk();
        disk.set_len(0x10_0000).unwrap();
        disk.into()
    });
}

#[test]
fn regions_that_are_wrong() {
    let _alone = alone();
    for (what, regions) in [
        (
            "two regions that overlap",
            vec![[GUEST, 0x2000, USER, 0], [GUEST + 0x1000, 0x2000, USER + 0x2000, 0]],
        ),
        ("an empty region", vec![[GUEST, 0, USER, 0]]),
        ("a region that wraps", vec![[u64::MAX - 0xfff, 0x2000, USER, 0]]),
        ("user addresses that wrap", vec![[GUEST, 0x2000, u64::MAX - 0xfff, 0]]),
        (
            "an offset that overflows",
            vec![[GUEST, 0x2000, USER, u64::MAX - 0xfff]],
        ),
        ("an offset behind the end", vec![[GUEST, 0x2000, USER, 0x10_0000]]),
        ("a huge region", vec![[0, u64::MAX, 0, 0]]),
    ] {
        let setup = Setup {
            regions,
            ..Setup::default()
        };
        with(what, setup, || memfd(0x10_0000));
    }
}

#[test]
fn rings_that_are_wrong() {
    let _alone = alone();
    let good = Setup::default();
    let packed = good.features | 1 << 34;
    for (what, setup) in [
        (
            "ring size 3",
            Setup {
                size: 3,
                ..good.clone()
            },
        ),
        (
            "ring size 0",
            Setup {
                size: 0,
                ..good.clone()
            },
        ),
        (
            "ring size 65536",
            Setup {
                size: 65536,
                ..good.clone()
            },
        ),
        (
            "a descriptor table outside",
            Setup {
                at: [0x10_0000, 0x1000, 0x2000],
                ..good.clone()
            },
        ),
        (
            "an available ring that ends outside",
            Setup {
                at: [0, 0x10_0000 - 8, 0x2000],
                ..good.clone()
            },
        ),
        (
            "a used ring far away",
            Setup {
                at: [0, 0x1000, u64::MAX - USER - 7],
                ..good.clone()
            },
        ),
        (
            "a descriptor table that is not aligned",
            Setup {
                at: [8, 0x1000, 0x2000],
                ..good.clone()
            },
        ),
        (
            "a used ring that is not aligned",
            Setup {
                at: [0, 0x1000, 0x2001],
                ..good.clone()
            },
        ),
        (
            "a base far from the used index",
            Setup {
                base: 0x7fff,
                ..good.clone()
            },
        ),
        (
            "features without VERSION_1",
            Setup {
                features: 1 << 30,
                ..good.clone()
            },
        ),
        (
            "features that were not offered",
            Setup {
                features: good.features | 1 << 33,
                ..good.clone()
            },
        ),
        (
            "a packed ring of 32769",
            Setup {
                features: packed,
                size: 32769,
                ..good.clone()
            },
        ),
        (
            "a packed ring with an event structure that is not aligned",
            Setup {
                features: packed,
                at: [0, 0x1002, 0x2000],
                ..good.clone()
            },
        ),
        (
            "a packed ring with a base outside it",
            Setup {
                features: packed,
                base: 0xffff,
                ..good.clone()
            },
        ),
    ] {
        with(what, setup, || memfd(0x10_0000));
    }
}

#[test]
fn events_that_are_none() {
    let _alone = alone();
    for as_kick in [true, false] {
        survives("a pipe as kick or call", |raw| {
            let (_reader, pipe) = rustix::pipe::pipe().unwrap();
            let (file, event) = (memfd(0x10_0000), event());
            let (kick, call): (BorrowedFd<'_>, BorrowedFd<'_>) = if as_kick {
                (pipe.as_fd(), event.as_fd())
            } else {
                (event.as_fd(), pipe.as_fd())
            };
            raw.set_up(&Setup::default(), file.as_fd(), kick, call);
        });
    }
}

#[test]
fn messages_that_are_wrong() {
    let _alone = alone();
    survives("an unknown message", |raw| assert!(raw.request(77, 0, &[], &[])));
    survives("a reply", |raw| assert!(raw.reply(1, &words(&[0]))));
    survives("a message of 4 GiB", |raw| {
        let mut bytes = raw::encode(25, 1, &[]);
        bytes[8..].fill(0xff);
        raw.send(&bytes, &[]);
    });
    survives("a ring that is not there", |raw| {
        assert!(raw.request(8, 0, &state(3, 16), &[]))
    });
    survives("descriptors with a message that takes none", |raw| {
        let event = event();
        raw.request(1, 0, &[], &[event.as_fd(); 20]);
    });
    survives("a table of more regions than descriptors", |raw| {
        let file = memfd(0x1000);
        raw.request(
            5,
            0,
            &words(&[2, 0, 0x1000, 0, 0, 0x1000, 0x1000, 0x1000, 0]),
            &[file.as_fd()],
        );
    });
    survives("half a message, and the end", |raw| {
        let file = memfd(0x1000);
        raw.send(&raw::encode(5, 1, &words(&[1, 0, 0x1000, 0, 0]))[..30], &[file.as_fd()]);
        raw.0.shutdown(std::net::Shutdown::Write).unwrap();
    });
    survives("a region to remove that is not there", |raw| {
        assert!(raw.request(16, 0, &words(&[1 << 15]), &[]));
        raw.request(38, 0, &words(&[0, GUEST, 0x1000, USER, 0]), &[]);
    });
}

/// A front-end that asks and never takes the answers: the port does not wait for it longer than its limit.
#[test]
fn never_reads() {
    let _alone = alone();
    let place = Place::new();
    let back = place.open("vhost", "timeout=200").unwrap();
    let raw = Raw::connect(&place.socket());
    raw.0.set_write_timeout(Some(LIMIT)).unwrap();
    let question = raw::encode(1, 1, &[]).repeat(1000);
    while raw.send(&question, &[]) {}
    serves(&place, &back);
}

/// While one front-end is served another that connects waits, and takes nothing from it.
#[test]
fn one_at_a_time() {
    let _alone = alone();
    let place = Place::new();
    let (front, back) = place.pair("", "");
    let second = Raw::connect(&place.socket());
    let _ = second.request(1, 0, &[], &[]);
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 1000, short);
    drop(second);
    both_ways(&mut front.queue(0).unwrap(), &mut back.queue(0).unwrap(), 1000, short);
    drop(front);
    serves(&place, &back);
}

/// The file is truncated under rings that run. With the guard installed that is a dead front-end, not a dead process.
#[test]
fn a_file_is_truncated_in_mid_traffic() {
    let _alone = alone();
    usernic::install_sigbus_guard().unwrap();
    for through_rx in [true, false] {
        let place = Place::new();
        let back = place.open("vhost", "").unwrap();
        let mut queue = back.queue(0).unwrap();
        let mut burst = Burst::new(32);
        let raw = Raw::connect(&place.socket());
        let file = memfd(0x10_0000);
        let _events = raw.set_up_well(&file);
        assert!(back.wait_link(LIMIT));

        // A frame in the transmit ring: a descriptor of 72 bytes, and the index says one.
        let ring = 0x1_0000;
        let at = |offset: u64, bytes: &[u8]| assert_eq!(rustix::io::pwrite(&file, bytes, offset).unwrap(), bytes.len());
        at(
            ring,
            &[words(&[GUEST + 0x8_0000]), 72u32.to_le_bytes().to_vec(), vec![0; 4]].concat(),
        );
        at(ring + 0x1000, &[0, 0, 1, 0, 0, 0]);
        until("the frame comes", || queue.rx(&mut burst) == 1);
        assert_eq!(burst[0].len(), 60);
        burst.clear();

        rustix::fs::ftruncate(&file, 0).unwrap();
        if through_rx {
            until("the link goes down", || {
                queue.rx(&mut burst);
                !back.link().up
            });
        } else {
            until("the link goes down", || {
                if queue.alloc(&mut burst, 1) == 1 {
                    burst[0].copy_from(&[7; 60]).unwrap();
                }
                queue.tx(&mut burst);
                burst.clear();
                !back.link().up
            });
        }
        raw.closed();
        drop(queue);
        serves(&place, &back);
    }
}
