//! The device behind vfio-user, with the crate's own client in QEMU's place, and the control socket.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vfio_user::Client;

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;

/// The program, ended when dropped.
struct Model(Child);

impl Model {
    fn start(directory: &Path, arguments: &[&str]) -> Self {
        let path = |name: &str| directory.join(name).display().to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vf-model"))
            .args([
                "--socket",
                &path("0"),
                "--socket",
                &path("1"),
                "--control",
                &path("c"),
                "--exit-with-stdin",
            ])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let model = Self(child);
        assert_eq!(line, "ready\n");
        model
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

struct Control(BufReader<UnixStream>);

impl Control {
    fn say(&mut self, line: &str) -> String {
        writeln!(self.0.get_mut(), "{line}").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

struct Guest(Client);

impl Guest {
    fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.region_read(BAR0, offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.0.region_write(BAR0, offset, &value.to_le_bytes()).unwrap();
    }

    fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.region_read(CONFIG, offset, &mut bytes).unwrap();
        bytes
    }
}

fn memory(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn a_client_finds_the_function_and_its_registers() {
    let directory = tempfile::tempdir().unwrap();
    let _model = Model::start(directory.path(), &["--kind", "x550"]);
    let mut guest = Guest(Client::new(&directory.path().join("0")).unwrap());
    assert_eq!(guest.config(0), [0x86, 0x80, 0x65, 0x15]);
    for region in [0, 3] {
        assert_eq!(guest.0.region(region).unwrap().size, 0x4000);
    }
    let irqs = guest.0.get_irq_info(MSIX).unwrap();
    assert_eq!((irqs.count, irqs.flags), (3, 9));
    guest.write(0x1008, 4096);
    assert_eq!(guest.read(0x1008), 4096);
    // A function-level reset, by way of the configuration space.
    guest.write(0x300, 1 << 29);
    guest.0.region_write(CONFIG, 0xa8, &[0x00, 0x80]).unwrap();
    assert_eq!(guest.read(0x300), 0);
    guest.0.reset().unwrap();
}

#[test]
fn a_frame_travels_through_files_and_rings_an_eventfd() {
    let directory = tempfile::tempdir().unwrap();
    let _model = Model::start(directory.path(), &["--latency", "0"]);
    let mut control = Control(BufReader::new(UnixStream::connect(directory.path().join("c")).unwrap()));
    let mut guest = Guest(Client::new(&directory.path().join("0")).unwrap());
    let file = memory(0x4000);
    // The second half of the file, at an address of its own.
    guest.0.dma_map(0x2000, 0x10_0000, 0x2000, file.as_raw_fd()).unwrap();
    let line = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    guest.0.set_irqs(MSIX, 0x24, 1, 1, &[line.as_raw_fd()]).unwrap();

    // Reset, VF_RESET, one receive descriptor of a ring of 64, its buffer behind the ring.
    guest.write(0, 1 << 26);
    guest.write(0x2fc, 4);
    guest.write(0x200, 1);
    guest.write(0x2fc, 1);
    assert_eq!(guest.read(0x200), 0x8000_0001);
    file.write_all_at(&0x10_1000_u64.to_le_bytes(), 0x2000).unwrap();
    for (register, value) in [
        (0x1000, 0x10_0000),
        (0x1004, 0),
        (0x1008, 1024),
        (0x1014, 0x0200_0002),
        (0x1028, 1 << 25),
        (0x1018, 1),
        (0x120, 0x81),
        (0x108, 2),
    ] {
        guest.write(register, value);
    }
    let frame = format!("028259900001{}", "5a".repeat(60));
    assert_eq!(control.say(&format!("inject {frame}")), "ok");
    // The line has rung before the answer came.
    let mut ready = [PollFd::new(&line, PollFlags::IN)];
    poll(&mut ready, Some(&rustix::time::Timespec::default())).unwrap();
    assert!(ready[0].revents().contains(PollFlags::IN));
    let mut bytes = [0; 66];
    file.read_exact_at(&mut bytes, 0x3000).unwrap();
    assert_eq!(bytes[..7], [0x02, 0x82, 0x59, 0x90, 0, 1, 0x5a]);
    let mut descriptor = [0; 16];
    file.read_exact_at(&mut descriptor, 0x2000).unwrap();
    assert_eq!((descriptor[8], descriptor[12]), (3, 66));

    // Unmapped: the next one is refused and counted.
    guest.0.dma_unmap(0x10_0000, 0x2000).unwrap();
    guest.write(0x1018, 2);
    control.say(&format!("inject {frame}"));
    let stats = control.say("stats");
    assert!(stats.contains("\"dma_faults\":1"), "{stats}");
    assert!(stats.contains("\"packets_rx\":1"), "{stats}");
}

#[test]
fn a_moderated_interrupt_comes_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let _model = Model::start(directory.path(), &[]);
    let mut guest = Guest(Client::new(&directory.path().join("0")).unwrap());
    let line = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    guest.0.set_irqs(MSIX, 0x24, 0, 1, &[line.as_raw_fd()]).unwrap();
    // The longest interval: 1022 us.
    guest.write(0x820, 0xff8);
    guest.write(0x108, 1);
    for _ in 0..20 {
        // The first at once, or when the interval is over; nothing is asked of the device meanwhile.
        guest.write(0x104, 1);
        let mut ready = [PollFd::new(&line, PollFlags::IN)];
        let limit = rustix::time::Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut ready, Some(&limit)).unwrap(), 1, "an interrupt");
        rustix::io::read(&line, &mut [0; 8]).unwrap();
        assert_eq!(guest.read(0x100), 1);
    }
}

#[test]
fn one_client_after_the_other_finds_a_fresh_function() {
    let directory = tempfile::tempdir().unwrap();
    let _model = Model::start(directory.path(), &[]);
    for _ in 0..3 {
        let mut guest = Guest(Client::new(&directory.path().join("1")).unwrap());
        assert_eq!(guest.read(0x300), 0);
        guest.write(0x300, 1 << 29);
        guest.0.shutdown().unwrap();
    }
}

#[test]
fn the_administrators_words() {
    let directory = tempfile::tempdir().unwrap();
    let _model = Model::start(directory.path(), &[]);
    let mut control = Control(BufReader::new(UnixStream::connect(directory.path().join("c")).unwrap()));
    let mut guest = Guest(Client::new(&directory.path().join("1")).unwrap());
    assert_eq!(guest.read(0x10), 0x7000_0000);
    for (line, links) in [
        ("link down", 0),
        ("link up 1g", 0x6000_0000),
        ("vf-link 1 off", 0),
        ("vf-link 1 on", 0x6000_0000),
        ("reset begin", 0),
        ("reset end", 0x6000_0000),
    ] {
        assert_eq!(control.say(line), "ok", "{line}");
        assert_eq!(guest.read(0x10), links, "{line}");
    }
    for line in [
        "mac 1 02:00:00:00:00:07",
        "mac 1 none",
        "vlan 1 100 3",
        "vlan 1 none",
        "trust 1 on",
        "spoof 1 off",
        "rss-query 1 on",
        "deaf 1 on",
        "refuse 1 5 2",
        "mdd on",
        "promiscuous on",
        "mtu 9000",
        "lose 0",
        "reset",
    ] {
        assert_eq!(control.say(line), "ok", "{line}");
    }
    assert_eq!(control.say("collect"), "none");
    assert!(control.say("help").contains("link up"));
    for line in [
        "",
        "link",
        "link up 3g",
        "mac 2 none",
        "mac 0 02:00",
        "vlan 0 4095",
        "trust 0 maybe",
        "refuse 0 99 1",
        "mtu 20",
        "inject 5",
        "inject zz",
        "inject 00",
    ] {
        assert!(control.say(line).starts_with("error: "), "{line}");
    }
}

#[test]
fn its_sockets_are_gone_after_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut model = Model::start(directory.path(), &[]);
    drop(model.0.stdin.take());
    assert!(model.0.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
