//! `usernic replay` and `usernic capture`: timing, pipes, formats, and records that are no frames.

mod lab;

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use lab::{Lab, Running, pcap, records};

const FRAME: [u8; 60] = [2; 60];

/// A switch that joins a and b, and a capture on b that ends after `count` frames.
fn rig(lab: &Lab, count: usize) -> (Running, Running) {
    let switch = lab.switch("--listen a,b --connect a:b");
    let line = format!("capture --port virtio-user,path=b --pcap out.pcap --count {count} --timeout 40");
    let capture = lab.start(&line);
    lab.until_up(&["b"]);
    lab.until("the capture has begun", || lab.path("out.pcap").exists());
    (switch, capture)
}

fn captured(lab: &Lab, capture: Running) -> Vec<(Duration, Vec<u8>)> {
    assert_eq!(capture.end().0, Some(0));
    records(&std::fs::read(lab.path("out.pcap")).unwrap())
}

#[test]
fn every_round_has_the_gaps_of_the_capture() {
    let lab = Lab::new();
    let frames: Vec<_> = [0, 300_000, 600_000].iter().map(|at| (*at, &FRAME[..])).collect();
    std::fs::write(lab.path("t.pcap"), pcap(frames)).unwrap();
    let (_switch, capture) = rig(&lab, 9);
    lab.run("replay --port virtio-user,path=a --pcap t.pcap --timing original --loop 3");
    let records = captured(&lab, capture);
    for (n, (at, _)) in records.iter().enumerate() {
        let since = at.saturating_sub(records[0].0).as_secs_f64();
        // Late on a busy machine, but not at once, and not later for being in a later round.
        let due = 0.3 * n as f64;
        assert!(
            since > due - 0.15 && since < due + 2.0,
            "frame {n} after {since} s, due after {due}"
        );
    }
}

#[test]
fn a_pipe_is_read_as_it_comes() {
    let lab = Lab::new();
    let (_switch, capture) = rig(&lab, 4);
    let mut command = lab.command("replay --port virtio-user,path=a --pcap -");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let replay = Running(Some(child));
    let bytes = pcap((0..4).map(|_| (0, &FRAME[..])));
    // One record and a half: the first is sent though the second has not come.
    pipe.write_all(&bytes[..24 + 76 + 30]).unwrap();
    lab.until("the first frame has come through", || {
        std::fs::metadata(lab.path("out.pcap")).is_ok_and(|meta| meta.len() == 24 + 76)
    });
    pipe.write_all(&bytes[24 + 76 + 30..]).unwrap();
    drop(pipe);
    let (status, totals) = replay.end();
    assert_eq!((status, totals["frames"].as_u64()), (Some(0), Some(4)), "{totals}");
    assert_eq!(captured(&lab, capture).len(), 4);
}

#[test]
fn a_signal_ends_the_wait_for_a_pipe() {
    let lab = Lab::new();
    let (_switch, _capture) = rig(&lab, 4);
    let mut command = lab.command("replay --port virtio-user,path=a --pcap -");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let replay = Running(Some(child));
    pipe.write_all(&pcap([(0, &FRAME[..])])).unwrap();
    lab.until("the frame has come through", || {
        std::fs::metadata(lab.path("out.pcap")).is_ok_and(|meta| meta.len() == 24 + 76)
    });
    replay.signal(libc::SIGINT);
    let (status, totals) = replay.end();
    assert_eq!((status, totals["ended"].as_str()), (Some(0), Some("signal")));
    assert_eq!(totals["frames"], 1);
    drop(pipe);
}

/// open(2) of a FIFO that nobody has at its other end goes on sleeping after a signal.
#[test]
fn a_signal_ends_the_wait_for_the_other_end_of_a_fifo() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a");
    let fifo = lab.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for program in ["replay", "capture"] {
        let mut running = lab.start(&format!("{program} --port virtio-user,path=a --pcap fifo"));
        lab.until_up(&["a"]);
        running.signal(libc::SIGTERM);
        let child = running.0.as_mut().unwrap();
        lab.until(&format!("{program} has ended"), || child.try_wait().unwrap().is_some());
        lab.until("the port is free", || {
            lab.run("stats --control ctl")["ports"][0]["link_up"] == false
        });
    }
}

#[test]
fn a_pipe_is_not_sent_twice() {
    let lab = Lab::new();
    let mut command = lab.command("replay --port virtio-user,path=a --pcap - --loop 2");
    let (reader, _writer) = std::io::pipe().unwrap();
    let output = command.stdin(reader).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(lab::json(&output)["error"].as_str().unwrap().contains("--loop"));
    // A file is, by the name of the standard input, too.
    std::fs::write(lab.path("t.pcap"), pcap([(0, &FRAME[..])])).unwrap();
    let (_switch, capture) = rig(&lab, 3);
    let mut command = lab.command("replay --port virtio-user,path=a --pcap - --loop 3");
    let file = std::fs::File::open(lab.path("t.pcap")).unwrap();
    let output = command.stdin(file).output().unwrap();
    assert_eq!(lab::json(&output)["frames"], 3);
    assert_eq!(captured(&lab, capture).len(), 3);
}

