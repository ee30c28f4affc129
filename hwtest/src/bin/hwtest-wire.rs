//! Frames out of and into packet sockets, for tests of what nobody here wrote: a forwarder that sends back what it gets, a
//! driver whose filters are looked at.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, ValueEnum};
use hwtest::frames::{capture, checksums_are_right, frame, ipv4};
use hwtest::{LIMIT, Peer};

/// Frames that are under way at a time: no ring on the way is shorter.
const WINDOW: usize = 32;

/// The same of long frames, which must fit the device's packet buffer.
const LONG_WINDOW: usize = 8;

/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(300);

/// What is sent, and what is to come of it.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Of 60 to 1514 bytes, not IP: with its addresses swapped, each comes as it was.
    Plain,
    /// TCP and UDP, every other frame with wrong checksums: all come with right ones.
    Checksums,
    /// The frames of a capture, readdressed, round and round: with its addresses swapped, each comes as it was.
    Capture,
    /// As plain, of 60 to 9014 bytes.
    Jumbo,
    /// Nothing comes back.
    Lost,
}

#[derive(Parser)]
enum What {
    /// Sends frames to a forwarder, and compares what comes back
    Echo(Echo),
    /// Sends frames, not IP, of 100 bytes
    Send {
        #[arg(long)]
        out: String,
        #[arg(long)]
        to: String,
        #[arg(long)]
        count: usize,
    },
    /// Says that it listens, and, once a file exists, how many frames have come
    Hear {
        #[arg(long)]
        by: String,
        /// The sender's address
        #[arg(long)]
        from: String,
        /// The receiver's, ours or not
        #[arg(long)]
        to: String,
        /// A group to be in meanwhile
        #[arg(long)]
        join: Option<String>,
        #[arg(long)]
        until: PathBuf,
    },
}

#[derive(Args)]
struct Echo {
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
    #[arg(long, value_enum)]
    frames: Kind,
    #[arg(long)]
    count: usize,
}

fn main() -> ExitCode {
    match run(&What::parse()) {
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

fn run(what: &What) -> Result<String> {
    match what {
        What::Echo(arguments) => echo(arguments),
        What::Send { out, to, count } => {
            let (out, to) = (Peer::open(out)?, mac_of(to)?);
            for i in 0..*count {
                out.send(&frame(to, out.mac(), 100, i))?;
            }
            Ok(format!("{count} frames"))
        }
        What::Hear {
            by,
            from,
            to,
            join,
            until,
        } => {
            let (peer, from, to) = (Peer::open(by)?, mac_of(from)?, mac_of(to)?);
            if let Some(group) = join {
                peer.join(mac_of(group)?)?;
            }
            println!("listening");
            let end = Instant::now() + LIMIT;
            while !until.exists() {
                ensure!(Instant::now() < end, "{} does not come to be", until.display());
                std::thread::sleep(Duration::from_millis(10));
            }
            std::thread::sleep(SILENCE);
            let mut heard = 0;
            while let Some(got) = peer.receive(from)? {
                heard += usize::from(got[..6] == to && got[12..14] == frame(to, from, 14, 0)[12..14]);
            }
            Ok(format!("heard {heard}"))
        }
    }
}

fn echo(arguments: &Echo) -> Result<String> {
    let (out, back) = (Peer::open(&arguments.out)?, Peer::open(&arguments.back)?);
    let quiet = arguments.quiet.as_deref().map(Peer::open).transpose()?;
    let to = mac_of(&arguments.to)?;
    let (kind, ours) = (arguments.frames, out.mac());
    let mut bytes = 0;
    let (captured, expected) = match kind {
        Kind::Capture => (capture(to, ours)?, capture(ours, to)?),
        _ => Default::default(),
    };
    let under_way = if kind == Kind::Jumbo { LONG_WINDOW } else { WINDOW };
    for begin in (0..arguments.count).step_by(under_way) {
        let window = under_way.min(arguments.count - begin);
        let mut missing: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
        for i in begin..begin + window {
            let (sent, wanted) = match kind {
                Kind::Checksums => checksummed(to, ours, i),
                Kind::Plain | Kind::Jumbo => {
                    let most = if kind == Kind::Jumbo { 8955 } else { 1455 };
                    let len = 60 + i * 97 % most;
                    (frame(to, ours, len, i), frame(ours, to, len, i))
                }
                Kind::Capture => {
                    let at = i % captured.len();
                    (captured[at].clone(), expected[at].clone())
                }
                Kind::Lost => (frame(to, ours, 100, i), Vec::new()),
            };
            out.send(&sent)?;
            bytes += sent.len();
            missing.entry(wanted).or_default().push(i);
        }
        if kind == Kind::Lost {
            std::thread::sleep(SILENCE);
            let heard = back.receive(to)?;
            ensure!(heard.is_none(), "heard all the same: {:x?}", heard.unwrap_or_default());
            continue;
        }
        let end = Instant::now() + LIMIT;
        while let Some(number) = missing.values().next().and_then(|numbers| numbers.first()).copied() {
            let Some(got) = back.receive(to)? else {
                ensure!(
                    Instant::now() < end,
                    "{} of {window} frames did not come back, number {number} among them",
                    missing.values().map(Vec::len).sum::<usize>()
                );
                std::thread::sleep(Duration::from_micros(200));
                continue;
            };
            let left = missing.get_mut(&got).and_then(|numbers| {
                numbers.pop()?;
                Some(numbers.len())
            });
            if left == Some(0) {
                missing.remove(&got);
            }
            if left.is_none() {
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
        let heard = quiet.receive(to)?;
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
    let tcp = i.is_multiple_of(2);
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
