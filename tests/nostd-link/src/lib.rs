//! What both programs do: the leaves at work, each result checked, so that nothing of it is optimised out.
#![no_std]

pub mod addresses;
pub mod functions;
pub mod messages;
pub mod rings;

/// A check that did not hold: its number is the program's exit status.
pub type Outcome = Result<(), u8>;

/// `Err(number)` unless `holds`.
///
/// # Errors
/// The number.
pub fn check(holds: bool, number: u8) -> Outcome {
    if holds { Ok(()) } else { Err(number) }
}

/// Runs the checks of the crates that need no operating system.
///
/// # Errors
/// The number of the first check that does not hold.
pub fn run(seed: u64) -> Outcome {
    addresses::run(seed)?;
    rings::run(seed)?;
    messages::run(seed)?;
    functions::run(seed)
}
