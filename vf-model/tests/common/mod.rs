//! A driver in as few lines as can be: it pokes registers by number, so that it shares no constant with the model.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::sync::Arc;

use vf_model::{Access, Memory, Registers, Settings, Shared, VfHandle};

/// Where the driver's memory lies for the device: above 4 GiB, so that the high halves of addresses matter.
pub const IOVA: u64 = 0x12_0000_0000;
pub const MEMORY: usize = 0x20_0000;
pub const RING: u32 = 64;
const RX_RINGS: usize = 0;
const TX_RINGS: usize = 0x8000;
const RX_BUFFERS: usize = 0x1_0000;
const TX_BUFFERS: usize = 0x18_0000;
/// Receive buffers of one descriptor; the device is told how much of it to use.
const RX_BUFFER: usize = 0x800;

pub const CTS: u32 = 0x2000_0000;
pub const SUCCESS: u32 = 0x8000_0000;
pub const FAILURE: u32 = 0x4000_0000;

pub const API_10: u32 = 0;
pub const API_11: u32 = 2;
pub const API_12: u32 = 3;
pub const API_13: u32 = 4;

/// EOP, IFCS, RS, DEXT, data.
pub const DATA: u32 = 0x2b30_0000;
/// CC.
pub const CC: u32 = 0x80;
/// IP and transport checksum.
pub const IXSM: u32 = 0x100;
pub const TXSM: u32 = 0x200;
/// Insert the tag, segment.
pub const VLE: u32 = 0x4000_0000;
pub const TSE: u32 = 0x8000_0000;

pub fn device(settings: Settings) -> Shared {
    Shared::new(settings)
}

pub fn two(settings: Settings) -> (Shared, Driver, Driver) {
    let device = device(Settings { vfs: 2, ..settings });
    let drivers = [0, 1].map(|vf| Driver::up(&device, vf));
    let [a, b] = drivers;
    (device, a, b)
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub bytes: Vec<u8>,
    pub kind: u32,
    pub hash: u32,
    pub status: u32,
    pub tag: u16,
    pub pieces: usize,
}

pub struct Driver {
    pub vf: VfHandle,
    pub memory: Arc<Memory>,
    pub mac: [u8; 6],
    /// PFSTS, PFACK, RSTD as they were read.
    seen: u32,
    rx_next: [u32; 8],
    tx_tail: [u32; 8],
}

impl Driver {
    /// A driver that has done nothing yet.
    pub fn new(device: &Shared, vf: usize) -> Self {
        let memory = Arc::new(Memory::anonymous(MEMORY).unwrap());
        device.with(|nic| {
            nic.dma(vf)
                .map_memory(IOVA, &memory, 0, MEMORY as u64, Access::ReadWrite)
                .unwrap();
        });
        Self {
            vf: device.vf(vf),
            memory,
            mac: [0; 6],
            seen: 0,
            rx_next: [0; 8],
            tx_tail: [0; 8],
        }
    }

    /// Reset, negotiated at 1.3, one queue pair up.
    pub fn up(device: &Shared, vf: usize) -> Self {
        let mut driver = Self::new(device, vf);
        driver.restart();
        driver
    }

    pub fn restart(&mut self) {
        self.reset();
        self.hello();
        assert_eq!(self.ask(&[0x08, API_13])[0], SUCCESS | CTS | 0x08);
        assert_eq!(self.ask(&[0x05, 1518])[0], SUCCESS | CTS | 0x05);
        self.rx_up(0, 0x0200_0002);
        self.tx_up(0);
    }

    pub fn read(&self, offset: u32) -> u32 {
        self.vf.read32(offset)
    }

    pub fn write(&self, offset: u32, value: u32) {
        self.vf.write32(offset, value);
    }

    /// VFCTRL.RST, then RSTD.
    pub fn reset(&mut self) {
        self.write(0x0, 1 << 26);
        self.seen = 0;
        assert!((0..100).any(|_| self.mailbox() & 0x80 != 0), "no RSTD");
        self.seen = 0;
    }

    /// VF_RESET: the address.
    pub fn hello(&mut self) {
        let reply = self.ask(&[0x01]);
        assert_eq!(reply[0], SUCCESS | 0x01);
        self.mac[..4].copy_from_slice(&reply[1].to_le_bytes());
        self.mac[4..].copy_from_slice(&reply[2].to_le_bytes()[..2]);
    }

    /// Reads VFMAILBOX, and keeps what clears.
    pub fn mailbox(&mut self) -> u32 {
        let value = self.read(0x2fc) | self.seen;
        self.seen |= value & 0xb0;
        value
    }

    /// Sends a request and waits for the answer: 16 words.
    pub fn ask(&mut self, message: &[u32]) -> Vec<u32> {
        self.try_ask(message).expect("the PF answers")
    }

