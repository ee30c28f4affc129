/* SPDX-License-Identifier: BSD-3-Clause
 *
 * How a device spreads frames over queues. An 82599's and an X540's key and table are the PF's, and back-ends of vhost-user
 * spread by themselves: both are refused, by the Rust half.
 */
#include <errno.h>
#include <string.h>

#include "net_usernic_dev.h"

/* Types of flows, and what the device calls them (VFMRQC). */
static const struct {
	uint64_t type;
	uint32_t field;
} usernic_types[] = {
	{RTE_ETH_RSS_NONFRAG_IPV4_TCP, 1U << 16},
	{RTE_ETH_RSS_IPV4, 1U << 17},
	{RTE_ETH_RSS_IPV6_TCP_EX, 1U << 18},
	{RTE_ETH_RSS_IPV6_EX, 1U << 19},
	{RTE_ETH_RSS_IPV6, 1U << 20},
	{RTE_ETH_RSS_NONFRAG_IPV6_TCP, 1U << 21},
	{RTE_ETH_RSS_NONFRAG_IPV4_UDP, 1U << 22},
	{RTE_ETH_RSS_NONFRAG_IPV6_UDP, 1U << 23},
	{RTE_ETH_RSS_IPV6_UDP_EX, 1U << 24},
};

uint64_t usernic_rss_types(const struct usernic_info *info)
{
	uint64_t types = 0;
	unsigned int i;

	if (info->vf == 0)
		return 0;
	for (i = 0; i < RTE_DIM(usernic_types); i++)
		types |= usernic_types[i].type;
	return types;
}

uint32_t usernic_rss_fields(uint64_t types)
{
	uint32_t fields = 0;
	unsigned int i;

	for (i = 0; i < RTE_DIM(usernic_types); i++)
		if (types & usernic_types[i].type)
			fields |= usernic_types[i].field;
	return fields;
}

/* Reads, has it changed, and writes. */
static int usernic_change(struct rte_eth_dev *eth, void (*change)(struct usernic_rss *rss, void *arg), void *arg)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct usernic_rss rss;
	int result;

	pthread_mutex_lock(&dev->lock);
	result = usernic_pmd_rss(dev->port, &rss);
	if (result >= 0) {
		change(&rss, arg);
		result = usernic_pmd_set_rss(dev->port, &rss);
	}
	pthread_mutex_unlock(&dev->lock);
	if (result < 0)
		USERNIC_LOG(ERR, "%s: %s\n", dev->name, usernic_pmd_error());
	return result;
}

static int usernic_read(struct rte_eth_dev *eth, struct usernic_rss *rss)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	int result;

	pthread_mutex_lock(&dev->lock);
	result = usernic_pmd_rss(dev->port, rss);
	pthread_mutex_unlock(&dev->lock);
	return result;
}

static void usernic_take_hash(struct usernic_rss *rss, void *arg)
{
	const struct rte_eth_rss_conf *conf = arg;

	if (conf->rss_key != NULL)
		memcpy(rss->key, conf->rss_key, sizeof(rss->key));
	rss->fields = usernic_rss_fields(conf->rss_hf);
}

int usernic_rss_update(struct rte_eth_dev *eth, struct rte_eth_rss_conf *conf)
{
	if (conf->rss_key != NULL && conf->rss_key_len != USERNIC_VF_KEY)
		return -EINVAL;
	return usernic_change(eth, usernic_take_hash, conf);
}

int usernic_rss_get(struct rte_eth_dev *eth, struct rte_eth_rss_conf *conf)
{
	struct usernic_rss rss;
	int result = usernic_read(eth, &rss);
	unsigned int i;

	if (result < 0)
		return result;
	if (conf->rss_key != NULL && conf->rss_key_len >= USERNIC_VF_KEY)
		memcpy(conf->rss_key, rss.key, sizeof(rss.key));
	conf->rss_key_len = USERNIC_VF_KEY;
	conf->rss_hf = 0;
	for (i = 0; i < RTE_DIM(usernic_types); i++)
		if (rss.fields & usernic_types[i].field)
			conf->rss_hf |= usernic_types[i].type;
	return 0;
}

static void usernic_take_table(struct usernic_rss *rss, void *arg)
{
	const struct rte_eth_rss_reta_entry64 *entries = arg;
	unsigned int i;

	for (i = 0; i < USERNIC_VF_TABLE; i++)
		if (entries->mask >> i & 1)
			rss->table[i] = entries->reta[i];
}

int usernic_reta_update(struct rte_eth_dev *eth, struct rte_eth_rss_reta_entry64 *entries, uint16_t count)
{
	if (count != USERNIC_VF_TABLE)
		return -EINVAL;
	return usernic_change(eth, usernic_take_table, entries);
}

int usernic_reta_get(struct rte_eth_dev *eth, struct rte_eth_rss_reta_entry64 *entries, uint16_t count)
{
	struct usernic_rss rss;
	int result = usernic_read(eth, &rss);
	unsigned int i;

	if (result < 0 || count != USERNIC_VF_TABLE)
		return result < 0 ? result : -EINVAL;
	for (i = 0; i < USERNIC_VF_TABLE; i++)
		if (entries->mask >> i & 1)
			entries->reta[i] = rss.table[i];
	return 0;
}
