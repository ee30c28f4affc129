//! Child processes that cannot outlive us, whose output is kept, and for which nobody waits for ever.
//!
//! Every child is the leader of its own process group, dies with us (`PR_SET_PDEATHSIG`, so even when we are killed
//! with SIGKILL) and is killed and reaped on drop. Its output goes to a buffer that waits search and that errors show.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};

/// Set by SIGINT and SIGTERM; every wait of this module looks at it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Children that are alive, for the second signal.
static LIVE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// How often a wait looks at [`INTERRUPTED`].
const TICK: Duration = Duration::from_millis(50);

/// Lines of a child's output that an error shows.
const SHOWN: usize = 15;

/// Turns SIGINT and SIGTERM into an error from the next wait, so that everything is dropped in order. A second
/// signal kills the children and ends at once.
pub fn handle_signals() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                for &pid in LIVE.lock().unwrap_or_else(|e| e.into_inner()).iter() {
                    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                }
                std::process::exit(128 + signal);
            }
            eprintln!("\nstopping (once more to stop at once)");
        }
    })?;
    Ok(())
}

/// Whether somebody asked us to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once somebody asked us to stop.
pub fn check_interrupted() -> Result<()> {
    if interrupted() { bail!("interrupted") } else { Ok(()) }
}

/// Sleeps, but not through a signal.
pub fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        check_interrupted()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(TICK));
    }
}

/// What surrounds a child.
#[derive(Default, Clone)]
pub struct Surroundings {
    /// A hugetlbfs of 2 MiB pages that only the child sees, on this (existing) directory: it goes with the child, and
    /// its files with it.
    pub hugetlbfs: Option<PathBuf>,
    /// Bytes that the hugetlbfs may hold; no limit of its own if none.
    pub hugetlbfs_size: Option<u64>,
    /// The CPUs that the child may run on; all if empty.
    pub cpus: Vec<usize>,
    /// The child gets no standard input, rather than a pipe.
    pub no_stdin: bool,
    /// Output is shown as it comes, too.
    pub echo: bool,
}

