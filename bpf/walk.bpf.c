/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Adds up what the kernel has counted for every thread of the asked processes.
 * Runs when user space asks (BPF_PROG_RUN), in its context; costs nothing
 * between polls. Read by bpf/walk.go.
 *
 * What it costs is cache misses: a thread's counters are in six lines of memory
 * that nobody has touched since the last pass. So it remembers each process's
 * threads and their counters, and looks at no more than one line of a thread
 * that has not run since: nothing else of it can have changed.
 */
#include "usage.h"

#define MAX_TRIES		   4
#define MAX_REMEMBERED		   16384 /* threads */
#define SPARE			   4	 /* room for threads that a process may yet start */
#define BPF_TASK_ITER_PROC_THREADS 2	 /* all threads of one process; 1 would be of the system */

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
extern struct task_struct *bpf_task_acquire(struct task_struct *p) __ksym;
extern void bpf_task_release(struct task_struct *p) __ksym;
extern void *bpf_rdonly_cast(const void *p, __u32 type) __ksym;
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
	__u32 known; /* of requests before: those beyond count are forgotten */
	__u32 fresh; /* not 0: nothing is unchanged */
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

/* What is remembered of the process of requests[i]. Written by the program only. */
struct process {
	struct task_struct __kptr *leader;
	__u64 start_ticks;
	__u32 pid;
	__u32 seq;	  /* of stats_lock when the threads were listed */
	__u32 threads;	  /* that were listed; 0: none are remembered */
	__u32 first;	  /* of them in threads */
	__u32 room;	  /* there */
	__u32 generation; /* of threads */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct process);
} processes SEC(".maps");

/* The remembered threads of all processes, each process's one after the other.
 * When they are full, processes that found no room are read as if for the first
 * time, in the last entry, until all start anew.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REMEMBERED + 1);
	__type(key, __u32);
	__type(value, struct mark);
} marks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REMEMBERED + 1);
	__type(key, __u32);
	__type(value, struct thread);
} threads SEC(".maps");

static __u32 generation;      /* of threads */
static __u32 remembered;      /* entries of threads that are given away */
static __u32 threads_seen;    /* in this pass */
static __u32 threads_refused; /* in this pass, for lack of room */
static __u32 fresh;
static __u64 fence;

/* full_barrier orders the loads around it, on every architecture. */
static __always_inline void full_barrier(void)
{
	__sync_fetch_and_add(&fence, 0);
}

/* make_room finds a place for so many threads of the process, and returns how
 * many fit.
 */
static __always_inline __u32 make_room(struct process *p, __u32 count)
{
	__u32 room = count + SPARE;

	if (p->generation == generation && count <= p->room)
		return p->room;
	p->room = 0;
	if (room > MAX_REMEMBERED - remembered) {
		threads_refused += count;
		return 0;
	}
	p->first = remembered;
	p->room = room;
	p->generation = generation;
	remembered += room;
	return room;
}

/* A thread that exits while we walk would be counted twice or not at all:
 * list notices (STATUS_TORN), as the kernel's thread_group_cputime does.
 */
static __always_inline __u32 list(__u32 slot, struct usage *u, struct process *p,
				  struct task_struct *leader)
{
	struct signal_struct *sig = leader->signal;
	__u32 seq, room, status = STATUS_OK;
	struct bpf_iter_task it;
	struct task_struct *t;

	p->threads = 0;
	seq = stats_seq(sig);
	if (seq & 1)
		return STATUS_TORN;
	full_barrier();
	begin(u, sig);
	room = make_room(p, u->expected);

	bpf_iter_task_new(&it, leader, BPF_TASK_ITER_PROC_THREADS);
	while ((t = bpf_iter_task_next(&it))) {
		__u32 n = u->threads, at = n < room ? p->first + n : MAX_REMEMBERED;
		struct mark *m = bpf_map_lookup_elem(&marks, &at);
		struct thread *r = bpf_map_lookup_elem(&threads, &at);

		if (n >= MAX_THREADS || !m || !r) {
			status = STATUS_TOO_MANY_THREADS;
			break;
		}
		add(u, slot, r, observe(m, r, t));
	}
	bpf_iter_task_destroy(&it);

	full_barrier();
	if (stats_seq(sig) != seq)
		return STATUS_TORN;
	/* One that was started meanwhile is counted before it is listed. */
	if (status == STATUS_OK && u->threads <= room && u->threads == u->expected &&
	    sig->nr_threads == u->expected) {
		p->threads = u->threads;
		p->seq = seq;
	}
	return status;
}

static __always_inline struct task_struct *task_of(struct mark *m)
{
	return bpf_rdonly_cast((void *)m->task, bpf_core_type_id_kernel(struct task_struct));
}

/* has_run says whether a thread may have run since it was observed, or runs. */
static __always_inline int has_run(struct mark *m)
{
	struct task_struct *t = task_of(m);

	return t->se.sum_exec_runtime != m->run_ns || t->se.on_rq;
}

/* update reads the process's threads as they were listed last. A thread leaves
 * the list only while it holds stats_lock, and is counted in nr_threads before
 * it joins: with both as they were the threads are the same, and while we hold
 * the RCU lock none of them can be freed. 0: they have to be listed again.
 */
static __always_inline int update(__u32 slot, struct usage *u, struct process *p,
				  struct task_struct *leader)
{
	struct signal_struct *sig = leader->signal;
	struct bpf_iter_num it;
	struct thread *r;
	struct mark *m;
	int *k, changed;
	__u32 at;

