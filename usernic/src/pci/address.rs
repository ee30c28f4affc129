//! `0000:81:10.0`

use std::fmt;
use std::str::FromStr;

/// Where a PCI function is: domain, bus, device, function, all in hexadecimal when written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address: write domain:bus:device.function, as 0000:81:10.0 or 81:10.0")]
pub struct AddressError(String);

impl Address {
    /// The function's folder in sysfs, below the root.
    pub fn sysfs(self) -> String {
        format!("sys/bus/pci/devices/{self}")
    }
}

impl FromStr for Address {
    type Err = AddressError;

    /// The domain is 0 if it is left out, as lspci does.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parse = || {
            // Hexadecimal digits only: from_str_radix takes a sign, too.
            let hex = |text: &str, most: usize, max: u32| {
                let valid = (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
                u32::from_str_radix(text, 16).ok().filter(|n| valid && *n <= max)
            };
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            Some(Address {
                // Bridges that are made by software number their domains beyond 16 bits.
                domain: hex(domain, 8, u32::MAX)?,
                bus: hex(bus, 2, 0xff)? as u8,
                device: hex(device, 2, 0x1f)? as u8,
                function: hex(function, 1, 7)? as u8,
            })
        };
        parse().ok_or_else(|| AddressError(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_as_it_is_read() {
        for (text, shown) in [
            ("0000:81:10.0", "0000:81:10.0"),
            ("81:1f.7", "0000:81:1f.7"),
            ("10000:E1:00.1", "10000:e1:00.1"),
            ("0:0:0.0", "0000:00:00.0"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "0000:81:10",
            "81:20.0",
            "81:10.8",
            "81:10.0 ",
            "100:10.0",
            "+1:10.0",
            "0000:81:+1.0",
            "a:0000:81:10.0",
            "eth0",
            "81.0",
            "0000:81:10.0\n",
            "../81:10.0",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.to_string().contains("0000:81:10.0"), "{text:?}");
        }
    }
}
