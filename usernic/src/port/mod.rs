//! Ports: what a spec opens.
//!
//! A port has a control thread, which sleeps on the vhost-user socket: it notices that the other side is gone, stops the
//! queues (see the gate), and makes the connection anew. Queues are taken off the port's shelf and driven by the
//! application's threads. Nothing sets or narrows anybody's CPU affinity.

mod back;
mod front;
mod lent;
mod plan;
mod vf;
mod wish;

#[cfg(test)]
pub(crate) use back::vectors;
pub use lent::{LentMemory, LentPair, LentPort, LentRegion};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd};

use crate::cpu;
use crate::error::{Error, Tried};
use crate::memory::MemorySource;
use crate::offload::Steering;
use crate::queue::{Parts, Queue};
use crate::spec::{Kind, PortSpec};
use crate::stats::{Counters, DeviceStats, Stats};
use crate::vf::Hardware;
use crate::vfio::Host;

/// Checks where queues are to be polled, and has the memory come from there if nothing else was said.
fn place(host: &Host, spec: &mut PortSpec) -> Result<(), Error> {
    if spec.cpus.is_empty() {
        return Ok(());
    }
    let allowed = cpu::allowed(host);
    // The list is that of the main thread, which may be pinned already.
    let possible = |cpu: u32| allowed.contains(&cpu) || cpu::reachable(cpu);
    if let Some(&cpu) = spec.cpus.iter().find(|cpu| !possible(**cpu)) {
        let allowed = cpu::format_list(&allowed);
        return Err(Error::Cpu { cpu, allowed });
    }
    let mut nodes: Vec<u32> = spec.cpus.iter().filter_map(|cpu| cpu::node(host, *cpu)).collect();
    nodes.sort_unstable();
    nodes.dedup();
    match (spec.numa, &nodes[..]) {
        (_, []) => {}
        (Some(node), near) if near == [node] => {}
        // One node: nothing to choose, and mbind(2) need not be allowed.
        (None, [_])
            if host
                .names("sys/devices/system/node")
                .iter()
                .filter(|n| is_node(n))
                .count()
                < 2 => {}
        (None, [node]) => spec.numa = Some(*node),
        (wanted, near) => tracing::warn!(
            path = %spec.path.display(),
            "the CPUs of cpus= are on NUMA nodes {near:?}, the memory is on {}",
            wanted.map_or("any".to_owned(), |node| format!("node {node}"))
        ),
    }
    Ok(())
}

fn is_node(name: &str) -> bool {
    name.strip_prefix("node")
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Bytes of the memory that a port of this spec asks for.
pub(crate) fn segment_len(spec: &PortSpec) -> Result<usize, Error> {
    match spec.kind {
        Kind::VirtioUser => Ok(plan::Plan::new(spec)?.len),
        Kind::Vhost => Ok(back::segment_len(spec)),
        Kind::Vf => vf::segment_len(spec),
    }
}

/// A network port that this process drives itself.
///
/// ```no_run
/// let port = usernic::Port::open("virtio-user,path=/run/vhost.sock,queues=2")?;
/// let mut queue = port.queue(0)?;
/// let mut burst = usernic::Burst::new(32);
/// loop {
///     if queue.rx(&mut burst) == 0 {
///         queue.wait(None)?;
///     }
///     queue.tx(&mut burst);
/// #   break;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Dropping it stops the rings and closes the socket. Queues and packets that are still held stay valid: queues move
/// nothing any more, and the memory goes when the last packet does.
pub struct Port {
    inner: Arc<Inner>,
    control: Option<JoinHandle<()>>,
    memory: String,
    memory_bytes: usize,
}

/// What the control thread and the port's handle share.
pub(crate) struct Inner {
    pub(crate) spec: PortSpec,
    mac: Mutex<[u8; 6]>,
    pub(crate) counters: Vec<Arc<Counters>>,
    shelf: Arc<Shelf>,
    /// Wakes the control thread.
    wake: OwnedFd,
    stop: AtomicBool,
    /// Readable, for good, once the port is to stop: ends the control thread's waits for the other side.
    stopping: Arc<OwnedFd>,
    /// Why the link is down.
    reason: Mutex<Option<String>>,
    up: AtomicBool,
    queues_up: AtomicU64,
    features: AtomicU64,
    mtu: AtomicU64,
    speed: AtomicU64,
    /// What the device of a `vf` port counted, as it was read last.
    device: Mutex<DeviceStats>,
    changed: (Mutex<u64>, Condvar),
    wishes: wish::Wishes,
    /// Addresses that the front-end announced.
    announced: Mutex<Vec<[u8; 6]>>,
    /// How the front-end wants frames spread over its queues, and whether it does.
    steering: Mutex<Option<Arc<Steering>>>,
    steered: AtomicBool,
    /// One for every queue, a member of its epoll instance: written when the link changes, and by the queue's gate.
    wakers: Vec<Arc<OwnedFd>>,
}

/// Queues that nobody has taken.
pub(crate) struct Shelf(Mutex<Vec<Option<Parts>>>);

/// The state of a port's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Link {
    /// The other side is there and the rings are running.
    pub up: bool,
    /// Queue pairs that are running.
    pub queues: u16,
    /// Link speed in Mb/s, as the spec says or else the back-end; 0 if unknown.
    pub speed: u32,
    /// The virtio features that were negotiated.
    pub features: u64,
}

