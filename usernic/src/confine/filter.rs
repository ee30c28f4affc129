//! The list of system calls as a filter.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::Error;
use super::calls::{RUNNING, RUNNING_OLD};

/// `VFIO_TYPE`, the second byte of its requests (`linux/vfio.h`); iommufd has the same.
const VFIO: u64 = (b';' as u64) << 8;

/// `PR_SET_VMA`, a name for memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

fn backend(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Calls(error.into())
}

/// A condition on a 32-bit argument.
fn word(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value).map_err(backend)
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Error> {
    SeccompRule::new(conditions).map_err(backend)
}

/// Alternatives on one argument.
fn one_of(index: u8, values: &[u64]) -> Result<Vec<SeccompRule>, Error> {
    let each = values
        .iter()
        .map(|value| rule(vec![word(index, SeccompCmpOp::Eq, *value)?]));
    each.collect()
}

/// What each call may be given; an empty list: anything.
fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = RUNNING
        .iter()
        .chain(RUNNING_OLD)
        .map(|(_, number)| (*number, Vec::new()))
        .collect();
    let masked = |mask: u64| SeccompCmpOp::MaskedEq(mask);
    // Unix sockets alone.
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socket, one_of(0, &[unix])?);
    rules.insert(libc::SYS_socketpair, one_of(0, &[unix])?);
    // Threads, and no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule(vec![word(0, masked(thread), thread)?])?]);
    // No memory that is executable.
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![rule(vec![word(2, masked(exec), 0)?])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(vec![word(2, masked(exec), 0)?])?]);
    // Limits are read.
    rules.insert(
        libc::SYS_prlimit64,
        vec![rule(vec![
            SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0).map_err(backend)?,
        ])?],
    );
    rules.insert(
        libc::SYS_prctl,
        one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, PR_SET_VMA])?,
    );
    // Devices, whether a file is a terminal, how much there is to read; not what types into a terminal.
    let terminal = [
        libc::TCGETS,
        libc::TIOCGWINSZ,
        libc::FIONBIO,
        libc::FIONREAD,
        libc::FIOCLEX,
    ];
    let mut requests = one_of(1, &terminal)?;
    requests.push(rule(vec![word(1, masked(0xff00), VFIO)?])?);
    rules.insert(libc::SYS_ioctl, requests);
    // abort(3), of this process.
    rules.insert(libc::SYS_tgkill, one_of(0, &[u64::from(std::process::id())])?);
    Ok(rules)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, Error> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(backend)?;
    let filter = SeccompFilter::new(rules, others, these, arch).map_err(backend)?;
    filter.try_into().map_err(backend)
}

/// From now on no thread of this process makes other calls than those that the library makes once ports are open:
/// [`RUNNING`], some with some arguments only. Others return `EPERM`.
///
/// Sockets are Unix sockets; `clone` makes threads; no memory becomes executable; `ioctl` is for VFIO; `prctl` names
/// threads; limits are read. What an application does beyond that it does before, or not at all.
///
/// # Errors
/// [`Error::Calls`]; nothing has changed then but, at the most, no_new_privs.
pub fn calls() -> Result<(), Error> {
    let list = program(rules()?, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?;
    // Its arguments are in memory, which a filter cannot see: the C library takes this answer for an old kernel's, and
    // uses clone. The stricter of two filters decides.
    let clone3 = program(
        [(libc::SYS_clone3, Vec::new())].into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    seccompiler::apply_filter_all_threads(&clone3).map_err(backend)?;
    seccompiler::apply_filter_all_threads(&list).map_err(backend)
}
