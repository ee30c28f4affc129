/* Buffers of the program's own, in memory that it lends, against a back-end in the same process.
 *
 *     lent SOCKET
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <usernic.h>

enum { COUNT = 64, EACH = 2048, SIZE = COUNT * EACH, ROUNDS = 10, RUNS = 3 };

static void must(int bad, const char *what) {
    if (bad) {
        fprintf(stderr, "%s: %s\n", what, usernic_error());
        exit(1);
    }
}

static uint8_t *at(uint8_t *memory, uint64_t index) {
    return memory + index * EACH + 64;
}

static void run(const char *socket) {
    char spec[300];
    usernic_port *back;
    usernic_queue *theirs;
    usernic_burst *burst;
    usernic_lent_port *port;
    usernic_lent_pair *pair;
    usernic_buffer buffers[COUNT];
    uint64_t cookies[COUNT];
    int fd = memfd_create("lent", MFD_CLOEXEC);
    must(fd < 0 || ftruncate(fd, SIZE) < 0, "memfd");
    uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(memory == MAP_FAILED, "mmap");
    snprintf(spec, sizeof spec, "vhost,path=%s", socket);
    must(usernic_port_open(spec, &back), spec);
    usernic_region region = {.address = memory, .length = SIZE, .page_size = 4096, .fd = fd};
    snprintf(spec, sizeof spec, "virtio-user,path=%s,memory=memfd", socket);
    must(usernic_lent_port_open(spec, &region, 1, &port), spec);
    must(usernic_port_wait_link(back, 60000) != 1 || usernic_lent_port_link(port) != 1, "link");
    must(usernic_port_queue(back, 0, &theirs) | usernic_lent_port_pair(port, 0, &pair), "queues");
    must(usernic_burst_new(COUNT, &burst), "burst");
    for (int round = 0; round < ROUNDS; round++) {
        /* The first half of the buffers is sent, the second half receives. */
        for (uint32_t i = 0; i < COUNT; i++) {
            buffers[i] = (usernic_buffer){.address = at(memory, i), .cookie = i, .length = i < COUNT / 2 ? 60 + i : 1514};
            memset(at(memory, i), (int)(i + (uint32_t)round), buffers[i].length);
        }
        must(usernic_lent_pair_post(pair, buffers + COUNT / 2, COUNT / 2) != COUNT / 2, "post");
        must(usernic_lent_pair_send(pair, buffers, COUNT / 2) != COUNT / 2, "send");
        must(usernic_queue_rx(theirs, burst) != COUNT / 2, "the back-end's rx");
        must(usernic_queue_tx(theirs, burst) != COUNT / 2, "the back-end's tx");
        must(usernic_lent_pair_sent(pair, cookies, COUNT) != COUNT / 2, "sent");
        must(usernic_lent_pair_receive(pair, buffers, COUNT) != COUNT / 2, "receive");
        for (uint32_t i = 0; i < COUNT / 2; i++) {
            const uint8_t *bytes = at(memory, buffers[i].cookie);
            must(cookies[i] != i || buffers[i].length != 60 + i, "order");
            for (uint32_t b = 0; b < buffers[i].length; b++)
                must(bytes[b] != (uint8_t)(i + (uint32_t)round), "bytes");
        }
    }
    must(usernic_lent_port_close(port) | usernic_lent_pair_close(pair), "close");
    must(usernic_burst_close(burst) | usernic_queue_close(theirs) | usernic_port_close(back), "close");
    munmap(memory, SIZE);
    close(fd);
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    /* More than once: what a first run leaves behind is no more in the table of handles after the second. */
    for (int i = 0; i < RUNS; i++)
        run(argv[1]);
    printf("%d frames there and back\n", RUNS * ROUNDS * COUNT / 2);
    return 0;
}
