/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Counts how long vCPU threads of watched domains waited for a CPU, and who had
 * it meanwhile. Loaded and read by bpf/runqueue.go, tested by
 * bpf/runqueue_lab_test.go.
 */
#include "domains.h"
#include <bpf/bpf_tracing.h>

/* Of bucket(). */
#define FIRST_WAIT 10
#define WAITS	   24

/* Who had the CPU that a thread waited for. */
enum culprit {
	UNDECIDED,
	NOBODY, /* the CPU was idle, and had to wake up first */
	SELF,	/* another thread of the domain */
	DOMAIN, /* another domain */
	HOST,	/* any other task */
	QUOTA,	/* nobody: the thread's group had used up its quota */
	CULPRITS,
};

/* Four cache lines. */
struct wait {
	__u64 switches;	       /* times put on a CPU */
	__u64 by_ns[CULPRITS]; /* waited; UNDECIDED stays 0 */
	__u64 buckets[WAITS];  /* waits by length */
	__u64 pad;
};

/* Of a thread of a watched domain. */
struct waiter {
	__u32 epoch;   /* that slot is of; 0: none yet */
	__u32 slot;    /* of the domain; MAX_DOMAINS: it is not watched any more */
	__u32 named;   /* vcpu is known; 0: its name is new */
	__u32 vcpu;    /* it has a vCPU thread's name */
	__u32 culprit; /* of the wait that is on, or was before this slice */
	__u32 pad;
	__u64 run_delay; /* when it last left its CPU, ns */
};

/* Switches of threads of watched domains that had no entry in threads yet. */
__u64 strangers;

/* Programs add entries, where the scheduler's lock is not held: adopt and
 * thread_made. The kernel removes them with the thread.
 */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct waiter);
} threads SEC(".maps");

/* Index: slot * cpus + CPU. Only programs write here, each on its own CPU and
 * with interrupts disabled.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* MAX_DOMAINS * cpus */
	__type(key, __u32);
	__type(value, struct wait);
} waits SEC(".maps");

/* renew finds out which domain t is of: domains have changed since it was met. */
static __always_inline void renew(struct task_struct *t, struct waiter *th)
{
	__u32 slot = slot_of(t);

	if (th->slot != slot || th->epoch < since) {
		th->slot = slot;
		th->culprit = UNDECIDED;
		th->run_delay = t->sched_info.run_delay;
	}
	th->epoch = epoch;
}

/* watched returns what is kept of a thread that may be a watched domain's, or
 * NULL.
 */
static __always_inline struct waiter *watched(struct task_struct *t)
{
	struct waiter *th;

	th = bpf_task_storage_get(&threads, t, NULL, 0);
	if (!th) {
		__u32 pid = t->tgid;

		if (bpf_map_lookup_elem(&domains, &pid))
			__sync_fetch_and_add(&strangers, 1);
		return NULL;
	}
	if (th->epoch != epoch)
		renew(t, th);
	if (!th->named) {
		__u64 comm[2] = {};

		bpf_probe_read_kernel(comm, sizeof(comm), &t->comm);
		th->vcpu = class_of(comm) == CLASS_VCPU;
		th->named = 1;
	}
	return th->slot < MAX_DOMAINS ? th : NULL;
}

static __always_inline struct wait *wait_of(struct waiter *th)
{
	__u32 index = th->slot * cpus + bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&waits, &index);
}

/* who is t, of which other is what is kept, to a thread of th's domain? */
static __always_inline enum culprit who(struct waiter *th, struct task_struct *t,
					struct waiter *other)
{
	if (other)
		return other->slot == th->slot ? SELF : DOMAIN;
	return t->pid ? HOST : NOBODY;
}

#define PREV 1
#define NEXT 2

/* count_switch is a function of its own so that switches of others, which are
 * most, need no more than its call's registers and no stack.
 */
static __attribute__((noinline)) int count_switch(struct task_struct *prev,
						  struct task_struct *next, int preempt, int which)
{
	struct waiter *p = NULL, *n = NULL;
	struct wait *w;
	__u32 by;

	if (which & PREV)
		p = watched(prev);
	if (which & NEXT)
		n = watched(next);
	if (p && p->vcpu) {
		__u64 ns = prev->sched_info.run_delay - p->run_delay;

		p->run_delay += ns;
		w = wait_of(p);
		by = p->culprit;
		barrier_var(by); /* old verifiers lose its bounds if it is read twice */
		if (w && by != UNDECIDED && by < CULPRITS) {
			w->by_ns[by] += ns;
			w->buckets[bucket(ns, FIRST_WAIT, WAITS)]++;
		}
		p->culprit = UNDECIDED;
		if (preempt || runnable(prev))
			p->culprit = throttled(prev) ? QUOTA : who(p, next, n);
	}
	if (n && n->vcpu) {
		w = wait_of(n);
		if (w)
			w->switches++;
		if (n->culprit == UNDECIDED)
			n->culprit = who(n, prev, p);
	}
	return 0;
}

/* Runs at every switch, on the CPU that switches, with its run queue locked. The
 * kernel adds a wait to run_delay right after it, when next begins to run: at
 * the switch in which a thread leaves its CPU the wait before that slice is
 * known. It also has what it waited on other CPUs' queues.
 */
SEC("tp_btf/sched_switch")
int BPF_PROG(switched, _Bool preempt, struct task_struct *prev, struct task_struct *next)
{
	int which = may_be_watched(prev) * PREV | may_be_watched(next) * NEXT;

	if (which)
		count_switch(prev, next, preempt, which);
	return 0;
}

/* Runs when a process or thread is made, in its maker's context. */
SEC("tp_btf/task_newtask")
int BPF_PROG(thread_made, struct task_struct *t)
{
	if (may_be_watched(t))
		bpf_task_storage_get(&threads, t, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
	return 0;
}

/* Runs when a thread gets a name, in the context of who gives it. QEMU's threads
 * name themselves when they begin.
 */
SEC("tp_btf/task_rename")
int BPF_PROG(renamed, struct task_struct *t)
{
	struct waiter *th;

	if (!may_be_watched(t))
		return 0;
	th = bpf_task_storage_get(&threads, t, NULL, 0);
	if (th)
		th->named = 0;
	return 0;
}

/* Runs in the reader's context, once a thread of the system, when domains that
 * have threads already come to be watched.
 */
SEC("iter/task")
int adopt(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task;
	__u32 pid;

	if (!t)
		return 0;
	pid = t->tgid;
	if (bpf_map_lookup_elem(&domains, &pid))
		bpf_task_storage_get(&threads, t, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
