//! A device through VFIO, on a kernel that is a model of one: regions, registers, configuration space, interrupts, reset.

#[path = "../../iova/tests/fake/mod.rs"]
mod fake;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use fake::{ADDRESS, Fake, GROUP, Region};
use iova::vfio::Request;
use usernic::vfio::{Access, Device, Error, Options, Placement, find};

/// Where the fake device keeps its regions.
const BAR0: u64 = 0x10000;
const BAR3: u64 = 0x20000;
const CONFIG: u64 = 0x70000;

/// Read, write, mmap: `VFIO_REGION_INFO_FLAG_*`.
const MAPPABLE: u32 = 7;
/// `VFIO_IRQ_SET_DATA_NONE | ACTION_TRIGGER`, `VFIO_IRQ_SET_DATA_EVENTFD | ACTION_TRIGGER`.
const TRIGGER_NONE: u32 = 0x21;
const TRIGGER_EVENTFD: u32 = 0x24;

/// An 82599 VF: BAR0 and BAR3 of 16 KiB, three MSI-X vectors.
fn machine() -> (Fake, File) {
    let fake = Fake::new();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(fake.path("device"))
        .unwrap();
    file.set_len(0x80000).unwrap();
    let region = |offset, size, flags| Region {
        size,
        flags,
        offset,
        sparse: None,
    };
    {
        let mut state = fake.state();
        state.regions[0] = region(BAR0, 0x4000, MAPPABLE);
        state.regions[3] = region(BAR3, 0x4000, MAPPABLE);
        state.regions[7] = region(CONFIG, 4096, 3);
    }
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, CONFIG + at).unwrap();
    put(0, &[0x86, 0x80, 0xed, 0x10]);
    put(6, &[0x10, 0]);
    // PCI Express at 0xa0, then MSI-X of three vectors at 0x70.
    put(0x34, &[0xa0]);
    put(0xa0, &[0x10, 0x70]);
    put(0x70, &[0x11, 0, 2, 0]);
    (fake, file)
}

fn open(fake: &Fake) -> Result<Device, Error> {
    Device::open_on(&fake.host(), ADDRESS.parse().unwrap(), &Options::default())
}

fn calls(fake: &Fake, request: Request) -> usize {
    fake.state().calls.iter().filter(|c| **c == request).count()
}

#[test]
fn registers_are_the_device_s() {
    let (fake, file) = machine();
    let device = open(&fake).unwrap();
    let bar = device.bar(0, 0x4000).unwrap();
    assert_eq!(bar.len(), 0x4000);
    file.write_all_at(&0x1234_5678u32.to_ne_bytes(), BAR0 + 0x10).unwrap();
    // SAFETY: inside of the mapping, aligned, and all bytes are valid.
    let value = unsafe { bar.as_ptr().add(0x10).cast::<u32>().read_volatile() };
    assert_eq!(value, 0x1234_5678);
    // SAFETY: as above.
    unsafe { bar.as_ptr().add(0x3ffc).cast::<u32>().write_volatile(7) };
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, BAR0 + 0x3ffc).unwrap();
    assert_eq!(bytes, 7u32.to_ne_bytes());
    // Half of it is enough for some.
    assert_eq!(device.bar(3, 0x100).unwrap().len(), 4096);
}

#[test]
fn a_bar_that_does_not_do() {
    let (fake, _file) = machine();
    let device = open(&fake).unwrap();
    let text = device.bar(0, 0x4001).unwrap_err().to_string();
    assert!(
        text.contains("BAR0 of 0000:81:10.0 has 16384 bytes") && text.contains("needs 16385"),
        "{text}"
    );
    let text = device.bar(1, 4096).unwrap_err().to_string();
    assert!(text.contains("BAR1 of 0000:81:10.0 has 0 bytes"), "{text}");
    fake.state().regions[0].flags = 3;
    let text = device.bar(0, 0x4000).unwrap_err().to_string();
    assert!(text.contains("lets 0 of 16384 bytes of BAR0"), "{text}");
    // Only a part can be mapped.
    fake.state().regions[0].flags = MAPPABLE;
    fake.state().regions[0].sparse = Some((0, 0x2000));
    let text = device.bar(0, 0x4000).unwrap_err().to_string();
    assert!(text.contains("lets 8192 of 16384 bytes of BAR0"), "{text}");
    assert_eq!(device.bar(0, 0x2000).unwrap().len(), 0x2000);
    fake.state().regions[0].sparse = Some((0x1000, 0x3000));
    assert!(matches!(
        device.bar(0, 0x1000),
        Err(Error::NotMappable { mappable: 0, .. })
    ));
}

