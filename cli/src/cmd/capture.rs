//! `usernic capture`: received frames into a file.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use usernic::Burst;
use usernic::spec::PortSpec;

use crate::capture_file::Writer;
use crate::common::{self, Ended, Meter, PollArgs, Summary};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The port, as in virtio-user,path=/run/vhost.sock
    #[arg(long, value_name = "SPEC")]
    port: PortSpec,
    /// Its queue pair
    #[arg(long, value_name = "N", default_value = "0")]
    queue: u16,
    /// The file to write; - is the standard output
    #[arg(long, value_name = "FILE")]
    pcap: PathBuf,
    /// Stop after this many frames
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Stop after this many seconds
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    timeout: Option<Duration>,
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
    if json && args.pcap.as_os_str() == "-" {
        return Err(common::Usage("--json and --pcap - both want the standard output".into()).into());
    }
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    // - is open already.
    let made = Some(&args.pcap).filter(|path| path.as_os_str() != "-");
    let confined = args.poll.confine([&args.port], made);
    let (port, mut queue) = args.poll.open(&args.port, args.queue, &stop)?;
    let _control = args.poll.serve(&[("0", &port)], confined)?;
    let writing = || format!("cannot write {}", args.pcap.display());
    let mut writer = Writer::create(&args.pcap).with_context(writing)?;
    let mut meter = Meter::new("capture");
    let mut burst = Burst::new(64);
    let mut frame = vec![0u8; 65_536];
    let start = Instant::now();
    let ended = 'run: loop {
        if stop.load(Ordering::Relaxed) {
            break Ended::Signal;
        }
        if args.timeout.is_some_and(|t| start.elapsed() >= t) {
            break Ended::Time;
        }
        if meter.is_due() {
            meter.show(port.stats());
            writer.flush().with_context(writing)?;
        }
        if queue.rx(&mut burst) == 0 {
            // Idle: let a reader of the file see what is there, then sleep.
            if !queue.wait(Some(Duration::from_millis(2)))? {
                writer.flush().with_context(writing)?;
                queue.wait(Some(Duration::from_millis(50)))?;
            }
            continue;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for packet in burst.iter() {
            if args.count.is_some_and(|count| writer.frames() >= count) {
                break 'run Ended::Count;
            }
            let len = packet.copy_to(&mut frame);
            writer.write(now, &frame[..len]).with_context(writing)?;
        }
        queue.free(&mut burst);
        if args.count.is_some_and(|count| writer.frames() >= count) {
            break Ended::Count;
        }
    };
    writer.flush().with_context(writing)?;
    meter.finish();
    let seconds = start.elapsed().as_secs_f64();
    let totals = Totals {
        frames: writer.frames(),
        file: args.pcap.clone(),
    };
    let line = format!("{} frames written to {}", totals.frames, args.pcap.display());
    Summary {
        schema: "usernic.capture/1",
        ended,
        seconds,
        ports: vec![port.stats()],
        more: totals,
    }
    .print(json, &line)
}
