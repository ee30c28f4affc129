//! What is wrong gets a clear message and a non-zero exit, soon, and leaves nothing behind.

mod backend;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use super::link::path;
use super::{Case, Ctx, Need, Outcome, Usernic, passed};
use crate::pcap;
use crate::process::{Process, Surroundings, describe, sleep};
use backend::{Behaviour, FakeBackend};

/// For a refusal: generous, since a machine may be busy; a hang is far longer.
const SOON: Duration = Duration::from_secs(20);

/// A refused command line: name, arguments, and what its message must say (one of the words, in any case).
type Refused = (&'static str, &'static [&'static str], &'static [&'static str]);

/// `DIR` stands for the case's directory.
const REFUSED: &[Refused] = &[
    (
        "no-such-socket",
        &["generate", "--wait", "0", "--port", "virtio-user,path=DIR/none.sock"],
        &["none.sock"],
    ),
    (
        "queue-size-0",
        &["generate", "--port", "virtio-user,path=DIR/s,queue_size=0"],
        &["queue_size", "from 2 to 32768"],
    ),
    (
        "queue-size-3",
        &["generate", "--port", "virtio-user,path=DIR/s,queue_size=3"],
        &["queue_size", "power of two"],
    ),
    (
        "queue-size-65536",
        &["generate", "--port", "virtio-user,path=DIR/s,queue_size=65536"],
        &["queue_size", "32768"],
    ),
    (
        "unknown-key",
        &["generate", "--port", "virtio-user,path=DIR/s,queue_siez=256"],
        &["queue_siez", "did you mean queue_size"],
    ),
    (
        "missing-value",
        &["generate", "--port", "virtio-user,path=DIR/s,queues"],
        &["queues"],
    ),
    (
        "unknown-kind",
        &["generate", "--port", "virtio-usr,path=DIR/s"],
        &["did you mean virtio-user"],
    ),
    ("no-path", &["generate", "--port", "virtio-user,queues=1"], &["path="]),
    (
        "no-such-capture",
        &["replay", "--port", "virtio-user,path=DIR/s", "--pcap", "DIR/none.pcap"],
        &["none.pcap"],
    ),
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &(name, args, words) in REFUSED {
        cases.push(Case::new(format!("bad-input/{name}"), &[Need::Usernic], move |ctx| {
            let dir = path(&ctx.dir)?;
            let args: Vec<String> = args.iter().map(|a| a.replace("DIR", dir)).collect();
            refused(ctx, &args.iter().map(String::as_str).collect::<Vec<_>>(), words)
        }));
    }
    let mut add = |name: &str, needs: &[Need], run: fn(&Ctx) -> Result<Outcome>| {
        let needs: Vec<Need> = needs.iter().copied().chain([Need::Usernic]).collect();
        cases.push(Case::new(format!("bad-input/{name}"), &needs, run));
    };
    add("long-socket-path", &[], long_path);
    add("socket-not-ours", &[], socket_is_a_file);
    add("back-end-closes-at-each-step", &[], back_end_closes);
    add("back-end-without-version-1", &[], no_version_1);
    add("more-queues-than-the-back-end-has", &[], too_many_queues);
    add("back-end-that-never-answers", &[], silent_back_end);
    add("mount-too-small", &[Need::Root, Need::Hugepages], mount_too_small);
    add("hugetlbfs-full", &[Need::Root, Need::Hugepages], hugetlbfs_full);
    add("capture-truncated", &[], capture_truncated);
    add("capture-of-something-else", &[], not_a_capture);
    add("frame-longer-than-the-buffers", &[], long_frame);
    add("sigint-in-traffic", &[], interrupted_in_traffic);
    add("kill-front-end-in-traffic", &[], kill_front_end);
    add("kill-back-end-in-traffic", &[], kill_back_end);
    cases
}

/// What must be the same before and after.
#[derive(PartialEq, Eq, Debug)]
struct Traces {
    files: Vec<String>,
    free_pages: usize,
    shm: usize,
}

impl Traces {
    fn of(ctx: &Ctx) -> Result<Self> {
        let names = |dir: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
        };
        let mut files = names(&ctx.dir);
        files.sort();
        Ok(Traces {
            files,
            free_pages: crate::scratch::free_pages(),
            shm: names(Path::new("/dev/shm")).len(),
        })
    }
}

/// Runs `usernic` with arguments that it must refuse, with a message that has all of `words` in it.
fn refused(ctx: &Ctx, args: &[&str], words: &[&str]) -> Result<Outcome> {
    let before = Traces::of(ctx)?;
    let process = Usernic::spawn(ctx, args)?;
    let message = failure(process, words)?;
    let after = Traces::of(ctx)?;
    ensure!(before == after, "left behind: {after:?} instead of {before:?}");
    Ok(Outcome::Passed(message))
}

/// Waits for a failure and checks its message, which it gives in one line.
fn failure(mut process: Process, words: &[&str]) -> Result<String> {
    let status = process.wait(SOON)?;
    let output = process.output();
    match status.code() {
        Some(0) => bail!("it ended as if all were well{}", process.tail()),
        Some(101) => bail!("it panicked{}", process.tail()),
        None => bail!("{}{}", describe(status), process.tail()),
        Some(_) => {}
    }
    for word in words {
        let found = output.to_lowercase().contains(&word.to_lowercase());
        ensure!(found, "its message does not say \"{word}\"{}", process.tail());
    }
    let said = |l: &&str| l.starts_with("usernic: ") || l.starts_with("error: ");
    Ok(output.lines().find(said).unwrap_or_default().trim().to_owned())
}

fn long_path(ctx: &Ctx) -> Result<Outcome> {
    let long = ctx.dir.join("x".repeat(120));
    let front = format!("virtio-user,path={}", path(&long)?);
    refused(ctx, &["generate", "--port", &front], &["107"])?;
    let back = format!("vhost,path={}", path(&long)?);
    refused(ctx, &["capture", "--port", &back, "--pcap", "/dev/null"], &["107"])
}

/// A file where the socket should be made: it is not ours to remove.
fn socket_is_a_file(ctx: &Ctx) -> Result<Outcome> {
    let file = ctx.dir.join("file");
    std::fs::write(&file, "precious")?;
    let spec = format!("vhost,path={}", path(&file)?);
    let outcome = refused(ctx, &["capture", "--port", &spec, "--pcap", "/dev/null"], &["file"])?;
    ensure!(std::fs::read(&file)? == b"precious", "the file was overwritten");
    Ok(outcome)
}

fn front_spec(socket: &Path, more: &str) -> Result<String> {
    Ok(format!("virtio-user,path={},timeout=2000{more}", path(socket)?))
}

/// Runs a front-end against a back-end that misbehaves.
fn against(ctx: &Ctx, behaviour: Behaviour, more: &str, words: &[&str]) -> Result<String> {
    let socket = ctx.dir.join("s");
    let backend = FakeBackend::listen(&socket, behaviour)?;
    let args = [
        "generate",
        "--port",
        &front_spec(&socket, more)?,
        "--wait",
        "4",
        "--count",
        "1",
    ];
    let message = failure(Usernic::spawn(ctx, &args)?, words)?;
    backend.finish()?;
    Ok(message)
}

fn back_end_closes(ctx: &Ctx) -> Result<Outcome> {
    let before = Traces::of(ctx)?;
    let steps = {
        // How many messages a whole negotiation has: until the first ring is enabled.
        let socket = ctx.dir.join("s");
        let backend = FakeBackend::listen(&socket, Behaviour::default())?;
        let args = [
            "generate",
            "--port",
            &front_spec(&socket, "")?,
            "--wait",
            "3",
            "--count",
            "1",
        ];
        let mut process = Usernic::spawn(ctx, &args)?;
        let steps = backend.steps_until_enabled(SOON)?;
        process.kill();
        backend.finish()?;
        steps
    };
    ensure!(steps >= 8, "only {steps} messages until the rings are enabled");
    for step in 0..steps {
        let behaviour = Behaviour {
            close_after: Some(step),
            ..Default::default()
        };
        against(ctx, behaviour, ",reconnect=0", &["s"]).with_context(|| format!("closed after {step} messages"))?;
    }
    let after = Traces::of(ctx)?;
    ensure!(before == after, "left behind: {after:?} instead of {before:?}");
    Ok(Outcome::Passed(format!("{steps} steps")))
}

fn no_version_1(ctx: &Ctx) -> Result<Outcome> {
    let behaviour = Behaviour {
        features: backend::FEATURES & !(1 << 32),
        ..Default::default()
    };
    Ok(Outcome::Passed(against(ctx, behaviour, "", &["VERSION_1"])?))
}

fn too_many_queues(ctx: &Ctx) -> Result<Outcome> {
    let behaviour = Behaviour {
        queues: 1,
        ..Default::default()
    };
    Ok(Outcome::Passed(against(
        ctx,
        behaviour,
        ",queues=4",
        &["queue", "4", "1"],
    )?))
}

fn silent_back_end(ctx: &Ctx) -> Result<Outcome> {
    let behaviour = Behaviour {
        silent: true,
        ..Default::default()
    };
    Ok(Outcome::Passed(against(ctx, behaviour, "", &["s"])?))
}

/// A front-end in a mount namespace of its own, with a hugetlbfs of so many bytes, after `first` was run there.
fn with_hugetlbfs(ctx: &Ctx, size: u64, first: &str, spec: &str, words: &[&str]) -> Result<Outcome> {
    let mount = ctx.hugetlbfs("small")?.context("the hugepages are gone")?;
    let socket = ctx.dir.join("s");
    let before = Traces::of(ctx)?;
    let backend = FakeBackend::listen(&socket, Behaviour::default())?;
    let port = format!(
        "{},memory=hugetlbfs,huge_dir={}{spec}",
        front_spec(&socket, "")?,
        path(&mount)?
    );
    let mut command = std::process::Command::new("sh");
    let script = format!("{first} exec \"$0\" generate --port \"$1\" --wait 3 --count 1");
    command
        .args(["-ec", &script])
        .arg(&ctx.usernic)
        .arg(&port)
        .current_dir(&mount);
    let surroundings = Surroundings {
        hugetlbfs: Some(mount.clone()),
        hugetlbfs_size: Some(size),
        no_stdin: true,
        ..Default::default()
    };
    let message = failure(Process::spawn("usernic generate", command, &surroundings)?, words)?;
    backend.finish()?;
    let after = Traces::of(ctx)?;
    ensure!(before == after, "left behind: {after:?} instead of {before:?}");
    Ok(Outcome::Passed(message))
}

fn mount_too_small(ctx: &Ctx) -> Result<Outcome> {
    with_hugetlbfs(ctx, 4 << 20, "", ",mem=64M", &["huge"])
}

fn hugetlbfs_full(ctx: &Ctx) -> Result<Outcome> {
    // The shell's own working directory was opened before the mount: the path is looked up again.
    with_hugetlbfs(ctx, 4 << 20, "cd \"$PWD\"; fallocate -l 4M taken;", "", &["huge"])
}

fn replay_file(ctx: &Ctx, bytes: &[u8], words: &[&str]) -> Result<Outcome> {
    let file = ctx.dir.join("bad.pcap");
    std::fs::write(&file, bytes)?;
    let socket = ctx.dir.join("s");
    let backend = FakeBackend::listen(&socket, Behaviour::default())?;
    let args = [
        "replay",
        "--port",
        &front_spec(&socket, "")?,
        "--wait",
        "3",
        "--strict",
        "--pcap",
        path(&file)?,
    ];
    let message = failure(Usernic::spawn(ctx, &args)?, words)?;
    backend.finish()?;
    Ok(Outcome::Passed(message))
}

fn capture_truncated(ctx: &Ctx) -> Result<Outcome> {
    let whole = ctx.dir.join("whole.pcap");
    pcap::write(&whole, &pcap::frames([100, 200, 300]))?;
    let bytes = std::fs::read(whole)?;
    replay_file(ctx, &bytes[..bytes.len() - 10], &["bad.pcap"])?;
    replay_file(ctx, &bytes[..30], &["bad.pcap"])?;
    replay_file(ctx, &bytes[..10], &["bad.pcap"])
}

fn not_a_capture(ctx: &Ctx) -> Result<Outcome> {
    replay_file(ctx, b"", &["bad.pcap"])?;
    replay_file(ctx, &[0x5a; 4096], &["bad.pcap"])
}

fn long_frame(ctx: &Ctx) -> Result<Outcome> {
    let whole = ctx.dir.join("whole.pcap");
    pcap::write(&whole, &pcap::frames([100, 4000]))?;
    replay_file(ctx, &std::fs::read(whole)?, &["4000"])
}

/// Our switch with two ports, and a generator on the first.
fn traffic(ctx: &Ctx) -> Result<(Process, Process, Process)> {
    let (a, b) = (ctx.dir.join("a"), ctx.dir.join("b"));
    let listen = format!("{},{}", path(&a)?, path(&b)?);
    let mut switch = Usernic::spawn(ctx, &["switch", "--listen", &listen, "--connect", "0:1"])?;
    wait_for(&mut switch, &b)?;
    let capture = Usernic::spawn(
        ctx,
        &[
            "capture",
            "--port",
            &format!("virtio-user,path={}", path(&b)?),
            "--pcap",
            "/dev/null",
        ],
    )?;
    let generate = generator(ctx, &a)?;
    sleep(Duration::from_millis(500))?;
    Ok((switch, capture, generate))
}

fn generator(ctx: &Ctx, socket: &Path) -> Result<Process> {
    Usernic::spawn(
        ctx,
        &[
            "generate",
            "--port",
            &format!("virtio-user,path={}", path(socket)?),
            "--rate",
            "10K",
        ],
    )
}

fn wait_for(process: &mut Process, socket: &Path) -> Result<()> {
    let end = std::time::Instant::now() + SOON;
    while !socket.exists() {
        ensure!(
            process.exited()?.is_none() && std::time::Instant::now() < end,
            "no {}{}",
            socket.display(),
            process.tail()
        );
        sleep(Duration::from_millis(5))?;
    }
    Ok(())
}

/// SIGINT ends each of them in order, with its totals, and the switch's sockets are gone.
fn interrupted_in_traffic(ctx: &Ctx) -> Result<Outcome> {
    let before = Traces::of(ctx)?;
    let (mut switch, mut capture, mut generate) = traffic(ctx)?;
    for process in [&mut generate, &mut capture, &mut switch] {
        process.signal(Signal::INT)?;
        process.wait_success(SOON)?;
        ensure!(
            !process.output().trim().is_empty(),
            "{} ended without totals",
            process.name()
        );
    }
    let after = Traces::of(ctx)?;
    ensure!(before == after, "left behind: {after:?} instead of {before:?}");
    passed()
}

/// So many hugepages are free as were before. The count is the machine's, and others may hold some for a moment.
fn came_back(pages: usize) -> Result<()> {
    let end = std::time::Instant::now() + SOON;
    while crate::scratch::free_pages() < pages {
        ensure!(std::time::Instant::now() < end, "hugepages were left behind");
        sleep(Duration::from_millis(20))?;
    }
    Ok(())
}

/// The switch outlives a front-end that dies, and serves the next one on the same socket.
fn kill_front_end(ctx: &Ctx) -> Result<Outcome> {
    let pages = crate::scratch::free_pages();
    let (mut switch, mut capture, mut generate) = traffic(ctx)?;
    for _ in 0..3 {
        generate.signal(Signal::KILL)?;
        generate.wait(SOON)?;
        generate = generator(ctx, &ctx.dir.join("a"))?;
        sleep(Duration::from_millis(300))?;
        ensure!(
            switch.exited()?.is_none(),
            "the switch died with its front-end{}",
            switch.tail()
        );
        ensure!(
            generate.exited()?.is_none(),
            "the next front-end is not served{}",
            generate.tail()
        );
    }
    for process in [&mut generate, &mut capture, &mut switch] {
        process.signal(Signal::INT)?;
        process.wait_success(SOON)?;
    }
    came_back(pages)?;
    passed()
}

/// Front-ends outlive a switch that dies: they stop when asked, and hold nothing.
fn kill_back_end(ctx: &Ctx) -> Result<Outcome> {
    let pages = crate::scratch::free_pages();
    let (mut switch, mut capture, mut generate) = traffic(ctx)?;
    switch.signal(Signal::KILL)?;
    switch.wait(SOON)?;
    sleep(Duration::from_millis(500))?;
    for process in [&mut generate, &mut capture] {
        // It may have ended by itself, with an error that says that the other side is gone.
        if let Some(status) = process.exited()? {
            ensure!(
                status.code().is_some_and(|c| c != 101),
                "{}: {}{}",
                process.name(),
                describe(status),
                process.tail()
            );
        } else {
            process.signal(Signal::INT)?;
            let status = process.wait(SOON)?;
            ensure!(
                status.code().is_some_and(|c| c != 101),
                "{}: {}{}",
                process.name(),
                describe(status),
                process.tail()
            );
        }
    }
    came_back(pages)?;
    // A socket that a dead switch left: the next switch takes its place.
    let (a, b) = (ctx.dir.join("a"), ctx.dir.join("b"));
    let listen = format!("{},{}", path(&a)?, path(&b)?);
    let mut next = Usernic::spawn(ctx, &["switch", "--listen", &listen, "--connect", "0:1"])?;
    sleep(Duration::from_millis(500))?;
    ensure!(
        next.exited()?.is_none(),
        "the next switch does not start over the dead one's sockets{}",
        next.tail()
    );
    next.signal(Signal::INT)?;
    next.wait_success(SOON)?;
    ensure!(
        !a.exists() && std::fs::metadata(&ctx.dir)?.permissions().mode() != 0,
        "a socket was left behind"
    );
    passed()
}
