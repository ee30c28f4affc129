//! Requests, headers, and what each message must look like.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a message header (vhost-user.rst, Message Specification).
pub const HEADER: usize = 12;

/// The longest payload that is taken: of GET_CONFIG and SET_CONFIG, 12 bytes and a configuration space of 256.
pub const MAX_PAYLOAD: usize = 512;

/// Descriptors that one message carries at the most: a memory table of 8 regions.
pub const MAX_FDS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// The header of a message, as it is on the wire: in the byte order of the machine, which is little-endian on all that
/// this crate was built for (the specification says "native").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    request: U32,
    flags: U32,
    size: U32,
}

static_assertions::const_assert_eq!(size_of::<Header>(), HEADER);

impl Header {
    /// The header of a request.
    pub const fn request(code: u32, size: u32, need_reply: bool) -> Self {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        Header {
            request: U32::new(code),
            flags: U32::new(flags),
            size: U32::new(size),
        }
    }

    /// The header of a reply.
    pub const fn reply(code: u32, size: u32) -> Self {
        Header {
            request: U32::new(code),
            flags: U32::new(VERSION | REPLY),
            size: U32::new(size),
        }
    }

    /// The number of the request.
    pub const fn code(&self) -> u32 {
        self.request.get()
    }

    /// The flags: version, reply, need-reply.
    pub const fn flags(&self) -> u32 {
        self.flags.get()
    }

    /// Bytes of payload.
    pub const fn size(&self) -> u32 {
        self.size.get()
    }

    /// Version 1, the only one.
    pub const fn version_is_known(&self) -> bool {
        self.flags.get() & VERSION_MASK == VERSION
    }

    /// It answers a request.
    pub const fn is_reply(&self) -> bool {
        self.flags.get() & REPLY != 0
    }

    /// Its sender waits for an answer (REPLY_ACK).
    pub const fn needs_reply(&self) -> bool {
        self.flags.get() & NEED_REPLY != 0
    }
}

/// What a message's payload is, for its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Exactly so many bytes.
    Exact(u32),
    /// At least so many, up to [`MAX_PAYLOAD`]: checked further by who reads it.
    AtLeast(u32),
}

/// Descriptors that go with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fds {
    /// None.
    None,
    /// Exactly one.
    One,
    /// One, unless bit 8 of the payload says that there is none.
    Vring,
    /// One for each region of the table.
    Table,
    /// None, or one that is closed.
    AtMostOne,
}

/// How a message is answered when its sender does not ask for an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Not at all.
    None,
    /// With a payload of its own.
    Always,
}

