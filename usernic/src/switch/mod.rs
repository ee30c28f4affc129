//! A switch of vhost-user back-ends: learning, or fixed cross-connects, and reflectors.
//!
//! One thread polls all ports; when nothing has come for a while it asks every port for a notification and sleeps.
//! Frames are copied out of the sender's memory once, into memory that nobody else can reach, looked at there, and
//! copied into the receiver's: no decision rests on bytes that a port can still change.

mod handle;
mod table;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

pub use handle::{Join, SwitchHandle, SwitchReport};
pub use table::{Mac, MacTable};

use crate::offload::Steering;
use crate::packet::{Burst, Packet};
use crate::port::Port;
use crate::queue::Queue;
use crate::spec::PortSpec;
use crate::stats::Stats;

/// Frames that are taken from a queue at a time.
const BURST: usize = 32;

/// What to do with a port's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Role {
    /// A port of the learning bridge.
    Learn,
    /// Every frame goes to the port of this number, whatever its addresses; nothing is dropped: a receiver that is full,
    /// or down, holds the sender.
    Connect(usize),
    /// Every frame goes back where it came from, its two addresses swapped.
    Reflect,
}

/// How a switch is to be.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// A name, a spec of kind `vhost` (or any other), and a role for each port.
    pub ports: Vec<(String, PortSpec, Role)>,
    /// How long an address is remembered.
    pub ageing: Duration,
    /// Addresses that are remembered.
    pub addresses: usize,
    /// How long to poll without a frame before sleeping.
    pub idle: Duration,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        SwitchConfig {
            ports: Vec::new(),
            ageing: Duration::from_secs(300),
            addresses: 4096,
            idle: Duration::from_micros(200),
        }
    }
}

/// What a port of the switch has done.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SwitchPortStats {
    /// Its name.
    pub name: String,
    /// Whether somebody is on it.
    pub link_up: bool,
    /// Its counters: what the switch received from it and sent to it.
    #[serde(flatten)]
    pub stats: Stats,
    /// Frames for it that were dropped since it was full or down.
    pub dropped: u64,
    /// Frames from it that went nowhere: their destination is behind it, or there is no other port.
    pub filtered: u64,
    /// Frames from it that were flooded.
    pub flooded: u64,
}

/// A switch. See the module.
pub struct Switch {
    ports: Vec<SwitchPort>,
    table: MacTable,
    idle: Duration,
    started: Instant,
    now: u32,
    desk: handle::Desk,
}

struct SwitchPort {
    name: String,
    port: Port,
    queues: Vec<Queue>,
    role: Role,
    /// Frames that were taken from each queue and not handed on yet (cross-connect, reflector).
    held: Vec<Burst>,
    /// Frames on their way to this port (learning).
    out: Burst,
    /// Frames on their way to one queue of this port, and those that did not fit (where the front-end spreads them).
    lanes: [Burst; 2],
    /// Its MAC table entries are to go: it was up and is down.
    was_up: bool,
    dropped: u64,
    filtered: u64,
    flooded: u64,
}

/// A switch that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// A cross-connect names a port that is not there, or itself.
    #[error(
        "port {port}: cannot be connected to port {to}: there are {ports} ports, and a port is no neighbour of its own"
    )]
    Connect {
        /// The port.
        port: usize,
        /// Where it was to be connected to.
        to: usize,
        /// Ports of the switch.
        ports: usize,
    },
    /// A port that could not be opened.
    #[error("port {name}")]
    Port {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: crate::Error,
    },
    /// A port of this name is there.
    #[error("there is a port {name}: take another name, or remove it first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No port has this name.
    #[error("there is no port {name}")]
    NoPort {
        /// The name.
        name: String,
    },
    /// A port has a neighbour already.
    #[error("port {name} is connected to another one: remove that first")]
    Taken {
        /// Its name.
        name: String,
    },
    /// There is no room for another port.
    #[error("a switch has at most {} ports", handle::MOST_PORTS)]
    Full,
    /// Nobody runs the switch.
    #[error("the switch does not run (any more)")]
    NotRunning,
    /// Waiting failed.
    #[error("poll(2) over the ports")]
    Wait(#[source] std::io::Error),
}

