//! A front-end that listens: several may connect, and the first that answers is the back-end.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::{Error, FrontendSession, Listener, SocketAccess};
use crate::warnings::Warnings;

/// Connections that have not said anything, at the most: the oldest gives way.
const SILENT: usize = 16;

/// How long a connection is kept that comes while a back-end is served.
const HOLD: Duration = Duration::from_millis(500);

/// First and longest pause after an accept(2) that failed for want of something.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// The socket of a listening front-end, and the connections to it that have not answered yet. They wait beside each other,
/// so that a silent one delays nobody.
#[derive(Debug)]
pub struct Candidates {
    listener: Listener,
    /// For each call of a session, and for the first answer of each candidate.
    timeout: Duration,
    /// Readable when somebody connects, or when one of the silent says something.
    events: OwnedFd,
    /// Each was asked what it offers, and goes at its time.
    silent: VecDeque<(FrontendSession, Instant)>,
    /// Nobody is accepted before.
    paused: Option<Instant>,
    pause: Duration,
    /// Connections that came while a back-end is served, and since when: that one may just be going.
    others: VecDeque<(OwnedFd, Instant)>,
    /// Of connections that said nothing, and of others beside a back-end.
    warnings: [Warnings; 2],
}

impl Candidates {
    /// Listens at `path`.
    ///
    /// # Errors
    /// Those of [`Listener::bind`].
    pub fn bind(path: &Path, access: SocketAccess, timeout: Duration) -> Result<Self, Error> {
        let listener = Listener::bind_for(path, access)?;
        let events =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::socket("epoll_create1(2) for", path, e))?;
        watch(&events, &listener, path)?;
        Ok(Candidates {
            listener,
            timeout,
            events,
            silent: VecDeque::new(),
            paused: None,
            pause: PAUSE[0],
            others: VecDeque::new(),
            warnings: Default::default(),
        })
    }

    /// What becomes readable when [`answered`](Candidates::answered) has something to do; `None`: nothing before
    /// [`deadline`](Candidates::deadline).
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        // While there is nothing to accept with, connections that wait are no reason to wake.
        self.paused.is_none().then(|| self.events.as_fd())
    }

    /// When to call [`answered`](Candidates::answered) even if nothing is readable.
    pub fn deadline(&self) -> Option<Instant> {
        let first = self.silent.front().map(|(_, until)| *until);
        // At once: nobody has asked them anything.
        let others = self.others.front().map(|(_, since)| *since);
        self.paused.into_iter().chain(first).chain(others).min()
    }

    /// Accepts new connections, closes those that were silent for too long, and gives one that has answered. It does not
    /// wait. A session that it gives fails with [`Error::GaveWay`] if it falls silent while another connection waits, until
    /// [`choose`](Candidates::choose).
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn answered(&mut self) -> Result<Option<FrontendSession>, Error> {
        let now = Instant::now();
        self.paused = self.paused.filter(|until| *until > now);
        while let Some((stream, _)) = self.others.pop_front() {
            self.greet(stream)?;
        }
        for _ in 0..SILENT {
            if self.paused.is_some() {
                break;
            }
            match self.listener.accept() {
                Ok(Some(stream)) => {
                    self.pause = PAUSE[0];
                    self.greet(stream)?;
                }
                Ok(None) => break,
                Err(error) => {
                    if self.pause == PAUSE[0] {
                        tracing::warn!("{error}: connections wait until that is over (EMFILE: raise `ulimit -n`)");
                    }
                    self.paused = Some(now + self.pause);
                    self.pause = (self.pause * 2).min(PAUSE[1]);
                }
            }
        }
        while let Some((_, until)) = self.silent.front()
            && *until <= now
        {
            self.silent.pop_front();
            if let Some(more) = self.warnings[0].due() {
                let (path, ms) = (self.listener.path().display(), self.timeout.as_millis());
                tracing::warn!(%path, "a connection said nothing within {ms} ms: closed{more}");
            }
        }
        let Some(at) = self.silent.iter().position(|(session, _)| session.is_readable()) else {
            return Ok(None);
        };
        let Some((mut session, _)) = self.silent.remove(at) else {
            return Ok(None);
        };
        let _ = epoll::delete(&self.events, &session);
        session.give_way_to(self.events.try_clone().ok());
        Ok(Some(session))
    }

    /// To be called now and then while a back-end is served: sends those away that have waited beside it for a while, which
    /// is not the way of a successor.
    pub fn look_beside(&mut self) {
        let now = Instant::now();
        while let Some((_, since)) = self.others.front()
            && now.saturating_duration_since(*since) >= HOLD
        {
            self.others.pop_front();
            if let Some(more) = self.warnings[1].due() {
                let path = self.listener.path().display();
                let what = "another back-end connected and was sent away: a port serves one at a time, and has one";
                tracing::warn!(%path, "{what}{more}");
            }
        }
        while self.others.len() < SILENT
            && let Ok(Some(stream)) = self.listener.accept()
        {
            self.others.push_back((stream, now));
        }
    }

    fn greet(&mut self, stream: OwnedFd) -> Result<(), Error> {
        let mut session = FrontendSession::new(stream, self.listener.path(), self.timeout);
        if self.silent.len() >= SILENT {
            self.silent.pop_front();
        }
        match session.hello() {
            // It is gone already.
            Err(Error::Closed { .. }) => return Ok(()),
            other => other?,
        }
        watch(&self.events, &session, self.listener.path())?;
        self.silent.push_back((session, Instant::now() + self.timeout));
        Ok(())
    }

    /// `session` is the back-end: it gives way to nobody any more, and the other candidates are closed.
    pub fn choose(&mut self, session: &mut FrontendSession) {
        session.give_way_to(None);
        self.silent.clear();
    }
}

fn watch(events: &OwnedFd, fd: impl AsFd, path: &Path) -> Result<(), Error> {
    epoll::add(events, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
        .map_err(|e| Error::socket("epoll_ctl(2) for", path, e))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A back-end that is started anew may be there before it is seen that the connection of its predecessor is gone.
    #[test]
    fn a_successor_that_came_early_is_asked_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut candidates = Candidates::bind(&path, SocketAccess::default(), Duration::from_secs(30)).unwrap();
        assert_eq!(candidates.deadline(), None);
        let mut successor = UnixStream::connect(&path).unwrap();
        candidates.look_beside();
        assert!(candidates.deadline().is_some_and(|at| at <= Instant::now()));
        assert!(candidates.answered().unwrap().is_none(), "it has said nothing");
        let mut question = [0; 24];
        successor.read_exact(&mut question).unwrap();
        assert_eq!((question[0], question[12]), (3, 1), "SET_OWNER, GET_FEATURES");
    }
}
