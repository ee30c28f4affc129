//! A machine with VFIO that is none: files in a folder, and a kernel that answers ioctls as Linux does.
//!
//! It keeps to what `include/uapi/linux/{vfio,iommufd}.h` promise, and has a switch for each way to be refused.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_int, c_void};
use std::fs;
use std::io::{Error, Result};
use std::mem::offset_of;
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_bindings as ioas;
use iova::vfio::{Host, Ioctl, Request};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio as uapi;

pub const ADDRESS: &str = "0000:81:10.0";
pub const DEVICE: &str = "sys/bus/pci/devices/0000:81:10.0";
pub const GROUP: u32 = 12;

/// A region of the device.
#[derive(Clone, Copy, Default)]
pub struct Region {
    pub size: u64,
    pub flags: u32,
    /// In the device's file.
    pub offset: u64,
    /// A capability that says which part can be mapped: offset and size.
    pub sparse: Option<(u64, u64)>,
}

/// What the kernel answers, and what it was asked.
pub struct State {
    pub api_version: i32,
    pub type1: bool,
    pub viable: bool,
    pub interrupt_remapping: bool,
    /// First and last address of what is usable. `None`: a kernel before 5.4, which does not tell.
    pub usable: Option<Vec<(u64, u64)>>,
    pub page_sizes: u64,
    /// Mappings left. `None`: a kernel before 5.10, which does not tell.
    pub avail: Option<u32>,
    /// Refuse to map with this error.
    pub map_error: Option<i32>,
    /// Unmap so many bytes less than there are.
    pub unmap_less: u64,
    /// IOVA to (length, address, writable).
    pub maps: BTreeMap<u64, (u64, u64, bool)>,
    pub calls: Vec<Request>,
    pub regions: Vec<Region>,
    /// Vectors of each kind of interrupt.
    pub irqs: Vec<u32>,
    pub device_flags: u32,
    pub reset_error: Option<i32>,
    /// SET_IRQS: index, start, count, flags, descriptors.
    pub set_irqs: Vec<(u32, u32, u32, u32, Vec<i32>)>,
    root: PathBuf,
    container_set: bool,
    iommu: Option<u32>,
    bound: bool,
    attached: bool,
}

pub struct Fake {
    pub root: TempDir,
    state: Arc<Mutex<State>>,
}

struct FakeKernel(Arc<Mutex<State>>);

impl Fake {
    /// A VF that is bound to vfio-pci, alone in its group, behind an IOMMU with the usual window for MSIs; the container
    /// interface.
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let state = State {
            api_version: 0,
            type1: true,
            viable: true,
            interrupt_remapping: true,
            usable: Some(vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)]),
            page_sizes: 0x1000 | 0x20_0000 | 0x4000_0000,
            avail: Some(65535),
            map_error: None,
            unmap_less: 0,
            maps: BTreeMap::new(),
            calls: Vec::new(),
            regions: vec![Region::default(); 9],
            irqs: vec![0, 0, 3, 1, 1],
            device_flags: uapi::VFIO_DEVICE_FLAGS_PCI | uapi::VFIO_DEVICE_FLAGS_RESET,
            reset_error: None,
            set_irqs: Vec::new(),
            root: root.path().to_owned(),
            container_set: false,
            iommu: None,
            bound: false,
            attached: false,
        };
        let fake = Fake {
            root,
            state: Arc::new(Mutex::new(state)),
        };
        fake.device(ADDRESS, Some("vfio-pci"), Some(GROUP));
        fake.write("dev/vfio/vfio", "");
        fake.write(&format!("dev/vfio/{GROUP}"), "");
        fake.write(
            &format!("sys/kernel/iommu_groups/{GROUP}/reserved_regions"),
            "0x00000000fee00000 0x00000000feefffff msi\n",
        );
        fake.memlock(None, 0);
        fake
    }

    /// The same with iommufd and the device's own node.
    pub fn with_iommufd() -> Self {
        let fake = Self::new();
        fake.write("dev/iommu", "");
        fake.write("dev/vfio/devices/vfio3", "");
        fake.write(&format!("{DEVICE}/vfio-dev/vfio3/dev"), "511:3\n");
        fake
    }

    pub fn host(&self) -> Host {
        Host::new(self.root.path(), FakeKernel(Arc::clone(&self.state)))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        match path.symlink_metadata().unwrap().is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }

    /// A link whose target need not be there.
    pub fn link(&self, path: &str, to: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(to, path).unwrap();
    }

    /// A PCI device in sysfs, in a group if one is given.
    pub fn device(&self, address: &str, driver: Option<&str>, group: Option<u32>) {
        let folder = format!("sys/bus/pci/devices/{address}");
        fs::create_dir_all(self.path(&folder)).unwrap();
        match driver {
            Some(driver) => self.link(
                &format!("{folder}/driver"),
                &format!("../../../../bus/pci/drivers/{driver}"),
            ),
            None => drop(fs::remove_file(self.path(&folder).join("driver"))),
        }
        if let Some(group) = group {
            self.link(
                &format!("{folder}/iommu_group"),
                &format!("../../../../kernel/iommu_groups/{group}"),
            );
            let members = format!("sys/kernel/iommu_groups/{group}/devices");
            self.link(
                &format!("{members}/{address}"),
                &format!("../../../../bus/pci/devices/{address}"),
            );
        }
    }

    /// RLIMIT_MEMLOCK (`None`: unlimited) and what is locked, in bytes, of a process without capabilities.
    pub fn memlock(&self, limit: Option<u64>, locked: u64) {
        self.process(limit, locked, 0, "0 0 4294967295");
    }

    pub fn process(&self, limit: Option<u64>, locked: u64, capabilities: u64, uid_map: &str) {
        let limit = limit.map_or("unlimited".to_owned(), |l| l.to_string());
        self.write(
            "proc/self/limits",
            &format!(
                "Limit                     Soft Limit           Hard Limit           Units     \nMax locked memory         \
                 {limit:<20} {limit:<20} bytes     \n"
            ),
        );
        self.write(
            "proc/self/status",
            &format!(
                "Name:\tx\nVmLck:\t{:8} kB\nCapEff:\t{capabilities:016x}\n",
                locked / 1024
            ),
        );
        self.write("proc/self/uid_map", &format!("         {uid_map}\n"));
    }
}

