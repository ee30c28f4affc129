//! libusernic: its header in C and C++, its installation, its examples through OVS-DPDK and under valgrind.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use object::read::elf::FileHeader as _;
use object::{Object as _, ObjectSymbol as _};

use super::link::path;
use super::{Case, Ctx, Link, Need, Outcome, Usernic, passed};
use crate::bench::inclusive;
use crate::install_c::{Layout, install};
use crate::pcap;
use crate::peers::ovs::{Ovs, PortKind};
use crate::process::{self, Process, Surroundings};

const GROUP: &str = "ffi";
const LIMIT: Duration = Duration::from_secs(60);
/// valgrind takes its time.
const SLOW: Duration = Duration::from_secs(120);

/// The library as installed, and the examples as their Makefile builds them.
struct Installed {
    prefix: PathBuf,
    examples: PathBuf,
}

pub fn cases() -> Vec<Case> {
    let build = [Need::Tool("gcc"), Need::Tool("pkg-config"), Need::Tool("make")];
    let with = |more: &[Need]| [&build[..], more].concat();
    vec![
        Case::new("ffi/header", &with(&[Need::Tool("g++")]), header).sharing(GROUP),
        Case::new("ffi/symbols", &build, symbols).sharing(GROUP),
        Case::new(
            "ffi/valgrind",
            &with(&[Need::Tool("valgrind"), Need::Usernic]),
            under_valgrind,
        )
        .sharing(GROUP),
        Case::new("ffi/lent", &with(&[Need::Tool("valgrind")]), lent).sharing(GROUP),
        Case::new("ffi/instructions", &with(&[Need::Tool("valgrind")]), instructions).sharing(GROUP),
        Case::new("ffi/ovs", &with(&[Need::Usernic, Need::Ovs, Need::Root]), through_ovs).sharing(GROUP),
    ]
}

impl Installed {
    fn get(ctx: &Ctx) -> Result<std::cell::RefMut<'_, Self>> {
        ctx.shared(GROUP, |dir| {
            let layout = Layout {
                prefix: dir.join("prefix"),
                libdir: "lib".into(),
                destdir: None,
            };
            install(&ctx.root, &layout, ctx.verbose)?;
            let examples = dir.join("examples");
            std::fs::create_dir_all(&examples)?;
            for file in std::fs::read_dir(ctx.root.join("ffi/examples"))? {
                let from = file?.path();
                let source = from.extension().is_some_and(|e| e == "c" || e == "h");
                if source || from.ends_with("Makefile") {
                    std::fs::copy(&from, examples.join(from.file_name().unwrap_or_default()))?;
                }
            }
            let installed = Installed {
                prefix: layout.prefix,
                examples,
            };
            // As the README has it: by a variable of make's command line.
            let mut make = Command::new("make");
            make.arg("-C").arg(&installed.examples);
            make.arg(format!(
                "PKG_CONFIG_PATH={}",
                installed.prefix.join("lib/pkgconfig").display()
            ));
            process::run("make", make, LIMIT)?;
            Ok(installed)
        })
    }

    /// A command that finds the library.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", self.prefix.join("lib"));
        command.env("PKG_CONFIG_PATH", self.prefix.join("lib/pkgconfig"));
        command
    }

    /// What pkg-config says.
    fn flags(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let mut command = self.command("pkg-config");
        command.args(arguments).arg("usernic");
        let output = process::run("pkg-config", command, LIMIT)?;
        Ok(output.split_whitespace().map(str::to_owned).collect())
    }

    /// Compiles one of `ffi/tests/c`.
    fn compile(&self, ctx: &Ctx, compiler: &[&str], source: &str, to: &str, libraries: &[String]) -> Result<PathBuf> {
        let program = ctx.dir.join(to);
        let mut command = self.command(compiler[0]);
        command
            .args(&compiler[1..])
            .args(["-O2", "-g", "-Wall", "-Wextra", "-Werror"]);
        command.args(self.flags(&["--cflags"])?);
        command.arg(ctx.root.join("ffi/tests/c").join(source));
        // What follows is no source.
        command.args(["-x", "none", "-o"]).arg(&program).args(libraries);
        process::run(&compiler.join(" "), command, LIMIT)?;
        Ok(program)
    }

    /// A command that fails on any error or leak.
    fn valgrind(&self, program: &Path) -> Command {
        let mut command = self.command("valgrind");
        command.args(["--quiet", "--error-exitcode=9", "--leak-check=full"]);
        // What lives until the end is the table of handles.
        command.args([
            "--show-leak-kinds=definite,indirect,possible",
            "--errors-for-leak-kinds=definite,indirect,possible",
        ]);
        command.arg(program);
        command
    }

    /// Starts an example on CPU 0: the peers poll on CPU 1.
    fn spawn(&self, example: &str, arguments: &[&str], valgrind: bool) -> Result<Process> {
        let program = self.examples.join(example);
        let mut command = if valgrind {
            self.valgrind(&program)
        } else {
            self.command(program)
        };
        command.args(arguments);
        let surroundings = Surroundings {
            cpus: vec![0],
            no_stdin: true,
            ..Default::default()
        };
        Process::spawn(example, command, &surroundings)
    }
}

