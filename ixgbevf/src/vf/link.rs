//! Link state and speed.

use super::Vf;
use crate::access::Registers;
use crate::message::{Api, Request};
use crate::regs::VFLINKS;
use crate::regs::links::{NON_STANDARD, SPEED, SPEED_1G, SPEED_10G, SPEED_100M, UP};
use crate::{Delay, Error, Model, Reason};
use core::fmt;

/// The speed of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Speed {
    /// 10 Mb/s.
    M10,
    /// 100 Mb/s.
    M100,
    /// 1 Gb/s.
    G1,
    /// 2.5 Gb/s.
    G2_5,
    /// 5 Gb/s.
    G5,
    /// 10 Gb/s.
    G10,
}

impl Speed {
    /// In Mb/s.
    pub const fn mbps(self) -> u32 {
        match self {
            Speed::M10 => 10,
            Speed::M100 => 100,
            Speed::G1 => 1_000,
            Speed::G2_5 => 2_500,
            Speed::G5 => 5_000,
            Speed::G10 => 10_000,
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Mb/s", self.mbps())
    }
}

/// The link of the port that the VF is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Down, or the PF was reset.
    Down,
    /// Up.
    Up(Speed),
}

/// VFLINKS decoded.
fn decode(model: Model, links: u32) -> Link {
    if links & UP == 0 || links == u32::MAX {
        return Link::Down;
    }
    let odd = model.has_own_rss() && links & NON_STANDARD != 0;
    Link::Up(match (links & SPEED, odd) {
        (SPEED_10G, false) => Speed::G10,
        (SPEED_10G, true) => Speed::G2_5,
        (SPEED_1G, _) => Speed::G1,
        (SPEED_100M, false) => Speed::M100,
        (SPEED_100M, true) => Speed::G5,
        _ => Speed::M10,
    })
}

impl<R: Registers, D: Delay> Vf<R, D> {
    /// The link as VFLINKS has it now: one read. A VF that its PF does not know has none.
    pub fn link(&self) -> Link {
        if self.is_known() {
            decode(self.model, self.regs.read(VFLINKS))
        } else {
            Link::Down
        }
    }

    /// The link, if it is there to stay: on an 82599 the bit flickers while a link comes up, and five more looks, 100 us
    /// apart, must all show it.
    pub fn settled_link(&mut self) -> Link {
        let mut link = self.link();
        for _ in 0..5 {
            if link == Link::Down || self.model != Model::I82599 {
                break;
            }
            self.delay.delay_us(100);
            link = self.link();
        }
        link
    }

    /// Asks the PF whether its administrator lets this VF have a link at all (GET_LINK_STATE).
    ///
    /// # Errors
    /// [`Error::Unsupported`] before API 1.2; those of the mailbox.
    pub fn is_link_enabled(&mut self) -> Result<bool, Error> {
        self.need(Api::V1_2)?;
        let request = Request::GetLinkState;
        let mut answer = [0; 2];
        self.ask(request, &[request.word(), 0], &mut answer)?;
        Ok(answer[1] != 0)
    }

    /// That the PF speaks at least `needed`.
    pub(super) fn need(&self, needed: Api) -> Result<(), Error> {
        self.check_standing()?;
        if self.api < needed {
            return Err(Error::Unsupported(Reason::Api {
                needed,
                negotiated: self.api,
            }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds() {
        let up = |links| decode(Model::I82599, UP | links);
        assert_eq!(up(0x3000_0000), Link::Up(Speed::G10));
        assert_eq!(up(0x2000_0000), Link::Up(Speed::G1));
        assert_eq!(up(0x1000_0000), Link::Up(Speed::M100));
        assert_eq!(decode(Model::I82599, 0x3000_0000), Link::Down);
        assert_eq!(decode(Model::I82599, u32::MAX), Link::Down);
        // The odd speeds are the X550's.
        assert_eq!(up(0x3800_0000), Link::Up(Speed::G10));
        let up = |links| decode(Model::X550EmA, UP | links);
        assert_eq!(up(0x3800_0000), Link::Up(Speed::G2_5));
        assert_eq!(up(0x1800_0000), Link::Up(Speed::G5));
        assert_eq!(up(0x1000_0000), Link::Up(Speed::M100));
        assert_eq!(up(0), Link::Up(Speed::M10));
        assert_eq!(Speed::G2_5.mbps(), 2500);
    }
}
