//! A scripted double: 16 KiB of registers, and a PF behind the mailbox that answers as a test tells it to.
#![allow(dead_code, reason = "no test file uses all of it")]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::rc::Rc;

use ixgbevf::{
    Delay, Error, Memory, Model, Offload, Registers, RxOptions, RxQueue, Segment, Slot, TxOptions, TxQueue, Vf,
    ring_len,
};

pub const VFCTRL: u32 = 0x0000;
pub const VFSTATUS: u32 = 0x0008;
pub const VFLINKS: u32 = 0x0010;
pub const VTEICR: u32 = 0x0100;
pub const VFMBMEM: u32 = 0x0200;
pub const VFMAILBOX: u32 = 0x02fc;
pub const RXDCTL: u32 = 0x1028;
pub const TXDCTL: u32 = 0x2028;

pub const ACK: u32 = 0x8000_0000;
pub const NACK: u32 = 0x4000_0000;
pub const CTS: u32 = 0x2000_0000;

pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xaa, 0xbb, 0xcc];

/// What the PF does with a message: its answer's words, or none.
pub type Script = Box<dyn FnMut(&[u32; 16]) -> Option<Vec<u32>>>;

struct Inner {
    words: Vec<u32>,
    script: Script,
    /// Every message that the PF got.
    messages: Vec<[u32; 16]>,
    /// Every write but those to the mailbox: offset and value.
    writes: Vec<(u32, u32)>,
    /// VFMAILBOX: bits that clear on read, and levels.
    latched: u32,
    level: u32,
    vfu: bool,
    /// The PF does not let go of the buffer.
    hoards: bool,
    /// The PF does not read.
    deaf: bool,
    /// Resets that show neither RSTI nor RSTD.
    no_reset: bool,
    /// Looks at VFMAILBOX until RSTD shows after a reset.
    slow_reset: u32,
    /// What the PF says next, once the VF has read what is there.
    unasked: VecDeque<u32>,
    /// The answer that waits behind it.
    pending: Option<Vec<u32>>,
    /// It says nothing else, without end.
    floods: Option<u32>,
    gone: bool,
    reads: u64,
    mailbox_reads: u64,
    /// Latched together with the next PFACK.
    with_ack: u32,
    /// Looks at VFMAILBOX until a message shows, and those left for the one that is on its way.
    slow: u32,
    on_its_way: u32,
    /// What a reset clears.
    cleared: Vec<u32>,
    /// ENABLE never follows.
    stuck: bool,
}

/// Shared by the VF under test and the test.
#[derive(Clone)]
pub struct Double(Rc<RefCell<Inner>>);

/// The wire numbers of the versions that a PF takes.
pub fn negotiator(accepted: &'static [u32]) -> Script {
    Box::new(move |message| Some(answer(message, accepted)))
}

/// What a well-behaved PF answers.
pub fn answer(message: &[u32; 16], accepted: &[u32]) -> Vec<u32> {
    let mut reply = message.to_vec();
    reply[0] |= match message[0] & 0xffff {
        1 => {
            let low = u32::from_le_bytes(MAC[..4].try_into().unwrap());
            let high = u32::from_le_bytes([MAC[4], MAC[5], 0, 0]);
            return vec![0x8000_0001, low, high, 0];
        }
        8 if !accepted.contains(&message[1]) => NACK | CTS,
        9 => {
            reply[1..5].copy_from_slice(&[4, 4, 0, 1]);
            ACK | CTS
        }
        0x10 => {
            reply[1] = 1;
            ACK | CTS
        }
        _ => ACK | CTS,
    };
    reply
}

impl Double {
    pub fn new(script: Script) -> Self {
        Double(Rc::new(RefCell::new(Inner {
            words: vec![0; 4096],
            script,
            messages: Vec::new(),
            writes: Vec::new(),
            latched: 0,
            level: 0,
            vfu: false,
            hoards: false,
            deaf: false,
            no_reset: false,
            slow_reset: 0,
            unasked: VecDeque::new(),
            pending: None,
            floods: None,
            gone: false,
            reads: 0,
            mailbox_reads: 0,
            with_ack: 0,
            slow: 0,
            on_its_way: 0,
            cleared: Vec::new(),
            stuck: false,
        })))
    }

