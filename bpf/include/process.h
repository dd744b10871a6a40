/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* How user space asks for processes, and what it is told of one that cannot be
 * read.
 */
#ifndef KVMETER_PROCESS_H
#define KVMETER_PROCESS_H

#include "kernel.h"
#include "compat.h"
#include "thread.h"

#define MAX_PROCESSES 1024 /* records; user space asks in chunks of this */

enum status {
	STATUS_GONE, /* no such process; also what user space writes before a pass */
	STATUS_OK,
	STATUS_REUSED,
	STATUS_TORN,
	STATUS_TOO_MANY_THREADS,
	STATUS_KERNEL_THREAD,
	STATUS_UNCHANGED, /* no thread has run: all is as the last pass left it */
};

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
