//! `devices`, `vf`, `bind`, `unbind` on a machine in a folder: what they do, and everything that they refuse.

mod machine;

use std::process::Command;

use machine::{Machine, PORT};
use serde_json::{Value, json};

const VF0: &str = "0000:81:10.0";
const VF1: &str = "0000:81:10.2";

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn devices_are_listed() {
    let machine = Machine::with_vfs();
    machine.does("bind 0000:81:10.2");
    let text = machine.does("devices");
    let lines: Vec<_> = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        lines,
        [
            "ADDRESS DEVICE DRIVER INTERFACE VFS GROUP NUMA NODE",
            "0000:81:00.0 8086:10fb 82599 ixgbe eth1 2 of 63 30 1",
            "0000:81:10.0 8086:10ed 82599 VF ixgbevf eth5 31 1",
            "0000:81:10.2 8086:10ed 82599 VF vfio-pci 32 1 /dev/vfio/32",
        ]
    );
    assert!(machine.does("devices --all").contains("0000:00:1f.0"));
    let report = parse(&machine.does("devices --json"));
    assert_eq!(report["schema"], "usernic.devices/1");
    assert_eq!((&report["iommu"], &report["notes"]), (&json!(true), &json!([])));
    let vf = &report["devices"][2];
    assert_eq!((&vf["address"], &vf["driver"]), (&json!(VF1), &json!("vfio-pci")));
    assert_eq!(
        (&vf["physical"], &vf["nodes"]),
        (&json!(PORT), &json!(["/dev/vfio/32"]))
    );
    assert_eq!(report["devices"][0]["virtuals"], json!([VF0, VF1]));
}

#[test]
fn what_is_missing_is_told_with_the_mend() {
    let empty = tempfile::tempdir().unwrap();
    let usernic = |root: &std::path::Path, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
        let output = command
            .arg("devices")
            .arg("--root")
            .arg(root)
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = usernic(empty.path(), &[]);
    assert!(text.contains("no SR-IOV device") && text.contains("no IOMMU"), "{text}");
    assert!(text.contains("intel_iommu=on"), "{text}");
    let report = parse(&usernic(empty.path(), &["--json"]));
    assert_eq!(report["iommu"], json!(false));
    assert_eq!(report["notes"].as_array().unwrap().len(), 2);
    // A machine that has everything but functions and the driver.
    let machine = Machine::new();
    machine.remove("sys/bus/pci/drivers/vfio-pci");
    let text = machine.does("devices");
    assert!(text.contains("usernic vf create 0000:81:00.0 N (1 to 63)"), "{text}");
    assert!(
        text.contains("modprobe vfio-pci") && !text.contains("no IOMMU"),
        "{text}"
    );
    // This machine, whatever it is.
    let report = parse(&usernic("/".as_ref(), &["--json"]));
    let some = !report["devices"].as_array().unwrap().is_empty();
    assert_eq!(
        some,
        !report["notes"].to_string().contains("no SR-IOV device"),
        "{report}"
    );
}

#[test]
fn virtual_functions_come_and_go() {
    let machine = Machine::new();
    machine.refuses(1, "vf create eth1 64", &["1 to 63", "64 asked for"]);
    machine.refuses(1, "vf create eth1 0", &["1 to 63"]);
    machine.refuses(1, "vf destroy eth1", &["no virtual functions"]);
    let text = machine.does("vf create eth1 2");
    assert!(text.contains("0000:81:00.0 made 0000:81:10.0, 0000:81:10.2"), "{text}");
    machine.refuses(
        1,
        "vf create 81:00.0 3",
        &["has 2 virtual functions already", "usernic vf destroy 0000:81:00.0"],
    );
    machine.refuses(1, "vf create 0000:81:10.0 1", &["no SR-IOV", "itself, of 0000:81:00.0"]);
    machine.refuses(1, "vf create 0000:00:1f.0 1", &["no SR-IOV"]);
    let report = parse(&machine.does("--json vf destroy eth1"));
    assert_eq!(
        (&report["schema"], &report["vfs"]),
        (&json!("usernic.vf.destroy/1"), &json!([VF0, VF1]))
    );
    assert_eq!(
        machine.writes(),
        [
            "devices/0000:81:00.0/sriov_numvfs <- 2",
            "devices/0000:81:00.0/sriov_numvfs <- 0"
        ]
    );
    let report = parse(&machine.does("vf create eth1 1 --json"));
    assert_eq!((&report["port"], &report["vfs"]), (&json!(PORT), &json!([VF0])));
}

