//! What the device does to frames on their way out, and the context descriptors that tell it.

use crate::{Error, MAX_FRAME};

/// 82599 datasheet §7.2.3.2.3 and §7.2.3.2.4. `cmd_type_len` and `type_tucmd_mlhl`.
pub(crate) mod command {
    pub(crate) const DTYP_CONTEXT: u32 = 2 << 20;
    pub(crate) const DTYP_DATA: u32 = 3 << 20;
    pub(crate) const EOP: u32 = 1 << 24;
    pub(crate) const IFCS: u32 = 1 << 25;
    pub(crate) const RS: u32 = 1 << 27;
    pub(crate) const DEXT: u32 = 1 << 29;
    pub(crate) const VLE: u32 = 1 << 30;
    pub(crate) const TSE: u32 = 1 << 31;
    /// Of every data descriptor.
    pub(crate) const DATA: u32 = DTYP_DATA | IFCS | DEXT;
}

/// `olinfo_status`.
pub(crate) mod olinfo {
    /// Written back.
    pub(crate) const DD: u32 = 1 << 0;
    pub(crate) const IDX_SHIFT: u32 = 4;
    /// There is a context: on a VF always, since its packets pass the switch. Where the PF has malicious-driver detection
    /// (X550 and later), it stops a queue that sends without one.
    pub(crate) const CC: u32 = 1 << 7;
    pub(crate) const IXSM: u32 = 1 << 8;
    pub(crate) const TXSM: u32 = 2 << 8;
    pub(crate) const PAYLEN_SHIFT: u32 = 14;
}

/// `type_tucmd_mlhl` of a context.
mod tucmd {
    pub(crate) const IPV4: u32 = 1 << 10;
    pub(crate) const L4T_TCP: u32 = 1 << 11;
    pub(crate) const L4T_SCTP: u32 = 2 << 11;
    pub(crate) const L4T_NONE: u32 = 3 << 11;
}

/// The shortest frame that the device takes.
pub const MIN_FRAME: u16 = 17;

/// The most payload that PAYLEN can say.
const MAX_PAYLOAD: u64 = (1 << 18) - 1;

/// Whose checksum the device puts in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum L4 {
    /// Nobody's.
    #[default]
    None,
    /// TCP's. The field must hold the checksum of the pseudo header (for segmentation with a length of 0).
    Tcp,
    /// UDP's. The field must hold the checksum of the pseudo header.
    Udp,
    /// SCTP's.
    Sctp,
}

/// TCP segmentation: one frame goes in, as many as needed go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Bytes of the TCP header.
    pub header_len: u8,
    /// Bytes of payload in each frame that goes out.
    pub mss: u16,
}

/// What the device is to do to a frame. The default is nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Bytes of the Ethernet header, VLAN tags in the frame with it: 14 to 127.
    pub l2_len: u8,
    /// Bytes of the IP header with its extensions: up to 511. Only looked at for checksums and segmentation.
    pub l3_len: u16,
    /// The IP header is version 4.
    pub ipv4: bool,
    /// Put the IPv4 header's checksum in.
    pub ip_checksum: bool,
    /// Put a transport checksum in.
    pub l4: L4,
    /// Insert a VLAN tag: priority, DEI and id.
    pub vlan: Option<u16>,
    /// Cut into segments. Needs [`L4::Tcp`], and with IPv4 its checksum.
    pub segmentation: Option<Segmentation>,
}

impl Default for Offload {
    fn default() -> Self {
        Self::NONE
    }
}

/// What a context descriptor says, but for its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    /// `vlan_macip_lens`.
    pub(crate) headers: u32,
    /// `type_tucmd_mlhl`.
    pub(crate) kind: u32,
    /// `mss_l4len_idx`.
    pub(crate) segments: u32,
}

impl Context {
    const KIND: u32 = command::DTYP_CONTEXT | command::DEXT;

    /// For frames that nothing is done to: an Ethernet header is all that it says.
    pub(crate) const PLAIN: Context = Context {
        headers: 14 << 9,
        kind: Self::KIND | tucmd::L4T_NONE,
        segments: 0,
    };
}

