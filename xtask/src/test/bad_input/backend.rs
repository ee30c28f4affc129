//! A vhost-user back-end that follows the protocol just far enough to misbehave at a chosen point.
//!
//! It is written against vhost-user.rst alone and shares nothing with the product.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// NET_MAC, NET_MRG_RXBUF, NET_STATUS, NET_CTRL_VQ, NET_MQ, RING_INDIRECT_DESC, RING_EVENT_IDX,
/// VHOST_USER_F_PROTOCOL_FEATURES, VERSION_1, IN_ORDER.
pub const FEATURES: u64 =
    1 << 5 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 35;

/// VHOST_USER_PROTOCOL_F_MQ, REPLY_ACK, STATUS.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 16;

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// How it misbehaves.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Closes the connection, and listens no more, when it has read so many messages.
    pub close_after: Option<usize>,
    /// Reads and never answers.
    pub silent: bool,
    /// Virtio features that it offers.
    pub features: u64,
    /// Queue pairs that it has.
    pub queues: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Behaviour {
            close_after: None,
            silent: false,
            features: FEATURES,
            queues: 8,
        }
    }
}

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    messages: AtomicUsize,
    enabled_after: AtomicUsize,
    trouble: Mutex<Option<String>>,
}

/// The back-end, in a thread.
pub struct FakeBackend {
    path: PathBuf,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl FakeBackend {
    /// Listens on `path` and serves one connection after the other.
    pub fn listen(path: &Path, behaviour: Behaviour) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
        listener.set_nonblocking(true)?;
        let seen = Arc::new(Seen::default());
        let thread = std::thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                while !seen.stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, _)) => {
                            let served = serve(stream, behaviour, &seen);
                            if let Err(e) = served {
                                *seen.trouble.lock().unwrap_or_else(|e| e.into_inner()) = Some(format!("{e:#}"));
                            }
                            if behaviour.close_after.is_some() {
                                return;
                            }
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
            }
        });
        Ok(FakeBackend {
            path: path.to_owned(),
            seen,
            thread: Some(thread),
        })
    }

    /// Waits until a ring was enabled, and says how many messages came before.
    pub fn steps_until_enabled(&self, limit: Duration) -> Result<usize> {
        let end = Instant::now() + limit;
        loop {
            match self.seen.enabled_after.load(Ordering::Relaxed) {
                0 if Instant::now() < end => crate::process::sleep(Duration::from_millis(5))?,
                0 => bail!(
                    "no ring was enabled; {} messages came",
                    self.seen.messages.load(Ordering::Relaxed)
                ),
                n => return Ok(n),
            }
        }
    }

    /// Ends it and removes its socket; an error if a message was malformed.
    pub fn finish(mut self) -> Result<()> {
        self.end();
        match self.seen.trouble.lock().unwrap_or_else(|e| e.into_inner()).take() {
            Some(trouble) => bail!("the front-end broke the protocol: {trouble}"),
            None => Ok(()),
        }
    }

    fn end(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for FakeBackend {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads exactly `buffer`, unless the connection or the test ends: then false.
fn read(stream: &mut UnixStream, buffer: &mut [u8], seen: &Seen) -> Result<bool> {
    let mut have = 0;
    while have < buffer.len() {
        if seen.stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match stream.read(&mut buffer[have..]) {
            Ok(0) if have == 0 => return Ok(false),
            Ok(0) => bail!("a message ends after {have} of {} bytes", buffer.len()),
            Ok(n) => have += n,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

fn serve(mut stream: UnixStream, behaviour: Behaviour, seen: &Seen) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut count = 0;
    let mut status = 0u64;
    loop {
        if behaviour.close_after == Some(count) {
            return Ok(());
        }
        let mut header = [0u8; 12];
        // Descriptors that come along are closed by the kernel, since nobody asks for them.
        if !read(&mut stream, &mut header, seen)? {
            return Ok(());
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8));
        if flags & 3 != VERSION || size > 4096 {
            bail!("request {request} with flags {flags:#x} and {size} bytes");
        }
        let mut payload = vec![0u8; size as usize];
        if !read(&mut stream, &mut payload, seen)? && size > 0 {
            return Ok(());
        }
        count += 1;
        seen.messages.fetch_add(1, Ordering::Relaxed);
        if request == SET_VRING_ENABLE {
            let _ = seen
                .enabled_after
                .compare_exchange(0, count, Ordering::Relaxed, Ordering::Relaxed);
        }
        if request == SET_STATUS {
            status = u64::from(payload.first().copied().unwrap_or(0));
        }
        if behaviour.silent || behaviour.close_after == Some(count) {
            continue;
        }
        let answer = match request {
            GET_FEATURES => Some(behaviour.features.to_le_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(PROTOCOL_FEATURES.to_le_bytes().to_vec()),
            GET_QUEUE_NUM => Some(behaviour.queues.to_le_bytes().to_vec()),
            GET_STATUS => Some(status.to_le_bytes().to_vec()),
            // The vring state: the index that was asked for, and a base of 0.
            GET_VRING_BASE => Some(payload.iter().copied().take(4).chain([0; 4]).collect()),
            _ if flags & NEED_REPLY != 0 => Some(0u64.to_le_bytes().to_vec()),
            _ => None,
        };
        if let Some(answer) = answer {
            let mut message = Vec::new();
            for word in [request, VERSION | REPLY, answer.len() as u32] {
                message.extend_from_slice(&word.to_le_bytes());
            }
            message.extend_from_slice(&answer);
            // The front-end may be gone, by right.
            if stream.write_all(&message).is_err() {
                return Ok(());
            }
        }
    }
}
