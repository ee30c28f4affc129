//! The network device (virtio 1.3 §5.1): the header before each packet, the configuration space, the control queue.

mod config;
mod control;
mod header;
mod request;

pub use config::{Config, Duplex, HashTypes, SPEED_UNKNOWN, Status};
pub use control::{Ack, Class, Command, MQ_VQ_PAIRS_MAX, MQ_VQ_PAIRS_MIN};
pub use header::{GsoType, HashReport, Header, HeaderFlags, header_len};
pub use request::{GUEST_OFFLOADS, HashConfig, MacList, Refused, Request, RssConfig, RxMode, VLANS};
