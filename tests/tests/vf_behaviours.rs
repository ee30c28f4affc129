//! The ten behaviours of virtual functions, their mailbox and their registers on which drivers have failed, each through a
//! port: the test fails when the driver does not keep to it.

mod vf_machine;

use std::time::Instant;

use usernic::filter::Filter;
use usernic::{Error, Port};
use vf_machine::{LIMIT, Machine, frame, ipv4, receive, send, until};
use vf_model::complaint::Complaint;
use vf_model::message::Api;
use vf_model::{Halt, Kind, Settings, Speed};

fn machine(kind: Kind, latency: u32) -> Machine {
    Machine::new(Settings {
        kind,
        vfs: 2,
        queues: 4,
        latency,
        hold: true,
    })
}

/// Frames pass from one function to the other.
fn frames_pass(a: &Port, b: &Port) {
    let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
    let frames: Vec<_> = (0..40).map(|i| frame(b.mac(), a.mac(), 60 + i, i)).collect();
    send(&mut qa, &frames);
    assert_eq!(receive(&mut qb, frames.len()), frames);
}

/// 1. PFSTS, PFACK and RSTD clear when VFMAILBOX is read: whichever read sees them must remember.
#[test]
fn one_bits_that_clear_on_read_are_kept() {
    // With much latency the bits come at any read: of the acknowledgement, of the answer, of an unasked message.
    for latency in 0..8 {
        let machine = machine(Kind::X540, latency);
        let (a, b) = (machine.port(0, ""), machine.port(1, ""));
        for round in 0..10 {
            // The PF says something unasked while a request is under way.
            machine
                .device
                .with(|nic| nic.set_link(Some([Speed::G10, Speed::G1][round % 2])));
            a.set_mtu(1400 + round as u16).unwrap();
        }
        assert_eq!(
            machine.device.with(|nic| nic.policy(0).agreed().max_frame),
            1427,
            "latency {latency}"
        );
        frames_pass(&a, &b);
        drop((a, b));
        machine.finish();
    }
}

/// 2. The answer to VF_RESET is a success with an address, or a failure without one: then one is made up and set.
#[test]
fn two_a_function_without_an_address_makes_one_up() {
    let machine = machine(Kind::I82599, 1);
    machine.device.with(|nic| nic.policy(0).mac = [0; 6]);
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    let mac = a.mac();
    assert_eq!(
        (mac[0] & 3, mac == [2, 0, 0, 0, 0, 0]),
        (2, false),
        "locally administered: {mac:x?}"
    );
    assert_eq!(machine.device.with(|nic| nic.policy(0).mac), mac, "and the PF was told");
    let assigned = machine.device.with(|nic| nic.policy(1).mac);
    assert_eq!(b.mac(), assigned, "low byte first, in words 1 and 2");
    frames_pass(&a, &b);
    frames_pass(&b, &a);
    drop((a, b));
    machine.finish();
}

/// 3. After VFCTRL.RST it takes a while until RSTI or RSTD shows: nothing is asked before, and it is not given up early.
#[test]
fn three_the_end_of_a_reset_is_waited_for() {
    let machine = machine(Kind::X540, 1);
    // 10,000 looks of 5 us each are what a driver has for it.
    machine.slow_resets(0, 9_900);
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    frames_pass(&a, &b);
    drop(a);
    machine.slow_resets(0, 20_000);
    let error = machine.try_port(0, "").map(drop).unwrap_err().to_string();
    assert!(error.contains("did not end within its limit"), "{error}");
    drop(b);
    machine.finish();
}

/// 4. SET_LPE at every start: a PF whose MTU is above 1500 keeps the receiver off until then.
#[test]
fn four_the_frame_length_is_told_at_every_start() {
    let machine = machine(Kind::I82599, 1);
    machine.device.with(|nic| nic.pf().mtu = 9000);
    for mtu in [1500, 9000] {
        let keys = format!(",mtu={mtu}");
        let (a, b) = (machine.port(0, &keys), machine.port(1, &keys));
        assert_eq!(machine.device.with(|nic| nic.policy(1).agreed().max_frame), mtu + 18);
        frames_pass(&a, &b);
        machine.device.with(|nic| {
            nic.begin_reset();
            nic.end_reset();
        });
        until("both are back", || {
            machine
                .device
                .with(|nic| (0..2).all(|vf| nic.policy(vf).agreed().max_frame == mtu + 18))
                && a.link().up
                && b.link().up
        });
        assert_eq!(machine.device.with(|nic| nic.drops(1).receive_off), 0);
        frames_pass(&a, &b);
    }
    machine.finish_after_pf_reset();
}

