//! Opening ports for a command, and waiting on all of their queues.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use usernic::spec::PortSpec;
use usernic::{Burst, Error, Link, Packet, Port, Queue, Stats, vhost_user};

use crate::common::PollArgs;
use crate::{note, packets};

/// How often a signal, a deadline or a socket is looked for.
const SLICE: Duration = Duration::from_millis(20);

/// A port whose link is up, with all of its queue pairs: whoever opens a port reads all of them, for frames on a queue
/// that nobody reads fill its ring and stall the other side.
pub struct Opened {
    /// The port.
    pub port: Arc<Port>,
    /// Its queue pairs, by their numbers.
    pub queues: Vec<Queue>,
}

/// What messages call a port.
pub fn name(spec: &PortSpec) -> String {
    match spec.pci {
        Some(address) => address.to_string(),
        None if spec.path.as_os_str().is_empty() => spec.kind.name().to_owned(),
        None => spec.path.display().to_string(),
    }
}

/// The other side may come yet.
fn is_early(error: &Error) -> bool {
    use vhost_user::Error as E;
    matches!(
        error,
        Error::VhostUser(E::NoSocket { .. } | E::NobodyListens { .. } | E::NobodyAccepts { .. })
    )
}

/// Opens a port, again and again until `deadline` while its other side has no socket yet.
fn open(spec: &PortSpec, deadline: Instant, wait: Duration, stop: &AtomicBool) -> Result<Port, Error> {
    let mut told = false;
    loop {
        let error = match Port::open_spec(spec.clone()) {
            Err(error) if is_early(&error) && Instant::now() < deadline && !stop.load(Ordering::Relaxed) => error,
            other => return other,
        };
        if !std::mem::replace(&mut told, true) {
            note!("{error}; waiting for it for {} s (--wait)", wait.as_secs_f64());
        }
        std::thread::sleep(SLICE.min(deadline.saturating_duration_since(Instant::now())));
    }
}

