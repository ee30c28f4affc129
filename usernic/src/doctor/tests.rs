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
        machine.write("proc/sys/fs/aio-nr", "0\n");
        machine.write("proc/sys/fs/aio-max-nr", "65536\n");
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
        self.capable(identity, 0);
    }

    fn capable(&self, identity: &str, capabilities: u64) {
        let text = format!("Name:\tx\n{identity}CapEff:\t{capabilities:016x}\nCpus_allowed_list:\t0-3\n");
        self.write("proc/self/status", &text);
    }

    /// The memory that may be locked, soft and hard.
    fn memlock(&self, bytes: &str) {
        let text = format!("Max locked memory         {bytes:20} {bytes:20} bytes\n");
        self.write("proc/self/limits", &text);
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

/// `open` takes what the kernel makes on demand, if the spec insists on huge pages.
#[test]
fn pages_on_demand() {
    let overcommit = |machine: &Machine, most: u64, surplus: u64| {
        let folder = format!("{POOL}/hugepages-2048kB");
        machine.write(&format!("{folder}/nr_overcommit_hugepages"), &format!("{most}\n"));
        machine.write(&format!("{folder}/surplus_hugepages"), &format!("{surplus}\n"));
    };
    let machine = Machine::fit();
    machine.pool("2048", 0, 0);
    overcommit(&machine, 64, 0);
    let good = |findings: Vec<Finding>| findings.iter().all(|f| f.level <= Level::Note);
    assert!(good(machine.port(SPEC)), "{:#?}", machine.port(SPEC));
    let auto = "virtio-user,path=/run/a/port.sock";
    only(
        machine.port(auto),
        Level::Warning,
        "few-hugepages",
        &["64 more can be made", "pass memory=memfd-huge"],
    );
    machine.pool("2048", 64, 0);
    overcommit(&machine, 64, 64);
    only(machine.port(SPEC), Level::Fault, "no-hugepages", &["echo 1 >"]);
    machine.pool("2048", 6, 1);
    overcommit(&machine, 4, 3);
    let larger = format!("{SPEC},mem=6M");
    only(
        machine.port(&larger),
        Level::Fault,
        "few-hugepages",
        &["1 of 3 huge", "1 more can be made", "3 needed", "echo 4 >"],
    );
    // A node's own pages are what counts where the spec names one.
    machine.pool("2048", 64, 64);
    overcommit(&machine, 0, 0);
    machine.write(
        "sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages",
        "0\n",
    );
    let node = format!("{SPEC},numa=1");
    only(
        machine.port(&node),
        Level::Fault,
        "few-hugepages-on-node",
        &["NUMA node 1 has 0"],
    );
}

/// With memory=hugetlbfs `open` takes the first mount that has enough, the one that wastes least before others.
#[test]
fn any_mount_that_fits() {
    let mounts = |machine: &Machine, lines: &[(&str, &str)]| {
        let lines: Vec<String> = lines
            .iter()
            .map(|(path, options)| format!("31 20 0:27 / {path} rw - hugetlbfs none {options}\n"))
            .collect();
        machine.write("proc/self/mountinfo", &lines.concat());
    };
    let spec = "virtio-user,path=/run/a/port.sock,memory=hugetlbfs,mem=8M";
    let at = |machine: &Machine, spec: &str| {
        let all = machine.port(spec);
        assert!(all.iter().all(|f| f.level <= Level::Note), "{all:#?}");
        let mount = all.into_iter().find(|f| f.check == "mount").unwrap();
        mount.what
    };
    let machine = Machine::fit();
    mounts(
        &machine,
        &[
            ("/mnt/1g", "rw,pagesize=1024M"),
            ("/mnt/small", "rw,pagesize=2M,size=4M"),
            ("/mnt/fits", "rw,pagesize=2M"),
        ],
    );
    assert!(at(&machine, spec).contains("/mnt/fits"));
    let named = format!("{spec},huge_dir=/mnt/small/below");
    only(machine.port(&named), Level::Fault, "mount-too-small", &["/mnt/small"]);
    let elsewhere = format!("{spec},huge_dir=/mnt/other");
    only(
        machine.port(&elsewhere),
        Level::Fault,
        "no-mount",
        &["/mnt/other is not on"],
    );
    // A mount of another kind lies over it.
    let info = std::fs::read_to_string(machine.path("proc/self/mountinfo")).unwrap();
    machine.write(
        "proc/self/mountinfo",
        &(info.clone() + "40 31 0:30 / /mnt/fits/over rw - tmpfs none rw\n"),
    );
    let over = format!("{spec},huge_dir=/mnt/fits/over/x");
    only(machine.port(&over), Level::Fault, "no-mount", &["/mnt/fits/over/x"]);
    machine.write("proc/self/mountinfo", &info);
    // One that this user may not write to is passed over.
    machine.folder("mnt/fits", 0o755);
    only(
        machine.port(&format!("{spec},huge_dir=/mnt/fits")),
        Level::Fault,
        "mount-mode",
        &["uid=65534"],
    );
    machine.folder("mnt/fits", 0o1777);
    assert!(at(&machine, spec).contains("/mnt/fits"));
    // No pages of 2 MiB, but one of 1 GiB.
    machine.pool("2048", 0, 0);
    machine.pool("1048576", 1, 1);
    assert!(at(&machine, spec).contains("/mnt/1g"));
}

/// The limit is looked at together with what lifts it, and the port asked about is what is measured.
#[test]
fn locked_memory() {
    const NOBODY: &str = "Uid:\t65534\t65534\t65534\t65534\nGid:\t65534\t65534\t65534\t65534\n";
    let machine = Machine::fit();
    let port = |keys: &str| format!("vf,pci={VF},memory=memfd{keys}");
    let good = |spec: &str| {
        let all = machine.port(spec);
        assert!(all.iter().all(|f| f.level <= Level::Note), "{spec}: {all:#?}");
        assert!(
            all.iter().any(|f| f.check == "device"),
            "{spec}: the device of the spec is looked at"
        );
    };
    machine.memlock("4194304");
    good(&port(",buffers=64,queue_size=64"));
    only(
        machine.port(&port(",buffers=65536")),
        Level::Fault,
        "memlock",
        &["4194304 bytes"],
    );
    machine.memlock("unlimited");
    good(&port(",buffers=65536"));
    machine.memlock("65536");
    only(machine.device(), Level::Fault, "memlock", &["65536 bytes"]);
    machine.capable(NOBODY, 1 << 14);
    good(&port(",buffers=65536"));
    machine.write("proc/self/uid_map", "         0          0 4294967295\n");
    good(&port(",buffers=65536"));
    // In a namespace of its own the capability counts for nothing.
    machine.write("proc/self/uid_map", "         0     100000      65536\n");
    only(machine.port(&port("")), Level::Fault, "memlock", &[]);
    // What is locked already is gone.
    machine.memlock("8388608");
    machine.write(
        "proc/self/status",
        &format!("{NOBODY}CapEff:\t0\nVmLck:\t    6144 kB\nCpus_allowed_list:\t0-3\n"),
    );
    only(
        machine.port(&port(",buffers=4096")),
        Level::Fault,
        "memlock",
        &["2097152 bytes"],
    );
}

#[test]
fn a_function_that_was_given_by_its_own_node() {
    let machine = Machine::fit();
    machine.remove("dev/vfio/31");
    machine.write(&format!("sys/bus/pci/devices/{VF}/vfio-dev/vfio0/dev"), "511:0\n");
    machine.node("dev/vfio/devices/vfio0", 0o666);
    only(machine.device(), Level::Fault, "no-group-node", &["/dev/vfio/31"]);
    machine.node("dev/iommu", 0o666);
    assert!(
        machine.device().iter().all(|f| f.level == Level::Ok),
        "{:#?}",
        machine.device()
    );
    let group = format!("vf,pci={VF},memory=memfd,interface=container");
    only(machine.port(&group), Level::Fault, "no-group-node", &["/dev/vfio/31"]);
}

#[test]
fn a_port_that_asks_for_noiommu() {
    const ROOT: &str = "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n";
    let machine = Machine::fit();
    machine.write("sys/kernel/iommu_groups/31/name", "vfio-noiommu\n");
    machine.node("dev/vfio/noiommu-31", 0o666);
    let spec = format!("vf,pci={VF},memory=memfd,noiommu=1");
    only(machine.port(&spec), Level::Fault, "noiommu", &["CAP_SYS_RAWIO"]);
    machine.capable(ROOT, 1 << 17);
    only(machine.port(&spec), Level::Warning, "noiommu", &[]);
}

#[test]
fn devices() {
    let machine = Machine::fit();
    machine.write("proc/self/limits", "Max locked memory         65536   65536    bytes\n");
    only(
        machine.device(),
        Level::Fault,
        "memlock",
        &["65536 bytes", "ulimit -l 4096"],
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

/// A listener that nobody accepts at, and how many connections wait there.
struct Counting(UnixListener);

impl Counting {
    fn at(machine: &Machine, path: &str) -> Self {
        let _ = fs::remove_file(machine.path(path));
        let listener = UnixListener::bind(machine.path(path)).unwrap();
        fs::set_permissions(machine.path(path), fs::Permissions::from_mode(0o777)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Counting(listener)
    }

    fn connections(&self) -> usize {
        std::iter::from_fn(|| self.0.accept().ok()).count()
    }
}

#[test]
fn without_connecting_nobody_is_connected_to() {
    let mut machine = Machine::fit();
    machine.back_end = None;
    for spec in [
        SPEC,
        "virtio-user,path=/run/a/port.sock,server=1",
        "vhost,path=/run/a/port.sock",
        "vhost,path=/run/a/port.sock,client=1",
    ] {
        let listener = Counting::at(&machine, "run/a/port.sock");
        let question = Question {
            quiet: true,
            ..Question::about(spec.parse().unwrap())
        };
        let all = machine.ask(&question);
        assert_eq!(listener.connections(), 0, "{spec}");
        assert!(all.iter().all(|f| f.level <= Level::Note), "{spec}: {all:#?}");
        let _ = machine.ask(&Question::about(spec.parse().unwrap()));
        assert_ne!(listener.connections(), 0, "{spec}: the listener counts");
    }
}

/// A process that is stopped, or hostile, accepts nobody.
#[test]
fn a_listener_with_a_full_backlog_is_not_waited_for() {
    let mut machine = Machine::fit();
    machine.back_end = None;
    let listener = Counting::at(&machine, "run/a/port.sock");
    rustix::net::listen(&listener.0, 0).unwrap();
    let _held: Vec<_> = std::iter::from_fn(|| {
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        );
        let socket = socket.unwrap();
        let address = rustix::net::SocketAddrUnix::new(machine.path("run/a/port.sock")).unwrap();
        rustix::net::connect(&socket, &address).ok().map(|()| socket)
    })
    .collect();
    only(
        machine.port("vhost,path=/run/a/port.sock"),
        Level::Fault,
        "socket-in-use",
        &[],
    );
    let client = machine.port("vhost,path=/run/a/port.sock,client=1");
    assert!(client.iter().all(|f| f.level <= Level::Note), "{client:#?}");
    only(
        machine.port(SPEC),
        Level::Warning,
        "silent-back-end",
        &["one at a time"],
    );
}

#[test]
fn what_is_no_socket_is_not_replaced() {
    let machine = Machine::fit();
    machine.write("run/a/file", "");
    symlink("/nowhere", machine.path("run/a/link")).unwrap();
    for name in ["file", "link"] {
        let spec = format!("vhost,path=/run/a/{name}");
        only(machine.port(&spec), Level::Fault, "not-a-socket", &["no socket", name]);
    }
    // A socket that is left over in a folder where no other can be made.
    drop(UnixListener::bind(machine.path("run/a/stale")).unwrap());
    machine.folder("run/a", 0o755);
    machine.status("Uid:\t4321\t4321\t4321\t4321\nGid:\t4321\t4321\t4321\t4321\n");
    only(
        machine.port("vhost,path=/run/a/stale"),
        Level::Fault,
        "folder-mode",
        &["/run/a"],
    );
}

#[test]
fn asynchronous_requests_that_are_all_taken() {
    let machine = Machine::fit();
    machine.write("proc/sys/fs/aio-nr", "65536\n");
    only(
        machine.port(SPEC),
        Level::Fault,
        "aio-limit",
        &["65536 of 65536", "sysctl -w fs.aio-max-nr="],
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
