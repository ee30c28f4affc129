//! What happens to a port on a virtual function besides frames: its link, resets of its PF, refusals, restarts, counters.

mod vf_machine;

use std::time::{Duration, Instant};

use proptest::prelude::*;
use usernic::filter::Filter;
use usernic::{Burst, Error, Port};
use vf_machine::{LIMIT, Machine, flush, frame, receive, send, until};
use vf_model::message::{Request, Xcast};
use vf_model::{Kind, Settings, Speed};
use virtio_ring::net::RxMode;

#[test]
fn the_link_goes_down_and_up_and_changes_its_speed() {
    let machine = Machine::two();
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    assert_eq!((a.link().speed, a.link().queues), (10_000, 1));
    let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
    machine.device.with(|nic| nic.set_link(None));
    until("the link goes down", || !a.link().up && !b.link().up);
    // Nothing leaves the burst while it is down, and nothing is lost.
    let mut burst = Burst::new(1);
    qa.alloc(&mut burst, 1);
    let sent = frame(b.mac(), a.mac(), 100, 3);
    burst[0].copy_from(&sent).unwrap();
    assert_eq!((qa.tx(&mut burst), burst.len()), (0, 1));
    machine.device.with(|nic| nic.set_link(Some(Speed::G1)));
    assert!(a.wait_link(LIMIT) && b.wait_link(LIMIT));
    assert_eq!(a.link().speed, 1000);
    flush(&mut qa, &mut burst);
    assert_eq!(receive(&mut qb, 1), [sent]);
    // The administrator takes it from one of them.
    machine.device.with(|nic| nic.set_link_enabled(1, false));
    until("one link goes down", || !b.link().up);
    assert!(a.link().up);
    machine.device.with(|nic| nic.set_link_enabled(1, true));
    assert!(b.wait_link(LIMIT));
    drop((qa, qb, a, b));
    machine.finish();
}

#[test]
fn a_link_that_changes_ends_a_wait() {
    let machine = Machine::two();
    let port = machine.port(0, "");
    let mut queue = port.queue(0).unwrap();
    // What came while the port was opened.
    queue.disarm();
    machine.device.with(|nic| nic.set_link(None));
    let start = Instant::now();
    assert!(!queue.wait(Some(LIMIT)).unwrap());
    assert!(start.elapsed() < LIMIT, "woken, not late");
    drop((queue, port));
    machine.finish();
}

/// All packets that a port can have out at once: what it lost for good would be missing.
fn buffers(port: &Port) -> usize {
    let mut queue = port.queue(0).unwrap();
    queue.reclaim();
    let mut held = Vec::new();
    while let Some(packet) = queue.packet() {
        held.push(packet);
    }
    held.len()
}

#[test]
fn a_reset_of_the_pf_is_recovered_from() {
    let machine = Machine::two();
    let (a, b) = (machine.port(0, ",vlan=7"), machine.port(1, ""));
    let before = (buffers(&a), buffers(&b));
    for round in 0..10 {
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        // Frames that were sent and never leave, and frames that came and nobody took.
        machine.freeze(true);
        let mut burst = Burst::new(32);
        qa.alloc(&mut burst, 32);
        for packet in &mut burst {
            packet.copy_from(&frame(b.mac(), a.mac(), 1000, round)).unwrap();
        }
        assert_eq!(qa.tx(&mut burst), 32);
        machine.device.with(vf_model::Nic::begin_reset);
        machine.freeze(false);
        until("the link goes down", || !a.link().up && !b.link().up);
        qb.rx(&mut burst);
        burst.clear();
        qa.alloc(&mut burst, 1);
        burst[0].copy_from(&frame(b.mac(), a.mac(), 100, 0)).unwrap();
        assert_eq!(qa.tx(&mut burst), 0, "nothing is sent meanwhile");
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_millis(30));
        }
        machine.device.with(vf_model::Nic::end_reset);
        assert!(a.wait_link(LIMIT) && b.wait_link(LIMIT), "round {round}");
        burst.clear();
        while qb.rx(&mut burst) > 0 {
            burst.clear();
        }
        let frames: Vec<_> = (0..64).map(|i| frame(b.mac(), a.mac(), 60 + 10 * i, i)).collect();
        send(&mut qa, &frames);
        assert_eq!(receive(&mut qb, 64), frames);
        let agreed = machine.device.with(|nic| nic.policy(0).agreed());
        assert_eq!(agreed.vlans, [0, 7], "asked for again");
        assert_eq!(agreed.max_frame, 1518);
    }
    // A receive ring that is not full again yet holds fewer: there may be more in the pool, and never less.
    let after = (buffers(&a), buffers(&b));
    assert!(
        after.0 >= before.0 && after.1 >= before.1,
        "buffers are lost: {after:?} of {before:?}"
    );
    drop((a, b));
    machine.finish_after_pf_reset();
}

