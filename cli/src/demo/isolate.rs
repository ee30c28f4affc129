//! Isolation: namespaces of its own, an empty root, no capability, no way to get one.
//!
//! A container is this program again, which isolates itself before it does anything else. It is single-threaded until
//! then, as unshare(2) wants it for user namespaces. Every step that fails says which it was and what can be done: the
//! demo never runs with less isolation than it shows.
//!
//! | layer | how |
//! |---|---|
//! | user | 65534 inside; started by root, also outside |
//! | mounts | a tmpfs, read-only, with the sockets of its ports and /proc, by pivot_root(2) |
//! | network | a namespace with nothing but a loopback that is down |
//! | processes | process 1 of a namespace of its own: when it or the demo dies, all in it die |
//! | capabilities | all five sets empty, no_new_privs set |

use std::fs;
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use usernic::vhost_user::MAX_PATH;

use super::channel::Proof;

/// The longest name of a socket in [`socket_folder`].
const LONGEST: &str = "a.sock";

/// The user and the group of nobody.
pub const NOBODY: u32 = 65534;

/// Whether this is root, and can become nobody: the root of a small user namespace has nobody else to be.
fn is_root_with_nobody() -> bool {
    let maps = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).is_ok_and(|map| has_nobody(&map));
    rustix::process::geteuid().is_root() && maps("uid_map") && maps("gid_map")
}

/// Whether a uid_map or gid_map (lines of first inside, first outside, count) has nobody in it.
fn has_nobody(map: &str) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if (first..first.saturating_add(count)).contains(&u64::from(NOBODY)))
    })
}

/// Takes this process to nobody's identity if it is root's, and into a user namespace in which it has every capability.
pub fn enter_user_namespace() -> Result<()> {
    if is_root_with_nobody() {
        let (user, group) = (
            rustix::process::Uid::from_raw(NOBODY),
            rustix::process::Gid::from_raw(NOBODY),
        );
        // Single-threaded: the thread's identity is the process's.
        rustix::thread::set_thread_groups(&[]).context("giving up root's groups")?;
        rustix::thread::set_thread_res_gid(group, group, group).context("changing to nobody's group")?;
        rustix::thread::set_thread_res_uid(user, user, user).context("changing to nobody")?;
        // A change of identity takes /proc/self away, which holds the maps to be written.
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).context("prctl(PR_SET_DUMPABLE)")?;
    }
    die_with_parent()?;
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: no thread but this one, and no file descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
        .map_err(|e| refused("a user namespace", e.into()))?;
    let map = |name: &str, text: String| {
        fs::write(format!("/proc/self/{name}"), text).map_err(|e| refused(&format!("writing /proc/self/{name}"), e))
    };
    map("setgroups", "deny".into())?;
    map("uid_map", format!("{NOBODY} {uid} 1"))?;
    map("gid_map", format!("{NOBODY} {gid} 1"))?;
    die_with_parent()
}

/// The kernel kills this process when its parent dies. Forgotten by the kernel at every change of identity.
pub fn die_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("prctl(PR_SET_PDEATHSIG)")
}

/// Leaves for namespaces of its own. Returns in process 1 of the new pid namespace; the process that called waits for
/// it and ends with its status.
pub fn enter_namespaces() -> Result<()> {
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: no thread but this one, and no file descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(all) }
        .map_err(|e| refused("mount, network, pid, ipc, uts and cgroup namespaces", e.into()))?;
    // SAFETY: this process has one thread, so that the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork(2) into the pid namespace"),
        0 => die_with_parent(),
        child => {
            let mut status = 0;
            loop {
                // SAFETY: `status` is a place for the status.
                let got = unsafe { libc::waitpid(child, &mut status, 0) };
                if got == child || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
                    break;
                }
            }
            std::process::exit(if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                1
            });
        }
    }
}

