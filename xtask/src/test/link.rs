//! The `usernic` program in a test: two ports, one that replays a capture and one that writes down what comes.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Ctx;
use crate::pcap;
use crate::process::{Process, Surroundings};

/// For a whole transfer.
const LIMIT: Duration = Duration::from_secs(60);

/// A run of the `usernic` program.
pub struct Usernic;

impl Usernic {
    /// Its command line.
    pub fn command(ctx: &Ctx, args: &[&str]) -> Command {
        let mut command = Command::new(&ctx.usernic);
        command.args(args).current_dir(&ctx.dir);
        command
    }

    /// Starts it on CPU 0: the peers poll on CPU 1.
    pub fn spawn(ctx: &Ctx, args: &[&str]) -> Result<Process> {
        let surroundings = Surroundings {
            cpus: vec![0],
            no_stdin: true,
            ..Default::default()
        };
        let command = Self::command(ctx, args);
        let line = crate::peers::shown(&command);
        Process::spawn(
            &format!("usernic {}", args.iter().find(|a| !a.starts_with('-')).unwrap_or(&"")),
            command,
            &surroundings,
        )
        .context(line)
    }
}

/// Who sends and who receives.
pub struct Link<'a> {
    /// The port that captures.
    pub capture: &'a str,
    /// The port that replays.
    pub replay: &'a str,
    /// Frames a second: what is between drops what its receiver has no room for.
    pub rate: u32,
}

/// A capture that runs; its port may not be up yet.
pub struct Capturing {
    process: Process,
    sent: Vec<Vec<u8>>,
    tag: String,
}

impl Link<'_> {
    /// Starts the capturing side alone.
    pub fn start(&self, ctx: &Ctx, tag: &str, frames: &[Vec<u8>]) -> Result<Capturing> {
        let out = ctx.dir.join(format!("{tag}-out.pcap"));
        let count = frames.len().to_string();
        let args = [
            "-v",
            "capture",
            "--wait",
            "30",
            "--port",
            self.capture,
            "--pcap",
            path(&out)?,
            "--count",
            &count,
        ];
        let process = Usernic::spawn(ctx, &args)?;
        Ok(Capturing {
            process,
            sent: frames.to_vec(),
            tag: tag.to_owned(),
        })
    }

    /// Starts the replaying side.
    pub fn replay(&self, ctx: &Ctx, capturing: &Capturing) -> Result<Process> {
        let input = ctx.dir.join(format!("{}-in.pcap", capturing.tag));
        pcap::write(&input, &capturing.sent)?;
        let rate = self.rate.to_string();
        // Few at a time, so that a small ring behind a busy peer is not overrun after a pause.
        let burst = (self.rate / 250).clamp(1, 32).to_string();
        let args = [
            "replay",
            "--wait",
            "30",
            "--port",
            self.replay,
            "--pcap",
            path(&input)?,
            "--rate",
            &rate,
            "--burst",
            &burst,
        ];
        Usernic::spawn(ctx, &args)
    }

    /// Sends the frames through, when both ends can come up by themselves, and compares.
    pub fn transfer(&self, ctx: &Ctx, tag: &str, frames: &[Vec<u8>], up: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut capturing = self.start(ctx, tag, frames)?;
        up()?;
        capturing.process().wait_for("link up", 0, Duration::from_secs(30))?;
        let mut replay = self.replay(ctx, &capturing)?;
        replay.wait_success(LIMIT)?;
        capturing.finish(ctx)
    }
}

impl Capturing {
    /// The capturing process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until all has come, and compares it with what was sent.
    pub fn finish(self, ctx: &Ctx) -> Result<()> {
        self.finish_with(ctx, pcap::same)
    }

    /// The same, for what is between keeping the order only within each flow, as OVS does.
    pub fn finish_in_any_order(self, ctx: &Ctx) -> Result<()> {
        self.finish_with(ctx, |sent, arrived| {
            let sorted = |frames: &[Vec<u8>]| {
                let mut frames = frames.to_vec();
                frames.sort_unstable();
                frames
            };
            pcap::same(&sorted(sent), &sorted(arrived)).context("in the order of their bytes")
        })
    }

    fn finish_with(mut self, ctx: &Ctx, same: impl Fn(&[Vec<u8>], &[Vec<u8>]) -> Result<()>) -> Result<()> {
        let out = ctx.dir.join(format!("{}-out.pcap", self.tag));
        if let Err(late) = self.process.wait_success(Duration::from_secs(20)) {
            // SIGINT ends it in order: what did come tells more than that not all came.
            self.process.signal(rustix::process::Signal::INT)?;
            let _ = self.process.wait(Duration::from_secs(5));
            let arrived = pcap::read(&out).unwrap_or_default();
            return match same(&self.sent, &arrived) {
                Ok(()) => Err(late.context("all arrived, yet the capture did not end")),
                Err(difference) => Err(late.context(difference)),
            };
        }
        same(&self.sent, &pcap::read(&out)?)
    }
}

/// A path as an argument.
pub fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
