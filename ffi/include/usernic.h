/*
 * libusernic: user-space network ports for containers.
 *
 *     usernic_port *port;
 *     usernic_queue *queue;
 *     usernic_burst *burst;
 *     if (usernic_port_open("virtio-user,path=/run/vhost.sock", &port) < 0)
 *         errx(1, "%s", usernic_error());
 *     usernic_port_queue(port, 0, &queue);
 *     usernic_burst_new(32, &burst);
 *     const usernic_frames *frames = usernic_burst_frames(burst);
 *     for (;;) {
 *         if (usernic_queue_rx(queue, burst) == 0)
 *             usernic_queue_wait(queue, -1);
 *         for (uint32_t i = 0; i < frames->count; i++)
 *             look_at(frames->frame[i].data, frames->frame[i].len);
 *         usernic_queue_tx(queue, burst);
 *         usernic_queue_free(queue, burst);
 *     }
 *
 * Results. A call that fails returns a number below 0, a usernic_status, and usernic_error() is the text for the calling
 * thread. Else it returns 0 or a count. What a failing call would have written through a pointer is left as it was.
 *
 * Handles (usernic_port *, usernic_queue *, usernic_burst * and so on) are numbers, not addresses. One that is null, closed, made up
 * or of another kind is refused with USERNIC_STATUS_HANDLE.
 *
 * Threads. A port may be used by all threads at a time. A queue and a burst are used by one thread at a time, whichever:
 * a call that comes while another is going on is refused with USERNIC_STATUS_BUSY and does nothing. The records of a burst
 * (usernic_frame) and the bytes that they point to belong to whoever uses the burst.
 *
 * Memory. Pointers are checked for null and alignment; that as much memory is behind them as the call says is up to the
 * caller. Bytes of a frame that has left its burst (sent, moved, freed), or whose burst was closed, are no more the
 * program's.
 *
 * Frames lie in memory that the other side of a virtio-user port has mapped, too, and can write at any moment: copy what
 * you check before you use it.
 *
 * Lent memory (usernic_lent_port, usernic_lent_pair): buffers of the program's own, in shared memory that it registers. A
 * buffer that was posted or sent is the other side's until its cookie comes back, and all are the program's again when
 * usernic_lent_port_close() returns. Threads: as for ports (one at a time) and queues.
 *
 * fork(): the child does not use what was opened before. No call is made from signal handlers.
 */

#ifndef USERNIC_H
#define USERNIC_H

/* Made from the Rust source by cbindgen: change that, then USERNIC_HEADER=write cargo test -p usernic-ffi --test header. */

#include <stdint.h>
#include <stddef.h>
#include <string.h>

/**
 * Frames of a burst at the most.
 */
#define USERNIC_BURST_MAX 32768

/**
 * Bytes of a frame at the most: what segmentation takes, with its headers.
 */
#define USERNIC_FRAME_MAX (65536 + 64)

/**
 * Set by the library: the other side found the checksums right.
 */
#define USERNIC_FRAME_CHECKSUM_RIGHT 1

/**
 * Set by the library: the TCP or UDP checksum is still to be made, from checksum_start on, at checksum_offset behind it.
 * A frame that was received so is right; sent to another port it is made there.
 */
#define USERNIC_FRAME_CHECKSUM_OPEN 2

/**
 * Set by the library: the frame is to be cut into packets of segment_size bytes of payload each, or was joined from such.
 */
#define USERNIC_FRAME_SEGMENTED 4

/**
 * Set by the library: the frame is in several pieces, of which the first has room bytes. usernic_burst_read() and
 * usernic_burst_write() reach all of it.
 */
#define USERNIC_FRAME_PIECES 8

/**
 * Set by the program, for usernic_queue_tx(): make the checksums, of IPv4, and of TCP or UDP.
 */
#define USERNIC_FRAME_ASK_CHECKSUM 256

/**
 * Set by the program, for usernic_queue_tx(): cut the frame (TCP or UDP) into packets of segment_size bytes of payload
 * each, with their checksums.
 */
