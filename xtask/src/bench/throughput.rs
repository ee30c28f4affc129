//! Throughput beside DPDK's: each side's variants are scouted first, then the best of each is measured in pairs.
//!
//! | group | ours | the peer |
//! |---|---|---|
//! | `virtio_user.*` | our front-end on DPDK's vhost | virtio_user on DPDK's vhost |
//! | `pmd.*` | our plugin in testpmd, on DPDK's vhost | virtio_user on DPDK's vhost |
//! | `both.*` | our front-end on our back-end | virtio_user on DPDK's vhost |
//! | `direct.*` | the same: a port to a port, no switch between | memif's client on its server |
//!
//! A column is a load and a frame length. The variants of a side are compared with its first one, so that scouting
//! stands still neither for far cores nor for the order in which variants are looked at.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::load::Load;
use super::report::{BusyOf, Row, Scouted};
use super::variants::{self, Busy, Choice, Subject};
use super::windows::{self, Comparison, Pairs, Plan, Variant};
use super::{BareRing, Bench, dpdk, ours};
use crate::process;

/// Entries of the rings.
pub const QUEUE: u16 = 1024;

/// A pair of programs, of which there are variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Our front-end, DPDK's vhost.
    OurFront,
    /// Our front-end, our back-end.
    OurBoth,
    /// Our plugin in testpmd, DPDK's vhost.
    Plugin,
    /// DPDK's virtio_user, DPDK's vhost.
    VirtioUser,
    /// DPDK's memif.
    Memif,
}

impl Family {
    fn choices(self) -> &'static [Choice] {
        match self {
            Family::OurFront | Family::OurBoth => variants::OURS,
            Family::Plugin => variants::PLUGIN,
            Family::VirtioUser => variants::VIRTIO_USER,
            Family::Memif => variants::MEMIF,
        }
    }
}

/// A group of metrics.
pub struct Group {
    /// The beginning of their names, without the dot.
    prefix: &'static str,
    ours: Family,
    peer: Family,
    peer_name: &'static str,
    /// Whether the bare ring has windows beside the pairs.
    limit: bool,
}

/// Ours on DPDK's back-end.
pub const VIRTIO_USER: Group = Group {
    prefix: "virtio_user",
    ours: Family::OurFront,
    peer: Family::VirtioUser,
    peer_name: "DPDK virtio_user",
    limit: false,
};

/// Two drivers of the same application on DPDK's back-end.
pub const PMD: Group = Group {
    prefix: "pmd",
    ours: Family::Plugin,
    peer: Family::VirtioUser,
    peer_name: "DPDK virtio_user",
    limit: false,
};

/// Each on its own back-end.
pub const BOTH: Group = Group {
    prefix: "both",
    ours: Family::OurBoth,
    peer: Family::VirtioUser,
    peer_name: "DPDK on both sides",
    limit: true,
};

/// From container to container.
pub const DIRECT: Group = Group {
    prefix: "direct",
    ours: Family::OurBoth,
    peer: Family::Memif,
    peer_name: "DPDK memif",
    limit: true,
};

/// A load and a frame length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Column {
    load: Load,
    bytes: usize,
}

