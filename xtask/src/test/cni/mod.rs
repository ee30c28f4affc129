//! The CNI plugin against our switch and OVS-DPDK: as a container runtime calls it, and as one that kills it.

mod host;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use host::{Host, Kind, LIMIT, USER};
use serde_json::{Value, json};

use super::{Case, Ctx, Need, Outcome, passed};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::Switch, Kind::Ovs] {
        let mut add = |name: &str, tools: &[&'static str], run: fn(&Ctx, Kind) -> Result<Outcome>| {
            let mut needs = vec![Need::Root, Need::Usernic, Need::Tool("unshare"), Need::Tool("setpriv")];
            needs.extend(tools.iter().map(|&tool| Need::Tool(tool)));
            if kind == Kind::Ovs {
                needs.push(Need::Ovs);
            }
            let case = Case::new(format!("cni/{}/{name}", kind.name()), &needs, move |ctx| run(ctx, kind));
            cases.push(match Host::group(kind) {
                Some(group) => case.sharing(group),
                None => case,
            });
        };
        add("commands", &[], commands);
        add("traffic", &[], traffic);
        add("garbage", &[], garbage);
        add("long-path", &[], long_path);
        add("killed", &["strace"], killed);
        if kind == Kind::Switch {
            add("full-disk", &["nsenter", "mount"], full_disk);
            add("addresses", &[], addresses);
            add("restart", &[], restart);
        }
    }
    cases
}

/// Every command, in the orders that runtimes are known for.
fn commands(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    let config = host.config();
    let versions = host.good("VERSION", "")?;
    ensure!(
        versions["supportedVersions"]
            .as_array()
            .is_some_and(|list| list.contains(&json!("1.1.0"))),
        "{versions}"
    );
    host.good("STATUS", "")?;
    host.good("DEL", "c1").context("DEL without ADD")?;
    host.call("CHECK", "c1", &config)?.expect(101)?;

    let first = host.good("ADD", "c1")?;
    let interface = &first["interfaces"][0];
    let socket = host.dir.join("c1/net1/sock");
    ensure!(
        interface["name"] == "net1" && interface["socketPath"] == json!(socket) && interface["mtu"] == 1500,
        "{first}"
    );
    host.good("CHECK", "c1")?;
    let second = host.good("ADD", "c1").context("ADD again")?;
    ensure!(first == second, "ADD again said something else: {first} {second}");
    ensure!(
        host.ports()?.len() == if kind == Kind::Ovs { 2 } else { 1 },
        "{:?}",
        host.ports()?
    );
    let folder = std::fs::metadata(host.dir.join("c1/net1"))?;
    ensure!(
        folder.uid() == USER && folder.mode() & 0o7 == 0,
        "the folder is of {}, mode {:o}",
        folder.uid(),
        folder.mode()
    );
    let info: Value = serde_json::from_slice(&std::fs::read(host.device_info())?)?;
    let mode = if kind == Kind::Ovs { "server" } else { "client" };
    ensure!(
        info["vhost-user"]["mode"] == mode && info["vhost-user"]["path"] == json!(socket),
        "{info}"
    );

    let mut other = config.clone();
    other["mtu"] = 1400.into();
    other["cniVersion"] = "0.4.0".into();
    other["prevResult"] = json!({ "cniVersion": "0.4.0", "interfaces": [{ "name": "eth0" }], "ips": [] });
    let chained = host.call("ADD", "c2", &other)?.good()?;
    ensure!(
        chained["interfaces"][0]["name"] == "eth0" && chained["interfaces"][1]["mac"] != first["interfaces"][0]["mac"],
        "{chained}"
    );

    for (what, value, code) in [
        ("cniVersion", json!("2.0.0"), 1),
        ("name", json!("a/b"), 7),
        ("mtu", json!("x"), 6),
    ] {
        let mut bad = config.clone();
        bad[what] = value;
        host.call("ADD", "c3", &bad)?.expect(code)?;
    }
    host.call("ADD", "c/3", &config)?.expect(4)?;
    host.call("SING", "c3", &config)?.expect(4)?;
    let mut nobody = config.clone();
    nobody["control"] = json!(ctx.dir.join("nobody"));
    nobody["ovsdb"] = nobody["control"].clone();
    host.call("STATUS", "", &nobody)?.expect(50)?;
    host.call("ADD", "c3", &nobody)?.expect(50)?;
    if kind == Kind::Ovs {
        let mut bridge = config.clone();
        bridge["bridge"] = "br7".into();
        host.call("STATUS", "", &bridge)?.expect(50)?;
        host.call("ADD", "c3", &bridge)?.expect(100)?;
    }

    for container in ["c1", "c2"] {
        host.good("DEL", container)?;
        host.good("DEL", container).context("DEL again")?;
    }
    host.call("CHECK", "c1", &config)?.expect(101)?;
    host.nothing_left()?;
    passed()
}