#define USERNIC_FRAME_ASK_SEGMENTS 512

/**
 * Set by the program, for usernic_queue_tx(): do not send the frame, free it.
 */
#define USERNIC_FRAME_DROP 1024

/**
 * Set by usernic_frame_push(): bytes before the frame may have been written, also if the frame does not begin there any
 * more when it is sent. A program that moves data by itself sets it, too.
 */
#define USERNIC_FRAME_PUSHED 2048

/**
 * Bytes before each buffer's address that belong to the library and the other side while it is posted or sent.
 */
#define USERNIC_LENT_HEADER 12

/**
 * Buffers of a call, and regions of a port, at the most.
 */
#define USERNIC_LENT_MAX 32768

/**
 * The interface that a header describes. It changes when a program that was compiled with an older header would not
 * work any more.
 */
#define USERNIC_ABI_VERSION 1

/**
 * What calls return that fail: below 0. What succeeds returns 0 or a count.
 */
enum usernic_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * It worked.
     */
    USERNIC_STATUS_OK = 0,
    /**
     * A pointer is null, or not aligned for its type.
     */
    USERNIC_STATUS_POINTER = -1,
    /**
     * A handle is null, was never made, was closed, or is of another kind.
     */
    USERNIC_STATUS_HANDLE = -2,
    /**
     * Another thread is in a call with this handle.
     */
    USERNIC_STATUS_BUSY = -3,
    /**
     * An argument is out of its range: a length, an index, a size of a struct, a text without end.
     */
    USERNIC_STATUS_ARGUMENT = -4,
    /**
     * The port spec is wrong.
     */
    USERNIC_STATUS_SPEC = -5,
    /**
     * The port's memory could not be had.
     */
    USERNIC_STATUS_MEMORY = -6,
    /**
     * The other side could not be reached, or does not speak as it should.
     */
    USERNIC_STATUS_CONNECTION = -7,
    /**
     * The other side, or the kind of port, lacks what was asked for.
     */
    USERNIC_STATUS_UNSUPPORTED = -8,
    /**
     * Somebody has the queue.
     */
    USERNIC_STATUS_TAKEN = -9,
    /**
     * A frame does not fit: into its buffer, its bounds, the burst.
     */
    USERNIC_STATUS_ROOM = -10,
    /**
     * A frame cannot be asked for this offload.
     */
    USERNIC_STATUS_OFFLOAD = -11,
    /**
     * The port was closed.
     */
    USERNIC_STATUS_CLOSED = -12,
    /**
     * A system call failed.
     */
    USERNIC_STATUS_SYSTEM = -13,
    /**
     * Header and library do not belong together.
     */
    USERNIC_STATUS_ABI = -14,
    /**
     * A fault of this library: what the handle stands for can only be closed.
     */
    USERNIC_STATUS_INTERNAL = -15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum usernic_status usernic_status;
#else
typedef int32_t usernic_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * A burst, as a handle: not to be followed.
 */
typedef struct usernic_burst usernic_burst;

/**
 * A pair of rings of such a port, as a handle: not to be followed.
 */
typedef struct usernic_lent_pair usernic_lent_pair;

/**
 * A port over lent memory, as a handle: not to be followed.
 */
typedef struct usernic_lent_port usernic_lent_port;

/**
 * A port, as a handle: not to be followed.
 */
typedef struct usernic_port usernic_port;

/**
 * A queue pair, as a handle: not to be followed.
 */
typedef struct usernic_queue usernic_queue;

/**
 * A frame of a burst.
 *
 * The bytes lie in the port's memory. The other side of a virtio-user port can write there at any moment: copy what you
 * check before you use it. The program may change data (together with len: see usernic_frame_push() and
 * usernic_frame_pull()), len, segment_size and the flags that it sets; the next call that takes the frame checks them.
 */
