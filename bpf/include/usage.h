/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* What walk and iter count, and how: both add up the same counters of the
 * same tasks into the same record, which bpf/record.go decodes.
 */
#ifndef KVMETER_USAGE_H
#define KVMETER_USAGE_H

#include "process.h"

#define MAX_THREADS  16384	  /* of one process, bounds the RCU section */
#define MAX_VCPUS    16384	  /* records a pass; no more are told of */
#define MAX_SLICE_NS 2000000000LL /* a longer one is a clock that cannot be trusted */

struct usage {
	__u64 run_ns[CLASSES];	 /* sum_exec_runtime of the live threads */
	__u64 slice_ns[CLASSES]; /* not yet in run_ns: the slices being run now */
	__u64 wait_ns[CLASSES];	 /* run_delay of the live threads */
	__u64 switches[CLASSES]; /* pcount of the live threads */
	__u64 exited_ns;	 /* of threads that have exited */
	__u64 read_bytes;	 /* of live and exited threads, like the next two */
	__u64 write_bytes;
	__u64 cancelled_write_bytes;
	__u32 threads;
	__u32 vcpus;
	__u32 seq;	/* of stats_lock when exited_ns was read */
	__u32 expected; /* threads there were then */
	__u32 status;
	__u32 retries;
	__u32 fields;	   /* FIELD_*: what this kernel counts */
	__u32 first_vcpu;  /* record; walk's are one after the other */
	__u32 vcpu_number; /* of records: less than vcpus if there was no room */
	__u32 running;	   /* not 0: there are slices */
};

/* What one vCPU thread has counted. */
struct vcpu {
	__u32 slot; /* of its process, in usages */
	__u32 tid;
	__u64 number;	/* the 8 characters of its name after "CPU " */
	__u64 slice_ns; /* not yet in run_ns */
	__u64 run_ns;
	__u64 wait_ns;
	__u64 switches;
};

/* What a thread has counted. */
struct thread {
	__u64 run_ns;
	__u64 wait_ns;
	__u64 switches;
	__u64 read_bytes;
	__u64 write_bytes;
	__u64 cancelled_write_bytes;
	__u64 number; /* as in struct vcpu */
	__u32 tid;
	__u8 class;
	__u8 pad[3];
};

/* What tells whether a thread has run since. */
struct mark {
	__u64 task;   /* its address */
	__u64 run_ns; /* when it was observed; NEVER if it runs without se.on_rq, as a real-time
		       * thread does
		       */
};

#define NEVER (~0ULL)

/* Written by the programs, in a pass from the first on. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_VCPUS);
	__type(key, __u32);
	__type(value, struct vcpu);
} vcpus SEC(".maps");

static __u32 vcpu_tail; /* records of this pass */

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
	vcpu_tail = 0;
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

/* begin reads what the process keeps of its exited threads. */
static __always_inline void begin(struct usage *u, struct signal_struct *sig)
{
	u->exited_ns = sig->sum_sched_runtime;
	u->expected = sig->nr_threads;
	u->first_vcpu = vcpu_tail;
	if (bpf_core_field_exists(((struct task_struct *)0)->sched_info.run_delay))
		u->fields |= FIELD_WAIT;
	if (!bpf_core_field_exists(sig->ioac.read_bytes))
		return;
	u->fields |= FIELD_IO;
	u->read_bytes = sig->ioac.read_bytes;
	u->write_bytes = sig->ioac.write_bytes;
	u->cancelled_write_bytes = sig->ioac.cancelled_write_bytes;
}

/* observe reads a live thread of the process into m and r, and returns the
 * slice that it is running now in ns.
 */
static __always_inline __u64 observe(struct mark *m, struct thread *r, struct task_struct *t)
{
	__u64 comm[2] = {}, run = t->se.sum_exec_runtime, slice = 0;
	int eager = 0;

	if (running(t)) {
		__u64 again;

		eager = !t->se.on_rq;
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
	m->task = (__u64)t;
	m->run_ns = eager ? NEVER : run;
	r->run_ns = run;
	if (bpf_core_field_exists(t->sched_info.run_delay)) {
		r->wait_ns = t->sched_info.run_delay;
		r->switches = t->sched_info.pcount;
	}
	if (bpf_core_field_exists(t->ioac.read_bytes)) {
		r->read_bytes = t->ioac.read_bytes;
		r->write_bytes = t->ioac.write_bytes;
		r->cancelled_write_bytes = t->ioac.cancelled_write_bytes;
	}
	bpf_probe_read_kernel(comm, sizeof(comm), &t->comm);
	r->class = class_of(comm);
	r->number = comm[0] >> 32 | comm[1] << 32;
	r->tid = t->pid;
	return slice;
}

/* add adds what was observed of a thread. */
static __always_inline void add(struct usage *u, __u32 slot, struct thread *r, __u64 slice)
{
	/* From memory, so that the verifier need not follow each class. */
	__u32 class = *(volatile __u8 *)&r->class, tail = vcpu_tail;
	struct vcpu *v;

	if (class >= CLASSES) /* never */
		return;
	u->run_ns[class] += r->run_ns;
	u->slice_ns[class] += slice;
	u->running |= slice;
	u->wait_ns[class] += r->wait_ns;
	u->switches[class] += r->switches;
	u->read_bytes += r->read_bytes;
	u->write_bytes += r->write_bytes;
	u->cancelled_write_bytes += r->cancelled_write_bytes;
	u->threads++;
	if (class != CLASS_VCPU)
		return;
	u->vcpus++;
	v = bpf_map_lookup_elem(&vcpus, &tail);
	if (!v)
		return;
	v->slot = slot;
	v->tid = r->tid;
	v->number = r->number;
	v->slice_ns = slice;
	v->run_ns = r->run_ns;
	v->wait_ns = r->wait_ns;
	v->switches = r->switches;
	vcpu_tail = tail + 1;
	u->vcpu_number++;
}

#endif
