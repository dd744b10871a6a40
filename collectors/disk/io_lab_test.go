//go:build lab

package disk

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is one that a test makes, as QEMU would for a guest.
type request struct {
	write, flush bool
	offset, size int
}

// engine does requests the way that QEMU's aio mode of that name does.
type engine func(t testing.TB, file *os.File, requests []request)

var engines = map[string]engine{"threads": threads, "native": native, "io_uring": uring}

const depth = 16 // requests that an engine has in flight

// buffers returns memory that direct I/O takes: one for each request in flight.
func buffers(t testing.TB, requests []request) [][]byte {
	t.Helper()
	size := 4096
	for _, r := range requests {
		size = max(size, r.size)
	}
	all, err := unix.Mmap(-1, 0, depth*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(all) })
	var each [][]byte
	for i := range depth {
		each = append(each, all[i*size:(i+1)*size])
	}
	return each
}

// threads does them in a pool, each with a system call that waits for it.
func threads(t testing.TB, file *os.File, requests []request) {
	var next atomic.Int64
	var wait sync.WaitGroup
	fd := int(file.Fd())
	for _, b := range buffers(t, requests)[:4] {
		wait.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(requests) {
					return
				}
				if n, err := one(fd, requests[i], b); err != nil || n != requests[i].size {
					t.Errorf("request %d: %d bytes, %v", i, n, err)
				}
			}
		})
	}
	wait.Wait()
}

func one(fd int, r request, b []byte) (int, error) {
	switch {
	case r.flush:
		return 0, unix.Fdatasync(fd)
	case r.write:
		return unix.Pwritev(fd, [][]byte{b[:r.size]}, int64(r.offset))
	}
	return unix.Preadv(fd, [][]byte{b[:r.size]}, int64(r.offset))
}

// iocb is struct iocb in linux/aio_abi.h.
type iocb struct {
	data      uint64
	_         uint64
	opcode    uint16
	_         int16
	fd        uint32
	buf, size uint64
	offset    int64
	_         [2]uint64
}

type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

// native does reads and writes by io_submit(2), and flushes like threads.
func native(t testing.TB, file *os.File, requests []request) {
	var ctx uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, depth, uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		t.Fatal("io_setup:", errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ctx, 0, 0)
	memory := buffers(t, requests)
	cbs := make([]iocb, depth)
	var events [depth]ioEvent
	free := make([]int, 0, depth)
	for i := range depth {
		free = append(free, i)
	}
	reap := func(least int) {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ctx, uintptr(least), depth, uintptr(unsafe.Pointer(&events[0])), 0, 0)
		if errno != 0 {
			t.Fatal("io_getevents:", errno)
		}
		for _, e := range events[:n] {
			if want := int64(cbs[e.data].size); e.res != want {
				t.Errorf("got %d of %d bytes", e.res, want)
			}
			free = append(free, int(e.data))
		}
	}
	for _, r := range requests {
		if r.flush {
			reap(depth - len(free))
			if _, err := one(int(file.Fd()), r, nil); err != nil {
				t.Error(err)
			}
			continue
		}
		if len(free) == 0 {
			reap(1)
		}
		i := free[len(free)-1]
		free = free[:len(free)-1]
		cbs[i] = iocb{data: uint64(i), fd: uint32(file.Fd()), buf: uint64(uintptr(unsafe.Pointer(&memory[i][0]))), size: uint64(r.size), offset: int64(r.offset)}
		if r.write {
			cbs[i].opcode = 1 // IOCB_CMD_PWRITE
		}
		p := &cbs[i]
		if n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, 1, uintptr(unsafe.Pointer(&p))); n != 1 {
			t.Fatal("io_submit:", errno)
		}
	}
	reap(depth - len(free))
	runtime.KeepAlive(cbs)
}

// The parts of linux/io_uring.h that uring uses.
const (
	uringOpReadv    = 1
	uringOpWritev   = 2
	uringOpFsync    = 3
	uringDatasync   = 1
	uringGetEvents  = 1
	uringOffSQEs    = 0x10000000
	uringSingleMmap = 1
)

type uringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

