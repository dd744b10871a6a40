/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* The walk for kernels without the open-coded task iterator (before 6.7): an
 * iterator over all threads of the system, run when user space reads it, that
 * adds up those of the asked processes. Read by bpf/iter.go.
 */
#include "usage.h"
#include <bpf/bpf_tracing.h>

struct slot {
	__u32 index; /* in usages */
	__u32 pad;
	__u64 start_ticks; /* 0: any */
};

/* Key: PID in the initial PID namespace. User space adds and deletes keys, and
 * never asks for more than fit.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

/* Zeroed by user space before a pass. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct usage);
} usages SEC(".maps");

/* Runs in the reader's context, once a thread of the system. A process with a
 * thread that exits during the pass is torn: its lock's sequence number has
 * changed when a later thread is met, or fewer threads are met than there
 * were (user space compares threads with expected).
 */
SEC("iter/task")
int iter(struct bpf_iter__task *ctx)
{
	struct task_struct *t = ctx->task;
	struct signal_struct *sig;
	struct slot *s;
	struct thread r = {};
	struct mark m = {};
	struct usage *u;
	__u32 pid;

	if (ctx->meta->seq_num == 0)
		start_pass();
	if (!t)
		return 0;
	pid = t->tgid;
	s = bpf_map_lookup_elem(&slots, &pid);
	if (!s)
		return 0;
	u = bpf_map_lookup_elem(&usages, &s->index);
	if (!u)
		return 0;

	sig = t->signal;
	if (u->status == STATUS_GONE) {
		u->status = check(t->group_leader, s->start_ticks);
		u->seq = stats_seq(sig);
		if (u->status == STATUS_OK && u->seq & 1)
			u->status = STATUS_TORN;
		begin(u, sig);
	}
	if (u->status != STATUS_OK)
		return 0;
	if (stats_seq(sig) != u->seq)
		u->status = STATUS_TORN;
	else if (u->threads >= MAX_THREADS)
		u->status = STATUS_TOO_MANY_THREADS;
	else
		add(u, s->index, &r, observe(&m, &r, t));
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
