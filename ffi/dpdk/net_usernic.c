/* SPDX-License-Identifier: BSD-3-Clause
 *
 * librte_net_usernic.so: a poll-mode driver for DPDK over usernic's ports. This file finds devices, reads their arguments
 * and looks after their connections.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_alarm.h>
#include <rte_eal_memconfig.h>
#include <rte_kvargs.h>
#include <rte_string_fns.h>

#include "net_usernic_dev.h"

/* Between two looks at a connection, in microseconds. */
#define LOOK 50000

RTE_LOG_REGISTER(usernic_logtype, pmd.net.usernic, NOTICE);

/* As virtio_user has them, and some of usernic's own. */
static const char *const usernic_keys[] = {"path",	"queues", "queue_size", "packed_vq", "mrg_rxbuf",   "in_order",
					   "server",	"mac",	  "speed",	"timeout",   "socket_mode", "socket_owner",
					   "vf",	"interface", NULL};

/* In a thread of DPDK's, every now and then. */
static void usernic_look(void *arg)
{
	struct usernic_dev *dev = arg;
	struct rte_eth_dev *eth = &rte_eth_devices[dev->port_id];
	bool changed = false, link;

	rte_mcfg_mem_read_lock();
	pthread_mutex_lock(&dev->lock);
	if (dev->started) {
		link = usernic_pmd_service(dev->port) > 0;
		changed = link != dev->link;
		dev->link = link;
		usernic_pmd_info(dev->port, &dev->info);
	}
	pthread_mutex_unlock(&dev->lock);
	rte_mcfg_mem_read_unlock();
	if (changed) {
		usernic_ops.link_update(eth, 0);
		USERNIC_LOG(NOTICE, "%s: link %s\n", dev->name, link ? "up" : "down");
		if (eth->data->dev_conf.intr_conf.lsc)
			rte_eth_dev_callback_process(eth, RTE_ETH_EVENT_INTR_LSC, NULL);
	}
	rte_eal_alarm_set(LOOK, usernic_look, dev);
}

void usernic_watch(struct usernic_dev *dev)
{
	rte_eal_alarm_set(LOOK, usernic_look, dev);
}

void usernic_unwatch(struct usernic_dev *dev)
{
	rte_eal_alarm_cancel(usernic_look, dev);
}

static int usernic_pair(const char *key, const char *value, void *arg)
{
	char *spec = arg;
	size_t length = strlen(spec);

	if (value == NULL || *value == '\0') {
		USERNIC_LOG(ERR, "%s= has no value\n", key);
		return -EINVAL;
	}
	if (strcmp(key, "vf") == 0)
		return 0;
	if (snprintf(spec + length, PATH_MAX - length, ",%s=%s", key, value) >= (int)(PATH_MAX - length))
		return -ENAMETOOLONG;
	return 0;
}

static int usernic_vf(const char *key __rte_unused, const char *value, void *arg)
{
	snprintf(arg, PATH_MAX, "vf,pci=%s", value == NULL ? "" : value);
	return 0;
}

/* The port spec that a device's arguments stand for. */
static int usernic_spec(const char *name, const char *arguments, char *spec)
{
	struct rte_kvargs *pairs = rte_kvargs_parse(arguments, usernic_keys);
	int result = 0;

	if (pairs == NULL) {
		USERNIC_LOG(ERR, "%s: arguments \"%s\": there are path, queues, queue_size, packed_vq, mrg_rxbuf, in_order, "
				 "server, mac, speed, timeout, socket_mode, socket_owner; or vf, queues, queue_size, mac, "
				 "interface\n",
			    name, arguments);
		return -EINVAL;
	}
	if (rte_kvargs_count(pairs, "path") + rte_kvargs_count(pairs, "vf") != 1) {
		USERNIC_LOG(ERR, "%s: path=SOCKET or vf=ADDRESS, one of them\n", name);
		result = -EINVAL;
	}
	if (result == 0) {
		snprintf(spec, PATH_MAX, "virtio-user");
		if (rte_kvargs_count(pairs, "vf") == 1)
			result = rte_kvargs_process(pairs, "vf", usernic_vf, spec);
	}
	if (result == 0)
		result = rte_kvargs_process(pairs, NULL, usernic_pair, spec);
	rte_kvargs_free(pairs);
	return result;
}

