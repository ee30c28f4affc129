//! A packet as C sees it: one record of a burst's array, which the burst calls write and read.

use usernic::{Burst, Checksum, Packet};

use crate::status::{Fault, Outcome, Status};

/// Set by the library: the other side found the checksums right.
pub const USERNIC_FRAME_CHECKSUM_RIGHT: u16 = 1;
/// Set by the library: the TCP or UDP checksum is still to be made, from checksum_start on, at checksum_offset behind it.
/// A frame that was received so is right; sent to another port it is made there.
pub const USERNIC_FRAME_CHECKSUM_OPEN: u16 = 2;
/// Set by the library: the frame is to be cut into packets of segment_size bytes of payload each, or was joined from such.
pub const USERNIC_FRAME_SEGMENTED: u16 = 4;
/// Set by the library: the frame is in several pieces, of which the first has room bytes. usernic_burst_read() and
/// usernic_burst_write() reach all of it.
pub const USERNIC_FRAME_PIECES: u16 = 8;
/// Set by the program, for usernic_queue_tx(): make the checksums, of IPv4, and of TCP or UDP.
pub const USERNIC_FRAME_ASK_CHECKSUM: u16 = 0x100;
/// Set by the program, for usernic_queue_tx(): cut the frame (TCP or UDP) into packets of segment_size bytes of payload
/// each, with their checksums.
pub const USERNIC_FRAME_ASK_SEGMENTS: u16 = 0x200;
/// Set by the program, for usernic_queue_tx(): do not send the frame, free it.
pub const USERNIC_FRAME_DROP: u16 = 0x400;

/// Set by usernic_frame_push(): bytes before the frame may have been written, also if the frame does not begin there any
/// more when it is sent. A program that moves data by itself sets it, too.
pub const USERNIC_FRAME_PUSHED: u16 = 0x800;

pub(crate) const ASKS: u16 =
    USERNIC_FRAME_ASK_CHECKSUM | USERNIC_FRAME_ASK_SEGMENTS | USERNIC_FRAME_DROP | USERNIC_FRAME_PUSHED;

/// A frame of a burst.
///
/// The bytes lie in the port's memory. The other side of a virtio-user port can write there at any moment: copy what you
/// check before you use it. The program may change data (together with len: see usernic_frame_push() and
/// usernic_frame_pull()), len, segment_size and the flags that it sets; the next call that takes the frame checks them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The first byte.
    pub data: *mut u8,
    /// Bytes of the frame, without FCS.
    pub len: u32,
    /// Bytes at data that are in one piece: what the frame can grow to in place.
    pub room: u32,
    /// Bytes before data by which the frame can grow at its front.
    pub headroom: u16,
    /// USERNIC_FRAME_...
    pub flags: u16,
    /// With USERNIC_FRAME_CHECKSUM_OPEN: the first byte that is summed.
    pub checksum_start: u16,
    /// With USERNIC_FRAME_CHECKSUM_OPEN: where the checksum stands, from checksum_start.
    pub checksum_offset: u16,
    /// With USERNIC_FRAME_SEGMENTED or USERNIC_FRAME_ASK_SEGMENTS: bytes of payload of each packet.
    pub segment_size: u16,
    /// With USERNIC_FRAME_SEGMENTED: the virtio-net gso_type (virtio 1.3, 5.1.6).
    pub segment_kind: u16,
    /// Zero.
    pub reserved: [u16; 2],
}

const _: () = assert!(size_of::<Frame>() == 32);

/// Writes the record of a packet.
///
/// # Safety
/// `record` can be written.
#[inline(always)]
pub(crate) unsafe fn describe(packet: &Packet, record: *mut Frame) {
    let place = packet.place();
    // Field by field: a record by value would go through the stack.
    // SAFETY: by the caller.
    unsafe {
        (*record).data = place.data.as_ptr();
        (*record).len = place.len;
        (*record).room = place.room;
        (*record).headroom = place.headroom;
        (*record).flags = if place.whole { 0 } else { USERNIC_FRAME_PIECES };
        (*record).checksum_start = 0;
        (*record).checksum_offset = 0;
        (*record).segment_size = 0;
        (*record).segment_kind = 0;
        (*record).reserved = [0; 2];
        if !place.plain {
            with_offloads(packet, &mut *record);
        }
    }
}

