//! `usernic switch ctl`: asks a running switch, and changes it.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::Value;
use usernic::spec::PortSpec;

use crate::common;
use crate::control::{Client, Joined, Request};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// The control socket of the switch
    #[arg(long, value_name = "PATH", default_value = "/run/usernic/switch.sock")]
    control: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Its ports
    List,
    /// Add a port; if just that port is there, nothing happens
    Add {
        /// Its name
        name: String,
        /// What it is, as in vhost,path=/run/a.sock,socket_mode=0660; a path that is not whole begins in this command's folder
        spec: String,
        /// Join it to this port, whatever the addresses, losing nothing
        #[arg(long, value_name = "NAME", conflicts_with = "reflect")]
        connect: Option<String>,
        /// Send every frame of it back
        #[arg(long)]
        reflect: bool,
    },
    /// Remove a port
    Remove {
        /// Its name
        name: String,
        /// It is no error if there is none
        #[arg(long)]
        if_exists: bool,
    },
    /// Counters and learned addresses
    Stats,
    /// The learned addresses
    Addresses,
    /// The counters as Prometheus reads them
    Metrics,
}

/// Asks, and prints the answer as JSON.
pub fn run(args: Args) -> Result<()> {
    let stop = common::stop_flag()?;
    let mut client = Client::connect(&args.control)?;
    let mut out = crate::output::stdout();
    match args.what {
        What::List => writeln!(out, "{}", client.ask(&Request::List, &stop)?)?,
        What::Stats => writeln!(out, "{}", client.ask(&Request::Stats, &stop)?)?,
        What::Addresses => {
            let stats = client.ask(&Request::Stats, &stop)?;
            let name = |port: &Value| {
                port.as_u64()
                    .and_then(|n| stats["ports"].get(n as usize))
                    .map(|p| &p["name"])
            };
            for entry in stats["addresses"].as_array().into_iter().flatten() {
                let (mac, age) = (entry["mac"].as_str(), entry["age_seconds"].as_f64());
                let port = name(&entry["port"]).and_then(Value::as_str).unwrap_or("?");
                writeln!(out, "{} {port} {:.1} s", mac.unwrap_or("?"), age.unwrap_or(0.0))?;
            }
        }
        What::Metrics => {
            let text = client.ask(&Request::Metrics, &stop)?;
            write!(out, "{}", text.as_str().unwrap_or_default())?;
        }
        What::Add {
            name,
            spec,
            connect,
            reflect,
        } => {
            // Mistakes are told before anybody is asked.
            spec.parse::<PortSpec>().map_err(|e| common::Usage(e.to_string()))?;
            let spec = common::whole(&spec)?;
            let join = match connect {
                Some(to) => Joined::Connect(to),
                None if reflect => Joined::Reflect,
                None => Joined::Learn,
            };
            writeln!(out, "{}", client.ask(&Request::Add { name, spec, join }, &stop)?)?;
        }
        What::Remove { name, if_exists } => {
            let answer = client.ask(&Request::Remove { name: name.clone() }, &stop)?;
            if answer["removed"] != true && !if_exists {
                bail!("there is no port {name}");
            }
            writeln!(out, "{answer}")?;
        }
    }
    Ok(())
}