/// The header as C11 and as C++17, without a warning, linked with both libraries, and run.
fn header(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let shared = installed.flags(&["--libs"])?;
    // The static library by its name: pkg-config --static gives what it needs besides.
    let mut whole = vec![path(&installed.prefix.join("lib/libusernic.a"))?.to_owned()];
    whole.extend(installed.flags(&["--static", "--libs-only-l"])?);
    whole.retain(|flag| flag != "-lusernic");
    let mut said = Vec::new();
    for (name, compiler) in [
        ("c11", &["gcc", "-std=c11", "-pedantic"][..]),
        ("c++17", &["g++", "-std=c++17", "-pedantic", "-x", "c++"]),
    ] {
        for (kind, libraries) in [("shared", &shared), ("static", &whole)] {
            let program = installed.compile(ctx, compiler, "header.c", &format!("{name}-{kind}"), libraries)?;
            let output = process::run(name, installed.command(&program), LIMIT)
                .with_context(|| format!("{name}, {kind}: the exit status is the number of the check that failed"))?;
            said.push(output.trim().to_owned());
        }
    }
    said.dedup();
    ensure!(said.len() == 1, "the libraries differ: {said:?}");
    Ok(Outcome::Passed(said.remove(0)))
}

/// The shared library exports what the header declares and nothing else, under its soname.
fn symbols(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let library = installed.prefix.join("lib/libusernic.so");
    let bytes = std::fs::read(&library)?;
    let file = object::read::elf::ElfFile64::<object::Endianness>::parse(&*bytes)?;
    let mut exported: Vec<&str> = file
        .dynamic_symbols()
        .filter(|symbol| symbol.is_definition())
        .map(|symbol| symbol.name())
        .collect::<Result<_, _>>()?;
    exported.sort_unstable();
    let header = std::fs::read_to_string(installed.prefix.join("include/usernic.h"))?;
    let mut declared: Vec<&str> = header
        .lines()
        .filter(|line| !line.starts_with([' ', '*', '/', '#']) && !line.starts_with("static"))
        .filter_map(|line| line.split_once('('))
        .filter_map(|(before, _)| before.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("usernic_"))
        .collect();
    declared.sort_unstable();
    if exported != declared {
        bail!("exported: {exported:?}, declared: {declared:?}");
    }
    let endian = file.endian();
    let sections = file.elf_header().sections(endian, &*bytes)?;
    let (dynamic, strings) = sections.dynamic(endian, &*bytes)?.context("no dynamic section")?;
    let strings = sections.strings(endian, &*bytes, strings)?;
    let soname = dynamic
        .iter()
        .find(|entry| entry.d_tag.get(endian) == object::elf::DT_SONAME)
        .and_then(|entry| strings.get(entry.d_val.get(endian) as u32).ok())
        .context("no soname")?;
    let soname = std::str::from_utf8(soname)?;
    ensure!(
        installed.prefix.join("lib").join(soname).exists(),
        "nothing is installed as {soname}"
    );
    Ok(Outcome::Passed(format!("{} functions, {soname}", exported.len())))
}

