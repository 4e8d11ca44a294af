/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Reading one packet. Headers beyond the linear part of a socket buffer are read like any others; a byte that is not
 * there drops the packet.
 */
#ifndef MESHBRIDGE_PACKET_H
#define MESHBRIDGE_PACKET_H

#define MAX_EXTENSION_HEADERS 6
#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_OPTION_LOOSE_ROUTE 131
#define IPV4_OPTION_STRICT_ROUTE 137

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define TCP_HEADER_BYTES 20
#define UDP_HEADER_BYTES 8
#define SCTP_HEADER_BYTES 12
#define ICMP_HEADER_BYTES 8

/* How a packet relates to flows. */
enum packet_kind {
	KIND_FLOW = 0,       /* opens or belongs to a flow: TCP, UDP, SCTP, echo requests, other protocols */
	KIND_ECHO_REPLY = 1, /* belongs to the flow of its request, opens none */
	KIND_STATELESS = 2,  /* other ICMP: judged by itself, packet for packet */
	KIND_ICMP_ERROR = 3, /* belongs to the flow it quotes */
};

enum fragment_part {
	FRAGMENT_NONE = 0,
	FRAGMENT_FIRST = 1,
	FRAGMENT_LATER = 2,
};

/* Where a family is not known yet, or the packet is not IP. */
#define FAMILY_NONE 255

struct ipv6_fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset_and_more;
	__be32 id;
};

struct ipv6_extension {
	__u8 next;
	__u8 length;
	__u8 type;          /* routing header */
	__u8 segments_left; /* routing header */
};

/* The first eight bytes of any transport header we read. */
struct transport_head {
	union {
		struct {
			__be16 source_port;
			__be16 destination_port;
		};
		__u8 icmp[4]; /* type, code, checksum */
	};
	__be16 third; /* UDP: length; ICMP echo: identifier */
	__be16 fourth;
};

struct tcp_flags {
	__u8 offset; /* upper half: header length in words */
	__u8 flags;
};

/* Headers on their way into struct packet. In memory, not on the stack: whichever way the bytes came in, they look the
 * same to the verifier from there on. */
union header_buffer {
	struct iphdr v4;
	struct ipv6hdr v6;
	struct ipv6_fragment fragment;
	struct ipv6_extension extension;
	struct {
		struct transport_head head;
		struct tcp_flags offset_and_flags;
	} transport;
};

struct packet {

	struct conntrack_key flow; /* the packet's own tuple and the direction it travels in */
	__u32 transport;           /* offset of the transport header, from the Ethernet header on */
	__u32 end;                 /* offset behind the last byte that belongs to the IP packet */
	__u32 fragment_id;
	__u32 fragment_start;  /* offset where the part that is cut into fragments begins */
	__u16 fragment_offset; /* in units of 8 bytes */
	__be16 ethertype;
	__u8 family;   /* enum ip_family or FAMILY_NONE */
	__u8 kind;     /* enum packet_kind */
	__u8 fragment; /* enum fragment_part */
	__u8 fragment_protocol;
	__u8 hop_limit;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 transport_bytes; /* length of the fixed part of the transport header */
	__u8 quoted; /* 1: an ICMP error; everything above is about the packet it quotes, outer_* about itself */
	__u8 outer_icmp_type;
	__u8 outer_icmp_code;
	__u8 group;                 /* addressed to a group by Ethernet */
	union header_buffer buffer; /* last, since it need not be zero */

} __attribute__((aligned(8)));

/* read_bytes - fetch *@to from the packet: directly where it is linear, else by the helper, which is 20 ns dearer.
 *
 * Return: 0, or not 0 when the packet ends before.
 */
