//! `usernic ping`: is a host there, and how far away? ARP or neighbour discovery, then echoes.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use hdrhistogram::Histogram;
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

use crate::common::{self, Ended, PollArgs, Summary, Usage};
use crate::packets::{self, ArpOp, BROADCAST, ETHER_LEN, IPV4_LEN, IPV6_LEN, Mac, ethertype, protocol};
use crate::ports::{self, Opened};
use crate::responder::{Responder, is_host, is_station};
use crate::result;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The port, as in virtio-user,path=/run/vhost.sock
    #[arg(long, value_name = "SPEC")]
    port: PortSpec,
    /// Our address
    #[arg(long, value_name = "ADDRESS")]
    from: IpAddr,
    /// The host to ask, on the same segment
    #[arg(long, value_name = "ADDRESS")]
    to: IpAddr,
    /// Stop after this many echoes; without it, at Ctrl-C
    #[arg(short, long, value_name = "N", value_parser = common::count)]
    count: Option<u64>,
    /// Seconds between two echoes
    #[arg(short, long, value_name = "S", default_value = "1", value_parser = common::seconds)]
    interval: Duration,
    /// Bytes of data in an echo
    #[arg(short, long, value_name = "BYTES", default_value = "56", value_parser = clap::value_parser!(u16).range(0..=9000))]
    size: u16,
    /// Seconds to wait for an answer
    #[arg(long, value_name = "S", default_value = "1", value_parser = common::seconds)]
    timeout: Duration,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Serialize)]
struct Totals {
    from: IpAddr,
    to: IpAddr,
    /// Unless the host never told it.
    to_mac: Option<String>,
    sent: u64,
    received: u64,
    min_us: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

/// Our end of the segment.
struct Host<'a> {
    queues: Vec<Queue>,
    burst: Burst,
    frame: Vec<u8>,
    mac: Mac,
    from: IpAddr,
    to: IpAddr,
    responder: Responder,
    stop: &'a AtomicBool,
}

/// How long answers to others may wait for room: they are asked for again.
const ANSWER: Duration = Duration::from_millis(10);

