//! What a host says when it is asked: ARP, neighbour solicitation and echo, over frames as bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packets::{self, ArpOp, ETHER_LEN, IPV4_LEN, IPV6_LEN, Mac, checksum, ethertype, protocol};

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
        self.addresses.as_ref().is_none_or(|list| list.contains(&ip)) && !ip.is_multicast() && !ip.is_unspecified()
    }

    /// Turns the question in `frame` into its answer, in place, and gives the answer's length.
    ///
    /// `None`: the frame is no question to us, or malformed, and is unchanged. `frame` is the room that the answer
    /// may use; `len` bytes of it are the question.
    pub fn answer(&self, frame: &mut [u8], len: usize) -> Option<usize> {
        let question = frame.get(..len)?;
        let asker: Mac = question.get(6..12)?.try_into().ok()?;
        // A group address is no sender: answering it would make a storm.
        if asker[0] & 1 == 1 {
            return None;
        }
        match packets::ethertype_of(question)? {
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
        if !self.is_ours(Ipv4Addr::from(target)) {
            return None;
        }
        let reply = packets::arp(ArpOp::Reply, (self.mac, target.into()), (mac, ip.into()));
        self.write(frame, &packets::ethernet(mac, self.mac, ethertype::ARP, &reply))
    }

    fn echo(&self, frame: &mut [u8], len: usize) -> Option<usize> {
        let packet = frame.get_mut(ETHER_LEN..len)?;
        let header = usize::from(packet.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff;
        let target: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
        if packet[0] >> 4 != 4
            || header < IPV4_LEN
            || fragment != 0
            || packet[9] != protocol::ICMP
            || !self.is_ours(Ipv4Addr::from(target))
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
        // The sums stay as they are when addresses change places.
        let (src, dst) = packet[12..20].split_at_mut(4);
        src.swap_with_slice(dst);
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
        if packets::checksums_hold(&frame[..len]) != Some(true) || source.is_unspecified() || source.is_multicast() {
            return None;
        }
        let size = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        let message = packet.get(IPV6_LEN..IPV6_LEN + size)?;
        let answer = match *message.first()? {
            135 if packet[7] == 255 => {
                let wanted: [u8; 16] = message.get(8..24)?.try_into().ok()?;
                let wanted = Ipv6Addr::from(wanted);
                if !self.is_ours(wanted) {
                    return None;
                }
                packets::neighbour_advertisement(self.mac, wanted, (asker, source))
            }
            128 if self.is_ours(target) => {
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