fn errno(code: i32) -> Error {
    Error::from_raw_os_error(code)
}

impl Ioctl for FakeKernel {
    unsafe fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, arg: *mut c_void) -> Result<c_int> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.calls.push(request);
        let node = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd))).unwrap();
        let node = node
            .strip_prefix(state.root.canonicalize().unwrap())
            .unwrap()
            .to_owned();
        // SAFETY: the promise of whoever called.
        unsafe {
            match request {
                Request::GET_API_VERSION => Ok(state.api_version),
                Request::CHECK_EXTENSION => Ok((arg.addr() as u32 == uapi::VFIO_TYPE1v2_IOMMU && state.type1).into()),
                Request::GROUP_GET_STATUS => {
                    (*arg.cast::<uapi::vfio_group_status>()).flags = state.viable.into();
                    Ok(0)
                }
                Request::GROUP_SET_CONTAINER => {
                    if !state.viable {
                        return Err(errno(libc::EPERM));
                    }
                    assert!(*arg.cast::<i32>() > 2, "a descriptor");
                    state.container_set = true;
                    Ok(0)
                }
                Request::SET_IOMMU => {
                    assert!(state.container_set, "a container without a group has no IOMMU to set");
                    if !state.interrupt_remapping {
                        return Err(errno(libc::EPERM));
                    }
                    state.iommu = Some(arg.addr() as u32);
                    Ok(0)
                }
                Request::GROUP_GET_DEVICE_FD => {
                    assert!(state.iommu.is_some(), "a device is opened when its group has an IOMMU");
                    let name = CStr::from_ptr(arg.cast()).to_str().unwrap();
                    if !state.root.join("sys/bus/pci/devices").join(name).exists() {
                        return Err(errno(libc::ENODEV));
                    }
                    Ok(open_device(&state.root.join("device"))?)
                }
                Request::IOMMU_GET_INFO => state.iommu_info(arg),
                Request::IOMMU_MAP_DMA => {
                    let map = *arg.cast::<uapi::vfio_iommu_type1_dma_map>();
                    assert_eq!(map.argsz, 32);
                    let write = map.flags & uapi::VFIO_DMA_MAP_FLAG_WRITE != 0;
                    state.map(map.iova, map.size, map.vaddr, write)?;
                    Ok(0)
                }
                Request::IOMMU_UNMAP_DMA => {
                    let unmap = &mut *arg.cast::<uapi::vfio_iommu_type1_dma_unmap>();
                    assert_eq!(unmap.argsz, 24);
                    unmap.size = state.unmap(unmap.iova, unmap.size);
                    Ok(0)
                }
                Request::DEVICE_BIND_IOMMUFD => {
                    let bind = *arg.cast::<uapi::vfio_device_bind_iommufd>();
                    assert_eq!((bind.argsz, bind.flags), (16, 0));
                    if !state.viable || !state.interrupt_remapping {
                        return Err(errno(libc::EPERM));
                    }
                    state.bound = true;
                    Ok(0)
                }
                Request::IOAS_ALLOC => {
                    (*arg.cast::<ioas::iommu_ioas_alloc>()).out_ioas_id = 7;
                    Ok(0)
                }
                Request::DEVICE_ATTACH_IOMMUFD_PT => {
                    assert!(state.bound && (*arg.cast::<uapi::vfio_device_attach_iommufd_pt>()).pt_id == 7);
                    state.attached = true;
                    Ok(0)
                }
                Request::IOAS_IOVA_RANGES => {
                    assert!(state.attached, "a device narrows what is usable");
                    let query = &mut *arg.cast::<ioas::iommu_ioas_iova_ranges>();
                    let ranges = state.usable.clone().unwrap();
                    let room = query.num_iovas as usize;
                    query.num_iovas = ranges.len() as u32;
                    query.out_iova_alignment = 0x1000;
                    let out =
                        std::ptr::with_exposed_provenance_mut::<ioas::iommu_iova_range>(query.allowed_iovas as usize);
                    for (at, (start, last)) in ranges.iter().enumerate().take(room) {
                        out.add(at).write(ioas::iommu_iova_range {
                            start: *start,
                            last: *last,
                        });
                    }
                    if room < ranges.len() {
                        Err(errno(libc::EMSGSIZE))
                    } else {
                        Ok(0)
                    }
                }
                Request::IOAS_MAP => {
                    let map = *arg.cast::<ioas::iommu_ioas_map>();
                    assert_eq!((map.size, map.ioas_id, map.flags & 1), (40, 7, 1));
                    let write = map.flags & ioas::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE != 0;
                    state.map(map.iova, map.length, map.user_va, write)?;
                    Ok(0)
                }
                Request::IOAS_UNMAP => {
                    let unmap = &mut *arg.cast::<ioas::iommu_ioas_unmap>();
                    unmap.length = state.unmap(unmap.iova, unmap.length);
                    Ok(0)
                }
                _ => {
                    assert!(
                        node == Path::new("device") || node.starts_with("dev/vfio/devices"),
                        "{request:?} of {node:?}"
                    );
                    state.device_call(request, arg)
                }
            }
        }
    }
}

