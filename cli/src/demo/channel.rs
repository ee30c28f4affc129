//! What the demo and its containers say to each other: JSON lines over an inherited socket pair.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What the demo tells a container to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open a port by this spec.
    Open {
        /// The spec, its path as the container sees it.
        spec: String,
    },
    /// Close the port.
    Close,
    /// Receive the capture and compare it.
    Receive,
    /// Send the capture.
    Replay,
    /// Send frames of `size` bytes and take them back, `window` in flight, for `millis`.
    Throughput {
        /// Bytes of a frame without FCS.
        size: usize,
        /// Frames in flight.
        window: usize,
        /// How long.
        millis: u64,
        /// The CPU to run on.
        cpu: Option<usize>,
    },
    /// One frame in flight, for `millis`.
    Latency {
        /// How long.
        millis: u64,
        /// The CPU to run on.
        cpu: Option<usize>,
    },
    /// A measurement of the kernel's veth.
    Kernel {
        /// Which.
        test: KernelTest,
        /// How long.
        millis: u64,
        /// The CPUs of client and peer.
        cpus: Option<(usize, usize)>,
    },
}

/// A measurement over a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelTest {
    /// UDP one way, frames of this many bytes without FCS, as many as get through.
    UdpThroughput(usize),
    /// One UDP datagram in flight, both ends spinning.
    UdpSpin,
    /// One UDP datagram in flight, both ends asleep in recv(2).
    UdpBlock,
    /// AF_PACKET frames of this many bytes, reflected, this many in flight.
    PacketThroughput(usize, usize),
    /// One AF_PACKET frame in flight, both ends spinning.
    PacketSpin,
}

/// How long something took, by percentile, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Percentiles {
    /// Measurements.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
    /// 999 of 1000 took no longer.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

impl Percentiles {
    /// Of a histogram of nanoseconds.
    pub fn of(h: &hdrhistogram::Histogram<u64>) -> Self {
        Percentiles {
            count: h.len(),
            p50: h.value_at_quantile(0.5),
            p99: h.value_at_quantile(0.99),
            p999: h.value_at_quantile(0.999),
            max: h.max(),
        }
    }
}

/// What went through in a time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Rate {
    /// Frames.
    pub frames: u64,
    /// Nanoseconds.
    pub nanos: u64,
    /// Frames that came back wrong, or not at all.
    pub wrong: u64,
}

/// How isolated a container finds itself, told by itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Proof {
    /// Line `Uid` of /proc/self/status: real, effective, saved, file system.
    pub uid: String,
    /// The capability sets of /proc/self/status by name (CapInh, CapPrm, CapEff, CapBnd, CapAmb), in hexadecimal.
    pub capabilities: Vec<(String, String)>,
    /// Line `NoNewPrivs`.
    pub no_new_privs: String,
    /// Line `NSpid`'s last number: the process's number in its own namespace.
    pub pid: String,
    /// Network interfaces.
    pub interfaces: Vec<String>,
    /// Everything in the file system, but for what is below /proc.
    pub files: Vec<String>,
    /// Whether a file can be created in the root directory.
    pub writable: bool,
    /// Whether /proc is mounted.
    pub proc: bool,
    /// The namespaces: name and identity, as in `net` and `net:[4026532000]`.
    pub namespaces: Vec<(String, String)>,
}

/// What a container tells the demo.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Report {
    /// It is isolated.
    Isolated(Proof),
    /// It is ready for orders, and has no more to say.
    Ready,
    /// The port is open; where its memory comes from.
    Opened {
        /// In words.
        memory: String,
        /// Bytes of packet memory.
        bytes: usize,
        /// From the order to the port being up, in nanoseconds.
        nanos: u64,
    },
    /// The order is done.
    Done,
    /// So many frames have come.
    Progress(u64),
    /// The capture has been received.
    Received {
        /// Frames.
        frames: u64,
        /// Their bytes.
        bytes: u64,
        /// Hash over all frames in their order.
        chain: u64,
        /// The first difference, if there is one.
        difference: Option<String>,
    },
    /// The capture has been sent.
    Sent {
        /// Frames.
        frames: u64,
        /// Their bytes.
        bytes: u64,
        /// Nanoseconds from the first to the last.
        nanos: u64,
    },
    /// Throughput was measured.
    Rate(Rate),
    /// Latency was measured.
    Latency(Percentiles),
    /// It failed, and ends.
    Failed(String),
}

