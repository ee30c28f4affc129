//! Back-ends that break off, refuse, keep silent or talk nonsense: opening a port fails in bounded time, with a message
//! that names the socket and the step, and leaves nothing behind.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{Place, alone, held};
use raw::{Message, Raw, encode, words};

const F_PROTOCOL: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const MQ: u64 = 1;
const REPLY_ACK: u64 = 1 << 3;
const STATUS: u64 = 1 << 16;

/// A back-end that answers as it should, unless told otherwise.
#[derive(Clone, Copy)]
struct Script {
    features: u64,
    protocol: u64,
    pairs: u64,
    /// What GET_STATUS leaves of the status.
    status: u64,
    /// What is done about the message of this number, counted from 0 or by its code, in place of the answer.
    at: At,
    act: Act,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum At {
    Never,
    Nth(usize),
    Code(u32),
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Act {
    Close,
    Silence,
    /// The answer is cut after so many bytes, and the connection closed.
    Truncate(usize),
    /// The answer is to another message.
    Other,
    /// The answer is a request.
    Request,
    /// The answer says that it failed.
    Refuse,
    /// The answer announces this many bytes.
    Announce(u32),
    /// The version is 2.
    Version,
}

const GOOD: Script = Script {
    features: VERSION_1 | F_PROTOCOL | 1 << 15 | 1 << 28 | 1 << 35,
    protocol: MQ | REPLY_ACK | STATUS,
    pairs: 1,
    status: 0xff,
    at: At::Never,
    act: Act::Close,
};

/// Serves one connection, until it closes; the codes that came.
fn serve(listener: &UnixListener, script: Script) -> Vec<u32> {
    let raw = Raw::new(listener.accept().unwrap().0);
    let (mut codes, mut status) = (Vec::new(), 0);
    while let Some(message) = raw.read() {
        let nth = codes.len();
        codes.push(message.code);
        let payload = answer(&script, &message, &mut status);
        if script.at != At::Nth(nth) && script.at != At::Code(message.code) {
            if let Some(payload) = payload {
                raw.reply(message.code, &payload);
            }
            continue;
        }
        let payload = payload.unwrap_or_else(|| words(&[0]));
        let right = encode(message.code, 5, &payload);
        match script.act {
            Act::Close => break,
            Act::Silence => {}
            Act::Truncate(len) => {
                raw.send(&right[..len.min(right.len() - 1)], &[]);
                break;
            }
            Act::Other => {
                raw.send(&encode(message.code + 1, 5, &payload), &[]);
            }
            Act::Request => {
                raw.send(&encode(message.code, 1, &payload), &[]);
            }
            // Who is not asked cannot refuse.
            Act::Refuse => {
                if message.needs_reply() {
                    raw.reply(message.code, &words(&[1]));
                }
            }
            Act::Announce(len) => {
                let mut bytes = right;
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
                raw.send(&bytes, &[]);
            }
            Act::Version => {
                raw.send(&encode(message.code, 6, &payload), &[]);
            }
        }
    }
    codes
}

/// What a back-end that does as it should answers.
fn answer(script: &Script, message: &Message, status: &mut u64) -> Option<Vec<u8>> {
    let word = match message.code {
        1 => script.features,
        15 => script.protocol,
        17 => script.pairs,
        39 => {
            *status = message.word();
            if !message.needs_reply() {
                return None;
            }
            0
        }
        40 => *status & script.status,
        11 => message.word() & 0xffff_ffff,
        _ if message.needs_reply() => 0,
        _ => return None,
    };
    Some(words(&[word]))
}

/// Opens a port on a back-end of this script: the error's text, which names the socket, or nothing; and what came.
fn open(script: Script, more: &str) -> (Option<String>, Vec<u32>) {
    // Once a process.
    usernic::notify::prepare().unwrap();
    let before = held();
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let begin = Instant::now();
    let (error, codes) = std::thread::scope(|scope| {
        let served = scope.spawn(|| serve(&listener, script));
        let result = place.open("virtio-user", &format!("timeout=200,reconnect=0{more}"));
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(2), "it took {took:?}");
        // A port that opened says goodbye here.
        let error = result.err().map(|e| e.to_string());
        (error, served.join().unwrap())
    });
    if let Some(error) = &error {
        let socket = place.socket().display().to_string();
        assert!(error.contains(&socket), "no socket in: {error}");
    }
    drop((listener, place));
    assert_eq!(held(), before, "left behind after {error:?}: (descriptors, threads)");
    (error, codes)
}

fn fails(script: Script, more: &str) -> String {
    open(script, more).0.expect("the port opened")
}

/// Back-ends with less and less of the protocol.
const KINDS: [(u64, u64); 5] = [
    (GOOD.features, MQ | REPLY_ACK | STATUS),
    (GOOD.features, STATUS),
    (GOOD.features, REPLY_ACK),
    (GOOD.features, 0),
    (VERSION_1, 0),
];

/// How many messages an opening takes of each kind of back-end: all up to the one whose answer ends it.
fn opening(features: u64, protocol: u64) -> Vec<u32> {
    let script = Script {
        features,
        protocol,
        ..GOOD
    };
    let (error, mut codes) = open(script, "");
    assert_eq!(error, None);
    // The goodbye: disable both rings, and stop them.
    let goodbye = codes.iter().rposition(|&code| code != 18 && code != 11).unwrap();
    codes.truncate(goodbye + 1);
    codes
}

#[test]
fn a_good_back_end() {
    let _alone = alone();
    for (features, protocol) in KINDS {
        let codes = opening(features, protocol);
        assert_eq!(codes[..2], [3, 1]);
        assert_eq!(
            codes.last(),
            Some(if protocol & (STATUS | REPLY_ACK) == STATUS | REPLY_ACK {
                &39
            } else {
                &1
            }),
            "the last message of an opening is answered, so that whoever opened knows: {codes:?}"
        );
    }
}

#[test]
fn closes_at_each_message() {
    let _alone = alone();
    for (features, protocol) in KINDS {
        for (at, code) in opening(features, protocol).iter().enumerate() {
            let script = Script {
                features,
                protocol,
                at: At::Nth(at),
                ..GOOD
            };
            let error = fails(script, "");
            assert!(
                error.contains("closed the connection at "),
                "message {at} ({code}) of {protocol:#x}: {error}"
            );
        }
    }
}

#[test]
fn keeps_silent_at_each_answer() {
    let _alone = alone();
    for (code, name) in [
        (1, "GET_FEATURES"),
        (15, "GET_PROTOCOL_FEATURES"),
        (17, "GET_QUEUE_NUM"),
        (39, "SET_STATUS"),
        (40, "GET_STATUS"),
        (5, "SET_MEM_TABLE"),
    ] {
        let error = fails(
            Script {
                at: At::Code(code),
                act: Act::Silence,
                ..GOOD
            },
            "",
        );
        assert!(error.contains(&format!("no answer to {name} within 200 ms")), "{error}");
    }
}

#[test]
fn answers_nonsense() {
    let _alone = alone();
    let at = |code, act| {
        fails(
            Script {
                at: At::Code(code),
                act,
                ..GOOD
            },
            "",
        )
    };
    for (code, name) in [(1, "GET_FEATURES"), (15, "GET_PROTOCOL_FEATURES"), (5, "SET_MEM_TABLE")] {
        let error = at(code, Act::Other);
        let expected = format!("the reply to message {} came in place of that to {name}", code + 1);
        assert!(error.contains(&expected), "{error}");
        let error = at(code, Act::Request);
        assert!(
            error.contains(&format!("a request came in place of the reply to {name}")),
            "{error}"
        );
        let error = at(code, Act::Announce(7));
        assert!(error.contains(&format!("{name} announces 7 bytes")), "{error}");
        let error = at(code, Act::Announce(u32::MAX));
        assert!(
            error.contains(&format!("{name} announces 4294967295 bytes, more than")),
            "{error}"
        );
        let error = at(code, Act::Version);
        assert!(error.contains("the version is not 1"), "{error}");
        for len in [1, 11, 12, 19] {
            let error = at(code, Act::Truncate(len));
            assert!(
                error.contains(&format!("closed the connection at {name}, in the middle")),
                "{error}"
            );
        }
    }
}

#[test]
fn refuses() {
    let _alone = alone();
    let error = fails(
        Script {
            features: GOOD.features & !VERSION_1,
            ..GOOD
        },
        "",
    );
    assert!(error.contains("offers no VIRTIO_F_VERSION_1"), "{error}");
    let error = fails(Script { pairs: 2, ..GOOD }, ",queues=3");
    assert!(
        error.contains("queues=3") && error.contains("has 2 queue pair"),
        "{error}"
    );
    let error = fails(
        Script {
            protocol: REPLY_ACK,
            ..GOOD
        },
        ",queues=2",
    );
    assert!(error.contains("has 1 queue pair"), "without MQ there is one: {error}");
    let error = fails(Script { pairs: 0, ..GOOD }, ",queues=2");
    assert!(error.contains("queues=2"), "{error}");
    let error = fails(Script { status: !8, ..GOOD }, "");
    assert!(error.contains("FEATURES_OK"), "{error}");
    for (code, name) in [(5, "SET_MEM_TABLE"), (39, "SET_STATUS")] {
        let error = fails(
            Script {
                at: At::Code(code),
                act: Act::Refuse,
                ..GOOD
            },
            "",
        );
        assert!(error.contains(&format!("refused {name}")), "{error}");
    }
}

/// A back-end that never accepts, with its backlog full: connecting has a limit too.
#[test]
fn never_accepts() {
    let _alone = alone();
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    // SAFETY: listen(2) on a socket of ours takes no memory.
    let made = unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    assert_eq!(made, 0);
    let _first = std::os::unix::net::UnixStream::connect(place.socket()).unwrap();
    let begin = Instant::now();
    let error = place
        .open("virtio-user", "timeout=200")
        .expect_err("nobody accepts")
        .to_string();
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert!(error.contains("port.sock"), "{error}");
}
