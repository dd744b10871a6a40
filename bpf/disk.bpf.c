/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
//go:build ignore

/* Counts what followed processes do to followed files: requests, bytes and
 * latency of reads and writes, flushes. Loaded and read by bpf/disk.go, which
 * attaches those of the programs that the kernel takes and that together count
 * each request once; tested by bpf/disk_test.go and collectors/disk.
 *
 * A request belongs to who submits it: there the process is current, and its
 * file is looked up. In flights it waits for its completion, which may come in an
 * interrupt on another CPU, knows it by its address and asks nothing of current.
 *
 * User space writes processes and files, the programs write devices, flights and
 * busy.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define MAX_DEVICES 2048
#define BUCKETS	    28 /* of the histograms */
#define FIRST_POWER 9  /* the first bucket holds what took less than 2^10 ns */

/* Powers of two. */
#define PROCESS_BITS	65536
#define FILE_SETS	4096
#define FILE_WAYS	4
#define FILE_PROBES	8 /* sets that an entry may be in */
#define FLIGHT_SET_BITS 11
#define FLIGHT_SETS	(1 << FLIGHT_SET_BITS)
#define FLIGHT_WAYS	4
#define MAX_STRANGERS	64

#define GOLDEN	 0x9e3779b97f4a7c15ULL /* 2^64 / golden ratio: multiplicative hashing */
#define GOLDEN32 0x9e3779b1U	       /* the same of 2^32 */

#define BLOCK_DEVICE ~0U /* in the place of a file system's device */

/* Requests on a file that other programs count than io_uring's. */
#define COVERED_DIRECT	 1
#define COVERED_BUFFERED 2
#define COVERED_FLUSHES	 4
#define COVERED_SHIFT	 16
#define DEVICE_MASK	 0xffff
#define UNFOLLOWED	 ~0U

#define S_IFMT	    0170000
#define S_IFBLK	    0060000
#define IOCB_NOWAIT 8	/* RWF_NOWAIT in include/uapi/linux/fs.h */
#define EIOCBQUEUED 529 /* include/linux/errno.h: it completes later */

/* enum io_uring_op in include/uapi/linux/io_uring.h */
#define IORING_OP_READV	      1
#define IORING_OP_WRITEV      2
#define IORING_OP_FSYNC	      3
#define IORING_OP_READ_FIXED  4
#define IORING_OP_WRITE_FIXED 5
#define IORING_OP_READ	      22
#define IORING_OP_WRITE	      23

enum operation {
	OPERATION_READ,
	OPERATION_WRITE,
	OPERATION_FLUSH,
	OPERATION_MASK = 3,
	/* Added to one of them: */
	BUFFERED = 4,
	NOWAIT = 8, /* io_uring may submit it again, in a thread that may wait */
};

/* Which programs saw a request begin: part of what is hashed. struct io_kiocb and
 * the struct kiocb in it have the same address, and so always different sets.
 */
enum tag {
	TAG_IOMAP,
	TAG_FILE,
	TAG_URING,
	TAG_FLUSH,
};

const volatile __u32 o_direct = 040000; /* O_DIRECT of this architecture */
const volatile __u32 shard_bits = 0;	/* each device's counters have 2^shard_bits copies */

/* Requests are the sums of the histograms. */
struct device {
	__u64 bytes[2]; /* by operation, like the next */
	__u64 ns[2];
	__u64 flushes;
	__u64 flush_ns;
	__u64 buffered; /* of the bytes, those that went through the page cache */
	__u64 pad;
	__u64 latency[2][BUCKETS];
};

/* The copies of device d are from d << shard_bits on, one for each CPU modulo
 * their number, so that CPUs seldom wait for each other. Interrupts add to them
 * too: atomically.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_DEVICES); /* times the copies */
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

/* A file that a process is followed on. */
struct file_key {
	__u64 ino; /* of a block device its number */
	__u32 dev;
	__u32 tgid; /* 0: nothing is or ever was here; ~0: nothing is */
};

/* User space puts an entry into the set that its hash names, or where that is
 * full into the next that has room.
 */
struct file_set {
	struct file_key keys[FILE_WAYS];
	__u32 devices[FILE_WAYS]; /* index into devices, with COVERED_* above COVERED_SHIFT */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, FILE_SETS);
	__type(key, __u32);
	__type(value, struct file_set);
} files SEC(".maps");

