//! What runs inside a container: a port, and orders to use it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use usernic::{Burst, Port, Queue};

use super::channel::{Channel, Order, Percentiles, Rate, Report};
use super::{isolate, kernel};
use crate::capture_file::{Capture, Chain};
use crate::common;
use crate::packets;

/// Frames handed over at a time.
const BURST: usize = 32;

/// Where the frame number is in a measuring frame: behind Ethernet, IPv4 and UDP headers.
pub const NUMBER_AT: usize = 42;

/// A container's life: isolation, its proof, then orders until the demo hangs up.
pub fn main(args: super::ContainerArgs) -> Result<()> {
    let (control, capture_fd) = (dup(std::io::stdin())?, dup(std::io::stdout())?);
    let mut channel = Channel::new(UnixStream::from(control))?;
    let result = match &args.root {
        Some(root) => isolated(root, &args, capture_fd.into(), &mut channel),
        None => kernel::main(&mut channel),
    };
    if let Err(error) = &result {
        // The demo tells it; if the demo is gone, nobody is left to tell.
        let _ = channel.send(&Report::Failed(common::describe(error)));
    }
    Ok(())
}

fn dup(fd: impl AsFd) -> Result<std::os::fd::OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).context("an inherited file descriptor is missing")
}

fn isolated(root: &std::path::Path, args: &super::ContainerArgs, capture: File, channel: &mut Channel) -> Result<()> {
    isolate::enter_user_namespace()?;
    isolate::enter_namespaces()?;
    let witness = isolate::Witness::new()?;
    rustix::system::sethostname(b"usernic-demo").context("sethostname(2)")?;
    isolate::enter_root(root, &args.socket)?;
    isolate::drop_privileges()?;
    channel.send(&Report::Isolated(witness.prove()?))?;
    let mut bytes = vec![0; capture.metadata().context("the capture's file descriptor")?.len() as usize];
    capture.read_exact_at(&mut bytes, 0).context("reading the capture")?;
    let capture = Capture::from_bytes(bytes, true).context("the capture")?;
    channel.send(&Report::Ready)?;
    let never = AtomicBool::new(false);
    let mut work = Work {
        capture,
        port: None,
        next: 0,
    };
    // A demo that dies takes this process with it; one that ends closes the channel.
    while let Some(order) = channel.receive::<Order>(None, &never)? {
        let report = work.carry_out(order, channel)?;
        channel.send(&report)?;
    }
    Ok(())
}

struct Work {
    capture: Capture,
    // The queue goes before its port.
    port: Option<(Queue, Port)>,
    /// The number of the next measuring frame.
    next: u64,
}

impl Work {
    fn carry_out(&mut self, order: Order, channel: &mut Channel) -> Result<Report> {
        if let Order::Open { spec } = order {
            self.port = None;
            let start = Instant::now();
            let port = Port::open(&spec).with_context(|| format!("opening {spec}"))?;
            let queue = port.queue(0)?;
            if !port.wait_link(Duration::from_secs(10)) {
                bail!("the link of {spec} did not come up within 10 s");
            }
            let opened = Report::Opened {
                memory: port.memory().to_owned(),
                bytes: port.memory_bytes(),
                nanos: start.elapsed().as_nanos() as u64,
            };
            self.port = Some((queue, port));
            return Ok(opened);
        }
        if matches!(order, Order::Close) {
            self.port = None;
            return Ok(Report::Done);
        }
        let Some((queue, port)) = &mut self.port else {
            bail!("an order without a port: {order:?}")
        };
        match order {
            Order::Receive => receive(queue, &self.capture, channel),
            Order::Replay => replay(queue, port, &self.capture),
            Order::Throughput {
                size,
                window,
                millis,
                cpu,
            } => {
                cpu.map_or(Ok(()), common::pin)?;
                throughput(queue, port, size, window, Duration::from_millis(millis), &mut self.next).map(Report::Rate)
            }
            Order::Latency { millis, cpu } => {
                cpu.map_or(Ok(()), common::pin)?;
                latency(queue, port, Duration::from_millis(millis), &mut self.next).map(Report::Latency)
            }
            Order::Open { .. } | Order::Close | Order::Kernel { .. } => bail!("not an order for a port: {order:?}"),
        }
    }
}

/// Takes as many frames as the capture has, compares each with what it should be, and sees that no more come.
fn receive(queue: &mut Queue, capture: &Capture, channel: &mut Channel) -> Result<Report> {
    channel.send(&Report::Ready)?;
    let (mut frames, mut bytes, mut chain, mut difference) = (0u64, 0u64, Chain::default(), None);
    let mut burst = Burst::new(64);
    let mut frame = vec![0; 65_536];
    let total = capture.len() as u64;
    let mut last = Instant::now();
    let mut told = last;
    loop {
        if queue.rx(&mut burst) == 0 {
            let patience = if frames < total {
                Duration::from_secs(5)
            } else {
                Duration::from_millis(50)
            };
            if last.elapsed() > patience {
                break;
            }
            queue.wait(Some(Duration::from_millis(5)))?;
            continue;
        }
        last = Instant::now();
        for packet in burst.iter() {
            let len = packet.copy_to(&mut frame);
            let frame = &frame[..len];
            if difference.is_none() {
                difference = if frames >= total {
                    Some(format!("frame {} of {total}: more frames than were sent", frames + 1))
                } else {
                    compare(frames, frame, capture.frame(frames as usize))
                };
            }
            chain.add(frame);
            frames += 1;
            bytes += len as u64;
        }
        queue.free(&mut burst);
        if told.elapsed() > Duration::from_millis(20) {
            channel.send(&Report::Progress(frames))?;
            told = Instant::now();
        }
    }
    if frames < total && difference.is_none() {
        difference = Some(format!("{frames} of {total} frames came"));
    }
    Ok(Report::Received {
        frames,
        bytes,
        chain: chain.value(),
        difference,
    })
}

