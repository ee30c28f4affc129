//! What vfio-user asks of one VF: regions, DMA maps, interrupts, resets.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::fstat;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use super::Machine;
use super::config_space::{self, ConfigSpace};
use crate::dma::Access;
use crate::kind::Kind;
use crate::memory::Memory;
use crate::register::{BAR0_BYTES, VECTORS};

/// Indices of VFIO_PCI regions and interrupts (linux/vfio.h).
const REGIONS: u32 = 9;
const REGION_BAR0: u32 = 0;
const REGION_BAR3: u32 = 3;
const REGION_CONFIG: u32 = 7;
const IRQS: u32 = 5;
const IRQ_MSIX: u32 = 2;

const REGION_READ_WRITE: u32 = 3;
const IRQ_EVENTFD: u32 = 1;
const IRQ_NO_RESIZE: u32 = 8;
const SET_EVENTFD: u32 = 4;

/// A server at a socket, listening.
pub(super) fn server(path: &Path) -> Result<Server, vfio_user::Error> {
    let region = |index| {
        let size = match index {
            REGION_BAR0 | REGION_BAR3 => BAR0_BYTES,
            REGION_CONFIG => config_space::BYTES as u64,
            _ => 0,
        };
        let mut region = ServerRegion {
            region_info: Default::default(),
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        region.region_info.argsz = size_of_val(&region.region_info) as u32;
        region.region_info.index = index;
        region.region_info.size = size;
        region.region_info.flags = if size == 0 { 0 } else { REGION_READ_WRITE };
        region
    };
    let irq = |index| IrqInfo {
        index,
        flags: IRQ_EVENTFD | IRQ_NO_RESIZE,
        count: if index == IRQ_MSIX { VECTORS as u32 } else { 0 },
    };
    let irqs = (0..IRQS).map(irq).collect();
    Server::new(path, true, irqs, (0..REGIONS).map(region).collect())
}

pub(super) struct Backend {
    machine: Arc<Machine>,
    vf: usize,
    kind: Kind,
    config: ConfigSpace,
    bar3: Box<[u8; BAR0_BYTES as usize]>,
    /// Files that were sent, mapped once each, by device and inode.
    files: HashMap<(u64, u64), Arc<Memory>>,
}

impl Backend {
    pub fn new(machine: Arc<Machine>, vf: usize) -> Self {
        let kind = machine.device().with(|nic| nic.pf().kind);
        Self {
            machine,
            vf,
            kind,
            config: ConfigSpace::new(kind),
            bar3: Box::new([0; BAR0_BYTES as usize]),
            files: HashMap::new(),
        }
    }

    /// The client has gone: memory and eventfds go too.
    pub fn disconnected(&mut self) {
        self.reset_function();
        self.machine.act(|nic| nic.dma(self.vf).unmap_all());
        self.files.clear();
    }

    fn reset_function(&mut self) {
        self.machine.act(|nic| nic.reset_vf(self.vf));
        for vector in 0..VECTORS {
            self.machine.set_line(self.vf, vector, None);
        }
        self.config = ConfigSpace::new(self.kind);
    }

    /// The file behind a mapping, mapped whole, again if it has grown.
    fn memory(&mut self, file: &File, end: u64) -> io::Result<Arc<Memory>> {
        let stat = fstat(file)?;
        let length = stat.st_size as u64;
        if end > length {
            return Err(io::Error::other(format!("{length} bytes of file, {end} needed")));
        }
        let key = (stat.st_dev, stat.st_ino);
        if let Some(memory) = self.files.get(&key).filter(|memory| memory.len() as u64 >= end) {
            return Ok(Arc::clone(memory));
        }
        let memory =
            Memory::file(file, length as usize, true).or_else(|_| Memory::file(file, length as usize, false))?;
        let memory = Arc::new(memory);
        self.files.insert(key, Arc::clone(&memory));
        Ok(memory)
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            REGION_BAR0 => {
                let mut at = u32::try_from(offset).unwrap_or(u32::MAX);
                for bytes in data.chunks_mut(4) {
                    let value = self.machine.act(|nic| nic.read32(self.vf, at));
                    bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
                    at = at.saturating_add(4);
                }
            }
            REGION_BAR3 => {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                match at.checked_add(data.len()).and_then(|end| self.bar3.get(at..end)) {
                    Some(bytes) => data.copy_from_slice(bytes),
                    None => data.fill(0),
                }
            }
            REGION_CONFIG => self.config.read(offset, data),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            REGION_BAR0 => {
                let mut at = u32::try_from(offset).unwrap_or(u32::MAX);
                for bytes in data.chunks(4) {
                    // Less than a register is no access to one.
                    let Ok(value) = bytes.try_into().map(u32::from_le_bytes) else {
                        return Err(io::ErrorKind::InvalidInput.into());
                    };
                    self.machine.act(|nic| nic.write32(self.vf, at, value));
                    at = at.saturating_add(4);
                }
            }
            REGION_BAR3 => {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                if let Some(bytes) = at.checked_add(data.len()).and_then(|end| self.bar3.get_mut(at..end)) {
                    bytes.copy_from_slice(data);
                }
            }
            REGION_CONFIG => {
                if self.config.write(offset, data) {
                    self.machine.act(|nic| nic.reset_vf(self.vf));
                }
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        // ROMs come without a file: nothing that a network device has to do with.
        let Some(file) = file else {
            return Ok(());
        };
        let access = match (flags.contains(DmaMapFlags::READ), flags.contains(DmaMapFlags::WRITE)) {
            (true, true) => Access::ReadWrite,
            (true, false) => Access::Read,
            (false, true) => Access::Write,
            (false, false) => return Ok(()),
        };
        let end = offset.checked_add(size).ok_or(io::ErrorKind::InvalidInput)?;
        let memory = self.memory(&file, end)?;
        // What cannot be written is a ROM, whatever is said of it.
        let access = if memory.is_writable() { access } else { Access::Read };
        self.machine.act(|nic| {
            nic.dma(self.vf)
                .map_memory(address, &memory, offset, size, access)
                .map_err(io::Error::other)
        })
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        self.machine.act(|nic| {
            if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
                nic.dma(self.vf).unmap_all();
            } else {
                nic.dma(self.vf).unmap(address, size);
            }
        });
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.reset_function();
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, files: Vec<File>) -> io::Result<()> {
        if index != IRQ_MSIX {
            return Ok(());
        }
        let mut files = files.into_iter();
        if flags & SET_EVENTFD == 0 {
            // Without data and without a count: all off. Without data, with a count: a test of the line, as nobody asks for.
            if count == 0 {
                for vector in 0..VECTORS {
                    self.machine.set_line(self.vf, vector, None);
                }
            }
            return Ok(());
        }
        for vector in (start as usize..VECTORS).take(count as usize) {
            self.machine.set_line(self.vf, vector, files.next());
        }
        Ok(())
    }
}