typedef struct usernic_frame {
    /**
     * The first byte.
     */
    uint8_t *data;
    /**
     * Bytes of the frame, without FCS.
     */
    uint32_t len;
    /**
     * Bytes at data that are in one piece: what the frame can grow to in place.
     */
    uint32_t room;
    /**
     * Bytes before data by which the frame can grow at its front.
     */
    uint16_t headroom;
    /**
     * USERNIC_FRAME_...
     */
    uint16_t flags;
    /**
     * With USERNIC_FRAME_CHECKSUM_OPEN: the first byte that is summed.
     */
    uint16_t checksum_start;
    /**
     * With USERNIC_FRAME_CHECKSUM_OPEN: where the checksum stands, from checksum_start.
     */
    uint16_t checksum_offset;
    /**
     * With USERNIC_FRAME_SEGMENTED or USERNIC_FRAME_ASK_SEGMENTS: bytes of payload of each packet.
     */
    uint16_t segment_size;
    /**
     * With USERNIC_FRAME_SEGMENTED: the virtio-net gso_type (virtio 1.3, 5.1.6).
     */
    uint16_t segment_kind;
    /**
     * Zero.
     */
    uint16_t reserved[2];
} usernic_frame;

/**
 * What a burst holds: kept up to date by every call with the burst. To be read only.
 */
typedef struct usernic_frames {
    /**
     * The first of count records; they stay where they are until the burst is closed.
     */
    struct usernic_frame *frame;
    /**
     * Frames that are there.
     */
    uint32_t count;
    /**
     * Frames that there is room for.
     */
    uint32_t capacity;
} usernic_frames;

/**
 * A piece of shared memory that the program lends to a port.
 */
typedef struct usernic_region {
    /**
     * Where it is mapped.
     */
    void *address;
    /**
     * Bytes of it.
     */
    uint64_t length;
    /**
     * Where it begins in the file.
     */
    uint64_t offset;
    /**
     * Bytes of a page of the file: address, length and offset are multiples of it.
     */
    uint64_t page_size;
    /**
     * The file: a memfd, or one of tmpfs or hugetlbfs. The library makes a copy of the descriptor.
     */
    int32_t fd;
    /**
     * Zero.
     */
    uint32_t reserved;
} usernic_region;

/**
 * A buffer in lent memory.
 */
typedef struct usernic_buffer {
    /**
     * The frame's first byte, with USERNIC_LENT_HEADER bytes before it. Null in what comes back.
     */
    void *address;
    /**
     * Whatever the program knows it by.
     */
    uint64_t cookie;
    /**
     * Bytes of the frame; of a buffer to receive into, bytes that it holds.
     */
    uint32_t length;
    /**
     * Zero.
     */
    uint32_t reserved;
} usernic_buffer;

/**
 * What a queue, or all queues of a port, have done since the port was opened.
 */
typedef struct usernic_counts {
    /**
     * Frames received and handed to the program.
     */
    uint64_t rx_packets;
    /**
     * Their bytes, without FCS.
     */
    uint64_t rx_bytes;
    /**
     * Frames sent: handed to the other side.
     */
    uint64_t tx_packets;
    /**
     * Their bytes, without FCS.
     */
    uint64_t tx_bytes;
    /**
     * Frames of the other side that were malformed, did not fit the port's buffers, or came from a ring that it had
     * disabled, and were dropped.
     */
    uint64_t rx_errors;
    /**
     * Frames that the receive filter kept out.
     */
    uint64_t rx_filtered;
    /**
     * Frames to send that were dropped since the other side can never take them.
     */
    uint64_t tx_errors;
    /**
     * Times that there was no buffer to receive into.
     */
    uint64_t rx_no_buffer;
    /**
     * Violations of the protocol by the other side that were caught.
     */
    uint64_t anomalies;
    /**
     * Notifications sent: each a system call.
     */
    uint64_t kicks;
    /**
     * Frames of the other side with fewer bytes than an Ethernet header has, which were dropped.
     */
    uint64_t rx_runts;
    /**
     * Frames of the other side that are longer than the port's MTU allows, and were dropped.
     */
    uint64_t rx_oversize;
    /**
     * Frames to send that are longer than the port's MTU allows, and were dropped.
     */
    uint64_t tx_oversize;
    /**
     * Frames to send that the other side's receive filter keeps out, and that were dropped.
     */
    uint64_t tx_filtered;
} usernic_counts;

