/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What the kernel programs and Python share: map keys, map values, events, enums.
 * meshbridge/abi.py reads this file and builds its ctypes classes and enums from it, so nothing here is typed twice.
 *
 * Rules: fixed-width fields only; explicit padding named pad*; enum values are written out and only ever appended;
 * fields in network byte order are __be16/__be32; addresses are __u8[16], an IPv4 address in its v4-mapped form
 * (::ffff:a.b.c.d), so that one key serves both families; every other field is in host byte order.
 */
#ifndef MESHBRIDGE_ABI_H
#define MESHBRIDGE_ABI_H

#define ABI_VERSION 4

enum ip_family {
	FAMILY_IPV4 = 0,
	FAMILY_IPV6 = 1,
};

/* Seen from the endpoint: ingress is to the pod (tc egress on the host side of its veth). */
enum direction {
	DIR_INGRESS = 0,
	DIR_EGRESS = 1,
};

/* Which family of policies an entry or a drop comes from; a packet has to pass both. */
enum policy_layer {
	LAYER_NETWORK = 0,
	LAYER_MESH = 1,
};

enum policy_verdict {
	POLICY_NONE = 0, /* no entry, or a layer without isolation */
	POLICY_ALLOW = 1,
	POLICY_DENY = 2,
	POLICY_NEEDS_L7 = 3, /* passes in the kernel because Envoy judges it; never written where Envoy does not */
};

/* Where a layer's entry does not decide: what happens to a packet no entry matched. */
enum policy_flags {
	POLICY_F_AUDIT = 1, /* a deny that is reported, not enforced */
};

enum event_type {
	EVENT_DROP = 1,
	EVENT_VERDICT = 2, /* the policy verdict on a new flow */
	EVENT_TRACE = 3,   /* first reply of a flow, forwarded */
	EVENT_LOST = 4,    /* no packet: only the lost counter is meaningful */
};

/* How specific the entry that decided was; Cilium's numbers and names. */
enum match_type {
	MATCH_NONE = 0,
	MATCH_L3_ONLY = 1,
	MATCH_L3_L4 = 2,
	MATCH_L4_ONLY = 3,
	MATCH_ALL = 4,
	MATCH_L3_PROTO = 5,
	MATCH_PROTO_ONLY = 6,
};

/* Numbers up to 219 are Cilium's where the meaning is Cilium's; ours start at 220. */
enum drop_reason {
	DROP_NONE = 0,
	DROP_INVALID_SOURCE_IP = 132,
	DROP_POLICY = 133,            /* isolated, and no entry allows it */
	DROP_INVALID_PACKET = 134,    /* cut short or self-contradictory */
	DROP_UNKNOWN_L4 = 142,        /* ICMP in the wrong address family */
	DROP_UNKNOWN_L3_TARGET = 150, /* to-pod: the destination is not an address of this pod */
	DROP_FRAG_NEEDED_STATE = 157, /* the fragment table could not be read or written */
	DROP_UNSUPPORTED_L2 = 166,    /* an ethertype that is neither IP nor ARP */
	DROP_FRAG_NOT_FOUND = 175,    /* a later fragment without its first */
	DROP_FORBIDDEN_ICMP6 = 176,   /* a router advertisement or foreign neighbour discovery from a pod */
	DROP_POLICY_DENY = 181,
	DROP_VLAN = 182,
	DROP_ENDPOINT_NOT_READY = 203, /* attached, but its policy is not known yet */
	DROP_MESH_POLICY = 220,        /* a mesh ALLOW policy exists and no rule of any allows it */
	DROP_MESH_POLICY_DENY = 221,
	DROP_NO_L7_JUDGE = 222, /* the policy needs L7 and nobody judges L7 on this port */
	DROP_SERVICE_BACKENDS_DIFFER = 223,
	DROP_ICMP_ERROR_UNRELATED = 224, /* an ICMP error that quotes no live flow of the endpoint */
	DROP_FRAG_TINY = 225,            /* a first fragment too short to carry its ports */
	DROP_FRAG_OVERLAP = 226,         /* a fragment that reaches into the transport header of the first */
	DROP_IPV6_EXTENSION = 227,       /* more extension headers than we follow, or one we do not know */
	DROP_FORBIDDEN_ARP = 228,        /* ARP that speaks for an address that is not the pod's */
	DROP_COMPENSATION = 229,         /* the port bypasses Envoy and the mesh's policy would not have allowed it */
	DROP_NO_SERVICE_BACKENDS = 230,  /* a Service's address, and nobody known to answer behind it */
};

/* Identity numbers below IDENTITY_FIRST_LOCAL are reserved; names and numbers are Cilium's. */
enum reserved_identity {
	IDENTITY_ANY = 0, /* in a policy key: whoever the peer is */
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_UNMANAGED = 3,
	IDENTITY_HEALTH = 4,
	IDENTITY_INIT = 5,
	IDENTITY_REMOTE_NODE = 6,
	IDENTITY_KUBE_APISERVER = 7,
	IDENTITY_INGRESS = 8,
	IDENTITY_WORLD_IPV4 = 9,
	IDENTITY_WORLD_IPV6 = 10,
	IDENTITY_FIRST_LOCAL = 256,
};

