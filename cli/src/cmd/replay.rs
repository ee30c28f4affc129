//! `usernic replay`: the frames of a capture file, sent in order, none lost on the way out.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use usernic::Burst;
use usernic::spec::PortSpec;

use crate::capture_file::Capture;
use crate::common::{self, Ended, Meter, Pacer, PollArgs, SendArgs, Summary};

/// When frames are sent.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Timing {
    /// As fast as the other side takes them, or at --rate
    Fast,
    /// With the gaps of the capture
    Original,
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
    /// The capture
    #[arg(long, value_name = "FILE")]
    pcap: PathBuf,
    /// Send it this many times
    #[arg(long = "loop", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    loops: u64,
    /// Frames a second; K, M and G are taken
    #[arg(long, value_name = "PPS", value_parser = common::quantity)]
    rate: Option<f64>,
    /// When to send
    #[arg(long, value_enum, default_value = "fast", conflicts_with = "rate")]
    timing: Timing,
    /// Send frames that the capture's snapshot length cut, as they are
    #[arg(long)]
    allow_cut: bool,
    /// Frames handed over at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    burst: u16,
    #[command(flatten)]
    send: SendArgs,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Serialize)]
struct Totals {
    file: PathBuf,
    frames: u64,
    bytes: u64,
    loops: u64,
}

/// The longest frame without FCS that a port of this MTU sends: Ethernet header, and a VLAN tag if the frame has one.
pub fn longest_frame(mtu: u16, frame: &[u8]) -> usize {
    let tagged = matches!(crate::packets::ethertype_of(frame), Some(0x8100 | 0x88a8));
    usize::from(mtu) + 14 + if tagged { 4 } else { 0 }
}

/// Sends the capture.
pub fn run(args: Args, json: bool) -> Result<()> {
    let stop = common::stop_flag()?;
    let capture = Capture::open(&args.pcap, args.allow_cut).with_context(|| args.pcap.display().to_string())?;
    args.poll.pin()?;
    let confined = args.poll.confine([&args.port], None);
    let (port, mut queue) = args.poll.open(&args.port, args.queue, &stop)?;
    for (index, frame) in capture.frames().enumerate() {
        if frame.len() > longest_frame(port.mtu(), frame) {
            bail!(
                "{}: frame {} has {} bytes, and a port with mtu={} sends at most {}: pass a larger mtu= in the port spec",
                args.pcap.display(),
                index + 1,
                frame.len(),
                port.mtu(),
                longest_frame(port.mtu(), frame)
            );
        }
    }
    let _control = args.poll.serve(&[("0", &port)], confined)?;
    let mut meter = Meter::new("replay");
    let mut pacer = args.rate.map(Pacer::new);
    let size = usize::from(args.burst);
    let mut burst = Burst::new(size);
    let mut received = Burst::new(64);
    let total = capture.len() as u64 * args.loops;
    let (mut next, mut frames, mut bytes) = (0u64, 0u64, 0u64);
    let start = Instant::now();
    let (mut loop_start, mut last) = (start, start);
    let ended = loop {
        if stop.load(Ordering::Relaxed) {
            break Ended::Signal;
        }
        if burst.is_empty() && next == total {
            break Ended::Count;
        }
        if meter.is_due() {
            meter.show(port.stats());
            // Nobody reads what comes in: it must not fill the ring and stall the other side.
            while queue.rx(&mut received) > 0 {
                queue.free(&mut received);
            }
        }
        let mut room = size - burst.len();
        if let Some(pacer) = &mut pacer {
            room = pacer.due(room);
        }
        let mut added = 0;
        while added < room && next < total {
            let index = (next % capture.len() as u64) as usize;
            if args.timing == Timing::Original {
                if index == 0 && next > 0 && added == 0 && burst.is_empty() {
                    loop_start = Instant::now();
                }
                let due = loop_start + capture.at(index);
                let now = Instant::now();
                if now < due {
                    // Short gaps are spun, long ones slept, in slices that a signal can end.
                    if burst.is_empty() && due - now > Duration::from_micros(200) {
                        std::thread::sleep((due - now - Duration::from_micros(100)).min(Duration::from_millis(100)));
                    }
                    break;
                }
            }
            let Some(mut packet) = queue.packet() else { break };
            let frame = capture.frame(index);
            if packet.copy_from(frame).is_err() {
                // The buffers are in flight: what the other side has taken comes back, the rest of them is in the
                // queue's own stack.
                queue.reclaim();
                break;
            }
            if burst.push(packet).is_err() {
                break;
            }
            bytes += frame.len() as u64;
            next += 1;
            added += 1;
        }
        if burst.is_empty() && (next == total || args.timing == Timing::Original || pacer.is_some()) {
            last = Instant::now();
            if let Some(pacer) = &pacer {
                pacer.idle();
            }
            continue;
        }
        let sent = queue.tx(&mut burst);
        frames += sent as u64;
        if let Some(pacer) = &mut pacer {
            pacer.sent(sent);
        }
        if sent > 0 {
            last = Instant::now();
        } else {
            if last.elapsed() > args.send.stall {
                let seconds = args.send.stall.as_secs_f64();
                if !port.link().up {
                    bail!("the link has been down for {seconds} s, after {frames} of {total} frames");
                }
                if burst.is_empty() {
                    bail!(
                        "no buffers for {seconds} s, after {frames} of {total} frames: raise buffers= in the port spec"
                    );
                }
                bail!("the other side has taken no frame for {seconds} s, after {frames} of {total} frames");
            }
            // The other side is slower: give it the CPU if it has none.
            std::thread::yield_now();
        }
    };
    for packet in burst.iter() {
        bytes -= packet.len() as u64;
    }
    queue.free(&mut burst);
    let seconds = start.elapsed().as_secs_f64();
    args.send.drain(&mut queue, &stop);
    meter.finish();
    let stats = port.stats();
    let totals = Totals {
        file: args.pcap.clone(),
        frames,
        bytes,
        loops: args.loops,
    };
    let line = format!("{frames} frames, {bytes} bytes sent from {}", args.pcap.display());
    Summary {
        schema: "usernic.replay/1",
        ended,
        seconds,
        ports: vec![stats],
        more: totals,
    }
    .print(json, &line)?;
    if stats.tx_errors > 0 {
        bail!(
            "{} frames were longer than the other side's buffers and were not sent",
            stats.tx_errors
        );
    }
    Ok(())
}