#[test]
fn a_pf_that_forgets_a_function_is_told_of_it_again() {
    let machine = Machine::two();
    let port = machine.port(0, "");
    // The administrator sets an address: the function is to reset, and has it then.
    let mac = [0x02, 0, 0, 0, 0x12, 0x34];
    machine.device.with(|nic| nic.set_mac(0, mac));
    until("it has the address", || port.mac() == mac && port.link().up);
    drop(port);
    machine.finish();
}

#[test]
fn a_pf_that_does_not_answer() {
    let machine = Machine::two();
    machine.device.with(|nic| nic.policy(0).deaf = true);
    let error = machine.try_port(0, "").map(drop).unwrap_err();
    assert!(
        matches!(&error, Error::Vf { .. }) && error.to_string().contains("ip link set PF up"),
        "{error}"
    );
    machine.device.with(|nic| nic.policy(0).deaf = false);
    let port = machine.port(0, "");
    // While the port is open, a call ends, and so does the port.
    machine.device.with(|nic| nic.policy(0).deaf = true);
    assert!(port.set_mtu(1400).is_err());
    assert_eq!(port.mtu(), 1500);
    drop(port);
    machine.finish();
}

#[test]
fn what_is_refused_leaves_nothing_half_done() {
    let machine = Machine::new(Settings {
        kind: Kind::X550,
        vfs: 2,
        hold: true,
        ..Settings::default()
    });
    let policy = |act: &dyn Fn(&mut vf_model::pf::Policy)| machine.device.with(|nic| act(nic.policy(0)));
    // At the opening: the device is closed and unmapped after each.
    policy(&|p| p.mac_is_set = true);
    let error = machine
        .try_port(0, ",mac=02:00:00:00:00:55")
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("leave mac= out"), "{error}");
    policy(&|p| p.mac_is_set = false);
    let requests = [
        Request::SetMaxFrame,
        Request::SetVlan,
        Request::SetMac,
        Request::GetQueues,
    ];
    for (i, request) in requests.into_iter().enumerate() {
        policy(&|p| p.refuse(request, 1));
        let refused = machine
            .try_port(0, &format!(",mac=02:00:00:00:01:0{i},vlan=5"))
            .map(drop);
        assert!(matches!(refused, Err(Error::Vf { .. })), "{request:?}: {refused:?}");
        assert!(machine.device.with(|nic| nic.dma(0).is_empty()), "{request:?}");
    }
    let error = machine.try_port(0, ",queues=4").map(drop).unwrap_err().to_string();
    assert!(error.contains("pass another queues="), "{error}");
    // On an open port what was before stays.
    let port = machine.port(0, "");
    let mac = port.mac();
    policy(&|p| p.refuse(Request::SetMac, 1));
    assert!(port.set_mac([2, 0, 0, 0, 0, 9]).is_err());
    assert_eq!(port.mac(), mac);
    port.set_mac([2, 0, 0, 0, 0, 9]).unwrap();
    assert_eq!(port.mac(), [2, 0, 0, 0, 0, 9]);
    assert_eq!(machine.device.with(|nic| nic.policy(0).mac), [2, 0, 0, 0, 0, 9]);
    assert!(port.announce().is_err() && port.set_queues(1).is_err());
    drop(port);
    machine.finish();
}

