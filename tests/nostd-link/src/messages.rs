//! x
use crate::Outcome;
/// x
/// # Errors
/// x
pub fn run(_seed: u64) -> Outcome {
    Ok(())
}
