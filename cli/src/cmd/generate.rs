//! `usernic generate`: UDP frames with valid checksums, as many as wanted or as the other side takes.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;
use usernic::Burst;
use usernic::spec::PortSpec;

use crate::common::{self, Ended, Meter, Pacer, PollArgs, SendArgs, Summary, Usage};
use crate::packets::{self, Mac};

/// Which lengths to send, in bytes without FCS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes(Vec<usize>);

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write a length (64), a range (64-1518) or imix; lengths are 60 to 9728 bytes".to_owned();
        let length = |t: &str| {
            t.parse::<usize>()
                .ok()
                .filter(|n| (60..=9728).contains(n))
                .ok_or_else(wrong)
        };
        if text == "imix" {
            // The simple IMIX: 7 of 64, 4 of 594, 1 of 1518 bytes, evenly mixed.
            return Ok(Sizes(vec![64, 594, 64, 64, 594, 64, 64, 1518, 64, 594, 64, 594]));
        }
        match text.split_once('-') {
            None => Ok(Sizes(vec![length(text)?])),
            Some((low, high)) => {
                let (low, high) = (length(low)?, length(high)?);
                if low > high {
                    return Err(wrong());
                }
                Ok(Sizes((low..=high).collect()))
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
    /// Its queue pair
    #[arg(long, value_name = "N", default_value = "0")]
    queue: u16,
    /// Frame length without FCS: 64, 64-1518 or imix
    #[arg(long, default_value = "64")]
    size: Sizes,
    /// Frames a second; K, M and G are taken; without it, as fast as possible
    #[arg(long, value_name = "PPS", value_parser = common::quantity)]
    rate: Option<f64>,
    /// Stop after this many frames
    #[arg(long, value_name = "N")]
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
    frames: u64,
    bytes: u64,
    /// Millions of frames a second, over the whole run.
    mpps: f64,
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
    let (port, mut queue) = args.poll.open(&args.port, args.queue, &stop)?;
    let longest = args.size.0.iter().copied().max().unwrap_or(0);
    let most = usize::from(port.mtu()) + 14;
    // 1518 counts the FCS when it stands for a full Ethernet frame: imix and ranges end at what the port carries.
    if longest > most && args.size.0.len() == 1 || longest > most + 4 {
        bail!(
            "frames of {longest} bytes: a port with mtu={} sends at most {most}: pass a larger mtu=",
            port.mtu()
        );
    }
    let src = args.src.unwrap_or_else(|| port.mac());
    let least = if from.is_ipv4() { 60 } else { 62 };
    let templates: Vec<Vec<u8>> = args
        .size
        .0
        .iter()
        .map(|len| packets::udp_frame((*len).clamp(least, most), args.dst, src, (from, 1024), (to, 9)))
        .collect();
    let _control = args.poll.serve(&[("0", &port)], confined)?;
    let mut meter = Meter::new("generate");
    let mut pacer = args.rate.map(Pacer::new);
    let size = usize::from(args.burst);
    let (mut burst, mut fresh, mut received) = (Burst::new(size), Burst::new(size), Burst::new(64));
    let (mut frames, mut made) = (0u64, 0u64);
    let start = Instant::now();
    let mut last = (0, start);
    let mut turns = 0u32;
    let ended = loop {
        // The clock and the flag are looked at every few bursts.
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(16) {
            if stop.load(Ordering::Relaxed) {
                break Ended::Signal;
            }
            if args.seconds.is_some_and(|s| start.elapsed() >= s) {
                break Ended::Time;
            }
            if frames > last.0 || burst.is_empty() {
                last = (frames, Instant::now());
            } else if last.1.elapsed() > args.send.stall {
                let seconds = args.send.stall.as_secs_f64();
                bail!("the other side has taken no frame for {seconds} s, after {frames} frames");
            }
            if meter.is_due() {
                meter.show(port.stats());
            }
            while queue.rx(&mut received) > 0 {
                queue.free(&mut received);
            }
        }
        if args.count.is_some_and(|count| frames >= count) {
            break Ended::Count;
        }
        let mut room = size - burst.len();
        if let Some(count) = args.count {
            room = room.min((count - made) as usize);
        }
        if let Some(pacer) = &mut pacer {
            room = room.min(pacer.due(size).saturating_sub(burst.len()));
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
        frames += sent as u64;
        match &mut pacer {
            Some(pacer) if sent > 0 => pacer.sent(sent),
            Some(pacer) => pacer.idle(),
            None => {}
        }
    };
    queue.free(&mut burst);
    let seconds = start.elapsed().as_secs_f64();
    args.send.drain(&mut queue, &stop);
    meter.finish();
    let stats = port.stats();
    let totals = Totals {
        frames,
        bytes: stats.tx_bytes,
        mpps: frames as f64 / seconds / 1e6,
    };
    let line = format!("{frames} frames generated, {:.3} Mpps,", totals.mpps);
    Summary {
        schema: "usernic.generate/1",
        ended,
        seconds,
        ports: vec![stats],
        more: totals,
    }
    .print(json, &line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!("64".parse(), Ok(Sizes(vec![64])));
        assert_eq!("64-66".parse(), Ok(Sizes(vec![64, 65, 66])));
        let imix: Sizes = "imix".parse().unwrap();
        let count = |n: usize| imix.0.iter().filter(|s| **s == n).count();
        assert_eq!((count(64), count(594), count(1518)), (7, 4, 1));
        for bad in ["", "59", "9729", "66-64", "64-", "x", "64-1518-9000", "-64"] {
            assert!(bad.parse::<Sizes>().is_err(), "{bad}");
        }
    }
}
