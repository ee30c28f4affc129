//! The limit of open files (RLIMIT_NOFILE): raised at the start, and told when it is too low for the ports asked for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use usernic::spec::PortSpec;

/// Descriptors of a program besides its ports: standard streams, control sockets and their clients, the queues' memory.
const PROGRAM: u64 = 64;

/// Descriptors of a port besides its queue pairs: its socket, the connection, the other side's channel, its own memory and
/// events, and the regions of a front-end while they are being mapped.
const PORT: u64 = 12;

/// Descriptors of a queue pair: two kicks, two calls, and the two that its thread sleeps on.
const PAIR: u64 = 6;

/// Raises the soft limit to the hard one, as programs may that do not use select(2).
pub fn raise() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::debug!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

/// Descriptors that these ports take when all of them are connected.
fn need<'a>(ports: impl IntoIterator<Item = &'a PortSpec>) -> u64 {
    PROGRAM
        + ports
            .into_iter()
            .map(|port| PORT + PAIR * u64::from(port.queues))
            .sum::<u64>()
}

/// Warns if the limit is too low for these ports.
pub fn check<'a>(ports: impl IntoIterator<Item = &'a PortSpec>) {
    let need = need(ports);
    // None: there is no limit.
    if let Some(limit) = getrlimit(Resource::Nofile).current
        && limit < need
    {
        tracing::warn!(
            "the limit of open files (RLIMIT_NOFILE) is {limit}, these ports take up to {need}: some will not come up. \
             Raise it with `ulimit -Hn`, LimitNOFILE= of systemd or --ulimit nofile= of podman"
        );
    }
}
