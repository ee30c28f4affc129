//! The control socket: a running program answers whoever may connect.
//!
//! A request is one line of JSON, an answer one line: `{"ok": ...}` or `{"error": "..."}`. Requests are answered in
//! their order, on one connection as many as wanted.
//!
//! | request | who | answer |
//! |---|---|---|
//! | `{"op":"stats"}` | all | the ports' counters; a switch's learned addresses |
//! | `{"op":"metrics"}` | all | the same as OpenMetrics text |
//! | `{"op":"list"}` | switch | each port's name, spec, role and link |
//! | `{"op":"add","name":N,"spec":S,"join":J}` | switch | `{"added":true}`, or false if just that port is there; J is `"learn"`, `"reflect"`, `{"connect":N}` or `"alone"` |
//! | `{"op":"remove","name":N}` | switch | `{"removed":true}`, or false if there is none |
//!
//! A client has [`PATIENCE`] to send a request that it has begun, and as long to read the answer; between two requests it
//! may stay, but the client that was idle longest makes room when another one comes and [`CLIENTS`] are there.
//!
//! `GET /metrics` of HTTP is answered too, for `curl --unix-socket`. The socket has mode 0600 unless told otherwise: who
//! may add a port has the program make sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use usernic::vhost_user::{Listener, SocketAccess};

/// Clients that are served at a time.
const CLIENTS: usize = 16;

/// Bytes of a request, or of an HTTP request's head.
const MOST: usize = 64 << 10;

/// How long a client may say nothing between two requests.
const IDLE: Duration = Duration::from_secs(60);

/// From the first byte of a request to its last, and from the first byte of an answer to its last.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often whoever waits looks whether the service ends.
const TICK: Duration = Duration::from_millis(20);

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    Stats,
    Metrics,
    List,
    Add {
        name: String,
        spec: String,
        #[serde(default)]
        join: Joined,
    },
    Remove {
        name: String,
    },
}

/// What a new port of a switch does with its frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Joined {
    #[default]
    Learn,
    Reflect,
    Connect(String),
    /// Outside the bridge, to be connected to.
    Alone,
}

/// Who answers.
pub type Answer = dyn Fn(Request) -> Result<Value> + Send + Sync;

/// A control socket that is bound and not served yet: clients can connect, and wait. Whoever has it is the only one.
pub struct Bound(Listener);

/// A served control socket; dropping it ends the service and removes the socket.
pub struct Control {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bound {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced.
    pub fn new(path: &Path, access: SocketAccess) -> Result<Self> {
        let access = SocketAccess {
            mode: access.mode.or(Some(0o600)),
            ..access
        };
        let listener = Listener::bind_for(path, access)
            .with_context(|| format!("cannot listen on the control socket {}", path.display()))?;
        // Clients come at any time, and many at once: more than one port's front-end.
        rustix::net::listen(&listener, 64).context("listen(2)")?;
        Ok(Bound(listener))
    }

    /// Serves `answer`.
    pub fn serve(self, answer: Arc<Answer>) -> Result<Control> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("control".into());
        let flag = Arc::clone(&stop);
        let thread = Some(thread.spawn(move || serve(&self.0, &*answer, &flag))?);
        Ok(Control { stop, thread })
    }
}