/// What was found best so far in this run.
#[derive(Default)]
pub struct Known(Vec<(Family, Column, &'static Choice)>);

impl Known {
    fn get(&self, family: Family, column: Column) -> Option<&'static Choice> {
        let found = self.0.iter().find(|(f, c, _)| *f == family && *c == column);
        found.map(|(_, _, choice)| *choice)
    }
}

impl Bench<'_> {
    /// Starts a pair of programs, and leaves it stopped.
    fn subject(&mut self, family: Family, choice: &Choice) -> Result<Box<dyn Subject>> {
        self.started += 1;
        let tag = self.started.to_string();
        let dir = self.scratch.dir().to_owned();
        let places =
            |bench: &Self| -> Result<_> { Ok((bench.front(&format!("{tag}f"))?, bench.back(&format!("{tag}b"))?)) };
        let mut subject: Box<dyn Subject> = match family {
            Family::OurFront => Box::new(ours::OnDpdk::start(
                &self.testpmd()?,
                &tag,
                self.front_cpus(),
                self.back(&format!("{tag}b"))?,
                QUEUE,
                choice,
            )?),
            Family::OurBoth => Box::new(ours::Both::start(
                &dir,
                &tag,
                self.front_cpus(),
                self.cpus,
                QUEUE,
                choice,
            )?),
            Family::Plugin => {
                let plugin = self.plugin()?;
                Box::new(dpdk::Pair::start_plugin(
                    &self.testpmd()?,
                    &plugin,
                    &tag,
                    places(self)?,
                    QUEUE,
                    choice,
                )?)
            }
            Family::VirtioUser => Box::new(dpdk::Pair::start(&self.testpmd()?, &tag, places(self)?, QUEUE, choice)?),
            Family::Memif => Box::new(dpdk::Pair::start_memif(
                &self.testpmd()?,
                &tag,
                places(self)?,
                QUEUE,
                choice,
            )?),
        };
        subject.run(false)?;
        Ok(subject)
    }

    /// The metrics of a group.
    pub fn throughput(&mut self, group: &Group) -> Result<()> {
        self.testpmd()?;
        let mut columns = Vec::new();
        for &bytes in self.sizes() {
            for load in Load::ALL {
                if self.wanted(&format!("{}.{}", group.prefix, load.name())) {
                    columns.push(Column { load, bytes });
                }
            }
        }
        self.scout(group, "ours", group.ours, &columns)?;
        self.scout(group, "peer", group.peer, &columns)?;
        let mut pairs: Vec<Pairs> = columns.iter().map(|_| Pairs::default()).collect();
        let mut busy: Vec<Vec<BusyOf>> = vec![Vec::new(); columns.len()];
        let mut errors: Vec<Option<anyhow::Error>> = columns.iter().map(|_| None).collect();
        for launch in 0..self.plan.launches {
            let mut live: Option<Live> = None;
            for (i, column) in columns.iter().enumerate() {
                match self.measure(group, *column, &mut live, &mut pairs[i]) {
                    Ok(shares) => busy[i].push(shares),
                    Err(error) => {
                        process::check_interrupted()?;
                        // What failed may have left its programs in any state.
                        live = None;
                        errors[i] = Some(error.context(format!("launch {launch}")));
                    }
                }
            }
        }
        for (((column, pairs), busy), error) in columns.iter().zip(pairs).zip(busy).zip(errors) {
            let name = format!("{}.{}", group.prefix, column.load.name());
            let result = match error {
                Some(error) => Err(error),
                None => pairs.compare(&self.plan),
            };
            let mut row = Row::compared(&name, column.bytes, "Mpps", true, group.peer_name, result);
            row.ours_name = self.known.get(group.ours, *column).map(|c| c.name.to_owned());
            row.peer_name = self
                .known
                .get(group.peer, *column)
                .map(|c| format!("{}: {}", group.peer_name, c.name));
            row.busy = mean(&busy);
            self.report.add(row);
        }
        Ok(())
    }

    /// One column in one launch.
    fn measure(&mut self, group: &Group, column: Column, live: &mut Option<Live>, pairs: &mut Pairs) -> Result<BusyOf> {
        let known = |family| self.known.get(family, column).context("no variant works");
        let choices = (known(group.ours)?, known(group.peer)?);
        if live.as_ref().is_none_or(|live| live.choices != choices) {
            // The old ones first: pages are given back.
            *live = None;
            *live = Some(Live {
                choices,
                ours: self.subject(group.ours, choices.0)?,
                peer: self.subject(group.peer, choices.1)?,
            });
        }
        let live = live.as_mut().context("just started")?;
        live.ours.prepare(column.load, column.bytes)?;
        live.peer.prepare(column.load, column.bytes)?;
        let mut ring = BareRing {
            cpus: self.cpus,
            bytes: column.bytes,
            window: self.plan.window / 3,
        };
        let limit = group.limit.then_some(&mut ring as &mut dyn Variant);
        let plan = self.plan;
        pairs.launch(&plan, &mut self.patience, &mut *live.ours, &mut *live.peer, limit)?;
        Ok(BusyOf {
            ours: shares(&plan, &mut *live.ours)?,
            peer: shares(&plan, &mut *live.peer)?,
        })
    }

    /// Finds a family's best variant for each column of which it is not known yet.
    fn scout(&mut self, group: &Group, side: &'static str, family: Family, columns: &[Column]) -> Result<()> {
        let columns: Vec<Column> = columns
            .iter()
            .copied()
            .filter(|&c| self.known.get(family, c).is_none())
            .collect();
        if columns.is_empty() {
            return Ok(());
        }
        let choices = family.choices();
        let choices = if self.options.quick { &choices[..2] } else { choices };
        let plan = Plan {
            window: self.plan.window / 2,
            launches: 1,
            tries: 20,
            limit: Duration::from_secs(20),
            near: false,
            ..self.plan
        };
        let mut found: Vec<Scouted> = Vec::new();
        let mut reference = self.subject(family, &choices[0])?;
        for choice in &choices[1..] {
            let started = self.subject(family, choice);
            process::check_interrupted()?;
            let mut started = started.map_err(|e| format!("{e:#}"));
            for column in &columns {
                let result = match &mut started {
                    Err(text) => Err(anyhow::anyhow!("{text}")),
                    Ok(candidate) => scouted(&plan, &mut **candidate, &mut *reference, *column),
                };
                process::check_interrupted()?;
                let (error, result) = (result.as_ref().err().map(|e| format!("{e:#}")), result.ok());
                found.push(Scouted {
                    metric: format!("{}.{}", group.prefix, column.load.name()),
                    bytes: column.bytes,
                    side,
                    variant: choice.name,
                    to_first: result.as_ref().map(|r| r.ratio.median),
                    pairs: result.as_ref().map_or(0, |r| r.pairs),
                    regime: result.as_ref().map(|r| r.regime),
                    best: false,
                    error,
                });
            }
        }
        for column in columns {
            let metric = format!("{}.{}", group.prefix, column.load.name());
            let of = |s: &Scouted| s.metric == metric && s.bytes == column.bytes;
            let best = found
                .iter()
                .enumerate()
                .filter(|(_, s)| of(s))
                .filter_map(|(i, s)| Some((i, s.to_first?)))
                .filter(|&(_, ratio)| ratio > 1.0)
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .map(|(i, _)| i);
            let name = best.map_or(choices[0].name, |i| {
                found[i].best = true;
                found[i].variant
            });
            let choice = choices
                .iter()
                .find(|c| c.name == name)
                .context("scouted among the choices")?;
            self.known.0.push((family, column, choice));
        }
        // A peer that was not looked at in full may be weaker than it could be: nobody should have to find out.
        for s in &found {
            if let Some(error) = &s.error {
                let why = error.lines().next().unwrap_or_default();
                println!("not scouted: {} {} {}: {}: {why}", s.metric, s.bytes, s.side, s.variant);
            }
        }
        self.report.scouted.extend(found);
        Ok(())
    }
}