/// 5. CC and a loaded context with every frame: a PF that detects malicious drivers stops the queue otherwise.
#[test]
fn five_every_frame_has_its_context() {
    let machine = machine(Kind::X550, 1);
    machine.device.with(|nic| nic.pf().malicious_detection = true);
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    frames_pass(&a, &b);
    // After frames with contexts of their own, and after a reset, which forgets them.
    let mut qa = a.queue(0).unwrap();
    for i in 0..5usize {
        let mut packet = qa.packet().unwrap();
        packet
            .copy_from(&ipv4(b.mac(), a.mac(), i % 2 == 0, (1, 2), &vec![3; 1000 * (i + 1)]))
            .unwrap();
        if i % 2 == 0 {
            packet.request_segmentation(500 + 100 * i as u16).unwrap();
        } else {
            packet.request_checksum().unwrap();
        }
        let mut burst = usernic::Burst::new(1);
        burst.push(packet).unwrap();
        vf_machine::flush(&mut qa, &mut burst);
        assert!(qa.drain(LIMIT));
    }
    drop(qa);
    // Sent is not yet arrived. Three packets are 2, 5 and 6 segments; the two that are no segments are longer than b takes.
    let mut qb = b.queue(0).unwrap();
    let segments = receive(&mut qb, 13);
    assert!(segments.iter().all(|segment| segment.len() <= 1514));
    drop(qb);
    frames_pass(&a, &b);
    machine.device.with(|nic| {
        assert_eq!(nic.complaints(0).count(Complaint::NoContext), 0);
        assert!(!nic.halts(0).contains(&Halt::Malicious));
    });
    drop((a, b));
    machine.finish();
}

/// 6. Counters cannot be cleared and wrap, at 32 and 36 bits, also while the function is reset.
#[test]
fn six_counters_wrap() {
    let machine = machine(Kind::X540, 1);
    machine.device.with(|nic| {
        let counters = nic.counters(1);
        (counters.packets_rx, counters.octets_rx) = (u32::MAX - 10, (1 << 36) - 1000);
        (counters.packets_tx, counters.multicast_rx) = (u32::MAX, u32::MAX);
    });
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    assert_eq!(
        b.device_stats().unwrap(),
        usernic::DeviceStats::default(),
        "what was before is not counted"
    );
    frames_pass(&a, &b);
    let stats = b.device_stats().unwrap();
    assert_eq!(stats.rx_packets, 40);
    assert_eq!(stats.rx_bytes, (60..100).sum::<u64>());
    drop((a, b));
    machine.finish();
}

/// 7. Key and table are the function's own on an X550 and the PF's before; queues are a power of two.
#[test]
fn seven_rss_is_set_by_chip() {
    for kind in Kind::ALL {
        let machine = machine(kind, 1);
        // The PF's own spread sends all to queue 2: what a function may not change it must live with.
        machine.device.with(|nic| nic.pf().rss.table = [2; 128]);
        let (a, b) = (machine.port(0, ""), machine.port(1, ",queues=4"));
        let mut qa = a.queue(0).unwrap();
        let frames: Vec<_> = (0..64u16)
            .map(|i| ipv4(b.mac(), a.mac(), true, (i, 9), &[1; 40]))
            .collect();
        send(&mut qa, &frames);
        until("all come", || {
            machine.device.with(|nic| nic.counters(1).packets_rx) == 64
        });
        let counts = [0, 1, 2, 3].map(|index| {
            let mut burst = usernic::Burst::new(64);
            while b.queue(index).unwrap().rx(&mut burst) > 0 {}
            burst.len()
        });
        if kind.has_own_rss() {
            assert!(counts.iter().all(|count| *count > 4), "{counts:?}");
        } else {
            assert_eq!(counts, [0, 0, 64, 0]);
        }
        drop((qa, a, b));
        machine
            .device
            .with(|nic| assert_eq!(nic.complaints(1).count(Complaint::AbsentRegister), 0));
        machine.finish();
    }
    let spec = "vf,queues=3".parse::<usernic::spec::PortSpec>();
    assert!(spec.unwrap_err().to_string().contains("1, 2, 4 or 8"));
}