/**
 * The state of a link.
 */
typedef struct usernic_link {
    /**
     * The virtio features that were negotiated.
     */
    uint64_t features;
    /**
     * Mb/s, 0 if unknown.
     */
    uint32_t speed;
    /**
     * Queue pairs that are running.
     */
    uint16_t queues;
    /**
     * 1: the other side is there and the rings are running.
     */
    uint16_t up;
} usernic_link;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Makes an empty burst for `capacity` frames, 1 to USERNIC_BURST_MAX.
 *
 * # Safety
 * `out` can be written.
 */
int32_t usernic_burst_new(uint32_t capacity, struct usernic_burst **out);

/**
 * Closes a burst and frees what is in it. Its records are gone with it.
 */
int32_t usernic_burst_close(struct usernic_burst *burst);

/**
 * Where the burst's records are, until it is closed: to be asked once. Null if there is no such burst.
 */
const struct usernic_frames *usernic_burst_frames(struct usernic_burst *burst);

/**
 * Frees all frames of a burst, from any thread. usernic_queue_free() is cheaper.
 */
int32_t usernic_burst_clear(struct usernic_burst *burst);

/**
 * Frees all frames of a burst but the first `count`.
 */
int32_t usernic_burst_truncate(struct usernic_burst *burst, uint32_t count);

/**
 * Moves frames to the end of another burst: those at `indices`, which rise. As many as fit are moved, and their number
 * is returned; the others keep their order. What the program changed in records is kept.
 *
 * # Safety
 * `indices` has `count` numbers.
 */
int32_t usernic_burst_move(struct usernic_burst *from,
                           const uint32_t *indices,
                           uint32_t count,
                           struct usernic_burst *to);

/**
 * Copies `len` bytes from `offset` on out of a frame, whatever pieces it is in.
 *
 * # Safety
 * `out` has `len` bytes that can be written, outside of the port's memory.
 */
int32_t usernic_burst_read(struct usernic_burst *burst,
                           uint32_t index,
                           size_t offset,
                           uint8_t *out,
                           size_t len);

/**
 * Copies `len` bytes into a frame, from `offset` on, whatever pieces it is in.
 *
 * # Safety
 * `bytes` has `len` bytes, outside of the port's memory.
 */
int32_t usernic_burst_write(struct usernic_burst *burst,
                            uint32_t index,
                            size_t offset,
                            const uint8_t *bytes,
                            size_t len);

/**
 * Makes a frame `len` bytes long, with as many pieces as that takes. What is new is whatever was there before: write it.
 * Without buffers for it the frame is empty afterwards.
 */
int32_t usernic_burst_set_len(struct usernic_burst *burst,
                              uint32_t index,
                              uint32_t len);

/**
 * Opens a port over memory that the program lends: `count` regions. C programs call usernic_lent_port_open(). The spec is of
 * kind virtio-user, without server=1, mrg_rxbuf=1 and offloads, or of kind vf, without csum=1 and vlan_strip=1. A
 * device finds the regions at the addresses that they have here; buffers that it receives into have buffer_size bytes at
 * least, and frames that do not fit one are dropped. A link that is lost stays lost: close the port and open it anew.
 *
 * # Safety
 * `spec` is a text, `regions` has `count` elements, `out` can be written. The regions stay mapped until the port is
 * closed.
 */
int32_t usernic_lent_port_open_abi(uint32_t abi,
                                   const char *spec,
                                   const struct usernic_region *regions,
                                   uint32_t count,
                                   struct usernic_lent_port **out);

/**
 * Closes a port over lent memory: the other side stops. When this returns, all buffers are the program's again. Its pairs
 * are still to be closed.
 */
