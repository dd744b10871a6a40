package agent

import (
	"testing"

	"github.com/kvmeter/kvmeter/agent/state"
	"github.com/kvmeter/kvmeter/bpf"
)

func TestAnEndTakesOverWhatTheHookSaw(t *testing.T) {
	type last = [usageCount]uint64
	for name, tc := range map[string]struct {
		before last
		lived  bpf.Lived
		want   last
	}{
		"of a domain that was never polled": {
			lived: bpf.Lived{Process: 100, Run: [bpf.Classes]uint64{60, 30, 5, 4, 1}, Wait: [bpf.Classes]uint64{7, 8}, ReadBytes: 9, WriteBytes: 10, Switches: [bpf.Classes]uint64{11, 12}, HasWait: true, HasIO: true},
			want:  last{iProcess: 100, iCPU: 60, iEmulator: 30, iIOThread: 5, iWorker: 4, iVHost: 1, iWait: 7, iEmulatorWait: 8, iSwitches: 11, iEmulatorSwitches: 12, iDiskRead: 9, iDiskWrite: 10},
		},
		"what threads ran for after the process's clock had ended is no class's": {
			lived: bpf.Lived{Process: 100, Run: [bpf.Classes]uint64{60, 45}},
			want:  last{iProcess: 100, iCPU: 60, iEmulator: 40},
		},
		"what no thread accounts for is exited time": {
			lived: bpf.Lived{Process: 100, Run: [bpf.Classes]uint64{60}},
			want:  last{iProcess: 100, iCPU: 60, iExited: 40},
		},
		"exited time that was published stays, and vCPUs go first": {
			before: last{iProcess: 80, iCPU: 50, iWorker: 10, iExited: 20},
			lived:  bpf.Lived{Process: 100, Run: [bpf.Classes]uint64{bpf.VCPU: 65, bpf.Worker: 35}},
			want:   last{iProcess: 100, iCPU: 65, iWorker: 15, iExited: 20},
		},
		"what was published of a running slice is held": {
			before: last{iProcess: 110, iCPU: 105, iEmulator: 5, iWait: 9, iDiskRead: 4},
			lived:  bpf.Lived{Process: 104, Run: [bpf.Classes]uint64{99, 5}, Wait: [bpf.Classes]uint64{3}, ReadBytes: 4, HasWait: true, HasIO: true},
			want:   last{iProcess: 110, iCPU: 105, iEmulator: 5, iWait: 9, iDiskRead: 4},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newUsageState(state.Memory(), 1, "a")
			s.last = tc.before
			s.end(&tc.lived, func(int) {})
			if s.last != tc.want {
				t.Errorf("got  %v\nwant %v", s.last, tc.want)
			}
			if has := s.has&(1<<iWait) != 0; has != tc.lived.HasWait {
				t.Errorf("cpu.wait is there: %v", has)
			}
			if has := s.has&(1<<iDiskRead) != 0; has != tc.lived.HasIO {
				t.Errorf("disk.host.read.bytes is there: %v", has)
			}
		})
	}
}

// FuzzEnd ends a domain after any readings: nothing decreases, and the classes
// add up to the process.
func FuzzEnd(f *testing.F) {
	f.Add([]byte{50, 10, 0, 20, 70, 30, 120})
	f.Add([]byte{0, 0, 0, 0, 9, 9, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 7 {
			return
		}
		s := newUsageState(state.Memory(), 1, "a")
		u := bpf.Usage{HasSplit: true, Exited: uint64(b[3])}
		u.Run[bpf.VCPU], u.Run[bpf.Emulator], u.Run[bpf.Worker] = uint64(b[0]), uint64(b[1]), uint64(b[2])
		u.Process = u.Exited + u.Run[bpf.VCPU] + u.Run[bpf.Emulator] + u.Run[bpf.Worker]
		s.advance(&u, nil, func(int) {})
		before := s.last
		s.end(&bpf.Lived{Process: uint64(b[6]), Run: [bpf.Classes]uint64{uint64(b[4]), uint64(b[5])}}, func(int) {})
		sum := s.last[iExited]
		for _, of := range classMeters {
			sum += s.last[of.run]
		}
		if sum != s.last[iProcess] {
			t.Errorf("after %v the classes add up to %d, the process to %d", before, sum, s.last[iProcess])
		}
		for i := range before {
			if s.last[i] < before[i] {
				t.Errorf("%s went from %d to %d", usageMeters[i].Name, before[i], s.last[i])
			}
		}
	})
}

func TestFilesNameProcesses(t *testing.T) {
	l := lives{dir: "/x"}
	p := bpf.Proc{PID: 12, StartTicks: 34}
	if got := l.path(p); got != "/x/12-34.json" {
		t.Errorf("got %s", got)
	}
	if got, ok := procOf("12-34.json"); !ok || got != p {
		t.Errorf("got %+v, %v", got, ok)
	}
	for _, name := range []string{"12-34.json.new", "12.json", "-.json", "a-1.json", ""} {
		if got, ok := procOf(name); ok {
			t.Errorf("%q is %+v", name, got)
		}
	}
	if got := (&lives{}).path(p); got != "" {
		t.Errorf("without a folder there is %q", got)
	}
}

func TestCommandsAreThoseOfTheProcessMeant(t *testing.T) {
	self := bpf.Proc{PID: 1, StartTicks: 1 << 60}
	if got := commandOf("/proc", self); got != nil {
		t.Errorf("got %q of another process", got)
	}
}
