//! Mapping through both interfaces, and every way to be refused, on a kernel that is a model of one.

mod fake;

use std::os::unix::fs::PermissionsExt;
use std::ptr::NonNull;

use fake::{ADDRESS, DEVICE, Fake, GROUP};
use iova::vfio::{
    Access, Attached, Error, Host, Interface, Mapping, NOIOMMU_WARNING, Options, Placement, Request, attach,
};
use iova::{AllocatorError, Range};

fn container() -> Options {
    Options {
        interface: Interface::Container,
        ..Options::default()
    }
}

fn attached(fake: &Fake) -> Attached {
    attach(&fake.host(), DEVICE, &Options::default()).unwrap()
}

/// The message of an error, without the folder that stands for the root.
fn refused(fake: &Fake, options: &Options) -> String {
    let error = attach(&fake.host(), DEVICE, options).unwrap_err().to_string();
    error.replace(fake.root.path().to_str().unwrap(), "")
}

/// Maps memory that nobody ever touches: the fake kernel does not either.
fn map(attached: &Attached, addr: u64, len: usize, placement: Placement) -> Result<Mapping, Error> {
    let addr = NonNull::new(std::ptr::without_provenance_mut(addr as usize)).unwrap();
    // SAFETY: there is no device that would reach it.
    unsafe { attached.space.map(addr, len, placement, Access::ReadWrite) }
}

const VA: u64 = 0x7f12_3460_0000;

#[test]
fn one_call_maps_all_and_dropping_unmaps() {
    for (fake, name, request) in [
        (Fake::new(), "VFIO type1v2", Request::IOMMU_MAP_DMA),
        (Fake::with_iommufd(), "iommufd", Request::IOAS_MAP),
    ] {
        let attached = attached(&fake);
        assert_eq!(attached.space.interface(), name);
        assert_eq!(attached.group, Some(GROUP));
        // 64 MiB of memory are one mapping, at our own address.
        let mapping = map(&attached, VA, 64 << 20, Placement::Auto).unwrap();
        assert_eq!(mapping.iova(), Range::new(VA, 64 << 20).unwrap());
        assert_eq!(fake.state().maps.get(&VA), Some(&(64 << 20, VA, true)));
        assert_eq!(fake.state().calls.iter().filter(|c| **c == request).count(), 1);
        assert_eq!(attached.space.mapped(), 64 << 20);
        drop(mapping);
        assert!(fake.state().maps.is_empty());
        assert_eq!(attached.space.mapped(), 0);
        // The addresses are free again, and a mapping outlives the handle on its space.
        let mapping = map(&attached, VA, 4096, Placement::Identity).unwrap();
        drop(attached);
        assert_eq!(fake.state().maps.len(), 1);
        mapping.unmap().unwrap();
        assert!(fake.state().maps.is_empty());
    }
}

#[test]
fn pieces_side_by_side_are_one_mapping() {
    let pieces = |pages: &[u64]| -> Vec<_> {
        let piece = |page: &u64| (VA + page * 4096) as usize;
        let at = |page| NonNull::new(std::ptr::without_provenance_mut(piece(page))).unwrap();
        pages.iter().map(|page| (at(page), 4096)).collect()
    };
    for fake in [Fake::new(), Fake::with_iommufd()] {
        let space = attached(&fake).space;
        let map = |pages: &[u64]| {
            // SAFETY: there is no device that would reach it.
            unsafe { space.map_all(&pieces(pages), Placement::Auto, Access::ReadWrite) }
        };
        let mappings = map(&[5, 3, 9, 4, 0]).unwrap();
        let ranges: Vec<_> = mappings.iter().map(|m| (m.addr() - VA, m.iova().len())).collect();
        assert_eq!(ranges, [(0, 4096), (0x3000, 3 * 4096), (0x9000, 4096)]);
        assert_eq!(fake.state().maps.len(), 3);
        drop(mappings);
        // All or nothing.
        fake.memlock(Some(2 * 4096), 0);
        fake.state().avail = Some(1);
        assert!(map(&[0, 1, 3]).is_err());
        assert!(fake.state().maps.is_empty());
        assert_eq!(map(&[0, 1]).unwrap().len(), 1);
    }
}

