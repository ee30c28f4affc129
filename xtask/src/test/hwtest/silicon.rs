//! The same cases on silicon: a function that vfio-pci has, and an interface of the kernel's that its frames reach.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use hwtest::CASES;

use crate::process::{self, Process, Surroundings};

const BUILD: Duration = Duration::from_secs(900);

/// For a case.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the cases on the function `vf`, with the kernel's interface `peer` on the other side; whether none failed.
pub fn command(root: &Path, vf: &str, peer: Option<&str>, filter: &[String]) -> Result<bool> {
    ensure!(
        Path::new("/sys/bus/pci/devices").join(vf).exists(),
        "there is no PCI device {vf}: `usernic devices --all` lists those that there are"
    );
    if let Some(peer) = peer {
        ensure!(
            Path::new("/sys/class/net").join(peer).exists(),
            "there is no interface {peer}: name the kernel's interface that frames of {vf} reach"
        );
    }
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--release", "--locked", "--package", "hwtest"]);
    build.current_dir(root);
    process::run("cargo build", build, BUILD)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let program = target.join("release/hwtest");
    let mut counts = [0; 3];
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    for case in CASES.iter().filter(|case| wanted(case.name)) {
        process::check_interrupted()?;
        let name = case.name;
        let skip = match (case.model, case.peer && peer.is_none()) {
            (true, _) => Some("it needs what only the model does: a link or a PF that goes down when asked"),
            (_, true) => Some("it needs a second port: --peer INTERFACE"),
            _ => None,
        };
        if let Some(reason) = skip {
            println!("SKIPPED {name}: {reason}");
            counts[2] += 1;
            continue;
        }
        let mut run = Command::new(&program);
        run.args(["--vf", vf, name]);
        if let Some(peer) = peer {
            run.args(["--peer", peer]);
        }
        let start = Instant::now();
        let mut process = Process::spawn(name, run, &Surroundings::default())?;
        let passed = process.wait(LIMIT)?.success();
        let time = start.elapsed().as_secs_f64();
        let output = process.output();
        let word = if passed { "PASSED" } else { "FAILED" };
        println!("{word} {name} ({time:.1} s): {}", output.trim());
        counts[usize::from(!passed)] += 1;
    }
    let [passed, failed, skipped] = counts;
    if passed + failed + skipped == 0 {
        bail!("no case has a name with {} in it", filter.join(" or "));
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}
