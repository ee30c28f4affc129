/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Between the two halves of librte_net_usernic.so: ethdev, memory and mempools in C, rings and connections in Rust.
 * Structs and functions are written a second time in src/abi.rs. Not installed, and no interface for anybody else.
 */
#ifndef NET_USERNIC_H
#define NET_USERNIC_H

#include <stddef.h>
#include <stdint.h>

#include <rte_mbuf.h>

/* Fields of an mbuf that the Rust half reads and writes: src/mbuf.rs. */
_Static_assert(offsetof(struct rte_mbuf, buf_addr) == 0, "mbuf: buf_addr");
_Static_assert(offsetof(struct rte_mbuf, rearm_data) == 16, "mbuf: rearm_data");
_Static_assert(offsetof(struct rte_mbuf, data_off) == 16, "mbuf: data_off");
_Static_assert(offsetof(struct rte_mbuf, refcnt) == 18, "mbuf: refcnt");
_Static_assert(offsetof(struct rte_mbuf, nb_segs) == 20, "mbuf: nb_segs");
_Static_assert(offsetof(struct rte_mbuf, port) == 22, "mbuf: port");
_Static_assert(offsetof(struct rte_mbuf, ol_flags) == 24, "mbuf: ol_flags");
_Static_assert(offsetof(struct rte_mbuf, packet_type) == 32, "mbuf: packet_type");
_Static_assert(offsetof(struct rte_mbuf, pkt_len) == 36, "mbuf: pkt_len");
_Static_assert(offsetof(struct rte_mbuf, data_len) == 40, "mbuf: data_len");
_Static_assert(offsetof(struct rte_mbuf, vlan_tci) == 42, "mbuf: vlan_tci");
_Static_assert(offsetof(struct rte_mbuf, hash.rss) == 44, "mbuf: hash");
_Static_assert(offsetof(struct rte_mbuf, pool) == 56, "mbuf: pool");
_Static_assert(RTE_MBUF_F_RX_VLAN == 1 && RTE_MBUF_F_RX_RSS_HASH == 2 && RTE_MBUF_F_RX_L4_CKSUM_BAD == 8 &&
	       RTE_MBUF_F_RX_IP_CKSUM_BAD == 16 && RTE_MBUF_F_RX_VLAN_STRIPPED == 64 &&
	       RTE_MBUF_F_RX_IP_CKSUM_GOOD == 128 && RTE_MBUF_F_RX_L4_CKSUM_GOOD == 256, "mbuf: flags");
_Static_assert(RTE_PTYPE_L2_ETHER == 0x1 && RTE_PTYPE_L3_IPV4 == 0x10 && RTE_PTYPE_L3_IPV4_EXT == 0x30 &&
	       RTE_PTYPE_L3_IPV6 == 0x40 && RTE_PTYPE_L3_IPV6_EXT == 0xc0 && RTE_PTYPE_L4_TCP == 0x100 &&
	       RTE_PTYPE_L4_UDP == 0x200 && RTE_PTYPE_L4_SCTP == 0x400, "mbuf: packet types");
_Static_assert(RTE_MBUF_F_INDIRECT == 1ULL << 62 && RTE_MBUF_F_EXTERNAL == 1ULL << 61, "mbuf: flags");

/* Bytes of the virtio-net header, before the data of each frame. */
#define USERNIC_NET_HEADER 12
/* Segments of one frame, at the most. */
#define USERNIC_MAX_SEGMENTS 64
/* Queue pairs of a port, at the most. */
#define USERNIC_MAX_PAIRS 128
/* Addresses that a port filters by besides its own, at the most. */
#define USERNIC_MAX_ADDRESSES 64

/* A run of DPDK's memory in one file. */
struct usernic_region {
	uint64_t address;
	uint64_t length;
	uint64_t offset;
	int32_t fd;
	uint32_t grain; /* it may go in pieces of so many bytes; 0: only as a whole */
};

/* One segment of a frame that is sent. */
struct usernic_piece {
	uint64_t address;
	uint32_t length;
	uint32_t reserved;
};