int32_t usernic_lent_port_close(struct usernic_lent_port *port);

/**
 * Whether the other side is there: 1, or 0. On a port of kind vf to be called a few times a second: it is then that the
 * device is looked after.
 */
int32_t usernic_lent_port_link(struct usernic_lent_port *port);

/**
 * Pairs of rings of the port.
 */
int32_t usernic_lent_port_pair_count(struct usernic_lent_port *port);

/**
 * Takes pair `index`, from 0: once.
 *
 * # Safety
 * `out` can be written.
 */
int32_t usernic_lent_port_pair(struct usernic_lent_port *port,
                               uint16_t index,
                               struct usernic_lent_pair **out);

/**
 * Gives up a pair. What it has posted or sent stays the other side's until the port is closed.
 */
int32_t usernic_lent_pair_close(struct usernic_lent_pair *pair);

/**
 * Posts buffers to receive into, from the front, as far as the ring has room; how many. At a buffer that is not in lent
 * memory it stops: an error if that is the first.
 *
 * # Safety
 * `buffers` has `count` elements. Nobody else uses their bytes until their cookies come back.
 */
int32_t usernic_lent_pair_post(struct usernic_lent_pair *pair,
                               const struct usernic_buffer *buffers,
                               uint32_t count);

/**
 * Sends frames, from the front, as far as the ring has room; how many. At a frame that is not in lent memory it stops: an
 * error if that is the first.
 *
 * # Safety
 * `buffers` has `count` elements. Nobody else uses their bytes until their cookies come back.
 */
int32_t usernic_lent_pair_send(struct usernic_lent_pair *pair,
                               const struct usernic_buffer *buffers,
                               uint32_t count);

/**
 * Takes up to `count` buffers that frames have come into; how many. Cookie and length are given, 0 for what was no frame, or
 * one that is too short or too long for the port.
 *
 * # Safety
 * `out` has `count` elements that can be written.
 */
int32_t usernic_lent_pair_receive(struct usernic_lent_pair *pair,
                                  struct usernic_buffer *out,
                                  uint32_t count);

/**
 * Takes the cookies of up to `count` frames that the other side has taken; how many.
 *
 * # Safety
 * `out` has `count` elements that can be written.
 */
int32_t usernic_lent_pair_sent(struct usernic_lent_pair *pair, uint64_t *out, uint32_t count);

/**
 * A file descriptor that is readable when the other side has notified of frames since usernic_lent_pair_arm(). It is the
 * pair's: neither read nor close it.
 */
int32_t usernic_lent_pair_fd(struct usernic_lent_pair *pair);

/**
 * Asks the other side to notify at the next frame. 1: frames are there already, do not sleep. Undone by
 * usernic_lent_pair_disarm().
 */
int32_t usernic_lent_pair_arm(struct usernic_lent_pair *pair);

/**
 * Asks for no more notifications, and takes those that came. 1: frames are there.
 */
int32_t usernic_lent_pair_disarm(struct usernic_lent_pair *pair);

/**
 * Sleeps until frames have come or `milliseconds` are over (below 0: without end). 1: frames are there. It does not see
 * that the link was lost: usernic_lent_port_link() does.
 */
int32_t usernic_lent_pair_wait(struct usernic_lent_pair *pair,
                               int64_t milliseconds);

/**
 * What the pair has done, in a struct of `size` bytes (sizeof *out).
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_lent_pair_counts(struct usernic_lent_pair *pair, struct usernic_counts *out, size_t size);

/**
 * Opens a port from a spec, such as "virtio-user,path=/run/vhost.sock,queues=2". C programs call usernic_port_open(),
 * which fills in `abi`: the USERNIC_ABI_VERSION of the header that the caller was made with.
 *
 * A front-end connects, negotiates and starts its rings before this returns; with "server=1", and for "vhost" ports, the
 * socket listens when this returns.
 *
 * # Safety
 * `spec` is a text, `out` can be written.
 */