impl Host<'_> {
    fn is_over(&self, deadline: Instant) -> bool {
        Instant::now() >= deadline || self.stop.load(Ordering::Relaxed)
    }

    /// Whether the other side took the frame until the deadline. A link that is down loses it, as a wire would.
    fn send(&mut self, frame: &[u8], deadline: Instant) -> bool {
        let mut burst = Burst::new(1);
        loop {
            let queue = &mut self.queues[0];
            if burst.is_empty() {
                let packet = queue
                    .packet()
                    .and_then(|mut packet| packet.copy_from(frame).ok().map(|()| packet));
                match packet {
                    // There is room for one.
                    Some(packet) => drop(burst.push(packet)),
                    None => queue.reclaim(),
                }
            }
            let some = !burst.is_empty();
            queue.tx(&mut burst);
            if some && burst.is_empty() {
                return true;
            }
            if self.is_over(deadline) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Hands received frames to `wanted` until it finds what it wants, answering questions to us on the way.
    fn receive<T>(
        &mut self,
        deadline: Instant,
        mut wanted: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<(T, Instant)>> {
        loop {
            let mut found = None;
            let mut answers = Vec::new();
            for queue in &mut self.queues {
                queue.rx(&mut self.burst);
                for packet in self.burst.iter() {
                    let len = ports::copy(packet, &mut self.frame);
                    if found.is_none() {
                        found = wanted(&self.frame[..len]).map(|t| (t, Instant::now()));
                    }
                    if let Some(len) = self.responder.answer(&mut self.frame, len) {
                        answers.push(self.frame[..len].to_vec());
                    }
                }
                queue.free(&mut self.burst);
            }
            for answer in answers {
                self.send(&answer, Instant::now() + ANSWER);
            }
            if found.is_some() || self.is_over(deadline) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut all: Vec<_> = self.queues.iter_mut().collect();
            ports::wait_any(&mut all, left.min(Duration::from_millis(20)))?;
        }
    }

    /// Who has the address of the host that we ask?
    fn question(&self) -> Vec<u8> {
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let request = packets::arp(ArpOp::Request, (self.mac, from), ([0; 6], to));
                packets::ethernet(BROADCAST, self.mac, ethertype::ARP, &request)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => packets::neighbour_solicitation(self.mac, from, to),
            // `run` refuses addresses of two families.
            _ => Vec::new(),
        }
    }

    fn resolve(&mut self) -> Result<Mac> {
        let (mac, from, to) = (self.mac, self.from, self.to);
        for _ in 0..3 {
            let deadline = Instant::now() + Duration::from_secs(1);
            let question = self.question();
            self.send(&question, deadline);
            if let Some((mac, _)) = self.receive(deadline, |frame| resolved(frame, (mac, from), to))? {
                return Ok(mac);
            }
            if self.stop.load(Ordering::Relaxed) {
                bail!("ended by a signal before {to} told its Ethernet address");
            }
        }
        bail!("{to} does not tell its Ethernet address: three questions, no answer");
    }
}

/// The sender's Ethernet address in an answer to our question "who has `to`?".
fn resolved(frame: &[u8], us: (Mac, IpAddr), to: IpAddr) -> Option<Mac> {
    let mac = match (us.1, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let packet = frame.get(ETHER_LEN..ETHER_LEN + 28)?;
            let ours = packets::ethertype_of(frame)? == ethertype::ARP
                && frame[..6] == us.0
                && packet[..8] == [0, 1, 8, 0, 6, 4, 0, 2]
                && packet[14..18] == to.octets()
                && packet[18..24] == us.0
                && packet[24..28] == from.octets();
            ours.then(|| packet[8..14].try_into().ok())?
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // A neighbour advertisement: type, code, checksum, flags, target, options. One to a group is no answer to us.
            let message = frame.get(ETHER_LEN + IPV6_LEN..)?;
            let ours = packets::checksums_hold(frame)?
                && packets::ethertype_of(frame)? == ethertype::IPV6
                && frame[..6] == us.0
                && frame[38..54] == from.octets()
                && frame[ETHER_LEN + 6] == protocol::ICMPV6
                && frame[ETHER_LEN + 7] == 255
                && *message.get(..2)? == [136, 0]
                && *message.get(8..24)? == to.octets();
            // The option with the address may be missing: then the frame's sender has it.
            let option = message.get(24..32).filter(|o| o[..2] == [2, 1]).map(|o| &o[2..8]);
            ours.then(|| option.or(frame.get(6..12))?.try_into().ok())?
        }
        _ => None,
    };
    mac.filter(|mac| is_station(*mac))
}

/// An echo of ours.
struct Echo<'a> {
    from: (Mac, IpAddr),
    to: IpAddr,
    id: u16,
    seq: u16,
    data: &'a [u8],
}

/// The length of the ICMP message in `frame`, if it is the answer to this echo: from that host, to us, with our data.
fn echoed(frame: &[u8], echo: &Echo<'_>) -> Option<usize> {
    if !packets::checksums_hold(frame)? || frame[..6] != echo.from.0 {
        return None;
    }
    let packet = &frame[ETHER_LEN..];
    let (message, reply, source, target, next) = match packets::ethertype_of(frame)? {
        ethertype::IPV4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let target: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff;
            if packet[0] >> 4 != 4 || header < IPV4_LEN || fragment != 0 {
                return None;
            }
            let message = packet.get(header..total)?;
            (
                message,
                0,
                IpAddr::from(source),
                IpAddr::from(target),
                (packet[9], protocol::ICMP),
            )
        }
        _ => {
            let len = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let target: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let message = packet.get(IPV6_LEN..IPV6_LEN + len)?;
            (
                message,
                129,
                IpAddr::from(source),
                IpAddr::from(target),
                (packet[6], protocol::ICMPV6),
            )
        }
    };
    let ours = next.0 == next.1
        && (source, target) == (echo.to, echo.from.1)
        && message.get(..2)? == [reply, 0]
        && message.get(4..6)? == echo.id.to_be_bytes()
        && message.get(6..8)? == echo.seq.to_be_bytes()
        && message.get(8..)? == echo.data;
    ours.then_some(message.len())
}

/// What was found out so far.
struct Found {
    to_mac: Option<Mac>,
    sent: u64,
    received: u64,
    rtts: Histogram<u64>,
}

