//! A machine in a folder that is fit, and each fault that makes it less so.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::*;
use crate::Port;

const SPEC: &str = "virtio-user,path=/run/a/port.sock,memory=memfd-huge";
const VF: &str = "0000:81:10.0";
const POOL: &str = "sys/kernel/mm/hugepages";

/// A machine with everything that a port or a virtual function needs.
struct Machine {
    root: tempfile::TempDir,
    /// The back-end at the socket of [`SPEC`].
    back_end: Option<Port>,
}

impl Machine {
    fn fit() -> Self {
        let machine = Machine {
            root: tempfile::tempdir().unwrap(),
            back_end: None,
        };
        machine.status("Uid:\t65534\t65534\t65534\t65534\nGid:\t65534\t65534\t65534\t65534\nGroups:\t65534\n");
        machine.write(
            "proc/self/limits",
            "Max locked memory         67108864             67108864             bytes\n",
        );
        machine.write("proc/sys/kernel/osrelease", "6.1.0-13-amd64\n");
        machine.write("proc/self/cgroup", "0::/box\n");
        machine.mounts("/dev/hugepages", "rw,pagesize=2M,size=67108864", "rw");
        machine.pool("2048", 64, 64);
        machine.write("sys/fs/cgroup/box/hugetlb.2MB.max", "8388608\n");
        machine.write("sys/fs/cgroup/box/hugetlb.2MB.current", "0\n");
        for (cpu, sibling, node) in [(0, "0,2", 0), (1, "1,3", 1), (2, "0,2", 0), (3, "1,3", 1)] {
            let folder = format!("sys/devices/system/cpu/cpu{cpu}");
            machine.write(&format!("{folder}/topology/thread_siblings_list"), sibling);
            machine.write(&format!("{folder}/node{node}/x"), "");
            machine.write(&format!("{folder}/cpufreq/scaling_governor"), "performance\n");
        }
        machine.write("sys/devices/system/node/node1/cpulist", "1,3\n");
        machine.write("sys/devices/system/cpu/isolated", "1-3\n");
        machine.write("sys/devices/system/cpu/nohz_full", "1-3\n");
        machine.function(VF, "0x10ed", "vfio-pci", 31);
        machine.node("dev/vfio/31", 0o666);
        machine.folder("run/a", 0o777);
        machine.serve("")
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn node(&self, path: &str, mode: u32) {
        self.write(path, "");
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn folder(&self, path: &str, mode: u32) {
        fs::create_dir_all(self.path(path)).unwrap();
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn status(&self, identity: &str) {
        let text = format!("Name:\tx\n{identity}CapEff:\t0000000000000000\nCpus_allowed_list:\t0-3\n");
        self.write("proc/self/status", &text);
    }

    fn mounts(&self, huge: &str, options: &str, shm: &str) {
        self.write(
            "proc/self/mountinfo",
            &format!(
                "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n31 20 0:27 / {huge} rw - hugetlbfs none {options}\n\
                 32 20 0:28 / /dev/shm {shm} - tmpfs tmpfs rw\n"
            ),
        );
    }

    fn pool(&self, kib: &str, total: u64, free: u64) {
        let folder = format!("{POOL}/hugepages-{kib}kB");
        self.write(&format!("{folder}/nr_hugepages"), &format!("{total}\n"));
        self.write(&format!("{folder}/free_hugepages"), &format!("{free}\n"));
        self.write(&format!("{folder}/resv_hugepages"), "0\n");
    }

    fn function(&self, address: &str, device: &str, driver: &str, group: u32) {
        let folder = format!("sys/bus/pci/devices/{address}");
        for (file, text) in [
            ("vendor", "0x8086"),
            ("device", device),
            ("class", "0x020000"),
            ("numa_node", "1"),
        ] {
            self.write(&format!("{folder}/{file}"), text);
        }
        let driver = self.path(&format!("sys/bus/pci/drivers/{driver}"));
        fs::create_dir_all(&driver).unwrap();
        symlink(driver, self.path(&format!("{folder}/driver"))).unwrap();
        let group = self.path(&format!("sys/kernel/iommu_groups/{group}"));
        fs::create_dir_all(group.join("devices")).unwrap();
        symlink(self.path(&folder), group.join("devices").join(address)).unwrap();
        symlink(&group, self.path(&format!("{folder}/iommu_group"))).unwrap();
    }

    /// A back-end at the socket, with these keys, to which everybody may connect.
    fn serve(mut self, keys: &str) -> Self {
        self.back_end = None;
        let socket = self.path("run/a/port.sock");
        self.back_end = Some(Port::open(&format!("vhost,path={}{keys}", socket.display())).unwrap());
        fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
        self
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.path(path)).unwrap();
    }

    fn ask(&self, question: &Question) -> Vec<Finding> {
        examine(&Host::new(self.root.path(), crate::vfio::Kernel), question)
    }

    fn port(&self, spec: &str) -> Vec<Finding> {
        self.ask(&Question::about(spec.parse().unwrap()))
    }

    fn device(&self) -> Vec<Finding> {
        self.ask(&Question {
            function: Some(VF.into()),
            ..Question::default()
        })
    }

    fn cpus(&self, cpus: &[u32]) -> Vec<Finding> {
        self.ask(&Question {
            cpus: cpus.to_vec(),
            ..Question::default()
        })
    }
}

/// The one thing that is wrong.
#[track_caller]
fn only(findings: Vec<Finding>, level: Level, check: &str, texts: &[&str]) {
    let wrong: Vec<_> = findings.into_iter().filter(|f| f.level > Level::Note).collect();
    let [finding] = &wrong[..] else {
        panic!("{check}: {wrong:#?}")
    };
    assert_eq!((finding.check, finding.level), (check, level), "{finding:#?}");
    let mend = finding.mend.as_deref().expect("a fault has a mend");
    for text in texts {
        assert!(
            finding.what.contains(text) || mend.contains(text),
            "{text:?} is not in {finding:#?}"
        );
    }
}

#[test]
fn a_fit_machine_has_nothing_wrong() {
    let machine = Machine::fit();
    let question = Question {
        function: Some(VF.into()),
        cpus: vec![1],
        ..Question::about(SPEC.parse().unwrap())
    };
    let all = machine.ask(&question);
    let wrong: Vec<_> = all.iter().filter(|f| f.level != Level::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for check in [
        "kernel",
        "back-end",
        "hugepages",
        "mount",
        "cgroup",
        "device",
        "cpus",
        "isolation",
        "governor",
    ] {
        assert!(all.iter().any(|f| f.check == check), "{check} was not looked at");
    }
    assert!(machine.ask(&Question::default()).iter().all(|f| f.level == Level::Ok));
}

#[test]
fn memory() {
    let machine = Machine::fit();
    machine.pool("2048", 0, 0);
    only(
        machine.port(SPEC),
        Level::Fault,
        "no-hugepages",
        &["echo 1 > /sys/kernel/mm", "memory=memfd"],
    );
    only(machine.ask(&Question::default()), Level::Warning, "no-hugepages", &[]);
    machine.pool("1048576", 4, 3);
    only(
        machine.port(SPEC),
        Level::Fault,
        "only-1g-pages",
        &["3 free huge pages of 1 GiB", "huge_dir="],
    );
    machine.pool("2048", 5, 0);
    only(
        machine.port(SPEC),
        Level::Fault,
        "few-hugepages",
        &["0 of 5", "echo 6 >"],
    );

    let machine = Machine::fit();
    let mounted = "virtio-user,path=/run/a/port.sock,memory=hugetlbfs,mem=8M";
    machine.mounts("/dev/hugepages", "rw,pagesize=2M,size=4M", "rw");
    only(
        machine.port(mounted),
        Level::Fault,
        "mount-too-small",
        &["2 free pages", "4 needed", "remount,size=8388608"],
    );
    machine.mounts("/dev/hugepages", "ro,pagesize=2M", "rw");
    only(machine.port(mounted), Level::Fault, "no-mount", &["mount -t hugetlbfs"]);

    let machine = Machine::fit();
    machine.write("sys/fs/cgroup/box/hugetlb.2MB.current", "8388608\n");
    only(
        machine.port(SPEC),
        Level::Fault,
        "cgroup-limit",
        &["box/hugetlb.2MB.max allows 0", "1 needed", "hugepageLimits"],
    );
    only(
        machine.port("virtio-user,path=/run/a/port.sock"),
        Level::Warning,
        "cgroup-limit",
        &[],
    );
}

#[test]
fn devices() {
    let machine = Machine::fit();
    machine.write("proc/self/limits", "Max locked memory         65536   65536    bytes\n");
    only(
        machine.device(),
        Level::Fault,
        "memlock",
        &["65536 bytes", "ulimit -l 2048"],
    );

    let machine = Machine::fit();
    machine.remove("dev/vfio/31");
    only(
        machine.device(),
        Level::Fault,
        "no-group-node",
        &["/dev/vfio/31", "usernic bind"],
    );
    machine.node("dev/vfio/31", 0o600);
    machine.status("Uid:\t4321\t4321\t4321\t4321\nGid:\t4321\t4321\t4321\t4321\n");
    only(
        machine.device(),
        Level::Fault,
        "wrong-owner",
        &["mode 600", "chown 4321 /dev/vfio/31"],
    );

    let machine = Machine::fit();
    machine.write("sys/kernel/iommu_groups/31/name", "vfio-noiommu\n");
    machine.node("dev/vfio/noiommu-31", 0o666);
    only(
        machine.device(),
        Level::Fault,
        "noiommu",
        &["CAP_SYS_RAWIO", "intel_iommu=on"],
    );

    let machine = Machine::fit();
    machine.function("0000:81:10.2", "0x10ed", "ixgbevf", 31);
    only(
        machine.device(),
        Level::Fault,
        "group-not-viable",
        &["0000:81:10.2 is with ixgbevf", "--group"],
    );

    let machine = Machine::fit();
    machine.remove("sys/bus/pci/devices/0000:81:10.0/driver");
    only(machine.device(), Level::Fault, "not-bound", &["no driver"]);
}

#[test]
fn cores() {
    let machine = Machine::fit();
    only(machine.cpus(&[7]), Level::Fault, "cpuset", &["CPU 7", "0-3"]);
    only(machine.cpus(&[1, 3]), Level::Warning, "smt-sibling-busy", &["1 and 3"]);
    let fields = "0 ".repeat(35);
    machine.write("proc/4000/task/4001/stat", &format!("4001 (a (b) c) R {fields}3 0 0\n"));
    only(
        machine.cpus(&[1]),
        Level::Warning,
        "smt-sibling-busy",
        &["CPU 3", "a (b) c (process 4000)"],
    );
    machine.write("proc/4000/task/4001/stat", &format!("4001 (a (b) c) S {fields}3 0 0\n"));
    assert!(machine.cpus(&[1]).iter().all(|f| f.level == Level::Ok));

    let far = Question {
        function: Some(VF.into()),
        cpus: vec![2],
        ..Question::default()
    };
    only(
        machine.ask(&far),
        Level::Warning,
        "numa-mismatch",
        &["node 0", "choose CPUs of node 1: 1,3"],
    );
    let spec = format!("{SPEC},numa=0");
    let far = Question {
        function: Some(VF.into()),
        ..Question::about(spec.parse().unwrap())
    };
    only(machine.ask(&far), Level::Warning, "numa-mismatch", &["pass numa=1"]);

    machine.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n");
    only(
        machine.cpus(&[1]),
        Level::Warning,
        "governor",
        &["powersave", "echo performance > /sys"],
    );
    let note = machine
        .cpus(&[0])
        .into_iter()
        .find(|f| f.check == "not-isolated")
        .unwrap();
    assert!(note.what.contains("isolcpus, nohz_full, rcu_nocbs"), "{note:?}");
}

#[test]
fn sockets() {
    let mut machine = Machine::fit();
    // Its listener goes without removing the file.
    machine.back_end = None;
    only(
        machine.port(SPEC),
        Level::Fault,
        "no-back-end",
        &["start the switch first", "server=1"],
    );
    drop(UnixListener::bind(machine.path("run/a/port.sock")).unwrap());
    fs::set_permissions(machine.path("run/a/port.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    only(machine.port(SPEC), Level::Fault, "stale-socket", &["nobody listens"]);
    let server = format!("{SPEC},server=1");
    assert!(
        machine
            .port(&server)
            .iter()
            .any(|f| f.check == "stale-socket" && f.level == Level::Ok)
    );
    let machine = machine.serve("");
    only(machine.port(&server), Level::Fault, "socket-in-use", &[]);

    fs::set_permissions(machine.path("run/a/port.sock"), fs::Permissions::from_mode(0o600)).unwrap();
    machine.status("Uid:\t4321\t4321\t4321\t4321\nGid:\t4321\t4321\t4321\t4321\n");
    only(
        machine.port(SPEC),
        Level::Fault,
        "socket-mode",
        &["mode 600", "user 4321", "chown 4321"],
    );

    let long = format!("virtio-user,path=/run/{}", "x".repeat(110));
    only(
        machine.port(&long),
        Level::Fault,
        "path-too-long",
        &["115 bytes", "107 at the most"],
    );
    let folder = "virtio-user,path=/run/b/port.sock,server=1";
    only(machine.port(folder), Level::Fault, "no-folder", &["mkdir -p /run/b"]);
    machine.folder("run/b", 0o755);
    only(
        machine.port(folder),
        Level::Fault,
        "folder-mode",
        &["chown 4321 /run/b"],
    );
}

#[test]
fn back_ends() {
    let machine = Machine::fit().serve(",packed_vq=0");
    only(
        machine.port(&format!("{SPEC},packed_vq=1")),
        Level::Fault,
        "back-end-lacks-feature",
        &["VIRTIO_F_RING_PACKED", "leave packed_vq=1 out"],
    );
    only(
        machine.port(&format!("{SPEC},queues=2")),
        Level::Fault,
        "back-end-has-fewer-queues",
        &["queues=1"],
    );
    let quiet = Question {
        quiet: true,
        ..Question::about(format!("{SPEC},packed_vq=1").parse().unwrap())
    };
    assert!(machine.ask(&quiet).iter().all(|f| f.level == Level::Ok));
}

#[test]
fn the_system() {
    let machine = Machine::fit();
    machine.write("proc/sys/kernel/osrelease", "4.4.0-generic\n");
    only(machine.port(SPEC), Level::Fault, "kernel-too-old", &["4.4.0", "4.14"]);
    machine.write("proc/sys/kernel/osrelease", "5.10.0\n");
    machine.mounts("/dev/hugepages", "rw,pagesize=2M", "ro");
    let notes: Vec<_> = machine
        .port(SPEC)
        .into_iter()
        .filter(|f| f.level == Level::Note)
        .collect();
    let names: Vec<_> = notes.iter().map(|f| f.check).collect();
    assert_eq!(names, ["kernel", "read-only-shm"], "{notes:#?}");
}

#[test]
fn the_real_machine_is_looked_at_without_harm() {
    let all = examine(&Host::default(), &Question::default());
    assert!(all.iter().any(|f| f.check == "kernel"), "{all:#?}");
    assert!(
        all.iter()
            .any(|f| f.check == "system-calls" || f.check == "seccomp-too-tight"),
        "{all:#?}"
    );
}
