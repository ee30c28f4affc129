//! Which virtual functions there are.

use crate::Error;
use core::fmt;

/// The PCI vendor of all of them.
pub const VENDOR: u16 = 0x8086;

/// A kind of virtual function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Model {
    /// 82599 (10ED).
    I82599,
    /// X540 (1515).
    X540,
    /// X550 (1565).
    X550,
    /// X550EM_x, in the Xeon D-1500 (15A8).
    X550EmX,
    /// X550EM_a, in the Atom C3000 (15C5).
    X550EmA,
}

/// Id, id of the variant for guests of Hyper-V, and that one's name.
const IDS: [(Model, u16, u16, &str); 5] = [
    (Model::I82599, 0x10ed, 0x152e, "82599 VF for Hyper-V"),
    (Model::X540, 0x1515, 0x1530, "X540 VF for Hyper-V"),
    (Model::X550, 0x1565, 0x1564, "X550 VF for Hyper-V"),
    (Model::X550EmX, 0x15a8, 0x15a9, "X550EM_X VF for Hyper-V"),
    (Model::X550EmA, 0x15c5, 0x15b4, "X550EM_A VF for Hyper-V"),
];

impl Model {
    /// The model with these PCI ids.
    ///
    /// # Errors
    /// [`Error::HyperV`] for the variants that guests of Hyper-V see: they have no mailbox, so that none of what this
    /// driver needs of the PF can be asked for. [`Error::UnknownDevice`] for anything else.
    pub const fn identify(vendor: u16, device: u16) -> Result<Self, Error> {
        let mut i = 0;
        while i < IDS.len() && vendor == VENDOR {
            let (model, id, hyper_v, name) = IDS[i];
            if device == id {
                return Ok(model);
            }
            if device == hyper_v {
                return Err(Error::HyperV { device, name });
            }
            i += 1;
        }
        Err(Error::UnknownDevice { vendor, device })
    }

    /// The PCI device id.
    pub const fn device(self) -> u16 {
        match self {
            Model::I82599 => 0x10ed,
            Model::X540 => 0x1515,
            Model::X550 => 0x1565,
            Model::X550EmX => 0x15a8,
            Model::X550EmA => 0x15c5,
        }
    }

    /// Whether the RSS key and table are the VF's own. On the 82599 and the X540 it shares the PF's, which it can only
    /// ask for.
    pub const fn has_own_rss(self) -> bool {
        !matches!(self, Model::I82599 | Model::X540)
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Model::I82599 => "82599 VF",
            Model::X540 => "X540 VF",
            Model::X550 => "X550 VF",
            Model::X550EmX => "X550EM_X VF",
            Model::X550EmA => "X550EM_A VF",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id() {
        for (model, id, hyper_v, name) in IDS {
            assert_eq!(Model::identify(0x8086, id), Ok(model));
            assert_eq!(model.device(), id);
            assert_eq!(
                Model::identify(0x8086, hyper_v),
                Err(Error::HyperV { device: hyper_v, name })
            );
            assert!(name.starts_with(&model.to_string()));
        }
        for (vendor, device) in [(0x8086, 0x10fb), (0x8086, 0x57ad), (0x1af4, 0x10ed)] {
            assert_eq!(
                Model::identify(vendor, device),
                Err(Error::UnknownDevice { vendor, device })
            );
        }
    }

    #[test]
    fn who_has_a_table() {
        let own = [Model::X550, Model::X550EmX, Model::X550EmA];
        assert!(own.iter().all(|model| model.has_own_rss()));
        assert!(!Model::I82599.has_own_rss() && !Model::X540.has_own_rss());
    }
}