/// A frame's offload as the data descriptors say it, but for the context's index and the payload's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) context: Context,
    pub(crate) command: u32,
    pub(crate) olinfo: u32,
    /// What of the frame's length PAYLEN leaves out.
    pub(crate) headers: u32,
}

impl Offload {
    /// Nothing.
    pub const NONE: Offload = Offload {
        l2_len: 14,
        l3_len: 0,
        ipv4: false,
        ip_checksum: false,
        l4: L4::None,
        vlan: None,
        segmentation: None,
    };

    #[cold]
    pub(crate) fn encode(&self) -> Result<Encoded, Error> {
        if *self == Self::NONE {
            return Ok(Encoded::PLAIN);
        }
        let mut command = command::DATA;
        let mut olinfo = olinfo::CC;
        let mut headers = 0;
        if !(14..=127).contains(&self.l2_len) {
            return Err(Error::Offload("an Ethernet header has 14 to 127 bytes"));
        }
        let mut context = Context {
            headers: u32::from(self.l2_len) << 9,
            ..Context::PLAIN
        };
        let l4 = match self.l4 {
            L4::None => tucmd::L4T_NONE,
            L4::Tcp => tucmd::L4T_TCP,
            L4::Udp => 0,
            L4::Sctp => tucmd::L4T_SCTP,
        };
        context.kind = Context::KIND | l4;
        if self.ip_checksum || self.l4 != L4::None {
            let least = if self.ipv4 { 20 } else { 40 };
            if !(least..=511).contains(&self.l3_len) {
                return Err(Error::Offload(
                    "an IPv4 header has 20 bytes at least, an IPv6 header 40, at most 511",
                ));
            }
            context.headers |= u32::from(self.l3_len);
        }
        if self.ipv4 {
            context.kind |= tucmd::IPV4;
        }
        if self.ip_checksum {
            if !self.ipv4 {
                return Err(Error::Offload("only an IPv4 header has a checksum"));
            }
            olinfo |= olinfo::IXSM;
        }
        if self.l4 != L4::None {
            olinfo |= olinfo::TXSM;
        }
        if let Some(tag) = self.vlan {
            context.headers |= u32::from(tag) << 16;
            command |= command::VLE;
        }
        if let Some(Segmentation { header_len, mss }) = self.segmentation {
            if self.l4 != L4::Tcp || self.ipv4 != self.ip_checksum {
                return Err(Error::Offload("segmentation needs L4::Tcp, and with IPv4 its checksum"));
            }
            headers = u32::from(self.l2_len) + u32::from(self.l3_len) + u32::from(header_len);
            if header_len < 20 || mss == 0 || headers + u32::from(mss) > u32::from(MAX_FRAME) {
                return Err(Error::Offload(
                    "segmentation needs a TCP header of 20 bytes at least, and segments that fit a frame",
                ));
            }
            context.segments = u32::from(header_len) << 8 | u32::from(mss) << 16;
            command |= command::TSE;
        }
        Ok(Encoded {
            context,
            command,
            olinfo,
            headers,
        })
    }
}

impl Encoded {
    /// Nothing is done.
    pub(crate) const PLAIN: Encoded = Encoded {
        context: Context::PLAIN,
        command: command::DATA,
        olinfo: olinfo::CC,
        headers: 0,
    };

