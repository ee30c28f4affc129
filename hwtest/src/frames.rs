//! Frames to send, and whether they are right.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

/// A small capture that ships with the project.
const CAPTURE: &[u8] = include_bytes!("../../cli/data/demo.pcap");

/// A frame that is not IP, of any bytes.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xb5]].concat();
    frame.extend((14..len).map(|i| (i * 7 + seed * 13) as u8));
    frame
}

/// An IPv4 frame with TCP or UDP and right checksums.
pub fn ipv4(to: [u8; 6], from: [u8; 6], tcp: bool, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let transport_len = if tcp { 20 } else { 8 } + payload.len();
    let (source, destination) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let mut ip = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, if tcp { 6 } else { 17 }, 0, 0];
    ip.extend(source.octets());
    ip.extend(destination.octets());
    ip[2..4].copy_from_slice(&((20 + transport_len) as u16).to_be_bytes());
    let sum = checksum(0, &ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut l4 = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    if tcp {
        l4.extend([0, 0, 0, 1, 0, 0, 0, 9, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    } else {
        l4.extend((transport_len as u16).to_be_bytes());
        l4.extend([0, 0]);
    }
    l4.extend(payload);
    let sum = checksum(pseudo(&ip, transport_len), &l4);
    let at = if tcp { 16 } else { 6 };
    l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    [&to[..], &from[..], &[8, 0], &ip, &l4].concat()
}

fn pseudo(ip: &[u8], len: usize) -> u32 {
    let words = ip[12..20]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    words.sum::<u32>() + u32::from(ip[9]) + len as u32
}

/// The Internet checksum (RFC 1071), written once more.
fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut total = u64::from(start);
    for pair in bytes.chunks(2) {
        total += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while total >> 16 > 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// Whether both checksums of an IPv4 frame without options are right. One that is cut short has none that are.
pub fn checksums_are_right(frame: &[u8]) -> bool {
    let Some(ip) = frame.get(14..34) else { return false };
    let len = usize::from(u16::from_be_bytes([ip[2], ip[3]])).saturating_sub(20);
    let Some(l4) = frame.get(34..34 + len) else {
        return false;
    };
    checksum(0, ip) == 0 && checksum(pseudo(ip, len), l4) == 0
}

/// The frames of the capture, readdressed. The device pads what is short, and a tag would be taken for a VLAN's.
pub fn capture(to: [u8; 6], from: [u8; 6]) -> Result<Vec<Vec<u8>>> {
    let mut reader = pcap_file::pcap::PcapReader::new(CAPTURE)?;
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet() {
        let mut frame = packet?.data.into_owned();
        frame.resize(frame.len().max(60), 0);
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        if frame.len() <= 1514 && frame[12..14] != [0x81, 0] {
            frames.push(frame);
        }
    }
    ensure!(frames.len() > 100, "the capture has {} frames", frames.len());
    Ok(frames)
}
