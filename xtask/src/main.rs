//! Developer commands: `cargo xtask peers`, `cargo xtask test`, `cargo xtask bench`.

mod bench;
mod pcap;
mod peers;
mod process;
mod scratch;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Developer commands of usernic",
    bin_name = "cargo xtask"
)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Get the programs that tests and benches compare with (DPDK, OVS) from this system's package manager
    Peers {
        /// Only look: exit status 1 if something is missing
        #[arg(long)]
        check: bool,
    },
    /// Run everything that passes on this machine: the crates' tests, and each part against its peers
    Test {
        /// A skip is a failure
        #[arg(long)]
        require_all: bool,
        /// Print the names and end
        #[arg(long)]
        list: bool,
        /// Show what long commands print
        #[arg(long, short)]
        verbose: bool,
        /// Test this `usernic` program instead of building one
        #[arg(long, value_name = "FILE")]
        usernic: Option<PathBuf>,
        /// Run only cases with one of these in their name
        filter: Vec<String>,
    },
    /// Compare with DPDK and with the kernel, side by side in one run
    Bench {
        /// Write the results here, too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Few and short windows: to see whether it works
        #[arg(long)]
        quick: bool,
        /// Only these metrics; * stands for anything, as in virtio_user.*
        #[arg(long, value_name = "GLOB")]
        metric: Vec<String>,
        /// DPDK's own pair alone, and the bare ring
        #[arg(long)]
        baseline: bool,
    },
    /// The programs that a bench measures
    #[command(hide = true)]
    BenchWorker {
        #[command(subcommand)]
        mode: bench::WorkerMode,
    },
    /// Keeps a run's hugepages and directory, and gives them back when the run ends
    #[command(hide = true)]
    Sentinel {
        #[arg(long)]
        pages: usize,
        #[arg(long)]
        remove: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<bool> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask lies in the workspace")?;
    if let What::Sentinel { pages, remove } = &what {
        return scratch::sentinel(*pages, remove).map(|()| true);
    }
    if let What::BenchWorker { mode } = &what {
        return bench::worker_main(mode).map(|()| true);
    }
    process::handle_signals()?;
    match what {
        What::Peers { check } => peers::command(root, check),
        What::Test {
            require_all,
            list,
            verbose,
            usernic,
            filter,
        } => test::command(
            root,
            &test::Options {
                require_all,
                list,
                filter,
                verbose,
                usernic,
            },
        ),
        What::Bench {
            json,
            quick,
            metric,
            baseline,
        } => bench::command(
            root,
            &bench::Options {
                json,
                quick,
                metric,
                baseline,
            },
        ),
        What::Sentinel { .. } | What::BenchWorker { .. } => unreachable!("handled above"),
    }
}