int32_t usernic_port_open_abi(uint32_t abi,
                              const char *spec,
                              struct usernic_port **out);

/**
 * Closes a port. Its queues move nothing any more and are to be closed, too, in any order; packets in bursts stay valid.
 * What was sent and not yet taken is lost: usernic_queue_drain() first.
 */
int32_t usernic_port_close(struct usernic_port *port);

/**
 * Takes queue pair `index`, from 0. Closing it gives it back.
 *
 * # Safety
 * `out` can be written.
 */
int32_t usernic_port_queue(struct usernic_port *port, uint16_t index, struct usernic_queue **out);

/**
 * Queue pairs of the port, running or not.
 */
int32_t usernic_port_queue_count(struct usernic_port *port);

/**
 * Uses the first `count` queue pairs of a front-end port and lets the others rest.
 */
int32_t usernic_port_set_queues(struct usernic_port *port, uint16_t count);

/**
 * The link, in a struct of `size` bytes (sizeof *out).
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_port_link(struct usernic_port *port, struct usernic_link *out, size_t size);

/**
 * Waits until the link is up, `milliseconds` at the most (below 0: without end). 1: it is up. 0: it is not.
 */
int32_t usernic_port_wait_link(struct usernic_port *port, int64_t milliseconds);

/**
 * Has the other side tell the network that this port's address is here, as after a move.
 */
int32_t usernic_port_announce(struct usernic_port *port);

/**
 * The port's address: 6 bytes.
 *
 * # Safety
 * `out` has 6 bytes that can be written.
 */
int32_t usernic_port_mac(struct usernic_port *port, uint8_t *out);

/**
 * The largest packet, in bytes, without its Ethernet header.
 */
int32_t usernic_port_mtu(struct usernic_port *port);

/**
 * What the port has done: the sum over its queues, in a struct of `size` bytes (sizeof *out).
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_port_counts(struct usernic_port *port, struct usernic_counts *out, size_t size);

/**
 * What queue pair `index` has done, whoever has it, in a struct of `size` bytes (sizeof *out).
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_port_queue_counts(struct usernic_port *port,
                                  uint16_t index,
                                  struct usernic_counts *out,
                                  size_t size);

/**
 * Where the port's memory comes from, in words: cut to `size` bytes, the NUL at its end included. Returns the bytes of
 * the whole text without the NUL, as snprintf() does; with `size` 0, `out` may be null.
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_port_memory(struct usernic_port *port,
                            char *out,
                            size_t size);

/**
 * Installs a handler of SIGBUS that keeps the process alive when the other side truncates a file that is mapped here:
 * the port goes down instead. For programs, before they open ports; libraries leave it to their program.
 */
int32_t usernic_install_sigbus_guard(void);

/**
 * Gives a queue back to its port.
 */
int32_t usernic_queue_close(struct usernic_queue *queue);

/**
 * Appends frames that have come to `burst`, as many as there is room for; how many. Never blocks.
 */
int32_t usernic_queue_rx(struct usernic_queue *queue, struct usernic_burst *burst);

/**
 * Sends the frames of `burst`, from the front; how many. They leave the burst, what there was no room for stays. Frames
 * that the other side can never take leave it, too, and are counted. Frames of another port are sent as copies. With an
 * error nothing is sent. Never blocks.
 */
int32_t usernic_queue_tx(struct usernic_queue *queue,
                         struct usernic_burst *burst);

/**
 * Appends `count` fresh, empty frames to `burst`, as far as there is room and the port has buffers; how many.
 */
int32_t usernic_queue_alloc(struct usernic_queue *queue, struct usernic_burst *burst, uint32_t count);

/**
 * Frees all frames of `burst`: the cheapest way, if they are of this queue's port.
 */
int32_t usernic_queue_free(struct usernic_queue *queue, struct usernic_burst *burst);

/**
 * Sleeps until frames have come, the link has changed, or `milliseconds` are over (below 0: without end). 1: frames are
 * there. 0: none; a signal ends the sleep early, too.
 */
