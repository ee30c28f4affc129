/* What the examples share: a port with one queue and a burst, and an end by signal. */
#ifndef COMMON_H
#define COMMON_H

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <usernic.h>

#define BURST 32

static volatile sig_atomic_t stopped;

static inline void stop(int signal) {
    (void)signal;
    stopped = 1;
}

/* Ends the program with the library's text of what failed. */
static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, usernic_error());
    exit(1);
}

/* Passes a call's result on, unless it failed. */
static inline int32_t must(int32_t result, const char *what) {
    if (result < 0)
        die(what);
    return result;
}

struct end {
    usernic_port *port;
    usernic_queue *queue;
    usernic_burst *burst;
    const usernic_frames *frames;
};

static inline void end_open(struct end *end, const char *spec) {
    must(usernic_port_open(spec, &end->port), spec);
    must(usernic_port_queue(end->port, 0, &end->queue), spec);
    must(usernic_burst_new(BURST, &end->burst), spec);
    end->frames = usernic_burst_frames(end->burst);
}

/* Waits for the other side: half a minute, or until a signal. */
static inline int end_link(const struct end *end, const char *spec) {
    for (int i = 0; i < 300 && !stopped; i++) {
        if (must(usernic_port_wait_link(end->port, 100), spec)) {
            printf("%s: link up\n", spec);
            fflush(stdout);
            return 1;
        }
    }
    return 0;
}

static inline void end_close(struct end *end, const char *spec) {
    usernic_counts counts;
    usernic_queue_drain(end->queue, 1000);
    must(usernic_port_counts(end->port, &counts, sizeof counts), spec);
    printf("%s: %llu received, %llu sent\n", spec, (unsigned long long)counts.rx_packets,
           (unsigned long long)counts.tx_packets);
    usernic_burst_close(end->burst);
    usernic_queue_close(end->queue);
    usernic_port_close(end->port);
}

static inline void handle_signals(void) {
    signal(SIGINT, stop);
    signal(SIGTERM, stop);
}

static inline unsigned long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000000000ull + (unsigned long long)now.tv_nsec;
}

/* Sleeps until it is time for frame number `frame` at `rate` frames a second; 0: at once. */
static inline void pace(unsigned long long begin, unsigned long long frame, unsigned long long rate) {
    unsigned long long due = begin + (rate ? frame * 1000000000ull / rate : 0), now = now_ns();
    if (rate && due > now) {
        struct timespec left = {(time_t)((due - now) / 1000000000ull), (long)((due - now) % 1000000000ull)};
        nanosleep(&left, NULL);
    }
}

/* Sends the whole burst, however long that takes; how many frames that were. */
static inline unsigned long long send_all(const struct end *end, const char *spec) {
    unsigned long long sent = 0;
    while (end->frames->count > 0 && !stopped) {
        int32_t n = must(usernic_queue_tx(end->queue, end->burst), spec);
        sent += (unsigned long long)n;
        if (n == 0) {
            struct timespec little = {0, 50000};
            nanosleep(&little, NULL);
        }
    }
    return sent;
}

static inline unsigned long long number(const char *text) {
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text == 0 || *end != 0) {
        fprintf(stderr, "%s is no number\n", text);
        exit(2);
    }
    return value;
}

#endif