impl Switch {
    /// Opens all ports. Those that listen do so from now on.
    ///
    /// # Errors
    /// [`SwitchError`]; what was opened is closed again.
    pub fn new(config: SwitchConfig) -> Result<Self, SwitchError> {
        let count = config.ports.len();
        // Room for some that are added later.
        let mut ports = Vec::with_capacity(count.next_power_of_two().max(64));
        if count > handle::MOST_PORTS {
            return Err(SwitchError::Full);
        }
        for (number, (name, spec, role)) in config.ports.into_iter().enumerate() {
            if let Role::Connect(to) = role
                && (to >= count || to == number)
            {
                return Err(SwitchError::Connect {
                    port: number,
                    to,
                    ports: count,
                });
            }
            ports.push(SwitchPort::open(name, spec, role)?);
        }
        let started = Instant::now();
        let key = crate::random_u64();
        Ok(Switch {
            ports,
            table: MacTable::new(config.addresses, config.ageing, key),
            idle: config.idle,
            started,
            now: 1,
            desk: handle::Desk::new()?,
        })
    }

    /// Forwards until `stop` is set; looks at it at least every 100 ms.
    ///
    /// # Errors
    /// [`SwitchError::Wait`].
    pub fn run(&mut self, stop: &AtomicBool) -> Result<(), SwitchError> {
        let mut quiet_since: Option<Instant> = None;
        let mut turns = 0u32;
        while !stop.load(Ordering::Relaxed) {
            if self.turn() > 0 {
                quiet_since = None;
                // The clock is for ageing: some hundred turns late does not matter.
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(256) {
                    self.tick();
                }
                continue;
            }
            let now = Instant::now();
            match quiet_since {
                None => quiet_since = Some(now),
                Some(since) if now - since < self.idle => {}
                Some(_) => {
                    self.sleep(Duration::from_millis(100))?;
                    quiet_since = None;
                }
            }
            self.tick();
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// One look at every queue of every port; frames that moved.
    pub fn turn(&mut self) -> usize {
        let mut moved = 0;
        for number in 0..self.ports.len() {
            for queue in 0..self.ports[number].queues.len() {
                moved += match self.ports[number].role {
                    Role::Learn => self.learn(number, queue),
                    Role::Connect(to) => self.connect(number, queue, to),
                    Role::Reflect => self.ports[number].reflect(queue),
                };
            }
        }
        moved
    }

    /// Moves the clock on, notices links that went down, and does what handles asked for.
    fn tick(&mut self) {
        self.serve();
        // Never 0, which marks a free entry.
        self.now = (self.started.elapsed().as_millis() as u32).max(1);
        for (number, port) in self.ports.iter_mut().enumerate() {
            let up = port.port.link().up;
            if port.was_up && !up {
                self.table.forget(number as u16);
            }
            for address in port.port.take_announcements() {
                self.table.learn(Mac::new(address), number as u16, self.now);
            }
            port.was_up = up;
        }
    }

    fn learn(&mut self, number: usize, queue: usize) -> usize {
        let port = &mut self.ports[number];
        let n = {
            let SwitchPort { queues, held, .. } = port;
            queues[queue].rx(&mut held[queue])
        };
        if n == 0 {
            return 0;
        }
        let mut burst = std::mem::replace(&mut port.held[queue], Burst::empty());
        for packet in burst.drain() {
            let Some(header) = packet.header::<12>() else {
                self.ports[number].filtered += 1;
                continue;
            };
            let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = header;
            let destination = Mac::new([d0, d1, d2, d3, d4, d5]);
            self.table
                .learn(Mac::new([s0, s1, s2, s3, s4, s5]), number as u16, self.now);
            let known = if destination.is_group() {
                None
            } else {
                self.table.lookup(destination, self.now)
            };
            match known {
                Some(to) if usize::from(to) == number => self.ports[number].filtered += 1,
                Some(to) => self.ports[usize::from(to)].enqueue(packet, queue),
                None => self.flood(number, packet, queue),
            }
        }
        self.ports[number].held[queue] = burst;
        for port in &mut self.ports {
            port.flush(queue);
        }
        n
    }

    fn flood(&mut self, from: usize, packet: Packet, queue: usize) {
        let mut last = None;
        for to in 0..self.ports.len() {
            let port = &mut self.ports[to];
            if to == from || port.role != Role::Learn || !port.port.link().up {
                continue;
            }
            if let Some(to) = last.replace(to) {
                self.ports[to].enqueue_copy(&packet, queue);
            }
        }
        match last {
            Some(to) => {
                self.ports[from].flooded += 1;
                self.ports[to].enqueue(packet, queue);
            }
            None => self.ports[from].filtered += 1,
        }
    }

    fn connect(&mut self, number: usize, queue: usize, to: usize) -> usize {
        // The indices differ: `new` saw to that.
        let Ok([from, to]) = self.ports.get_disjoint_mut([number, to]) else {
            return 0;
        };
        let SwitchPort { queues, held, .. } = from;
        let burst = &mut held[queue];
        let n = queues[queue].rx(burst);
        // Frames that are held move too, when there is room again.
        let sent = match to.port.steering() {
            Some(steering) => to.spread(&steering, burst),
            None => to.queue_for(queue).map_or(0, |out| out.tx(burst)),
        };
        n + sent
    }

    fn sleep(&mut self, limit: Duration) -> Result<(), SwitchError> {
        let mut there = false;
        for queue in self.ports.iter_mut().flat_map(|p| &mut p.queues) {
            there |= queue.arm();
        }
        // A frame that is held waits for room, which nobody notifies of: look again soon.
        let held = self.ports.iter().flat_map(|p| &p.held).any(|h| !h.is_empty());
        let mut result = Ok(());
        if !there {
            let limit = if held { Duration::from_micros(100) } else { limit };
            let mut fds: Vec<PollFd<'_>> = self
                .ports
                .iter()
                .flat_map(|p| &p.queues)
                .map(|q| q.as_fd())
                .chain([self.desk.wake().as_fd()])
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let timeout = Timespec {
                tv_sec: limit.as_secs() as i64,
                tv_nsec: limit.subsec_nanos().into(),
            };
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {
                    if fds.last().is_some_and(|wake| wake.revents().contains(PollFlags::IN)) {
                        let _ = rustix::io::read(self.desk.wake(), &mut [0u8; 8]);
                    }
                }
                Err(e) => result = Err(SwitchError::Wait(e.into())),
            }
        }
        for queue in self.ports.iter_mut().flat_map(|p| &mut p.queues) {
            queue.disarm();
        }
        result
    }

    /// Every port's counters.
    pub fn stats(&self) -> Vec<SwitchPortStats> {
        self.ports.iter().map(SwitchPort::stats).collect()
    }

    /// The learned addresses: address, port, how long ago it was seen.
    pub fn addresses(&self) -> Vec<(Mac, usize, Duration)> {
        self.learned().collect()
    }

    fn learned(&self) -> impl Iterator<Item = (Mac, usize, Duration)> + '_ {
        let age = |ms: u32| Duration::from_millis(ms.into());
        let entries = self.table.entries(self.now);
        entries.map(move |(mac, port, ms)| (mac, usize::from(port), age(ms)))
    }

