/* SPDX-License-Identifier: BSD-3-Clause
 *
 * ethdev operations: configuration, queues, start and stop.
 */
#include <errno.h>
#include <string.h>

#include <rte_eal_memconfig.h>
#include <rte_malloc.h>

#include "net_usernic_dev.h"

/* Free descriptors at which a receive ring is filled. */
#define REFILL 32

static int usernic_configure(struct rte_eth_dev *eth)
{
	const struct rte_eth_conf *conf = &eth->data->dev_conf;
	enum rte_eth_rx_mq_mode mode = conf->rxmode.mq_mode;
	/* By no hash: as the back-end spreads them, then. Many applications ask so, of whatever is there. */
	bool none = mode == RTE_ETH_MQ_RX_NONE || (mode == RTE_ETH_MQ_RX_RSS && conf->rx_adv_conf.rss_conf.rss_hf == 0);

	/* A device spreads by a hash of its own accord. */
	if (usernic_dev_of(eth)->info.vf && mode == RTE_ETH_MQ_RX_RSS)
		none = true;
	if (!none || conf->txmode.mq_mode != RTE_ETH_MQ_TX_NONE) {
		USERNIC_LOG(ERR, "%s: the back-end spreads frames over queues by itself: mq_mode is NONE\n",
			    usernic_dev_of(eth)->name);
		return -ENOTSUP;
	}
	return 0;
}

static uint64_t usernic_rx_offloads(const struct usernic_info *info)
{
	uint64_t offloads =
		RTE_ETH_RX_OFFLOAD_VLAN_STRIP | RTE_ETH_RX_OFFLOAD_VLAN_FILTER | RTE_ETH_RX_OFFLOAD_IPV4_CKSUM;
	bool merge = info->features & USERNIC_F_MRG_RXBUF && info->mrg_rxbuf != 0;

	if (info->vf)
		return offloads | RTE_ETH_RX_OFFLOAD_SCATTER | RTE_ETH_RX_OFFLOAD_UDP_CKSUM | RTE_ETH_RX_OFFLOAD_TCP_CKSUM |
		       RTE_ETH_RX_OFFLOAD_RSS_HASH;

	if (merge)
		offloads |= RTE_ETH_RX_OFFLOAD_SCATTER;
	if (info->features & USERNIC_F_GUEST_CSUM) {
		offloads |= RTE_ETH_RX_OFFLOAD_UDP_CKSUM | RTE_ETH_RX_OFFLOAD_TCP_CKSUM;
		if (merge && (info->features & USERNIC_F_GUEST_TSO) == USERNIC_F_GUEST_TSO)
			offloads |= RTE_ETH_RX_OFFLOAD_TCP_LRO;
	}
	return offloads;
}

static uint64_t usernic_tx_offloads(const struct usernic_info *info)
{
	uint64_t offloads =
		RTE_ETH_TX_OFFLOAD_MULTI_SEGS | RTE_ETH_TX_OFFLOAD_VLAN_INSERT | RTE_ETH_TX_OFFLOAD_MBUF_FAST_FREE;

	if (info->vf)
		offloads |= RTE_ETH_TX_OFFLOAD_IPV4_CKSUM | RTE_ETH_TX_OFFLOAD_SCTP_CKSUM;
	if (info->features & USERNIC_F_CSUM) {
		offloads |= RTE_ETH_TX_OFFLOAD_UDP_CKSUM | RTE_ETH_TX_OFFLOAD_TCP_CKSUM;
		if ((info->features & USERNIC_F_HOST_TSO) == USERNIC_F_HOST_TSO)
			offloads |= RTE_ETH_TX_OFFLOAD_TCP_TSO;
	}
	return offloads;
}

