//! Whatever a driver writes: no panic, no access outside of what is mapped, no step without an end.

use std::sync::Arc;

use proptest::prelude::*;
use vf_model::{Access, Kind, Memory, Registers, Settings, Shared, Speed};

/// The device may reach this much in the middle; around it lie bytes that must not change.
const WINDOW: usize = 0x1_0000;
const AROUND: usize = 0x1000;
const IOVA: u64 = 0x4000_0000;
const CANARY: u8 = 0xa5;

#[derive(Clone, Debug)]
enum Act {
    Read(u32),
    Write(u32, u32),
    /// A descriptor at this slot of the ring's memory.
    Descriptor(usize, u64, u64),
    /// Base, length, enable and tail of a queue, as a driver would do it, with numbers that need not fit.
    Queue {
        q: u32,
        transmit: bool,
        length: u32,
        tail: u32,
    },
    Message(Vec<u32>),
    Inject(Vec<u8>),
    Step,
    Reset,
    PfReset,
    Link(bool),
    Detection(bool),
}

fn offset() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (0_u32..0x1000).prop_map(|word| word * 4),
        2 => (0_u32..8, 0_u32..16, any::<bool>()).prop_map(|(q, word, tx)| 0x1000 + 0x1000 * u32::from(tx) + 0x40 * q + 4 * word),
        2 => (0_u32..0x90).prop_map(|word| 0x100 + 4 * word),
        1 => any::<u32>(),
    ]
}

fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0_u32..0x100,
        Just(1 << 25),
        Just(0x0200_0001),
        (0_u32..WINDOW as u32).prop_map(|at| IOVA as u32 + at),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..WINDOW as u64).prop_map(|at| IOVA + at),
        1 => (0_u64..64).prop_map(|back| IOVA + WINDOW as u64 - back),
        1 => (0_u64..64).prop_map(|back| IOVA - back),
        1 => any::<u64>(),
    ]
}

/// Descriptors that are nearly right: contexts and data with plausible lengths.
fn descriptor() -> impl Strategy<Value = (u64, u64)> {
    let data = (address(), 0_u64..2000, any::<u8>(), any::<u8>(), 0_u64..2000).prop_map(
        |(address, length, command, options, payload)| {
            let command = u64::from(command) << 24 | 0x2030_0000 | length;
            (address, command | u64::from(options) << 39 | payload << 46)
        },
    );
    let fitting = (
        address(),
        17_u64..1600,
        prop_oneof![Just(0x2b_u64), Just(0xab), Just(0x6b)],
    )
        .prop_map(|(address, length, command)| {
            (
                address,
                command << 24 | 0x0030_0000 | length | 0x80 << 32 | length << 46,
            )
        });
    let context = (any::<u64>(), any::<u64>()).prop_map(|(low, high)| (low, high & !(0xf << 20) | 0x2020_0000));
    let lengths = (20_u64..60, 0_u64..1500, 0_u64..2)
        .prop_map(|(ip, mss, tcp)| (14 << 9 | ip, 0x2020_0400 | tcp << 11 | 20 << 40 | mss << 48));
    prop_oneof![
        2 => data,
        2 => fitting,
        1 => context,
        2 => lengths,
        1 => (any::<u64>(), any::<u64>()),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => offset().prop_map(Act::Read),
        8 => (offset(), value()).prop_map(|(offset, value)| Act::Write(offset, value)),
        8 => (0_usize..256, descriptor()).prop_map(|(slot, (low, high))| Act::Descriptor(slot, low, high)),
        6 => (prop_oneof![Just(0_u32), 0_u32..8], any::<bool>(), prop_oneof![4 => Just(512_u32), 4 => Just(1024), 1 => any::<u32>()], prop_oneof![8 => 0_u32..64, 1 => any::<u32>()])
            .prop_map(|(q, transmit, length, tail)| Act::Queue { q, transmit, length, tail }),
        4 => prop::collection::vec(prop_oneof![0_u32..0x14, any::<u32>()], 1..16).prop_map(Act::Message),
        3 => prop::collection::vec(any::<u8>(), 0..2000).prop_map(Act::Inject),
        6 => Just(Act::Step),
        1 => Just(Act::Reset),
        1 => Just(Act::PfReset),
        1 => any::<bool>().prop_map(Act::Link),
        1 => any::<bool>().prop_map(Act::Detection),
    ]
}

