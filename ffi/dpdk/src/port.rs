//! A port: on a vhost-user socket, or on a virtual function.

use std::ffi::c_void;
use std::ptr::NonNull;

use rustix::io::Errno;
use usernic::filter::Filter;
use usernic::spec::{Kind, PortSpec};
use virtio_ring::net::RxMode;

use crate::abi::{self, Calls, Config, FilterSetup, Info, RxSetup, TxSetup};
use crate::setup::{Fault, Outcome};
use crate::{socket, vf};

/// A port of either kind.
#[allow(clippy::large_enum_variant, reason = "there is one of it, in a box")]
pub(crate) enum Port {
    Socket(socket::Port),
    Vf(vf::Port),
}

/// The same call on either.
macro_rules! either {
    ($port:expr, $it:ident => $call:expr) => {
        match $port {
            Port::Socket($it) => $call,
            Port::Vf($it) => $call,
        }
    };
}

impl Port {
    /// Connects or listens, or opens a device.
    pub(crate) fn open(text: &str, calls: &'static Calls) -> Outcome<Self> {
        let spec: PortSpec = text
            .parse()
            .map_err(|e: usernic::spec::SpecError| Fault::new(Errno::INVAL, e.to_string()))?;
        match spec.kind {
            Kind::VirtioUser => socket::Port::open(spec, calls).map(Port::Socket),
            Kind::Vf => vf::Port::open(spec, calls).map(Port::Vf),
            Kind::Vhost => Err(Fault::new(
                Errno::OPNOTSUPP,
                "a back-end is no port of DPDK's: path= or vf=",
            )),
        }
    }

    pub(crate) fn info(&self) -> Info {
        either!(self, port => port.info())
    }

    pub(crate) fn memory(&self, config: &Config, rx: &[RxSetup], tx: &[TxSetup]) -> Outcome<usize> {
        either!(self, port => port.memory(config, rx, tx))
    }

    /// Starts the queues.
    ///
    /// # Safety
    /// `memory` is as long as [`memory`](Port::memory) says, aligned to a page, and stays until the port is stopped, as do the
    /// pools.
    pub(crate) unsafe fn start(
        &mut self,
        config: &Config,
        rx: &[RxSetup],
        tx: &[TxSetup],
        memory: NonNull<u8>,
        queues: &mut [*mut c_void],
    ) -> Outcome<()> {
        // SAFETY: by the caller.
        either!(self, port => unsafe { port.start(config, rx, tx, memory, queues) })
    }

    pub(crate) fn stop(&mut self) {
        either!(self, port => port.stop());
    }

    pub(crate) fn share(&mut self) -> Outcome<()> {
        either!(self, port => port.share())
    }

    pub(crate) fn service(&mut self) -> bool {
        either!(self, port => port.service())
    }

    pub(crate) fn set_filter(&mut self, setup: &FilterSetup) -> Outcome<()> {
        let filter = filter(setup);
        either!(self, port => port.set_filter(filter))
    }

    pub(crate) fn set_vlan_strip(&mut self, on: bool) {
        either!(self, port => port.set_vlan_strip(on));
    }

    /// Takes packets of so many bytes from now on.
    pub(crate) fn set_mtu(&mut self, mtu: u16) -> Outcome<()> {
        match self {
            Port::Socket(port) => {
                port.set_mtu(mtu);
                Ok(())
            }
            Port::Vf(port) => port.set_mtu(mtu),
        }
    }

    /// The function, where there is one.
    pub(crate) fn vf(&mut self) -> Outcome<&mut vf::Port> {
        match self {
            Port::Vf(port) => Ok(port),
            Port::Socket(_) => Err(Fault::new(
                Errno::OPNOTSUPP,
                "the back-end spreads frames over queues by itself",
            )),
        }
    }
}

/// The filter that an application asks for.
fn filter(setup: &FilterSetup) -> Filter {
    let mut filter = Filter::new(setup.mac);
    let stations = usize::from(setup.stations).min(abi::MAX_ADDRESSES);
    let groups = usize::from(setup.groups).min(abi::MAX_ADDRESSES);
    let (unicast, rest) = setup.addresses.split_at(stations);
    filter.set_addresses(unicast, &rest[..groups]);
    // Promiscuous mode lets in what other VLANs have, too, which DPDK's does not.
    let everything = setup.promiscuous != 0;
    filter.set_mode(RxMode::Promiscuous, everything && setup.vlan == 0);
    filter.set_mode(RxMode::AllUnicast, everything);
    filter.set_mode(RxMode::AllMulticast, everything || setup.all_multicast != 0);
    if setup.vlan != 0 {
        filter.set_vlan_filter(true);
    }
    for id in 0..4096u16 {
        if setup.vlans[usize::from(id / 64)] >> (id % 64) & 1 == 1 {
            filter.set_vlan(id, true);
        }
    }
    filter
}
