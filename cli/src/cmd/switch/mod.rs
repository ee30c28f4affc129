//! `usernic switch`: vhost-user ports joined by a learning bridge, by fixed cross-connects, or reflected.
//!
//! With `--control` it is a service: ports come and go while it runs ([`service`], and [`ctl`] as its client).

mod ctl;
pub mod service;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use usernic::spec::PortSpec;
use usernic::switch::{Mac, Role, Switch, SwitchConfig, SwitchError, SwitchPortStats, SwitchReport};
use usernic::vhost_user::SocketAccess;

use crate::common::{self, ConfineArgs, Confined, Ended, Usage};
use crate::control::{self, Bound, Control, Request};
use crate::descriptors;
use crate::{note, result};

/// Arguments.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
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
    /// MTU of the ports of --listen: a port is sent no frame that is longer (1500)
    #[arg(long, value_name = "BYTES", requires = "listen")]
    mtu: Option<u16>,
    /// Forward frames for the link-local groups 01:80:c2:00:00:00 to :0f (STP, LACP, LLDP), as a bridge does not
    #[arg(long)]
    forward_link_local: bool,
    /// Poll for so many microseconds without a frame before sleeping
    #[arg(long, value_name = "US", default_value = "200")]
    idle: u64,
    /// Stop after this many seconds
    #[arg(long, value_name = "S", value_parser = common::seconds)]
    seconds: Option<Duration>,
    /// Pin the polling thread to this CPU
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Permissions of the sockets of --listen, in octal
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<String>,
    /// User and group of the sockets of --listen, by number: 1000:1000, 1000 or :1000
    #[arg(long, value_name = "USER:GROUP")]
    socket_owner: Option<String>,
    /// Serve counters and changes on this Unix socket, for `usernic stats` and `usernic switch ctl`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Permissions of the control socket, in octal (0600)
    #[arg(long, value_name = "MODE", requires = "control")]
    control_mode: Option<String>,
    /// User and group of the control socket, by number
    #[arg(long, value_name = "USER:GROUP", requires = "control")]
    control_owner: Option<String>,
    /// Serve the counters, and nothing else, to everybody on this Unix socket
    #[arg(long, value_name = "PATH")]
    metrics: Option<PathBuf>,
    /// Keep ports that were added in this file, and have them again after a restart
    #[arg(long, value_name = "FILE", requires = "control")]
    state: Option<PathBuf>,
    #[command(flatten)]
    confine: ConfineArgs,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Ask a running switch, or change it
    Ctl(ctl::Args),
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
    confined: Confined,
    ports: Vec<SwitchPortStats>,
    addresses: Vec<Address>,
}

impl Snapshot {
    fn of(report: &SwitchReport, confined: Confined) -> Self {
        Self::new(report.ports.clone(), &report.addresses, confined)
    }

