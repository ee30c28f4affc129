//! The container, whatever its engine.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use usernic::needs::{Memory, Needs, Nodes};
use usernic::spec::PortSpec;
use usernic::vfio::Host;

use super::Args;
use crate::common::Usage;

/// Bytes that a program takes beside its packets, with room to spare: it was seen to be 10 MiB.
const PROGRAM: usize = 64 << 20;

/// A huge page, as each engine names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// 2 MiB.
    TwoMib,
    /// 1 GiB.
    OneGib,
}

impl Page {
    /// Bytes.
    pub fn bytes(self) -> usize {
        match self {
            Page::TwoMib => 2 << 20,
            Page::OneGib => 1 << 30,
        }
    }

    /// As cgroups have it.
    pub fn cgroup(self) -> &'static str {
        match self {
            Page::TwoMib => "2MB",
            Page::OneGib => "1GB",
        }
    }

    /// As Kubernetes has it.
    pub fn kubernetes(self) -> &'static str {
        match self {
            Page::TwoMib => "2Mi",
            Page::OneGib => "1Gi",
        }
    }

    /// As mount(8) has it.
    pub fn mount(self) -> &'static str {
        match self {
            Page::TwoMib => "2M",
            Page::OneGib => "1G",
        }
    }
}

impl FromStr for Page {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "2M" => Ok(Page::TwoMib),
            "1G" => Ok(Page::OneGib),
            _ => Err("write 2M or 1G".into()),
        }
    }
}

/// A folder of the host that is also there inside, under the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    pub path: PathBuf,
    pub writable: bool,
}

/// A character device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub path: PathBuf,
    pub major: u32,
    pub minor: u32,
}

/// Huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Huge {
    pub page: Page,
    /// Whole pages for all ports.
    pub bytes: usize,
    /// Where a hugetlbfs must be mounted.
    pub mounts: Vec<PathBuf>,
}

/// One port or virtual function by itself, for formats that name devices.
#[derive(Clone, Debug)]
pub struct Part {
    pub name: String,
    pub folders: Vec<Folder>,
    pub devices: Vec<Device>,
}

/// All that it must be given.
#[derive(Clone, Debug)]
pub struct Container {
    pub name: String,
    pub image: String,
    pub rootfs: Option<PathBuf>,
    pub user: u32,
    pub command: Vec<String>,
    pub folders: Vec<Folder>,
    pub huge: Option<Huge>,
    /// Bytes of ordinary memory.
    pub plain: usize,
    pub devices: Vec<Device>,
    /// Bytes that a device may have mapped; 0 if there is none.
    pub memlock: usize,
    /// Open files.
    pub files: u64,
    /// The resource of virtual functions and how many of it.
    pub resource: Option<(String, usize)>,
    pub parts: Vec<Part>,
    /// What an operator should know or do.
    pub notes: Vec<String>,
}

/// Where a container gets a hugetlbfs for a port that takes any.
const HUGE_DIR: &str = "/dev/hugepages";

/// Folders that hold more than ports.
const SHARED: [&str; 14] = [
    "/", "/dev", "/dev/shm", "/etc", "/home", "/opt", "/proc", "/root", "/run", "/sys", "/tmp", "/usr", "/var",
    "/var/run",
];

