//go:build lab

package bpf

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"
	"time"
)

func TestProcessesThatNobodyAsksForAreForgotten(t *testing.T) {
	w, err := LoadWalk()
	if errors.Is(err, ErrNoTaskIterator) {
		t.Skip("the kernel lacks the open-coded task iterator")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	procs, out := []Proc{{PID: os.Getppid()}, {PID: os.Getpid()}}, make([]Usage, 2)
	read := func(n int) {
		t.Helper()
		if err := w.Read(t.Context(), procs[:n], out); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if out[i].Err != nil {
				t.Fatalf("%+v: %v", procs[i], out[i].Err)
			}
		}
	}
	remembered := func() uint32 {
		t.Helper()
		value := make([]byte, w.objs.Processes.ValueSize())
		if err := w.objs.Processes.Lookup(uint32(1), &value); err != nil {
			t.Fatal(err)
		}
		return binary.NativeEndian.Uint32(value[16:]) // its PID
	}
	read(2)
	read(1)
	if pid := remembered(); pid != uint32(os.Getpid()) {
		t.Errorf("after a read of one: PID %d is remembered, want %d", pid, os.Getpid())
	}
	w.heldAt = time.Now().Add(-2 * forgetAfter)
	read(1)
	if pid := remembered(); pid != 0 {
		t.Errorf("PID %d is still remembered", pid)
	}
	read(2)
	if pid := remembered(); pid != uint32(os.Getpid()) {
		t.Errorf("PID %d is remembered, want %d", pid, os.Getpid())
	}
}
