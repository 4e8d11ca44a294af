/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The maps of abi.h, declared once. Sizes are defaults: Python creates the maps and may choose others (MapSizes).
 * Maps that only user space fills are not preallocated: their memory follows their content, but for 16 bytes per entry
 * of their size. Maps that the programs fill are preallocated, so that no packet depends on an allocation.
 */
#ifndef MESHBRIDGE_MAPS_H
#define MESHBRIDGE_MAPS_H

BPF_F_TABLE("hash", struct endpoint_key, struct endpoint_value, endpoints, 4096, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct endpoint_address_key, struct endpoint_address_value, endpoint_addresses, 16384,
            BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct ipcache_key, struct ipcache_value, ipcache, 262144, BPF_F_NO_PREALLOC);
BPF_LPM_TRIE(ipcache_cidr, struct ipcache_cidr_key, struct ipcache_value, 65536);
BPF_TABLE("array", u32, struct policy_bucket, policy, 262144); /* a million entries */
BPF_F_TABLE("hash", struct policy_set_key, struct policy_set_value, policy_sets, 65536, BPF_F_NO_PREALLOC);

/* The inner map is a template: every endpoint incarnation has one of its own. An array, so that finding it is no call. */
BPF_TABLE("lru_hash", struct conntrack_key, struct conntrack_value, conntrack_inner, 4096);
BPF_ARRAY_OF_MAPS(conntrack, "conntrack_inner", 4096);

BPF_TABLE("lru_hash", struct fragment_key, struct fragment_value, fragments, 8192);
BPF_TABLE("percpu_hash", struct metric_key, struct metric_value, metrics, 512);
BPF_TABLE("percpu_array", u32, struct metric_value, forwarded, 2);
BPF_TABLE("percpu_array", u32, struct event_limiter, event_limiter, 1);
BPF_RINGBUF_OUTPUT(events, 256);

/* Working memory of one run, which the stack has no room for. A run is never interrupted by another on its CPU: both
 * hooks have bottom halves disabled. Belongs to the programs, so it is neither pinned nor in abi.h. */
struct scratch {
	__u64 now_ns; /* the time, as of `jiffies` */
	__u64 jiffies;
	struct endpoint_value endpoint;
	struct packet packet;
	struct verdict verdict;
};
BPF_TABLE("percpu_array", u32, struct scratch, scratches, 1);

#endif
