//! The README's command line that builds the examples, as it is written there.

use std::path::Path;
use std::process::Command;

#[test]
fn the_line_of_the_readme_finds_the_library() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(here.join("README.md")).unwrap();
    let line = readme
        .lines()
        .find_map(|line| line.strip_prefix("$ make -C ffi/examples "));
    let line = line.expect("the README says how the examples are built");
    let (variable, folder) = line.split_once('=').expect("a variable of make");
    assert_eq!((variable, folder.ends_with("lib/pkgconfig")), ("PKG_CONFIG_PATH", true));
    if ["make", "pkg-config"]
        .iter()
        .any(|tool| Command::new(tool).arg("--version").output().is_err())
    {
        eprintln!("skipped: make and pkg-config are not installed");
        return;
    }
    // A library of this name, elsewhere.
    let prefix = tempfile::tempdir().unwrap();
    let text = "Name: usernic\nDescription: x\nVersion: 1\nCflags: -I/marked/include\nLibs: -L/marked/lib -lusernic\n";
    std::fs::write(prefix.path().join("usernic.pc"), text).unwrap();
    let output = Command::new("make")
        .args(["--dry-run", "--always-make", "-C"])
        .arg(here.join("examples"))
        .arg(format!("{variable}={}", prefix.path().display()))
        .env_remove("PKG_CONFIG_PATH")
        .output()
        .unwrap();
    let commands = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for flag in ["-I/marked/include", "-L/marked/lib", "-lusernic"] {
        assert!(commands.contains(flag), "{flag} is missing: {commands}");
    }
}
