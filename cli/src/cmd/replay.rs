//! `usernic replay`: the frames of a capture file, sent in order, none lost on the way out.
//!
//! The file is read while it is sent, a record at a time; only `--strict` reads it before, to send all of it or nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

use crate::capture_file::{CaptureError, Input, Oddities, Options, Reader};
use crate::common::{self, Ended, Meter, Pacer, PollArgs, SendArgs, Summary, Usage};
use crate::packets::{ETHER_LEN, tags};
use crate::ports::{self, Opened};

/// When frames are sent.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Timing {
    /// As fast as the other side takes them, or at --rate
    Fast,
    /// With the gaps of the capture; from the last frame of a round to the first of the next the mean of them, or a second
    /// where there are none
    Original,
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
    /// The capture, pcap or pcapng; - is the standard input
    #[arg(long, value_name = "FILE")]
    pcap: PathBuf,
    /// Send it this many times; a file, not a pipe
    #[arg(long = "loop", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    loops: u64,
    /// Frames (not bits) a second; K, M and G are taken
    #[arg(long, value_name = "PPS", value_parser = common::quantity)]
    rate: Option<f64>,
    /// When to send
    #[arg(long, value_enum, default_value = "fast", conflicts_with = "rate")]
    timing: Timing,
    /// Send frames that the capture's snapshot length cut, as they are
    #[arg(long)]
    allow_cut: bool,
    /// Do not fail because of frames that are left out: too long for the port, or cut
    #[arg(long, conflicts_with = "strict")]
    skip: bool,
    /// Send nothing if anything is wrong with any record (of a pipe: nothing from that record on)
    #[arg(long)]
    strict: bool,
    /// Frames handed over at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    burst: u16,
    #[command(flatten)]
    send: SendArgs,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Default, Serialize)]
struct Totals {
    file: PathBuf,
    frames: u64,
    bytes: u64,
    loops: u64,
    /// Records of the file that are no whole Ethernet frames, and were not sent.
    left_out: u64,
    /// Frames that the capture's snapshot length cut, and that were not sent.
    cut: u64,
    /// Frames of the file that the port's MTU does not allow, and were not sent.
    too_long: u64,
    /// Records with odd headers, whose frames were sent.
    odd: u64,
    /// The first of all these.
    first: Option<String>,
}

/// The longest frame without FCS that a port of this MTU sends: Ethernet header, and the frame's VLAN tags.
fn longest(mtu: usize, frame: &[u8]) -> usize {
    mtu + ETHER_LEN + tags(frame)
}

/// Why a frame is too long, and what helps, if anything does.
fn too_long(number: u64, frame: &[u8], mtu: u16) -> String {
    /// The largest `mtu=` of a port spec.
    const MOST: usize = 9710;
    let (len, most) = (frame.len(), longest(mtu.into(), frame));
    let needed = len.saturating_sub(longest(0, frame));
    let hint = if needed <= MOST {
        format!("pass a larger mtu= in the port spec, here and on the other side: {needed}")
    } else {
        let most = longest(MOST, frame);
        format!("no port sends more than {most}; captures have such frames where segmentation offloads were on")
    };
    format!("frame {number} has {len} bytes, and a port with mtu={mtu} sends at most {most}: {hint}")
}

/// Reads the whole file: every record is a frame, and none is too long.
fn check(input: &Input, options: Options, mtu: Option<u16>) -> Result<()> {
    let mut reader = Reader::new(input.again()?, options)?;
    while let Some(record) = reader.next()? {
        if let Some(mtu) = mtu.filter(|mtu| record.frame.len() > longest((*mtu).into(), record.frame)) {
            bail!(too_long(record.number, record.frame, mtu));
        }
    }
    Ok(())
}

