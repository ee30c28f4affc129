//! Instructions of the front-end's burst calls for each packet, under callgrind: they repeat to the digit.
//!
//! One thread drives both sides in turn, so that no poll is empty. Only the wrapped front-end calls are counted. Two
//! runs of different lengths are subtracted: what is done once (the first touch of each buffer) drops out.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use usernic::{Burst, Port, Queue};

use super::worker::headers;
use crate::process;

const BURST: usize = 32;

/// What is counted.
pub const CALLS: [(&str, &str); 4] = [
    ("tx", "usernic_bench_tx"),
    ("rx", "usernic_bench_rx"),
    ("alloc", "usernic_bench_alloc"),
    ("free", "usernic_bench_free"),
];

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_tx(queue: &mut Queue, burst: &mut Burst) -> usize {
    queue.tx(burst)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_rx(queue: &mut Queue, burst: &mut Burst) -> usize {
    queue.rx(burst)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_alloc(queue: &mut Queue, burst: &mut Burst) -> usize {
    queue.alloc(burst, BURST)
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn usernic_bench_free(queue: &mut Queue, burst: &mut Burst) {
    queue.free(burst);
}

/// The program that callgrind watches: `bursts` bursts of packets of `size` bytes go from the front-end to the back-end
/// and come back.
pub fn main(spec: &str, bursts: u64, size: usize) -> Result<()> {
    let back_spec = spec.replacen("virtio-user", "vhost", 1);
    let back_spec = back_spec.split(",queue_size").next().unwrap_or_default();
    let back = Port::open(back_spec)?;
    let front = Port::open(spec)?;
    if !back.wait_link(Duration::from_secs(60)) || !front.wait_link(Duration::from_secs(60)) {
        bail!("no link between the two sides");
    }
    let (mut front, mut back) = (front.queue(0)?, back.queue(0)?);
    let mut burst = Burst::new(BURST);
    let headers = headers(size);
    for round in 0..bursts {
        usernic_bench_alloc(&mut front, &mut burst);
        for packet in burst.iter_mut() {
            packet.set_len(size)?;
            packet.write_at(0, &headers)?;
        }
        if burst.len() != BURST || usernic_bench_tx(&mut front, &mut burst) != BURST {
            bail!("round {round}: a burst was not sent whole");
        }
        if back.rx(&mut burst) != BURST || back.tx(&mut burst) != BURST {
            bail!("round {round}: the back-end did not send a whole burst back");
        }
        if usernic_bench_rx(&mut front, &mut burst) != BURST {
            bail!("round {round}: a burst did not come back whole");
        }
        usernic_bench_free(&mut front, &mut burst);
    }
    Ok(())
}

/// Instructions for each packet of each of [`CALLS`].
pub fn measure(dir: &Path, size: usize) -> Result<Vec<(&'static str, f64)>> {
    // A multiple of the ring's size in packets, so that refills and wraps fall alike.
    let (few, many) = (256, 512);
    let mut found = Vec::new();
    for (name, function) in CALLS {
        let instructions = count(dir, function, many, size)? - count(dir, function, few, size)?;
        found.push((name, instructions as f64 / ((many - few) * BURST as u64) as f64));
    }
    Ok(found)
}

fn count(dir: &Path, function: &str, bursts: u64, size: usize) -> Result<i64> {
    let out = dir.join("callgrind.out");
    let socket = dir.join("callgrind.sock");
    let mut command = Command::new("valgrind");
    command.args([
        "--tool=callgrind",
        "--collect-atstart=no",
        &format!("--toggle-collect={function}"),
    ]);
    command
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe()?);
    let spec = format!("virtio-user,path={},queue_size=256,memory=memfd", socket.display());
    command.args(["bench-worker", "instructions", "--spec", &spec]);
    command.args(["--bursts", &bursts.to_string(), "--size", &size.to_string()]);
    process::run("valgrind", command, Duration::from_secs(180))?;
    let report = std::fs::read_to_string(&out)?;
    totals(&report).with_context(|| format!("no totals in {}", out.display()))
}

fn totals(report: &str) -> Option<i64> {
    report
        .lines()
        .rev()
        .find_map(|l| l.strip_prefix("totals:").or(l.strip_prefix("summary:")))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn totals_are_read() {
        assert_eq!(super::totals("events: Ir\n\nfn=(1)\n1 5\n\ntotals: 4711\n"), Some(4711));
        assert_eq!(super::totals("events: Ir\n"), None);
    }
}
