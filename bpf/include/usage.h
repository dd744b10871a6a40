/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* What walk and iter count, and how: both add up the same counters of the
 * same tasks into the same record, which bpf/record.go decodes.
 */
#ifndef KVMETER_USAGE_H
#define KVMETER_USAGE_H

#include "kernel.h"
#include "compat.h"

#define MAX_PROCESSES	  512	       /* records; user space asks in chunks of this */
#define MAX_THREADS	  16384	       /* of one process, bounds the RCU section */
#define NS_PER_CLOCK_TICK 10000000     /* USER_HZ is 100: the unit of /proc/PID/stat */
#define MAX_SLICE_NS	  2000000000LL /* a longer one is a clock that cannot be trusted */

enum class {
	CLASS_VCPU,
	CLASS_EMULATOR,
	CLASS_IOTHREAD,
	CLASS_WORKER,
	CLASS_VHOST,
	CLASSES,
};

enum status {
	STATUS_GONE, /* no such process; also what user space writes before a pass */
	STATUS_OK,
	STATUS_REUSED,
	STATUS_TORN,
	STATUS_TOO_MANY_THREADS,
	STATUS_KERNEL_THREAD,
};

#define FIELD_IO   1
#define FIELD_WAIT 2

struct usage {
	__u64 run_ns[CLASSES];	 /* sum_exec_runtime of the live threads */
	__u64 slice_ns[CLASSES]; /* not yet in run_ns: the slices being run now */
	__u64 exited_ns;	 /* of threads that have exited */
	__u64 vcpu_wait_ns;	 /* run_delay of the live vCPU threads */
	__u64 wait_ns;		 /* run_delay of all live threads */
	__u64 switches;		 /* pcount of all live threads */
	__u64 read_bytes;	 /* of live and exited threads, like the next two */
	__u64 write_bytes;
	__u64 cancelled_write_bytes;
	__u32 threads;
	__u32 vcpus;
	__u32 seq;	/* of stats_lock when exited_ns was read */
	__u32 expected; /* threads there were then */
	__u32 status;
	__u32 retries;
	__u32 fields; /* FIELD_*: what this kernel counts */
	__u32 pad;
};

/* scheduler_offset is CLOCK_MONOTONIC minus the scheduler's clock, or a little
 * more: the least difference seen in this pass. User space reads its own
 * thread's CPU clock right before a pass, which updates that CPU's run queue.
 */
static __s64 scheduler_offset;

static __always_inline __s64 offset_of(struct rq *rq)
{
	return bpf_ktime_get_ns() - BPF_CORE_READ(rq, clock);
}

static __always_inline void start_pass(void)
{
	struct task_struct *current = (void *)bpf_get_current_task();
	struct rq *rq = run_queue(current);

	scheduler_offset = rq ? offset_of(rq) : 0;
}

/* slice_ns is the time that t has been on its CPU since its sum_exec_runtime
 * was last updated, which happens at least once a tick.
 */
static __always_inline __u64 slice_ns(struct task_struct *t, __u64 exec_start)
{
	struct rq *rq = run_queue(t);
	__u64 clock, clock_task;
	__s64 offset, slice;
	__u64 now;

	/* Until the switch is complete it stays on_cpu. */
	if (!rq || BPF_CORE_READ(rq, curr) != t)
		return 0;
	clock = BPF_CORE_READ(rq, clock);
	clock_task = BPF_CORE_READ(rq, clock_task);
	now = bpf_ktime_get_ns();
	offset = now - clock;
	if (offset < scheduler_offset)
		scheduler_offset = offset;
	slice = now - scheduler_offset - (clock - clock_task) - exec_start;
	if (slice < 0 || slice > MAX_SLICE_NS)
		return 0;
	return slice;
}

#define BYTES(a, b, c, d, e, f, g, h)                                                              \
	((__u64)(a) | (__u64)(b) << 8 | (__u64)(c) << 16 | (__u64)(d) << 24 | (__u64)(e) << 32 |   \
	 (__u64)(f) << 40 | (__u64)(g) << 48 | (__u64)(h) << 56)
#define FIRST(n) (~0ULL >> (64 - 8 * (n)))

/* class_of tells a QEMU thread's class by its name (QEMU's debug-threads, which
 * libvirt always asks for). bpf.ClassOf is its twin in Go.
 */
