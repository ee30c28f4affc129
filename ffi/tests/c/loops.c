/* A receive loop and a transmit loop, for callgrind: both sides of a port in one thread, so that no poll is empty.
 *
 *     loops SOCKET BURSTS SIZE
 */
#include <stdio.h>
#include <stdlib.h>
#include <usernic.h>

enum { BURST = 32 };

static void must(int bad, const char *what) {
    if (bad) {
        fprintf(stderr, "%s: %s\n", what, usernic_error());
        exit(1);
    }
}

/* Fills a burst of frames and sends it. */
__attribute__((noinline)) int loop_tx(usernic_queue *queue, usernic_burst *burst, const usernic_frames *frames,
                                      uint32_t size) {
    static const uint8_t header[14] = {2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5};
    usernic_queue_alloc(queue, burst, BURST);
    for (uint32_t i = 0; i < frames->count; i++) {
        usernic_frame *frame = &frames->frame[i];
        memcpy(frame->data, header, sizeof header);
        frame->len = size;
    }
    return usernic_queue_tx(queue, burst);
}

/* Receives a burst, looks at each frame, and frees it. */
__attribute__((noinline)) int loop_rx(usernic_queue *queue, usernic_burst *burst, const usernic_frames *frames,
                                      uint64_t *sum) {
    int count = usernic_queue_rx(queue, burst);
    for (uint32_t i = 0; i < frames->count; i++)
        *sum += frames->frame[i].len + frames->frame[i].data[13];
    usernic_queue_free(queue, burst);
    return count;
}

int main(int argc, char **argv) {
    char spec[300];
    usernic_port *back, *front;
    usernic_queue *theirs, *ours;
    usernic_burst *there, *here;
    uint64_t sum = 0;
    if (argc != 4)
        return 2;
    int bursts = atoi(argv[2]);
    uint32_t size = (uint32_t)atoi(argv[3]);
    snprintf(spec, sizeof spec, "vhost,path=%s", argv[1]);
    must(usernic_port_open(spec, &back), spec);
    snprintf(spec, sizeof spec, "virtio-user,path=%s,queue_size=256,memory=memfd", argv[1]);
    must(usernic_port_open(spec, &front), spec);
    must(usernic_port_wait_link(back, 60000) != 1, "link");
    must(usernic_port_queue(back, 0, &theirs) | usernic_port_queue(front, 0, &ours), "queues");
    must(usernic_burst_new(BURST, &there) | usernic_burst_new(BURST, &here), "bursts");
    const usernic_frames *frames = usernic_burst_frames(here);
    for (int i = 0; i < bursts; i++) {
        must(loop_tx(ours, here, frames, size) != BURST, "tx");
        must(usernic_queue_rx(theirs, there) != BURST, "the back-end's rx");
        must(usernic_queue_tx(theirs, there) != BURST, "the back-end's tx");
        must(loop_rx(ours, here, frames, &sum) != BURST, "rx");
    }
    must(sum != (uint64_t)bursts * BURST * (size + 0xb5), "what came back is not what was sent");
    usernic_burst_close(here);
    usernic_burst_close(there);
    usernic_queue_close(ours);
    usernic_queue_close(theirs);
    usernic_port_close(front);
    usernic_port_close(back);
    return 0;
}
