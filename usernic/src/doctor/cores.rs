//! CPUs of polling threads.

use super::{Finding, Level, Question};
use crate::cpu;
use crate::pci::Function;
use crate::vfio::Host;

pub(super) fn examine(host: &Host, question: &Question) -> Vec<Finding> {
    let allowed = cpu::allowed(host);
    let list = cpu::format_list(&allowed);
    let mut all = vec![Finding::ok("cpus", format!("this process may use CPUs {list}"))];
    // Without a question, those that threads would be put on.
    let asked = &question.cpus;
    for &cpu in asked {
        if !allowed.contains(&cpu) {
            all.push(Finding::fault(
                "cpuset",
                format!("CPU {cpu} is not among those that this process may use: {list}"),
                format!("name some of {list}, or widen the container's cpuset (--cpuset-cpus, or the CPU manager)"),
            ));
            continue;
        }
        all.extend(sibling(host, cpu, asked));
        all.push(quiet(host, cpu));
        all.extend(governor(host, cpu));
    }
    all.extend(locality(host, question));
    all
}

/// Two threads of a core share its caches and its execution units.
fn sibling(host: &Host, cpu: u32, asked: &[u32]) -> Option<Finding> {
    let others: Vec<u32> = cpu::siblings(host, cpu).into_iter().filter(|c| *c != cpu).collect();
    let both = others.iter().find(|other| asked.contains(other));
    if let Some(other) = both.filter(|other| **other > cpu) {
        return Some(Finding::warning(
            "smt-sibling-busy",
            format!("CPUs {cpu} and {other} are threads of one core: two polling threads get half of it each"),
            "name CPUs of different cores",
        ));
    }
    let running = running(host);
    let (other, name) = others
        .iter()
        .find_map(|other| running.iter().find(|(on, _)| on == other).map(|(on, name)| (*on, name)))?;
    Some(Finding::warning(
        "smt-sibling-busy",
        format!("CPU {other}, which shares its core with CPU {cpu}, runs {name}"),
        format!("isolcpus={other} and keep it idle, or choose another core"),
    ))
}

/// Threads that run at this moment, but for our own: the CPU, and the process's name. See proc_pid_stat(5).
fn running(host: &Host) -> Vec<(u32, String)> {
    let own = std::process::id();
    let mut all = Vec::new();
    for pid in host.names("proc") {
        let Ok(number) = pid.parse::<u32>() else { continue };
        if number == own {
            continue;
        }
        let mut files: Vec<String> = host
            .names(format!("proc/{pid}/task"))
            .iter()
            .map(|thread| format!("proc/{pid}/task/{thread}/stat"))
            .collect();
        if files.is_empty() {
            files.push(format!("proc/{pid}/stat"));
        }
        for file in files {
            let stat = host.read(file).unwrap_or_default();
            // The name is in parentheses and may hold anything.
            let Some((head, rest)) = stat.rsplit_once(')') else {
                continue;
            };
            let fields: Vec<&str> = rest.split_whitespace().collect();
            // Field 3 is the first behind the name; 39 is the CPU.
            if let (Some(&"R"), Some(Ok(cpu))) = (fields.first(), fields.get(36).map(|f| f.parse())) {
                let name = head.split_once('(').map_or("", |(_, name)| name);
                all.push((cpu, format!("{name} (process {pid})")));
            }
        }
    }
    all
}

/// Whether the kernel keeps its own work away.
fn quiet(host: &Host, cpu: u32) -> Finding {
    let listed = |file: &str| {
        let text = host.read(format!("sys/devices/system/cpu/{file}")).unwrap_or_default();
        cpu::parse_list(&text).contains(&cpu)
    };
    let command_line = host.read("proc/cmdline").unwrap_or_default();
    let rcu = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("rcu_nocbs="))
        .is_some_and(|list| list == "all" || cpu::parse_list(list).contains(&cpu));
    let missing: Vec<&str> = [
        ("isolcpus", listed("isolated")),
        ("nohz_full", listed("nohz_full")),
        // Implied by nohz_full.
        ("rcu_nocbs", rcu || listed("nohz_full")),
    ]
    .into_iter()
    .filter_map(|(name, there)| (!there).then_some(name))
    .collect();
    if missing.is_empty() {
        return Finding::ok(
            "isolation",
            format!("CPU {cpu} is isolated, without ticks and callbacks"),
        );
    }
    Finding::bad(
        Level::Note,
        "not-isolated",
        format!(
            "CPU {cpu} is not in {}: other work interrupts a polling thread",
            missing.join(", ")
        ),
        format!(
            "boot with isolcpus={cpu} nohz_full={cpu} rcu_nocbs={cpu} if jitter matters (usernic doctor --spin 5 shows it)"
        ),
    )
}

fn governor(host: &Host, cpu: u32) -> Option<Finding> {
    let file = format!("sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor");
    let governor = host.read(&file).ok()?;
    let governor = governor.trim();
    Some(if governor == "performance" {
        Finding::ok("governor", format!("CPU {cpu}: performance"))
    } else {
        Finding::warning(
            "governor",
            format!("CPU {cpu} has the frequency governor {governor}"),
            format!("echo performance > /{file}"),
        )
    })
}

/// Device, memory and threads on one node.
fn locality(host: &Host, question: &Question) -> Vec<Finding> {
    let mut wanted = Vec::new();
    if let Some(node) = question.spec.as_ref().and_then(|spec| spec.numa) {
        wanted.push((node, "the port's memory (numa=)".to_owned()));
    }
    let function = question
        .function
        .as_ref()
        .and_then(|name| Function::named(host, name).ok());
    if let Some((node, address)) = function.and_then(|f| Some((f.numa_node?, f.address))) {
        wanted.push((node, format!("device {address}")));
    }
    let mut all = Vec::new();
    if let [(first, one), (second, other)] = &wanted[..]
        && first != second
    {
        all.push(Finding::warning(
            "numa-mismatch",
            format!("{one} is on NUMA node {first}, {other} on node {second}"),
            format!("pass numa={second}"),
        ));
    }
    for &cpu in &question.cpus {
        let Some(own) = cpu::node(host, cpu) else { continue };
        if let Some((node, what)) = wanted.iter().find(|(node, _)| *node != own) {
            let file = format!("sys/devices/system/node/node{node}/cpulist");
            let near = host.read(file).unwrap_or_default();
            all.push(Finding::warning(
                "numa-mismatch",
                format!("CPU {cpu} is on NUMA node {own}, {what} on node {node}"),
                format!("choose CPUs of node {node}: {}", near.trim()),
            ));
        }
    }
    all
}