impl Container {
    /// What these arguments ask for.
    pub fn of(args: &Args) -> Result<Self> {
        if args.port.is_empty() && args.vf.is_empty() {
            return Err(Usage("a container needs a port: --port SPEC, or --vf DEVICE".into()).into());
        }
        let host = args.host.host();
        let page = args.page;
        let mut all = Container {
            name: args.name.clone(),
            image: args.image.clone(),
            rootfs: args.rootfs.clone(),
            user: args.user,
            command: args.command.clone(),
            folders: Vec::new(),
            huge: None,
            plain: PROGRAM,
            devices: Vec::new(),
            memlock: 0,
            files: 256,
            resource: None,
            parts: Vec::new(),
            notes: Vec::new(),
        };
        let mut huge = Huge {
            page,
            bytes: 0,
            mounts: Vec::new(),
        };
        for (number, port) in args.port.iter().enumerate() {
            let spec = &port.spec;
            let needs = Needs::of(spec)?;
            if needs.memory.huge {
                huge.bytes += needs.memory.in_pages_of(page.bytes());
                let mount = needs.memory.mount.clone();
                let any = needs.memory.is_mounted().then(|| HUGE_DIR.into());
                huge.mounts.extend(mount.or(any));
            }
            // Where there are no huge pages free, most ports take plain ones.
            all.plain += needs.memory.bytes;
            // Two eventfds a ring, in both directions of a queue pair, the socket and what it carries.
            all.files += 8 * u64::from(spec.queues);
            let folder = Folder {
                path: folder(&host, &needs.socket.folder, &spec.path, &mut all.notes)?,
                writable: needs.socket.listens,
            };
            all.parts.push(Part {
                name: format!("port{number}"),
                folders: vec![folder.clone()],
                devices: Vec::new(),
            });
            match all.folders.iter_mut().find(|f| f.path == folder.path) {
                Some(known) => known.writable |= folder.writable,
                None => all.folders.push(folder),
            }
        }
        for name in &args.vf {
            all.add_function(&host, name, page, &mut huge)?;
        }
        huge.mounts.sort();
        huge.mounts.dedup();
        if !args.vf.is_empty() {
            all.resource = Some((args.resource.clone(), args.vf.len()));
        }
        all.huge = Some(huge).filter(|h| h.bytes > 0);
        if all.command.is_empty() {
            all.command = check(args);
        }
        Ok(all)
    }

    fn add_function(&mut self, host: &Host, name: &str, page: Page, huge: &mut Huge) -> Result<()> {
        let nodes = Nodes::of(host, name)?;
        let mut devices = Vec::new();
        for path in nodes.paths {
            devices.push(device(host, path)?);
        }
        let memory = Memory::of(&PortSpec::vf(nodes.function.address))?;
        huge.bytes += memory.in_pages_of(page.bytes());
        self.plain += memory.bytes;
        self.memlock += memory.in_pages_of(page.bytes());
        self.parts.push(Part {
            name: nodes.function.address.to_string(),
            folders: Vec::new(),
            devices: devices.clone(),
        });
        for device in devices {
            if !self.devices.contains(&device) {
                self.devices.push(device);
            }
        }
        Ok(())
    }
}

/// Whether the container is fit for its first port or function.
fn check(args: &Args) -> Vec<String> {
    let mut words = ["usernic", "doctor"].map(str::to_owned).to_vec();
    match (args.port.first(), args.vf.first()) {
        (Some(port), _) => words.extend(["--port".to_owned(), port.text.clone()]),
        (None, Some(name)) => words.extend(["--vf".to_owned(), name.clone()]),
        (None, None) => {}
    }
    words
}

/// The folder of a socket, if it is one that a container may be given whole.
fn folder(host: &Host, folder: &Path, socket: &Path, notes: &mut Vec<String>) -> Result<PathBuf> {
    let refused = |why: String| -> anyhow::Error { Usage(format!("path={}: {why}", socket.display())).into() };
    let plain = folder
        .components()
        .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !folder.is_absolute() || !plain {
        return Err(refused(
            "a container knows whole paths only: begin with / and leave . and .. out".into(),
        ));
    }
    if SHARED.iter().any(|shared| folder == Path::new(shared)) {
        return Err(refused(format!(
            "{} would be the container's as a whole: put the socket into a folder of its own, as in /run/usernic/{}/",
            folder.display(),
            socket.file_stem().unwrap_or_default().to_string_lossy()
        )));
    }
    let others: Vec<String> = fs::read_dir(host.path(folder.strip_prefix("/").unwrap_or(folder)))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| Some(name.as_str()) != socket.file_name().and_then(|n| n.to_str()))
        .collect();
    if !others.is_empty() {
        // Whoever has the folder can put any number there.
        let more = others.len().saturating_sub(8);
        let mut others = others[..others.len() - more].join(", ");
        if more > 0 {
            others += &format!(" and {more} others");
        }
        notes.push(format!(
            "{} also holds {others}: the container could take those ports, too; give each container a folder of its own",
            folder.display()
        ));
    }
    Ok(folder.to_owned())
}

fn device(host: &Host, path: PathBuf) -> Result<Device> {
    let real = host.path(path.strip_prefix("/").unwrap_or(&path));
    let number = fs::metadata(&real).with_context(|| path.display().to_string())?.rdev();
    Ok(Device {
        major: rustix::fs::major(number),
        minor: rustix::fs::minor(number),
        path,
    })
}
