//! A B A B in one run: two variants that are both started, of which one runs at a time.
//!
//! Each variant is a complete set of processes. All of them are stopped (SIGSTOP) but for the one whose window it is.
//! Before and after each window the two CPUs' distance is probed, while nothing runs. A window is dropped, and its
//! reason counted, if the distance changed, or if a thread that forwards waited for its CPU for more than 4 % of the
//! time. An A and the B after it are a pair if both were kept, in the same regime. Pairs of several launches (fresh
//! processes, fresh memory) are put together; those of the near regime are preferred, and waited for: a metric for as
//! long as [`Plan::patience`] says, and the run for as long as it has patience left.

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
    /// Times that both variants are started anew.
    pub launches: usize,
    /// Pairs that are wanted of each launch.
    pub pairs: usize,
    /// Pairs that are tried, at most, in each launch.
    pub tries: usize,
    /// The time that a launch may take, at most, without what it waits for near cores.
    pub limit: Duration,
    /// The part of a window for which a busy thread may wait: [`WAIT_AT_MOST`], but for a trial on a busy machine.
    pub wait_at_most: f64,
    /// Whether pairs in the near regime are waited for.
    pub near: bool,
    /// How long a metric waits for near cores, over all launches: the first of three for a third of it.
    pub patience: Duration,
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
    /// Ours to a window of the bare ring beside it, pair by pair.
    pub of_limit: Option<Spread>,
    /// The CPUs' distance in these pairs.
    pub regime: Regime,
    /// Median round trip of a cache line in nanoseconds.
    pub round_trip_ns: f64,
    /// Pairs that count.
    pub pairs: usize,
    /// The same of each launch.
    pub launches: Vec<Launch>,
    /// Windows that were dropped, by reason.
    pub dropped: BTreeMap<String, usize>,
}

/// The pairs of one launch.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Launch {
    /// Its number, from 0.
    pub launch: usize,
    /// Pairs that count.
    pub pairs: usize,
    /// Median of ours.
    pub ours: f64,
    /// Median of the peer's.
    pub peer: f64,
    /// Median of the pairwise ratios.
    pub ratio: f64,
}

struct Window {
    value: f64,
    regime: Regime,
    round_trip: f64,
}

#[derive(Clone, Copy)]
struct Pair {
    launch: usize,
    ours: f64,
    peer: f64,
    limit: Option<f64>,
    round_trip: f64,
}

/// The pairs of a metric, over its launches.
#[derive(Default)]
pub struct Pairs {
    kept: BTreeMap<Regime, Vec<Pair>>,
    dropped: BTreeMap<String, usize>,
    launches: usize,
    waited: Duration,
}

impl Pairs {
    /// The next launch's pairs come.
    pub fn begin(&mut self) {
        self.launches += 1;
    }

    /// How long it was waited for near cores.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// How long this launch may still wait for near cores, in a run that has `patience` left.
    fn may_wait(&self, plan: &Plan, patience: Duration) -> Duration {
        if !plan.near {
            return Duration::ZERO;
        }
        let share = plan.patience * self.launches as u32 / plan.launches.max(1) as u32;
        share.saturating_sub(self.waited).min(patience)
    }

    /// Waits for a while, if it may: whether it did.
    fn wait(&mut self, plan: &Plan, patience: &mut Duration) -> Result<bool> {
        let pause = Duration::from_millis(200).min(self.may_wait(plan, *patience));
        process::sleep(pause)?;
        *patience -= pause;
        self.waited += pause;
        Ok(!pause.is_zero())
    }

    /// The cores' distance, once they are near or were waited for long enough.
    pub fn regime(&mut self, plan: &Plan, patience: &mut Duration) -> Result<Regime> {
        loop {
            let regime = probe(plan)?.regime;
            if regime == Regime::Near || !self.wait(plan, patience)? {
                return Ok(regime);
            }
        }
    }

    /// One launch's pairs: alternates until there are enough, in the near regime if it can be had. `patience` is how
    /// long this run may still wait for near cores, in all. The bare ring, if given, has a window beside each pair.
    pub fn launch(
        &mut self,
        plan: &Plan,
        patience: &mut Duration,
        ours: &mut dyn Variant,
        peer: &mut dyn Variant,
        limit: Option<&mut dyn Variant>,
    ) -> Result<()> {
        self.begin();
        self.go_on(plan, patience, None, ours, peer, limit).map(drop)
    }