/// The demo's capture, and frames of several pieces.
fn capture(ctx: &Ctx) -> Result<Vec<Vec<u8>>> {
    let mut frames = pcap::read(&ctx.root.join("cli/data/demo.pcap"))?;
    frames.extend(pcap::frames([60, 1515, 2048, 2049, 4096, 8999, 9000]));
    Ok(frames)
}

/// All examples against our own switch, under valgrind: no error and no leak, and every byte arrives.
fn under_valgrind(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let sockets: Vec<PathBuf> = ["a", "b", "c", "d"].iter().map(|name| ctx.dir.join(name)).collect();
    let listen = sockets.iter().map(|s| path(s)).collect::<Result<Vec<_>>>()?.join(",");
    let mut switch = Usernic::spawn(
        ctx,
        &[
            "switch",
            "--listen",
            &listen,
            "--mtu",
            "9000",
            "--connect",
            "0:1",
            "--connect",
            "2:3",
        ],
    )?;
    for socket in &sockets {
        super::capture::wait_for_socket(socket, &mut switch)?;
    }
    let spec = |socket: &Path| format!("virtio-user,path={},memory=memfd,mtu=9000", socket.display());
    // generate - switch - echo, and back.
    let mut echo = installed.spawn("echo", &[&spec(&sockets[1]), "200"], true)?;
    echo.wait_for("link up", 0, SLOW)?;
    let mut generate = installed.spawn("generate", &[&spec(&sockets[0]), "300", "200", "500"], true)?;
    generate.wait_success(SLOW)?;
    echo.wait_success(SLOW)?;
    // replay - switch - l2fwd - switch - capture.
    let frames = capture(ctx)?;
    let link = Link {
        capture: &spec(&sockets[3]),
        replay: "",
        rate: 0,
    };
    let mut capturing = link.start(ctx, "t", &frames)?;
    capturing.process().wait_for("link up", 0, LIMIT)?;
    let count = frames.len().to_string();
    let mut l2fwd = installed.spawn("l2fwd", &[&spec(&sockets[1]), &spec(&sockets[2]), &count], true)?;
    let mark = l2fwd.wait_for("link up", 0, SLOW)?;
    l2fwd.wait_for("link up", mark, SLOW)?;
    let input = ctx.dir.join("in.pcap");
    pcap::write(&input, &frames)?;
    let mut replay = installed.spawn("replay", &[&spec(&sockets[0]), path(&input)?, "500"], true)?;
    replay.wait_success(SLOW)?;
    l2fwd.wait_success(SLOW)?;
    capturing.finish(ctx)?;
    switch.signal(rustix::process::Signal::INT)?;
    switch.wait_success(LIMIT)?;
    passed()
}

/// Buffers in memory that a C program lends, under valgrind.
fn lent(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let program = installed.compile(
        ctx,
        &["gcc", "-std=gnu11"],
        "lent.c",
        "lent",
        &installed.flags(&["--libs"])?,
    )?;
    let mut command = installed.valgrind(&program);
    command.arg(ctx.dir.join("s"));
    let output = process::run("lent", command, SLOW)?;
    Ok(Outcome::Passed(output.trim().to_owned()))
}

/// Instructions for each packet that a C loop may take: what it takes, and some room for another compiler.
const MOST: [(&str, f64); 2] = [("loop_rx", 160.0), ("loop_tx", 200.0)];