/// Two containers that know nothing but `auto`, and no more privileges than a folder gives.
fn traffic(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    for container in ["a", "b"] {
        host.good("ADD", container)?;
    }
    ping(&host)?;
    // A container that is none of these users cannot reach the port.
    let stranger = std::fs::metadata(host.dir.join("a/net1"))?;
    ensure!(stranger.mode() & 0o007 == 0, "mode {:o}", stranger.mode());
    for container in ["a", "b"] {
        host.good("DEL", container)?;
    }
    host.nothing_left()?;
    passed()
}

fn ping(host: &Host<'_>) -> Result<()> {
    let answers = [
        "-v",
        "forward",
        "--port",
        "auto",
        "--wait",
        "20",
        "--mode",
        "icmpecho",
        "--ip",
        "192.0.2.2",
    ];
    let mut answers = host.container("b", &answers)?;
    let asks = [
        "ping",
        "--port",
        "auto,network=fast",
        "--wait",
        "20",
        "--from",
        "192.0.2.1",
        "--to",
        "192.0.2.2",
    ];
    let mut asks = host.container("a", &[&asks[..], &["--count", "5", "--interval", "0.02"]].concat())?;
    asks.wait_success(LIMIT)
        .with_context(|| format!("the other side{}", answers.tail()))?;
    answers.stop(Duration::from_secs(5));
    Ok(())
}