/* What a device is to do to a frame. */
struct usernic_offload {
	uint16_t what; /* USERNIC_OFFLOAD_ */
	uint16_t l2, l3, l4; /* bytes of the headers */
	uint16_t mss;
	uint16_t tag;
};
#define USERNIC_OFFLOAD_VLAN 1U
#define USERNIC_OFFLOAD_IPV4 2U /* that is what the frame is */
#define USERNIC_OFFLOAD_IP_CHECKSUM 4U
#define USERNIC_OFFLOAD_TCP 8U
#define USERNIC_OFFLOAD_UDP 16U
#define USERNIC_OFFLOAD_SCTP 32U
#define USERNIC_OFFLOAD_SEGMENT 64U

/* How a device spreads frames over queues: fields as in its register VFMRQC. */
struct usernic_rss {
	uint8_t key[40];
	uint8_t table[64];
	uint32_t fields;
};

/* What the Rust half calls. */
struct usernic_calls {
	/* Fresh mbufs, in their initial state: all, or 0 of them. */
	int32_t (*get)(void *pool, struct rte_mbuf **mbufs, uint32_t count);
	/* mbufs of one pool, each in the state in which the pool wants it. */
	void (*put)(void *pool, struct rte_mbuf **mbufs, uint32_t count);
	/* A frame, whatever it consists of. */
	void (*release)(struct rte_mbuf *mbuf);
	/* Appends a received segment, of `length` bytes, to a frame. */
	void (*append)(struct rte_mbuf *frame, struct rte_mbuf *last, struct rte_mbuf *segment);
	/* What a received frame's virtio-net header says, and VLAN stripping: 0, or the frame is malformed. */
	int32_t (*received)(struct rte_mbuf *frame, const uint8_t *header, uint32_t what);
	/* The segments of a frame to send, and its header if `offload`: how many; 0: it cannot be sent. `*frame` may be
	 * another one afterwards. */
	uint32_t (*pieces)(struct rte_mbuf **frame, uint32_t offload, uint8_t *header, struct usernic_piece *pieces);
	/* The segments of a frame to send, as they are, and what a device is to do to it: how many; 0: it cannot be sent. */
	uint32_t (*describe)(struct rte_mbuf *frame, struct usernic_offload *offload, struct usernic_piece *pieces);
	/* The regions of memory, in the order of their addresses: how many, or a negative errno. With `files`, all of it has
	 * to be in files. */
	int32_t (*regions)(struct usernic_region *regions, uint32_t most, uint32_t files);
	/* A line of the log, of one of DPDK's levels. */
	void (*log)(uint32_t level, const char *text, size_t length);
};

/* What is done with received frames: for `received`. */
#define USERNIC_RX_HEADER 1U /* the header may say something */
#define USERNIC_RX_VLAN_STRIP 2U
#define USERNIC_RX_IPV4 4U /* the checksum of an IPv4 header, which no back-end looks at */

/* A port, as it is before it starts. */
struct usernic_info {
	uint64_t features; /* what the back-end offers; all that could be, if it is not known */
	uint32_t speed;    /* Mb/s, 0: unknown */
	uint16_t pairs;    /* that can be used */
	uint16_t queue_size;
	uint8_t mac[6];
	uint8_t connected;
	uint8_t server;
	int8_t mrg_rxbuf; /* -1: not said */
	uint8_t packed;
	uint8_t in_order;
	uint8_t vf; /* USERNIC_VF..., 0: a vhost-user socket */
};
#define USERNIC_VF 1
#define USERNIC_VF_OWN_RSS 2

/* A receive queue. A null pool: nothing is received. */
struct usernic_rx_setup {
	void *pool;
	uint64_t flags;	   /* ol_flags of an empty mbuf */
	uint32_t shift;	   /* from an mbuf to its buffer; 0: to be read of each */
	uint32_t room;	   /* bytes of a frame that an mbuf holds */
	uint16_t size;	   /* descriptors */
	uint16_t batch;	   /* free descriptors at which it is filled */
	uint16_t headroom;
	uint16_t reserved;
};

/* A transmit queue. Size 0: it is none of the application's. */
struct usernic_tx_setup {
	uint64_t odd;	   /* ol_flags that ask for something */
	uint16_t size;	   /* descriptors */
	uint16_t keep;	   /* frames in flight at which it is looked for those that were taken */
	uint8_t fast_free; /* all mbufs are of one pool, and not shared */
	uint8_t reserved[3];
};

