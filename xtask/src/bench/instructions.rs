//! Instructions of the front-end's burst calls for each packet, under callgrind: they repeat to the digit.
//!
//! One thread drives both sides in turn, so that no poll is empty. Only the wrapped front-end calls are counted. Two
//! runs of different lengths are subtracted: what is done once (the first touch of each buffer) drops out. DPDK's
//! virtio_user on DPDK's vhost is counted in the same way; callgrind knows no AVX-512, so not its packed vectorized path.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use usernic::{Burst, Port, Queue};

use super::drive::{BURST, headers};
use super::report::{Counted, Row};
use super::variants::{self, Choice};
use super::{Bench, startup};
use crate::peers::which;
use crate::process;

/// Entries of the rings.
const RING: u16 = 256;

/// What is counted: the metric, our function, and DPDK's in `dpdk_probe.c`.
pub const CALLS: [(&str, &str, &str); 4] = [
    ("tx", "usernic_bench_tx", "probe_tx"),
    ("rx", "usernic_bench_rx", "probe_rx"),
    ("alloc", "usernic_bench_alloc", "probe_alloc"),
    ("free", "usernic_bench_free", "probe_free"),
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

/// Who is counted.
#[derive(Clone, Copy, Debug)]
pub enum Who<'a> {
    /// Our two sides in one thread.
    Ours,
    /// DPDK's, by the probe program at this path.
    Dpdk(&'a Path),
}

/// Instructions for each packet of each of [`CALLS`], of a variant.
pub fn measure(dir: &Path, who: Who<'_>, choice: &Choice, size: usize) -> Result<[f64; 4]> {
    // A multiple of the ring's size in packets, so that refills and wraps fall alike.
    let (few, many) = (256, 512);
    let (less, more) = (
        count(dir, who, choice, few, size)?,
        count(dir, who, choice, many, size)?,
    );
    let packets = ((many - few) * BURST as u64) as f64;
    Ok(std::array::from_fn(|i| (more[i] as f64 - less[i] as f64) / packets))
}

fn count(dir: &Path, who: Who<'_>, choice: &Choice, bursts: u64, size: usize) -> Result<[u64; 4]> {
    let out = dir.join("callgrind.out");
    let socket = dir.join("callgrind.sock");
    let mut command = Command::new("valgrind");
    command
        .arg("--tool=callgrind")
        .arg(format!("--callgrind-out-file={}", out.display()));
    let (bursts, size) = (bursts.to_string(), size.to_string());
    match who {
        Who::Ours => {
            let spec = format!(
                "virtio-user,path={},queue_size={RING},memory=memfd{}",
                socket.display(),
                choice.keys
            );
            command.arg(std::env::current_exe()?);
            command.args(["bench-worker", "instructions", "--spec", &spec]);
            command.args(["--bursts", &bursts, "--size", &size]);
        }
        Who::Dpdk(program) => {
            command.env("XDG_RUNTIME_DIR", dir).env("RUNTIME_DIRECTORY", dir);
            command.arg(program);
            command.args(["--lcores", "0@0", "--no-pci", "--no-telemetry", "--no-huge", "-m", "96"]);
            command.arg(format!("--file-prefix=xt{}count", std::process::id()));
            command.arg(format!("--vdev=net_vhost0,iface={},queues=1", socket.display()));
            command.args(["--", "count", &bursts, &size]);
            command.arg(format!(
                "path={},queues=1,queue_size={RING}{}",
                socket.display(),
                choice.keys
            ));
        }
    }
    let outcome = process::run("valgrind", command, Duration::from_secs(180));
    // DPDK leaves its socket where it ends without ceremony.
    let _ = std::fs::remove_file(&socket);
    outcome?;
    let report = std::fs::read_to_string(&out)?;
    let mut counts = [0; 4];
    for (i, (call, ours, dpdk)) in CALLS.iter().enumerate() {
        let function = match who {
            Who::Ours => ours,
            Who::Dpdk(_) => dpdk,
        };
        counts[i] = inclusive(&report, function)
            .with_context(|| format!("no call of {function} ({call}) in {}", out.display()))?;
    }
    Ok(counts)
}

/// Instructions of all calls of a function, with all that it calls, in callgrind's output.
///
/// A call is a line `cfn=(ID) NAME` (the name only where the id stands first, here or in an `fn=` line), a line
/// `calls=...`, and a line of a position and the cost.
pub fn inclusive(report: &str, function: &str) -> Option<u64> {
    let mut id = None;
    let mut called = false;
    let mut counted = false;
    let mut sum = None;
    for line in report.lines() {
        if counted {
            counted = false;
            let cost: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            sum = Some(sum.unwrap_or(0) + cost);
            continue;
        }
        if let Some(rest) = line.strip_prefix("cfn=").or_else(|| line.strip_prefix("fn=")) {
            let (this, name) = rest.split_once(' ').unwrap_or((rest, ""));
            if name == function {
                id = Some(this);
            }
            called = line.starts_with('c') && id == Some(this);
        } else if line.starts_with("calls=") {
            counted = called;
            called = false;
        }
    }
    sum
}

impl Bench<'_> {
    /// The metrics `instructions.*`.
    pub fn instructions(&mut self) -> Result<()> {
        if which("valgrind").is_none() {
            bail!("valgrind is missing: cargo xtask peers");
        }
        let dir = self.scratch.dir().to_owned();
        // DPDK's part may be missing; ours is then told alone.
        let probe = self.testpmd().and_then(|_| startup::build_probe(&dir));
        for &bytes in self.sizes() {
            let any = |(call, ..): &(&str, _, _)| self.wanted_at(&format!("instructions.{call}"), Some(bytes));
            if !CALLS.iter().any(any) {
                continue;
            }
            let ours = self.count(&dir, Who::Ours, variants::OURS, bytes)?;
            let peer = match &probe {
                Ok(probe) => self.count(&dir, Who::Dpdk(probe), variants::VIRTIO_USER, bytes)?,
                Err(_) => Vec::new(),
            };
            for (i, (call, ..)) in CALLS.iter().enumerate() {
                let name = format!("instructions.{call}");
                if !self.wanted_at(&name, Some(bytes)) {
                    continue;
                }
                let least = |of: &[(&'static str, [f64; 4])]| {
                    of.iter().map(|o| (o.0, o.1[i])).min_by(|a, b| a.1.total_cmp(&b.1))
                };
                let (ours, peer) = (least(&ours), least(&peer));
                let value = |of: Option<(&str, f64)>| of.map(|o| o.1).into_iter().collect::<Vec<_>>();
                let peer_name = peer.map(|p| format!("DPDK virtio_user: {}", p.0));
                let mut row = Row::paired(
                    &name,
                    Some(bytes),
                    "instructions/packet",
                    peer_name.as_deref(),
                    &value(ours),
                    &value(peer),
                );
                row.ours_name = ours.map(|o| o.0.to_owned());
                self.report.add(row);
            }
            self.save()?;
        }
        match probe {
            Ok(_) => Ok(()),
            Err(error) => Err(error.context("DPDK's part of the instructions")),
        }
    }

    /// Counts a side's variants, those that work and that callgrind knows.
    fn count(
        &mut self,
        dir: &Path,
        who: Who<'_>,
        choices: &'static [Choice],
        bytes: usize,
    ) -> Result<Vec<(&'static str, [f64; 4])>> {
        let side = if matches!(who, Who::Ours) { "ours" } else { "peer" };
        let choices = if self.options.quick { &choices[..2] } else { choices };
        let mut found = Vec::new();
        let mut trouble = None;
        // AVX-512 is what packed and vectorized needs.
        for choice in choices.iter().filter(|c| !(c.vectorized && c.keys.contains("packed"))) {
            match measure(dir, who, choice, bytes) {
                Ok(counts) => {
                    for ((call, ..), instructions) in CALLS.iter().zip(counts) {
                        self.report.counted.push(Counted {
                            call,
                            bytes,
                            side,
                            variant: choice.name,
                            instructions,
                        });
                    }
                    found.push((choice.name, counts));
                }
                Err(error) => {
                    process::check_interrupted()?;
                    trouble = Some(error.context(choice.name));
                }
            }
        }
        match (found.is_empty(), trouble) {
            (true, Some(error)) => Err(error),
            _ => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::inclusive;

    #[test]
    fn calls_are_summed() {
        let report = "events: Ir\nfn=(1) main\n5 10\ncfn=(2) probe_tx\ncalls=3 7\n6 4711\ncfn=(3) other\ncalls=1 1\n\
                      +1 99\n\nfn=(2)\n7 5\n\nfn=(4) again\ncfn=(2)\ncalls=1 7\n* 289\n";
        assert_eq!(inclusive(report, "probe_tx"), Some(5000));
        assert_eq!(inclusive(report, "other"), Some(99));
        assert_eq!(inclusive(report, "main"), None);
    }
}