    /// Moves what ports have sent already, for at most `limit`, and waits until the other sides have taken it: for when
    /// the switch is about to be dropped. Whether nothing was left.
    pub fn drain(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.turn() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
        }
        let mut queues = self.ports.iter_mut().flat_map(|port| &mut port.queues);
        queues.all(|queue| queue.drain(deadline.saturating_duration_since(Instant::now())))
            && self
                .ports
                .iter()
                .flat_map(|port| &port.held)
                .all(|held| held.is_empty())
    }

    /// The ports, in their order.
    pub fn ports(&self) -> impl Iterator<Item = (&str, &Port)> {
        self.ports.iter().map(|p| (p.name.as_str(), &p.port))
    }
}

impl SwitchPort {
    fn open(name: String, spec: PortSpec, role: Role) -> Result<Self, SwitchError> {
        let opened = Port::open_spec(spec).and_then(|port| {
            let queues = (0..port.queue_count())
                .map(|i| port.queue(i))
                .collect::<Result<Vec<_>, _>>()?;
            Ok((port, queues))
        });
        let (port, queues) = match opened {
            Ok(opened) => opened,
            Err(source) => return Err(SwitchError::Port { name, source }),
        };
        let held = queues.iter().map(|_| Burst::new(BURST)).collect();
        Ok(SwitchPort {
            name,
            port,
            queues,
            role,
            held,
            out: Burst::new(BURST),
            lanes: [Burst::new(BURST), Burst::new(BURST)],
            was_up: false,
            dropped: 0,
            filtered: 0,
            flooded: 0,
        })
    }