/// Replaces the file system by one that holds `sockets`, as `/run/NAME` for each, and /proc where that is allowed.
///
/// `root` is an empty directory, used as the place to mount on.
pub fn enter_root(root: &Path, sockets: &[PathBuf]) -> Result<()> {
    let tried = |what: &str| format!("{what} (root at {})", root.display());
    fs::metadata(root).with_context(|| {
        format!(
            "user nobody cannot reach {}: set TMPDIR to a folder that everybody may pass through",
            root.display()
        )
    })?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| refused("making all mounts private", e.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("tmpfs", root, "tmpfs", flags, c"size=64k,nr_inodes=32,mode=0755")
        .map_err(|e| refused("mounting a tmpfs", e.into()))?;
    for folder in ["run", "proc"] {
        fs::create_dir(root.join(folder)).with_context(|| tried("creating a folder"))?;
    }
    for socket in sockets {
        let Some(name) = socket.file_name() else {
            bail!("{} is no socket", socket.display())
        };
        let place = root.join("run").join(name);
        fs::write(&place, b"").with_context(|| tried("creating a place for a socket"))?;
        rustix::mount::mount_bind(socket, &place)
            .with_context(|| tried(&format!("binding the socket {}", socket.display())))?;
    }
    // A container around us may have hidden parts of /proc; then the kernel refuses a fresh one. Less is fine too.
    if let Err(e) = rustix::mount::mount("proc", root.join("proc"), "proc", flags, None) {
        tracing::info!("no /proc in the container: {e}");
    }
    rustix::process::chdir(root).with_context(|| tried("entering the root"))?;
    rustix::process::pivot_root(".", ".").with_context(|| tried("pivot_root(2)"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).with_context(|| tried("unmounting the old root"))?;
    rustix::process::chdir("/").with_context(|| tried("entering the new root"))?;
    rustix::mount::mount_remount("/", flags | MountFlags::RDONLY | MountFlags::BIND, "")
        .with_context(|| tried("making the root read-only"))
}

/// Gives up every capability in every set, and every way to get one.
pub fn drop_privileges() -> Result<()> {
    rustix::thread::clear_ambient_capability_set().context("clearing the ambient capabilities")?;
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(one) {
            Ok(true) => rustix::thread::remove_capability_from_bounding_set(one)
                .with_context(|| format!("dropping capability {number} from the bounding set"))?,
            Ok(false) => {}
            // The kernel knows no capability of this number, and none above.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e).with_context(|| format!("asking for capability {number}")),
        }
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .context("dropping all capabilities")?;
    rustix::thread::set_no_new_privs(true).context("prctl(PR_SET_NO_NEW_PRIVS)")
}

/// The namespaces that the demo shows.
pub const NAMESPACES: [&str; 6] = ["user", "mnt", "net", "pid", "ipc", "uts"];

/// The identity of this process's namespaces. Empty where /proc is not mounted.
pub fn namespaces() -> Vec<(String, String)> {
    NAMESPACES
        .into_iter()
        .filter_map(|name| {
            let link = fs::read_link(format!("/proc/self/ns/{name}")).ok()?;
            Some((name.to_owned(), link.to_string_lossy().into_owned()))
        })
        .collect()
}

/// Files opened before the root is replaced, so that the proof does not depend on the new root's /proc.
pub struct Witness {
    status: fs::File,
    namespaces: Vec<(String, String)>,
}

impl Witness {
    /// Called in the isolated process, in its namespaces, before [`enter_root`].
    pub fn new() -> Result<Self> {
        let status = fs::File::open("/proc/self/status").context("opening /proc/self/status")?;
        Ok(Witness {
            status,
            namespaces: namespaces(),
        })
    }

    /// What this process can say of itself now.
    pub fn prove(mut self) -> Result<Proof> {
        let proc = Path::new("/proc/self/status").exists();
        if proc {
            self.status = fs::File::open("/proc/self/status").context("opening /proc/self/status")?;
        }
        let mut status = String::new();
        self.status.rewind()?;
        self.status
            .read_to_string(&mut status)
            .context("reading /proc/self/status")?;
        let mut proof = parse_status(&status);
        proof.proc = proc;
        proof.namespaces = self.namespaces;
        proof.interfaces = super::netlink::interfaces().context("listing the network interfaces")?;
        list(Path::new("/"), &mut proof.files)?;
        proof.writable = fs::write("/probe", b"").is_ok();
        Ok(proof)
    }
}

/// All files below `folder`, but for what is below /proc.
fn list(folder: &Path, files: &mut Vec<String>) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(|e| e.file_name());
    for entry in entries {
        files.push(entry.path().display().to_string());
        if entry.file_type()?.is_dir() && entry.path() != Path::new("/proc") {
            list(&entry.path(), files)?;
        }
    }
    Ok(())
}

fn parse_status(status: &str) -> Proof {
    let mut proof = Proof::default();
    for line in status.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match name {
            "Uid" => proof.uid = value.split_whitespace().collect::<Vec<_>>().join(" "),
            "NoNewPrivs" => proof.no_new_privs = value.to_owned(),
            "NSpid" => proof.pid = value.split_whitespace().next_back().unwrap_or_default().to_owned(),
            _ if name.starts_with("Cap") => proof.capabilities.push((name.to_owned(), value.to_owned())),
            _ => {}
        }
    }
    proof
}