/// A candidate beside the first of its family.
fn scouted(plan: &Plan, candidate: &mut dyn Subject, first: &mut dyn Subject, column: Column) -> Result<Comparison> {
    candidate.prepare(column.load, column.bytes)?;
    first.prepare(column.load, column.bytes)?;
    let mut no_patience = Duration::ZERO;
    windows::compare(plan, &mut no_patience, candidate, first)
}

/// The two that run for a column.
struct Live {
    choices: (&'static Choice, &'static Choice),
    ours: Box<dyn Subject>,
    peer: Box<dyn Subject>,
}

/// Runs a subject for a window of its own, in which polls are counted: DPDK's counting costs it some cycles.
fn shares(plan: &Plan, subject: &mut dyn Subject) -> Result<Busy> {
    subject.run(true)?;
    process::sleep(plan.settle)?;
    subject.begin_polls()?;
    process::sleep(plan.window)?;
    let busy = subject.end_polls()?;
    subject.run(false)?;
    Ok(busy)
}

/// The mean over launches.
fn mean(of: &[BusyOf]) -> Option<BusyOf> {
    let mean = |get: fn(&BusyOf) -> Option<f64>| {
        let values: Vec<f64> = of.iter().filter_map(get).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    (!of.is_empty()).then(|| BusyOf {
        ours: Busy {
            front: mean(|b| b.ours.front),
            back: mean(|b| b.ours.back),
        },
        peer: Busy {
            front: mean(|b| b.peer.front),
            back: mean(|b| b.peer.back),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_averaged_where_there_are_some() {
        let busy = |front, back| Busy { front, back };
        let of = |front| BusyOf {
            ours: busy(front, None),
            peer: busy(Some(1.0), Some(0.5)),
        };
        let mean = mean(&[of(Some(0.25)), of(None), of(Some(0.75))]).unwrap();
        assert_eq!((mean.ours.front, mean.ours.back), (Some(0.5), None));
        assert_eq!((mean.peer.front, mean.peer.back), (Some(1.0), Some(0.5)));
        assert!(super::mean(&[]).is_none());
    }
}