static int usernic_make(struct rte_vdev_device *vdev, struct rte_eth_dev *eth)
{
	struct usernic_dev *dev = usernic_dev_of(eth);
	pthread_mutexattr_t attributes;
	char spec[PATH_MAX];
	int result;

	rte_strscpy(dev->name, rte_vdev_device_name(vdev), sizeof(dev->name));
	dev->port_id = eth->data->port_id;
	result = usernic_spec(dev->name, rte_vdev_device_args(vdev), spec);
	if (result < 0)
		return result;
	result = usernic_pmd_open(spec, &usernic_calls, &dev->port);
	if (result < 0) {
		USERNIC_LOG(ERR, "%s: %s\n", dev->name, usernic_pmd_error());
		return result;
	}
	usernic_pmd_info(dev->port, &dev->info);
	pthread_mutexattr_init(&attributes);
	pthread_mutex_init(&dev->lock, &attributes);
	pthread_mutexattr_destroy(&attributes);
	eth->data->mac_addrs =
		rte_zmalloc(dev->name, (1 + USERNIC_MAX_ADDRESSES) * sizeof(struct rte_ether_addr), 0);
	result = eth->data->mac_addrs == NULL ? -ENOMEM : usernic_follow_memory(dev);
	if (result < 0) {
		usernic_pmd_close(dev->port);
		dev->port = NULL;
		return result;
	}
	memcpy(&eth->data->mac_addrs[0], dev->info.mac, RTE_ETHER_ADDR_LEN);
	if (rte_is_zero_ether_addr(&eth->data->mac_addrs[0]))
		rte_eth_random_addr(eth->data->mac_addrs[0].addr_bytes);
	eth->data->dev_flags = RTE_ETH_DEV_AUTOFILL_QUEUE_XSTATS | RTE_ETH_DEV_INTR_LSC;
	eth->data->dev_link.link_speed = RTE_ETH_SPEED_NUM_UNKNOWN;
	eth->dev_ops = &usernic_ops;
	eth->rx_pkt_burst = (eth_rx_burst_t)usernic_pmd_rx;
	eth->tx_pkt_burst = (eth_tx_burst_t)usernic_pmd_tx;
	eth->tx_pkt_prepare = dev->info.vf ? usernic_vf_prepare : usernic_tx_prepare;
	usernic_watch(dev);
	return 0;
}

static int usernic_probe(struct rte_vdev_device *vdev)
{
	struct rte_eth_dev *eth;
	int result;

	if (rte_eal_process_type() != RTE_PROC_PRIMARY) {
		USERNIC_LOG(ERR, "%s: a port is its primary process's alone\n", rte_vdev_device_name(vdev));
		return -ENOTSUP;
	}
	eth = rte_eth_vdev_allocate(vdev, sizeof(struct usernic_dev));
	if (eth == NULL)
		return -ENOMEM;
	result = usernic_make(vdev, eth);
	if (result < 0) {
		rte_eth_dev_release_port(eth);
		return result;
	}
	rte_eth_dev_probing_finish(eth);
	return 0;
}

static int usernic_remove(struct rte_vdev_device *vdev)
{
	struct rte_eth_dev *eth = rte_eth_dev_allocated(rte_vdev_device_name(vdev));

	if (eth == NULL)
		return 0;
	usernic_ops.dev_close(eth);
	return rte_eth_dev_release_port(eth);
}

static struct rte_vdev_driver usernic_driver = {
	.probe = usernic_probe,
	.remove = usernic_remove,
};

RTE_PMD_REGISTER_VDEV(net_usernic, usernic_driver);
RTE_PMD_REGISTER_PARAM_STRING(net_usernic, "path=<socket> queues=<n> queue_size=<n> packed_vq=<0|1> mrg_rxbuf=<0|1> "
					   "in_order=<0|1> server=<0|1> mac=<address> speed=<Mb/s> timeout=<ms> "
					   "socket_mode=<octal> socket_owner=<ids> vf=<address> interface=<container|iommufd>");
