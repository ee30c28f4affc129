//! What the VF and its PF say to each other, word by word.

mod common;

use common::*;
use ixgbevf::{Api, Error, Event, Link, Model, Reason, Request, XcastMode, local_mac};

/// What befalls the PF.
type Cause = fn(&Double);

fn words<const N: usize>(message: &[u32; 16]) -> [u32; N] {
    message[..N].try_into().unwrap()
}

#[test]
fn a_reset_says_who_i_am_which_version_and_how_many_queues() {
    let double = Double::well_behaved();
    let (mut vf, _) = fresh(&double, Model::I82599);
    assert!(!vf.is_known());
    vf.reset().unwrap();
    let messages = double.messages();
    assert_eq!(messages.len(), 3);
    assert_eq!(messages[0][0], 1);
    assert_eq!(words(&messages[1]), [8, 4, 0]);
    assert_eq!(words(&messages[2]), [9, 0, 0, 0, 0]);
    assert_eq!((vf.mac(), vf.is_mac_assigned(), vf.api()), (MAC, true, Api::V1_3));
    let limits = vf.limits();
    assert_eq!((limits.tx, limits.rx, limits.default_queue), (4, 4, 1));
    assert!(vf.is_known());
}

/// Behaviour 1. The double clears PFSTS, PFACK and RSTD when they are read, as the device does.
#[test]
fn bits_that_clear_when_read_are_not_lost() {
    let (mut vf, double) = known(Model::X550);
    // The answer is there together with the acknowledgement: one read shows both.
    vf.set_vlan(7, true).unwrap();
    // A ping is there when a dump reads the register.
    double.say(0x2000_0100);
    vf.dump(|_, _, _| ());
    assert_eq!(vf.service(), Ok(Event::Ping));
    // And a reset of the PF, seen by the dump only.
    double.latch(0x80);
    vf.dump(|_, _, _| ());
    assert_eq!(vf.service(), Ok(Event::PfReset));
}

/// Behaviour 2.
#[test]
fn an_address_is_made_up_when_none_is_assigned() {
    for reply in [
        vec![0x4000_0001, 0, 0, 2],
        vec![0x8000_0001, 0, 0, 2],
        vec![0x8000_0001, 0x0000_00ff, 0, 2],
    ] {
        let double = Double::new(Box::new(move |message| {
            Some(if message[0] == 1 {
                reply.clone()
            } else {
                answer(message, &[4])
            })
        }));
        let (mut vf, _) = fresh(&double, Model::X540);
        vf.reset().unwrap();
        let mac = vf.mac();
        assert_eq!((mac, vf.is_mac_assigned()), (local_mac(1), false));
        assert_eq!(mac[0] & 3, 2, "local and unicast");
        // The PF is told.
        let told = *double.messages().last().unwrap();
        let low = u32::from_le_bytes(mac[..4].try_into().unwrap());
        assert_eq!(words(&told), [2, low, u32::from(mac[4]) | u32::from(mac[5]) << 8]);
    }
}

/// Behaviour 2: word 0 exactly, and word 3.
#[test]
fn the_answer_to_a_reset_is_taken_literally() {
    for word in [
        0xa000_0001,
        0x6000_0001,
        0xc000_0001,
        0x0000_0001,
        0x8000_0002,
        0x8001_0001,
    ] {
        let double = Double::new(Box::new(move |message| {
            Some(if message[0] == 1 {
                vec![word, 0, 0, 0]
            } else {
                answer(message, &[4])
            })
        }));
        let (mut vf, _) = fresh(&double, Model::X540);
        let request = Request::Reset;
        assert_eq!(vf.reset(), Err(Error::BadReply { request, word }));
        assert!(!vf.is_known());
    }
    for (kind, hash, wrong) in [
        (0, 0xcda, 0),
        (1, 0x9b5, 0),
        (2, 0x36a, 0),
        (3, 0xdab, 0),
        (9, 0xcda, 1),
    ] {
        let double = Double::new(Box::new(move |message| {
            let mut reply = answer(message, &[4]);
            if message[0] == 1 {
                reply[3] = kind;
            }
            Some(reply)
        }));
        let (mut vf, _) = fresh(&double, Model::X540);
        vf.reset().unwrap();
        assert_eq!(vf.mac(), MAC);
        vf.set_multicast(&[[0x01, 0x00, 0x5e, 0x01, 0xab, 0xcd]]).unwrap();
        assert_eq!(double.messages().last().unwrap()[1], hash);
        assert_eq!(vf.anomalies().answer, wrong);
    }
}