type uringSQE struct {
	opcode, flags uint8
	priority      uint16
	fd            int32
	offset, addr  uint64
	size, opFlags uint32
	data          uint64
	_             [3]uint64
}

type uringCQE struct {
	data  uint64
	res   int32
	flags uint32
}

// uring does all of them by io_uring, as QEMU does: vectors, plain descriptors,
// flushes too.
func uring(t testing.TB, file *os.File, requests []request) {
	var p uringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, depth, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		t.Fatal("io_uring_setup:", errno)
	}
	defer unix.Close(int(fd))
	if p.features&uringSingleMmap == 0 {
		t.Fatal("the kernel's io_uring is older than Linux 5.4")
	}
	size := max(int(p.sq.array+4*p.sqEntries), int(p.cq.cqes)+int(p.cqEntries)*int(unsafe.Sizeof(uringCQE{})))
	ring, err := unix.Mmap(int(fd), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(ring)
	raw, err := unix.Mmap(int(fd), uringOffSQEs, int(p.sqEntries)*int(unsafe.Sizeof(uringSQE{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(raw)
	sqes := unsafe.Slice((*uringSQE)(unsafe.Pointer(&raw[0])), p.sqEntries)
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&ring[off])) }
	cqes := unsafe.Slice((*uringCQE)(unsafe.Pointer(&ring[p.cq.cqes])), p.cqEntries)

	memory := buffers(t, requests)
	vectors := make([]unix.Iovec, depth)
	sizes := make([]int, depth)
	free := make([]int, 0, depth)
	for i := range depth {
		free = append(free, i)
	}
	enter := func(submit, wait int) {
		for {
			n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, fd, uintptr(submit), uintptr(wait), uringGetEvents, 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if errno != 0 || int(n) != submit {
				t.Fatalf("io_uring_enter: %d of %d, %v", n, submit, errno)
			}
			break
		}
		for head := *word(p.cq.head); head != atomic.LoadUint32(word(p.cq.tail)); head++ {
			c := cqes[head&*word(p.cq.mask)]
			if int(c.res) != sizes[c.data] {
				t.Errorf("got %d of %d bytes", c.res, sizes[c.data])
			}
			free = append(free, int(c.data))
			atomic.StoreUint32(word(p.cq.head), head+1)
		}
	}
	for _, r := range requests {
		for len(free) == 0 || r.flush && len(free) < depth {
			enter(0, 1)
		}
		i := free[len(free)-1]
		free = free[:len(free)-1]
		sizes[i] = r.size
		tail := *word(p.sq.tail)
		at := tail & *word(p.sq.mask)
		e := &sqes[at]
		*e = uringSQE{fd: int32(file.Fd()), data: uint64(i)}
		if r.flush {
			e.opcode, e.opFlags = uringOpFsync, uringDatasync
		} else {
			vectors[i] = unix.Iovec{Base: &memory[i][0]}
			vectors[i].SetLen(r.size)
			e.opcode, e.offset, e.addr, e.size = uringOpReadv, uint64(r.offset), uint64(uintptr(unsafe.Pointer(&vectors[i]))), 1
			if r.write {
				e.opcode = uringOpWritev
			}
		}
		*word(p.sq.array + 4*at) = at
		atomic.StoreUint32(word(p.sq.tail), tail+1)
		enter(1, 0)
	}
	for len(free) < depth {
		enter(0, 1)
	}
	runtime.KeepAlive(vectors)
}

// makeImage makes a file of a size, written once, for direct I/O or not.
func makeImage(t testing.TB, path string, size int, direct bool) *os.File {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := os.O_RDWR | unix.O_CLOEXEC
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EINVAL) {
		t.Fatalf("%s: its file system does no direct I/O; set TMPDIR to one that does", path)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// asGuests returns the requests that the guest of the lab makes: 1,000 reads of
// 4 KiB, 512 writes of 64 KiB, and flushes.
func asGuests(flushes int) []request {
	var all []request
	for i := range 512 {
		all = append(all, request{write: true, offset: i % 64 << 16, size: 64 << 10})
	}
	for i := range 1000 {
		all = append(all, request{offset: i << 12, size: 4 << 10})
	}
	for range flushes {
		all = append(all, request{flush: true})
	}
	return all
}

const guestImage = 4 << 20
