//! The vhost-user socket and who is behind it.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use virtio_ring::Features;

use super::{Finding, Level, Process};
use crate::needs::Needs;
use crate::spec::{Kind, PortSpec};
use crate::vfio::Host;
use crate::vhost_user::{Error, FrontendSession};

const READ_WRITE_SEARCH: (u32, u32) = (2, 3);

/// For each answer of a back-end.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn examine(host: &Host, spec: &PortSpec, process: &Process, quiet: bool) -> Vec<Finding> {
    let needs = match Needs::of(spec) {
        Ok(needs) => needs,
        Err(crate::Error::VhostUser(error)) => {
            return vec![Finding::fault(
                "path-too-long",
                error.to_string(),
                "give the folder a shorter name",
            )];
        }
        Err(_) => return Vec::new(),
    };
    if needs.socket.listens {
        vec![listening(host, spec, &needs.socket.folder, process, quiet)]
    } else {
        connecting(host, spec, process, quiet)
    }
}

/// Whether somebody listens there, without waiting: a listener that does not accept has a full backlog (unix(7)).
fn probe(path: &Path) -> Result<(), Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Err(Errno::AGAIN) => Ok(()),
        result => result,
    }
}

fn listening(host: &Host, spec: &PortSpec, folder: &Path, process: &Process, quiet: bool) -> Finding {
    let (path, real) = (spec.path.display(), host.path(&spec.path));
    let there = std::fs::symlink_metadata(&real);
    if there.as_ref().is_ok_and(|meta| !meta.file_type().is_socket()) {
        return Finding::fault(
            "not-a-socket",
            format!("{path} is no socket, and stays"),
            "remove it, or choose another path",
        );
    }
    let mut good = Finding::ok("socket", format!("the port can listen at {path}"));
    if there.is_ok() {
        match (!quiet).then(|| probe(&real)) {
            Some(Ok(())) => {
                return Finding::fault(
                    "socket-in-use",
                    format!("somebody listens at {path} already"),
                    "end that program, or choose another path",
                );
            }
            Some(Err(Errno::CONNREFUSED)) => {
                good = Finding::ok("stale-socket", format!("{path} is left over: the port will replace it"));
            }
            Some(Err(_)) => {}
            None => {
                let what = format!("{path} is there: if nobody listens at it, the port will replace it");
                good = Finding::bad(Level::Note, "socket", what, "leave --no-connect out to have it tried");
            }
        }
    }
    let Ok(meta) = std::fs::metadata(host.path(folder)) else {
        return Finding::fault(
            "no-folder",
            format!("there is no folder {}", folder.display()),
            format!("mkdir -p {}, or mount it into the container", folder.display()),
        );
    };
    if !process.may(meta.uid(), meta.gid(), meta.mode(), READ_WRITE_SEARCH.1) {
        return Finding::fault(
            "folder-mode",
            format!(
                "{} belongs to {}:{} with mode {:03o}: user {} cannot make a socket there",
                folder.display(),
                meta.uid(),
                meta.gid(),
                meta.mode() & 0o777,
                process.uid
            ),
            format!("chown {} {}", process.uid, folder.display()),
        );
    }
    good
}

fn connecting(host: &Host, spec: &PortSpec, process: &Process, quiet: bool) -> Vec<Finding> {
    let (path, real) = (spec.path.display(), host.path(&spec.path));
    let meta = match std::fs::metadata(&real) {
        Ok(meta) => meta,
        Err(error) => {
            return vec![Finding::fault(
                "no-back-end",
                format!("{path}: {error}"),
                "start the switch first, and mount the socket's folder, not the socket, into the container; or listen \
                 with server=1",
            )];
        }
    };
    if !meta.file_type().is_socket() {
        let mend =
            "a mount of a socket that was not there made a folder or a file: remove it and start the switch first";
        return vec![Finding::fault("no-back-end", format!("{path} is no socket"), mend)];
    }
    // Both a listener that is gone and the rights can be seen before anything is sent.
    if !process.may(meta.uid(), meta.gid(), meta.mode(), READ_WRITE_SEARCH.0) {
        return vec![Finding::fault(
            "socket-mode",
            format!(
                "{path} belongs to {}:{} with mode {:03o}: user {} may not connect",
                meta.uid(),
                meta.gid(),
                meta.mode() & 0o777,
                process.uid
            ),
            format!(
                "chown {} {path} (or chmod 0666) on the host, once the switch runs",
                process.uid
            ),
        )];
    }
    if spec.kind == Kind::Vhost || quiet {
        return vec![match (!quiet).then(|| probe(&real)) {
            Some(Err(Errno::CONNREFUSED)) => stale(spec),
            _ => Finding::ok("socket", format!("{path} is there")),
        }];
    }
    match FrontendSession::connect(&real, PATIENCE).and_then(|mut session| session.offer()) {
        Ok(offer) => features(spec, offer.features, offer.queue_pairs),
        Err(Error::NobodyListens { .. }) => vec![stale(spec)],
        Err(error) => vec![Finding::warning(
            "silent-back-end",
            format!("{path}: {error}"),
            "another front-end may have the port: a back-end serves one at a time",
        )],
    }
}

fn stale(spec: &PortSpec) -> Finding {
    Finding::fault(
        "stale-socket",
        format!("{} is left over: nobody listens there", spec.path.display()),
        "start the switch again; a container that has the socket mounted rather than its folder has to start again, too",
    )
}

fn features(spec: &PortSpec, offered: u64, pairs: u16) -> Vec<Finding> {
    let path = spec.path.display();
    let lacks = |feature: &str, mend: &str| {
        Finding::fault(
            "back-end-lacks-feature",
            format!("the back-end at {path} offers no {feature} (it offers {offered:#x})"),
            mend,
        )
    };
    let has = Features::from_bits_retain(offered);
    let mut all = Vec::new();
    if !has.contains(Features::VERSION_1) {
        all.push(lacks("VIRTIO_F_VERSION_1", "use a back-end of virtio 1.0 or later"));
    }
    if spec.packed && !has.contains(Features::RING_PACKED) {
        all.push(lacks("VIRTIO_F_RING_PACKED", "leave packed_vq=1 out"));
    }
    if spec.mergeable() && !has.contains(Features::NET_MRG_RXBUF) {
        all.push(lacks(
            "VIRTIO_NET_F_MRG_RXBUF",
            "pass a buffer_size= that a frame of mtu= fits, and leave lro=1 out",
        ));
    }
    if spec.queues > pairs {
        all.push(Finding::fault(
            "back-end-has-fewer-queues",
            format!("queues={}: the back-end at {path} has {pairs}", spec.queues),
            format!("pass queues={pairs}, or give the switch's port more"),
        ));
    }
    let open = spec.offloads().difference(has);
    if !open.is_empty() {
        all.push(Finding::warning(
            "back-end-lacks-feature",
            format!(
                "the back-end at {path} offers not all of csum, tso and lro: {:#x} is done in software",
                open.bits()
            ),
            "leave these keys out, or switch offloads on at the other side",
        ));
    }
    if all.is_empty() {
        all.push(Finding::ok(
            "back-end",
            format!("the back-end at {path} has {pairs} queue pair(s) and what the port asks for"),
        ));
    }
    all
}