/// Behaviour 3.
#[test]
fn a_reset_is_waited_for_10000_times_5_us() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::X550);
    double.slow_reset(9_999);
    vf.reset().unwrap();
    assert!(time.0.get() >= 50_000 + 9_998 * 5);

    let (mut vf, time) = fresh(&double, Model::X550);
    double.never_reset(true);
    let before = double.mailbox_reads();
    assert_eq!(vf.reset(), Err(Error::ResetTimeout));
    assert_eq!(double.mailbox_reads() - before, 10_000);
    assert!(time.0.get() < 200_000, "{} us", time.0.get());
    // RSTI will do as well.
    double.level(0x40);
    vf.reset().unwrap();
}

#[test]
fn versions_from_the_newest_down_and_never_2_0() {
    for (accepted, api, asked) in [
        (&[0, 2, 3, 4][..], Api::V1_3, &[4][..]),
        (&[0, 2, 3], Api::V1_2, &[4, 3]),
        (&[0, 2], Api::V1_1, &[4, 3, 2]),
        (&[0], Api::V1_0, &[4, 3, 2, 0]),
        (&[], Api::V1_0, &[4, 3, 2, 0]),
    ] {
        let double = Double::new(negotiator(accepted));
        let (mut vf, _) = fresh(&double, Model::I82599);
        vf.reset().unwrap();
        assert_eq!(vf.api(), api);
        let messages = double.messages();
        let tried: Vec<_> = messages.iter().filter(|m| m[0] == 8).map(|m| m[1]).collect();
        assert_eq!(tried, asked);
        // GET_QUEUES is of 1.1; without it there is one of each.
        let queues = messages.iter().any(|m| m[0] == 9);
        assert_eq!(queues, api >= Api::V1_1);
        assert_eq!(vf.limits().rx, if queues { 4 } else { 1 });
        let late = Error::Unsupported(Reason::Api {
            needed: Api::V1_2,
            negotiated: api,
        });
        if api < Api::V1_2 {
            assert_eq!(vf.set_mode(XcastMode::AllMulticast), Err(late));
            assert_eq!(vf.is_link_enabled(), Err(late));
            assert_eq!(vf.pf_rss_key(), Err(late));
        }
    }
}

#[test]
fn queues_that_cannot_be_count_as_one() {
    let double = Double::new(Box::new(|message| {
        let mut reply = answer(message, &[4]);
        if message[0] == 9 {
            reply[1..5].copy_from_slice(&[0, 9, 2, 77]);
        }
        Some(reply)
    }));
    let (mut vf, _) = fresh(&double, Model::X550);
    vf.reset().unwrap();
    let limits = vf.limits();
    assert_eq!(
        (limits.tx, limits.rx, limits.default_queue, limits.vlan_or_classes),
        (1, 1, 0, 2)
    );
    assert_eq!(vf.anomalies().answer, 2);
}

