//! Frames with headers, made and judged by code that shares nothing with the product.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use usernic::{Burst, Packet};

use crate::process::check_interrupted;
use crate::test::wire::End;

pub const BROADCAST: [u8; 6] = [0xff; 6];

/// What ends a round: a frame for everybody that nothing else looks like.
const MARK: [u8; 2] = [0x88, 0xb7];

/// Up to this long for a round.
const LIMIT: Duration = Duration::from_secs(20);

/// The Internet checksum of bytes, with what was summed before.
fn fold(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An Ethernet header.
pub fn ether(to: [u8; 6], from: [u8; 6], kind: u16) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes()].concat()
}

/// A TCP or UDP frame over IPv4. Its checksums are right, or wrong (of UDP not 0, which would say that there is none).
pub fn ipv4(to: [u8; 6], destination: [u8; 4], protocol: u8, payload: &[u8], right: bool) -> Vec<u8> {
    let mut frame = ether(to, [2, 0, 0, 0, 9, 9], 0x0800);
    let head = if protocol == 17 { 8 } else { 20 };
    let total = (20 + head + payload.len()) as u16;
    let [high, low] = total.to_be_bytes();
    frame.extend([0x45, 0, high, low, 0, 7, 0, 0, 64, protocol, 0, 0, 198, 18, 0, 9]);
    frame.extend(destination);
    frame.extend([0x10, 0, 0x20, 0]);
    if protocol == 17 {
        frame.extend(((8 + payload.len()) as u16).to_be_bytes());
        frame.extend(if right { [0, 0] } else { [0xba, 0xad] });
    } else {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0x10, 0, 0, 0, 0, 0]);
    }
    frame.extend(payload);
    if right {
        let sum = !fold(&frame[14..34], 0);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        let at = 34 + if protocol == 17 { 6 } else { 16 };
        let sum = !fold(&frame[34..], pseudo(&frame));
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// The sum of the pseudo header.
fn pseudo(frame: &[u8]) -> u32 {
    u32::from(fold(&frame[26..34], u32::from(frame[23]) + (frame.len() - 34) as u32))
}

/// Whether both checksums of an IPv4 frame are right.
pub fn is_right(frame: &[u8]) -> bool {
    fold(&frame[14..34], 0) == 0xffff && fold(&frame[34..], pseudo(frame)) == 0xffff
}

/// Whether the IPv4 header's checksum is.
pub fn header_is_right(frame: &[u8]) -> bool {
    fold(&frame[14..34], 0) == 0xffff
}

/// A frame with a VLAN tag.
pub fn tagged(frame: &[u8], id: u16) -> Vec<u8> {
    [&frame[..12], &[0x81, 0], &id.to_be_bytes(), &frame[12..]].concat()
}

/// Sends one frame.
pub fn send(end: &mut End, frame: &[u8]) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut burst = Burst::new(1);
    loop {
        if burst.is_empty()
            && let Some(mut packet) = end.queues[0].packet()
        {
            packet.copy_from(frame)?;
            let _ = burst.push(packet);
        }
        if end.queues[0].tx(&mut burst) == 1 {
            return Ok(());
        }
        check_interrupted()?;
        ensure!(Instant::now() < deadline, "a frame cannot be sent");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Hands what comes to `each` until that says that it is enough.
pub fn receive(end: &mut End, mut each: impl FnMut(&Packet, Vec<u8>) -> bool) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let mut burst = Burst::new(32);
    let mut bytes = vec![0; 65_536];
    loop {
        let mut enough = false;
        end.queues[0].rx(&mut burst);
        for packet in burst.iter() {
            let len = packet.copy_to(&mut bytes);
            enough |= each(packet, bytes[..len].to_vec());
        }
        end.queues[0].free(&mut burst);
        if enough {
            return Ok(());
        }
        check_interrupted()?;
        ensure!(
            Instant::now() < deadline,
            "what was expected did not come within {LIMIT:?}"
        );
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Sends frames from `a`, and gives those that come out at `b`, in order.
pub fn through(a: &mut End, b: &mut End, frames: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    for frame in frames {
        send(a, frame)?;
    }
    let mut mark = ether(BROADCAST, [2, 0, 0, 0, 9, 9], u16::from_be_bytes(MARK));
    mark.resize(60, 0x5a);
    send(a, &mark)?;
    let mut came = Vec::new();
    receive(b, |_, frame| {
        let end = frame.len() == 60 && frame[12..14] == MARK;
        if !end {
            came.push(frame);
        }
        end
    })?;
    Ok(came)
}
