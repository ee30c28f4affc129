//! A virtual function: its IOMMU group, its node, its memory limit.

use std::os::unix::fs::MetadataExt;

use iova::vfio::Memlock;

use super::{CAP_SYS_RAWIO, Finding, Process, Question};
use crate::needs::Memory;
use crate::pci::Function;
use crate::spec::{Kind, PortSpec};
use crate::vfio::{Host, Interface};

pub(super) fn examine(host: &Host, question: &Question, process: &Process) -> Vec<Finding> {
    let spec = question.spec.as_ref().filter(|spec| spec.kind == Kind::Vf);
    let functions = match (&question.function, spec.and_then(|spec| spec.pci)) {
        (Some(name), _) => Function::named(host, name).map(|function| vec![function]),
        (None, Some(address)) => Function::read(host, address).map(|function| vec![function]),
        // In general: those that were given away already.
        (None, None) => Ok(Function::list(host)
            .into_iter()
            .filter(|f| f.is_supported() && f.is_given_away())
            .collect()),
    };
    match functions {
        Ok(functions) => functions.iter().flat_map(|f| one(host, f, spec, process)).collect(),
        Err(error) => vec![Finding::fault(
            "no-device",
            error.to_string(),
            "usernic devices lists what there is",
        )],
    }
}

fn one(host: &Host, function: &Function, spec: Option<&PortSpec>, process: &Process) -> Vec<Finding> {
    let address = function.address;
    let mut all = Vec::new();
    if function.noiommu {
        let what = format!("{address} is in noiommu mode: it reaches all memory, and its process needs CAP_SYS_RAWIO");
        let mend =
            "switch the IOMMU on in firmware and kernel (intel_iommu=on iommu=pt), and enable_unsafe_noiommu_mode off";
        let wanted = spec.is_some_and(|spec| spec.noiommu) && process.has(CAP_SYS_RAWIO);
        all.push(if wanted {
            Finding::warning("noiommu", what, mend)
        } else {
            Finding::fault("noiommu", what, mend)
        });
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
    all.push(node(host, function, group, spec, process));
    all.extend(memlock(host, function, spec));
    if all.iter().all(|finding| finding.mend.is_none()) {
        all = vec![Finding::ok("device", format!("{address} can be driven here"))];
    }
    all
}

/// The nodes that `open` would take: the device's own by iommufd, or that of its group.
fn node(host: &Host, function: &Function, group: u32, spec: Option<&PortSpec>, process: &Process) -> Finding {
    let group = host.group_node(group);
    let interface = spec.map_or(Interface::Auto, |spec| spec.interface);
    let by_group = interface != Interface::Iommufd || function.noiommu;
    let by_iommufd = interface != Interface::Container && !function.noiommu && host.exists("dev/iommu");
    let mut found = function.nodes(host);
    found.retain(|node| if *node == group { by_group } else { by_iommufd });
    let mut refused = None;
    for name in &found {
        let Ok(meta) = std::fs::metadata(host.path(name)) else {
            continue;
        };
        if process.may(meta.uid(), meta.gid(), meta.mode(), 6) {
            return Finding::ok("group-node", format!("{name} may be opened"));
        }
        refused = refused.or(Some(Finding::fault(
            "wrong-owner",
            format!(
                "{name} belongs to {}:{} with mode {:03o}: user {} may not open it",
                meta.uid(),
                meta.gid(),
                meta.mode() & 0o777,
                process.uid
            ),
            format!("chown {} {name} on the host", process.uid),
        )));
    }
    refused.unwrap_or_else(|| {
        let node = if by_group {
            group
        } else {
            "/dev/vfio/devices/vfio*".into()
        };
        Finding::fault(
            "no-group-node",
            format!("there is no {node}, the node of {}", function.address),
            format!(
                "on the host: usernic bind {0}; in a container: give it {node} (usernic container --vf {0})",
                function.address
            ),
        )
    })
}

/// What a device maps is locked, and counted, by the same rules as when it is opened.
fn memlock(host: &Host, function: &Function, spec: Option<&PortSpec>) -> Option<Finding> {
    if function.noiommu {
        return None;
    }
    let memory = Memory::of(&spec.cloned().unwrap_or_else(|| PortSpec::vf(function.address))).ok()?;
    let page = if memory.huge { 2 << 20 } else { 4 << 10 };
    let needed = memory.in_pages_of(page) as u64;
    let memlock = Memlock::read(host);
    let Some(limit) = memlock.limit else {
        return Some(Finding::ok("memlock", "any memory may be locked"));
    };
    let left = limit.saturating_sub(memlock.locked);
    Some(if left < needed {
        Finding::fault(
            "memlock",
            format!("this process may lock {left} bytes, the port's memory has {needed} (RLIMIT_MEMLOCK)"),
            format!(
                "ulimit -l {} before it starts; podman --ulimit memlock={needed}; LimitMEMLOCK= in systemd",
                (needed + memlock.locked) >> 10
            ),
        )
    } else {
        Finding::ok("memlock", format!("{left} bytes may be locked, {needed} needed"))
    })
}