impl Port {
    /// Opens a port from a spec (see [`spec`](crate::spec) for the keys). `"auto"` opens the one that an orchestrator
    /// gave this container (see [`auto`](crate::auto)).
    ///
    /// A front-end connects, negotiates and starts its rings before this returns; with `server=1`, and for `vhost`
    /// ports, the socket is listening when this returns, and the link comes up when somebody connects
    /// ([`wait_link`](Port::wait_link)).
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left half set up.
    pub fn open(spec: &str) -> Result<Self, Error> {
        Self::open_spec(spec.parse()?)
    }

    /// Opens a port from a parsed spec.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left half set up.
    pub fn open_spec(spec: PortSpec) -> Result<Self, Error> {
        let mut memory = crate::memory::Automatic::from_spec(&spec);
        Self::open_with(spec, &mut memory)
    }

    /// Opens a port as [`open_spec`](Port::open_spec) does, but does not wait for a back-end: a front-end that connects goes on
    /// looking for its back-end, as it does after a loss, until the link is up ([`wait_link`](Port::wait_link)) or the port
    /// is dropped. [`link_error`](Port::link_error) says what stands against it.
    ///
    /// # Errors
    /// See [`Error`]; none of the connection. Nothing is left half set up.
    pub fn open_unconnected(mut spec: PortSpec) -> Result<Self, Error> {
        let mut memory = crate::memory::Automatic::from_spec(&spec);
        match spec.kind {
            Kind::VirtioUser => {
                place(&Host::default(), &mut spec)?;
                crate::notify::prepare()?;
                front::open(spec, &mut memory, false)
            }
            Kind::Vhost | Kind::Vf => Self::open_with(spec, &mut memory),
        }
    }

    /// Why the link is down, of a front-end: what became of the last try to connect, or of the connection. `None` while the
    /// link is up, and before there was anything to say.
    pub fn link_error(&self) -> Option<String> {
        lock(&self.inner.reason).clone()
    }

    /// Opens a port whose segment comes from `memory`.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left half set up.
    pub fn open_with(mut spec: PortSpec, memory: &mut dyn MemorySource) -> Result<Self, Error> {
        spec.check()?;
        place(&Host::default(), &mut spec)?;
        crate::notify::prepare()?;
        match spec.kind {
            Kind::VirtioUser => front::open(spec, memory, true),
            Kind::Vhost => back::open(spec),
            Kind::Vf => vf::open(spec, memory),
        }
    }

    /// Opens a `vf` port on a virtual function that is reached in a way of its own: a model's, for tests. What the spec says
    /// about finding and opening one is not looked at.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left half set up.
    pub fn open_vf(spec: PortSpec, hardware: Box<dyn Hardware>, memory: &mut dyn MemorySource) -> Result<Self, Error> {
        vf::open_on(spec, hardware, memory)
    }

    /// Takes a queue pair. It is back on the shelf when the handle is dropped.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`], [`Error::QueueTaken`].
    pub fn queue(&self, index: u16) -> Result<Queue, Error> {
        let mut shelf = lock(&self.inner.shelf.0);
        let count = shelf.len() as u16;
        let place = shelf
            .get_mut(usize::from(index))
            .ok_or(Error::NoSuchQueue { index, count })?;
        let parts = place.take().ok_or(Error::QueueTaken { index })?;
        Ok(Queue::new(parts, Arc::downgrade(&self.inner.shelf)))
    }

    /// The CPU that the thread of a queue is to run on, by `cpus=`. Nobody is moved there: see
    /// [`cpu::pin`](crate::cpu::pin).
    pub fn cpu(&self, queue: u16) -> Option<u32> {
        self.inner.spec.cpus.get(usize::from(queue)).copied()
    }

    /// Queue pairs of the port, running or not.
    pub fn queue_count(&self) -> u16 {
        self.inner.counters.len() as u16
    }

    /// The link.
    pub fn link(&self) -> Link {
        self.inner.link()
    }