#[test]
fn configuration_space() {
    let (fake, file) = machine();
    let device = open(&fake).unwrap();
    let config = device.config();
    assert_eq!(config.ids().unwrap(), (0x8086, 0x10ed));
    assert_eq!(config.capability(0x11).unwrap(), Some(0x70));
    assert_eq!(config.capability(0x10).unwrap(), Some(0xa0));
    assert_eq!(config.capability(0x05).unwrap(), None);
    // A list that bites its tail ends all the same.
    file.write_all_at(&[0xa0], CONFIG + 0x71).unwrap();
    assert_eq!(config.capability(0x05).unwrap(), None);
    // A device that is gone answers with ones.
    file.write_all_at(&[0xff; 256], CONFIG).unwrap();
    assert_eq!(config.capability(0x05).unwrap(), None);
    let text = config.read_u16(4095).unwrap_err().to_string();
    assert!(
        text.contains("read configuration space of 0000:81:10.0 at 0xfff"),
        "{text}"
    );
    assert!(config.write_u16(u64::MAX, 0).is_err());
    // The file ends before the region does.
    file.set_len(CONFIG + 100).unwrap();
    assert!(config.read_u16(100).is_err());
}

#[test]
fn bus_mastering_begins_and_ends_with_us() {
    let (fake, file) = machine();
    let command = || {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, CONFIG + 4).unwrap();
        u16::from_le_bytes(bytes)
    };
    // What the last one left on, and a bit that is not ours.
    file.write_all_at(&[0x04, 0x04], CONFIG + 4).unwrap();
    let device = open(&fake).unwrap();
    assert_eq!(command(), 0x0400);
    device.config().set_bus_master(true).unwrap();
    assert_eq!(command(), 0x0406);
    assert!(device.config().bus_master().unwrap());
    drop(device);
    assert_eq!(command(), 0x0402);
}

#[test]
fn closing_turns_everything_off_and_resets() {
    let (fake, _file) = machine();
    let device = open(&fake).unwrap();
    let bar = device.bar(0, 0x4000).unwrap();
    let fds = device.enable_vectors(2).unwrap();
    let before = calls(&fake, Request::DEVICE_RESET);
    drop(device);
    assert_eq!(
        calls(&fake, Request::DEVICE_RESET),
        before + 1,
        "while registers are mapped, too"
    );
    let state = fake.state();
    assert_eq!(state.calls.last(), Some(&Request::DEVICE_RESET));
    let (index, _, count, flags, _) = state.set_irqs.last().unwrap();
    assert_eq!((*index, *count, *flags), (2, 0, TRIGGER_NONE));
    drop((bar, fds));
}

#[test]
fn interrupts_are_eventfds() {
    let (fake, _file) = machine();
    let device = open(&fake).unwrap();
    assert_eq!(device.vectors().unwrap(), 3);
    let fds = device.enable_vectors(2).unwrap();
    {
        let state = fake.state();
        let raw: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        assert_eq!(state.set_irqs.last().unwrap(), &(2, 0, 2, TRIGGER_EVENTFD, raw));
        assert_eq!(state.set_irqs.len(), 1, "nothing is turned off that is not on");
    }
    let mut value = [0; 8];
    assert!(rustix::io::read(&fds[0], &mut value).is_err(), "nobody waits in read");
    rustix::io::write(&fds[0], &3u64.to_ne_bytes()).unwrap();
    rustix::io::read(&fds[0], &mut value).unwrap();
    assert_eq!(u64::from_ne_bytes(value), 3);

    device.enable_vectors(3).unwrap();
    {
        let state = fake.state();
        assert_eq!(
            state.set_irqs[1],
            (2, 0, 0, TRIGGER_NONE, vec![]),
            "what was on goes off first"
        );
        assert_eq!((state.set_irqs[2].2, state.set_irqs[2].3), (3, TRIGGER_EVENTFD));
    }

    let text = device.enable_vectors(4).unwrap_err().to_string();
    assert!(text.contains("has 3 MSI-X vectors, 4 asked for"), "{text}");
    assert!(device.enable_vectors(0).is_err());

    let notice = device.notice_of_removal().unwrap().unwrap();
    assert_eq!(
        fake.state().set_irqs.last().unwrap(),
        &(4, 0, 1, TRIGGER_EVENTFD, vec![notice.as_raw_fd()])
    );
    fake.state().irqs.truncate(3);
    assert!(
        device.notice_of_removal().unwrap().is_none(),
        "an old kernel does not tell"
    );
}

