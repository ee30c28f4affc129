//! `usernic vf`: virtual functions of a port, and what the port allows them.

mod link;

use std::io::Write;

use anyhow::{Context, Result, bail};
use usernic::pci::{self, Function};
use usernic::vfio::Host;

use crate::common::{HostArgs, Usage};
use crate::packets::{Mac, parse_mac};
use link::{Change, LinkState};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Have a port make virtual functions
    Create {
        /// The port: PCI address or network interface
        port: String,
        /// How many
        count: u16,
        #[command(flatten)]
        host: HostArgs,
    },
    /// Have a port unmake all of its virtual functions
    Destroy {
        /// The port: PCI address or network interface
        port: String,
        /// Also those that a default route, a bond or a bridge needs
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        host: HostArgs,
    },
    /// Change what a virtual function may do
    Set(SetArgs),
}

#[derive(clap::Args)]
struct SetArgs {
    /// The virtual function's PCI address
    vf: String,
    /// Its Ethernet address
    #[arg(long, value_parser = parse_mac)]
    mac: Option<Mac>,
    /// The VLAN that it is in, 1 to 4094, without seeing its tag; 0 for none
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=4094))]
    vlan: Option<u32>,
    /// The priority in that tag, 0 to 7
    #[arg(long, requires = "vlan", value_parser = clap::value_parser!(u32).range(0..=7))]
    priority: Option<u32>,
    /// Whether it may change its address and hear all multicasts
    #[arg(long, value_name = "on|off", value_parser = on_off)]
    trust: Option<bool>,
    /// Whether frames from other addresses than its own are dropped
    #[arg(long, value_name = "on|off", value_parser = on_off)]
    spoof_check: Option<bool>,
    /// At most so many Mb/s sent; 0 for no limit
    #[arg(long, value_name = "MBPS")]
    rate: Option<u32>,
    /// Its link: as the port's, or always up or down
    #[arg(long, value_enum)]
    link: Option<LinkState>,
    #[command(flatten)]
    host: HostArgs,
}

fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".into()),
    }
}

/// Does it.
pub fn run(args: Args, json: bool) -> Result<()> {
    match args.command {
        Command::Create { port, count, host } => {
            let host = host.host();
            let port = Function::named(&host, &port)?.address;
            let made = pci::create_vfs(&host, port, count)?;
            let text = format!("{port} made {}; usernic bind gives one to vfio-pci", names(&made));
            print(
                "usernic.vf.create/1",
                serde_json::json!({ "port": port, "vfs": made }),
                &text,
                json,
            )
        }
        Command::Destroy { port, force, host } => {
            let host = host.host();
            let port = Function::named(&host, &port)?.address;
            let gone = pci::destroy_vfs(&host, port, force)?;
            let text = format!("{port} unmade {}", names(&gone));
            print(
                "usernic.vf.destroy/1",
                serde_json::json!({ "port": port, "vfs": gone }),
                &text,
                json,
            )
        }
        Command::Set(args) => set(&args, json),
    }
}

fn names(addresses: &[pci::Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn print(schema: &str, mut report: serde_json::Value, text: &str, json: bool) -> Result<()> {
    let mut out = crate::output::stdout();
    if json {
        report["schema"] = schema.into();
        writeln!(out, "{report}")?;
    } else {
        writeln!(out, "{text}")?;
    }
    Ok(())
}

/// What is to be changed, in the order in which it is done.
fn changes(args: &SetArgs) -> Result<Vec<Change>> {
    if let Some(mac) = args.mac
        && (mac[0] & 1 != 0 || mac == [0; 6])
    {
        return Err(Usage("--mac: a station's own address has an even first byte and is not all zero".into()).into());
    }
    let vlan = |id| Change::Vlan {
        id,
        priority: args.priority.unwrap_or(0),
    };
    let all = [
        args.mac.map(Change::Mac),
        args.vlan.map(vlan),
        args.trust.map(Change::Trust),
        args.spoof_check.map(Change::SpoofCheck),
        args.rate.map(Change::Rate),
        args.link.map(Change::Link),
    ];
    let all: Vec<_> = all.into_iter().flatten().collect();
    if all.is_empty() {
        let options = "--mac, --vlan, --trust, --spoof-check, --rate or --link";
        return Err(Usage(format!("nothing to set: give {options}")).into());
    }
    Ok(all)
}

/// A virtual function as its port counts it.
struct Place {
    /// The port's interface.
    interface: String,
    /// The interface's number.
    index: u32,
    /// The virtual function's number.
    number: u32,
}

fn place(host: &Host, name: &str) -> Result<Place> {
    let function = Function::named(host, name)?;
    let Some(port) = function.physical else {
        bail!(
            "{} is no virtual function: `usernic devices` lists those that there are",
            function.address
        );
    };
    let port = Function::read(host, port)?;
    let Some(interface) = port.interfaces.first().cloned() else {
        bail!(
            "the port {} has no network interface in this namespace (its driver: {}): run this where it is",
            port.address,
            port.driver.as_deref().unwrap_or("none")
        );
    };
    let number = port.virtuals.iter().position(|a| *a == function.address);
    let index = host.read(format!("sys/class/net/{interface}/ifindex")).ok();
    Ok(Place {
        number: number.context("the port does not list this virtual function: has it gone just now?")? as u32,
        index: index
            .and_then(|text| text.trim().parse().ok())
            .with_context(|| format!("sysfs does not tell the number of {interface}"))?,
        interface,
    })
}

fn set(args: &SetArgs, json: bool) -> Result<()> {
    let changes = changes(args)?;
    let place = place(&args.host.host(), &args.vf)?;
    let mut socket = link::Socket::open().context("cannot open a netlink socket")?;
    let mut done = Vec::new();
    // One by one: an answer then belongs to one change.
    for change in &changes {
        if let Err(error) = socket.set(place.index, place.number, change) {
            let before = match done.as_slice() {
                [] => "nothing was changed".to_owned(),
                done => format!("{} is set already", done.join(", ")),
            };
            bail!(
                "virtual function {} of {}: {change} is refused: {error}{}; {before}",
                place.number,
                place.interface,
                link::advice(&error)
            );
        }
        done.push(change.to_string());
    }
    let text = format!(
        "virtual function {} of {}: {}",
        place.number,
        place.interface,
        done.join(", ")
    );
    let report = serde_json::json!({ "port": place.interface, "number": place.number, "set": done });
    print("usernic.vf.set/1", report, &text, json)
}
