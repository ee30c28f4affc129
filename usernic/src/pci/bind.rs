//! From the kernel's driver to vfio-pci and back, by `driver_override`: no other device of the same kind is touched.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use iova::vfio::Host;

use super::{Address, Error, Function, interface_use, users};

/// How to bind.
#[derive(Debug, Clone)]
pub struct BindOptions {
    /// The driver: `vfio-pci`, or a variant of it.
    pub driver: String,
    /// Bind also what the machine's routes, bonds or bridges need.
    pub force: bool,
    /// Bind a function that no IOMMU keeps to its memory.
    pub noiommu: bool,
    /// Bind the others of its IOMMU group, too.
    pub group: bool,
}

impl Default for BindOptions {
    fn default() -> Self {
        BindOptions {
            driver: "vfio-pci".into(),
            force: false,
            noiommu: false,
            group: false,
        }
    }
}

/// What became of a function.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Bound {
    /// The function.
    pub address: Address,
    /// The driver before.
    pub from: Option<String>,
    /// The driver now.
    pub to: Option<String>,
    /// What a container must be given to use it.
    pub nodes: Vec<String>,
}

/// Gives functions to vfio-pci, all or none. Those that it has already are left as they are.
///
/// # Errors
/// Before anything changes: [`Error::NoDevice`], [`Error::NoDriver`], [`Error::InUse`], [`Error::NoIommu`],
/// [`Error::NotViable`]. After: [`Error::Write`], [`Error::NotBound`]; what was changed is taken back then.
pub fn bind(host: &Host, addresses: &[Address], options: &BindOptions) -> Result<Vec<Bound>, Error> {
    let functions = plan(host, addresses, options)?;
    let mut bound: Vec<Bound> = Vec::new();
    for function in &functions {
        let mut done = Bound {
            address: function.address,
            from: function.driver.clone(),
            to: function.driver.clone(),
            nodes: Vec::new(),
        };
        if function.driver.as_deref() != Some(&options.driver) {
            if let Err(error) = hand_over(host, function, Some(&options.driver)) {
                let changed = bound.iter().filter(|b| b.from != b.to).map(|b| b.address);
                for address in changed.chain([function.address]) {
                    // As far as it goes: the first error is the one to tell.
                    let _ = Function::read(host, address).and_then(|f| hand_over(host, &f, None));
                }
                return Err(error);
            }
            done.to = Some(options.driver.clone());
        }
        bound.push(done);
    }
    for (bound, function) in bound.iter_mut().zip(&functions) {
        bound.nodes = Function::read(host, function.address)?.nodes(host);
    }
    Ok(bound)
}

/// What is to be bound, if nothing speaks against it.
fn plan(host: &Host, addresses: &[Address], options: &BindOptions) -> Result<Vec<Function>, Error> {
    let mut addresses = addresses.to_vec();
    addresses.sort();
    addresses.dedup();
    let mut functions = Vec::new();
    while let Some(address) = addresses.get(functions.len()).copied() {
        let function = Function::read(host, address)?;
        if let Some(group) = function.iommu_group {
            // Bridges and what has no driver are in nobody's way.
            let others = host.group_members(group).into_iter().filter(|m| m.blocks());
            let others = others.filter(|m| !addresses.iter().any(|a| a.to_string() == m.device));
            let others: Vec<_> = others.collect();
            if options.group {
                addresses.extend(others.iter().filter_map(|m| m.device.parse::<Address>().ok()));
            } else if !others.is_empty() {
                return Err(Error::NotViable {
                    group,
                    others: others
                        .into_iter()
                        .map(|m| (m.device, m.driver.unwrap_or_default()))
                        .collect(),
                });
            }
        }
        functions.push(function);
    }
    for function in &functions {
        let address = function.address;
        if let Some(by) = interface_use(host, function).filter(|_| !options.force) {
            return Err(Error::InUse { address, by });
        }
        if function.iommu_group.is_none() || function.noiommu {
            if !options.noiommu {
                return Err(Error::NoIommu {
                    address,
                    none: host.names("sys/kernel/iommu_groups").is_empty(),
                });
            }
            let switch = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
            if !host.read(switch).is_ok_and(|text| matches!(text.trim(), "Y" | "1")) {
                return Err(Error::NoIommuOff {
                    path: host.path(switch),
                });
            }
        }
    }
    if !host.exists(format!("sys/bus/pci/drivers/{}", options.driver)) {
        return Err(Error::NoDriver {
            driver: options.driver.clone(),
        });
    }
    Ok(functions)
}

/// Takes functions back from vfio-pci: the kernel's own drivers may have them again.
///
/// # Errors
/// Before anything changes: [`Error::NoDevice`], [`Error::NotGivenAway`], [`Error::Open`]. [`Error::Write`].
pub fn unbind(host: &Host, addresses: &[Address]) -> Result<Vec<Bound>, Error> {
    let functions = addresses
        .iter()
        .map(|a| Function::read(host, *a))
        .collect::<Result<Vec<_>, _>>()?;
    for function in &functions {
        let address = function.address;
        if !function.is_given_away() {
            return Err(Error::NotGivenAway {
                address,
                driver: function.driver.clone(),
            });
        }
        let by = users(host, function);
        if !by.is_empty() {
            return Err(Error::Open { address, by });
        }
    }
    let give_back = |function: Function| {
        hand_over(host, &function, None)?;
        Ok(Bound {
            address: function.address,
            to: Function::read(host, function.address)?.driver,
            from: function.driver,
            nodes: Vec::new(),
        })
    };
    functions.into_iter().map(give_back).collect()
}

/// Hands a function to a driver, or to whichever of the kernel's drivers wants it.
fn hand_over(host: &Host, function: &Function, to: Option<&str>) -> Result<(), Error> {
    let folder = function.address.sysfs();
    let address = function.address.to_string();
    write(host, &format!("{folder}/driver_override"), to.unwrap_or("\n"))?;
    if function.driver.is_some() {
        write(host, &format!("{folder}/driver/unbind"), &address)?;
        settle(|| host.link(format!("{folder}/driver")).is_none());
    }
    let probed = write(host, "sys/bus/pci/drivers_probe", &address);
    let found = || host.link(format!("{folder}/driver"));
    let Some(driver) = to else {
        // Nobody may want it.
        settle(|| found().is_some());
        return probed;
    };
    if probed.is_ok() {
        settle(|| found().as_deref() == Some(driver));
    }
    match found() {
        Some(found) if found == driver => Ok(()),
        found => probed.and(Err(Error::NotBound {
            address: function.address,
            driver: driver.to_owned(),
            found,
        })),
    }
}

/// Waits, two seconds at most, for something that the kernel has mostly done when a write returns.
pub(super) fn settle(mut done: impl FnMut() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Writes to a file of sysfs, in one call.
pub(super) fn write(host: &Host, path: &str, text: &str) -> Result<(), Error> {
    let path = host.path(path);
    let opened = OpenOptions::new().write(true).open(&path);
    opened
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| Error::Write {
            path,
            text: text.trim().to_owned(),
            source,
        })
}