static int usernic_infos(struct rte_eth_dev *eth, struct rte_eth_dev_info *infos)
{
	struct usernic_dev *dev = usernic_dev_of(eth);

	pthread_mutex_lock(&dev->lock);
	usernic_pmd_info(dev->port, &dev->info);
	pthread_mutex_unlock(&dev->lock);
	infos->min_rx_bufsize = 64;
	infos->max_rx_pktlen = USERNIC_MAX_FRAME;
	infos->min_mtu = RTE_ETHER_MIN_MTU;
	infos->max_mtu = USERNIC_MAX_FRAME - USERNIC_OVERHEAD;
	infos->max_lro_pkt_size = UINT16_MAX;
	infos->max_rx_queues = infos->max_tx_queues = dev->info.pairs;
	infos->max_mac_addrs = 1 + USERNIC_MAX_ADDRESSES;
	infos->rx_offload_capa = usernic_rx_offloads(&dev->info);
	infos->tx_offload_capa = usernic_tx_offloads(&dev->info);
	infos->tx_queue_offload_capa = RTE_ETH_TX_OFFLOAD_MBUF_FAST_FREE;
	/* Longer ones are made as long as queue_size says. */
	infos->rx_desc_lim = infos->tx_desc_lim = (struct rte_eth_desc_lim){
		.nb_max = 32768,
		.nb_min = 2,
		.nb_align = 1,
		.nb_seg_max = USERNIC_MAX_SEGMENTS,
		.nb_mtu_seg_max = USERNIC_MAX_SEGMENTS,
	};
	infos->default_rxconf.rx_free_thresh = REFILL;
	infos->dev_capa = 0;
	if (dev->info.vf) {
		infos->min_rx_bufsize = 1024;
		infos->rx_desc_lim = infos->tx_desc_lim = (struct rte_eth_desc_lim){
			.nb_max = USERNIC_VF_MAX_RING,
			.nb_min = USERNIC_VF_MIN_RING,
			.nb_align = 8,
			.nb_seg_max = USERNIC_VF_MAX_SEGMENTS,
			.nb_mtu_seg_max = USERNIC_VF_MAX_SEGMENTS,
		};
		infos->flow_type_rss_offloads = usernic_rss_types(&dev->info);
		if (dev->info.vf == USERNIC_VF_OWN_RSS) {
			infos->reta_size = USERNIC_VF_TABLE;
			infos->hash_key_size = USERNIC_VF_KEY;
		}
	}
	return 0;
}

/* As many as are asked for, as the rings can have, at most queue_size. */
static uint16_t usernic_descriptors(const struct usernic_dev *dev, uint16_t asked)
{
	uint32_t size = dev->info.packed ? asked : rte_align32pow2(asked);

	if (dev->info.vf)
		size = RTE_MAX(RTE_ALIGN_CEIL(asked, 8), USERNIC_VF_MIN_RING);
	return asked == 0 || size > dev->info.queue_size ? dev->info.queue_size : size;
}

static uint32_t usernic_room(struct rte_mempool *pool)
{
	return rte_pktmbuf_data_room_size(pool) - RTE_PKTMBUF_HEADROOM;
}

static int usernic_rx_setup(struct rte_eth_dev *eth, uint16_t index, uint16_t size, unsigned int socket __rte_unused,
			    const struct rte_eth_rxconf *conf, struct rte_mempool *pool)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct usernic_rxq *queue = &dev->rxq[index];

	if (conf->rx_deferred_start) {
		USERNIC_LOG(ERR, "%s: queues start with the port: no deferred start\n", dev->name);
		return -EINVAL;
	}
	if (rte_pktmbuf_data_room_size(pool) <= RTE_PKTMBUF_HEADROOM) {
		USERNIC_LOG(ERR, "%s: the pool's mbufs have no room behind their headroom\n", dev->name);
		return -EINVAL;
	}
	if (dev->info.vf && usernic_room(pool) < 1024) {
		USERNIC_LOG(ERR, "%s: a device receives into buffers of 1024 bytes and more: larger mbufs\n", dev->name);
		return -EINVAL;
	}
	queue->pool = pool;
	queue->conf = *conf;
	queue->size = usernic_descriptors(dev, size);
	eth->data->rx_queues[index] = queue;
	return 0;
}

