//! That the machine in software tells what happens in it: the cases that rest on it can fail.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Case, Ctx, Need, Outcome, passed};
use crate::machine::{Config, Initramfs, Vm};

const SHORT: Duration = Duration::from_secs(30);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("machine/scripts", &[Need::Machine], scripts),
        Case::new("machine/panic", &[Need::Machine], panic),
    ]
}

fn boot(ctx: &Ctx, fill: impl FnOnce(&mut Initramfs) -> Result<()>) -> Result<Vm> {
    let machine = ctx.machine()?;
    let initramfs = ctx.dir.join("initramfs");
    let mut root = Initramfs::new(&machine.guest)?;
    fill(&mut root)?;
    root.write(&initramfs)?;
    let config = Config {
        echo: ctx.verbose,
        ..Default::default()
    };
    Vm::boot(machine, &config, &initramfs, &ctx.dir)
}

/// Statuses, every byte of the output, files of the root file system, and a script that does not end.
fn scripts(ctx: &Ctx) -> Result<Outcome> {
    let bytes: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut vm = boot(ctx, |root| {
        root.file("some/where/bytes", 0o600, &bytes)?;
        root.modules(&["dummy"])
    })?;
    let ended = vm.run("status", "echo one; echo two >&2; exit 3", SHORT)?;
    ensure!(ended.status == 3 && ended.output == b"one\ntwo\n", "{ended:?}");
    let ended = vm.run("bytes", "cat /some/where/bytes", SHORT)?;
    ensure!(
        ended.status == 0 && ended.output == bytes,
        "{} bytes of output differ",
        ended.output.len()
    );
    let mode = vm.ok("mode", "stat -c %a /some/where/bytes /some", SHORT)?;
    ensure!(mode == "600\n755\n", "{mode}");
    let loaded = vm.ok("modules", "grep ^dummy /proc/modules", SHORT)?;
    ensure!(!loaded.is_empty(), "the module was not loaded");
    let error = vm
        .ok("failure", "echo as it should; false", SHORT)
        .err()
        .context("a failure that was none")?;
    ensure!(format!("{error:#}").contains("as it should"), "{error:#}");
    let error = vm
        .run("endless", "sleep 60", Duration::from_secs(1))
        .err()
        .context("60 s in one")?;
    ensure!(format!("{error:#}").contains("in time"), "{error:#}");
    passed()
}

/// A guest that dies is an error that shows its last words, and is noticed at once.
fn panic(ctx: &Ctx) -> Result<Outcome> {
    let mut vm = boot(ctx, |_| Ok(()))?;
    let died = vm.run(
        "crash",
        "echo c >/proc/sysrq-trigger; sleep 60",
        Duration::from_secs(50),
    );
    let error = format!("{:#}", died.err().context("a guest that survived its crash")?);
    ensure!(
        error.contains("the guest is gone") && error.contains("its last output"),
        "{error}"
    );
    let console = vm.console();
    ensure!(console.contains("Kernel panic"), "{console}");
    passed()
}
