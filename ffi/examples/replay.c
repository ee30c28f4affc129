/* Sends the frames of a capture (pcap, Ethernet), byte for byte.
 *
 *     replay SPEC FILE [RATE]      RATE frames a second; 0: as fast as it goes
 */
#include "common.h"

static int swapped;

static uint32_t word(const uint8_t *bytes) {
    uint32_t value;
    memcpy(&value, bytes, 4);
    return swapped ? __builtin_bswap32(value) : value;
}

/* Reads the next frame into a burst's frame, in as many pieces as it takes. 0: there is none. */
static int next(FILE *file, struct end *end, uint32_t index, const char *spec) {
    static uint8_t bytes[USERNIC_FRAME_MAX];
    uint8_t header[16];
    if (fread(header, 1, 16, file) != 16)
        return 0;
    uint32_t len = word(header + 8);
    if (len > sizeof bytes || fread(bytes, 1, len, file) != len) {
        fprintf(stderr, "a frame of %u bytes: too long, or cut\n", len);
        exit(1);
    }
    usernic_frame *frame = &end->frames->frame[index];
    if (usernic_frame_copy(frame, bytes, len) < 0) {
        must(usernic_burst_set_len(end->burst, index, len), spec);
        must(usernic_burst_write(end->burst, index, 0, bytes, len), spec);
    }
    return 1;
}

int main(int argc, char **argv) {
    uint8_t header[24];
    if (argc < 3) {
        fprintf(stderr, "usage: replay SPEC FILE [RATE]\n");
        return 2;
    }
    const char *spec = argv[1];
    unsigned long long rate = argc > 3 ? number(argv[3]) : 0, sent = 0;
    FILE *file = fopen(argv[2], "rb");
    if (!file || fread(header, 1, 24, file) != 24) {
        perror(argv[2]);
        return 1;
    }
    swapped = word(header) == 0xd4c3b2a1 || word(header) == 0x4d3cb2a1;
    if ((word(header) != 0xa1b2c3d4 && word(header) != 0xa1b23c4d) || (word(header + 20) & 0xffff) != 1) {
        fprintf(stderr, "%s is no pcap of Ethernet\n", argv[2]);
        return 1;
    }
    struct end end;
    handle_signals();
    end_open(&end, spec);
    int up = end_link(&end, spec), more = up;
    /* Few at a time where it is to go slowly: what is between may have little room. */
    uint32_t burst = rate && rate / 250 < BURST ? (uint32_t)(rate / 250 ? rate / 250 : 1) : BURST;
    unsigned long long begin = now_ns();
    while (more && !stopped) {
        pace(begin, sent, rate);
        uint32_t there = (uint32_t)must(usernic_queue_alloc(end.queue, end.burst, burst), spec), used = 0;
        while (used < there && (more = next(file, &end, used, spec)))
            used++;
        usernic_burst_truncate(end.burst, used);
        sent += send_all(&end, spec);
    }
    fclose(file);
    printf("%llu frames sent\n", sent);
    end_close(&end, spec);
    return up && !more ? 0 : 1;
}
