//! `usernic stats`: the counters of a running program.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;

use crate::common;
use crate::control::{Client, Request};
use crate::{output, result};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The control socket that the program was given with --control
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// Print the counters so many times, once a second; a line of JSON unless the standard output
    /// is a terminal
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Print the counters once, as Prometheus reads them
    #[arg(long, conflicts_with = "count")]
    metrics: bool,
}

/// A line a port: what moved, then every other counter that is not 0.
fn text(stats: &Value) -> String {
    const ALWAYS: [&str; 4] = ["rx_packets", "rx_bytes", "tx_packets", "tx_bytes"];
    let mut text = String::new();
    for port in stats["ports"].as_array().into_iter().flatten() {
        let link = if port["link_up"] == true { "up" } else { "down" };
        text += &format!("{}: link {link}", port["name"].as_str().unwrap_or("?"));
        for name in ALWAYS {
            text += &format!(", {name} {}", port[name].as_u64().unwrap_or(0));
        }
        for (name, value) in port.as_object().into_iter().flatten() {
            if let Some(count) = value.as_u64().filter(|count| *count > 0)
                && !ALWAYS.contains(&name.as_str())
            {
                text += &format!(", {name} {count}");
            }
        }
        text += "\n";
    }
    if let Some(addresses) = stats["addresses"].as_array() {
        text += &format!("{} addresses learned\n", addresses.len());
    }
    if let Some(confined) = stats["confined"].as_object() {
        let given_up = |what: &str| {
            if confined.get(what) == Some(&Value::Bool(true)) {
                "given up"
            } else {
                "kept"
            }
        };
        text += &format!("confined: files {}, calls {}\n", given_up("files"), given_up("calls"));
    }
    text
}

/// Prints text on a terminal, JSON lines elsewhere, or metrics.
pub fn run(args: Args, json: bool) -> Result<()> {
    let stop = common::stop_flag()?;
    let mut client = Client::connect(&args.control)?;
    if args.metrics {
        let text = client.ask(&Request::Metrics, &stop)?;
        output::write_results(text.as_str().unwrap_or_default())?;
        return Ok(());
    }
    let start = Instant::now();
    for line in 0..args.count {
        let due = start + Duration::from_secs(line);
        while Instant::now() < due && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20).min(due.saturating_duration_since(Instant::now())));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let stats = client.ask(&Request::Stats, &stop)?;
        match json || !std::io::stdout().is_terminal() {
            true => result!("{stats}")?,
            false => output::write_results(&text(&stats))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_are_not_0_have_their_names() {
        let port = serde_json::json!({ "name": "a", "link_up": true, "rx_packets": 3, "tx_oversize": 2, "dropped": 0 });
        let text = text(&serde_json::json!({ "ports": [port], "addresses": [] }));
        assert_eq!(
            text,
            "a: link up, rx_packets 3, rx_bytes 0, tx_packets 0, tx_bytes 0, tx_oversize 2\n0 addresses learned\n"
        );
    }
}
