//! The program that a guest, or a machine with the silicon, runs: one case, or a look at an error.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use hwtest::{CASES, Peer, World};

/// Runs one case on a virtual function.
#[derive(Parser)]
struct Arguments {
    /// The function's PCI address; vfio-pci has it
    #[arg(long)]
    vf: String,
    /// What port specs have more: interface=container
    #[arg(long, default_value = "")]
    keys: String,
    /// The kernel's interface on the other side
    #[arg(long)]
    peer: Option<String>,
    /// Become this user, without capabilities, once the peer's socket is open
    #[arg(long)]
    user: Option<u32>,
    /// The case
    case: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<String> {
    let case = CASES.iter().find(|case| case.name == arguments.case);
    let case = case.with_context(|| format!("there is no case {}", arguments.case))?;
    let open = |name: &String| Peer::open(name);
    let peer = arguments.peer.as_ref().map(open).transpose()?;
    let tagged = arguments.peer.as_ref().map(|name| format!("{name}.100"));
    let there = tagged.filter(|name| std::path::Path::new(&format!("/sys/class/net/{name}")).exists());
    let world = World {
        vf: arguments.vf.clone(),
        keys: Some(&arguments.keys)
            .filter(|keys| !keys.is_empty())
            .map_or_else(String::new, |keys| format!(",{keys}")),
        peer,
        tagged: there.as_ref().map(open).transpose()?,
    };
    if let Some(user) = arguments.user {
        become_nobody(user)?;
    }
    (case.run)(&world)
}

/// No other groups, no capability, no way to get one.
fn become_nobody(user: u32) -> Result<()> {
    // SAFETY: system calls that take numbers, and one that takes no list.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(user, user, user) == 0
            && libc::setresuid(user, user, user) == 0
    };
    ensure!(done, "becoming user {user}: {}", std::io::Error::last_os_error());
    let status = std::fs::read_to_string("/proc/self/status")?;
    for set in ["CapPrm:\t", "CapEff:\t"] {
        let value = status.lines().find_map(|line| line.strip_prefix(set));
        ensure!(value == Some("0000000000000000"), "user {user} has {set}{value:?}");
    }
    Ok(())
}