#[test]
fn a_device_that_cannot_be_reset() {
    let (fake, _file) = machine();
    fake.state().device_flags = 2;
    let device = open(&fake).unwrap();
    assert!(!device.can_reset());
    assert!(matches!(device.reset(), Err(Error::NoReset { .. })));
    drop(device);
    assert_eq!(calls(&fake, Request::DEVICE_RESET), 0);
    fake.state().device_flags = 3;
    fake.state().reset_error = Some(libc::ENOTTY);
    let text = open(&fake).unwrap().reset().unwrap_err().to_string();
    assert!(text.contains("reset 0000:81:10.0"), "{text}");
    fake.state().device_flags = 4;
    assert!(matches!(open(&fake), Err(Error::NotPci { flags: 4, .. })));
}

#[test]
fn its_memory_outlives_it_safely() {
    let (fake, _file) = machine();
    let device = open(&fake).unwrap();
    let addr = NonNull::new(std::ptr::without_provenance_mut(0x7f00_0000_0000)).unwrap();
    // SAFETY: there is no device that would reach it.
    let mapping = unsafe { device.space().map(addr, 0x20_0000, Placement::Auto, Access::ReadWrite) }.unwrap();
    drop(device);
    assert_eq!(fake.state().maps.len(), 1);
    drop(mapping);
    assert!(fake.state().maps.is_empty());
}

#[test]
fn what_is_in_the_way_is_told() {
    let (fake, _file) = machine();
    fake.device(ADDRESS, Some("ixgbevf"), Some(GROUP));
    let text = open(&fake).unwrap_err().to_string();
    assert!(
        text.contains("bound to ixgbevf") && text.contains("usernic bind"),
        "{text}"
    );
}

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

#[test]
fn the_device_that_a_container_was_given() {
    let fake = Fake::new();
    let host = fake.host();
    let found = |pairs: &[(&str, &str)]| find(&host, environment(pairs)).map(|a| a.to_string());
    let plugin = [
        ("PATH", "/bin"),
        ("PCIDEVICE_INTEL_COM_SRIOV_INFO", "{\"0000:81:10.2\":{}}"),
        ("PCIDEVICE_INTEL_COM_SRIOV", "0000:81:10.2"),
    ];
    assert_eq!(found(&plugin).unwrap(), "0000:81:10.2");
    assert_eq!(
        found(&[("PCIDEVICE_A", "81:10.2,"), ("PCIDEVICE_B", "0000:81:10.2")]).unwrap(),
        "0000:81:10.2"
    );
    let text = found(&[("PCIDEVICE_A", "0000:81:10.2,0000:81:10.4")])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("several devices (0000:81:10.2, 0000:81:10.4): pass one"),
        "{text}"
    );
    let text = found(&[("PCIDEVICE_A", "eth0")]).unwrap_err().to_string();
    assert!(text.contains("PCIDEVICE_A=\"eth0\""), "{text}");

    // Without a variable: the network functions behind the nodes.
    let text = found(&[]).unwrap_err().to_string();
    assert!(text.contains("no network device is behind /dev/vfio/12"), "{text}");
    fake.write(&format!("sys/bus/pci/devices/{ADDRESS}/class"), "0x020000\n");
    fake.device("0000:80:01.0", Some("pcieport"), Some(GROUP));
    fake.write("sys/bus/pci/devices/0000:80:01.0/class", "0x060400\n");
    assert_eq!(found(&[]).unwrap(), ADDRESS);
    // The same one, by its own node.
    fake.write("dev/vfio/devices/vfio3", "");
    fake.link(
        "sys/class/vfio-dev/vfio3/device",
        &format!("../../../bus/pci/devices/{ADDRESS}"),
    );
    assert_eq!(found(&[]).unwrap(), ADDRESS);
    fake.remove(&format!("dev/vfio/{GROUP}"));
    assert_eq!(found(&[]).unwrap(), ADDRESS);
    fake.remove("dev/vfio/devices");
    let text = found(&[]).unwrap_err().to_string();
    assert!(
        text.contains("/dev/vfio has no group") && text.contains("pass pci="),
        "{text}"
    );
}