static int usernic_tx_setup(struct rte_eth_dev *eth, uint16_t index, uint16_t size, unsigned int socket __rte_unused,
			    const struct rte_eth_txconf *conf)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct usernic_txq *queue = &dev->txq[index];

	if (conf->tx_deferred_start) {
		USERNIC_LOG(ERR, "%s: queues start with the port: no deferred start\n", dev->name);
		return -EINVAL;
	}
	queue->conf = *conf;
	queue->size = usernic_descriptors(dev, size);
	eth->data->tx_queues[index] = queue;
	return 0;
}

static void usernic_rx_release(struct rte_eth_dev *eth, uint16_t index)
{
	memset(&usernic_dev_of(eth)->rxq[index], 0, sizeof(struct usernic_rxq));
}

static void usernic_tx_release(struct rte_eth_dev *eth, uint16_t index)
{
	memset(&usernic_dev_of(eth)->txq[index], 0, sizeof(struct usernic_txq));
}

static void usernic_rx_info(struct rte_eth_dev *eth, uint16_t index, struct rte_eth_rxq_info *info)
{
	const struct usernic_rxq *queue = &usernic_dev_of(eth)->rxq[index];

	info->mp = queue->pool;
	info->conf = queue->conf;
	info->nb_desc = queue->size;
	info->scattered_rx = eth->data->scattered_rx;
}

static void usernic_tx_info(struct rte_eth_dev *eth, uint16_t index, struct rte_eth_txq_info *info)
{
	const struct usernic_txq *queue = &usernic_dev_of(eth)->txq[index];

	info->conf = queue->conf;
	info->nb_desc = queue->size;
}

/* How mbufs of a pool are filled. */
static void usernic_rx_fill(const struct usernic_dev *dev, const struct usernic_rxq *queue, struct usernic_rx_setup *setup)
{
	uint32_t shift = sizeof(struct rte_mbuf) + rte_pktmbuf_priv_size(queue->pool);
	bool pinned = rte_pktmbuf_priv_flags(queue->pool) & RTE_PKTMBUF_POOL_F_PINNED_EXT_BUF;
	struct rte_mbuf *mbuf = rte_mbuf_raw_alloc(queue->pool);

	/* Pools can be made in many ways; most have each buffer behind its mbuf. */
	if (mbuf != NULL) {
		if ((char *)mbuf + shift != mbuf->buf_addr)
			shift = 0;
		rte_mbuf_raw_free(mbuf);
	} else {
		shift = 0;
	}
	*setup = (struct usernic_rx_setup){
		.pool = queue->pool,
		.flags = pinned ? RTE_MBUF_F_EXTERNAL : 0,
		.shift = pinned ? 0 : shift,
		.room = usernic_room(queue->pool),
		.size = queue->size,
		.batch = queue->conf.rx_free_thresh != 0 ? queue->conf.rx_free_thresh : REFILL,
		.headroom = RTE_PKTMBUF_HEADROOM,
	};
	(void)dev;
}

