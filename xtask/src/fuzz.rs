//! `cargo xtask fuzz`: the targets of `fuzz/`, guided by coverage, for a bounded time.
//!
//! libFuzzer comes with its crate. What it needs of the compiler are LLVM's coverage callbacks, which are stable options;
//! AddressSanitizer is not, and is used where the toolchain has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{Process, Surroundings};

/// The targets, as `fuzz/Cargo.toml` has them.
pub const TARGETS: [&str; 6] = ["messages", "device", "driver", "control", "headers", "specs"];

/// Coverage: counters and comparisons, for libFuzzer to find its way by.
const COVERAGE: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// For a build, on cores that others use.
const BUILD: Duration = Duration::from_secs(900);

/// Where the built targets are, and what they found.
pub struct Fuzzer {
    root: PathBuf,
    home: PathBuf,
    programs: PathBuf,
    echo: bool,
}

/// What a run says of itself.
pub struct Found {
    /// Inputs that were tried.
    pub runs: u64,
    /// Places in the code that they reached.
    pub reached: u64,
}

impl Fuzzer {
    /// Builds all targets. `target` is where cargo puts what it builds.
    pub fn build(root: &Path, target: &Path, echo: bool) -> Result<Self> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let print = |what: &str| -> Result<String> {
            let output = Command::new(&rustc).args(["--print", what]).output()?;
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let (host, libraries) = (print("host-tuple")?, print("target-libdir")?);
        let sanitizer = fs::read_dir(&libraries)
            .with_context(|| libraries.clone())?
            .filter_map(Result::ok)
            .any(|file| file.file_name().to_string_lossy().contains("_rt.asan."));
        let home = target.join("fuzz");
        let mut flags = COVERAGE.map(str::to_owned).to_vec();
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .current_dir(root)
            .args(["build", "--release", "--locked", "--target", &host]);
        command.args(["--manifest-path", "fuzz/Cargo.toml"]);
        if sanitizer {
            // The flag is not stable; what it does here has been the same for years.
            flags.push("-Zsanitizer=address".to_owned());
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command.env("RUSTFLAGS", flags.join(" ")).env("CARGO_TARGET_DIR", &home);
        command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        let surroundings = Surroundings {
            no_stdin: true,
            echo,
            ..Default::default()
        };
        Process::spawn("cargo build (fuzz)", command, &surroundings)?.wait_success(BUILD)?;
        Ok(Fuzzer {
            root: root.to_owned(),
            programs: home.join(host).join("release"),
            home,
            echo,
        })
    }

    /// Runs a target for so many seconds; what it learns is kept for the next time. An input that fails is an error that
    /// names its file.
    pub fn run(&self, target: &str, seconds: u64) -> Result<Found> {
        let (corpus, failures) = (
            self.home.join("corpus").join(target),
            self.home.join("failures").join(target),
        );
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&failures)?;
        let mut command = Command::new(self.programs.join(target));
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-artifact_prefix={}/", failures.display()));
        command.args([
            "-timeout=100",
            "-rss_limit_mb=2048",
            "-max_len=4096",
            "-print_final_stats=1",
        ]);
        command.arg(&corpus).arg(self.root.join("fuzz/seeds").join(target));
        let surroundings = Surroundings {
            no_stdin: true,
            echo: self.echo,
            ..Default::default()
        };
        let mut process = Process::spawn(target, command, &surroundings)?;
        process.wait_success(Duration::from_secs(seconds + 120))?;
        let output = process.output();
        let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u64>().ok());
        let runs = output
            .lines()
            .find_map(|line| number(line.strip_prefix("stat::number_of_executed_units:")));
        let reached = output
            .lines()
            .rev()
            .find_map(|line| number(line.split_once(" cov: ")?.1.split_whitespace().next()));
        let (Some(runs), Some(reached)) = (runs, reached) else {
            bail!("{target} says nothing of runs and coverage:\n{output}");
        };
        // What is not instrumented is not guided.
        ensure!(reached > 50, "{target} reached {reached} places only");
        Ok(Found { runs, reached })
    }
}

/// Fuzzes `targets`, all if there are none, for so many seconds each.
pub fn command(root: &Path, targets: &[String], seconds: u64) -> Result<bool> {
    if let Some(unknown) = targets.iter().find(|name| !TARGETS.contains(&name.as_str())) {
        bail!("no fuzz target {unknown:?}: there are {}", TARGETS.join(", "));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let fuzzer = Fuzzer::build(root, &target, true)?;
    for name in TARGETS {
        if targets.is_empty() || targets.iter().any(|target| target == name) {
            let found = fuzzer.run(name, seconds)?;
            println!("{name}: {} inputs, {} places reached", found.runs, found.reached);
        }
    }
    Ok(true)
}
