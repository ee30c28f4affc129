//! The control thread of a `vhost` port: who is served, who waits, who goes.
//!
//! One front-end is served at a time. Whoever connects is looked at at once, and becomes the one that is served with its
//! first message that changes something; until then its questions (which features there are) are answered beside those of
//! others. So connections that say nothing, however many, keep nobody from the port:
//!
//! | a connection | goes |
//! |---|---|
//! | that has not said a whole message | after `timeout=` |
//! | that leaves a message half said, or does not take an answer | `timeout=` later |
//! | that is served, but has not set its features | when another one wants to be served, after `timeout=` |
//! | that comes while a front-end is served that has | after [`HOLD`], unless that one is gone by then |

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vhost_proto::Offer;
use virtio_ring::Features;

use super::net::Net;
use super::{LOOK, PROTOCOL, RETRY, Served, has_control};
use crate::regions::MAX_REGIONS;
use crate::vhost_user::{BackendSession, Closer, Error, Listener};
use crate::warnings::Warnings;

/// Connections that are not served yet, at the most: beyond them those go first that have said nothing, the oldest first.
const WAITING: usize = 16;

/// How long a connection is kept that comes while another front-end is served: that one may just be going, and its
/// successor is faster than the news.
const HOLD: Duration = Duration::from_millis(500);

/// How long a front-end that has not set its features is served at least while another one waits.
const TURN: Duration = Duration::from_millis(250);

/// Descriptors that front-ends passed and whose close(2) blocks, at the most. With more of them nobody is served.
const UNCLOSED: usize = 64;

/// How long nobody is accepted after an accept(2) that failed: first, and at the most. Connections that wait keep the
/// listener readable.
const REST: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// What the control thread owns.
pub(super) struct Control {
    pub(super) served: Served,
    pub(super) listener: Option<Listener>,
    session: Option<Connection>,
    waiting: Vec<Connection>,
    closer: Closer,
    /// When a `client=1` port looks for the front-end again.
    next_try: Instant,
    /// Nobody is accepted before.
    rest: Option<Instant>,
    /// How long that is; 0: the last accept(2) did not fail.
    resting: Duration,
    refusals: Warnings,
    others: Warnings,
}

/// A connection that was made.
struct Connection {
    session: BackendSession,
    since: Instant,
    /// When it began to be served.
    served: Instant,
    /// It has set its features at least once.
    negotiated: bool,
}

impl Control {
    pub(super) fn new(served: Served, listener: Option<Listener>) -> Self {
        Control {
            served,
            listener,
            session: None,
            waiting: Vec::new(),
            closer: Closer::default(),
            next_try: Instant::now(),
            rest: None,
            resting: Duration::ZERO,
            refusals: Warnings::default(),
            others: Warnings::default(),
        }
    }

    fn offer(&self) -> Offer {
        let spec = &self.served.inner.spec;
        let mut features = Features::VERSION_1 | Features::NET_MRG_RXBUF | Features::NET_MTU;
        features |= spec.offloads();
        let control = has_control(spec);
        if control {
            features |= Net::offer(spec);
        }
        features.set(Features::NET_MQ, spec.queues > 1);
        features.set(Features::RING_PACKED, spec.packed);
        features.set(Features::IN_ORDER, spec.in_order);
        features.set(Features::RING_EVENT_IDX, spec.event_idx);
        features.set(Features::RING_INDIRECT_DESC, spec.indirect);
        Offer {
            features: features.bits(),
            protocol: PROTOCOL,
            rings: 2 * spec.queues + u16::from(control),
            queue_num: spec.queues,
            mem_slots: MAX_REGIONS as u16,
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.served.inner.spec.timeout_ms.into())
    }

    pub(super) fn run(mut self) {
        while !self.served.inner.stopped() {
            while let Some((wish, answer)) = self.served.inner.wishes.next() {
                // The request is applied even if the caller has timed out.
                let _ = answer.send(self.served.grant(wish));
            }
            self.sleep();
            if self.served.inner.stopped() {
                break;
            }
            self.serve();
            self.find();
            self.look_at_waiting();
        }
        self.served.inner.wishes.close();
        self.session = None;
        self.waiting.clear();
        self.served.clear();
        if let Some(listener) = self.listener.take() {
            // Connections in its backlog may have brought descriptors.
            listener.close_by(&self.closer);
        }
    }

    /// Whether a front-end is served that has set its features: nobody else is looked at then.
    fn is_busy(&self) -> bool {
        self.session.as_ref().is_some_and(|connection| connection.negotiated)
    }

