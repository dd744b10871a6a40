/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Counts the packets that pass tap devices, and why packets of them were
 * dropped. Loaded and read by bpf/tcx.go, tested by bpf/tcx_lab_test.go.
 */
#include "skb.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>

#define MAX_NICS   2048 /* 500 domains with 4 NICs */
#define INDEX_BITS 65536

/* Directions are the guest's. */
enum direction {
	INCOMING,
	OUTGOING,
	DIRECTIONS,
};

/* A packet of 2^(FIRST_SIZE + n) bytes or more, and less than twice that, is in
 * bucket n; smaller and larger ones are in the first and the last.
 */
#define FIRST_SIZE 4
#define SIZES	   16

/* One cache line. */
struct traffic {
	__u64 packets[DIRECTIONS];
	__u64 bytes[DIRECTIONS];
	__u64 segments[DIRECTIONS];
	__u64 pad[2];
};

struct histogram {
	__u64 packets[DIRECTIONS][SIZES];
};

/* Set before loading. */
const volatile __u32 cpus = 1;	      /* possible ones */
const volatile __u32 count_sizes = 0; /* 1: sizes is as large as traffics */
const volatile __u32 reasons = 1;     /* that the kernel has for a drop, 0 included */

/* Bit: interface index modulo the number of bits, set for those in nics and
 * maybe for others: who has no bit is not looked up. User space writes it.
 */
__u64 maybe[INDEX_BITS / 64];

/* Key: interface index. Value: the NIC's slot. User space adds and deletes
 * keys, and refuses what does not fit.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NICS);
	__type(key, __u32);
	__type(value, __u32);
} nics SEC(".maps");

/* Index: slot * cpus + CPU. Only programs write here, each on its own CPU and
 * with bottom halves disabled: nothing is lost, and no line is shared.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* MAX_NICS * cpus */
	__type(key, __u32);
	__type(value, struct traffic);
} traffics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* MAX_NICS * cpus */
	__type(key, __u32);
	__type(value, struct histogram);
} sizes SEC(".maps");

/* Index: slot * (reasons + 1) + reason. Reason 0 is none and holds the sum of
 * all; the last holds those that have no place of their own. Drops are rare:
 * CPUs share the counters.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2); /* MAX_NICS * (reasons + 1) */
	__type(key, __u32);
	__type(value, __u64);
} drops SEC(".maps");

static __always_inline __u32 bucket(__u32 len)
{
	__u32 log = 0;

	if (len >> 16) {
		len >>= 16;
		log += 16;
	}
	if (len >> 8) {
		len >>= 8;
		log += 8;
	}
	if (len >> 4) {
		len >>= 4;
		log += 4;
	}
	if (len >> 2) {
		len >>= 2;
		log += 2;
	}
	log += len >> 1;
	if (log < FIRST_SIZE)
		return 0;
	log -= FIRST_SIZE;
	return log < SIZES ? log : SIZES - 1;
}

/* headers is the length of what every segment of a GSO packet repeats. Each
 * call for bytes costs some 12 ns, each look at ip none.
 */
static __always_inline __u32 headers(struct __sk_buff *skb)
{
	__u32 off = ETH_HLEN;
	__u8 ip[2 + 20], protocol, length;
	__be16 type;

	/* With the type that is before it. */
	if (bpf_skb_load_bytes(skb, off - 2, ip, sizeof(ip)))
		return off;
	type = ip[0] | ip[1] << 8;
	if (type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD)) {
		off += VLAN_HLEN;
		if (bpf_skb_load_bytes(skb, off - 2, ip, sizeof(ip)))
			return off;
		type = ip[0] | ip[1] << 8;
	}
	if (type == bpf_htons(ETH_P_IP)) {
		off += (ip[2] & 15) * 4;
		protocol = ip[2 + 9];
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		off += 40;
		protocol = ip[2 + 6];
	} else {
		return off;
	}
	if (protocol == IPPROTO_UDP)
		return off + 8;
	if (protocol == IPPROTO_TCP && !bpf_skb_load_bytes(skb, off + 12, &length, 1))
		off += (length >> 4) * 4;
	return off;
}

/* segments is how many packets skb is on a wire. A guest does not say how many
 * it left to be made, only how large; the kernel counts when it makes them.
 */
static __always_inline __u32 segments(struct __sk_buff *skb)
{
	__u32 size = skb->gso_size, header;

	if (!size)
		return 1;
	if (skb->gso_segs)
		return skb->gso_segs;
	header = headers(skb);
	if (skb->len <= header)
		return 1;
	return (skb->len - header + size - 1) / size;
}

static __always_inline int count(struct __sk_buff *skb, enum direction way)
{
	__u32 ifindex = skb->ifindex, len = skb->len, index, *slot;
	struct traffic *t;
	struct histogram *s;

	slot = bpf_map_lookup_elem(&nics, &ifindex);
	if (!slot)
		return TC_ACT_UNSPEC;
	index = *slot * cpus + bpf_get_smp_processor_id();
	t = bpf_map_lookup_elem(&traffics, &index);
	if (!t)
		return TC_ACT_UNSPEC;
	/* The tag is beside the packet here and inside on the tap. */
	if (skb->vlan_present)
		len += VLAN_HLEN;
	t->packets[way]++;
	t->bytes[way] += len;
	t->segments[way] += segments(skb);
	if (!count_sizes)
		return TC_ACT_UNSPEC;
	s = bpf_map_lookup_elem(&sizes, &index);
	if (s)
		s->packets[way][bucket(len)]++;
	return TC_ACT_UNSPEC;
}

/* Runs for each packet that a guest has sent, on the CPU that took it from the
 * tap's queue, before bridges and switches see it.
 */
SEC("tc")
int from_guest(struct __sk_buff *skb)
{
	return count(skb, OUTGOING);
}

/* Runs for each packet to a guest, before it is put in the tap's queue, where
 * it may find no room.
 */
SEC("tc")
int to_guest(struct __sk_buff *skb)
{
	return count(skb, INCOMING);
}

/* Runs for each packet that the host drops, in whatever context that is; not
 * for those that it has done with. Linux 5.17 and newer say why (c504e5c2f964
 * "net: skb: introduce kfree_skb_reason()").
 */
SEC("tp_btf/kfree_skb")
int BPF_PROG(dropped, struct sk_buff *skb, void *location, __u32 reason)
{
	struct net_device *dev = skb->dev;
	__u32 ifindex, index, *slot;
	__u64 *n;

	if (!dev)
		return 0;
	ifindex = dev->ifindex;
	if (!(maybe[ifindex / 64 % (INDEX_BITS / 64)] >> ifindex % 64 & 1))
		return 0;
	slot = bpf_map_lookup_elem(&nics, &ifindex);
	if (!slot)
		return 0;
	index = *slot * (reasons + 1);
	n = bpf_map_lookup_elem(&drops, &index);
	if (n)
		__sync_fetch_and_add(n, 1);
	index += reason && reason < reasons ? reason : reasons;
	n = bpf_map_lookup_elem(&drops, &index);
	if (n)
		__sync_fetch_and_add(n, 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