#define LINEAR_READ_MAX 512
#define read_bytes(skb, offset, to)                                                                                    \
	({                                                                                                             \
		__u32 read_at = (offset);                                                                              \
		typeof(to) read_from = (void *)(long)(skb)->data + (read_at & (LINEAR_READ_MAX - 1));                  \
		int read_failed = 0;                                                                                   \
                                                                                                                       \
		if (read_at < LINEAR_READ_MAX && (void *)(read_from + 1) <= (void *)(long)(skb)->data_end)             \
			*(to) = *read_from;                                                                            \
		else                                                                                                   \
			read_failed = bpf_skb_load_bytes(skb, read_at, to, sizeof(*(to)));                             \
		read_failed;                                                                                           \
	})

static __always_inline bool is_v4_mapped(const __u8 *address)
{
	const __be32 *words = (const __be32 *)address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_unspecified(const __u8 *address)
{
	const __be32 *words = (const __be32 *)address;

	return !words[0] && !words[1] && !words[2] && !words[3];
}

static __always_inline bool is_link_local(const __u8 *address)
{
	return address[0] == 0xfe && (address[1] & 0xc0) == 0x80;
}

static __always_inline bool same_mac(const __u8 *one, const __u8 *other)
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3] &&
	       one[4] == other[4] && one[5] == other[5];
}

static __always_inline void map_v4(__u8 *address, __be32 v4)
{
	__be32 *words = (__be32 *)address;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = v4;
}

/* is_group - addressed to more than this pod: by its Ethernet address, or as an IP multicast or broadcast. */
static __always_inline bool is_group(const struct packet *packet)
{
	const __u8 *destination = packet->flow.destination;

	if (packet->group)
		return true;
	if (packet->family == FAMILY_IPV6)
		return destination[0] == 0xff;
	return (destination[12] & 0xf0) == 0xe0 || *(const __be32 *)&destination[12] == 0xffffffff;
}

/* check_source_route - refuse the options that make the destination address a mere waypoint.
 * @offset: of the IPv4 options
 * @length: of the options, 4..40
 *
 * Return: 0, or a negative enum drop_reason.
 */
static __always_inline int check_source_route(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	__u32 at = 0;

	/* 40 steps: every option but padding is two bytes at least, and a step is never shorter than one byte. */
	for (int step = 0; step < 40; step++) {
		__u8 option[2] = {};

		if (at >= length)
			return 0;
		if (bpf_skb_load_bytes(skb, offset + at, option, 1))
			return -DROP_INVALID_PACKET;
		if (option[0] == 0) /* end of options */
			return 0;
		if (option[0] == 1) { /* padding */
			at++;
			continue;
		}
		if (option[0] == IPV4_OPTION_LOOSE_ROUTE || option[0] == IPV4_OPTION_STRICT_ROUTE)
			return -DROP_INVALID_PACKET;
		if (at + 1 >= length || bpf_skb_load_bytes(skb, offset + at + 1, &option[1], 1) || option[1] < 2)
			return -DROP_INVALID_PACKET;
		at += option[1];
	}
	return 0;
}

/* parse_ipv4 - read an IPv4 header into @packet.
 * @offset: of the header
 * @limit: offset behind the last byte there is
 *
 * A packet quoted by an ICMP error may be cut short.
 *
 * Return: 0, or a negative enum drop_reason.
 */
static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *packet, __u32 offset, __u32 limit)
{
	struct iphdr *header = &packet->buffer.v4;
	__u32 header_bytes, total;
	__u16 fragment;

	if (offset + sizeof(*header) > limit || read_bytes(skb, offset, header))
		return -DROP_INVALID_PACKET;
	packet->family = FAMILY_IPV4;
	map_v4(packet->flow.source, header->saddr);
	map_v4(packet->flow.destination, header->daddr);
	packet->flow.protocol = header->protocol;
	packet->hop_limit = header->ttl;
	header_bytes = header->ihl * 4;
	total = bpf_ntohs(header->tot_len);
	/* A packet larger than 64 KB, joined by the kernel for one trip (BIG TCP), says 0; nobody can send one. */
	if (!packet->quoted && !total && header->protocol == IPPROTO_TCP && skb->gso_size)
		total = limit - offset;
	if (header->version != 4 || header->ihl < 5 || total < header_bytes)
		return -DROP_INVALID_PACKET;
	if (offset + total <= limit)
		limit = offset + total;
	else if (!packet->quoted)
		return -DROP_INVALID_PACKET;
	packet->transport = offset + header_bytes;
	packet->end = limit;
	if (packet->transport > limit)
		return -DROP_INVALID_PACKET;
	if (header->ihl > 5 && !packet->quoted) {
		int code = check_source_route(skb, offset + sizeof(*header), header_bytes - sizeof(*header));

		if (code)
			return code;
	}
	fragment = bpf_ntohs(header->frag_off);
	packet->fragment_offset = fragment & IPV4_FRAGMENT_OFFSET;
	packet->fragment_id = header->id;
	packet->fragment_protocol = header->protocol;
	packet->fragment_start = packet->transport;
	if (packet->fragment_offset)
		packet->fragment = FRAGMENT_LATER;
	else if (fragment & IPV4_MORE_FRAGMENTS)
		packet->fragment = FRAGMENT_FIRST;
	return 0;
}

