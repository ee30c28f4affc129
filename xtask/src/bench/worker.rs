//! A program of ours to measure: one port, one thread that drives it, another that takes commands.
//!
//! What the driving thread does is in [`drive`].

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use usernic::{Burst, Port};

use super::cores::pin;
use super::drive::{self, BURST, Driver, Load, Shared, fill, lock};

/// The program: `spec` opens its port, `cpus` are the commands' and the driving thread's, who moves `burst` packets at a
/// time and, if `timed`, reads the time stamp counter once a round.
pub fn main(spec: &str, cpus: (usize, usize), burst: usize, timed: bool) -> Result<()> {
    pin(cpus.0)?;
    let port = Arc::new(Port::open(spec)?);
    let queues = (0..port.queue_count())
        .map(|index| port.queue(index))
        .collect::<Result<Vec<_>, _>>()?;
    let shared = Arc::new(Shared::new()?);
    std::thread::spawn({
        let shared = Arc::clone(&shared);
        move || {
            let driver = Driver::new(queues, burst);
            if let Err(error) = pin(cpus.1).and_then(|()| driver.run(&shared, timed)) {
                println!("error: {error:#}");
                std::process::exit(1);
            }
        }
    });
    commands(&shared, || {
        let stats = port.stats();
        (stats.rx_packets, stats.tx_packets)
    })
}

/// Takes commands until there are no more; `counts` says how many packets were received and sent.
pub fn commands(shared: &Shared, counts: impl Fn() -> (u64, u64)) -> Result<()> {
    say("ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["load", ref load @ ..] if !load.is_empty() => {
                *lock(&shared.load) = Some(Load::parse(load)?);
                let next = shared.generation.fetch_add(1, Ordering::Release) + 1;
                // Taken over when the driving thread has emptied the place.
                let end = Instant::now() + Duration::from_secs(5);
                while lock(&shared.load).is_some() {
                    if Instant::now() > end {
                        bail!("load {next} is not taken over");
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
                say("ok")?;
            }
            ["stats"] => {
                let (rx, tx) = counts();
                say(&format!("stats {rx} {tx} {}", monotonic()))?;
            }
            ["polls"] => {
                let polls = shared.polls();
                say(&format!(
                    "polls {} {} {} {}",
                    polls.calls, polls.busy, polls.cycles, polls.packets
                ))?;
            }
            ["latency"] => {
                let mut trips = lock(&shared.trips);
                let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| trips.value_at_quantile(q));
                let line = format!("latency {} {p50} {p99} {p999}", trips.len());
                trips.reset();
                drop(trips);
                say(&line)?;
            }
            _ => bail!("what is \"{line}\"?"),
        }
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// The monotonic clock in nanoseconds, which all processes share.
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The start-up program: opens its port, sends one packet, waits for it to come back, says when and what it uses, and
/// ends at the end of its input.
pub fn first(spec: &str) -> Result<()> {
    let port = Port::open(spec)?;
    let mut queue = port.queue(0)?;
    let end = Instant::now() + Duration::from_secs(10);
    let mut burst = Burst::new(BURST);
    let late = || -> Result<()> {
        if Instant::now() > end {
            bail!("no packet came back within 10 s: {:?}", port.link())
        } else {
            Ok(())
        }
    };
    fill(&mut queue, &mut burst, 1, 64, &drive::headers(64))?;
    while queue.tx(&mut burst) == 0 {
        late()?;
    }
    while queue.rx(&mut burst) == 0 {
        late()?;
    }
    say(&format!("first {}", monotonic()))?;
    let _ = std::io::stdin().lock().lines().next();
    Ok(())
}
