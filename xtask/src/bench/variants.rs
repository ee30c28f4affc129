//! The variants of each side: kinds of rings, and what is negotiated on them.

use super::load::Load;
use super::protocol::Polls;
use super::windows::Variant;

/// A way to set a side up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What reports call it.
    pub name: &'static str,
    /// Further keys of the front-end's spec, each behind a comma.
    pub keys: &'static str,
    /// DPDK's vectorized paths: EAL is to allow AVX-512, and says in its log if it took another path.
    pub vectorized: bool,
}

impl Choice {
    /// What of it matters for a load: the kind of receive buffers changes nothing for who only sends.
    fn matters(&self, load: Load) -> Vec<&'static str> {
        let keys = self.keys.split(',').filter(|key| !key.is_empty());
        keys.filter(|key| load != Load::Tx || !key.starts_with("mrg_rxbuf"))
            .collect()
    }
}

/// Those that differ for a load, from the first and from each other.
pub fn that_differ(choices: &'static [Choice], load: Load) -> impl Iterator<Item = &'static Choice> {
    choices.iter().enumerate().filter_map(move |(i, choice)| {
        let same = |before: &Choice| before.matters(load) == choice.matters(load);
        (!choices[..i].iter().any(same)).then_some(choice)
    })
}

const fn plain(name: &'static str, keys: &'static str) -> Choice {
    Choice {
        name,
        keys,
        vectorized: false,
    }
}

const fn vectorized(name: &'static str, keys: &'static str) -> Choice {
    Choice {
        name,
        keys,
        vectorized: true,
    }
}

/// Ours. The first is what the others are compared with while scouting.
pub const OURS: &[Choice] = &[
    plain("split", ""),
    plain("packed", ",packed_vq=1"),
    plain("split, in_order=0", ",in_order=0"),
    plain("split, mrg_rxbuf=1", ",mrg_rxbuf=1"),
    plain("packed, in_order=0", ",packed_vq=1,in_order=0"),
    plain("packed, mrg_rxbuf=1", ",packed_vq=1,mrg_rxbuf=1"),
];

/// The plugin's, in DPDK's own testpmd.
pub const PLUGIN: &[Choice] = &[
    plain("split", ""),
    plain("packed", ",packed_vq=1"),
    plain("split, in_order=0", ",in_order=0"),
    plain("packed, in_order=0", ",packed_vq=1,in_order=0"),
];

/// virtio_user's: by default its buffers are mergeable and used in order.
pub const VIRTIO_USER: &[Choice] = &[
    plain("split", ""),
    plain("packed", ",packed_vq=1"),
    plain("split, mrg_rxbuf=0", ",mrg_rxbuf=0"),
    plain("split, mrg_rxbuf=0, in_order=0", ",mrg_rxbuf=0,in_order=0"),
    vectorized("split, vectorized", ",mrg_rxbuf=0,in_order=0,vectorized=1"),
    plain("packed, mrg_rxbuf=0", ",packed_vq=1,mrg_rxbuf=0"),
    plain("packed, mrg_rxbuf=0, in_order=0", ",packed_vq=1,mrg_rxbuf=0,in_order=0"),
    vectorized("packed, vectorized", ",packed_vq=1,mrg_rxbuf=0,vectorized=1"),
];

/// memif's.
pub const MEMIF: &[Choice] = &[plain("zero-copy", ",zero-copy=yes"), plain("copy", "")];

/// Shares of polls that moved packets, of the two sides: the side whose polls are all busy is the bottleneck.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Busy {
    /// The front-end's, 0 to 1.
    pub front: Option<f64>,
    /// The back-end's.
    pub back: Option<f64>,
}

/// A variant that takes loads.
pub trait Subject: Variant {
    /// Sets a load up, with frames of `size` bytes, and leaves it stopped.
    fn prepare(&mut self, load: Load, size: usize) -> anyhow::Result<()>;
    /// Begins to count polls, while it runs.
    fn begin_polls(&mut self) -> anyhow::Result<()>;
    /// Ends that.
    fn end_polls(&mut self) -> anyhow::Result<Busy>;
}

/// Polls of a worker of ours, between two looks.
#[derive(Default)]
pub struct Look(Polls);

impl Look {
    /// Begins.
    pub fn begin(&mut self, polls: Polls) {
        self.0 = polls;
    }

    /// The share of busy polls since then.
    pub fn end(&self, polls: Polls) -> Option<f64> {
        polls.since(self.0).share()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for choices in [OURS, PLUGIN, VIRTIO_USER, MEMIF] {
            let names: std::collections::BTreeSet<_> = choices.iter().map(|c| c.name).collect();
            assert_eq!(names.len(), choices.len());
        }
    }

    #[test]
    fn what_only_sends_has_no_kinds_of_receive_buffers() {
        let names = |choices, load| that_differ(choices, load).map(|c| c.name).collect::<Vec<_>>();
        let sending = ["split", "packed", "split, in_order=0", "packed, in_order=0"];
        assert_eq!(names(OURS, Load::Tx), sending);
        for choices in [OURS, PLUGIN, VIRTIO_USER, MEMIF] {
            for load in [Load::Rx, Load::Loop(32)] {
                assert_eq!(names(choices, load).len(), choices.len());
            }
        }
        assert_eq!(names(VIRTIO_USER, Load::Tx).len(), VIRTIO_USER.len() - 2);
    }

    #[test]
    fn our_keys_are_known() {
        for choice in OURS {
            let spec: usernic::spec::PortSpec = format!("virtio-user,path=/tmp/s{}", choice.keys).parse().unwrap();
            assert_eq!(spec.packed, choice.name.starts_with("packed"), "{}", choice.name);
        }
    }
}
