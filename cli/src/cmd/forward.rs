//! `usernic forward`: received frames go on, go back, or are answered.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::{Burst, Port, Queue};

use crate::common::{self, Ended, Meter, PollArgs, Summary, Usage};
use crate::ports;
use crate::responder::Responder;

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// Send it out of the other port, or back out of the only one, as it is
    Io,
    /// The same with its two Ethernet addresses exchanged
    Macswap,
    /// Answer ARP, neighbour solicitation and echo requests; drop everything else
    Icmpecho,
}

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// One port, whose frames go back, or two, which are joined
    #[arg(long, value_name = "SPEC", required = true)]
    port: Vec<PortSpec>,
    /// What to do with frames
    #[arg(long, value_enum, default_value = "io")]
    mode: Mode,
    /// With icmpecho: answer for this address, as often as needed; without it, for every address
    #[arg(long, value_name = "ADDRESS")]
    ip: Vec<IpAddr>,
    /// Stop after this many seconds
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    seconds: Option<Duration>,
    /// Frames taken at a time
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    burst: u16,
    #[command(flatten)]
    poll: PollArgs,
}

#[derive(Serialize)]
struct Totals {
    mode: Mode,
    /// Frames that went on, or were answered.
    forwarded: u64,
    /// Frames that went nowhere: no question (icmpecho), or no room on the other side.
    dropped: u64,
}

/// One direction: what moves between two queues, or within one.
struct Lane {
    burst: Burst,
    out: Burst,
    frame: Vec<u8>,
    mode: Mode,
    responder: Responder,
    totals: Totals,
}

impl Lane {
    fn new(args: &Args, port: &Port) -> Self {
        let size = usize::from(args.burst);
        Lane {
            burst: Burst::new(size),
            out: Burst::new(size),
            frame: vec![0; 65_536],
            mode: args.mode,
            responder: Responder::new(port.mac(), &args.ip),
            totals: Totals {
                mode: args.mode,
                forwarded: 0,
                dropped: 0,
            },
        }
    }

    /// Changes the frames of `burst` in place, and drops those that are to go nowhere.
    fn treat(&mut self) {
        match self.mode {
            Mode::Io => {}
            Mode::Macswap => {
                for packet in self.burst.iter_mut() {
                    if let Some(mut addresses) = packet.header::<12>() {
                        addresses.rotate_left(6);
                        // It was read from there: it is long enough.
                        let _ = packet.write_at(0, &addresses);
                    }
                }
            }
            Mode::Icmpecho => {
                for mut packet in self.burst.drain() {
                    let len = ports::copy(&packet, &mut self.frame);
                    let answered = match self.responder.answer(&mut self.frame, len) {
                        Some(len) => packet.copy_from(&self.frame[..len]).is_ok() && self.out.push(packet).is_ok(),
                        None => false,
                    };
                    self.totals.dropped += u64::from(!answered);
                }
                self.out.move_to(&mut self.burst);
            }
        }
    }

    /// Sends the burst; what finds no room even after a few tries is dropped, as a router would.
    fn send(&mut self, queue: &mut Queue) {
        for _ in 0..16 {
            self.totals.forwarded += queue.tx(&mut self.burst) as u64;
            if self.burst.is_empty() {
                return;
            }
            std::hint::spin_loop();
        }
        self.totals.dropped += self.burst.len() as u64;
        queue.free(&mut self.burst);
    }

    /// A burst from `queue` and back to it.
    fn reflect(&mut self, queue: &mut Queue) -> usize {
        let n = queue.rx(&mut self.burst);
        if n > 0 {
            self.treat();
            self.send(queue);
        }
        n
    }

    /// A burst from each queue pair of one port to another.
    fn pass(&mut self, from: &mut [Queue], to: &mut [Queue]) -> usize {
        let count = to.len();
        let pairs = from.iter_mut().enumerate();
        pairs
            .map(|(index, from)| self.pass_one(from, &mut to[index % count]))
            .sum()
    }

