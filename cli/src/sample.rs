//! The capture that ships with the program: a made-up morning on a small network, built byte by byte from
//! [`crate::packets`], the same on every machine.
//!
//! Three hosts on one segment, addresses from the documentation ranges (RFC 5737, RFC 3849): ARP, ping of two
//! families, neighbour discovery, DNS over UDP, TCP connections with a transfer, UDP in sizes from 60 to 1514 bytes.
//! A test rebuilds it and compares it with `data/demo.pcap`.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;

use crate::capture_file::{Format, Output, Writer};
use crate::output;
use crate::packets::{self, ArpOp, BROADCAST, Mac, ethertype, protocol, tcp_flags};

/// The capture itself, as it is in the repository.
pub const DEMO_PCAP: &[u8] = include_bytes!("../data/demo.pcap");

/// A station of the made-up network.
#[derive(Clone, Copy)]
struct Host {
    mac: Mac,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

const fn host(n: u8) -> Host {
    Host {
        mac: [0x02, 0x00, 0x5e, 0x00, 0x53, n],
        v4: Ipv4Addr::new(192, 0, 2, n),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, n as u16),
    }
}

/// Frames with the time since the first, in microseconds.
struct Story {
    now: u64,
    ip_id: u16,
    random: u64,
    frames: Vec<(u64, Vec<u8>)>,
}

