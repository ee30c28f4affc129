//! Which variant of a side is its best, for a load and a frame length, at a distance of the cores.
//!
//! Each variant that can differ is compared with its side's first one, A B A B in short windows that pass the same
//! gates as those that are measured. That is done once a run for each side, column and distance, whichever metrics use
//! it. The first of a side and the candidate stay started for all columns that are wanted. A variant that is far behind
//! after one pair is not looked at again; one of which there is no more than that pair, or nothing, is, after the others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Bench;
use super::cores::{self, Regime};
use super::report::{Scouted, Spent};
use super::throughput::{Column, Family};
use super::variants::{self, Choice, Subject};
use super::windows::{Pairs, Plan};
use crate::process;

/// Pairs of windows that a variant gets that is not far behind.
const PAIRS: usize = 3;

/// Pairs that tell that a variant is better.
const ENOUGH: usize = 2;

/// Far behind: this ratio to the first, or less.
const BEHIND: f64 = 0.85;

/// Times that a variant is looked at whose windows were dropped.
const ATTEMPTS: usize = 3;

/// How long scouting a side for a group's columns waits for near cores, if they went away meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was seen of a variant for a column.
struct Seen {
    family: Family,
    column: Column,
    choice: &'static Choice,
    /// For reports: the metric that it was scouted for first, and the side.
    metric: String,
    side: &'static str,
    /// To the first, and pairs, by the cores' distance.
    ratios: BTreeMap<Regime, (f64, usize)>,
    /// The distances for which there was an attempt.
    tried: Vec<Regime>,
    error: Option<String>,
}

impl Seen {
    /// The ratio to the first, of enough pairs: at that distance, or else at the other one.
    fn told(&self, regime: Regime) -> Option<(Regime, f64)> {
        let told = |(regime, &(ratio, pairs)): (&Regime, &(f64, usize))| (pairs >= ENOUGH).then_some((*regime, ratio));
        let here = self.ratios.get_key_value(&regime).and_then(told);
        here.or_else(|| self.ratios.iter().find_map(told))
    }
}

/// A variant to be looked at, and the columns, with their metrics' names and the pairs that there are.
struct Todo {
    choice: &'static Choice,
    columns: Vec<(String, Column, Pairs)>,
}

/// All that was scouted in this run.
#[derive(Default)]
pub struct Known {
    seen: Vec<Seen>,
}

impl Known {
    fn of(&self, family: Family, column: Column) -> impl Iterator<Item = &Seen> {
        self.seen
            .iter()
            .filter(move |s| s.family == family && s.column == column)
    }

    /// Whether variants among `choices` are to be scouted for a column yet: they were not looked at, at that distance.
    pub fn lacks(&self, family: Family, choices: &'static [Choice], column: Column, regime: Regime) -> bool {
        let looked = |s: &Seen| s.ratios.contains_key(&regime) || s.tried.contains(&regime) || s.error.is_some();
        let known = |choice| self.of(family, column).any(|s| s.choice == choice && looked(s));
        variants::that_differ(choices, column.load)
            .skip(1)
            .any(|choice| !known(choice))
    }

    /// The best variant at that distance; by what was seen at the other one, if there is nothing else.
    pub fn best(&self, family: Family, column: Column, regime: Regime) -> Option<&'static Choice> {
        self.of(family, column)
            .filter_map(|s| Some((s.choice, s.told(regime)?.1)))
            .filter(|&(_, ratio)| ratio > 1.0)
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map_or(family.choices().first(), |(choice, _)| Some(choice))
    }

    /// The distances at which that was found out.
    pub fn scouted_at(&self, family: Family, column: Column, regime: Regime) -> Vec<Regime> {
        self.of(family, column)
            .filter_map(|s| s.told(regime).map(|(regime, _)| regime))
            .collect()
    }

    /// For the report.
    pub fn report(&self) -> Vec<Scouted> {
        let mut all = Vec::new();
        for s in &self.seen {
            let row = |regime: Option<Regime>, value: Option<(f64, usize)>| Scouted {
                metric: s.metric.clone(),
                bytes: s.column.bytes,
                side: s.side,
                variant: s.choice.name,
                to_first: value.map(|v| v.0),
                pairs: value.map_or(0, |v| v.1),
                regime,
                best: regime.is_some_and(|r| self.best(s.family, s.column, r) == Some(s.choice)),
                error: s.error.clone(),
            };
            if s.ratios.is_empty() {
                all.push(row(None, None));
            }
            all.extend(s.ratios.iter().map(|(regime, value)| row(Some(*regime), Some(*value))));
        }
        all
    }
}

