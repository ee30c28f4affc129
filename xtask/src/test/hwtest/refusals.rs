//! What cannot work, on a kernel that really refuses it: each message names the cause and the mend.

use anyhow::Result;
use vf_model::Kind;

use super::stage::{Stage, Wiring};
use crate::test::{Case, Ctx, Need, Outcome};

pub fn cases() -> Vec<Case> {
    type Check = fn(&Ctx) -> Result<String>;
    let checks: [(&str, Check); 5] = [
        ("no-iommu", no_iommu),
        ("group-not-viable", group),
        ("no-interrupt-remapping", no_remapping),
        ("narrow-iommu", narrow),
        ("removal", removal),
    ];
    let case = |(name, check): (&str, Check)| {
        Case::new(format!("hwtest/refusals/{name}"), &[Need::Machine], move |ctx| {
            check(ctx).map(Outcome::Passed)
        })
    };
    checks.into_iter().map(case).collect()
}

/// What no kernel of Debian's has.
pub fn noiommu_case() -> Case {
    Case::new("hwtest/refusals/noiommu", &[Need::FullKernel], |ctx| {
        noiommu(ctx).map(Outcome::Passed)
    })
}

fn plain() -> Wiring {
    Wiring::plain(Kind::I82599)
}

/// A machine without an IOMMU.
fn no_iommu(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring { iommu: None, ..plain() };
    let mut stage = Stage::boot(ctx, &ctx.dir, &wiring)?;
    let said = stage.refused("bind", "usernic bind $VF", &["no IOMMU group", "intel_iommu=on"])?;
    // Nothing was changed.
    stage.script(
        "driver",
        "[ $(basename $(readlink /sys/bus/pci/devices/$VF/driver)) = ixgbevf ]",
    )?;
    stage.power_off()?;
    Ok(said)
}

/// Two functions in a group, of which Linux has one.
fn group(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring {
        bridge: Some("pcie-pci-bridge,id=br,bus=pcie.0,addr=05.0"),
        places: [("br", 1, "0000:01:01.0"), ("br", 2, "0000:01:02.0")],
        ..plain()
    };
    let mut stage = Stage::boot(ctx, &ctx.dir, &wiring)?;
    let said = stage.refused(
        "bind",
        "usernic bind $VF",
        &["not be viable", "--group", "0000:01:01.0"],
    )?;
    // By hand, past our own check: the kernel refuses, and we say why.
    let by_hand = "echo vfio-pci >/sys/bus/pci/devices/$VF/driver_override
echo $VF >/sys/bus/pci/devices/$VF/driver/unbind
echo $VF >/sys/bus/pci/drivers_probe
hwtest --vf $VF open";
    stage.refused("open", by_hand, &["is not viable", "0000:01:01.0", "ixgbevf"])?;
    stage.script("group", "set -e\nusernic bind --group $VF\nhwtest --vf $VF open")?;
    stage.flawless()?;
    stage.power_off()?;
    Ok(said)
}

/// An IOMMU that does not remap interrupts.
fn no_remapping(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring {
        iommu: Some("intremap=off,caching-mode=on"),
        ..plain()
    };
    let mut stage = Stage::boot(ctx, &ctx.dir, &wiring)?;
    stage.script("bind", "usernic bind $VF")?;
    let said = stage.refused(
        "open",
        "hwtest --vf $VF open",
        &["not remapped", "allow_unsafe_interrupts"],
    )?;
    stage.power_off()?;
    Ok(said)
}

/// An IOMMU of 39 bits, which the addresses of a process are beyond: they are not used then, and frames pass all the same.
fn narrow(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring {
        iommu: Some("intremap=on,caching-mode=on,aw-bits=39"),
        ..plain()
    };
    let mut stage = Stage::start(ctx, &ctx.dir, &wiring)?;
    for name in ["capture-out", "capture-in"] {
        let case = hwtest::CASES.iter().find(|case| case.name == name);
        let Some(case) = case else { continue };
        stage.case(case)?;
    }
    stage.power_off()?;
    Ok("addresses from an allocator".into())
}

/// Somebody wants the function back: the port gives it up. QEMU does not outlive that, so the case speaks on the console.
fn removal(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring {
        bridge: Some("pcie-root-port,id=rp,bus=pcie.0,chassis=1,addr=06.0"),
        places: [("pcie.0", 5, "0000:00:05.0"), ("rp", 0, "0000:01:00.0")],
        ..plain()
    };
    let mut stage = Stage::start(ctx, &ctx.dir, &wiring)?;
    stage.removed()
}

/// Noiommu mode: refused unless it is asked for by name; then it works, with physical addresses, for root alone.
fn noiommu(ctx: &Ctx) -> Result<String> {
    let wiring = Wiring {
        full: true,
        iommu: None,
        ..plain()
    };
    let mut stage = Stage::boot(ctx, &ctx.dir, &wiring)?;
    let on = "set -e
echo 24 >/proc/sys/vm/nr_hugepages
echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
usernic bind --noiommu $VF";
    stage.script("bind", on)?;
    let said = stage.refused("open", "hwtest --vf $VF open", &["noiommu mode", "noiommu=1"])?;
    stage.script("open, by name", "hwtest --vf $VF --keys noiommu=1,queue_size=64 open")?;
    stage.flawless()?;
    stage.power_off()?;
    Ok(said)
}
