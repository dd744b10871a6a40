/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Counts how long vCPUs of watched domains are out of their guest. Loaded and
 * read by bpf/exits.go, tested by bpf/exits_lab_test.go.
 */
#include "domains.h"
#include <bpf/bpf_tracing.h>

/* Of bucket(). */
#define FIRST_EXIT 8
#define EXITS	   24

/* Four cache lines. */
struct host_time {
	__u64 exits;
	__u64 entries;
	__u64 ns;	      /* between an exit and the entry after it */
	__u64 buckets[EXITS]; /* such times by length */
	__u64 pad[5];
};

/* Of a vCPU thread of a watched domain. */
struct vcpu {
	__u32 epoch;   /* that slot is of; 0: none yet */
	__u32 slot;    /* of the domain; MAX_DOMAINS: it is not watched any more */
	__u64 left_ns; /* CLOCK_MONOTONIC of its exit; 0: it is in the guest, or was not seen to
			  leave */
};

/* The program left adds entries, the kernel removes them with the thread. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct vcpu);
} vcpus SEC(".maps");

/* Index: slot * cpus + CPU, so that CPUs share no line. A thread may be preempted
 * in a program by another vCPU's: additions are atomic.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* MAX_DOMAINS * cpus */
	__type(key, __u32);
	__type(value, struct host_time);
} host_times SEC(".maps");

/* Exits of watched vCPUs that were not counted, since there was no memory. */
__u64 dropped;

/* watched returns what is kept of the current thread if it is a watched
 * domain's, else NULL.
 */
static __always_inline struct vcpu *watched(__u64 flags)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct vcpu *v;

	if (!may_be_watched(t))
		return NULL;
	v = bpf_task_storage_get(&vcpus, t, NULL, flags);
	if (!v) {
		if (flags && slot_of(t) < MAX_DOMAINS)
			__sync_fetch_and_add(&dropped, 1);
		return NULL;
	}
	if (v->epoch != epoch) {
		__u32 slot = slot_of(t);

		if (v->slot != slot || v->epoch < since) {
			v->slot = slot;
			v->left_ns = 0;
		}
		v->epoch = epoch;
	}
	return v->slot < MAX_DOMAINS ? v : NULL;
}

static __always_inline struct host_time *host_time_of(struct vcpu *v)
{
	__u32 index = v->slot * cpus + bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&host_times, &index);
}

/* Runs at each exit of a vCPU from its guest, in its thread. Arguments differ
 * between kernels and architectures; none is read.
 */
SEC("tp_btf/kvm_exit")
int BPF_PROG(left)
{
	struct vcpu *v = watched(BPF_LOCAL_STORAGE_GET_F_CREATE);
	struct host_time *h;

	if (!v)
		return 0;
	v->left_ns = bpf_ktime_get_ns();
	h = host_time_of(v);
	if (h)
		__sync_fetch_and_add(&h->exits, 1);
	return 0;
}

/* Runs before each entry of a vCPU into its guest, in its thread. */
SEC("tp_btf/kvm_entry")
int BPF_PROG(entered)
{
	struct vcpu *v = watched(0);
	struct host_time *h;
	__u64 ns;

	if (!v || !v->left_ns)
		return 0;
	ns = bpf_ktime_get_ns() - v->left_ns;
	v->left_ns = 0;
	h = host_time_of(v);
	if (!h)
		return 0;
	__sync_fetch_and_add(&h->entries, 1);
	__sync_fetch_and_add(&h->ns, ns);
	__sync_fetch_and_add(&h->buckets[bucket(ns, FIRST_EXIT, EXITS)], 1);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