    /// Waits until the link is up (or `timeout` is over); whether it is.
    pub fn wait_link(&self, timeout: Duration) -> bool {
        let deadline = crate::deadline(timeout);
        let (state, condition) = &self.inner.changed;
        let mut guard = lock(state);
        while !self.link().up {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard = condition
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// The port's address.
    pub fn mac(&self) -> [u8; 6] {
        self.inner.mac()
    }

    /// The largest packet, in bytes, without its Ethernet header.
    pub fn mtu(&self) -> u16 {
        self.inner.mtu.load(Ordering::Relaxed) as u16
    }

    /// The spec that the port was opened with.
    pub fn spec(&self) -> &PortSpec {
        &self.inner.spec
    }

    /// How the front-end of a `vhost` port wants the frames that are sent to it spread over the queues, if it set up
    /// receive-side scaling (virtio 1.3, 5.1.6.5.7): a frame belongs on the queue [`Steering::pair`]. One load where it
    /// did not. To be asked again for each burst: the front-end may change it at any moment.
    #[inline]
    pub fn steering(&self) -> Option<Arc<Steering>> {
        if !self.inner.steered.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.inner.steering).clone()
    }

    /// What the port has done: the sum over its queues.
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        for counters in &self.inner.counters {
            sum += counters.snapshot();
        }
        sum
    }

    /// What a queue has done, if there is such a queue.
    pub fn queue_stats(&self, index: u16) -> Option<Stats> {
        self.inner.counters.get(usize::from(index)).map(|c| c.snapshot())
    }

    /// Where the port's segment comes from, in words: kind, page size, path, and why it is no better.
    pub fn memory(&self) -> &str {
        &self.memory
    }

    /// Bytes of the port's segment.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("kind", &self.spec().kind.name())
            .field("path", &self.spec().path)
            .field("link", &self.link())
            .finish_non_exhaustive()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.inner.stopping, &1u64.to_ne_bytes());
        self.inner.wake();
        if let Some(control) = self.control.take() {
            // It waits for nobody any more, but for half a second at the most until the other side has stopped the rings.
            let _ = control.join();
        }
        // Queues on the shelf hold buffers.
        lock(&self.inner.shelf.0).clear();
    }
}

impl Inner {
    pub(crate) fn new(spec: PortSpec, queues: u16) -> Result<Self, Error> {
        let mac = spec.mac.unwrap_or_else(random_mac);
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wakers = (0..queues)
            .map(|_| eventfd(0, flags).map(Arc::new))
            .collect::<Result<_, _>>()
            .tried("eventfd(2)")?;
        Ok(Inner {
            mac: Mutex::new(mac),
            counters: (0..queues).map(|_| Arc::default()).collect(),
            shelf: Arc::new(Shelf(Mutex::new((0..queues).map(|_| None).collect()))),
            wake: eventfd(0, flags).tried("eventfd(2)")?,
            stop: AtomicBool::new(false),
            stopping: Arc::new(eventfd(0, flags).tried("eventfd(2)")?),
            reason: Mutex::default(),
            up: AtomicBool::new(false),
            queues_up: AtomicU64::new(0),
            features: AtomicU64::new(0),
            mtu: AtomicU64::new(spec.mtu.into()),
            speed: AtomicU64::new(spec.speed.into()),
            device: Mutex::default(),
            changed: (Mutex::new(0), Condvar::new()),
            wishes: wish::Wishes::new(),
            announced: Mutex::default(),
            steering: Mutex::default(),
            steered: AtomicBool::new(false),
            wakers,
            spec,
        })
    }

    pub(crate) fn link(&self) -> Link {
        let up = self.up.load(Ordering::Acquire);
        Link {
            up,
            queues: if up {
                self.queues_up.load(Ordering::Relaxed) as u16
            } else {
                0
            },
            speed: self.speed.load(Ordering::Relaxed) as u32,
            features: self.features.load(Ordering::Relaxed),
        }
    }

    /// Says why the link is down.
    fn set_reason(&self, reason: Option<String>) {
        *lock(&self.reason) = reason;
    }

    /// Says that the link is up with `queues` pairs, or down (0), and wakes who waits for that.
    pub(crate) fn set_link(&self, queues: u16, features: u64) {
        self.queues_up.store(queues.into(), Ordering::Relaxed);
        self.features.store(features, Ordering::Relaxed);
        self.up.store(queues > 0, Ordering::Release);
        *lock(&self.changed.0) += 1;
        self.changed.1.notify_all();
        for waker in &self.wakers {
            let _ = rustix::io::write(&**waker, &1u64.to_ne_bytes());
        }
    }

    /// Says how the front-end wants frames spread.
    pub(crate) fn set_steering(&self, steering: Option<Arc<Steering>>) {
        let on = steering.is_some();
        *lock(&self.steering) = steering;
        self.steered.store(on, Ordering::Release);
    }

