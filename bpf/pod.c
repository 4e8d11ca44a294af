/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The two programs on the host side of a pod's interface: from_pod at tc ingress, to_pod at tc egress. Both run the same
 * steps with the direction as a constant: link layer, IP, addresses, neighbour discovery, fragments, flows, policy.
 *
 * A step returns 0 to go on, PASS to pass, or a negative enum drop_reason; only finish() turns that into a verdict for
 * the kernel, counts it and tells it, so no packet leaves without a trace. Passing is TC_ACT_UNSPEC: programs behind
 * ours still see the packet. Map lookups stay in this file: BCC rewrites them only in the main source.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>

#include "abi.h"
#include "lib/packet.h"
#include "lib/flow.h"
#include "lib/policy.h"
#include "maps.h"

#define PASS 1
#define NO_UID 0xffffffff
#define REPLY_UNKNOWN 2
#define READ_ATTEMPTS 3
#define PLAIN_BYTES (ETH_HLEN + sizeof(struct iphdr) + TCP_HEADER_BYTES)

/* is_own - the pod may use this address, in this incarnation. */
static __always_inline bool is_own(struct __sk_buff *skb, const struct endpoint_value *endpoint, const __u8 *address)
{
	struct endpoint_address_key key = {.ifindex = skb->ifindex};
	struct endpoint_address_value *value;

	__builtin_memcpy(key.address, address, 16);
	value = endpoint_addresses.lookup(&key);
	return value && value->incarnation == endpoint->incarnation;
}

/* from_own_mac - the frame's source is the pod's link-layer address. */
static __always_inline bool from_own_mac(struct __sk_buff *skb, const struct endpoint_value *endpoint)
{
	__u8 mac[6];

	return !bpf_skb_load_bytes(skb, ETH_ALEN, mac, sizeof(mac)) && same_mac(mac, endpoint->mac);
}

struct arp_ipv4 {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_bytes;
	__u8 protocol_bytes;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
};

/* check_arp - from a pod only what speaks for its own address, to a pod only what concerns it.
 *
 * Return: PASS, or a negative enum drop_reason.
 */
static __always_inline int check_arp(struct __sk_buff *skb, const struct endpoint_value *endpoint, __u8 direction)
{
	struct arp_ipv4 arp;
	__u8 sender[16] __attribute__((aligned(8))), target[16] __attribute__((aligned(8)));
	__be32 sender_v4, target_v4;
	bool request;

	if (read_bytes(skb, ETH_HLEN, &arp))
		return -DROP_INVALID_PACKET;
	request = arp.operation == bpf_htons(1);
	if (arp.hardware != bpf_htons(1) || arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_bytes != 6 ||
	    arp.protocol_bytes != 4 || (!request && arp.operation != bpf_htons(2)))
		return -DROP_FORBIDDEN_ARP;
	__builtin_memcpy(&sender_v4, arp.sender, 4);
	__builtin_memcpy(&target_v4, arp.target, 4);
	map_v4(sender, sender_v4);
	map_v4(target, target_v4);
	if (direction == DIR_EGRESS) {
		if (endpoint->flags & ENDPOINT_F_MAC &&
		    (!same_mac(arp.sender_mac, endpoint->mac) || !from_own_mac(skb, endpoint)))
			return -DROP_FORBIDDEN_ARP;
		/* A probe asks whether an address is free, before it is anybody's. */
		if ((request && !sender_v4) || is_own(skb, endpoint, sender))
			return PASS;
		return -DROP_FORBIDDEN_ARP;
	}
	/* An announcement speaks of its sender only; the answer to a probe has no target address. */
	if (sender_v4 == target_v4 || (!request && !target_v4) || is_own(skb, endpoint, target))
		return PASS;
	return -DROP_FORBIDDEN_ARP;
}

struct neighbour_option {
	__u8 type;
	__u8 length;
	__u8 mac[6];
};

/* check_options - a pod's neighbour discovery names no link-layer address but its own, and carries little else.
 * @at: offset of the first option
 */
static __always_inline int check_options(struct __sk_buff *skb, const struct endpoint_value *endpoint,
                                         const struct packet *packet, __u32 at)
{
	for (int count = 0; count < 4; count++) {
		struct neighbour_option option;

		if (at == packet->end)
			return 0;
		if (at + sizeof(option) > packet->end || bpf_skb_load_bytes(skb, at, &option, sizeof(option)) ||
		    !option.length || option.length > 2)
			return -DROP_FORBIDDEN_ICMP6;
		/* 1 and 2: source and target link-layer address */
		if (endpoint->flags & ENDPOINT_F_MAC && (option.type == 1 || option.type == 2) &&
		    !same_mac(option.mac, endpoint->mac))
			return -DROP_FORBIDDEN_ICMP6;
		at += option.length * 8;
	}
	return at == packet->end ? 0 : -DROP_FORBIDDEN_ICMP6;
}

/* check_neighbour_from_pod - neighbour discovery and multicast listener reports of a pod.
 *
 * Return: PASS, 0 for what policy judges, or a negative enum drop_reason.
 */
