//! `usernic generate`: UDP frames with valid checksums, as many as wanted or as the other side takes.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

use crate::common::{self, Ended, Meter, Pacer, PollArgs, SendArgs, Summary, Usage};
use crate::packets::{self, ETHER_LEN, Mac};
use crate::ports::{self, Opened};

/// Which lengths to send, in bytes without FCS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    lengths: Vec<usize>,
    /// A mix, whose shortest frame is as long as its headers need.
    mix: bool,
}

/// The shortest frame of Ethernet, and the longest that a port carries: an MTU of 9710 and the header.
const LENGTHS: std::ops::RangeInclusive<usize> = 60..=9724;

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let (least, most) = (LENGTHS.start(), LENGTHS.end());
            format!("write a length (64), a range (60-1514) or imix; lengths are {least} to {most} bytes without FCS")
        };
        let length = |t: &str| {
            t.parse::<usize>()
                .ok()
                .filter(|n| LENGTHS.contains(n))
                .ok_or_else(wrong)
        };
        let mix = text == "imix";
        let lengths = match text.split_once('-') {
            // The simple IMIX: 7 of 64, 4 of 594, 1 of 1518 bytes with their FCS, evenly mixed.
            _ if mix => vec![60, 590, 60, 60, 590, 60, 60, 1514, 60, 590, 60, 590],
            None => vec![length(text)?],
            Some((low, high)) => {
                let (low, high) = (length(low)?, length(high)?);
                if low > high {
                    return Err(wrong());
                }
                (low..=high).collect()
            }
        };
        Ok(Sizes { lengths, mix })
    }
}

impl Sizes {
    /// The lengths, if frames of `least` to `most` bytes can be made; a mix begins at `least`.
    fn within(&self, least: usize, most: usize) -> Result<Vec<usize>> {
        let lengths = self
            .lengths
            .iter()
            .map(|len| if self.mix { least.max(*len) } else { *len });
        let lengths: Vec<usize> = lengths.collect();
        if let Some(short) = lengths.iter().find(|len| **len < least) {
            bail!("--size {short}: a UDP frame over IPv6 has at least {least} bytes");
        }
        if let Some(long) = lengths.iter().max().filter(|len| **len > most) {
            // A frame that any MTU allows can be sent by a port with that MTU: LENGTHS ends there.
            bail!(
                "frames of {long} bytes: a port with mtu={} sends at most {most} (without FCS): pass mtu={} in the port spec, here and on the other side",
                most - ETHER_LEN,
                long - ETHER_LEN
            );
        }
        Ok(lengths)
    }
}

/// Bytes that a frame takes on an Ethernet wire beside its own: FCS (4), preamble and start delimiter (8), the gap to the
/// next frame (12) (IEEE 802.3, 3.1.1 and 4.4.2).
const WIRE: usize = 24;

/// How fast to send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// Frames a second.
    Frames(f64),
    /// Bits a second on the wire.
    Bits(f64),
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        type Unit = (&'static str, fn(f64) -> Rate);
        const UNITS: [Unit; 4] = [
            ("bit/s", Rate::Bits),
            ("bit", Rate::Bits),
            ("pps", Rate::Frames),
            ("", Rate::Frames),
        ];
        let lower = text.to_ascii_lowercase();
        let rate = UNITS
            .into_iter()
            .find_map(|(unit, rate)| Some((lower.strip_suffix(unit)?, rate)))
            .and_then(|(number, rate)| common::quantity(number).ok().map(rate));
        rate.ok_or_else(|| {
            let bytes = if lower.ends_with("bps") || lower.ends_with("b/s") {
                "; bps is bits to some programs and bytes to others, and is not taken"
            } else {
                ""
            };
            format!("write frames a second (1000, 2.5M, 2.5Mpps) or bits a second (100Mbit, 10Gbit), above 0{bytes}")
        })
    }
}

impl Rate {
    /// Frames a second, for frames of these lengths in turn.
    fn frames(self, lengths: &[usize]) -> f64 {
        match self {
            Rate::Frames(rate) => rate,
            Rate::Bits(bits) => {
                let bytes: usize = lengths.iter().map(|len| len + WIRE).sum();
                bits * lengths.len() as f64 / (8 * bytes) as f64
            }
        }
    }
}

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The port, as in virtio-user,path=/run/vhost.sock
    #[arg(long, value_name = "SPEC")]
    port: PortSpec,
    /// The queue pair to send on; what comes in on any is dropped
    #[arg(long, value_name = "N", default_value = "0")]
    queue: u16,
    /// Frame length in bytes without the FCS of 4: 64, 60-1514 or imix (7 of 60, 4 of 590, 1 of 1514 bytes)
    #[arg(long, default_value = "64")]
    size: Sizes,
    /// Frames a second (2.5M or 2.5Mpps), or bits a second of an Ethernet wire (10Gbit): each frame counts with 24 bytes
    /// more, its FCS, preamble and gap; K, M and G are taken; without it, as fast as possible
    #[arg(long, value_name = "RATE")]
    rate: Option<Rate>,
    /// Stop after this many frames; K, M and G are taken
    #[arg(long, value_name = "N", value_parser = common::count)]
    count: Option<u64>,
    /// Stop after this many seconds
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    seconds: Option<Duration>,
    /// Frames handed over at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    burst: u16,
    /// Destination Ethernet address
    #[arg(long, value_name = "MAC", default_value = "02:00:00:00:00:02", value_parser = packets::parse_mac)]
    dst: Mac,
    /// Source Ethernet address; the port's own without it
    #[arg(long, value_name = "MAC", value_parser = packets::parse_mac)]
    src: Option<Mac>,
    /// Source and destination IP address, of one family
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"], default_values = ["192.0.2.1", "192.0.2.2"])]
    ip: Vec<IpAddr>,
    #[command(flatten)]
    send: SendArgs,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Serialize)]