struct usernic_config {
	uint64_t features; /* offloads that the application configured: all are needed */
	uint16_t pairs;
	uint16_t mtu;
	uint16_t port;	   /* DPDK's number of it */
	uint8_t mergeable;
	uint8_t extras;	   /* USERNIC_RX_ */
	uint32_t hash;	   /* fields that a device spreads by; 0: as it likes */
	uint16_t rx_pairs; /* of them, those that the application receives from */
	uint16_t reserved;
};

/* Which frames are received. */
struct usernic_filter {
	uint8_t mac[6];
	uint8_t promiscuous;
	uint8_t all_multicast;
	uint8_t vlan;
	uint8_t stations; /* addresses that follow */
	uint16_t groups;  /* addresses behind those */
	uint64_t vlans[64];
	uint8_t addresses[2 * USERNIC_MAX_ADDRESSES][6];
};

struct usernic_counts {
	uint64_t packets, bytes;
	uint64_t errors;   /* rx: malformed; tx: frames that could not be sent, and were freed */
	uint64_t runts;	   /* rx: of less than 14 bytes */
	uint64_t oversize; /* rx: longer than the MTU allows */
	uint64_t filtered; /* rx: for somebody else */
	uint64_t empty;	   /* rx: buffers that the pool did not have */
	uint64_t chains;   /* frames of several segments */
	uint64_t kicks;
	uint64_t anomalies; /* what the other side did wrong */
};

struct usernic_port;
struct usernic_rx;
struct usernic_tx;

/* What DPDK knows a queue by begins so: null while the port is stopped, when DPDK's calls still come. */
struct usernic_handle {
	void *running; /* struct usernic_rx or usernic_tx */
};

/* All that fails gives a negative errno and a text, which is the thread's until its next call. */
const char *usernic_pmd_error(void);
int32_t usernic_pmd_open(const char *spec, const struct usernic_calls *calls, struct usernic_port **port);
void usernic_pmd_close(struct usernic_port *port);
void usernic_pmd_info(struct usernic_port *port, struct usernic_info *info);

/* Bytes of memory that a started port needs, in DPDK's memory, aligned to 4096. */
uint64_t usernic_pmd_memory(struct usernic_port *port, const struct usernic_config *config,
			    const struct usernic_rx_setup *rx, const struct usernic_tx_setup *tx);
/* Starts: queues[i] and queues[pairs + i] are a struct usernic_rx and a struct usernic_tx. */
int32_t usernic_pmd_start(struct usernic_port *port, const struct usernic_config *config,
			  const struct usernic_rx_setup *rx, const struct usernic_tx_setup *tx, void *memory,
			  void **queues);
/* Stops: no mbuf is the other side's any more, and the queues' pointers are dead. */
void usernic_pmd_stop(struct usernic_port *port);
/* The memory is another: shares it. */
int32_t usernic_pmd_share(struct usernic_port *port);
/* Looks after the connection: 1, the link is up; 0, it is down. */
int32_t usernic_pmd_service(struct usernic_port *port);
int32_t usernic_pmd_filter(struct usernic_port *port, const struct usernic_filter *filter);
void usernic_pmd_vlan_strip(struct usernic_port *port, uint8_t on);
int32_t usernic_pmd_mtu(struct usernic_port *port, uint16_t mtu);
int32_t usernic_pmd_rss(struct usernic_port *port, struct usernic_rss *rss);
int32_t usernic_pmd_set_rss(struct usernic_port *port, const struct usernic_rss *rss);

/* `queue`: a struct usernic_handle. */
uint16_t usernic_pmd_rx(void *queue, struct rte_mbuf **mbufs, uint16_t count);
uint16_t usernic_pmd_tx(void *queue, struct rte_mbuf **mbufs, uint16_t count);
void usernic_pmd_rx_counts(struct usernic_rx *queue, struct usernic_counts *counts);
void usernic_pmd_tx_counts(struct usernic_tx *queue, struct usernic_counts *counts);
/* What becomes readable with each notification. Nobody reads it: see src/wake.rs. */
int32_t usernic_pmd_rx_fd(struct usernic_rx *queue);
/* Wants to be notified, or not. 1: frames are there. `queue`: a struct usernic_handle. */
int32_t usernic_pmd_rx_arm(void *queue, uint8_t on);
/* Frees up to `most` (0: all) frames that the other side has taken. `queue`: a struct usernic_handle. */
int32_t usernic_pmd_tx_clean(void *queue, uint32_t most);

#endif