    /// A burst across. Each port has packet memory of its own: frames are copied.
    fn pass_one(&mut self, from: &mut Queue, to: &mut Queue) -> usize {
        let n = from.rx(&mut self.burst);
        if n > 0 {
            self.treat();
            for packet in self.burst.iter() {
                let copy = to
                    .packet()
                    .and_then(|mut copy| copy.copy_packet(packet).ok().map(|()| copy));
                let taken = copy.is_some_and(|copy| self.out.push(copy).is_ok());
                self.totals.dropped += u64::from(!taken);
            }
            from.free(&mut self.burst);
            std::mem::swap(&mut self.burst, &mut self.out);
            self.send(to);
        }
        n
    }
}

/// Forwards until the time is over or a signal comes.
pub fn run(args: Args, json: bool) -> Result<()> {
    if args.port.len() > 2 {
        return Err(Usage(format!(
            "{} ports: forward takes one or two (see `usernic switch` for more)",
            args.port.len()
        ))
        .into());
    }
    if !args.ip.is_empty() && args.mode != Mode::Icmpecho {
        return Err(Usage("--ip belongs to --mode icmpecho".into()).into());
    }
    let stop = common::stop_flag()?;
    args.poll.pin()?;
    let confined = args.poll.confine(&args.port, None);
    let opened = args.poll.open(&args.port, 0, &stop)?;
    let ports: Vec<Arc<Port>> = opened.iter().map(|o| Arc::clone(&o.port)).collect();
    let mut queues: Vec<Vec<Queue>> = opened.into_iter().map(|o| o.queues).collect();
    let named: Vec<(&str, &Arc<Port>)> = ["0", "1"].into_iter().zip(&ports).collect();
    let _control = args.poll.serve(&named, confined)?;
    let mut lanes: Vec<Lane> = ports.iter().map(|port| Lane::new(&args, port)).collect();
    let mut meter = Meter::new("forward");
    let start = Instant::now();
    let outcome = forward(&args, &ports, &mut queues, &mut lanes, &stop, start, &mut meter);
    meter.finish();
    let seconds = start.elapsed().as_secs_f64();
    let mut totals = Totals {
        mode: args.mode,
        forwarded: 0,
        dropped: 0,
    };
    for lane in &lanes {
        totals.forwarded += lane.totals.forwarded;
        totals.dropped += lane.totals.dropped;
    }
    let line = format!("{} frames forwarded, {} dropped", totals.forwarded, totals.dropped);
    let stats = ports.iter().map(|p| p.stats()).collect();
    Summary::new("usernic.forward/1", &outcome, seconds, stats, totals).print(json, &line, outcome)
}

/// Moves frames: those of a queue pair to the pair of the same number, as far as the other port has as many.
fn forward(
    args: &Args,
    ports: &[Arc<Port>],
    queues: &mut [Vec<Queue>],
    lanes: &mut [Lane],
    stop: &AtomicBool,
    start: Instant,
    meter: &mut Meter,
) -> Result<Ended> {
    let end = args.seconds.and_then(|seconds| start.checked_add(seconds));
    // A burst can keep it busy for ever: the clock is looked at every few of them, too.
    let (mut quiet, mut turns) = (0u32, 0u32);
    loop {
        let moved: usize = match (&mut *queues, &mut *lanes) {
            ([a, b], [there, back]) if args.mode != Mode::Icmpecho => there.pass(a, b) + back.pass(b, a),
            // A question is answered where it was asked.
            (all, lanes) => all
                .iter_mut()
                .zip(lanes)
                .map(|(queues, lane)| queues.iter_mut().map(|queue| lane.reflect(queue)).sum::<usize>())
                .sum(),
        };
        quiet = if moved > 0 { 0 } else { quiet + 1 };
        turns = turns.wrapping_add(1);
        if moved == 0 || turns.is_multiple_of(64) {
            if stop.load(Ordering::Relaxed) {
                return Ok(Ended::Signal);
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(Ended::Time);
            }
            if meter.is_due() {
                meter.show(ports::total(ports));
            }
        }
        if quiet > 20_000 {
            // Nothing for a while: sleep until something comes, wherever.
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let mut all: Vec<&mut Queue> = queues.iter_mut().flatten().collect();
            if ports::wait_any(&mut all, left.unwrap_or(SLEEP).min(SLEEP))? {
                quiet = 0;
            }
        }
        std::hint::spin_loop();
    }
}

/// The longest sleep, after which signals are looked for.
const SLEEP: Duration = Duration::from_millis(50);