impl Bench<'_> {
    /// The cores' distance just now.
    pub fn distance(&self) -> Result<Regime> {
        Ok(cores::probe(self.cpus, Duration::from_millis(4))?.regime)
    }

    /// Scouts a side at a distance: for this column, and while its programs run for all others that are wanted and that
    /// the distance allows.
    pub fn scout(
        &mut self,
        metric: &str,
        side: &'static str,
        family: Family,
        column: Column,
        regime: Regime,
        spent: &mut Spent,
    ) -> Result<()> {
        let columns = self.columns_to_scout(metric, family, column, regime);
        let choices = self.choices(family);
        let plan = Plan {
            settle: self.plan.settle / 2,
            window: (self.plan.window / 4).max(Duration::from_millis(40)),
            launches: 1,
            pairs: 1,
            tries: 6,
            limit: Duration::from_secs(3),
            ..self.plan
        };
        let mut patience = PATIENCE.min(self.patience);
        let mut reference: Option<Box<dyn Subject>> = None;
        let mut todo: Vec<Todo> = Vec::new();
        for choice in &choices[1..] {
            let wanted = |c: &&(String, Column)| variants::that_differ(choices, c.1.load).any(|d| d == choice);
            let of = |(metric, column): &(String, Column)| (metric.clone(), *column, Pairs::default());
            let columns: Vec<_> = columns.iter().filter(wanted).map(of).collect();
            if !columns.is_empty() {
                todo.push(Todo { choice, columns });
            }
        }
        for attempt in 1..=ATTEMPTS {
            for Todo { choice, columns } in std::mem::take(&mut todo) {
                let start = Instant::now();
                if reference.is_none() {
                    reference = Some(self.subject(family, &choices[0])?);
                }
                let candidate = self.subject(family, choice);
                process::check_interrupted()?;
                spent.starting += start.elapsed().as_secs_f64();
                let start = Instant::now();
                let Some(reference) = &mut reference else { continue };
                let mut candidate = candidate.map_err(|e| format!("{e:#}"));
                let mut waiting = Duration::ZERO;
                let mut again = Vec::new();
                for (metric, column, mut pairs) in columns {
                    let before = pairs.waited();
                    let outcome = match &mut candidate {
                        Err(text) => Err(anyhow::anyhow!("{text}")),
                        Ok(candidate) => look(
                            &plan,
                            &mut patience,
                            &mut **candidate,
                            &mut **reference,
                            column,
                            regime,
                            &mut pairs,
                        ),
                    };
                    process::check_interrupted()?;
                    waiting += pairs.waited() - before;
                    if outcome.is_ok() && !is_told(&pairs) && attempt < ATTEMPTS {
                        again.push((metric, column, pairs));
                        continue;
                    }
                    let nothing = || anyhow::anyhow!("no pair of windows was fit to compare: {}", pairs.dropped());
                    let outcome = outcome.and_then(|()| match pairs.ratios().is_empty() {
                        true => Err(nothing()),
                        false => Ok(()),
                    });
                    let error = outcome.err().map(|e| format!("{e:#}"));
                    if let Some(error) = &error {
                        // A peer that was not looked at in full may be weaker than it could be: nobody should have to
                        // find out.
                        let why = error.lines().next().unwrap_or_default();
                        println!("not scouted: {metric} {} {side}: {}: {why}", column.bytes, choice.name);
                    }
                    self.known
                        .note(family, column, choice, (&metric, side), &pairs, regime, error);
                }
                self.patience -= waiting.min(self.patience);
                spent.waiting += waiting.as_secs_f64();
                spent.scouting += start.elapsed().as_secs_f64() - waiting.as_secs_f64();
                if !again.is_empty() {
                    todo.push(Todo { choice, columns: again });
                }
            }
        }
        self.report.scouted = self.known.report();
        eprintln!("  scouted for {metric} and its like: {side}, {regime}");
        Ok(())
    }

    /// The variants of a family that this run looks at.
    pub fn choices(&self, family: Family) -> &'static [Choice] {
        let choices = family.choices();
        if self.options.quick { &choices[..2] } else { choices }
    }

    /// Whether a family is to be scouted for a column yet. A short run takes what it has from the other distance.
    pub fn to_scout(&self, family: Family, column: Column, regime: Regime) -> bool {
        let lacks = |regime| self.known.lacks(family, self.choices(family), column, regime);
        match self.options.quick {
            true => lacks(Regime::Near) && lacks(Regime::Far),
            false => lacks(regime),
        }
    }

    /// The columns of the metric's group that are not scouted at that distance yet: programs start once for all.
    fn columns_to_scout(&self, metric: &str, family: Family, column: Column, regime: Regime) -> Vec<(String, Column)> {
        let group = metric.split('.').next().unwrap_or_default();
        let mut columns = vec![(metric.to_owned(), column)];
        for &bytes in self.sizes() {
            for load in super::load::Load::ALL {
                let (name, other) = (format!("{group}.{}", load.name()), Column { load, bytes });
                let lacks = self.to_scout(family, other, regime);
                if other != column && lacks && self.wanted_at(&name, Some(bytes)) {
                    columns.push((name, other));
                }
            }
        }
        columns
    }
}