/// 8. Rings of 64 to 8192 descriptors, a multiple of 8; buffers of whole KiB.
#[test]
fn eight_rings_have_their_limits() {
    let machine = machine(Kind::I82599, 1);
    let b = machine.port(1, "");
    for size in [64, 72, 1000, 8192] {
        let a = machine.port(0, &format!(",queue_size={size},buffer_size=1024"));
        frames_pass(&a, &b);
        frames_pass(&b, &a);
    }
    for keys in ["queue_size=56", "queue_size=8200", "queue_size=100", "buffer_size=2000"] {
        let spec = format!("vf,{keys}").parse::<usernic::spec::PortSpec>();
        assert!(spec.is_err(), "{keys}");
    }
    // A spec that was made by hand is looked at as well.
    let spec = usernic::spec::PortSpec {
        queue_size: 56,
        ..usernic::spec::PortSpec::vf("0000:00:05.0".parse().unwrap())
    };
    let mut memory = usernic::memory::Automatic::from_spec(&spec);
    let opened = Port::open_vf(spec, machine.hardware(0), &mut memory).map(drop);
    assert!(matches!(opened, Err(Error::Spec(_))), "{opened:?}");
    drop(b);
    machine.finish();
}

/// 9. Promiscuous mode: never on an 82599; elsewhere with API 1.3, trust and a promiscuous PF.
#[test]
fn nine_promiscuous_mode_is_refused_with_its_reason() {
    for (kind, api, trusted, promiscuous) in [
        (Kind::I82599, Api::V13, true, true),
        (Kind::X550, Api::V12, true, true),
        (Kind::X550, Api::V13, false, true),
        (Kind::X550, Api::V13, true, false),
        (Kind::X550, Api::V13, true, true),
    ] {
        let machine = machine(kind, 1);
        machine.device.with(|nic| {
            nic.pf().newest_api = api;
            nic.pf().promiscuous = promiscuous;
            nic.policy(0).trusted = trusted;
        });
        let port = machine.port(0, "");
        let result = port.set_filter(Some(Filter::new(port.mac())));
        let may = kind != Kind::I82599 && api == Api::V13 && trusted && promiscuous;
        match result {
            Ok(()) => assert!(may, "{kind} {api:?} {trusted} {promiscuous}"),
            Err(error) => {
                assert!(!may, "{error}");
                let reason = match (kind, api, trusted, promiscuous) {
                    (Kind::I82599, ..) => "82599 PF lets no VF be promiscuous",
                    (_, Api::V12, ..) => "mailbox API 1.3 is needed",
                    _ => "trust on",
                };
                assert!(error.to_string().contains(reason), "{error}");
            }
        }
        drop(port);
        machine.finish();
    }
}

/// 10. A PF that resets says so with message 0x100: nothing moves until the function is reset, and nothing waits for ever.
#[test]
fn ten_a_reset_of_the_pf_ends_every_wait() {
    let machine = machine(Kind::X540, 1);
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    frames_pass(&a, &b);
    machine.device.with(vf_model::Nic::begin_reset);
    let start = Instant::now();
    until("the link goes down", || !a.link().up && !b.link().up);
    let (mut qa, mut burst) = (a.queue(0).unwrap(), usernic::Burst::new(1));
    qa.alloc(&mut burst, 1);
    burst[0].copy_from(&frame(b.mac(), a.mac(), 60, 0)).unwrap();
    assert_eq!(qa.tx(&mut burst), 0);
    assert!(
        qa.drain(LIMIT),
        "who drains does not wait for a device that does not run"
    );
    assert!(a.set_mtu(1400).is_err(), "nor who asks for something");
    assert!(start.elapsed() < LIMIT);
    machine.device.with(vf_model::Nic::end_reset);
    assert!(a.wait_link(LIMIT) && b.wait_link(LIMIT));
    drop((qa, burst));
    frames_pass(&a, &b);
    drop((a, b));
    machine.finish_after_pf_reset();
}
