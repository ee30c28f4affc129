//! The programs together: a switch, and everything that a port can be used for, over real sockets.

mod lab;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, Running, port};

#[test]
fn a_capture_goes_through_the_cross_connect() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --count 600 --timeout 20");
    lab.until_up(&["b"]);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/data/demo.pcap");
    let sent = lab.run(&format!("replay --port virtio-user,path=a --loop 2 --pcap {demo}"));
    assert_eq!(
        (sent["schema"].as_str(), sent["ended"].as_str()),
        (Some("usernic.replay/1"), Some("count"))
    );
    assert_eq!(sent["frames"], 600);
    let (status, got) = capture.end();
    assert_eq!(
        (status, got["frames"].as_u64(), got["ended"].as_str()),
        (Some(0), Some(600), Some("count")),
        "{got}"
    );
    // Record by record, but for the timestamps: the same lengths and bytes, twice.
    let frames = |bytes: &[u8]| {
        let mut frames = Vec::new();
        let mut at = 24;
        while at < bytes.len() {
            let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
            frames.push(bytes[at + 16..at + 16 + len].to_vec());
            at += 16 + len;
        }
        frames
    };
    let original = frames(&std::fs::read(demo).unwrap());
    let received = frames(&std::fs::read(lab.path("out.pcap")).unwrap());
    assert!(
        received == [original.clone(), original].concat(),
        "the capture changed on its way"
    );
    switch.signal(libc::SIGINT);
    let (status, totals) = switch.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("signal")));
    assert_eq!(
        (
            port(&totals, "a")["rx_packets"].as_u64(),
            port(&totals, "b")["tx_packets"].as_u64()
        ),
        (Some(600), Some(600))
    );
    for file in ["a", "b", "ctl"] {
        assert!(!lab.path(file).exists(), "{file} was left behind");
    }
}

#[test]
fn a_host_is_pinged_in_both_families() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b");
    let host = lab.start("forward --port virtio-user,path=b --mode icmpecho --ip 192.0.2.2 --ip 2001:db8::2");
    lab.until_up(&["b"]);
    for (from, to) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let pinged = lab.run(&format!(
            "ping --port virtio-user,path=a --from {from} --to {to} --count 3 -i 0.02"
        ));
        assert_eq!(
            (pinged["sent"].as_u64(), pinged["received"].as_u64()),
            (Some(3), Some(3)),
            "{pinged}"
        );
        assert!(pinged["max_us"].as_f64() >= pinged["min_us"].as_f64());
    }
    let nobody = lab
        .command("ping --port virtio-user,path=a --from 192.0.2.1 --to 192.0.2.9 -c 1")
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1), "an address that nobody has");
    host.signal(libc::SIGTERM);
    let (status, totals) = host.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("signal")));
    // Two questions for the address, six echoes; more when the machine is slow and a question was repeated.
    assert!(totals["forwarded"].as_u64() >= Some(8), "{totals}");
    switch.signal(libc::SIGTERM);
    assert_eq!(switch.end().0, Some(0));
}

#[test]
fn generated_frames_are_counted_everywhere() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect 0:1");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --timeout 30");
    lab.until_up(&["b"]);
    let made = lab.run("generate --port virtio-user,path=a --count 1000 --rate 20K --size 60-100");
    assert_eq!(
        (made["frames"].as_u64(), made["ended"].as_str()),
        (Some(1000), Some("count"))
    );
    assert!(
        made["seconds"].as_f64() >= Some(0.04),
        "1000 at 20 K a second take 50 ms: {made}"
    );
    // The captured file is whole even though a signal ends it.
    lab.until("all frames are captured", || {
        std::fs::metadata(lab.path("out.pcap")).is_ok_and(|m| m.len() >= 24 + 1000 * 76)
    });
    std::thread::sleep(Duration::from_millis(100));
    capture.signal(libc::SIGINT);
    let (status, got) = capture.end();
    assert_eq!((status, got["frames"].as_u64()), (Some(0), Some(1000)), "{got}");
    // What was written is a capture; and since nobody is behind b now, the cross-connect holds it, and the sender ends.
    let line = "replay --port virtio-user,path=a --pcap out.pcap --stall 0.3";
    let held = lab.command(line).output().unwrap();
    let message = String::from_utf8_lossy(&held.stderr);
    assert_eq!(held.status.code(), Some(1), "{message}");
    assert!(
        message.contains("taken no frame for 0.3 s") && message.contains("frames of out.pcap"),
        "{message}"
    );
    drop(switch);
}

