//! A B A B in one run: two variants that are both started, of which one runs at a time.
//!
//! Each variant is a complete set of processes. All of them are stopped (SIGSTOP) but for the one whose window it is.
//! Before and after each window the two CPUs' distance is probed, while nothing runs. A window is dropped, and its
//! reason counted, if the distance changed, or if a thread that forwards waited for its CPU for more than 4 % of the
//! time. An A and the B after it are a pair if both were kept, in the same regime.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::cores::{self, Regime};
use super::stats::{Spread, median};
use crate::process;

/// A thread that waits for its CPU for longer than this part of a window spoils it.
pub const WAIT_AT_MOST: f64 = 0.04;

/// A thread that runs for more than this part of a window is one that forwards.
const BUSY_FROM: f64 = 0.5;

/// One side of a comparison, set up and ready to run.
pub trait Variant {
    /// Continues (SIGCONT) or stops (SIGSTOP) all of its processes.
    fn run(&mut self, on: bool) -> Result<()>;
    /// Begins a measurement, while it runs.
    fn begin(&mut self) -> Result<()>;
    /// Ends it: the value since [`Variant::begin`], in the metric's unit.
    fn end(&mut self) -> Result<f64>;
    /// Its processes, whose threads must not wait for a CPU.
    fn pids(&self) -> Vec<rustix::process::Pid>;
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The two CPUs.
    pub cpus: (usize, usize),
    /// From SIGCONT to the window's beginning.
    pub settle: Duration,
    /// The window.
    pub window: Duration,
    /// Pairs that are wanted.
    pub pairs: usize,
    /// Pairs that are tried, at most.
    pub tries: usize,
    /// The time that this may take, at most.
    pub limit: Duration,
    /// The part of a window for which a busy thread may wait: [`WAIT_AT_MOST`], but for a trial on a busy machine.
    pub wait_at_most: f64,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Comparison {
    /// Median of ours, over the pairs.
    pub ours: f64,
    /// Median of the peer's.
    pub peer: f64,
    /// Pairwise ratios, ours to peer's.
    pub ratio: Spread,
    /// The CPUs' distance in these pairs.
    pub regime: Regime,
    /// Median round trip of a cache line in nanoseconds.
    pub round_trip_ns: f64,
    /// Pairs that count.
    pub pairs: usize,
    /// Windows that were dropped, by reason.
    pub dropped: BTreeMap<String, usize>,
}

struct Window {
    value: f64,
    regime: Regime,
    round_trip: f64,
}

/// Alternates until there are pairs enough in one regime.
pub fn compare(plan: &Plan, ours: &mut dyn Variant, peer: &mut dyn Variant) -> Result<Comparison> {
    let mut dropped = BTreeMap::new();
    let mut pairs: BTreeMap<Regime, Vec<(f64, f64, f64)>> = BTreeMap::new();
    let enough = |pairs: &BTreeMap<Regime, Vec<_>>| pairs.values().any(|p: &Vec<_>| p.len() >= plan.pairs);
    let start = Instant::now();
    let mut before = probe(plan)?;
    for _ in 0..plan.tries {
        if enough(&pairs) || start.elapsed() > plan.limit {
            break;
        }
        let a = window(plan, ours, &mut before, &mut dropped)?;
        let b = window(plan, peer, &mut before, &mut dropped)?;
        match (a, b) {
            (Some(a), Some(b)) if a.regime == b.regime => {
                let trip = (a.round_trip + b.round_trip) / 2.0;
                pairs.entry(a.regime).or_default().push((a.value, b.value, trip));
            }
            (Some(_), Some(_)) => count(&mut dropped, "regime differs within the pair", 2),
            (None, None) => {}
            _ => count(&mut dropped, "its partner was dropped", 1),
        }
    }
    // Most pairs; near, if there are as many of each.
    let Some((regime, pairs)) = pairs.into_iter().rev().max_by_key(|(_, p)| p.len()) else {
        bail!("no pair of windows was fit to compare: {}", reasons(&dropped));
    };
    let column = |f: fn(&(f64, f64, f64)) -> f64| pairs.iter().map(f).collect::<Vec<_>>();
    Ok(Comparison {
        ours: median(&column(|p| p.0)),
        peer: median(&column(|p| p.1)),
        ratio: Spread::of(&column(|p| p.0 / p.1)),
        regime,
        round_trip_ns: median(&column(|p| p.2)),
        pairs: pairs.len(),
        dropped,
    })
}

/// Medians of one variant alone, where there is nothing to compare with: as many windows as a comparison has pairs.
pub fn alone(plan: &Plan, variant: &mut dyn Variant) -> Result<(f64, Regime, usize)> {
    let mut dropped = BTreeMap::new();
    let mut values: BTreeMap<Regime, Vec<f64>> = BTreeMap::new();
    let mut before = probe(plan)?;
    for _ in 0..plan.tries {
        if values.values().any(|v| v.len() >= plan.pairs) {
            break;
        }
        if let Some(window) = window(plan, variant, &mut before, &mut dropped)? {
            values.entry(window.regime).or_default().push(window.value);
        }
    }
    let Some((regime, values)) = values.into_iter().rev().max_by_key(|(_, v)| v.len()) else {
        bail!("no window was fit: {}", reasons(&dropped));
    };
    Ok((median(&values), regime, values.len()))
}

/// The counted reasons as text.
pub fn reasons(dropped: &BTreeMap<String, usize>) -> String {
    dropped
        .iter()
        .map(|(reason, n)| format!("{n} {reason}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn count(dropped: &mut BTreeMap<String, usize>, reason: &str, n: usize) {
    *dropped.entry(reason.to_owned()).or_default() += n;
}

fn probe(plan: &Plan) -> Result<cores::Distance> {
    cores::probe(plan.cpus, Duration::from_millis(4))
}

fn window(
    plan: &Plan,
    variant: &mut dyn Variant,
    before: &mut cores::Distance,
    dropped: &mut BTreeMap<String, usize>,
) -> Result<Option<Window>> {
    process::check_interrupted()?;
    variant.run(true)?;
    std::thread::sleep(plan.settle);
    let threads = schedstat(&variant.pids());
    let start = Instant::now();
    variant.begin()?;
    std::thread::sleep(plan.window);
    let value = variant.end()?;
    let took = start.elapsed();
    let waited = longest_wait(&threads, &schedstat(&variant.pids()), took);
    variant.run(false)?;
    let after = probe(plan)?;
    let was = std::mem::replace(before, after);
    if was.regime != after.regime {
        count(dropped, "regime changed", 1);
    } else if waited > plan.wait_at_most {
        count(dropped, "a thread waited for its CPU", 1);
    } else if value.is_nan() || value <= 0.0 {
        count(dropped, "nothing arrived", 1);
    } else {
        return Ok(Some(Window {
            value,
            regime: was.regime,
            round_trip: (was.round_trip + after.round_trip) / 2.0,
        }));
    }
    Ok(None)
}

/// Nanoseconds that each thread ran and waited.
fn schedstat(pids: &[rustix::process::Pid]) -> BTreeMap<String, (u64, u64)> {
    let mut found = BTreeMap::new();
    for pid in pids {
        let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
        for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let mut words = text.split_whitespace().map(|w| w.parse::<u64>().unwrap_or(0));
            if let (Some(ran), Some(waited)) = (words.next(), words.next()) {
                found.insert(task.file_name().to_string_lossy().into_owned(), (ran, waited));
            }
        }
    }
    found
}

/// The largest part of the window for which a busy thread waited.
fn longest_wait(before: &BTreeMap<String, (u64, u64)>, after: &BTreeMap<String, (u64, u64)>, took: Duration) -> f64 {
    let took = took.as_nanos() as f64;
    after
        .iter()
        .filter_map(|(thread, &(ran, waited))| {
            let &(ran_before, waited_before) = before.get(thread)?;
            let (ran, waited) = ((ran - ran_before) as f64 / took, (waited - waited_before) as f64 / took);
            // One that wanted to run for most of the window, whether or not it could.
            (ran + waited > BUSY_FROM).then_some(waited)
        })
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_threads_may_wait_and_busy_ones_may_not() {
        let before = BTreeMap::from([("1".to_owned(), (0, 0)), ("2".to_owned(), (0, 0))]);
        let after = BTreeMap::from([("1".to_owned(), (900, 20)), ("2".to_owned(), (10, 300))]);
        assert_eq!(longest_wait(&before, &after, Duration::from_nanos(1000)), 0.02);
        let after = BTreeMap::from([("1".to_owned(), (300, 300)), ("2".to_owned(), (10, 0))]);
        assert_eq!(longest_wait(&before, &after, Duration::from_nanos(1000)), 0.3);
    }

    struct Fixed(f64);

    impl Variant for Fixed {
        fn run(&mut self, _: bool) -> Result<()> {
            Ok(())
        }
        fn begin(&mut self) -> Result<()> {
            Ok(())
        }
        fn end(&mut self) -> Result<f64> {
            Ok(self.0)
        }
        fn pids(&self) -> Vec<rustix::process::Pid> {
            Vec::new()
        }
    }

    #[test]
    fn a_comparison_is_ours_to_the_peers() {
        let Ok(cpus) = cores::two() else {
            eprintln!("SKIPPED a_comparison_is_ours_to_the_peers: one CPU");
            return;
        };
        let ms = Duration::from_millis;
        let plan = Plan {
            cpus,
            settle: ms(0),
            window: ms(1),
            pairs: 3,
            tries: 200,
            limit: ms(20_000),
            wait_at_most: 1.0,
        };
        let result = compare(&plan, &mut Fixed(3.0), &mut Fixed(2.0)).unwrap();
        assert_eq!(
            (result.ours, result.peer, result.ratio.median, result.pairs),
            (3.0, 2.0, 1.5, 3)
        );
        assert!(
            compare(&plan, &mut Fixed(0.0), &mut Fixed(2.0))
                .unwrap_err()
                .to_string()
                .contains("nothing arrived")
        );
    }
}
