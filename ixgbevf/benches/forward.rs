//! What forwarding a frame of 64 bytes costs the driver, against a device that is memory: `cargo bench -p ixgbevf`.
//!
//! Bursts of 32 are received, the ring is filled again with the buffers of frames that were sent, and the burst is sent; the
//! tails are written to memory. Between the driver's calls, and not counted, this program writes descriptors back as a device
//! would.
//!
//! * without arguments: time-stamp cycles a packet, the median of 31 runs (on x86-64);
//! * `-- instructions`: instructions a packet, of each step, under callgrind (needs valgrind); they repeat to the digit;
//! * `-- run BURSTS plain` or `offloaded`: that many bursts and nothing else, for a profiler.

use std::hint::black_box;
use std::process::Command;
use std::ptr::NonNull;

use ixgbevf::{
    BAR_LEN, Bar, L4, Memory, Model, Offload, Registers as _, RxQueue, Segment, Slot, TxQueue, Vf, ring_len,
};

const BURST: usize = 32;
const RING: u16 = 512;
const BUFFER: u64 = 2048;
const BASE: u64 = 0x7f00_0000_0000;

type Rx = RxQueue<Bar, Vec<Slot>>;
type Tx = TxQueue<Bar, Vec<Slot>>;

/// The frames of a burst: where they are, and which buffer that is.
struct Frames {
    frames: [(Segment, u64); BURST],
    count: usize,
}

/// A way to send a burst.
type Send = fn(&mut Tx, &Frames) -> usize;