/// Of 64 MB, with 8 MB of data to be had (the port's own memory is no data, but mapped).
#[test]
fn a_file_is_not_read_into_memory() {
    let lab = Lab::new();
    let frame = [2; 1514];
    std::fs::write(lab.path("big.pcap"), pcap((0..44_000).map(|n| (n, &frame[..])))).unwrap();
    let _switch = lab.switch("--listen a --reflect a");
    let mut child = lab.command("replay --port virtio-user,path=a,memory=memfd --pcap big.pcap --rate 20K");
    let child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let replay = Running(Some(child));
    let mut anonymous = 0;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        anonymous = anonymous.max(kib.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(10));
    }
    replay.signal(libc::SIGINT);
    let totals = replay.end().1;
    assert!(totals["frames"].as_u64() > Some(0), "{totals}");
    assert!(anonymous > 0 && anonymous < 16 << 10, "{anonymous} KiB");
}

#[test]
fn records_that_are_no_frames_are_left_out_and_told() {
    let lab = Lab::new();
    let mut bytes = pcap([(0, &FRAME[..]), (1, &[1; 7]), (2, &[]), (3, &FRAME), (4, &FRAME)]);
    bytes.truncate(bytes.len() - 3);
    std::fs::write(lab.path("odd.pcap"), bytes).unwrap();
    let (_switch, capture) = rig(&lab, 4);
    let sent = lab.run("replay --port virtio-user,path=a --pcap odd.pcap --loop 2");
    assert_eq!(
        (sent["frames"].as_u64(), sent["left_out"].as_u64()),
        (Some(4), Some(3)),
        "{sent}"
    );
    assert!(sent["first"].as_str().unwrap().contains("frame 2"), "{sent}");
    assert_eq!(captured(&lab, capture).len(), 4);
    let strict = lab
        .command("replay --port virtio-user,path=a --pcap odd.pcap --strict")
        .output()
        .unwrap();
    assert_eq!(strict.status.code(), Some(1));
    assert!(lab::json(&strict)["error"].as_str().unwrap().contains("frame 2"));
}

#[test]
fn frames_that_do_not_fit_are_missed_unless_they_may_be() {
    let lab = Lab::new();
    std::fs::write(
        lab.path("t.pcap"),
        pcap([(0, &FRAME[..]), (1, &[3; 20_000]), (2, &FRAME)]),
    )
    .unwrap();
    let (_switch, capture) = rig(&lab, 4);
    let line = "replay --port virtio-user,path=a --pcap t.pcap";
    let output = lab.command(line).output().unwrap();
    let totals = lab::json(&output);
    assert_eq!(output.status.code(), Some(1), "{totals}");
    assert_eq!(
        (totals["frames"].as_u64(), totals["too_long"].as_u64()),
        (Some(2), Some(1)),
        "{totals}"
    );
    let error = totals["error"].as_str().unwrap();
    assert!(
        error.contains("20000 bytes") && !error.contains("larger mtu="),
        "{error}"
    );
    assert_eq!(lab.run(&format!("{line} --skip"))["too_long"], 1);
    assert_eq!(captured(&lab, capture).len(), 4);
}

#[test]
fn pcapng_goes_in_and_comes_out() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    for (file, arguments) in [("one.pcapng", ""), ("two.bin", "--format pcapng")] {
        let line = format!("capture --port virtio-user,path=b --pcap {file} {arguments} --count 3 --timeout 40");
        let capture = lab.start(&line);
        lab.until("the capture has begun", || lab.path(file).exists());
        let input = if file == "one.pcapng" {
            std::fs::write(lab.path("in.pcap"), pcap((0..3).map(|n| (n, &FRAME[..])))).unwrap();
            "in.pcap"
        } else {
            "one.pcapng"
        };
        let sent = lab.run(&format!("replay --port virtio-user,path=a --strict --pcap {input}"));
        assert_eq!(sent["frames"], 3);
        assert_eq!(capture.end().0, Some(0));
        let bytes = std::fs::read(lab.path(file)).unwrap();
        assert_eq!(bytes[..4], [0x0a, 0x0d, 0x0d, 0x0a], "{file}");
        assert_eq!(bytes.len(), 60 + 3 * (32 + 60), "{file}");
    }
    drop(switch);
}

#[test]
fn frames_with_two_tags_are_as_long_as_their_payload_allows() {
    let lab = Lab::new();
    let mut frame = vec![2; 1522];
    frame[12..20].copy_from_slice(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5]);
    std::fs::write(lab.path("t.pcap"), pcap([(0, &frame[..])])).unwrap();
    let (_switch, capture) = rig(&lab, 1);
    lab.run("replay --port virtio-user,path=a --pcap t.pcap");
    assert_eq!(captured(&lab, capture)[0].1, frame);
}
