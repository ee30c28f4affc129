use std::fs;

use super::*;
use crate::common::Usage;
use clap::Parser;

#[derive(Parser)]
struct Only {
    #[command(flatten)]
    args: Args,
}

fn container(line: &str) -> Result<Container> {
    let words = ["x"].into_iter().chain(line.split_whitespace());
    Container::of(&Only::try_parse_from(words)?.args)
}

fn document(line: &str, format: Format) -> Value {
    Text::of(&container(line).unwrap(), format).unwrap().json()
}

const PORT: &str = "--port virtio-user,path=/run/usernic/a/port.sock";

#[test]
fn no_format_gives_a_privilege() {
    let oci = document(PORT, Format::Oci);
    assert_eq!(oci["process"]["user"]["uid"], 65534);
    assert_eq!(oci["process"]["noNewPrivileges"], true);
    for set in ["bounding", "effective", "inheritable", "permitted", "ambient"] {
        assert_eq!(oci["process"]["capabilities"][set], serde_json::json!([]), "{set}");
    }
    assert_eq!(oci["root"]["readonly"], true);
    assert_eq!(oci["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    let names = oci["linux"]["seccomp"]["syscalls"][0]["names"].as_array().unwrap();
    assert!(names.iter().any(|n| n == "recvmsg") && !names.iter().any(|n| n == "mount" || n == "ptrace"));
    let spaces = oci["linux"]["namespaces"].as_array().unwrap();
    assert!(spaces.iter().any(|n| n["type"] == "network" && n.get("path").is_none()));

    for format in [Format::Podman, Format::Docker] {
        let Value::Array(words) = document(PORT, format) else {
            panic!("no words")
        };
        for word in [
            "--read-only",
            "--user=65534:65534",
            "--network=none",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--mount=type=bind,source=/run/usernic/a,target=/run/usernic/a,readonly",
        ] {
            assert!(words.iter().any(|w| w == word), "{word} is not in {words:?}");
        }
        assert!(!words.iter().any(|w| w.as_str().unwrap().contains("privileged")));
    }

    let pod = document(PORT, Format::Pod);
    assert_eq!(pod["kind"], "Pod");
    assert_eq!(pod["spec"]["securityContext"]["runAsNonRoot"], true);
    assert_eq!(
        pod["spec"]["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    let one = &pod["spec"]["containers"][0];
    assert_eq!(
        one["securityContext"]["capabilities"]["drop"],
        serde_json::json!(["ALL"])
    );
    assert_eq!(one["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(one["volumeMounts"][0]["readOnly"], true);
}

#[test]
fn huge_pages_are_those_of_all_ports() {
    let two = "--port virtio-user,path=/r/a/s --port virtio-user,path=/r/b/s,mem=5M";
    let oci = document(two, Format::Oci);
    let limit = &oci["linux"]["resources"]["hugepageLimits"][0];
    assert_eq!(
        (limit["pageSize"].as_str(), limit["limit"].as_i64()),
        (Some("2MB"), Some(8 << 20))
    );
    let pod = document(two, Format::Pod);
    let resources = &pod["spec"]["containers"][0]["resources"];
    assert_eq!(resources["limits"]["hugepages-2Mi"], "8Mi");
    assert_eq!(resources["limits"], resources["requests"]);
    assert!(
        pod["spec"]["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .all(|v| v.get("emptyDir").is_none())
    );

    let mounted = "--page 1G --port virtio-user,path=/r/a/s,memory=hugetlbfs";
    let oci = document(mounted, Format::Oci);
    let mount = oci["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["type"] == "hugetlbfs")
        .unwrap();
    assert_eq!(mount["destination"], "/dev/hugepages");
    let options = mount["options"].as_array().unwrap();
    for option in ["pagesize=1G", "size=1073741824", "uid=65534"] {
        assert!(options.iter().any(|o| o == option), "{option} is not in {options:?}");
    }
    let pod = document(mounted, Format::Pod);
    assert_eq!(pod["spec"]["volumes"][1]["emptyDir"]["medium"], "HugePages-1Gi");
    assert_eq!(
        pod["spec"]["containers"][0]["resources"]["limits"]["hugepages-1Gi"],
        "1024Mi"
    );

    let none = document("--port virtio-user,path=/r/a/s,memory=memfd", Format::Oci);
    assert!(none["linux"]["resources"].get("hugepageLimits").is_none());
}

#[test]
fn who_listens_may_write_and_nobody_else() {
    for (spec, access) in [
        ("virtio-user,path=/r/a/s", "ro"),
        ("virtio-user,path=/r/a/s,server=1", "rw"),
        ("vhost,path=/r/a/s", "rw"),
    ] {
        let cdi = document(&format!("--port {spec}"), Format::Cdi);
        let mount = &cdi["devices"][0]["containerEdits"]["mounts"][0];
        assert_eq!(mount["hostPath"], "/r/a");
        assert_eq!(mount["options"][4], access, "{spec}");
        let oci = document(&format!("--port {spec}"), Format::Oci);
        let bind = oci["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .find(|m| m["type"] == "bind")
            .unwrap();
        assert_eq!(bind["options"][4], access, "{spec}");
    }
}

#[test]
fn folders_of_others_are_not_given_away() {
    for path in ["/s", "/run/s", "/tmp/s", "/dev/shm/s", "s", "a/s", "/run/../etc/s"] {
        let error = container(&format!("--port virtio-user,path={path}")).unwrap_err();
        assert!(error.is::<Usage>(), "{path}: {error}");
    }
    assert!(container("").unwrap_err().is::<Usage>());
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("r/a")).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(root.path().join("r/a/other")).unwrap();
    let line = format!("--port virtio-user,path=/r/a/s --root {}", root.path().display());
    let notes = container(&line).unwrap().notes;
    assert!(notes[0].contains("/r/a also holds other"), "{notes:?}");
}

#[test]
fn lines_survive_a_shell() {
    let words = ["plain", "with space", "it's", "", "a,b=c:/d", "$HOME"].map(str::to_owned);
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("printf '%s\\n' {}", engine::line(&words)))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), words.join("\n") + "\n");
}
