//! The crates' own tests, the models of their memory orderings, and the proof that the leaves need no std.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Case, Ctx, Need, Outcome};
use crate::fuzz::{Fuzzer, TARGETS};
use crate::process::{Process, Surroundings};

/// Builds from an empty target directory on two cores, with room to spare.
const LIMIT: Duration = Duration::from_secs(1500);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("workspace/tests", &[], tests),
        Case::new("workspace/doc", &[], doc),
        Case::new("workspace/loom", &[], loom),
        Case::new("workspace/tsan", &[], tsan),
        Case::new("workspace/fuzz", &[Need::Tool("c++")], fuzz),
        Case::new("workspace/no-std-link", &[Need::Tool("gcc")], no_std_link),
    ]
}

fn long(ctx: &Ctx, name: &str, command: Command) -> Result<String> {
    let surroundings = Surroundings {
        no_stdin: true,
        echo: ctx.verbose,
        ..Default::default()
    };
    let mut process = Process::spawn(name, command, &surroundings)?;
    process.wait_success(LIMIT)?;
    Ok(process.output())
}

/// Where cargo puts what it builds.
fn target_dir(ctx: &Ctx) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| ctx.root.join("target"), PathBuf::from)
}

/// Builds the `usernic` program, unless one is given, and copies it to where every user can run it.
pub fn usernic(ctx: &Ctx, given: Option<&Path>) -> Result<PathBuf> {
    let program = match given {
        Some(program) => program.to_owned(),
        None => {
            long(
                ctx,
                "cargo build",
                ctx.cargo(&["build", "--release", "--package", "usernic-cli"]),
            )?;
            target_dir(ctx).join("release/usernic")
        }
    };
    let copy = ctx.scratch.subdir("bin")?.join("usernic");
    std::fs::copy(&program, &copy).with_context(|| program.display().to_string())?;
    Ok(copy)
}

fn tests(ctx: &Ctx) -> Result<Outcome> {
    let nextest = ctx
        .cargo(&["nextest", "--version"])
        .output()
        .is_ok_and(|o| o.status.success());
    let command = if nextest {
        let mut command = ctx.cargo(&["nextest", "run", "--workspace", "--color=never", "--no-fail-fast"]);
        // Tests that cannot run here say "SKIPPED name: reason" and pass: their output shows it.
        command.args([
            "--success-output=final",
            "--failure-output=final",
            "--status-level=fail",
        ]);
        command
    } else {
        let mut command = ctx.cargo(&["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"]);
        command.args(["--", "--nocapture", "--test-threads=2"]);
        command
    };
    let output = long(ctx, "cargo test", command)?;
    let ran = count(&output).context("no line of the output counts tests")?;
    if ran == 0 {
        bail!("no tests ran");
    }
    let mut parts = vec![("all".to_owned(), Outcome::Passed(format!("{ran} tests")))];
    parts.extend(
        skipped(&output)
            .into_iter()
            .map(|(name, reason)| (name, Outcome::Skipped(reason))),
    );
    Ok(Outcome::Parts(parts))
}

fn doc(ctx: &Ctx) -> Result<Outcome> {
    let output = long(ctx, "cargo test --doc", ctx.cargo(&["test", "--workspace", "--doc"]))?;
    Ok(Outcome::Passed(format!("{} examples", count(&output).unwrap_or(0))))
}

/// The models: package, the flag that they are behind, and the arguments that choose them.
const MODELS: [(&str, &str, &[&str]); 3] = [
    ("virtio-ring", "loom", &["--test", "loom"]),
    ("hugemem", "loom", &["--lib", "model"]),
    ("usernic", "loom_gate", &["--lib", "model"]),
];

/// Memory orderings under loom, in a target directory of their own: the flag would rebuild the rest.
fn loom(ctx: &Ctx) -> Result<Outcome> {
    let mut parts = Vec::new();
    for (package, flag, which) in MODELS {
        let mut command = ctx.cargo(&["test", "--release", "--package", package]);
        command.args(which).env("RUSTFLAGS", format!("--cfg {flag}"));
        command.env("CARGO_TARGET_DIR", target_dir(ctx).join(flag));
        // Models need optimised code, not whole-program optimisation.
        command
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        let output = long(ctx, &format!("cargo test (loom, {package})"), command)?;
        match count(&output) {
            Some(n @ 1..) => parts.push((package.to_owned(), Outcome::Passed(format!("{n} models")))),
            _ => bail!("{package} has no models under {}", which.join(" ")),
        }
    }
    Ok(Outcome::Parts(parts))
}

/// Races in libtest's own channel, which is in the std that is not instrumented.
const NOT_OURS: &str = "race:test::event::CompletedTest\n";