/* What the application configured, in the words of virtio. */
static int usernic_wishes(struct rte_eth_dev *eth, struct usernic_config *config, struct usernic_rx_setup *rx,
			  struct usernic_tx_setup *tx)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint64_t in = eth->data->dev_conf.rxmode.offloads, out = eth->data->dev_conf.txmode.offloads;
	uint32_t frame = eth->data->mtu + USERNIC_OVERHEAD, room = UINT32_MAX;
	uint16_t i;

	*config = (struct usernic_config){
		.pairs = RTE_MAX(eth->data->nb_rx_queues, eth->data->nb_tx_queues),
		.mtu = eth->data->mtu,
		.port = dev->port_id,
		.rx_pairs = eth->data->nb_rx_queues,
	};
	memset(rx, 0, config->pairs * sizeof(*rx));
	memset(tx, 0, config->pairs * sizeof(*tx));
	for (i = 0; i < eth->data->nb_rx_queues; i++) {
		if (dev->rxq[i].pool == NULL)
			return -EINVAL;
		in |= dev->rxq[i].conf.offloads;
		usernic_rx_fill(dev, &dev->rxq[i], &rx[i]);
		room = RTE_MIN(room, rx[i].room);
	}
	if (dev->info.vf) {
		config->hash = usernic_rss_fields(eth->data->dev_conf.rx_adv_conf.rss_conf.rss_hf);
		/* The device knows whole KiB. */
		room = RTE_MIN(RTE_ALIGN_FLOOR(room, 1024), 16384U);
	} else if (in & (RTE_ETH_RX_OFFLOAD_UDP_CKSUM | RTE_ETH_RX_OFFLOAD_TCP_CKSUM | RTE_ETH_RX_OFFLOAD_TCP_LRO)) {
		config->features |= USERNIC_F_GUEST_CSUM;
		config->extras |= USERNIC_RX_HEADER;
	}
	if (in & RTE_ETH_RX_OFFLOAD_IPV4_CKSUM && !dev->info.vf)
		config->extras |= USERNIC_RX_IPV4;
	if (in & RTE_ETH_RX_OFFLOAD_TCP_LRO)
		config->features |= USERNIC_F_GUEST_TSO | USERNIC_F_MRG_RXBUF;
	dev->vlan_strip = (in & RTE_ETH_RX_OFFLOAD_VLAN_STRIP) != 0;
	if (dev->vlan_strip)
		config->extras |= USERNIC_RX_VLAN_STRIP;
	if (frame > room && !(in & RTE_ETH_RX_OFFLOAD_SCATTER)) {
		USERNIC_LOG(ERR, "%s: frames of %u bytes do not fit mbufs of %u: larger mbufs, a smaller MTU, or "
				 "RTE_ETH_RX_OFFLOAD_SCATTER\n", dev->name, frame, room);
		return -EINVAL;
	}
	if (dev->info.mrg_rxbuf != 0)
		config->mergeable = dev->info.mrg_rxbuf > 0 || (in & RTE_ETH_RX_OFFLOAD_TCP_LRO) != 0 || frame > room;
	if (frame > room)
		config->features |= USERNIC_F_MRG_RXBUF;
	config->mergeable |= (config->features & USERNIC_F_MRG_RXBUF) != 0;
	eth->data->scattered_rx = config->mergeable && (in & RTE_ETH_RX_OFFLOAD_SCATTER || frame > room);

	if (out & (RTE_ETH_TX_OFFLOAD_UDP_CKSUM | RTE_ETH_TX_OFFLOAD_TCP_CKSUM | RTE_ETH_TX_OFFLOAD_TCP_TSO |
		   RTE_ETH_TX_OFFLOAD_SCTP_CKSUM))
		config->features |= USERNIC_F_CSUM;
	if (out & RTE_ETH_TX_OFFLOAD_TCP_TSO)
		config->features |= USERNIC_F_HOST_TSO;
	for (i = 0; i < eth->data->nb_tx_queues; i++) {
		const struct usernic_txq *queue = &dev->txq[i];
		uint64_t all = out | queue->conf.offloads;

		if (queue->size == 0)
			return -EINVAL;
		tx[i] = (struct usernic_tx_setup){
			.size = queue->size,
			/* Half of the ring: what was taken long ago is no line that the other side writes now. */
			.keep = queue->conf.tx_free_thresh != 0 ? queue->conf.tx_free_thresh : queue->size / 2,
			.fast_free = (all & RTE_ETH_TX_OFFLOAD_MBUF_FAST_FREE) != 0,
		};
		if (all & RTE_ETH_TX_OFFLOAD_VLAN_INSERT)
			tx[i].odd |= RTE_MBUF_F_TX_VLAN;
		if (all & RTE_ETH_TX_OFFLOAD_IPV4_CKSUM)
			tx[i].odd |= RTE_MBUF_F_TX_IP_CKSUM;
		if (config->features & USERNIC_F_CSUM)
			tx[i].odd |= RTE_MBUF_F_TX_L4_MASK | RTE_MBUF_F_TX_TCP_SEG;
	}
	return 0;
}

