//! A machine in software: QEMU, a stock Debian kernel and a root file system of our own making.
//!
//! Three parts, each of use to every test that wants a machine:
//!
//! 1. [`mod@fetch`] gets QEMU, a kernel and the guest's programs into a cache, and [`full`] makes another kernel;
//! 2. [`initramfs`] packs modules, programs and files into what the kernel boots from;
//! 3. [`vm`] boots it with devices of the caller's choice, and runs shell scripts in it, one after the other.
//!
//! Nothing of the host is used or changed but a cache directory; no root, no KVM and no network is needed to run it.

pub mod apt;
mod fetch;
pub mod full;
pub mod initramfs;
mod kernel;
pub mod vm;

pub use fetch::{Folder, Machine, cache_for, fetch, install, loader, locked, shown, whole};
pub use initramfs::Initramfs;
pub use vm::{Config, Vm};
