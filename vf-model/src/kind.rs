//! Which chip the model is of.

use std::fmt;
use std::str::FromStr;

/// The chip, as far as its virtual functions differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 82599: RSS shared with the PF, one maximum frame for all.
    I82599,
    /// X540: RSS shared with the PF.
    X540,
    /// X550: an RSS key and table of each VF's own.
    X550,
}

impl Kind {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::I82599, Self::X540, Self::X550];

    /// PCI device id of the virtual function; the vendor is 0x8086.
    #[must_use]
    pub fn device_id(self) -> u16 {
        match self {
            Self::I82599 => 0x10ed,
            Self::X540 => 0x1515,
            Self::X550 => 0x1565,
        }
    }

    /// Whether a VF has VFMRQC, VFRSSRK and VFRETA.
    #[must_use]
    pub fn has_own_rss(self) -> bool {
        self == Self::X550
    }

    /// Whether RXDCTL.RLPML limits the frames of one queue (X540 on).
    #[must_use]
    pub fn limits_queue_frames(self) -> bool {
        self != Self::I82599
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I82599 => "82599",
            Self::X540 => "x540",
            Self::X550 => "x550",
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| format!("{text:?} is no kind of device: 82599, x540 or x550"))
    }
}
