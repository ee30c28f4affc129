//! What a host says when it is asked: ARP, neighbour solicitation and echo, over frames as bytes.

//!
//! | question | from | answer | specification |
//! |---|---|---|---|
//! | ARP request | a host | reply to it | RFC 826 |
//! | ARP probe | 0.0.0.0 | reply to the prober: the address is taken | RFC 5227, 2.1.1 |
//! | ARP announcement of an address of ours | that address | reply, if addresses were given: the announcer sees the conflict | RFC 5227, 2.4 |
//! | echo request to one host | a host | echo reply | RFC 1122, 3.2.2.6; RFC 4443, 4.2 |
//! | neighbour solicitation | a host | advertisement to it, solicited | RFC 4861, 7.2.4 |
//! | the same, duplicate address detection | :: | advertisement to all nodes, unsolicited | RFC 4861, 7.2.4; RFC 4862, 5.4 |
//!
//! Nothing else is answered: nothing to or from an address that is not one host's ([`is_host`]), and nothing from a group's
//! Ethernet address. A question with VLAN tags has its answer with the same tags.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packets::{self, ArpOp, ETHER_LEN, IPV4_LEN, IPV6_LEN, Mac, checksum, ethertype, protocol};

/// All nodes of a link (RFC 4291, 2.7.1), and the Ethernet group that carries it (RFC 2464, 7).
const ALL_NODES: (Mac, Ipv6Addr) = ([0x33, 0x33, 0, 0, 0, 1], Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));

/// Whether an address can be one host's on a network: its own, and the source of what it sends (RFC 1122, 3.2.1.3;
/// RFC 4291, 2.5 and 2.7).
pub fn is_host(ip: IpAddr) -> bool {
    match ip {
        // 0 is "this network", 127 the host itself, 224 and above groups, reserved, and the limited broadcast.
        IpAddr::V4(ip) => matches!(ip.octets()[0], 1..=126 | 128..=223),
        IpAddr::V6(ip) => {
            !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.to_ipv4_mapped().is_some())
        }
    }
}