/* A descriptor for each receive queue, for applications that sleep. */
static int usernic_interrupts(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint16_t i, count = eth->data->nb_rx_queues;

	if (!eth->data->dev_conf.intr_conf.rxq)
		return 0;
	if (dev->intr == NULL)
		dev->intr = rte_intr_instance_alloc(RTE_INTR_INSTANCE_F_PRIVATE);
	if (dev->intr == NULL)
		return -ENOMEM;
	rte_intr_vec_list_free(dev->intr);
	if (rte_intr_type_set(dev->intr, RTE_INTR_HANDLE_VDEV) < 0 ||
	    rte_intr_vec_list_alloc(dev->intr, NULL, count) < 0 || rte_intr_nb_efd_set(dev->intr, count) < 0 ||
	    rte_intr_max_intr_set(dev->intr, count + 1) < 0 ||
	    /* No byte is to be read of it: see src/wake.rs. */
	    rte_intr_efd_counter_size_set(dev->intr, 0) < 0)
		return -rte_errno;
	for (i = 0; i < count; i++)
		if (rte_intr_vec_list_index_set(dev->intr, i, RTE_INTR_VEC_RXTX_OFFSET + i) < 0 ||
		    rte_intr_efds_index_set(dev->intr, i, usernic_pmd_rx_fd(dev->queues[i])) < 0)
			return -rte_errno;
	eth->intr_handle = dev->intr;
	return 0;
}

static void usernic_show_link(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct rte_eth_link link = {
		.link_speed = dev->info.speed != 0 ? dev->info.speed : RTE_ETH_SPEED_NUM_UNKNOWN,
		.link_duplex = RTE_ETH_LINK_FULL_DUPLEX,
		.link_status = dev->started && dev->link ? RTE_ETH_LINK_UP : RTE_ETH_LINK_DOWN,
		.link_autoneg = RTE_ETH_LINK_FIXED,
	};

	rte_eth_linkstatus_set(eth, &link);
}

static int usernic_link_update(struct rte_eth_dev *eth, int wait __rte_unused)
{
	usernic_show_link(eth);
	return 0;
}

static int usernic_stop(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint16_t i;

	eth->data->dev_started = 0;
	/* Of a descriptor that is closed an application's epoll would keep an entry that cannot be replaced. */
	if (dev->intr != NULL)
		rte_intr_free_epoll_fd(dev->intr);
	pthread_mutex_lock(&dev->lock);
	if (dev->started) {
		usernic_stats_keep(dev);
		dev->started = false;
		for (i = 0; i < USERNIC_MAX_PAIRS; i++)
			dev->rxq[i].handle.running = dev->txq[i].handle.running = NULL;
		usernic_pmd_stop(dev->port);
	}
	pthread_mutex_unlock(&dev->lock);
	for (i = 0; i < eth->data->nb_rx_queues; i++)
		eth->data->rx_queue_state[i] = RTE_ETH_QUEUE_STATE_STOPPED;
	for (i = 0; i < eth->data->nb_tx_queues; i++)
		eth->data->tx_queue_state[i] = RTE_ETH_QUEUE_STATE_STOPPED;
	rte_free(dev->rings);
	dev->rings = NULL;
	usernic_show_link(eth);
	return 0;
}