/* Bit tgid % PROCESS_BITS is set for processes that have files that are followed;
 * in the second half, for those that need io_uring's tracepoints. This is nearly
 * all that a request of another process costs when it is submitted. Like busy it
 * is small and not mapped, and so in memory that the kernel maps by large pages:
 * the TLB has them, even when a CPU has just been idle.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * PROCESS_BITS / 64);
	__type(key, __u32);
	__type(value, __u64);
} processes SEC(".maps");

/* How many flights there are in two sets each. This is nearly all that a
 * request of another process costs when it completes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLIGHT_SETS / 2);
	__type(key, __u32);
	__type(value, __u64);
} busy SEC(".maps");

/* What is in flight. Where a set is full the oldest makes room: its end may have
 * been missed.
 */
struct flight {
	__u64 key; /* an address, or a tid; 0: free */
	__u64 start_ns;
	__u32 device; /* TAG_URING: the tgid */
	__u32 operation;
};

/* A file that is not followed, of a process that is. User space takes it out
 * when it has seen it.
 */
struct stranger {
	__u64 ino;
	__u32 dev;
	__u32 tgid; /* 0: nothing is here */
	__u64 requests;
};

struct state {
	struct flight flights[FLIGHT_SETS][FLIGHT_WAYS];
	struct stranger strangers[MAX_STRANGERS];
	__u64 lost;    /* flights that made room */
	__u64 endless; /* flights of which no end was seen before their key came again */
};

/* In memory that user space maps, too. */
struct state shared;

/* Cold code goes out of the way of what runs for each request. */
#define unlikely(x) __builtin_expect(!!(x), 0)
#define likely(x)   __builtin_expect(!!(x), 1)

#define ADD(counter, n) ((void)__sync_fetch_and_add(&(counter), n))

static __always_inline __u32 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

static __always_inline int followed(__u32 half, __u32 tgid)
{
	__u32 i = tgid % PROCESS_BITS / 64 + half * (PROCESS_BITS / 64);
	__u64 *word = bpf_map_lookup_elem(&processes, &i);

	return word && *word >> tgid % 64 & 1;
}

/* find returns a file's device and COVERED_*, or UNFOLLOWED. */
static __always_inline __u32 find(__u64 ino, __u32 dev, __u32 tgid)
{
	__u32 set = (ino ^ (__u64)tgid << 32) * GOLDEN >> 52;

	for (int probe = 0; probe < FILE_PROBES; probe++, set++) {
		struct file_set *s;

		set &= FILE_SETS - 1;
		s = bpf_map_lookup_elem(&files, &set);
		if (unlikely(!s))
			return UNFOLLOWED;
		for (int i = 0; i < FILE_WAYS; i++) {
			struct file_key *k = &s->keys[i];

			if (likely(k->tgid == tgid && k->ino == ino && k->dev == dev))
				return s->devices[i];
			if (unlikely(!k->tgid))
				return UNFOLLOWED;
		}
	}
	return UNFOLLOWED;
}

static __always_inline void note_stranger(__u64 ino, __u32 dev, __u32 tgid)
{
	__u32 i = (ino ^ (__u64)tgid << 32) * GOLDEN >> 58;
	struct stranger *s = &shared.strangers[i];

	if (!s->tgid) {
		s->ino = ino;
		s->dev = dev;
		barrier();
		s->tgid = tgid;
	}
	if (s->tgid == tgid && s->ino == ino && s->dev == dev)
		ADD(s->requests, 1);
}

/* file_of looks up an inode of a process that is followed, like find. */
static __always_inline __u32 file_of(struct inode *inode, __u32 tgid)
{
	__u64 ino = inode->i_ino;
	__u32 dev, file;

	if (unlikely((inode->i_mode & S_IFMT) == S_IFBLK)) {
		ino = inode->i_rdev;
		dev = BLOCK_DEVICE;
	} else {
		dev = inode->i_sb->s_dev;
	}
	file = find(ino, dev, tgid);
	if (unlikely(file == UNFOLLOWED))
		note_stranger(ino, dev, tgid);
	return file;
}