struct Totals {
    /// Frames that were handed to the other side.
    frames: u64,
    /// Their bytes, without FCS.
    bytes: u64,
    /// Frames that were made and not sent: the other side can never take them, or its filter keeps them out.
    dropped: u64,
    /// The other side has taken all that was sent.
    taken: bool,
    /// Millions of frames a second, over the whole run.
    mpps: f64,
    /// Bits a second that this is on an Ethernet wire, with 24 bytes a frame more.
    wire_bps: f64,
}

/// Generates until the count, the time or a signal.
pub fn run(args: Args, json: bool) -> Result<()> {
    let (from, to) = (args.ip[0], args.ip[1]);
    if from.is_ipv4() != to.is_ipv4() {
        return Err(Usage(format!("--ip {from} {to}: both addresses must be of one family")).into());
    }
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    let confined = args.poll.confine([&args.port], None);
    let mut opened = args.poll.open(std::slice::from_ref(&args.port), args.queue, &stop)?;
    let Opened { port, queues } = &mut opened[0];
    ports::has_queue(port, args.queue)?;
    let lengths = args.size.within(
        if from.is_ipv4() { 60 } else { 62 },
        usize::from(port.mtu()) + ETHER_LEN,
    )?;
    let src = args.src.unwrap_or_else(|| port.mac());
    let templates: Vec<Vec<u8>> = lengths
        .iter()
        .map(|len| packets::udp_frame(*len, args.dst, src, (from, 1024), (to, 9)))
        .collect();
    let _control = args.poll.serve(&[("0", port)], confined)?;
    let mut meter = Meter::new("generate");
    let start = Instant::now();
    let mut frames = 0;
    let rate = args.rate.map(|rate| rate.frames(&lengths));
    let outcome = send(
        &args,
        rate,
        port,
        queues,
        &templates,
        &stop,
        start,
        &mut meter,
        &mut frames,
    );
    let seconds = start.elapsed().as_secs_f64();
    let taken = outcome.is_ok() && args.send.drain(&mut queues[usize::from(args.queue)], &stop);
    meter.finish();
    let stats = port.stats();
    let wire = (stats.tx_bytes + stats.tx_packets * WIRE as u64) as f64 * 8.0;
    let totals = Totals {
        frames: stats.tx_packets,
        bytes: stats.tx_bytes,
        dropped: frames.saturating_sub(stats.tx_packets),
        taken,
        mpps: stats.tx_packets as f64 / seconds / 1e6,
        wire_bps: wire / seconds,
    };
    let mut line = format!(
        "{} frames sent, {:.3} Mpps, {}b/s on a wire,",
        totals.frames,
        totals.mpps,
        common::scaled(totals.wire_bps)
    );
    if totals.dropped > 0 {
        line = format!("{line} {} dropped,", totals.dropped);
    }
    if outcome.is_ok() && !taken {
        line += " the last of them not taken by the other side,";
    }
    Summary::new("usernic.generate/1", &outcome, seconds, vec![stats], totals).print(json, &line, outcome)
}

