//! Frames out of a packet socket, to a forwarder of another project's that sends them back, and whether they come as they
//! should.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use hwtest::frames::{checksums_are_right, frame, ipv4};
use hwtest::{LIMIT, Peer};

/// Frames that are under way at a time: no ring on the way is shorter.
const WINDOW: usize = 32;

/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(300);

/// What is sent, and what is to come of it.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Of 60 to 1514 bytes, not IP: with its addresses swapped, each comes as it was.
    Plain,
    /// TCP and UDP, every other frame with wrong checksums: all come with right ones.
    Checksums,
    /// Not IP, to the address `--to`: heard at `--back`, and not sent back.
    OneWay,
    /// As one-way, but nothing must be heard.
    Unheard,
    /// Nothing comes at all.
    Lost,
}

/// Sends frames, and compares what comes back.
#[derive(Parser)]
struct Arguments {
    /// The interface that frames are sent by
    #[arg(long)]
    out: String,
    /// The one that they come back by
    #[arg(long)]
    back: String,
    /// One that none must come back by
    #[arg(long)]
    quiet: Option<String>,
    /// The forwarder's address
    #[arg(long)]
    to: String,
    /// Whose frames are listened to, if not the forwarder's
    #[arg(long)]
    from: Option<String>,
    #[arg(long, value_enum)]
    frames: Kind,
    #[arg(long)]
    count: usize,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn mac_of(text: &str) -> Result<[u8; 6]> {
    let mut digits = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let two = digits.next().with_context(|| format!("{text} is no address"))?;
        *byte = u8::from_str_radix(two, 16).with_context(|| format!("{text} is no address"))?;
    }
    Ok(mac)
}

fn run(arguments: &Arguments) -> Result<String> {
    let (out, back) = (Peer::open(&arguments.out)?, Peer::open(&arguments.back)?);
    let quiet = arguments.quiet.as_deref().map(Peer::open).transpose()?;
    let to = mac_of(&arguments.to)?;
    let from = arguments.from.as_deref().map_or(Ok(to), mac_of)?;
    let (kind, ours) = (arguments.frames, out.mac());
    let mut bytes = 0;
    for begin in (0..arguments.count).step_by(WINDOW) {
        let window = WINDOW.min(arguments.count - begin);
        let mut missing: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        for i in begin..begin + window {
            let (sent, wanted) = match kind {
                Kind::Checksums => checksummed(to, ours, i),
                Kind::Plain => {
                    let len = 60 + i * 97 % 1455;
                    (frame(to, ours, len, i), frame(ours, to, len, i))
                }
                Kind::OneWay | Kind::Unheard | Kind::Lost => {
                    let sent = frame(to, ours, 100, i);
                    (sent.clone(), sent)
                }
            };
            out.send(&sent)?;
            bytes += sent.len();
            missing.insert(wanted, i);
        }
        if matches!(kind, Kind::Unheard | Kind::Lost) {
            std::thread::sleep(SILENCE);
            let heard = back.receive(from)?;
            ensure!(heard.is_none(), "heard all the same: {:x?}", heard.unwrap_or_default());
            continue;
        }
        let end = Instant::now() + LIMIT;
        while let Some(number) = missing.values().next().copied() {
            let Some(got) = back.receive(from)? else {
                ensure!(
                    Instant::now() < end,
                    "{} of {window} frames did not come back, number {number} among them",
                    missing.len()
                );
                std::thread::sleep(Duration::from_micros(200));
                continue;
            };
            if missing.remove(&got).is_none() {
                let right = if checksums_are_right(&got) { "right" } else { "wrong" };
                bail!(
                    "what came is none of those that are missing ({number} is the first of them): {} bytes, \
                     checksums, if it has any, {right}: {:x?}",
                    got.len(),
                    &got[..got.len().min(64)]
                );
            }
        }
    }
    if let Some(quiet) = quiet {
        std::thread::sleep(SILENCE);
        let heard = quiet.receive(from)?;
        ensure!(
            heard.is_none(),
            "a frame came by {} too",
            arguments.quiet.as_deref().unwrap_or_default()
        );
    }
    Ok(format!("{} frames, {bytes} bytes", arguments.count))
}

/// A frame with the addresses and ports of a flow of its own, as it is sent, with wrong checksums every other time, and as
/// it is to come back.
fn checksummed(to: [u8; 6], ours: [u8; 6], i: usize) -> (Vec<u8>, Vec<u8>) {
    let tcp = i % 2 == 0;
    let payload: Vec<u8> = (0..20 + i * 61 % 1400).map(|at| (at * 3 + i) as u8).collect();
    let mut sent = ipv4(to, ours, tcp, (1000, 2000), &payload);
    if i / 2 % 2 == 1 {
        let field = 34 + if tcp { 16 } else { 6 };
        // Zero would be no checksum.
        sent[24] ^= 0x55;
        sent[field] = if sent[field] == 0xaa { 0xab } else { 0xaa };
        sent[field + 1] = 0x55;
    }
    (sent, ipv4(ours, to, tcp, (1000, 2000), &payload))
}