fn open_device(path: &Path) -> Result<c_int> {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    Ok(file.into_raw_fd())
}

impl State {
    fn map(&mut self, iova: u64, len: u64, addr: u64, write: bool) -> Result<()> {
        if let Some(code) = self.map_error {
            return Err(errno(code));
        }
        let last = iova + (len - 1);
        let usable = self.usable.clone().unwrap_or(vec![(0, u64::MAX)]);
        if !usable.iter().any(|(first, end)| *first <= iova && last <= *end) || (iova | len | addr) & 0xfff != 0 {
            return Err(errno(libc::EINVAL));
        }
        if self
            .maps
            .iter()
            .any(|(start, (l, ..))| *start <= last && iova < start + l)
        {
            return Err(errno(libc::EEXIST));
        }
        if let Some(avail) = &mut self.avail {
            *avail = avail.checked_sub(1).ok_or(errno(libc::ENOSPC))?;
        }
        self.maps.insert(iova, (len, addr, write));
        Ok(())
    }

    fn unmap(&mut self, iova: u64, len: u64) -> u64 {
        match self.maps.get(&iova) {
            Some((mapped, ..)) if *mapped == len => {
                self.maps.remove(&iova);
                self.avail = self.avail.map(|a| a + 1);
                len - self.unmap_less
            }
            _ => 0,
        }
    }

