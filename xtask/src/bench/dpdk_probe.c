/*
 * DPDK's side of the latency and start-up metrics: the least that a DPDK application with one port does.
 *
 *   dpdk_probe EAL-ARGUMENTS -- run      speaks the lines of protocol.rs
 *   dpdk_probe EAL-ARGUMENTS -- first    sends one packet, waits for it, says "first NANOSECONDS", ends with its input
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

static void start_port(void)
{
	struct rte_eth_conf conf;

	memset(&conf, 0, sizeof(conf));
	pool = rte_pktmbuf_pool_create("probe", 2047, 128, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
	if (pool == NULL)
		die("no pool");
	if (rte_eth_dev_configure(0, 1, 1, &conf) < 0)
		die("configure");
	if (rte_eth_rx_queue_setup(0, 0, DESCRIPTORS, SOCKET_ID_ANY, NULL, pool) < 0)
		die("receive queue");
	if (rte_eth_tx_queue_setup(0, 0, DESCRIPTORS, SOCKET_ID_ANY, NULL) < 0)
		die("transmit queue");
	if (rte_eth_dev_start(0) < 0)
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

/* One round trip of n packets; 0 if one is lost. */
static uint64_t round_trip(unsigned n, unsigned size)
{
	struct rte_mbuf *out[BURST], *back[BURST];
	unsigned sent = 0, got = 0;
	uint64_t start;

	if (fill(out, n, size) != n)
		return 0;
	start = now();
	while (sent < n) {
		sent += rte_eth_tx_burst(0, 0, out + sent, (uint16_t)(n - sent));
		if (sent < n && now() - start > 20000000) {
			rte_pktmbuf_free_bulk(out + sent, n - sent);
			break;
		}
	}
	while (got < n) {
		got += rte_eth_rx_burst(0, 0, back + got, (uint16_t)(n - got));
		if (got < n && now() - start > 20000000)
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
				uint64_t took = round_trip(in_flight, size);

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
			printf("latency %u %u %u\n", count, count ? samples[count / 2] : 0,
			       count ? samples[(uint64_t)count * 99 / 100] : 0);
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

int main(int argc, char **argv)
{
	int used = rte_eal_init(argc, argv);

	if (used < 0)
		die("EAL");
	argc -= used;
	argv += used;
	if (argc < 2)
		die("run or first?");
	start_port();
	if (strcmp(argv[1], "first") == 0) {
		char line[16];

		if (round_trip(1, 64) == 0)
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
