//! `usernic cat`: a part of the last-level cache for polling threads alone, or back to all.

use anyhow::Result;
use usernic::resctrl::{Partition, undo};

use super::doctor::{Cpus, list};
use crate::common::HostArgs;
use crate::result;

/// The group's name in resctrl.
pub const GROUP: &str = "usernic";

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The CPUs of the polling threads: 2,4-5
    #[arg(long, value_name = "LIST", value_parser = list, required_unless_present = "undo")]
    cpu: Option<Cpus>,
    /// Ways of the cache that are theirs alone
    #[arg(long, value_name = "N", required_unless_present = "undo")]
    ways: Option<u32>,
    /// Give all ways back to all
    #[arg(long, conflicts_with_all = ["cpu", "ways"])]
    undo: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Writes it.
pub fn run(args: Args, json: bool) -> Result<()> {
    let host = args.host.host();
    if args.undo {
        undo(&host, GROUP)?;
        if json {
            result!("{}", serde_json::json!({ "schema": "usernic.cat/1", "group": null }))?;
        }
        return Ok(());
    }
    let cpus = args.cpu.map(|list| list.0).unwrap_or_default();
    let partition = Partition::plan(&host, GROUP, &cpus, args.ways.unwrap_or(0))?;
    partition.apply(&host)?;
    if json {
        result!(
            "{}",
            serde_json::json!({ "schema": "usernic.cat/1", "group": partition })
        )?;
    } else {
        result!(
            "{}: {}; all others: {}",
            partition.group,
            partition.schemata,
            partition.rest
        )?;
    }
    Ok(())
}
