/* SPDX-License-Identifier: BSD-3-Clause
 *
 * A DPDK application that does with its one port what testpmd does not: `exercise EAL-ARGUMENTS -- SCENARIO`. The other
 * side sends every frame back. Exit status 0: all was as it should be.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_malloc.h>
#include <rte_mbuf.h>
#include <rte_version.h>

#define PORT 0
#define COUNT 2047

static struct rte_mempool *pool;
static uint32_t number;

static void fail(const char *format, ...)
{
	va_list values;

	va_start(values, format);
	fprintf(stderr, "exercise: ");
	vfprintf(stderr, format, values);
	fprintf(stderr, "\n");
	va_end(values);
	exit(1);
}

#define CHECK(what) ((what) ? (void)0 : fail("line %d: not so: %s (%s)", __LINE__, #what, rte_strerror(rte_errno)))
#define DONE(call)                                                                                                     \
	do {                                                                                                           \
		int result_ = (call);                                                                                  \
		if (result_ < 0)                                                                                       \
			fail("line %d: %s: %s", __LINE__, #call, strerror(-result_));                                  \
	} while (0)

static void start(struct rte_eth_conf *conf, uint16_t queues)
{
	struct rte_eth_dev_info info;
	uint16_t i;

	DONE(rte_eth_dev_info_get(PORT, &info));
	conf->txmode.offloads |= RTE_ETH_TX_OFFLOAD_MULTI_SEGS;
	DONE(rte_eth_dev_configure(PORT, queues, queues, conf));
	for (i = 0; i < queues; i++) {
		DONE(rte_eth_rx_queue_setup(PORT, i, 256, SOCKET_ID_ANY, NULL, pool));
		DONE(rte_eth_tx_queue_setup(PORT, i, 256, SOCKET_ID_ANY, NULL));
	}
	DONE(rte_eth_dev_start(PORT));
	DONE(rte_eth_promiscuous_enable(PORT));
}

/* Bytes of a frame that nobody else sends. */
static void paint(uint8_t *bytes, uint32_t length, uint32_t of)
{
	uint32_t i;

	memset(bytes, 0, 14);
	bytes[0] = 2;
	bytes[6] = 2;
	bytes[12] = 0x88;
	bytes[13] = 0xb5;
	for (i = 14; i < length; i++)
		bytes[i] = (uint8_t)(of * 31 + i);
}

static void append(struct rte_mbuf *frame, uint32_t length)
{
	char *bytes = rte_pktmbuf_append(frame, length);

	if (bytes == NULL)
		fail("no room for %u bytes", length);
	else
		paint((uint8_t *)bytes, length, number);
}

static struct rte_mbuf *frame_of(struct rte_mempool *from, uint32_t length)
{
	struct rte_mbuf *frame = rte_pktmbuf_alloc(from);

	CHECK(frame != NULL);
	number++;
	append(frame, length);
	return frame;
}

static void send_frame(struct rte_mbuf *frame)
{
	uint64_t end = rte_get_timer_cycles() + 10 * rte_get_timer_hz();

	while (rte_eth_tx_burst(PORT, 0, &frame, 1) == 0)
		if (rte_get_timer_cycles() > end)
			fail("a frame cannot be sent");
}

/* The next frame that comes back, or NULL after some seconds. */
static struct rte_mbuf *next_frame(unsigned int seconds)
{
	uint64_t end = rte_get_timer_cycles() + seconds * rte_get_timer_hz();
	struct rte_mbuf *frame;

	do {
		if (rte_eth_rx_burst(PORT, 0, &frame, 1) == 1)
			return frame;
	} while (rte_get_timer_cycles() < end);
	return NULL;
}

/* Waits for the frame of this number to come back as it was painted. */
static void expect(uint32_t length, uint32_t of)
{
	uint8_t expected[9000], got[9000];
	struct rte_mbuf *frame = next_frame(10);
	const uint8_t *bytes;

	if (frame == NULL)
		fail("frame %u of %u bytes did not come back", of, length);
	paint(expected, length, of);
	CHECK(frame->pkt_len == length);
	bytes = rte_pktmbuf_read(frame, 0, length, got);
	CHECK(memcmp(bytes, expected, length) == 0);
	rte_pktmbuf_free(frame);
}

static void there_and_back(struct rte_mempool *from, uint32_t length)
{
	send_frame(frame_of(from, length));
	expect(length, number);
}

