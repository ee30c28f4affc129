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
//! | `{"op":"add","name":N,"spec":S,"join":J}` | switch | `{"added":true}`, or false if just that port is there; J is `"learn"`, `"reflect"` or `{"connect":N}` |
//! | `{"op":"remove","name":N}` | switch | `{"removed":true}`, or false if there is none |
//!
//! `GET /metrics` of HTTP is answered too, for `curl --unix-socket`. The socket has mode 0600 unless told otherwise: who
//! may add a port has the program make sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use usernic::vhost_user::{Listener, SocketAccess};

/// Clients that are served at a time.
const CLIENTS: usize = 16;

/// Bytes of a request, or of an HTTP request's head.
const MOST: usize = 64 << 10;

/// How long a client may say nothing, or not read.
const PATIENCE: Duration = Duration::from_secs(60);

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
}

/// Who answers.
pub type Answer = dyn Fn(Request) -> Result<Value> + Send + Sync;

/// A served control socket; dropping it ends the service and removes the socket.
pub struct Control {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves `answer` at `path`. A socket file that nobody listens on any more is replaced.
    pub fn serve(path: &Path, access: SocketAccess, answer: Arc<Answer>) -> Result<Self> {
        let access = SocketAccess {
            mode: access.mode.or(Some(0o600)),
            ..access
        };
        let listener = Listener::bind_for(path, access)
            .with_context(|| format!("cannot listen on the control socket {}", path.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("control".into());
        let flag = Arc::clone(&stop);
        let thread = Some(thread.spawn(move || serve(&listener, &*answer, &flag))?);
        Ok(Control { stop, thread })
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

fn serve(listener: &Listener, answer: &Answer, stop: &AtomicBool) {
    let clients = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            while let Ok(Some(stream)) = listener.accept() {
                if clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS {
                    clients.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let clients = &clients;
                let client = move || {
                    // A client that goes away in the middle is no matter to anybody else.
                    let _ = talk(stream.into(), answer, stop);
                    clients.fetch_sub(1, Ordering::Relaxed);
                };
                let builder = std::thread::Builder::new().name("control-client".into());
                if builder.spawn_scoped(scope, client).is_err() {
                    clients.fetch_sub(1, Ordering::Relaxed);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Serves one client until it goes, is too slow, or the service ends.
fn talk(mut stream: UnixStream, answer: &Answer, stop: &AtomicBool) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let mut held = Vec::new();
    while let Some(line) = line(&mut stream, &mut held, stop)? {
        if let Some(request) = line.strip_prefix("GET ") {
            return http(&mut stream, &mut held, request, answer, stop);
        }
        let result = serde_json::from_str(&line).context("not understood").and_then(answer);
        let reply = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": crate::common::describe(&error) }),
        };
        stream.write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}

/// The next line, without its end; `held` keeps what came behind it. `None`: the client is done, or the service is.
fn line(stream: &mut UnixStream, held: &mut Vec<u8>, stop: &AtomicBool) -> Result<Option<String>> {
    let since = Instant::now();
    let mut looked = 0;
    loop {
        if let Some(at) = held[looked..].iter().position(|byte| *byte == b'\n') {
            let rest = held.split_off(looked + at + 1);
            let line = std::mem::replace(held, rest);
            return Ok(Some(String::from_utf8(line)?.trim_end().to_owned()));
        }
        looked = held.len();
        if looked >= MOST {
            bail!("a line of more than {MOST} bytes");
        }
        let mut part = [0; 4096];
        match stream.read(&mut part) {
            Ok(0) => return Ok(None),
            Ok(n) => held.extend_from_slice(&part[..n]),
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e.into()),
        }
        if stop.load(Ordering::Relaxed) || since.elapsed() > PATIENCE {
            return Ok(None);
        }
    }
}

/// Answers one request of HTTP, of which the first line was read.
fn http(stream: &mut UnixStream, held: &mut Vec<u8>, request: &str, answer: &Answer, stop: &AtomicBool) -> Result<()> {
    let mut head = 0;
    while let Some(line) = line(stream, held, stop)?.filter(|line| !line.is_empty()) {
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
    stream.write_all((head + &body).as_bytes())?;
    Ok(())
}

/// The other side: one connection to a program's control socket.
pub struct Client {
    stream: UnixStream,
    held: Vec<u8>,
    path: std::path::PathBuf,
}

/// How long an answer may take: a port may have to be opened.
const ANSWER: Duration = Duration::from_secs(30);

impl Client {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| {
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
                Ok(0) => bail!("the program at {path} hung up"),
                Ok(n) => self.held.extend_from_slice(&part[..n]),
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
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
}