fn compare(index: u64, got: &[u8], sent: &[u8]) -> Option<String> {
    if got == sent {
        return None;
    }
    let at = got
        .iter()
        .zip(sent)
        .position(|(a, b)| a != b)
        .unwrap_or(got.len().min(sent.len()));
    Some(format!(
        "frame {}: {} bytes came, {} were sent, and they differ from byte {at} on",
        index + 1,
        got.len(),
        sent.len()
    ))
}

/// Sends the capture once; what does not fit is tried again until it does.
fn replay(queue: &mut Queue, port: &Port, capture: &Capture) -> Result<Report> {
    let mut burst = Burst::new(BURST);
    let (mut next, mut bytes) = (0, 0u64);
    let start = Instant::now();
    let mut last = start;
    while next < capture.len() || !burst.is_empty() {
        while burst.room() > 0 && next < capture.len() {
            let Some(mut packet) = queue.packet() else { break };
            if packet.copy_from(capture.frame(next)).is_err() || burst.push(packet).is_err() {
                break;
            }
            bytes += capture.frame(next).len() as u64;
            next += 1;
        }
        if queue.tx(&mut burst) > 0 {
            last = Instant::now();
        } else {
            if last.elapsed() > Duration::from_secs(5) {
                bail!("the switch has taken no frame for 5 s, after {next} frames");
            }
            // Three busy threads on what may be two cores: let the others run.
            std::thread::yield_now();
        }
    }
    let nanos = start.elapsed().as_nanos() as u64;
    let errors = port.stats().tx_errors;
    if errors > 0 {
        bail!("{errors} frames were longer than the switch's buffers");
    }
    Ok(Report::Sent {
        frames: next as u64,
        bytes,
        nanos,
    })
}

/// Writes frames, sends them to the reflector, takes them back, reads them: `window` in flight.
fn throughput(
    queue: &mut Queue,
    port: &Port,
    size: usize,
    window: usize,
    limit: Duration,
    next: &mut u64,
) -> Result<Rate> {
    let mut template = measuring_frame(size, port.mac());
    let (mut out, mut back) = (Burst::new(BURST), Burst::new(BURST));
    let mut frame = vec![0; 65_536];
    let mut expected = *next;
    let (mut frames, mut wrong) = (0u64, 0u64);
    let start = Instant::now();
    let mut last = start;
    let mut over = false;
    let mut idle = 0u32;
    while !over || expected < *next {
        let in_flight = (*next - expected) as usize;
        if !over && in_flight + BURST <= window && out.is_empty() {
            queue.alloc(&mut out, BURST);
            for packet in out.iter_mut() {
                template[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&next.to_be_bytes());
                packet.copy_from(&template)?;
                *next += 1;
            }
        }
        queue.tx(&mut out);
        if queue.rx(&mut back) == 0 {
            idle = idle.wrapping_add(1);
            if idle.is_multiple_of(4096) && last.elapsed() > Duration::from_secs(1) {
                bail!("the reflector has returned nothing for a second, {in_flight} frames in flight");
            }
            std::hint::spin_loop();
            continue;
        }
        for packet in back.iter() {
            let len = packet.copy_to(&mut frame);
            let good = len == size && frame[NUMBER_AT..NUMBER_AT + 8] == expected.to_be_bytes();
            wrong += u64::from(!good);
            expected += 1;
        }
        frames += back.len() as u64;
        queue.free(&mut back);
        last = Instant::now();
        over = last - start >= limit;
    }
    Ok(Rate {
        frames,
        nanos: start.elapsed().as_nanos() as u64,
        wrong,
    })
}

/// One frame of 64 bytes to the reflector and back, again and again.
fn latency(queue: &mut Queue, port: &Port, limit: Duration, next: &mut u64) -> Result<Percentiles> {
    let mut template = measuring_frame(64, port.mac());
    let mut times = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    let mut burst = Burst::new(1);
    let mut frame = [0u8; 2048];
    let start = Instant::now();
    while start.elapsed() < limit {
        let before = Instant::now();
        template[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&next.to_be_bytes());
        let Some(mut packet) = queue.packet() else {
            bail!("the port has no free buffer")
        };
        packet.copy_from(&template)?;
        let _ = burst.push(packet);
        while queue.tx(&mut burst) == 0 {
            std::hint::spin_loop();
        }
        let mut spins = 0u32;
        while queue.rx(&mut burst) == 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(4096) && before.elapsed() > Duration::from_secs(1) {
                bail!("frame {next} did not come back within a second");
            }
            std::hint::spin_loop();
        }
        let len = burst[0].copy_to(&mut frame);
        times.saturating_record(before.elapsed().as_nanos() as u64);
        if len != 64 || frame[NUMBER_AT..NUMBER_AT + 8] != next.to_be_bytes() {
            bail!("frame {next} came back changed");
        }
        queue.free(&mut burst);
        *next += 1;
    }
    Ok(Percentiles::of(&times))
}

/// A UDP frame of `size` bytes to the reflector.
fn measuring_frame(size: usize, mac: [u8; 6]) -> Vec<u8> {
    let to = [0x02, 0, 0, 0, 0, 0xfe];
    packets::udp_frame(size, to, mac, ([192, 0, 2, 1].into(), 1024), ([192, 0, 2, 2].into(), 9))
}