    /// A PF that speaks up to 1.3.
    pub fn well_behaved() -> Self {
        Self::new(negotiator(&[0, 2, 3, 4]))
    }

    pub fn set_script(&self, script: Script) {
        self.0.borrow_mut().script = script;
    }

    pub fn messages(&self) -> Vec<[u32; 16]> {
        std::mem::take(&mut self.0.borrow_mut().messages)
    }

    pub fn writes(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.0.borrow_mut().writes)
    }

    /// How often `offset` was written, and the last value.
    pub fn written(&self, offset: u32) -> Option<u32> {
        let inner = self.0.borrow();
        inner.writes.iter().rev().find(|(at, _)| *at == offset).map(|(_, v)| *v)
    }

    pub fn mailbox_reads(&self) -> u64 {
        self.0.borrow().mailbox_reads
    }

    pub fn poke(&self, offset: u32, value: u32) {
        self.0.borrow_mut().words[offset as usize / 4] = value;
    }

    pub fn peek(&self, offset: u32) -> u32 {
        self.0.borrow().words[offset as usize / 4]
    }

    /// The PF says something unasked.
    pub fn say(&self, word: u32) {
        let mut inner = self.0.borrow_mut();
        inner.words[VFMBMEM as usize / 4] = word;
        inner.latched |= 0x10;
    }

    /// The PF says something unasked before its next answer.
    pub fn interject(&self, word: u32) {
        self.0.borrow_mut().unasked.push_back(word);
    }

    /// The PF says nothing but this, again and again.
    pub fn flood(&self, word: u32) {
        self.0.borrow_mut().floods = Some(word);
    }

    pub fn latch(&self, bits: u32) {
        self.0.borrow_mut().latched |= bits;
    }

    /// As [`Double::latch`], but together with the next PFACK.
    pub fn latch_with_ack(&self, bits: u32) {
        self.0.borrow_mut().with_ack = bits;
    }

    pub fn level(&self, bits: u32) {
        self.0.borrow_mut().level = bits;
    }

    pub fn hoard(&self, on: bool) {
        self.0.borrow_mut().hoards = on;
    }

    pub fn deafen(&self, on: bool) {
        self.0.borrow_mut().deaf = on;
    }

    pub fn never_reset(&self, on: bool) {
        self.0.borrow_mut().no_reset = on;
    }

    pub fn slow_reset(&self, looks: u32) {
        self.0.borrow_mut().slow_reset = looks;
    }

    /// Every message takes so many looks.
    pub fn answer_slowly(&self, looks: u32) {
        self.0.borrow_mut().slow = looks;
    }

    pub fn clear_on_reset(&self, offsets: Vec<u32>) {
        self.0.borrow_mut().cleared = offsets;
    }

    pub fn remove(&self) {
        self.0.borrow_mut().gone = true;
    }

    pub fn stick(&self, on: bool) {
        self.0.borrow_mut().stuck = on;
    }
}

impl Inner {
    fn mailbox(&mut self) -> u32 {
        self.mailbox_reads += 1;
        if self.slow_reset > 0 {
            self.slow_reset -= 1;
            if self.slow_reset == 0 {
                self.latched |= 0x80;
            }
        }
        if self.on_its_way > 0 {
            self.on_its_way -= 1;
            if self.on_its_way == 0 {
                self.latched |= 0x10;
            }
        }
        let status = self.latched | self.level | if self.vfu { 4 } else { 0 };
        self.latched = 0;
        status
    }

    fn requested(&mut self) {
        if self.deaf {
            return;
        }
        let at = VFMBMEM as usize / 4;
        let message: [u32; 16] = self.words[at..at + 16].try_into().unwrap();
        self.messages.push(message);
        // The PF has read it.
        self.latched |= 0x20 | std::mem::take(&mut self.with_ack);
        self.pending = (self.script)(&message);
        self.deliver();
    }