impl Story {
    /// SplitMix64, so that payloads do not compress to a pattern and are the same everywhere.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8))
            .flat_map(|_| self.random().to_le_bytes())
            .take(len)
            .collect()
    }

    fn put(&mut self, frame: Vec<u8>) {
        self.now += 20 + self.random() % 400;
        self.frames.push((self.now, frame));
    }

    /// One packet of `protocol` between two hosts, in the family of the addresses.
    fn ip(&mut self, from: Host, to: Host, six: bool, protocol: u8, payload: &[u8]) {
        let frame = if six {
            packets::ethernet(
                to.mac,
                from.mac,
                ethertype::IPV6,
                &packets::ipv6(from.v6, to.v6, protocol, 64, payload),
            )
        } else {
            self.ip_id = self.ip_id.wrapping_add(1);
            let packet = packets::ipv4(from.v4, to.v4, protocol, self.ip_id, payload);
            packets::ethernet(to.mac, from.mac, ethertype::IPV4, &packet)
        };
        self.put(frame);
    }

    fn resolve(&mut self, from: Host, to: Host) {
        let request = packets::arp(ArpOp::Request, (from.mac, from.v4), ([0; 6], to.v4));
        self.put(packets::ethernet(BROADCAST, from.mac, ethertype::ARP, &request));
        let reply = packets::arp(ArpOp::Reply, (to.mac, to.v4), (from.mac, from.v4));
        self.put(packets::ethernet(from.mac, to.mac, ethertype::ARP, &reply));
    }

    fn resolve_six(&mut self, from: Host, to: Host) {
        self.put(packets::neighbour_solicitation(from.mac, from.v6, to.v6));
        self.put(packets::neighbour_advertisement(to.mac, to.v6, (from.mac, from.v6)));
    }

    fn ping(&mut self, from: Host, to: Host, six: bool, count: u16, size: usize) {
        for seq in 1..=count {
            let payload = self.bytes(size);
            if six {
                let ask = packets::icmpv6_echo(from.v6, to.v6, 128, 0x1234, seq, &payload);
                self.ip(from, to, true, protocol::ICMPV6, &ask);
                let answer = packets::icmpv6_echo(to.v6, from.v6, 129, 0x1234, seq, &payload);
                self.ip(to, from, true, protocol::ICMPV6, &answer);
            } else {
                self.ip(
                    from,
                    to,
                    false,
                    protocol::ICMP,
                    &packets::icmp_echo(8, 0x1234, seq, &payload),
                );
                self.ip(
                    to,
                    from,
                    false,
                    protocol::ICMP,
                    &packets::icmp_echo(0, 0x1234, seq, &payload),
                );
            }
        }
    }

    fn udp(&mut self, from: (Host, u16), to: (Host, u16), six: bool, payload: &[u8]) {
        let (a, b) = (address(from.0, six), address(to.0, six));
        self.ip(
            from.0,
            to.0,
            six,
            protocol::UDP,
            &packets::udp((a, from.1), (b, to.1), payload),
        );
    }

    /// A question for the address of `name` and its answer (RFC 1035).
    fn dns(&mut self, client: Host, server: Host, six: bool, name: &str, answer: Host) {
        let id = self.random() as u16;
        let port = 49152 + (self.random() % 16384) as u16;
        let kind: [u8; 2] = if six { [0, 28] } else { [0, 1] };
        let mut question = Vec::new();
        for label in name.split('.') {
            question.push(label.len() as u8);
            question.extend_from_slice(label.as_bytes());
        }
        question.push(0);
        question.extend_from_slice(&[kind[0], kind[1], 0, 1]);
        let message = |flags: [u8; 2], answers: u8| {
            let mut m = id.to_be_bytes().to_vec();
            m.extend_from_slice(&flags);
            m.extend_from_slice(&[0, 1, 0, answers, 0, 0, 0, 0]);
            m.extend_from_slice(&question);
            m
        };
        let ask = message([0x01, 0x00], 0);
        let mut reply = message([0x81, 0x80], 1);
        reply.extend_from_slice(&[0xc0, 0x0c, kind[0], kind[1], 0, 1, 0, 0, 0x0e, 0x10]);
        match address(answer, six) {
            IpAddr::V4(ip) => {
                reply.extend_from_slice(&[0, 4]);
                reply.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                reply.extend_from_slice(&[0, 16]);
                reply.extend_from_slice(&ip.octets());
            }
        }
        self.udp((client, port), (server, 53), six, &ask);
        self.udp((server, 53), (client, port), six, &reply);
    }

    /// A TCP connection: handshake, a request, `size` bytes of answer, the end of both directions.
    fn transfer(&mut self, client: Host, server: Host, six: bool, size: usize) {
        let port = 49152 + (self.random() % 16384) as u16;
        let (a, b) = ((address(client, six), port), (address(server, six), 80));
        let (mut c, mut s) = (self.random() as u32, self.random() as u32);
        let mut say = |story: &mut Story, up: bool, flags: u8, payload: &[u8]| {
            let (from, to, seq, ack) = if up { (a, b, c, s) } else { (b, a, s, c) };
            let ack = if flags & tcp_flags::ACK == 0 { 0 } else { ack };
            let segment = packets::tcp(from, to, seq, ack, flags, payload);
            let (from, to) = if up { (client, server) } else { (server, client) };
            story.ip(from, to, six, protocol::TCP, &segment);
            let taken = payload.len() as u32 + u32::from(flags & (tcp_flags::SYN | tcp_flags::FIN) != 0);
            let side = if up { &mut c } else { &mut s };
            *side = side.wrapping_add(taken);
        };
        use tcp_flags::{ACK, FIN, PSH, SYN};
        say(self, true, SYN, &[]);
        say(self, false, SYN | ACK, &[]);
        say(self, true, ACK, &[]);
        say(
            self,
            true,
            PSH | ACK,
            b"GET /file HTTP/1.1\r\nHost: www.example.org\r\nConnection: close\r\n\r\n",
        );
        say(self, false, ACK, &[]);
        let mut body = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n").into_bytes();
        body.extend(self.bytes(size));
        let segment = if six { 1440 } else { 1460 };
        for (i, chunk) in body.chunks(segment).enumerate() {
            say(self, false, if chunk.len() < segment { PSH | ACK } else { ACK }, chunk);
            if i % 2 == 1 {
                say(self, true, ACK, &[]);
            }
        }
        say(self, false, FIN | ACK, &[]);
        say(self, true, FIN | ACK, &[]);
        say(self, false, ACK, &[]);
    }
}

fn address(host: Host, six: bool) -> IpAddr {
    if six { host.v6.into() } else { host.v4.into() }
}

