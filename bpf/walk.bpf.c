/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Adds up what the kernel has counted for every thread of the asked processes.
 * Runs when user space asks (BPF_PROG_RUN), in its context; costs nothing
 * between polls. Read by bpf/walk.go.
 */
#include "usage.h"

#define MAX_TRIES		   4
#define BPF_TASK_ITER_PROC_THREADS 2 /* all threads of one process; 1 would be of the system */

struct bpf_iter_task {
	__u64 opaque[3];
} __attribute__((aligned(8)));

struct bpf_iter_num {
	__u64 opaque[1];
} __attribute__((aligned(8)));

extern int bpf_iter_num_new(struct bpf_iter_num *it, int start, int end) __ksym;
extern int *bpf_iter_num_next(struct bpf_iter_num *it) __ksym;
extern void bpf_iter_num_destroy(struct bpf_iter_num *it) __ksym;
extern struct task_struct *bpf_task_from_pid(__s32 pid) __ksym;
extern void bpf_task_release(struct task_struct *p) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;
extern int bpf_iter_task_new(struct bpf_iter_task *it, struct task_struct *task,
			     unsigned int flags) __ksym;
extern struct task_struct *bpf_iter_task_next(struct bpf_iter_task *it) __ksym;
extern void bpf_iter_task_destroy(struct bpf_iter_task *it) __ksym;

struct request {
	__u32 pid; /* in the initial PID namespace */
	__u32 pad;
	__u64 start_ticks; /* 0: any */
};

/* The argument of BPF_PROG_RUN. */
struct run {
	__u32 count; /* of requests to answer */
	__u32 pad;
};

/* requests[i] is written by user space before a run, usages[i] by the program. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct request);
} requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct usage);
} usages SEC(".maps");

static __u64 fence;

/* full_barrier orders the loads around it, on every architecture. */
static __always_inline void full_barrier(void)
{
	__sync_fetch_and_add(&fence, 0);
}

/* A thread that exits while we walk would be counted twice or not at all:
 * read_once notices (STATUS_TORN), as the kernel's thread_group_cputime does.
 */
static __always_inline enum status read_once(struct usage *u, struct task_struct *leader)
{
	struct signal_struct *sig = leader->signal;
	enum status status = STATUS_OK;
	struct bpf_iter_task it;
	struct task_struct *t;
	__u32 seq;

	seq = stats_seq(sig);
	if (seq & 1)
		return STATUS_TORN;
	full_barrier();
	begin(u, sig);

	bpf_iter_task_new(&it, leader, BPF_TASK_ITER_PROC_THREADS);
	while ((t = bpf_iter_task_next(&it))) {
		if (u->threads >= MAX_THREADS) {
			status = STATUS_TOO_MANY_THREADS;
			break;
		}
		add_thread(u, t);
	}
	bpf_iter_task_destroy(&it);

	full_barrier();
	if (stats_seq(sig) != seq)
		return STATUS_TORN;
	return status;
}

static long read_process(__u32 i, void *ctx)
{
	struct task_struct *leader;
	enum status status;
	struct request *r;
	struct usage *u;
	struct bpf_iter_num tries;
	int *try;

	r = bpf_map_lookup_elem(&requests, &i);
	u = bpf_map_lookup_elem(&usages, &i);
	if (!r || !u)
		return 1;
	u->status = STATUS_GONE;
	leader = bpf_task_from_pid(r->pid);
	if (!leader)
		return 0;

	status = check(leader, r->start_ticks);
	bpf_iter_num_new(&tries, 0, status == STATUS_OK ? MAX_TRIES : 0);
	while ((try = bpf_iter_num_next(&tries))) {
		__builtin_memset(u, 0, sizeof(*u));
		u->retries = *try;
		bpf_rcu_read_lock();
		status = read_once(u, leader);
		bpf_rcu_read_unlock();
		if (status != STATUS_TORN)
			break;
	}
	bpf_iter_num_destroy(&tries);
	/* Once reaped, the leader may stand in both sums; it is dead before. */
	if (leader->exit_state == EXIT_DEAD)
		status = STATUS_GONE;
	u->status = status;
	bpf_task_release(leader);
	return 0;
}

SEC("syscall")
int walk(struct run *run)
{
	start_pass();
	bpf_loop(run->count, read_process, NULL, 0);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
