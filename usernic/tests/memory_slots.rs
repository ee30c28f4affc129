//! A front-end's memory changes: a back-end hears of the differences where it takes regions one by one, and of the whole
//! table where it does not.

#[path = "common/raw.rs"]
mod raw;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use raw::{Message, Raw, memfd, words};
use usernic::vhost_user::{Error, FrontendSession, Region};

const SET_MEM_TABLE: u32 = 5;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

const VERSION_1: u64 = 1 << 32;
const F_PROTOCOL: u64 = 1 << 30;
const REPLY_ACK: u64 = 1 << 3;
const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

const SIZE: u64 = 4096;

/// What a back-end did.
#[derive(Default)]
struct Log {
    /// The messages about memory.
    codes: Vec<u32>,
    /// The regions that it has, by guest address and the file's number.
    regions: BTreeSet<(u64, u64)>,
}

fn word(message: &Message, at: usize) -> u64 {
    u64::from_le_bytes(message.payload[8 * at..8 * at + 8].try_into().unwrap())
}

fn inode(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// A back-end that keeps count, until the other side closes. A region that it does not know cannot be removed, and one
/// that it has not be added.
fn serve(raw: &Raw, protocol: u64, slots: u64) -> Log {
    let mut log = Log::default();
    while let Some(message) = raw.read() {
        match message.code {
            1 => assert!(raw.reply(1, &words(&[VERSION_1 | F_PROTOCOL]))),
            15 => assert!(raw.reply(15, &words(&[protocol]))),
            GET_MAX_MEM_SLOTS => assert!(raw.reply(GET_MAX_MEM_SLOTS, &words(&[slots]))),
            SET_MEM_TABLE => {
                let files = message.fds.iter().map(inode);
                let addresses = (0..message.fds.len()).map(|i| word(&message, 1 + 4 * i));
                log.regions = addresses.zip(files).collect();
            }
            ADD_MEM_REG => {
                assert_eq!(message.fds.len(), 1);
                let region = (word(&message, 1), inode(&message.fds[0]));
                assert!(log.regions.insert(region), "there already: {region:?}");
            }
            REM_MEM_REG => {
                let at = word(&message, 1);
                let old = log.regions.iter().find(|r| r.0 == at).copied();
                assert!(log.regions.remove(&old.expect("a region that is there")));
            }
            _ => {}
        }
        if message.code >= GET_MAX_MEM_SLOTS && message.code <= REM_MEM_REG || message.code == SET_MEM_TABLE {
            log.codes.push(message.code);
        }
        if message.needs_reply() && ![1, 15, GET_MAX_MEM_SLOTS].contains(&message.code) {
            assert!(raw.reply(message.code, &words(&[0])));
        }
    }
    log
}

/// Shares one list of regions after the other, each region by its number and that of its file; what the back-end
/// counted after each, and the last outcome.
fn share(protocol: u64, slots: u64, lists: &[&[(u64, usize)]]) -> (Vec<u32>, Result<(), Error>) {
    let files: Vec<OwnedFd> = (0..40).map(|_| memfd(SIZE)).collect();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back = Raw::new(theirs);
    std::thread::scope(|scope| {
        let served = scope.spawn(move || serve(&back, protocol, slots));
        let mut session = FrontendSession::new(ours.into(), Path::new("/test"), Duration::from_secs(10));
        session.offer().unwrap();
        let mut outcome = Ok(());
        let mut has = BTreeSet::new();
        for list in lists {
            let regions: Vec<Region<'_>> = list
                .iter()
                .map(|&(at, file)| Region {
                    guest_addr: at * SIZE,
                    user_addr: at * SIZE,
                    size: SIZE,
                    offset: 0,
                    fd: files[file].as_fd(),
                })
                .collect();
            outcome = session.share(&regions);
            if outcome.is_ok() {
                has = list
                    .iter()
                    .map(|&(at, file)| (at * SIZE, inode(&files[file])))
                    .collect();
            }
        }
        drop(session);
        let log = served.join().unwrap();
        assert_eq!(log.regions, has, "the back-end has another memory");
        (log.codes, outcome)
    })
}

fn numbered(range: std::ops::Range<u64>) -> Vec<(u64, usize)> {
    range.map(|at| (at, at as usize)).collect()
}

const SLOTS: u64 = REPLY_ACK | CONFIGURE_MEM_SLOTS;

#[test]
fn only_differences_are_told() {
    for protocol in [SLOTS, CONFIGURE_MEM_SLOTS] {
        let (codes, outcome) = share(
            protocol,
            32,
            &[
                &numbered(0..12),
                &numbered(0..12),
                &numbered(2..13),
                &numbered(2..5),
                &numbered(2..12),
            ],
        );
        outcome.unwrap();
        let mut expected = vec![GET_MAX_MEM_SLOTS];
        expected.extend([ADD_MEM_REG; 12]);
        // 0 and 1 go, 12 comes.
        expected.extend([REM_MEM_REG, REM_MEM_REG, ADD_MEM_REG]);
        expected.extend([REM_MEM_REG; 8]);
        expected.extend([ADD_MEM_REG; 7]);
        assert_eq!(codes, expected);
    }
}

#[test]
fn the_first_few_go_at_once() {
    let (codes, outcome) = share(SLOTS, 32, &[&numbered(0..3), &numbered(0..10), &numbered(20..25)]);
    outcome.unwrap();
    let mut expected = vec![SET_MEM_TABLE, GET_MAX_MEM_SLOTS];
    expected.extend([ADD_MEM_REG; 7]);
    // Nothing stays.
    expected.push(SET_MEM_TABLE);
    assert_eq!(codes, expected);
}

#[test]
fn another_file_at_the_same_place_is_another_region() {
    let (codes, outcome) = share(SLOTS, 32, &[&[(0, 0), (1, 1)], &[(0, 0), (1, 2)]]);
    outcome.unwrap();
    assert_eq!(codes, [SET_MEM_TABLE, REM_MEM_REG, ADD_MEM_REG]);
}

#[test]
fn without_slots_there_is_a_table() {
    let (codes, outcome) = share(
        REPLY_ACK,
        0,
        &[&numbered(0..2), &numbered(0..8), &numbered(1..3), &numbered(0..9)],
    );
    assert_eq!(codes, [SET_MEM_TABLE; 3]);
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("9 regions") && error.contains("takes 8"), "{error}");
}

#[test]
fn a_back_end_says_how_many_it_takes() {
    let (codes, outcome) = share(SLOTS, 10, &[&numbered(0..10), &numbered(0..11)]);
    let mut expected = vec![GET_MAX_MEM_SLOTS];
    expected.extend([ADD_MEM_REG; 10]);
    assert_eq!(codes, expected);
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("11 regions") && error.contains("takes 10"), "{error}");
}
