//! The commands, one a module.

pub mod capture;
pub mod forward;
pub mod generate;
pub mod ping;
pub mod replay;
pub mod stats;
pub mod switch;
