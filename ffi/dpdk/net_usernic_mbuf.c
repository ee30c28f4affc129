/* SPDX-License-Identifier: BSD-3-Clause
 *
 * What the Rust half leaves to C: mempools, and frames that are anything but plain.
 */
#include <string.h>

#include <rte_byteorder.h>
#include <rte_errno.h>
#include <rte_ether.h>
#include <rte_ip.h>
#include <rte_mempool.h>
#include <rte_net.h>
#include <rte_tcp.h>
#include <rte_udp.h>

#include "net_usernic_dev.h"

/* struct virtio_net_hdr (virtio 1.3, 5.1.6), little-endian. */
struct usernic_header {
	uint8_t flags, gso_type;
	rte_le16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct usernic_header) == USERNIC_NET_HEADER, "the virtio-net header");

#define NEEDS_CSUM 1
#define DATA_VALID 2
#define GSO_TCPV4 1
#define GSO_TCPV6 4
#define GSO_ECN 0x80

#define TX_L4 (RTE_MBUF_F_TX_L4_MASK | RTE_MBUF_F_TX_TCP_SEG)

static int32_t usernic_get(void *pool, struct rte_mbuf **mbufs, uint32_t count)
{
	return rte_mempool_get_bulk(pool, (void **)mbufs, count) == 0 ? (int32_t)count : 0;
}

static void usernic_put(void *pool, struct rte_mbuf **mbufs, uint32_t count)
{
	rte_mempool_put_bulk(pool, (void **)mbufs, count);
}

static void usernic_release(struct rte_mbuf *mbuf)
{
	rte_pktmbuf_free(mbuf);
}

static void usernic_append(struct rte_mbuf *frame, struct rte_mbuf *last, struct rte_mbuf *segment)
{
	last->next = segment;
	frame->nb_segs++;
	frame->pkt_len += segment->data_len;
}

/* A frame that came from another port of the host with its checksum left open, or with several segments in one. */
static int usernic_open_frame(struct rte_mbuf *frame, const struct usernic_header *header)
{
	/* What the frame does not have stays 0. */
	struct rte_net_hdr_lens lens = {0};
	uint32_t start = rte_le_to_cpu_16(header->csum_start), offset = rte_le_to_cpu_16(header->csum_offset);
	uint32_t ptype = rte_net_get_ptype(frame, &lens, RTE_PTYPE_ALL_MASK), l4 = ptype & RTE_PTYPE_L4_MASK;
	uint32_t headers = lens.l2_len + lens.l3_len + lens.l4_len;

	frame->packet_type = ptype;
	if (header->flags & NEEDS_CSUM) {
		if (start + offset + sizeof(uint16_t) > frame->pkt_len)
			return -1;
		if (start <= headers && (l4 == RTE_PTYPE_L4_TCP || l4 == RTE_PTYPE_L4_UDP || l4 == RTE_PTYPE_L4_SCTP)) {
			/* Good, and not written. */
			frame->ol_flags |= RTE_MBUF_F_RX_L4_CKSUM_NONE;
		} else {
			uint16_t sum;

			/* Nobody behind us knows where it goes. */
			if (rte_raw_cksum_mbuf(frame, start, frame->pkt_len - start, &sum) < 0)
				return -1;
			if (sum != 0xffff)
				sum = ~sum;
			if (rte_pktmbuf_data_len(frame) >= start + offset + sizeof(sum))
				memcpy(rte_pktmbuf_mtod_offset(frame, uint8_t *, start + offset), &sum, sizeof(sum));
		}
	} else if (header->flags & DATA_VALID && l4 != 0) {
		frame->ol_flags |= RTE_MBUF_F_RX_L4_CKSUM_GOOD;
	}
	if (header->gso_type != 0) {
		uint8_t type = header->gso_type & ~GSO_ECN;

		if ((type != GSO_TCPV4 && type != GSO_TCPV6) || header->gso_size == 0)
			return -1;
		frame->tso_segsz = rte_le_to_cpu_16(header->gso_size);
		frame->ol_flags |= RTE_MBUF_F_RX_LRO | RTE_MBUF_F_RX_L4_CKSUM_NONE;
	}
	return 0;
}

/* The longest header of IPv4, in bytes. */
#define IPV4_MAX (15 * RTE_IPV4_IHL_MULTIPLIER)