/* set_of takes the lower half of an address only, which is as much of it as the
 * verifier lets a program calculate with.
 */
static __always_inline __u32 set_of(const void *key, enum tag tag)
{
	__u32 low = (__u32)(__u64)key;

	asm volatile("" : "+w"(low)); /* or it is shifted, which is calculating */
	return low * GOLDEN32 >> (32 - FLIGHT_SET_BITS) ^ tag;
}

static __always_inline __u64 *busy_of(__u32 set)
{
	__u32 i = set / 2;

	return bpf_map_lookup_elem(&busy, &i);
}

static __always_inline void depart(const void *key, enum tag tag, __u32 device, __u32 operation)
{
	__u32 set = set_of(key, tag);
	struct flight *flights = shared.flights[set], *f;
	__u64 *n = busy_of(set);

	if (unlikely(!n))
		return;
	for (int i = 0; i < FLIGHT_WAYS; i++) {
		f = &flights[i];
		if (unlikely(f->key == (__u64)key)) {
			if (!(f->operation & NOWAIT))
				ADD(shared.endless, 1);
			goto found;
		}
	}
	for (int i = 0; i < FLIGHT_WAYS; i++) {
		f = &flights[i];
		if (likely(!f->key) && !__sync_val_compare_and_swap(&f->key, 0, (__u64)key)) {
			ADD(*n, 1);
			goto found;
		}
	}
	ADD(shared.lost, 1);
	f = &flights[0];
	for (int i = 1; i < FLIGHT_WAYS; i++) {
		if (flights[i].start_ns < f->start_ns)
			f = &flights[i];
	}
	f->key = (__u64)key;
found:
	f->device = device;
	f->operation = operation;
	f->start_ns = bpf_ktime_get_ns();
}

/* land takes a flight out; 0: there is none. */
static __always_inline int land(const void *key, enum tag tag, struct flight *was)
{
	__u32 set = set_of(key, tag);
	__u64 *n = busy_of(set);

	if (!n || !*n)
		return 0;
	for (int i = 0; i < FLIGHT_WAYS; i++) {
		struct flight *f = &shared.flights[set][i];

		if (likely(f->key == (__u64)key)) {
			*was = *f;
			f->key = 0;
			ADD(*n, -1);
			return 1;
		}
	}
	return 0;
}

static __always_inline __u32 log2(__u64 v)
{
	__u32 n = 0;

	if (v >> 32) {
		v >>= 32;
		n += 32;
	}
	if (v >> 16) {
		v >>= 16;
		n += 16;
	}
	if (v >> 8) {
		v >>= 8;
		n += 8;
	}
	if (v >> 4) {
		v >>= 4;
		n += 4;
	}
	if (v >> 2) {
		v >>= 2;
		n += 2;
	}
	return n + (v >> 1);
}

/* count adds a request that has succeeded. */
static __always_inline void count(__u32 device, __u32 operation, __u64 bytes, __u64 ns)
{
	__u32 place = device << shard_bits;
	struct device *d;
	__u32 bucket;

	if (shard_bits)
		place |= bpf_get_smp_processor_id() & ((1 << shard_bits) - 1);
	d = bpf_map_lookup_elem(&devices, &place);
	if (!d)
		return;
	if (unlikely(operation & BUFFERED))
		ADD(d->buffered, bytes);
	operation &= OPERATION_MASK;
	if (unlikely(operation == OPERATION_FLUSH)) {
		ADD(d->flush_ns, ns);
		ADD(d->flushes, 1);
		return;
	}
	bucket = log2(ns);
	bucket = bucket < FIRST_POWER ? 0 : bucket - FIRST_POWER;
	if (unlikely(bucket >= BUCKETS))
		bucket = BUCKETS - 1;
	if (operation == OPERATION_WRITE) {
		ADD(d->bytes[1], bytes);
		ADD(d->ns[1], ns);
		ADD(d->latency[1][bucket], 1);
	} else {
		ADD(d->bytes[0], bytes);
		ADD(d->ns[0], ns);
		ADD(d->latency[0][bucket], 1);
	}
}

/* arrive is where a request ends. */
static __always_inline int arrive(const void *key, enum tag tag, const __u64 *result)
{
	struct flight was;

	if (land(key, tag, &was) && (__s64)*result >= 0)
		count(was.device, was.operation, *result, bpf_ktime_get_ns() - was.start_ns);
	return 0;
}

