/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Statistics. The Rust half counts for a queue as long as that runs; what it counted before is kept here.
 */
#include <string.h>

#include "net_usernic_dev.h"

#define FIELDS (sizeof(struct usernic_counts) / sizeof(uint64_t))

struct usernic_name {
	const char *name;
	size_t offset;
};

static const struct usernic_name rx_names[] = {
	{"malformed", offsetof(struct usernic_counts, errors)},
	{"runts", offsetof(struct usernic_counts, runts)},
	{"oversize", offsetof(struct usernic_counts, oversize)},
	{"filtered", offsetof(struct usernic_counts, filtered)},
	{"no_mbufs", offsetof(struct usernic_counts, empty)},
	{"joined", offsetof(struct usernic_counts, chains)},
	{"back_end_faults", offsetof(struct usernic_counts, anomalies)},
};

static const struct usernic_name tx_names[] = {
	{"not_sendable", offsetof(struct usernic_counts, errors)},
	{"chained", offsetof(struct usernic_counts, chains)},
	{"back_end_faults", offsetof(struct usernic_counts, anomalies)},
};

static void usernic_add(struct usernic_counts *to, const struct usernic_counts *counts, bool minus)
{
	uint64_t *sum = (uint64_t *)to;
	const uint64_t *each = (const uint64_t *)counts;
	size_t i;

	for (i = 0; i < FIELDS; i++)
		sum[i] = minus ? sum[i] - each[i] : sum[i] + each[i];
}

/* All that a queue has counted, with the lock taken. */
static struct usernic_counts usernic_all(struct usernic_dev *dev, bool rx, uint16_t queue)
{
	struct usernic_counts counts = rx ? dev->rx[queue].past : dev->tx[queue].past, now;

	if (dev->started && queue < dev->pairs) {
		if (rx)
			usernic_pmd_rx_counts(dev->queues[queue], &now);
		else
			usernic_pmd_tx_counts(dev->queues[dev->pairs + queue], &now);
		usernic_add(&counts, &now, false);
	}
	return counts;
}

/* Since the last reset. */
static struct usernic_counts usernic_since(struct usernic_dev *dev, bool rx, uint16_t queue)
{
	struct usernic_counts counts = usernic_all(dev, rx, queue);

	usernic_add(&counts, rx ? &dev->rx[queue].base : &dev->tx[queue].base, true);
	return counts;
}

/* Before the queues go, with the lock taken. */
void usernic_stats_keep(struct usernic_dev *dev)
{
	uint16_t i;

	for (i = 0; i < dev->pairs; i++) {
		dev->rx[i].past = usernic_all(dev, true, i);
		dev->tx[i].past = usernic_all(dev, false, i);
	}
}

/* Before DPDK 25.11 the counters of queues were fields of rte_eth_stats. */
#if RTE_VERSION < RTE_VERSION_NUM(25, 11, 0, 0)
#define eth_queue_stats rte_eth_stats
#endif

static int usernic_stats(struct rte_eth_dev *eth, struct rte_eth_stats *stats, struct eth_queue_stats *queues)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct usernic_counts counts;
	uint64_t errors;
	uint16_t i;

	pthread_mutex_lock(&dev->lock);
	for (i = 0; i < eth->data->nb_rx_queues; i++) {
		counts = usernic_since(dev, true, i);
		stats->ipackets += counts.packets;
		stats->ibytes += counts.bytes;
		errors = counts.errors + counts.runts + counts.oversize;
		stats->ierrors += errors;
		stats->rx_nombuf += counts.empty;
		if (queues != NULL && i < RTE_ETHDEV_QUEUE_STAT_CNTRS) {
			queues->q_ipackets[i] = counts.packets;
			queues->q_ibytes[i] = counts.bytes;
			queues->q_errors[i] = errors;
		}
	}
	for (i = 0; i < eth->data->nb_tx_queues; i++) {
		counts = usernic_since(dev, false, i);
		stats->opackets += counts.packets;
		stats->obytes += counts.bytes;
		stats->oerrors += counts.errors;
		if (queues != NULL && i < RTE_ETHDEV_QUEUE_STAT_CNTRS) {
			queues->q_opackets[i] = counts.packets;
			queues->q_obytes[i] = counts.bytes;
		}
	}
	pthread_mutex_unlock(&dev->lock);
	return 0;
}

#if RTE_VERSION >= RTE_VERSION_NUM(25, 11, 0, 0)
int usernic_stats_get(struct rte_eth_dev *eth, struct rte_eth_stats *stats, struct eth_queue_stats *queues)
{
	return usernic_stats(eth, stats, queues);
}
#else
int usernic_stats_get(struct rte_eth_dev *eth, struct rte_eth_stats *stats)
{
	return usernic_stats(eth, stats, stats);
}
#endif

int usernic_stats_reset(struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint16_t i;

	pthread_mutex_lock(&dev->lock);
	for (i = 0; i < USERNIC_MAX_PAIRS; i++) {
		dev->rx[i].base = usernic_all(dev, true, i);
		dev->tx[i].base = usernic_all(dev, false, i);
	}
	pthread_mutex_unlock(&dev->lock);
	return 0;
}

static unsigned int usernic_xstats_count(const struct rte_eth_dev *eth)
{
	return eth->data->nb_rx_queues * RTE_DIM(rx_names) + eth->data->nb_tx_queues * RTE_DIM(tx_names);
}

int usernic_xstats_get(struct rte_eth_dev *eth, struct rte_eth_xstat *values, unsigned int most)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	unsigned int n = 0, i, j;

	if (most < usernic_xstats_count(eth) || values == NULL)
		return usernic_xstats_count(eth);
	pthread_mutex_lock(&dev->lock);
	for (i = 0; i < eth->data->nb_rx_queues; i++) {
		struct usernic_counts counts = usernic_since(dev, true, i);

		for (j = 0; j < RTE_DIM(rx_names); j++, n++) {
			values[n].id = n;
			memcpy(&values[n].value, (char *)&counts + rx_names[j].offset, sizeof(uint64_t));
		}
	}
	for (i = 0; i < eth->data->nb_tx_queues; i++) {
		struct usernic_counts counts = usernic_since(dev, false, i);

		for (j = 0; j < RTE_DIM(tx_names); j++, n++) {
			values[n].id = n;
			memcpy(&values[n].value, (char *)&counts + tx_names[j].offset, sizeof(uint64_t));
		}
	}
	pthread_mutex_unlock(&dev->lock);
	return n;
}

int usernic_xstats_names(struct rte_eth_dev *eth, struct rte_eth_xstat_name *names, unsigned int most)
{
	unsigned int n = 0, i, j;

	if (names == NULL || most < usernic_xstats_count(eth))
		return usernic_xstats_count(eth);
	for (i = 0; i < eth->data->nb_rx_queues; i++)
		for (j = 0; j < RTE_DIM(rx_names); j++)
			snprintf(names[n++].name, sizeof(names->name), "rx_q%u_%s", i, rx_names[j].name);
	for (i = 0; i < eth->data->nb_tx_queues; i++)
		for (j = 0; j < RTE_DIM(tx_names); j++)
			snprintf(names[n++].name, sizeof(names->name), "tx_q%u_%s", i, tx_names[j].name);
	return n;
}