    /// The next message to the VF, if there is one.
    fn deliver(&mut self) {
        let message = match self.floods {
            Some(word) => vec![word],
            None if self.pending.is_none() => return,
            None => match self.unasked.pop_front() {
                Some(word) => vec![word],
                None => self.pending.take().unwrap(),
            },
        };
        let at = VFMBMEM as usize / 4;
        self.words[at..at + message.len()].copy_from_slice(&message);
        self.on_its_way = self.slow;
        if self.slow == 0 {
            self.latched |= 0x10;
        }
    }
}

impl Registers for Double {
    fn read(&self, offset: u32) -> u32 {
        assert!(offset < 0x4000 && offset.is_multiple_of(4), "{offset:#x}");
        let mut inner = self.0.borrow_mut();
        inner.reads += 1;
        if inner.gone {
            return u32::MAX;
        }
        match offset {
            VFMAILBOX => inner.mailbox(),
            VTEICR => std::mem::take(&mut inner.words[offset as usize / 4]),
            _ => inner.words[offset as usize / 4],
        }
    }

    fn write(&self, offset: u32, value: u32) {
        assert!(offset < 0x4000 && offset.is_multiple_of(4), "{offset:#x}");
        let mut inner = self.0.borrow_mut();
        if inner.gone {
            return;
        }
        if offset == VFMAILBOX {
            inner.vfu = value & 4 != 0 && !inner.hoards;
            if value & 1 != 0 {
                inner.requested();
            }
            if value & 2 != 0 {
                inner.deliver();
            }
            return;
        }
        if !(VFMBMEM..VFMBMEM + 64).contains(&offset) {
            inner.writes.push((offset, value));
        } else {
            assert!(inner.vfu, "the mailbox memory is written without owning it");
        }
        if offset == VFCTRL {
            for at in inner.cleared.clone() {
                inner.words[at as usize / 4] = 0;
            }
        }
        if offset == VFCTRL && value & 1 << 26 != 0 && !inner.no_reset && inner.slow_reset == 0 {
            inner.latched |= 0x80;
        }
        let mut value = value;
        let control = (0x1000..0x2200).contains(&offset) && offset % 0x40 == 0x28;
        if inner.stuck && control && !(0x1200..0x2000).contains(&offset) {
            value = inner.words[offset as usize / 4] & 1 << 25 | value & !(1 << 25);
        }
        inner.words[offset as usize / 4] = value;
    }
}

/// Time that passes at once, and is added up.
#[derive(Clone, Default)]
pub struct Time(pub Rc<Cell<u64>>);

impl Delay for Time {
    fn delay_us(&mut self, us: u32) {
        self.0.set(self.0.get() + u64::from(us));
    }
}

/// A VF on `double`, not reset.
pub fn fresh(double: &Double, model: Model) -> (Vf<Double, Time>, Time) {
    let time = Time::default();
    (Vf::new(double.clone(), time.clone(), model, 1), time)
}

/// A VF on a well-behaved double, reset.
pub fn known(model: Model) -> (Vf<Double, Time>, Double) {
    let double = Double::well_behaved();
    let (mut vf, _) = fresh(&double, model);
    vf.reset().unwrap();
    double.messages();
    double.writes();
    (vf, double)
}

#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Line([u64; 16]);

/// Descriptor memory, as its device sees it.
#[derive(Clone)]
pub struct Block {
    lines: Rc<Vec<Line>>,
    pub size: u16,
}

/// Where the device sees descriptor memory.
pub const RING_ADDR: u64 = 0x12_3456_7880;

impl Block {
    pub fn new(size: u16) -> Self {
        Block {
            lines: Rc::new(vec![Line([u64::MAX; 16]); ring_len(size) / 128 + 1]),
            size,
        }
    }

    fn base(&self) -> *mut u64 {
        self.lines.as_ptr().cast_mut().cast()
    }

    pub fn memory(&self) -> Memory {
        Memory {
            ptr: NonNull::new(self.base().cast()).unwrap(),
            addr: RING_ADDR,
        }
    }

    /// The two quadwords of a descriptor.
    pub fn get(&self, i: usize) -> [u64; 2] {
        assert!(i < usize::from(self.size));
        // SAFETY: inside the block; only this thread uses it.
        unsafe {
            [
                self.base().add(2 * i).read_volatile(),
                self.base().add(2 * i + 1).read_volatile(),
            ]
        }
    }

