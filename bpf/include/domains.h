/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* Which domains are watched, for programs that run as things happen to threads.
 * bpf/watchlist.go is the other side.
 */
#ifndef KVMETER_DOMAINS_H
#define KVMETER_DOMAINS_H

#include "compat.h"
#include "thread.h"

#define MAX_DOMAINS 1024
#define PID_BITS    65536

/* Set before loading. */
const volatile __u32 cpus = 1; /* possible ones */

struct domain {
	__u32 slot;
	__u32 pad;
	__u64 start_ticks; /* 0: any */
};

/* Key: PID. User space adds and deletes keys, and refuses what does not fit. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DOMAINS);
	__type(key, __u32);
	__type(value, struct domain);
} domains SEC(".maps");

/* Bit: PID modulo the number of bits, set for those in domains and maybe for
 * others: who has no bit is not looked up. User space writes it.
 */
__u64 maybe[PID_BITS / 64];

/* User space adds 1 when domains have changed. What a thread holds of an epoch
 * before since is of before the programs were attached.
 */
__u32 epoch = 1;
__u32 since = 1;

static __always_inline int may_be_watched(struct task_struct *t)
{
	__u32 pid = t->tgid;

	return maybe[pid / 64 % (PID_BITS / 64)] >> pid % 64 & 1;
}

/* slot_of returns the slot of t's domain, MAX_DOMAINS if it has none. */
static __always_inline __u32 slot_of(struct task_struct *t)
{
	__u32 pid = t->tgid;
	struct domain *d = bpf_map_lookup_elem(&domains, &pid);

	if (!d)
		return MAX_DOMAINS;
	if (d->start_ticks && t->group_leader->start_boottime / NS_PER_CLOCK_TICK != d->start_ticks)
		return MAX_DOMAINS;
	return d->slot;
}

/* bucket says in which of n buckets a time belongs: in number i if it is
 * 2^(first + i) ns or more, and less than twice that; shorter and longer ones in
 * the first and the last.
 */
static __always_inline __u32 bucket(__u64 ns, __u32 first, __u32 n)
{
	__u32 log = 0;

	if (ns >> 32) {
		ns >>= 32;
		log += 32;
	}
	if (ns >> 16) {
		ns >>= 16;
		log += 16;
	}
	if (ns >> 8) {
		ns >>= 8;
		log += 8;
	}
	if (ns >> 4) {
		ns >>= 4;
		log += 4;
	}
	if (ns >> 2) {
		ns >>= 2;
		log += 2;
	}
	log += ns >> 1;
	if (log < first)
		return 0;
	log -= first;
	return log < n ? log : n - 1;
}

#endif
