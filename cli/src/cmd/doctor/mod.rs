//! `usernic doctor`: is this machine, or this container, fit for a port?

mod spin;

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use usernic::cpu::{self, parse_list};
use usernic::doctor::{Finding, Level, Question, examine};
use usernic::resctrl::Partition;
use usernic::spec::PortSpec;

use crate::common::{self, Failed, HostArgs, Usage};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The port that is to be opened here; without one, what most ports need is looked at
    #[arg(long, value_name = "SPEC")]
    port: Option<PortSpec>,
    /// The virtual function that is to be driven here, by address or interface
    #[arg(long, value_name = "DEVICE")]
    vf: Option<String>,
    /// The CPUs of polling threads: 2,4-5
    #[arg(long, value_name = "LIST", value_parser = list)]
    cpu: Option<Cpus>,
    /// Do not connect to the port's socket: its back-end may have a front-end, and serves one at a time
    #[arg(long)]
    no_connect: bool,
    /// Spin for so many seconds on each of the CPUs and show how long the thread was away
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    spin: Option<Duration>,
    /// Print what gives these CPUs so many ways of the last-level cache alone; `usernic cat` does it
    #[arg(long, value_name = "WAYS")]
    cat: Option<u32>,
    #[command(flatten)]
    host: HostArgs,
}

/// CPUs as a clap value, which takes a plain `Vec` for a repeated argument.
#[derive(Clone, Debug)]
pub struct Cpus(pub Vec<u32>);

/// A list of CPUs as it is typed.
pub fn list(text: &str) -> Result<Cpus, String> {
    let cpus = parse_list(text);
    // What does not come out as it went in was no list.
    if cpus.is_empty() || text.split([',', '-']).any(|part| part.trim().parse::<u32>().is_err()) {
        return Err("write CPUs as 2 or 2,4-5".into());
    }
    Ok(Cpus(cpus))
}

#[derive(Serialize)]
struct Report {
    schema: &'static str,
    /// Whether there is no fault.
    fit: bool,
    findings: Vec<Finding>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    jitter: Vec<spin::Jitter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<Partition>,
}

/// Looks, prints, and fails if there is a fault.
pub fn run(args: Args, json: bool) -> Result<()> {
    let host = args.host.host();
    let cpus = args.cpu.map(|list| list.0).unwrap_or_default();
    let cat = match args.cat {
        Some(_) if cpus.is_empty() => return Err(Usage("--cat needs the CPUs: --cpu 2,3".into()).into()),
        Some(ways) => Some(Partition::plan(&host, super::cat::GROUP, &cpus, ways)?),
        None => None,
    };
    let question = Question {
        spec: args.port,
        function: args.vf,
        cpus: cpus.clone(),
        quiet: args.no_connect,
    };
    let findings = examine(&host, &question);
    let mut jitter = Vec::new();
    if let Some(time) = args.spin {
        let allowed = cpu::allowed(&host);
        let which = if cpus.is_empty() { &allowed } else { &cpus };
        // Those that may not be used are faults already.
        for cpu in which.iter().filter(|cpu| allowed.contains(cpu)) {
            jitter.push(spin::spin(*cpu, time)?);
        }
    }
    let report = Report {
        schema: "usernic.doctor/1",
        fit: findings.iter().all(|finding| finding.level < Level::Fault),
        findings,
        jitter,
        cat,
    };
    let mut out = crate::output::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        show(&mut out, &report)?;
    }
    if report.fit { Ok(()) } else { Err(Failed.into()) }
}

fn show(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for finding in &report.findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Fault => "FAULT",
        };
        writeln!(out, "{level:<8} {}: {}", finding.check, finding.what)?;
        if let Some(mend) = &finding.mend {
            writeln!(out, "{:<8} -> {mend}", "")?;
        }
    }
    for jitter in &report.jitter {
        write!(out, "{jitter}")?;
    }
    if let Some(partition) = &report.cat {
        for command in partition.commands() {
            writeln!(out, "{command}")?;
        }
    }
    let count = |level: Level| report.findings.iter().filter(|f| f.level == level).count();
    writeln!(
        out,
        "{}: {} faults, {} warnings",
        if report.fit { "fit" } else { "not fit" },
        count(Level::Fault),
        count(Level::Warning)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_lists() {
        assert_eq!(list("2,4-5").unwrap().0, [2, 4, 5]);
        for bad in ["", "x", "1,", "1-x", "-1", "5-3"] {
            assert!(list(bad).is_err(), "{bad:?}");
        }
    }
}
