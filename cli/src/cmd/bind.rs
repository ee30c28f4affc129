//! `usernic bind` and `usernic unbind`: a function to vfio-pci, and back to the kernel.

use std::io::Write;

use anyhow::Result;
use usernic::pci::{self, Address, BindOptions, Bound, Function};
use usernic::vfio::{Host, NOIOMMU_WARNING};

use crate::common::HostArgs;

/// Arguments of `bind`.
#[derive(clap::Args)]
pub struct Args {
    /// The functions: PCI addresses or network interfaces
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<String>,
    /// The driver that gets them
    #[arg(long, value_name = "NAME", default_value = "vfio-pci")]
    driver: String,
    /// Bind the other devices of their IOMMU groups, too
    #[arg(long)]
    group: bool,
    /// Bind also what a default route, a bond or a bridge needs
    #[arg(long)]
    force: bool,
    /// Bind without an IOMMU: whoever gets the device owns this machine
    #[arg(long)]
    noiommu: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Arguments of `unbind`.
#[derive(clap::Args)]
pub struct UnbindArgs {
    /// The functions: PCI addresses
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<String>,
    #[command(flatten)]
    host: HostArgs,
}

/// Binds.
pub fn run(args: Args, json: bool) -> Result<()> {
    let host = args.host.host();
    let addresses = addresses(&host, &args.devices)?;
    if args.noiommu {
        tracing::warn!("{NOIOMMU_WARNING}");
    }
    let options = BindOptions {
        driver: args.driver,
        force: args.force,
        noiommu: args.noiommu,
        group: args.group,
    };
    print("usernic.bind/1", &pci::bind(&host, &addresses, &options)?, json)
}

/// Unbinds.
pub fn run_unbind(args: UnbindArgs, json: bool) -> Result<()> {
    let host = args.host.host();
    let addresses = addresses(&host, &args.devices)?;
    print("usernic.unbind/1", &pci::unbind(&host, &addresses)?, json)
}

fn addresses(host: &Host, names: &[String]) -> Result<Vec<Address>> {
    let address = |name: &String| Ok(Function::named(host, name)?.address);
    names.iter().map(address).collect()
}

fn print(schema: &str, all: &[Bound], json: bool) -> Result<()> {
    let mut out = crate::output::stdout();
    if json {
        let report = serde_json::json!({ "schema": schema, "devices": all });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    for Bound {
        address,
        from,
        to,
        nodes,
    } in all
    {
        let [from, to] = [from, to].map(|d| d.as_deref().unwrap_or("no driver"));
        let nodes = match nodes.as_slice() {
            [] => String::new(),
            nodes => format!("; a container needs {}", nodes.join(" or ")),
        };
        if from == to {
            writeln!(out, "{address}: {to} has it already{nodes}")?;
        } else {
            writeln!(out, "{address}: from {from} to {to}{nodes}")?;
        }
    }
    Ok(())
}
