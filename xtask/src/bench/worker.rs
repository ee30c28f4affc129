//! A program of ours to measure: one port, one thread that drives it, another that takes commands.
//!
//! It does for a packet what testpmd does: `tx` takes a fresh buffer for each, writes 42 bytes of headers, and frees
//! what was not sent; `rx` frees unread what came; `io` sends back what came, and drops what does not fit.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;
use usernic::{Burst, Port, Queue};

use super::cores::pin;

/// Packets that are moved at a time.
const BURST: usize = 32;

/// The bytes of Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 42;

/// A round trip that takes longer has lost a packet.
const LOST: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// Take out and free.
    Rx,
    Tx {
        size: usize,
    },
    Io,
    /// Send `in_flight` packets, then send back what comes.
    Loop {
        size: usize,
        in_flight: usize,
    },
    /// Send `in_flight` packets, wait for all of them, note the time, again.
    Latency {
        size: usize,
        in_flight: usize,
    },
}

impl Load {
    fn parse(words: &[&str]) -> Result<Self> {
        let number = |at: usize| -> Result<usize> { Ok(words.get(at).context("a number is missing")?.parse()?) };
        Ok(match words[0] {
            "rx" => Load::Rx,
            "io" => Load::Io,
            "tx" => Load::Tx { size: number(1)? },
            "loop" => Load::Loop {
                size: number(1)?,
                in_flight: number(2)?,
            },
            "latency" => Load::Latency {
                size: number(1)?,
                in_flight: number(2)?,
            },
            other => bail!("no load {other}"),
        })
    }
}

struct Shared {
    /// Changes when there is another load, so that the driving thread looks at one word only.
    generation: AtomicU64,
    load: Mutex<Option<Load>>,
    trips: Mutex<Histogram<u64>>,
}

/// The program: `spec` opens its port, `cpus` are the commands' and the driving thread's.
pub fn main(spec: &str, cpus: (usize, usize)) -> Result<()> {
    pin(cpus.0)?;
    let port = Arc::new(Port::open(spec)?);
    let mut queue = port.queue(0)?;
    let shared = Arc::new(Shared {
        generation: AtomicU64::new(0),
        load: Mutex::new(Some(Load::Rx)),
        trips: Mutex::new(Histogram::new_with_bounds(1, 10_000_000_000, 3)?),
    });
    std::thread::spawn({
        let shared = Arc::clone(&shared);
        move || {
            if let Err(error) = pin(cpus.1).and_then(|()| drive(&mut queue, &shared)) {
                println!("error: {error:#}");
                std::process::exit(1);
            }
        }
    });
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
                let stats = port.stats();
                say(&format!(
                    "stats {} {} {}",
                    stats.rx_packets,
                    stats.tx_packets,
                    monotonic()
                ))?;
            }
            ["latency"] => {
                let mut trips = lock(&shared.trips);
                let (p50, p99) = (trips.value_at_quantile(0.5), trips.value_at_quantile(0.99));
                let line = format!("latency {} {p50} {p99}", trips.len());
                trips.reset();
                drop(trips);
                say(&line)?;
            }
            ["describe"] => say(&format!("describe {} | {:?}", port.memory(), port.link()))?,
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The monotonic clock in nanoseconds, which all processes share.
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Ethernet, IPv4 and UDP, as a generator writes them for each packet.
pub fn headers(size: usize) -> [u8; HEADERS] {
    let mut bytes = [0u8; HEADERS];
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
    bytes[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&(size as u16 - 14).to_be_bytes());
    bytes[22] = 64;
    bytes[23] = 17;
    bytes[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    bytes[34..38].copy_from_slice(&[0, 9, 0, 9]);
    bytes[38..40].copy_from_slice(&(size as u16 - 34).to_be_bytes());
    bytes
}

fn drive(queue: &mut Queue, shared: &Shared) -> Result<()> {
    let mut load = Load::Rx;
    let mut generation = u64::MAX;
    loop {
        let now = shared.generation.load(Ordering::Acquire);
        if now != generation {
            generation = now;
            if let Some(next) = lock(&shared.load).take() {
                load = next;
            }
        }
        let same = || shared.generation.load(Ordering::Relaxed) == generation;
        match load {
            Load::Rx => receive(queue, same),
            Load::Tx { size } => transmit(queue, size, same)?,
            Load::Io => reflect(queue, same),
            Load::Loop { size, in_flight } => {
                launch(queue, size, in_flight, same)?;
                reflect(queue, same);
            }
            Load::Latency { size, in_flight } => round_trips(queue, size, in_flight, &shared.trips, same)?,
        }
    }
}

fn receive(queue: &mut Queue, same: impl Fn() -> bool) {
    let mut burst = Burst::new(BURST);
    while same() {
        queue.rx(&mut burst);
        queue.free(&mut burst);
    }
}

/// Fresh buffers with headers.
#[inline(always)]
fn fill(queue: &mut Queue, burst: &mut Burst, count: usize, size: usize, headers: &[u8; HEADERS]) -> Result<()> {
    queue.alloc(burst, count);
    for packet in burst.iter_mut() {
        packet.set_len(size)?;
        packet.write_at(0, headers)?;
    }
    Ok(())
}

fn transmit(queue: &mut Queue, size: usize, same: impl Fn() -> bool) -> Result<()> {
    let mut burst = Burst::new(BURST);
    let headers = headers(size);
    while same() {
        fill(queue, &mut burst, BURST, size, &headers)?;
        queue.tx(&mut burst);
        queue.free(&mut burst);
    }
    Ok(())
}

fn reflect(queue: &mut Queue, same: impl Fn() -> bool) {
    let mut burst = Burst::new(BURST);
    while same() {
        if queue.rx(&mut burst) > 0 {
            queue.tx(&mut burst);
            queue.free(&mut burst);
        }
    }
}

/// Sends exactly so many.
fn launch(queue: &mut Queue, size: usize, count: usize, same: impl Fn() -> bool) -> Result<()> {
    let mut burst = Burst::new(BURST);
    let headers = headers(size);
    let mut left = count;
    while same() && left > 0 {
        fill(queue, &mut burst, left.min(BURST), size, &headers)?;
        left -= burst.len();
        while same() && !burst.is_empty() {
            queue.tx(&mut burst);
        }
    }
    queue.free(&mut burst);
    Ok(())
}

fn round_trips(
    queue: &mut Queue,
    size: usize,
    in_flight: usize,
    trips: &Mutex<Histogram<u64>>,
    same: impl Fn() -> bool,
) -> Result<()> {
    let (mut out, mut back) = (Burst::new(in_flight), Burst::new(in_flight));
    let headers = headers(size);
    let mut found = Vec::with_capacity(1024);
    while same() {
        fill(queue, &mut out, in_flight, size, &headers)?;
        let wanted = out.len();
        let start = Instant::now();
        while !out.is_empty() {
            queue.tx(&mut out);
            if start.elapsed() > LOST {
                break;
            }
        }
        while back.len() < wanted {
            queue.rx(&mut back);
            if back.len() < wanted && start.elapsed() > LOST {
                break;
            }
        }
        let took = start.elapsed();
        let complete = back.len() == wanted;
        queue.free(&mut back);
        queue.free(&mut out);
        if complete && wanted == in_flight {
            found.push(took.as_nanos() as u64);
        }
        if found.len() == found.capacity() || !complete {
            let mut trips = lock(trips);
            found.drain(..).for_each(|t| trips.saturating_record(t));
        }
    }
    Ok(())
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
    fill(&mut queue, &mut burst, 1, 64, &headers(64))?;
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