/// The frames, each with its time in microseconds since the first.
fn story() -> Vec<(u64, Vec<u8>)> {
    let (alice, bob, router) = (host(10), host(20), host(1));
    let mut s = Story {
        now: 0,
        ip_id: 0x1000,
        random: 0x75_73_65_72_6e_69_63,
        frames: Vec::new(),
    };
    for (a, b) in [(alice, router), (alice, bob), (bob, router)] {
        s.resolve(a, b);
        s.resolve_six(a, b);
    }
    s.ping(alice, bob, false, 8, 56);
    s.ping(alice, bob, true, 8, 56);
    s.ping(bob, router, false, 4, 1472);
    s.ping(bob, router, true, 3, 1452);
    for (i, name) in [
        "www.example.org",
        "mail.example.net",
        "a.very.long.name.of.a.host.example.com",
    ]
    .iter()
    .enumerate()
    {
        s.dns(alice, router, i % 2 == 1, name, bob);
        s.dns(bob, router, i % 2 == 0, name, alice);
    }
    s.transfer(alice, bob, false, 20_000);
    s.transfer(bob, alice, true, 20_000);
    // A conversation in datagrams: each length once on the way from the shortest frame to the longest.
    for (i, len) in (60..=1514).step_by(23).enumerate() {
        let six = i % 4 == 3 && len > 62;
        let payload = s.bytes(len - if six { 62 } else { 42 });
        let (from, to) = if i % 2 == 0 { (alice, bob) } else { (bob, alice) };
        s.udp((from, 5004), (to, 5004), six, &payload);
    }
    s.transfer(alice, router, true, 3_000);
    for len in [60, 1514, 61, 1513, 64, 512, 1514, 1514] {
        let payload = s.bytes(len - 42);
        s.udp((bob, 4789), (alice, 4789), false, &payload);
    }
    // Queries and answers until the story has its 300 frames.
    while s.frames.len() < 300 {
        let six = s.random() & 1 == 1;
        s.dns(alice, router, six, "www.example.org", bob);
    }
    s.frames
}

/// Lets a [`Writer`] fill memory that outlives it.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Output for Shared {}

/// Builds the capture file.
pub fn build() -> std::io::Result<Vec<u8>> {
    let out = Shared::default();
    let mut writer = Writer::new(Box::new(out.clone()), Format::Pcap);
    // 1 January 2026, 08:00 UTC.
    let start = Duration::from_secs(1_767_254_400);
    for (at, frame) in story() {
        writer.write(start + Duration::from_micros(at), &frame)?;
    }
    writer.flush()?;
    drop(writer);
    let bytes = std::mem::take(&mut *out.0.lock().unwrap_or_else(|e| e.into_inner()));
    Ok(bytes)
}

/// Writes the capture to `path`, `-` being the standard output: how `data/demo.pcap` is made.
pub fn write(path: &Path) -> anyhow::Result<()> {
    let bytes = build()?;
    match path.to_str() {
        Some("-") => output::stdout_file().and_then(|mut out| out.write_all(&bytes).map_err(output::lost)),
        _ => std::fs::write(path, bytes),
    }
    .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture_file::Capture;

    #[test]
    fn the_repository_holds_what_this_builds() {
        assert!(
            build().unwrap() == DEMO_PCAP,
            "run `usernic sample cli/data/demo.pcap` and commit the file"
        );
        assert!(DEMO_PCAP.len() < 150_000);
    }

    #[test]
    fn it_is_what_it_says() {
        let capture = Capture::from_bytes(build().unwrap(), false).unwrap();
        assert!((300..320).contains(&capture.len()), "{}", capture.len());
        assert_eq!(capture.longest().1, 1514);
        assert_eq!(capture.frames().map(<[u8]>::len).min(), Some(60));
        let (mut arp, mut right) = (0, 0);
        for frame in capture.frames() {
            match packets::checksums_hold(frame) {
                Some(good) => {
                    assert!(good, "{frame:02x?}");
                    right += 1;
                }
                None => {
                    assert_eq!(packets::ethertype_of(frame), Some(ethertype::ARP));
                    arp += 1;
                }
            }
        }
        assert_eq!((arp, arp + right), (6, capture.len()));
    }
}