#[test]
fn access_is_what_was_asked_for() {
    for fake in [Fake::new(), Fake::with_iommufd()] {
        let attached = attached(&fake);
        let addr = NonNull::new(std::ptr::without_provenance_mut(VA as usize)).unwrap();
        // SAFETY: there is no device that would reach it.
        let _mapping = unsafe { attached.space.map(addr, 4096, Placement::Auto, Access::Read) }.unwrap();
        assert_eq!(fake.state().maps.get(&VA), Some(&(4096, VA, false)));
    }
}

#[test]
fn an_iommu_of_fewer_bits_gets_addresses_of_its_own() {
    for fake in [Fake::new(), Fake::with_iommufd()] {
        fake.state().usable = Some(vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)]);
        let attached = attached(&fake);
        let one = map(&attached, VA, 4 << 20, Placement::Auto).unwrap();
        // Aligned as our address is (2 MiB), for the IOMMU's large pages; never at 0.
        assert_eq!(one.iova(), Range::new(0x20_0000, 4 << 20).unwrap());
        assert_eq!(fake.state().maps.get(&0x20_0000), Some(&(4 << 20, VA, true)));
        let two = map(&attached, VA + 0x1000, 0x1000, Placement::Auto).unwrap();
        assert_eq!(two.iova().start(), 0x1000);
        let error = map(&attached, VA, 4096, Placement::Identity).unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("0xfef00000..=0x7fffffffff"), "{error}");
        // Where the same memory is mapped twice, the second time it is elsewhere.
        assert_eq!(
            map(&attached, VA, 4 << 20, Placement::Auto).unwrap().iova().start(),
            0x60_0000
        );
    }
}

#[test]
fn a_device_of_fewer_bits_too() {
    let fake = Fake::new();
    let options = Options {
        width: 32,
        ..Options::default()
    };
    let attached = attach(&fake.host(), DEVICE, &options).unwrap();
    assert_eq!(
        attached.space.usable().iter().collect::<Vec<_>>(),
        [
            Range::new(0x1000, 0xfedf_f000).unwrap(),
            Range::new(0xfef0_0000, 0x110_0000).unwrap()
        ]
    );
    let error = map(&attached, VA, 4 << 30, Placement::Auto).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoAddress {
                source: AllocatorError::Exhausted,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn the_msi_window_is_named() {
    for fake in [Fake::new(), Fake::with_iommufd()] {
        let attached = attached(&fake);
        let error = map(&attached, VA, 0x20_0000, Placement::At(0xfed0_0000)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::ReservedRegion { .. }), "{text}");
        assert!(text.contains("the MSI window 0xfee00000..=0xfeefffff"), "{text}");
        assert!(fake.state().maps.is_empty(), "the kernel was not even asked");
        map(&attached, VA, 0x10_0000, Placement::At(0xfed0_0000)).unwrap();
    }
}

#[test]
fn a_kernel_that_does_not_tell_what_is_usable() {
    let fake = Fake::new();
    fake.state().usable = None;
    fake.state().avail = None;
    let reserved = format!("sys/kernel/iommu_groups/{GROUP}/reserved_regions");
    fake.write(
        &reserved,
        "0x0000000000001000 0x0000000000001fff direct\nnonsense\n0x5 0x4 odd\n",
    );
    let attached = attached(&fake);
    assert_eq!(
        format!("{:?}", attached.space.usable()),
        "[0x2000..=0xfedfffff, 0xfef00000..=0x7fffffffff]"
    );
    let error = map(&attached, VA, 0x1000, Placement::At(0x1000)).unwrap_err();
    assert!(error.to_string().contains("a direct range"), "{error}");
}

#[test]
fn memory_is_of_whole_pages() {
    let fake = Fake::new();
    let attached = attached(&fake);
    for (addr, len, placement) in [
        (VA + 8, 4096, Placement::Auto),
        (VA, 100, Placement::Auto),
        (VA, 0, Placement::Auto),
        (VA, 4096, Placement::At(0x1008)),
        (VA, usize::MAX & !0xfff, Placement::Auto),
    ] {
        let error = map(&attached, addr, len, placement).unwrap_err();
        assert!(matches!(error, Error::Unaligned { page: 4096, .. }), "{error}");
    }
    // A kernel of larger pages.
    fake.state().page_sizes = 0x1_0000;
    let attached = self::attached(&fake);
    assert!(map(&attached, VA + 0x1000, 0x1_0000, Placement::Auto).is_err());
}

#[test]
fn a_memlock_one_page_too_small_is_reported_before() {
    for (fake, locked) in [(Fake::new(), 8192), (Fake::with_iommufd(), 0)] {
        let attached = attached(&fake);
        fake.memlock(Some(locked + 0x1f_f000), locked);
        let error = map(&attached, VA, 0x20_0000, Placement::Auto).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Memlock { .. }), "{text}");
        assert!(
            text.contains("4096 too few") && text.contains(&format!("to {} or more", locked + 0x20_0000)),
            "{text}"
        );
        assert!(fake.state().maps.is_empty(), "the kernel was not asked");
        // The addresses are free again.
        fake.memlock(Some(locked + 0x20_0000), locked);
        let first = map(&attached, VA, 0x20_0000, Placement::Identity).unwrap();
        // The user's account is not told to us, ours is known.
        fake.memlock(Some(locked + 0x20_0000), locked + 0x20_0000);
        assert!(matches!(
            map(&attached, VA + 0x20_0000, 4096, Placement::Auto),
            Err(Error::Memlock { .. })
        ));
        drop(first);
        fake.memlock(Some(locked + 4096), locked);
        map(&attached, VA, 4096, Placement::Auto).unwrap();
    }
}