static __always_inline __u32 class_of(struct task_struct *t)
{
	__u64 comm[2] = {};

	bpf_probe_read_kernel(comm, sizeof(comm), &t->comm);

	/* "CPU 0/KVM", "CPU 0/TCG"; "ALL CPUs/TCG" when TCG has one thread */
	if ((comm[0] & FIRST(4)) == BYTES('C', 'P', 'U', ' ', 0, 0, 0, 0) ||
	    comm[0] == BYTES('A', 'L', 'L', ' ', 'C', 'P', 'U', 's'))
		return CLASS_VCPU;
	/* libvirt's "IO mon_iothread" serves the monitor, no disk */
	if ((comm[0] & FIRST(3)) == BYTES('I', 'O', ' ', 0, 0, 0, 0, 0)) {
		if (comm[0] == BYTES('I', 'O', ' ', 'm', 'o', 'n', '_', 'i') &&
		    comm[1] == BYTES('o', 't', 'h', 'r', 'e', 'a', 'd', 0))
			return CLASS_EMULATOR;
		return CLASS_IOTHREAD;
	}
	/* "worker", and the kernel's io_uring threads of this process */
	if ((comm[0] & FIRST(7)) == BYTES('w', 'o', 'r', 'k', 'e', 'r', 0, 0) ||
	    comm[0] == BYTES('i', 'o', 'u', '-', 'w', 'r', 'k', '-') ||
	    comm[0] == BYTES('i', 'o', 'u', '-', 's', 'q', 'p', '-'))
		return CLASS_WORKER;
	/* "vhost-PID", tasks of the process since Linux 6.4 */
	if ((comm[0] & FIRST(6)) == BYTES('v', 'h', 'o', 's', 't', '-', 0, 0))
		return CLASS_VHOST;
	return CLASS_EMULATOR;
}

static __always_inline void add_io(struct usage *u, struct task_io_accounting *io)
{
	if (!bpf_core_field_exists(io->read_bytes))
		return;
	u->read_bytes += io->read_bytes;
	u->write_bytes += io->write_bytes;
	u->cancelled_write_bytes += io->cancelled_write_bytes;
}

/* begin reads what the process keeps of its exited threads. */
static __always_inline void begin(struct usage *u, struct signal_struct *sig)
{
	u->exited_ns = sig->sum_sched_runtime;
	u->expected = sig->nr_threads;
	if (bpf_core_field_exists(sig->ioac.read_bytes))
		u->fields |= FIELD_IO;
	add_io(u, &sig->ioac);
}

/* add_thread adds a live thread of the process. */
static __always_inline void add_thread(struct usage *u, struct task_struct *t)
{
	__u32 class = class_of(t);
	__u64 run, slice = 0;

	run = t->se.sum_exec_runtime;
	if (running(t)) {
		__u64 again;

		barrier();
		slice = slice_ns(t, t->se.exec_start);
		barrier();
		again = t->se.sum_exec_runtime;
		/* The tick, or a switch, added the slice while we measured it. */
		if (again != run) {
			run = again;
			slice = 0;
		}
	}

	if (class < CLASSES) {
		u->run_ns[class] += run;
		u->slice_ns[class] += slice;
	}
	u->threads++;
	if (bpf_core_field_exists(t->sched_info.run_delay)) {
		u->fields |= FIELD_WAIT;
		u->wait_ns += t->sched_info.run_delay;
		u->switches += t->sched_info.pcount;
		if (class == CLASS_VCPU)
			u->vcpu_wait_ns += t->sched_info.run_delay;
	}
	if (class == CLASS_VCPU)
		u->vcpus++;
	add_io(u, &t->ioac);
}

/* check says whether leader is the process that user space means. start_ticks
 * is its start time as in /proc/PID/stat, 0 if any will do.
 */
static __always_inline enum status check(struct task_struct *leader, __u64 start_ticks)
{
	if (leader->pid != leader->tgid || leader->exit_state == EXIT_DEAD)
		return STATUS_GONE;
	if (leader->flags & PF_KTHREAD)
		return STATUS_KERNEL_THREAD;
	if (start_ticks && leader->start_boottime / NS_PER_CLOCK_TICK != start_ticks)
		return STATUS_REUSED;
	return STATUS_OK;
}

#endif
