//! Throughput beside DPDK's: each side's variants are scouted first, then the best of each is measured in pairs.
//!
//! | group | ours | the peer |
//! |---|---|---|
//! | `virtio_user.*` | our front-end on DPDK's vhost | virtio_user on DPDK's vhost |
//! | `pmd.*` | our plugin in testpmd, on DPDK's vhost | virtio_user on DPDK's vhost |
//! | `both.*` | our front-end on our back-end | virtio_user on DPDK's vhost |
//! | `direct.*` | the same: a port to a port, no switch between | memif's client on its server |
//!
//! A column is a load and a frame length. Variants are scouted in [`scouting`](super::scouting), at the distance of the
//! cores at which the column is measured then.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::load::Load;
use super::report::{BusyOf, Row, Spent};
use super::variants::{self, Busy, Choice, Subject};
use super::windows::{Pairs, Plan, Variant};
use super::{BareRing, Bench, dpdk, ours};
use crate::process;

/// Entries of the rings.
pub const QUEUE: u16 = 1024;

/// Times that a column is taken up in a launch, where the cores' distance changes meanwhile.
const ROUNDS: usize = 3;

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
    /// Its variants.
    pub fn choices(self) -> &'static [Choice] {
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
pub struct Column {
    /// What the two sides do.
    pub load: Load,
    /// The frame length.
    pub bytes: usize,
}

/// A column of a group on its way through the launches.
struct Metric {
    name: String,
    column: Column,
    pairs: Pairs,
    busy: Vec<BusyOf>,
    error: Option<anyhow::Error>,
    spent: Spent,
}