impl Known {
    #[expect(clippy::too_many_arguments, reason = "one call")]
    fn note(
        &mut self,
        family: Family,
        column: Column,
        choice: &'static Choice,
        (metric, side): (&str, &'static str),
        pairs: &Pairs,
        regime: Regime,
        error: Option<String>,
    ) {
        let ratios = pairs.ratios();
        let old = self
            .seen
            .iter_mut()
            .find(|s| s.family == family && s.column == column && s.choice == choice);
        if let Some(seen) = old {
            seen.ratios.extend(ratios);
            seen.tried.push(regime);
            seen.error = error;
            return;
        }
        self.seen.push(Seen {
            family,
            column,
            choice,
            metric: metric.to_owned(),
            side,
            ratios,
            tried: vec![regime],
            error,
        });
    }
}

/// Whether pairs of some distance tell what a variant is worth.
fn is_told(pairs: &Pairs) -> bool {
    let told = |(ratio, pairs): (f64, usize)| pairs >= ENOUGH || ratio <= BEHIND;
    pairs.ratios().into_values().any(told)
}

/// Compares a candidate with the first of its family.
fn look(
    plan: &Plan,
    patience: &mut Duration,
    candidate: &mut dyn Subject,
    first: &mut dyn Subject,
    column: Column,
    regime: Regime,
    pairs: &mut Pairs,
) -> Result<()> {
    candidate.prepare(column.load, column.bytes)?;
    first.prepare(column.load, column.bytes)?;
    pairs.begin();
    let plan = Plan {
        near: plan.near && regime == Regime::Near,
        ..*plan
    };
    pairs.go_on(&plan, patience, None, candidate, first, None)?;
    let ratios = pairs.ratios();
    let seen = ratios.get(&regime).or(ratios.values().next());
    if seen.is_none_or(|&(ratio, _)| ratio <= BEHIND) {
        return Ok(());
    }
    let more = Plan { pairs: PAIRS, ..plan };
    pairs.go_on(&more, patience, None, candidate, first, None).map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::load::Load;
    use super::*;

    const COLUMN: Column = Column {
        load: Load::Rx,
        bytes: 64,
    };

    #[test]
    fn the_best_is_of_the_distance() {
        let mut known = Known::default();
        let family = Family::OurBoth;
        let choices = &variants::OURS[..3];
        assert!(known.lacks(family, choices, COLUMN, Regime::Near));
        assert_eq!(known.best(family, COLUMN, Regime::Near), variants::OURS.first());
        for (choice, near, far) in [(&variants::OURS[1], 1.2, 0.9), (&variants::OURS[2], 1.1, 1.3)] {
            known.seen.push(Seen {
                family: Family::OurBoth,
                column: COLUMN,
                choice,
                metric: "both.rx".into(),
                side: "ours",
                ratios: BTreeMap::from([(Regime::Near, (near, 3)), (Regime::Far, (far, 3))]),
                tried: vec![Regime::Near],
                error: None,
            });
        }
        let best_of = |known: &Known, regime| known.best(family, COLUMN, regime).unwrap().name;
        assert_eq!(best_of(&known, Regime::Near), "packed");
        assert_eq!(best_of(&known, Regime::Far), "split, in_order=0");
        assert!(!known.lacks(family, choices, COLUMN, Regime::Near));
        assert!(!known.lacks(family, choices, COLUMN, Regime::Far));
        assert!(known.lacks(family, variants::OURS, COLUMN, Regime::Near));
        assert_eq!(known.report().iter().filter(|s| s.best).count(), 2);
        // One pair tells nothing: the other distance does.
        known.seen[1].ratios.insert(Regime::Near, (1.4, 1));
        assert_eq!(best_of(&known, Regime::Near), "split, in_order=0");
        known.seen[1].ratios.insert(Regime::Far, (1.0, 3));
        assert_eq!(best_of(&known, Regime::Near), "packed");
        known.seen[0].ratios.remove(&Regime::Far);
        assert!(known.lacks(family, choices, COLUMN, Regime::Far));
        let scouted = known.scouted_at(family, COLUMN, Regime::Far);
        assert_eq!(scouted, [Regime::Near, Regime::Far]);
    }
}