    /// Says which speed the other side tells; 0: none.
    fn set_speed(&self, told: u32) {
        let speed = if self.spec.speed == 0 { told } else { self.spec.speed };
        self.speed.store(speed.into(), Ordering::Relaxed);
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        *lock(&self.mac)
    }

    fn set_mac(&self, mac: [u8; 6]) {
        *lock(&self.mac) = mac;
    }

    pub(crate) fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu.into(), Ordering::Relaxed);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Nothing is left to do for a port but to be closed.
    fn wait_for_stop(&self) {
        self.wishes.close();
        while !self.stopped() {
            self.sleep(None, None);
        }
    }

    /// The control thread's sleep: until `fd` is readable, the port is to stop, or the deadline has come.
    fn sleep(&self, fd: Option<BorrowedFd<'_>>, deadline: Option<Instant>) {
        self.sleep_on([fd, None], deadline);
    }

    /// The same, with two that may become readable.
    fn sleep_on(&self, [a, b]: [Option<BorrowedFd<'_>>; 2], deadline: Option<Instant>) {
        let wake = self.wake.as_fd();
        let fds = [wake, a.unwrap_or(wake), b.unwrap_or(wake)];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        // An error or an interruption is a sleep that was short.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        // Whoever woke this thread set a flag, or sent a wish, before.
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    /// Keeps an address that the front-end announced, unless nobody takes them.
    fn announced(&self, address: [u8; 6]) {
        let mut announced = lock(&self.announced);
        if announced.len() < Port::ANNOUNCEMENTS && !announced.contains(&address) {
            announced.push(address);
        }
    }

    /// What ends the sleep of queue `index`.
    pub(crate) fn waker_of(&self, index: usize) -> Arc<OwnedFd> {
        Arc::clone(&self.wakers[index])
    }

    /// The epoll instance of queue `index`, with its waker in it.
    pub(crate) fn epoll_of(&self, index: usize) -> Result<OwnedFd, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).tried("epoll_create1(2)")?;
        watch(&epoll, &*self.wakers[index])?;
        Ok(epoll)
    }

    pub(crate) fn put_on_shelf(&self, parts: Parts) {
        self.shelf.put_back(parts);
    }
}

/// Starts a port's control thread.
fn spawn(run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    let builder = std::thread::Builder::new()
        .name("usernic-control".into())
        .stack_size(256 << 10);
    builder.spawn(run).tried("starting the port's control thread")
}

/// Adds `fd` to an epoll instance, edge-triggered: nobody has to read it.
pub(crate) fn watch(epoll_fd: &OwnedFd, fd: &impl AsFd) -> Result<(), Error> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(epoll_fd, fd, epoll::EventData::new_u64(0), flags).tried("epoll_ctl(2)")
}

impl Shelf {
    pub(crate) fn put_back(&self, parts: Parts) {
        let mut shelf = lock(&self.0);
        let index = usize::from(parts.index);
        if let Some(place) = shelf.get_mut(index) {
            *place = Some(parts);
        }
    }
}

/// A poisoned lock guards nothing that a panic could have left half done here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A random unicast address, locally administered.
fn random_mac() -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = crate::random_u64().to_ne_bytes();
    [a & 0xFC | 0x02, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_polled_where_the_process_may_run_and_memory_is_near() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/self/status", "Cpus_allowed_list:\t2-3,200\n");
        let host = Host::new(root.path(), crate::vfio::Kernel);
        let placed = |text: &str| {
            let mut spec: PortSpec = text.parse().unwrap();
            place(&host, &mut spec).map(|()| spec.numa)
        };
        let error = placed("virtio-user,path=/s,queues=2,cpus=3+8191")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("CPU 8191 is not among") && error.contains("2-3,200"),
            "{error}"
        );
        assert_eq!(placed("virtio-user,path=/s,cpus=200").unwrap(), None);
        for (cpu, node) in [(2, 0), (3, 0), (200, 1)] {
            write(&format!("sys/devices/system/cpu/cpu{cpu}/node{node}/x"), "");
        }
        write("sys/devices/system/node/node0/x", "");
        assert_eq!(placed("virtio-user,path=/s,cpus=2").unwrap(), None, "there is one node");
        write("sys/devices/system/node/node1/x", "");
        assert_eq!(placed("virtio-user,path=/s,cpus=200").unwrap(), Some(1));
        assert_eq!(placed("virtio-user,path=/s,cpus=200,numa=0").unwrap(), Some(0));
        assert_eq!(placed("virtio-user,path=/s,queues=2,cpus=2+200").unwrap(), None);
    }
}