    pub fn try_ask(&mut self, message: &[u32]) -> Option<Vec<u32>> {
        self.send_message(message);
        self.wait(0x20)?;
        self.wait(0x10)?;
        Some(self.take_message())
    }

    pub fn send_message(&mut self, message: &[u32]) {
        self.write(0x2fc, 0x4);
        assert_eq!(self.mailbox() & 0x4, 0x4, "the mailbox is held");
        self.seen &= !0x30;
        for (i, word) in message.iter().enumerate() {
            self.write(0x200 + 4 * i as u32, *word);
        }
        self.write(0x2fc, 0x1);
    }

    pub fn wait(&mut self, bit: u32) -> Option<()> {
        (0..100).find(|_| self.mailbox() & bit != 0)?;
        self.seen &= !bit;
        Some(())
    }

    pub fn take_message(&mut self) -> Vec<u32> {
        self.write(0x2fc, 0x4);
        assert_eq!(self.mailbox() & 0x4, 0x4, "the mailbox is held");
        let words = (0..16).map(|i| self.read(0x200 + 4 * i)).collect();
        self.write(0x2fc, 0x2);
        words
    }

    fn set_ring(&self, block: u32, at: usize) {
        let address = IOVA + at as u64;
        self.write(block, address as u32);
        self.write(block + 4, (address >> 32) as u32);
        self.write(block + 8, RING * 16);
        self.write(block + 0x10, 0);
        self.write(block + 0x18, 0);
    }

    fn enable(&self, register: u32, bits: u32) {
        self.write(register, bits | 1 << 25);
        assert!((0..100).any(|_| self.read(register) & 1 << 25 != 0), "not enabled");
    }

    /// A receive queue with all its descriptors but one posted.
    pub fn rx_up(&mut self, q: u32, srrctl: u32) {
        self.rx_up_with(q, srrctl, 0, RING - 1);
    }

    pub fn rx_up_with(&mut self, q: u32, srrctl: u32, rxdctl: u32, posted: u32) {
        let block = 0x1000 + 0x40 * q;
        self.write(block + 0x28, 0);
        self.set_ring(block, RX_RINGS + 0x1000 * q as usize);
        self.write(block + 0x14, srrctl);
        for i in 0..RING {
            self.post(q, i);
        }
        self.rx_next[q as usize] = 0;
        self.enable(block + 0x28, rxdctl);
        self.write(block + 0x18, posted);
    }

    fn post(&self, q: u32, index: u32) {
        let buffer = RX_BUFFERS + (q * RING + index) as usize * RX_BUFFER;
        let at = RX_RINGS + 0x1000 * q as usize + 16 * index as usize;
        self.memory.write(at, &(IOVA + buffer as u64).to_le_bytes());
        self.memory.write(at + 8, &[0; 8]);
    }

    pub fn tx_up(&mut self, q: u32) {
        let block = 0x2000 + 0x40 * q;
        self.write(block + 0x28, 0);
        self.set_ring(block, TX_RINGS + 0x1000 * q as usize);
        self.tx_tail[q as usize] = 0;
        self.enable(block + 0x28, 0);
    }

    /// Puts a descriptor into a ring, behind the tail: its index.
    pub fn put(&mut self, q: u32, low: u64, high: u64) -> u32 {
        let index = self.tx_tail[q as usize];
        let at = TX_RINGS + 0x1000 * q as usize + 16 * index as usize;
        self.memory.write(at, &low.to_le_bytes());
        self.memory.write(at + 8, &high.to_le_bytes());
        self.tx_tail[q as usize] = (index + 1) % RING;
        index
    }

    pub fn tx_tail(&self, q: u32) {
        self.write(0x2018 + 0x40 * q, self.tx_tail[q as usize]);
    }

    /// A context: MACLEN, IPLEN, tag; TUCMD; L4LEN, MSS.
    pub fn put_context(&mut self, slot: u64, lengths: (u64, u64, u64), tag: u16, tucmd: u64, mss: u64) {
        let (mac, ip, transport) = lengths;
        let low = ip | mac << 9 | u64::from(tag) << 16;
        let high = tucmd | 0x2020_0000 | slot << 36 | transport << 40 | mss << 48;
        self.put(0, low, high);
    }

    /// Puts the bytes of a packet where transmit buffers are: the device's address.
    pub fn buffer(&self, at: usize, bytes: &[u8]) -> u64 {
        self.memory.write(TX_BUFFERS + at, bytes);
        IOVA + (TX_BUFFERS + at) as u64
    }