    /// PAYLEN for a frame of `len` bytes.
    #[inline]
    pub(crate) fn payload(&self, len: u64) -> Result<u32, Error> {
        let headers = u64::from(self.headers);
        let fits = if self.command & command::TSE != 0 {
            len > headers && len - headers <= MAX_PAYLOAD
        } else {
            (u64::from(MIN_FRAME)..=u64::from(MAX_FRAME)).contains(&len)
        };
        if fits {
            Ok(len as u32 - self.headers)
        } else {
            Err(Error::FrameLen(len))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP4: Offload = Offload {
        l3_len: 20,
        ipv4: true,
        ip_checksum: true,
        l4: L4::Tcp,
        ..Offload::NONE
    };

    #[test]
    fn nothing_still_has_a_context() {
        let encoded = Offload::NONE.encode().unwrap();
        assert_eq!(
            encoded.context,
            Context {
                headers: 0x1c00,
                kind: 0x2020_1800,
                segments: 0
            }
        );
        assert_eq!((encoded.command, encoded.olinfo), (0x2230_0000, 0x80));
        assert_eq!(encoded.payload(64), Ok(64));
        for len in [0, 16, 9729, 1 << 40] {
            assert_eq!(encoded.payload(len), Err(Error::FrameLen(len)));
        }
    }

    #[test]
    fn checksums() {
        let encoded = TCP4.encode().unwrap();
        assert_eq!(
            encoded.context,
            Context {
                headers: 0x1c14,
                kind: 0x2020_0c00,
                segments: 0
            }
        );
        assert_eq!(encoded.olinfo, 0x380);
        let udp6 = Offload {
            l3_len: 40,
            l4: L4::Udp,
            ..Offload::NONE
        }
        .encode()
        .unwrap();
        assert_eq!(
            udp6.context,
            Context {
                headers: 0x1c28,
                kind: 0x2020_0000,
                segments: 0
            }
        );
        assert_eq!(udp6.olinfo, 0x280);
        let sctp = Offload {
            l4: L4::Sctp,
            ip_checksum: false,
            ..TCP4
        }
        .encode()
        .unwrap();
        assert_eq!((sctp.context.kind, sctp.olinfo), (0x2020_1400, 0x280));
        let ip = Offload { l4: L4::None, ..TCP4 }.encode().unwrap();
        assert_eq!((ip.context.kind, ip.olinfo), (0x2020_1c00, 0x180));
    }

    #[test]
    fn tags() {
        let encoded = Offload {
            vlan: Some(0x6123),
            l2_len: 18,
            ..Offload::NONE
        }
        .encode()
        .unwrap();
        assert_eq!(encoded.context.headers, 0x6123_2400);
        assert_eq!(encoded.command, 0x6230_0000);
    }

    #[test]
    fn segmentation() {
        let tso = Offload {
            segmentation: Some(Segmentation {
                header_len: 32,
                mss: 1448,
            }),
            ..TCP4
        };
        let encoded = tso.encode().unwrap();
        assert_eq!(encoded.context.segments, 0x05a8_2000);
        assert_eq!((encoded.command, encoded.headers), (0xa230_0000, 66));
        assert_eq!(encoded.payload(66 + 60_000), Ok(60_000));
        assert_eq!(encoded.payload(66 + MAX_PAYLOAD), Ok(0x3_ffff));
        for len in [66, 66 + MAX_PAYLOAD + 1] {
            assert_eq!(encoded.payload(len), Err(Error::FrameLen(len)));
        }
    }

    #[test]
    fn what_does_not_go_together() {
        for offload in [
            Offload { l2_len: 13, ..TCP4 },
            Offload { l2_len: 128, ..TCP4 },
            Offload { l3_len: 19, ..TCP4 },
            Offload { l3_len: 512, ..TCP4 },
            Offload {
                ipv4: false,
                l3_len: 40,
                ..TCP4
            },
            Offload {
                ipv4: false,
                ip_checksum: false,
                l3_len: 39,
                ..TCP4
            },
            Offload {
                l4: L4::Udp,
                segmentation: Some(Segmentation {
                    header_len: 20,
                    mss: 1448,
                }),
                ..TCP4
            },
            Offload {
                ip_checksum: false,
                segmentation: Some(Segmentation {
                    header_len: 20,
                    mss: 1448,
                }),
                ..TCP4
            },
            Offload {
                segmentation: Some(Segmentation {
                    header_len: 19,
                    mss: 1448,
                }),
                ..TCP4
            },
            Offload {
                segmentation: Some(Segmentation { header_len: 20, mss: 0 }),
                ..TCP4
            },
            Offload {
                segmentation: Some(Segmentation {
                    header_len: 20,
                    mss: 9700,
                }),
                ..TCP4
            },
        ] {
            assert!(matches!(offload.encode(), Err(Error::Offload(_))), "{offload:?}");
        }
    }
}
