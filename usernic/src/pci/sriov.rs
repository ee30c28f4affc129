//! Virtual functions: made and unmade through `sriov_numvfs`.

use iova::vfio::Host;

use super::bind::{settle, write};
use super::{Address, Error, Function, interface_use, users};

/// Has a port make `count` virtual functions. It has none before.
///
/// # Errors
/// Before anything changes: [`Error::NoSriov`], [`Error::NoPortDriver`], [`Error::HowMany`], [`Error::HasVfs`].
/// [`Error::Write`]; [`Error::TooFew`], after which there are none.
pub fn create_vfs(host: &Host, port: Address, count: u16) -> Result<Vec<Address>, Error> {
    let function = Function::read(host, port)?;
    let total = sriov(&function)?;
    if function.driver.is_none() || function.is_given_away() {
        return Err(Error::NoPortDriver {
            address: port,
            driver: function.driver,
        });
    }
    if !function.virtuals.is_empty() {
        return Err(Error::HasVfs {
            address: port,
            count: function.virtuals.len(),
        });
    }
    if count == 0 || count > total {
        return Err(Error::HowMany {
            address: port,
            total,
            asked: count,
        });
    }
    let file = format!("{}/sriov_numvfs", port.sysfs());
    write(host, &file, &count.to_string())?;
    let virtuals = || Function::read(host, port).map(|f| f.virtuals).unwrap_or_default();
    settle(|| virtuals().len() == usize::from(count));
    let made = virtuals();
    if made.len() != usize::from(count) {
        let _ = write(host, &file, "0");
        return Err(Error::TooFew {
            address: port,
            found: made.len(),
            asked: count,
        });
    }
    Ok(made)
}

/// Has a port unmake all its virtual functions, and says which they were.
///
/// # Errors
/// Before anything changes: [`Error::NoSriov`], [`Error::NoVfs`]; [`Error::Open`] and [`Error::InUse`] if one of them is
/// needed (the second not with `force`). [`Error::Write`].
pub fn destroy_vfs(host: &Host, port: Address, force: bool) -> Result<Vec<Address>, Error> {
    let function = Function::read(host, port)?;
    sriov(&function)?;
    if function.virtuals.is_empty() {
        return Err(Error::NoVfs { address: port });
    }
    for address in function.virtuals.iter().copied() {
        let vf = Function::read(host, address)?;
        let by = users(host, &vf);
        if !by.is_empty() {
            return Err(Error::Open { address, by });
        }
        if let Some(by) = interface_use(host, &vf).filter(|_| !force) {
            return Err(Error::InUse { address, by });
        }
    }
    write(host, &format!("{}/sriov_numvfs", port.sysfs()), "0")?;
    settle(|| Function::read(host, port).is_ok_and(|f| f.virtuals.is_empty()));
    Ok(function.virtuals)
}

/// How many virtual functions it can have.
fn sriov(function: &Function) -> Result<u16, Error> {
    function.total_vfs.filter(|total| *total > 0).ok_or(Error::NoSriov {
        address: function.address,
        physical: function.physical,
    })
}
