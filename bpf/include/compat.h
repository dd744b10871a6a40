/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* Every difference between kernels, one helper each. */
#ifndef KVMETER_COMPAT_H
#define KVMETER_COMPAT_H

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	seqcount_t seqcount;
} seqlock_t___v59;

struct signal_struct___v59 {
	seqlock_t___v59 stats_lock;
};

struct task_struct___v513 {
	volatile long state;
};

#pragma clang attribute pop

/* stats_seq is the sequence number of sig->stats_lock: odd while a thread's
 * totals are being moved to sig.
 *
 * Since 5.10 (1909760f5fc3 "seqlock: PREEMPT_RT: Do not starve seqlock_t
 * writers") a seqlock_t holds a seqcount_spinlock_t, before it a seqcount_t.
 */
static __always_inline __u32 stats_seq(struct signal_struct *sig)
{
	struct signal_struct___v59 *old = (void *)sig;

	if (bpf_core_field_exists(sig->stats_lock.seqcount.seqcount.sequence))
		return sig->stats_lock.seqcount.seqcount.sequence;
	return old->stats_lock.seqcount.sequence;
}

/* runnable says whether t is on a CPU or waits for one.
 *
 * Since 5.14 (2f064a59a11f "sched: Change task_struct::state") state is called
 * __state.
 */
static __always_inline int runnable(struct task_struct *t)
{
	struct task_struct___v513 *old = (void *)t;

	if (bpf_core_field_exists(t->__state))
		return t->__state == 0;
	return old->state == 0;
}

/* throttled says whether t's group, or one above it, has used up its quota.
 * Kernels without CONFIG_CFS_BANDWIDTH have none.
 */
static __always_inline int throttled(struct task_struct *t)
{
	if (!bpf_core_field_exists(t->se.cfs_rq->throttle_count))
		return 0;
	return t->se.cfs_rq->throttle_count > 0;
}

/* running says whether t is on a CPU and not about to leave it to sleep: what
 * it does then counts as its slice until the CPU has found something else to
 * do, but is never added to its time.
 *
 * Kernels built without SMP lack on_cpu; there a slice in progress is counted
 * when the tick has added it.
 */
static __always_inline int running(struct task_struct *t)
{
	if (!bpf_core_field_exists(t->on_cpu) || !t->on_cpu)
		return 0;
	return runnable(t);
}

/* run_queue is the run queue of t's CPU, NULL where the kernel has no group
 * scheduling (CONFIG_FAIR_GROUP_SCHED) and so keeps no pointer to it.
 */
static __always_inline struct rq *run_queue(struct task_struct *t)
{
	if (!bpf_core_field_exists(t->se.cfs_rq->rq))
		return NULL;
	return BPF_CORE_READ(t, se.cfs_rq, rq);
}

#endif