static __always_inline int check_neighbour_from_pod(struct __sk_buff *skb, const struct endpoint_value *endpoint,
                                                    const struct packet *packet, bool own_source)
{
	const __u8 *source = packet->flow.source, *destination = packet->flow.destination;
	__u8 target[16] __attribute__((aligned(8)));
	__u32 body = packet->transport + ICMP_HEADER_BYTES;
	__u8 type = packet->icmp_type;

	if (type == 131 || type == 132 || type == 143) { /* listener reports stay on the link */
		if (packet->hop_limit != 1 || destination[0] != 0xff || packet->fragment)
			return -DROP_FORBIDDEN_ICMP6;
		return own_source || is_link_local(source) || is_unspecified(source) ? PASS : -DROP_INVALID_SOURCE_IP;
	}
	if (type < 133 || type > 137)
		return 0;
	if (type == 134 || type == 137) /* router advertisement, redirect */
		return -DROP_FORBIDDEN_ICMP6;
	if (packet->hop_limit != 255 || packet->icmp_code || packet->fragment)
		return -DROP_FORBIDDEN_ICMP6;
	if (!own_source && !is_link_local(source) && !is_unspecified(source))
		return -DROP_INVALID_SOURCE_IP;
	if (endpoint->flags & ENDPOINT_F_MAC && !from_own_mac(skb, endpoint))
		return -DROP_FORBIDDEN_ICMP6;
	/* Off the link it could carry bytes to anybody; within, to nodes and pods only. */
	if (destination[0] != 0xff && !is_link_local(destination)) {
		struct ipcache_key key = {};

		__builtin_memcpy(key.address, destination, 16);
		if (!ipcache.lookup(&key))
			return -DROP_FORBIDDEN_ICMP6;
	}
	if (type != 133) { /* solicitation and advertisement name a target */
		if (body + sizeof(target) > packet->end || bpf_skb_load_bytes(skb, body, target, sizeof(target)))
			return -DROP_INVALID_PACKET;
		body += sizeof(target);
		if (type == 136 && !is_link_local(target) && !is_own(skb, endpoint, target))
			return -DROP_FORBIDDEN_ICMP6;
	}
	return check_options(skb, endpoint, packet, body) ?: PASS;
}

/* check_neighbour_to_pod - neighbour discovery, router advertisements and listener messages from the link.
 *
 * Return: as above.
 */
static __always_inline int check_neighbour_to_pod(const struct packet *packet)
{
	const __u8 *source = packet->flow.source;
	__u8 type = packet->icmp_type;

	if ((type >= 130 && type <= 132) || type == 143)
		return packet->hop_limit == 1 && !packet->fragment && (is_link_local(source) || is_unspecified(source))
			   ? PASS
			   : 0;
	if (type < 134 || type > 136)
		return 0;
	if (packet->hop_limit != 255 || packet->icmp_code || packet->fragment)
		return -DROP_FORBIDDEN_ICMP6;
	return type == 134 && !is_link_local(source) ? -DROP_FORBIDDEN_ICMP6 : PASS;
}

static __always_inline void fragment_key_of(struct fragment_key *key, const struct endpoint_value *endpoint,
                                            const struct packet *packet)
{
	key->incarnation = endpoint->incarnation;
	key->id = packet->fragment_id;
	key->protocol = packet->fragment_protocol;
	key->direction = packet->flow.direction;
	__builtin_memcpy(key->source, packet->flow.source, 16);
	__builtin_memcpy(key->destination, packet->flow.destination, 16);
}

/* recall_fragment - give a later fragment the ports its first one had. */
static __always_inline int recall_fragment(struct packet *packet, const struct endpoint_value *endpoint, __u64 now)
{
	struct fragment_key key __attribute__((aligned(8))) = {};
	struct fragment_value *first;

	fragment_key_of(&key, endpoint, packet);
	first = fragments.lookup(&key);
	if (!first || is_over(now, first->seen_ns, FRAGMENTS_S))
		return -DROP_FRAG_NOT_FOUND;
	if (packet->fragment_offset < first->header_units)
		return -DROP_FRAG_OVERLAP;
	packet->flow.protocol = first->protocol;
	packet->flow.source_port = first->source_port;
	packet->flow.destination_port = first->destination_port;
	packet->icmp_type = first->icmp_type;
	packet->icmp_code = first->icmp_code;
	if (first->protocol == IPPROTO_ICMP || first->protocol == IPPROTO_ICMPV6)
		classify_icmp(packet, first->source_port ?: first->destination_port);
	return 0;
}

/* remember_fragment - let the later fragments of a datagram follow its first, which passed. */
static __always_inline int remember_fragment(const struct packet *packet, const struct endpoint_value *endpoint,
                                             __u64 now)
{
	struct fragment_key key __attribute__((aligned(8))) = {};
	struct fragment_value value = {
	    .seen_ns = now,
	    .source_port = packet->flow.source_port,
	    .destination_port = packet->flow.destination_port,
	    .icmp_type = packet->icmp_type,
	    .icmp_code = packet->icmp_code,
	    .protocol = packet->flow.protocol,
	};

	fragment_key_of(&key, endpoint, packet);
	value.header_units = (packet->transport + packet->transport_bytes - packet->fragment_start + 7) / 8;
	return fragments.update(&key, &value) ? -DROP_FRAG_NEEDED_STATE : 0;
}

/* peer_identity - the number of the class an address is in.
 * @peer: the address, with prefix_bits 128
 * @forwarded: the flow's opener is behind a forwarding hop, so a node's address is a masquerade
 *
 * A value that is replaced may be another address's at once (read_endpoint), so an exact one counts only while it is
 * still found after it was read. Prefixes are freed behind the packets that may be reading them.
 *
 * Return: IDENTITY_ANY, which no peer has, when it changes faster than it can be read.
 */
static __always_inline __u32 peer_identity(struct ipcache_cidr_key *peer, __u8 family, bool forwarded)
{
	struct ipcache_key *exact = (struct ipcache_key *)peer->address;
	struct ipcache_value *value, found;

#pragma clang loop unroll(disable)
	for (int attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
		value = ipcache.lookup(exact);
		if (!value)
			break;
		found = *value;
		barrier();
		if (ipcache.lookup(exact) == value)
			return forwarded && found.forwarded_identity ? found.forwarded_identity : found.identity;
	}
	if (value)
		return IDENTITY_ANY;
	value = ipcache_cidr.lookup(peer);
	if (!value)
		return family == FAMILY_IPV6 ? IDENTITY_WORLD_IPV6 : IDENTITY_WORLD_IPV4;
	return forwarded && value->forwarded_identity ? value->forwarded_identity : value->identity;
}