/// Instructions for each packet of a receive and a transmit loop in C, under callgrind: they repeat to the digit.
fn instructions(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let program = installed.compile(
        ctx,
        &["gcc", "-std=gnu11"],
        "loops.c",
        "loops",
        &installed.flags(&["--libs"])?,
    )?;
    let count = |bursts: u32| -> Result<Vec<u64>> {
        let out = ctx.dir.join("callgrind.out");
        let mut command = installed.command("valgrind");
        command.arg("--tool=callgrind");
        command.arg(format!("--callgrind-out-file={}", out.display()));
        command
            .arg(&program)
            .arg(ctx.dir.join("s"))
            .args([&bursts.to_string(), "64"]);
        process::run("valgrind", command, SLOW)?;
        let report = std::fs::read_to_string(&out)?;
        MOST.iter()
            .map(|(function, _)| inclusive(&report, function).with_context(|| format!("no call of {function}")))
            .collect()
    };
    // What is done once drops out of the difference.
    let (less, more) = (count(256)?, count(512)?);
    let mut said = Vec::new();
    for ((function, most), (less, more)) in MOST.iter().zip(less.iter().zip(more)) {
        let each = (more - less) as f64 / (256.0 * 32.0);
        ensure!(
            each <= *most,
            "{function}: {each:.1} instructions for each packet, {most} at the most"
        );
        said.push(format!("{function} {each:.1}"));
    }
    Ok(Outcome::Passed(format!("instructions a packet: {}", said.join(", "))))
}

/// replay - OVS - l2fwd - OVS - capture, byte for byte; and generate - OVS - echo, and back.
fn through_ovs(ctx: &Ctx) -> Result<Outcome> {
    let installed = Installed::get(ctx)?;
    let mut ovs = Ovs::start(&ctx.found, &ctx.subdir("ovs")?, ctx.hugetlbfs("ovs")?)?;
    let mut sockets = Vec::new();
    for name in ["p1", "p2", "p3", "p4"] {
        sockets.push(ovs.add_port(name, PortKind::VhostUser, 9000)?);
    }
    for (from, to) in [(1, 2), (2, 1), (3, 4), (4, 3)] {
        ovs.connect(from, to)?;
    }
    // A ring has room for all that is sent: three programs share a CPU, and none may come too late.
    let spec = |socket: &Path| format!("virtio-user,path={},mtu=9000,queue_size=2048", socket.display());
    let frames = capture(ctx)?;
    let link = Link {
        capture: &spec(&sockets[3]),
        replay: "",
        rate: 0,
    };
    let mut capturing = link.start(ctx, "t", &frames)?;
    capturing.process().wait_for("link up", 0, LIMIT)?;
    let count = frames.len().to_string();
    let mut l2fwd = installed.spawn("l2fwd", &[&spec(&sockets[1]), &spec(&sockets[2]), &count], false)?;
    ovs.wait_log("has been added", 3, LIMIT)?;
    let input = ctx.dir.join("in.pcap");
    pcap::write(&input, &frames)?;
    let mut replay = installed.spawn("replay", &[&spec(&sockets[0]), path(&input)?, "2000"], false)?;
    replay.wait_success(LIMIT)?;
    let forwarded = l2fwd.wait_success(LIMIT);
    let mut statistics = || {
        format!(
            "p1: {} p4: {}",
            ovs.statistics("p1").trim(),
            ovs.statistics("p4").trim()
        )
    };
    forwarded.with_context(&mut statistics)?;
    capturing.finish_in_any_order(ctx).with_context(&mut statistics)?;

    let mut echo = installed.spawn("echo", &[&spec(&sockets[1]), "2000"], false)?;
    ovs.wait_log("has been added", 5, LIMIT)?;
    let mut generate = installed.spawn("generate", &[&spec(&sockets[0]), "64", "2000", "4000"], false)?;
    generate.wait_success(LIMIT)?;
    echo.wait_success(LIMIT)?;
    passed()
}
