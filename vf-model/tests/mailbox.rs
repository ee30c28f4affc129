//! What VF and PF say to each other.

mod common;

use common::{API_10, API_11, API_12, API_13, CTS, Driver, FAILURE, SUCCESS, device};
use vf_model::message::{Api, Request, Xcast};
use vf_model::{Complaint, Kind, Registers as _, Settings, Speed};

fn settings(kind: Kind) -> Settings {
    Settings {
        kind,
        ..Settings::default()
    }
}

#[test]
fn reset_gives_address_and_filter_type_without_cts() {
    let device = device(Settings::default());
    device.with(|nic| nic.pf().multicast_filter = 2);
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    let reply = driver.ask(&[0x01]);
    assert_eq!(reply[0], 0x8000_0001);
    assert_eq!(reply[1..4], [0x9059_8202, 0x0100, 2]);
}

#[test]
fn reset_without_an_address_is_refused_and_still_clears_to_send() {
    let device = device(Settings::default());
    device.with(|nic| nic.set_mac(0, [0; 6]));
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    assert_eq!(driver.ask(&[0x01])[0], 0x4000_0001);
    let reply = driver.ask(&[0x02, 0x1d1c_1b02, 0x1f1e]);
    assert_eq!(reply[0], SUCCESS | CTS | 0x02);
    assert_eq!(
        device.with(|nic| nic.policy(0).mac),
        [0x02, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]
    );
}

#[test]
fn nothing_is_granted_before_reset() {
    let device = device(Settings::default());
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    assert_eq!(driver.ask(&[0x08, API_10])[0], FAILURE | 0x08);
}

#[test]
fn versions_of_1_0_to_1_3_are_spoken() {
    let device = device(Settings::default());
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    driver.hello();
    for (value, granted) in [
        (8, false),
        (5, false),
        (1, false),
        (API_13, true),
        (API_12, true),
        (API_11, true),
        (API_10, true),
    ] {
        let word = if granted { SUCCESS } else { FAILURE } | CTS | 0x08;
        assert_eq!(driver.ask(&[0x08, value])[0], word, "{value}");
    }
    device.with(|nic| nic.pf().newest_api = Api::V11);
    assert_eq!(driver.ask(&[0x08, API_12])[0], FAILURE | CTS | 0x08);
}

#[test]
fn queues_from_1_1_on() {
    let device = device(Settings {
        queues: 4,
        ..Settings::default()
    });
    let mut driver = Driver::new(&device, 0);
    driver.reset();
    driver.hello();
    assert_eq!(driver.ask(&[0x09])[0], FAILURE | CTS | 0x09);
    driver.ask(&[0x08, API_11]);
    assert_eq!(driver.ask(&[0x09])[..5], [SUCCESS | CTS | 0x09, 4, 4, 0, 0]);
    device.with(|nic| nic.policy(0).port_vlan = Some((7, 0)));
    assert_eq!(driver.ask(&[0x09])[3], 1, "transparent VLAN");
}

#[test]
fn rss_of_the_pf_can_be_read_where_allowed() {
    let device = device(settings(Kind::X540));
    let mut driver = Driver::up(&device, 0);
    assert_eq!(driver.ask(&[0x0a])[0], FAILURE | CTS | 0x0a);
    device.with(|nic| nic.policy(0).rss_query = true);
    // Entries are 0, 1, 0, 1 and so on: two bits each.
    let reply = driver.ask(&[0x0a]);
    assert_eq!(reply[0], SUCCESS | CTS | 0x0a);
    assert_eq!(reply[1..9], [0x4444_4444; 8]);
    let key = device.with(|nic| nic.pf().rss.key);
    let reply = driver.ask(&[0x0b]);
    let bytes: Vec<u8> = reply[1..11].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(bytes, key);
    driver.ask(&[0x08, API_11]);
    assert_eq!(driver.ask(&[0x0a])[0], FAILURE | CTS | 0x0a, "1.2 is needed");
}

#[test]
fn promiscuous_mode_has_four_conditions() {
    // Kind, API, trusted, PF promiscuous: granted mode or refused.
    for (kind, api, trusted, pf, result) in [
        (Kind::X550, API_13, true, true, Some(3)),
        (Kind::X540, API_13, true, true, Some(3)),
        (Kind::I82599, API_13, true, true, None),
        (Kind::X550, API_12, true, true, None),
        (Kind::X550, API_11, true, true, None),
        (Kind::X550, API_13, true, false, None),
        // Not refused, but granted less: the reply says what.
        (Kind::X550, API_13, false, true, Some(1)),
    ] {
        let device = device(settings(kind));
        let mut driver = Driver::up(&device, 0);
        driver.ask(&[0x08, api]);
        device.with(|nic| {
            nic.policy(0).trusted = trusted;
            nic.pf().promiscuous = pf;
        });
        let reply = driver.ask(&[0x0c, 3]);
        match result {
            Some(mode) => assert_eq!(reply[..2], [SUCCESS | CTS | 0x0c, mode], "{kind} {api}"),
            None => assert_eq!(reply[0], FAILURE | CTS | 0x0c, "{kind} {api} {trusted} {pf}"),
        }
    }
}

