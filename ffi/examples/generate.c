/* Sends frames, each with its number in it, and counts those that come back as echo sends them.
 *
 *     generate SPEC SIZE COUNT [RATE]      RATE frames a second; 0: as fast as it goes
 *
 * With RATE, it ends successfully if all came back.
 */
#include "common.h"

/* EtherType of local experiments. */
static const uint8_t HEADER[14] = {0x02, 0, 0, 0, 0, 0x02, 0x02, 0, 0, 0, 0, 0x01, 0x88, 0xb5};

static unsigned long long receive(struct end *end, const char *spec, uint32_t size) {
    unsigned long long good = 0;
    must(usernic_queue_rx(end->queue, end->burst), spec);
    for (uint32_t i = 0; i < end->frames->count; i++) {
        const usernic_frame *frame = &end->frames->frame[i];
        uint8_t header[14];
        if (frame->len != size || frame->room < size)
            continue;
        memcpy(header, frame->data, 14);
        good += memcmp(header, HEADER + 6, 6) == 0 && memcmp(header + 6, HEADER, 6) == 0;
    }
    usernic_queue_free(end->queue, end->burst);
    return good;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: generate SPEC SIZE COUNT [RATE]\n");
        return 2;
    }
    const char *spec = argv[1];
    uint32_t size = (uint32_t)number(argv[2]);
    unsigned long long count = number(argv[3]), rate = argc > 4 ? number(argv[4]) : 0, sent = 0, back = 0;
    struct end end;
    handle_signals();
    end_open(&end, spec);
    if (!end_link(&end, spec)) {
        end_close(&end, spec);
        return 1;
    }
    unsigned long long begin = now_ns();
    while (sent < count && !stopped) {
        pace(begin, sent, rate);
        uint32_t want = count - sent < BURST ? (uint32_t)(count - sent) : BURST;
        must(usernic_queue_alloc(end.queue, end.burst, want), spec);
        for (uint32_t i = 0; i < end.frames->count; i++) {
            usernic_frame *frame = &end.frames->frame[i];
            uint64_t tag = sent + i;
            if (size < 22 || size > frame->room) {
                fprintf(stderr, "SIZE: 22 to %u\n", frame->room);
                end_close(&end, spec);
                return 2;
            }
            memcpy(frame->data, HEADER, 14);
            memcpy(frame->data + 14, &tag, 8);
            memset(frame->data + 22, (int)(tag & 0xff), size - 22);
            frame->len = size;
        }
        sent += send_all(&end, spec);
        back += receive(&end, spec, size);
    }
    /* What is still under way: for as long as something comes. */
    for (int idle = 0; rate && idle < 50 && back < sent && !stopped;) {
        unsigned long long more = receive(&end, spec, size);
        back += more;
        idle = more ? 0 : idle + 1;
        if (!more)
            usernic_queue_wait(end.queue, 100);
    }
    printf("%llu sent, %llu came back\n", sent, back);
    end_close(&end, spec);
    return rate && back != count ? 1 : 0;
}
