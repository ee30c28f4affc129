//! Two ports of ours in this process, with a peer between them: frames go both ways and are compared as they come.
//!
//! A sender keeps at most so many descriptors ahead of what has arrived as every ring on the way holds. So nothing that
//! lies between has a reason to drop a frame, however late any of the threads gets its CPU: a frame that does not come
//! is an error of somebody's, never one of the clock's.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use usernic::{Burst, Port, Queue};

use crate::pcap;
use crate::process::check_interrupted;

/// Nothing at all moves for so long: it will not any more.
const STALL: Duration = Duration::from_secs(20);

/// How often a lane that has not been seen to work is tried.
const PROBE: Duration = Duration::from_millis(20);

/// Ethernet types: of frames that are counted (local experiments 1), and of those that only ask whether a lane works.
const FRAME: [u8; 2] = [0x88, 0xb5];
const PROBES: [u8; 2] = [0x88, 0xb6];

/// Bytes of a frame that a descriptor holds at least, wherever it passes.
const PIECE: usize = 1900;

/// A port and all its queues.
pub struct End {
    /// The queues, which go before the port.
    pub queues: Vec<Queue>,
    /// The port.
    pub port: Port,
}

impl End {
    /// Opens a port.
    pub fn open(spec: &str) -> Result<Self> {
        let port = Port::open(spec).with_context(|| spec.to_owned())?;
        let queues = (0..port.queue_count())
            .map(|index| port.queue(index))
            .collect::<Result<_, _>>()?;
        Ok(End { queues, port })
    }

    /// Waits for the link.
    pub fn wait_link(&self) -> Result<()> {
        let end = Instant::now() + STALL;
        while !self.port.wait_link(Duration::from_millis(100)) {
            check_interrupted()?;
            ensure!(
                Instant::now() < end,
                "the link of {} is not up after {STALL:?}",
                self.port.spec().path.display()
            );
        }
        Ok(())
    }

    /// An error unless the features were negotiated that are in `mask`, and of them no others than `wanted`.
    pub fn expect_features(&self, mask: u64, wanted: u64) -> Result<()> {
        // A front-end that came back may set its rings up twice: in between there is no link, and no features.
        ensure!(
            self.port.wait_link(STALL),
            "{}: the link went down and stayed so",
            self.port.spec().path.display()
        );
        let features = self.port.link().features;
        ensure!(
            features & mask == wanted,
            "{}: features {features:#x} were negotiated, of {mask:#x} {wanted:#x} were expected",
            self.port.spec().path.display()
        );
        Ok(())
    }

    /// What the port says of itself, for messages.
    fn state(&self) -> String {
        format!("{:?} {:?}", self.port.link(), self.port.stats())
    }
}

/// What goes from one queue to another.
struct Lane {
    frames: Vec<Vec<u8>>,
    name: String,
    sent: usize,
    arrived: usize,
    /// Descriptors of what was sent and has not arrived.
    ahead: usize,
    pending: Burst,
    bytes: Vec<u8>,
    proven: bool,
}

/// Descriptors that a frame takes at most in any ring.
fn cost(frame: &[u8]) -> usize {
    // One more: a header may have a descriptor of its own.
    frame.len().div_ceil(PIECE) + 1
}

impl Lane {
    fn new(frames: &[Vec<u8>], queue: usize, back: bool) -> Self {
        let mut frames = frames.to_vec();
        for frame in &mut frames {
            // Queue and direction in the addresses: what strays is seen.
            (frame[5], frame[11]) = (queue as u8, u8::from(back));
            frame[12..14].copy_from_slice(&FRAME);
        }
        Lane {
            frames,
            name: format!("queue {queue}, {}", if back { "b to a" } else { "a to b" }),
            sent: 0,
            arrived: 0,
            ahead: 0,
            pending: Burst::new(32),
            bytes: vec![0; 65_536],
            proven: false,
        }
    }

