//! What all commands share: the port's arguments, signals, pacing, progress and totals.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use usernic::confine::{Enforced, Files};
use usernic::spec::PortSpec;
use usernic::vfio::{Host, Kernel};
use usernic::vhost_user::SocketAccess;
use usernic::{Port, Queue, Stats};

use crate::control::{Control, Request};
use crate::metrics::{self, Metrics, PortMetrics};
use crate::{note, output, result};

/// An error in how the program was called: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// What failed was told already: exit status 1 without a message.
#[derive(Debug)]
pub struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it failed, as was told")
    }
}

impl std::error::Error for Failed {}

/// An error and its causes in one line, each cause once: some errors quote their source already.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The arguments of every command that drives ports.
#[derive(clap::Args)]
pub struct PollArgs {
    /// Pin the polling thread to this CPU
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,
    /// Wait this many seconds for the link to come up
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub wait: Duration,
    /// Serve the port's counters on this Unix socket, for `usernic stats`
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    #[command(flatten)]
    pub confine: ConfineArgs,
}

/// Whether a program gives up what it does not need.
#[derive(clap::Args)]
pub struct ConfineArgs {
    /// Stay able to open other files and to make other system calls (Landlock and seccomp)
    #[arg(long)]
    no_confine: bool,
}

/// What a program has given up, for `usernic stats`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Confined {
    /// Files, by Landlock; nothing if it was not asked for or refused.
    files: Option<Enforced>,
    /// System calls, by seccomp.
    calls: bool,
}

impl ConfineArgs {
    /// Gives up all files but those of these ports and those that are to be made. Before ports are opened: the threads
    /// that they start are confined with this one. What is refused is told, and done without.
    pub fn files<'a>(&self, ports: impl IntoIterator<Item = &'a PortSpec>, made: &[Option<&PathBuf>]) -> Confined {
        if self.no_confine {
            return Confined::default();
        }
        let ports = ports.into_iter().fold(Files::new(), Files::port);
        let files = made
            .iter()
            .flatten()
            .fold(ports, |files, path| files.create(path))
            .apply();
        Confined {
            files: files.map_err(|error| tracing::warn!("not confined: {error}")).ok(),
            calls: false,
        }
    }

    /// Gives up all system calls but those of open ports, in all threads.
    pub fn calls(&self, confined: Confined) -> Confined {
        let calls = !self.no_confine
            && usernic::confine::calls()
                .map_err(|error| tracing::warn!("not confined: {error}"))
                .is_ok();
        Confined { calls, ..confined }
    }
}

impl PollArgs {
    /// Pins the calling thread, if that was asked for.
    pub fn pin(&self) -> Result<()> {
        self.cpu.map_or(Ok(()), pin)
    }

    /// Gives up files: those of these ports stay, and those that are to be made.
    pub fn confine<'a>(&self, ports: impl IntoIterator<Item = &'a PortSpec>, made: Option<&PathBuf>) -> Confined {
        self.confine.files(ports, &[made, self.control.as_ref()])
    }

    /// Serves the counters of `ports` if a control socket was asked for; while the answer lives.
    ///
    /// System calls are given up first: ports are open when their counters are served.
    pub fn serve(&self, ports: &[(&str, &Arc<Port>)], confined: Confined) -> Result<Option<Control>> {
        let confined = self.confine.calls(confined);
        let Some(path) = &self.control else { return Ok(None) };
        let ports: Vec<(String, Arc<Port>)> = ports.iter().map(|(n, p)| (n.to_string(), Arc::clone(p))).collect();
        let stats = move |request| match request {
            Request::Stats => {
                let all: Vec<_> = ports
                    .iter()
                    .map(|(name, port)| {
                        let mut value = serde_json::to_value(port.stats()).unwrap_or_default();
                        value["name"] = name.clone().into();
                        value["link_up"] = port.link().up.into();
                        value
                    })
                    .collect();
                Ok(serde_json::json!({ "ports": all, "confined": confined }))
            }
            Request::Metrics => {
                let ports = ports.iter().map(|(name, port)| PortMetrics {
                    name: name.clone(),
                    link_up: port.link().up,
                    stats: port.stats(),
                    switch: None,
                });
                let ports = ports.collect();
                Ok(metrics::render(Metrics { ports, addresses: None })?.into())
            }
            _ => bail!("only a switch has ports to list, add or remove"),
        };
        Control::serve(path, SocketAccess::default(), Arc::new(stats)).map(Some)
    }
}

