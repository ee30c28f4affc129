//! Messages between VF and PF: the numbers, as PF drivers of today speak them (API 1.0 to 1.3).

/// The PF agrees.
pub const SUCCESS: u32 = 0x8000_0000;
/// The PF refuses.
pub const FAILURE: u32 = 0x4000_0000;
/// Clear to send: the PF knows this VF since its last reset.
pub const CTS: u32 = 0x2000_0000;
/// Where the argument of the first word begins.
pub const INFO_SHIFT: u32 = 16;

/// What a VF asks for: the low 16 bits of the first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// 0x01.
    Reset,
    /// 0x02.
    SetMac,
    /// 0x03.
    SetMulticast,
    /// 0x04.
    SetVlan,
    /// 0x05: longest frame, CRC included.
    SetMaxFrame,
    /// 0x06: one more unicast address.
    SetMacVlan,
    /// 0x08.
    Negotiate,
    /// 0x09, API 1.1.
    GetQueues,
    /// 0x0a, API 1.2.
    GetReta,
    /// 0x0b, API 1.2.
    GetRssKey,
    /// 0x0c, API 1.2.
    UpdateXcast,
    /// 0x10, API 1.2.
    GetLinkState,
}

impl Request {
    /// The request that the first word of a message names.
    #[must_use]
    pub fn of(word: u32) -> Option<Self> {
        Some(match word & 0xffff {
            0x01 => Self::Reset,
            0x02 => Self::SetMac,
            0x03 => Self::SetMulticast,
            0x04 => Self::SetVlan,
            0x05 => Self::SetMaxFrame,
            0x06 => Self::SetMacVlan,
            0x08 => Self::Negotiate,
            0x09 => Self::GetQueues,
            0x0a => Self::GetReta,
            0x0b => Self::GetRssKey,
            0x0c => Self::UpdateXcast,
            0x10 => Self::GetLinkState,
            _ => return None,
        })
    }
}

/// The PF's own message: it resets, or the link has changed.
pub const CONTROL: u32 = 0x0100;

/// The mailbox interface's version, in the order of time. (2.0, whose wire value is 1, is not spoken.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Api {
    /// 1.0: what a VF speaks that negotiates nothing.
    #[default]
    V10,
    /// 1.1: queues; jumbo frames on 82599.
    V11,
    /// 1.2: RSS, multicast modes, link state.
    V12,
    /// 1.3: promiscuous mode.
    V13,
}

impl Api {
    /// By its wire value.
    #[must_use]
    pub fn of(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::V10,
            2 => Self::V11,
            3 => Self::V12,
            4 => Self::V13,
            _ => return None,
        })
    }
}

/// What UPDATE_XCAST_MODE asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Xcast {
    /// Neither broadcast nor multicast.
    None = 0,
    /// Broadcast, and the multicast groups asked for.
    #[default]
    Multi = 1,
    /// All multicast.
    AllMulti = 2,
    /// Everything.
    Promiscuous = 3,
}

impl Xcast {
    /// By its wire value.
    #[must_use]
    pub fn of(value: u32) -> Option<Self> {
        [Self::None, Self::Multi, Self::AllMulti, Self::Promiscuous]
            .into_iter()
            .find(|mode| *mode as u32 == value)
    }
}
