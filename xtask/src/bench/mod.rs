//! `cargo xtask bench`.

mod cores;
mod dpdk;
mod load;
mod stats;
mod windows;

use std::time::Duration;
use anyhow::{Context as _, Result};
use crate::peers::Found;
use crate::scratch::Scratch;
use load::Load;
use windows::{Plan, alone};

pub fn baseline(root: &std::path::Path) -> Result<bool> {
    let cpus = cores::two()?;
    let scratch = Scratch::new(256)?;
    let found = Found::search(root);
    let testpmd = found.testpmd.as_ref().context("dpdk-testpmd is missing: cargo xtask peers")?;
    let huge = |n: &str| -> Result<_> { if scratch.pages() > 0 { scratch.subdir(n).map(Some) } else { Ok(None) } };
    let ms = Duration::from_millis;
    let plan = Plan { cpus, settle: ms(60), window: ms(300), pairs: 9, tries: 30, limit: ms(60_000) };
    for bytes in [64, 1518] {
        println!("limit.spsc {bytes} {:.1} {:?}", cores::spsc(cpus, bytes, ms(300))?, cores::probe(cpus, ms(4))?);
    }
    let mut pair = dpdk::Pair::start(testpmd, "d", (
        dpdk::Place { dir: scratch.dir().into(), huge: huge("hf")?, cpus: (cpus.1, cpus.0) },
        dpdk::Place { dir: scratch.dir().into(), huge: huge("hb")?, cpus },
    ), 1024)?;
    for size in [64, 1518] {
        for load in Load::ALL {
            pair.prepare(load, size)?;
            println!("{} {size} {:?}", load.name(), alone(&plan, &mut pair));
        }
    }
    Ok(true)
}