/// Sends the capture.
pub fn run(args: Args, json: bool) -> Result<()> {
    let stop = common::stop_flag()?;
    let named = || args.pcap.display().to_string();
    let input = Input::open(&args.pcap, &stop).with_context(named)?;
    if args.loops > 1 && !input.is_file() {
        let what = "is a pipe, which can be read once: --loop needs a file";
        return Err(Usage(format!("--pcap {} {what}", args.pcap.display())).into());
    }
    let options = Options {
        strict: args.strict,
        allow_cut: args.allow_cut,
    };
    // What is no capture is refused before anybody is connected to.
    if input.is_file() {
        let mut reader = Reader::new(input.again().with_context(named)?, options).with_context(named)?;
        if reader.next().with_context(named)?.is_none() && reader.oddities() == Oddities::default() {
            return Err(CaptureError::Empty).with_context(named);
        }
        if args.strict {
            check(&input, options, None).with_context(named)?;
        }
    }
    args.poll.pin()?;
    let confined = args.poll.confine([&args.port], None);
    let mut opened = args.poll.open(std::slice::from_ref(&args.port), args.queue, &stop)?;
    let Opened { port, queues } = &mut opened[0];
    ports::has_queue(port, args.queue)?;
    if args.strict && input.is_file() {
        check(&input, options, Some(port.mtu())).with_context(named)?;
    }
    let _control = args.poll.serve(&[("0", port)], confined)?;
    let mut meter = Meter::new("replay");
    let start = Instant::now();
    let mut sender = Sender {
        args: &args,
        options,
        port,
        queues,
        stop: &stop,
        totals: Totals {
            file: args.pcap.clone(),
            loops: args.loops,
            ..Totals::default()
        },
    };
    let mut outcome = sender.send(&input, &mut meter);
    let totals = sender.totals;
    let seconds = start.elapsed().as_secs_f64();
    if outcome.is_ok() {
        args.send.drain(&mut queues[usize::from(args.queue)], &stop);
    }
    meter.finish();
    let stats = port.stats();
    if outcome.is_ok() {
        outcome = totals.judge(outcome, stats.tx_errors, args.skip);
    }
    let line = totals.line();
    Summary::new("usernic.replay/1", &outcome, seconds, vec![stats], totals).print(json, &line, outcome)
}

impl Totals {
    fn line(&self) -> String {
        let mut line = format!(
            "{} frames, {} bytes sent from {}",
            self.frames,
            self.bytes,
            self.file.display()
        );
        for (count, what) in [
            (self.left_out, "no whole frames, left out"),
            (self.cut, "cut, left out"),
            (self.too_long, "too long, left out"),
            (self.odd, "odd, sent"),
        ] {
            if count > 0 {
                line.push_str(&format!(", {count} {what}"));
            }
        }
        if let Some(first) = &self.first {
            line.push_str(&format!(" (the first: {first}),"));
        }
        line
    }

    /// Whether what was sent is what was to be sent: `refused` by the port as too long for the other side's buffers.
    fn judge(&self, outcome: Result<Ended>, refused: u64, skip: bool) -> Result<Ended> {
        if refused > 0 {
            bail!("{refused} frames were longer than the other side's buffers and were not sent");
        }
        let first = self.first.as_deref().unwrap_or("there is no frame in it");
        if matches!(outcome, Ok(Ended::Count)) && self.frames == 0 {
            bail!("{}: no frame was sent: {first}", self.file.display());
        }
        // What an option would have had sent is missed; what is no frame is not.
        let missed = self.too_long + self.cut;
        if !skip && missed > 0 {
            bail!("{missed} frames were not sent (--skip leaves them out without failing); the first: {first}");
        }
        outcome
    }
}

struct Sender<'a> {
    args: &'a Args,
    options: Options,
    port: &'a Arc<Port>,
    queues: &'a mut [Queue],
    stop: &'a AtomicBool,
    totals: Totals,
}

/// When the frames of a capture are due that is sent round after round, each with the capture's gaps.
struct Schedule {
    start: Instant,
    /// The first frame's time in the capture.
    first: Option<Duration>,
    /// From the first frame to the latest.
    span: Duration,
    frames: u32,
    /// From the first frame of a round to that of the next.
    length: Duration,
    round: u32,
}

impl Schedule {
    fn new(start: Instant) -> Self {
        Schedule {
            start,
            first: None,
            span: Duration::ZERO,
            frames: 0,
            length: Duration::ZERO,
            round: 0,
        }
    }

