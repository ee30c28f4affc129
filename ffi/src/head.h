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
