/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The C half alone: its files are part of this program, which plays the Rust half. A port that refuses what it is asked for
 * keeps what it had; headers of frames that the other side writes meanwhile are read once.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../net_usernic_filter.c"
#include "../net_usernic_mbuf.c"

#define CHECK(what) \
	do { \
		if (!(what)) { \
			fprintf(stderr, "line %d: not so: %s\n", __LINE__, #what); \
			exit(1); \
		} \
	} while (0)

int usernic_logtype;

static bool refuses;
static struct usernic_filter asked;
static int stripped = -1;

int32_t usernic_pmd_filter(struct usernic_port *port __rte_unused, const struct usernic_filter *filter)
{
	asked = *filter;
	return refuses ? -EPERM : 0;
}

void usernic_pmd_vlan_strip(struct usernic_port *port __rte_unused, uint8_t on)
{
	stripped = on;
}

const char *usernic_pmd_error(void)
{
	return "refused";
}

int32_t usernic_regions(struct usernic_region *regions __rte_unused, uint32_t most __rte_unused,
			uint32_t files __rte_unused)
{
	return 0;
}

static void setters(void)
{
	static struct usernic_dev dev = {.lock = PTHREAD_MUTEX_INITIALIZER};
	static struct rte_ether_addr addresses[1 + USERNIC_MAX_ADDRESSES];
	static struct rte_eth_dev_data data = {.dev_private = &dev, .mac_addrs = addresses};
	struct rte_eth_dev eth = {.data = &data};
	struct rte_ether_addr first = {{2, 0, 0, 0, 0, 1}}, second = {{2, 0, 0, 0, 0, 2}};
	struct rte_ether_addr groups[2] = {{{1, 0, 94, 0, 0, 1}}, {{1, 0, 94, 0, 0, 2}}};
	struct rte_ether_addr others[3] = {{{1, 0, 94, 0, 1, 1}}, {{1, 0, 94, 0, 1, 2}}, {{1, 0, 94, 0, 1, 3}}};
	struct usernic_filter before;

	CHECK(usernic_mac_set(&eth, &first) == 0 && usernic_mac_add(&eth, &second, 1, 0) == 0);
	CHECK(usernic_groups_set(&eth, groups, 2) == 0 && usernic_vlan_filter(&eth, 100, 1) == 0);
	before = asked;
	CHECK(before.stations == 1 && before.groups == 2 && before.vlans[1] == 1ULL << 36);

	refuses = true;
	CHECK(usernic_mac_set(&eth, &second) == -EPERM);
	CHECK(usernic_mac_add(&eth, &first, 1, 0) == -EPERM);
	CHECK(usernic_mac_add(&eth, &first, 2, 0) == -EPERM);
	CHECK(usernic_groups_set(&eth, others, 3) == -EPERM);
	CHECK(usernic_groups_set(&eth, others, 0) == -EPERM);
	CHECK(usernic_vlan_filter(&eth, 100, 0) == -EPERM);
	CHECK(usernic_vlan_filter(&eth, 101, 1) == -EPERM);
	CHECK(usernic_promiscuous_on(&eth) == -EPERM && usernic_all_multicast_on(&eth) == -EPERM);
	data.dev_conf.rxmode.offloads = RTE_ETH_RX_OFFLOAD_VLAN_FILTER | RTE_ETH_RX_OFFLOAD_VLAN_STRIP;
	CHECK(usernic_vlan_offload(&eth, RTE_ETH_VLAN_FILTER_MASK | RTE_ETH_VLAN_STRIP_MASK) == -EPERM);
	CHECK(!dev.vlan_strip && stripped == -1);
	data.dev_conf.rxmode.offloads = 0;

	/* What the next request says is what was granted before. */
	refuses = false;
	CHECK(usernic_promiscuous_off(&eth) == 0);
	CHECK(memcmp(&asked, &before, sizeof(asked)) == 0);
}

/* An Ethernet and an IPv4 header: the bytes of both, the second's `words`, behind a tag or not, with a right checksum. */
static uint16_t put(uint8_t *frame, bool tag, uint8_t words)
{
	uint16_t at = tag ? 18 : 14;
	struct rte_ipv4_hdr *ipv4 = (void *)(frame + at);

	memset(frame, 0, at + 4 * words);
	memcpy(frame + 12, tag ? "\x81\x00\x00\x07\x08\x00" : "\x08\x00", at - 12);
	ipv4->version_ihl = 0x40 | words;
	memset(frame + at + 20, 0x5a, 4 * words - 20);
	ipv4->hdr_checksum = rte_ipv4_cksum(ipv4);
	return at + 4 * words;
}

static uint64_t look(uint8_t *frame, uint16_t length)
{
	struct rte_mbuf mbuf = {.buf_addr = frame, .data_len = length, .pkt_len = length, .nb_segs = 1};

	CHECK(usernic_received(&mbuf, NULL, USERNIC_RX_IPV4) == 0);
	return mbuf.ol_flags;
}

static volatile bool done;

/* The other side, which writes the length of the header. */
static void *rewrite(void *arg)
{
	volatile uint8_t *byte = arg;

	while (!done) {
		*byte = 0x45;
		*byte = 0x4f;
	}
	return NULL;
}

static void headers(void)
{
	long page = sysconf(_SC_PAGESIZE);
	uint8_t *room = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t bytes[78], *frame;
	pthread_t writer;
	uint8_t words;
	int tag, i;

	/* Whoever reads behind a frame dies. */
	CHECK(room != MAP_FAILED && mprotect(room + page, page, PROT_NONE) == 0);
	for (tag = 0; tag < 2; tag++)
		for (words = 5; words < 16; words++) {
			uint16_t length = put(bytes, tag, words), at;

			frame = room + page - length;
			memcpy(frame, bytes, length);
			CHECK(look(frame, length) == RTE_MBUF_F_RX_IP_CKSUM_GOOD);
			frame[length - 1] ^= 1;
			CHECK(look(frame, length) == RTE_MBUF_F_RX_IP_CKSUM_BAD);
			for (at = 14; at < length; at++) {
				memcpy(room + page - at, bytes, at);
				CHECK(look(room + page - at, at) == 0);
			}
		}
	frame = room + page - put(bytes, false, 5);
	memcpy(frame, bytes, 34);
	frame[14] = 0x44;
	CHECK(look(frame, 34) == 0);
	CHECK(pthread_create(&writer, NULL, rewrite, frame + 14) == 0);
	for (i = 0; i < 2000000; i++)
		look(frame, 34);
	done = true;
	pthread_join(writer, NULL);
}

int main(void)
{
	setters();
	headers();
	printf("the C half: done\n");
	return 0;
}
