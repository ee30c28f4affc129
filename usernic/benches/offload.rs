//! What offloads in software cost: `cargo bench -p usernic --bench offload`.
//!
//! Each line is the median of 31 runs on one thread, in nanoseconds a call. With arguments, `cargo bench -p usernic
//! --bench offload -- CASE COUNT`, it runs that one case COUNT times and prints nothing, for counting instructions:
//! `valgrind --tool=callgrind` with two COUNTs, and the difference.

use std::hint::black_box;
use std::time::Instant;

use usernic::offload::checksum::Sum;
use usernic::offload::hash::{KEY, Toeplitz};
use usernic::offload::headers::Headers;

/// A call, `count` times.
type Case = fn(usize);

/// Ethernet, IPv4, TCP.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; len];
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6]);
    frame[16..18].copy_from_slice(&(len as u16 - 14).to_be_bytes());
    frame[46] = 0x50;
    frame
}

fn parse(count: usize) {
    let frame = frame(1514);
    for _ in 0..count {
        black_box(Headers::parse(black_box(&frame), frame.len()));
    }
}

fn sum<const LEN: usize>(count: usize) {
    let bytes = frame(LEN);
    for _ in 0..count {
        black_box(Sum::of(black_box(&bytes)).checksum());
    }
}

fn hash<const LEN: usize>(count: usize) {
    let (toeplitz, bytes) = (Toeplitz::new(&KEY), [0x5a; LEN]);
    for _ in 0..count {
        black_box(toeplitz.hash(black_box(&bytes)));
    }
}

/// The loop alone: to be taken off the others.
fn nothing(count: usize) {
    let frame = frame(64);
    for _ in 0..count {
        black_box(black_box(&frame).len());
    }
}

const CASES: [(&str, Case); 8] = [
    ("nothing", nothing),
    ("headers", parse),
    ("sum_54", sum::<54>),
    ("sum_1500", sum::<1500>),
    ("sum_9000", sum::<9000>),
    ("sum_65535", sum::<65535>),
    ("hash_tcp4", hash::<12>),
    ("hash_tcp6", hash::<36>),
];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    if let (Some(name), Some(count)) = (args.next(), args.next().and_then(|n| n.parse().ok())) {
        let case = CASES
            .iter()
            .find(|case| case.0 == name)
            .expect("one of the cases' names");
        return case.1(count);
    }
    for (name, case) in CASES {
        let mut runs: Vec<f64> = (0..31)
            .map(|_| {
                let start = Instant::now();
                case(5_000);
                start.elapsed().as_nanos() as f64 / 5_000.0
            })
            .collect();
        runs.sort_by(f64::total_cmp);
        println!(
            "{name:12} {:8.2} ns (fastest {:.2}, slowest {:.2})",
            runs[15], runs[0], runs[30]
        );
    }
}
