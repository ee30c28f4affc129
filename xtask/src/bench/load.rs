//! What the two sides of a throughput metric do.

/// Seen from the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It sends: a fresh buffer and 42 bytes of headers each; the back-end receives and frees unread.
    Tx,
    /// It receives and frees unread; the back-end sends likewise.
    Rx,
    /// Both send back what they receive; so many packets are on their way.
    Loop(u32),
}

/// Which of the back-end's counters tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Packets that it received.
    Received,
    /// Packets that it sent.
    Sent,
}

impl Load {
    /// The loads of the throughput metrics.
    pub const ALL: [Load; 4] = [Load::Tx, Load::Rx, Load::Loop(32), Load::Loop(512)];

    /// The last part of the metric's name.
    pub fn name(self) -> String {
        match self {
            Load::Tx => "tx".into(),
            Load::Rx => "rx".into(),
            Load::Loop(n) => format!("loop{n}"),
        }
    }

    /// Which of the back-end's counters tells.
    pub fn counted(self) -> Counted {
        if self == Load::Rx {
            Counted::Sent
        } else {
            Counted::Received
        }
    }
}