/* parse_ipv6 - as parse_ipv4; follows extension headers to the transport header. */
static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *packet, __u32 offset, __u32 limit)
{
	struct ipv6hdr *header = &packet->buffer.v6;
	__u32 at = offset + sizeof(*header), payload;
	__u8 next;

	if (at > limit || read_bytes(skb, offset, header))
		return -DROP_INVALID_PACKET;
	packet->family = FAMILY_IPV6;
	__builtin_memcpy(packet->flow.source, &header->saddr, 16);
	__builtin_memcpy(packet->flow.destination, &header->daddr, 16);
	next = header->nexthdr;
	packet->flow.protocol = next;
	packet->hop_limit = header->hop_limit;
	/* In our keys a v4-mapped address is an IPv4 one; on the wire it has no business. */
	if (header->version != 6 || is_v4_mapped(packet->flow.source) || is_v4_mapped(packet->flow.destination))
		return -DROP_INVALID_PACKET;
	payload = bpf_ntohs(header->payload_len);
	if (!packet->quoted && !payload && next == IPPROTO_HOPOPTS && skb->gso_size) /* BIG TCP, as above */
		payload = limit - at;
	if (at + payload <= limit)
		limit = at + payload;
	else if (!packet->quoted)
		return -DROP_INVALID_PACKET;
	packet->end = limit;

	for (int count = 0; count <= MAX_EXTENSION_HEADERS; count++) {
		struct ipv6_extension *extension = &packet->buffer.extension;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_FRAGMENT &&
		    next != IPPROTO_DSTOPTS && next != IPPROTO_AH) {
			packet->flow.protocol = next;
			packet->transport = at;
			/* No next header, mobility, HIP, shim6, experiments: whatever follows, we could not name it. */
			if (next == IPPROTO_NONE || next == 135 || next == 139 || next == 140 || next == 253 ||
			    next == 254)
				return -DROP_IPV6_EXTENSION;
			return at > limit ? -DROP_INVALID_PACKET : 0;
		}
		if (count == MAX_EXTENSION_HEADERS || (next == IPPROTO_HOPOPTS && count))
			return -DROP_IPV6_EXTENSION;
		if (next == IPPROTO_FRAGMENT) {
			struct ipv6_fragment *fragment = &packet->buffer.fragment;
			__u16 bits;

			if (at + sizeof(*fragment) > limit || read_bytes(skb, at, fragment))
				return -DROP_INVALID_PACKET;
			if (packet->fragment_start)
				return -DROP_IPV6_EXTENSION;
			at += sizeof(*fragment);
			bits = bpf_ntohs(fragment->offset_and_more);
			packet->fragment_offset = bits >> 3;
			packet->fragment_id = fragment->id;
			packet->fragment_protocol = fragment->next;
			packet->fragment_start = at;
			next = fragment->next;
			packet->flow.protocol = next;
			packet->transport = at;
			if (packet->fragment_offset) {
				packet->fragment = FRAGMENT_LATER;
				return 0;
			}
			if (bits & 1)
				packet->fragment = FRAGMENT_FIRST;
			continue;
		}
		if (at + sizeof(*extension) > limit || read_bytes(skb, at, extension))
			return -DROP_INVALID_PACKET;
		/* With segments left the destination address is only the next stop. */
		if (next == IPPROTO_ROUTING && extension->segments_left)
			return -DROP_IPV6_EXTENSION;
		at += next == IPPROTO_AH ? (extension->length + 2) * 4 : (extension->length + 1) * 8;
		next = extension->next;
		if (at > limit)
			return packet->fragment == FRAGMENT_FIRST ? -DROP_FRAG_TINY : -DROP_INVALID_PACKET;
	}
	return -DROP_IPV6_EXTENSION;
}