#[test]
fn modes_are_none_to_promiscuous_and_no_more() {
    let device = device(settings(Kind::X550));
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| nic.policy(0).trusted = true);
    assert_eq!(driver.ask(&[0x0c, 2])[..2], [SUCCESS | CTS | 0x0c, 2]);
    assert_eq!(driver.ask(&[0x0c, 0])[..2], [SUCCESS | CTS | 0x0c, 0]);
    assert_eq!(driver.ask(&[0x0c, 4])[0], FAILURE | CTS | 0x0c);
    assert_eq!(device.with(|nic| nic.policy(0).agreed().xcast), Xcast::None);
}

#[test]
fn addresses_are_checked() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    assert_eq!(driver.ask(&[0x02, 0, 0])[0], FAILURE | CTS | 0x02, "zero");
    assert_eq!(driver.ask(&[0x02, 1, 0])[0], FAILURE | CTS | 0x02, "multicast");
    device.with(|nic| nic.policy(0).mac_is_set = true);
    assert_eq!(
        driver.ask(&[0x02, 0x4, 0])[0],
        FAILURE | CTS | 0x02,
        "the administrator's"
    );
    let own = [0x02, u32::from_le_bytes(driver.mac[..4].try_into().unwrap()), 0x0100];
    assert_eq!(driver.ask(&own)[0], SUCCESS | CTS | 0x02, "the same again");
    assert_eq!(driver.ask(&[0x0001_0006, 4, 0])[0], FAILURE | CTS | 0x0001_0006);
    device.with(|nic| nic.policy(0).trusted = true);
    assert_eq!(driver.ask(&[0x02, 0x4, 0])[0], SUCCESS | CTS | 0x02);
}

#[test]
fn more_addresses_are_a_list_that_index_1_begins_anew() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    let list = |nic: &mut vf_model::Nic| nic.policy(0).agreed().more_macs;
    assert_eq!(driver.ask(&[0x0001_0006, 0x02, 0])[0], SUCCESS | CTS | 0x0001_0006);
    driver.ask(&[0x0002_0006, 0x12, 0]);
    assert_eq!(device.with(list).len(), 2);
    driver.ask(&[0x0001_0006, 0x22, 0]);
    assert_eq!(device.with(list), [[0x22, 0, 0, 0, 0, 0]]);
    driver.ask(&[0x0006, 0, 0]);
    assert!(device.with(list).is_empty());
    // The table has 128 entries for all.
    let granted = (0..200).filter(|i| driver.ask(&[0x0002_0006, i << 8 | 2, 1])[0] & SUCCESS != 0);
    assert_eq!(granted.count(), 126);
}

#[test]
fn multicast_hashes_are_twelve_bits_two_a_word_thirty_at_most() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    let mut message = vec![0x00ff_0003];
    message.extend((0..15).map(|i| (i * 2) | ((i * 2 + 1) << 16) | 0xf000_f000));
    assert_eq!(driver.ask(&message)[0], SUCCESS | CTS | 0x00ff_0003);
    let hashes = device.with(|nic| nic.policy(0).agreed().hashes);
    assert_eq!(hashes, (0..30).collect::<Vec<_>>());
    driver.ask(&[0x0001_0003, 0x0abc_0def]);
    assert_eq!(device.with(|nic| nic.policy(0).agreed().hashes), [0xdef]);
}

#[test]
fn vlan_filters_are_sixty_four_for_all() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    // VLAN 0 is always there.
    let granted = (1..100).filter(|vlan| driver.ask(&[0x0001_0004, *vlan])[0] & SUCCESS != 0);
    assert_eq!(granted.count(), 63);
    assert_eq!(driver.ask(&[0x0004, 5])[0], SUCCESS | CTS | 0x0004);
    assert_eq!(driver.ask(&[0x0004, 0])[0], SUCCESS | CTS | 0x0004);
    let vlans = device.with(|nic| nic.policy(0).agreed().vlans);
    assert!(!vlans.contains(&5) && vlans.contains(&0) && vlans.len() == 63);
    device.with(|nic| nic.policy(0).port_vlan = Some((9, 0)));
    assert_eq!(driver.ask(&[0x0001_0004, 5])[0], FAILURE | CTS | 0x0001_0004);
}

#[test]
fn an_82599_lets_a_vf_have_long_frames_only_with_its_pf() {
    let device = device(settings(Kind::I82599));
    let mut driver = Driver::up(&device, 0);
    assert_eq!(driver.ask(&[0x05, 9018])[0], FAILURE | CTS | 0x05);
    device.with(|nic| nic.pf().mtu = 9000);
    assert_eq!(driver.ask(&[0x05, 9018])[0], SUCCESS | CTS | 0x05);
    assert_eq!(driver.ask(&[0x05, 9729])[0], FAILURE | CTS | 0x05);
    driver.ask(&[0x08, API_10]);
    assert_eq!(
        driver.ask(&[0x05, 1518])[0],
        FAILURE | CTS | 0x05,
        "1.0 knows nothing of it"
    );
}