/// Buffers that are free, by their numbers.
struct Stack {
    numbers: Vec<u64>,
    top: usize,
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn ixgbevf_bench_receive(rx: &mut Rx, burst: &mut Frames) {
    let mut count = 0;
    rx.poll_each(BURST, |received| {
        if received.is_whole() {
            let addr = BASE + received.cookie * BUFFER;
            burst.frames[count & (BURST - 1)] = (
                Segment {
                    addr,
                    len: received.len,
                },
                received.cookie,
            );
            count += 1;
        }
    });
    burst.count = count;
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn ixgbevf_bench_clean(tx: &mut Tx, free: &mut Stack) {
    let Stack { numbers, top } = free;
    let mut at = *top;
    tx.poll_each(BURST, |cookie| {
        numbers[at] = cookie;
        at += 1;
    });
    *top = at;
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn ixgbevf_bench_refill(rx: &mut Rx, free: &mut Stack) {
    let count = free.top.min(BURST);
    let buffers = free.numbers[free.top - count..free.top].iter().map(|number| {
        let addr = BASE + number * BUFFER;
        (
            Segment {
                addr,
                len: BUFFER as u32,
            },
            *number,
        )
    });
    // SAFETY: nobody follows the addresses.
    free.top -= unsafe { rx.add_each(buffers) };
    rx.publish();
}

#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn ixgbevf_bench_send(tx: &mut Tx, burst: &Frames) -> usize {
    // SAFETY: nobody follows the addresses.
    let sent = unsafe { tx.add_each(burst.frames[..burst.count].iter().copied()) };
    tx.publish();
    sent
}

/// As [`ixgbevf_bench_send`], with checksums and one by one.
#[inline(never)]
#[unsafe(no_mangle)]
extern "Rust" fn ixgbevf_bench_send_offloaded(tx: &mut Tx, burst: &Frames) -> usize {
    let tcp = Offload {
        l3_len: 20,
        ipv4: true,
        ip_checksum: true,
        l4: L4::Tcp,
        ..Offload::NONE
    };
    let frames = burst.frames[..burst.count].iter();
    // SAFETY: nobody follows the addresses.
    let sent = frames.take_while(|(segment, cookie)| unsafe { tx.add(&[*segment], black_box(&tcp), *cookie) }.is_ok());
    let sent = sent.count();
    tx.publish();
    sent
}

/// What is counted: a step, and its function.
const STEPS: [(&str, &str); 4] = [
    ("receive", "ixgbevf_bench_receive"),
    ("refill", "ixgbevf_bench_refill"),
    ("send", "ixgbevf_bench_send"),
    ("clean", "ixgbevf_bench_clean"),
];

/// Instead of the third step.
const OFFLOADED: &str = "ixgbevf_bench_send_offloaded";

/// Zeroed memory, aligned to a page, for as long as the program runs.
fn memory(len: usize) -> NonNull<u8> {
    let layout = std::alloc::Layout::from_size_align(len, 4096).expect("a layout");
    // SAFETY: the length is not 0.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).expect("memory")
}

/// The device: descriptor memory, and how far it is.
struct Device {
    bar: Bar,
    rx: NonNull<[u64; 2]>,
    tx: NonNull<[u64; 2]>,
    rx_head: usize,
    tx_head: usize,
}

impl Device {
    /// Receives a burst, and sends all that there is.
    fn work(&mut self) {
        let ring = usize::from(RING);
        for _ in 0..BURST {
            // SAFETY: inside the ring, which this program keeps; one thread.
            unsafe { self.rx.add(self.rx_head).write_volatile([0x0110, 60 << 32 | 0x63]) };
            self.rx_head = (self.rx_head + 1) % ring;
        }
        let tail = self.bar.read(0x2018) as usize;
        while self.tx_head != tail {
            // SAFETY: as above.
            let desc = unsafe { self.tx.add(self.tx_head) };
            // SAFETY: as above.
            unsafe {
                let [addr, rest] = desc.read_volatile();
                if rest & 0x0800_0000 != 0 {
                    desc.write_volatile([addr, 1 << 32]);
                }
            }
            self.tx_head = (self.tx_head + 1) % ring;
        }
    }
}

struct Bench {
    rx: Rx,
    tx: Tx,
    device: Device,
    free: Stack,
    burst: Frames,
}

/// A BAR of memory has no PF: mailbox and reset are answered here.
fn answer(bar: Bar) {
    // VFMAILBOX says at once that everything is done, and word 0 that everything is agreed to.
    let word = bar.read(0x200);
    bar.write(0x2fc, 0x34 | if bar.read(0x000) != 0 { 0x80 } else { 0 });
    if word & 0xc000_0000 == 0 && word != 0 {
        bar.write(0x200, word | 0x8000_0000);
        if word == 1 {
            bar.write(0x204, 0x0002);
        }
    }
}

fn bench() -> Bench {
    // SAFETY: memory of the BAR's length, for as long as the program runs.
    let bar = unsafe { Bar::new(memory(BAR_LEN as usize)) };
    let (rx_ring, tx_ring) = (memory(ring_len(RING)), memory(ring_len(RING)));
    let slots = || vec![Slot::default(); RING.into()];
    let ring = |ptr, addr| Memory { ptr, addr };
    // SAFETY: the rings have the length and live as long as the program; only the queues use them.
    let rx = unsafe { RxQueue::new(bar, 0, ring(rx_ring, 0x1000), RING, Default::default(), slots()) };
    // SAFETY: as above.
    let tx = unsafe { TxQueue::new(bar, 0, ring(tx_ring, 0x4000), RING, Default::default(), slots()) };
    let (mut rx, mut tx) = (rx.expect("a ring"), tx.expect("a ring"));
    bar.write(0x2fc, 0x80);
    let mut vf = Vf::new(Agreeing(bar), |_: u32| (), Model::X540, 1);
    vf.reset().expect("a PF that agrees");
    vf.configure(&Default::default()).expect("a PF that agrees");
    vf.start_rx(&mut rx).expect("memory that agrees");
    vf.start_tx(&mut tx).expect("memory that agrees");
    let mut free = Stack {
        numbers: (0..1024).collect(),
        top: 1024,
    };
    while rx.free() > 0 {
        ixgbevf_bench_refill(&mut rx, &mut free);
    }
    let none = (Segment { addr: 0, len: 0 }, 0);
    Bench {
        rx,
        tx,
        device: Device {
            bar,
            rx: rx_ring.cast(),
            tx: tx_ring.cast(),
            rx_head: 0,
            tx_head: 0,
        },
        free,
        burst: Frames {
            frames: [none; BURST],
            count: 0,
        },
    }
}

/// The BAR while the VF is set up.
struct Agreeing(Bar);

impl ixgbevf::Registers for Agreeing {
    fn read(&self, offset: u32) -> u32 {
        self.0.read(offset)
    }

    fn write(&self, offset: u32, value: u32) {
        self.0.write(offset, value);
        if offset == 0x2fc {
            answer(self.0);
        }
        if offset == 0 {
            self.0.write(0x2fc, 0x80);
            self.0.write(0, 0);
        }
    }
}

impl Bench {
    /// One burst; the cycles that the driver took.
    fn forward(&mut self, send: Send) -> u64 {
        let Bench {
            rx,
            tx,
            device,
            free,
            burst,
        } = self;
        device.work();
        let start = cycles();
        ixgbevf_bench_receive(rx, black_box(burst));
        ixgbevf_bench_clean(tx, black_box(free));
        ixgbevf_bench_refill(rx, black_box(free));
        let sent = send(tx, black_box(burst));
        let took = cycles() - start;
        assert_eq!((burst.count, sent), (BURST, BURST));
        took
    }
}

#[cfg(target_arch = "x86_64")]
fn cycles() -> u64 {
    // SAFETY: every x86-64 has a time-stamp counter; the fence waits for what is before it.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cycles() -> u64 {
    0
}

/// Instructions of `function` for each packet, by callgrind: two runs, of which one is longer.
fn instructions(function: &str) -> f64 {
    // Multiples of the ring's size, so that wraps fall alike.
    let (few, many) = (256, 1280);
    let moved = total(function, many) - total(function, few);
    moved as f64 / ((many - few) * BURST) as f64
}

fn total(function: &str, bursts: usize) -> u64 {
    let out = std::env::temp_dir().join(format!("ixgbevf-bench-{}.out", std::process::id()));
    let program = std::env::current_exe().expect("a path of this program");
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "-q", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={function}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args(["run", &bursts.to_string()])
        .arg(if function == OFFLOADED { "offloaded" } else { "plain" })
        .status()
        .expect("valgrind starts");
    assert!(status.success(), "valgrind: {status}");
    let report = std::fs::read_to_string(&out).expect("callgrind's report");
    std::fs::remove_file(&out).expect("the report can be removed");
    let totals = report
        .lines()
        .find_map(|line| line.strip_prefix("totals:").or(line.strip_prefix("summary:")))
        .expect("totals in the report");
    totals
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("a number")
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", bursts, how] => {
            let send = if how == "offloaded" {
                ixgbevf_bench_send_offloaded
            } else {
                ixgbevf_bench_send
            };
            let mut bench = bench();
            for _ in 0..bursts.parse().expect("a number of bursts") {
                bench.forward(send);
            }
        }
        ["instructions"] => {
            let mut sum = 0.0;
            for (step, function) in STEPS {
                let packet = instructions(function);
                println!("{step:10}{packet:8.2} instructions a packet");
                sum += packet;
            }
            println!("{:10}{sum:8.2}", "all");
            println!(
                "{:10}{:8.2} if sent one by one, with checksums",
                "send",
                instructions(OFFLOADED)
            );
        }
        _ => {
            let mut bench = bench();
            let mut runs: Vec<f64> = (0..31)
                .map(|_| {
                    let cycles: u64 = (0..10_000).map(|_| bench.forward(ixgbevf_bench_send)).sum();
                    cycles as f64 / (10_000 * BURST) as f64
                })
                .collect();
            runs.sort_by(f64::total_cmp);
            println!("{:.1} cycles a packet ({:.1} to {:.1})", runs[15], runs[0], runs[30]);
        }
    }
}
