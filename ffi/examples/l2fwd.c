/* Forwards frames between two ports, both ways, with their bytes as they are.
 *
 *     l2fwd SPEC SPEC [COUNT]      ends after COUNT frames, or by a signal
 *
 * Ports have memory of their own: usernic_queue_tx() copies a frame of one port into that of the other.
 */
#include "common.h"
#include <poll.h>

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: l2fwd SPEC SPEC [COUNT]\n");
        return 2;
    }
    unsigned long long count = argc > 3 ? number(argv[3]) : ~0ull, forwarded = 0;
    struct end ends[2];
    struct pollfd fds[2];
    handle_signals();
    for (int i = 0; i < 2; i++) {
        end_open(&ends[i], argv[1 + i]);
        fds[i].fd = must(usernic_queue_fd(ends[i].queue), argv[1 + i]);
        fds[i].events = POLLIN;
    }
    int up = end_link(&ends[0], argv[1]) && end_link(&ends[1], argv[2]);
    while (up && forwarded < count && !stopped) {
        unsigned long long before = forwarded;
        for (int i = 0; i < 2; i++) {
            struct end *from = &ends[i], *to = &ends[1 - i];
            /* What the other port had no room for the last time goes first. */
            if (from->frames->count < from->frames->capacity)
                must(usernic_queue_rx(from->queue, from->burst), argv[1 + i]);
            forwarded += (unsigned long long)must(usernic_queue_tx(to->queue, from->burst), argv[2 - i]);
        }
        if (forwarded != before || ends[0].frames->count + ends[1].frames->count > 0)
            continue;
        /* Nothing to do: sleep until one of them has something. */
        int there = usernic_queue_arm(ends[0].queue) + usernic_queue_arm(ends[1].queue);
        if (there == 0)
            poll(fds, 2, 100);
        usernic_queue_disarm(ends[0].queue);
        usernic_queue_disarm(ends[1].queue);
    }
    for (int i = 0; i < 2; i++)
        end_close(&ends[i], argv[1 + i]);
    return up ? 0 : 1;
}