static void usernic_look_at_ipv4(struct rte_mbuf *frame)
{
	struct {
		struct rte_ether_hdr ether;
		uint8_t rest[sizeof(struct rte_vlan_hdr) + IPV4_MAX];
	} copy;
	uint32_t length = RTE_MIN(frame->data_len, sizeof(copy)), offset = 0, header;
	const struct rte_vlan_hdr *vlan = (const void *)copy.rest;
	const struct rte_ipv4_hdr *ipv4;
	rte_be16_t type;

	/* Once: the other side may write the frame meanwhile, and the length of its header is in it. */
	memcpy(&copy, rte_pktmbuf_mtod(frame, const void *), length);
	rte_compiler_barrier();
	length -= sizeof(copy.ether);
	type = copy.ether.ether_type;
	if (type == rte_cpu_to_be_16(RTE_ETHER_TYPE_VLAN) && length >= sizeof(*vlan)) {
		offset = sizeof(*vlan);
		type = vlan->eth_proto;
	}
	ipv4 = (const void *)(copy.rest + offset);
	if (type != rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV4) || length < offset + sizeof(*ipv4))
		return;
	header = rte_ipv4_hdr_len(ipv4);
	if (header < sizeof(*ipv4) || length < offset + header)
		return;
	frame->ol_flags |= rte_ipv4_cksum(ipv4) == 0 ? RTE_MBUF_F_RX_IP_CKSUM_GOOD : RTE_MBUF_F_RX_IP_CKSUM_BAD;
}

static int32_t usernic_received(struct rte_mbuf *frame, const uint8_t *bytes, uint32_t what)
{
	struct usernic_header header;

	if (what & USERNIC_RX_HEADER) {
		/* Once: the other side may write it meanwhile. */
		memcpy(&header, bytes, sizeof(header));
		rte_compiler_barrier();
		if ((header.flags | header.gso_type) != 0 && usernic_open_frame(frame, &header) < 0)
			return -1;
	}
	if (what & USERNIC_RX_IPV4 && frame->data_len >= RTE_ETHER_HDR_LEN)
		usernic_look_at_ipv4(frame);
	if (what & USERNIC_RX_VLAN_STRIP && frame->data_len >= RTE_ETHER_HDR_LEN + RTE_VLAN_HLEN)
		rte_vlan_strip(frame);
	return 0;
}

static void usernic_ask(const struct rte_mbuf *frame, struct usernic_header *header)
{
	uint64_t l4 = frame->ol_flags & RTE_MBUF_F_TX_L4_MASK;

	memset(header, 0, sizeof(*header));
	if (l4 != 0 || frame->ol_flags & RTE_MBUF_F_TX_TCP_SEG) {
		bool udp = l4 == RTE_MBUF_F_TX_UDP_CKSUM;

		header->flags = NEEDS_CSUM;
		header->csum_start = rte_cpu_to_le_16(frame->l2_len + frame->l3_len);
		header->csum_offset = rte_cpu_to_le_16(udp ? offsetof(struct rte_udp_hdr, dgram_cksum)
							   : offsetof(struct rte_tcp_hdr, cksum));
	}
	if (frame->ol_flags & RTE_MBUF_F_TX_TCP_SEG) {
		header->gso_type = frame->ol_flags & RTE_MBUF_F_TX_IPV6 ? GSO_TCPV6 : GSO_TCPV4;
		header->gso_size = rte_cpu_to_le_16(frame->tso_segsz);
		header->hdr_len = rte_cpu_to_le_16(frame->l2_len + frame->l3_len + frame->l4_len);
	}
}

static uint32_t usernic_pieces(struct rte_mbuf **frame, uint32_t offload, uint8_t *slot, struct usernic_piece *pieces)
{
	struct usernic_header header = {0};
	const struct rte_mbuf *segment;
	struct rte_mbuf *first;
	uint8_t *place = slot;
	uint32_t n = 0;

	/* Done here, too, for applications that do not prepare their frames. */
	if (offload && (*frame)->ol_flags & RTE_MBUF_F_TX_VLAN && rte_vlan_insert(frame) < 0)
		return 0;
	first = *frame;
	if (first->nb_segs > USERNIC_MAX_SEGMENTS)
		return 0;
	if (offload)
		usernic_ask(first, &header);
	/* Into its own buffer, if that is nobody else's: a descriptor less. */
	if (RTE_MBUF_DIRECT(first) && rte_mbuf_refcnt_read(first) == 1 && first->data_off >= USERNIC_NET_HEADER &&
	    first->data_len != 0) {
		place = rte_pktmbuf_mtod(first, uint8_t *) - USERNIC_NET_HEADER;
	} else {
		pieces[n++] = (struct usernic_piece){.address = (uintptr_t)slot, .length = USERNIC_NET_HEADER};
	}
	memcpy(place, &header, sizeof(header));
	for (segment = first; segment != NULL; segment = segment->next) {
		if (segment->data_len == 0)
			continue;
		if (n > USERNIC_MAX_SEGMENTS)
			return 0;
		pieces[n++] = (struct usernic_piece){
			.address = (uintptr_t)rte_pktmbuf_mtod(segment, uint8_t *),
			.length = segment->data_len,
		};
	}
	if (place != slot) {
		pieces[0].address -= USERNIC_NET_HEADER;
		pieces[0].length += USERNIC_NET_HEADER;
	} else if (n == 1) {
		/* No byte at all. */
		return 0;
	}
	return n;
}

