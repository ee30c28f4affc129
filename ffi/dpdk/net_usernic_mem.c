/* SPDX-License-Identifier: BSD-3-Clause
 *
 * DPDK's memory as regions of files, and how they change.
 */
#include <errno.h>

#include <rte_eal_memconfig.h>
#include <rte_errno.h>
#include <rte_memory.h>

#include "net_usernic_dev.h"

/* Memory that is about to go, while its going is announced: guarded by DPDK's lock of its memory. */
static uint64_t going, going_length;

struct usernic_walk {
	struct usernic_region *regions;
	const struct rte_memseg_list *list;
	uint32_t count, most, files;
};

static int usernic_segment(const struct rte_memseg_list *list, const struct rte_memseg *segment, void *arg)
{
	struct usernic_walk *walk = arg;
	struct usernic_region *last = walk->count > 0 && walk->count <= walk->most ? &walk->regions[walk->count - 1] : NULL;
	uint64_t address = (uintptr_t)segment->addr;
	size_t offset;
	int fd;

	if (address >= going && address - going < going_length)
		return 0;
	fd = rte_memseg_get_fd_thread_unsafe(segment);
	if (fd < 0 || rte_memseg_get_fd_offset_thread_unsafe(segment, &offset) < 0) {
		fd = -1;
		offset = 0;
	}
	if (fd < 0 && walk->files) {
		/* What the application brought may lie in no file: it cannot be shared, and no pool of ours is in it. */
		if (list->external)
			return 0;
		USERNIC_LOG(ERR, "%zu bytes at %p are in no file: %s\n", segment->len, segment->addr,
			    rte_strerror(rte_errno));
		return -1;
	}
	if (last != NULL && walk->list == list && last->fd == fd && last->address + last->length == address &&
	    (fd < 0 || last->offset + last->length == offset)) {
		last->length += segment->len;
		return 0;
	}
	if (walk->count < walk->most)
		walk->regions[walk->count] = (struct usernic_region){
			.address = address,
			.length = segment->len,
			.offset = offset,
			.fd = fd,
			/* DPDK's own goes by pages; what was brought, as it came. Pages of 4 KiB are not given back. */
			.grain = list->external || list->page_sz <= 4096 || list->page_sz > UINT32_MAX ? 0 : list->page_sz,
		};
	walk->list = list;
	walk->count++;
	return 0;
}

/* With DPDK's lock of its memory taken. */
int32_t usernic_regions(struct usernic_region *regions, uint32_t most, uint32_t files)
{
	struct usernic_walk walk = {.regions = regions, .most = most, .files = files};

	if (rte_memseg_walk_thread_unsafe(usernic_segment, &walk) < 0)
		return -ENOTSUP;
	return walk.count;
}

static void usernic_memory_event(enum rte_mem_event event, const void *address, size_t length, void *arg)
{
	struct usernic_dev *dev = arg;
	const struct rte_memseg_list *list = rte_mem_virt2memseg_list(address);

	/* Of what the application brought only that counts which lies in a file, and that has its events, too. */
	if (list == NULL)
		return;
	if (event == RTE_MEM_EVENT_FREE) {
		going = (uintptr_t)address;
		going_length = length;
	}
	pthread_mutex_lock(&dev->lock);
	/* A device keeps the memory while its port is stopped. */
	if ((dev->started || dev->info.vf) && usernic_pmd_share(dev->port) < 0)
		USERNIC_LOG(ERR, "%s: DPDK's memory changed, and the other side did not take that: %s\n", dev->name,
			    usernic_pmd_error());
	pthread_mutex_unlock(&dev->lock);
	going_length = 0;
}

int usernic_follow_memory(struct usernic_dev *dev)
{
	char name[RTE_MEM_EVENT_CALLBACK_NAME_LEN];
	int result;

	snprintf(name, sizeof(name), "net_usernic_%u", dev->port_id);
	result = rte_mem_event_callback_register(name, usernic_memory_event, dev);
	/* With --legacy-mem and --no-huge memory does not change. */
	if (result < 0 && rte_errno != ENOTSUP) {
		USERNIC_LOG(ERR, "%s: changes of memory cannot be followed: %s\n", dev->name, rte_strerror(rte_errno));
		return -rte_errno;
	}
	return 0;
}

void usernic_unfollow_memory(struct usernic_dev *dev)
{
	char name[RTE_MEM_EVENT_CALLBACK_NAME_LEN];

	snprintf(name, sizeof(name), "net_usernic_%u", dev->port_id);
	rte_mem_event_callback_unregister(name, dev);
}
