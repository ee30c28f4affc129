//! The commands, one a module.

pub mod bind;
pub mod capture;
pub mod cat;
pub mod container;
pub mod devices;
pub mod doctor;
pub mod forward;
pub mod generate;
pub mod ping;
pub mod replay;
pub mod stats;
pub mod switch;
pub mod vf;
