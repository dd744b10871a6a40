/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Adds up what KVM has counted for the vCPUs of the asked processes, found by
 * their files: "kvm-vcpu:N", whose private data is KVM's struct of the vCPU.
 * Runs when user space asks (BPF_PROG_RUN), in its context; QEMU is not asked
 * and costs nothing. Read by bpf/kvm.go.
 *
 * KVM may be a module, whose types the loader of this program does not know:
 * user space reads them and says where the counters are.
 */
#include "process.h"

#define MAX_KVM_FIELDS 64   /* counters that are added up */
#define MAX_KVM_FDS    256  /* of one process that are remembered */
#define MAX_KVM_SCAN   8192 /* file descriptors of one process that are looked at */
#define KVM_STAT_BYTES 4096 /* of struct kvm_vcpu_stat at most */

extern struct task_struct *bpf_task_from_pid(__s32 pid) __ksym;
extern void bpf_task_release(struct task_struct *p) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct qstr___kvm {
	const unsigned char *name;
};

struct dentry___kvm {
	struct qstr___kvm d_name;
};

struct path___kvm {
	struct dentry___kvm *dentry;
};

struct file___kvm {
	void *private_data;
	struct path___kvm f_path;
};

struct fdtable___kvm {
	unsigned int max_fds;
	struct file___kvm **fd;
};

struct files_struct___kvm {
	struct fdtable___kvm *fdt;
};

struct task_struct___kvm {
	struct files_struct___kvm *files;
};

#pragma clang attribute pop

struct kvm_request {
	__u32 pid;   /* in the initial PID namespace */
	__u32 vcpus; /* that it should have: others are looked for; 0: as many as before */
	__u64 start_ticks;
};

/* What was counted of a process's vCPUs. */
struct kvm_usage {
	__u64 sums[MAX_KVM_FIELDS];
	__u32 status;
	__u32 vcpus; /* files that were found */
	__u32 scans; /* 1: the whole table of files was looked through */
	__u32 pad;
};

/* Where the counters are, in bytes. */
struct kvm_layout {
	__u32 stat;   /* struct kvm_vcpu_stat in struct kvm_vcpu */
	__u32 size;   /* of it */
	__u32 fields; /* that are added up */
	__u32 at[MAX_KVM_FIELDS];
	__u32 pad;
};

/* The argument of BPF_PROG_RUN. */
struct kvm_run {
	__u32 count;
	__u32 pad;
	struct kvm_layout layout;
};

/* The files of a process that were its vCPUs last time. */
struct kvm_known {
	__u32 pid;
	__u32 count;
	__u64 start_ticks;
	__u32 fds[MAX_KVM_FDS];
};

struct kvm_stat {
	__u8 bytes[KVM_STAT_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct kvm_request);
} kvm_requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct kvm_usage);
} kvm_usages SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PROCESSES);
	__type(key, __u32);
	__type(value, struct kvm_known);
} kvm_knowns SEC(".maps");

/* One vCPU's statistics; the program runs once at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kvm_stat);
} kvm_stats SEC(".maps");

static struct kvm_layout layout;

/* vcpu_file returns file descriptor fd's file if it is a vCPU's. */
static __always_inline struct file___kvm *vcpu_file(struct file___kvm **fds, __u32 fd)
{
	const unsigned char *text;
	struct file___kvm *file;
	__u64 name = 0;

	if (bpf_probe_read_kernel(&file, sizeof(file), &fds[fd]) || !file)
		return NULL;
	text = BPF_CORE_READ(file, f_path.dentry, d_name.name);
	if (bpf_probe_read_kernel(&name, sizeof(name), text))
		return NULL;
	return name == BYTES('k', 'v', 'm', '-', 'v', 'c', 'p', 'u') ? file : NULL;
}

/* add_vcpu adds the counters of the vCPU whose file fd is. While that is open
 * its memory stays: a file that was closed meanwhile counts nothing.
 */