    /// Puts a packet of one descriptor into queue 0.
    pub fn put_packet(&mut self, bytes: &[u8], command: u32, olinfo: u32, payload: usize) -> u32 {
        let at = 0x1000 * (self.tx_tail[0] as usize % 8);
        let address = self.buffer(at, bytes);
        let high = u64::from(DATA | command | bytes.len() as u32) | u64::from(olinfo | (payload as u32) << 14) << 32;
        self.put(0, address, high)
    }

    /// Sends a packet with a context that says nothing but MACLEN, and steps: the descriptor's index.
    pub fn send(&mut self, bytes: &[u8]) -> u32 {
        self.put_context(0, (14, 0, 0), 0, 0, 0);
        let index = self.put_packet(bytes, 0, CC, bytes.len());
        self.tx_tail(0);
        self.settle();
        index
    }

    pub fn settle(&self) {
        self.vf.device().with(|nic| nic.run(1000));
    }

    /// Whether DD is set in a transmit descriptor.
    pub fn is_done(&self, q: u32, index: u32) -> bool {
        let at = TX_RINGS + 0x1000 * q as usize + 16 * index as usize;
        self.memory.read::<16>(at)[12] & 1 == 1
    }

    pub fn receive(&mut self) -> Option<Received> {
        self.receive_from(0)
    }

    /// Takes one frame from a queue and posts its buffers again.
    pub fn receive_from(&mut self, q: u32) -> Option<Received> {
        let mut received = Received {
            bytes: Vec::new(),
            kind: 0,
            hash: 0,
            status: 0,
            tag: 0,
            pieces: 0,
        };
        loop {
            let index = self.rx_next[q as usize];
            let at = RX_RINGS + 0x1000 * q as usize + 16 * index as usize;
            let words = self.memory.read::<16>(at);
            let dword = |i: usize| u32::from_le_bytes(words[4 * i..4 * i + 4].try_into().unwrap());
            let status = dword(2);
            if status & 1 == 0 {
                assert_eq!(received.pieces, 0, "a frame without an end");
                return None;
            }
            let length = (dword(3) & 0xffff) as usize;
            let buffer = RX_BUFFERS + (q * RING + index) as usize * RX_BUFFER;
            received.bytes.extend(self.memory.read_vec(buffer, length));
            received.pieces += 1;
            self.post(q, index);
            self.write(0x1018 + 0x40 * q, index);
            self.rx_next[q as usize] = (index + 1) % RING;
            if status & 2 != 0 {
                received.kind = dword(0);
                received.hash = dword(1);
                received.status = status;
                received.tag = (dword(3) >> 16) as u16;
                return Some(received);
            }
        }
    }
}

/// A frame without IP.
pub fn frame(to: [u8; 6], from: [u8; 6], length: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xb5]].concat();
    frame.extend((14..length).map(|i| (i * 7) as u8));
    frame
}

/// The Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut total: u32 = 0;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// Ethernet, IPv4 and the given transport bytes; the IP checksum is right.
pub fn ipv4(to: [u8; 6], from: [u8; 6], protocol: u8, transport: &[u8]) -> Vec<u8> {
    let length = (20 + transport.len()) as u16;
    let mut header = vec![
        0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&to[..], &from[..], &[8, 0], &header, transport].concat()
}

/// UDP ports 1000 to 2000; the checksum field is `checksum`.
pub fn udp(payload: &[u8], checksum: u16) -> Vec<u8> {
    let mut bytes = vec![0x03, 0xe8, 0x07, 0xd0, 0, 0];
    bytes[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    bytes.extend(checksum.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// TCP ports 1000 to 2000, sequence number 1, flags; the checksum field is `checksum`.
pub fn tcp(payload: &[u8], flags: u8, checksum: u16) -> Vec<u8> {
    let mut bytes = vec![0x03, 0xe8, 0x07, 0xd0, 0, 0, 0, 1, 0, 0, 0, 9, 0x50, flags, 1, 0];
    bytes.extend(checksum.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

/// The sum over the IPv4 pseudo header of 10.0.0.1 to 10.0.0.2, not inverted: what a driver leaves in the field.
pub fn pseudo(protocol: u8, length: usize) -> u16 {
    let mut bytes = vec![10, 0, 0, 1, 10, 0, 0, 2, 0, protocol];
    bytes.extend((length as u16).to_be_bytes());
    !checksum(&bytes)
}

/// Whether the transport checksum of an IPv4 frame is right, computed here.
pub fn transport_ok(frame: &[u8]) -> bool {
    let length = usize::from(u16::from_be_bytes([frame[16], frame[17]])) - 20;
    let transport = &frame[34..34 + length];
    let mut bytes = vec![0, frame[23]];
    bytes.extend((length as u16).to_be_bytes());
    bytes.extend(&frame[26..34]);
    bytes.extend(transport);
    checksum(&bytes) == 0
}