#[cold]
#[inline(never)]
fn with_offloads(packet: &Packet, record: &mut Frame) {
    match packet.checksum() {
        Checksum::Unknown => {}
        Checksum::Right => record.flags |= USERNIC_FRAME_CHECKSUM_RIGHT,
        Checksum::Open(partial) => {
            record.flags |= USERNIC_FRAME_CHECKSUM_OPEN;
            (record.checksum_start, record.checksum_offset) = (partial.start, partial.offset);
        }
    }
    if let Some(segmentation) = packet.segmentation() {
        record.flags |= USERNIC_FRAME_SEGMENTED;
        (record.segment_size, record.segment_kind) = (segmentation.size, u16::from(segmentation.kind.0));
    }
}

/// Takes over what the program made of a packet's record: where it begins and how long it is. What it asks for.
#[inline(always)]
pub(crate) fn settle(index: usize, packet: &mut Packet, frame: &Frame) -> Outcome<u16> {
    let place = packet.place();
    // A frame in one piece, of whatever length: looked at no closer, since storing the length is less than comparing it.
    let simple = place.whole && frame.data == place.data.as_ptr() && frame.len <= place.room;
    if !(simple && packet.set_len(frame.len as usize).is_ok()) {
        reshape(index, packet, frame)?;
    }
    Ok(frame.flags & ASKS)
}

#[cold]
#[inline(never)]
fn reshape(index: usize, packet: &mut Packet, frame: &Frame) -> Outcome<()> {
    let place = packet.place();
    let by = (frame.data as isize).wrapping_sub(place.data.as_ptr() as isize);
    if by == 0 && frame.len == place.len {
        return Ok(());
    }
    // In one piece a frame may be anywhere in its buffer; in several, it is as long as it is.
    if by < -(place.headroom as isize) || by > place.room as isize {
        return Err(Fault::new(
            Status::Room,
            format_args!(
                "frame {index}: data was moved by {by}, with {} bytes of headroom and {} behind",
                place.headroom, place.room
            ),
        ));
    }
    let most = if place.whole { place.room } else { place.len } as isize - by;
    if frame.len as isize > most {
        return Err(Fault::new(
            Status::Room,
            format_args!("frame {index}: len is {}, with room for {most}", frame.len),
        ));
    }
    let moved = if place.whole {
        packet.set_len(place.room as usize)
    } else {
        Ok(())
    };
    moved
        .and_then(|()| packet.move_start(by))
        .and_then(|()| packet.set_len(frame.len as usize))
        .map_err(|error| Fault::new(Status::Room, format_args!("frame {index}: {error}")))
}

/// Does what the program asked for. Dropped frames are gone, the others stand in their order.
#[cold]
#[inline(never)]
pub(crate) fn grant(burst: &mut Burst, asks: impl Fn(usize) -> (u16, u16)) -> Outcome<()> {
    for (index, packet) in burst.iter_mut().enumerate() {
        let (flags, size) = asks(index);
        if flags & USERNIC_FRAME_PUSHED != 0 {
            // What lies before the frame is no zeroed header any more: a move says so, whatever its distance.
            let _ = packet.move_start(0);
        }
        let granted = if flags & USERNIC_FRAME_DROP != 0 {
            Ok(())
        } else if flags & USERNIC_FRAME_ASK_SEGMENTS != 0 {
            packet.request_segmentation(size)
        } else if flags & USERNIC_FRAME_ASK_CHECKSUM != 0 {
            packet.request_checksum()
        } else {
            Ok(())
        };
        granted.map_err(|error| Fault::new(Status::Offload, format_args!("frame {index}: {error}")))?;
    }
    let mut kept = 0;
    for index in 0..burst.len() {
        if asks(index).0 & USERNIC_FRAME_DROP == 0 {
            burst.swap(kept, index);
            kept += 1;
        }
    }
    burst.truncate(kept);
    Ok(())
}
