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
use crate::spec::{Kind, PortSpec};
use crate::stats::{Counters, Stats};

/// Frames that are taken from a queue at a time.
const BURST: usize = 32;

/// Bytes of an Ethernet header: a frame with fewer is a runt.
const HEADER: usize = 14;

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
    /// Addresses that are remembered, [`MacTable::MOST`] at the most.
    pub addresses: usize,
    /// How long to poll without a frame before sleeping.
    pub idle: Duration,
    /// Flood frames for the link-local groups 01:80:c2:00:00:00 to 01:80:c2:00:00:0f, which a bridge does not forward
    /// (IEEE 802.1Q, 8.6.3). A cross-connect passes them either way.
    pub forward_link_local: bool,
}

impl Default for SwitchConfig {
    fn default() -> Self {
        SwitchConfig {
            ports: Vec::new(),
            ageing: Duration::from_secs(300),
            addresses: 4096,
            idle: Duration::from_micros(200),
            forward_link_local: false,
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
    /// Frames from it that went nowhere: their destination is behind it, or a link-local group, or there is no other port.
    pub filtered: u64,
    /// Frames from it that were flooded.
    pub flooded: u64,
    /// Copies of flooded frames from it: one less than the ports that a frame was flooded to.
    pub copies: u64,
}

impl std::ops::AddAssign<&SwitchPortStats> for SwitchPortStats {
    /// Adds the counters; name and link stay.
    fn add_assign(&mut self, other: &SwitchPortStats) {
        self.stats += other.stats;
        self.dropped += other.dropped;
        self.filtered += other.filtered;
        self.flooded += other.flooded;
        self.copies += other.copies;
    }
}

/// A switch. See the module.
pub struct Switch {
    ports: Vec<SwitchPort>,
    table: MacTable,
    idle: Duration,
    forward_link_local: bool,
    started: Instant,
    now: u32,
    desk: handle::Desk,
    /// What ports that were removed had counted.
    removed: Option<SwitchPortStats>,
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
    /// Bytes of the longest frame that the port's MTU allows, without VLAN tags.
    longest: usize,
    dropped: u64,
    filtered: u64,
    flooded: u64,
    copies: u64,
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
    /// The name is empty, or has control characters, which would break lines of logs.
    #[error("a port needs a name, without control characters: {name:?}")]
    NoName {
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
    /// No table has so many addresses.
    #[error("addresses={addresses}: a switch remembers at most {} addresses", MacTable::MOST)]
    Addresses {
        /// So many were asked for.
        addresses: usize,
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
        config.check()?;
        // Room for some that are added later.
        let mut ports = Vec::with_capacity(config.ports.len().next_power_of_two().max(64));
        for (name, spec, role) in config.ports {
            ports.push(SwitchPort::open(name, spec, role)?);
        }
        let started = Instant::now();
        let key = crate::random_u64();
        Ok(Switch {
            ports,
            table: MacTable::new(config.addresses, config.ageing, key),
            idle: config.idle,
            forward_link_local: config.forward_link_local,
            started,
            now: 1,
            desk: handle::Desk::new()?,
            removed: None,
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
            // Only a port of the bridge that is up has addresses; what another one announces is thrown away.
            for address in port.port.take_announcements() {
                if up && port.role == Role::Learn {
                    self.table.learn(Mac::new(address), number as u16, self.now);
                }
            }
            port.was_up = up;
            port.longest = longest(&port.port);
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
            let Some(header) = packet.header::<HEADER>() else {
                self.ports[number].queues[queue].counters().rx_runts.add(1);
                continue;
            };
            let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, _, _] = header;
            let destination = Mac::new([d0, d1, d2, d3, d4, d5]);
            self.table
                .learn(Mac::new([s0, s1, s2, s3, s4, s5]), number as u16, self.now);
            if destination.is_group() {
                if destination.is_link_local() && !self.forward_link_local {
                    self.ports[number].filtered += 1;
                } else {
                    self.flood(number, packet, queue);
                }
                continue;
            }
            match self.table.lookup(destination, self.now).map(usize::from) {
                Some(to) if to == number => self.ports[number].filtered += 1,
                // Whatever the table says: a port outside the bridge gets none of its frames.
                Some(to) if self.ports.get(to).is_some_and(|port| port.role == Role::Learn) => {
                    self.ports[to].enqueue(packet, queue);
                }
                _ => self.flood(number, packet, queue),
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
                self.ports[from].copies += 1;
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
        if burst.iter().any(|packet| to.is_odd(packet)) {
            to.keep_out(burst, 0, queues[queue].counters());
        }
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
    /// the switch is about to be dropped. What is still held then is dropped, and counted. Whether nothing was left.
    pub fn drain(&mut self, limit: Duration) -> bool {
        let deadline = crate::deadline(limit);
        let mut late = false;
        while !late && self.turn() > 0 {
            late = Instant::now() >= deadline;
        }
        let queues = self.ports.iter_mut().flat_map(|port| &mut port.queues);
        // All of them, also behind one whose other side is gone.
        let drain = |all, queue: &mut Queue| queue.drain(deadline.saturating_duration_since(Instant::now())) && all;
        let drained = queues.fold(!late, drain);
        let mut held = 0;
        for number in 0..self.ports.len() {
            held += self.drop_held(number);
        }
        drained && held == 0
    }

    /// Drops the frames that a port's neighbour has not taken, and counts them; how many.
    fn drop_held(&mut self, number: usize) -> u64 {
        let port = &mut self.ports[number];
        let mut count = 0;
        for held in &mut port.held {
            count += held.len() as u64;
            held.clear();
        }
        let receiver = match port.role {
            Role::Connect(to) => self.ports.get_mut(to),
            Role::Learn | Role::Reflect => self.ports.get_mut(number),
        };
        match receiver {
            Some(receiver) => receiver.dropped += count,
            // The neighbour is gone: they go nowhere.
            None => self.ports[number].filtered += count,
        }
        count
    }

    /// The sum of what ports counted that were removed; `None`: none was. Ports that are there and this one together have
    /// counted every frame.
    pub fn removed(&self) -> Option<&SwitchPortStats> {
        self.removed.as_ref()
    }

    /// The ports, in their order.
    pub fn ports(&self) -> impl Iterator<Item = (&str, &Port)> {
        self.ports.iter().map(|p| (p.name.as_str(), &p.port))
    }
}

impl SwitchPort {
    fn open(name: String, spec: PortSpec, role: Role) -> Result<Self, SwitchError> {
        match Port::open_spec(spec) {
            Ok(port) => Self::new(name, port, role),
            Err(source) => Err(SwitchError::Port { name, source }),
        }
    }

    fn new(name: String, port: Port, role: Role) -> Result<Self, SwitchError> {
        let queues = (0..port.queue_count()).map(|index| port.queue(index));
        let queues: Vec<Queue> = match queues.collect() {
            Ok(queues) => queues,
            Err(source) => return Err(SwitchError::Port { name, source }),
        };
        let held = queues.iter().map(|_| Burst::new(BURST)).collect();
        let longest = longest(&port);
        Ok(SwitchPort {
            name,
            port,
            queues,
            role,
            held,
            out: Burst::new(BURST),
            lanes: [Burst::new(BURST), Burst::new(BURST)],
            was_up: false,
            longest,
            dropped: 0,
            filtered: 0,
            flooded: 0,
            copies: 0,
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
            copies: self.copies,
        }
    }

    /// Whether a frame is a runt, or longer than this port's MTU allows without a closer look.
    #[inline(always)]
    fn is_odd(&self, packet: &Packet) -> bool {
        !(HEADER..=self.longest).contains(&packet.len())
    }

    /// Whether a frame, or each of those that it is to be cut into, is no longer than the port's MTU allows.
    #[cold]
    #[inline(never)]
    fn admits(&self, packet: &Packet) -> bool {
        let (longest, tags) = packet.longest_frame();
        longest <= self.longest + tags
    }

    /// Drops runts, and what is too long for this port, from `start` on. `sender` has the counters of the queue that the
    /// burst was received on.
    #[cold]
    #[inline(never)]
    fn keep_out(&self, burst: &mut Burst, start: usize, sender: &Counters) {
        burst.rewrite(start, |packet| {
            if packet.len() < HEADER {
                sender.rx_runts.add(1);
                return None;
            }
            if packet.len() > self.longest && !self.admits(&packet) {
                self.count_oversize();
                return None;
            }
            Some(packet)
        });
    }

    fn count_oversize(&self) {
        // A port has at least one queue.
        if let Some(queue) = self.queues.first() {
            queue.counters().tx_oversize.add(1);
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
        if packet.len() > self.longest && !self.admits(&packet) {
            self.count_oversize();
            return;
        }
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
        let mut burst = std::mem::replace(&mut self.held[queue], Burst::empty());
        let before = burst.len();
        let n = self.queues[queue].rx(&mut burst);
        if burst[before..].iter().any(|packet| self.is_odd(packet)) {
            self.keep_out(&mut burst, before, self.queues[queue].counters());
        }
        for packet in &mut burst[before..] {
            if let Some(mut header) = packet.header::<12>() {
                header.rotate_left(6);
                // It was just read there: it is long enough.
                let _ = packet.write_at(0, &header);
            }
        }
        let sent = self.queues[queue].tx(&mut burst);
        self.held[queue] = burst;
        n + sent
    }
}

/// Bytes of the longest frame that a port's MTU allows, without VLAN tags. What a front-end says of its own MTU does not
/// change that of a `vhost` port.
fn longest(port: &Port) -> usize {
    let mtu = match port.spec().kind {
        Kind::Vhost => port.spec().mtu,
        Kind::VirtioUser | Kind::Vf => port.mtu(),
    };
    HEADER + usize::from(mtu)
}

/// Whether a port may have a name beside ports of `others`.
fn check_name<'a>(name: &str, mut others: impl Iterator<Item = &'a str>) -> Result<(), SwitchError> {
    if name.is_empty() || name.contains(char::is_control) {
        return Err(SwitchError::NoName { name: name.to_owned() });
    }
    if others.any(|other| other == name) {
        return Err(SwitchError::NameTaken { name: name.to_owned() });
    }
    Ok(())
}

impl SwitchConfig {
    /// Whether there can be such a switch, as far as that can be said before a port is opened: [`Switch::new`] asks this
    /// first.
    ///
    /// # Errors
    /// [`SwitchError::NoName`], [`SwitchError::NameTaken`], [`SwitchError::Connect`], [`SwitchError::Full`],
    /// [`SwitchError::Addresses`].
    pub fn check(&self) -> Result<(), SwitchError> {
        let ports = self.ports.len();
        if ports > handle::MOST_PORTS {
            return Err(SwitchError::Full);
        }
        if self.addresses > MacTable::MOST {
            let addresses = self.addresses;
            return Err(SwitchError::Addresses { addresses });
        }
        for (port, (name, _, role)) in self.ports.iter().enumerate() {
            check_name(name, self.ports[..port].iter().map(|(name, ..)| name.as_str()))?;
            match *role {
                Role::Connect(to) if to >= ports || to == port => {
                    return Err(SwitchError::Connect { port, to, ports });
                }
                _ => {}
            }
        }
        Ok(())
    }

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