    fn send(&mut self, queue: &mut Queue, window: usize) -> usize {
        while self.sent < self.frames.len() && self.pending.room() > 0 {
            let frame = &self.frames[self.sent];
            if self.ahead > 0 && self.ahead + cost(frame) > window {
                break;
            }
            let Some(mut packet) = queue.packet() else { break };
            if packet.copy_from(frame).is_err() {
                queue.reclaim();
                break;
            }
            if self.pending.push(packet).is_err() {
                break;
            }
            self.ahead += cost(frame);
            self.sent += 1;
        }
        queue.tx(&mut self.pending)
    }

    fn receive(&mut self, queue: &mut Queue, burst: &mut Burst) -> Result<usize> {
        let count = queue.rx(burst);
        for packet in burst.iter() {
            let len = packet.copy_to(&mut self.bytes);
            let got = &self.bytes[..len];
            if got.get(12..14) == Some(&PROBES) {
                self.proven = true;
                continue;
            }
            match self.frames.get(self.arrived) {
                Some(frame) if frame == got => self.ahead -= cost(frame),
                _ => {
                    let mut arrived = self.frames[..self.arrived.min(self.frames.len())].to_vec();
                    arrived.push(got.to_vec());
                    let difference = pcap::same(&self.frames, &arrived).err();
                    bail!(
                        "{}: {}; it begins with {:02x?}",
                        self.name,
                        difference.map_or(String::new(), |e| format!("{e:#}")),
                        &got[..got.len().min(32)]
                    );
                }
            }
            self.arrived += 1;
        }
        queue.free(burst);
        Ok(count)
    }

    fn done(&self) -> bool {
        self.arrived == self.frames.len()
    }
}

