//! DPDK's virtio_user under the conditions of our containers: what it takes until it comes up, how long that is, and
//! what it leaves behind when it is killed. Told, beside the same of ours; only ours is held to anything.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Stage, wait_for_socket};
use crate::peers::engine::Kind;
use crate::process::Process;
use crate::test::link::path;
use crate::test::{Ctx, Outcome, Usernic};

const LIMIT: Duration = Duration::from_secs(20);

/// What a variant is given beyond our container, and EAL's arguments.
struct Variant {
    name: &'static str,
    arguments: &'static [&'static str],
    huge_mib: u64,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        name: "as-ours",
        arguments: &[],
        huge_mib: 2,
    },
    Variant {
        name: "in-memory",
        arguments: &["--in-memory", "--single-file-segments"],
        huge_mib: 2,
    },
    Variant {
        name: "in-memory-and-more-pages",
        arguments: &["--in-memory", "--single-file-segments", "-m", "64", "--no-telemetry"],
        huge_mib: 512,
    },
    Variant {
        name: "no-huge",
        arguments: &["--no-huge", "-m", "64", "--in-memory", "--no-telemetry"],
        huge_mib: 0,
    },
];

/// The cases of one table, as parts.
pub fn beside(ctx: &Ctx) -> Result<Outcome> {
    let program = ctx.found.testpmd.as_ref().context("no testpmd")?.path.clone();
    if !program.starts_with("/usr") {
        return Ok(Outcome::Skipped("testpmd is not installed, but unpacked".into()));
    }
    let mut stage = Stage::new(ctx, Kind::Crun)?;
    let socket = stage.folders[0].join("port.sock");
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", path(&socket)?])?;
    wait_for_socket(&socket, &mut switch)?;
    let mut parts = Vec::new();

    let port = format!("virtio-user,path={},memory=memfd-huge", socket.display());
    let command = [
        "usernic",
        "-v",
        "capture",
        "--port",
        &port,
        "--pcap",
        "-",
        "--timeout",
        "0.2",
    ];
    let name = format!("xt{}-ours", std::process::id());
    let printed = stage.printed(ctx, &name, &port, &command)?;
    let start = Instant::now();
    let mut ours = stage.engine.spawn(&name, &printed, &ctx.dir.join("ours"))?;
    ours.wait_for("link up", 0, LIMIT)?;
    let time = start.elapsed().as_secs_f64() * 1e3;
    ours.wait_success(LIMIT)?;
    parts.push(told(
        "usernic",
        format!("link up {time:.0} ms after the container's start, with 2 MiB of huge pages"),
    ));

    let rootfs = ctx.subdir("system")?;
    for folder in ["usr", "etc", "proc", "dev", "sys", "run"] {
        fs::create_dir_all(rootfs.join(folder))?;
    }
    for link in ["lib", "lib64", "bin", "sbin"] {
        symlink(format!("usr/{link}"), rootfs.join(link))?;
    }
    let mut came_up = 0;
    for variant in &VARIANTS {
        let mut config: Value = serde_json::from_str(&printed)?;
        let mut arguments = vec![path(&program)?.to_owned(), "--no-pci".into()];
        arguments.extend(variant.arguments.iter().map(|a| (*a).to_owned()));
        arguments.push(format!("--vdev=net_virtio_user0,path={}", socket.display()));
        arguments.push("--".into());
        config["process"]["args"] = json!(arguments);
        config["root"]["path"] = json!(rootfs);
        config["linux"]["resources"]["hugepageLimits"][0]["limit"] = json!(variant.huge_mib << 20);
        // What it calls is not what this is about.
        config["linux"].as_object_mut().context("no linux")?.remove("seccomp");
        let mounts = config["mounts"].as_array_mut().context("no mounts")?;
        for folder in ["/usr", "/etc"] {
            mounts.push(json!({"destination": folder, "type": "bind", "source": folder, "options": ["rbind", "ro"]}));
        }
        let name = format!("xt{}-{}", std::process::id(), variant.name);
        let start = Instant::now();
        let out = ctx.dir.join(variant.name);
        let mut process = stage.engine.spawn(&name, &config.to_string(), &out)?;
        let status = process.wait(LIMIT)?;
        let time = start.elapsed().as_secs_f64() * 1e3;
        let text = format!("{}{}", process.output(), fs::read_to_string(&out)?);
        let what = if text.contains("Press enter to exit") {
            came_up += 1;
            format!(
                "up and down again in {time:.0} ms ({} MiB of huge pages allowed)",
                variant.huge_mib
            )
        } else {
            let line = text
                .lines()
                .rfind(|l| {
                    ["Cannot", "cannot", "FATAL", "Error", "No "]
                        .iter()
                        .any(|word| l.contains(word))
                })
                .unwrap_or_default();
            format!("does not start ({}): {}", crate::process::describe(status), line.trim())
        };
        let shown = variant.arguments.join(" ");
        parts.push(told(
            &format!("dpdk-{}", variant.name),
            format!("{what}; EAL: --no-pci {shown}"),
        ));
    }
    ensure!(came_up > 0, "no variant came up, so that nothing is compared");
    parts.extend(left_behind(ctx, &stage, &program, &socket)?);
    Ok(Outcome::Parts(parts))
}

fn told(name: &str, what: String) -> (String, Outcome) {
    (name.to_owned(), Outcome::Passed(what))
}

/// Both are killed with a hugetlbfs of their own and a folder for what else they make; what is there then?
fn left_behind(ctx: &Ctx, stage: &Stage, program: &Path, socket: &Path) -> Result<Vec<(String, Outcome)>> {
    let mut parts = Vec::new();
    for who in ["usernic", "dpdk"] {
        let (huge, run) = (ctx.subdir(&format!("{who}-huge"))?, ctx.subdir(&format!("{who}-run"))?);
        let (at, own) = (huge.display(), run.display());
        let line = match who {
            "usernic" => format!(
                "exec {} -v capture --pcap - --port virtio-user,path={},memory=hugetlbfs,huge_dir={at} > /dev/null",
                ctx.usernic.display(),
                socket.display()
            ),
            _ => format!(
                "XDG_RUNTIME_DIR={own} RUNTIME_DIRECTORY={own} exec {} --no-pci --huge-dir={at} -m 64 --no-telemetry \
                 --single-file-segments --vdev=net_virtio_user0,path={} -- -i",
                program.display(),
                socket.display()
            ),
        };
        let line = format!("mount -t hugetlbfs -o pagesize=2M none {at} && cd {own} && {line}");
        let mut process: Process = stage.engine.run(who, &line)?;
        let ready = if who == "usernic" { "link up" } else { "testpmd>" };
        process.wait_for(ready, 0, LIMIT)?;
        process.signal(Signal::KILL)?;
        process.wait(LIMIT)?;
        let count = |folder: &Path| -> Result<usize> {
            let list = stage
                .engine
                .shell("find", &format!("find {} ! -type d", folder.display()))?;
            Ok(list.lines().count())
        };
        let (pages, files) = (count(&huge)?, count(&run)?);
        if who == "usernic" {
            ensure!(
                pages == 0 && files == 0,
                "killed, it leaves {pages} files of huge pages and {files} others"
            );
        }
        let what = format!("killed, it leaves {pages} files of huge pages and {files} others");
        parts.push(told(&format!("{who}-leaves"), what));
    }
    Ok(parts)
}
