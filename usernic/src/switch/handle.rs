//! Changing a switch while it runs.
//!
//! Everything slow happens on the caller's thread: sockets and memory of a new port are made there, those of a removed
//! one are given back there. The polling thread is handed the finished port, or hands one back, between two turns.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::{Mac, Role, Switch, SwitchError, SwitchPort, SwitchPortStats, check_name};
use crate::Port;
use crate::spec::PortSpec;

/// Ports of a switch.
pub(super) const MOST_PORTS: usize = 4096;

/// How long the polling thread may take to answer: it looks every 256 busy turns, and at once when it sleeps.
const LIMIT: Duration = Duration::from_secs(10);

/// The place of a port whose neighbour is gone.
pub(super) const NOWHERE: usize = usize::MAX;

/// What a port that is added is to do with its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Join {
    /// See [`Role::Learn`].
    Learn,
    /// See [`Role::Connect`], both ways: the named port is connected to the new one. It must not be connected to one
    /// that is there.
    Connect(String),
    /// See [`Role::Connect`], to no port yet: its frames wait for one that is connected to it.
    Alone,
    /// See [`Role::Reflect`].
    Reflect,
}

/// What a switch knows of the moment.
#[derive(Clone, Debug)]
pub struct SwitchReport {
    /// Every port's counters.
    pub ports: Vec<SwitchPortStats>,
    /// Every port's role, in the same order. The number of [`Role::Connect`] is none of theirs if the neighbour was
    /// removed.
    pub roles: Vec<Role>,
    /// The learned addresses: address, port, how long ago it was seen.
    pub addresses: Vec<(Mac, usize, Duration)>,
}

/// The way to a switch that another thread runs. Clones are equal; any thread may hold one.
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
/// use usernic::spec::PortSpec;
/// use usernic::switch::{Join, Switch, SwitchConfig};
///
/// let dir = tempfile::tempdir()?;
/// let mut switch = Switch::new(SwitchConfig::default())?;
/// let (handle, stop) = (switch.handle(), AtomicBool::new(false));
/// std::thread::scope(|scope| {
///     let polling = scope.spawn(|| switch.run(&stop));
///     handle.add("a", PortSpec::vhost(dir.path().join("a")), Join::Learn)?;
///     assert_eq!(handle.report()?.ports.len(), 1);
///     handle.remove("a")?;
///     stop.store(true, Ordering::Relaxed);
///     polling.join().expect("no panic")
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SwitchHandle {
    commands: Sender<Command>,
    bell: Arc<Bell>,
}

/// Tells the polling thread that a command is there.
pub(super) struct Bell {
    pending: AtomicBool,
    /// Ends its sleep.
    wake: OwnedFd,
}

/// The polling thread's side.
pub(super) struct Desk {
    commands: Receiver<Command>,
    sender: Sender<Command>,
    bell: Arc<Bell>,
}

enum Command {
    Add(Box<SwitchPort>, Join, SyncSender<Result<(), Refused>>),
    Remove(String, SyncSender<Result<Box<SwitchPort>, SwitchError>>),
    Report(SwitchReport, SyncSender<SwitchReport>),
}

/// The port that was not taken is closed where it was opened.
struct Refused(Box<SwitchPort>, SwitchError);

impl Desk {
    pub(super) fn new() -> Result<Self, SwitchError> {
        let (sender, commands) = channel();
        let wake =
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|e| SwitchError::Wait(e.into()))?;
        let pending = AtomicBool::new(false);
        Ok(Desk {
            commands,
            sender,
            bell: Arc::new(Bell { pending, wake }),
        })
    }

    pub(super) fn handle(&self) -> SwitchHandle {
        SwitchHandle {
            commands: self.sender.clone(),
            bell: Arc::clone(&self.bell),
        }
    }

    /// Readable when a command came.
    pub(super) fn wake(&self) -> &OwnedFd {
        &self.bell.wake
    }

    #[inline]
    fn has_rung(&self) -> bool {
        self.bell.pending.load(Ordering::Relaxed) && self.bell.pending.swap(false, Ordering::Acquire)
    }
}

impl SwitchHandle {
    /// Adds a port. It is opened by the calling thread; the others' frames move on meanwhile.
    ///
    /// # Errors
    /// [`SwitchError::NoName`], [`SwitchError::NameTaken`], [`SwitchError::NoPort`] and [`SwitchError::Taken`] of a
    /// neighbour, [`SwitchError::Full`], [`SwitchError::Port`], [`SwitchError::NotRunning`].
    pub fn add(&self, name: &str, spec: PortSpec, join: Join) -> Result<(), SwitchError> {
        self.add_opened(SwitchPort::open(name.to_owned(), spec, Role::Learn)?, join)
    }

    /// Adds a port that is open, for what a spec does not say: memory of one's own
    /// ([`Port::open_with`]), or a device that is reached in another way ([`Port::open_vf`]). Nobody has its queues.
    ///
    /// # Errors
    /// Those of [`add`](SwitchHandle::add), after which the port is closed; [`SwitchError::Port`] if one of its queues is
    /// taken.
    pub fn add_port(&self, name: &str, port: Port, join: Join) -> Result<(), SwitchError> {
        self.add_opened(SwitchPort::new(name.to_owned(), port, Role::Learn)?, join)
    }

    fn add_opened(&self, port: SwitchPort, join: Join) -> Result<(), SwitchError> {
        let (answer, answered) = sync_channel(1);
        self.tell(Command::Add(Box::new(port), join, answer))?;
        receive(&answered)?.map_err(|Refused(port, error)| {
            drop(port);
            error
        })
    }