enum endpoint_flags {
	ENDPOINT_F_READY = 1,        /* unset: every packet of the endpoint is dropped */
	ENDPOINT_F_NO_LOCALHOST = 2, /* do not let the node's own processes in by themselves */
	ENDPOINT_F_MAC = 4,          /* mac is known and enforced on ARP and neighbour discovery */
};

/* map endpoints: hash, key = ifindex of the host side of the pod's veth */
struct endpoint_key {
	__u32 ifindex;
};

struct endpoint_value {
	__u32 ifindex;       /* the key once more, first and last: see read_endpoint */
	__u32 id;            /* shown to people; unique on the node */
	__u32 incarnation;   /* new for every pod: state never outlives the pod that made it */
	__u32 identity;      /* the pod's own */
	__u32 revision;      /* a conntrack entry with another revision is judged again */
	__u32 flags;         /* enum endpoint_flags */
	__u32 policy_set[4]; /* index = direction * 2 + ip_family; 0 = none yet, everything is dropped */
	__u8 mac[6];         /* the pod's own */
	__u16 flow_table;    /* index in map conntrack of this incarnation's flows; 0 = none, everything is dropped */
	__u32 ifindex_again;
};

/* map endpoint_addresses: hash, the source addresses a pod may use (and speak for in ARP and neighbour discovery).
 * Open flows are not asked again: whoever takes an address away gives the endpoint a new revision after that. */
struct endpoint_address_key {
	__u32 ifindex;
	__u8 address[16];
};

struct endpoint_address_value {
	__u32 incarnation;
};

/* maps ipcache (hash, exact addresses) and ipcache_cidr (LPM, prefixes); a miss in both is world */
struct ipcache_key {
	__u8 address[16];
};

struct ipcache_cidr_key {
	__u32 prefix_bits; /* 0..128 over the v4-mapped form: an IPv4 /24 is 120 */
	__u8 address[16];
};

struct ipcache_value {
	__u32 identity;
	__u32
	    forwarded_identity; /* not 0: a node's address; used when the packet was forwarded (ingress_ifindex != 0), i.e. masqueraded */
};

/* The key of a policy entry: the peer's identity or IDENTITY_ANY in the low 32 bits, and from these bits on: */
#define POLICY_KEY_PORT 32     /* destination port of the forward flow, masked to prefix; ICMP: the type */
#define POLICY_KEY_PROTOCOL 48 /* IPPROTO_*, 0 with POLICY_PREFIX_ANY */
#define POLICY_KEY_PREFIX 56   /* 0..16, POLICY_PREFIX_ANY */
#define POLICY_KEY_LAYER 61    /* enum policy_layer */
#define POLICY_KEY_USED 63     /* 1: no key is 0 */

#define POLICY_PREFIX_PROTO 0 /* 0..16: the protocol and that many leading bits of the port */
#define POLICY_PREFIX_PORT 16
#define POLICY_PREFIX_ANY 17 /* any protocol; protocol and port are 0 */

/* Of all entries a packet matches in a layer the highest precedence decides; on a tie the longer prefix, then the
 * specific identity. The compiler writes precedence so that a deny beats the allows of its tier. */
struct policy_value {
	__u32 precedence;
	__u32 rule_id;
	__u8 verdict;     /* enum policy_verdict */
	__u8 flags;       /* enum policy_flags */
	__u8 deny_reason; /* enum drop_reason when verdict is POLICY_DENY */
	__u8 pad;
};

/* map policy: array of cache lines. Those of a set lie together: buckets of keys first, then the values, each once.
 * An entry is in the bucket its key has by the upper half of its hash, or, where that one says so, in the one it has by
 * the lower half:
 *   h = (key ^ seed) * POLICY_HASH_FIRST;  h = (h ^ h >> 32) * POLICY_HASH_SECOND;  half * buckets >> 32
 * A lookup probes, for the peer's identity and for IDENTITY_ANY, every prefix length the set uses with it. */
#define POLICY_HASH_FIRST 0x5851f42d4c957f2d
#define POLICY_HASH_SECOND 0x369dea0f31a53f85
#define POLICY_BUCKET_KEYS 6
struct policy_bucket {
	__u64 keys[6];   /* 0: no entry */
	__u16 values[6]; /* which of the set's values each has */
	__u16 more;      /* 1: some key of this bucket is in its other one */
	__u8 pad[2];
};

#define POLICY_LINE_VALUES 4
struct policy_values {
	struct policy_value values[4];
	__u8 pad[16];
};

/* map policy_sets: hash, key = set id. What holds for a whole set. Nothing of a set changes while the set is here. */
struct policy_set_key {
	__u32 set_id;
};

