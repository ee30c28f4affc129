//! The whole device: VFs, PF and switch, driven by one thread step by step.

use std::collections::VecDeque;
use std::time::Duration;

use crate::complaint::Complaints;
use crate::device::Vf;
use crate::dma::Windows;
use crate::frame::parse;
use crate::kind::Kind;
use crate::mailbox::Message;
use crate::message::{CONTROL, CTS, FAILURE};
use crate::pf::{Mac, Pf, Policy, Speed};
use crate::register::links;
use crate::ring::Halt;
use crate::rx::Arriving;
use crate::stats::{Counters, Drops, Offloads};
use crate::switch::{insert_tag, tag_of};
use crate::tx::TxWorld;

/// Frames to the wire that nobody has collected; older ones are dropped.
const WIRE_FRAMES: usize = 4096;
/// Descriptors and frames that a queue handles in one step.
const BUDGET: usize = 256;

/// What a device is made of.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The chip.
    pub kind: Kind,
    /// Virtual functions: 1 to 63.
    pub vfs: usize,
    /// Queue pairs of each: 1, 2, 4 or 8.
    pub queues: usize,
    /// How many reads the device and the PF take to do what they are asked for.
    pub latency: u32,
    /// Frames wait for descriptors even where DROP_EN is set, up to 64 MiB of them. Hardware does not do so; tests that must
    /// not lose frames want it.
    pub hold: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kind: Kind::I82599,
            vfs: 1,
            queues: 2,
            latency: 1,
            hold: false,
        }
    }
}

/// The device.
pub struct Nic {
    pf: Pf,
    vfs: Vec<Vf>,
    wire: VecDeque<Vec<u8>>,
    wire_dropped: u64,
    hold: bool,
    now: u64,
}