#[test]
fn every_request_word_by_word() {
    let (mut vf, double) = known(Model::X550);
    let last = || *double.messages().last().unwrap();

    vf.set_mac([0x02, 0x11, 0x22, 0x33, 0x44, 0x55]).unwrap();
    assert_eq!(words(&last()), [2, 0x3322_1102, 0x5544]);
    assert_eq!(vf.mac(), [0x02, 0x11, 0x22, 0x33, 0x44, 0x55]);

    let multicast = |n: u8| [0x33, 0x33, 0, 0, n, 0];
    vf.set_multicast(&[multicast(0x10), multicast(0x20), multicast(0x30)])
        .unwrap();
    assert_eq!(words(&last()), [0x0003_0003, 0x0002_0001, 0x0000_0003, 0]);
    vf.set_multicast(&[]).unwrap();
    assert_eq!(words(&last()), [3, 0]);

    vf.set_vlan(100, true).unwrap();
    assert_eq!(words(&last()), [0x0001_0004, 100]);
    vf.set_vlan(100, false).unwrap();
    assert_eq!(words(&last()), [4, 100]);

    vf.set_max_frame(9728).unwrap();
    assert_eq!(words(&last()), [5, 9728]);
    vf.set_mtu(1500).unwrap();
    assert_eq!(words(&last()), [5, 1518]);

    vf.set_mode(XcastMode::Promiscuous).unwrap();
    assert_eq!(words(&last()), [12, 3]);
    assert_eq!(vf.is_link_enabled(), Ok(true));
    assert_eq!(words(&last()), [16, 0]);

    vf.set_unicast(&[[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]]).unwrap();
    let list: Vec<[u32; 3]> = double.messages().iter().map(words).collect();
    assert_eq!(list, [[6, 0, 0], [0x0001_0006, 2, 0x0100], [0x0002_0006, 2, 0x0200]]);
}

#[test]
fn the_pfs_key_and_table() {
    let (mut vf, double) = known(Model::I82599);
    double.set_script(Box::new(|message| {
        let mut reply = vec![message[0] | ACK | CTS];
        match message[0] {
            0x0a => reply.extend((0..8).map(|i| 0x1b1b_1b1b << (i % 2))),
            _ => reply.extend((0..10u32).map(|i| u32::from_le_bytes([4 * i as u8; 4]) + 0x0302_0100)),
        }
        Some(reply)
    }));
    let key = vf.pf_rss_key().unwrap();
    assert_eq!(key, std::array::from_fn(|i| i as u8));
    // 0x1b is the four entries 3, 2, 1, 0, two bits each.
    let table = vf.pf_rss_table().unwrap();
    assert_eq!(table[..8], [3, 2, 1, 0, 3, 2, 1, 0]);
    assert_eq!(table[16..20], [2, 1, 3, 0]);
    // On an X550 they would say nothing about the VF.
    let (mut vf, double) = known(Model::X550EmX);
    assert_eq!(vf.pf_rss_table(), Err(Error::Unsupported(Reason::RssIsTheVfs)));
    assert!(double.messages().is_empty());
}

#[test]
fn a_refusal_is_an_error_and_nothing_else() {
    let (mut vf, double) = known(Model::X550);
    double.set_script(Box::new(|message| Some(vec![message[0] | NACK | CTS])));
    let mac = vf.mac();
    assert_eq!(vf.set_mac([2, 0, 0, 0, 0, 9]), Err(Error::Refused(Request::SetMac)));
    assert_eq!(vf.mac(), mac);
    assert_eq!(vf.set_vlan(5, true), Err(Error::Refused(Request::SetVlan)));
    assert_eq!(vf.set_max_frame(9000), Err(Error::Refused(Request::SetLpe)));
    assert!(vf.is_known());
    // What was refused is not asked for after the next reset.
    double.messages();
    double.set_script(negotiator(&[4]));
    vf.reset().unwrap();
    vf.configure(&Default::default()).unwrap();
    assert!(!double.messages().iter().any(|m| [2, 4].contains(&(m[0] & 0xff))));
}

/// Behaviour 9.
#[test]
fn promiscuous_is_not_for_an_82599_nor_before_1_3() {
    let (mut vf, double) = known(Model::I82599);
    assert_eq!(
        vf.set_mode(XcastMode::Promiscuous),
        Err(Error::Unsupported(Reason::Promiscuous82599))
    );
    assert!(double.messages().is_empty());
    vf.set_mode(XcastMode::AllMulticast).unwrap();

    let double = Double::new(negotiator(&[0, 2, 3]));
    let (mut vf, _) = fresh(&double, Model::X540);
    vf.reset().unwrap();
    assert_eq!(
        vf.set_mode(XcastMode::Promiscuous),
        Err(Error::Unsupported(Reason::Api {
            needed: Api::V1_3,
            negotiated: Api::V1_2
        }))
    );
    vf.set_mode(XcastMode::AllMulticast).unwrap();
    // A PF that does not trust the VF.
    let (mut vf, double) = known(Model::X540);
    double.set_script(Box::new(|message| Some(vec![message[0] | NACK | CTS])));
    assert_eq!(
        vf.set_mode(XcastMode::Promiscuous),
        Err(Error::Refused(Request::UpdateXcastMode))
    );
}

