//! That the machine in software tells what happens in it: the cases that rest on it can fail.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Case, Ctx, Need, Outcome, passed};
use crate::machine::{Config, Initramfs, Machine, Vm};

const SHORT: Duration = Duration::from_secs(30);

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("machine/scripts", &[Need::Machine], scripts),
        Case::new("machine/panic", &[Need::Machine], panic),
    ]
}

/// The kernel of our own making, whose cases are run with `cargo xtask hwtest --kernel full`.
pub fn full_case() -> Case {
    Case::new("machine/full", &[Need::FullKernel], full)
}

fn boot(ctx: &Ctx, fill: impl FnOnce(&mut Initramfs) -> Result<()>) -> Result<Vm> {
    boot_on(ctx, ctx.machine()?, Config::default(), fill)
}

fn boot_on(
    ctx: &Ctx,
    machine: &Machine,
    config: Config,
    fill: impl FnOnce(&mut Initramfs) -> Result<()>,
) -> Result<Vm> {
    let initramfs = ctx.dir.join("initramfs");
    let mut root = Initramfs::new(&machine.guest)?;
    fill(&mut root)?;
    root.write(&initramfs)?;
    let config = Config {
        echo: ctx.verbose,
        ..config
    };
    Vm::boot(machine, &config, &initramfs, &ctx.dir)
}

/// It boots, behind an IOMMU, and has what no kernel of Debian's has: iommufd, noiommu mode, vhost-net, all built in.
fn full(ctx: &Ctx) -> Result<Outcome> {
    let machine = ctx.full_machine()?;
    let config = Config {
        devices: ["-device", "intel-iommu,intremap=on,caching-mode=on"]
            .map(str::to_owned)
            .to_vec(),
        append: "intel_iommu=on no_timer_check".into(),
        ..Config::default()
    };
    let mut vm = boot_on(ctx, &machine, config, |_| Ok(()))?;
    // Opened, not only there: a node without its driver is of no use.
    let script = "set -e
uname -r
for node in /dev/iommu /dev/vfio/vfio /dev/vhost-net /dev/net/tun; do
    [ -c $node ] || { echo no $node; exit 1; }
    exec 4<>$node
    exec 4>&-
done
[ -e /sys/module/vfio/parameters/enable_unsafe_noiommu_mode ]
[ -d /sys/bus/pci/drivers/vfio-pci ]
[ -d /sys/bus/pci/drivers/ixgbevf ]
ls /sys/class/iommu | grep -q dmar
[ ! -s /proc/modules ]";
    let said = vm.ok("nodes", script, SHORT)?;
    let version = machine.guest.version();
    ensure!(said.trim() == version, "the kernel is {said}, not {version}");
    let log = vm.ok("kernel log", "dmesg | grep -E 'BUG:|WARNING:' || true", SHORT)?;
    ensure!(log.is_empty(), "the kernel complains:\n{log}");
    vm.power_off()?;
    Ok(Outcome::Passed(format!("Linux {version}")))
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