    fn new(ports: Vec<SwitchPortStats>, addresses: &[(Mac, usize, Duration)], confined: Confined) -> Self {
        let addresses = addresses.iter().map(|(mac, port, age)| Address {
            mac: mac.to_string(),
            port: *port,
            age_seconds: age.as_secs_f64(),
        });
        Snapshot {
            confined,
            ports,
            addresses: addresses.collect(),
        }
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
    let access = access("--socket", args.socket_mode.as_deref(), args.socket_owner.as_deref())?;
    for (_, spec, _) in &mut config.ports {
        spec.access = access;
        if let Some(mtu) = args.mtu {
            // The key's own parser knows what it may be.
            let parsed = format!("vhost,path=x,mtu={mtu}").parse::<PortSpec>();
            spec.mtu = parsed.map_err(|e| Usage(format!("--mtu: {e}")))?.mtu;
        }
    }
    for spec in &args.port {
        // A virtual function has an address, no socket.
        let name = match (spec.path.file_name(), spec.pci) {
            (Some(name), _) => name.to_string_lossy().into_owned(),
            (None, Some(address)) => address.to_string(),
            (None, None) => spec.kind.name().to_owned(),
        };
        config.ports.push((name, spec.clone(), Role::Learn));
    }
    if config.ports.is_empty() && args.control.is_none() {
        let what = "a switch needs ports: --listen PATH[,PATH...], --port SPEC, or --control PATH to add some later";
        return Err(Usage(what.into()).into());
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
    config.forward_link_local = args.forward_link_local;
    config.check().map_err(|e| {
        let hint = match e {
            SwitchError::NameTaken { .. } => " (the name of a port is the file name of its socket)",
            _ => "",
        };
        Usage(format!("{e}{hint}"))
    })?;
    Ok(config)
}

/// Permissions and owner, from the values of two arguments.
fn access(argument: &str, mode: Option<&str>, owner: Option<&str>) -> Result<SocketAccess> {
    let mode = mode.map(|mode| format!(",socket_mode={mode}"));
    let owner = owner.map(|owner| format!(",socket_owner={owner}"));
    let text = format!("vhost,path=x{}{}", mode.unwrap_or_default(), owner.unwrap_or_default());
    let spec = text.parse::<PortSpec>();
    spec.map(|spec| spec.access)
        .map_err(|e| Usage(format!("{argument}-mode, {argument}-owner: {e}")).into())
}

/// How long the ports have to take what is under way when the switch ends.
const DRAIN: Duration = Duration::from_millis(500);

/// Switches until the time is over or a signal comes.
pub fn run(mut args: Args, json: bool) -> Result<()> {
    if let Some(Command::Ctl(args)) = args.command.take() {
        return ctl::run(args);
    }
    let config = config(&args)?;
    let stop = common::stop_flag()?;
    // Whoever has these is the only one: before anything is read, changed or opened.
    let state = args.state.as_deref().map(service::State::own).transpose()?;
    let sockets = Sockets::bind(&args)?;
    descriptors::check(config.ports.iter().map(|(_, spec, _)| spec));
    // A switch that takes ports later cannot know which files and calls those need: its service manager confines it.
    let grows = args.control.is_some();
    let ports: Vec<PortSpec> = config.ports.iter().map(|(_, spec, _)| spec.clone()).collect();
    let confined = if grows {
        Confined::default()
    } else {
        args.confine.files(&ports, &[args.metrics.as_ref()])
    };
    let mut switch = Switch::new(config).context("cannot start the switch")?;
    let given: Vec<_> = switch
        .ports()
        .map(|(name, port)| {
            (
                name.to_owned(),
                format!("{},path={}", port.spec().kind.name(), port.spec().path.display()),
            )
        })
        .collect();
    let names: Vec<String> = given.iter().map(|(name, spec)| format!("{name} ({spec})")).collect();
    let start = Instant::now();
    // What ends the polling loop: a signal, or the time.
    let over = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (stop, over, limit) = (Arc::clone(&stop), Arc::clone(&over), args.seconds);
        std::thread::Builder::new().name("watcher".into()).spawn(move || {
            while !(stop.load(Ordering::Relaxed)
                || over.load(Ordering::Relaxed)
                || limit.is_some_and(|l| start.elapsed() >= l))
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            over.store(true, Ordering::Relaxed);
        })?
    };
    let service = Arc::new(service::Service::new(switch.handle(), given, state));
    let polling = {
        let (over, cpu) = (Arc::clone(&over), args.cpu);
        std::thread::Builder::new()
            .name("switch".into())
            .spawn(move || -> Result<Snapshot> {
                cpu.map_or(Ok(()), common::pin)?;
                let result = switch.run(&over);
                over.store(true, Ordering::Relaxed);
                switch.drain(DRAIN);
                result.context("the switch stopped")?;
                // The switch ends here, and with it the wait of whoever asks for something now.
                let mut ports = switch.stats();
                ports.extend(switch.removed().cloned());
                Ok(Snapshot::new(ports, &switch.addresses(), Confined::default()))
            })?
    };
    let served = service.restore().and_then(|restored| {
        let served = sockets.serve(&service)?;
        started(&[names, restored].concat(), args.control.as_deref());
        Ok(served)
    });
    if served.is_err() {
        over.store(true, Ordering::Relaxed);
    }
    let confined = if grows { confined } else { args.confine.calls(confined) };
    service.set_confined(confined);
    if served.is_ok()
        && let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready])
    {
        tracing::warn!("the service manager was not told that the switch is ready: {error}");
    }
    let polled = polling.join();
    over.store(true, Ordering::Relaxed);
    let _ = watcher.join();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    drop(served?);
    let mut end = polled.map_err(|_| anyhow::anyhow!("the polling thread panicked"))??;
    end.confined = confined;
    let ended = if stop.load(Ordering::Relaxed) {
        Ended::Signal
    } else {
        Ended::Time
    };
    let seconds = start.elapsed().as_secs_f64();
    if json {
        let totals = Totals {
            schema: "usernic.switch/1",
            ended,
            seconds,
            end,
        };
        result!("{}", serde_json::to_string(&totals)?)?;
        return Ok(());
    }
    note!(
        "switched for {seconds:.3} s{}",
        if ended == Ended::Signal {
            " (ended by a signal)"
        } else {
            ""
        }
    );
    for port in &end.ports {
        note!("{}", line(port));
    }
    Ok(())
}