macro_rules! messages {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $code:literal, $shape:expr, $fds:expr, $answer:expr, $wire:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name { $($(#[$doc])* $variant = $code),* }

        impl $name {
            /// All of them, by number.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The message of this number.
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// Its number.
            pub const fn code(self) -> u32 {
                self as u32
            }

            /// Its name, as the specification writes it, without prefix.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $wire),* }
            }

            /// Its payload.
            pub const fn shape(self) -> Shape {
                use Shape::*;
                match self { $(Self::$variant => $shape),* }
            }

            /// Its descriptors.
            pub const fn fds(self) -> Fds {
                match self { $(Self::$variant => $fds),* }
            }

            /// Its answer.
            pub const fn answer(self) -> Answer {
                match self { $(Self::$variant => $answer),* }
            }
        }
    };
}

messages! {
    /// What a front-end sends (vhost-user.rst, Front-end message types).
    Request {
        /// The virtio features that the back-end offers.
        GetFeatures = 1, Exact(0), Fds::None, Answer::Always, "GET_FEATURES";
        /// The virtio features that are used.
        SetFeatures = 2, Exact(8), Fds::None, Answer::None, "SET_FEATURES";
        /// This connection is the session's.
        SetOwner = 3, Exact(0), Fds::None, Answer::None, "SET_OWNER";
        /// Deprecated, and to be ignored.
        ResetOwner = 4, Exact(0), Fds::None, Answer::None, "RESET_OWNER";
        /// All regions of memory.
        SetMemTable = 5, AtLeast(8), Fds::Table, Answer::None, "SET_MEM_TABLE";
        /// The log of dirty pages.
        SetLogBase = 6, Exact(16), Fds::AtMostOne, Answer::Always, "SET_LOG_BASE";
        /// What is signalled when the log is written.
        SetLogFd = 7, AtLeast(0), Fds::AtMostOne, Answer::None, "SET_LOG_FD";
        /// The size of a ring.
        SetVringNum = 8, Exact(8), Fds::None, Answer::None, "SET_VRING_NUM";
        /// Where a ring is.
        SetVringAddr = 9, Exact(40), Fds::None, Answer::None, "SET_VRING_ADDR";
        /// Where a ring begins.
        SetVringBase = 10, Exact(8), Fds::None, Answer::None, "SET_VRING_BASE";
        /// Stops a ring, and asks where it was.
        GetVringBase = 11, Exact(8), Fds::None, Answer::Always, "GET_VRING_BASE";
        /// What the front-end signals when it has made buffers available.
        SetVringKick = 12, Exact(8), Fds::Vring, Answer::None, "SET_VRING_KICK";
        /// What the back-end signals when it has used buffers.
        SetVringCall = 13, Exact(8), Fds::Vring, Answer::None, "SET_VRING_CALL";
        /// What the back-end signals when a ring is broken.
        SetVringErr = 14, Exact(8), Fds::Vring, Answer::None, "SET_VRING_ERR";
        /// The protocol features that the back-end offers.
        GetProtocolFeatures = 15, Exact(0), Fds::None, Answer::Always, "GET_PROTOCOL_FEATURES";
        /// The protocol features that are used.
        SetProtocolFeatures = 16, Exact(8), Fds::None, Answer::None, "SET_PROTOCOL_FEATURES";
        /// How many queues the back-end has (MQ).
        GetQueueNum = 17, Exact(0), Fds::None, Answer::Always, "GET_QUEUE_NUM";
        /// Enables a ring, or disables it.
        SetVringEnable = 18, Exact(8), Fds::None, Answer::None, "SET_VRING_ENABLE";
        /// A guest moved: announce its address (RARP).
        SendRarp = 19, Exact(8), Fds::None, Answer::None, "SEND_RARP";
        /// The MTU (MTU).
        NetSetMtu = 20, Exact(8), Fds::None, Answer::None, "NET_SET_MTU";
        /// The socket for requests of the back-end (BACKEND_REQ).
        SetBackendReqFd = 21, Exact(0), Fds::One, Answer::None, "SET_BACKEND_REQ_FD";
        /// An update of the I/O translation buffer.
        IotlbMsg = 22, Exact(32), Fds::None, Answer::None, "IOTLB_MSG";
        /// The byte order of a legacy ring (CROSS_ENDIAN).
        SetVringEndian = 23, Exact(8), Fds::None, Answer::None, "SET_VRING_ENDIAN";
        /// A piece of the configuration space (CONFIG).
        GetConfig = 24, AtLeast(12), Fds::None, Answer::Always, "GET_CONFIG";
        /// Writes a piece of the configuration space (CONFIG).
        SetConfig = 25, AtLeast(12), Fds::None, Answer::None, "SET_CONFIG";
        /// Crypto sessions (CRYPTO_SESSION).
        CreateCryptoSession = 26, AtLeast(0), Fds::None, Answer::Always, "CREATE_CRYPTO_SESSION";
        /// Crypto sessions (CRYPTO_SESSION).
        CloseCryptoSession = 27, Exact(8), Fds::None, Answer::None, "CLOSE_CRYPTO_SESSION";
        /// Post-copy migration (PAGEFAULT).
        PostcopyAdvise = 28, Exact(0), Fds::None, Answer::Always, "POSTCOPY_ADVISE";
        /// Post-copy migration (PAGEFAULT).
        PostcopyListen = 29, Exact(0), Fds::None, Answer::None, "POSTCOPY_LISTEN";
        /// Post-copy migration (PAGEFAULT).
        PostcopyEnd = 30, Exact(0), Fds::None, Answer::Always, "POSTCOPY_END";
        /// Makes the memory in which buffers in flight are tracked (INFLIGHT_SHMFD).
        GetInflightFd = 31, AtLeast(20), Fds::None, Answer::Always, "GET_INFLIGHT_FD";
        /// Gives that memory to a new back-end (INFLIGHT_SHMFD).
        SetInflightFd = 32, AtLeast(20), Fds::One, Answer::None, "SET_INFLIGHT_FD";
        /// The socket of a GPU.
        GpuSetSocket = 33, Exact(0), Fds::One, Answer::None, "GPU_SET_SOCKET";
        /// Resets the device (RESET_DEVICE).
        ResetDevice = 34, Exact(0), Fds::None, Answer::None, "RESET_DEVICE";
        /// A kick in the socket (INBAND_NOTIFICATIONS).
        VringKick = 35, Exact(8), Fds::None, Answer::None, "VRING_KICK";
        /// How many regions the back-end takes (CONFIGURE_MEM_SLOTS).
        GetMaxMemSlots = 36, Exact(0), Fds::None, Answer::Always, "GET_MAX_MEM_SLOTS";
        /// One more region (CONFIGURE_MEM_SLOTS).
        AddMemReg = 37, Exact(40), Fds::One, Answer::None, "ADD_MEM_REG";
        /// One region less (CONFIGURE_MEM_SLOTS). A descriptor should not come with it and is closed if it does.
        RemMemReg = 38, Exact(40), Fds::AtMostOne, Answer::None, "REM_MEM_REG";
        /// The device status (STATUS).
        SetStatus = 39, Exact(8), Fds::None, Answer::None, "SET_STATUS";
        /// The device status (STATUS).
        GetStatus = 40, Exact(0), Fds::None, Answer::Always, "GET_STATUS";
        /// An object shared between devices (SHARED_OBJECT).
        GetSharedObject = 41, Exact(16), Fds::None, Answer::Always, "GET_SHARED_OBJECT";
        /// A channel for the device's state (DEVICE_STATE).
        SetDeviceStateFd = 42, Exact(8), Fds::One, Answer::Always, "SET_DEVICE_STATE_FD";
        /// Whether that went well (DEVICE_STATE).
        CheckDeviceState = 43, Exact(0), Fds::None, Answer::Always, "CHECK_DEVICE_STATE";
        /// The sizes of the device's shared memory regions (SHMEM).
        GetShmemConfig = 44, Exact(0), Fds::None, Answer::Always, "GET_SHMEM_CONFIG";
    }
}

messages! {
    /// What a back-end sends on its own channel (vhost-user.rst, Back-end message types).
    BackendRequest {
        /// A miss or fault of the I/O translation buffer.
        IotlbMsg = 1, Exact(32), Fds::None, Answer::None, "BACKEND_IOTLB_MSG";
        /// The configuration space changed.
        ConfigChangeMsg = 2, Exact(0), Fds::None, Answer::None, "BACKEND_CONFIG_CHANGE_MSG";
        /// Where the guest can notify the device itself.
        VringHostNotifierMsg = 3, Exact(24), Fds::AtMostOne, Answer::None, "BACKEND_VRING_HOST_NOTIFIER_MSG";
        /// A call in the socket (INBAND_NOTIFICATIONS).
        VringCall = 4, Exact(8), Fds::None, Answer::None, "BACKEND_VRING_CALL";
        /// An error in the socket (INBAND_NOTIFICATIONS).
        VringErr = 5, Exact(8), Fds::None, Answer::None, "BACKEND_VRING_ERR";
        /// A shared object is there.
        SharedObjectAdd = 6, Exact(16), Fds::None, Answer::None, "BACKEND_SHARED_OBJECT_ADD";
        /// A shared object is gone.
        SharedObjectRemove = 7, Exact(16), Fds::None, Answer::None, "BACKEND_SHARED_OBJECT_REMOVE";
        /// Asks for a shared object.
        SharedObjectLookup = 8, Exact(16), Fds::None, Answer::Always, "BACKEND_SHARED_OBJECT_LOOKUP";
        /// Maps a file into a shared memory region of the device (SHMEM).
        ShmemMap = 9, Exact(40), Fds::One, Answer::None, "BACKEND_SHMEM_MAP";
        /// Takes such a mapping away (SHMEM).
        ShmemUnmap = 10, Exact(40), Fds::None, Answer::None, "BACKEND_SHMEM_UNMAP";
    }
}

impl Request {
    /// Whether a device works as well if the back-end refuses the message: it tells of something, or offers something.
    pub const fn is_advisory(self) -> bool {
        matches!(
            self,
            Request::NetSetMtu
                | Request::SendRarp
                | Request::SetBackendReqFd
                | Request::SetConfig
                | Request::SetVringErr
                | Request::SetLogFd
        )
    }
}

bitflags::bitflags! {
    /// Protocol features (vhost-user.rst, Protocol features).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ProtocolFeatures: u64 {
        /// More than one queue; GET_QUEUE_NUM.
        const MQ = 1 << 0;
        /// The dirty log is in shared memory.
        const LOG_SHMFD = 1 << 1;
        /// SEND_RARP.
        const RARP = 1 << 2;
        /// Messages can ask for an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// NET_SET_MTU.
        const MTU = 1 << 4;
        /// A channel for requests of the back-end.
        const BACKEND_REQ = 1 << 5;
        /// SET_VRING_ENDIAN.
        const CROSS_ENDIAN = 1 << 6;
        /// Crypto sessions.
        const CRYPTO_SESSION = 1 << 7;
        /// Post-copy migration.
        const PAGEFAULT = 1 << 8;
        /// GET_CONFIG and SET_CONFIG.
        const CONFIG = 1 << 9;
        /// Requests of the back-end may carry descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// VRING_HOST_NOTIFIER_MSG.
        const HOST_NOTIFIER = 1 << 11;
        /// Buffers in flight are tracked in shared memory.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// Notifications in the socket.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// SET_STATUS and GET_STATUS.
        const STATUS = 1 << 16;
        /// Regions for Xen.
        const XEN_MMAP = 1 << 17;
        /// Objects shared between devices.
        const SHARED_OBJECT = 1 << 18;
        /// The device's state can be moved.
        const DEVICE_STATE = 1 << 19;
        /// GET_VRING_BASE leaves buffers in flight.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Ring addresses are guest addresses.
        const GPA_ADDRESSES = 1 << 21;
        /// Shared memory regions of the device.
        const SHMEM = 1 << 22;
        const _ = !0;
    }
}

/// VHOST_USER_F_PROTOCOL_FEATURES: bit 30 of the virtio features says that there are protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_on_the_wire() {
        assert_eq!(
            Header::request(1, 0, false).as_bytes(),
            [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            Header::request(5, 40, true).as_bytes(),
            [5, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0]
        );
        assert_eq!(Header::reply(11, 8).as_bytes(), [11, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        let header = Header::read_from_bytes(&[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        assert!(!header.version_is_known());
    }

    #[test]
    fn numbers_have_no_holes() {
        for (at, request) in Request::ALL.iter().enumerate() {
            assert_eq!(request.code() as usize, at + 1);
            assert_eq!(Request::from_code(request.code()), Some(*request));
        }
        for (at, request) in BackendRequest::ALL.iter().enumerate() {
            assert_eq!(request.code() as usize, at + 1);
        }
        assert_eq!(Request::from_code(0), None);
        assert_eq!(Request::from_code(45), None);
    }
}
