/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Follows QEMU processes from their exec to the end of their last thread, so
 * that one which lives between two polls, or ends while no agent runs, is
 * accounted all the same. Pinned: see bpf/life.go, which reads it.
 */
#include "compat.h"
#include "thread.h"
#include <bpf/bpf_tracing.h>

#define MAX_FOLLOWED 4096
#define MAX_ARGS     4096 /* bytes of a command line that are kept */
#define RING_BYTES   (1 << 20)

enum kind {
	KIND_EXEC = 1,
	KIND_END,      /* the last thread exits, or the process was freed */
	KIND_REPLACED, /* its PID was given again */
};

enum drop {
	DROP_FOLLOW, /* processes not followed: the map is full */
	DROP_EXEC,   /* command lines not kept: the ring is full */
	DROP_END,  /* wake-ups, and ends of processes whose PID was given again, for which the ring
		      had no room */
	DROP_HOLD, /* processes that are followed, but not held: the map is full */
	DROPS,
};

/* What threads of a process have used. */
struct shares {
	__u64 run_ns[CLASSES];
	__u64 wait_ns[CLASSES];
	__u64 switches[CLASSES];
};

/* What a process has used, by its threads, and at its end by the totals that the
 * kernel keeps of a process.
 */
struct life {
	__u64 start_ticks;    /* as in /proc/PID/stat */
	struct shares freed;  /* as threads are freed: all that they used */
	struct shares exited; /* as they exit: less than all, for when the kernel skips a free */
	__u64 ended_ns;	      /* CLOCK_BOOTTIME at which the totals were taken; 0: it lives */
	__u64 process_ns; /* the process's CPU clock at its end, all threads, like the next three */
	__u64 read_bytes;
	__u64 write_bytes;
	__u64 cancelled_write_bytes;
	__u32 threads; /* freed */
	__u32 fields;  /* FIELD_*: what this kernel counts */
};

/* Key: PID of the process in the initial PID namespace. The program at exec adds
 * QEMUs, user space adds the processes that it found by other means; only user
 * space deletes, so that what has ended waits here until it was read.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_FOLLOWED);
	__type(key, __u32);
	__type(value, struct life);
} lives SEC(".maps");

/* What user space has not read yet. Full: see enum drop. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, DROPS);
	__type(key, __u32);
	__type(value, __u64);
} drops SEC(".maps");

/* The leader of each process that is followed, held so that its totals can be
 * read once it is gone: no event that the kernel skips then costs them, and on
 * some kernels hooks in interrupts, such as that at a free, are skipped one time
 * in two hundred. What is held is not freed. Keys as in lives. Linux 6.2.
 */
typedef struct task_struct task; /* clang 14 loses the tag of a pointer to a struct */

struct held {
	task __attribute__((btf_type_tag("kptr"))) * task;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_FOLLOWED);
	__type(key, __u32);
	__type(value, struct held);
} tasks SEC(".maps");

extern struct task_struct *bpf_task_acquire(struct task_struct *p) __ksym;
extern struct task_struct *bpf_task_from_pid(__s32 pid) __ksym;
extern void bpf_task_release(struct task_struct *p) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;

/* The argument of life_hold and life_read. */
struct ask {
	__u32 pid;
	__u32 pad;
	__u64 start_ticks;
};

struct exec_event {
	__u32 kind;
	__u32 pid;
	__u64 start_ticks;
	__u64 at_ns; /* CLOCK_MONOTONIC */
	__u32 bytes; /* of args */
	__u32 all;   /* bytes that the command line has */
	__u8 args[MAX_ARGS];
};

struct end_event {
	__u32 kind;
	__u32 pid;
	struct life life;
};

static __always_inline void drop(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&drops, &what);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline void tell_end(__u32 kind, __u32 pid, struct life *l)
{
	struct end_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		drop(DROP_END);
		return;
	}
	e->kind = kind;
	e->pid = pid;
	__builtin_memcpy(&e->life, l, sizeof(*l));
	bpf_ringbuf_submit(e, 0);
}

/* is_qemu knows a QEMU by the name that exec has just given it, which is that
 * of the file: parseCommand in agent/process.go has the same names. What is no
 * guest after all, user space deletes.
 */