/// A port's totals: what moved, and by its reason what did not.
fn line(port: &SwitchPortStats) -> String {
    let stats = &port.stats;
    let mut line = format!(
        "{}: rx {} packets {} bytes, tx {} packets {} bytes, dropped {}, filtered {}, flooded {}, anomalies {}",
        port.name,
        stats.rx_packets,
        stats.rx_bytes,
        stats.tx_packets,
        stats.tx_bytes,
        port.dropped,
        port.filtered,
        port.flooded,
        stats.anomalies
    );
    for (count, what) in [
        (stats.rx_runts, "runts from it"),
        (stats.rx_oversize, "from it over its mtu"),
        (stats.rx_errors, "malformed from it"),
        (stats.rx_filtered, "kept out by its filter"),
        (stats.rx_no_buffer, "times no buffer"),
        (stats.tx_oversize, "for it over its mtu"),
        (stats.tx_errors, "longer than its front-end's buffers"),
        (stats.tx_filtered, "kept out by its front-end's filter"),
        (stats.peers_refused, "front-ends sent away"),
    ] {
        if count > 0 {
            line += &format!(", {count} {what}");
        }
    }
    line
}

/// Says what the switch begins with.
fn started(ports: &[String], control: Option<&Path>) {
    let mut line = match ports {
        [] => "switching, with no port yet".to_owned(),
        ports => format!("switching: {}", ports.join(", ")),
    };
    if let Some(control) = control {
        line += &format!("; control socket {}", control.display());
    }
    note!("{line}");
}

/// The sockets for counters and changes, bound before anything else happens.
struct Sockets {
    metrics: Option<Bound>,
    control: Option<Bound>,
}

impl Sockets {
    fn bind(args: &Args) -> Result<Self> {
        let access = access("--control", args.control_mode.as_deref(), args.control_owner.as_deref())?;
        let control = args.control.as_ref().map(|path| Bound::new(path, access)).transpose()?;
        let everybody = self::access("--metrics", Some("666"), None)?;
        let metrics = args
            .metrics
            .as_ref()
            .map(|path| Bound::new(path, everybody))
            .transpose()?;
        Ok(Sockets { metrics, control })
    }

    fn serve(self, service: &Arc<service::Service>) -> Result<Vec<Control>> {
        let mut served = Vec::new();
        if let Some(metrics) = self.metrics {
            let service = Arc::clone(service);
            served.push(
                metrics.serve(Arc::new(control::at_intervals(move |request| match request {
                    Request::Stats | Request::Metrics => service.answer(request),
                    _ => bail!("here counters are told, and nothing is changed"),
                })))?,
            );
        }
        if let Some(control) = self.control {
            let service = Arc::clone(service);
            served.push(control.serve(Arc::new(move |request| service.answer(request)))?);
        }
        Ok(served)
    }
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

    #[test]
    fn names_are_told_apart_before_anything_is_opened() {
        for bad in [
            &["--listen", "/r/1/a,/r/2/a"][..],
            &["--listen", "/r/a", "--port", "vhost,path=/q/a"],
            &["--port", "vhost,path=/r/a", "--port", "virtio-user,path=/q/a"],
            &["--port", "vf,pci=0000:81:10.0", "--port", "vf,pci=0000:81:10.0"],
        ] {
            let error = roles(bad).unwrap_err();
            assert!(
                error.is::<Usage>() && error.to_string().contains("there is a port"),
                "{error}"
            );
        }
        let functions = ["--port", "vf,pci=0000:81:10.0", "--port", "vf,pci=0000:81:10.2"];
        assert_eq!(roles(&functions).unwrap(), [Role::Learn; 2]);
        let mtu = |value: &str| {
            let args = Only::try_parse_from(["x", "--listen", "/r/a", "--mtu", value])?.args;
            Ok::<_, anyhow::Error>(config(&args)?.ports[0].1.mtu)
        };
        assert_eq!(mtu("9000").unwrap(), 9000);
        assert!(mtu("9711").unwrap_err().to_string().contains("9710"));
    }

    #[test]
    fn totals_say_why_frames_are_missing() {
        let mut port = SwitchPortStats {
            name: "a".into(),
            link_up: false,
            stats: usernic::Stats::default(),
            dropped: 0,
            filtered: 0,
            flooded: 0,
            copies: 0,
        };
        assert!(line(&port).ends_with("anomalies 0"));
        port.stats.tx_oversize = 3;
        port.stats.rx_runts = 2;
        assert!(line(&port).ends_with("anomalies 0, 2 runts from it, 3 for it over its mtu"));
    }
}
