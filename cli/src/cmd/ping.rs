//! `usernic ping`: is a host there, and how far away? ARP or neighbour discovery, then echoes.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Queue};

use crate::common::{self, Ended, PollArgs, Summary, Usage};
use crate::packets::{self, ArpOp, BROADCAST, ETHER_LEN, IPV6_LEN, Mac, ethertype, protocol};
use crate::responder::Responder;

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
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    count: Option<u16>,
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
    to_mac: String,
    sent: u64,
    received: u64,
    min_us: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

/// Our end of the segment.
struct Host {
    queue: Queue,
    burst: Burst,
    frame: Vec<u8>,
    mac: Mac,
    responder: Responder,
}

impl Host {
    fn send(&mut self, frame: &[u8]) -> Result<()> {
        let Some(mut packet) = self.queue.packet() else {
            bail!("the port has no free buffer")
        };
        packet.copy_from(frame)?;
        let mut burst = Burst::new(1);
        let _ = burst.push(packet);
        let sent = common::settle(Duration::from_secs(1), || {
            self.queue.tx(&mut burst);
            burst.is_empty()
        });
        if !sent {
            bail!("the other side has taken no frame for a second");
        }
        Ok(())
    }

    /// Hands received frames to `wanted` until it finds what it wants, answering questions to us on the way.
    fn receive<T>(
        &mut self,
        deadline: Instant,
        stop: &AtomicBool,
        mut wanted: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<(T, Instant)>> {
        loop {
            let mut found = None;
            let mut answers = Vec::new();
            self.queue.rx(&mut self.burst);
            for packet in self.burst.iter() {
                let len = packet.copy_to(&mut self.frame);
                if found.is_none() {
                    found = wanted(&self.frame[..len]).map(|t| (t, Instant::now()));
                }
                if let Some(len) = self.responder.answer(&mut self.frame, len) {
                    answers.push(self.frame[..len].to_vec());
                }
            }
            self.queue.free(&mut self.burst);
            for answer in answers {
                self.send(&answer)?;
            }
            let now = Instant::now();
            if found.is_some() || now >= deadline || stop.load(Ordering::Relaxed) {
                return Ok(found);
            }
            self.queue.wait(Some((deadline - now).min(Duration::from_millis(50))))?;
        }
    }
}

/// The sender's Ethernet address in an answer to "who has `to`?".
fn resolved(frame: &[u8], to: IpAddr) -> Option<Mac> {
    match to {
        IpAddr::V4(to) => {
            let packet = frame.get(ETHER_LEN..ETHER_LEN + 28)?;
            let ours = packets::ethertype_of(frame)? == ethertype::ARP
                && packet[..8] == [0, 1, 8, 0, 6, 4, 0, 2]
                && packet[14..18] == to.octets();
            ours.then(|| packet[8..14].try_into().ok())?
        }
        IpAddr::V6(to) => {
            // A neighbour advertisement: type, code, checksum, flags, target, options.
            let message = frame.get(ETHER_LEN + IPV6_LEN..)?;
            let ours = packets::checksums_hold(frame)?
                && packets::ethertype_of(frame)? == ethertype::IPV6
                && frame[ETHER_LEN + 6] == protocol::ICMPV6
                && frame[ETHER_LEN + 7] == 255
                && *message.first()? == 136
                && *message.get(8..24)? == to.octets();
            // The option with the address may be missing: then the frame's sender has it.
            let option = message.get(24..32).filter(|o| o[..2] == [2, 1]).map(|o| &o[2..8]);
            ours.then(|| option.or(frame.get(6..12))?.try_into().ok())?
        }
    }
}

/// The sequence number and the length of an echo's answer from `to` with our `id`.
fn echoed(frame: &[u8], to: IpAddr, id: u16) -> Option<(u16, usize)> {
    if !packets::checksums_hold(frame)? {
        return None;
    }
    let (message, reply, sender) = match packets::ethertype_of(frame)? {
        ethertype::IPV4 => {
            let header = usize::from(frame[ETHER_LEN] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let sender: [u8; 4] = frame.get(26..30)?.try_into().ok()?;
            if frame[23] != protocol::ICMP {
                return None;
            }
            (
                frame.get(ETHER_LEN + header..ETHER_LEN + total)?,
                0,
                IpAddr::from(sender),
            )
        }
        _ => {
            let len = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
            let sender: [u8; 16] = frame.get(22..38)?.try_into().ok()?;
            if frame[20] != protocol::ICMPV6 {
                return None;
            }
            (
                frame.get(ETHER_LEN + IPV6_LEN..ETHER_LEN + IPV6_LEN + len)?,
                129,
                IpAddr::from(sender),
            )
        }
    };
    let ours = message.len() >= 8 && message[0] == reply && sender == to && message[4..6] == id.to_be_bytes();
    ours.then(|| (u16::from_be_bytes([message[6], message[7]]), message.len()))
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
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    let confined = args.poll.confine([&args.port], None);
    let (port, queue) = args.poll.open(&args.port, 0, &stop)?;
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
    let responder = Responder::new(mac, &[args.from]);
    let mut host = Host {
        queue,
        burst: Burst::new(64),
        frame: vec![0; 65_536],
        mac,
        responder,
    };
    let start = Instant::now();
    let Some(to_mac) = resolve(&mut host, args.from, args.to, &stop)? else {
        if stop.load(Ordering::Relaxed) {
            bail!("ended by a signal before {} told its Ethernet address", args.to);
        }
        bail!(
            "{} does not tell its Ethernet address: three questions, no answer",
            args.to
        );
    };
    if !json {
        println!(
            "PING {} ({}) {} bytes of data.",
            args.to,
            packets::format_mac(to_mac),
            args.size
        );
    }
    let id = std::process::id() as u16;
    let payload: Vec<u8> = (0..args.size).map(|i| i as u8).collect();
    let mut rtts = Histogram::<u64>::new_with_bounds(1, 3_600_000_000_000, 3)?;
    let (mut sent, mut received, mut seq) = (0u64, 0u64, 0u16);
    let ended = loop {
        if args.count.is_some_and(|c| sent >= u64::from(c)) {
            break Ended::Count;
        }
        if stop.load(Ordering::Relaxed) {
            break Ended::Signal;
        }
        seq = seq.wrapping_add(1);
        let frame = echo_frame((mac, args.from), (to_mac, args.to), id, seq, &payload);
        let begin = Instant::now();
        host.send(&frame)?;
        sent += 1;
        let answer = host.receive(begin + args.timeout, &stop, |frame| {
            echoed(frame, args.to, id).filter(|(s, _)| *s == seq)
        })?;
        match answer {
            Some(((seq, len), at)) => {
                received += 1;
                let rtt = at - begin;
                rtts.saturating_record(rtt.as_nanos() as u64);
                if !json {
                    println!(
                        "{len} bytes from {}: seq={seq} time={:.1} us",
                        args.to,
                        rtt.as_secs_f64() * 1e6
                    );
                }
            }
            None if stop.load(Ordering::Relaxed) => {}
            None if !json => println!("no answer to seq={seq} within {} s", args.timeout.as_secs_f64()),
            None => {}
        }
        let more = args.count.is_none_or(|c| sent < u64::from(c));
        if more {
            host.receive(begin + args.interval, &stop, |_| None::<()>)?;
        }
    };
    let us = |ns: u64| ns as f64 / 1e3;
    let totals = Totals {
        from: args.from,
        to: args.to,
        to_mac: packets::format_mac(to_mac),
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
    Summary {
        schema: "usernic.ping/1",
        ended,
        seconds,
        ports: vec![port.stats()],
        more: totals,
    }
    .print(json, &line)?;
    if received == 0 && ended == Ended::Count {
        bail!("{} answered none of {sent} echoes", args.to);
    }
    Ok(())
}

fn resolve(host: &mut Host, from: IpAddr, to: IpAddr, stop: &AtomicBool) -> Result<Option<Mac>> {
    for _ in 0..3 {
        let question = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let request = packets::arp(ArpOp::Request, (host.mac, from), ([0; 6], to));
                packets::ethernet(BROADCAST, host.mac, ethertype::ARP, &request)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => packets::neighbour_solicitation(host.mac, from, to),
            _ => bail!("addresses of two families"),
        };
        host.send(&question)?;
        let deadline = Instant::now() + Duration::from_secs(1);
        if let Some((mac, _)) = host.receive(deadline, stop, |frame| resolved(frame, to))? {
            return Ok(Some(mac));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(None)
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
            assert_eq!(resolved(&answer, to), Some(you));
            assert_eq!(resolved(&answer, from), None);
            assert_eq!(resolved(&question, to), None);
            let echo = ask(&echo_frame((me, from), (you, to), 77, 3, b"twelve bytes"));
            assert_eq!(echoed(&echo, to, 77), Some((3, 20)));
            assert_eq!(echoed(&echo, to, 78), None);
            assert_eq!(echoed(&echo, from, 77), None);
            for len in 0..54.min(echo.len()) {
                assert_eq!(echoed(&echo[..len], to, 77), None, "{len}");
            }
        }
    }
}
