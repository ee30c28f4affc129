//! The noisy neighbour: a process that has nothing to do with the measured ones but the machine.
//!
//! It writes cache lines all over a memory larger than the last-level cache. It runs beside them on a CPU of their own:
//! the sibling of one of theirs, or any other. Where there is none, it shares the back-end's at the lowest priority.

use std::path::Path;

use anyhow::Result;
use rustix::process::{Pid, Signal};

use crate::bench::cores::{allowed, pin};
use crate::process::{Process, Surroundings};

/// Where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the other hardware thread of a measured core.
    Sibling(usize),
    /// On another core.
    Other(usize),
    /// On a measured CPU itself.
    Shared(usize),
}

impl Place {
    /// The nearest CPU that none of the two is.
    pub fn find(cpus: (usize, usize)) -> Self {
        let siblings = |cpu: usize| {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            list(&std::fs::read_to_string(path).unwrap_or_default())
        };
        let free: Vec<usize> = allowed()
            .into_iter()
            .filter(|cpu| ![cpus.0, cpus.1].contains(cpu))
            .collect();
        let near = [cpus.1, cpus.0]
            .into_iter()
            .flat_map(siblings)
            .find(|cpu| free.contains(cpu));
        match (near, free.first()) {
            (Some(cpu), _) => Place::Sibling(cpu),
            (None, Some(&cpu)) => Place::Other(cpu),
            (None, None) => Place::Shared(cpus.1),
        }
    }

    /// In words, for charts.
    pub fn words(self) -> String {
        match self {
            Place::Sibling(cpu) => format!("on CPU {cpu}, the sibling of a measured one"),
            Place::Other(cpu) => format!("on CPU {cpu}, a core of its own"),
            Place::Shared(cpu) => format!("on CPU {cpu}, the back-end's, at the lowest priority: there is no third"),
        }
    }

    fn cpu(self) -> usize {
        match self {
            Place::Sibling(cpu) | Place::Other(cpu) | Place::Shared(cpu) => cpu,
        }
    }
}

/// `0,2-3` as the kernel writes it.
fn list(text: &str) -> Vec<usize> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => Some(number(first)?..=number(last)?),
        None => number(part).map(|cpu| cpu..=cpu),
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// A neighbour that is quiet until it is told.
pub struct Neighbour {
    process: Process,
    /// Where it is.
    pub place: Place,
    /// What it writes to.
    pub mib: usize,
}

impl Neighbour {
    /// Starts it, quiet.
    pub fn start(cpus: (usize, usize)) -> Result<Self> {
        let place = Place::find(cpus);
        let mib = (2 * cache_mib()).clamp(16, 256);
        let how = format!("{mib},{}", u8::from(matches!(place, Place::Shared(_))));
        let command = crate::bench::ours::worker_command("neighbour", &how, (place.cpu(), place.cpu()))?;
        let mut process = Process::spawn("the neighbour", command, &Surroundings::default())?;
        process.wait_for("ready\n", 0, std::time::Duration::from_secs(30))?;
        let mut neighbour = Neighbour { process, place, mib };
        neighbour.run(false)?;
        Ok(neighbour)
    }

    /// Its id, if it shares a CPU with what is measured.
    pub fn sharing(&self) -> Option<Pid> {
        matches!(self.place, Place::Shared(_)).then(|| self.process.pid())
    }

    /// Noisy or quiet.
    pub fn run(&mut self, noisy: bool) -> Result<()> {
        self.process.signal(if noisy { Signal::CONT } else { Signal::STOP })
    }
}

/// The last-level cache, in MiB; 32 where the kernel does not tell.
fn cache_mib() -> usize {
    let size = |index: usize| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(Path::new(&path)).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (0..8).filter_map(size).max().map_or(32, |kib| kib.div_ceil(1024))
}

/// The program: `how` is its memory in MiB and whether it is to be of the lowest priority.
pub fn main(how: &str, cpu: usize) -> Result<()> {
    let (mib, low) = how.split_once(',').unwrap_or((how, "0"));
    pin(cpu)?;
    if low == "1" {
        rustix::process::nice(19)?;
    }
    let lines = (mib.parse::<usize>()? << 20) / 64;
    let mut memory = vec![[0u8; 64]; lines];
    println!("ready");
    let mut at = 1u64;
    loop {
        // Marsaglia's xorshift: no two lines in a row that a prefetcher could guess.
        at ^= at << 13;
        at ^= at >> 7;
        at ^= at << 17;
        let line = &mut memory[at as usize % lines];
        line[0] = line[0].wrapping_add(1);
        std::hint::black_box(line);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn lists_of_cpus() {
        assert_eq!(super::list("0,2-4\n"), [0, 2, 3, 4]);
        assert_eq!(super::list(""), [0usize; 0]);
    }
}