    pub fn set(&self, i: usize, quads: [u64; 2]) {
        assert!(i < usize::from(self.size));
        // SAFETY: inside the block; only this thread uses it.
        unsafe {
            self.base().add(2 * i).write_volatile(quads[0]);
            self.base().add(2 * i + 1).write_volatile(quads[1]);
        }
    }

    /// Writes receive descriptor `i` back.
    pub fn write_back(&self, i: usize, packet: u32, hash: u32, status: u32, len: u16, vlan: u16) {
        self.set(
            i,
            [
                u64::from(packet) | u64::from(hash) << 32,
                u64::from(status) | u64::from(len) << 32 | u64::from(vlan) << 48,
            ],
        );
    }

    /// A whole frame of `len` bytes without anything to say.
    pub fn frame(&self, i: usize, len: u16) {
        self.write_back(i, 0, 0, 3, len, 0);
    }

    /// Writes transmit descriptor `i` back.
    pub fn sent(&self, i: usize) {
        let [address, _] = self.get(i);
        self.set(i, [address, 1 << 32]);
    }
}

pub type Rx = RxQueue<Double, Vec<Slot>>;
pub type Tx = TxQueue<Double, Vec<Slot>>;

pub fn rx_queue(double: &Double, index: u8, size: u16, options: RxOptions) -> (Rx, Block) {
    let block = Block::new(size);
    let slots = vec![Slot::default(); size.into()];
    // SAFETY: tests keep the block as long as the queue.
    let queue = unsafe { RxQueue::new(double.clone(), index, block.memory(), size, options, slots) };
    (queue.unwrap(), block)
}

pub fn tx_queue(double: &Double, index: u8, size: u16, options: TxOptions) -> (Tx, Block) {
    let block = Block::new(size);
    let slots = vec![Slot::default(); size.into()];
    // SAFETY: tests keep the block as long as the queue.
    let queue = unsafe { TxQueue::new(double.clone(), index, block.memory(), size, options, slots) };
    (queue.unwrap(), block)
}

/// A generator that repeats: xorshift64*.
pub struct Random(Cell<u64>);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(Cell::new(seed | 1))
    }

    pub fn next(&self) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What the tests post need not be memory: their device is a script, which follows no address, and does not run while a
/// queue detaches.
pub trait Posting {
    fn post_each(&mut self, buffers: impl IntoIterator<Item = (Segment, u64)>) -> usize;
    fn detach(&mut self, each: impl FnMut(u64));
}

impl<R: Registers, S: AsMut<[Slot]>> Posting for RxQueue<R, S> {
    fn post_each(&mut self, buffers: impl IntoIterator<Item = (Segment, u64)>) -> usize {
        // SAFETY: nobody follows the addresses.
        unsafe { self.add_each(buffers) }
    }

    fn detach(&mut self, each: impl FnMut(u64)) {
        // SAFETY: there is no device but the script.
        unsafe { self.detach_each(each) }
    }
}

impl<R: Registers, S: AsMut<[Slot]>> Posting for TxQueue<R, S> {
    fn post_each(&mut self, buffers: impl IntoIterator<Item = (Segment, u64)>) -> usize {
        // SAFETY: nobody follows the addresses.
        unsafe { self.add_each(buffers) }
    }

    fn detach(&mut self, each: impl FnMut(u64)) {
        // SAFETY: there is no device but the script.
        unsafe { self.detach_each(each) }
    }
}

/// The same of a frame of several segments.
pub trait PostingFrames {
    fn post(&mut self, frame: &[Segment], offload: &Offload, cookie: u64) -> Result<(), Error>;
}

impl<R: Registers, S: AsMut<[Slot]>> PostingFrames for TxQueue<R, S> {
    fn post(&mut self, frame: &[Segment], offload: &Offload, cookie: u64) -> Result<(), Error> {
        // SAFETY: nobody follows the addresses.
        unsafe { self.add(frame, offload, cookie) }
    }
}