/// Both sides of a ring on two threads under ThreadSanitizer. It does not know fences: what is published must be in order
/// by Release and Acquire alone. The standard library is the one that comes with the compiler, not instrumented.
fn tsan(ctx: &Ctx) -> Result<Outcome> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let print = |what: &str| -> Result<String> {
        let output = Command::new(&rustc).args(["--print", what]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let libraries = print("target-libdir")?;
    let runtime = std::fs::read_dir(&libraries)
        .with_context(|| libraries.clone())?
        .filter_map(Result::ok)
        .any(|file| file.file_name().to_string_lossy().contains("_rt.tsan."));
    if !runtime {
        return Ok(Outcome::Skipped(format!("no ThreadSanitizer among {libraries}")));
    }
    let suppressions = ctx.dir.join("suppressions");
    std::fs::write(&suppressions, NOT_OURS)?;
    let host = print("host-tuple")?;
    let mut command = ctx.cargo(&[
        "test",
        "--package",
        "virtio-ring",
        "--test",
        "threads",
        "--target",
        &host,
    ]);
    command.args(["--", "--nocapture", "--test-threads=1"]);
    // The flags are not stable; what they do here has been the same for years.
    command
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer");
    command.env("TSAN_OPTIONS", format!("suppressions={}", suppressions.display()));
    command.env("VIRTIO_RING_CHAINS", "20000");
    command.env("CARGO_TARGET_DIR", target_dir(ctx).join("tsan"));
    let output = long(ctx, "cargo test (ThreadSanitizer)", command)?;
    match count(&output) {
        Some(n @ 1..) => Ok(Outcome::Passed(format!("{n} tests"))),
        _ => bail!("no tests ran under ThreadSanitizer"),
    }
}

/// Every fuzz target for a few seconds, from where the last run ended.
fn fuzz(ctx: &Ctx) -> Result<Outcome> {
    const SECONDS: u64 = 4;
    let fuzzer = Fuzzer::build(&ctx.root, &target_dir(ctx), ctx.verbose)?;
    let mut runs = 0;
    for target in TARGETS {
        runs += fuzzer.run(target, SECONDS)?.runs;
    }
    Ok(Outcome::Passed(format!("{} targets, {runs} inputs", TARGETS.len())))
}

/// A program without std, allocator or main, linked with all of the leaves and run.
fn no_std_link(ctx: &Ctx) -> Result<Outcome> {
    let dir = ctx.root.join("tests/nostd-link");
    let target = target_dir(ctx).join("nostd-link");
    let mut command = ctx.cargo(&["build", "--release", "--locked"]);
    command.current_dir(&dir).env("CARGO_TARGET_DIR", &target);
    command.env_remove("RUSTFLAGS");
    long(ctx, "cargo build (no_std)", command)?;
    let mut parts = Vec::new();
    for bin in ["freestanding", "with-libc"] {
        let program = target.join("x86_64-unknown-linux-gnu/release").join(bin);
        let size = std::fs::metadata(&program)?.len();
        super::process::run(bin, Command::new(&program), Duration::from_secs(10))
            .with_context(|| format!("{bin}: its exit status is the number of the check that failed"))?;
        parts.push((bin.to_owned(), Outcome::Passed(format!("{size} bytes"))));
    }
    Ok(Outcome::Parts(parts))
}

/// Tests that ran, by the summaries of nextest ("Summary [ 1.2s] 12 tests run: ...") or of libtest
/// ("test result: ok. 3 passed; ...").
fn count(output: &str) -> Option<usize> {
    let mut sum = None;
    for line in output.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = if line.trim_start().starts_with("Summary") {
            words
                .iter()
                .position(|w| w.starts_with("test"))
                .and_then(|at| words[at - 1].parse::<usize>().ok())
        } else if line.starts_with("test result:") {
            words
                .iter()
                .position(|w| w.starts_with("passed"))
                .and_then(|at| words[at - 1].parse::<usize>().ok())
        } else {
            None
        };
        if let Some(number) = number {
            sum = Some(sum.unwrap_or(0) + number);
        }
    }
    sum
}

/// Lines "SKIPPED name: reason" that tests wrote, each once.
fn skipped(output: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = output
        .lines()
        .filter_map(|l| l.trim_start().strip_prefix("SKIPPED "))
        .filter_map(|l| l.split_once(": "))
        .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
        .collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_counted() {
        assert_eq!(
            count("     Summary [   1.003s] 12 tests run: 12 passed, 0 skipped"),
            Some(12)
        );
        assert_eq!(
            count("     Summary [   1.003s] 1 test run: 1 passed, 0 skipped"),
            Some(1)
        );
        let libtest = "test result: ok. 3 passed; 0 failed; 0 ignored\nx\ntest result: ok. 4 passed; 0 failed";
        assert_eq!(count(libtest), Some(7));
        assert_eq!(count("nothing"), None);
    }

    #[test]
    fn skips_inside_tests_are_seen() {
        let output = "  SKIPPED a_test: no hugepages\nSKIPPED a_test: no hugepages\nnot SKIPPED b: x\n";
        assert_eq!(skipped(output), vec![("a_test".to_owned(), "no hugepages".to_owned())]);
    }
}
