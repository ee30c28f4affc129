//! What a start may not do, whatever the machine: walk through what the kernel tells of each CPU. How many system calls it
//! makes, and its time, are for `cargo xtask bench`.

use anyhow::{Result, ensure};

use super::{Case, Ctx, Need, Outcome};
use crate::bench::cores;
use crate::bench::startup::Reflector;

pub fn cases() -> Vec<Case> {
    vec![Case::new("startup/no-walks", &[Need::Tool("strace")], no_walks)]
}

fn no_walks(ctx: &Ctx) -> Result<Outcome> {
    let files = Reflector::start(&ctx.dir, cores::two()?)?.files()?;
    ensure!(
        files.iter().any(|file| file.contains("/hugepages-2048kB/")),
        "strace did not see the start look for memory: {files:?}"
    );
    // One entry for each CPU, or for each node: what grows with the machine.
    let walks: Vec<_> = files
        .iter()
        .filter(|file| file.starts_with("/sys/devices/system/"))
        .collect();
    ensure!(walks.is_empty(), "the start looks at each CPU or node: {walks:?}");
    Ok(Outcome::Passed(format!("{} files are looked at", files.len())))
}
