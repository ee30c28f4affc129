//! A guest with two functions of the model, one of them with vfio-pci.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use vf_model::server::{Machine as Model, stats};
use vf_model::{Kind, Settings, Speed};

use crate::machine::{Config, Initramfs, Vm};
use crate::process;
use crate::test::Ctx;
use crate::test::link::path;

/// For what takes a moment.
pub const SHORT: Duration = Duration::from_secs(60);

/// For a case of many starts, in emulation, on cores that others use.
const LONG: Duration = Duration::from_secs(240);

const BUILD: Duration = Duration::from_secs(900);

/// How the functions are put into the machine.
#[derive(Clone, Copy)]
pub struct Wiring {
    /// The kernel that has iommufd, rather than the stock one.
    pub full: bool,
    /// What port specs have more.
    pub keys: &'static str,
    /// The chip.
    pub kind: Kind,
    /// The IOMMU's properties; none: there is no IOMMU.
    pub iommu: Option<&'static str>,
    /// A device that comes before the functions, if any.
    pub bridge: Option<&'static str>,
    /// Frames wait for descriptors, although the driver would have them dropped: nothing is lost to a slow machine.
    pub hold: bool,
    /// The PF stops queues that send without a context.
    pub detection: bool,
    /// QEMU waits for each write to a register: the two functions' writes take effect in the order of time.
    pub no_posted_writes: bool,
    /// What the root file system has more.
    pub more: fn(&Ctx, &mut Initramfs) -> Result<()>,
    /// Bus and slot of the peer's function and of ours, and their addresses in the guest.
    pub places: [(&'static str, u8, &'static str); 2],
}

impl Wiring {
    /// Each function in a group of its own.
    pub fn plain(kind: Kind) -> Self {
        Wiring {
            full: false,
            keys: "",
            kind,
            iommu: Some("intremap=on,caching-mode=on"),
            bridge: None,
            hold: true,
            detection: true,
            no_posted_writes: false,
            more: |_, _| Ok(()),
            places: [("pcie.0", 5, "0000:00:05.0"), ("pcie.0", 6, "0000:00:06.0")],
        }
    }
}

/// A guest that runs, and its model.
pub struct Stage {
    vm: Vm,
    model: Arc<Model>,
    /// The PCI addresses of the peer's function and of ours.
    addresses: [&'static str; 2],
    monitor: PathBuf,
    keys: &'static str,
}

/// Builds what runs in the guest, without libraries: those of [`hwtest`], and `usernic`.
pub fn programs(ctx: &Ctx) -> Result<[PathBuf; 3]> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| ctx.root.join("target"), PathBuf::from);
    let target = target.join("static");
    let triple = "x86_64-unknown-linux-gnu";
    let mut command = ctx.cargo(&[
        "build",
        "--release",
        "--locked",
        "--target",
        triple,
        "--target-dir",
        path(&target)?,
    ]);
    command.args(["--package", "hwtest", "--package", "usernic-cli"]);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    // The guest unpacks them into memory.
    command.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    process::run("cargo build of what runs in the guest", command, BUILD)?;
    Ok(["hwtest", "hwtest-wire", "usernic"].map(|name| target.join(triple).join("release").join(name)))
}

