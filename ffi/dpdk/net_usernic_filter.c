/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Which frames a port receives. Back-ends of vhost-user do not filter, so the Rust half does: what an application asks for
 * here is what it gets. A promiscuous port without a VLAN filter pays nothing for it. A virtual function's PF may refuse.
 */
#include <errno.h>
#include <string.h>

#include "net_usernic_dev.h"

int usernic_use_filter(struct rte_eth_dev *eth, bool promiscuous, bool all_multicast)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	const struct rte_ether_addr *addresses = eth->data->mac_addrs;
	struct usernic_filter filter = {
		.promiscuous = promiscuous,
		.all_multicast = all_multicast,
		.vlan = (eth->data->dev_conf.rxmode.offloads & RTE_ETH_RX_OFFLOAD_VLAN_FILTER) != 0,
	};
	unsigned int i, n = 0;
	int result;

	memcpy(filter.mac, &addresses[0], sizeof(filter.mac));
	for (i = 1; i <= USERNIC_MAX_ADDRESSES; i++)
		if (!rte_is_zero_ether_addr(&addresses[i]))
			memcpy(filter.addresses[n++], &addresses[i], RTE_ETHER_ADDR_LEN);
	filter.stations = n;
	filter.groups = dev->group_count;
	memcpy(filter.addresses[n], dev->groups, dev->group_count * sizeof(dev->groups[0]));
	memcpy(filter.vlans, eth->data->vlan_filter_conf.ids, sizeof(filter.vlans));
	pthread_mutex_lock(&dev->lock);
	result = usernic_pmd_filter(dev->port, &filter);
	pthread_mutex_unlock(&dev->lock);
	if (result < 0)
		USERNIC_LOG(NOTICE, "%s: %s\n", dev->name, usernic_pmd_error());
	return result;
}

_Static_assert(sizeof(((struct rte_vlan_filter_conf *)0)->ids) == sizeof(((struct usernic_filter *)0)->vlans), "VLANs");

static int usernic_use_this(struct rte_eth_dev *eth)
{
	return usernic_use_filter(eth, eth->data->promiscuous, eth->data->all_multicast);
}

/* DPDK sets its own flags after these. */
int usernic_promiscuous_on(struct rte_eth_dev *eth)
{
	return usernic_use_filter(eth, true, eth->data->all_multicast);
}

int usernic_promiscuous_off(struct rte_eth_dev *eth)
{
	return usernic_use_filter(eth, false, eth->data->all_multicast);
}

int usernic_all_multicast_on(struct rte_eth_dev *eth)
{
	return usernic_use_filter(eth, eth->data->promiscuous, true);
}

int usernic_all_multicast_off(struct rte_eth_dev *eth)
{
	return usernic_use_filter(eth, eth->data->promiscuous, false);
}

int usernic_mac_set(struct rte_eth_dev *eth, struct rte_ether_addr *address)
{
	struct rte_ether_addr before = eth->data->mac_addrs[0];
	int result;

	rte_ether_addr_copy(address, &eth->data->mac_addrs[0]);
	result = usernic_use_this(eth);
	if (result < 0)
		eth->data->mac_addrs[0] = before;
	return result;
}

int usernic_mac_add(struct rte_eth_dev *eth, struct rte_ether_addr *address, uint32_t index, uint32_t pool __rte_unused)
{
	struct rte_ether_addr before;
	int result;

	if (index > USERNIC_MAX_ADDRESSES)
		return -EINVAL;
	before = eth->data->mac_addrs[index];
	rte_ether_addr_copy(address, &eth->data->mac_addrs[index]);
	result = usernic_use_this(eth);
	if (result < 0)
		eth->data->mac_addrs[index] = before;
	return result;
}

void usernic_mac_remove(struct rte_eth_dev *eth, uint32_t index)
{
	struct rte_ether_addr address;

	if (index > USERNIC_MAX_ADDRESSES)
		return;
	/* DPDK clears it after this. */
	rte_ether_addr_copy(&eth->data->mac_addrs[index], &address);
	memset(&eth->data->mac_addrs[index], 0, sizeof(address));
	usernic_use_this(eth);
}

int usernic_groups_set(struct rte_eth_dev *eth, struct rte_ether_addr *groups, uint32_t count)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	struct rte_ether_addr before[USERNIC_MAX_ADDRESSES];
	uint16_t count_before = dev->group_count;
	int result;

	if (count > USERNIC_MAX_ADDRESSES)
		return -ENOSPC;
	memcpy(before, dev->groups, sizeof(before));
	memcpy(dev->groups, groups, count * sizeof(*groups));
	dev->group_count = count;
	result = usernic_use_this(eth);
	if (result < 0) {
		memcpy(dev->groups, before, sizeof(before));
		dev->group_count = count_before;
	}
	return result;
}

int usernic_vlan_filter(struct rte_eth_dev *eth, uint16_t id, int on)
{
	struct rte_vlan_filter_conf *listed = &eth->data->vlan_filter_conf;
	uint64_t bit = 1ULL << (id % 64), before = listed->ids[id / 64];

	int result;

	/* DPDK lists it after this, if this did it. */
	listed->ids[id / 64] = on ? before | bit : before & ~bit;
	result = usernic_use_this(eth);
	if (result < 0)
		listed->ids[id / 64] = before;
	return result;
}

int usernic_vlan_offload(struct rte_eth_dev *eth, int mask)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	uint64_t offloads = eth->data->dev_conf.rxmode.offloads;

	/* First what can be refused: DPDK takes all of it back then. */
	if (mask & RTE_ETH_VLAN_FILTER_MASK) {
		int result = usernic_use_this(eth);

		if (result < 0)
			return result;
	}
	if (mask & RTE_ETH_VLAN_STRIP_MASK) {
		dev->vlan_strip = (offloads & RTE_ETH_RX_OFFLOAD_VLAN_STRIP) != 0;
		pthread_mutex_lock(&dev->lock);
		usernic_pmd_vlan_strip(dev->port, dev->vlan_strip);
		pthread_mutex_unlock(&dev->lock);
	}
	return 0;
}
