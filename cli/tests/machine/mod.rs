//! A machine's `/sys`, `/proc` and `/dev` in a folder, with a kernel behind it: the files that a program writes to are
//! pipes, and a thread does what Linux does when it reads from them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

/// The port and the driver of its virtual functions.
pub const PORT: &str = "0000:81:00.0";
pub const DRIVERS: [&str; 4] = ["ixgbe", "ixgbevf", "vfio-pci", "pcieport"];

pub struct Machine {
    pub root: TempDir,
    kernel: Arc<Kernel>,
    thread: Option<JoinHandle<()>>,
}

struct Kernel {
    root: PathBuf,
    stop: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Every write, as `file <- text`.
    writes: Vec<String>,
    pipes: BTreeMap<PathBuf, File>,
    overrides: BTreeMap<String, String>,
    /// Functions that vfio-pci does not take.
    refused: Vec<String>,
    /// The port makes that many fewer than it is asked for.
    short: usize,
}

impl Machine {
    /// An 82599 port with an IOMMU and vfio-pci loaded, and a function that has nothing to do with it.
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let kernel = Arc::new(Kernel {
            root: root.path().to_owned(),
            stop: AtomicBool::new(false),
            state: Mutex::default(),
        });
        for driver in DRIVERS {
            fs::create_dir_all(kernel.path(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
            kernel.pipe(&format!("sys/bus/pci/drivers/{driver}/unbind"));
        }
        kernel.pipe("sys/bus/pci/drivers_probe");
        kernel.device(PORT, 0x10fb, Some("ixgbe"), Some(30));
        kernel.write(&format!("sys/bus/pci/devices/{PORT}/sriov_totalvfs"), "63\n");
        kernel.pipe(&format!("sys/bus/pci/devices/{PORT}/sriov_numvfs"));
        kernel.interface(PORT, "eth1", 1);
        kernel.device("0000:00:1f.0", 0x2918, None, None);
        kernel.write("sys/bus/pci/devices/0000:00:1f.0/class", "0x060100\n");
        kernel.write("dev/vfio/vfio", "");
        let run = Arc::clone(&kernel);
        Machine {
            root,
            kernel,
            thread: Some(std::thread::spawn(move || run.run())),
        }
    }

    /// The same with two virtual functions, `10.0` as eth5 and `10.2` as eth6, in groups 31 and 32.
    pub fn with_vfs() -> Self {
        let machine = Self::new();
        machine.kernel.make_vfs(2);
        machine
    }

    pub fn usernic(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_usernic"))
            .args(line.split_whitespace())
            .arg("--root")
            .arg(self.root.path())
            .output()
            .unwrap()
    }

    /// Runs what must work, and gives its output.
    pub fn does(&self, line: &str) -> String {
        let output = self.usernic(line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs what must fail with `status` and a message that holds `texts`, before anything is written.
    pub fn refuses(&self, status: i32, line: &str, texts: &[&str]) {
        let before = self.writes();
        self.fails(status, line, texts);
        assert_eq!(self.writes(), before, "{line}: refused before anything changes");
    }

    pub fn fails(&self, status: i32, line: &str, texts: &[&str]) {
        let output = self.usernic(line);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {message}");
        for text in texts {
            assert!(message.contains(text), "{line}: {text:?} is not in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    }

    /// All writes until now: the thread may not have read the last of them yet.
    pub fn writes(&self) -> Vec<String> {
        loop {
            let state = self.kernel.state.lock().unwrap();
            let waiting = |pipe: &File| rustix::io::ioctl_fionread(pipe).unwrap() > 0;
            if self.thread.as_ref().unwrap().is_finished() || !state.pipes.values().any(waiting) {
                return state.writes.clone();
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn refuse(&self, address: &str) {
        self.kernel.state.lock().unwrap().refused.push(address.to_owned());
    }

    pub fn make_fewer(&self, short: usize) {
        self.kernel.state.lock().unwrap().short = short;
    }

    pub fn driver(&self, address: &str) -> Option<String> {
        let to = fs::read_link(self.path(&format!("sys/bus/pci/devices/{address}/driver"))).ok()?;
        Some(to.file_name()?.to_str()?.to_owned())
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.kernel.path(path)
    }

    pub fn write(&self, path: &str, text: &str) {
        self.kernel.write(path, text);
    }

    pub fn link(&self, path: &str, to: impl AsRef<Path>) {
        self.kernel.link(path, to);
    }

    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        match path.symlink_metadata().unwrap().is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }

    /// Puts a function into another IOMMU group, or into none.
    pub fn group(&self, address: &str, group: Option<u32>) {
        self.kernel.leave_group(address);
        self.kernel.join_group(address, group);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kernel.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

impl Kernel {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, to: impl AsRef<Path>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(to, path).unwrap();
    }

    /// A file that is read by the thread. Held open both ways, so that a writer never waits.
    fn pipe(&self, path: &str) {
        let full = self.path(path);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &full,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(full)
            .unwrap();
        self.state.lock().unwrap().pipes.insert(path.into(), file);
    }

    fn device(&self, address: &str, id: u16, driver: Option<&str>, group: Option<u32>) {
        let folder = format!("sys/bus/pci/devices/{address}");
        for (file, text) in [
            ("vendor", "0x8086\n".to_owned()),
            ("device", format!("{id:#06x}\n")),
            ("class", "0x020000\n".to_owned()),
            ("numa_node", "1\n".to_owned()),
        ] {
            self.write(&format!("{folder}/{file}"), &text);
        }
        self.pipe(&format!("{folder}/driver_override"));
        self.attach(address, driver);
        self.join_group(address, group);
    }

    fn attach(&self, address: &str, driver: Option<&str>) {
        if let Some(driver) = driver {
            let to = self.path(&format!("sys/bus/pci/drivers/{driver}"));
            self.link(&format!("sys/bus/pci/devices/{address}/driver"), to);
        }
    }

    fn join_group(&self, address: &str, group: Option<u32>) {
        let Some(group) = group else { return };
        let folder = format!("sys/bus/pci/devices/{address}");
        self.link(
            &format!("{folder}/iommu_group"),
            self.path(&format!("sys/kernel/iommu_groups/{group}")),
        );
        self.link(
            &format!("sys/kernel/iommu_groups/{group}/devices/{address}"),
            self.path(&folder),
        );
    }

    fn leave_group(&self, address: &str) {
        let link = self.path(&format!("sys/bus/pci/devices/{address}/iommu_group"));
        if let Ok(group) = fs::read_link(&link) {
            fs::remove_file(group.join("devices").join(address)).unwrap();
            fs::remove_file(link).unwrap();
            if fs::read_dir(group.join("devices")).unwrap().next().is_none() {
                fs::remove_dir_all(group).unwrap();
            }
        }
    }

    fn interface(&self, address: &str, name: &str, index: u32) {
        let folder = format!("sys/bus/pci/devices/{address}");
        fs::create_dir_all(self.path(&format!("{folder}/net/{name}"))).unwrap();
        self.write(&format!("sys/class/net/{name}/ifindex"), &format!("{index}\n"));
        self.link(&format!("sys/class/net/{name}/device"), self.path(&folder));
    }

    fn make_vfs(&self, count: usize) {
        for number in 0..count {
            let address = format!("0000:81:10.{}", number * 2);
            self.device(&address, 0x10ed, Some("ixgbevf"), Some(31 + number as u32));
            self.interface(&address, &format!("eth{}", 5 + number), 100 + number as u32);
            let folder = format!("sys/bus/pci/devices/{address}");
            self.link(
                &format!("{folder}/physfn"),
                self.path(&format!("sys/bus/pci/devices/{PORT}")),
            );
            self.link(
                &format!("sys/bus/pci/devices/{PORT}/virtfn{number}"),
                self.path(&folder),
            );
        }
    }

    fn unmake_vfs(&self) {
        for number in 0.. {
            let link = self.path(&format!("sys/bus/pci/devices/{PORT}/virtfn{number}"));
            let Ok(folder) = fs::read_link(&link) else { break };
            let address = folder.file_name().unwrap().to_str().unwrap().to_owned();
            self.leave_group(&address);
            let pipe = PathBuf::from(format!("sys/bus/pci/devices/{address}/driver_override"));
            self.state.lock().unwrap().pipes.remove(&pipe);
            fs::remove_dir_all(folder).unwrap();
            fs::remove_file(link).unwrap();
        }
    }

    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let paths: Vec<PathBuf> = self.state.lock().unwrap().pipes.keys().cloned().collect();
            for path in paths {
                if let Some(text) = self.take(&path) {
                    self.react(path.to_str().unwrap(), &text);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What was written to a file since the last time.
    fn take(&self, path: &Path) -> Option<String> {
        let mut bytes = [0; 256];
        let mut state = self.state.lock().unwrap();
        let n = rustix::io::read(state.pipes.get(path)?, &mut bytes).ok()?;
        let text = std::str::from_utf8(&bytes[..n]).unwrap().trim().to_owned();
        let short = path.to_str().unwrap().trim_start_matches("sys/bus/pci/");
        state.writes.push(format!("{short} <- {text}"));
        Some(text)
    }

    fn react(&self, path: &str, text: &str) {
        let folder = |address: &str| self.path(&format!("sys/bus/pci/devices/{address}"));
        let parts: Vec<_> = path.trim_start_matches("sys/bus/pci/").split('/').collect();
        match parts[..] {
            ["devices", address, "driver_override"] => {
                self.state.lock().unwrap().overrides.insert(address.into(), text.into());
            }
            ["devices", _, "sriov_numvfs"] if text == "0" => self.unmake_vfs(),
            ["devices", _, "sriov_numvfs"] => {
                let short = self.state.lock().unwrap().short;
                self.make_vfs(text.parse::<usize>().unwrap() - short);
            }
            ["drivers", driver, "unbind"] => {
                let link = folder(text).join("driver");
                assert!(
                    fs::read_link(&link).unwrap().ends_with(driver),
                    "{text} is not with {driver}"
                );
                fs::remove_file(link).unwrap();
                let _ = fs::remove_dir_all(folder(text).join("net"));
            }
            ["drivers_probe"] => {
                // It was written before this, and may not have been read.
                let pipe = PathBuf::from(format!("sys/bus/pci/devices/{text}/driver_override"));
                if let Some(name) = self.take(&pipe) {
                    self.state.lock().unwrap().overrides.insert(text.into(), name);
                }
                self.probe(text);
            }
            _ => panic!("nobody writes to {path}"),
        }
    }

    fn probe(&self, address: &str) {
        let state = self.state.lock().unwrap();
        let chosen = state.overrides.get(address).filter(|name| !name.is_empty()).cloned();
        let refused = state.refused.iter().any(|a| a == address);
        drop(state);
        match chosen.as_deref() {
            Some("vfio-pci") if refused => {}
            Some(driver) => {
                self.attach(address, Some(driver));
                let group = fs::read_link(self.path(&format!("sys/bus/pci/devices/{address}/iommu_group")));
                if let Ok(group) = group {
                    self.write(
                        &format!("dev/vfio/{}", group.file_name().unwrap().to_str().unwrap()),
                        "",
                    );
                }
            }
            None => {
                self.attach(address, Some("ixgbevf"));
                let folder = self.path(&format!("sys/bus/pci/devices/{address}"));
                for interface in fs::read_dir(self.path("sys/class/net")).unwrap().flatten() {
                    if fs::read_link(interface.path().join("device")).is_ok_and(|to| to == folder) {
                        fs::create_dir_all(folder.join("net").join(interface.file_name())).unwrap();
                    }
                }
            }
        }
    }
}