/* find_entry - the entry that a set has under a key, or NULL.
 * @verdict: marked where the set cannot be read
 */
static __always_inline const struct policy_value *find_entry(const struct policy_set_value *set, __u64 key,
                                                             struct layer_verdict *verdict)
{
	__u64 hash = (key ^ set->seed) * POLICY_HASH_FIRST;
	struct policy_values *line;
	__u32 number, index;

	hash = (hash ^ hash >> 32) * POLICY_HASH_SECOND;
#pragma unroll
	for (int other = 0; other <= 1; other++) {
		__u64 half = other ? (__u32)hash : hash >> 32;
		struct policy_bucket *bucket;

		index = set->first_line + (__u32)(half * set->buckets >> 32);
		bucket = policy.lookup(&index);
		if (!bucket) {
			verdict->unreadable = 1;
			return NULL;
		}
#pragma unroll
		for (int slot = 0; slot < POLICY_BUCKET_KEYS; slot++) {
			if (bucket->keys[slot] == key) {
				number = bucket->values[slot];
				goto found;
			}
		}
		if (!bucket->more)
			return NULL;
	}
	return NULL;
found:
	index = set->first_line + set->buckets + number / POLICY_LINE_VALUES;
	line = (struct policy_values *)policy.lookup(&index);
	if (!line) {
		verdict->unreadable = 1;
		return NULL;
	}
	return &line->values[number % POLICY_LINE_VALUES];
}

/* judge_layer - the entry of highest precedence decides; on a tie the longer prefix, then the specific identity.
 *
 * What a turn of the loop finds is kept in @decision, not in registers: there every combination would be a path of its
 * own to the verifier.
 */
static __always_inline void judge_layer(struct decision *decision, const struct policy_set_value *set, __u32 layer)
{
	const struct policy_layer_default *fallback = &set->layers[layer & 1];
	struct layer_verdict *verdict = &decision->layers[layer & 1];
	__u32 left = fallback->prefixes | fallback->any_prefixes; /* not tried yet */

	/* Longest prefix first, so that a later entry has to be of higher precedence to win. */
#pragma clang loop unroll(disable)
	for (__u32 step = 0; left && step <= POLICY_PREFIX_ANY; step++) {
		__u32 prefix = step == POLICY_PREFIX_ANY ? POLICY_PREFIX_ANY : POLICY_PREFIX_PORT - step;
		__u64 key =
		    1ULL << POLICY_KEY_USED | (__u64)layer << POLICY_KEY_LAYER | (__u64)prefix << POLICY_KEY_PREFIX;

		if (!(left >> prefix & 1))
			continue;
		left &= ~(1U << prefix);
		if (prefix != POLICY_PREFIX_ANY)
			key |= (__u64)decision->protocol << POLICY_KEY_PROTOCOL |
			       (__u64)(decision->port & (0xffff0000 >> prefix)) << POLICY_KEY_PORT;
#pragma unroll
		for (__u32 any = 0; any <= 1; any++) {
			const struct policy_value *entry;

			if (!((any ? fallback->any_prefixes : fallback->prefixes) >> prefix & 1))
				continue;
			entry = find_entry(set, any ? key | IDENTITY_ANY : key | decision->peer_identity, verdict);
			if (!entry || (verdict->matched && entry->precedence <= verdict->precedence))
				continue;
			verdict->matched = 1;
			verdict->precedence = entry->precedence;
			verdict->rule_id = entry->rule_id;
			verdict->verdict = entry->verdict;
			verdict->reason = entry->deny_reason;
			verdict->flags = entry->flags;
			verdict->match = match_of(any, prefix);
		}
	}
	if (!verdict->matched) {
		verdict->rule_id = fallback->rule_id;
		verdict->verdict = fallback->verdict;
		verdict->reason = fallback->deny_reason;
		verdict->flags = fallback->flags;
	}
}

/* judge_flow - what the endpoint's policy says about a flow, told by its forward tuple.
 * @policy_port: its destination port, or ICMP type
 * @forwarded: see peer_identity
 */
static __always_inline void judge_flow(struct decision *decision, const struct endpoint_value *endpoint,
                                       const struct conntrack_key *flow, __u8 family, __u16 policy_port, bool forwarded)
{
	struct policy_set_key set_key = {};
	struct policy_set_value *set;
	struct ipcache_cidr_key peer = {.prefix_bits = 128};
	struct layer_verdict *network = &decision->layers[LAYER_NETWORK], *mesh = &decision->layers[LAYER_MESH];

	__builtin_memset(decision, 0, sizeof(*decision));
	if (flow->direction == DIR_INGRESS) {
		__builtin_memcpy(peer.address, flow->source, 16);
		decision->peer_identity = peer_identity(&peer, family, forwarded);
		decision->localhost = decision->peer_identity == IDENTITY_HOST && !forwarded &&
		                      !(endpoint->flags & ENDPOINT_F_NO_LOCALHOST);
	} else {
		__builtin_memcpy(peer.address, flow->destination, 16);
		decision->peer_identity = peer_identity(&peer, family, false);
	}
	decision->set_id = endpoint->policy_set[(flow->direction * 2 + family) & 3];
	decision->protocol = flow->protocol;
	decision->port = policy_port;
	barrier(); /* for the verifier, as in track() */
	set_key.set_id = decision->set_id;
	set = policy_sets.lookup(&set_key);
	if (!set || !set_key.set_id) {
		decision->reason = DROP_ENDPOINT_NOT_READY;
		return;
	}
#pragma clang loop unroll(disable)
	for (__u32 layer = LAYER_NETWORK; layer <= LAYER_MESH; layer++)
		judge_layer(decision, set, layer);
	barrier();
	/* The node's own processes, kubelet's probes among them, are stopped by an entry only. */
	if (decision->localhost && !network->matched && network->verdict != POLICY_NEEDS_L7)
		network->verdict = POLICY_ALLOW;
	settle_layer(network, network->matched ? DROP_POLICY_DENY : DROP_POLICY);
	settle_layer(mesh, mesh->matched ? DROP_MESH_POLICY_DENY : DROP_MESH_POLICY);
	settle(decision);
}

