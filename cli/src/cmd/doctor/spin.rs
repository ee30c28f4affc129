//! A thread that does nothing but look at the clock, and how long it was away in between.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;
use usernic::cpu;

/// The longest gaps that are told.
const LONGEST: usize = 5;

/// The histogram's largest gap: what is longer counts as this.
const MOST: u64 = 60_000_000_000;

/// Gaps of one CPU, in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Jitter {
    cpu: u32,
    seconds: f64,
    /// Looks at the clock.
    looks: u64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    p99999_ns: u64,
    max_ns: u64,
    /// Gaps of at least 1, 10, 100 and 1000 microseconds.
    over: [u64; 4],
    longest_ns: Vec<u64>,
}

/// Spins on a CPU for so long. The thread is one of its own: nobody's affinity changes.
pub fn spin(cpu: u32, time: Duration) -> Result<Jitter> {
    let thread = std::thread::Builder::new().name("spin".into()).spawn(move || {
        cpu::pin(cpu)?;
        Ok::<_, std::io::Error>(measure(cpu, time))
    });
    let jitter = thread?.join().ok().context("the spinning thread ended early")?;
    jitter.with_context(|| format!("cannot run on CPU {cpu}"))
}

fn measure(cpu: u32, time: Duration) -> Jitter {
    let mut histogram =
        Histogram::<u64>::new_with_bounds(1, MOST, 3).unwrap_or_else(|_| Histogram::new(3).expect("3 digits"));
    let mut longest: Vec<u64> = Vec::with_capacity(LONGEST + 1);
    let start = Instant::now();
    let mut last = start;
    loop {
        let now = Instant::now();
        let gap = u64::try_from((now - last).as_nanos()).unwrap_or(MOST);
        last = now;
        histogram.saturating_record(gap.max(1));
        if longest.len() < LONGEST || longest.last().is_some_and(|least| gap > *least) {
            let at = longest.partition_point(|other| *other >= gap);
            longest.insert(at, gap);
            longest.truncate(LONGEST);
        }
        if now - start >= time {
            break;
        }
    }
    let over = [1_000, 10_000, 100_000, 1_000_000].map(|least| histogram.count_between(least, histogram.high()));
    Jitter {
        cpu,
        seconds: start.elapsed().as_secs_f64(),
        looks: histogram.len(),
        p50_ns: histogram.value_at_quantile(0.5),
        p99_ns: histogram.value_at_quantile(0.99),
        p999_ns: histogram.value_at_quantile(0.999),
        p99999_ns: histogram.value_at_quantile(0.99999),
        max_ns: histogram.max(),
        over,
        longest_ns: longest,
    }
}

impl fmt::Display for Jitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        writeln!(
            f,
            "CPU {} looked at the clock {} times in {:.1} s; gaps in us: median {:.2}, 99% {:.2}, 99.9% {:.2}, 99.999% \
             {:.2}, longest {:.1}",
            self.cpu,
            self.looks,
            self.seconds,
            us(self.p50_ns),
            us(self.p99_ns),
            us(self.p999_ns),
            us(self.p99999_ns),
            us(self.max_ns)
        )?;
        let longest: Vec<String> = self.longest_ns.iter().map(|ns| format!("{:.1}", us(*ns))).collect();
        writeln!(
            f,
            "  away for 1 us or more {} times, 10 us {}, 100 us {}, 1 ms {}; the longest: {}",
            self.over[0],
            self.over[1],
            self.over[2],
            self.over[3],
            longest.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_counted() {
        let jitter = measure(0, Duration::from_millis(30));
        let gaps = jitter.longest_ns.len() as u64;
        assert_eq!(gaps, jitter.looks.min(LONGEST as u64), "{jitter:?}");
        assert!(gaps > 0 && jitter.longest_ns.is_sorted_by(|a, b| a >= b));
        assert!(jitter.max_ns >= jitter.longest_ns[0] / 2, "{jitter:?}");
        assert!(jitter.over.is_sorted_by(|a, b| a >= b) && jitter.p50_ns <= jitter.max_ns);
        assert!(jitter.to_string().contains("looked at the clock"));
    }
}