static __always_inline int add_vcpu(struct kvm_usage *u, struct file___kvm **fds, __u32 fd)
{
	struct file___kvm *file = vcpu_file(fds, fd), *again = NULL;
	__u32 zero = 0, size = layout.size;
	struct kvm_stat *stat;
	void *vcpu;

	stat = bpf_map_lookup_elem(&kvm_stats, &zero);
	if (!file || !stat || size > sizeof(*stat))
		return 0;
	vcpu = BPF_CORE_READ(file, private_data);
	if (bpf_probe_read_kernel(stat, size, vcpu + layout.stat))
		return 0;
	bpf_probe_read_kernel(&again, sizeof(again), &fds[fd]);
	if (again != file)
		return 0;
	for (__u32 i = 0; i < MAX_KVM_FIELDS; i++) {
		__u32 at = layout.at[i];

		if (i >= layout.fields)
			break;
		if (at > sizeof(*stat) - sizeof(__u64))
			continue;
		u->sums[i] += *(__u64 *)(stat->bytes + at);
	}
	u->vcpus++;
	return 1;
}

struct scan {
	struct kvm_usage *u;
	struct kvm_known *known;
	struct file___kvm **fds;
};

static long scan_fd(__u32 fd, void *ctx)
{
	struct scan *s = ctx;
	__u32 n;

	if (!add_vcpu(s->u, s->fds, fd))
		return 0;
	n = s->known->count;
	if (n < MAX_KVM_FDS) {
		s->known->fds[n] = fd;
		s->known->count = n + 1;
	}
	return 0;
}

static long known_fd(__u32 i, void *ctx)
{
	struct scan *s = ctx;

	if (i >= MAX_KVM_FDS)
		return 1;
	return !add_vcpu(s->u, s->fds, s->known->fds[i]);
}

static __always_inline void read_vcpus(struct kvm_usage *u, struct kvm_known *known,
				       struct kvm_request *r, struct task_struct *leader)
{
	struct fdtable___kvm *fdt;
	struct scan s = {};
	__u32 fds, count;

	fdt = BPF_CORE_READ((struct task_struct___kvm *)leader, files, fdt);
	s.u = u;
	s.known = known;
	s.fds = BPF_CORE_READ(fdt, fd);
	fds = BPF_CORE_READ(fdt, max_fds);
	count = known->count;
	if (known->pid == r->pid && known->start_ticks == r->start_ticks && count &&
	    count <= MAX_KVM_FDS && (!r->vcpus || count == r->vcpus)) {
		bpf_loop(count, known_fd, &s, 0);
		if (u->vcpus == count)
			return;
	}
	__builtin_memset(u, 0, sizeof(*u));
	u->scans = 1;
	known->pid = r->pid;
	known->start_ticks = r->start_ticks;
	known->count = 0;
	bpf_loop(fds < MAX_KVM_SCAN ? fds : MAX_KVM_SCAN, scan_fd, &s, 0);
}

static long read_process(__u32 i, void *ctx)
{
	struct task_struct *leader;
	struct kvm_request *r;
	struct kvm_known *known;
	struct kvm_usage *u;
	enum status status;

	r = bpf_map_lookup_elem(&kvm_requests, &i);
	u = bpf_map_lookup_elem(&kvm_usages, &i);
	known = bpf_map_lookup_elem(&kvm_knowns, &i);
	if (!r || !u || !known)
		return 1;
	__builtin_memset(u, 0, sizeof(*u));
	leader = bpf_task_from_pid(r->pid);
	if (!leader)
		return 0;
	status = check(leader, r->start_ticks);
	if (status == STATUS_OK) {
		bpf_rcu_read_lock();
		read_vcpus(u, known, r, leader);
		bpf_rcu_read_unlock();
	}
	u->status = status;
	bpf_task_release(leader);
	return 0;
}

SEC("syscall")
int kvm(struct kvm_run *run)
{
	layout = run->layout;
	bpf_loop(run->count, read_process, NULL, 0);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
