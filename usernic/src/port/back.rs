//! x
use super::Port;
use crate::error::Error;
use crate::spec::PortSpec;
pub(super) fn open(_: PortSpec) -> Result<Port, Error> { todo!() }