impl Control {
    /// Serves `answer` at `path`.
    pub fn serve(path: &Path, access: SocketAccess, answer: Arc<Answer>) -> Result<Self> {
        Bound::new(path, access)?.serve(answer)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One of the clients that are served.
struct Served {
    stream: UnixStream,
    user: u32,
    /// When it came, or had its last answer, in microseconds since the service began.
    last: AtomicU64,
    /// Its request is being answered.
    busy: AtomicBool,
}

impl Served {
    fn new(stream: UnixStream, now: u64) -> Result<Self> {
        // In slices, so that the end of the service is seen.
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        let user = rustix::net::sockopt::socket_peercred(&stream)?.uid.as_raw();
        Ok(Served {
            stream,
            user,
            last: AtomicU64::new(now),
            busy: AtomicBool::new(false),
        })
    }
}

/// Takes out the client that is to make room: one of the user that has the most clients, of those the one that was idle
/// longest. So nobody else is pushed out by a user who connects again and again.
fn give_way(clients: &mut Vec<Arc<Served>>) -> Option<Arc<Served>> {
    let rank = |client: &Served| {
        let same = clients.iter().filter(|other| other.user == client.user).count();
        let last = client.last.load(Ordering::Relaxed);
        (!client.busy.load(Ordering::Relaxed), same, std::cmp::Reverse(last))
    };
    let at = (0..clients.len()).max_by_key(|&at| rank(&clients[at]))?;
    Some(clients.swap_remove(at))
}

fn serve(listener: &Listener, answer: &Answer, stop: &AtomicBool) {
    let start = Instant::now();
    let mut clients: Vec<Arc<Served>> = Vec::new();
    // Those that gave way, until their threads have ended.
    let mut leaving: Vec<Arc<Served>> = Vec::new();
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            // A thread that has ended has dropped its client.
            clients.retain(|client| Arc::strong_count(client) > 1);
            leaving.retain(|client| Arc::strong_count(client) > 1);
            let is_full = clients.len() >= CLIENTS;
            if is_full && leaving.len() >= CLIENTS {
                // Whoever comes now waits in the backlog, until threads have ended.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            if !readable(listener, TICK) {
                continue;
            }
            let Ok(Some(stream)) = listener.accept() else {
                // It went again, or there is no descriptor for it: that passes, and asking on at once does not help.
                std::thread::sleep(TICK);
                continue;
            };
            let Ok(client) = Served::new(stream.into(), start.elapsed().as_micros() as u64) else {
                continue;
            };
            if is_full && let Some(gone) = give_way(&mut clients) {
                let _ = gone.stream.shutdown(std::net::Shutdown::Both);
                leaving.push(gone);
            }
            let client = Arc::new(client);
            let served = Arc::clone(&client);
            let builder = std::thread::Builder::new().name("control-client".into());
            // A client that goes away in the middle is no matter to anybody else.
            let run = move || drop(talk(&served, answer, stop, start));
            if builder.spawn_scoped(scope, run).is_ok() {
                clients.push(client);
            }
        }
    });
}

fn readable(listener: &Listener, limit: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: limit.subsec_nanos().into(),
    };
    matches!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1..))
}

/// Whether a read or write timed out or was interrupted: to be tried again.
fn again(error: &std::io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

/// Serves one client until it goes, is too slow, gives way, or the service ends.
fn talk(client: &Served, answer: &Answer, stop: &AtomicBool, start: Instant) -> Result<()> {
    let mut held = Vec::new();
    while let Some((line, deadline)) = line(&client.stream, &mut held, None, stop)? {
        let answer = |request| {
            client.busy.store(true, Ordering::Relaxed);
            let result = answer(request);
            client.busy.store(false, Ordering::Relaxed);
            result
        };
        if let Some(request) = line.strip_prefix("GET ") {
            let text = http(&client.stream, &mut held, request, answer, deadline, stop)?;
            return write(&client.stream, text.as_bytes(), stop);
        }
        let result = serde_json::from_str(&line).context("not understood").and_then(answer);
        let reply = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": crate::common::describe(&error) }),
        };
        // Before the answer is there: whoever has it is not taken for idle.
        client.last.store(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        write(&client.stream, format!("{reply}\n").as_bytes(), stop)?;
    }
    Ok(())
}

/// Writes an answer, as long as the client's patience and the service last.
fn write(mut stream: &UnixStream, mut bytes: &[u8], stop: &AtomicBool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if again(&e) => {}
            Err(e) => return Err(e.into()),
        }
        if !bytes.is_empty() && (stop.load(Ordering::Relaxed) || Instant::now() >= deadline) {
            bail!("the client does not read its answer");
        }
    }
    Ok(())
}

