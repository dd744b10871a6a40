package bpf

import (
	"testing"
	"unsafe"

	"github.com/kvmeter/kvmeter/gen"
)

func TestGoAndCAgreeOnDomains(t *testing.T) {
	runQueue, err := gen.LoadRunQueue()
	if err != nil {
		t.Fatal(err)
	}
	exits, err := gen.LoadExits()
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string][2]int{
		"domains of runqueue":         {int(runQueue.Maps[gen.RunQueueMapDomains].MaxEntries), maxDomains},
		"domains of exits":            {int(exits.Maps[gen.ExitsMapDomains].MaxEntries), maxDomains},
		"bytes of a domain":           {int(exits.Maps[gen.ExitsMapDomains].ValueSize), int(unsafe.Sizeof(domain{}))},
		"bytes of maybe in runqueue":  {int(runQueue.Variables[gen.RunQueueVarMaybe].Size()), maybeBits / 8},
		"bytes of maybe in exits":     {int(exits.Variables[gen.ExitsVarMaybe].Size()), maybeBits / 8},
		"bytes of a wait":             {int(runQueue.Maps[gen.RunQueueMapWaits].ValueSize), int(unsafe.Sizeof(gen.RunQueueWait{}))},
		"bytes of a time in the host": {int(exits.Maps[gen.ExitsMapHostTimes].ValueSize), int(unsafe.Sizeof(gen.ExitsHostTime{}))},
		"buckets of waits":            {len(gen.RunQueueWait{}.Buckets), Waits},
		"buckets of exits":            {len(gen.ExitsHostTime{}.Buckets), ExitTimes},
		"culprits":                    {len(gen.RunQueueWait{}.ByNs) - 1, int(Culprits)},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %d in C, %d in Go", name, got[0], got[1])
		}
	}
}
