//go:build lab

package bpf_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/procfs"
)

// childEnv makes the test binary be another process instead. Its value is what
// to be: see beChild.
const childEnv = "KVMETER_BPF_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		os.Exit(beChild(what))
	}
	os.Exit(m.Run())
}

// beChild is "unprivileged", "unprivileged-life", "tcx", "clsact", "nothing",
// "written", or a list of threads separated by commas. Each is a thread's name
// after what it does: '*' works and rests in turn for ever, '#' works for ever, '.'
// rests for ever, '!' works for 20 ms and exits, '~' goes on making threads that
// work for 100 µs and exit, '%' works a little and gives itself one name after the
// other, '^' makes the process another one, with the threads of the variable
// KVMETER_BPF_NEXT, at SIGUSR1, '=' works for 100 ms, upon which the process exits.
func beChild(what string) int {
	switch what {
	case "unprivileged":
		return beUnprivileged()
	case "tcx", "clsact":
		return beUnprivilegedTCX(ways[what])
	case "unprivileged-life":
		return beUnprivilegedLife()
	case "nothing":
		return 0
	case "written":
		return beWriter()
	}
	var done sync.WaitGroup
	for thread := range strings.SplitSeq(what, ",") {
		if thread == "^" {
			return becomeAnother()
		}
		started := make(chan struct{})
		if thread[0] == '=' {
			done.Go(func() {
				close(started)
				nameThread(thread[1:])
				work(100 * time.Millisecond)
				runtime.Gosched()
			})
		} else {
			go beThread(thread[0], thread[1:], started)
		}
		<-started
	}
	if strings.Contains(what, "=") {
		done.Wait()
		return 0
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the test closes it or dies
	return 0
}

// becomeAnother replaces the process by an exec from a thread that is not its
// first one.
func becomeAnother() int {
	woken := make(chan os.Signal, 1)
	signal.Notify(woken, syscall.SIGUSR1)
	fmt.Println("ready")
	<-woken
	env := []string{childEnv + "=" + os.Getenv("KVMETER_BPF_NEXT"), "GOMAXPROCS=2"}
	for {
		go func() {
			runtime.LockOSThread()
			if unix.Gettid() != unix.Getpid() {
				fmt.Println(syscall.Exec("/proc/self/exe", []string{"child"}, env))
			}
			select {}
		}()
		time.Sleep(10 * time.Millisecond)
	}
}

// beWriter writes 1 MiB to a file of the working folder, from a thread that exits.
func beWriter() int {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		f, err := os.Create("file")
		if err == nil {
			_, err = f.Write(make([]byte, 1<<20))
			err = errors.Join(err, f.Sync(), f.Close())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func beThread(kind byte, name string, started chan struct{}) {
	if kind == '~' {
		close(started)
		for {
			done := make(chan struct{})
			go func() {
				nameThread(name)
				work(100 * time.Microsecond)
				close(done) // and take the thread along: it is locked
			}()
			<-done
		}
	}
	nameThread(name)
	if kind == '!' {
		work(20 * time.Millisecond)
		close(started)
		return
	}
	close(started)
	for i := 0; kind == '%'; i++ {
		work(50 * time.Microsecond)
		time.Sleep(200 * time.Microsecond)
		setName([]string{"CPU 7/KVM", "worker", "CPU 8/KVM", "IO iothread1", "anything"}[i%5])
	}
	for kind == '#' {
		work(time.Second)
	}
	for kind == '*' {
		work(2 * time.Millisecond)
		time.Sleep(3 * time.Millisecond)
	}
	select {}
}

// nameThread makes the calling goroutine a thread of that name.
func nameThread(name string) {
	runtime.LockOSThread()
	setName(name)
}

func setName(name string) {
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData(name+"\x00"))), 0, 0, 0); err != nil {
		panic(err)
	}
}

// work spends d on a CPU. The calling goroutine has its thread for itself.
func work(d time.Duration) {
	var ts unix.Timespec
	for until := int64(0); until == 0 || ts.Nano() < until; {
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
			panic(err)
		}
		if until == 0 {
			until = ts.Nano() + d.Nanoseconds()
		}
	}
}

// child is a process with threads of our choice.
type child struct {
	cmd  *exec.Cmd
	out  *bufio.Reader
	proc bpf.Proc
}

func startChild(t testing.TB, threads string) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+threads, "GOMAXPROCS=2")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: cmd, out: bufio.NewReader(stdout)}
	t.Cleanup(func() {
		stdin.Close()
		c.kill()
	})
	c.ready(t)
	start, err := procfs.StartTicks(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	c.proc = bpf.Proc{PID: cmd.Process.Pid, StartTicks: start}
	return c
}

// ready waits until the child has its threads.
func (c *child) ready(t testing.TB) {
	t.Helper()
	if line, err := c.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
}

// stop stops all threads of the child and returns once none is on a CPU.
func (c *child) stop(t testing.TB) {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, c.proc.PID, &info, unix.WSTOPPED|unix.WNOWAIT, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			t.Fatal(err)
		}
	}
	tasks, err := os.ReadDir("/proc/" + strconv.Itoa(c.proc.PID) + "/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		for {
			stat, err := os.ReadFile("/proc/" + strconv.Itoa(c.proc.PID) + "/task/" + task.Name() + "/stat")
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
				break // the thread has ended
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, state, _ := strings.Cut(string(stat), ") "); state[0] == 'T' {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	time.Sleep(20 * time.Millisecond) // stopped, and off its CPU
}

// resume lets the threads of a stopped child go on.
func (c *child) resume(t testing.TB) {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
}