/// The two that run for a column, if they do.
#[derive(Default)]
struct Live {
    ours: Option<(&'static Choice, Box<dyn Subject>)>,
    peer: Option<(&'static Choice, Box<dyn Subject>)>,
}

impl Group {
    fn families(&self) -> [(&'static str, Family); 2] {
        [("ours", self.ours), ("peer", self.peer)]
    }
}

impl Bench<'_> {
    /// Starts a pair of programs, and leaves it stopped.
    pub fn subject(&mut self, family: Family, choice: &Choice) -> Result<Box<dyn Subject>> {
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
        let mut metrics = Vec::new();
        for &bytes in self.sizes() {
            for load in Load::ALL {
                let name = format!("{}.{}", group.prefix, load.name());
                if self.wanted_at(&name, Some(bytes)) {
                    metrics.push(Metric {
                        name,
                        column: Column { load, bytes },
                        pairs: Pairs::default(),
                        busy: Vec::new(),
                        error: None,
                        spent: Spent::default(),
                    });
                }
            }
        }
        for launch in 0..self.plan.launches {
            let mut live = Live::default();
            let mut left: Vec<usize> = (0..metrics.len()).collect();
            while !left.is_empty() {
                // Next one that the running programs do for.
                let regime = self.distance()?;
                let runs = |place: &Option<(&Choice, _)>, family, i: usize| {
                    let best = self.known.best(family, metrics[i].column, regime);
                    place.as_ref().is_some_and(|(choice, _)| Some(*choice) == best)
                };
                let starts = |i: usize| {
                    let (ours, peer) = (runs(&live.ours, group.ours, i), runs(&live.peer, group.peer, i));
                    // DPDK's takes longer to start.
                    2 * u8::from(!peer) + u8::from(!ours)
                };
                let at = (0..left.len()).min_by_key(|&at| starts(left[at])).unwrap_or_default();
                let i = left.remove(at);
                let metric = &mut metrics[i];
                if metric.error.is_some() {
                    continue;
                }
                metric.pairs.begin();
                let outcome = self.measure(group, metric, &mut live);
                process::check_interrupted()?;
                if let Err(error) = outcome {
                    // What failed may have left its programs in any state.
                    live = Live::default();
                    metric.error = Some(error.context(format!("launch {launch}")));
                }
                eprintln!(
                    "  {} {}: launch {} of {}",
                    metric.name,
                    metric.column.bytes,
                    launch + 1,
                    self.plan.launches
                );
                let done = launch + 1 == self.plan.launches || metric.error.is_some();
                let row = self.row(group, metric, !done);
                if done {
                    self.report.add(row);
                } else {
                    self.report.set(row);
                }
                self.save()?;
            }
        }
        Ok(())
    }

    fn row(&self, group: &Group, metric: &Metric, unfinished: bool) -> Row {
        let column = metric.column;
        let result = match &metric.error {
            Some(error) => Err(anyhow::anyhow!("{error:#}")),
            None => metric.pairs.compare(&self.plan),
        };
        let regime = result.as_ref().ok().map(|c| c.regime);
        let mut row = Row::compared(&metric.name, column.bytes, "Mpps", true, group.peer_name, result);
        if let Some(regime) = regime {
            let best = |family| self.known.best(family, column, regime);
            row.ours_name = best(group.ours).map(|c| c.name.to_owned());
            row.peer_name = best(group.peer).map(|c| format!("{}: {}", group.peer_name, c.name));
            let scouted = |(_, family)| self.known.scouted_at(family, column, regime);
            row.scouted = group.families().into_iter().flat_map(scouted).collect();
        }
        row.busy = mean(&metric.busy);
        row.unfinished = unfinished;
        row.seconds = Some(metric.spent);
        row
    }

    /// One column in one launch.
    fn measure(&mut self, group: &Group, metric: &mut Metric, live: &mut Live) -> Result<()> {
        let column = metric.column;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let regime = metric.pairs.regime(&self.plan, &mut self.patience)?;
            metric.spent.waiting += start.elapsed().as_secs_f64();
            for (side, family) in group.families() {
                if self.to_scout(family, column, regime) {
                    // Pages are given back first.
                    *live = Live::default();
                    self.scout(&metric.name, side, family, column, regime, &mut metric.spent)?;
                }
            }
            let best = |family| self.known.best(family, column, regime).context("no variant works");
            let (ours, peer) = (best(group.ours)?, best(group.peer)?);
            let start = Instant::now();
            self.replace(&mut live.ours, group.ours, ours)?;
            self.replace(&mut live.peer, group.peer, peer)?;
            metric.spent.starting += start.elapsed().as_secs_f64();
            let (Some((_, ours)), Some((_, peer))) = (&mut live.ours, &mut live.peer) else {
                continue;
            };
            let start = Instant::now();
            ours.prepare(column.load, column.bytes)?;
            peer.prepare(column.load, column.bytes)?;
            metric.spent.preparing += start.elapsed().as_secs_f64();
            let mut ring = BareRing {
                cpus: self.cpus,
                bytes: column.bytes,
                window: self.plan.window / 3,
            };
            let limit = group.limit.then_some(&mut ring as &mut dyn Variant);
            let plan = self.plan;
            let (start, waited) = (Instant::now(), metric.pairs.waited());
            let only = Some(regime);
            let enough = metric
                .pairs
                .go_on(&plan, &mut self.patience, only, &mut **ours, &mut **peer, limit)?;
            if enough {
                metric.busy.push(BusyOf {
                    ours: shares(&plan, &mut **ours)?,
                    peer: shares(&plan, &mut **peer)?,
                });
            }
            let waited = (metric.pairs.waited() - waited).as_secs_f64();
            metric.spent.waiting += waited;
            metric.spent.measuring += start.elapsed().as_secs_f64() - waited;
            if enough {
                break;
            }
        }
        Ok(())
    }

    /// Another program in the place of one, unless it is the same.
    fn replace(
        &mut self,
        place: &mut Option<(&'static Choice, Box<dyn Subject>)>,
        family: Family,
        choice: &'static Choice,
    ) -> Result<()> {
        if place.as_ref().is_none_or(|(running, _)| *running != choice) {
            // The old one first: pages are given back.
            *place = None;
            *place = Some((choice, self.subject(family, choice)?));
        }
        Ok(())
    }
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