static __always_inline __u32 rule_of(const struct decision *decision)
{
	return decision->layers[LAYER_NETWORK].rule_id ?: decision->layers[LAYER_MESH].rule_id;
}

/* renew - a flow was judged again and passes. */
static __always_inline void renew(struct conntrack_value *entry, const struct endpoint_value *endpoint,
                                  const struct decision *decision)
{
	entry->peer_identity = decision->peer_identity;
	entry->rule_id = rule_of(decision);
	entry->revision = endpoint->revision;
}

/* touch - a packet of the flow passed.
 * @reply: it came from the side that did not open the flow
 */
static __always_inline void touch(struct conntrack_value *entry, __u8 tcp_flags, __u64 now, bool reply)
{
	__u32 flags = entry->flags, fins = CONNTRACK_F_FIN_OPENER | CONNTRACK_F_FIN_ANSWERER;

	if (reply)
		flags |= CONNTRACK_F_REPLIED;
	if (tcp_flags & TCP_FIN)
		flags |= reply ? CONNTRACK_F_FIN_ANSWERER : CONNTRACK_F_FIN_OPENER;
	if (tcp_flags & TCP_RST || (flags & fins) == fins)
		flags |= CONNTRACK_F_CLOSING;
	/* Written only when it changes, which spares other CPUs the cache line. */
	if (entry->seen_ns != now)
		entry->seen_ns = now;
	if (entry->flags != flags)
		entry->flags = flags;
}

