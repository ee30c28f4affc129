//! `cargo xtask bench --scale`: how our two sides do over sizes of rings, bursts, frames, and numbers of queues and
//! regions; split and packed rings; sending and receiving.
//!
//! One thing is varied at a time, the rest is as [`BASE`]; where regions are, the front-end is [`raw`](super::raw), since
//! a port has one. Each point is a fresh pair of processes. The cycles are those
//! of rounds that moved packets: taking buffers, writing headers, the burst call, giving buffers back.

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::cores::Regime;
use super::load::Load;
use super::protocol::{Polls, Worker};
use super::variants::Subject;
use super::windows::{self, Plan};
use super::{Bench, ours};
use crate::process;

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Descriptors of each ring.
    pub ring: u16,
    /// Packets that are moved at a time.
    pub burst: usize,
    /// Queue pairs, all driven by one thread on each side.
    pub queues: u16,
    /// Frame length in bytes without FCS.
    pub bytes: usize,
    /// Regions of memory, over which the front-end's packets are spread; 0 if it is a port, which has one.
    pub regions: usize,
}

/// What holds where nothing else is said.
pub const BASE: Shape = Shape {
    ring: 256,
    burst: 32,
    queues: 1,
    bytes: 64,
    regions: 0,
};

const RINGS: [u16; 10] = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];
const BURSTS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const QUEUES: [u16; 4] = [1, 2, 4, 8];
const REGIONS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const SIZES: [usize; 8] = [64, 128, 256, 512, 1024, 1518, 4096, 9000];

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// What is varied: `ring`, `burst`, `queues`, `bytes`, `regions`.
    pub factor: &'static str,
    /// Its value.
    pub at: usize,
    /// `split` or `packed`.
    pub rings: &'static str,
    /// `tx` or `rx`, seen from the front-end.
    pub load: String,
    /// All of it.
    pub shape: Shape,
    /// Millions of packets a second.
    pub mpps: Option<f64>,
    /// Cycles of the time stamp counter a packet: of the front-end's thread.
    pub front_cycles: Option<f64>,
    /// Of the back-end's.
    pub back_cycles: Option<f64>,
    /// Share of the front-end's polls that moved packets.
    pub front_busy: Option<f64>,
    /// Of the back-end's.
    pub back_busy: Option<f64>,
    /// The CPUs' distance.
    pub regime: Option<Regime>,
    /// Windows that count.
    pub windows: usize,
    /// Why there is no result.
    pub error: Option<String>,
}

/// All that is measured, without kinds of rings and loads.
fn shapes(quick: bool) -> Vec<(&'static str, usize, Shape)> {
    let mut all = Vec::new();
    all.extend(thinned(&RINGS, quick).map(|ring| ("ring", usize::from(ring), Shape { ring, ..BASE })));
    all.extend(thinned(&BURSTS, quick).map(|burst| ("burst", burst, Shape { burst, ..BASE })));
    all.extend(thinned(&QUEUES, quick).map(|queues| ("queues", usize::from(queues), Shape { queues, ..BASE })));
    all.extend(thinned(&SIZES, quick).map(|bytes| ("bytes", bytes, Shape { bytes, ..BASE })));
    all.extend(thinned(&REGIONS, quick).map(|regions| ("regions", regions, Shape { regions, ..BASE })));
    all
}

/// All, or the first and the last.
fn thinned<T: Copy>(values: &[T], quick: bool) -> impl Iterator<Item = T> {
    let last = values.len() - 1;
    let keep = move |i: usize| !quick || i == 0 || i == last;
    values
        .iter()
        .enumerate()
        .filter_map(move |(i, &v)| keep(i).then_some(v))
}

/// The specs of both sides.
fn specs(shape: &Shape, packed: bool, socket: &std::path::Path) -> (String, String) {
    let Shape {
        ring, burst, queues, ..
    } = *shape;
    let path = socket.display();
    let pairs = usize::from(queues);
    // Rings, caches, and a burst in hand on its way in each direction.
    let buffers = pairs * (2 * usize::from(ring) + 256) + 4 * burst;
    let mut front = format!("virtio-user,path={path},queue_size={ring},queues={queues},buffers={buffers}");
    let mut back = format!("vhost,path={path},queues={queues},buffers={}", pairs * 1024 + 4 * burst);
    if packed {
        front += ",packed_vq=1";
    }
    if shape.bytes > 1518 {
        let long = ",mtu=9000,buffer_size=9216";
        front += long;
        back += long;
    }
    (front, back)
}

/// The heading of the table.
fn heading() -> String {
    format!(
        "{:<7} {:>6} {:<7} {:<4} {:>9} {:>13} {:>13} {:>12} {:<5}",
        "factor", "at", "rings", "load", "Mpps", "front cycles", "back cycles", "busy %", "CPUs"
    )
}

