//! One end of a vhost-user socket, by hand: bytes and descriptors, nothing checked.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// A message that came.
pub struct Message {
    pub code: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload's first word.
    pub fn word(&self) -> u64 {
        self.payload.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    pub fn needs_reply(&self) -> bool {
        self.flags & 8 != 0
    }
}

pub struct Raw(pub UnixStream);

impl Raw {
    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Raw(stream)
    }

    /// The next message; `None`: the other side closed.
    pub fn read(&self) -> Option<Message> {
        let mut fds = Vec::new();
        let header = self.exactly(12, &mut fds)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let payload = self.exactly(word(8) as usize, &mut fds)?;
        Some(Message {
            code: word(0),
            flags: word(4),
            payload,
            fds,
        })
    }

    fn exactly(&self, len: usize, fds: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut have = 0;
        while have < len {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes[have..])],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            match got {
                Ok(message) if message.bytes > 0 => have += message.bytes,
                Err(rustix::io::Errno::AGAIN) => panic!("the other side neither answers nor closes"),
                _ => return None,
            }
        }
        Some(bytes)
    }

    /// Sends bytes, descriptors with them. `false`: the other side closed.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        matches!(sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL), Ok(n) if n == bytes.len())
    }

    /// Sends a request.
    pub fn request(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(&encode(code, 1 | flags, payload), fds)
    }

    /// Sends a reply.
    pub fn reply(&self, code: u32, payload: &[u8]) -> bool {
        self.send(&encode(code, 5, payload), &[])
    }

    /// Waits until the other side closes.
    pub fn closed(&self) {
        while self.read().is_some() {}
    }
}

pub fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [code, flags, payload.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A ring and a number, as one word.
pub fn state(index: u32, num: u32) -> Vec<u8> {
    words(&[u64::from(index) | u64::from(num) << 32])
}

/// An eventfd.
pub fn event() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

/// A memfd of `len` bytes.
pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// Where the front-end of [`set_up`] has its memory, in its own addresses.
pub const USER: u64 = 0x7000_0000_0000;
/// And in those of descriptors.
pub const GUEST: u64 = 0x10_0000;

/// What a front-end says to start one pair of rings; each test changes one thing of it.
#[derive(Clone)]
pub struct Setup {
    pub features: u64,
    pub size: u32,
    pub base: u32,
    /// Of descriptor table, available and used ring: where they are in the file.
    pub at: [u64; 3],
    /// Guest address, size, user address, offset.
    pub regions: Vec<[u64; 4]>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            features: 1 << 32 | 1 << 30,
            size: 16,
            base: 0,
            at: [0, 0x1000, 0x2000],
            regions: vec![[GUEST, 0x10_0000, USER, 0]],
        }
    }
}

impl Raw {
    /// Starts a pair of rings over `file`. Whether all was taken so far as can be seen without waiting.
    pub fn set_up(&self, setup: &Setup, file: BorrowedFd<'_>, kick: BorrowedFd<'_>, call: BorrowedFd<'_>) -> bool {
        let files = vec![file; setup.regions.len()];
        let mut table = words(&[setup.regions.len() as u64]);
        table.extend(words(setup.regions.as_flattened()));
        let mut ok = self.request(3, 0, &[], &[])
            && self.request(16, 0, &words(&[1 | 8]), &[])
            && self.request(2, 0, &words(&[setup.features]), &[])
            && self.request(5, 0, &table, &files);
        for index in 0..2 {
            // The second ring is 64 KiB after the first.
            let [desc, avail, used] = setup.at.map(|at| (USER + at).wrapping_add(u64::from(index) * 0x1_0000));
            ok = ok
                && self.request(8, 0, &state(index, setup.size), &[])
                && self.request(10, 0, &state(index, setup.base), &[])
                && self.request(9, 0, &words(&[index.into(), desc, used, avail, 0]), &[])
                && self.request(13, 0, &words(&[index.into()]), &[call])
                && self.request(12, 0, &words(&[index.into()]), &[kick])
                && self.request(18, 0, &state(index, 1), &[]);
        }
        ok
    }

    /// Starts rings that are right.
    pub fn set_up_well(&self, file: &OwnedFd) -> (OwnedFd, OwnedFd) {
        let (kick, call) = (event(), event());
        assert!(self.set_up(&Setup::default(), file.as_fd(), kick.as_fd(), call.as_fd()));
        (kick, call)
    }
}