/* opens_connection, answers_connection - what only TCP tells. */
static __always_inline bool opens_connection(const struct packet *packet)
{
	return packet->flow.protocol == IPPROTO_TCP && !packet->quoted &&
	       (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool answers_connection(const struct packet *packet)
{
	return packet->flow.protocol == IPPROTO_TCP && !packet->quoted &&
	       (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK);
}

/* policy_port - what stands for the destination port of a flow in policy.
 * @own: the flow is opened in the packet's own direction
 */
static __always_inline __u16 policy_port(const struct packet *packet, const struct conntrack_key *flow, bool own)
{
	if (flow->protocol != IPPROTO_ICMP && flow->protocol != IPPROTO_ICMPV6)
		return bpf_ntohs(flow->destination_port);
	if (own && packet->kind != KIND_FLOW)
		return packet->icmp_type;
	return flow->protocol == IPPROTO_ICMP ? ICMP_ECHO : ICMPV6_ECHO_REQUEST;
}

/* live - the entry, unless it has been silent for too long. */
static __always_inline bool live(const struct conntrack_value *entry, __u8 protocol, __u64 now)
{
	return !is_over(now, entry->seen_ns, flow_lifetime_s(protocol, entry->flags));
}

/* find_flow - pass a packet of a flow that was judged under the endpoint's revision; else say what has to be judged.
 *
 * Return: PASS, 0 to go on, or a negative enum drop_reason.
 */
static __always_inline int find_flow(const struct endpoint_value *endpoint, const struct packet *packet,
                                     struct verdict *verdict, void *flows, __u64 now)
{
	struct conntrack_key reverse __attribute__((aligned(8))) = {};
	bool opens = opens_connection(packet), tcp = packet->flow.protocol == IPPROTO_TCP;
	/* Only the order of the two lookups; most packets need one then. */
	bool replies = !is_client_port(packet->flow.source_port) && is_client_port(packet->flow.destination_port);

	/* Without an entry a reply does not show how its flow came in: the lesser claim holds. */
	verdict->other_forwarded = 1;
	for (int turn = 0; turn < 2; turn++) {
		struct conntrack_value *entry;
		bool other = turn != replies;

		if (other ? opens || packet->kind == KIND_STATELESS : packet->kind != KIND_FLOW)
			continue;
		if (other)
			reverse_flow(&packet->flow, &reverse);
		entry = bpf_map_lookup_elem(flows, other ? &reverse : (void *)&packet->flow);
		if (!entry || !live(entry, packet->flow.protocol, now))
			continue;
		if (!opens && entry->revision == endpoint->revision) {
			if (packet->quoted)
				return PASS;
			if (other && !(entry->flags & CONNTRACK_F_REPLIED)) {
				verdict->event = EVENT_TRACE;
				verdict->is_reply = 1;
				verdict->decision.peer_identity = entry->peer_identity;
				verdict->decision.layers[LAYER_NETWORK].rule_id = entry->rule_id;
			}
			touch(entry, packet->tcp_flags, now, other);
			return PASS;
		}
		if (other) {
			verdict->has_other = 1;
			verdict->other_forwarded = entry->flags & CONNTRACK_F_FORWARDED ? 1 : 0;
		} else {
			verdict->has_own = 1;
			verdict->own_forwarded = entry->flags & CONNTRACK_F_FORWARDED ? 1 : 0;
		}
	}
	if (packet->quoted && !verdict->has_own && !verdict->has_other)
		return -DROP_ICMP_ERROR_UNRELATED;
	verdict->judge_other = verdict->has_other || (tcp && !opens && !verdict->has_own);
	verdict->judge_own = verdict->has_own || (!packet->quoted && (!tcp || !verdict->has_other));
	return 0;
}

/* choose_opener - TCP without an entry and without a SYN: did the flow come from here, from there, or from neither?
 *
 * Return: 1 from the packet's sender, 2 from its receiver, 0 unknown or not allowed.
 */
static __always_inline int choose_opener(const struct packet *packet, const struct verdict *verdict)
{
	bool own_client = is_client_port(packet->flow.source_port);
	bool answers = answers_connection(packet);

	if (!verdict->own_allowed)
		return 0;
	if (!verdict->other_allowed)
		return own_client && !answers;
	return answers || (!own_client && is_client_port(packet->flow.destination_port)) ? 2 : 1;
}

/* conclude - act on what policy says: renew, drop or open a flow.
 *
 * Return: PASS, or a negative enum drop_reason.
 */
static __always_inline int conclude(struct __sk_buff *skb, const struct endpoint_value *endpoint, struct packet *packet,
                                    struct verdict *verdict, void *flows, __u64 now)
{
	struct conntrack_key flow __attribute__((aligned(8))) = {};
	struct conntrack_value *entry, value = {};
	bool opens = opens_connection(packet);
	bool known = verdict->has_own || verdict->has_other;
	bool by_other = verdict->other_allowed && (!verdict->own_allowed || (verdict->has_other && !verdict->has_own));
	bool allowed = verdict->own_allowed || verdict->other_allowed;

	if (packet->flow.protocol == IPPROTO_TCP && !opens && !known) {
		int opener = choose_opener(packet, verdict);

		allowed = opener != 0;
		by_other = opener == 2 || (!opener && verdict->own_allowed);
	}
	if (!verdict->judge_own || by_other)
		verdict->decision = verdict->other_decision;
	if (packet->quoted)
		return allowed ? PASS : -DROP_ICMP_ERROR_UNRELATED;

	reverse_flow(&packet->flow, &flow);
	if (!allowed) {
		verdict->rejudged = known && !opens;
		if (verdict->has_own) {
			entry = bpf_map_lookup_elem(flows, &packet->flow);
			if (entry) {
				entry->seen_ns = now;
				entry->revision = ~endpoint->revision;
			}
		}
		if (verdict->has_other) {
			entry = bpf_map_lookup_elem(flows, &flow);
			if (entry)
				entry->seen_ns = now;
		}
		return -(int)(verdict->decision.reason ?: DROP_POLICY);
	}

	if (!by_other)
		flow = packet->flow;
	if (!opens && (by_other ? verdict->has_other : verdict->has_own)) {
		entry = bpf_map_lookup_elem(flows, &flow);
		if (entry) {
			renew(entry, endpoint, &verdict->decision);
			touch(entry, packet->tcp_flags, now, by_other);
			return PASS;
		}
	}
	verdict->event = EVENT_VERDICT;
	/* Beside a flow that is denied now a packet of the pod's own may pass, but must not open the way back for it. */
	if (packet->kind != KIND_FLOW || verdict->has_other)
		return PASS;
	touch(&value, packet->tcp_flags, now, by_other);

	if (flow.direction == DIR_INGRESS && (by_other || skb->ingress_ifindex))
		value.flags |= CONNTRACK_F_FORWARDED;
	renew(&value, endpoint, &verdict->decision);
	/* When it cannot be written the packet still passes: policy allows it. Its reply would be judged by itself. */
	bpf_map_update_elem(flows, &flow, &value, BPF_ANY);
	return PASS;
}

/* track - judge a packet that find_flow() did not pass.
 *
 * A packet may belong to a flow that was opened in its own direction ("own"), or to one opened the other way, as a reply
 * ("other"). An entry judged under an older revision is judged again by its forward tuple; one that is denied now stays
 * as it is, so that every further packet is judged again and none can pass for a new flow.
 *
 * TCP without an entry and without a SYN (the entry was lost, or the connection is older than this program) does not say
 * who opened it. It passes when policy allows the flow in the packet's own direction, and either the other way too, or the
 * packet comes from a client's port: so a connection that ingress denies does not come back as one its server opened.
 * Nothing passes as a reply without an entry: whoever may send chooses the ports, and with them the flow it claims to
 * answer. The side that may open the flow brings it back with its next packet.
 *
 * For an ICMP error @packet holds what it quotes: it passes where that would, and leaves every entry as it is.
 *
 * Return: PASS, or a negative enum drop_reason.
 */
static __always_inline int track(struct __sk_buff *skb, struct endpoint_value *endpoint, struct packet *packet,
                                 struct verdict *verdict, void *flows, __u64 now)
{
	struct conntrack_key flow __attribute__((aligned(8))) = {};

	reverse_flow(&packet->flow, &flow);
	/* For the verifier: from here on what was found is read back from memory, not known path by path. */
	barrier();

	/* A loop of two, so that the code of judge_flow is there once; first "other", whose tuple `flow` holds. */
#pragma clang loop unroll(disable)
	for (__u32 turn = 0; turn < 2; turn++) {
		bool forwarded = verdict->other_forwarded;

		if (turn) {
			flow = packet->flow;
			forwarded = verdict->own_forwarded;
			if (!packet->quoted)
				forwarded |= skb->ingress_ifindex != 0;
		}
		if (!(turn ? verdict->judge_own : verdict->judge_other))
			continue;
		judge_flow(&verdict->decision, endpoint, &flow, packet->family, policy_port(packet, &flow, turn),
		           forwarded);
		if (turn) {
			verdict->own_allowed = !verdict->decision.reason;
		} else {
			verdict->other_allowed = !verdict->decision.reason;
			verdict->other_decision = verdict->decision;
		}
	}
	barrier();
	return conclude(skb, endpoint, packet, verdict, flows, now);
}

/* read_quoted - put the packet that an ICMP error quotes in the place of the error itself.
 *
 * Return: 0, or a negative enum drop_reason.
 */
static __always_inline int read_quoted(struct __sk_buff *skb, struct packet *packet)
{
	__u32 offset = packet->transport + ICMP_HEADER_BYTES;
	int code;

	packet->quoted = 1;
	packet->kind = KIND_FLOW;
	packet->outer_icmp_type = packet->icmp_type;
	packet->outer_icmp_code = packet->icmp_code;
	/* What it quotes went the other way. */
	packet->flow.direction = !packet->flow.direction;
	packet->fragment_start = 0;
	if (packet->family == FAMILY_IPV6)
		code = parse_ipv6(skb, packet, offset, packet->end);
	else
		code = parse_ipv4(skb, packet, offset, packet->end);
	if (code || packet->fragment == FRAGMENT_LATER || parse_transport(skb, packet))
		return -DROP_ICMP_ERROR_UNRELATED;
	return packet->kind == KIND_STATELESS || packet->kind == KIND_ICMP_ERROR ? -DROP_ICMP_ERROR_UNRELATED : 0;
}

/* show_outer - let an event tell the ICMP error, not what it quotes. */
static __always_inline void show_outer(struct __sk_buff *skb, struct packet *packet, __u8 direction)
{
	__be32 v4[2] = {};

	packet->flow.direction = direction;
	packet->flow.source_port = 0;
	packet->flow.destination_port = 0;
	packet->icmp_type = packet->outer_icmp_type;
	packet->icmp_code = packet->outer_icmp_code;
	/* The addresses are read once more: few errors are dropped, and none else needs room for them. */
	if (packet->family == FAMILY_IPV6) {
		packet->flow.protocol = IPPROTO_ICMPV6;
		bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), packet->flow.source, 16);
		bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, daddr), packet->flow.destination, 16);
		return;
	}
	packet->flow.protocol = IPPROTO_ICMP;
	bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), v4, sizeof(v4));
	map_v4(packet->flow.source, v4[0]);
	map_v4(packet->flow.destination, v4[1]);
}

