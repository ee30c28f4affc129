//! `usernic devices`: which functions there are, who has them, and what is missing.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;
use usernic::pci::{Function, interface_use, users};
use usernic::vfio::Host;

use crate::common::HostArgs;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// List all PCI functions, not only those that have to do with virtual functions
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    /// Whether the kernel has IOMMU groups.
    iommu: bool,
    devices: Vec<Row>,
    /// What is missing, and what to do about it.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    function: Function,
    /// What it is, if this project knows it.
    name: Option<&'static str>,
    /// What a container must be given, beside `/dev/vfio/vfio` or `/dev/iommu`.
    nodes: Vec<String>,
    /// Why the machine needs it.
    in_use: Option<String>,
    /// The processes that have it open.
    users: Vec<String>,
}

const NO_IOMMU: &str = "no IOMMU: a virtual function cannot be given to a container safely. Switch VT-d (AMD-Vi) on in the \
                        firmware and boot with intel_iommu=on iommu=pt (AMD: iommu=pt)";
const NO_SRIOV: &str = "no SR-IOV device: no port here makes virtual functions, and there is none of its kind. In a virtual \
                        machine, pass it one; on hardware, switch SR-IOV on in the firmware";
const NO_DRIVER: &str = "vfio-pci is not there: modprobe vfio-pci";

/// Prints the table.
pub fn run(args: Args, json: bool) -> Result<()> {
    let report = report(&args.host.host(), args.all);
    let mut out = crate::output::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    if !report.devices.is_empty() {
        write!(out, "{}", table(&report.devices))?;
    }
    for note in &report.notes {
        writeln!(out, "{note}")?;
    }
    Ok(())
}

/// Whether a function has to do with virtual functions.
fn matters(function: &Function) -> bool {
    function.is_network() && (function.total_vfs.is_some() || function.physical.is_some())
        || function.is_supported()
        || function.is_given_away()
}

fn report(host: &Host, all: bool) -> Report {
    let iommu = !host.names("sys/kernel/iommu_groups").is_empty();
    let functions = Function::list(host);
    let mut notes = Vec::new();
    let some = functions.iter().any(matters);
    if !some {
        notes.push(NO_SRIOV.to_owned());
    }
    if !iommu {
        notes.push(NO_IOMMU.to_owned());
    }
    for port in functions
        .iter()
        .filter(|f| f.total_vfs.is_some_and(|n| n > 0) && f.is_network())
    {
        if port.virtuals.is_empty() {
            let total = port.total_vfs.unwrap_or(0);
            notes.push(format!(
                "{} has no virtual functions yet: usernic vf create {} N (1 to {total})",
                port.address, port.address
            ));
        }
    }
    if some && iommu && !host.exists("sys/bus/pci/drivers/vfio-pci") {
        notes.push(NO_DRIVER.to_owned());
    }
    let row = |function: Function| Row {
        name: function.name(),
        nodes: function.nodes(host),
        in_use: interface_use(host, &function).map(|u| u.to_string()),
        users: users(host, &function).iter().map(ToString::to_string).collect(),
        function,
    };
    Report {
        schema: "usernic.devices/1",
        iommu,
        devices: functions.into_iter().filter(|f| all || matters(f)).map(row).collect(),
        notes,
    }
}

/// Columns as wide as what is in them; those that are empty everywhere are left out.
fn table(rows: &[Row]) -> String {
    let head = [
        "ADDRESS",
        "DEVICE",
        "DRIVER",
        "INTERFACE",
        "VFS",
        "GROUP",
        "NUMA",
        "NODE",
        "USED BY",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let used = |column: usize| lines[1..].iter().any(|line| !line[column].is_empty());
    let columns: Vec<usize> = (0..head.len()).filter(|c| used(*c)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for line in &lines {
        let cells = columns.iter().map(|c| format!("{:<1$}", line[*c], width(*c)));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn cells(row: &Row) -> [String; 9] {
    let f = &row.function;
    let ids = || format!("{:04x}:{:04x}", f.vendor, f.device);
    let vfs = |total: u16| format!("{} of {total}", f.virtuals.len());
    let users = row
        .in_use
        .iter()
        .chain(&row.users)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    [
        f.address.to_string(),
        row.name.map_or_else(ids, |name| format!("{} {name}", ids())),
        f.driver.clone().unwrap_or_else(|| "-".into()),
        f.interfaces.join(","),
        f.total_vfs.map(vfs).unwrap_or_default(),
        f.iommu_group.map(|g| g.to_string()).unwrap_or_default(),
        f.numa_node.map(|n| n.to_string()).unwrap_or_default(),
        row.nodes.join(","),
        users,
    ]
}