impl Nic {
    /// A device whose link is up at 10 Gb/s.
    ///
    /// # Panics
    /// The number of VFs or queues is out of range.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings {
            kind,
            vfs,
            queues,
            latency,
            hold,
        } = settings;
        assert!((1..=63).contains(&vfs), "1 to 63 VFs");
        assert!([1, 2, 4, 8].contains(&queues), "1, 2, 4 or 8 queues");
        let mut nic = Self {
            pf: Pf::new(kind, vfs, queues as u32),
            vfs: (0..vfs).map(|_| Vf::new(kind, queues, latency)).collect(),
            wire: VecDeque::new(),
            wire_dropped: 0,
            hold,
            now: 0,
        };
        nic.show_link();
        nic
    }

    /// How many VFs there are.
    #[must_use]
    pub fn vf_count(&self) -> usize {
        self.vfs.len()
    }

    /// Reads a register of BAR 0.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn read32(&mut self, vf: usize, offset: u32) -> u32 {
        self.tick_mailbox(vf);
        self.vfs[vf].read(offset)
    }

    /// Writes a register of BAR 0. What that asks of the PF is done when it is due; packets move in [`Nic::step`].
    ///
    /// # Panics
    /// There is no such VF.
    pub fn write32(&mut self, vf: usize, offset: u32, value: u32) {
        let effect = self.vfs[vf].write(offset, value);
        if effect.reset {
            self.reset_vf(vf);
        }
        if effect.acknowledged && !self.pf.vfs[vf].clear_to_send && !self.vfs[vf].mailbox.is_resetting() {
            // Who reads messages without having sent RESET is told that it has lost its clearance.
            self.post(vf, FAILURE);
        }
        self.tick_without_latency(vf);
    }

    /// VFCTRL.RST, or a function-level reset of this VF.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn reset_vf(&mut self, vf: usize) {
        self.vfs[vf].reset();
        self.pf.vfs[vf].forget();
        self.tick_without_latency(vf);
    }

    /// Moves packets, answers messages, lets enabled queues work: one round, bounded work. True if something moved.
    pub fn step(&mut self) -> bool {
        let mut moved = false;
        for vf in 0..self.vfs.len() {
            self.tick_mailbox(vf);
            for q in 0..self.vfs[vf].queues {
                self.vfs[vf].rx[q].ring.tick();
                self.vfs[vf].tx[q].ring.tick();
            }
        }
        if self.pf.link.is_some() {
            for vf in 0..self.vfs.len() {
                moved |= self.transmit(vf);
            }
        }
        for vf in &mut self.vfs {
            for q in 0..vf.queues {
                let done = vf.rx[q].run(&mut vf.dma, &mut vf.complaints, &mut vf.counters, &mut vf.drops);
                if done > 0 {
                    vf.interrupts.queue_event(q, 0);
                    moved = true;
                }
            }
        }
        moved || self.vfs.iter().any(|vf| vf.mailbox.is_busy())
    }

    /// Steps until nothing moves, at most `limit` times: how often.
    pub fn run(&mut self, limit: usize) -> usize {
        (0..limit).take_while(|_| self.step()).count()
    }

    fn transmit(&mut self, index: usize) -> bool {
        if !self.pf.vfs[index].transmit_enabled {
            return false;
        }
        let mut moved = false;
        for q in 0..self.vfs[index].queues {
            let vf = &mut self.vfs[index];
            let mut world = TxWorld {
                dma: &mut vf.dma,
                complaints: &mut vf.complaints,
                offloads: &mut vf.offloads,
                malicious_detection: self.pf.malicious_detection,
                budget: BUDGET,
                no_crc: 0,
            };
            let (frames, reported) = vf.tx[q].run(&mut world);
            vf.drops.no_crc += world.no_crc;
            moved |= world.budget != BUDGET;
            if reported {
                vf.interrupts.queue_event(q, 1);
            }
            for frame in frames {
                self.vfs[index].counters.sent(&frame);
                self.forward(Some(index), frame);
            }
        }
        moved
    }

    /// Hands a frame to whom it is for.
    fn forward(&mut self, source: Option<usize>, mut frame: Vec<u8>) {
        if let Some(vf) = source {
            if let Some((vlan, priority)) = self.pf.vfs[vf].port_vlan {
                insert_tag(&mut frame, vlan | u16::from(priority) << 13);
            }
            if self.pf.is_spoofed(vf, &frame) {
                self.vfs[vf].drops.spoofed += 1;
                return;
            }
        }
        let destinations = self.pf.destinations(source, &frame);
        for vf in destinations.vfs {
            self.deliver(vf, frame.clone(), source.is_some());
        }
        if destinations.wire {
            if self.wire.len() == WIRE_FRAMES {
                self.wire.pop_front();
                self.wire_dropped += 1;
            }
            self.wire.push_back(frame);
        }
    }

    fn deliver(&mut self, index: usize, frame: Vec<u8>, loopback: bool) {
        let vf = &mut self.vfs[index];
        let policy = &self.pf.vfs[index];
        if !policy.receive_enabled {
            vf.drops.receive_off += 1;
            return;
        }
        // The CRC counts, a tag does not.
        let tag = if tag_of(&frame).is_some() { 4 } else { 0 };
        if frame.len() + 4 - tag > self.pf.longest_frame() as usize {
            vf.drops.too_long += 1;
            return;
        }
        let layers = parse(&frame);
        let (queue, hashed) = vf.spread(&self.pf.rss).queue(&frame, &layers);
        let arriving = Arriving {
            frame,
            loopback,
            hide_tag: policy.port_vlan.is_some(),
        };
        vf.rx[queue].accept(arriving, &layers, hashed, self.pf.kind, self.hold, &mut vf.drops);
    }

    /// A frame comes in from the wire, without CRC. False, and nothing happens, if it is too short for addresses and type,
    /// or the link is down.
    pub fn inject(&mut self, frame: &[u8]) -> bool {
        if frame.len() < 14 || self.pf.link.is_none() {
            return false;
        }
        self.forward(None, frame.to_vec());
        true
    }

    /// The oldest frame that went out to the wire and was not collected yet.
    pub fn collect(&mut self) -> Option<Vec<u8>> {
        self.wire.pop_front()
    }

    /// Frames to the wire that were dropped because nobody collected them.
    #[must_use]
    pub fn wire_dropped(&self) -> u64 {
        self.wire_dropped
    }

    fn tick_mailbox(&mut self, vf: usize) {
        let (message, mut interrupt) = self.vfs[vf].mailbox.tick();
        if let Some(message) = message {
            interrupt |= self.request(vf, message);
        }
        if interrupt {
            self.vfs[vf].interrupts.mailbox_event();
        }
    }

    fn request(&mut self, vf: usize, message: Message) -> bool {
        let answer = self.pf.answer(vf, message);
        if let Some((message, words)) = answer {
            self.vfs[vf].mailbox.answer(message, words);
        }
        answer.is_some()
    }

    /// Without latency, a request is done when the write that made it returns.
    fn tick_without_latency(&mut self, vf: usize) {
        if self.vfs[vf].latency == 0 {
            for _ in 0..3 {
                self.tick_mailbox(vf);
            }
        }
    }

    fn post(&mut self, vf: usize, word: u32) {
        self.vfs[vf].mailbox.post(word);
        self.vfs[vf].interrupts.mailbox_event();
    }

    /// The PF tells a VF that something has changed.
    fn notify(&mut self, vf: usize) {
        let clearance = if self.pf.vfs[vf].clear_to_send { CTS } else { 0 };
        self.post(vf, CONTROL | clearance);
    }

    fn show_link(&mut self) {
        for (vf, policy) in self.vfs.iter_mut().zip(&self.pf.vfs) {
            vf.links = match self.pf.link {
                Some(speed) if policy.link_enabled => links::UP | speed.bits(),
                _ => 0,
            };
        }
    }

    /// The cable is plugged in, or out (none): every VF is told.
    pub fn set_link(&mut self, link: Option<Speed>) {
        self.pf.link = link;
        self.show_link();
        for vf in 0..self.vfs.len() {
            self.notify(vf);
        }
    }

    /// The administrator gives a VF the link, or takes it away.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn set_link_enabled(&mut self, vf: usize, enabled: bool) {
        self.pf.vfs[vf].link_enabled = enabled;
        self.show_link();
        self.notify(vf);
    }

    /// The administrator sets a VF's address (all zero: none), or lets it choose again. The VF is to reset.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn set_mac(&mut self, vf: usize, mac: Mac) {
        let policy = &mut self.pf.vfs[vf];
        policy.mac = mac;
        policy.mac_is_set = mac != [0; 6];
        self.lose_clearance(vf);
    }

    /// The administrator puts a VF into a VLAN, with a priority, or into none. The VF is to reset.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn set_port_vlan(&mut self, vf: usize, port_vlan: Option<(u16, u8)>) {
        self.pf.vfs[vf].port_vlan = port_vlan.map(|(vlan, priority)| (vlan & 0xfff, priority & 7));
        self.lose_clearance(vf);
    }

    /// The administrator trusts a VF, or no longer. The VF is to reset.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn set_trusted(&mut self, vf: usize, trusted: bool) {
        self.pf.vfs[vf].trusted = trusted;
        self.lose_clearance(vf);
    }

    /// The PF forgets that it knows this VF, and says so: the VF is to reset.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn lose_clearance(&mut self, vf: usize) {
        self.pf.vfs[vf].clear_to_send = false;
        self.notify(vf);
    }

    /// The PF begins to reset the device: message 0x100 without CTS, then RSTI; nothing moves, nobody answers.
    pub fn begin_reset(&mut self) {
        for vf in 0..self.vfs.len() {
            self.lose_clearance(vf);
            let word = self.vfs[vf].mailbox.read_memory(0);
            self.vfs[vf].mailbox.begin_reset();
            self.vfs[vf].mailbox.post(word);
            self.pf.vfs[vf].forget();
            self.vfs[vf].reset_all();
            self.vfs[vf].links = 0;
        }
    }

    /// The PF is back: RSTD, and message 0x100, without CTS until the VF has sent RESET.
    pub fn end_reset(&mut self) {
        self.show_link();
        for vf in 0..self.vfs.len() {
            self.vfs[vf].mailbox.end_reset();
            self.notify(vf);
        }
    }

    /// The PF holds a VF's mailbox memory, or lets go of it.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn hold_mailbox(&mut self, vf: usize, held: bool) {
        self.vfs[vf].mailbox.hold(held);
    }

    /// The PF's settings, to look at and to change. What needs a VF to hear of it has a method of its own here.
    pub fn pf(&mut self) -> &mut Pf {
        &mut self.pf
    }

    /// What the PF keeps of a VF.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn policy(&mut self, vf: usize) -> &mut Policy {
        &mut self.pf.vfs[vf]
    }

    /// What a VF may reach of memory.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn dma(&mut self, vf: usize) -> &mut Windows {
        &mut self.vfs[vf].dma
    }

    /// What a VF's driver did that it should not.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn complaints(&self, vf: usize) -> &Complaints {
        &self.vfs[vf].complaints
    }

    /// The VF's counters, to look at, and to set near where they wrap.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn counters(&mut self, vf: usize) -> &mut Counters {
        &mut self.vfs[vf].counters
    }

    /// What a VF has lost.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn drops(&self, vf: usize) -> Drops {
        self.vfs[vf].drops
    }

    /// What the device did for a VF's driver.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn offloads(&self, vf: usize) -> Offloads {
        self.vfs[vf].offloads
    }

    /// Why queues of a VF have stopped.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn halts(&self, vf: usize) -> Vec<Halt> {
        self.vfs[vf].halts().collect()
    }

    /// Frames that wait for receive descriptors.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn waiting(&self, vf: usize) -> usize {
        self.vfs[vf].rx.iter().map(crate::rx::RxQueue::waiting).sum()
    }

    /// The vectors that sent an MSI-X message since the last call, as bits.
    ///
    /// # Panics
    /// There is no such VF.
    pub fn take_interrupts(&mut self, vf: usize) -> u32 {
        self.vfs[vf].interrupts.take_fired()
    }

    /// MSI-X messages sent so far, for each vector.
    ///
    /// # Panics
    /// There is no such VF.
    #[must_use]
    pub fn interrupts_sent(&self, vf: usize) -> [u64; crate::register::VECTORS] {
        self.vfs[vf].interrupts.sent
    }

    /// Time passes: what interrupt moderation and VFFRTIMER go by.
    pub fn advance(&mut self, time: Duration) {
        self.now = self.now.saturating_add(time.as_nanos() as u64);
        for vf in &mut self.vfs {
            vf.now = self.now;
            vf.interrupts.advance(self.now);
        }
    }

    /// After how much time a moderated interrupt is due.
    #[must_use]
    pub fn next_interrupt(&self) -> Option<Duration> {
        let due = self.vfs.iter().filter_map(|vf| vf.interrupts.next_due()).min()?;
        Some(Duration::from_nanos(due.saturating_sub(self.now)))
    }
}