#[test]
fn a_port_that_makes_too_few_or_has_no_driver() {
    let machine = Machine::new();
    machine.make_fewer(1);
    machine.fails(
        1,
        "vf create eth1 3",
        &["has 2 virtual functions after 3 were asked for", "dmesg"],
    );
    assert_eq!(
        machine.writes().last().unwrap(),
        "devices/0000:81:00.0/sriov_numvfs <- 0"
    );
    machine.remove("sys/bus/pci/devices/0000:81:00.0/driver");
    machine.refuses(1, "vf create 81:00.0 3", &["with no driver", "ixgbe"]);
}

#[test]
fn bound_and_back() {
    let machine = Machine::with_vfs();
    let text = machine.does("bind eth5");
    assert!(
        text.contains("0000:81:10.0: from ixgbevf to vfio-pci; a container needs /dev/vfio/31"),
        "{text}"
    );
    assert_eq!(machine.driver(VF0).as_deref(), Some("vfio-pci"));
    assert_eq!(
        machine.driver(VF1).as_deref(),
        Some("ixgbevf"),
        "of the same kind, and left alone"
    );
    assert_eq!(
        machine.writes(),
        [
            "devices/0000:81:10.0/driver_override <- vfio-pci",
            "drivers/ixgbevf/unbind <- 0000:81:10.0",
            "drivers_probe <- 0000:81:10.0"
        ]
    );
    let text = machine.does("bind 81:10.0");
    assert!(
        text.contains("vfio-pci has it already; a container needs /dev/vfio/31"),
        "{text}"
    );
    assert_eq!(machine.writes().len(), 3);

    let report = parse(&machine.does("--json unbind 81:10.0"));
    assert_eq!(report["schema"], "usernic.unbind/1");
    assert_eq!(
        (&report["devices"][0]["from"], &report["devices"][0]["to"]),
        (&json!("vfio-pci"), &json!("ixgbevf"))
    );
    assert_eq!(machine.driver(VF0).as_deref(), Some("ixgbevf"));
    assert_eq!(machine.writes()[3], "devices/0000:81:10.0/driver_override <- ");
    machine.refuses(1, "unbind 81:10.0", &["with ixgbevf", "nothing to unbind"]);
}