/* begin_io is where a process submits a request. */
static __always_inline int begin_io(struct kiocb *k, enum tag tag, __u32 operation, __u32 tgid)
{
	struct file *file = k->ki_filp;
	__u32 found = file_of(file->f_inode, tgid);

	if (unlikely(found == UNFOLLOWED))
		return 0;
	if (tag == TAG_FILE && !(file->f_flags & o_direct))
		operation |= BUFFERED;
	if (k->ki_flags & IOCB_NOWAIT)
		operation |= NOWAIT;
	depart(k, tag, found & DEVICE_MASK, operation);
	return 0;
}

/* Direct I/O on a file system, of whatever process and way to ask for it. In
 * the context of who submits.
 */
SEC("tp_btf/iomap_dio_rw_begin")
int iomap_begin(__u64 *ctx)
{
	__u32 tgid = current_tgid();
	struct iov_iter *iter;

	if (!followed(0, tgid))
		return 0;
	iter = (void *)ctx[1];
	return begin_io((void *)ctx[0], TAG_IOMAP,
			iter->data_source ? OPERATION_WRITE : OPERATION_READ, tgid);
}

/* In any context. */
SEC("tp_btf/iomap_dio_complete")
int iomap_end(__u64 *ctx)
{
	return arrive((void *)ctx[0], TAG_IOMAP, &ctx[2]);
}

/* Flushes of ext4, of whatever way to ask for them. Like all flushes but
 * io_uring's they end in the thread that began them.
 */
static __always_inline const void *current_tid(void)
{
	return (const void *)(bpf_get_current_pid_tgid() & ~0U);
}

static __always_inline int begin_flush(struct file *file)
{
	__u32 tgid = current_tgid(), found;

	if (!followed(0, tgid))
		return 0;
	found = file_of(file->f_inode, tgid);
	if (found != UNFOLLOWED)
		depart(current_tid(), TAG_FLUSH, found & DEVICE_MASK, OPERATION_FLUSH);
	return 0;
}

static __always_inline int end_flush(int result)
{
	__u64 extended = (__s64)result;

	return arrive(current_tid(), TAG_FLUSH, &extended);
}

SEC("tp_btf/ext4_sync_file_enter")
int sync_begin(__u64 *ctx)
{
	return begin_flush((void *)ctx[0]);
}

SEC("tp_btf/ext4_sync_file_exit")
int sync_end(__u64 *ctx)
{
	return end_flush(ctx[1]);
}

/* io_uring, of processes some of whose requests no other program counts. When a
 * request is submitted its file is not known yet.
 */
static __always_inline int uring_begin(struct io_kiocb *req)
{
	__u32 tgid = current_tgid(), operation;

	if (!followed(1, tgid))
		return 0;
	switch (req->opcode) {
	case IORING_OP_READV:
	case IORING_OP_READ_FIXED:
	case IORING_OP_READ:
		operation = OPERATION_READ;
		break;
	case IORING_OP_WRITEV:
	case IORING_OP_WRITE_FIXED:
	case IORING_OP_WRITE:
		operation = OPERATION_WRITE;
		break;
	case IORING_OP_FSYNC:
		operation = OPERATION_FLUSH;
		break;
	default:
		return 0;
	}
	depart(req, TAG_URING, tgid, operation);
	return 0;
}

/* Since 6.3 (2ad57931db64 "io_uring: rename trace_io_uring_submit_sqe()
 * tracepoint"); io_uring_submit_sqe before.
 */
SEC("tp_btf/io_uring_submit_req")
int uring_begin_req(__u64 *ctx)
{
	return uring_begin((void *)ctx[0]);
}

SEC("tp_btf/io_uring_submit_sqe")
int uring_begin_sqe(__u64 *ctx)
{
	return uring_begin((void *)ctx[0]);
}