#[test]
fn filters_are_asked_of_the_pf_and_refusals_change_nothing() {
    for kind in Kind::ALL {
        let machine = Machine::new(Settings {
            kind,
            vfs: 2,
            hold: true,
            ..Settings::default()
        });
        let (a, b) = (machine.port(0, ""), machine.port(1, ""));
        let agreed = || machine.device.with(|nic| nic.policy(1).agreed());
        let fresh = agreed();
        // Not without trust, which not even a trusted function of an 82599 gets.
        let promiscuous = Filter::new(b.mac());
        let error = b.set_filter(Some(promiscuous.clone())).unwrap_err();
        assert!(matches!(error, Error::Vf { .. }), "{error}");
        assert_eq!(agreed(), fresh);
        let mut groups = Filter::new(b.mac());
        groups.set_mode(RxMode::Promiscuous, false);
        groups.set_mode(RxMode::AllMulticast, true);
        let error = b.set_filter(Some(groups.clone())).unwrap_err().to_string();
        assert!(error.contains("trust on"), "{error}");
        assert_eq!(agreed(), fresh, "granted in part, and taken back");

        machine.device.with(|nic| {
            nic.pf().promiscuous = true;
            nic.set_trusted(1, true);
        });
        until("it came back", || {
            machine.device.with(|nic| nic.policy(1).agreed().clear_to_send) && b.link().up
        });
        let granted = b.set_filter(Some(promiscuous));
        assert_eq!(granted.is_err(), kind == Kind::I82599, "{granted:?}");
        b.set_filter(Some(groups)).unwrap();
        assert_eq!(agreed().xcast, Xcast::AllMulti);
        let mut listed = Filter::new(b.mac());
        listed.set_mode(RxMode::Promiscuous, false);
        listed.set_addresses(&[[2, 0, 0, 0, 0, 0x77]], &[[1, 0, 0x5e, 0, 0, 1]]);
        listed.set_vlan(9, true);
        b.set_filter(Some(listed)).unwrap();
        let now = agreed();
        assert_eq!((now.xcast, now.vlans, now.hashes.len()), (Xcast::Multi, vec![0, 9], 1));
        assert_eq!(now.more_macs, [[2, 0, 0, 0, 0, 0x77]]);
        let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
        let to = |mac| frame(mac, a.mac(), 80, 1);
        // The second shares its hash with the group that is listed, as far as the 82599 looks: software drops it.
        let sent = [
            to([1, 0, 0x5e, 0, 0, 1]),
            to([1, 0, 0x5f, 0, 0, 1]),
            to([2, 0, 0, 0, 0, 0x77]),
            to(b.mac()),
            to([0xff; 6]),
        ];
        send(&mut qa, &sent);
        let got = receive(&mut qb, 4);
        assert_eq!(got, [&sent[0], &sent[2], &sent[3], &sent[4]].map(Clone::clone));
        b.set_filter(None).unwrap();
        assert_eq!((agreed().vlans, agreed().more_macs.len()), (vec![0], 0));
        // The address of a filter that is refused is refused with it.
        let told = || machine.device.with(|nic| nic.policy(1).mac);
        let before = (b.mac(), told());
        let mut other = Filter::new([2, 0, 0, 0, 0, 0x66]);
        other.set_mode(RxMode::Promiscuous, false);
        other.set_addresses(&[[2, 0, 0, 0, 0, 0x77]], &[]);
        machine.device.with(|nic| nic.policy(1).refuse(Request::SetMacVlan, 1));
        b.set_filter(Some(other)).unwrap_err();
        assert_eq!((b.mac(), told()), before);
        drop((qa, qb, a, b));
        machine.finish();
    }
}

