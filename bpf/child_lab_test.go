//go:build lab

package bpf_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
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

// beChild is "unprivileged", or a list of threads separated by commas. Each is
// a thread's name after what it does: '*' works and rests in turn for ever, '.'
// rests for ever, '!' works for 20 ms and exits, '~' goes on making threads that
// work for 100 µs and exit.
func beChild(what string) int {
	if what == "unprivileged" {
		return beUnprivileged()
	}
	for thread := range strings.SplitSeq(what, ",") {
		started := make(chan struct{})
		go beThread(thread[0], thread[1:], started)
		<-started
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the test closes it or dies
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
	for kind == '*' {
		work(2 * time.Millisecond)
		time.Sleep(3 * time.Millisecond)
	}
	select {}
}

// nameThread makes the calling goroutine a thread of that name.
func nameThread(name string) {
	runtime.LockOSThread()
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
	c := &child{cmd: cmd}
	t.Cleanup(func() {
		stdin.Close()
		c.kill()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	start, err := procfs.StartTicks(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	c.proc = bpf.Proc{PID: cmd.Process.Pid, StartTicks: start}
	return c
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

func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
}