#[test]
fn cap_ipc_lock_counts_in_the_first_user_namespace() {
    let fake = Fake::new();
    let attached = attached(&fake);
    fake.process(Some(4096), 4096, 1 << 14, "0 0 4294967295");
    map(&attached, VA, 8192, Placement::Auto).unwrap();
    fake.process(Some(4096), 4096, 1 << 14, "0 100000 65536");
    assert!(matches!(
        map(&attached, VA, 8192, Placement::Auto),
        Err(Error::Memlock { .. })
    ));
}

#[test]
fn the_limit_of_entries_is_reported_before() {
    let fake = Fake::new();
    fake.state().avail = Some(2);
    let attached = attached(&fake);
    let _one = map(&attached, VA, 4096, Placement::Auto).unwrap();
    let two = map(&attached, VA + 4096, 4096, Placement::Auto).unwrap();
    let calls = |fake: &Fake| {
        fake.state()
            .calls
            .iter()
            .filter(|c| **c == Request::IOMMU_MAP_DMA)
            .count()
    };
    let text = map(&attached, VA + 8192, 4096, Placement::Auto)
        .unwrap_err()
        .to_string();
    assert!(text.contains("2 of ours") && text.contains("dma_entry_limit"), "{text}");
    assert_eq!(calls(&fake), 2, "the kernel was not asked");
    drop(two);
    let _two = map(&attached, VA + 8192, 4096, Placement::Auto).unwrap();
    // A kernel that does not tell refuses with ENOSPC: the same message.
    let fake = Fake::new();
    fake.state().avail = None;
    fake.state().map_error = Some(libc::ENOSPC);
    let text = map(&self::attached(&fake), VA, 4096, Placement::Auto)
        .unwrap_err()
        .to_string();
    assert!(text.contains("0 of ours") && text.contains("dma_entry_limit"), "{text}");
}

#[test]
fn errors_of_the_kernel_say_what_they_mean() {
    for (code, text) in [
        (libc::EEXIST, "mapped there already"),
        (libc::ENOMEM, "RLIMIT_MEMLOCK"),
        (libc::EFAULT, "no memory of ours"),
        (libc::EINVAL, "map 0x7f1234600000..=0x7f1234600fff with"),
    ] {
        for fake in [Fake::new(), Fake::with_iommufd()] {
            let attached = attached(&fake);
            fake.state().map_error = Some(code);
            let error = map(&attached, VA, 4096, Placement::Identity).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
            fake.state().map_error = None;
            map(&attached, VA, 4096, Placement::Identity).unwrap();
        }
    }
}