	if (!p->threads || p->generation != generation || stats_seq(sig) != p->seq ||
	    sig->nr_threads != p->threads)
		return 0;
	full_barrier();

	changed = fresh || u->running;
	bpf_iter_num_new(&it, 0, changed ? 0 : p->threads);
	while ((k = bpf_iter_num_next(&it))) {
		at = p->first + *k;
		m = bpf_map_lookup_elem(&marks, &at);
		if (!m || has_run(m)) {
			changed = 1;
			break;
		}
	}
	bpf_iter_num_destroy(&it);
	if (!changed) {
		u->status = STATUS_UNCHANGED;
		return 1;
	}

	__builtin_memset(u, 0, sizeof(*u));
	begin(u, sig);
	bpf_iter_num_new(&it, 0, p->threads);
	while ((k = bpf_iter_num_next(&it))) {
		__u64 slice = 0;

		at = p->first + *k;
		m = bpf_map_lookup_elem(&marks, &at);
		r = bpf_map_lookup_elem(&threads, &at);
		if (!m || !r)
			break;
		if (has_run(m))
			slice = observe(m, r, task_of(m));
		add(u, slot, r, slice);
	}
	bpf_iter_num_destroy(&it);
	full_barrier();
	if (stats_seq(sig) != p->seq)
		return 0;
	u->status = STATUS_OK;
	return 1;
}

static __always_inline void forget(struct process *p)
{
	struct task_struct *leader = bpf_kptr_xchg(&p->leader, NULL);

	p->threads = 0;
	if (leader)
		bpf_task_release(leader);
}

/* find makes p the process that user space asks for. */
static __noinline int find(struct process *p, struct request *r)
{
	struct task_struct *leader;
	enum status status;

	forget(p);
	p->pid = r->pid;
	p->start_ticks = r->start_ticks;
	leader = bpf_task_from_pid(r->pid);
	if (!leader)
		return STATUS_GONE;
	status = check(leader, r->start_ticks);
	if (status == STATUS_OK)
		leader = bpf_kptr_xchg(&p->leader, leader);
	if (leader)
		bpf_task_release(leader);
	return status;
}

/* reread lists the threads of p's process. */
static __noinline int reread(__u32 slot, struct usage *u, struct process *p)
{
	struct task_struct *known, *leader = NULL;
	__u32 status = STATUS_GONE, tail = vcpu_tail;
	struct bpf_iter_num tries;
	int *try;

	bpf_rcu_read_lock();
	known = p->leader;
	if (known)
		leader = bpf_task_acquire(known);
	bpf_rcu_read_unlock();
	if (!leader)
		return STATUS_GONE;
	bpf_iter_num_new(&tries, 0, leader->exit_state == EXIT_DEAD ? 0 : MAX_TRIES);
	while ((try = bpf_iter_num_next(&tries))) {
		__builtin_memset(u, 0, sizeof(*u));
		u->retries = *try;
		vcpu_tail = tail;
		bpf_rcu_read_lock();
		status = list(slot, u, p, leader);
		bpf_rcu_read_unlock();
		if (status != STATUS_TORN)
			break;
	}
	bpf_iter_num_destroy(&tries);
	/* Once reaped, the leader may stand in both sums; it is dead before. */
	if (leader->exit_state == EXIT_DEAD)
		status = STATUS_GONE;
	bpf_task_release(leader);
	return status;
}

/* refresh reads the process as it is remembered, if it is. */
static __always_inline int refresh(__u32 slot, struct usage *u, struct process *p, int *alive)
{
	__u32 tail = vcpu_tail;
	struct task_struct *leader;
	int done = 0;

	bpf_rcu_read_lock();
	leader = p->leader;
	if (leader) {
		done = update(slot, u, p, leader);
		/* After an exec by another thread that one has the PID. */
		*alive = done || leader->exit_state != EXIT_DEAD;
	}
	bpf_rcu_read_unlock();
	if (!done)
		vcpu_tail = tail;
	return done;
}

static long read_process(__u32 i, void *ctx)
{
	struct process *p;
	struct request *r;
	struct usage *u;
	int alive = 0;
	__u32 status;

	r = bpf_map_lookup_elem(&requests, &i);
	u = bpf_map_lookup_elem(&usages, &i);
	p = bpf_map_lookup_elem(&processes, &i);
	if (!r || !u || !p)
		return 1;
	if (p->pid == r->pid && p->start_ticks == r->start_ticks && refresh(i, u, p, &alive)) {
		threads_seen += p->threads;
		return 0;
	}
	status = alive ? STATUS_OK : find(p, r);
	if (status == STATUS_OK)
		status = reread(i, u, p);
	u->status = status;
	threads_seen += u->threads;
	return 0;
}

static long drop(__u32 i, void *ctx)
{
	__u32 at = *(__u32 *)ctx + i;
	struct process *p = bpf_map_lookup_elem(&processes, &at);

	if (!p)
		return 1;
	p->pid = 0;
	forget(p);
	return 0;
}

SEC("syscall")
int walk(struct run *run)
{
	__u32 count = run->count, known = run->known;

	if (threads_refused && threads_seen < MAX_REMEMBERED / 2) {
		generation++;
		remembered = 0;
	}
	threads_refused = threads_seen = 0;
	fresh = run->fresh;
	start_pass();
	bpf_loop(count, read_process, NULL, 0);
	if (known > count) /* so that no process is held that nobody asks for */
		bpf_loop(known - count, drop, &count, 0);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
