//! `usernic switch`: vhost-user ports joined by a learning bridge, by fixed cross-connects, or reflected.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::switch::{Role, Switch, SwitchConfig, SwitchPortStats};

use crate::common::{self, Ended, Usage};
use crate::control::Control;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Sockets to listen on, one a port; a port's name is its socket's file name
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    listen: Vec<PathBuf>,
    /// A port by its whole spec, as in vhost,path=/run/a.sock,client=1,mtu=9000; may be repeated
    #[arg(long, value_name = "SPEC")]
    port: Vec<PortSpec>,
    /// Join two ports, whatever the addresses, losing nothing: names or numbers from 0
    #[arg(long, value_name = "A:B")]
    connect: Vec<String>,
    /// Send every frame of this port back to it, Ethernet addresses exchanged
    #[arg(long, value_name = "A")]
    reflect: Vec<String>,
    /// Forget an address that was not seen for so many seconds
    #[arg(long, value_name = "S", default_value = "300", value_parser = common::seconds)]
    ageing: Duration,
    /// Poll for so many microseconds without a frame before sleeping
    #[arg(long, value_name = "US", default_value = "200")]
    idle: u64,
    /// Stop after this many seconds
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    seconds: Option<Duration>,
    /// Pin the polling thread to this CPU
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Serve the counters on this Unix socket, for `usernic stats`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// A learned address.
#[derive(Clone, Serialize)]
struct Address {
    mac: String,
    port: usize,
    age_seconds: f64,
}

#[derive(Clone, Serialize)]
struct Snapshot {
    ports: Vec<SwitchPortStats>,
    addresses: Vec<Address>,
}

fn snapshot(switch: &Switch) -> Snapshot {
    let addresses = switch
        .addresses()
        .into_iter()
        .map(|(mac, port, age)| Address {
            mac: crate::packets::format_mac(mac.bytes()),
            port,
            age_seconds: age.as_secs_f64(),
        })
        .collect();
    Snapshot {
        ports: switch.stats(),
        addresses,
    }
}

#[derive(Serialize)]
struct Totals {
    schema: &'static str,
    ended: Ended,
    seconds: f64,
    #[serde(flatten)]
    end: Snapshot,
}

fn config(args: &Args) -> Result<SwitchConfig> {
    let mut config = SwitchConfig::learning(args.listen.iter().cloned());
    for spec in &args.port {
        let name = spec
            .path
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        config.ports.push((name, spec.clone(), Role::Learn));
    }
    if config.ports.is_empty() {
        return Err(Usage("a switch needs ports: --listen PATH[,PATH...] or --port SPEC".into()).into());
    }
    let names: Vec<String> = config.ports.iter().map(|(name, ..)| name.clone()).collect();
    let find = |text: &str| -> Result<usize> {
        let number = text.parse::<usize>().ok().filter(|n| *n < names.len());
        let found = names.iter().position(|n| n == text).or(number);
        found.ok_or_else(|| Usage(format!("no port {text:?}: the ports are {}", names.join(", "))).into())
    };
    let mut taken = vec![false; names.len()];
    let mut set = |port: usize, role: Role| -> Result<()> {
        if std::mem::replace(&mut taken[port], true) {
            return Err(Usage(format!(
                "port {:?} is named twice by --connect or --reflect",
                names[port]
            ))
            .into());
        }
        config.ports[port].2 = role;
        Ok(())
    };
    for pair in &args.connect {
        let Some((a, b)) = pair.split_once(':') else {
            return Err(Usage(format!("--connect {pair}: write two ports, as in a.sock:b.sock or 0:1")).into());
        };
        let (a, b) = (find(a)?, find(b)?);
        if a == b {
            return Err(Usage(format!(
                "--connect {pair}: that is one port; --reflect {} sends its frames back",
                names[a]
            ))
            .into());
        }
        set(a, Role::Connect(b))?;
        set(b, Role::Connect(a))?;
    }
    for port in &args.reflect {
        set(find(port)?, Role::Reflect)?;
    }
    config.ageing = args.ageing;
    config.idle = Duration::from_micros(args.idle);
    Ok(config)
}