/// The argument of every command about devices.
#[derive(clap::Args)]
pub struct HostArgs {
    /// The folder that stands for the machine's root, for tests
    #[arg(long, hide = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl HostArgs {
    /// The machine.
    pub fn host(&self) -> Host {
        Host::new(&self.root, Kernel)
    }
}

/// Seconds, with a fraction if wanted, as a clap value.
pub fn seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .filter(|d| *d <= Duration::from_secs(86_400 * 365))
        .ok_or_else(|| "write seconds, as in 10 or 0.5, 31536000 (a year) at the most".to_owned())
}

/// A number with K, M or G, as a clap value: `--rate 2.5M`.
pub fn quantity(text: &str) -> Result<f64, String> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1e3),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1e6),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 1e9),
        _ => (text, 1.0),
    };
    digits
        .parse::<f64>()
        .ok()
        .map(|n| n * factor)
        .filter(|n| n.is_finite() && *n > 0.0)
        .ok_or_else(|| "write frames a second, a number above 0 with K, M or G if wanted: 2.5M".to_owned())
}

/// A number of things, with K, M or G, as a clap value: `--count 10K`.
pub fn count(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1u64),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .ok_or_else(|| "write a whole number, with K, M or G if wanted: 1000 or 10K".to_owned())
}

/// A port spec whose socket's path is whole, for another process, whose folder is another one.
pub fn whole(spec: &str) -> Result<String> {
    let keys = spec.split(',').map(|key| match key.strip_prefix("path=") {
        Some(path) if !path.is_empty() => {
            let path = std::path::absolute(path).with_context(|| format!("path={path}"))?;
            let path = path.into_os_string().into_string();
            let path = path.map_err(|path| anyhow::anyhow!("{}: the path is not UTF-8", path.display()))?;
            Ok(format!("path={path}"))
        }
        _ => Ok(key.to_owned()),
    });
    Ok(keys.collect::<Result<Vec<_>>>()?.join(","))
}

/// Pins the calling thread to a CPU. Whether it may is the kernel's to say: another thread may be pinned elsewhere already.
pub fn pin(cpu: usize) -> Result<()> {
    let refused = || {
        let list = usernic::cpu::format_list(&usernic::cpu::allowed(&Host::default()));
        format!("cannot pin the thread to CPU {cpu} (this process may use {list})")
    };
    let number = u32::try_from(cpu).with_context(refused)?;
    usernic::cpu::pin(number).with_context(refused)
}

/// The CPUs that this process may use.
pub fn cpus() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// A flag that SIGINT and SIGTERM set; the second of either ends the program at once.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // In this order: the first signal finds the flag unset, goes by, and sets it.
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// How many things may be sent by now, at an even rate: the first at once.
pub struct Pacer {
    rate: f64,
    start: Instant,
    sent: u64,
}

impl Pacer {
    /// `rate` a second, from now on.
    pub fn new(rate: f64) -> Self {
        Pacer {
            rate,
            start: Instant::now(),
            sent: 0,
        }
    }

    /// How many are due, at most `most`. What could not be sent for a tenth of a second is not made up for.
    pub fn due(&mut self, most: usize) -> usize {
        let target = self.start.elapsed().as_secs_f64() * self.rate + 1.0;
        let mut lag = target - self.sent as f64;
        let limit = (self.rate * 0.1).max(2.0);
        if lag > limit {
            let keep = limit.min(most.max(1) as f64);
            self.start += Duration::try_from_secs_f64((lag - keep) / self.rate).unwrap_or_default();
            lag = keep;
        }
        (lag.max(0.0) as usize).min(most)
    }

    /// `count` were sent.
    pub fn sent(&mut self, count: usize) {
        self.sent += count as u64;
    }

    /// Until the next is due, or `end` has come: sleeps when that is long, spins when it is not.
    pub fn idle(&self, end: Option<Instant>) {
        let next = Duration::try_from_secs_f64(self.sent as f64 / self.rate);
        let next = next.ok().and_then(|next| self.start.checked_add(next));
        idle_until(next.into_iter().chain(end).min());
    }
}