static int usernic_start(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct usernic_rx_setup rx[USERNIC_MAX_PAIRS];
	struct usernic_tx_setup tx[USERNIC_MAX_PAIRS];
	struct usernic_config config;
	uint64_t length;
	int result = usernic_wishes(eth, &config, rx, tx);
	uint16_t i;

	if (result < 0)
		return result;
	length = usernic_pmd_memory(dev->port, &config, rx, tx);
	dev->rings = length == 0 ? NULL : rte_zmalloc_socket("net_usernic", length, 4096, eth->data->numa_node);
	if (dev->rings == NULL) {
		USERNIC_LOG(ERR, "%s: no %" PRIu64 " bytes for rings: %s\n", dev->name, length,
			    length == 0 ? usernic_pmd_error() : "DPDK's memory is used up");
		return -ENOMEM;
	}
	/* In this order, as whoever changes the memory does; nothing is allocated meanwhile. */
	rte_mcfg_mem_read_lock();
	pthread_mutex_lock(&dev->lock);
	result = usernic_pmd_start(dev->port, &config, rx, tx, dev->rings, dev->queues);
	if (result < 0)
		USERNIC_LOG(ERR, "%s: not started: %s\n", dev->name, usernic_pmd_error());
	dev->started = result >= 0;
	dev->pairs = config.pairs;
	usernic_pmd_info(dev->port, &dev->info);
	dev->link = dev->info.connected;
	pthread_mutex_unlock(&dev->lock);
	rte_mcfg_mem_read_unlock();
	if (result < 0)
		goto failed;
	for (i = 0; i < eth->data->nb_rx_queues; i++) {
		dev->rxq[i].handle.running = dev->queues[i];
		eth->data->rx_queue_state[i] = RTE_ETH_QUEUE_STATE_STARTED;
	}
	for (i = 0; i < eth->data->nb_tx_queues; i++) {
		dev->txq[i].handle.running = dev->queues[dev->pairs + i];
		eth->data->tx_queue_state[i] = RTE_ETH_QUEUE_STATE_STARTED;
	}
	usernic_use_filter(eth, eth->data->promiscuous, eth->data->all_multicast);
	result = usernic_interrupts(eth);
	if (result < 0) {
		USERNIC_LOG(ERR, "%s: no interrupts: %s\n", dev->name, strerror(-result));
		goto failed;
	}
	usernic_show_link(eth);
	return 0;
failed:
	usernic_stop(eth);
	return result;
}

static int usernic_close(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);

	if (rte_eal_process_type() != RTE_PROC_PRIMARY || dev->port == NULL)
		return 0;
	usernic_stop(eth);
	usernic_unwatch(dev);
	usernic_unfollow_memory(dev);
	usernic_pmd_close(dev->port);
	dev->port = NULL;
	if (dev->intr != NULL) {
		rte_intr_vec_list_free(dev->intr);
		rte_intr_instance_free(dev->intr);
		eth->intr_handle = dev->intr = NULL;
	}
	pthread_mutex_destroy(&dev->lock);
	return 0;
}

static int usernic_mtu(struct rte_eth_dev *eth, uint16_t mtu)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint16_t i;

	int result;

	/* Larger frames may need mergeable buffers, which only a start can agree on. */
	for (i = 0; dev->started && i < eth->data->nb_rx_queues; i++)
		if (!eth->data->scattered_rx && (uint32_t)mtu + USERNIC_OVERHEAD > usernic_room(dev->rxq[i].pool)) {
			USERNIC_LOG(ERR, "%s: an MTU of %u needs several mbufs a frame: stop the port first\n", dev->name,
				    mtu);
			return -EBUSY;
		}
	if (!dev->started)
		return 0;
	pthread_mutex_lock(&dev->lock);
	result = usernic_pmd_mtu(dev->port, mtu);
	pthread_mutex_unlock(&dev->lock);
	if (result < 0)
		USERNIC_LOG(ERR, "%s: %s\n", dev->name, usernic_pmd_error());
	return result;
}

static int usernic_rx_arm(struct rte_eth_dev *eth, uint16_t index)
{
	if (!usernic_dev_of(eth)->started)
		return -EIO;
	usernic_pmd_rx_arm(eth->data->rx_queues[index], 1);
	return 0;
}

static int usernic_rx_disarm(struct rte_eth_dev *eth, uint16_t index)
{
	if (!usernic_dev_of(eth)->started)
		return -EIO;
	usernic_pmd_rx_arm(eth->data->rx_queues[index], 0);
	return 0;
}