struct policy_layer_default {
	__u32 prefixes;     /* bit n: some entry of the layer for one peer has prefix n */
	__u32 any_prefixes; /* likewise, of those for IDENTITY_ANY */
	__u32 rule_id;      /* names the policies that isolate the endpoint */
	__u8 verdict;       /* where no entry matches: POLICY_ALLOW, POLICY_NEEDS_L7 or POLICY_DENY */
	__u8 deny_reason;
	__u8 flags;
	__u8 pad;
};

struct policy_set_value {
	struct policy_layer_default layers[2]; /* index = enum policy_layer */
	__u64 seed;
	__u32 first_line;
	__u32 buckets;
	__u32 lines; /* those of buckets and of values */
	__u8 pad[4];
};

/* map conntrack: array of maps, index = endpoint_value.flow_table, 0 stays empty; inner: LRU hash, so that one endpoint
 * only evicts its own flows. The name of an inner map tells whose it is: flows_INCARNATION in eight hex digits. */
struct conntrack_key {
	__u8 source[16]; /* the forward flow: who opened it */
	__u8 destination[16];
	__be16 source_port;      /* ICMP echo: the identifier */
	__be16 destination_port; /* ICMP echo: 0 */
	__u8 protocol;
	__u8 direction; /* enum direction of the forward flow */
	__u8 pad[2];
};

enum conntrack_flags {
	CONNTRACK_F_REPLIED = 1,
	CONNTRACK_F_CLOSING = 2,    /* a FIN of both sides or a RST was seen */
	CONNTRACK_F_FORWARDED = 4,  /* ingress: its opener's packets had been forwarded (ingress_ifindex was not 0) */
	CONNTRACK_F_FIN_OPENER = 8, /* the opener has closed its side; the other may go on sending for long */
	CONNTRACK_F_FIN_ANSWERER = 16,
};

struct conntrack_value {
	__u64 seen_ns;  /* bpf_ktime_get_ns of the last packet */
	__u32 revision; /* of the endpoint when the flow was last judged */
	__u32 peer_identity;
	__u32 rule_id;
	__u32 flags; /* enum conntrack_flags */
};

/* map fragments: LRU hash, what a first fragment told about the later ones */
struct fragment_key {
	__u32 incarnation;
	__u32 id; /* IPv4: the 16-bit identification; network byte order as on the wire */
	__u8 source[16];
	__u8 destination[16];
	__u8 protocol;
	__u8 direction;
	__u8 pad[2];
};

struct fragment_value {
	__u64 seen_ns;
	__be16 source_port;
	__be16 destination_port;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 protocol;     /* IPv6: extension headers may stand between the fragment header and it */
	__u8 header_units; /* a later fragment starting before this many 8-byte units overlaps the transport header */
};

/* map metrics: per-CPU hash */
struct metric_key {
	__u8 reason; /* enum drop_reason but DROP_NONE, see map forwarded */
	__u8 direction;
	__u8 pad[2];
};

struct metric_value {
	__u64 packets;
	__u64 bytes;
};

/* map forwarded: per-CPU array of metric_value, index = enum direction: what metrics would hold under DROP_NONE */

/* map event_limiter: per-CPU array of one. Events a CPU could not send are counted and told in its next one.
 * Verdicts and traces stop at three quarters of a window, so that new flows cannot hide drops. */
struct event_limiter {
	__u64 window_start_ns;
	__u32 sent; /* in this window */
	__u32 lost; /* since the last event that told it */
};
#define EVENT_WINDOW_NS 50000000
#define EVENTS_PER_WINDOW 100

/* map events: ring buffer of these */
struct flow_event {
	__u64 time_ns; /* bpf_ktime_get_ns */
	__u32 endpoint_id;
	__u32 ifindex;
	__u32 source_identity;
	__u32 destination_identity;
	__u32 network_rule_id; /* 0: none */
	__u32 mesh_rule_id;
	__u32 lost; /* events this CPU dropped since its last one */
	__u32 packet_bytes;
	__u32 uid; /* owner of the sending socket where visible (egress), else 0xffffffff */
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 type;   /* enum event_type */
	__u8 reason; /* enum drop_reason */
	__u8 direction;
	__u8 family; /* enum ip_family; 255 when the packet was not IP */
	__u8 protocol;
	__u8 tcp_flags; /* as on the wire */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 network_verdict; /* enum policy_verdict */
	__u8 mesh_verdict;
	__u8 match_type; /* enum match_type of the layer that decided */
	__u8 is_reply;   /* 0 request, 1 reply, 2 unknown */
	__be16 ethertype;
	__u8 audit;      /* 1: policy would have dropped it */
	__u8 rejudged;   /* 1: an open flow judged again */
	__u64 cgroup_id; /* of cgroup v2, of the sending socket where visible (egress), else 0 */
};

#endif
