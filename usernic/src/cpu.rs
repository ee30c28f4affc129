//! CPUs: which this process may use, and where they are.
//!
//! Nothing here has a largest CPU: what the kernel writes as a list is read as one.

use std::io;

use crate::vfio::Host;

/// Reads a list as the kernel writes it: `0-3,8,10-11`; a stride as in `0-8:2/4` is not used by the files that are read
/// here. What is no number is left out.
///
/// ```
/// assert_eq!(usernic::cpu::parse_list("0-2,130\n"), [0, 1, 2, 130]);
/// ```
pub fn parse_list(text: &str) -> Vec<u32> {
    let mut all = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) else {
            continue;
        };
        // A kernel has no more than 8192 (CONFIG_NR_CPUS); a prepared file may say anything.
        all.extend(first..=last.min(first.saturating_add(1 << 16)));
    }
    all.sort_unstable();
    all.dedup();
    all
}

/// The reverse of [`parse_list`]: `0-2,130`.
pub fn format_list(cpus: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if cpu == *last + 1 => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let text = parts.iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    });
    text.collect::<Vec<_>>().join(",")
}

/// The CPUs that the process may use: the affinity of its first thread, which its cpuset bounds. Empty if the kernel does
/// not say. A thread that was pinned may still be pinned elsewhere: only the cpuset forbids that.
pub fn allowed(host: &Host) -> Vec<u32> {
    let status = host.read("proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.map(parse_list).unwrap_or_default()
}

/// The threads of a CPU's core, itself among them.
pub fn siblings(host: &Host, cpu: u32) -> Vec<u32> {
    let file = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    host.read(file).map(|text| parse_list(&text)).unwrap_or_default()
}

/// The NUMA node of a CPU.
pub fn node(host: &Host, cpu: u32) -> Option<u32> {
    let names = host.names(format!("sys/devices/system/cpu/cpu{cpu}"));
    names.iter().find_map(|name| name.strip_prefix("node")?.parse().ok())
}

/// Lets the calling thread run on this CPU alone, whatever its number.
///
/// # Errors
/// Those of sched_setaffinity(2): EINVAL for a CPU that is not there or outside of the cpuset.
pub fn pin(cpu: u32) -> io::Result<()> {
    let bits = usize::BITS as usize;
    let mut mask = vec![0usize; cpu as usize / bits + 1];
    mask[cpu as usize / bits] |= 1 << (cpu as usize % bits);
    // SAFETY: the mask has as many bytes as is said, and is only read.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&mask[..]), mask.as_ptr().cast()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether a thread of this process may run on a CPU: tried with a thread of its own. That the calling thread, or the
/// main one, is pinned elsewhere is no matter.
pub(crate) fn reachable(cpu: u32) -> bool {
    let tried = std::thread::Builder::new().spawn(move || pin(cpu).is_ok());
    tried.is_ok_and(|thread| thread.join().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_any_length() {
        assert_eq!(parse_list("0-1,4,6-7\n"), [0, 1, 4, 6, 7]);
        assert_eq!(parse_list("200-202,1"), [1, 200, 201, 202]);
        assert_eq!(parse_list(""), [0u32; 0]);
        assert_eq!(parse_list("x,3-,5-4,2"), [2]);
        assert!(parse_list("0-4294967295").len() <= (1 << 16) + 1);
        for text in ["0", "0-3", "0,2", "1-2,4-5,2000"] {
            assert_eq!(format_list(&parse_list(text)), text);
        }
    }

    #[test]
    fn a_thread_is_pinned_where_it_may_run_and_nowhere_else() {
        let host = Host::default();
        let before = allowed(&host);
        let thread = std::thread::spawn(move || {
            let (first, beyond) = (before[0], 8191);
            pin(first).unwrap();
            assert_eq!(rustix::thread::sched_getaffinity(None).unwrap().count(), 1);
            assert_eq!(pin(beyond).unwrap_err().raw_os_error(), Some(libc::EINVAL));
            // From a thread that may run on the first CPU alone.
            assert!(before.iter().all(|cpu| reachable(*cpu)) && !reachable(beyond));
        });
        thread.join().unwrap();
    }
}
