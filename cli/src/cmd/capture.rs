//! `usernic capture`: received frames into a file.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

use crate::capture_file::{Format, Writer};
use crate::common::{self, Ended, Meter, PollArgs, Summary};
use crate::output;
use crate::ports::{self, Opened};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The port, as in virtio-user,path=/run/vhost.sock
    #[arg(long, value_name = "SPEC")]
    port: PortSpec,
    /// Write what comes on this queue pair alone, and drop the rest; without it, what comes on any
    #[arg(long, value_name = "N")]
    queue: Option<u16>,
    /// The file to write; - is the standard output
    #[arg(long, value_name = "FILE")]
    pcap: PathBuf,
    /// Its format; by itself pcapng for FILE.pcapng, pcap for all others
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Stop after this many frames; K, M and G are taken
    #[arg(long, value_name = "N", value_parser = common::count)]
    count: Option<u64>,
    /// Stop after this many seconds
    #[arg(long, visible_alias = "timeout", value_name = "S", value_parser = common::seconds)]
    seconds: Option<Duration>,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Serialize)]
struct Totals {
    frames: u64,
    file: PathBuf,
}

/// Captures until the count, the time or a signal; what was received is in the file then.
pub fn run(args: Args, json: bool) -> Result<()> {
    if json && is_stdout(&args) {
        return Err(common::Usage("--json and --pcap - both want the standard output".into()).into());
    }
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    // - is open already.
    let made = Some(&args.pcap).filter(|_| !is_stdout(&args));
    let confined = args.poll.confine([&args.port], made);
    let mut opened = args
        .poll
        .open(std::slice::from_ref(&args.port), args.queue.unwrap_or(0), &stop)?;
    let Opened { port, queues } = &mut opened[0];
    ports::has_queue(port, args.queue.unwrap_or(0))?;
    let _control = args.poll.serve(&[("0", port)], confined)?;
    let format = args.format.unwrap_or_else(|| Format::of(&args.pcap));
    let mut writer = Writer::create(&args.pcap, format, &stop).map_err(|error| cannot(&args, error))?;
    let mut meter = Meter::new("capture");
    let start = Instant::now();
    let mut outcome = receive(&args, port, queues, &mut writer, &stop, start, &mut meter);
    let flushed = writer.flush().map_err(|error| cannot(&args, error));
    if let (Ok(_), Err(error)) = (&outcome, flushed) {
        outcome = Err(error);
    }
    meter.finish();
    let seconds = start.elapsed().as_secs_f64();
    let totals = Totals {
        frames: writer.frames(),
        file: args.pcap.clone(),
    };
    let line = format!("{} frames written to {}", totals.frames, args.pcap.display());
    let stats = vec![port.stats()];
    Summary::new("usernic.capture/1", &outcome, seconds, stats, totals).print(json, &line, outcome)
}

/// An error of the file, or of the standard output.
fn cannot(args: &Args, error: std::io::Error) -> anyhow::Error {
    let error = if is_stdout(args) { output::lost(error) } else { error };
    anyhow::Error::from(error).context(format!("cannot write {}", args.pcap.display()))
}

fn is_stdout(args: &Args) -> bool {
    args.pcap.as_os_str() == "-"
}

/// Writes what comes; the writer counts it, whatever ends it.
fn receive(
    args: &Args,
    port: &Port,
    queues: &mut [Queue],
    writer: &mut Writer,
    stop: &AtomicBool,
    start: Instant,
    meter: &mut Meter,
) -> Result<Ended> {
    let end = args.seconds.and_then(|seconds| start.checked_add(seconds));
    let is_over = |writer: &Writer| args.count.is_some_and(|count| writer.frames() >= count);
    let mut burst = Burst::new(64);
    let mut frame = vec![0u8; 65_536];
    let mut readers: Vec<_> = queues.iter_mut().collect();
    loop {
        if stop.load(Ordering::Relaxed) {
            return Ok(Ended::Signal);
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(Ended::Time);
        }
        if is_over(writer) {
            return Ok(Ended::Count);
        }
        if meter.is_due() {
            meter.show(port.stats());
            writer.flush().map_err(|error| cannot(args, error))?;
        }
        let mut some = false;
        for queue in &mut readers {
            if queue.rx(&mut burst) == 0 {
                continue;
            }
            some = true;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            if args.queue.is_none_or(|wanted| wanted == queue.index()) {
                for packet in burst.iter() {
                    if is_over(writer) {
                        break;
                    }
                    let len = ports::copy(packet, &mut frame);
                    writer.write(now, &frame[..len]).map_err(|error| cannot(args, error))?;
                }
            }
            queue.free(&mut burst);
        }
        if !some {
            // Idle: let a reader of the file see what is there, then sleep.
            let left = left.unwrap_or(Duration::MAX);
            if !ports::wait_any(&mut readers, left.min(Duration::from_millis(2)))? {
                writer.flush().map_err(|error| cannot(args, error))?;
                ports::wait_any(&mut readers, left.min(Duration::from_millis(20)))?;
            }
        }
    }
}
