//! What a case has: the function, the peer, and whoever can pull the cable.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use usernic::{Burst, Packet, Port, Queue};

use crate::LIMIT;
use crate::peer::Peer;

/// Frames that are under way at a time: no ring on the way is shorter.
const WINDOW: usize = 32;

/// What a case has.
pub struct World {
    /// The function's PCI address.
    pub vf: String,
    /// What all port specs have more, with a comma before it; or nothing.
    pub keys: String,
    /// The kernel's interface on the other side.
    pub peer: Option<Peer>,
    /// The same in VLAN 100.
    pub tagged: Option<Peer>,
}

impl World {
    /// Opens a port, waits for its link, and takes its first queue.
    pub fn open(&self, keys: &str) -> Result<(Port, Queue)> {
        let spec = format!("vf,pci={}{}{keys}", self.vf, self.keys);
        let port = Port::open(&spec).with_context(|| spec.clone())?;
        ensure!(port.wait_link(LIMIT), "{spec}: no link within {LIMIT:?}");
        let queue = port.queue(0)?;
        Ok((port, queue))
    }

    /// The peer: cases that need none do not ask.
    pub fn peer(&self) -> Result<&Peer> {
        self.peer.as_ref().context("this case needs --peer")
    }

    /// Has whoever runs this do something to the hardware: a line of standard output asks. Nobody answers: the case looks
    /// for the effect.
    pub fn ask(&self, what: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "@{what}")?;
        Ok(out.flush()?)
    }
}

/// Waits until something is so.
pub fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !done()? {
        ensure!(Instant::now() < end, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Sends packets of a burst, all of them.
pub fn flush(queue: &mut Queue, burst: &mut Burst) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !burst.is_empty() {
        queue.tx(burst);
        ensure!(Instant::now() < end, "the function takes no frame: {:?}", queue.stats());
    }
    Ok(())
}

/// Sends frames, at most as many as a burst has room for.
pub fn send(queue: &mut Queue, frames: &[Vec<u8>]) -> Result<()> {
    let mut burst = Burst::new(frames.len().max(1));
    let end = Instant::now() + LIMIT;
    while burst.len() < frames.len() {
        let missing = frames.len() - burst.len();
        if queue.alloc(&mut burst, missing) == 0 {
            queue.reclaim();
        }
        ensure!(Instant::now() < end, "buffers do not come back: {:?}", queue.stats());
    }
    for (packet, frame) in burst.iter_mut().zip(frames) {
        packet.copy_from(frame)?;
    }
    flush(queue, &mut burst)
}

/// Receives so many frames from this source.
pub fn receive(queue: &mut Queue, from: [u8; 6], count: usize) -> Result<Vec<Packet>> {
    let end = Instant::now() + LIMIT;
    let mut received = Vec::new();
    let mut burst = Burst::new(32);
    while received.len() < count {
        if queue.rx(&mut burst) == 0 {
            std::thread::yield_now();
        }
        received.extend(burst.drain().filter(|packet| {
            let mut source = [0; 6];
            packet.read_at(6, &mut source).is_ok() && source == from
        }));
        ensure!(
            Instant::now() < end,
            "{} frames of {count} came: {:?}",
            received.len(),
            queue.stats()
        );
    }
    Ok(received)
}

/// The peer's next frame from this source.
pub fn heard(peer: &Peer, from: [u8; 6]) -> Result<Vec<u8>> {
    let mut frame = None;
    until("a frame at the peer", || {
        frame = peer.receive(from)?;
        Ok(frame.is_some())
    })?;
    frame.context("no frame")
}

/// Sends frames from the port, and compares what the peer gets. The kernel hands frames of different flows on in any order,
/// where its device has several queues.
pub fn to_peer(queue: &mut Queue, peer: &Peer, from: [u8; 6], frames: &[Vec<u8>]) -> Result<()> {
    for (at, window) in frames.chunks(WINDOW).enumerate() {
        send(queue, window)?;
        let mut missing: Vec<_> = window.iter().enumerate().collect();
        while let Some((first, _)) = missing.first() {
            let got = heard(peer, from).with_context(|| format!("frame {}", at * WINDOW + first))?;
            match missing.iter().position(|(_, frame)| **frame == got) {
                Some(found) => drop(missing.remove(found)),
                None => same(at * WINDOW + first, &window[*first], &got)?,
            }
        }
    }
    Ok(())
}

/// Sends frames from the peer, and compares what the port gets.
pub fn from_peer(queue: &mut Queue, peer: &Peer, frames: &[Vec<u8>]) -> Result<()> {
    for (at, window) in frames.chunks(WINDOW).enumerate() {
        for frame in window {
            peer.send(frame)?;
        }
        let got = receive(queue, peer.mac(), window.len())?;
        for (i, (frame, packet)) in window.iter().zip(got).enumerate() {
            same(at * WINDOW + i, frame, &packet.into_private())?;
        }
    }
    Ok(())
}

fn same(number: usize, sent: &[u8], got: &[u8]) -> Result<()> {
    let differs = sent.iter().zip(got).position(|(a, b)| a != b);
    ensure!(
        sent == got,
        "frame {number}: {} bytes came of {}, the first that differs is {differs:?}",
        got.len(),
        sent.len()
    );
    Ok(())
}
