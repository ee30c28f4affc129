//! Developer commands: `cargo xtask peers`, `cargo xtask test`, `cargo xtask bench`, `cargo xtask evaluate`,
//! `cargo xtask install-c`, `cargo xtask plugin`.

mod bench;
mod fuzz;
mod install_c;
mod machine;
mod pcap;
mod peers;
mod plugin;
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
        /// full: also make a kernel with iommufd for the guest, in some minutes
        #[arg(long, value_name = "KIND", value_parser = ["stock", "full"], default_value = "stock")]
        kernel: String,
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
        /// Rounds of the reliability cases: how often a peer is killed, and such
        #[arg(long, value_name = "N")]
        rounds: Option<usize>,
        /// Run only cases with one of these in their name
        filter: Vec<String>,
    },
    /// Drive virtual functions: those of the model in a guest, or, with --vf, silicon
    Hwtest {
        /// A function that vfio-pci has (`usernic bind`): its PCI address
        #[arg(long, value_name = "ADDRESS")]
        vf: Option<String>,
        /// full: on a kernel with iommufd and noiommu, which is made first, in some minutes
        #[arg(long, value_name = "KIND", value_parser = ["stock", "full"], default_value = "stock")]
        kernel: String,
        /// The kernel's interface that the function's frames reach; without it most cases are skipped
        #[arg(long, value_name = "INTERFACE", requires = "vf")]
        peer: Option<String>,
        /// A skip is a failure
        #[arg(long, conflicts_with = "vf")]
        require_all: bool,
        /// Print the names and end
        #[arg(long)]
        list: bool,
        /// Show what long commands print
        #[arg(long, short)]
        verbose: bool,
        /// Run only cases with one of these in their name
        filter: Vec<String>,
    },
    /// Compare with DPDK and with the kernel, side by side in one run
    Bench {
        /// Write the results here, too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Keep what the file of --json has: measure what has no result there yet, or, with --metric, these anew
        #[arg(long, requires = "json")]
        resume: bool,
        /// Few and short windows: to see whether it works
        #[arg(long)]
        quick: bool,
        /// Only these metrics; * stands for anything, as in virtio_user.*
        #[arg(long, value_name = "GLOB")]
        metric: Vec<String>,
        /// DPDK's own pair alone, and the bare ring
        #[arg(long, conflicts_with_all = ["metric", "scale"])]
        baseline: bool,
        /// Ours alone, over sizes of rings, bursts and frames, and numbers of queues
        #[arg(long, conflicts_with = "metric")]
        scale: bool,
        /// Measure nothing: draw these results into docs/charts/, and link the charts in docs/performance.md
        #[arg(long, value_name = "JSON", num_args = 1.., conflicts_with_all = ["json", "quick", "metric", "baseline", "scale"])]
        charts: Vec<PathBuf>,
    },
    /// Feed what parses and indexes with inputs that coverage guides: see fuzz/README.md
    Fuzz {
        /// For each target
        #[arg(long, value_name = "N", default_value = "60")]
        seconds: u64,
        /// Only these targets
        target: Vec<String>,
    },
    /// Redraw the talk's evaluation: throughput, latency and jitter of the kernel's veth, ours and DPDK, with and without a noisy neighbour
    Evaluate {
        /// Where the JSON and the charts go
        #[arg(long, value_name = "DIR", default_value = "target/evaluate")]
        out: PathBuf,
        /// Few and short windows: to see whether it works
        #[arg(long)]
        quick: bool,
    },
    /// Build and install the C library: header, shared and static library, pkg-config file
    InstallC {
        /// Where it will be used from
        #[arg(long, value_name = "DIR", default_value = "/usr/local")]
        prefix: PathBuf,
        /// Where libraries go, below the prefix
        #[arg(long, value_name = "DIR", default_value = "lib")]
        libdir: PathBuf,
        /// Put everything below this, for packages
        #[arg(long, value_name = "DIR")]
        destdir: Option<PathBuf>,
    },
    /// Build librte_net_usernic.so, the poll-mode driver for DPDK applications
    Plugin {
        /// Where it goes; target/plugin by itself
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// A DPDK that was installed with enable_driver_sdk, instead of this system's
        #[arg(long, value_name = "PREFIX")]
        dpdk: Option<PathBuf>,
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
        What::Peers { check, kernel } => peers::command(root, check, kernel == "full"),
        What::Test {
            require_all,
            list,
            verbose,
            usernic,
            rounds,
            filter,
        } => test::command(
            root,
            &test::Options {
                suite: "",
                full: false,
                require_all,
                list,
                filter,
                verbose,
                rounds,
                usernic,
            },
        ),
        What::Hwtest {
            vf: Some(vf),
            peer,
            filter,
            ..
        } => test::silicon(root, &vf, peer.as_deref(), &filter),
        What::Hwtest {
            list,
            verbose,
            filter,
            kernel,
            require_all,
            ..
        } => test::command(
            root,
            &test::Options {
                // Those of the full kernel are a list of their own.
                suite: if kernel == "full" { "" } else { "hwtest/" },
                full: kernel == "full" && {
                    if !list {
                        machine::full::make(&machine::fetch()?.guest)?;
                    }
                    true
                },
                require_all,
                list,
                filter,
                verbose,
                rounds: None,
                usernic: None,
            },
        ),
        What::Bench {
            json,
            resume,
            quick,
            metric,
            baseline,
            scale,
            charts,
        } => bench::command(
            root,
            &bench::Options {
                json,
                resume,
                quick,
                metric,
                baseline,
                scale,
                charts,
            },
        ),
        What::Fuzz { seconds, target } => fuzz::command(root, &target, seconds),
        What::Evaluate { out, quick } => bench::evaluate::command(root, &root.join(out), quick),
        What::InstallC {
            prefix,
            libdir,
            destdir,
        } => {
            let layout = install_c::Layout {
                prefix,
                libdir,
                destdir,
            };
            install_c::install(root, &layout, true).map(|()| true)
        }
        What::Plugin { out, dpdk } => {
            let out = out.unwrap_or_else(|| plugin::default_out(root));
            plugin::command(root, &out, dpdk.as_deref())
        }
        What::Sentinel { .. } | What::BenchWorker { .. } => unreachable!("handled above"),
    }
}