/// Switches until the time is over or a signal comes.
pub fn run(args: Args, json: bool) -> Result<()> {
    let config = config(&args)?;
    let stop = common::stop_flag()?;
    if let Some(cpu) = args.cpu {
        common::pin(cpu)?;
    }
    let mut switch = Switch::new(config).context("cannot start the switch")?;
    for (name, port) in switch.ports() {
        tracing::info!("port {name}: {}", port.spec().path.display());
    }
    // The switch belongs to the polling thread; once a second it leaves the loop to publish its counters.
    let latest = Arc::new(Mutex::new(snapshot(&switch)));
    let control = match &args.control {
        None => None,
        Some(path) => {
            let latest = Arc::clone(&latest);
            let read = move || {
                serde_json::to_value(&*latest.lock().unwrap_or_else(PoisonError::into_inner)).unwrap_or_default()
            };
            Some(Control::serve(path, Arc::new(read))?)
        }
    };
    let start = Instant::now();
    let pause = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (stop, pause, limit) = (Arc::clone(&stop), Arc::clone(&pause), args.seconds);
        let publish = args.control.is_some();
        let over = move || stop.load(Ordering::Relaxed) || limit.is_some_and(|l| start.elapsed() >= l);
        std::thread::Builder::new().name("watcher".into()).spawn(move || {
            let mut slices = 0u32;
            while !over() {
                std::thread::sleep(Duration::from_millis(20));
                slices += 1;
                if publish && slices.is_multiple_of(25) {
                    pause.store(true, Ordering::Relaxed);
                }
            }
            pause.store(true, Ordering::Relaxed);
        })?
    };
    let result = loop {
        if let Err(e) = switch.run(&pause) {
            break Err(e);
        }
        if stop.load(Ordering::Relaxed) || watcher.is_finished() || args.seconds.is_some_and(|l| start.elapsed() >= l) {
            break Ok(());
        }
        pause.store(false, Ordering::Relaxed);
        if control.is_some() {
            *latest.lock().unwrap_or_else(PoisonError::into_inner) = snapshot(&switch);
        }
    };
    let ended = if stop.load(Ordering::Relaxed) {
        Ended::Signal
    } else {
        Ended::Time
    };
    let seconds = start.elapsed().as_secs_f64();
    let end = snapshot(&switch);
    drop(control);
    drop(switch);
    result.context("the switch stopped")?;
    if json {
        println!(
            "{}",
            serde_json::to_string(&Totals {
                schema: "usernic.switch/1",
                ended,
                seconds,
                end
            })?
        );
        return Ok(());
    }
    eprintln!(
        "switched for {seconds:.3} s{}",
        if ended == Ended::Signal {
            " (ended by a signal)"
        } else {
            ""
        }
    );
    for port in &end.ports {
        eprintln!(
            "{}: rx {} packets {} bytes, tx {} packets {} bytes, dropped {}, filtered {}, flooded {}, anomalies {}",
            port.name,
            port.stats.rx_packets,
            port.stats.rx_bytes,
            port.stats.tx_packets,
            port.stats.tx_bytes,
            port.dropped,
            port.filtered,
            port.flooded,
            port.stats.anomalies
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: Args,
    }

    fn roles(line: &[&str]) -> Result<Vec<Role>> {
        let args = Only::try_parse_from([&["x"], line].concat())?.args;
        Ok(config(&args)?.ports.into_iter().map(|(_, _, role)| role).collect())
    }

    #[test]
    fn ports_are_joined_by_name_and_number() {
        let listen = ["--listen", "/r/a,/r/b,/r/c,/r/d"];
        let with = |more: &[&'static str]| roles(&[&listen, more].concat());
        assert_eq!(with(&[]).unwrap(), [Role::Learn; 4]);
        let joined = [Role::Connect(2), Role::Reflect, Role::Connect(0), Role::Learn];
        assert_eq!(with(&["--connect", "a:c", "--reflect", "1"]).unwrap(), joined);
        for bad in [
            &["--connect", "a:a"][..],
            &["--connect", "a"],
            &["--connect", "a:x"],
            &["--reflect", "4"],
        ] {
            assert!(with(bad).unwrap_err().is::<Usage>(), "{bad:?}");
        }
        assert!(
            with(&["--connect", "a:b", "--reflect", "b"])
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
        assert!(roles(&[]).unwrap_err().to_string().contains("needs ports"));
    }
}