    /// More pairs of this launch, until there are enough. With `only`, pairs in the other regime do not count, for the
    /// variants were chosen for this one; and `false`, before there are enough, when the cores are not at that distance
    /// any more.
    pub fn go_on(
        &mut self,
        plan: &Plan,
        patience: &mut Duration,
        only: Option<Regime>,
        ours: &mut dyn Variant,
        peer: &mut dyn Variant,
        mut limit: Option<&mut dyn Variant>,
    ) -> Result<bool> {
        let launch = self.launches.saturating_sub(1);
        let waited = self.waited;
        let mut tried = 0;
        let start = Instant::now();
        let mut before = probe(plan)?;
        while tried < plan.tries && start.elapsed() < plan.limit + (self.waited - waited) {
            let near = self.of_launch(Regime::Near, launch);
            let far = self.of_launch(Regime::Far, launch);
            match only {
                Some(only) if self.of_launch(only, launch) >= plan.pairs => break,
                Some(only) if before.regime != only => {
                    // Near ones went: they may come back.
                    if only == Regime::Near && self.wait(plan, patience)? {
                        before = probe(plan)?;
                        continue;
                    }
                    return Ok(false);
                }
                Some(_) => {}
                None if near >= plan.pairs => break,
                None if far >= plan.pairs => {
                    if self.may_wait(plan, *patience).is_zero() {
                        break;
                    }
                    if before.regime == Regime::Far {
                        self.wait(plan, patience)?;
                        before = probe(plan)?;
                        continue;
                    }
                }
                None => {}
            }
            tried += 1;
            let dropped = &mut self.dropped;
            let a = window(plan, ours, &mut before, dropped)?;
            let b = window(plan, peer, &mut before, dropped)?;
            let c = match &mut limit {
                Some(limit) => Some(window(&plan.bare(), *limit, &mut before, dropped)?),
                None => None,
            };
            match (a, b) {
                (Some(a), Some(b)) if a.regime == b.regime && only.is_some_and(|only| only != a.regime) => {
                    count(dropped, "variants were chosen for the other regime", 2);
                }
                (Some(a), Some(b)) if a.regime == b.regime => {
                    let beside = c.flatten().filter(|c| c.regime == a.regime);
                    self.kept.entry(a.regime).or_default().push(Pair {
                        launch,
                        ours: a.value,
                        peer: b.value,
                        limit: beside.map(|c| c.value),
                        round_trip: (a.round_trip + b.round_trip) / 2.0,
                    });
                }
                (Some(_), Some(_)) => count(dropped, "regime differs within the pair", 2),
                (None, None) => {}
                _ => count(dropped, "its partner was dropped", 1),
            }
        }
        Ok(true)
    }

    /// The median ratio in each regime, and how many pairs that is of.
    pub fn ratios(&self) -> BTreeMap<Regime, (f64, usize)> {
        let of = |pairs: &Vec<Pair>| pairs.iter().map(|p| p.ours / p.peer).collect::<Vec<_>>();
        let of = |(regime, pairs): (&Regime, &Vec<Pair>)| (*regime, (median(&of(pairs)), pairs.len()));
        self.kept.iter().map(of).collect()
    }

    /// The windows that were dropped, as text.
    pub fn dropped(&self) -> String {
        reasons(&self.dropped)
    }

    fn of_launch(&self, regime: Regime, launch: usize) -> usize {
        let pairs = self.kept.get(&regime).into_iter().flatten();
        pairs.filter(|p| p.launch == launch).count()
    }

    /// What the pairs say: those of the near regime if there are as many as wanted, or no fewer than of the far one.
    pub fn compare(&self, plan: &Plan) -> Result<Comparison> {
        let len = |regime| self.kept.get(&regime).map_or(0, Vec::len);
        let (near, far) = (len(Regime::Near), len(Regime::Far));
        let regime = if near > 0 && (near >= plan.pairs * plan.launches || near >= far) {
            Regime::Near
        } else {
            Regime::Far
        };
        let Some(pairs) = self.kept.get(&regime) else {
            bail!("no pair of windows was fit to compare: {}", reasons(&self.dropped));
        };
        let column = |f: fn(&Pair) -> f64| pairs.iter().map(f).collect::<Vec<_>>();
        let launches = (0..self.launches).filter_map(|launch| {
            let of: Vec<&Pair> = pairs.iter().filter(|p| p.launch == launch).collect();
            let column = |f: fn(&Pair) -> f64| median(&of.iter().map(|p| f(p)).collect::<Vec<_>>());
            (!of.is_empty()).then(|| Launch {
                launch,
                pairs: of.len(),
                ours: column(|p| p.ours),
                peer: column(|p| p.peer),
                ratio: column(|p| p.ours / p.peer),
            })
        });
        let of_limit: Vec<f64> = pairs.iter().filter_map(|p| Some(p.ours / p.limit?)).collect();
        let mut dropped = self.dropped.clone();
        let other = near + far - pairs.len();
        if other > 0 {
            count(&mut dropped, "of the other regime", 2 * other);
        }
        Ok(Comparison {
            ours: median(&column(|p| p.ours)),
            peer: median(&column(|p| p.peer)),
            ratio: Spread::of(&column(|p| p.ours / p.peer)),
            of_limit: (!of_limit.is_empty()).then(|| Spread::of(&of_limit)),
            regime,
            round_trip_ns: median(&column(|p| p.round_trip)),
            pairs: pairs.len(),
            launches: launches.collect(),
            dropped,
        })
    }
}