/// Pings until the count or a signal; fails when nothing answered.
pub fn run(args: Args, json: bool) -> Result<()> {
    if args.from.is_ipv4() != args.to.is_ipv4() {
        return Err(Usage(format!(
            "--from {} --to {}: both addresses must be of one family",
            args.from, args.to
        ))
        .into());
    }
    for (argument, ip) in [("--from", args.from), ("--to", args.to)] {
        if !is_host(ip) {
            return Err(Usage(format!("{argument} {ip}: that is not the address of one host")).into());
        }
    }
    if args.count == Some(0) {
        return Err(Usage("--count 0: nothing would be asked".into()).into());
    }
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    let confined = args.poll.confine([&args.port], None);
    let mut opened = args.poll.open(std::slice::from_ref(&args.port), 0, &stop)?;
    let Opened { port, queues } = opened.remove(0);
    let _control = args.poll.serve(&[("0", &port)], confined)?;
    let headers = if args.to.is_ipv4() { 28 } else { 48 };
    if usize::from(args.size) + headers > usize::from(port.mtu()) {
        bail!(
            "--size {}: with {headers} bytes of headers that is more than the port's mtu={}",
            args.size,
            port.mtu()
        );
    }
    let mac = port.mac();
    let mut host = Host {
        queues,
        burst: Burst::new(64),
        frame: vec![0; 65_536],
        mac,
        from: args.from,
        to: args.to,
        responder: Responder::new(mac, &[args.from]),
        stop: &stop,
    };
    let mut found = Found {
        to_mac: None,
        sent: 0,
        received: 0,
        rtts: Histogram::new_with_bounds(1, 3_600_000_000_000, 3)?,
    };
    let start = Instant::now();
    let mut outcome = ping(&args, json, &port, &mut host, &mut found);
    let Found {
        to_mac,
        sent,
        received,
        rtts,
    } = found;
    if received == 0 && matches!(outcome, Ok(Ended::Count)) {
        outcome = Err(anyhow!("{} answered none of {sent} echoes", args.to));
    }
    let us = |ns: u64| ns as f64 / 1e3;
    let totals = Totals {
        from: args.from,
        to: args.to,
        to_mac: to_mac.map(packets::format_mac),
        sent,
        received,
        min_us: us(if rtts.is_empty() { 0 } else { rtts.min() }),
        p50_us: us(rtts.value_at_quantile(0.5)),
        p99_us: us(rtts.value_at_quantile(0.99)),
        max_us: us(rtts.max()),
    };
    let line = format!(
        "{sent} echoes, {received} answers, rtt min/p50/p99/max = {:.1}/{:.1}/{:.1}/{:.1} us,",
        totals.min_us, totals.p50_us, totals.p99_us, totals.max_us
    );
    let seconds = start.elapsed().as_secs_f64();
    let stats = vec![port.stats()];
    Summary::new("usernic.ping/1", &outcome, seconds, stats, totals).print(json, &line, outcome)
}

fn ping(args: &Args, json: bool, port: &Port, host: &mut Host<'_>, found: &mut Found) -> Result<Ended> {
    let mut to_mac = host.resolve()?;
    found.to_mac = Some(to_mac);
    if !json {
        result!(
            "PING {} ({}) {} bytes of data.",
            args.to,
            packets::format_mac(to_mac),
            args.size
        )?;
    }
    let us = (host.mac, args.from);
    let id = std::process::id() as u16;
    let data: Vec<u8> = (0..args.size).map(|i| i as u8).collect();
    let (mut seq, mut lost) = (0u16, false);
    loop {
        if args.count.is_some_and(|c| found.sent >= c) {
            return Ok(Ended::Count);
        }
        if host.stop.load(Ordering::Relaxed) {
            return Ok(Ended::Signal);
        }
        seq = seq.wrapping_add(1);
        let begin = Instant::now();
        let deadline = begin + args.timeout;
        if lost {
            // Perhaps another machine has the address now.
            let question = host.question();
            host.send(&question, deadline);
        }
        let frame = echo_frame(us, (to_mac, args.to), id, seq, &data);
        let sent_at = Instant::now();
        host.send(&frame, deadline);
        found.sent += 1;
        let echo = Echo {
            from: us,
            to: args.to,
            id,
            seq,
            data: &data,
        };
        let answer = host.receive(deadline, |frame| {
            if let Some(mac) = resolved(frame, us, args.to).filter(|_| lost) {
                to_mac = mac;
            }
            echoed(frame, &echo)
        })?;
        found.to_mac = Some(to_mac);
        lost = answer.is_none();
        match answer {
            Some((len, at)) => {
                found.received += 1;
                let rtt = at - sent_at;
                found.rtts.saturating_record(rtt.as_nanos() as u64);
                if !json {
                    let time = rtt.as_secs_f64() * 1e6;
                    result!("{len} bytes from {}: seq={seq} time={time:.1} us", args.to)?;
                }
            }
            None if host.stop.load(Ordering::Relaxed) => {}
            None if !json => {
                let down = if port.link().up { "" } else { " (the link is down)" };
                result!("no answer to seq={seq} within {} s{down}", args.timeout.as_secs_f64())?;
            }
            None => {}
        }
        let more = args.count.is_none_or(|c| found.sent < c);
        if more {
            host.receive(begin + args.interval, |_| None::<()>)?;
        }
    }
}

