//! What the segment of a virtual function holds: the descriptor rings first, then the packet buffers.

use ixgbevf::ring_len;

use super::super::plan::buffers_of_pair;
use crate::error::Error;
use crate::pool::{BULK, Pool};
use crate::spec::PortSpec;

/// Where everything is in the segment.
#[derive(Debug)]
pub(super) struct Plan {
    /// Where the buffers begin.
    pub(super) buffers_at: usize,
    /// Bytes to ask for.
    pub(super) len: usize,
    stride: usize,
    fixed: Option<u32>,
}

impl Plan {
    pub(super) fn new(spec: &PortSpec) -> Result<Self, Error> {
        let queues = usize::from(spec.queues);
        let stride = Pool::stride(spec.buffer_size);
        // Rings are aligned to 128 bytes, as long as they are.
        let buffers_at = (2 * queues * ring_len(spec.queue_size)).next_multiple_of(4096);
        let fixed = spec.buffers.map(|n| n as usize);
        let count = fixed.unwrap_or(queues * buffers_of_pair(spec.queue_size));
        let mut len = buffers_at + count * stride;
        if let Some(given) = spec.mem {
            // With less than this the port would stand still, waiting for itself.
            let buffers = fixed.unwrap_or(queues * (usize::from(spec.queue_size) + 2 * BULK));
            let needed = buffers_at + buffers * stride;
            if given < needed {
                return Err(Error::TooSmall {
                    given,
                    rings: buffers_at,
                    buffers,
                    stride,
                    needed,
                });
            }
            len = given;
        }
        Ok(Plan {
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
    fn the_rings_of_four_pairs_of_512_are_a_small_part_of_a_huge_page() {
        let spec = "vf,queues=4,mem=16M".parse().unwrap();
        let plan = Plan::new(&spec).unwrap();
        assert_eq!((plan.buffers_at, plan.len), (64 << 10, 16 << 20));
        assert!(plan.buffers(16 << 20) >= 4 * (2 * 512 + 192));
        let error = Plan::new(&"vf,queues=4,mem=4M".parse().unwrap()).unwrap_err();
        assert!(
            error.to_string().contains("65536 bytes of rings and 2304 buffers"),
            "{error}"
        );
    }
}