static __always_inline int is_qemu(struct task_struct *t)
{
	__u64 comm[2] = {};

	bpf_probe_read_kernel(comm, sizeof(comm), &t->comm);
	return (comm[0] == BYTES('q', 'e', 'm', 'u', '-', 's', 'y', 's') &&
		(comm[1] & FIRST(4)) == BYTES('t', 'e', 'm', '-', 0, 0, 0, 0)) ||
	       (comm[0] == BYTES('q', 'e', 'm', 'u', '-', 'k', 'v', 'm') &&
		(comm[1] & FIRST(1)) == 0) ||
	       (comm[0] & FIRST(4)) == BYTES('k', 'v', 'm', 0, 0, 0, 0, 0);
}

static __always_inline void tell_exec(struct task_struct *t, __u64 start_ticks)
{
	__u64 first = BPF_CORE_READ(t, mm, arg_start);
	__u64 all = BPF_CORE_READ(t, mm, arg_end) - first;
	struct exec_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	__u64 bytes = all < MAX_ARGS ? all : MAX_ARGS;

	if (!e) {
		drop(DROP_EXEC);
		return;
	}
	e->kind = KIND_EXEC;
	e->pid = t->tgid;
	e->start_ticks = start_ticks;
	e->at_ns = bpf_ktime_get_ns();
	e->all = all;
	e->bytes = bytes;
	barrier_var(bytes); /* so that the verifier sees the bound */
	if (bytes > MAX_ARGS || bpf_probe_read_user(e->args, bytes, (void *)first))
		e->bytes = 0;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void add(struct shares *s, struct task_struct *t)
{
	__u64 comm[2] = {};
	__u32 class;

	bpf_probe_read_kernel(comm, sizeof(comm), &t->comm);
	class = class_of(comm);
	if (class >= CLASSES)
		return;
	__sync_fetch_and_add(&s->run_ns[class], t->se.sum_exec_runtime);
	if (bpf_core_field_exists(t->sched_info.run_delay)) {
		__sync_fetch_and_add(&s->wait_ns[class], t->sched_info.run_delay);
		__sync_fetch_and_add(&s->switches[class], t->sched_info.pcount);
	}
}

/* add_freed adds what a thread has used that will not run any more. */
static __always_inline void add_freed(struct life *l, struct task_struct *t)
{
	add(&l->freed, t);
	__sync_fetch_and_add(&l->threads, 1);
}

/* finish takes over the totals of a process that has ended, from its leader. All
 * its threads are part of them, the leader too (release_task adds each).
 */
static __always_inline void finish(struct life *l, struct task_struct *t)
{
	l->process_ns = t->signal->sum_sched_runtime;
	if (bpf_core_field_exists(t->sched_info.run_delay))
		l->fields |= FIELD_WAIT;
	if (bpf_core_field_exists(t->signal->ioac.read_bytes)) {
		l->fields |= FIELD_IO;
		l->read_bytes = t->signal->ioac.read_bytes;
		l->write_bytes = t->signal->ioac.write_bytes;
		l->cancelled_write_bytes = t->signal->ioac.cancelled_write_bytes;
	}
	l->ended_ns = bpf_ktime_get_boot_ns();
}

/* replace has a process followed in place of the one that had its PID before. */
static __always_inline void replace(__u32 pid, struct life *old, __u64 start_ticks)
{
	struct life fresh = {.start_ticks = start_ticks};

	if (old)
		tell_end(KIND_REPLACED, pid, old);
	if (bpf_map_update_elem(&lives, &pid, &fresh, BPF_ANY))
		drop(DROP_FOLLOW);
}

/* Runs at every exec of the host, in the process itself, before its first
 * instruction. The process may have waited for that for long, but all its time
 * is its own: it is counted from the fork.
 */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(life_exec, struct task_struct *t)
{
	__u32 pid = t->tgid;
	__u64 start_ticks;
	struct life *l;

	if (!is_qemu(t))
		return 0;
	start_ticks = t->start_boottime / NS_PER_CLOCK_TICK;
	l = bpf_map_lookup_elem(&lives, &pid);
	if (!l || l->start_ticks != start_ticks)
		replace(pid, l, start_ticks);
	tell_exec(t, start_ticks);
	return 0;
}

/* hold keeps t, which is given up, for its PID. */
static __always_inline void hold(__u32 pid, struct life *old, struct task_struct *t)
{
	struct held none = {}, *h;

	h = bpf_map_lookup_elem(&tasks, &pid);
	if (!h) {
		bpf_map_update_elem(&tasks, &pid, &none, BPF_ANY);
		h = bpf_map_lookup_elem(&tasks, &pid);
	}
	if (!h) {
		bpf_task_release(t);
		drop(DROP_HOLD);
		return;
	}
	t = bpf_kptr_xchg(&h->task, t);
	if (!t)
		return;
	/* That one had the PID before. */
	if (old && !old->ended_ns && !t->sighand) {
		add_freed(old, t);
		finish(old, t);
	}
	bpf_task_release(t);
}

/* The same where the kernel has task references (Linux 6.2). */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(life_exec_hold, struct task_struct *t)
{
	struct task_struct *own;
	__u32 pid = t->tgid;
	__u64 start_ticks;
	struct life *l;

	if (!is_qemu(t))
		return 0;
	start_ticks = t->start_boottime / NS_PER_CLOCK_TICK;
	l = bpf_map_lookup_elem(&lives, &pid);
	if (!l || l->start_ticks != start_ticks) {
		own = bpf_task_acquire(t);
		if (own)
			hold(pid, l, own);
		else
			drop(DROP_HOLD);
		replace(pid, l, start_ticks);
	}
	tell_exec(t, start_ticks);
	return 0;
}

/* Run by user space for a process that it has put into lives. */
SEC("syscall")
int life_hold(struct ask *ask)
{
	__u32 pid = ask->pid;
	struct task_struct *t = bpf_task_from_pid(pid);

	if (!t)
		return 0;
	if (t->start_boottime / NS_PER_CLOCK_TICK == ask->start_ticks)
		hold(pid, NULL, t);
	else
		bpf_task_release(t);
	return 0;
}

/* Runs at the exit of every thread of the host, in the thread. Until the process
 * has been waited for it may take its time, and user space asks by life_read. Two
 * threads that exit at once may both tell.
 */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(life_exit, struct task_struct *t)
{
	__u32 pid = t->tgid;
	struct life *l = bpf_map_lookup_elem(&lives, &pid);

	if (!l)
		return 0;
	add(&l->exited, t);
	if (t->signal->live.counter == 0)
		tell_end(KIND_END, pid, l);
	return 0;
}

/* Run by user space for a process that may have ended. */
SEC("syscall")
int life_read(struct ask *ask)
{
	__u32 pid = ask->pid;
	struct task_struct *t;
	struct held *h;
	struct life *l;

	l = bpf_map_lookup_elem(&lives, &pid);
	h = bpf_map_lookup_elem(&tasks, &pid);
	if (!l || !h || l->start_ticks != ask->start_ticks || l->ended_ns)
		return 0;
	bpf_rcu_read_lock();
	t = h->task;
	if (t && !t->sighand && t->start_boottime / NS_PER_CLOCK_TICK == ask->start_ticks) {
		add_freed(l, t);
		finish(l, t);
	}
	bpf_rcu_read_unlock();
	return 0;
}

/* Runs for every thread of the host after it has ended and its process has been
 * waited for, from RCU, so that threads of a process may come in any order, at
 * the same time, and later than their leader. Nothing is added to a thread's
 * times any more.
 */
SEC("tp_btf/sched_process_free")
int BPF_PROG(life_free, struct task_struct *t)
{
	__u32 pid = t->tgid;
	struct life *l;
	__u64 start;

	l = bpf_map_lookup_elem(&lives, &pid);
	if (!l)
		return 0;
	start = t->start_boottime;
	if (start / NS_PER_CLOCK_TICK < l->start_ticks) {
		/* Of the process that had the PID before. Its leader has its totals. */
		struct life before = {.start_ticks = start / NS_PER_CLOCK_TICK};

		if (t->pid == pid) {
			finish(&before, t);
			tell_end(KIND_REPLACED, pid, &before);
		}
		return 0;
	}
	/* Of the process that has the PID now. */
	if (l->ended_ns && start > l->ended_ns)
		return 0;

	add_freed(l, t);
	if (t->pid != pid || start / NS_PER_CLOCK_TICK != l->start_ticks)
		return 0;

	finish(l, t);
	tell_end(KIND_END, pid, l);
	return 0;
}

/* Types that the loader needs and no map has. */
const struct exec_event *unused_exec_event __attribute__((unused));
const struct end_event *unused_end_event __attribute__((unused));

char _license[] SEC("license") = "Dual BSD/GPL";