    /// Sleeps until there is something to do.
    fn sleep(&self) {
        let mut fds = vec![PollFd::from_borrowed_fd(self.served.inner.wake.as_fd(), PollFlags::IN)];
        let mut until = Deadline(None);
        if self.served.again {
            until.at_most(Instant::now());
        }
        if let Some(connection) = &self.session {
            let (kicks, pause) = self.served.control_kick();
            // The SIGBUS guard tells nobody: look at it now and then.
            until.within(pause);
            fds.extend(kicks.map(|kicks| PollFd::from_borrowed_fd(kicks, PollFlags::IN)));
            let session = &connection.session;
            fds.push(PollFd::new(session, session.interest()));
            if let Some(deadline) = session.deadline() {
                until.at_most(deadline);
            }
        }
        let busy = self.is_busy();
        for connection in &self.waiting {
            match self.limit(connection) {
                // It has said all that it may for now.
                Some(limit) => until.at_most(limit),
                None => until.within(LOOK),
            }
            if !busy && !connection.session.is_held() {
                fds.push(PollFd::new(&connection.session, connection.session.interest()));
                if let Some(deadline) = connection.session.deadline() {
                    until.at_most(deadline);
                }
            }
        }
        match &self.listener {
            Some(_) if self.is_clogged() => until.within(LOOK),
            Some(listener) => match self.rest {
                Some(end) => until.at_most(end),
                None => fds.push(PollFd::new(listener, PollFlags::IN)),
            },
            None if self.is_alone() => until.at_most(self.next_try),
            None => {}
        }
        let timeout = until.0.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        // An error or an interruption is a sleep that was short.
        let _ = poll(&mut fds, timeout.as_ref());
        // Whoever woke this thread set a flag, or sent a wish, before.
        let _ = rustix::io::read(&self.served.inner.wake, &mut [0u8; 8]);
    }

    /// When a connection that is not served goes or becomes the one that is; `None`: it may stay as it is.
    fn limit(&self, connection: &Connection) -> Option<Instant> {
        let after = |since: Instant, time| since.checked_add(time);
        match &self.session {
            Some(session) if session.negotiated => after(connection.since.max(session.served), self.hold()),
            Some(session) if connection.session.is_held() => session.end_of_turn(self.timeout()),
            _ if connection.session.has_spoken() => None,
            _ => after(connection.since, self.timeout()),
        }
    }

    fn hold(&self) -> Duration {
        HOLD.min(self.timeout())
    }

    /// Neither is anybody served, nor does anybody wait for it.
    fn is_alone(&self) -> bool {
        self.session.is_none() && self.waiting.is_empty()
    }

    /// Too many descriptors are there that cannot be closed.
    fn is_clogged(&self) -> bool {
        self.closer.pending() > UNCLOSED
    }

    /// Does what the front-end wants.
    fn serve(&mut self) {
        let Some(connection) = &mut self.session else { return };
        let mut result = connection.session.service(&mut self.served);
        connection.negotiated |= connection.session.has_features();
        self.served.serve_control();
        if result.is_ok() && self.served.memory.is_dead() {
            result = Err(Error::Setup {
                path: self.served.inner.spec.path.clone(),
                what: "the front-end truncated a file of its memory".into(),
            });
        }
        self.served.update_link();
        if let Err(error) = result {
            self.end(&error);
        }
    }

    /// The front-end that was served is gone, or goes.
    fn end(&mut self, error: &Error) {
        self.session = None;
        self.served.clear();
        self.next_try = Instant::now() + RETRY;
        self.tell(error);
    }

    /// Tells why a connection ended: of one that left, to whoever wants to know; of one that was sent away, to the
    /// operator.
    fn tell(&mut self, error: &Error) {
        let path = self.served.inner.spec.path.display();
        if matches!(error, Error::Closed { .. }) {
            tracing::info!(%path, "front-end gone: {error}");
            return;
        }
        self.served.inner.counters[0].peers_refused.add(1);
        match self.refusals.due() {
            Some(more) => tracing::warn!(%path, "front-end sent away: {error}{more}"),
            None => tracing::info!(%path, "front-end sent away: {error}"),
        }
    }

    /// Takes connections that were made, or makes one.
    fn find(&mut self) {
        let inner = std::sync::Arc::clone(&self.served.inner);
        let path = &inner.spec.path;
        let Some(listener) = &self.listener else {
            if self.is_alone() && Instant::now() >= self.next_try {
                self.next_try = Instant::now() + RETRY;
                match BackendSession::connect(path, self.offer(), self.timeout(), &self.closer) {
                    Ok(session) => self.waiting.push(Connection::new(session)),
                    Err(error) => tracing::debug!(path = %path.display(), "no front-end yet: {error}"),
                }
            }
            return;
        };
        self.rest = self.rest.filter(|end| Instant::now() < *end);
        // Bound: whoever connects faster than that waits for the next turn.
        for _ in 0..WAITING {
            if self.is_clogged() || self.rest.is_some() {
                break;
            }
            match listener.accept() {
                Ok(Some(stream)) => {
                    self.resting = Duration::ZERO;
                    let session = BackendSession::new(stream, path, self.offer(), self.timeout(), &self.closer);
                    self.waiting.push(Connection::new(session));
                }
                Ok(None) => break,
                Err(error) => {
                    // Once, until it is over.
                    if self.resting.is_zero() {
                        let advice = shortage(&error);
                        tracing::warn!("a connection waits: {error}{advice}; it is accepted when that is over");
                    }
                    self.resting = (self.resting * 2).clamp(REST[0], REST[1]);
                    self.rest = Instant::now().checked_add(self.resting);
                }
            }
        }
    }

