/* SPDX-License-Identifier: BSD-3-Clause
 *
 * A port, as the C files of this driver know it.
 */
#ifndef NET_USERNIC_DEV_H
#define NET_USERNIC_DEV_H

#include <pthread.h>
#include <stdbool.h>

#include <bus_vdev_driver.h>
#include <ethdev_driver.h>
#include <ethdev_vdev.h>
#include <rte_log.h>
#include <rte_version.h>

#include "net_usernic.h"

/* A device's: descriptors of a ring, segments of a frame, entries of its table. */
#define USERNIC_VF_MIN_RING 64
#define USERNIC_VF_MAX_RING 8192
#define USERNIC_VF_MAX_SEGMENTS 40
#define USERNIC_VF_TABLE 64
#define USERNIC_VF_KEY 40

/* Bytes of a frame with its VLAN tag and without FCS, at the most. */
#define USERNIC_MAX_FRAME 9728
#define USERNIC_OVERHEAD (RTE_ETHER_HDR_LEN + RTE_VLAN_HLEN)

/* virtio_net features (virtio 1.3, 5.1.3). */
#define USERNIC_F_CSUM (1ULL << 0)
#define USERNIC_F_GUEST_CSUM (1ULL << 1)
#define USERNIC_F_GUEST_TSO (1ULL << 7 | 1ULL << 8)
#define USERNIC_F_HOST_TSO (1ULL << 11 | 1ULL << 12)
#define USERNIC_F_MRG_RXBUF (1ULL << 15)

struct usernic_rxq {
	struct usernic_handle handle; /* first */
	struct rte_mempool *pool;
	struct rte_eth_rxconf conf;
	uint16_t size;
};

struct usernic_txq {
	struct usernic_handle handle; /* first */
	struct rte_eth_txconf conf;
	uint16_t size;
};

/* Of all starts so far but the running one; and where counting began. */
struct usernic_tally {
	struct usernic_counts past, base;
};

struct usernic_dev {
	struct usernic_port *port;
	/* Taken around calls for `port`; behind DPDK's lock of its memory, where both are. */
	pthread_mutex_t lock;
	struct usernic_info info;
	uint16_t port_id;
	bool started, link, listed;
	bool vlan_strip;
	/* Rings, in DPDK's memory. */
	void *rings;
	void *queues[2 * USERNIC_MAX_PAIRS];
	uint16_t pairs;
	struct usernic_rxq rxq[USERNIC_MAX_PAIRS];
	struct usernic_txq txq[USERNIC_MAX_PAIRS];
	struct usernic_tally rx[USERNIC_MAX_PAIRS], tx[USERNIC_MAX_PAIRS];
	struct rte_intr_handle *intr;
	/* Groups that are received. */
	struct rte_ether_addr groups[USERNIC_MAX_ADDRESSES];
	uint16_t group_count;
	char name[32];
};

extern int usernic_logtype;
#define USERNIC_LOG(level, ...) rte_log(RTE_LOG_##level, usernic_logtype, "net_usernic: " __VA_ARGS__)

extern const struct eth_dev_ops usernic_ops;
extern const struct usernic_calls usernic_calls;

static inline struct usernic_dev *usernic_dev_of(const struct rte_eth_dev *dev)
{
	return dev->data->dev_private;
}

/* net_usernic.c */
void usernic_watch(struct usernic_dev *dev);
void usernic_unwatch(struct usernic_dev *dev);

/* net_usernic_mem.c */
int usernic_follow_memory(struct usernic_dev *dev);
void usernic_unfollow_memory(struct usernic_dev *dev);
int32_t usernic_regions(struct usernic_region *regions, uint32_t most, uint32_t files);

/* net_usernic_mbuf.c */
uint16_t usernic_tx_prepare(void *queue, struct rte_mbuf **mbufs, uint16_t count);
uint16_t usernic_vf_prepare(void *queue, struct rte_mbuf **mbufs, uint16_t count);

/* net_usernic_stats.c */
#if RTE_VERSION >= RTE_VERSION_NUM(25, 11, 0, 0)
int usernic_stats_get(struct rte_eth_dev *eth, struct rte_eth_stats *stats, struct eth_queue_stats *queues);
#else
int usernic_stats_get(struct rte_eth_dev *eth, struct rte_eth_stats *stats);
#endif
int usernic_stats_reset(struct rte_eth_dev *eth);
int usernic_xstats_get(struct rte_eth_dev *eth, struct rte_eth_xstat *values, unsigned int most);
int usernic_xstats_names(struct rte_eth_dev *eth, struct rte_eth_xstat_name *names, unsigned int most);
void usernic_stats_keep(struct usernic_dev *dev);

/* net_usernic_rss.c */
uint64_t usernic_rss_types(const struct usernic_info *info);
uint32_t usernic_rss_fields(uint64_t types);
int usernic_rss_update(struct rte_eth_dev *eth, struct rte_eth_rss_conf *conf);
int usernic_rss_get(struct rte_eth_dev *eth, struct rte_eth_rss_conf *conf);
int usernic_reta_update(struct rte_eth_dev *eth, struct rte_eth_rss_reta_entry64 *entries, uint16_t count);
int usernic_reta_get(struct rte_eth_dev *eth, struct rte_eth_rss_reta_entry64 *entries, uint16_t count);

/* net_usernic_filter.c */
int usernic_use_filter(struct rte_eth_dev *eth, bool promiscuous, bool all_multicast);
int usernic_promiscuous_on(struct rte_eth_dev *eth);
int usernic_promiscuous_off(struct rte_eth_dev *eth);
int usernic_all_multicast_on(struct rte_eth_dev *eth);
int usernic_all_multicast_off(struct rte_eth_dev *eth);
int usernic_mac_set(struct rte_eth_dev *eth, struct rte_ether_addr *address);
int usernic_mac_add(struct rte_eth_dev *eth, struct rte_ether_addr *address, uint32_t index, uint32_t pool);
void usernic_mac_remove(struct rte_eth_dev *eth, uint32_t index);
int usernic_groups_set(struct rte_eth_dev *eth, struct rte_ether_addr *groups, uint32_t count);
int usernic_vlan_filter(struct rte_eth_dev *eth, uint16_t id, int on);
int usernic_vlan_offload(struct rte_eth_dev *eth, int mask);

#endif