impl Stage {
    /// Boots, with Linux's driver on both functions.
    pub fn boot(ctx: &Ctx, dir: &Path, wiring: &Wiring) -> Result<Self> {
        let machine = if wiring.full {
            ctx.full_machine()?
        } else {
            ctx.machine()?.clone()
        };
        let mut root = Initramfs::new(&machine.guest)?;
        root.modules(&["ixgbevf", "8021q", "vfio_iommu_type1", "vfio-pci"])?;
        root.tool("ethtool")?;
        for program in programs(ctx)? {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            root.program(&name, &program)?;
        }
        (wiring.more)(ctx, &mut root)?;
        let initramfs = dir.join("initramfs");
        root.write(&initramfs)?;

        let model = Model::new(Settings {
            kind: wiring.kind,
            vfs: 2,
            queues: 4,
            hold: wiring.hold,
            ..Settings::default()
        })?;
        model.act(|nic| {
            nic.pf().mtu = 9000;
            nic.pf().malicious_detection = wiring.detection;
        });
        let monitor = dir.join("monitor");
        let mut devices = vec![
            "-monitor".to_owned(),
            format!("unix:{},server=on,wait=off", path(&monitor)?),
        ];
        if let Some(iommu) = wiring.iommu {
            devices.extend(["-device".into(), format!("intel-iommu,{iommu}")]);
        }
        if let Some(bridge) = wiring.bridge {
            devices.extend(["-device".into(), bridge.to_owned()]);
        }
        for (vf, (bus, slot, _)) in wiring.places.into_iter().enumerate() {
            let socket = dir.join(format!("vf{vf}"));
            model.serve(vf, &socket)?;
            let device = serde_json::json!({
                "driver": "vfio-user-pci",
                "id": format!("vf{vf}"),
                "socket": { "type": "unix", "path": path(&socket)? },
                "bus": bus,
                "addr": format!("{slot:02x}.0"),
                "x-no-posted-writes": wiring.no_posted_writes,
            });
            devices.extend(["-device".into(), device.to_string()]);
        }
        let config = Config {
            cpus: 2,
            devices,
            // An emulated timer behind the IOMMU may come too late for the kernel's taste where others want the cores.
            append: "intel_iommu=on no_timer_check".into(),
            echo: ctx.verbose,
            ..Default::default()
        };
        let vm = Vm::boot(&machine, &config, &initramfs, dir)?;
        Ok(Stage {
            vm,
            model,
            keys: wiring.keys,
            addresses: wiring.places.map(|(_, _, address)| address),
            monitor,
        })
    }

