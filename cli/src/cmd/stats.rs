//! `usernic stats`: the counters of a running program.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::common;
use crate::control::{Client, Request};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The control socket that the program was given with --control
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// Stop after this many lines; one comes each second
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Print the counters once, as Prometheus reads them
    #[arg(long, conflicts_with = "count")]
    metrics: bool,
}

/// Prints JSON lines, or metrics.
pub fn run(args: Args) -> Result<()> {
    let stop = common::stop_flag()?;
    let mut client = Client::connect(&args.control)?;
    if args.metrics {
        let text = client.ask(&Request::Metrics, &stop)?;
        write!(std::io::stdout(), "{}", text.as_str().unwrap_or_default())?;
        return Ok(());
    }
    let start = Instant::now();
    for line in 0..args.count {
        let due = start + Duration::from_secs(line);
        while Instant::now() < due && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20).min(due.saturating_duration_since(Instant::now())));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        writeln!(std::io::stdout(), "{}", client.ask(&Request::Stats, &stop)?)?;
    }
    Ok(())
}
