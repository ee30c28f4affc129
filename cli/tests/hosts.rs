//! Who answers, and who is believed: `usernic ping` and `usernic forward --mode icmpecho`; and ports of several queues.

mod lab;

use std::time::{Duration, Instant};

use lab::{Lab, ethernet};
use usernic::{Burst, Port, Queue};

const ASKER: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A port of this process on the socket at `name`, with all its queues.
fn front(lab: &Lab, name: &str, queues: u16) -> (Port, Vec<Queue>) {
    let spec = format!(
        "virtio-user,path={},queues={queues},memory=memfd",
        lab.path(name).display()
    );
    let port = Port::open(&spec).unwrap();
    let queues = (0..queues).map(|index| port.queue(index).unwrap()).collect();
    (port, queues)
}

fn send(queue: &mut Queue, frame: &[u8]) {
    let mut burst = Burst::new(1);
    let mut packet = queue.packet().unwrap();
    packet.copy_from(frame).unwrap();
    assert!(burst.push(packet).is_ok());
    let begin = Instant::now();
    while !burst.is_empty() {
        queue.tx(&mut burst);
        assert!(begin.elapsed() < Duration::from_secs(10), "the frame is not taken");
    }
}

/// The frames that come on any queue within `limit`, or until there are `count`.
fn receive(queues: &mut [Queue], count: usize, limit: Duration) -> Vec<Vec<u8>> {
    let (mut frames, begin) = (Vec::new(), Instant::now());
    while frames.len() < count && begin.elapsed() < limit {
        for queue in &mut *queues {
            let mut burst = Burst::new(32);
            queue.rx(&mut burst);
            for packet in burst.iter() {
                let mut frame = vec![0; packet.len()];
                packet.copy_to(&mut frame);
                frames.push(frame);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    frames
}

fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &ASKER, &[192, 0, 2, 1], &[0; 6], &target].concat();
    ethernet([0xff; 6], ASKER, 0x0806, &body)
}

#[test]
fn every_queue_of_a_port_is_read() {
    let lab = Lab::new();
    let _switch = lab.switch(
        "--port vhost,path=a,queues=3 --port vhost,path=b,queues=3 --port vhost,path=c,queues=3 --port vhost,path=d,queues=3 \
         --port vhost,path=e,queues=3 --port vhost,path=f,queues=3 --connect a:b --connect c:d --connect e:f",
    );
    let capture = lab.start("capture --port virtio-user,path=b,queues=3 --pcap out.pcap --count 9 --timeout 40");
    let host = lab.start("forward --port virtio-user,path=d,queues=3 --mode icmpecho");
    let back = lab.start("forward --port virtio-user,path=f,queues=3 --mode macswap");
    lab.until_up(&["b", "d", "f"]);
    let (_a, mut to_capture) = front(&lab, "a", 3);
    let (_c, mut to_host) = front(&lab, "c", 3);
    let (_e, mut to_back) = front(&lab, "e", 3);
    lab.until_up(&["a", "c", "e"]);
    for index in 0..3 {
        for _ in 0..3 {
            send(&mut to_capture[index], &[2; 60]);
        }
        send(&mut to_host[index], &arp_request([192, 0, 2, 2]));
        let answer = receive(&mut to_host, 1, Duration::from_secs(10));
        assert_eq!(answer.len(), 1, "no answer to a question on queue {index}");
        send(&mut to_back[index], &[4; 60]);
        assert_eq!(
            receive(&mut to_back, 1, Duration::from_secs(10)).len(),
            1,
            "nothing came back from queue {index}"
        );
    }
    let (status, totals) = capture.end();
    assert_eq!((status, totals["frames"].as_u64()), (Some(0), Some(9)), "{totals}");
    for running in [host, back] {
        running.signal(libc::SIGINT);
        assert_eq!(running.end().1["forwarded"], 3);
    }
}

#[test]
fn a_capture_of_one_queue_drops_the_others_frames() {
    let lab = Lab::new();
    let _switch = lab.switch("--port vhost,path=a,queues=2 --port vhost,path=b,queues=2 --connect a:b");
    let capture =
        lab.start("capture --port virtio-user,path=b,queues=2 --queue 1 --pcap out.pcap --count 1 --timeout 40");
    lab.until_up(&["b"]);
    // More than the ring of queue 0 holds: it would stall if nobody read it.
    lab.run("generate --port virtio-user,path=a,queues=2 --count 2000");
    let (_a, mut queues) = front(&lab, "a", 2);
    send(&mut queues[1], &[7; 61]);
    assert_eq!(capture.end().1["frames"], 1);
    let bytes = std::fs::read(lab.path("out.pcap")).unwrap();
    assert_eq!(lab::records(&bytes)[0].1, [7; 61]);
}

#[test]
fn two_listening_ports_are_open_at_once() {
    let lab = Lab::new();
    let forward = lab.start("forward --port vhost,path=a --port vhost,path=b --wait 30");
    lab.until("both sockets are there", || {
        lab.path("a").exists() && lab.path("b").exists()
    });
    // The second first.
    let (_b, mut b) = front(&lab, "b", 1);
    let (_a, mut a) = front(&lab, "a", 1);
    let begin = Instant::now();
    let mut came = Vec::new();
    // Until it forwards: both links are up for it.
    while came.is_empty() {
        send(&mut a[0], &[5; 60]);
        came = receive(&mut b, 1, Duration::from_millis(200));
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    assert_eq!(came[0], [5; 60]);
    forward.signal(libc::SIGINT);
    assert_eq!(forward.end().0, Some(0));
}

#[test]
fn the_first_connect_is_waited_for() {
    let lab = Lab::new();
    let generate = lab.start("generate --port virtio-user,path=a --wait 60 --count 10");
    let capture = lab.start("capture --port virtio-user,path=b --pcap out.pcap --count 10 --wait 60 --timeout 60");
    let begin = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    let _switch = lab.switch("--listen a,b --connect a:b");
    assert_eq!(generate.end().1["frames"], 10);
    assert_eq!(capture.end().1["frames"], 10);
    assert!(begin.elapsed() < Duration::from_secs(30));
    // And not longer than it was said.
    let output = lab
        .command("generate --port virtio-user,path=none --wait 0.2")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        lab::json(&output)["error"]
            .as_str()
            .unwrap()
            .contains("no socket at none")
    );
}

#[test]
fn a_signal_ends_a_program_that_waits_for_its_port() {
    for socket in ["none", "silent"] {
        let lab = Lab::new();
        // Listens, and says nothing.
        let _silent = std::os::unix::net::UnixListener::bind(lab.path("silent")).unwrap();
        let program = lab.start(&format!(
            "generate --port virtio-user,path={socket},timeout=60000 --wait 60"
        ));
        // Whenever it comes; the handlers are there before the port is.
        std::thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        program.signal(libc::SIGINT);
        let (status, value) = program.end();
        assert_eq!(status, Some(1));
        assert!(value["error"].as_str().unwrap().contains("signal"), "{value}");
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "{socket}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn a_generator_is_on_time() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a --reflect a");
    let made = lab.run("generate --port virtio-user,path=a --seconds 0");
    assert_eq!(
        (made["frames"].as_u64(), made["ended"].as_str()),
        (Some(0), Some("time")),
        "{made}"
    );
    let made = lab.run("generate --port virtio-user,path=a --rate 1 --seconds 2");
    assert_eq!(made["frames"], 2, "at 0 and 1 s");
    let seconds = made["seconds"].as_f64().unwrap();
    assert!((2.0..2.7).contains(&seconds), "{seconds}");
    assert_eq!(
        lab.run("generate --port virtio-user,path=a --count 1k --rate 100K")["frames"],
        1000
    );
}

#[test]
fn a_ping_outlives_its_switch() {
    let lab = Lab::new();
    let switch = lab.switch("--listen a,b --connect a:b");
    let _host = lab.start("forward --port virtio-user,path=b --mode icmpecho --control host");
    lab.until_up(&["b"]);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_usernic"));
    let line = "ping --port virtio-user,path=a --from 192.0.2.1 --to 192.0.2.2 -i 0.05 --timeout 0.2";
    command.args(line.split_whitespace()).current_dir(lab.folder());
    let out = std::fs::File::create(lab.path("out")).unwrap();
    let err = std::fs::File::create(lab.path("err")).unwrap();
    let ping = lab::Running(Some(command.stdout(out).stderr(err).spawn().unwrap()));
    let said = |text: &str| std::fs::read_to_string(lab.path("out")).unwrap().matches(text).count();
    lab.until("answers", || said("bytes from") > 2);
    drop(switch);
    lab.until("losses", || said("no answer") > 2);
    for socket in ["a", "b", "ctl"] {
        let _ = std::fs::remove_file(lab.path(socket));
    }
    let _switch = lab.switch("--listen a,b --connect a:b");
    let before = said("bytes from");
    lab.until("answers again", || said("bytes from") > before + 2);
    ping.signal(libc::SIGINT);
    let mut ping = ping;
    assert!(ping.0.take().unwrap().wait().unwrap().success());
    let totals = std::fs::read_to_string(lab.path("err")).unwrap();
    assert!(totals.contains("echoes,") && totals.contains("port 0:"), "{totals}");
}

#[test]
fn questions_from_nobody_are_not_answered_and_tags_are_kept() {
    let lab = Lab::new();
    let _switch = lab.switch("--listen a,b --connect a:b");
    let host = lab.start("forward --port virtio-user,path=b --mode icmpecho --ip 192.0.2.2");
    lab.until_up(&["b"]);
    let (_port, mut queues) = front(&lab, "a", 1);
    let mut from_group = arp_request([192, 0, 2, 2]);
    from_group[28..32].copy_from_slice(&[224, 0, 0, 1]);
    send(&mut queues[0], &from_group);
    send(&mut queues[0], &arp_request([192, 0, 2, 3]));
    let plain = arp_request([192, 0, 2, 2]);
    let tagged = [&plain[..12], &[0x81, 0, 0xe0, 9], &plain[12..]].concat();
    send(&mut queues[0], &tagged);
    let answers = receive(&mut queues, 1, Duration::from_secs(10));
    assert_eq!(
        answers[0][12..18],
        [0x81, 0, 0xe0, 9, 0x08, 0x06],
        "the first answer has the tag"
    );
    assert_eq!(answers[0][..6], ASKER);
    host.signal(libc::SIGINT);
    let totals = host.end().1;
    assert_eq!(
        (totals["forwarded"].as_u64(), totals["dropped"].as_u64()),
        (Some(1), Some(2)),
        "{totals}"
    );
}
