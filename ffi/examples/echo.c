/* Sends every frame back to where it came from, sleeping while there is none.
 *
 *     echo SPEC [COUNT]      ends after COUNT frames, or by a signal
 */
#include "common.h"

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: echo SPEC [COUNT]\n");
        return 2;
    }
    unsigned long long count = argc > 2 ? number(argv[2]) : ~0ull, echoed = 0;
    struct end end;
    handle_signals();
    end_open(&end, argv[1]);
    int up = end_link(&end, argv[1]);
    while (up && echoed < count && !stopped) {
        if (must(usernic_queue_rx(end.queue, end.burst), argv[1]) == 0) {
            must(usernic_queue_wait(end.queue, 100), argv[1]);
            continue;
        }
        for (uint32_t i = 0; i < end.frames->count; i++) {
            usernic_frame *frame = &end.frames->frame[i];
            uint8_t addresses[12];
            if (frame->len < 14 || frame->room < 14) {
                frame->flags |= USERNIC_FRAME_DROP;
                continue;
            }
            memcpy(addresses, frame->data, 12);
            memcpy(frame->data, addresses + 6, 6);
            memcpy(frame->data + 6, addresses, 6);
        }
        echoed += send_all(&end, argv[1]);
    }
    end_close(&end, argv[1]);
    return up ? 0 : 1;
}
