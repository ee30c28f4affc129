//! A virtual function: its IOMMU group, its node, its memory limit.

use std::os::unix::fs::MetadataExt;

use super::{Finding, Process, Question};
use crate::needs::Needs;
use crate::pci::Function;
use crate::spec::PortSpec;
use crate::vfio::Host;

pub(super) fn examine(host: &Host, question: &Question, process: &Process) -> Vec<Finding> {
    let functions = match &question.function {
        Some(name) => match Function::named(host, name) {
            Ok(function) => vec![function],
            Err(error) => {
                return vec![Finding::fault(
                    "no-device",
                    error.to_string(),
                    "usernic devices lists what there is",
                )];
            }
        },
        // In general: those that were given away already.
        None => Function::list(host)
            .into_iter()
            .filter(|f| f.is_supported() && f.is_given_away())
            .collect(),
    };
    functions.iter().flat_map(|f| one(host, f, process)).collect()
}

fn one(host: &Host, function: &Function, process: &Process) -> Vec<Finding> {
    let address = function.address;
    let mut all = Vec::new();
    if function.noiommu {
        all.push(Finding::fault(
            "noiommu",
            format!("{address} is in noiommu mode: it reaches all memory, and its process needs CAP_SYS_RAWIO"),
            "switch the IOMMU on in firmware and kernel (intel_iommu=on iommu=pt), and enable_unsafe_noiommu_mode off",
        ));
    }
    let Some(group) = function.iommu_group else {
        all.push(Finding::fault(
            "no-iommu-group",
            format!("{address} has no IOMMU group"),
            "switch the IOMMU on in firmware and kernel (intel_iommu=on iommu=pt)",
        ));
        return all;
    };
    if !function.is_given_away() {
        let driver = function.driver.as_deref().unwrap_or("no driver");
        all.push(Finding::fault(
            "not-bound",
            format!("{address} is with {driver}, not with vfio-pci"),
            format!("usernic bind {address}"),
        ));
    }
    let blocking: Vec<String> = host
        .group_members(group)
        .iter()
        .filter(|member| member.blocks() && member.device != address.to_string())
        .map(|member| format!("{} is with {}", member.device, member.driver.as_deref().unwrap_or("?")))
        .collect();
    if !blocking.is_empty() {
        all.push(Finding::fault(
            "group-not-viable",
            format!(
                "IOMMU group {group} of {address} is not viable: {}",
                blocking.join(", ")
            ),
            format!("usernic bind --group {address}: the devices of a group go together"),
        ));
    }
    all.push(node(host, function, group, process));
    all.extend(memlock(host));
    if all.iter().all(|finding| finding.mend.is_none()) {
        all = vec![Finding::ok("device", format!("{address} can be driven here"))];
    }
    all
}

fn node(host: &Host, function: &Function, group: u32, process: &Process) -> Finding {
    let prefix = if function.noiommu { "noiommu-" } else { "" };
    let name = format!("/dev/vfio/{prefix}{group}");
    let Ok(meta) = std::fs::metadata(host.path(&name)) else {
        return Finding::fault(
            "no-group-node",
            format!("there is no {name}, the node of {}", function.address),
            format!(
                "on the host: usernic bind {0}; in a container: give it {name} (usernic container --vf {0})",
                function.address
            ),
        );
    };
    if !process.may(meta.uid(), meta.gid(), meta.mode(), 6) {
        return Finding::fault(
            "wrong-owner",
            format!(
                "{name} belongs to {}:{} with mode {:03o}: user {} may not open it",
                meta.uid(),
                meta.gid(),
                meta.mode() & 0o777,
                process.uid
            ),
            format!("chown {} {name} on the host", process.uid),
        );
    }
    Finding::ok("group-node", format!("{name} may be opened"))
}

/// What a device maps is locked, and counted.
fn memlock(host: &Host) -> Option<Finding> {
    let limits = host.read("proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    let soft: u64 = line.split_whitespace().next()?.parse().ok()?;
    let needs = Needs::of(&PortSpec::virtio_user("/")).ok()?;
    let needed = needs.memory.in_pages_of(2 << 20) as u64;
    Some(if soft < needed {
        Finding::fault(
            "memlock",
            format!("this process may lock {soft} bytes, a device's packets need {needed} (RLIMIT_MEMLOCK)"),
            format!(
                "ulimit -l {} before it starts; podman --ulimit memlock={needed}; LimitMEMLOCK= in systemd",
                needed >> 10
            ),
        )
    } else {
        Finding::ok("memlock", format!("{soft} bytes may be locked"))
    })
}
