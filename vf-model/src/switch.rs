//! Who gets a frame: the switch between the VFs and the wire (datasheet 7.10.3).

use crate::frame::{VLAN, be16};
use crate::message::Xcast;
use crate::pf::{Pf, Policy};

/// Where a frame goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Destinations {
    pub vfs: Vec<usize>,
    pub wire: bool,
}

impl Policy {
    fn hears_vlan(&self, vlan: Option<u16>) -> bool {
        self.xcast == Xcast::Promiscuous
            || match vlan {
                None => self.port_vlan.is_none(),
                Some(vlan) => self.vlans.contains(&vlan),
            }
    }

    fn owns(&self, mac: &[u8]) -> bool {
        self.mac == mac || self.more_macs.iter().any(|more| more == mac)
    }
}

impl Pf {
    /// The destinations of a frame from a VF, or from the wire.
    pub(crate) fn destinations(&self, source: Option<usize>, frame: &[u8]) -> Destinations {
        let to = &frame[..6];
        let group = to[0] & 1 == 1;
        let broadcast = *to == [0xff; 6];
        let vlan = tag_of(frame).map(|tag| tag & 0xfff);
        // The table of multicast hashes is one for all; a VF hears it when it has asked for any group.
        let hashed = group && {
            let hash = self.hash(to);
            self.vfs.iter().any(|vf| vf.hashes.contains(&hash))
        };
        let mut exact = false;
        let mut vfs = Vec::new();
        for (index, policy) in self.vfs.iter().enumerate() {
            if !policy.clear_to_send || !policy.hears_vlan(vlan) {
                continue;
            }
            let hears = if broadcast {
                policy.xcast >= Xcast::Multi
            } else if group {
                policy.xcast >= Xcast::AllMulti || policy.xcast == Xcast::Multi && hashed && !policy.hashes.is_empty()
            } else {
                let owns = policy.owns(to);
                exact |= owns;
                owns || policy.xcast == Xcast::Promiscuous
            };
            if hears && source != Some(index) {
                vfs.push(index);
            }
        }
        Destinations {
            vfs,
            wire: source.is_some() && (group || !exact),
        }
    }

    /// Whether a VF may send this frame, as far as addresses go.
    pub(crate) fn is_spoofed(&self, vf: usize, frame: &[u8]) -> bool {
        let policy = &self.vfs[vf];
        let vlan = tag_of(frame).map_or(0, |tag| tag & 0xfff);
        policy.spoof_check && !(policy.owns(&frame[6..12]) && policy.vlans.contains(&vlan))
    }
}

/// The VLAN tag of a frame.
pub(crate) fn tag_of(frame: &[u8]) -> Option<u16> {
    if be16(frame, 12) == Some(VLAN) {
        be16(frame, 14)
    } else {
        None
    }
}

/// Puts a tag into a frame.
pub(crate) fn insert_tag(frame: &mut Vec<u8>, tag: u16) {
    let [high, low] = tag.to_be_bytes();
    let [kind, of] = VLAN.to_be_bytes();
    frame.splice(12..12, [kind, of, high, low]);
}

/// Takes the tag out of a frame.
pub(crate) fn remove_tag(frame: &mut Vec<u8>) -> Option<u16> {
    let tag = tag_of(frame)?;
    frame.drain(12..16);
    Some(tag)
}