    /// Answers those that wait, and finds out who is served next.
    fn look_at_waiting(&mut self) {
        if self.is_busy() {
            self.send_others_away();
        } else {
            self.negotiate();
        }
        while self.waiting.len() > WAITING {
            let silent = self.waiting.iter().position(|c| !c.session.has_spoken());
            let connection = self.waiting.remove(silent.unwrap_or(0));
            self.tell(&connection.refused("it waited the longest of too many connections"));
        }
    }

    fn negotiate(&mut self) {
        let timeout = self.timeout();
        let mut at = 0;
        while at < self.waiting.len() && !self.is_busy() {
            let connection = &mut self.waiting[at];
            match connection.session.negotiate() {
                Ok(true) => {
                    if let Some(session) = &self.session {
                        if session.end_of_turn(timeout).is_some_and(|end| Instant::now() < end) {
                            at += 1;
                            continue;
                        }
                        let ms = timeout.as_millis();
                        let why =
                            format!("it did not set its features within {ms} ms (timeout=), and another one came");
                        let error = session.refused(&why);
                        self.end(&error);
                    }
                    let mut connection = self.waiting.remove(at);
                    connection.served = Instant::now();
                    self.session = Some(connection);
                    // At once: it may be one that is right.
                    self.serve();
                }
                Ok(false) if !connection.session.has_spoken() && connection.since.elapsed() >= timeout => {
                    let connection = self.waiting.remove(at);
                    let ms = timeout.as_millis();
                    let error = connection.refused(&format!("it said nothing within {ms} ms (timeout= is the limit)"));
                    self.next_try = Instant::now() + RETRY;
                    if self.listener.is_some() {
                        self.tell(&error);
                    } else {
                        // Who listens may have another back-end.
                        tracing::debug!("{error}");
                    }
                }
                Ok(false) => at += 1,
                Err(error) => {
                    self.waiting.remove(at);
                    self.next_try = Instant::now() + RETRY;
                    self.tell(&error);
                }
            }
        }
    }

    /// A front-end is served: whoever else has waited long enough goes.
    fn send_others_away(&mut self) {
        let now = Instant::now();
        let mut at = 0;
        while at < self.waiting.len() {
            if self.limit(&self.waiting[at]).is_none_or(|limit| now < limit) {
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            self.served.inner.counters[0].peers_refused.add(1);
            let path = self.served.inner.spec.path.display();
            let what = "another front-end connected and was sent away: a port serves one at a time, and has one";
            match self.others.due() {
                Some(more) => tracing::warn!(%path, "{what}{more}"),
                None => tracing::info!(%path, "{what}"),
            }
        }
    }
}

/// What to do about an accept(2) that failed.
fn shortage(error: &Error) -> String {
    let Error::Socket { source, .. } = error else {
        return String::new();
    };
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => {
            let limit = getrlimit(Resource::Nofile).current;
            let limit = limit.map_or("any number of".into(), |limit| limit.to_string());
            format!(" (this process may have {limit} descriptors, RLIMIT_NOFILE: raise `ulimit -n`)")
        }
        Some(Errno::NFILE) => " (the system has no descriptor left: raise fs.file-max)".into(),
        _ => String::new(),
    }
}

impl Connection {
    fn new(session: BackendSession) -> Self {
        let now = Instant::now();
        Connection {
            session,
            since: now,
            served: now,
            negotiated: false,
        }
    }

    /// When one that is served, and has not set its features, gives way to another.
    fn end_of_turn(&self, timeout: Duration) -> Option<Instant> {
        let turn = self.served.checked_add(TURN.min(timeout))?;
        Some(turn.max(self.since.checked_add(timeout)?))
    }

    fn refused(&self, why: &str) -> Error {
        self.session.setup(why.into())
    }
}

/// The earliest of several moments.
struct Deadline(Option<Instant>);

impl Deadline {
    fn at_most(&mut self, at: Instant) {
        self.0 = Some(self.0.map_or(at, |old| old.min(at)));
    }

    fn within(&mut self, time: Duration) {
        if let Some(at) = Instant::now().checked_add(time) {
            self.at_most(at);
        }
    }
}
