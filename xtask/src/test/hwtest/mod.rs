//! Virtual functions under our own driver: the cases of the crate `hwtest`, in a guest whose functions are those of
//! `vf-model`, behind an emulated IOMMU. One function is ours, through the guest's vfio-pci, the other has Linux's own
//! ixgbevf. After each case the model is asked whether anything was done that it holds to be wrong.

mod refusals;
mod silicon;
pub(super) mod stage;

use anyhow::{Result, ensure};
use hwtest::CASES;
use vf_model::Kind;

use super::{Case, Ctx, Need, Outcome};
use stage::{Stage, Wiring};

pub use silicon::command as silicon;

/// What the chips differ in, and what a start depends on: the whole list is run on the first.
const SHORT_LIST: [&str; 6] = ["open", "capture-out", "capture-in", "queues", "checksum", "pf-reset"];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in Kind::ALL {
        let wiring = Wiring::plain(kind);
        let group = kind.to_string();
        let whole = kind == Kind::I82599;
        add(&mut cases, &group, wiring, whole);
        if whole {
            for (name, check) in CHECKS {
                cases.push(on_stage(&group, name, wiring, move |stage| {
                    let said = check(stage)?;
                    stage.flawless()?;
                    Ok(said)
                }));
            }
        }
    }
    cases.extend(refusals::cases());
    cases
}

/// Those of the kernel that is made for it, which `cargo xtask test` does not ask for.
pub fn full_cases() -> Vec<Case> {
    let mut cases = vec![super::machine::full_case()];
    // A kernel that has both ways: iommufd by itself, the container where it is asked for.
    for (name, keys) in [("iommufd", "interface=iommufd"), ("container", "interface=container")] {
        let wiring = Wiring {
            full: true,
            keys,
            ..Wiring::plain(Kind::I82599)
        };
        add(&mut cases, name, wiring, name == "iommufd");
    }
    cases.push(refusals::noiommu_case());
    cases
}

type Check = fn(&mut Stage) -> Result<String>;

/// What takes more than the function's user.
const CHECKS: [(&str, Check); 5] = [
    ("icmpecho", icmpecho),
    ("round-trips", round_trips),
    ("sandbox", sandbox),
    ("memlock", memlock),
    ("hand-back", hand_back),
];

/// The list, or the short one, in one guest.
fn add(cases: &mut Vec<Case>, group: &str, wiring: Wiring, whole: bool) {
    for case in CASES.iter().filter(|case| whole || SHORT_LIST.contains(&case.name)) {
        cases.push(on_stage(group, case.name, wiring, |stage| stage.case(case)));
    }
}

/// A case in a guest that others of its group share.
fn on_stage(group: &str, name: &str, wiring: Wiring, check: impl Fn(&mut Stage) -> Result<String> + 'static) -> Case {
    let need = if wiring.full { Need::FullKernel } else { Need::Machine };
    let shared = format!("hwtest-{group}");
    let group_of = shared.clone();
    let run = move |ctx: &Ctx| {
        let mut stage = ctx.shared(&group_of, |dir| Stage::start(ctx, dir, &wiring))?;
        check(&mut stage).map(Outcome::Passed)
    };
    Case::new(format!("hwtest/{group}/{name}"), &[need], run).sharing(&shared)
}

/// A ping of Linux's, answered by `usernic forward`, which confines itself.
fn icmpecho(stage: &mut Stage) -> Result<String> {
    let script = "set -e
ip addr add 10.9.0.1/24 dev eth0 2>/dev/null || true
usernic forward --port vf,pci=$VF,mtu=9000 --mode icmpecho --ip 10.9.0.2 >/tmp/forward 2>&1 &
for i in $(seq 100); do ping -c 1 -W 1 10.9.0.2 >/dev/null 2>&1 && break; done
ping -q -c 200 -i 0.01 -W 5 10.9.0.2 | tee /tmp/ping
ping -q -c 20 -i 0.02 -s 8972 -W 5 10.9.0.2 | tee /tmp/jumbo
kill -INT $!
wait $! || { cat /tmp/forward; exit 1; }
grep -q '200 packets received, 0% packet loss' /tmp/ping
grep -q '20 packets received, 0% packet loss' /tmp/jumbo";
    stage.script("icmpecho", script)?;
    Ok("220 echoes, of 64 and 9,000 bytes".into())
}