    /// Boots, gives the second function to vfio-pci and its group to a user without privileges, and makes the other one
    /// the peer.
    pub fn start(ctx: &Ctx, dir: &Path, wiring: &Wiring) -> Result<Self> {
        let mut stage = Self::boot(ctx, dir, wiring)?;
        let script = "set -e
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
echo 24 >/proc/sys/vm/nr_hugepages
usernic bind $VF
chown 65534 /dev/vfio/$GROUP
for node in /dev/iommu /dev/vfio/devices/*; do [ ! -e $node ] || chown 65534 $node; done
ip link set eth0 mtu 9000 up
ethtool -K eth0 gro off
vconfig add eth0 100
ip link set eth0.100 up
until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.05; done
dmesg -c >/dev/null";
        stage.script("set-up", script)?;
        stage.forget();
        Ok(stage)
    }

    /// Tells QEMU's monitor something.
    fn monitor(&self, line: &str) -> Result<()> {
        use std::io::Write as _;
        let mut stream = std::os::unix::net::UnixStream::connect(&self.monitor)?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        // It reads at its leisure, and what is not read when we hang up is lost.
        process::sleep(Duration::from_millis(200))
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn with_names(&self, script: &str) -> String {
        let [peer, ours] = &self.addresses;
        let keys = self.keys;
        format!(
            "KEYS={keys}\nVF={ours}\nPEER={peer}\nGROUP=$(basename $(readlink /sys/bus/pci/devices/$VF/iommu_group) 2>/dev/null)\n{script}"
        )
    }

    /// Runs a script that must succeed; it has our function's address as $VF, its group as $GROUP.
    pub fn script(&mut self, name: &str, script: &str) -> Result<String> {
        let script = self.with_names(script);
        let result = self.vm.ok(name, &script, LONG);
        result.map_err(|e| self.explained(e))
    }

    /// Runs a script that must fail, with all of these in what it says; its last line.
    pub fn refused(&mut self, name: &str, script: &str, texts: &[&str]) -> Result<String> {
        let script = self.with_names(script);
        let ended = self.vm.run(name, &script, SHORT)?;
        let output = String::from_utf8_lossy(&ended.output).into_owned();
        ensure!(ended.status != 0, "{name}: nothing was refused:\n{output}");
        for text in texts {
            ensure!(output.contains(text), "{name}: no \"{text}\" in:\n{output}");
        }
        Ok(output.trim().lines().last().unwrap_or_default().to_owned())
    }

    fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        let stats = self.model.act(stats);
        error.context(format!("console:\n{}model: {stats:#}\n", self.vm.console()))
    }

    /// Runs a case as a user without privileges, and does meanwhile what it asks for.
    pub fn case(&mut self, case: &hwtest::Case) -> Result<String> {
        let said = self.run_case(case).map_err(|e| self.explained(e))?;
        self.flawless()?;
        Ok(said)
    }

    fn run_case(&mut self, case: &hwtest::Case) -> Result<String> {
        let name = case.name;
        let start = format!(
            "ulimit -l 65536
{{ hwtest --vf $VF --keys \"$KEYS\" --peer eth0 --user 65534 {name}; echo \"@end $?\"; }} >/tmp/case 2>&1 </dev/null &"
        );
        let start = self.with_names(&start);
        self.vm.ok(name, &start, SHORT)?;
        let end = Instant::now() + LONG;
        let mut seen = 0;
        loop {
            // A look a second at the latest, so that whoever interrupts us does not wait.
            let look = format!(
                "for i in $(seq 20); do [ $(grep -c '^@' /tmp/case) -gt {seen} ] && break; sleep 0.05; done; cat /tmp/case"
            );
            let text = self.vm.ok(name, &look, SHORT)?;
            for asked in text.lines().filter_map(|line| line.strip_prefix('@')).skip(seen) {
                seen += 1;
                match asked {
                    "end 0" => {
                        let said = text.lines().rfind(|line| !line.starts_with('@'));
                        return Ok(said.unwrap_or_default().to_owned());
                    }
                    "link-down" => self.model.act(|nic| nic.set_link(None)),
                    "link-up" => self.model.act(|nic| nic.set_link(Some(Speed::G10))),
                    "reset-begin" => self.model.act(|nic| nic.begin_reset()),
                    "reset-end" => self.model.act(|nic| nic.end_reset()),
                    _ if asked.starts_with("end ") => bail!("{text}"),
                    _ => bail!("the case asks for \"{asked}\""),
                }
            }
            ensure!(Instant::now() < end, "{name} does not end:\n{text}");
        }
    }

    /// Has QEMU ask for our function while a port has it; what the port says on the console.
    pub fn removed(&mut self) -> Result<String> {
        self.script(
            "forward",
            "usernic -v forward --port vf,pci=$VF </dev/null 2>&1 | cat >/dev/ttyS0 &",
        )?;
        self.shown("link up")?;
        self.monitor("device_del vf1")?;
        self.shown("wants the device back")
    }

    /// Waits for a line on the console.
    fn shown(&self, text: &str) -> Result<String> {
        let end = Instant::now() + SHORT;
        loop {
            let console = self.vm.console();
            if let Some(line) = console.lines().find(|line| line.contains(text)) {
                return Ok(line.trim().to_owned());
            }
            ensure!(Instant::now() < end, "no \"{text}\" on the console:\n{console}");
            process::sleep(Duration::from_millis(50))?;
        }
    }

    /// That our function did nothing that the model holds to be wrong, and that no access of it went astray.
    pub fn flawless(&mut self) -> Result<()> {
        self.model.act(|nic| {
            let faults = nic.dma(1).take_faults();
            ensure!(faults.is_empty(), "accesses outside of what is mapped: {faults:?}");
            let complaints = nic.complaints(1);
            ensure!(complaints.is_empty(), "the model complains: {complaints}");
            let halts = nic.halts(1);
            ensure!(halts.is_empty(), "queues were stopped: {halts:?}");
            Ok(())
        })?;
        self.kernel_is_content()
    }

    /// That the guest's kernel has said nothing of a mistake.
    pub fn kernel_is_content(&mut self) -> Result<()> {
        let log = self.vm.ok(
            "kernel log",
            "dmesg | grep -E 'BUG:|WARNING:|DMAR:.*fault|timed out' || true",
            SHORT,
        )?;
        ensure!(log.is_empty(), "the guest's kernel complains:\n{log}");
        Ok(())
    }

    /// What another driver of our function did is not ours.
    pub fn forget(&mut self) {
        self.model.act(|nic| drop(nic.dma(1).take_faults()));
    }

    /// Ends the guest in order.
    pub fn power_off(self) -> Result<()> {
        self.vm.power_off()
    }
}
