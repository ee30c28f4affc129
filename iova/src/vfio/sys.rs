//! The calls of VFIO and iommufd, by number. `include/uapi/linux/vfio.h`, `include/uapi/linux/iommufd.h`.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_UNMAP,
};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};

/// The number of a call: `_IO(VFIO_TYPE, ...)`. iommufd has the same type, from 0x80 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request(pub u32);

const fn vfio(number: u32) -> Request {
    Request(((VFIO_TYPE as u32) << 8) | (VFIO_BASE + number))
}

const fn iommufd(number: u32) -> Request {
    Request(((VFIO_TYPE as u32) << 8) | number)
}

#[allow(missing_docs, reason = "named as in vfio.h and iommufd.h, which document them")]
impl Request {
    pub const GET_API_VERSION: Request = vfio(0);
    pub const CHECK_EXTENSION: Request = vfio(1);
    pub const SET_IOMMU: Request = vfio(2);
    pub const GROUP_GET_STATUS: Request = vfio(3);
    pub const GROUP_SET_CONTAINER: Request = vfio(4);
    pub const GROUP_GET_DEVICE_FD: Request = vfio(6);
    pub const DEVICE_GET_INFO: Request = vfio(7);
    pub const DEVICE_GET_REGION_INFO: Request = vfio(8);
    pub const DEVICE_GET_IRQ_INFO: Request = vfio(9);
    pub const DEVICE_SET_IRQS: Request = vfio(10);
    pub const DEVICE_RESET: Request = vfio(11);
    pub const IOMMU_GET_INFO: Request = vfio(12);
    pub const IOMMU_MAP_DMA: Request = vfio(13);
    pub const IOMMU_UNMAP_DMA: Request = vfio(14);
    pub const DEVICE_BIND_IOMMUFD: Request = vfio(18);
    pub const DEVICE_ATTACH_IOMMUFD_PT: Request = vfio(19);

    pub const IOAS_ALLOC: Request = iommufd(IOMMUFD_CMD_IOAS_ALLOC);
    pub const IOAS_IOVA_RANGES: Request = iommufd(IOMMUFD_CMD_IOAS_IOVA_RANGES);
    pub const IOAS_MAP: Request = iommufd(IOMMUFD_CMD_IOAS_MAP);
    pub const IOAS_UNMAP: Request = iommufd(IOMMUFD_CMD_IOAS_UNMAP);
}

/// ioctl(2), or what stands in for it in a test.
pub trait Ioctl: Send + Sync {
    /// Calls it; what comes back is at least 0.
    ///
    /// # Safety
    /// `arg` is what `request` expects: a number in the place of a pointer, or a pointer to the structure of that
    /// request, as many bytes as its `argsz` or `size` says.
    ///
    /// # Errors
    /// Those of the call.
    unsafe fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, arg: *mut c_void) -> io::Result<c_int>;
}

/// The running kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kernel;

impl Ioctl for Kernel {
    unsafe fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, arg: *mut c_void) -> io::Result<c_int> {
        // SAFETY: the caller's promise.
        match unsafe { libc::ioctl(fd.as_raw_fd(), request.0 as _, arg) } {
            -1 => Err(io::Error::last_os_error()),
            value => Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_headers() {
        // _IO(';', 100 + 13) and _IO(';', 0x85), written out.
        assert_eq!(Request::IOMMU_MAP_DMA.0, 0x3b71);
        assert_eq!(Request::DEVICE_ATTACH_IOMMUFD_PT.0, 0x3b77);
        assert_eq!(Request::IOAS_MAP.0, 0x3b85);
    }

    #[test]
    fn the_kernel_answers() {
        use std::os::fd::AsFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the call takes no argument.
        let answer = unsafe { Kernel.ioctl(file.as_fd(), Request::GET_API_VERSION, std::ptr::null_mut()) };
        assert_eq!(answer.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