    /// `struct vfio_iommu_type1_info` and its capabilities, as far as `argsz` has room.
    unsafe fn iommu_info(&self, arg: *mut c_void) -> Result<c_int> {
        let mut bytes = vec![0u8; size_of::<uapi::vfio_iommu_type1_info>()];
        let mut flags = uapi::VFIO_IOMMU_INFO_PGSIZES;
        let put = |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        let mut link = offset_of!(uapi::vfio_iommu_type1_info, cap_offset);
        let mut capability = |bytes: &mut Vec<u8>, id: u32, body: &[u8]| {
            flags |= uapi::VFIO_IOMMU_INFO_CAPS;
            let at = bytes.len();
            put(bytes, link, at as u32);
            bytes.extend_from_slice(&(id | 1 << 16).to_ne_bytes());
            link = bytes.len();
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(body);
        };
        // One that nobody asks for comes first.
        capability(&mut bytes, uapi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, &[0; 24]);
        if let Some(usable) = &self.usable {
            let mut body = [usable.len() as u32, 0]
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect::<Vec<_>>();
            for (first, last) in usable {
                body.extend_from_slice(&first.to_ne_bytes());
                body.extend_from_slice(&last.to_ne_bytes());
            }
            capability(&mut bytes, uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, &body);
        }
        if let Some(avail) = self.avail {
            capability(&mut bytes, uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, &avail.to_ne_bytes());
        }
        let len = bytes.len() as u32;
        put(&mut bytes, 0, len);
        put(&mut bytes, 4, flags);
        bytes[8..16].copy_from_slice(&self.page_sizes.to_ne_bytes());
        // SAFETY: argsz bytes are the caller's.
        unsafe {
            let room = arg.cast::<u32>().read() as usize;
            if room < len as usize {
                // The kernel leaves the capabilities out, and says how much room they want.
                bytes.truncate(size_of::<uapi::vfio_iommu_type1_info>());
                bytes[16..20].fill(0);
            }
            arg.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        Ok(0)
    }

    unsafe fn device_call(&mut self, request: Request, arg: *mut c_void) -> Result<c_int> {
        // SAFETY: the promise of whoever called.
        unsafe {
            match request {
                Request::DEVICE_GET_INFO => {
                    let info = &mut *arg.cast::<uapi::vfio_device_info>();
                    info.flags = self.device_flags;
                    info.num_regions = self.regions.len() as u32;
                    info.num_irqs = self.irqs.len() as u32;
                    Ok(0)
                }
                Request::DEVICE_GET_REGION_INFO => self.region_info(arg),
                Request::DEVICE_GET_IRQ_INFO => {
                    let info = &mut *arg.cast::<uapi::vfio_irq_info>();
                    let count = self.irqs.get(info.index as usize).ok_or(errno(libc::EINVAL))?;
                    info.count = *count;
                    info.flags = uapi::VFIO_IRQ_INFO_EVENTFD | uapi::VFIO_IRQ_INFO_NORESIZE;
                    Ok(0)
                }
                Request::DEVICE_SET_IRQS => {
                    let words = arg.cast::<u32>();
                    let (argsz, flags, index) = (words.read(), words.add(1).read(), words.add(2).read());
                    let (start, count) = (words.add(3).read(), words.add(4).read());
                    let most = *self.irqs.get(index as usize).ok_or(errno(libc::EINVAL))?;
                    // Nor does Linux turn off what is not on.
                    let on = self
                        .set_irqs
                        .iter()
                        .rev()
                        .find(|s| s.0 == index)
                        .is_some_and(|s| s.2 > 0);
                    if start + count > most || count == 0 && !on {
                        return Err(errno(libc::EINVAL));
                    }
                    let fds = (0..(argsz - 20) / 4)
                        .map(|i| words.add(5 + i as usize).cast::<i32>().read())
                        .collect();
                    self.set_irqs.push((index, start, count, flags, fds));
                    Ok(0)
                }
                Request::DEVICE_RESET => self.reset_error.map_or(Ok(0), |code| Err(errno(code))),
                _ => Err(errno(libc::ENOTTY)),
            }
        }
    }

    unsafe fn region_info(&self, arg: *mut c_void) -> Result<c_int> {
        // SAFETY: the promise of whoever called.
        unsafe {
            let info = &mut *arg.cast::<uapi::vfio_region_info>();
            let region = self.regions.get(info.index as usize).ok_or(errno(libc::EINVAL))?;
            (info.flags, info.size, info.offset) = (region.flags, region.size, region.offset);
            info.cap_offset = 0;
            let room = info.argsz;
            info.argsz = 32;
            let Some((offset, size)) = region.sparse else {
                return Ok(0);
            };
            info.flags |= uapi::VFIO_REGION_INFO_FLAG_CAPS;
            info.argsz = 32 + 32;
            if room >= info.argsz {
                info.cap_offset = 32;
                let words = arg.cast::<u8>().add(32).cast::<u32>();
                for (at, word) in [uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP | 1 << 16, 0, 1, 0]
                    .into_iter()
                    .enumerate()
                {
                    words.add(at).write(word);
                }
                arg.cast::<u8>().add(48).cast::<[u64; 2]>().write([offset, size]);
            }
            Ok(0)
        }
    }
}