/// Echoes of Linux's, answered by our port and by Linux's own driver on the same function: the times are of a machine in
/// software, and say how the two differ there, nothing of hardware.
fn round_trips(stage: &mut Stage) -> Result<String> {
    let script = "set -e
ip addr add 10.9.0.1/24 dev eth0 2>/dev/null || true
ask() { ping -q -c 300 -i 0.01 -W 5 10.9.0.2 | sed -n 's/^round-trip min.avg.max = //p'; }
usernic forward --port vf,pci=$VF --mode icmpecho --ip 10.9.0.2 >/tmp/forward 2>&1 &
for i in $(seq 100); do ping -c 1 -W 1 10.9.0.2 >/dev/null 2>&1 && break; done
ours=$(ask)
kill -INT $!
wait $!
usernic unbind $VF >/dev/null
until [ -e /sys/bus/pci/devices/$VF/net ]; do sleep 0.05; done
name=$(ls /sys/bus/pci/devices/$VF/net)
unshare -n sleep 1000 </dev/null >/dev/null 2>&1 &
holder=$!
while [ \"$(readlink /proc/$holder/ns/net)\" = \"$(readlink /proc/self/ns/net)\" ]; do sleep 0.01; done
ip link set $name netns $holder
nsenter -t $holder -n ip addr add 10.9.0.2/24 dev $name
nsenter -t $holder -n ip link set $name up
ip neigh flush dev eth0 >/dev/null
for i in $(seq 100); do ping -c 1 -W 1 10.9.0.2 >/dev/null 2>&1 && break; done
theirs=$(ask)
kill $holder
for i in $(seq 100); do [ -e /sys/class/net/$name ] && break; sleep 0.05; done
usernic bind $VF >/dev/null
chown 65534 /dev/vfio/$GROUP
ip neigh flush dev eth0 >/dev/null
echo \"usernic $ours, Linux's ixgbevf $theirs\"";
    let said = stage.script("round trips", script)?;
    stage.forget();
    let said = said.trim();
    ensure!(said.matches('/').count() == 4, "no times in: {said}");
    Ok(format!("round trip, min/avg/max, emulated: {said}"))
}

/// What a container has: the node of the container and of the group, and locked memory that is just enough.
fn sandbox(stage: &mut Stage) -> Result<String> {
    let script = "set -e
mkdir -p /box
mount -t tmpfs box /box
cd /box
mkdir -p bin dev/vfio proc sys
cp /usr/bin/hwtest bin/
for node in vfio $GROUP; do touch dev/vfio/$node; mount --bind /dev/vfio/$node dev/vfio/$node; done
mount --bind /sys sys
mount -o remount,ro,bind sys
mount -t proc proc proc
ulimit -l 4096
chroot /box /bin/hwtest --vf $VF --user 65534 open && status=0 || status=$?
cd /
umount /box/proc /box/sys /box/dev/vfio/vfio /box/dev/vfio/$GROUP
umount /box
exit $status";
    let said = stage.script("sandbox", script)?;
    Ok(format!(
        "4 MiB may be locked, two nodes, no capability: {}",
        said.trim()
    ))
}

/// One page of locked memory too few.
fn memlock(stage: &mut Stage) -> Result<String> {
    let script = "ulimit -l 4092; hwtest --vf $VF --user 65534 open";
    let said = stage.refused("memlock", script, &["RLIMIT_MEMLOCK", "4096 too few", "ulimit -l"])?;
    Ok(said)
}

/// `usernic unbind` gives the function back, and Linux's driver works on it; `usernic bind` takes it again.
fn hand_back(stage: &mut Stage) -> Result<String> {
    let script = "set -e
usernic devices
usernic unbind $VF
for i in $(seq 100); do [ -e /sys/bus/pci/devices/$VF/driver ] && break; sleep 0.05; done
basename $(readlink /sys/bus/pci/devices/$VF/driver)
usernic bind $VF
chown 65534 /dev/vfio/$GROUP
hwtest --vf $VF --user 65534 open";
    let said = stage.script("hand-back", script)?;
    for text in ["vfio-pci", "ixgbevf"] {
        ensure!(said.contains(text), "nothing of {text} in:\n{said}");
    }
    // What Linux's driver did in between is not ours to answer for.
    stage.forget();
    Ok(String::new())
}