/* What a device is to do, and where the frame is. */
static uint32_t usernic_describe(struct rte_mbuf *frame, struct usernic_offload *offload, struct usernic_piece *pieces)
{
	uint64_t flags = frame->ol_flags, l4 = flags & RTE_MBUF_F_TX_L4_MASK;
	struct rte_mbuf *segment;
	uint16_t what = 0;
	uint32_t n = 0;

	if (flags & RTE_MBUF_F_TX_VLAN)
		what |= USERNIC_OFFLOAD_VLAN;
	if (flags & RTE_MBUF_F_TX_IPV4)
		what |= USERNIC_OFFLOAD_IPV4;
	if (flags & RTE_MBUF_F_TX_IP_CKSUM)
		what |= USERNIC_OFFLOAD_IPV4 | USERNIC_OFFLOAD_IP_CHECKSUM;
	if (flags & RTE_MBUF_F_TX_TCP_SEG) {
		what |= USERNIC_OFFLOAD_SEGMENT | USERNIC_OFFLOAD_TCP;
		/* Each piece has another length, so that the device makes this one, too. */
		if (what & USERNIC_OFFLOAD_IPV4)
			what |= USERNIC_OFFLOAD_IP_CHECKSUM;
	} else if (l4 == RTE_MBUF_F_TX_TCP_CKSUM) {
		what |= USERNIC_OFFLOAD_TCP;
	} else if (l4 == RTE_MBUF_F_TX_UDP_CKSUM) {
		what |= USERNIC_OFFLOAD_UDP;
	} else if (l4 == RTE_MBUF_F_TX_SCTP_CKSUM) {
		what |= USERNIC_OFFLOAD_SCTP;
	}
	*offload = (struct usernic_offload){
		.what = what,
		.l2 = frame->l2_len,
		.l3 = frame->l3_len,
		.l4 = frame->l4_len,
		.mss = frame->tso_segsz,
		.tag = frame->vlan_tci,
	};
	for (segment = frame; segment != NULL; segment = segment->next) {
		if (segment->data_len == 0)
			continue;
		if (n > USERNIC_MAX_SEGMENTS)
			return 0;
		pieces[n++] = (struct usernic_piece){
			.address = (uintptr_t)rte_pktmbuf_mtod(segment, uint8_t *),
			.length = segment->data_len,
		};
	}
	return n;
}

/* A packet that is cut has the length in its pseudo header's sum, where DPDK's have 0 (virtio 1.3, 5.1.6.2). */
static void usernic_add_length(struct rte_mbuf *frame)
{
	struct rte_tcp_hdr *tcp;
	uint32_t sum, length;

	if (frame->data_len < frame->l2_len + frame->l3_len + sizeof(*tcp))
		return;
	tcp = rte_pktmbuf_mtod_offset(frame, struct rte_tcp_hdr *, frame->l2_len + frame->l3_len);
	length = frame->pkt_len - frame->l2_len - frame->l3_len;
	sum = tcp->cksum + rte_cpu_to_be_16(length & 0xffff) + rte_cpu_to_be_16(length >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	tcp->cksum = (sum & 0xffff) + (sum >> 16);
}

uint16_t usernic_tx_prepare(void *queue __rte_unused, struct rte_mbuf **mbufs, uint16_t count)
{
	uint16_t at;

	for (at = 0; at < count; at++) {
		struct rte_mbuf *frame = mbufs[at];
		int result = 0;

		if (frame->nb_segs > USERNIC_MAX_SEGMENTS)
			result = -EINVAL;
		if (result == 0 && frame->ol_flags & RTE_MBUF_F_TX_VLAN) {
			result = rte_vlan_insert(&frame);
			mbufs[at] = frame;
		}
		if (result == 0 && frame->ol_flags & TX_L4) {
			result = rte_net_intel_cksum_prepare(frame);
			if (result == 0 && frame->ol_flags & RTE_MBUF_F_TX_TCP_SEG)
				usernic_add_length(frame);
		}
		if (result != 0) {
			rte_errno = -result;
			break;
		}
	}
	return at;
}

/* A device inserts tags by itself, and counts the length of what it cuts. */
uint16_t usernic_vf_prepare(void *queue __rte_unused, struct rte_mbuf **mbufs, uint16_t count)
{
	uint16_t at;

	for (at = 0; at < count; at++) {
		struct rte_mbuf *frame = mbufs[at];
		int result = 0;

		if (frame->nb_segs > USERNIC_VF_MAX_SEGMENTS)
			result = -EINVAL;
		if (result == 0 && frame->ol_flags & (TX_L4 | RTE_MBUF_F_TX_IP_CKSUM))
			result = rte_net_intel_cksum_prepare(frame);
		if (result != 0) {
			rte_errno = -result;
			break;
		}
	}
	return at;
}

static void usernic_log(uint32_t level, const char *text, size_t length)
{
	rte_log(level, usernic_logtype, "net_usernic: %.*s\n", (int)length, text);
}

const struct usernic_calls usernic_calls = {
	.get = usernic_get,
	.put = usernic_put,
	.release = usernic_release,
	.append = usernic_append,
	.received = usernic_received,
	.pieces = usernic_pieces,
	.describe = usernic_describe,
	.regions = usernic_regions,
	.log = usernic_log,
};
