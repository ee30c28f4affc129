//! The device behind vfio-user: each VF a socket, which QEMU attaches as a PCI device.
//!
//! One thread for each VF takes its accesses, one for all keeps the time of moderated interrupts. Whoever has changed
//! something moves packets until nothing moves, under one lock.

mod backend;
mod config_space;
mod control;

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::nic::{Nic, Settings};
use crate::register::VECTORS;
use crate::shared::Shared;

use backend::Backend;
pub use config_space::ConfigSpace;
pub use control::{serve as serve_control, stats};

/// Rounds that one access may cause; far more than any work that drivers can have ready.
const ROUNDS: usize = 100_000;

/// The device, the eventfds of its vectors, and its clock.
pub struct Machine {
    device: Shared,
    lines: Vec<Mutex<[Option<File>; VECTORS]>>,
    last: Mutex<Instant>,
    timer: (Mutex<bool>, Condvar),
}

impl Machine {
    /// A device, and the thread that keeps its time.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn new(settings: Settings) -> Result<Arc<Self>> {
        let machine = Arc::new(Self {
            device: Shared::tolerant(settings),
            lines: (0..settings.vfs).map(|_| Mutex::default()).collect(),
            last: Mutex::new(Instant::now()),
            timer: (Mutex::new(false), Condvar::new()),
        });
        let timed = Arc::downgrade(&machine);
        thread::Builder::new().name("time".into()).spawn(move || {
            while let Some(machine) = timed.upgrade() {
                machine.wait_for_timer();
            }
        })?;
        Ok(machine)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Shared {
        &self.device
    }

    /// Does something with the device, then moves packets until nothing moves, and sends the interrupts.
    pub fn act<T>(&self, act: impl FnOnce(&mut Nic) -> T) -> T {
        let passed = {
            let mut last = lock(&self.last);
            let now = Instant::now();
            now - std::mem::replace(&mut *last, now)
        };
        let (result, fired, next) = self.device.with(|nic| {
            nic.advance(passed);
            let result = act(nic);
            nic.run(ROUNDS);
            let fired: Vec<u32> = (0..nic.vf_count()).map(|vf| nic.take_interrupts(vf)).collect();
            (result, fired, nic.next_interrupt())
        });
        for (lines, fired) in self.lines.iter().zip(fired) {
            let lines = lock(lines);
            for (vector, line) in lines.iter().enumerate() {
                if let (true, Some(line)) = (fired & 1 << vector != 0, line) {
                    // A counter that is full is an interrupt that nobody has taken yet.
                    let _ = (&mut &*line).write(&1_u64.to_ne_bytes());
                }
            }
        }
        if next.is_some() {
            *lock(&self.timer.0) = true;
            self.timer.1.notify_one();
        }
        result
    }

    fn set_line(&self, vf: usize, vector: usize, line: Option<File>) {
        if let Some(place) = lock(&self.lines[vf]).get_mut(vector) {
            *place = line;
        }
    }

    /// Waits until a moderated interrupt is due, or may be due earlier than was thought.
    fn wait_for_timer(&self) {
        let (asked, changed) = &self.timer;
        *lock(asked) = false;
        let next = self.device.with(|nic| nic.next_interrupt());
        // Now and then it looks whether the machine is still there.
        let time = next.unwrap_or(Duration::from_millis(500));
        let (asked, waited) = changed
            .wait_timeout_while(lock(asked), time, |asked| !*asked)
            .unwrap_or_else(PoisonError::into_inner);
        drop(asked);
        if next.is_some() && waited.timed_out() {
            self.act(|_| ());
        }
    }

    /// Serves a VF at a socket, one connection after the other, in a thread of its own. The socket is there when this
    /// returns.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn serve(self: &Arc<Self>, vf: usize, path: &Path) -> Result<()> {
        let server = backend::server(path).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let mut backend = Backend::new(Arc::clone(self), vf);
        let name = path.display().to_string();
        thread::Builder::new()
            .name(format!("vf {vf}"))
            .spawn(move || {
                loop {
                    if let Err(error) = server.run(&mut backend) {
                        eprintln!("{name}: {error}");
                    }
                    backend.disconnected();
                }
            })
            .with_context(|| format!("a thread for {}", path.display()))?;
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
