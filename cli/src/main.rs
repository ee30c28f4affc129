//! `usernic`: what operators type.
//!
//! Each command is a module below [`cmd`], the demo below [`demo`]; both are thin over the `usernic` library. A command
//! ends with totals, whether its work is done or a signal ended it; with `--json` they are one JSON object on the
//! standard output. Exit status: 0 done, 1 failed, 2 used wrongly.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[cfg(test)]
mod any_input;
mod capture_file;
mod cmd;
mod cni;
mod common;
mod control;
mod demo;
mod descriptors;
mod metrics;
mod output;
mod packets;
mod ports;
mod responder;
mod sample;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// User-space network ports for containers: a demo, a switch and the tools around them.
#[derive(Parser)]
#[command(name = "usernic", version, about, arg_required_else_help = true)]
struct Cli {
    /// Say more: -v information, -vv debugging (or set USERNIC_LOG)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Print one JSON object on the standard output at the end
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Two isolated containers, our switch, a capture byte for byte, and a measurement beside the kernel's veth
    Demo(demo::Args),
    /// Switch frames between vhost-user ports
    Switch(cmd::switch::Args),
    /// Send UDP frames as fast as wanted
    Generate(cmd::generate::Args),
    /// Write received frames to a capture file
    Capture(cmd::capture::Args),
    /// Send the frames of a capture file
    Replay(cmd::replay::Args),
    /// Send received frames on, or answer them
    Forward(cmd::forward::Args),
    /// Ask a host for echoes, resolving its address first
    Ping(cmd::ping::Args),
    /// Show the counters of a running usernic program
    Stats(cmd::stats::Args),
    /// The CNI plugin: what a container runtime calls, also by the name usernic-cni
    Cni,
    /// List virtual functions, their ports, and what is missing to use them
    Devices(cmd::devices::Args),
    /// Make, unmake and configure virtual functions
    Vf(cmd::vf::Args),
    /// Give devices to vfio-pci, for a container to drive
    Bind(cmd::bind::Args),
    /// Give devices back to the kernel's drivers
    Unbind(cmd::bind::UnbindArgs),
    /// Is this machine, or this container, fit for a port? Each fault with what mends it
    Doctor(cmd::doctor::Args),
    /// Give polling threads a part of the last-level cache of their own
    Cat(cmd::cat::Args),
    /// The least that a container must be given for its ports: OCI, podman, docker, Kubernetes, CDI
    Container(cmd::container::Args),
    /// Write the capture that ships with the program
    #[command(hide = true)]
    Sample {
        /// The file; - is the standard output
        out: PathBuf,
    },
    /// What the demo runs in a container
    #[command(hide = true, name = "demo-container")]
    DemoContainer(demo::ContainerArgs),
}

fn main() -> ExitCode {
    descriptors::raise();
    // Runtimes call plugins by the name of the file.
    let called = std::env::args_os().next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == "usernic-cni") {
        return cni::main_by_name();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and the version are results; an error's text is not.
        Err(answer) => {
            let written = answer.print().and_then(|()| output::check());
            return ExitCode::from(if answer.use_stderr() {
                2
            } else {
                u8::from(written.is_err())
            });
        }
    };
    if matches!(cli.command, Command::Cni) {
        return cni::main();
    }
    let level = ["warn", "info", "debug"][usize::from(cli.verbose.min(2))];
    let filter = EnvFilter::try_from_env("USERNIC_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| output::Log)
        .log_internal_errors(false)
        .with_target(false)
        .without_time()
        .with_ansi(output::has_escapes(&std::io::stderr()))
        .init();
    // Without it the other side of a port could end this program by truncating a file.
    if let Err(error) = usernic::install_sigbus_guard() {
        tracing::warn!("no guard against truncated memory: {error}");
    }
    let result = match cli.command {
        Command::Demo(args) => demo::run(args, cli.json),
        Command::Switch(args) => cmd::switch::run(args, cli.json),
        Command::Generate(args) => cmd::generate::run(args, cli.json),
        Command::Capture(args) => cmd::capture::run(args, cli.json),
        Command::Replay(args) => cmd::replay::run(args, cli.json),
        Command::Forward(args) => cmd::forward::run(args, cli.json),
        Command::Ping(args) => cmd::ping::run(args, cli.json),
        Command::Stats(args) => cmd::stats::run(args, cli.json),
        Command::Cni => unreachable!("answered above"),
        Command::Devices(args) => cmd::devices::run(args, cli.json),
        Command::Vf(args) => cmd::vf::run(args, cli.json),
        Command::Bind(args) => cmd::bind::run(args, cli.json),
        Command::Unbind(args) => cmd::bind::run_unbind(args, cli.json),
        Command::Doctor(args) => cmd::doctor::run(args, cli.json),
        Command::Cat(args) => cmd::cat::run(args, cli.json),
        Command::Container(args) => cmd::container::run(args, cli.json),
        Command::Sample { out } => sample::write(&out),
        Command::DemoContainer(args) => demo::container_main(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<common::Failed>() || output::Lost::quietly(&error) => ExitCode::FAILURE,
        Err(error) => {
            let usage = error.is::<common::Usage>();
            let message = common::describe(&error);
            crate::note!("usernic: {message}");
            if cli.json {
                // The status says that it failed, whether this can be written or not.
                let _ = crate::result!("{}", serde_json::json!({ "error": message }));
            }
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