/// Spins when `when` is near, and sleeps when it is not, in slices that a signal can end.
pub fn idle_until(when: Option<Instant>) {
    const LONG: Duration = Duration::from_micros(200);
    let left = when.map_or(Duration::MAX, |when| when.saturating_duration_since(Instant::now()));
    if left > LONG {
        std::thread::sleep((left - LONG / 2).min(Duration::from_millis(20)));
    } else {
        std::hint::spin_loop();
    }
}

/// A line on a terminal, or one log line a second elsewhere, that says how fast it goes.
pub struct Meter {
    bar: ProgressBar,
    last: Instant,
    before: Stats,
    started: Instant,
}

impl Meter {
    /// A meter for `what` is done.
    pub fn new(what: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(None, output::progress(4));
        let style = ProgressStyle::with_template("{spinner} {prefix} {elapsed_precise} {msg}");
        if let Ok(style) = style {
            let ticks = if output::is_utf8() {
                "⠁⠂⠄⡀⢀⠠⠐⠈ "
            } else {
                "|/-\\ "
            };
            bar.set_style(style.tick_chars(ticks));
        }
        bar.set_prefix(what);
        let now = Instant::now();
        Meter {
            bar,
            last: now,
            before: Stats::default(),
            started: now,
        }
    }

    /// Whether a second has gone since the last [`Meter::show`]: then it is time for the next.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= Duration::from_secs(1)
    }

    /// Shows the rates since the last time.
    pub fn show(&mut self, stats: Stats) {
        let seconds = self.last.elapsed().as_secs_f64();
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let line = format!(
            "tx {}pps {}b/s  rx {}pps {}b/s",
            scaled(rate(stats.tx_packets, self.before.tx_packets)),
            scaled(8.0 * rate(stats.tx_bytes, self.before.tx_bytes)),
            scaled(rate(stats.rx_packets, self.before.rx_packets)),
            scaled(8.0 * rate(stats.rx_bytes, self.before.rx_bytes)),
        );
        // Hidden: no terminal, or one whose lines do not move.
        if self.bar.is_hidden() {
            let line = format!("{:6.1} s  {line}\n", self.started.elapsed().as_secs_f64());
            let _ = output::Log.write_all(line.as_bytes());
        } else {
            self.bar.set_message(line);
            self.bar.tick();
        }
        self.last = Instant::now();
        self.before = stats;
    }

    /// Removes the line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// `12.3 M`: three digits and a decimal prefix.
pub fn scaled(value: f64) -> String {
    let (value, prefix) = match value {
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$} {prefix}")
}

/// Why a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// SIGINT or SIGTERM.
    Signal,
    /// The count was reached, or the file was at its end.
    Count,
    /// The time was over.
    Time,
    /// Something failed, after the port was open.
    Error,
}

/// The last word of a command.
#[derive(Serialize)]
pub struct Summary<T: Serialize> {
    /// The command and the version of this object's form, as in `usernic.generate/1`.
    pub schema: &'static str,
    /// Why it ended.
    pub ended: Ended,
    /// What failed, if something did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How long it ran.
    pub seconds: f64,
    /// The counters of its ports, in their order.
    pub ports: Vec<Stats>,
    /// What belongs to this command alone.
    #[serde(flatten)]
    pub more: T,
}

impl<T: Serialize> Summary<T> {
    /// The totals of a command that ended by itself or by `error`.
    pub fn new(schema: &'static str, outcome: &Result<Ended>, seconds: f64, ports: Vec<Stats>, more: T) -> Self {
        Summary {
            schema,
            ended: *outcome.as_ref().unwrap_or(&Ended::Error),
            error: outcome.as_ref().err().map(describe),
            seconds,
            ports,
            more,
        }
    }

    /// Prints it: as JSON on the standard output, or as text on the standard error; `line` is the text's beginning.
    ///
    /// # Errors
    /// The error of `outcome`, told already; the JSON that cannot be written.
    pub fn print(&self, json: bool, line: &str, outcome: Result<Ended>) -> Result<()> {
        let written = if json {
            result!("{}", serde_json::to_string(self)?).map_err(anyhow::Error::from)
        } else {
            self.note(line);
            Ok(())
        };
        let Err(error) = outcome else { return written };
        if output::Lost::quietly(&error) {
            return Err(error);
        }
        note!("usernic: {}", describe(&error));
        Err(Failed.into())
    }