int32_t usernic_queue_wait(struct usernic_queue *queue,
                           int64_t milliseconds);

/**
 * A file descriptor that is readable when the other side has notified since usernic_queue_arm(), or when the link has
 * changed: for poll(2) and its kin, together with others. It is the queue's: neither read nor close it.
 */
int32_t usernic_queue_fd(struct usernic_queue *queue);

/**
 * Asks the other side to notify at the next frame. 1: frames are there already, do not sleep. Undone by
 * usernic_queue_disarm().
 */
int32_t usernic_queue_arm(struct usernic_queue *queue);

/**
 * Asks for no more notifications, and takes those that came. 1: frames are there.
 */
int32_t usernic_queue_disarm(struct usernic_queue *queue);

/**
 * Waits until the other side has taken all that was sent, or `milliseconds` are over, or the link is down. 1: nothing is
 * left. To be called before a port is closed.
 */
int32_t usernic_queue_drain(struct usernic_queue *queue,
                            int64_t milliseconds);

/**
 * What this queue has done, in a struct of `size` bytes (sizeof *out).
 *
 * # Safety
 * `out` has `size` bytes that can be written.
 */
int32_t usernic_queue_counts(struct usernic_queue *queue, struct usernic_counts *out, size_t size);

/**
 * The text of the last call of this thread that failed: what was tried, what was found, what to do. Empty if none did.
 * It stays as it is until another call of this thread fails.
 */
const char *usernic_error(void);

/**
 * A status in words, for any number.
 */
const char *usernic_status_text(int32_t status);

/**
 * The library's USERNIC_ABI_VERSION.
 */
uint32_t usernic_abi_version(void);

/**
 * The library's version, as "0.1.0".
 */
const char *usernic_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* USERNIC_H */

#ifndef USERNIC_INLINE_H
#define USERNIC_INLINE_H

#ifdef __cplusplus
extern "C" {
#endif

/* Opens a port: see usernic_port_open_abi(). */
static inline int32_t usernic_port_open(const char *spec, usernic_port **out) {
    return usernic_port_open_abi(USERNIC_ABI_VERSION, spec, out);
}

/* Opens a port over lent memory: see usernic_lent_port_open_abi(). */
static inline int32_t usernic_lent_port_open(const char *spec, const usernic_region *regions, uint32_t count,
                                             usernic_lent_port **out) {
    return usernic_lent_port_open_abi(USERNIC_ABI_VERSION, spec, regions, count, out);
}

/* Makes room for count bytes before a frame; where they are. NULL: there is no such headroom. The bytes are whatever was
   there before: write them. */
static inline uint8_t *usernic_frame_push(usernic_frame *frame, uint16_t count) {
    if (count > frame->headroom)
        return NULL;
    frame->flags |= USERNIC_FRAME_PUSHED;
    frame->headroom = (uint16_t)(frame->headroom - count);
    frame->data -= count;
    frame->len += count;
    frame->room += count;
    return frame->data;
}

/* Takes count bytes off the front of a frame; where it begins now. NULL: the first piece of it has fewer. */
static inline uint8_t *usernic_frame_pull(usernic_frame *frame, uint16_t count) {
    if (count > frame->len || count > frame->room)
        return NULL;
    frame->headroom = (uint16_t)(frame->headroom + count);
    frame->data += count;
    frame->len -= count;
    frame->room -= count;
    return frame->data;
}

/* Makes a frame equal to len bytes. -1: they do not fit in one piece (usernic_burst_set_len() makes more). */
static inline int usernic_frame_copy(usernic_frame *frame, const void *bytes, uint32_t len) {
    if (len > frame->room || (frame->flags & USERNIC_FRAME_PIECES))
        return -1;
    memcpy(frame->data, bytes, len);
    frame->len = len;
    return 0;
}

#ifdef __cplusplus
}
#endif

#endif /* USERNIC_INLINE_H */