/// What the four rings' memory holds at first: contexts and packets that are right, or receive buffers.
fn fill(memory: &Memory) {
    for slot in 0..256_u64 {
        let buffer = IOVA + 0x2000 + slot % 16 * 0x800;
        let (low, high): (u64, u64) = match (slot / 64 % 2, slot % 2) {
            (1, _) => (buffer, 0),
            // Ethernet, IPv4, TCP; segments of 500 bytes.
            (_, 0) => (14 << 9 | 20, 0x2020_0c00 | 20 << 40 | 500 << 48),
            _ if slot % 8 == 7 => (buffer, 0xab30_05dc | 0x380 << 32 | (1500 - 54) << 46),
            _ => (buffer, 0x2b30_05dc | 0x280 << 32 | 1500 << 46),
        };
        memory.write(AROUND + slot as usize * 16, &low.to_le_bytes());
        memory.write(AROUND + slot as usize * 16 + 8, &high.to_le_bytes());
    }
}

fn message(vf: &impl Registers, words: &[u32]) {
    vf.write32(0x2fc, 4);
    for (i, word) in words.iter().enumerate() {
        vf.write32(0x200 + 4 * i as u32, *word);
    }
    vf.write32(0x2fc, 1);
}

fn perform(device: &Shared, vf: usize, memory: &Memory, act: &Act) {
    let registers = device.vf(vf);
    match act {
        Act::Read(offset) => {
            registers.read32(*offset);
        }
        Act::Write(offset, value) => registers.write32(*offset, *value),
        Act::Descriptor(slot, low, high) => {
            memory.write(AROUND + slot * 16, &low.to_le_bytes());
            memory.write(AROUND + slot * 16 + 8, &high.to_le_bytes());
        }
        Act::Queue {
            q,
            transmit,
            length,
            tail,
        } => {
            let block = 0x1000 + 0x1000 * u32::from(*transmit) + 0x40 * q;
            registers.write32(block + 0x28, 0);
            registers.write32(block, IOVA as u32 + 0x400 * ((q + u32::from(!*transmit)) % 4));
            registers.write32(block + 4, 0);
            registers.write32(block + 8, *length);
            registers.write32(block + 0x10, 0);
            registers.write32(block + 0x14, 0x0200_0001);
            registers.write32(block + 0x28, 1 << 25);
            for _ in 0..3 {
                registers.read32(block + 0x28);
            }
            registers.write32(block + 0x18, *tail);
        }
        Act::Message(words) => message(&registers, words),
        Act::Inject(frame) => {
            device.with(|nic| nic.inject(frame));
            let mut broadcast = frame.clone();
            broadcast.iter_mut().take(6).for_each(|byte| *byte = 0xff);
            device.with(|nic| nic.inject(&broadcast));
        }
        Act::Step => {
            device.step();
        }
        Act::Reset => {
            registers.write32(0, 1 << 26);
            for _ in 0..3 {
                registers.read32(0x2fc);
            }
            message(&registers, &[1]);
        }
        Act::PfReset => device.with(|nic| {
            nic.begin_reset();
            nic.end_reset();
        }),
        Act::Link(up) => device.with(|nic| nic.set_link(up.then_some(Speed::G10))),
        Act::Detection(on) => device.with(|nic| nic.pf().malicious_detection = *on),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn anything_goes(
        kind in prop::sample::select(Kind::ALL.to_vec()),
        queues in prop::sample::select(vec![1_usize, 2, 4, 8]),
        latency in 0_u32..3,
        acts in prop::collection::vec((0_usize..2, act()), 1..150),
    ) {
        let device = Shared::tolerant(Settings { kind, vfs: 2, queues, latency, hold: false });
        let memories: Vec<_> = (0..2)
            .map(|vf| {
                let memory = Arc::new(Memory::anonymous(WINDOW + 2 * AROUND).unwrap());
                memory.write(0, &[CANARY; AROUND]);
                memory.write(AROUND + WINDOW, &[CANARY; AROUND]);
                fill(&memory);
                device.with(|nic| {
                    nic.dma(vf).map_memory(IOVA, &memory, AROUND as u64, WINDOW as u64, Access::ReadWrite).unwrap();
                    nic.policy(vf).spoof_check = false;
                });
                memory
            })
            .collect();
        for (vf, memory) in memories.iter().enumerate() {
            perform(&device, vf, memory, &Act::Reset);
        }
        for (vf, act) in &acts {
            perform(&device, *vf, &memories[*vf], act);
        }
        // Two VFs of at most eight rings of 65,535 descriptors, 256 a step, and some steps for messages.
        prop_assert!(device.with(|nic| nic.run(2 * 8 * 256 + 100)) < 2 * 8 * 256 + 100, "it comes to rest");
        for memory in &memories {
            prop_assert!(memory.read_vec(0, AROUND).iter().all(|byte| *byte == CANARY));
            prop_assert!(memory.read_vec(AROUND + WINDOW, AROUND).iter().all(|byte| *byte == CANARY));
        }
    }
}