    fn stats(&self) -> SwitchPortStats {
        SwitchPortStats {
            name: self.name.clone(),
            link_up: self.port.link().up,
            stats: self.port.stats(),
            dropped: self.dropped,
            filtered: self.filtered,
            flooded: self.flooded,
        }
    }

    /// The queue to send on, for frames that came on queue `queue` of another port.
    fn queue_for(&mut self, queue: usize) -> Option<&mut Queue> {
        let active = usize::from(self.port.link().queues).min(self.queues.len());
        if active == 0 {
            None
        } else {
            self.queues.get_mut(queue % active)
        }
    }

    fn enqueue(&mut self, packet: Packet, queue: usize) {
        if self.out.room() == 0 {
            self.flush(queue);
        }
        // flush leaves room.
        if self.out.push(packet).is_err() {
            self.dropped += 1;
        }
    }

    fn enqueue_copy(&mut self, packet: &Packet, queue: usize) {
        let copy = self.queues.first_mut().and_then(Queue::packet);
        match copy.and_then(|mut copy| copy.copy_packet(packet).ok().map(|()| copy)) {
            Some(copy) => self.enqueue(copy, queue),
            None => self.dropped += 1,
        }
    }

    /// Sends what is to go out; what does not fit is dropped, and counted.
    fn flush(&mut self, queue: usize) {
        if self.out.is_empty() {
            return;
        }
        let mut out = std::mem::replace(&mut self.out, Burst::empty());
        if let Some(steering) = self.port.steering() {
            self.spread(&steering, &mut out);
        } else if let Some(queue) = self.queue_for(queue) {
            queue.tx(&mut out);
        }
        self.dropped += out.len() as u64;
        out.clear();
        self.out = out;
    }

    /// Sends each packet on the queue that the front-end wants it on; how many. What there was no room for stays.
    fn spread(&mut self, steering: &Steering, out: &mut Burst) -> usize {
        let SwitchPort { queues, lanes, .. } = self;
        let [lane, kept] = lanes;
        let mut sent = 0;
        while let Some(first) = out.first() {
            // Those of one queue at a time, in their order.
            let pair = steering.pair(first);
            out.rewrite(0, |packet| match steering.pair(&packet) == pair {
                true => lane.push(packet).err(),
                false => Some(packet),
            });
            if let Some(queue) = queues.get_mut(usize::from(pair)) {
                sent += queue.tx(lane);
            }
            lane.move_to(kept);
        }
        kept.move_to(out);
        sent
    }

    fn reflect(&mut self, queue: usize) -> usize {
        let SwitchPort { queues, held, .. } = self;
        let (queue, burst) = (&mut queues[queue], &mut held[queue]);
        let before = burst.len();
        let n = queue.rx(burst);
        for packet in &mut burst[before..] {
            if let Some(mut header) = packet.header::<12>() {
                header.rotate_left(6);
                // It was just read there: it is long enough.
                let _ = packet.write_at(0, &header);
            }
        }
        n + if burst.is_empty() { 0 } else { queue.tx(burst) }
    }
}

impl SwitchConfig {
    /// A learning switch that listens on each of `paths`.
    pub fn learning(paths: impl IntoIterator<Item = std::path::PathBuf>) -> Self {
        let ports = paths
            .into_iter()
            .map(|path| {
                let name = path
                    .file_name()
                    .map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
                (name, PortSpec::vhost(path), Role::Learn)
            })
            .collect();
        SwitchConfig {
            ports,
            ..SwitchConfig::default()
        }
    }
}