/// Behaviour 10: by the notice, by RSTD, by RSTI, by a refusal without CTS, asked or unasked.
#[test]
fn a_reset_of_the_pf_stops_everything_until_the_vf_is_reset() {
    let causes: [Cause; 5] = [
        |double| double.say(0x0100),
        |double| double.latch(0x80),
        |double| double.level(0x40),
        |double| double.say(0x4000_0005),
        |double| double.set_script(Box::new(|message| Some(vec![message[0] | NACK]))),
    ];
    for (i, cause) in causes.iter().enumerate() {
        for ask in [false, true] {
            let (mut vf, double) = known(Model::X550);
            double.poke(VFLINKS, 0x7000_0000);
            assert_ne!(vf.link(), Link::Down);
            cause(&double);
            if ask || i == 4 {
                assert_eq!(vf.set_vlan(1, true), Err(Error::PfReset), "cause {i}");
            } else {
                assert_eq!(vf.service(), Ok(Event::PfReset), "cause {i}");
            }
            assert!(!vf.is_known());
            assert_eq!(vf.link(), Link::Down);
            // Nothing is asked any more, and nothing waits.
            double.messages();
            let reads = double.mailbox_reads();
            assert_eq!(vf.set_mac([2, 0, 0, 0, 0, 1]), Err(Error::PfReset));
            assert_eq!(vf.set_mode(XcastMode::Multicast), Err(Error::PfReset));
            assert_eq!(vf.configure(&Default::default()), Err(Error::PfReset));
            assert_eq!(vf.service(), Ok(Event::PfReset));
            let (mut tx, _block) = tx_queue(&double, 0, 64, Default::default());
            assert_eq!(vf.start_tx(&mut tx), Err(Error::PfReset));
            assert!(double.messages().is_empty());
            assert_eq!(double.mailbox_reads(), reads);
            // The PF is back.
            double.level(0);
            double.set_script(negotiator(&[4]));
            vf.reset().unwrap();
            vf.set_vlan(1, true).unwrap();
            assert_eq!(vf.service(), Ok(Event::Quiet));
        }
    }
}

#[test]
fn a_reset_of_the_pf_ends_a_wait_at_once() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::X550);
    vf.reset().unwrap();
    // The PF reads the request, and is reset instead of answering.
    let other = double.clone();
    double.set_script(Box::new(|_| None));
    double.latch_with_ack(0x80);
    let before = time.0.get();
    assert_eq!(vf.set_vlan(1, true), Err(Error::PfReset));
    assert!(time.0.get() - before < 1000);
    assert!(other.messages().iter().any(|m| m[0] & 0xff == 4));
}

#[test]
fn pings_do_not_hide_answers() {
    let (mut vf, double) = known(Model::X550);
    double.interject(0x2000_0100);
    vf.set_vlan(3, true).unwrap();
    assert_eq!(vf.anomalies().stray_message, 1);
    // The notice of a reset instead of an answer.
    double.interject(0x0000_0100);
    assert_eq!(vf.set_vlan(4, true), Err(Error::PfReset));
    // A notice from before the VF's own reset does not stop that.
    double.interject(0x0000_0100);
    vf.reset().unwrap();
}