/* The request holds its file and its result until after. */
SEC("tp_btf/io_uring_complete")
int uring_end(__u64 *ctx)
{
	struct io_kiocb *req = (void *)ctx[1];
	__u32 covered, dev, found;
	struct inode *inode;
	struct flight was;
	struct file *file;
	int result;
	__u64 ino;

	if (!land(req, TAG_URING, &was))
		return 0;
	result = BPF_CORE_READ(req, cqe.res);
	file = BPF_CORE_READ(req, file);
	if (result < 0 || !file)
		return 0;
	inode = BPF_CORE_READ(file, f_inode);
	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) == S_IFBLK) {
		ino = BPF_CORE_READ(inode, i_rdev);
		dev = BLOCK_DEVICE;
	} else {
		ino = BPF_CORE_READ(inode, i_ino);
		dev = BPF_CORE_READ(inode, i_sb, s_dev);
	}
	if (was.operation == OPERATION_FLUSH)
		covered = COVERED_FLUSHES;
	else if (BPF_CORE_READ(file, f_flags) & o_direct)
		covered = COVERED_DIRECT;
	else
		covered = COVERED_BUFFERED;
	if (covered == COVERED_BUFFERED)
		was.operation |= BUFFERED;
	found = find(ino, dev, was.device);
	if (found == UNFOLLOWED)
		note_stranger(ino, dev, was.device);
	else if (!(found >> COVERED_SHIFT & covered))
		count(found & DEVICE_MASK, was.operation, result,
		      bpf_ktime_get_ns() - was.start_ns);
	return 0;
}

/* A call that returns EIOCBQUEUED has begun what completes later, by aio_end or
 * uring_file_end, and perhaps already has.
 */
static __always_inline int end_call(struct kiocb *k, const __u64 *result)
{
	if ((__s64)*result == -EIOCBQUEUED)
		return 0;
	return arrive(k, TAG_FILE, result);
}

static __always_inline int begin_call(struct kiocb *k, __u32 operation)
{
	__u32 tgid = current_tgid();

	return followed(0, tgid) ? begin_io(k, TAG_FILE, operation, tgid) : 0;
}

/* What a file system, or the block layer for its devices, does when it is asked
 * for I/O, direct or buffered.
 */
#define FILE_PROGRAMS(name, read, write)                                                           \
	SEC("fentry/" #read)                                                                       \
	int name##_read_begin(__u64 *ctx)                                                          \
	{                                                                                          \
		return begin_call((void *)ctx[0], OPERATION_READ);                                 \
	}                                                                                          \
	SEC("fexit/" #read)                                                                        \
	int name##_read_end(__u64 *ctx)                                                            \
	{                                                                                          \
		return end_call((void *)ctx[0], &ctx[2]);                                          \
	}                                                                                          \
	SEC("fentry/" #write)                                                                      \
	int name##_write_begin(__u64 *ctx)                                                         \
	{                                                                                          \
		return begin_call((void *)ctx[0], OPERATION_WRITE);                                \
	}                                                                                          \
	SEC("fexit/" #write)                                                                       \
	int name##_write_end(__u64 *ctx)                                                           \
	{                                                                                          \
		return end_call((void *)ctx[0], &ctx[2]);                                          \
	}

#define FLUSH_PROGRAMS(name, flush)                                                                \
	SEC("fentry/" #flush)                                                                      \
	int name##_flush_begin(__u64 *ctx)                                                         \
	{                                                                                          \
		return begin_flush((void *)ctx[0]);                                                \
	}                                                                                          \
	SEC("fexit/" #flush)                                                                       \
	int name##_flush_end(__u64 *ctx)                                                           \
	{                                                                                          \
		return end_flush(ctx[4]);                                                          \
	}

FILE_PROGRAMS(ext4, ext4_file_read_iter, ext4_file_write_iter)
FILE_PROGRAMS(xfs, xfs_file_read_iter, xfs_file_write_iter)
FILE_PROGRAMS(block, blkdev_read_iter, blkdev_write_iter)
FLUSH_PROGRAMS(xfs, xfs_file_fsync)
FLUSH_PROGRAMS(block, blkdev_fsync)

/* In any context. */
SEC("fentry/aio_complete_rw")
int aio_end(__u64 *ctx)
{
	return arrive((void *)ctx[0], TAG_FILE, &ctx[1]);
}

SEC("fentry/io_complete_rw")
int uring_file_end(__u64 *ctx)
{
	return arrive((void *)ctx[0], TAG_FILE, &ctx[1]);
}

char _license[] SEC("license") = "Dual BSD/GPL";