/* Every mbuf that is not posted is in its pool again. */
static void nothing_lost(void)
{
	uint64_t end = rte_get_timer_cycles() + 5 * rte_get_timer_hz();

	while (rte_mempool_avail_count(pool) < COUNT - 256) {
		rte_eth_tx_done_cleanup(PORT, 0, 0);
		if (rte_get_timer_cycles() > end)
			fail("%u of %u mbufs are in the pool", rte_mempool_avail_count(pool), COUNT);
	}
	DONE(rte_eth_dev_stop(PORT));
	CHECK(rte_mempool_avail_count(pool) == COUNT);
}

/* DPDK's memory grows and shrinks while the port runs. */
static void memory(void)
{
	struct rte_eth_conf conf = {0};
	int i;

	start(&conf, 1);
	there_and_back(pool, 100);
	for (i = 0; i < 6; i++) {
		struct rte_mempool *more =
			rte_pktmbuf_pool_create("more", 8191 + 2048 * i, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);

		CHECK(more != NULL);
		there_and_back(more, 300 + i);
		there_and_back(pool, 200 + i);
		while (rte_mempool_avail_count(more) < more->size)
			rte_eth_tx_done_cleanup(PORT, 0, 0);
		rte_mempool_free(more);
		there_and_back(pool, 400 + i);
	}
	nothing_lost();
}

static void free_extra(void *address __rte_unused, void *flag)
{
	*(volatile int *)flag = 1;
}

/* Frames whose mbufs are shared, attached, or someone's own memory; and chains of them. */
static void shared(void)
{
	struct rte_eth_conf conf = {0};
	struct rte_mbuf *frame, *clone, *head;
	static volatile int freed;
	uint32_t length, of, i;

	conf.rxmode.mtu = 2000;
	start(&conf, 1);
	for (i = 0; i < 300; i++) {
		length = 60 + i * 4;
		/* Twice the same mbuf. */
		frame = frame_of(pool, length);
		of = number;
		rte_mbuf_refcnt_update(frame, 1);
		send_frame(frame);
		expect(length, of);
		send_frame(frame);
		expect(length, of);
		/* A clone beside its original. */
		frame = frame_of(pool, length);
		of = number;
		clone = rte_pktmbuf_clone(frame, pool);
		CHECK(clone != NULL);
		send_frame(clone);
		expect(length, of);
		send_frame(frame);
		expect(length, of);
		/* A head of its own before a clone of the rest. */
		frame = frame_of(pool, length);
		of = number;
		head = rte_pktmbuf_alloc(pool);
		clone = rte_pktmbuf_clone(frame, pool);
		CHECK(head != NULL && clone != NULL);
		append(head, 20);
		memcpy(rte_pktmbuf_mtod(head, char *), rte_pktmbuf_mtod(frame, char *), 20);
		CHECK(rte_pktmbuf_adj(clone, 20) != NULL);
		CHECK(rte_pktmbuf_chain(head, clone) == 0);
		rte_pktmbuf_free(frame);
		send_frame(head);
		expect(length, of);
		/* No room for a header before the data. */
		frame = frame_of(pool, length);
		of = number;
		CHECK(rte_pktmbuf_prepend(frame, RTE_PKTMBUF_HEADROOM) != NULL);
		paint(rte_pktmbuf_mtod(frame, uint8_t *), length + RTE_PKTMBUF_HEADROOM, of);
		send_frame(frame);
		expect(length + RTE_PKTMBUF_HEADROOM, of);
	}
	/* Memory that is no mbuf's. */
	for (i = 0; i < 20; i++) {
		uint16_t room = 4096;
		uint8_t *extra = rte_malloc(NULL, room, 64);
		struct rte_mbuf_ext_shared_info *info;

		CHECK(extra != NULL);
		freed = 0;
		info = rte_pktmbuf_ext_shinfo_init_helper(extra, &room, free_extra, (void *)(uintptr_t)&freed);
		CHECK(info != NULL);
		frame = rte_pktmbuf_alloc(pool);
		CHECK(frame != NULL);
		rte_pktmbuf_attach_extbuf(frame, extra, RTE_BAD_IOVA, room, info);
		frame->data_off = 0;
		number++;
		append(frame, 2000);
		send_frame(frame);
		expect(2000, number);
		while (!freed)
			rte_eth_tx_done_cleanup(PORT, 0, 0);
		rte_free(extra);
	}
	/* More segments than can be sent: freed, and counted. */
	head = rte_pktmbuf_alloc(pool);
	rte_pktmbuf_append(head, 20);
	for (i = 0; i < 70; i++) {
		frame = rte_pktmbuf_alloc(pool);
		rte_pktmbuf_append(frame, 20);
		CHECK(rte_pktmbuf_chain(head, frame) == 0);
	}
	send_frame(head);
	{
		struct rte_eth_stats stats;

		DONE(rte_eth_stats_get(PORT, &stats));
		CHECK(stats.oerrors == 1 && stats.imissed == 0 && stats.ierrors == 0);
		CHECK(stats.ibytes > 0);
#if RTE_VERSION < RTE_VERSION_NUM(25, 11, 0, 0)
		CHECK(stats.q_opackets[0] == stats.opackets);
#endif
		DONE(rte_eth_stats_reset(PORT));
		DONE(rte_eth_stats_get(PORT, &stats));
		CHECK(stats.opackets == 0 && stats.ibytes == 0 && stats.oerrors == 0);
	}
	nothing_lost();
}

