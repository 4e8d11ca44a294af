/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What is true of flows without looking into a map: lifetimes, who may have opened one.
 */
#ifndef MESHBRIDGE_FLOW_H
#define MESHBRIDGE_FLOW_H

#define SECOND_NS 1000000000ULL
#define TCP_UNANSWERED_S 120
#define TCP_ANSWERED_S 21600
#define TCP_CLOSING_S 60
#define UDP_UNANSWERED_S 60
#define UDP_ANSWERED_S 180
#define ICMP_S 30
#define OTHER_S 600
#define FRAGMENTS_S 30

/* Linux gives ports from here on to those who connect; servers are rarely found there. */
#define FIRST_CLIENT_PORT 32768

/* flow_lifetime_s - how long a flow may be silent before it counts as over. */
static __always_inline __u64 flow_lifetime_s(__u8 protocol, __u32 flags)
{
	bool answered = flags & CONNTRACK_F_REPLIED;

	switch (protocol) {
	case IPPROTO_TCP:
		if (flags & CONNTRACK_F_CLOSING)
			return TCP_CLOSING_S;
		return answered ? TCP_ANSWERED_S : TCP_UNANSWERED_S;
	case IPPROTO_UDP:
		return answered ? UDP_ANSWERED_S : UDP_UNANSWERED_S;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return ICMP_S;
	default:
		return OTHER_S;
	}
}

/* is_over - more than so many seconds have passed. The clocks of two CPUs may be a tick apart: what another wrote may lie
 * ahead of us. */
static __always_inline bool is_over(__u64 now, __u64 seen_ns, __u64 seconds)
{
	return (__s64)(now - seen_ns) > (__s64)(seconds * SECOND_NS);
}

static __always_inline bool is_client_port(__be16 port)
{
	return bpf_ntohs(port) >= FIRST_CLIENT_PORT;
}

/* reverse_flow - the flow that the packets of @flow would be replies to. */
static __always_inline void reverse_flow(const struct conntrack_key *flow, struct conntrack_key *reverse)
{
	__builtin_memcpy(reverse->source, flow->destination, 16);
	__builtin_memcpy(reverse->destination, flow->source, 16);
	reverse->source_port = flow->destination_port;
	reverse->destination_port = flow->source_port;
	reverse->protocol = flow->protocol;
	reverse->direction = !flow->direction;
}

#endif