/// Sends; `frames` counts what was sent, whatever ends it.
#[allow(clippy::too_many_arguments)]
fn send(
    args: &Args,
    rate: Option<f64>,
    port: &Arc<Port>,
    queues: &mut [Queue],
    templates: &[Vec<u8>],
    stop: &AtomicBool,
    start: Instant,
    meter: &mut Meter,
    frames: &mut u64,
) -> Result<Ended> {
    let end = args.seconds.and_then(|seconds| start.checked_add(seconds));
    let mut pacer = rate.map(Pacer::new);
    let size = usize::from(args.burst);
    let (mut burst, mut fresh, mut received) = (Burst::new(size), Burst::new(size), Burst::new(64));
    let mut made = 0u64;
    let mut last = (0, start);
    let mut turns = 0u32;
    let mut quiet = true;
    loop {
        // The clock and the flag are looked at every few bursts, and whenever nothing was sent.
        if quiet || turns.is_multiple_of(16) {
            if stop.load(Ordering::Relaxed) {
                return Ok(Ended::Signal);
            }
            let now = Instant::now();
            if end.is_some_and(|end| now >= end) {
                return Ok(Ended::Time);
            }
            if *frames > last.0 || burst.is_empty() && pacer.is_some() {
                last = (*frames, now);
            } else if now - last.1 > args.send.stall {
                let sent = format!("{frames} frames");
                return Err(ports::stalled(port, args.send.stall, sent, burst.is_empty()));
            }
            if meter.is_due() {
                meter.show(port.stats());
            }
            ports::discard(queues, &mut received);
        }
        turns = turns.wrapping_add(1);
        if args.count.is_some_and(|count| *frames >= count) {
            return Ok(Ended::Count);
        }
        let queue = &mut queues[usize::from(args.queue)];
        let mut room = size - burst.len();
        if let Some(count) = args.count {
            room = room.min((count - made) as usize);
        }
        if let Some(pacer) = &mut pacer {
            room = room.min(pacer.due(size).saturating_sub(burst.len()));
            // What is due only now is due too late.
            if room > 0 && end.is_some_and(|end| Instant::now() >= end) {
                return Ok(Ended::Time);
            }
        }
        queue.alloc(&mut fresh, room);
        for mut packet in fresh.drain() {
            // A template fits one buffer or several; when buffers run out, the frame waits for the next turn.
            if packet
                .copy_from(&templates[(made % templates.len() as u64) as usize])
                .is_err()
            {
                break;
            }
            if burst.push(packet).is_err() {
                break;
            }
            made += 1;
        }
        let sent = queue.tx(&mut burst);
        *frames += sent as u64;
        quiet = sent == 0;
        match &mut pacer {
            Some(pacer) if sent > 0 => pacer.sent(sent),
            Some(pacer) if burst.is_empty() => pacer.idle(end),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let sizes = |text: &str| text.parse::<Sizes>().map(|sizes| sizes.lengths);
        assert_eq!(sizes("64"), Ok(vec![64]));
        assert_eq!(sizes("64-66"), Ok(vec![64, 65, 66]));
        let imix = sizes("imix").unwrap();
        let count = |n: usize| imix.iter().filter(|s| **s == n).count();
        assert_eq!((count(60), count(590), count(1514)), (7, 4, 1));
        for bad in ["", "59", "9725", "66-64", "64-", "x", "64-1518-9000", "-64"] {
            assert!(sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_frames_or_bits_of_a_wire() {
        let rate = |text: &str| text.parse::<Rate>();
        for (text, frames) in [
            ("1000", 1e3),
            ("2.5M", 2.5e6),
            ("2.5Mpps", 2.5e6),
            ("1Kpps", 1e3),
            ("1e3", 1e3),
        ] {
            assert_eq!(rate(text), Ok(Rate::Frames(frames)), "{text}");
        }
        for (text, bits) in [
            ("1Gbit", 1e9),
            ("0.5gbit/s", 5e8),
            ("100Mbit", 1e8),
            ("9600bit", 9600.0),
        ] {
            assert_eq!(rate(text), Ok(Rate::Bits(bits)), "{text}");
        }
        for bad in [
            "",
            "0",
            "-1",
            "-0",
            "x",
            "nan",
            "inf",
            "1e999",
            "1T",
            "1Tbit",
            "0bit",
            "-1Gbit",
            "bit",
            "Gbit",
            "infbit",
            "1Gbyte",
            "1 Gbit",
            "1Gbitbit",
            "1Gbit/m",
            "pps",
            "1e308Gbit",
            "0x10",
        ] {
            assert!(rate(bad).is_err(), "{bad}");
        }
        for bytes in ["1Gbps", "1MB/s", "1b/s"] {
            assert!(rate(bytes).unwrap_err().contains("is not taken"), "{bytes}");
        }
        // 10 Gb/s are 14.88 million of the shortest frames, as every data sheet has it.
        assert_eq!(Rate::Bits(10e9).frames(&[60]).round(), 14_880_952.0);
        assert_eq!(Rate::Bits(10e9).frames(&[60, 1514]).round(), 1_541_307.0);
        assert_eq!(Rate::Frames(7.0).frames(&[60, 1514]), 7.0);
    }

    #[test]
    fn no_length_is_changed_in_silence() {
        let within = |text: &str, least| text.parse::<Sizes>().unwrap().within(least, 1514);
        assert_eq!(within("1513-1514", 60).unwrap(), [1513, 1514]);
        let message = within("1513-1518", 60).unwrap_err().to_string();
        assert!(
            message.contains("1518 bytes") && message.contains("mtu=1504"),
            "{message}"
        );
        assert!(within("60", 62).unwrap_err().to_string().contains("at least 62"));
        let mix = within("imix", 62).unwrap();
        assert!(mix.contains(&62) && mix.contains(&1514) && !mix.contains(&60));
    }
}