#[test]
fn what_was_not_unmapped_keeps_its_addresses() {
    let fake = Fake::new();
    let attached = attached(&fake);
    fake.state().unmap_less = 4096;
    let error = map(&attached, VA, 8192, Placement::Auto).unwrap().unmap().unwrap_err();
    assert!(matches!(error, Error::PartialUnmap { unmapped: 4096, .. }), "{error}");
    let error = map(&attached, VA, 8192, Placement::Identity).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NoAddress {
                source: AllocatorError::Taken(_),
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn no_device_no_iommu_no_group() {
    let fake = Fake::new();
    let error = attach(&fake.host(), "sys/bus/pci/devices/0000:99:00.0", &container()).unwrap_err();
    assert!(error.to_string().contains("no device 0000:99:00.0"), "{error}");
    fake.remove(&format!("{DEVICE}/iommu_group"));
    let text = refused(&fake, &container());
    assert!(text.contains("behind no IOMMU"), "others have groups: {text}");
    fake.remove("sys/kernel/iommu_groups");
    let text = refused(&fake, &container());
    assert!(text.contains("no IOMMU") && text.contains("intel_iommu=on"), "{text}");
}

#[test]
fn another_driver_or_none() {
    let fake = Fake::new();
    for (driver, text) in [(Some("ixgbevf"), "bound to ixgbevf"), (None, "bound to no driver")] {
        fake.device(ADDRESS, driver, Some(GROUP));
        let error = refused(&fake, &container());
        assert!(
            error.contains(text) && error.contains("usernic bind 0000:81:10.0"),
            "{error}"
        );
    }
    fake.device(ADDRESS, Some("mlx5_vfio_pci"), Some(GROUP));
    attached(&fake);
}

#[test]
fn no_group_node() {
    let fake = Fake::new();
    fake.remove(&format!("dev/vfio/{GROUP}"));
    let text = refused(&fake, &container());
    assert!(
        text.contains("there is no /dev/vfio/12") && text.contains("--device"),
        "{text}"
    );
    fake.write(&format!("dev/vfio/{GROUP}"), "");
    fake.remove("dev/vfio/vfio");
    let text = refused(&fake, &container());
    assert!(
        text.contains("there is no /dev/vfio/vfio") && text.contains("modprobe"),
        "{text}"
    );
}

/// Runs as nobody, as far as files are concerned, if this is root. Such an identity is a thread's.
fn without_rights<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes numbers, changes this thread only, which ends with the closure.
            unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
            run()
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_node_of_somebody_else() {
    let fake = Fake::with_iommufd();
    std::fs::set_permissions(fake.root.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for path in [format!("dev/vfio/{GROUP}"), "dev/vfio/devices/vfio3".into()] {
        std::fs::set_permissions(fake.path(&path), std::fs::Permissions::from_mode(0o400)).unwrap();
    }
    for interface in [Interface::Container, Interface::Auto, Interface::Iommufd] {
        let options = Options {
            interface,
            ..Options::default()
        };
        let text = without_rights(|| refused(&fake, &options));
        let node = if interface == Interface::Iommufd {
            "devices/vfio3"
        } else {
            "12"
        };
        assert!(
            text.contains(&format!("/dev/vfio/{node} belongs to")) && text.contains("with mode 0400"),
            "{text}"
        );
        assert!(text.contains("chown"), "{text}");
    }
}

#[test]
fn a_group_with_others_in_it() {
    for (fake, interface) in [
        (Fake::new(), Interface::Container),
        (Fake::with_iommufd(), Interface::Iommufd),
    ] {
        fake.device("0000:81:10.1", Some("ixgbevf"), Some(GROUP));
        fake.device("0000:81:10.2", Some("igbvf"), Some(GROUP));
        fake.device("0000:81:10.3", None, Some(GROUP));
        fake.device("0000:80:01.0", Some("pcieport"), Some(GROUP));
        fake.state().viable = false;
        let options = Options {
            interface,
            ..Options::default()
        };
        let text = refused(&fake, &options);
        assert!(text.contains("group 12 is not viable"), "{text}");
        assert!(
            text.contains("0000:81:10.1 is bound to ixgbevf, 0000:81:10.2 is bound to igbvf"),
            "{text}"
        );
        assert!(text.contains("`usernic bind 0000:81:10.1 0000:81:10.2` too"), "{text}");
        assert!(fake.state().maps.is_empty());
    }
}

#[test]
fn no_interrupt_remapping() {
    for (fake, module) in [(Fake::new(), "vfio_iommu_type1"), (Fake::with_iommufd(), "iommufd")] {
        fake.state().interrupt_remapping = false;
        let text = refused(&fake, &Options::default());
        assert!(
            text.contains("intremap=on")
                && text.contains(&format!("allow_unsafe_interrupts=1 for the module {module}")),
            "{text}"
        );
    }
}

#[test]
fn an_old_or_crippled_vfio() {
    let fake = Fake::new();
    fake.state().type1 = false;
    assert!(refused(&fake, &container()).contains("modprobe vfio_iommu_type1"));
    fake.state().api_version = 9;
    assert!(refused(&fake, &container()).contains("version 9"));
}

#[test]
fn iommufd_where_the_kernel_has_it() {
    let iommufd = Options {
        interface: Interface::Iommufd,
        ..Options::default()
    };
    let fake = Fake::new();
    assert!(refused(&fake, &iommufd).contains("no iommufd (no /dev/iommu)"));
    // iommufd without nodes for devices: the other interface is taken, unless this one is asked for.
    fake.write("dev/iommu", "");
    std::fs::create_dir_all(fake.path(&format!("{DEVICE}/vfio-dev/vfio3"))).unwrap();
    let text = refused(&fake, &iommufd);
    assert!(
        text.contains("VFIO_DEVICE_CDEV") && text.contains("0000:81:10.0/vfio-dev"),
        "{text}"
    );
    assert_eq!(attached(&fake).space.interface(), "VFIO type1v2");
    // Both are there.
    let fake = Fake::with_iommufd();
    assert_eq!(attached(&fake).space.interface(), "iommufd");
    assert_eq!(
        attach(&fake.host(), DEVICE, &container()).unwrap().space.interface(),
        "VFIO type1v2"
    );
    // A container that was given the group's node only.
    fake.remove("dev/vfio/devices/vfio3");
    assert_eq!(attached(&fake).space.interface(), "VFIO type1v2");
    // More ranges than a first question has room for.
    let fake = Fake::with_iommufd();
    fake.state().usable = Some((0..20).map(|n| (n * 0x10_0000, n * 0x10_0000 + 0xffff)).collect());
    assert_eq!(attached(&fake).space.usable().len(), 20);
}

fn noiommu(fake: &Fake) -> Options {
    fake.write(&format!("sys/kernel/iommu_groups/{GROUP}/name"), "vfio-noiommu\n");
    fake.write(&format!("dev/vfio/noiommu-{GROUP}"), "");
    fake.remove(&format!("dev/vfio/{GROUP}"));
    Options {
        noiommu: true,
        ..Options::default()
    }
}

/// Entries of `/proc/self/pagemap` for the pages from `VA` on.
fn pagemap(fake: &Fake, entries: &[u64]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(fake.path("proc/self/pagemap")).unwrap();
    for (at, entry) in entries.iter().enumerate() {
        file.write_all_at(&entry.to_ne_bytes(), (VA / 4096 + at as u64) * 8)
            .unwrap();
    }
}

#[test]
fn noiommu_only_by_name() {
    let fake = Fake::new();
    let by_name = noiommu(&fake);
    let text = refused(&fake, &Options::default());
    assert!(
        text.contains("reaches all memory") && text.contains("noiommu=1"),
        "{text}"
    );
    assert!(fake.state().calls.is_empty(), "nothing was opened");
    assert!(NOIOMMU_WARNING.contains("all memory of this machine"));

    let present = 1 << 63;
    pagemap(
        &fake,
        &[present | 0x1234, present | 0x1235, present | 0x1300, present, 0],
    );
    let attached = attach(&fake.host(), DEVICE, &by_name).unwrap();
    assert_eq!(attached.space.interface(), "noiommu");
    let mapping = map(&attached, VA, 8192, Placement::Auto).unwrap();
    assert_eq!(mapping.iova(), Range::new(0x123_4000, 8192).unwrap());
    drop(mapping);
    for (addr, len, text) in [
        (VA, 3 * 4096, "8192 are: use one huge page"),
        (VA + 3 * 4096, 4096, "CAP_SYS_ADMIN"),
        (VA + 4 * 4096, 4096, "not present"),
    ] {
        let error = map(&attached, addr, len, Placement::Auto).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn this_machine_says_what_it_is_or_what_it_lacks() {
    let host = Host::default();
    let error = attach(&host, "sys/bus/pci/devices/ffff:ff:1f.7", &Options::default()).unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. }), "{error}");
}