#[test]
fn later_devices_do_not_care_about_their_pf() {
    for kind in [Kind::X540, Kind::X550] {
        let device = device(settings(kind));
        let mut driver = Driver::up(&device, 0);
        assert_eq!(driver.ask(&[0x05, 9728])[0], SUCCESS | CTS | 0x05);
        assert_eq!(driver.ask(&[0x05, 9729])[0], FAILURE | CTS | 0x05);
    }
}

#[test]
fn the_link_state_is_the_administrators() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    assert_eq!(driver.ask(&[0x10])[..2], [SUCCESS | CTS | 0x10, 1]);
    device.with(|nic| nic.set_link_enabled(0, false));
    assert_eq!(driver.ask(&[0x10])[1], 0);
    assert_eq!(driver.read(0x10) & 0x4000_0000, 0);
}

#[test]
fn ipsec_and_the_unknown_are_refused() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    for request in [0x00, 0x07, 0x0d, 0x0e, 0x11, 0x12, 0xffff] {
        assert_eq!(driver.ask(&[request])[0], FAILURE | CTS | request);
    }
}

#[test]
fn the_pf_can_be_told_to_refuse_or_to_be_silent() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| nic.policy(0).refuse(Request::SetMaxFrame, 2));
    let granted = [0; 3].map(|_| driver.ask(&[0x05, 1518])[0] & SUCCESS != 0);
    assert_eq!(granted, [false, false, true]);
    device.with(|nic| nic.policy(0).deaf = true);
    driver.send_message(&[0x05, 1518]);
    driver.wait(0x20).expect("the mailbox itself acknowledges");
    assert_eq!(driver.wait(0x10), None);
}

#[test]
fn a_reset_of_the_pf_as_a_vf_sees_it() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| nic.begin_reset());
    assert_eq!(driver.mailbox() & 0xf0, 0x50, "RSTI and a message");
    assert_eq!(driver.take_message()[0], 0x100, "without CTS");
    assert_eq!(driver.read(0x10) & 0x4000_0000, 0, "no link");
    assert_eq!(driver.read(0x1028) & 1 << 25, 0, "queues are off");
    driver.send_message(&[0x01]);
    assert_eq!(driver.wait(0x20), None, "nobody is there");
    device.with(|nic| nic.end_reset());
    assert_eq!(driver.mailbox() & 0xc0, 0x80, "RSTD, no RSTI");
    assert_eq!(driver.read(0x2fc) & 0x80, 0, "which clears when read");
    driver.restart();
    assert_eq!(driver.ask(&[0x05, 1518])[0], SUCCESS | CTS | 0x05);
}

#[test]
fn lost_clearance_is_told_to_who_reads() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| nic.lose_clearance(0));
    driver.wait(0x10).expect("a message");
    assert_eq!(driver.take_message()[0], 0x100);
    // Reading it has an answer: refused, no CTS.
    driver.wait(0x10).expect("a second message");
    driver.write(0x2fc, 0x4);
    assert_eq!(driver.read(0x200), FAILURE);
}

#[test]
fn links_and_speeds() {
    let device = device(settings(Kind::X550));
    let mut driver = Driver::up(&device, 0);
    for (speed, bits) in [
        (Some(Speed::G10), 0x7000_0000),
        (Some(Speed::G1), 0x6000_0000),
        (Some(Speed::M100), 0x5000_0000),
        (Some(Speed::G2_5), 0x7800_0000),
        (Some(Speed::G5), 0x5800_0000),
        (None, 0),
    ] {
        device.with(|nic| nic.set_link(speed));
        assert_eq!(driver.read(0x10), bits);
        driver.wait(0x10).expect("the PF says so");
        assert_eq!(driver.take_message()[0], CTS | 0x100);
    }
}

#[test]
fn a_held_mailbox_is_waited_for() {
    let device = device(Settings::default());
    let mut driver = Driver::up(&device, 0);
    device.with(|nic| nic.hold_mailbox(0, true));
    driver.write(0x2fc, 0x4);
    assert_eq!(driver.read(0x2fc) & 0xc, 0x8, "PFU, no VFU");
    driver.write(0x200, 0x1234);
    assert_ne!(driver.read(0x200), 0x1234);
    assert_eq!(
        device.with(|nic| nic.complaints(0).count(Complaint::MailboxNotOwned)),
        1
    );
    device.with(|nic| nic.hold_mailbox(0, false));
    assert_eq!(driver.ask(&[0x05, 1518])[0], SUCCESS | CTS | 0x05);
}

#[test]
fn the_pf_takes_as_many_reads_as_it_is_told() {
    for latency in [0, 1, 5] {
        let device = device(Settings {
            latency,
            ..Settings::default()
        });
        let vf = device.vf(0);
        vf.write32(0, 1 << 26);
        let reads = (1..).find(|_| vf.read32(0x2fc) & 0x80 != 0);
        assert_eq!(reads, Some(latency + 1));
    }
}