    /// When the frame that was captured at `at` is due: by its round and its time in the file, whatever happened before.
    /// One that claims to be earlier than the first is due with it.
    fn due(&mut self, at: Duration) -> Instant {
        let since = at.saturating_sub(*self.first.get_or_insert(at));
        if self.round == 0 {
            self.span = self.span.max(since);
            self.frames += 1;
        }
        let after = self.length.saturating_mul(self.round).saturating_add(since);
        // A time that no clock reaches: a day is long enough to wait.
        let far = Duration::from_secs(86_400);
        self.start.checked_add(after).unwrap_or(self.start + far)
    }

    /// The capture begins again. After its last frame comes a gap as between frames, or a second if there are none.
    fn again(&mut self) {
        if self.round == 0 {
            let gap = self.span / (self.frames.max(2) - 1);
            self.length = if self.span.is_zero() {
                Duration::from_secs(1)
            } else {
                self.span.saturating_add(gap)
            };
        }
        self.round += 1;
    }
}

impl Sender<'_> {
    fn note(&mut self, reader: &Reader<Input>, round: u64) {
        // The later rounds find the same.
        if round == 0 {
            let Oddities { left_out, cut, odd } = reader.oddities();
            (self.totals.left_out, self.totals.cut, self.totals.odd) = (left_out, cut, odd);
            if let Some(first) = reader.first() {
                self.totals.first.get_or_insert_with(|| first.to_string());
            }
        }
    }

    /// Sends; the totals count what was sent, whatever ends it.
    fn send(&mut self, input: &Input, meter: &mut Meter) -> Result<Ended> {
        let size = usize::from(self.args.burst);
        let mut burst = Burst::new(size);
        let named = || self.args.pcap.display().to_string();
        let mut reader = Reader::new(input.again()?, self.options).with_context(named)?;
        let mut round = 0;
        let ended = self.rounds(input, &mut reader, &mut burst, &mut round, meter);
        self.note(&reader, round);
        // Read, and not taken by the port.
        self.totals.bytes -= burst.iter().map(|packet| packet.len() as u64).sum::<u64>();
        ended.or_else(|error| {
            // A signal ends reading with an error.
            if self.stop.load(Ordering::Relaxed) {
                Ok(Ended::Signal)
            } else {
                Err(error)
            }
        })
    }

    fn rounds(
        &mut self,
        input: &Input,
        reader: &mut Reader<Input>,
        burst: &mut Burst,
        round: &mut u64,
        meter: &mut Meter,
    ) -> Result<Ended> {
        let named = || self.args.pcap.display().to_string();
        let mtu = self.port.mtu();
        let size = usize::from(self.args.burst);
        let original = self.args.timing == Timing::Original;
        let mut received = Burst::new(64);
        let mut pacer = self.args.rate.map(Pacer::new);
        let (mut schedule, mut last) = (None::<Schedule>, Instant::now());
        // A frame that was read and has no packet yet, and when it is due.
        let mut pending: Option<Option<Instant>> = None;
        let mut ended = false;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(Ended::Signal);
            }
            if burst.is_empty() && ended {
                return Ok(Ended::Count);
            }
            if meter.is_due() {
                meter.show(self.port.stats());
                ports::discard(self.queues, &mut received);
            }
            let mut room = size - burst.len();
            if let Some(pacer) = &mut pacer {
                room = room.min(pacer.due(size).saturating_sub(burst.len()));
            }
            // Why nothing is added: not yet due, not yet read, or no buffers.
            let (mut early, mut idle) = (None, false);
            while room > 0 && !ended {
                let due = match pending {
                    Some(due) => due,
                    None => {
                        // What is in the burst does not wait for a pipe.
                        if !burst.is_empty() && !reader.is_whole() {
                            break;
                        }
                        if !reader.is_ready() {
                            idle = true;
                            break;
                        }
                        let Some(record) = reader.next().with_context(named)? else {
                            self.note(reader, *round);
                            *round += 1;
                            if *round == self.args.loops || self.totals.frames == 0 && burst.is_empty() {
                                ended = true;
                                break;
                            }
                            *reader = Reader::new(input.again()?, self.options).with_context(named)?;
                            if let Some(schedule) = &mut schedule {
                                schedule.again();
                            }
                            continue;
                        };
                        if record.frame.len() > longest(mtu.into(), record.frame) {
                            let what = too_long(record.number, record.frame, mtu);
                            if self.args.strict {
                                bail!("{}: {what}", self.args.pcap.display());
                            }
                            if *round == 0 {
                                self.totals.too_long += 1;
                                self.totals.first.get_or_insert(what);
                            }
                            continue;
                        }
                        original.then(|| {
                            schedule
                                .get_or_insert_with(|| Schedule::new(Instant::now()))
                                .due(record.at)
                        })
                    }
                };
                pending = Some(due);
                if due.is_some_and(|due| Instant::now() < due) {
                    early = due;
                    break;
                }
                let queue = &mut self.queues[usize::from(self.args.queue)];
                let Some(mut packet) = queue.packet() else { break };
                if packet.copy_from(reader.frame()).is_err() {
                    // The buffers are in flight: what the other side has taken comes back, the rest of them is in the
                    // queue's own stack.
                    queue.reclaim();
                    break;
                }
                self.totals.bytes += packet.len() as u64;
                if burst.push(packet).is_err() {
                    break;
                }
                pending = None;
                room -= 1;
            }
            if burst.is_empty() && (ended || idle || early.is_some() || room == 0) {
                last = Instant::now();
                match &pacer {
                    Some(pacer) if room == 0 => pacer.idle(None),
                    _ if idle => std::thread::sleep(Duration::from_millis(1)),
                    _ => common::idle_until(early),
                }
                continue;
            }
            let sent = self.queues[usize::from(self.args.queue)].tx(burst);
            self.totals.frames += sent as u64;
            if let Some(pacer) = &mut pacer {
                pacer.sent(sent);
            }
            if sent > 0 {
                last = Instant::now();
                continue;
            }
            if last.elapsed() > self.args.send.stall {
                let sent = format!("{} frames of {}", self.totals.frames, self.args.pcap.display());
                return Err(ports::stalled(self.port, self.args.send.stall, sent, burst.is_empty()));
            }
            // The other side is slower: give it the CPU if it has none.
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_the_captures_gaps() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut schedule = Schedule::new(start);
        for round in 0..3u32 {
            for at in [100, 400, 50, 700] {
                let since = ms(at).saturating_sub(ms(100));
                assert_eq!(schedule.due(ms(at)), start + ms(800) * round + since, "{round} {at}");
            }
            schedule.again();
        }
    }

    #[test]
    fn a_capture_without_gaps_is_sent_once_a_second() {
        for frames in [1, 3] {
            let start = Instant::now();
            let mut schedule = Schedule::new(start);
            for round in 0..3 {
                for _ in 0..frames {
                    assert_eq!(schedule.due(Duration::from_secs(9)), start + Duration::from_secs(round));
                }
                schedule.again();
            }
        }
    }

    #[test]
    fn no_time_in_a_file_is_too_late_for_a_clock() {
        let mut schedule = Schedule::new(Instant::now());
        schedule.due(Duration::ZERO);
        schedule.due(Duration::MAX);
        schedule.again();
        schedule.due(Duration::MAX);
    }

    #[test]
    fn a_hint_is_given_where_it_helps() {
        let mut frame = vec![0; 2000];
        let text = too_long(7, &frame, 1500);
        assert!(
            text.contains("frame 7 has 2000 bytes") && text.contains("at most 1514") && text.contains("1986"),
            "{text}"
        );
        frame[12..14].copy_from_slice(&[0x88, 0xa8]);
        frame[16..18].copy_from_slice(&[0x81, 0x00]);
        assert!(too_long(7, &frame, 1500).contains("at most 1522"));
        frame.resize(9732, 0);
        assert!(too_long(1, &frame, 1500).contains(": 9710"));
        frame.resize(9733, 0);
        let text = too_long(1, &frame, 1500);
        assert!(!text.contains("mtu= in") && text.contains("more than 9732"), "{text}");
    }
}