#[test]
fn what_the_machine_needs_stays() {
    let machine = Machine::with_vfs();
    let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
    let route = |interface: &str, destination: &str, mask: &str| {
        format!("{head}{interface}\t{destination}\t0102A8C0\t0003\t0\t0\t0\t{mask}\t0\t0\t0\n")
    };
    machine.write("proc/net/route", &route("eth5", "00000000", "00000000"));
    machine.refuses(
        1,
        "bind eth5",
        &[
            "0000:81:10.0 is in use: the default route goes through its interface eth5",
            "--force",
        ],
    );
    machine.refuses(1, "vf destroy eth1", &["0000:81:10.0 is in use"]);
    let row = machine.does("devices");
    assert!(
        row.contains("the default route goes through its interface eth5"),
        "{row}"
    );
    // A VLAN on top of it.
    machine.write("proc/net/route", &route("eth5.7", "00000000", "00000000"));
    machine.link("sys/class/net/eth5/upper_eth5.7", "../eth5.7");
    machine.refuses(1, "bind eth5", &["through eth5.7, which is on its interface eth5"]);
    // A network, not a default route; and half of the Internet.
    for (destination, mask) in [("0000A8C0", "0000FFFF"), ("00000000", "00000080")] {
        machine.write("proc/net/route", &route("eth6", destination, mask));
        machine.does("bind eth6");
        machine.does("unbind 0000:81:10.2");
        assert!(machine.does("devices").contains("eth6"));
    }
    // IPv6, on the other.
    machine.write("proc/net/route", head);
    let zero = "0".repeat(32);
    let v6 = |len: &str, interface: &str| {
        format!("{zero} {len} {zero} 00 {zero} 00000400 00000001 00000000 00000003 {interface:>8}\n")
    };
    machine.write(
        "proc/net/ipv6_route",
        &(v6("00", "lo") + &v6("00", "eth1") + &v6("40", "eth5")),
    );
    machine.refuses(1, "bind eth1", &["the default route goes through its interface eth1"]);
    // A port of a bond.
    machine.link("sys/class/net/eth5/master", "../bond0");
    machine.refuses(1, "bind eth5", &["its interface eth5 is a port of bond0"]);
    machine.does("bind eth5 --force");
    assert_eq!(machine.driver(VF0).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_group_goes_together() {
    let machine = Machine::with_vfs();
    machine.group(VF1, Some(31));
    machine.refuses(
        1,
        "bind 81:10.0",
        &["group 31 would not be viable: 0000:81:10.2 is with ixgbevf", "--group"],
    );
    machine.does("bind 81:10.0 81:10.2");
    machine.does("unbind 81:10.0 81:10.2");
    let report = parse(&machine.does("bind 81:10.0 --group --json"));
    assert_eq!(report["devices"].as_array().unwrap().len(), 2);
    assert_eq!(machine.driver(VF1).as_deref(), Some("vfio-pci"));
    // Bridges are in nobody's way.
    let machine = Machine::with_vfs();
    machine.group(PORT, Some(31));
    machine.link(
        &format!("sys/bus/pci/devices/{PORT}/driver"),
        machine.path("sys/bus/pci/drivers/pcieport"),
    );
    machine.does("bind 81:10.0");
}

#[test]
fn no_iommu() {
    let machine = Machine::with_vfs();
    machine.group(VF0, None);
    machine.refuses(1, "bind 81:10.0", &["in no IOMMU group: vfio-pci would refuse it"]);
    machine.group(VF1, None);
    machine.group(PORT, None);
    machine.refuses(
        1,
        "bind 81:10.0",
        &[
            "in no IOMMU group, and this kernel has no IOMMU",
            "intel_iommu=on",
            "--noiommu",
        ],
    );
    assert!(machine.does("devices").contains("no IOMMU"));
    let switch = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    let warning = "owns the kernel";
    machine.refuses(
        1,
        "bind 81:10.0 --noiommu",
        &["enable_unsafe_noiommu_mode is not on", warning],
    );
    machine.write(switch, "N\n");
    machine.refuses(1, "bind 81:10.0 --noiommu", &["is not on"]);
    machine.write(switch, "Y\n");
    let output = machine.usernic("bind 81:10.0 --noiommu");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(warning));
    assert_eq!(machine.driver(VF0).as_deref(), Some("vfio-pci"));
}

#[test]
fn mistakes() {
    let machine = Machine::with_vfs();
    machine.refuses(1, "bind 81:11.0", &["no PCI device 0000:81:11.0"]);
    machine.refuses(1, "bind eth9", &["\"eth9\" is neither a PCI address"]);
    machine.refuses(1, "bind ../../../etc", &["neither a PCI address"]);
    machine.refuses(
        1,
        "bind 81:10.0 --driver vfio_pci",
        &["vfio_pci is not there: modprobe vfio_pci"],
    );
    machine.refuses(2, "bind", &["DEVICE"]);
    machine.refuses(2, "vf create eth1", &["COUNT"]);
    machine.refuses(2, "vf create eth1 many", &["many"]);
    // Sysfs that is not to be written, as in a container.
    machine.remove("sys/bus/pci/devices/0000:81:10.0/driver_override");
    machine.fails(1, "bind 81:10.0", &["cannot write \"vfio-pci\"", "driver_override"]);
}

#[test]
fn nothing_is_half_done() {
    let machine = Machine::with_vfs();
    machine.refuse(VF1);
    machine.fails(
        1,
        "bind 81:10.0 81:10.2",
        &["vfio-pci did not take 0000:81:10.2: it has no driver", "dmesg"],
    );
    assert_eq!(machine.driver(VF0).as_deref(), Some("ixgbevf"), "given back");
    assert_eq!(machine.driver(VF1).as_deref(), Some("ixgbevf"), "given back");
}

#[test]
fn nobody_waits_for_a_process_that_does_not_know() {
    let machine = Machine::with_vfs();
    machine.does("bind 81:10.0");
    machine.write("proc/4242/comm", "testpmd\n");
    machine.link("proc/4242/fd/0", "/dev/null");
    machine.link("proc/4242/fd/9", "/dev/vfio/31");
    let open = "0000:81:10.0 is open in testpmd (process 4242): end that first";
    machine.refuses(1, "unbind 81:10.0", &[open]);
    machine.refuses(1, "vf destroy eth1 --force", &[open]);
    assert!(machine.does("devices").contains("testpmd (process 4242)"));
    machine.remove("proc/4242");
    machine.does("unbind 81:10.0");
}

#[test]
fn settings_of_a_virtual_function() {
    let machine = Machine::with_vfs();
    machine.refuses(2, "vf set 81:10.0", &["nothing to set", "--mac"]);
    machine.refuses(2, "vf set 81:10.0 --mac 01:00:5e:00:00:01", &["even first byte"]);
    machine.refuses(2, "vf set 81:10.0 --mac 00:00:00:00:00:00", &["even first byte"]);
    machine.refuses(2, "vf set 81:10.0 --mac 02:00", &["no Ethernet address"]);
    machine.refuses(2, "vf set 81:10.0 --vlan 4095", &["4095"]);
    machine.refuses(2, "vf set 81:10.0 --priority 3", &["--vlan"]);
    machine.refuses(2, "vf set 81:10.0 --trust yes", &["on or off"]);
    machine.refuses(1, "vf set 81:00.0 --trust on", &["is no virtual function"]);
    machine.refuses(1, "vf set 81:11.0 --trust on", &["no PCI device"]);
    // The port's interface has number 1 here, which is the loopback of this machine: its driver knows no such thing,
    // which only root is told.
    machine.refuses(
        1,
        "vf set 81:10.2 --vlan 100 --rate 500",
        &[
            "virtual function 1 of eth1: vlan 100 is refused",
            "(",
            "nothing was changed",
        ],
    );
    machine.remove("sys/bus/pci/devices/0000:81:00.0/net");
    machine.refuses(
        1,
        "vf set 81:10.0 --trust on",
        &["no network interface in this namespace", "ixgbe"],
    );
}

#[test]
fn a_container_gets_its_function_and_nothing_else() {
    let machine = Machine::with_vfs();
    machine.refuses(
        1,
        "container --vf 0000:81:10.2 --format oci",
        &["is with ixgbevf", "usernic bind 0000:81:10.2"],
    );
    machine.does("bind 0000:81:10.2");
    let oci = parse(&machine.does("container --vf 0000:81:10.2 --format oci"));
    let paths: Vec<_> = oci["linux"]["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["path"])
        .collect();
    assert_eq!(paths, [&json!("/dev/vfio/vfio"), &json!("/dev/vfio/32")]);
    let node = &oci["linux"]["devices"][1];
    assert_eq!(
        (&node["uid"], &node["gid"], &node["fileMode"]),
        (&json!(65534), &json!(65534), &json!(0o600))
    );
    let limits = oci["process"]["rlimits"].as_array().unwrap();
    assert!(
        limits.contains(&json!({"type": "RLIMIT_MEMLOCK", "hard": 4 << 20, "soft": 4 << 20})),
        "{limits:?}"
    );
    let cdi = parse(&machine.does("container --vf 0000:81:10.2 --format cdi"));
    assert_eq!(cdi["kind"], "usernic.github.io/port");
    assert_eq!(cdi["devices"][0]["name"], VF1);
    assert_eq!(
        cdi["devices"][0]["containerEdits"]["deviceNodes"][1]["path"],
        "/dev/vfio/32"
    );
    let pod = parse(&machine.does("container --vf 0000:81:10.2 --format pod --resource example.com/vf"));
    assert_eq!(
        pod["spec"]["containers"][0]["resources"]["limits"]["example.com/vf"],
        "1"
    );
    let line = machine.does("container --vf 0000:81:10.2 --format podman");
    assert!(
        line.contains("--device=/dev/vfio/32") && line.contains("--ulimit=memlock=4194304:4194304"),
        "{line}"
    );
    machine.group("0000:81:10.2", None);
    machine.refuses(1, "container --vf 0000:81:10.2", &["no IOMMU group", "intel_iommu=on"]);
}