#[test]
fn no_wait_is_longer_than_its_limit() {
    let request = Request::SetVlan;
    let cases: [(Cause, Error); 3] = [
        (|double| double.hoard(true), Error::MailboxBusy(request)),
        (|double| double.deafen(true), Error::NoAck(request)),
        (|double| double.set_script(Box::new(|_| None)), Error::NoReply(request)),
    ];
    for (make, error) in cases {
        let double = Double::well_behaved();
        let (mut vf, time) = fresh(&double, Model::X540);
        vf.reset().unwrap();
        make(&double);
        let before = time.0.get();
        assert_eq!(vf.set_vlan(1, true), Err(error));
        // 2,000 looks, 500 us apart.
        assert_eq!(time.0.get() - before, 1_000_000);
        // It may work the next time.
        double.hoard(false);
        double.deafen(false);
        double.set_script(negotiator(&[4]));
        vf.set_vlan(1, true).unwrap();
    }
}

#[test]
fn a_pf_that_only_pings_is_given_up() {
    let (mut vf, double) = known(Model::X550);
    double.flood(0x2000_0100);
    assert_eq!(vf.set_vlan(1, true), Err(Error::NoReply(Request::SetVlan)));
    assert_eq!(vf.service(), Ok(Event::Ping));
    assert_eq!(vf.reset(), Err(Error::NoReply(Request::Reset)));
}

#[test]
fn a_request_takes_three_seconds_at_the_most() {
    let double = Double::well_behaved();
    let (mut vf, time) = fresh(&double, Model::X550);
    vf.reset().unwrap();
    double.answer_slowly(1900);
    let before = time.0.get();
    vf.set_vlan(1, true).unwrap();
    assert!((900_000..1_000_000).contains(&(time.0.get() - before)));
    // Pings, each of them just before it is given up.
    double.flood(0x2000_0100);
    let before = time.0.get();
    assert_eq!(vf.set_vlan(1, true), Err(Error::NoReply(Request::SetVlan)));
    assert_eq!(time.0.get() - before, 3_000_000);
}

#[test]
fn answers_to_other_questions_are_errors() {
    let request = Request::SetVlan;
    for word in [ACK | CTS | 5, ACK | NACK | CTS | 4, CTS | 4, 0x8000_ffff, 4] {
        let (mut vf, double) = known(Model::X550);
        double.set_script(Box::new(move |_| Some(vec![word])));
        assert_eq!(
            vf.set_vlan(1, true),
            Err(Error::BadReply { request, word }),
            "{word:#x}"
        );
    }
}

#[test]
fn a_device_that_is_gone_is_noticed_everywhere() {
    let (mut vf, double) = known(Model::X550);
    double.remove();
    assert_eq!(vf.link(), Link::Down);
    assert_eq!(vf.set_vlan(1, true), Err(Error::Gone));
    assert_eq!(vf.service(), Err(Error::Gone));
    assert_eq!(vf.configure(&Default::default()), Err(Error::Gone));
    assert_eq!(vf.reset(), Err(Error::Gone));
    let before = vf.statistics();
    assert_eq!(vf.statistics(), before);
}

#[test]
fn what_cannot_be_is_not_asked() {
    let (mut vf, double) = known(Model::X550);
    assert_eq!(vf.set_vlan(4096, true), Err(Error::Vlan(4096)));
    assert_eq!(vf.set_mac([1, 0, 0, 0, 0, 0]), Err(Error::Mac([1, 0, 0, 0, 0, 0])));
    assert_eq!(vf.set_max_frame(63), Err(Error::MaxFrame(63)));
    assert_eq!(vf.set_max_frame(9729), Err(Error::MaxFrame(9729)));
    assert_eq!(vf.set_mtu(u16::MAX), Err(Error::MaxFrame(u16::MAX)));
    let many = [[0x33, 0x33, 0, 0, 0, 1]; 31];
    assert_eq!(
        vf.set_multicast(&many),
        Err(Error::TooManyAddresses { given: 31, limit: 30 })
    );
    assert_eq!(vf.set_multicast(&[MAC]), Err(Error::Mac(MAC)));
    let many = [MAC; 17];
    assert_eq!(
        vf.set_unicast(&many),
        Err(Error::TooManyAddresses { given: 17, limit: 16 })
    );
    // An 82599's PF spends another entry on the same address.
    vf.set_mac(MAC).unwrap();
    assert!(double.messages().is_empty());
}
