/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Verdicts as values: what an entry or a default says, and how the two layers add up.
 */
#ifndef MESHBRIDGE_POLICY_H
#define MESHBRIDGE_POLICY_H

/* What one layer says about a flow. Zero denies: a verdict is earned. */
struct layer_verdict {
	__u32 rule_id;
	__u32 precedence; /* of the entry */
	__u8 verdict;     /* enum policy_verdict */
	__u8 reason;      /* enum drop_reason; 0: passes */
	__u8 match;       /* enum match_type */
	__u8 audit;       /* 1: would not pass, but is only reported */
	__u8 matched;     /* 1: an entry decided, not the default */
	__u8 flags;       /* enum policy_flags */
	__u8 unreadable;  /* 1: the set names lines that do not exist */
	__u8 pad;
};

/* What the endpoint's policy says about a flow. */
struct decision {
	struct layer_verdict layers[2]; /* index = enum policy_layer */
	__u32 peer_identity;
	__u32 set_id;
	__u16 port; /* what stands for the destination port in policy */
	__u8 protocol;
	__u8 localhost; /* the peer is a process of this node */
	__u8 reason;    /* enum drop_reason; 0: passes */
	__u8 match;
	__u8 audit;
	__u8 audit_reason;
};

/* What is known about one packet on its way out, beside the packet itself. A packet may belong to a flow opened in its
 * own direction ("own"), or to one opened the other way, as a reply ("other"). */
struct verdict {
	struct decision decision;
	__u8 event; /* enum event_type for a packet that passes, 0 for none */
	__u8 is_reply;
	__u8 rejudged;
	__u8 has_own; /* a live entry, judged under an older revision */
	__u8 has_other;
	__u8 own_forwarded; /* how its opener's packets came in, see CONNTRACK_F_FORWARDED */
	__u8 other_forwarded;
	__u8 judge_own;
	__u8 judge_other;
	__u8 own_allowed;
	__u8 other_allowed;
	__u8 pad[5];
	struct decision other_decision; /* last, since it need not be zero */
} __attribute__((aligned(8)));

/* match_of - Cilium's name for how specific an entry is. */
static __always_inline __u8 match_of(bool any_peer, __u32 prefix)
{
	if (prefix == POLICY_PREFIX_ANY)
		return any_peer ? MATCH_ALL : MATCH_L3_ONLY;
	if (prefix == POLICY_PREFIX_PROTO)
		return any_peer ? MATCH_PROTO_ONLY : MATCH_L3_PROTO;
	return any_peer ? MATCH_L4_ONLY : MATCH_L3_L4;
}

/* settle_layer - give a layer's verdict its reason; whatever is not known to pass is denied.
 * @fallback: the reason where entry or default name none
 */
static __always_inline void settle_layer(struct layer_verdict *layer, __u8 fallback)
{
	if (layer->unreadable) {
		layer->verdict = POLICY_DENY;
		layer->reason = DROP_ENDPOINT_NOT_READY;
		return;
	}
	if (layer->verdict == POLICY_ALLOW || layer->verdict == POLICY_NEEDS_L7) {
		layer->reason = 0;
		return;
	}
	layer->verdict = POLICY_DENY;
	layer->reason = layer->reason ?: fallback;
	layer->audit = layer->flags & POLICY_F_AUDIT ? 1 : 0;
}

/* settle - a flow passes when both layers let it; the network layer's reason comes first. */
static __always_inline void settle(struct decision *decision)
{
	struct layer_verdict *network = &decision->layers[LAYER_NETWORK], *mesh = &decision->layers[LAYER_MESH];

	decision->match = network->match ?: mesh->match;
	if (network->reason && !network->audit) {
		decision->reason = network->reason;
		decision->match = network->match;
	} else if (mesh->reason && !mesh->audit) {
		decision->reason = mesh->reason;
		decision->match = mesh->match;
	} else if (network->audit || mesh->audit) {
		decision->audit = 1;
		decision->audit_reason = network->audit ? network->reason : mesh->reason;
		decision->match = network->audit ? network->match : mesh->match;
	}
}

#endif