/* Sleeps until the other side notifies: each round it is asked for a frame by one that was sent. */
static void interrupts(void)
{
	struct rte_eth_conf conf = {.intr_conf = {.rxq = 1}};
	struct rte_epoll_event event;
	uint32_t i, slept = 0;

	start(&conf, 1);
	there_and_back(pool, 100);
	for (i = 0; i < 200; i++) {
		struct rte_mbuf *frame;

		if (i == 100) {
			/* What was waited for is gone with the queues, and those that are new take its place. */
			DONE(rte_eth_dev_stop(PORT));
			DONE(rte_eth_dev_start(PORT));
			there_and_back(pool, 100);
		}
		if (i % 100 == 0)
			DONE(rte_eth_dev_rx_intr_ctl_q(PORT, 0, RTE_EPOLL_PER_THREAD, RTE_INTR_EVENT_ADD, NULL));
		send_frame(frame_of(pool, 60 + i));
		DONE(rte_eth_dev_rx_intr_enable(PORT, 0));
		if (rte_eth_rx_burst(PORT, 0, &frame, 1) == 0) {
			CHECK(rte_epoll_wait(RTE_EPOLL_PER_THREAD, &event, 1, 10000) == 1);
			slept++;
			DONE(rte_eth_dev_rx_intr_disable(PORT, 0));
			frame = next_frame(10);
		} else {
			DONE(rte_eth_dev_rx_intr_disable(PORT, 0));
		}
		CHECK(frame != NULL && frame->pkt_len == 60 + i);
		rte_pktmbuf_free(frame);
	}
	DONE(rte_eth_dev_rx_intr_ctl_q(PORT, 0, RTE_EPOLL_PER_THREAD, RTE_INTR_EVENT_DEL, NULL));
	printf("slept %u times\n", slept);
	CHECK(slept > 20);
	nothing_lost();
}

static volatile int changes;

static int link_changed(uint16_t port, enum rte_eth_event_type type __rte_unused, void *arg __rte_unused,
			void *more __rte_unused)
{
	struct rte_eth_link link;

	DONE(rte_eth_link_get_nowait(port, &link));
	printf("link %s\n", link.link_status ? "up" : "down");
	fflush(stdout);
	changes++;
	return 0;
}

/* The other side goes away and comes back. */
static void link_state(void)
{
	struct rte_eth_conf conf = {.intr_conf = {.lsc = 1}};
	uint64_t end;

	DONE(rte_eth_dev_callback_register(PORT, RTE_ETH_EVENT_INTR_LSC, link_changed, NULL));
	start(&conf, 1);
	there_and_back(pool, 100);
	printf("ready\n");
	fflush(stdout);
	end = rte_get_timer_cycles() + 20 * rte_get_timer_hz();
	while (changes < 2) {
		struct rte_mbuf *frame;

		/* Meanwhile frames are refused or lost, and never stuck. */
		frame = frame_of(pool, 60);
		if (rte_eth_tx_burst(PORT, 0, &frame, 1) == 0)
			rte_pktmbuf_free(frame);
		if (rte_eth_rx_burst(PORT, 0, &frame, 1) == 1)
			rte_pktmbuf_free(frame);
		CHECK(rte_get_timer_cycles() < end);
		usleep(100);
	}
	for (end = 0; end < 50; end++) {
		struct rte_mbuf *frame = next_frame(0);

		if (frame != NULL)
			rte_pktmbuf_free(frame);
		usleep(1000);
	}
	while (next_frame(0) != NULL)
		;
	there_and_back(pool, 222);
	nothing_lost();
}