/// Whether the proof shows what the demo claims; what it does not, if so. `outside`: the demo's own namespaces.
pub fn verify(proof: &Proof, outside: &[(String, String)], sockets: &[String]) -> Result<(), String> {
    let mut expected = vec!["/proc".to_owned(), "/run".to_owned()];
    expected.extend(sockets.iter().map(|name| format!("/run/{name}")));
    expected.sort();
    let mut files = proof.files.clone();
    files.sort();
    let nobody = format!("{NOBODY} {NOBODY} {NOBODY} {NOBODY}");
    let shared: Vec<&str> = proof
        .namespaces
        .iter()
        .filter(|ns| outside.contains(ns))
        .map(|(name, _)| name.as_str())
        .collect();
    let capability = proof
        .capabilities
        .iter()
        .find(|(_, set)| set.bytes().any(|b| b != b'0'));
    if proof.uid != nobody {
        Err(format!("its uid is {}, not {nobody}", proof.uid))
    } else if let Some((name, set)) = capability {
        Err(format!("it has capabilities: {name} {set}"))
    } else if proof.capabilities.len() < 5 {
        Err("the kernel does not show its capabilities".into())
    } else if proof.no_new_privs != "1" {
        Err(format!("NoNewPrivs is {:?}", proof.no_new_privs))
    } else if proof.pid != "1" {
        Err(format!("it is process {} of its namespace, not 1", proof.pid))
    } else if proof.interfaces != ["lo"] {
        Err(format!("it has the network interfaces {:?}", proof.interfaces))
    } else if proof.namespaces.len() < NAMESPACES.len() || !shared.is_empty() {
        Err(format!(
            "it shares namespaces with the demo: {shared:?} of {:?}",
            proof.namespaces
        ))
    } else if files != expected {
        Err(format!("its root holds {files:?}, expected {expected:?}"))
    } else if proof.writable {
        Err("its root can be written".into())
    } else {
        Ok(())
    }
}

/// An error that says what was tried, what the kernel said, and which switches there are.
fn refused(what: &str, error: std::io::Error) -> anyhow::Error {
    let read = |path: &str| fs::read_to_string(path).map(|s| s.trim().to_owned()).ok();
    let mut advice = Vec::new();
    if read("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") {
        advice.push("user namespaces are switched off: sysctl user.max_user_namespaces=15000".to_owned());
    }
    if read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        advice.push("ordinary users may not have them: sysctl kernel.unprivileged_userns_clone=1".to_owned());
    }
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        advice.push(
            "AppArmor takes the capabilities out of them: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an \
             AppArmor profile for this program with `userns,`"
                .to_owned(),
        );
    }
    if advice.is_empty() && (Path::new("/.dockerenv").exists() || Path::new("/run/.containerenv").exists()) {
        advice.push(
            "this is a container itself: its seccomp or AppArmor profile may forbid it (docker run --security-opt \
             seccomp=unconfined --security-opt apparmor=unconfined)"
                .to_owned(),
        );
    }
    if advice.is_empty() {
        advice.push(
            "no switch that is known to forbid it is set; a seccomp filter or SELinux may (see user_namespaces(7))"
                .to_owned(),
        );
    }
    anyhow::anyhow!(
        "cannot isolate: {what}: {error}; {}; the demo does not run without isolation",
        advice.join("; ")
    )
}