impl Point {
    fn line(&self) -> String {
        let start = format!("{:<7} {:>6} {:<7} {:<4}", self.factor, self.at, self.rings, self.load);
        if let Some(error) = &self.error {
            return format!("{start}  no result: {}", error.lines().next().unwrap_or_default());
        }
        let number = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
        let percent = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{:.0}", v * 100.0));
        format!(
            "{start} {:>9} {:>13} {:>13} {:>12} {:<5}",
            number(self.mpps),
            number(self.front_cycles),
            number(self.back_cycles),
            format!("{}/{}", percent(self.front_busy), percent(self.back_busy)),
            self.regime.map_or("-".to_owned(), |r| r.to_string())
        )
    }
}

/// What a window's worth of points says.
struct Measured {
    mpps: f64,
    regime: Regime,
    windows: usize,
    front: Polls,
    back: Polls,
}

impl Bench<'_> {
    /// All points.
    pub fn scale(&mut self) -> Result<()> {
        println!("{}", heading());
        let loads: &[Load] = if self.options.quick {
            &[Load::Tx]
        } else {
            &[Load::Tx, Load::Rx]
        };
        for packed in [false, true] {
            for (factor, at, shape) in shapes(self.options.quick) {
                for &load in loads {
                    process::check_interrupted()?;
                    let result = self.point(&shape, packed, load);
                    process::check_interrupted()?;
                    let mut point = Point {
                        factor,
                        at,
                        rings: if packed { "packed" } else { "split" },
                        load: load.name(),
                        shape,
                        mpps: None,
                        front_cycles: None,
                        back_cycles: None,
                        front_busy: None,
                        back_busy: None,
                        regime: None,
                        windows: 0,
                        error: None,
                    };
                    match result {
                        Ok(m) => {
                            let cycles = |p: Polls| (p.packets > 0).then(|| p.cycles as f64 / p.packets as f64);
                            point.mpps = Some(m.mpps);
                            (point.front_cycles, point.back_cycles) = (cycles(m.front), cycles(m.back));
                            (point.front_busy, point.back_busy) = (m.front.share(), m.back.share());
                            (point.regime, point.windows) = (Some(m.regime), m.windows);
                        }
                        Err(error) => point.error = Some(format!("{error:#}")),
                    }
                    println!("{}", point.line());
                    self.report.scale.push(point);
                    self.save()?;
                }
            }
        }
        Ok(())
    }

    fn point(&mut self, shape: &Shape, packed: bool, load: Load) -> Result<Measured> {
        self.started += 1;
        let socket = self.scratch.dir().join(format!("s{}.sock", self.started));
        let (front, back) = specs(shape, packed, &socket);
        let burst = shape.burst.to_string();
        let more = ["--timed", "--burst", &burst];
        let back = ours::worker("our back-end", &back, self.cpus, &more)?;
        let cpus = self.front_cpus();
        let front = match shape.regions {
            0 => ours::worker("our front-end", &front, cpus, &more)?,
            n => {
                let n = n.to_string();
                let more = [&more[..], &["--regions", &n]].concat();
                ours::worker_in("regions", "our raw front-end", &front, cpus, &more)?
            }
        };
        let mut pair = ours::Both::of(front, back);
        pair.prepare(load, shape.bytes)?;
        let plan = Plan {
            launches: 1,
            window: self.plan.window / 2,
            ..self.plan
        };
        // The workers are stopped: their counters stand still but for the windows.
        let polls = |pair: &mut ours::Both| -> Result<(Polls, Polls)> {
            windows::Variant::run(pair, true)?;
            let (front, back): (&mut Worker, &mut Worker) = pair.workers();
            let polls = (front.polls()?, back.polls()?);
            windows::Variant::run(pair, false)?;
            Ok(polls)
        };
        let before = polls(&mut pair)?;
        let (mpps, regime, windows) = windows::alone(&plan, &mut pair).context("no window")?;
        let after = polls(&mut pair)?;
        Ok(Measured {
            mpps,
            regime,
            windows,
            front: after.0.since(before.0),
            back: after.1.since(before.1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spec_is_one() {
        let socket = std::path::Path::new("/tmp/s");
        for (factor, at, shape) in shapes(false) {
            for packed in [false, true] {
                let (front, back) = specs(&shape, packed, socket);
                let parsed: usernic::spec::PortSpec = front.parse().unwrap_or_else(|e| panic!("{front}: {e}"));
                assert_eq!(parsed.packed, packed, "{front}");
                assert!(
                    parsed.buffers.unwrap() as usize >= 2 * usize::from(shape.ring),
                    "{front}"
                );
                back.parse::<usernic::spec::PortSpec>()
                    .unwrap_or_else(|e| panic!("{back}: {e}"));
            }
            let value = match factor {
                "ring" => usize::from(shape.ring),
                "burst" => shape.burst,
                "queues" => usize::from(shape.queues),
                "bytes" => shape.bytes,
                "regions" => shape.regions,
                other => panic!("{other}"),
            };
            assert_eq!(value, at);
        }
        assert_eq!(shapes(true).len(), 10);
    }
}