impl PollArgs {
    /// Opens ports, all at once, waits for their links and takes their queues. The calling thread, which is to poll them,
    /// goes to the CPU that the first port's spec has for its queue `first`.
    pub fn open(&self, specs: &[PortSpec], first: u16, stop: &Arc<AtomicBool>) -> Result<Vec<Opened>> {
        let deadline = Instant::now() + self.wait;
        let signal = || bail!("ended by a signal before the port on {} was open", names(specs));
        // On threads of their own: a signal ends the program though a call waits for the other side's answer.
        let (sender, receiver) = channel();
        for (index, spec) in specs.iter().enumerate() {
            let (sender, spec, wait, stop) = (sender.clone(), spec.clone(), self.wait, Arc::clone(stop));
            let opening = move || {
                // Nobody hears it when another port failed first.
                let _ = sender.send((index, open(&spec, deadline, wait, &stop)));
            };
            std::thread::Builder::new().name("open".into()).spawn(opening)?;
        }
        let mut ports: Vec<Option<Port>> = specs.iter().map(|_| None).collect();
        while ports.iter().any(Option::is_none) {
            let told = receiver.recv_timeout(SLICE);
            if stop.load(Ordering::Relaxed) {
                return signal();
            }
            match told {
                Ok((index, port)) => {
                    let port = port.with_context(|| format!("cannot open the port on {}", name(&specs[index])))?;
                    ports[index] = Some(port);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("a thread that was to open a port ended in a panic"),
            }
        }
        let mut opened = Vec::new();
        for port in ports.into_iter().flatten() {
            let queues = (0..port.queue_count())
                .map(|index| port.queue(index).with_context(|| format!("cannot take queue {index}")));
            let queues = queues.collect::<Result<_>>()?;
            opened.push(Opened {
                port: Arc::new(port),
                queues,
            });
        }
        // What the command line says goes before.
        if let Some(cpu) = opened[0].port.cpu(first).filter(|_| self.cpu.is_none()) {
            usernic::cpu::pin(cpu).with_context(|| format!("cannot pin the thread to CPU {cpu}"))?;
        }
        for (spec, Opened { port, .. }) in specs.iter().zip(&opened) {
            while !port.wait_link(SLICE.min(self.wait)) {
                if stop.load(Ordering::Relaxed) {
                    return signal();
                }
                if Instant::now() >= deadline {
                    bail!(
                        "the link of {} is not up after {} s: is the other side there? (--wait S waits longer)",
                        name(spec),
                        self.wait.as_secs_f64()
                    );
                }
            }
            let Link { queues, features, .. } = port.link();
            tracing::info!(
                "{}: link up, mac {}, mtu {}",
                name(spec),
                packets::format_mac(port.mac()),
                port.mtu()
            );
            tracing::debug!(
                "{}: {queues} of {} queue pairs run, features {features:#x}, {} bytes of memory from {}",
                name(spec),
                port.queue_count(),
                port.memory_bytes(),
                port.memory()
            );
        }
        Ok(opened)
    }
}

/// Refuses a queue pair that the port has not.
pub fn has_queue(port: &Port, index: u16) -> Result<(), Error> {
    let count = port.queue_count();
    if index < count {
        Ok(())
    } else {
        Err(Error::NoSuchQueue { index, count })
    }
}

fn names(specs: &[PortSpec]) -> String {
    specs.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// Sleeps until one of `queues` has frames, a link has changed, or `timeout` is over. `true`: frames are there.
pub fn wait_any(queues: &mut [&mut Queue], timeout: Duration) -> std::io::Result<bool> {
    if let [only] = queues {
        return only.wait(Some(timeout));
    }
    let mut there = false;
    for queue in &mut *queues {
        there |= queue.arm();
    }
    let slept = if there {
        Ok(())
    } else {
        let mut fds: Vec<_> = queues
            .iter()
            .map(|queue| PollFd::from_borrowed_fd(queue.as_fd(), PollFlags::IN))
            .collect();
        match poll(&mut fds, Timespec::try_from(timeout).ok().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    for queue in queues {
        there |= queue.disarm();
    }
    slept.map(|()| there)
}

/// Drops what came in on queues whose frames nobody wants: it must not fill the rings and stall the other side. Not more
/// at a time than a ring may hold, or a fast sender would hold its caller.
pub fn discard(queues: &mut [Queue], burst: &mut Burst) {
    for queue in queues {
        for _ in 0..64 {
            if queue.rx(burst) == 0 {
                break;
            }
            queue.free(burst);
        }
    }
}

/// Copies a frame as it was on the wire: with the VLAN tag that the port took out of it, if it did. `room` is larger than
/// any frame.
pub fn copy(packet: &Packet, room: &mut [u8]) -> usize {
    let len = packet.copy_to(room);
    let Some(tag) = packet.vlan_tag().filter(|_| len >= 12 && len + 4 <= room.len()) else {
        return len;
    };
    room.copy_within(12..len, 16);
    room[12..14].copy_from_slice(&[0x81, 0]);
    room[14..16].copy_from_slice(&tag.to_be_bytes());
    len + 4
}

/// The sum of the ports' counters.
pub fn total<'a>(ports: impl IntoIterator<Item = &'a Arc<Port>>) -> Stats {
    let mut sum = Stats::default();
    ports.into_iter().for_each(|port| sum += port.stats());
    sum
}

/// Why a sender gives up: the other side took no frame for `limit`.
pub fn stalled(port: &Port, limit: Duration, sent: impl std::fmt::Display, no_buffers: bool) -> anyhow::Error {
    let seconds = limit.as_secs_f64();
    if !port.link().up {
        anyhow::anyhow!("the link has been down for {seconds} s, after {sent}")
    } else if no_buffers {
        anyhow::anyhow!("no buffers for {seconds} s, after {sent}: raise buffers= in the port spec")
    } else {
        anyhow::anyhow!("the other side has taken no frame for {seconds} s, after {sent}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_port_has_a_name() {
        for (spec, expected) in [
            ("virtio-user,path=/run/x", "/run/x"),
            ("vf,pci=0000:81:10.0", "0000:81:10.0"),
            ("vf", "vf"),
        ] {
            assert_eq!(name(&spec.parse().unwrap()), expected);
        }
    }

    #[test]
    fn a_tag_that_was_taken_out_is_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let port = Port::open(&format!("vhost,path={}", dir.path().join("s").display())).unwrap();
        let mut packet = port.queue(0).unwrap().packet().unwrap();
        let frame: Vec<u8> = (0..60).collect();
        packet.copy_from(&frame).unwrap();
        let mut room = [0; 128];
        assert_eq!(copy(&packet, &mut room), 60);
        assert_eq!(room[..60], frame);
        packet.set_vlan_tag(Some(0xe005));
        assert_eq!(copy(&packet, &mut room), 64);
        assert_eq!(room[..64], [&frame[..12], &[0x81, 0, 0xe0, 5], &frame[12..]].concat());
    }

    #[test]
    fn a_wait_sees_frames_on_every_queue() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let back = Port::open(&format!("vhost,path={},queues=3", path.display())).unwrap();
        let front = Port::open(&format!("virtio-user,path={},queues=3", path.display())).unwrap();
        assert!(back.wait_link(Duration::from_secs(10)));
        let mut readers: Vec<_> = (0..3).map(|index| back.queue(index).unwrap()).collect();
        for index in 0..3 {
            let mut queue = front.queue(index).unwrap();
            let mut burst = Burst::new(1);
            let mut packet = queue.packet().unwrap();
            packet.copy_from(&[index as u8; 60]).unwrap();
            assert!(burst.push(packet).is_ok());
            let begin = Instant::now();
            let sender = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                while queue.tx(&mut burst) == 0 {}
                queue
            });
            let mut all: Vec<_> = readers.iter_mut().collect();
            while !wait_any(&mut all, Duration::from_secs(20)).unwrap() {
                assert!(begin.elapsed() < Duration::from_secs(20), "queue {index} woke nobody");
            }
            let mut received = Burst::new(4);
            assert_eq!(readers[usize::from(index)].rx(&mut received), 1);
            drop(sender.join().unwrap());
        }
        let mut all: Vec<_> = readers.iter_mut().collect();
        assert!(!wait_any(&mut all, Duration::from_millis(10)).unwrap());
    }
}
