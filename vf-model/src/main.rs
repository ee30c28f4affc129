//! `vf-model`: virtual functions in software, for QEMU to attach.

use std::io::Read as _;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use vf_model::server::{Machine, serve_control};
use vf_model::{Kind, Settings};

/// Virtual functions of an 82599, X540 or X550 in software, one a socket, for QEMU's vfio-user-pci. A switch joins them.
#[derive(Parser)]
#[command(name = "vf-model")]
struct Arguments {
    /// A VF at this socket; again for more
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
    /// The chip: 82599, x540 or x550
    #[arg(long, default_value_t = Kind::I82599)]
    kind: Kind,
    /// Queue pairs of each VF: 1, 2, 4 or 8
    #[arg(long, default_value_t = 2)]
    queues: usize,
    /// Commands of the administrator at this socket, one a line; `help` lists them
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Reads that device and PF take to do what they are asked for
    #[arg(long, default_value_t = 1)]
    latency: u32,
    /// Frames wait for descriptors even where the driver says to drop them
    #[arg(long)]
    hold: bool,
    /// End when standard input ends
    #[arg(long)]
    exit_with_stdin: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.sockets.len() <= 63, "at most 63 sockets");
    ensure!([1, 2, 4, 8].contains(&arguments.queues), "--queues is 1, 2, 4 or 8");
    let machine = Machine::new(Settings {
        kind: arguments.kind,
        vfs: arguments.sockets.len(),
        queues: arguments.queues,
        latency: arguments.latency,
        hold: arguments.hold,
    })?;
    for (vf, path) in arguments.sockets.iter().enumerate() {
        machine.serve(vf, path)?;
    }
    if let Some(path) = &arguments.control {
        serve_control(&machine, path)?;
    }
    println!("ready");
    if arguments.exit_with_stdin {
        std::io::stdin().lock().read_to_end(&mut Vec::new())?;
        for path in arguments.sockets.iter().chain(&arguments.control) {
            // Another may have taken it away already.
            let _ = std::fs::remove_file(path);
        }
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}
