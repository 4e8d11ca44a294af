/* SPDX-License-Identifier: GPL-2.0-only */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>

#include "abi.h"
#include "maps.h"

static __always_inline int judge(struct __sk_buff *skb, __u8 direction)
{
	struct endpoint_key key = {.ifindex = skb->ifindex};
	struct endpoint_value *endpoint = endpoints.lookup(&key);

	return endpoint && (endpoint->flags & ENDPOINT_F_READY) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

int from_pod(struct __sk_buff *skb)
{
	return judge(skb, DIR_EGRESS);
}

int to_pod(struct __sk_buff *skb)
{
	return judge(skb, DIR_INGRESS);
}
