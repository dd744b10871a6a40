/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* What the threads of a QEMU are, for all that counts them. */
#ifndef KVMETER_THREAD_H
#define KVMETER_THREAD_H

#include "kernel.h"

#define NS_PER_CLOCK_TICK 10000000 /* USER_HZ is 100: the unit of /proc/PID/stat */

#define FIELD_IO   1
#define FIELD_WAIT 2

enum class {
	CLASS_VCPU,
	CLASS_EMULATOR,
	CLASS_IOTHREAD,
	CLASS_WORKER,
	CLASS_VHOST,
	CLASSES,
};

#define BYTES(a, b, c, d, e, f, g, h)                                                              \
	((__u64)(a) | (__u64)(b) << 8 | (__u64)(c) << 16 | (__u64)(d) << 24 | (__u64)(e) << 32 |   \
	 (__u64)(f) << 40 | (__u64)(g) << 48 | (__u64)(h) << 56)
#define FIRST(n) (~0ULL >> (64 - 8 * (n)))

/* class_of tells a QEMU thread's class by its name (QEMU's debug-threads, which
 * libvirt always asks for). bpf.ClassOf is its twin in Go.
 */
static __always_inline __u32 class_of(__u64 comm[2])
{
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

#endif