#[test]
fn a_thousand_restarts() {
    let machine = Machine::two();
    let b = machine.port(1, "");
    let mut qb = b.queue(0).unwrap();
    for round in 0..1000 {
        let a = machine.port(0, ",queue_size=64,buffers=128");
        let mut qa = a.queue(0).unwrap();
        let sent = [frame(b.mac(), a.mac(), 60 + round, round)];
        send(&mut qa, &sent);
        assert_eq!(receive(&mut qb, 1), sent, "round {round}");
        if round % 2 == 0 {
            // A queue and a packet outlive their port.
            let packet = qa.packet();
            drop(a);
            let mut burst = Burst::new(1);
            assert_eq!((qa.rx(&mut burst), qa.arm()), (0, false));
            drop((qa, packet));
        }
    }
    drop((qb, b));
    machine.finish();
}

#[test]
fn counters_wrap_and_are_read_in_time() {
    let machine = Machine::two();
    let (a, b) = (machine.port(0, ""), machine.port(1, ""));
    let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
    let start = b.device_stats().unwrap();
    machine.device.with(|nic| {
        let counters = nic.counters(1);
        counters.packets_rx = counters.packets_rx.wrapping_add(u32::MAX - 2);
        counters.octets_rx = (counters.octets_rx + (1 << 36) - 100) & ((1 << 36) - 1);
    });
    let middle = b.device_stats().unwrap();
    assert_eq!(middle.rx_packets - start.rx_packets, u64::from(u32::MAX - 2));
    assert_eq!(middle.rx_bytes - start.rx_bytes, (1 << 36) - 100);
    let frames: Vec<_> = (0..10).map(|i| frame(b.mac(), a.mac(), 200, i)).collect();
    send(&mut qa, &frames);
    receive(&mut qb, 10);
    let end = b.device_stats().unwrap();
    assert_eq!(end.rx_packets - middle.rx_packets, 10, "over the wrap");
    assert_eq!(end.rx_bytes - middle.rx_bytes, 2000);
    drop((qa, qb, a, b));
    machine.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: no access outside of what is mapped, no buffer lost, nothing that hangs.
    #[test]
    fn any_order_of_events(events in prop::collection::vec(0..10u8, 1..25), queue_size in 8..20u16) {
        let machine = Machine::two();
        let (a, b) = (machine.port(0, &format!(",queue_size={}", queue_size * 8)), machine.port(1, ""));
        let before = buffers(&a);
        let mut resetting = false;
        for (i, event) in events.iter().enumerate() {
            let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
            let mut burst = Burst::new(32);
            match event {
                0..4 => {
                    qa.alloc(&mut burst, 20);
                    for packet in &mut burst {
                        packet.copy_from(&frame(b.mac(), a.mac(), 60 + 100 * i, i)).unwrap();
                    }
                    qa.tx(&mut burst);
                }
                4 => drop(qb.rx(&mut burst)),
                5 => machine.device.with(|nic| nic.set_link(None)),
                6 => machine.device.with(|nic| nic.set_link(Some(Speed::G10))),
                7 if !resetting => {
                    machine.device.with(vf_model::Nic::begin_reset);
                    resetting = true;
                }
                8 if resetting => {
                    machine.device.with(vf_model::Nic::end_reset);
                    resetting = false;
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        if resetting {
            machine.device.with(vf_model::Nic::end_reset);
        }
        machine.device.with(|nic| nic.set_link(Some(Speed::G10)));
        {
            let (mut qa, mut qb) = (a.queue(0).unwrap(), b.queue(0).unwrap());
            // A function that was not told of the end of a reset yet may have its link a moment still.
            let last = frame(b.mac(), a.mac(), 77, 99);
            let deadline = Instant::now() + LIMIT;
            let mut burst = Burst::new(32);
            let mut came = false;
            while !came {
                prop_assert!(Instant::now() < deadline, "frames pass again");
                if qa.alloc(&mut burst, 1) == 1 {
                    burst[0].copy_from(&last).unwrap();
                    qa.tx(&mut burst);
                }
                burst.clear();
                qb.rx(&mut burst);
                came = burst.drain().any(|packet| packet.into_private() == last);
                std::thread::sleep(Duration::from_micros(200));
            }
            prop_assert!(qa.drain(LIMIT));
        }
        prop_assert_eq!(buffers(&a), before);
        drop((a, b));
        machine.finish_after_pf_reset();
    }
}