/* pass - let a packet pass; a first fragment is remembered for those that follow.
 *
 * Return: PASS, or a negative enum drop_reason.
 */
static __always_inline int pass(const struct packet *packet, const struct endpoint_value *endpoint, __u64 now)
{
	int code = 0;

	if (packet->fragment == FRAGMENT_FIRST && !packet->quoted)
		code = remember_fragment(packet, endpoint, now);
	return code ?: PASS;
}

/* receive - judge one packet.
 *
 * Return: PASS, or a negative enum drop_reason.
 */
static __always_inline int receive(struct __sk_buff *skb, struct endpoint_value *endpoint, struct packet *packet,
                                   struct verdict *verdict, __u8 direction, __u64 now)
{
	bool own_source;
	__u32 flow_table;
	void *flows;
	int code;

	packet->family = FAMILY_NONE;
	packet->flow.direction = direction;
	/* Two reads of a few bytes: the header as a whole has no alignment, and would be copied byte by byte. */
	if (read_bytes(skb, offsetof(struct ethhdr, h_proto), &packet->ethertype) || read_bytes(skb, 0, &packet->group))
		return -DROP_INVALID_PACKET;
	packet->group &= 1;
	if (!endpoint || !(endpoint->flags & ENDPOINT_F_READY))
		return -DROP_ENDPOINT_NOT_READY;

	/* The device may have taken the tag out of the frame. */
	if (skb->vlan_present || packet->ethertype == bpf_htons(ETH_P_8021Q) ||
	    packet->ethertype == bpf_htons(ETH_P_8021AD))
		return -DROP_VLAN;
	if (packet->ethertype == bpf_htons(ETH_P_ARP))
		return check_arp(skb, endpoint, direction);
	if (packet->ethertype == bpf_htons(ETH_P_IP))
		code = parse_ipv4(skb, packet, ETH_HLEN, skb->len);
	else if (packet->ethertype == bpf_htons(ETH_P_IPV6))
		code = parse_ipv6(skb, packet, ETH_HLEN, skb->len);
	else
		return -DROP_UNSUPPORTED_L2;
	if (code)
		return code;

	if (packet->fragment == FRAGMENT_LATER)
		code = recall_fragment(packet, endpoint, now);
	else
		code = parse_transport(skb, packet);

	/* An open flow passes before its addresses are looked up: they were when it was opened, by this incarnation. */
	flow_table = endpoint->flow_table;
	flows = conntrack.lookup(&flow_table);
	if (!code && flows && packet->kind != KIND_ICMP_ERROR) {
		code = find_flow(endpoint, packet, verdict, flows, now);
		if (code > 0)
			return pass(packet, endpoint, now);
	}

	/* Whom a packet pretends to be is told before what is wrong with the rest of it. */
	own_source = direction == DIR_INGRESS || is_own(skb, endpoint, packet->flow.source);
	if (!code && packet->flow.protocol == IPPROTO_ICMPV6) {
		code = direction == DIR_EGRESS ? check_neighbour_from_pod(skb, endpoint, packet, own_source)
		                               : check_neighbour_to_pod(packet);
		if (code)
			return code;
	}
	if (!own_source)
		return -DROP_INVALID_SOURCE_IP;
	if (direction == DIR_INGRESS && !is_group(packet) && !is_own(skb, endpoint, packet->flow.destination))
		return -DROP_UNKNOWN_L3_TARGET;
	if (code)
		return code;
	if (!flows)
		return -DROP_ENDPOINT_NOT_READY;

	if (packet->kind == KIND_ICMP_ERROR) {
		code = packet->fragment ? -DROP_ICMP_ERROR_UNRELATED : read_quoted(skb, packet);
		if (!code)
			code = find_flow(endpoint, packet, verdict, flows, now);
		if (code)
			return code;
	}
	code = track(skb, endpoint, packet, verdict, flows, now);
	return code < 0 ? code : pass(packet, endpoint, now);
}

