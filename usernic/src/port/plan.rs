//! What a front-end's segment holds: the rings first, then the packet buffers.
//!
//! There are two areas for rings, which sessions use in turn. A back-end that was stopped (SIGSTOP) while the port went over
//! to another one continues where it was, and what it writes there is no entry of the other's rings.

use virtio_ring::any::{Format, Layout};

use crate::error::Error;
use crate::pool::{BULK, Pool};
use crate::spec::PortSpec;

/// Where everything is in the segment.
#[derive(Debug)]
pub(super) struct Plan {
    /// Of each ring.
    pub(super) layout: Layout,
    /// Of the control queue's ring.
    pub(super) control: Layout,
    /// Where that is in an area; its commands are behind it.
    pub(super) control_at: usize,
    /// Bytes of an area: the rings of all pairs, then the control queue's.
    pub(super) area: usize,
    /// Where the buffers begin.
    pub(super) buffers_at: usize,
    /// Bytes to ask for.
    pub(super) len: usize,
    stride: usize,
    fixed: Option<u32>,
}

/// Descriptors of the control queue's ring: one command at a time.
const CONTROL: u16 = 16;

/// Bytes for a command and its answer.
pub(super) const COMMAND: usize = 2048;

/// Buffers that a pair of rings of `size` needs: both rings full, a burst in hand, and what lies in caches.
pub(super) fn buffers_of_pair(size: u16) -> usize {
    2 * usize::from(size) + 6 * BULK
}

impl Plan {
    pub(super) fn new(spec: &PortSpec) -> Result<Self, Error> {
        let format = if spec.packed { Format::Packed } else { Format::Split };
        let layout = Layout::new(format, spec.queue_size).map_err(|source| Error::Ring { index: 0, source })?;
        let rings = 2 * usize::from(spec.queues);
        let stride = Pool::stride(spec.buffer_size);
        let control = Layout::new(format, CONTROL).map_err(|source| Error::Ring { index: 0, source })?;
        let control_at = (rings * layout.block_len()).next_multiple_of(Layout::ALIGN);
        let area = (control_at + control.block_len() + COMMAND).next_multiple_of(Layout::ALIGN);
        let buffers_at = (2 * area).next_multiple_of(stride.next_power_of_two().min(4096));
        let need = usize::from(spec.queues) * buffers_of_pair(spec.queue_size);
        let count = spec.buffers.map_or(need, |n| n as usize);
        let len = match spec.mem {
            None => buffers_at + count * stride,
            Some(mem) => {
                // With less than this the port would stand still, waiting for itself.
                let least = spec.buffers.map_or(
                    usize::from(spec.queues) * (usize::from(spec.queue_size) + 2 * BULK),
                    |n| n as usize,
                );
                let needed = buffers_at + least * stride;
                if mem < needed {
                    return Err(Error::TooSmall {
                        given: mem,
                        rings: buffers_at,
                        buffers: least,
                        stride,
                        needed,
                    });
                }
                mem
            }
        };
        Ok(Plan {
            layout,
            control,
            control_at,
            area,
            buffers_at,
            len,
            stride,
            fixed: spec.buffers,
        })
    }

    /// Buffers that a segment of `len` bytes has room for.
    pub(super) fn buffers(&self, len: usize) -> u32 {
        let room = (len - self.buffers_at) / self.stride;
        self.fixed
            .unwrap_or(u32::try_from(room).unwrap_or(u32::MAX))
            .min(hugemem::MAX_BUFFERS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pair_of_256_fits_a_page_of_2_mib() {
        let plan = Plan::new(&PortSpec::virtio_user("/s")).unwrap();
        assert!(plan.len <= 2 << 20, "{}", plan.len);
        assert!(plan.buffers(2 << 20) >= 2 * 256 + 192);
        assert!(plan.buffers_at + plan.buffers(2 << 20) as usize * plan.stride <= 2 << 20);
    }

    #[test]
    fn too_little_memory_is_refused_with_the_sum() {
        let spec = "virtio-user,path=/s,queue_size=1024,mem=1M".parse().unwrap();
        let error = Plan::new(&spec).unwrap_err().to_string();
        assert!(error.contains("1088 buffers"), "{error}");
    }
}
