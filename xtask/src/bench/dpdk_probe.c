/*
 * DPDK's side of the latency and start-up metrics: the least that a DPDK application with one port does.
 *
 *   dpdk_probe EAL-ARGUMENTS -- run      speaks the lines of protocol.rs
 *   dpdk_probe EAL-ARGUMENTS -- first    sends one packet, waits for it, says "first NANOSECONDS", ends with its input
 *   dpdk_probe EAL-ARGUMENTS -- count BURSTS SIZE DEVARGS
 *                                        for callgrind: port 0 is a vhost back-end, DEVARGS those of the virtio_user
 *                                        port on it; bursts go there and back in this one thread, in the probe_ calls
 *
 * It polls on its main lcore and looks at its input between bursts of round trips.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>

#define BURST 32
#define DESCRIPTORS 256
#define SAMPLES (1u << 22)

static struct rte_mempool *pool;
static uint16_t front;
static uint32_t samples[SAMPLES];
static unsigned count;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "dpdk_probe: %s\n", what);
	exit(1);
}

static void start_port(uint16_t port)
{
	struct rte_eth_conf conf;

	memset(&conf, 0, sizeof(conf));
	if (pool == NULL)
		pool = rte_pktmbuf_pool_create("probe", 2047, 128, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
	if (pool == NULL)
		die("no pool");
	if (rte_eth_dev_configure(port, 1, 1, &conf) < 0)
		die("configure");
	if (rte_eth_rx_queue_setup(port, 0, DESCRIPTORS, SOCKET_ID_ANY, NULL, pool) < 0)
		die("receive queue");
	if (rte_eth_tx_queue_setup(port, 0, DESCRIPTORS, SOCKET_ID_ANY, NULL) < 0)
		die("transmit queue");
	if (rte_eth_dev_start(port) < 0)
		die("start");
}

static unsigned fill(struct rte_mbuf **mbufs, unsigned n, unsigned size)
{
	static const uint8_t headers[42] = { 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45 };
	unsigned i;

	if (rte_pktmbuf_alloc_bulk(pool, mbufs, n) != 0)
		return 0;
	for (i = 0; i < n; i++) {
		mbufs[i]->data_len = (uint16_t)size;
		mbufs[i]->pkt_len = size;
		memcpy(rte_pktmbuf_mtod(mbufs[i], void *), headers, sizeof(headers));
	}
	return n;
}

/* One round trip of n packets; 0 if it takes longer than limit nanoseconds: one is lost. */
static uint64_t round_trip(unsigned n, unsigned size, uint64_t limit)
{
	struct rte_mbuf *out[BURST], *back[BURST];
	unsigned sent = 0, got = 0;
	uint64_t start;

	if (fill(out, n, size) != n)
		return 0;
	start = now();
	while (sent < n) {
		sent += rte_eth_tx_burst(0, 0, out + sent, (uint16_t)(n - sent));
		if (sent < n && now() - start > limit) {
			rte_pktmbuf_free_bulk(out + sent, n - sent);
			break;
		}
	}
	while (got < n) {
		got += rte_eth_rx_burst(0, 0, back + got, (uint16_t)(n - got));
		if (got < n && now() - start > limit)
			break;
	}
	start = now() - start;
	rte_pktmbuf_free_bulk(back, got);
	return got == n ? start : 0;
}

static int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void serve(void)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	struct rte_mbuf *mbufs[BURST];
	struct rte_eth_stats stats;
	unsigned size = 64, in_flight = 0, i;
	char line[128];

	setvbuf(stdin, NULL, _IONBF, 0);
	puts("ready");
	fflush(stdout);
	for (;;) {
		for (i = 0; i < 64; i++) {
			if (in_flight > 0) {
				uint64_t took = round_trip(in_flight, size, 20000000);

				if (took > 0 && count < SAMPLES)
					samples[count++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
			} else {
				rte_pktmbuf_free_bulk(mbufs, rte_eth_rx_burst(0, 0, mbufs, BURST));
			}
		}
		if (poll(&input, 1, 0) <= 0)
			continue;
		if (fgets(line, sizeof(line), stdin) == NULL)
			return;
		if (strncmp(line, "load rx", 7) == 0) {
			in_flight = 0;
			puts("ok");
		} else if (sscanf(line, "load latency %u %u", &size, &in_flight) == 2 && in_flight <= BURST) {
			puts("ok");
		} else if (strncmp(line, "latency", 7) == 0) {
			qsort(samples, count, sizeof(samples[0]), ascending);
			printf("latency %u %u %u %u\n", count, count ? samples[count / 2] : 0,
			       count ? samples[(uint64_t)count * 99 / 100] : 0,
			       count ? samples[(uint64_t)count * 999 / 1000] : 0);
			count = 0;
		} else if (strncmp(line, "stats", 5) == 0) {
			rte_eth_stats_get(0, &stats);
			printf("stats %llu %llu %llu\n", (unsigned long long)stats.ipackets,
			       (unsigned long long)stats.opackets, (unsigned long long)now());
		} else {
			die("unknown line");
		}
		fflush(stdout);
	}
}