#[test]
fn bits_a_second_are_those_of_a_wire_and_what_was_sent_is_told() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect 0:1");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --timeout 30");
    lab.until_up(&["b"]);
    // 84 bytes of a wire each: 10,000 a second.
    let made = lab.run("generate --port virtio-user,path=a --count 1000 --size 60 --rate 6.72Mbit");
    let seconds = made["seconds"].as_f64().unwrap();
    assert!(seconds >= 0.09, "1000 at 10 K a second take 100 ms: {made}");
    let wire = made["wire_bps"].as_f64().unwrap();
    assert!((wire * seconds - 1000.0 * 84.0 * 8.0).abs() < 1.0, "{made}");
    let of = |name: &str| made[name].as_u64();
    assert_eq!(
        (of("frames"), of("bytes"), of("dropped")),
        (Some(1000), Some(60_000), Some(0))
    );
    assert_eq!(made["taken"], true);
    capture.signal(libc::SIGINT);
    capture.end();
    // With nobody behind b the cross-connect holds what it has: what stays in the ring was not taken.
    let made = lab.run("generate --port virtio-user,path=a --count 200 --stall 0.3");
    assert_eq!(
        (&made["taken"], made["frames"].as_u64()),
        (&false.into(), Some(200)),
        "{made}"
    );
    drop(switch);
}

#[test]
fn the_sample_is_a_capture_on_the_standard_output_too() {
    let lab = Lab::new();
    let output = lab.command("sample -").output().unwrap();
    assert!(output.status.success() && !lab.path("-").exists());
    assert!(output.stdout == include_bytes!("../data/demo.pcap"));
    // A reader that has left is no fault of the program's, and no panic.
    let mut head = lab.command("sample -");
    let mut child = head.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_reflector_returns_frames_and_a_timer_ends_programs() {
    let lab = Lab::new();
    let switch = lab.switch("--listen r --reflect r --seconds 3");
    let begun = Instant::now();
    let made = lab.run("generate --port virtio-user,path=r --seconds 0.3");
    assert_eq!(made["ended"], "time");
    assert!(
        made["frames"].as_u64() > Some(100) && made["ports"][0]["rx_packets"].as_u64() > Some(0),
        "{made}"
    );
    let (status, totals) = switch.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("time")));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn two_ports_are_joined_by_forward() {
    let lab = Lab::new();
    let left = lab.switch("--listen a,b --connect a:b");
    std::fs::rename(lab.path("ctl"), lab.path("ctl-left")).unwrap();
    let right = lab.switch("--listen c,d --connect c:d");
    let forward = lab.start("forward --port virtio-user,path=b --port virtio-user,path=c --mode macswap");
    let capture = lab.start("capture --port virtio-user,path=d --pcap out.pcap --count 100 --timeout 20");
    lab.until_up(&["c", "d"]);
    lab.run(
        "generate --port virtio-user,path=a --count 100 --rate 10K --dst 02:00:00:00:00:0b --src 02:00:00:00:00:0a",
    );
    let (status, got) = capture.end();
    assert_eq!((status, got["frames"].as_u64()), (Some(0), Some(100)), "{got}");
    let bytes = std::fs::read(lab.path("out.pcap")).unwrap();
    assert_eq!(
        bytes[40..52],
        [2, 0, 0, 0, 0, 0x0a, 2, 0, 0, 0, 0, 0x0b],
        "addresses have changed places"
    );
    forward.signal(libc::SIGINT);
    assert_eq!(forward.end().1["forwarded"], 100);
    drop((left, right));
}

#[test]
fn a_capture_to_the_standard_output() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    let mut command = Command::new(env!("CARGO_BIN_EXE_usernic"));
    let line = "capture --port virtio-user,path=b --pcap - --count 3 --timeout 20";
    command.args(line.split_whitespace()).current_dir(lab.folder());
    let capture = Running(Some(
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(),
    ));
    lab.until_up(&["b"]);
    lab.run("generate --port virtio-user,path=a --count 3");
    let mut capture = capture;
    let output = capture.0.take().unwrap().wait_with_output().unwrap();
    assert_eq!(output.stdout.len(), 24 + 3 * (16 + 64));
    assert_eq!(output.stdout[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
    drop(switch);
}
