//! Opens a device that is bound to vfio-pci, looks at it, gives it a page of memory, and closes it.
//!
//! `vfio [ADDRESS] [auto|container|iommufd|noiommu]`; without an address, the device that this container was given.

use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use usernic::vfio::{Access, Device, Host, Interface, Options, Placement, find};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let address = match arguments.next_if(|a| a.contains(':')) {
        Some(text) => text.parse()?,
        None => find(&Host::default(), std::env::vars())?,
    };
    let mut options = Options::default();
    match arguments.next().as_deref() {
        None | Some("auto") => {}
        Some("container") => options.interface = Interface::Container,
        Some("iommufd") => options.interface = Interface::Iommufd,
        Some("noiommu") => options.noiommu = true,
        Some(other) => return Err(format!("{other:?} is no interface").into()),
    }

    let device = Device::open(address, &options)?;
    let (vendor, id) = device.config().ids()?;
    println!(
        "{address}: {vendor:04x}:{id:04x} through {}",
        device.space().interface()
    );
    println!("addresses for memory: {:?}", device.space().usable());

    // Enough for the registers of any of these virtual functions.
    let bar = device.bar(0, 0x4000)?;
    // SAFETY: inside of the mapping and aligned; VFSTATUS (0x8) of the 82599, X540 and X550 has no side effects.
    let status = unsafe { bar.as_ptr().add(8).cast::<u32>().read_volatile() };
    println!("BAR0: {} bytes, VFSTATUS {status:#010x}", bar.len());

    let vectors = device.vectors()?;
    let fds = device.enable_vectors((vectors as usize).min(2))?;
    println!("MSI-X: {vectors} vectors, {} enabled", fds.len());

    let page = device.space().page() as usize;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
    // SAFETY: new memory at an address that the kernel chooses.
    let memory = unsafe { mmap_anonymous(std::ptr::null_mut(), page, protection, flags)? };
    let addr = NonNull::new(memory.cast()).ok_or("memory at address 0")?;
    // SAFETY: the memory is nobody else's, and is unmapped after the mapping has gone.
    let mapping = unsafe { device.space().map(addr, page, Placement::Auto, Access::ReadWrite)? };
    println!(
        "{page} bytes at {:#x} are {:?} to the device",
        mapping.addr(),
        mapping.iova()
    );
    device.config().set_bus_master(true)?;
    println!("bus master: {}", device.config().bus_master()?);

    drop(device);
    mapping.unmap()?;
    // SAFETY: mapped above, and nothing refers to it any more.
    unsafe { munmap(memory, page)? };
    println!("closed");
    Ok(())
}