static __always_inline void count(__u8 reason, __u8 direction, __u32 bytes)
{
	struct metric_key key = {.reason = reason, .direction = direction};
	struct metric_value *value, zero = {};
	__u32 index = direction;

	if (!reason) {
		value = forwarded.lookup(&index); /* half the price of a hash, and most packets pass */
		/* Else clang joins this call with the one below, and a call that serves two maps cannot be inlined. */
		barrier();
	} else {
		value = metrics.lookup(&key);
		if (!value) {
			metrics.insert(&key, &zero); /* another CPU may have been faster: then its entry serves */
			value = metrics.lookup(&key);
		}
	}
	if (!value)
		return;
	value->packets++;
	value->bytes += bytes;
}

/* plain_flow - the tuple of a packet as nearly all are: IP without options, extension headers and fragments, TCP or UDP, all
 * in the linear buffer, whole; TCP without SYN.
 *
 * What it takes, parse_ipv4 or parse_ipv6 and parse_transport take as well, and read the same of it.
 *
 * Return: false for any other packet.
 */
static __always_inline bool plain_flow(struct __sk_buff *skb, struct conntrack_key *flow, __u8 *tcp_flags)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 *ethertype = data + offsetof(struct ethhdr, h_proto);
	struct transport_head *head;
	__u32 *words = (__u32 *)flow, length, at;
	__u8 protocol;

	if (data + PLAIN_BYTES > end || skb->vlan_present)
		return false;
	if (*ethertype == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;

		length = bpf_ntohs(ip->tot_len);
		if (*(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS) ||
		    length < sizeof(*ip) || ETH_HLEN + length > skb->len)
			return false;
		words[0] = words[1] = words[4] = words[5] = 0;
		words[2] = words[6] = bpf_htonl(0xffff);
		words[3] = ip->saddr;
		words[7] = ip->daddr;
		protocol = ip->protocol;
		length -= sizeof(*ip);
		at = ETH_HLEN + sizeof(*ip);
	} else if (*ethertype == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if (data + PLAIN_BYTES + sizeof(struct ipv6hdr) - sizeof(struct iphdr) > end)
			return false;
		length = bpf_ntohs(ip->payload_len);
		if (ip->version != 6 || ETH_HLEN + sizeof(*ip) + length > skb->len)
			return false;
		__builtin_memcpy(flow->source, &ip->saddr, 16);
		__builtin_memcpy(flow->destination, &ip->daddr, 16);
		if (is_v4_mapped(flow->source) || is_v4_mapped(flow->destination))
			return false;
		protocol = ip->nexthdr;
		at = ETH_HLEN + sizeof(*ip);
	} else {
		return false;
	}
	head = data + at;
	if (protocol == IPPROTO_TCP) {
		struct tcp_flags *tcp = data + at + 12;
		__u32 header_bytes = (tcp->offset >> 4) * 4;

		if (header_bytes < TCP_HEADER_BYTES || header_bytes > length || tcp->flags & TCP_SYN)
			return false;
		*tcp_flags = tcp->flags;
	} else if (protocol == IPPROTO_UDP) {
		__u32 datagram = bpf_ntohs(head->third);

		if (datagram < UDP_HEADER_BYTES || datagram > length)
			return false;
	} else {
		return false;
	}
	flow->source_port = head->source_port;
	flow->destination_port = head->destination_port;
	flow->protocol = protocol;
	return true;
}

/* pass_open_flow - whether a packet is one of nearly all: of a flow judged under the endpoint's revision, and worth no event.
 * What find_flow() would do with it, with nothing copied and nothing else looked at.
 * @found: the endpoint's entry, of which nothing is used unless it was the interface's after it was read (read_endpoint)
 */
static __always_inline bool pass_open_flow(struct __sk_buff *skb, const struct endpoint_value *found, __u8 direction,
                                           __u64 now)
{
	const volatile struct endpoint_value *endpoint = found;
	struct conntrack_key own __attribute__((aligned(4))) = {.direction = direction};
	struct conntrack_key reverse __attribute__((aligned(4))) = {};
	struct conntrack_value *entry;
	__u32 flow_table = endpoint->flow_table, revision = endpoint->revision, flags = endpoint->flags;
	__u8 tcp_flags = 0;
	bool replies;
	void *flows;

	if (endpoint->ifindex != skb->ifindex || endpoint->ifindex_again != skb->ifindex ||
	    !(flags & ENDPOINT_F_READY) || !plain_flow(skb, &own, &tcp_flags))
		return false;
	flows = conntrack.lookup(&flow_table);
	if (!flows)
		return false;
	replies = !is_client_port(own.source_port) && is_client_port(own.destination_port);
	if (replies) {
		reverse_flow(&own, &reverse);
		entry = bpf_map_lookup_elem(flows, &reverse);
	} else {
		entry = bpf_map_lookup_elem(flows, &own);
	}
	if (!entry || entry->revision != revision || !live(entry, own.protocol, now) ||
	    (replies && !(entry->flags & CONNTRACK_F_REPLIED)))
		return false;
	touch(entry, tcp_flags, now, replies);
	return true;
}

/* clock - the time, at most a tick old: reading the tick costs nothing, reading the clock as much as a lookup. */
static __always_inline __u64 clock(struct scratch *scratch)
{
	__u64 tick = bpf_jiffies64();

	if (scratch->jiffies != tick) {
		scratch->jiffies = tick;
		scratch->now_ns = bpf_ktime_get_ns();
	}
	return scratch->now_ns;
}

