//! What a PF is asked to let through, so that a filter finds what it lets in.

use ixgbevf::XcastMode;
use virtio_ring::net::{RxMode, VLANS};

use super::Function;
use crate::error::Error;
use crate::filter::Filter;

/// Stations and groups that a PF can be told of (SET_MACVLAN, SET_MULTICAST).
const STATIONS: usize = 16;
const GROUPS: usize = 30;

/// What to ask for.
struct Wanted {
    mode: XcastMode,
    stations: Vec<[u8; 6]>,
    groups: Vec<[u8; 6]>,
}

impl Wanted {
    fn of(filter: Option<&Filter>) -> Self {
        let none = Wanted {
            mode: XcastMode::Multicast,
            stations: Vec::new(),
            groups: Vec::new(),
        };
        let Some(filter) = filter else { return none };
        let stations = filter.stations().filter(|s| s.len() <= STATIONS);
        let groups = filter.groups().filter(|g| g.len() <= GROUPS);
        // All stations come to promiscuous functions only.
        let all_stations = filter.mode(RxMode::Promiscuous) || filter.mode(RxMode::AllUnicast) || stations.is_none();
        let mode = if all_stations {
            XcastMode::Promiscuous
        } else if filter.mode(RxMode::AllMulticast) || groups.is_none() {
            XcastMode::AllMulticast
        } else {
            XcastMode::Multicast
        };
        Wanted {
            mode,
            stations: stations.unwrap_or_default(),
            groups: groups.unwrap_or_default(),
        }
    }
}

impl Function {
    /// Asks the PF for what `filter` lets in; what else comes is for the caller to drop. After an error all is as before,
    /// as far as the PF grants that once more.
    ///
    /// # Errors
    /// [`Error::Vf`].
    pub fn set_filter(&mut self, filter: Option<Filter>) -> Result<(), Error> {
        let before = self.filter.take();
        let mac = self.vf.mac();
        if let Err(error) = self.ask(before.as_ref(), filter.as_ref()) {
            let again = self.ask(filter.as_ref(), before.as_ref());
            // Without a filter before nothing says which address it was.
            let again = again.and_then(|()| match self.vf.mac() == mac {
                true => Ok(()),
                false => self.vf.set_mac(mac),
            });
            if let Err(again) = again {
                tracing::warn!("{}: the filter of before is not granted any more: {again}", self.name());
            }
            self.filter = before;
            return Err(self.failed("have the filter's frames let through")(error));
        }
        self.filter = filter;
        Ok(())
    }

    fn ask(&mut self, before: Option<&Filter>, after: Option<&Filter>) -> Result<(), ixgbevf::Error> {
        let vf = &mut self.vf;
        let (old, new) = (Wanted::of(before), Wanted::of(after));
        if new.mode != self.mode {
            vf.set_mode(new.mode)?;
            self.mode = new.mode;
        }
        if let Some(filter) = after
            && filter.mac() != vf.mac()
        {
            vf.set_mac(filter.mac())?;
        }
        if new.groups != old.groups {
            vf.set_multicast(&new.groups)?;
        }
        if new.stations != old.stations {
            vf.set_unicast(&new.stations)?;
        }
        for id in 0..VLANS {
            let listed =
                |filter: Option<&Filter>| self.vlans.contains(&id) || filter.is_some_and(|filter| filter.has_vlan(id));
            if listed(before) != listed(after) {
                vf.set_vlan(id, listed(after))?;
            }
        }
        Ok(())
    }
}
