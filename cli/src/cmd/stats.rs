//! `usernic stats`: the counters of a running program.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::common;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The control socket that the program was given with --control
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// Stop after this many lines; one comes each second
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
}

/// Prints JSON lines.
pub fn run(args: Args) -> Result<()> {
    let stop = common::stop_flag()?;
    let stream = UnixStream::connect(&args.control).with_context(|| {
        format!(
            "cannot connect to {}: is a usernic program running with --control of this path?",
            args.control.display()
        )
    })?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut lines = 0;
    let mut quiet = 0;
    while lines < args.count && !stop.load(Ordering::Relaxed) {
        match reader.read_line(&mut line) {
            Ok(0) if lines == 0 => bail!("the program at {} said nothing and hung up", args.control.display()),
            Ok(0) => break,
            Ok(_) => {
                let value: serde_json::Value = serde_json::from_str(&line)
                    .with_context(|| format!("what {} sends is no JSON line", args.control.display()))?;
                writeln!(std::io::stdout(), "{value}")?;
                line.clear();
                lines += 1;
                quiet = 0;
            }
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) =>
            {
                quiet += 1;
                if quiet > 50 {
                    bail!("the program at {} has said nothing for 5 s", args.control.display());
                }
            }
            Err(e) => return Err(e).context("reading from the control socket"),
        }
    }
    Ok(())
}