/// The next line, without its end, and when its request is to be complete: by `deadline`, or, where that is `None`, some
/// time after its first byte. `held` keeps what came behind it. `None`: the client is done, or the service is.
fn line(
    mut stream: &UnixStream,
    held: &mut Vec<u8>,
    mut deadline: Option<Instant>,
    stop: &AtomicBool,
) -> Result<Option<(String, Instant)>> {
    let idle_until = Instant::now() + IDLE;
    let mut looked = 0;
    loop {
        if deadline.is_none() && !held.is_empty() {
            deadline = Some(Instant::now() + PATIENCE);
        }
        if let Some(at) = held[looked..].iter().position(|byte| *byte == b'\n') {
            let rest = held.split_off(looked + at + 1);
            let line = std::mem::replace(held, rest);
            let line = String::from_utf8(line)?.trim_end().to_owned();
            return Ok(Some((line, deadline.unwrap_or(idle_until))));
        }
        looked = held.len();
        if looked >= MOST {
            bail!("a line of more than {MOST} bytes");
        }
        if stop.load(Ordering::Relaxed) || Instant::now() >= deadline.unwrap_or(idle_until) {
            return Ok(None);
        }
        let mut part = [0; 4096];
        match stream.read(&mut part) {
            Ok(0) => return Ok(None),
            Ok(n) => held.extend_from_slice(&part[..n]),
            Err(e) if again(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The answer to one request of HTTP, of which the first line was read: the rest of its head has the same deadline.
fn http(
    stream: &UnixStream,
    held: &mut Vec<u8>,
    request: &str,
    answer: impl FnOnce(Request) -> Result<Value>,
    deadline: Instant,
    stop: &AtomicBool,
) -> Result<String> {
    let mut head = 0;
    loop {
        let Some((line, _)) = line(stream, held, Some(deadline), stop)? else {
            bail!("half a request");
        };
        if line.is_empty() {
            break;
        }
        head += line.len();
        if head > MOST {
            bail!("a head of more than {MOST} bytes");
        }
    }
    let (status, kind, body) = match request.split_whitespace().next() {
        Some("/metrics") => match answer(Request::Metrics)? {
            Value::String(text) => ("200 OK", crate::metrics::CONTENT_TYPE, text),
            _ => bail!("the metrics are no text"),
        },
        _ => ("404 Not Found", "text/plain", "there is /metrics\n".to_owned()),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    Ok(head + &body)
}

/// Has a request of the same kind answered at most once in [`TICK`], whoever asks how often: for a socket that everybody
/// may connect to, so that nobody can keep busy what is asked.
pub fn at_intervals(answer: impl Fn(Request) -> Result<Value> + Send + Sync) -> impl Fn(Request) -> Result<Value> {
    let last: Mutex<Vec<(Request, Instant, Value)>> = Mutex::default();
    move |request| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|(_, at, _)| at.elapsed() < TICK);
        if let Some((.., value)) = last.iter().find(|(asked, ..)| *asked == request) {
            return Ok(value.clone());
        }
        let value = answer(request.clone())?;
        last.push((request, Instant::now(), value.clone()));
        Ok(value)
    }
}

/// The other side: one connection to a program's control socket.
pub struct Client {
    stream: UnixStream,
    held: Vec<u8>,
    path: std::path::PathBuf,
}

/// How long an answer may take: a port may have to be opened.
const ANSWER: Duration = Duration::from_secs(30);

/// Connects, for at most [`PATIENCE`]: while the backlog of the other side is full, connect(2) would block.
pub fn connect(path: &Path) -> std::io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(TICK);
            }
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl Client {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = connect(path).with_context(|| {
            format!(
                "cannot connect to {}: is a usernic program running with --control of this path?",
                path.display()
            )
        })?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Client {
            stream,
            held: Vec::new(),
            path: path.to_owned(),
        })
    }

    /// Another connection to the same program.
    pub fn again(&self) -> Result<Self> {
        Self::connect(&self.path)
    }

    /// Asks, and gives what stands under `ok`. Ends early if `stop` is set.
    pub fn ask(&mut self, request: &Request, stop: &AtomicBool) -> Result<Value> {
        let path = self.path.display();
        let since = Instant::now();
        let text = serde_json::to_string(request)? + "\n";
        self.stream
            .write_all(text.as_bytes())
            .with_context(|| format!("writing to {path}"))?;
        let mut part = [0; 16 << 10];
        let line = loop {
            if let Some(at) = self.held.iter().position(|byte| *byte == b'\n') {
                let rest = self.held.split_off(at + 1);
                break std::mem::replace(&mut self.held, rest);
            }
            match self.stream.read(&mut part) {
                Ok(0) => {
                    let error = std::io::Error::from(ErrorKind::UnexpectedEof);
                    return Err(error).with_context(|| format!("the program at {path} hung up"));
                }
                Ok(n) => self.held.extend_from_slice(&part[..n]),
                Err(e) if again(&e) => {}
                Err(e) => return Err(e).with_context(|| format!("reading from {path}")),
            }
            if stop.load(Ordering::Relaxed) || since.elapsed() > ANSWER {
                bail!("no answer from the program at {path}");
            }
        };
        let mut answer: Value =
            serde_json::from_slice(&line).with_context(|| format!("what {path} sends is no JSON line"))?;
        if let Some(error) = answer["error"].as_str() {
            bail!("{error}");
        }
        Ok(answer["ok"].take())
    }

    /// The group that the program runs as, by number.
    pub fn group(&self) -> Result<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream).context("SO_PEERCRED")?;
        Ok(peer.gid.as_raw())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    fn echo(request: Request) -> Result<Value> {
        match request {
            Request::Metrics => Ok("some 1\n".into()),
            Request::Remove { .. } => bail!("no such port"),
            other => Ok(json!([format!("{other:?}")])),
        }
    }

    fn served(path: &Path) -> Result<Control> {
        Control::serve(path, SocketAccess::default(), Arc::new(echo))
    }

    #[test]
    fn a_client_is_answered_and_the_socket_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let never = AtomicBool::new(false);
        // A stale socket is in the way.
        drop(UnixListener::bind(&path).unwrap());
        let control = served(&path).unwrap();
        assert!(served(&path).is_err(), "one program a socket");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = Client::connect(&path).unwrap();
        for _ in 0..3 {
            assert_eq!(client.ask(&Request::Stats, &never).unwrap(), json!(["Stats"]));
        }
        let name = "x".to_owned();
        let error = client.ask(&Request::Remove { name }, &never).unwrap_err();
        assert_eq!(error.to_string(), "no such port");
        assert_eq!(
            client.ask(&Request::List, &never).unwrap(),
            json!(["List"]),
            "an error ends nothing"
        );
        drop(control);
        assert!(!path.exists());
        std::fs::write(&path, "text").unwrap();
        assert!(served(&path).is_err());
        assert!(path.exists(), "what is no socket stays");
    }

    fn raw(path: &Path, text: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(text).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn http_and_nonsense() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _control = served(&path).unwrap();
        let answer = raw(&path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nsome 1\n"),
            "{answer}"
        );
        assert!(raw(&path, b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        for bad in [
            "{}",
            "x",
            "{\"op\":\"add\"}",
            "{\"op\":\"remove\",\"name\":\"a\",\"more\":1}",
            "",
        ] {
            let answer = raw(&path, format!("{bad}\n").as_bytes());
            assert!(answer.starts_with("{\"error\":\"not understood"), "{bad}: {answer}");
        }
        assert_eq!(raw(&path, b"{\"op\":"), "", "half a request is none");
        // Without an end it is cut off, and the next client is served.
        let mut endless = UnixStream::connect(&path).unwrap();
        let written = endless.write_all(&vec![b'x'; MOST + 8192]);
        let closed = written.is_err() || !matches!(endless.read(&mut [0; 1]), Ok(1..));
        assert!(closed, "an endless line is read for ever");
        assert!(raw(&path, b"{\"op\":\"list\"}\n").contains("List"));
    }

    /// A client that says `begun` and then `more` every now and then, until it is sent away; how long that took.
    fn drips(path: &Path, begun: &[u8], more: &[u8]) -> Duration {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let start = Instant::now();
        let _ = stream.write_all(begun);
        loop {
            assert!(start.elapsed() < 4 * PATIENCE, "it is listened to for ever");
            match stream.read(&mut [0; 64]) {
                Err(e) if again(&e) => {}
                _ => return start.elapsed(),
            }
            let _ = stream.write_all(more);
        }
    }

    #[test]
    fn a_request_has_one_deadline_however_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _control = served(&path).unwrap();
        std::thread::scope(|scope| {
            let head = scope.spawn(|| drips(&path, b"GET /metrics HTTP/1.1\r\n", b"X: y\r\n"));
            let line = scope.spawn(|| drips(&path, b"{", b" "));
            let mute = scope.spawn(|| drips(&path, b"GET /metrics HTTP/1.1\r\n", b""));
            for client in [head, line, mute] {
                let took = client.join().unwrap();
                assert!(took >= PATIENCE / 2, "a client has some time: {took:?}");
            }
        });
    }

    #[test]
    fn the_client_that_was_idle_longest_gives_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _control = served(&path).unwrap();
        let never = AtomicBool::new(false);
        let mut silent: Vec<_> = (0..CLIENTS - 1).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut active = Client::connect(&path).unwrap();
        for _ in 0..3 * CLIENTS {
            assert!(active.ask(&Request::List, &never).is_ok(), "who asks is not sent away");
            let mut other = Client::connect(&path).unwrap();
            let start = Instant::now();
            assert!(other.ask(&Request::List, &never).is_ok());
            assert!(start.elapsed() < PATIENCE, "silent clients keep the socket");
            silent.push(other.stream);
        }
        // The first one is the first to go.
        silent[0].set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0);
    }

    /// The threads of clients that gave way end later: until then nobody else is sent away in their place.
    #[test]
    fn whoever_comes_while_others_leave_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (asked, held) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(())));
        let (count, gate) = (Arc::clone(&asked), Arc::clone(&held));
        let wait = move |request| {
            count.fetch_add(1, Ordering::Relaxed);
            drop(gate.lock().unwrap_or_else(PoisonError::into_inner));
            echo(request)
        };
        let _control = Control::serve(&path, SocketAccess::default(), Arc::new(wait)).unwrap();
        let guard = held.lock().unwrap();
        let ask = || {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"{\"op\":\"list\"}\n").unwrap();
            stream
        };
        let mut many = Vec::new();
        while many.len() < 2 * CLIENTS {
            many.push(ask());
            // One that says nothing yet would be the next to give way.
            while asked.load(Ordering::Relaxed) < many.len() as u64 {
                std::thread::yield_now();
            }
        }
        let mut late = ask();
        late.set_read_timeout(Some(2 * TICK)).unwrap();
        let early = late.read(&mut [0; 1]);
        assert!(early.is_err_and(|e| again(&e)), "sent away");
        drop(guard);
        late.set_read_timeout(None).unwrap();
        assert_eq!(late.read(&mut [0; 1]).unwrap(), 1);
    }

    #[test]
    fn the_service_ends_at_once_whatever_its_clients_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let long = |_| Ok(Value::String("x".repeat(8 << 20)));
        let control = Control::serve(&path, SocketAccess::default(), Arc::new(long)).unwrap();
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let mut stream = UnixStream::connect(&path).unwrap();
                // An answer that does not fit the socket, and is not read.
                stream.write_all(b"{\"op\":\"list\"}\n{\"op\":\"list\"}\n").unwrap();
                stream
            })
            .collect();
        let mut reader = UnixStream::connect(&path).unwrap();
        reader.write_all(b"{\"op\":\"list\"}\n").unwrap();
        reader.read_exact(&mut [0; 4096]).unwrap();
        let start = Instant::now();
        drop(control);
        assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
        drop(clients);
    }

    #[test]
    fn everybody_together_asks_at_intervals() {
        let asked = AtomicU64::new(0);
        let start = Instant::now();
        let limited = at_intervals(|request| {
            asked.fetch_add(1, Ordering::Relaxed);
            echo(request)
        });
        for _ in 0..1000 {
            assert_eq!(limited(Request::Metrics).unwrap(), "some 1\n");
            assert_eq!(limited(Request::List).unwrap(), json!(["List"]));
        }
        let most = 2 * (1 + start.elapsed().as_millis() / TICK.as_millis()) as u64;
        assert!((2..=most).contains(&asked.load(Ordering::Relaxed)), "{most}");
    }
}
