//! Which device, when nobody says so: what a container was given.

use iova::vfio::Host;

use super::Error;
use crate::pci::{Address, Function};

/// The one device that this container was given.
///
/// An SR-IOV device plugin names it in variables as `PCIDEVICE_INTEL_COM_SRIOV=0000:81:10.0`; several are separated by
/// commas, and `..._INFO` holds JSON. Without any, it is the network function whose group, or whose own node, is in
/// `/dev/vfio`.
///
/// # Errors
/// [`Error::NoneFound`], [`Error::SeveralFound`], [`Error::Variable`].
pub fn find(host: &Host, environment: impl IntoIterator<Item = (String, String)>) -> Result<Address, Error> {
    let mut found = Vec::new();
    let mut named = false;
    for (variable, value) in environment {
        if !variable.starts_with("PCIDEVICE_") || variable.ends_with("_INFO") {
            continue;
        }
        for text in value.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            named = true;
            found.push(text.parse().map_err(|source| Error::Variable {
                variable: variable.clone(),
                value: value.clone(),
                source,
            })?);
        }
    }
    let mut nodes = Vec::new();
    if !named {
        nodes = host.names("dev/vfio");
        nodes.retain(|name| name != "vfio" && name != "devices");
        for group in nodes.iter().filter_map(|name| Host::group_of_node(name)) {
            let members = host.group_members(group).into_iter();
            found.extend(members.filter_map(|m| m.device.parse::<Address>().ok()));
        }
        for node in host.names("dev/vfio/devices") {
            let device = host.link(format!("sys/class/vfio-dev/{node}/device"));
            found.extend(device.and_then(|d| d.parse::<Address>().ok()));
        }
        // A group can hold bridges and other kinds of devices.
        found.retain(|address| Function::read(host, *address).is_ok_and(|f| f.is_network()));
    }
    found.sort();
    found.dedup();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Error::NoneFound {
            seen: match nodes[..] {
                [] => "no variable is set, and /dev/vfio has no group".to_owned(),
                _ => format!(
                    "no variable is set, and no network device is behind /dev/vfio/{}",
                    nodes.join(", ")
                ),
            },
        }),
        _ => Err(Error::SeveralFound { found }),
    }
}