/// Whether an Ethernet address is one station's.
pub fn is_station(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// A host with one Ethernet address that answers for some, or for all, IP addresses.
#[derive(Clone, Debug)]
pub struct Responder {
    mac: Mac,
    addresses: Option<Vec<IpAddr>>,
}

impl Responder {
    /// Answers for `addresses`; for every address when there are none.
    pub fn new(mac: Mac, addresses: &[IpAddr]) -> Self {
        Responder {
            mac,
            addresses: (!addresses.is_empty()).then(|| addresses.to_vec()),
        }
    }

    fn is_ours(&self, ip: impl Into<IpAddr>) -> bool {
        let ip = ip.into();
        is_host(ip) && self.addresses.as_ref().is_none_or(|list| list.contains(&ip))
    }

    /// Whether `source` may ask for `target`, an address of ours: it is another host.
    fn may_ask(&self, source: impl Into<IpAddr>, target: impl Into<IpAddr>) -> bool {
        let source = source.into();
        is_host(source) && source != target.into() && self.addresses.as_ref().is_none_or(|list| !list.contains(&source))
    }

    /// Turns the question in `frame` into its answer, in place, and gives the answer's length.
    ///
    /// `None`: the frame is no question to us, or malformed, and is unchanged. `frame` is the room that the answer
    /// may use; `len` bytes of it are the question.
    pub fn answer(&self, frame: &mut [u8], len: usize) -> Option<usize> {
        let question = frame.get(..len)?;
        let asker: Mac = question.get(6..12)?.try_into().ok()?;
        // A group address is no sender: answering it would make a storm.
        if !is_station(asker) {
            return None;
        }
        let tags = packets::tags(question);
        if tags == 0 {
            return self.untagged(frame, len, asker);
        }
        // Taken out, and put into whatever is there then.
        let mut taken = [0; 8];
        taken[..tags].copy_from_slice(&frame[12..12 + tags]);
        frame.copy_within(12 + tags..len, 12);
        let room = frame.len() - tags;
        let answer = self.untagged(&mut frame[..room], len - tags, asker);
        let end = answer.unwrap_or(len - tags);
        frame.copy_within(12..end, 12 + tags);
        frame[12..12 + tags].copy_from_slice(&taken[..tags]);
        Some(answer? + tags)
    }

    fn untagged(&self, frame: &mut [u8], len: usize, asker: Mac) -> Option<usize> {
        match packets::ethertype_of(&frame[..len])? {
            ethertype::ARP => self.arp(frame, len),
            ethertype::IPV4 => self.echo(frame, len),
            ethertype::IPV6 => self.icmpv6(frame, len, asker),
            _ => None,
        }
    }

    fn arp(&self, frame: &mut [u8], len: usize) -> Option<usize> {
        let packet = frame.get(ETHER_LEN..len)?.first_chunk::<28>()?;
        if packet[..8] != [0, 1, 8, 0, 6, 4, 0, 1] {
            return None;
        }
        let mac: Mac = packet[8..14].try_into().ok()?;
        let ip: [u8; 4] = packet[14..18].try_into().ok()?;
        let target: [u8; 4] = packet[24..28].try_into().ok()?;
        let (ip, target) = (Ipv4Addr::from(ip), Ipv4Addr::from(target));
        let is_probe = ip.is_unspecified();
        let is_claim = ip == target && self.addresses.is_some();
        if !is_station(mac) || !self.is_ours(target) || !(is_probe || is_claim || self.may_ask(ip, target)) {
            return None;
        }
        let reply = packets::arp(ArpOp::Reply, (self.mac, target), (mac, ip));
        self.write(frame, &packets::ethernet(mac, self.mac, ethertype::ARP, &reply))
    }

    fn echo(&self, frame: &mut [u8], len: usize) -> Option<usize> {
        let packet = frame.get_mut(ETHER_LEN..len)?;
        let header = usize::from(packet.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff;
        let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
        let target: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
        let (source, target) = (Ipv4Addr::from(source), Ipv4Addr::from(target));
        if packet[0] >> 4 != 4
            || header < IPV4_LEN
            || fragment != 0
            || packet[9] != protocol::ICMP
            || !self.is_ours(target)
            || !self.may_ask(source, target)
            || checksum(packet.get(..header)?, 0) != 0
        {
            return None;
        }
        let message = packet.get_mut(header..total)?;
        if message.len() < 8 || message[0] != 8 || message[1] != 0 || checksum(message, 0) != 0 {
            return None;
        }
        message[0] = 0;
        message[2..4].fill(0);
        let check = checksum(message, 0);
        message[2..4].copy_from_slice(&check.to_be_bytes());
        let (src, dst) = packet[12..20].split_at_mut(4);
        src.swap_with_slice(dst);
        // A packet of ours: what is left of the question's time to live is not its limit.
        packet[8] = 64;
        packet[10..12].fill(0);
        let check = checksum(&packet[..header], 0);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
        packets::swap_macs(frame);
        frame[6..12].copy_from_slice(&self.mac);
        Some(len)
    }

    fn icmpv6(&self, frame: &mut [u8], len: usize, asker: Mac) -> Option<usize> {
        let packet = frame.get(ETHER_LEN..len)?;
        if packet.len() < IPV6_LEN || packet[0] >> 4 != 6 || packet[6] != protocol::ICMPV6 {
            return None;
        }
        let source: [u8; 16] = packet[8..24].try_into().ok()?;
        let target: [u8; 16] = packet[24..40].try_into().ok()?;
        let (source, target) = (Ipv6Addr::from(source), Ipv6Addr::from(target));
        if packets::checksums_hold(&frame[..len]) != Some(true) {
            return None;
        }
        let size = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        let message = packet.get(IPV6_LEN..IPV6_LEN + size)?;
        let answer = match *message.first_chunk::<2>()? {
            [135, 0] if packet[7] == 255 => {
                let wanted: [u8; 16] = message.get(8..24)?.try_into().ok()?;
                let wanted = Ipv6Addr::from(wanted);
                // RFC 4861, 7.1.1.
                let link = source_link_address(message.get(24..)?)?;
                let to = if source.is_unspecified() {
                    if link.is_some() || target != packets::solicited_node(wanted).0 {
                        return None;
                    }
                    ALL_NODES
                } else if self.may_ask(source, wanted) {
                    (link.unwrap_or(asker), source)
                } else {
                    return None;
                };
                if !self.is_ours(wanted) || to != ALL_NODES && !is_station(to.0) {
                    return None;
                }
                packets::neighbour_advertisement(self.mac, wanted, to)
            }
            [128, 0] if self.is_ours(target) && self.may_ask(source, target) => {
                let echo = packets::icmpv6(target, source, 129, message.get(4..)?);
                let packet = packets::ipv6(target, source, protocol::ICMPV6, 64, &echo);
                packets::ethernet(asker, self.mac, ethertype::IPV6, &packet)
            }
            _ => return None,
        };
        self.write(frame, &answer)
    }

    fn write(&self, frame: &mut [u8], answer: &[u8]) -> Option<usize> {
        frame.get_mut(..answer.len())?.copy_from_slice(answer);
        Some(answer.len())
    }
}

/// The source link-layer address among the options of a solicitation, if there is one; `None` if the options are
/// malformed: one of length 0, or one that is cut (RFC 4861, 7.1.1).
fn source_link_address(mut options: &[u8]) -> Option<Option<Mac>> {
    let mut found = None;
    while !options.is_empty() {
        let length = usize::from(*options.get(1)?) * 8;
        let option = options.get(..length).filter(|option| !option.is_empty())?;
        if option[0] == 1 && length == 8 {
            found = option[2..8].try_into().ok();
        }
        options = &options[length..];
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packets::*;

    const ME: Mac = [2, 0, 0, 0, 0, 1];
    const YOU: Mac = [2, 0, 0, 0, 0, 2];

    fn ask(responder: &Responder, question: &[u8]) -> Option<Vec<u8>> {
        let mut room = [0u8; 2048];
        room[..question.len()].copy_from_slice(question);
        let before = room;
        let answer = responder.answer(&mut room, question.len());
        if answer.is_none() {
            assert_eq!(room, before, "no answer, but the frame changed");
        }
        answer.map(|len| room[..len].to_vec())
    }

    #[test]
    fn arp_is_answered_for_our_address_alone() {
        let me = Responder::new(ME, &[[192, 0, 2, 1].into()]);
        let request = |target: [u8; 4]| {
            let packet = arp(ArpOp::Request, (YOU, [192, 0, 2, 2].into()), ([0; 6], target.into()));
            ethernet(BROADCAST, YOU, ethertype::ARP, &packet)
        };
        let reply = ask(&me, &request([192, 0, 2, 1])).unwrap();
        let expected = arp(ArpOp::Reply, (ME, [192, 0, 2, 1].into()), (YOU, [192, 0, 2, 2].into()));
        assert_eq!(reply, ethernet(YOU, ME, ethertype::ARP, &expected));
        assert_eq!(ask(&me, &request([192, 0, 2, 3])), None);
        assert_eq!(ask(&me, &reply), None, "a reply is no question");
    }

    #[test]
    fn echo_is_answered_with_valid_checksums() {
        let any = Responder::new(ME, &[]);
        let message = icmp_echo(8, 7, 9, b"payload of an odd length.");
        let packet = ipv4(
            [192, 0, 2, 2].into(),
            [192, 0, 2, 1].into(),
            protocol::ICMP,
            5,
            &message,
        );
        let question = ethernet(ME, YOU, ethertype::IPV4, &packet);
        let answer = ask(&any, &question).unwrap();
        assert_eq!(checksums_hold(&answer), Some(true));
        assert_eq!((&answer[..6], &answer[6..12]), (&YOU[..], &ME[..]));
        assert_eq!(answer[34..], icmp_echo(0, 7, 9, b"payload of an odd length.")[..]);
        let mut wrong = question.clone();
        wrong[40] ^= 1;
        assert_eq!(ask(&any, &wrong), None, "a wrong checksum is not answered");
        let mut storm = question;
        storm[6] = 3;
        assert_eq!(ask(&any, &storm), None, "a group sender is not answered");
    }

    #[test]
    fn ipv6_is_answered() {
        let (mine, yours): (Ipv6Addr, Ipv6Addr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        let me = Responder::new(ME, &[mine.into()]);
        let advertisement = ask(&me, &neighbour_solicitation(YOU, yours, mine)).unwrap();
        assert_eq!(advertisement, neighbour_advertisement(ME, mine, (YOU, yours)));
        assert_eq!(checksums_hold(&advertisement), Some(true));
        assert_eq!(ask(&me, &neighbour_solicitation(YOU, yours, yours)), None);
        let echo = icmpv6_echo(yours, mine, 128, 1, 2, b"hello");
        let question = ethernet(
            ME,
            YOU,
            ethertype::IPV6,
            &ipv6(yours, mine, protocol::ICMPV6, 64, &echo),
        );
        let answer = ask(&me, &question).unwrap();
        assert_eq!(checksums_hold(&answer), Some(true));
        assert_eq!(answer[54], 129);
    }

    #[test]
    fn a_probe_and_a_claim_are_told_that_the_address_is_taken() {
        let me = Responder::new(ME, &[[192, 0, 2, 1].into()]);
        let any = Responder::new(ME, &[]);
        let request = |sender: (Mac, [u8; 4])| {
            let packet = arp(
                ArpOp::Request,
                (sender.0, sender.1.into()),
                ([0; 6], [192, 0, 2, 1].into()),
            );
            ethernet(BROADCAST, YOU, ethertype::ARP, &packet)
        };
        let probed = ask(&me, &request((YOU, [0; 4]))).unwrap();
        let expected = arp(ArpOp::Reply, (ME, [192, 0, 2, 1].into()), (YOU, [0; 4].into()));
        assert_eq!(probed, ethernet(YOU, ME, ethertype::ARP, &expected));
        assert!(
            ask(&me, &request((YOU, [192, 0, 2, 1]))).is_some(),
            "a claim of our address"
        );
        assert_eq!(
            ask(&any, &request((YOU, [192, 0, 2, 1]))),
            None,
            "every host's announcement"
        );
        for group in [BROADCAST, [3, 0, 0, 0, 0, 1], [0; 6]] {
            assert_eq!(
                ask(&me, &request((group, [192, 0, 2, 2]))),
                None,
                "{group:02x?} is no station"
            );
        }
    }

    #[test]
    fn only_one_host_may_ask_another() {
        let (mine, any) = (Responder::new(ME, &[[192, 0, 2, 1].into()]), Responder::new(ME, &[]));
        let echo = |from: [u8; 4], to: [u8; 4]| {
            let packet = ipv4(from.into(), to.into(), protocol::ICMP, 5, &icmp_echo(8, 7, 9, &[0; 8]));
            ethernet(ME, YOU, ethertype::IPV4, &packet)
        };
        let request = |from: [u8; 4], to: [u8; 4]| {
            let packet = arp(ArpOp::Request, (YOU, from.into()), ([0; 6], to.into()));
            ethernet(BROADCAST, YOU, ethertype::ARP, &packet)
        };
        let (good, own) = ([192, 0, 2, 2], [192, 0, 2, 1]);
        assert!(ask(&mine, &echo(good, own)).is_some() && ask(&any, &echo(good, own)).is_some());
        for bad in [
            [255; 4],
            [224, 0, 0, 1],
            [239, 1, 2, 3],
            [127, 0, 0, 1],
            [0, 1, 2, 3],
            [240, 0, 0, 1],
        ] {
            for me in [&mine, &any] {
                assert_eq!(ask(me, &echo(bad, own)), None, "from {bad:?}");
                assert_eq!(ask(me, &request(bad, own)), None, "from {bad:?}");
                assert_eq!(ask(me, &echo(good, bad)), None, "to {bad:?}");
                assert_eq!(ask(me, &request(good, bad)), None, "to {bad:?}");
            }
        }
        assert_eq!(ask(&mine, &echo([0; 4], own)), None);
        assert_eq!(ask(&mine, &echo(own, own)), None, "from our own address");
        assert_eq!(ask(&any, &echo(own, own)), None, "from the address that it goes to");
        let echo6 = |from: &str, to: &str| {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let message = icmpv6_echo(from, to, 128, 1, 2, b"hello");
            ethernet(
                ME,
                YOU,
                ethertype::IPV6,
                &ipv6(from, to, protocol::ICMPV6, 64, &message),
            )
        };
        assert!(ask(&any, &echo6("fe80::2", "fe80::1")).is_some());
        for bad in ["::", "::1", "ff02::1", "::ffff:192.0.2.2"] {
            assert_eq!(ask(&any, &echo6(bad, "2001:db8::1")), None, "from {bad}");
            assert_eq!(ask(&any, &echo6("2001:db8::2", bad)), None, "to {bad}");
        }
    }

    #[test]
    fn an_echo_has_a_time_to_live_of_its_own() {
        let any = Responder::new(ME, &[]);
        let mut packet = ipv4(
            [192, 0, 2, 2].into(),
            [192, 0, 2, 1].into(),
            protocol::ICMP,
            5,
            &icmp_echo(8, 7, 9, &[0; 8]),
        );
        packet[8] = 1;
        packet[10..12].fill(0);
        let check = checksum(&packet[..20], 0);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
        let answer = ask(&any, &ethernet(ME, YOU, ethertype::IPV4, &packet)).unwrap();
        assert_eq!((answer[22], checksums_hold(&answer)), (64, Some(true)));
    }

    /// A solicitation with these parts, its checksum right.
    fn solicitation(from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, code: u8, options: &[u8]) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend_from_slice(&target.octets());
        body.extend_from_slice(options);
        let mut message = icmpv6(from, to, 135, &body);
        message[1] = code;
        message[2..4].fill(0);
        let check = checksum(
            &message,
            pseudo(from.into(), to.into(), protocol::ICMPV6, message.len()),
        );
        message[2..4].copy_from_slice(&check.to_be_bytes());
        let packet = ipv6(from, to, protocol::ICMPV6, 255, &message);
        ethernet([0x33, 0x33, 0xff, 0, 0, 1], YOU, ethertype::IPV6, &packet)
    }

    #[test]
    fn a_duplicate_address_is_told_to_all_nodes() {
        let (mine, none) = ("2001:db8::1".parse().unwrap(), Ipv6Addr::UNSPECIFIED);
        let me = Responder::new(ME, &[IpAddr::V6(mine)]);
        let (group, _) = solicited_node(mine);
        let answer = ask(&me, &solicitation(none, group, mine, 0, &[])).unwrap();
        assert_eq!(answer, neighbour_advertisement(ME, mine, ALL_NODES));
        assert_eq!(
            (answer[58] & 0x40, checksums_hold(&answer)),
            (0, Some(true)),
            "unsolicited"
        );
        let link = [1, 1, 2, 0, 0, 0, 0, 9];
        assert_eq!(
            ask(&me, &solicitation(none, group, mine, 0, &link)),
            None,
            "an address of nobody has no link"
        );
        assert_eq!(
            ask(&me, &solicitation(none, mine, mine, 0, &[])),
            None,
            "not to the group"
        );
        assert_eq!(
            ask(&me, &solicitation(none, group, "2001:db8::9".parse().unwrap(), 0, &[])),
            None
        );
    }

    #[test]
    fn a_solicitation_is_valid_or_not_answered() {
        let (mine, yours): (Ipv6Addr, Ipv6Addr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        let me = Responder::new(ME, &[IpAddr::V6(mine)]);
        let (group, _) = solicited_node(mine);
        let link = [1, 1, 2, 0, 0, 0, 0, 9];
        let answer = ask(&me, &solicitation(yours, group, mine, 0, &link)).unwrap();
        assert_eq!(answer[..6], [2, 0, 0, 0, 0, 9], "to the address that the option tells");
        assert_eq!(ask(&me, &solicitation(yours, group, mine, 0, &[])).unwrap()[..6], YOU);
        assert_eq!(ask(&me, &solicitation(yours, group, mine, 1, &link)), None, "a code");
        assert_eq!(
            ask(&me, &solicitation(yours, group, mine, 0, &[1, 0, 0, 0, 0, 0, 0, 0])),
            None,
            "length 0"
        );
        assert_eq!(
            ask(&me, &solicitation(yours, group, mine, 0, &link[..6])),
            None,
            "a cut option"
        );
        assert_eq!(
            ask(&me, &solicitation(yours, group, mine, 0, &[1, 1, 3, 0, 0, 0, 0, 9])),
            None,
            "a group's link"
        );
        assert_eq!(
            ask(&me, &solicitation(mine, group, mine, 0, &[])),
            None,
            "from our own address"
        );
    }

    #[test]
    fn tags_of_a_question_are_those_of_its_answer() {
        let me = Responder::new(ME, &[[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()]);
        let request = arp(
            ArpOp::Request,
            (YOU, [192, 0, 2, 2].into()),
            ([0; 6], [192, 0, 2, 1].into()),
        );
        let packet = ipv4(
            [192, 0, 2, 2].into(),
            [192, 0, 2, 1].into(),
            protocol::ICMP,
            5,
            &icmp_echo(8, 7, 9, &[0; 60]),
        );
        for question in [
            ethernet(BROADCAST, YOU, ethertype::ARP, &request),
            ethernet(ME, YOU, ethertype::IPV4, &packet),
            neighbour_solicitation(YOU, "2001:db8::2".parse().unwrap(), "2001:db8::1".parse().unwrap()),
        ] {
            let plain = ask(&me, &question).unwrap();
            for tags in [&[0x81, 0, 0xe0, 5][..], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 0]] {
                let with = |frame: &[u8]| [&frame[..12], tags, &frame[12..]].concat();
                assert_eq!(ask(&me, &with(&question)), Some(with(&plain)));
                // No question: `ask` checks that it is unchanged.
                assert_eq!(ask(&me, &with(&plain)), None);
            }
        }
    }

    #[test]
    fn cut_frames_get_no_answer_and_do_not_panic() {
        let any = Responder::new(ME, &[]);
        let (mine, yours): (Ipv6Addr, Ipv6Addr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        let v4 = ipv4(
            [192, 0, 2, 2].into(),
            [192, 0, 2, 1].into(),
            protocol::ICMP,
            5,
            &icmp_echo(8, 7, 9, &[0; 20]),
        );
        for whole in [
            ethernet(ME, YOU, ethertype::IPV4, &v4),
            neighbour_solicitation(YOU, yours, mine),
        ] {
            for len in 0..whole.len() {
                // Padding may go without harm; headers may not.
                if len < 62 {
                    assert_eq!(ask(&any, &whole[..len]), None, "{len}");
                }
            }
        }
    }
}