fn echo_frame(from: (Mac, IpAddr), to: (Mac, IpAddr), id: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let (kind, packet) = match (from.1, to.1) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let echo = packets::icmpv6_echo(src, dst, 128, id, seq, payload);
            (ethertype::IPV6, packets::ipv6(src, dst, protocol::ICMPV6, 64, &echo))
        }
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let echo = packets::icmp_echo(8, id, seq, payload);
            (ethertype::IPV4, packets::ipv4(src, dst, protocol::ICMP, seq, &echo))
        }
        // `run` refuses addresses of two families.
        _ => return Vec::new(),
    };
    packets::ethernet(to.0, from.0, kind, &packet)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our questions, answered by our responder, are understood: both families.
    #[test]
    fn questions_and_answers_meet() {
        let (me, you) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        for (from, to) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let host = Responder::new(you, &[to]);
            let mut room = vec![0; 2048];
            let mut ask = |question: &[u8]| {
                room[..question.len()].copy_from_slice(question);
                let len = host.answer(&mut room, question.len()).expect("an answer");
                room[..len].to_vec()
            };
            let question = match (from, to) {
                (IpAddr::V4(f), IpAddr::V4(t)) => packets::ethernet(
                    BROADCAST,
                    me,
                    ethertype::ARP,
                    &packets::arp(ArpOp::Request, (me, f), ([0; 6], t)),
                ),
                (IpAddr::V6(f), IpAddr::V6(t)) => packets::neighbour_solicitation(me, f, t),
                _ => unreachable!(),
            };
            let answer = ask(&question);
            assert_eq!(resolved(&answer, (me, from), to), Some(you));
            assert_eq!(resolved(&answer, (me, from), from), None);
            assert_eq!(resolved(&answer, (you, from), to), None, "to another station");
            assert_eq!(resolved(&answer, (me, to), to), None, "to another address");
            assert_eq!(resolved(&question, (me, from), to), None);
            let data = b"twelve bytes";
            let echo = |seq, id| Echo {
                from: (me, from),
                to,
                id,
                seq,
                data,
            };
            let answer = ask(&echo_frame((me, from), (you, to), 77, 3, data));
            assert_eq!(echoed(&answer, &echo(3, 77)), Some(20));
            assert_eq!(echoed(&answer, &echo(3, 78)), None, "another's id");
            assert_eq!(echoed(&answer, &echo(4, 77)), None, "an earlier echo");
            let other = "192.0.2.9".parse().unwrap();
            assert_eq!(
                echoed(
                    &answer,
                    &Echo {
                        to: other,
                        ..echo(3, 77)
                    }
                ),
                None,
                "another host"
            );
            assert_eq!(
                echoed(
                    &answer,
                    &Echo {
                        from: (me, other),
                        ..echo(3, 77)
                    }
                ),
                None,
                "to another address"
            );
            assert_eq!(
                echoed(
                    &answer,
                    &Echo {
                        from: (you, from),
                        ..echo(3, 77)
                    }
                ),
                None,
                "to another station"
            );
            assert_eq!(
                echoed(
                    &answer,
                    &Echo {
                        data: b"twelve bites",
                        ..echo(3, 77)
                    }
                ),
                None,
                "other data"
            );
            let mut wrong = answer.clone();
            *wrong.last_mut().unwrap() ^= 1;
            // Of IPv4 the last byte is padding.
            if to.is_ipv6() {
                assert_eq!(echoed(&wrong, &echo(3, 77)), None, "a wrong checksum");
            }
            for len in 0..54.min(answer.len()) {
                assert_eq!(echoed(&answer[..len], &echo(3, 77)), None, "{len}");
            }
        }
    }
}