    fn note(&self, line: &str) {
        note!(
            "{line} in {:.3} s{}",
            self.seconds,
            match self.ended {
                Ended::Signal => " (ended by a signal)",
                Ended::Error => " (ended by an error)",
                Ended::Count | Ended::Time => "",
            }
        );
        for (number, s) in self.ports.iter().enumerate() {
            let seconds = self.seconds.max(1e-9);
            note!(
                "port {number}: tx {} packets {} bytes ({}pps), rx {} packets {} bytes ({}pps), errors tx {} rx {}, \
                 no buffer {}, anomalies {}, kicks {}",
                s.tx_packets,
                s.tx_bytes,
                scaled(s.tx_packets as f64 / seconds),
                s.rx_packets,
                s.rx_bytes,
                scaled(s.rx_packets as f64 / seconds),
                s.tx_errors,
                s.rx_errors,
                s.rx_no_buffer,
                s.anomalies,
                s.kicks,
            );
        }
    }
}

/// How long the other side may take no frame before a sender gives up, and how long a sender stays after its last frame.
///
/// How senders end.
#[derive(clap::Args)]
pub struct SendArgs {
    /// Give up when the other side takes no frame for so many seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub stall: Duration,
}

impl SendArgs {
    /// Stays until the other side has taken what is in the ring, or takes none for too long, or `stop` is set. Whether it
    /// has taken all.
    pub fn drain(&self, queue: &mut Queue, stop: &AtomicBool) -> bool {
        const TURN: Duration = Duration::from_millis(10);
        let deadline = Instant::now() + self.stall;
        let mut begin = Instant::now();
        while !queue.drain(TURN) {
            // A drain that ends early with frames left says that nobody is there to take them.
            if begin.elapsed() < TURN || begin >= deadline || stop.load(Ordering::Relaxed) {
                return false;
            }
            begin = Instant::now();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_and_seconds() {
        assert_eq!(quantity("2.5M"), Ok(2_500_000.0));
        assert_eq!(quantity("10"), Ok(10.0));
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "M", "-1", "0", "x", "1T", "inf", "nan"] {
            assert!(quantity(bad).is_err(), "{bad}");
        }
        for bad in ["", "-1", "x", "1e30", "nan", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_spec_for_another_process_has_a_whole_path() {
        let here = std::env::current_dir().unwrap();
        let of = |path: &str| format!("vhost,path={},mtu=9000", here.join(path).display());
        assert_eq!(whole("vhost,path=a/b,mtu=9000").unwrap(), of("a/b"));
        for same in [
            "vhost,path=/r/s,mtu=9000",
            "vhost",
            "",
            "vf,pci=0000:81:10.0",
            "vhost,path=",
        ] {
            assert_eq!(whole(same).unwrap(), same);
        }
    }

    #[test]
    fn counts() {
        assert_eq!(count("1k"), Ok(1_000));
        assert_eq!(count("3G"), Ok(3_000_000_000));
        assert_eq!(count("0"), Ok(0));
        for bad in ["", "k", "-1", "1.5k", "1T", "99999999999G"] {
            assert!(count(bad).unwrap_err().contains("10K"), "{bad}");
        }
    }

    #[test]
    fn the_first_is_due_at_once_and_each_other_at_its_time() {
        let mut pacer = Pacer::new(0.001);
        assert_eq!(pacer.due(32), 1);
        pacer.sent(1);
        assert_eq!(pacer.due(32), 0, "the second is due in 1,000 s");
        let begin = Instant::now();
        pacer.idle(Some(begin));
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn scales() {
        assert_eq!(scaled(0.0), "0.00 ");
        assert_eq!(scaled(12_345.0), "12.3 k");
        assert_eq!(scaled(123_456_789.0), "123 M");
    }

    #[test]
    fn the_pacer_keeps_its_rate() {
        let mut pacer = Pacer::new(10_000.0);
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < Duration::from_millis(100) {
            let due = pacer.due(32);
            pacer.sent(due);
            sent += due;
            pacer.idle(None);
        }
        let elapsed = start.elapsed().as_secs_f64();
        assert!(sent as f64 <= 10_000.0 * elapsed + 1.0, "{sent} in {elapsed}");
        assert!(sent > 100, "{sent}");
    }

    #[test]
    fn causes_are_told_once() {
        let inner = std::io::Error::other("no luck");
        let error = anyhow::Error::new(inner).context("cannot: no luck").context("outer");
        assert_eq!(describe(&error), "outer: cannot: no luck");
    }
}