/// A folder for the sockets, which only the container's user can enter, removed on drop.
pub fn socket_folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("usernic-")
        .tempdir()
        .context("creating a temporary folder (TMPDIR says where, else it is /tmp)")?;
    let len = dir.path().join(LONGEST).as_os_str().len();
    if len > MAX_PATH {
        bail!(
            "sockets in {} have paths of {len} bytes, and {MAX_PATH} are the most (unix(7)): set TMPDIR to a folder with a \
             shorter path, such as /tmp",
            dir.path().display()
        );
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
    give_to_container(dir.path())?;
    Ok(dir)
}

/// Makes `path` the container's user's, when that is not who runs this.
pub fn give_to_container(path: &Path) -> Result<()> {
    if is_root_with_nobody() {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY))
            .with_context(|| format!("giving {} to nobody", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Proof {
        let status = "Name:\tusernic\nUid:\t65534\t65534\t65534\t65534\nNSpid:\t4711\t1\nCapInh:\t0000000000000000\n\
                      CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
                      CapAmb:\t0000000000000000\nNoNewPrivs:\t1\n";
        let mut proof = parse_status(status);
        proof.interfaces = vec!["lo".into()];
        proof.files = vec!["/proc".into(), "/run".into(), "/run/a.sock".into()];
        proof.namespaces = NAMESPACES
            .into_iter()
            .map(|n| (n.to_owned(), format!("{n}:[1]")))
            .collect();
        proof
    }

    #[test]
    fn nobody_is_found_in_maps() {
        assert!(has_nobody("         0          0 4294967295\n"));
        assert!(has_nobody("0 1000 1\n1 100000 65536\n"));
        assert!(!has_nobody("0 1000 1\n"));
        assert!(!has_nobody("0 100000 65534\n"));
        assert!(!has_nobody("65535 1 1\nnonsense"));
    }

    #[test]
    fn a_proof_is_taken_only_when_all_of_it_holds() {
        let outside: Vec<_> = NAMESPACES
            .into_iter()
            .map(|n| (n.to_owned(), format!("{n}:[2]")))
            .collect();
        let check = |p: &Proof| verify(p, &outside, &["a.sock".into()]);
        assert_eq!(check(&good()), Ok(()));
        let broken = |change: fn(&mut Proof)| {
            let mut proof = good();
            change(&mut proof);
            check(&proof).unwrap_err()
        };
        assert!(broken(|p| p.uid = "0 0 0 0".into()).contains("uid"));
        assert!(broken(|p| p.capabilities[3].1 = "0000000000000400".into()).contains("CapBnd"));
        assert!(broken(|p| p.capabilities.clear()).contains("does not show"));
        assert!(broken(|p| p.no_new_privs = "0".into()).contains("NoNewPrivs"));
        assert!(broken(|p| p.pid = "2".into()).contains("process 2"));
        assert!(broken(|p| p.interfaces.push("eth0".into())).contains("eth0"));
        assert!(broken(|p| p.files.push("/etc".into())).contains("/etc"));
        assert!(broken(|p| p.writable = true).contains("written"));
        assert!(broken(|p| p.namespaces[2].1 = "net:[2]".into()).contains("net"));
        assert!(broken(|p| drop(p.namespaces.pop())).contains("shares"));
    }
}