    /// Removes a port and closes it: its front-end sees the socket close. The frames that it has sent and nobody has
    /// taken are lost; a port that was connected to it holds its own until another one is.
    ///
    /// # Errors
    /// [`SwitchError::NoPort`], [`SwitchError::NotRunning`].
    pub fn remove(&self, name: &str) -> Result<(), SwitchError> {
        let (answer, answered) = sync_channel(1);
        self.tell(Command::Remove(name.to_owned(), answer))?;
        receive(&answered)?.map(drop)
    }

    /// Counters, roles and addresses.
    ///
    /// # Errors
    /// [`SwitchError::NotRunning`].
    pub fn report(&self) -> Result<SwitchReport, SwitchError> {
        let (answer, answered) = sync_channel(1);
        // Room for what is usual, so that the polling thread need not ask the system for it.
        let empty = SwitchReport {
            ports: Vec::with_capacity(64),
            roles: Vec::with_capacity(64),
            addresses: Vec::with_capacity(4096),
        };
        self.tell(Command::Report(empty, answer))?;
        receive(&answered)
    }

    fn tell(&self, command: Command) -> Result<(), SwitchError> {
        self.commands.send(command).map_err(|_| SwitchError::NotRunning)?;
        self.bell.pending.store(true, Ordering::Release);
        // A full counter wakes too.
        let _ = rustix::io::write(&self.bell.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

/// Closes a port that nobody waits for any more. That waits for the port's control thread, which the polling thread does
/// not do.
#[cold]
fn close(port: Box<SwitchPort>) {
    // Without a thread for it the port is closed here, when the closure is dropped.
    let _ = std::thread::Builder::new()
        .name("switch-close".into())
        .spawn(move || drop(port));
}

fn receive<T>(answered: &Receiver<T>) -> Result<T, SwitchError> {
    answered.recv_timeout(LIMIT).map_err(|_| SwitchError::NotRunning)
}

impl Switch {
    /// The way to change this switch while it runs.
    pub fn handle(&self) -> SwitchHandle {
        self.desk.handle()
    }

    /// Does what handles asked for.
    #[inline]
    pub(super) fn serve(&mut self) {
        if self.desk.has_rung() {
            self.serve_all();
        }
    }

    #[cold]
    fn serve_all(&mut self) {
        while let Ok(command) = self.desk.commands.try_recv() {
            // Who asked may have gone: it did not wait so long.
            match command {
                Command::Add(port, join, answer) => {
                    let result = self.add(port, join);
                    let added = result.is_ok();
                    match answer.try_send(result) {
                        Ok(()) => {}
                        Err(_) if added => close(self.take(self.ports.len() - 1)),
                        Err(TrySendError::Full(Err(refused)) | TrySendError::Disconnected(Err(refused))) => {
                            close(refused.0);
                        }
                        Err(_) => {}
                    }
                }
                Command::Remove(name, answer) => {
                    let result = self.find(&name).map(|number| self.take(number));
                    if let Err(TrySendError::Full(Ok(port)) | TrySendError::Disconnected(Ok(port))) =
                        answer.try_send(result)
                    {
                        close(port);
                    }
                }
                Command::Report(mut report, answer) => {
                    report.ports.extend(self.ports.iter().map(SwitchPort::stats));
                    report.roles.extend(self.ports.iter().map(|port| port.role));
                    report.addresses.extend(self.learned());
                    let _ = answer.try_send(report);
                }
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize, SwitchError> {
        self.ports
            .iter()
            .position(|port| port.name == name)
            .ok_or_else(|| SwitchError::NoPort { name: name.to_owned() })
    }

    fn add(&mut self, mut port: Box<SwitchPort>, join: Join) -> Result<(), Refused> {
        let number = self.ports.len();
        if number >= MOST_PORTS {
            return Err(Refused(port, SwitchError::Full));
        }
        if let Err(error) = check_name(&port.name, self.ports.iter().map(|port| port.name.as_str())) {
            return Err(Refused(port, error));
        }
        match join {
            Join::Learn => port.role = Role::Learn,
            Join::Reflect => port.role = Role::Reflect,
            Join::Alone => port.role = Role::Connect(NOWHERE),
            Join::Connect(name) => match self.find(&name) {
                Err(error) => return Err(Refused(port, error)),
                Ok(to) if matches!(self.ports[to].role, Role::Connect(other) if other != NOWHERE) => {
                    return Err(Refused(port, SwitchError::Taken { name }));
                }
                Ok(to) => {
                    self.table.forget(to as u16);
                    self.ports[to].role = Role::Connect(number);
                    port.role = Role::Connect(to);
                }
            },
        }
        self.ports.push(*port);
        Ok(())
    }

    /// Takes a port out; the ones behind it move up.
    fn take(&mut self, number: usize) -> Box<SwitchPort> {
        self.drop_held(number);
        let port = Box::new(self.ports.remove(number));
        let counted = port.stats();
        match &mut self.removed {
            Some(removed) => *removed += &counted,
            None => {
                let name = "(removed ports)".to_owned();
                self.removed = Some(SwitchPortStats {
                    name,
                    link_up: false,
                    ..counted
                });
            }
        }
        self.table.remove(number as u16);
        for other in &mut self.ports {
            if let Role::Connect(to) = &mut other.role {
                match (*to).cmp(&number) {
                    std::cmp::Ordering::Less => {}
                    std::cmp::Ordering::Equal => *to = NOWHERE,
                    std::cmp::Ordering::Greater if *to != NOWHERE => *to -= 1,
                    std::cmp::Ordering::Greater => {}
                }
            }
        }
        port
    }
}