/// One end of the socket pair.
pub struct Channel {
    reader: BufReader<UnixStream>,
    line: Vec<u8>,
}

/// The longest line that is taken: the proof's, with room.
const LONGEST: usize = 1 << 20;

impl Channel {
    /// Over a connected socket.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        Ok(Channel {
            reader: BufReader::new(stream),
            line: Vec::new(),
        })
    }

    /// Sends one line.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.reader
            .get_mut()
            .write_all(&line)
            .context("the other end of the control channel is gone")
    }

    /// Receives one line. `None`: the other end hung up.
    pub fn receive<T: DeserializeOwned>(&mut self, limit: Option<Duration>, stop: &AtomicBool) -> Result<Option<T>> {
        let deadline = limit.map(|l| Instant::now() + l);
        loop {
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(0) => return Ok(None),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.line).context("a line on the control channel is wrong");
                    self.line.clear();
                    return message.map(Some);
                }
                Ok(_) => return Ok(None),
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e).context("reading the control channel"),
            }
            if self.line.len() > LONGEST {
                bail!("a line on the control channel has no end");
            }
            if stop.load(Ordering::Relaxed) {
                bail!("ended by a signal");
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                bail!(
                    "no answer on the control channel within {:.0} s",
                    limit.unwrap_or_default().as_secs_f64()
                );
            }
        }
    }
}

/// The demo's side of a running container.
pub struct Container {
    /// What it is called in messages.
    pub name: &'static str,
    /// The process that waits for the isolated one.
    pub child: std::process::Child,
    /// To it.
    pub channel: Channel,
    /// Set by a signal.
    pub stop: Arc<AtomicBool>,
}

impl Container {
    /// Gives an order.
    pub fn order(&mut self, order: &Order) -> Result<()> {
        self.channel
            .send(order)
            .with_context(|| format!("container {}", self.name))
    }

    /// Waits for its next report; a failure that it reports is an error.
    pub fn report(&mut self, limit: Duration) -> Result<Report> {
        let report = self
            .channel
            .receive(Some(limit), &self.stop)
            .with_context(|| format!("container {}", self.name))?;
        match report {
            Some(Report::Failed(message)) => bail!("container {}: {message}", self.name),
            Some(report) => Ok(report),
            None => {
                let status = self.child.wait()?;
                bail!("container {} ended unexpectedly: {status}", self.name)
            }
        }
    }

    /// An order and the report on it.
    pub fn ask(&mut self, order: &Order) -> Result<Report> {
        self.order(order)?;
        self.report(Duration::from_secs(30))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // The process below dies with this one: PR_SET_PDEATHSIG, and it is the init of its namespace.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_cross_and_an_end_is_seen() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        let stop = AtomicBool::new(false);
        a.send(&Order::Kernel {
            test: KernelTest::PacketThroughput(64, 32),
            millis: 5,
            cpus: Some((0, 1)),
        })
        .unwrap();
        a.send(&Order::Replay).unwrap();
        let first: Option<Order> = b.receive(None, &stop).unwrap();
        assert!(matches!(
            first,
            Some(Order::Kernel {
                test: KernelTest::PacketThroughput(64, 32),
                ..
            })
        ));
        assert!(matches!(b.receive(None, &stop).unwrap(), Some(Order::Replay)));
        let nothing: Result<Option<Order>> = b.receive(Some(Duration::from_millis(60)), &stop);
        assert!(nothing.unwrap_err().to_string().contains("no answer"));
        // Half a line is kept until the rest comes.
        a.reader.get_mut().write_all(b"\"Clo").unwrap();
        assert!(b.receive::<Order>(Some(Duration::from_millis(60)), &stop).is_err());
        a.reader.get_mut().write_all(b"se\"\n").unwrap();
        assert!(matches!(b.receive(None, &stop).unwrap(), Some(Order::Close)));
        drop(a);
        assert!(b.receive::<Order>(None, &stop).unwrap().is_none());
    }
}