/* classify_icmp - set kind and ports from protocol, type and echo identifier. */
static __always_inline void classify_icmp(struct packet *packet, __be16 identifier)
{
	__u8 type = packet->icmp_type;
	bool v4 = packet->flow.protocol == IPPROTO_ICMP;

	packet->kind = KIND_STATELESS;
	if (type == (v4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST)) {
		packet->kind = KIND_FLOW;
		packet->flow.source_port = identifier;
	} else if (type == (v4 ? ICMP_ECHOREPLY : ICMPV6_ECHO_REPLY)) {
		packet->kind = KIND_ECHO_REPLY;
		packet->flow.destination_port = identifier;
	} else if (v4 ? type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB
	              : type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMPROB) {
		packet->kind = KIND_ICMP_ERROR;
	}
}

/* parse_transport - read ports, TCP flags, ICMP type; @packet has been through parse_ipv4 or parse_ipv6.
 *
 * Of a quoted packet eight bytes of transport header are enough.
 *
 * Return: 0, or a negative enum drop_reason.
 */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *packet)
{
	__u32 available = packet->end - packet->transport, needed;
	__u8 protocol = packet->flow.protocol;
	struct transport_head *head = &packet->buffer.transport.head;
	struct tcp_flags *offset_and_flags = &packet->buffer.transport.offset_and_flags;

	switch (protocol) {
	case IPPROTO_TCP:
		needed = TCP_HEADER_BYTES;
		break;
	case IPPROTO_UDP:
		needed = UDP_HEADER_BYTES;
		break;
	case IPPROTO_SCTP:
		needed = SCTP_HEADER_BYTES;
		break;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		needed = ICMP_HEADER_BYTES;
		if ((protocol == IPPROTO_ICMPV6) != (packet->family == FAMILY_IPV6))
			return -DROP_UNKNOWN_L4;
		break;
	default:
		return 0;
	}
	packet->transport_bytes = needed;
	if (available < (packet->quoted ? sizeof(*head) : needed))
		return packet->fragment == FRAGMENT_FIRST ? -DROP_FRAG_TINY : -DROP_INVALID_PACKET;
	if (read_bytes(skb, packet->transport, head))
		return -DROP_INVALID_PACKET;
	if (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6) {
		packet->icmp_type = head->icmp[0];
		packet->icmp_code = head->icmp[1];
		classify_icmp(packet, head->third);
		return 0;
	}
	packet->flow.source_port = head->source_port;
	packet->flow.destination_port = head->destination_port;
	if (packet->quoted)
		return 0;
	if (protocol == IPPROTO_TCP) {
		if (read_bytes(skb, packet->transport + 12, offset_and_flags))
			return -DROP_INVALID_PACKET;
		packet->tcp_flags = offset_and_flags->flags;
		needed = (offset_and_flags->offset >> 4) * 4;
		if (needed < TCP_HEADER_BYTES || (needed > available && packet->fragment == FRAGMENT_NONE))
			return -DROP_INVALID_PACKET;
	} else if (protocol == IPPROTO_UDP && packet->fragment == FRAGMENT_NONE) {
		needed = bpf_ntohs(head->third);
		if (needed < UDP_HEADER_BYTES || needed > available)
			return -DROP_INVALID_PACKET;
	}
	return 0;
}

#endif