impl Plan {
    /// For the bare ring, which runs within [`Variant::end`].
    pub fn bare(&self) -> Self {
        Plan {
            settle: Duration::ZERO,
            window: Duration::ZERO,
            ..*self
        }
    }

    /// Of one launch that has all the pairs.
    pub fn at_once(&self) -> Self {
        Plan {
            launches: 1,
            pairs: self.pairs * self.launches,
            tries: self.tries * self.launches,
            limit: self.limit * self.launches as u32,
            ..*self
        }
    }
}

/// All pairs in one launch.
pub fn compare(
    plan: &Plan,
    patience: &mut Duration,
    ours: &mut dyn Variant,
    peer: &mut dyn Variant,
) -> Result<Comparison> {
    let plan = plan.at_once();
    let mut pairs = Pairs::default();
    pairs.launch(&plan, patience, ours, peer, None)?;
    pairs.compare(&plan)
}

/// Medians of one variant alone, where there is nothing to compare with: as many windows as a comparison has pairs.
pub fn alone(plan: &Plan, variant: &mut dyn Variant) -> Result<(f64, Regime, usize)> {
    let mut dropped = BTreeMap::new();
    let mut values: BTreeMap<Regime, Vec<f64>> = BTreeMap::new();
    let plan = &plan.at_once();
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
pub(super) fn schedstat(pids: &[rustix::process::Pid]) -> BTreeMap<String, (u64, u64)> {
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
pub(super) fn longest_wait(
    before: &BTreeMap<String, (u64, u64)>,
    after: &BTreeMap<String, (u64, u64)>,
    took: Duration,
) -> f64 {
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
            launches: 2,
            pairs: 2,
            tries: 100,
            limit: ms(10_000),
            wait_at_most: 1.0,
            near: false,
            patience: ms(0),
        };
        let mut pairs = Pairs::default();
        let mut no_patience = Duration::ZERO;
        for _ in 0..plan.launches {
            let limit: Option<&mut dyn Variant> = Some(&mut Fixed(6.0));
            pairs
                .launch(&plan, &mut no_patience, &mut Fixed(3.0), &mut Fixed(2.0), limit)
                .unwrap();
        }
        let result = pairs.compare(&plan).unwrap();
        assert_eq!((result.ours, result.peer, result.ratio.median), (3.0, 2.0, 1.5));
        assert_eq!(result.of_limit.unwrap().median, 0.5);
        assert!(result.pairs >= 2 && result.launches.iter().map(|l| l.pairs).sum::<usize>() == result.pairs);
        let nothing = compare(&plan, &mut no_patience, &mut Fixed(0.0), &mut Fixed(2.0));
        assert!(nothing.unwrap_err().to_string().contains("nothing arrived"));
    }

    #[test]
    fn near_pairs_count_if_there_are_enough_of_them() {
        let pair = |ours| Pair {
            launch: 0,
            ours,
            peer: 1.0,
            limit: None,
            round_trip: 50.0,
        };
        let of = |near: usize, far: usize| {
            let kept = BTreeMap::from([
                (Regime::Near, vec![pair(2.0); near]),
                (Regime::Far, vec![pair(3.0); far]),
            ]);
            let pairs = Pairs {
                kept,
                launches: 1,
                ..Pairs::default()
            };
            let plan = Plan {
                cpus: (0, 1),
                settle: Duration::ZERO,
                window: Duration::ZERO,
                launches: 1,
                pairs: 3,
                tries: 1,
                limit: Duration::ZERO,
                wait_at_most: 1.0,
                near: true,
                patience: Duration::ZERO,
            };
            pairs.compare(&plan).unwrap()
        };
        assert_eq!((of(3, 9).regime, of(3, 9).ours), (Regime::Near, 2.0));
        assert_eq!(of(2, 2).regime, Regime::Near);
        assert_eq!((of(2, 3).regime, of(2, 3).ours), (Regime::Far, 3.0));
        assert_eq!(of(3, 9).dropped["of the other regime"], 18);
    }
}
