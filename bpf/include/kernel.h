/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* The kernel's types, as far as our programs read them. Offsets are relocated
 * when a program is loaded (CO-RE), so only names and kinds have to be right.
 */
#ifndef KVMETER_KERNEL_H
#define KVMETER_KERNEL_H

typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

#define NULL ((void *)0)

/* enum bpf_map_type, flags of BPF_MAP_CREATE: include/uapi/linux/bpf.h */
#define BPF_MAP_TYPE_HASH	  1
#define BPF_MAP_TYPE_ARRAY	  2
#define BPF_MAP_TYPE_RINGBUF	  27
#define BPF_MAP_TYPE_TASK_STORAGE 29
#define BPF_ANY			  0
#define BPF_F_NO_PREALLOC	  (1U << 0)
#define BPF_F_MMAPABLE		  (1U << 10)

#define BPF_LOCAL_STORAGE_GET_F_CREATE 1

#define PF_KTHREAD    0x00200000 /* include/linux/sched.h */
#define EXIT_DEAD     0x0010	 /* include/linux/sched.h */
#define TASK_COMM_LEN 16

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct task_struct;

struct rq {
	struct task_struct *curr;
	__u64 clock;	  /* scheduler clock at the run queue's last update, ns */
	__u64 clock_task; /* the same without interrupt and stolen time, ns */
};

struct cfs_rq {
	struct rq *rq;
	int throttle_count; /* of its group and those above that are out of quota */
};

struct sched_entity {
	unsigned char on_rq;	/* an int before 6.12 */
	__u64 exec_start;	/* clock_task when sum_exec_runtime was last updated, ns */
	__u64 sum_exec_runtime; /* ns on a CPU */
	struct cfs_rq *cfs_rq;	/* set for every scheduling class: the CPU's own */
};

struct sched_info {
	unsigned long pcount;	      /* times put on a CPU */
	unsigned long long run_delay; /* ns runnable but off CPU */
};

struct task_io_accounting {
	__u64 read_bytes;
	__u64 write_bytes;
	__u64 cancelled_write_bytes;
};

typedef struct {
	unsigned int sequence;
} seqcount_t;

typedef struct {
	seqcount_t seqcount;
} seqcount_spinlock_t;

typedef struct {
	seqcount_spinlock_t seqcount;
} seqlock_t;

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live; /* threads that do not exit yet */
	int nr_threads;
	seqlock_t stats_lock; /* held while a thread's totals move to the fields below */
	struct task_io_accounting ioac;
	unsigned long long sum_sched_runtime;
};

struct mm_struct {
	unsigned long arg_start; /* of the command line, in user space */
	unsigned long arg_end;
};

struct task_struct {
	struct mm_struct *mm;
	unsigned int __state; /* 0 is running or runnable */
	unsigned int flags;
	int on_cpu;
	struct sched_entity se;
	struct sched_info sched_info;
	int exit_state;
	__s32 pid;
	__s32 tgid;
	struct task_struct *group_leader;
	__u64 start_boottime; /* ns since boot, suspend included */
	char comm[TASK_COMM_LEN];
	struct signal_struct *signal;
	struct sighand_struct *sighand; /* NULL once its times are part of signal's */
	struct task_io_accounting ioac;
};

struct super_block {
	__u32 s_dev; /* major << 20 | minor */
};

struct inode {
	__u16 i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	__u32 i_rdev; /* of a device node, like s_dev */
};

struct file {
	struct inode *f_inode;
	unsigned int f_flags;
};

struct kiocb {
	struct file *ki_filp;
	int ki_flags;
};

struct iov_iter {
	_Bool data_source; /* the memory is the source: a write */
};

struct io_cqe {
	__s32 res;
};

struct io_kiocb {
	struct file *file;
	__u8 opcode; /* IORING_OP_* */
	struct io_cqe cqe;
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
	__u64 seq_num;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

#pragma clang attribute pop

#endif