/* What callgrind counts, each call with all that it calls. */
__attribute__((noinline)) int probe_alloc(struct rte_mbuf **mbufs)
{
	return rte_pktmbuf_alloc_bulk(pool, mbufs, BURST);
}

__attribute__((noinline)) unsigned probe_tx(struct rte_mbuf **mbufs)
{
	return rte_eth_tx_burst(front, 0, mbufs, BURST);
}

__attribute__((noinline)) unsigned probe_rx(struct rte_mbuf **mbufs)
{
	return rte_eth_rx_burst(front, 0, mbufs, BURST);
}

__attribute__((noinline)) void probe_free(struct rte_mbuf **mbufs)
{
	rte_pktmbuf_free_bulk(mbufs, BURST);
}

/* Packets from the front-end to the back-end and back; how many came. */
static unsigned round_by(unsigned (*tx)(struct rte_mbuf **), unsigned (*rx)(struct rte_mbuf **), struct rte_mbuf **mbufs)
{
	unsigned n = tx(mbufs), got;

	if (n < BURST)
		rte_pktmbuf_free_bulk(mbufs + n, BURST - n);
	n = rte_eth_rx_burst(0, 0, mbufs, BURST);
	got = rte_eth_tx_burst(0, 0, mbufs, (uint16_t)n);
	if (got < n)
		rte_pktmbuf_free_bulk(mbufs + got, n - got);
	return rx(mbufs);
}

static unsigned plain_tx(struct rte_mbuf **mbufs)
{
	return rte_eth_tx_burst(front, 0, mbufs, BURST);
}

static unsigned plain_rx(struct rte_mbuf **mbufs)
{
	return rte_eth_rx_burst(front, 0, mbufs, BURST);
}

static void count_bursts(unsigned bursts, unsigned size, const char *devargs)
{
	struct rte_mbuf *mbufs[BURST];
	unsigned i, j, whole = 0;
	static const uint8_t headers[42] = { 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45 };

	start_port(0);
	if (rte_eal_hotplug_add("vdev", "net_virtio_user0", devargs) < 0)
		die("no virtio_user port");
	if (rte_eth_dev_get_port_by_name("net_virtio_user0", &front) < 0)
		die("no such port");
	start_port(front);
	/* Until both sides are awake; these calls are not counted. */
	for (i = 0; whole < 16; i++) {
		unsigned got;

		if (fill(mbufs, BURST, size) != BURST)
			die("no mbufs");
		got = round_by(plain_tx, plain_rx, mbufs);
		rte_pktmbuf_free_bulk(mbufs, got);
		whole = got == BURST ? whole + 1 : 0;
		if (whole == 0)
			usleep(1000);
		if (i > 30000)
			die("packets do not come back");
	}
	for (i = 0; i < bursts; i++) {
		if (probe_alloc(mbufs) != 0)
			die("no mbufs");
		for (j = 0; j < BURST; j++) {
			mbufs[j]->data_len = (uint16_t)size;
			mbufs[j]->pkt_len = size;
			memcpy(rte_pktmbuf_mtod(mbufs[j], void *), headers, sizeof(headers));
		}
		if (round_by(probe_tx, probe_rx, mbufs) != BURST)
			die("a burst did not come back whole");
		probe_free(mbufs);
	}
	puts("counted");
}

int main(int argc, char **argv)
{
	int used = rte_eal_init(argc, argv);

	if (used < 0)
		die("EAL");
	argc -= used;
	argv += used;
	if (argc < 2)
		die("run or first?");
	if (strcmp(argv[1], "count") == 0) {
		if (argc != 5)
			die("count BURSTS SIZE DEVARGS");
		count_bursts((unsigned)atoi(argv[2]), (unsigned)atoi(argv[3]), argv[4]);
		fflush(stdout);
		return 0;
	}
	start_port(0);
	if (strcmp(argv[1], "first") == 0) {
		char line[16];

		if (round_trip(1, 64, 10000000000) == 0)
			die("no packet came back");
		printf("first %llu\n", (unsigned long long)now());
		fflush(stdout);
		if (fgets(line, sizeof(line), stdin) == NULL)
			line[0] = 0;
	} else {
		serve();
	}
	rte_eth_dev_stop(0);
	rte_eal_cleanup();
	return 0;
}