/// Sends a small frame now and then on every queue, both ways, until one has come out of each: links come up before all
/// that lies between does.
pub fn prove(a: &mut End, b: &mut End) -> Result<()> {
    let mut probe = pcap::frames([60]).remove(0);
    probe[12..14].copy_from_slice(&PROBES);
    let mut lanes = lanes(a, &[]);
    let mut burst = Burst::new(64);
    let end = Instant::now() + STALL;
    let mut next = Instant::now();
    loop {
        check_interrupted()?;
        let due = Instant::now() >= next;
        if due {
            next = Instant::now() + PROBE;
        }
        for (index, [there, back]) in lanes.iter_mut().enumerate() {
            let (a, b) = (&mut a.queues[index], &mut b.queues[index]);
            for (lane, queue) in [(&*there, &mut *a), (&*back, &mut *b)] {
                if due
                    && !lane.proven
                    && let Some(mut packet) = queue.packet()
                {
                    packet.copy_from(&probe)?;
                    let _ = burst.push(packet);
                    queue.tx(&mut burst);
                    queue.free(&mut burst);
                }
            }
            there.receive(b, &mut burst)?;
            back.receive(a, &mut burst)?;
        }
        let silent: Vec<&str> = lanes
            .iter()
            .flatten()
            .filter(|l| !l.proven)
            .map(|l| l.name.as_str())
            .collect();
        if silent.is_empty() {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "no frame came through within {STALL:?}: {}; a: {}; b: {}",
            silent.join("; "),
            a.state(),
            b.state()
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn lanes(a: &End, frames: &[Vec<u8>]) -> Vec<[Lane; 2]> {
    (0..a.queues.len())
        .map(|queue| [false, true].map(|back| Lane::new(frames, queue, back)))
        .collect()
}

/// Sends the frames through every queue, both ways at a time, and compares what comes, in order. `window`: descriptors
/// that may be under way on each.
pub fn exchange(a: &mut End, b: &mut End, frames: &[Vec<u8>], window: usize) -> Result<()> {
    ensure!(a.queues.len() == b.queues.len(), "queues that do not match");
    let mut lanes = lanes(a, frames);
    let mut burst = Burst::new(64);
    let mut moved = Instant::now();
    let mut idle = 0u32;
    while !lanes.iter().flatten().all(Lane::done) {
        let mut count = 0;
        for (index, [there, back]) in lanes.iter_mut().enumerate() {
            let (a, b) = (&mut a.queues[index], &mut b.queues[index]);
            count += there.send(a, window) + back.send(b, window);
            count += there.receive(b, &mut burst)? + back.receive(a, &mut burst)?;
        }
        if count > 0 {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle == 1 {
            moved = Instant::now();
        }
        if idle.is_multiple_of(100) {
            check_interrupted()?;
            // The peer may wait for this CPU.
            std::thread::sleep(Duration::from_micros(20));
        }
        if moved.elapsed() > STALL {
            let open: Vec<String> = lanes
                .iter()
                .flatten()
                .filter(|l| !l.done())
                .map(|l| {
                    format!(
                        "{}: {} of {} arrived, {} sent, {} not taken",
                        l.name,
                        l.arrived,
                        l.frames.len(),
                        l.sent,
                        l.pending.len()
                    )
                })
                .collect();
            bail!(
                "nothing moved for {STALL:?}: {}; a: {}; b: {}",
                open.join("; "),
                a.state(),
                b.state()
            );
        }
    }
    for end in [a, b] {
        let stats = end.port.stats();
        ensure!(
            stats.anomalies == 0 && stats.rx_errors == 0 && stats.tx_errors == 0,
            "{}: {stats:?}",
            end.port.spec().path.display()
        );
    }
    Ok(())
}

/// Frames one at a time, from `a` to `b` and back, whose receiver sleeps: nothing but the other side's notification
/// wakes it.
pub fn wake(a: &mut End, b: &mut End, rounds: usize) -> Result<()> {
    let lengths = (0..rounds).map(|i| 60 + i % 1400);
    let frames = pcap::frames(lengths);
    let mut burst = Burst::new(64);
    let mut lanes = lanes(a, &frames);
    for (index, [there, back]) in lanes.iter_mut().enumerate() {
        for (lane, to_b) in [(there, true), (back, false)] {
            let (a, b) = (&mut a.queues[index], &mut b.queues[index]);
            let (from, to) = if to_b { (a, b) } else { (b, a) };
            // What was notified before is no answer to what is sent now.
            to.disarm();
            while to.rx(&mut burst) > 0 {
                to.free(&mut burst);
            }
            for round in 0..rounds {
                let mut asleep = !to.arm();
                while lane.sent == round {
                    lane.send(from, 1);
                    ensure!(asleep, "{}: a frame before it was sent", lane.name);
                }
                while lane.arrived == round {
                    if asleep {
                        sleep_on(to).with_context(|| format!("{}, frame {round}", lane.name))?;
                    }
                    to.disarm();
                    lane.receive(to, &mut burst)?;
                    asleep = lane.arrived > round || !to.arm();
                }
            }
            to.disarm();
        }
    }
    Ok(())
}

/// Waits for the queue's notification.
fn sleep_on(queue: &Queue) -> Result<()> {
    let end = Instant::now() + STALL;
    while !notified(queue, 100)? {
        check_interrupted()?;
        ensure!(Instant::now() < end, "it was not woken within {STALL:?}");
    }
    Ok(())
}

/// Whether the queue was notified, by now or within so many milliseconds.
fn notified(queue: &Queue, milliseconds: u32) -> Result<bool> {
    let timeout = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(milliseconds) * 1_000_000,
    };
    let mut fds = [rustix::event::PollFd::new(queue, rustix::event::PollFlags::IN)];
    Ok(rustix::event::poll(&mut fds, Some(&timeout))? > 0)
}

/// An error if a queue that polls, and said so, was notified all the same.
pub fn expect_silence(end: &End) -> Result<()> {
    for queue in &end.queues {
        ensure!(!notified(queue, 0)?, "queue {}: notified while it polls", queue.index());
    }
    Ok(())
}