/* What a port is asked for, by calls. */
static void calls(void)
{
	struct rte_eth_conf conf = {0};
	struct rte_ether_addr address, many[65] = {0};
	struct rte_eth_dev_info info;
	struct rte_eth_rxq_info rxq;
	struct rte_eth_burst_mode mode;
	uint16_t mtu;
	int i;

	DONE(rte_eth_dev_info_get(PORT, &info));
	CHECK(strcmp(info.driver_name, "net_usernic") == 0 && info.max_rx_queues == 1);
	CHECK(info.tx_offload_capa & RTE_ETH_TX_OFFLOAD_MULTI_SEGS);
	CHECK(info.flow_type_rss_offloads == 0 && info.reta_size == 0);
	conf.rxmode.mq_mode = RTE_ETH_MQ_RX_VMDQ_ONLY;
	CHECK(rte_eth_dev_configure(PORT, 1, 1, &conf) < 0);
	conf.rxmode.mq_mode = RTE_ETH_MQ_RX_NONE;
	/* A frame of 9,000 bytes fits no mbuf, and scattering is not asked for. */
	conf.rxmode.mtu = 9000;
	DONE(rte_eth_dev_configure(PORT, 1, 1, &conf));
	DONE(rte_eth_rx_queue_setup(PORT, 0, 100, SOCKET_ID_ANY, NULL, pool));
	DONE(rte_eth_tx_queue_setup(PORT, 0, 100, SOCKET_ID_ANY, NULL));
	CHECK(rte_eth_dev_start(PORT) == -EINVAL);
	conf.rxmode.mtu = 1500;
	start(&conf, 1);
	DONE(rte_eth_rx_queue_info_get(PORT, 0, &rxq));
	CHECK(rxq.mp == pool && rxq.nb_desc == 256);
	DONE(rte_eth_rx_burst_mode_get(PORT, 0, &mode));
	printf("rings: %s\n", mode.info);
	DONE(rte_eth_dev_set_mtu(PORT, 1400));
	DONE(rte_eth_dev_get_mtu(PORT, &mtu));
	CHECK(mtu == 1400);
	CHECK(rte_eth_dev_set_mtu(PORT, 9000) < 0 && rte_eth_dev_set_mtu(PORT, 20) < 0);
	CHECK(rte_eth_dev_set_mc_addr_list(PORT, many, 65) == -ENOSPC);
	DONE(rte_eth_macaddr_get(PORT, &address));
	address.addr_bytes[5] ^= 1;
	DONE(rte_eth_dev_default_mac_addr_set(PORT, &address));
	for (i = 0; i < 64; i++) {
		address.addr_bytes[4] = i;
		address.addr_bytes[5] = 0x40;
		DONE(rte_eth_dev_mac_addr_add(PORT, &address, 0));
	}
	address.addr_bytes[4] = 99;
	CHECK(rte_eth_dev_mac_addr_add(PORT, &address, 0) == -ENOSPC);
	there_and_back(pool, 700);
	/* Down and up, with what was configured. Calls for queues that do not run are harmless. */
	DONE(rte_eth_dev_stop(PORT));
	CHECK(rte_eth_tx_done_cleanup(PORT, 0, 0) == 0);
	CHECK(rte_eth_dev_rx_intr_enable(PORT, 0) < 0 && rte_eth_dev_rx_intr_disable(PORT, 0) < 0);
	DONE(rte_eth_dev_start(PORT));
	there_and_back(pool, 701);
	nothing_lost();
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} scenarios[] = {
		{"memory", memory}, {"shared", shared}, {"interrupts", interrupts}, {"link", link_state}, {"calls", calls},
	};
	int used = rte_eal_init(argc, argv);
	size_t i;

	if (used < 0 || argc != used + 2)
		fail("exercise EAL-ARGUMENTS -- SCENARIO");
	CHECK(rte_eth_dev_count_avail() == 1);
	pool = rte_pktmbuf_pool_create("pool", COUNT, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
	CHECK(pool != NULL);
	for (i = 0; i < RTE_DIM(scenarios); i++)
		if (strcmp(argv[used + 1], scenarios[i].name) == 0) {
			scenarios[i].run();
			DONE(rte_eth_dev_close(PORT));
			rte_mempool_free(pool);
			rte_eal_cleanup();
			printf("%s: done\n", scenarios[i].name);
			return 0;
		}
	fail("no scenario %s", argv[used + 1]);
	return 1;
}