/// GC leaves what it is told to, and what is of another network.
fn garbage(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    let mut config = host.config();
    let mut slow = config.clone();
    slow["name"] = "slow".into();
    for container in ["a", "b", "c"] {
        host.good("ADD", container)?;
    }
    host.call("ADD", "d", &slow)?.good()?;
    // Whoever cleaned up by hand leaves a port without a folder.
    std::fs::remove_dir_all(host.dir.join("b"))?;
    host.call("GC", "", &config)?
        .expect(7)
        .context("GC without a list would remove everything")?;
    config["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "net1" }]);
    host.call("GC", "", &config)?.good()?;
    host.call("GC", "", &config)?.good().context("GC again")?;
    ensure!(
        host.ports()?.len() == if kind == Kind::Ovs { 4 } else { 2 },
        "{:?}",
        host.ports()?
    );
    host.good("CHECK", "a")?;
    host.call("CHECK", "d", &slow)?.good()?;
    ensure!(!host.dir.join("c").exists(), "the folder of c is left");
    slow["cni.dev/valid-attachments"] = json!([]);
    host.call("GC", "", &slow)?.good()?;
    host.good("DEL", "a")?;
    host.nothing_left()?;
    passed()
}

/// A socket whose path has 108 bytes cannot be; one of 107 can.
fn long_path(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    let config = host.config();
    let fixed = host.dir.join("/net1/sock".trim_start_matches('/')).as_os_str().len() + 1;
    let name = |len: usize| "c".repeat(len - fixed);
    let too_long = host.call("ADD", &name(108), &config)?;
    too_long.expect(7)?;
    ensure!(
        too_long.json["msg"]
            .as_str()
            .is_some_and(|text| text.contains("108 bytes")),
        "{too_long:?}"
    );
    host.good("DEL", &name(108))?;
    host.nothing_left()?;
    host.good("ADD", &name(107))?;
    host.good("CHECK", &name(107))?;
    host.good("DEL", &name(107))?;
    host.nothing_left()?;
    passed()
}

/// System calls that change something, or tell somebody to; strace counts each by itself.
const STEPS: [&str; 18] = [
    "mkdir",
    "mkdirat",
    "rename",
    "renameat",
    "renameat2",
    "chown",
    "lchown",
    "fchown",
    "fchownat",
    "chmod",
    "fchmod",
    "fchmodat",
    "unlink",
    "unlinkat",
    "rmdir",
    "write",
    "sendto",
    "connect",
];

/// Killed before each of its steps, at ADD and at DEL: the next DEL, or the next ADD and its DEL, leave nothing.
fn killed(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    let config = host.config();
    let killed_at = |command: &str, call: &str, step: usize| {
        let inject = format!("inject=?{call}:signal=KILL:when={step}");
        let under = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", &inject];
        host.call_under(&under, command, "c1", &config)
    };
    let mut steps = [0; 2];
    for (command, count) in ["ADD", "DEL"].into_iter().zip(&mut steps) {
        for call in STEPS {
            for step in 1.. {
                ensure!(step < 100, "{command} does not end");
                let context = || format!("{command} killed before {call} number {step}");
                if command == "DEL" {
                    host.good("ADD", "c1").with_context(context)?;
                }
                let answer = killed_at(command, call, step)?;
                if !answer.killed {
                    answer.good().with_context(context)?;
                    host.good("DEL", "c1")?;
                    break;
                }
                *count += 1;
                host.good("DEL", "c1").with_context(context)?;
                host.nothing_left().with_context(context)?;
                // The other way to go on: as if nothing had been.
                if command == "ADD" {
                    // How often the last of these calls are made depends on how messages arrive: it may get through.
                    let again = killed_at(command, call, step)?;
                    if again.killed {
                        host.good("ADD", "c1").with_context(context)?;
                    } else {
                        again.good().with_context(context)?;
                    }
                    host.good("CHECK", "c1").with_context(context)?;
                    host.good("DEL", "c1").with_context(context)?;
                    host.nothing_left().with_context(context)?;
                }
            }
        }
    }
    // A folder, a file, an owner, a port: at the least.
    ensure!(
        steps[0] >= 8 && steps[1] >= 4,
        "only {steps:?} steps: is strace's filter right?"
    );
    host.nothing_left()?;
    Ok(Outcome::Passed(format!(
        "killed before {} steps of ADD and {} of DEL",
        steps[0], steps[1]
    )))
}

/// A disk that fills up at any point of ADD.
fn full_disk(ctx: &Ctx, _: Kind) -> Result<Outcome> {
    let mut refused = [0; 2];
    for (option, most, count) in [("nr_inodes", 12, 0), ("nr_blocks", 4, 1)] {
        let mut worked = false;
        for number in 2..=most {
            // The root takes the first inode; 0 would mean no limit.
            let host = Host::small(ctx, &format!("{option}={number}"))?;
            let context = || format!("a tmpfs with {option}={number}");
            if option == "nr_blocks" {
                // Folders take no blocks: fill it but for less than a file.
                let mut fill = host.command("dd");
                let (file, blocks) = (host.dir.join("filler"), format!("count={}", number - 1));
                fill.args(["if=/dev/zero", "bs=4096", &blocks, "status=none"])
                    .arg(format!("of={}", file.display()));
                crate::process::run("dd", fill, LIMIT)?;
            }
            let answer = host.call("ADD", "c1", &host.config())?;
            if answer.good {
                worked = true;
                host.good("CHECK", "c1").with_context(context)?;
                host.good("DEL", "c1").with_context(context)?;
            } else {
                let code = answer.json["code"].as_u64();
                // A socket is the switch's to make.
                ensure!(code == Some(5) || code == Some(100), "{}: {answer:?}", context());
                refused[count] += 1;
            }
            if option == "nr_blocks" {
                let mut remove = host.command("rm");
                remove.arg(host.dir.join("filler"));
                crate::process::run("rm", remove, LIMIT)?;
            }
            host.nothing_left().with_context(context)?;
        }
        ensure!(worked || option == "nr_blocks", "no disk was large enough");
    }
    ensure!(refused.iter().all(|&count| count > 0), "no disk was full: {refused:?}");
    passed()
}

/// An address plugin gives and takes back what it gave, whatever goes wrong after it.
fn addresses(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    let script = "#!/bin/sh\n\
        echo \"$CNI_COMMAND $CNI_CONTAINERID\" >> \"${0%/*}/ipam.log\"\n\
        cat > /dev/null\n\
        [ \"$CNI_COMMAND\" != ADD ] || echo '{\"ips\":[{\"address\":\"192.0.2.9/24\",\"gateway\":\"192.0.2.1\"}],\"dns\":{}}'\n";
    let path = ctx.dir.join("give");
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut config = host.config();
    config["ipam"] = json!({ "type": "give" });
    let log = || std::fs::read_to_string(ctx.dir.join("ipam.log")).unwrap_or_default();

    let result = host.call("ADD", "c1", &config)?.good()?;
    let ip = &result["ips"][0];
    ensure!(
        ip["address"] == "192.0.2.9/24" && ip["gateway"] == "192.0.2.1" && ip["interface"] == 0,
        "{result}"
    );
    let port: Value = serde_json::from_slice(&std::fs::read(host.dir.join("c1/net1/port.json"))?)?;
    ensure!(port["ips"] == json!(["192.0.2.9/24"]), "{port}");
    let again = host.call("ADD", "c1", &config)?.good()?;
    ensure!(again["ips"][0]["address"] == "192.0.2.9/24", "{again}");
    host.call("DEL", "c1", &config)?.good()?;
    ensure!(
        log() == "ADD c1\nDEL c1\n",
        "the address plugin was called so: {:?}",
        log()
    );

    // A port that the switch refuses: a file is where the socket is to be.
    host.call("ADD", "c1", &config)?.good()?;
    let mut taken = config.clone();
    taken["mtu"] = 1400.into();
    taken["queues"] = 2.into();
    taken["name"] = "other".into();
    host.call("ADD", "c1", &taken)?
        .good()
        .context("another network for the same interface takes its place")?;
    ensure!(host.ports()?.len() == 1, "{:?}", host.ports()?);
    host.call("DEL", "c1", &taken)?.good()?;
    host.call("DEL", "c1", &config)?.good()?;

    config["ipam"] = json!({ "type": "absent" });
    host.call("ADD", "c1", &config)?.expect(102)?;
    host.nothing_left().or_else(|_| {
        // DEL needs the address plugin too, so the folder waits for it.
        config["ipam"] = json!({ "type": "give" });
        host.call("DEL", "c1", &config)?.good()?;
        host.nothing_left()
    })?;
    passed()
}

/// Our switch is started anew under containers that run.
fn restart(ctx: &Ctx, kind: Kind) -> Result<Outcome> {
    let host = Host::start(ctx, kind)?;
    for container in ["a", "b"] {
        host.good("ADD", container)?;
    }
    ping(&host)?;
    host.restart()?;
    host.good("CHECK", "a")?;
    ping(&host).context("after a restart of the switch")?;
    for container in ["a", "b"] {
        host.good("DEL", container)?;
    }
    host.nothing_left()?;
    passed()
}
