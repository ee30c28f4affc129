//! `config.json` of the OCI runtime specification.
//!
//! There is no rule of the device cgroup in it: without a capability no device node can be made, and no mount but `/dev`
//! has any. Engines add such rules themselves.

use std::collections::HashSet;

use anyhow::Result;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType,
    LinuxHugepageLimitBuilder, LinuxResourcesBuilder, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder,
    LinuxSyscallBuilder, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder, get_default_maskedpaths, get_default_namespaces,
    get_default_readonly_paths,
};
use usernic::confine::{RUNNING, RUNNING_OLD, STARTING};

use super::model::Container;

/// `EPERM`, errno(3).
const EPERM: u32 = 1;

/// The whole file.
pub fn spec(container: &Container) -> Result<Spec> {
    let root = container.rootfs.clone().unwrap_or_else(|| "rootfs".into());
    Ok(SpecBuilder::default()
        .version("1.0.2")
        .root(RootBuilder::default().path(root).readonly(true).build()?)
        .hostname(container.name.clone())
        .process(process(container)?)
        .mounts(mounts(container)?)
        .linux(linux(container)?)
        .build()?)
}

fn process(container: &Container) -> Result<Process, OciSpecError> {
    let none = || HashSet::new();
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(none())
        .effective(none())
        .inheritable(none())
        .permitted(none())
        .ambient(none())
        .build()?;
    let mut limits = vec![
        limit(PosixRlimitType::RlimitNofile, container.files)?,
        limit(PosixRlimitType::RlimitCore, 0)?,
    ];
    if container.memlock > 0 {
        limits.push(limit(PosixRlimitType::RlimitMemlock, container.memlock as u64)?);
    }
    ProcessBuilder::default()
        .terminal(false)
        .user(UserBuilder::default().uid(container.user).gid(container.user).build()?)
        .args(container.command.clone())
        .env(vec!["PATH=/usr/local/bin:/usr/bin:/bin".to_owned()])
        .cwd("/")
        .capabilities(capabilities)
        .rlimits(limits)
        .no_new_privileges(true)
        .build()
}

fn limit(kind: PosixRlimitType, value: u64) -> Result<PosixRlimit, OciSpecError> {
    PosixRlimitBuilder::default().typ(kind).hard(value).soft(value).build()
}

fn mounts(container: &Container) -> Result<Vec<Mount>, OciSpecError> {
    let mount = |at: &str, kind: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(at)
            .typ(kind)
            .source(kind)
            .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
            .build()
    };
    let mut all = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "noexec", "strictatime", "mode=755", "size=64k"],
        )?,
        // Free pages, limits and the topology, for error messages and the doctor; and the IOMMU group of a device.
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        )?,
    ];
    for folder in &container.folders {
        let access = if folder.writable { "rw" } else { "ro" };
        all.push(
            MountBuilder::default()
                .destination(&folder.path)
                .typ("bind")
                .source(&folder.path)
                .options(
                    ["bind", "nosuid", "noexec", "nodev", access]
                        .map(str::to_owned)
                        .to_vec(),
                )
                .build()?,
        );
    }
    if let Some(huge) = &container.huge {
        for at in &huge.mounts {
            let user = container.user;
            all.push(
                MountBuilder::default()
                    .destination(at)
                    .typ("hugetlbfs")
                    .source("hugetlbfs")
                    .options(vec![
                        "nosuid".to_owned(),
                        "nodev".to_owned(),
                        format!("pagesize={}", huge.page.mount()),
                        format!("size={}", huge.bytes),
                        format!("uid={user}"),
                        format!("gid={user}"),
                        "mode=0700".to_owned(),
                    ])
                    .build()?,
            );
        }
    }
    Ok(all)
}

fn linux(container: &Container) -> Result<Linux, OciSpecError> {
    let mut resources = LinuxResourcesBuilder::default();
    if let Some(huge) = &container.huge {
        resources = resources.hugepage_limits(vec![
            LinuxHugepageLimitBuilder::default()
                .page_size(huge.page.cgroup())
                .limit(huge.bytes as i64)
                .build()?,
        ]);
    }
    let mut linux = LinuxBuilder::default()
        .namespaces(get_default_namespaces())
        .masked_paths(get_default_maskedpaths())
        .readonly_paths(get_default_readonly_paths())
        .resources(resources.build()?)
        .seccomp(seccomp()?);
    if !container.devices.is_empty() {
        let devices: Result<Vec<LinuxDevice>, _> = container
            .devices
            .iter()
            .map(|device| {
                // A node of the container's own: that of the host keeps its owner.
                LinuxDeviceBuilder::default()
                    .path(&device.path)
                    .typ(LinuxDeviceType::C)
                    .major(device.major)
                    .minor(device.minor)
                    .file_mode(0o600u32)
                    .uid(container.user)
                    .gid(container.user)
                    .build()
            })
            .collect();
        linux = linux.devices(devices?);
    }
    linux.build()
}

/// What the library makes, and what it takes to get there. A program that does more adds to it.
fn seccomp() -> Result<LinuxSeccomp, OciSpecError> {
    let mut names: Vec<String> = RUNNING
        .iter()
        .chain(RUNNING_OLD)
        .map(|(name, _)| *name)
        .chain(STARTING.iter().copied())
        .map(str::to_owned)
        .collect();
    names.sort();
    names.dedup();
    let calls = LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActAllow)
        .build()?;
    let arch = if cfg!(target_arch = "aarch64") {
        Arch::ScmpArchAarch64
    } else {
        Arch::ScmpArchX86_64
    };
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(vec![arch])
        .syscalls(vec![calls])
        .build()
}