/* tell - send one event, or count it as lost. */
static __always_inline void tell(struct __sk_buff *skb, const struct endpoint_value *endpoint,
                                 const struct packet *packet, const struct verdict *verdict, __u8 type, __u8 reason,
                                 __u64 now)
{
	const struct decision *decision = &verdict->decision;
	__u32 zero = 0, most = type == EVENT_DROP ? EVENTS_PER_WINDOW : EVENTS_PER_WINDOW * 3 / 4;
	struct event_limiter *limiter = event_limiter.lookup(&zero);
	struct flow_event *event;
	struct bpf_sock *socket;

	if (!limiter)
		return;
	if (now - limiter->window_start_ns >= EVENT_WINDOW_NS) {
		limiter->window_start_ns = now;
		limiter->sent = 0;
	}
	if (limiter->sent >= most) {
		limiter->lost++;
		return;
	}
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event) {
		limiter->lost++;
		return;
	}
	limiter->sent++;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->lost = limiter->lost;
	limiter->lost = 0;
	event->ifindex = skb->ifindex;
	event->packet_bytes = skb->len;
	event->uid = NO_UID;
	if (packet->flow.direction == DIR_EGRESS) {
		socket = skb->sk;
		/* that of a connection still being made stands for its listener */
		if (socket && (socket->state == BPF_TCP_NEW_SYN_RECV || bpf_sk_fullsock(socket)))
			event->uid = bpf_get_socket_uid(skb);
		event->cgroup_id = bpf_skb_cgroup_id(skb);
	}
	if (endpoint) {
		event->endpoint_id = endpoint->id;
		if (packet->flow.direction == DIR_EGRESS) {
			event->source_identity = endpoint->identity;
			event->destination_identity = decision->peer_identity;
		} else {
			event->source_identity = decision->peer_identity;
			event->destination_identity = endpoint->identity;
		}
	}
	event->network_rule_id = decision->layers[LAYER_NETWORK].rule_id;
	event->mesh_rule_id = decision->layers[LAYER_MESH].rule_id;
	event->network_verdict = decision->layers[LAYER_NETWORK].verdict;
	event->mesh_verdict = decision->layers[LAYER_MESH].verdict;
	event->match_type = decision->match;
	__builtin_memcpy(event->source, packet->flow.source, 16);
	__builtin_memcpy(event->destination, packet->flow.destination, 16);
	event->source_port = packet->flow.source_port;
	event->destination_port = packet->flow.destination_port;
	event->type = type;
	event->reason = decision->audit && type != EVENT_DROP ? decision->audit_reason : reason;
	event->direction = packet->flow.direction;
	event->family = packet->family;
	event->protocol = packet->flow.protocol;
	event->tcp_flags = packet->tcp_flags;
	event->icmp_type = packet->icmp_type;
	event->icmp_code = packet->icmp_code;
	event->is_reply = type == EVENT_DROP ? REPLY_UNKNOWN : verdict->is_reply;
	event->ethertype = packet->ethertype;
	event->audit = decision->audit;
	event->rejudged = verdict->rejudged;
	events.ringbuf_submit(event, 0);
}

/* read_endpoint - copy the endpoint's entry, whole and of one moment.
 *
 * The memory of a value that user space replaces goes at once to the next one it writes (hash maps from kernel 6.1 on),
 * so what a lookup found can become another pod's while it is read. A copy counts only when the key, which stands first
 * and last in the value, is still there in both places afterwards; both, whichever end the kernel copies from. Loads stay
 * in order on x86; elsewhere the window is a few instructions.
 * @found: what a lookup has found, or NULL
 *
 * Return: whether there is one.
 */
static __always_inline bool read_endpoint(struct endpoint_value *copy, struct endpoint_value *found, __u32 ifindex)
{
	struct endpoint_key key = {.ifindex = ifindex};

#pragma clang loop unroll(disable)
	for (int attempt = 0; found && attempt < READ_ATTEMPTS; attempt++) {
		const volatile struct endpoint_value *marks = found;

		*copy = *found;
		barrier();
		if (marks->ifindex == ifindex && marks->ifindex_again == ifindex)
			return true;
		found = endpoints.lookup(&key);
	}
	return false;
}

/* finish - the one way out: count the packet, tell it where it is worth telling, answer the kernel. */
static __always_inline int finish(struct __sk_buff *skb, __u8 direction)
{
	__u32 zero = 0;
	struct scratch *scratch = scratches.lookup(&zero);
	struct endpoint_key endpoint_key = {.ifindex = skb->ifindex};
	struct endpoint_value *endpoint;
	struct packet *packet;
	struct verdict *verdict;
	__u64 now;
	__u8 reason;
	int code;

	if (!scratch) /* cannot be: an array has all its entries */
		return TC_ACT_SHOT;
	now = clock(scratch);
	endpoint = endpoints.lookup(&endpoint_key);
	if (endpoint && pass_open_flow(skb, endpoint, direction, now)) {
		count(DROP_NONE, direction, skb->len);
		return TC_ACT_UNSPEC;
	}
	endpoint = read_endpoint(&scratch->endpoint, endpoint, skb->ifindex) ? &scratch->endpoint : NULL;
	packet = &scratch->packet;
	verdict = &scratch->verdict;
	__builtin_memset(packet, 0, offsetof(struct packet, buffer));
	__builtin_memset(verdict, 0, offsetof(struct verdict, other_decision));
	code = receive(skb, endpoint, packet, verdict, direction, now);
	reason = code == PASS ? DROP_NONE : code < 0 ? -code : DROP_INVALID_PACKET;
	if (packet->quoted)
		show_outer(skb, packet, direction);
	count(reason, direction, skb->len);
	if (reason)
		tell(skb, endpoint, packet, verdict, EVENT_DROP, reason, now);
	else if (verdict->event)
		tell(skb, endpoint, packet, verdict, verdict->event, DROP_NONE, now);
	return reason ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

int from_pod(struct __sk_buff *skb)
{
	return finish(skb, DIR_EGRESS);
}

int to_pod(struct __sk_buff *skb)
{
	return finish(skb, DIR_INGRESS);
}
