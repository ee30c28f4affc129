//! The control socket: a running program tells its counters to whoever connects.
//!
//! A client connects and is sent one JSON line at once and one each second after, until it or the program goes. It
//! need not say anything: the program never reads, so that nothing a client sends can matter.

use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Gives the counters of the moment.
pub type Snapshot = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Clients that are served at a time.
const CLIENTS: usize = 16;

/// A served control socket; dropping it ends the service and removes the socket.
pub struct Control {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves `snapshot` at `path`. A socket file that nobody listens on any more is replaced.
    pub fn serve(path: &Path, snapshot: Snapshot) -> Result<Self> {
        let listener = bind(path).with_context(|| format!("cannot listen on the control socket {}", path.display()))?;
        let path = path.to_owned();
        let stop = Arc::new(AtomicBool::new(false));
        let mut control = Control {
            path,
            stop: Arc::clone(&stop),
            thread: None,
        };
        listener.set_nonblocking(true)?;
        let thread = std::thread::Builder::new().name("control".into());
        control.thread = Some(thread.spawn(move || serve(&listener, &snapshot, &stop))?);
        Ok(control)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bind(path: &Path) -> Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                bail!("there is a file of that name, and it is no socket");
            }
            if UnixStream::connect(path).is_ok() {
                bail!("another program listens there");
            }
            std::fs::remove_file(path)?;
            Ok(UnixListener::bind(path)?)
        }
        other => Ok(other?),
    }
}

fn serve(listener: &UnixListener, snapshot: &Snapshot, stop: &AtomicBool) {
    let mut clients: Vec<(UnixStream, Instant)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            // A client that does not read must hold nobody up.
            if clients.len() < CLIENTS && stream.set_nonblocking(true).is_ok() {
                clients.push((stream, Instant::now()));
            }
        }
        let now = Instant::now();
        if clients.iter().any(|(_, due)| *due <= now) {
            let line = format!("{}\n", snapshot());
            clients.retain_mut(|(stream, due)| {
                if *due > now {
                    return true;
                }
                *due += Duration::from_secs(1);
                // Too slow for one line a second, or gone: either way no longer served.
                matches!(stream.write(line.as_bytes()), Ok(n) if n == line.len())
            });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn a_client_is_told_and_the_socket_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        // A stale socket is in the way.
        drop(UnixListener::bind(&path).unwrap());
        let control = Control::serve(&path, Arc::new(|| serde_json::json!({"ports": [7]}))).unwrap();
        assert!(
            Control::serve(&path, Arc::new(|| serde_json::Value::Null)).is_err(),
            "one program a socket"
        );
        let mut line = String::new();
        BufReader::new(UnixStream::connect(&path).unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "{\"ports\":[7]}\n");
        drop(control);
        assert!(!path.exists());
        std::fs::write(&path, "text").unwrap();
        assert!(Control::serve(&path, Arc::new(|| serde_json::Value::Null)).is_err());
        assert!(path.exists(), "what is no socket stays");
    }
}
