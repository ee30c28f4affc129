//! The crates' own tests, the models of their memory orderings, and the proof that the leaves need no std.

use std::os::unix::fs::PermissionsExt;
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
        Case::new("workspace/release", &[], release),
        Case::new("workspace/adversary", &[], adversary),
        Case::new("workspace/loom", &[], loom),
        Case::new("workspace/tsan", &[], |ctx| sanitize(ctx, &THREAD)),
        Case::new("workspace/asan", &[], |ctx| sanitize(ctx, &ADDRESS)),
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
    // It was built with the umask of whoever built it.
    std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o755))?;
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

/// The fuzzers over calls, as programs are built that are used: there numbers wrap that panic in a debug build.
fn release(ctx: &Ctx) -> Result<Outcome> {
    let args = "test --release --package usernic --package usernic-ffi --test calls --test extremes --test fuzz";
    let args: Vec<&str> = args.split(' ').collect();
    let output = long(ctx, "cargo test --release (fuzzers over calls)", ctx.cargo(&args))?;
    match count(&output) {
        Some(n @ 1..) => Ok(Outcome::Passed(format!("{n} tests"))),
        _ => bail!("no fuzzer ran"),
    }
}

/// Hostile peers of the real programs. They are among the tests of the workspace, too.
fn adversary(ctx: &Ctx) -> Result<Outcome> {
    let args = ["test", "--package", "usernic-cli", "--test", "adversary"];
    let output = long(ctx, "cargo test (adversary)", ctx.cargo(&args))?;
    match count(&output) {
        Some(n @ 1..) => Ok(Outcome::Passed(format!("{n} attacks"))),
        _ => bail!("no attack ran"),
    }
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

/// What ThreadSanitizer cannot know, since the standard library is not instrumented: waiting inside of it, and fences.
const NOT_RACES: &str = "\
# Channels of the standard library, libtest's among them: the list of waiting threads is behind a lock of its own.
race:test::event::CompletedTest
race:std::sync::mpmc
# The end of a thread: its result, and its handle.
race:std::thread::lifecycle::Packet
race:std::thread::thread::Inner
# The last owner sees what the others did by a fence.
race:alloc::sync::Arc<*>::drop
race:alloc::sync::Arc<*> as core::ops::drop::Drop
";

/// What LeakSanitizer, which comes with AddressSanitizer, finds and is meant: libusernic forgets what a panic carries, since
/// dropping it may panic again.
const NO_LEAKS: &str = "leak:std::panicking::panic_handler\n";

/// A sanitizer of the compiler's, and the tests that run under it.
struct Sanitizer {
    name: &'static str,
    /// Of its runtime library.
    runtime: &'static str,
    /// Tests at a time.
    threads: &'static str,
    runs: &'static [Selection],
}

/// Tests of some packages: what chooses the binaries, and the tests in them; all, if nothing does.
struct Selection {
    packages: &'static [&'static str],
    which: &'static [&'static str],
    tests: &'static [&'static str],
}

/// Code that several threads are in at once without a lock. Of the standard library, which is not instrumented, it does not
/// see how a thread that had to wait for a Mutex got it: where threads wait for such, reports come and go with the machine's
/// load, so that tests of whole ports and switches are not among these. It does not know fences: what is published must be
/// in order by Release and Acquire alone. Nor does it know that two addresses are the same memory: the two sides of a port
/// map the rings each for itself, so between them it sees nothing; `virtio-ring`'s threads share one mapping.
const THREAD: Sanitizer = Sanitizer {
    name: "thread",
    runtime: "_rt.tsan.",
    // What tests share, such as a OnceLock, is published inside of the standard library.
    threads: "--test-threads=1",
    runs: &[
        Selection {
            packages: &["virtio-ring", "hugemem"],
            which: &["--test", "threads", "--test", "pool"],
            tests: &[],
        },
        Selection {
            packages: &["usernic"],
            which: &["--lib"],
            tests: &["gate::", "pool::", "notify::", "packet::tests::", "queue::tests::"],
        },
    ],
};

/// The crates that read what others wrote, and those with unsafe code.
const ADDRESS: Sanitizer = Sanitizer {
    name: "address",
    runtime: "_rt.asan.",
    threads: "--test-threads=2",
    runs: &[
        Selection {
            packages: &["virtio-ring", "vhost-proto", "ixgbevf", "hugemem", "iova"],
            which: &["--lib", "--tests", "--features", "iova/vfio"],
            tests: &[],
        },
        Selection {
            packages: &["usernic", "usernic-ffi"],
            which: &[
                "--lib",
                "--test",
                "hostile_*",
                "--test",
                "lengths",
                "--test",
                "extremes",
                "--test",
                "shared_descriptors",
                "--test",
                "api",
                "--test",
                "lent",
                "--test",
                "fuzz",
            ],
            tests: &[],
        },
    ],
};

/// For what is not ours: built for no other run, and short of time.
const DEPENDENCIES: [&str; 4] = [
    "--config",
    "profile.dev.package.\"*\".opt-level=0",
    "--config",
    "profile.dev.package.\"*\".debug=0",
];

/// Tests under a sanitizer. The standard library is the one that comes with the compiler, not instrumented.
fn sanitize(ctx: &Ctx, sanitizer: &Sanitizer) -> Result<Outcome> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let print = |what: &str| -> Result<String> {
        let output = Command::new(&rustc).args(["--print", what]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let name = sanitizer.name;
    let libraries = print("target-libdir")?;
    let runtime = std::fs::read_dir(&libraries)
        .with_context(|| libraries.clone())?
        .filter_map(Result::ok)
        .any(|file| file.file_name().to_string_lossy().contains(sanitizer.runtime));
    if !runtime {
        return Ok(Outcome::Skipped(format!(
            "no runtime of -Zsanitizer={name} among {libraries}"
        )));
    }
    let (races, leaks) = (ctx.dir.join("races"), ctx.dir.join("leaks"));
    std::fs::write(&races, NOT_RACES)?;
    std::fs::write(&leaks, NO_LEAKS)?;
    let host = print("host-tuple")?;
    let mut ran = 0;
    for Selection { packages, which, tests } in sanitizer.runs {
        let mut command = ctx.cargo(&["test", "--target", &host]);
        command.args(DEPENDENCIES);
        command.args(packages.iter().flat_map(|package| ["--package", package]));
        command
            .args(*which)
            .args(["--", "--nocapture", sanitizer.threads])
            .args(*tests);
        // The flags are not stable; what they do here has been the same for years.
        command.env("RUSTC_BOOTSTRAP", "1").env(
            "RUSTFLAGS",
            format!("-Zsanitizer={name} -Cunsafe-allow-abi-mismatch=sanitizer"),
        );
        command.env("TSAN_OPTIONS", format!("suppressions={}", races.display()));
        command.env("LSAN_OPTIONS", format!("suppressions={}", leaks.display()));
        // The SIGBUS guard's tests look what the default action does.
        command.env("ASAN_OPTIONS", "handle_sigbus=0");
        command.env("VIRTIO_RING_CHAINS", "20000").env("USERNIC_FUZZ", "10000");
        command.env("CARGO_TARGET_DIR", target_dir(ctx).join(name));
        let output = long(ctx, &format!("cargo test (-Zsanitizer={name})"), command)?;
        match count(&output) {
            Some(n @ 1..) => ran += n,
            _ => bail!("no tests of {} ran under -Zsanitizer={name}", packages.join(", ")),
        }
    }
    Ok(Outcome::Passed(format!("{ran} tests")))
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