static int usernic_tx_clean(void *queue, uint32_t most)
{
	return usernic_pmd_tx_clean(queue, most);
}

static int usernic_burst_mode(struct rte_eth_dev *eth, uint16_t index __rte_unused, struct rte_eth_burst_mode *mode)
{
	const struct usernic_info *info = &usernic_dev_of(eth)->info;

	if (info->vf) {
		snprintf(mode->info, sizeof(mode->info), "descriptors");
		return 0;
	}
	snprintf(mode->info, sizeof(mode->info), "%s%s", info->packed ? "packed" : "split",
		 info->in_order ? ", in order" : "");
	return 0;
}

/* Headers that a device recognises; a back-end tells none. The list ends with RTE_PTYPE_UNKNOWN, or since DPDK 24.03 by its
 * length. */
#if RTE_VERSION >= RTE_VERSION_NUM(24, 3, 0, 0)
static const uint32_t *usernic_ptypes(struct rte_eth_dev *eth, size_t *count)
#else
static const uint32_t *usernic_ptypes(struct rte_eth_dev *eth)
#endif
{
	static const uint32_t ptypes[] = {
		RTE_PTYPE_L2_ETHER, RTE_PTYPE_L3_IPV4, RTE_PTYPE_L3_IPV4_EXT, RTE_PTYPE_L3_IPV6, RTE_PTYPE_L3_IPV6_EXT,
		RTE_PTYPE_L4_TCP, RTE_PTYPE_L4_UDP, RTE_PTYPE_L4_SCTP, RTE_PTYPE_UNKNOWN,
	};

#if RTE_VERSION >= RTE_VERSION_NUM(24, 3, 0, 0)
	*count = RTE_DIM(ptypes) - 1;
#endif
	return usernic_dev_of(eth)->info.vf ? ptypes : NULL;
}

const struct eth_dev_ops usernic_ops = {
	.dev_configure = usernic_configure,
	.dev_start = usernic_start,
	.dev_stop = usernic_stop,
	.dev_close = usernic_close,
	.dev_infos_get = usernic_infos,
	.link_update = usernic_link_update,
	.rx_queue_setup = usernic_rx_setup,
	.tx_queue_setup = usernic_tx_setup,
	.rx_queue_release = usernic_rx_release,
	.tx_queue_release = usernic_tx_release,
	.rxq_info_get = usernic_rx_info,
	.txq_info_get = usernic_tx_info,
	.rx_burst_mode_get = usernic_burst_mode,
	.tx_burst_mode_get = usernic_burst_mode,
	.rx_queue_intr_enable = usernic_rx_arm,
	.rx_queue_intr_disable = usernic_rx_disarm,
	.tx_done_cleanup = usernic_tx_clean,
	.mtu_set = usernic_mtu,
	.dev_supported_ptypes_get = usernic_ptypes,
	.rss_hash_update = usernic_rss_update,
	.rss_hash_conf_get = usernic_rss_get,
	.reta_update = usernic_reta_update,
	.reta_query = usernic_reta_get,
	.stats_get = usernic_stats_get,
	.stats_reset = usernic_stats_reset,
	.xstats_get = usernic_xstats_get,
	.xstats_get_names = usernic_xstats_names,
	.xstats_reset = usernic_stats_reset,
	.promiscuous_enable = usernic_promiscuous_on,
	.promiscuous_disable = usernic_promiscuous_off,
	.allmulticast_enable = usernic_all_multicast_on,
	.allmulticast_disable = usernic_all_multicast_off,
	.mac_addr_set = usernic_mac_set,
	.mac_addr_add = usernic_mac_add,
	.mac_addr_remove = usernic_mac_remove,
	.set_mc_addr_list = usernic_groups_set,
	.vlan_filter_set = usernic_vlan_filter,
	.vlan_offload_set = usernic_vlan_offload,
};