#[derive(Default)]
struct Output {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

/// A running child.
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Output>,
    reader: Option<JoinHandle<()>>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; `name` is for messages.
    pub fn spawn(name: &str, mut command: Command, surroundings: &Surroundings) -> Result<Self> {
        check_interrupted()?;
        let (read, write) = std::io::pipe()?;
        command.stdout(write.try_clone()?).stderr(write);
        command.stdin(if surroundings.no_stdin {
            Stdio::null()
        } else {
            Stdio::piped()
        });
        command.process_group(0);
        let mount = match &surroundings.hugetlbfs {
            Some(dir) => {
                let size = surroundings
                    .hugetlbfs_size
                    .map_or(String::new(), |bytes| format!(",size={bytes}"));
                Some((
                    CString::new(dir.as_os_str().as_bytes())?,
                    CString::new(format!("pagesize=2M{size}"))?,
                ))
            }
            None => None,
        };
        let cpus = surroundings.cpus.clone();
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure makes system calls only and allocates nothing: its strings and
        // vectors were made before.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have died before that call.
                if rustix::process::getppid().map(|p| p.as_raw_nonzero().get() as u32) != Some(parent) {
                    return Err(std::io::ErrorKind::BrokenPipe.into());
                }
                if !cpus.is_empty() {
                    let mut set = rustix::thread::CpuSet::new();
                    cpus.iter().for_each(|&cpu| set.set(cpu));
                    rustix::thread::sched_setaffinity(None, &set)?;
                }
                if let Some((dir, options)) = &mount {
                    private_hugetlbfs(dir, options)?;
                }
                Ok(())
            });
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .spawn()
            .with_context(|| format!("{name}: {program} does not start"))?;
        // Our copies of the pipe's writing end go with the command, so that the reader sees the end of the output.
        drop(command);
        LIVE.lock().unwrap_or_else(|e| e.into_inner()).push(pid_of(&child));
        let stdin = child.stdin.take();
        let output = Arc::new(Output::default());
        let reader = std::thread::spawn({
            let output = Arc::clone(&output);
            let echo = surroundings.echo;
            move || collect(read, &output, echo)
        });
        Ok(Process {
            name: name.to_owned(),
            child,
            stdin,
            output,
            reader: Some(reader),
            status: None,
        })
    }

    /// The name that messages use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Writes a line to its standard input.
    pub fn command(&mut self, line: &str) -> Result<()> {
        let Some(stdin) = &mut self.stdin else {
            bail!("{} has no standard input", self.name)
        };
        let sent = stdin
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| stdin.flush());
        sent.with_context(|| format!("{} does not take \"{line}\"{}", self.name, self.tail()))
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Where its output ends now: from here on a wait may look.
    pub fn mark(&self) -> usize {
        self.bytes().len()
    }

    /// All that it wrote, from `mark` on.
    pub fn output_since(&self, mark: usize) -> String {
        let bytes = self.bytes();
        String::from_utf8_lossy(&bytes[mark.min(bytes.len())..]).into_owned()
    }

    /// All that it wrote.
    pub fn output(&self) -> String {
        self.output_since(0)
    }

    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.output.bytes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until `text` stands in the output from `mark` on, and gives the mark behind it.
    pub fn wait_for(&mut self, text: &str, mark: usize, limit: Duration) -> Result<usize> {
        let end = Instant::now() + limit;
        let mut from = mark;
        loop {
            {
                let bytes = self.bytes();
                if let Some(at) = find(&bytes[from.min(bytes.len())..], text.as_bytes()) {
                    return Ok(from + at + text.len());
                }
                // What was searched is not searched again, but for a part of the text at its end.
                from = from.max(bytes.len().saturating_sub(text.len()));
                let wait = end.saturating_duration_since(Instant::now()).min(TICK);
                drop(self.output.more.wait_timeout(bytes, wait));
            }
            check_interrupted()?;
            if let Some(status) = self.exited()? {
                // Its last words may still be on their way through the reader.
                self.join_reader();
                if !self.output_since(from).contains(text) {
                    bail!(
                        "{} ended ({}) before it wrote \"{text}\"{}",
                        self.name,
                        describe(status),
                        self.tail()
                    );
                }
            } else if Instant::now() >= end {
                bail!(
                    "{} did not write \"{text}\" within {:?}{}",
                    self.name,
                    limit,
                    self.tail()
                );
            }
        }
    }

    /// Whether it has ended, and how.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
            if self.status.is_some() {
                forget(pid_of(&self.child));
            }
        }
        Ok(self.status)
    }

    /// Waits for its end; an error if that takes longer.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = self.exited()? {
                self.join_reader();
                return Ok(status);
            }
            check_interrupted()?;
            if Instant::now() >= end {
                bail!("{} did not end within {:?}{}", self.name, limit, self.tail());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Waits for its end; an error if that takes longer, or if it is not a success.
    pub fn wait_success(&mut self, limit: Duration) -> Result<()> {
        let status = self.wait(limit)?;
        if status.success() {
            Ok(())
        } else {
            bail!("{}: {}{}", self.name, describe(status), self.tail())
        }
    }

    /// Sends a signal to the process alone.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_none() {
            rustix::process::kill_process(self.pid(), signal)?;
        }
        Ok(())
    }

    /// Asks for its end with SIGTERM, and insists with SIGKILL after `limit`.
    pub fn stop(&mut self, limit: Duration) {
        if let Ok(None) = self.exited() {
            let _ = self.signal(Signal::TERM);
            let _ = self.signal(Signal::CONT);
            if self.wait(limit).is_err() {
                self.kill();
            }
        }
    }

    /// Kills its whole group and reaps it.
    pub fn kill(&mut self) {
        // The group may have members although its leader is gone; while the leader is not reaped its id is ours.
        let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
        if self.status.is_none() {
            self.status = self.child.wait().ok();
            forget(pid_of(&self.child));
        }
    }

    fn join_reader(&mut self) {
        // A grandchild may hold the pipe open for ever: a short grace, then its output is what there is.
        let end = Instant::now() + Duration::from_millis(500);
        while let Some(reader) = &self.reader {
            if reader.is_finished() {
                let _ = self.reader.take().map(JoinHandle::join);
            } else if Instant::now() >= end {
                return;
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// The last lines of its output, for an error's text.
    pub fn tail(&self) -> String {
        let text = self.output();
        let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        if lines.is_empty() {
            return "; it wrote nothing".into();
        }
        let shown = &lines[lines.len().saturating_sub(SHOWN)..];
        format!("; its last output:\n    {}", shown.join("\n    "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.kill();
        }
    }
}

/// Runs a command to its end and gives its output; an error if it fails or takes longer than `limit`.
pub fn run(name: &str, command: Command, limit: Duration) -> Result<String> {
    let surroundings = Surroundings {
        no_stdin: true,
        ..Default::default()
    };
    let mut process = Process::spawn(name, command, &surroundings)?;
    process.wait_success(limit)?;
    Ok(process.output())
}

/// What a status means, in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

fn collect(mut pipe: std::io::PipeReader, output: &Output, echo: bool) {
    let mut buffer = [0u8; 16384];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        if echo {
            let _ = std::io::stderr().write_all(&buffer[..n]);
        }
        output
            .bytes
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .extend_from_slice(&buffer[..n]);
        output.more.notify_all();
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn forget(pid: Pid) {
    LIVE.lock().unwrap_or_else(|e| e.into_inner()).retain(|&p| p != pid);
}

/// A mount namespace of the caller's own, with a hugetlbfs of 2 MiB pages on `dir`.
fn private_hugetlbfs(dir: &CString, options: &CString) -> rustix::io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: between fork and exec there is one thread; nothing relies on the mounts that it shared before.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)? };
    mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    mount(
        c"none",
        dir.as_c_str(),
        c"hugetlbfs",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn output_is_found_and_errors_show_it() {
        let mut p = Process::spawn(
            "sh",
            shell("echo one; read x; echo got $x; exit 3"),
            &Surroundings::default(),
        )
        .unwrap();
        let mark = p.wait_for("one", 0, Duration::from_secs(5)).unwrap();
        p.command("two").unwrap();
        p.wait_for("got two", mark, Duration::from_secs(5)).unwrap();
        let error = p.wait_success(Duration::from_secs(5)).unwrap_err().to_string();
        assert!(error.contains("exit status 3") && error.contains("got two"), "{error}");
        let error = p.wait_for("never", 0, Duration::from_secs(5)).unwrap_err().to_string();
        assert!(error.contains("before it wrote"), "{error}");
    }

    #[test]
    fn waits_are_bounded() {
        let mut p = Process::spawn("sh", shell("echo here; sleep 60"), &Surroundings::default()).unwrap();
        let error = p
            .wait_for("there", 0, Duration::from_millis(200))
            .unwrap_err()
            .to_string();
        assert!(error.contains("did not write") && error.contains("here"), "{error}");
        assert!(p.wait(Duration::from_millis(100)).is_err());
    }

    #[test]
    fn drop_kills_the_whole_group() {
        let mut p = Process::spawn("sh", shell("sleep 61 & echo pid $!; wait"), &Surroundings::default()).unwrap();
        p.wait_for("\n", 0, Duration::from_secs(5)).unwrap();
        let grandchild: i32 = p.output().trim().strip_prefix("pid ").unwrap().parse().unwrap();
        drop(p);
        let gone = || match std::fs::read_to_string(format!("/proc/{grandchild}/stat")) {
            Ok(stat) => stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")),
            Err(_) => true,
        };
        let end = Instant::now() + Duration::from_secs(5);
        while !gone() {
            assert!(Instant::now() < end, "{grandchild} lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
