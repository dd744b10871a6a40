package host

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/bpf"
	"github.com/kvmeter/kvmeter/collectors/all"
	"github.com/kvmeter/kvmeter/sample"
)

func TestHooksThatLackTheSameAreOneNote(t *testing.T) {
	refused := errors.New("the kernel says no")
	notes := hookNotes([]all.Missing{
		{Name: "disk", Origin: sample.Iomap, Err: fmt.Errorf("load disk: %w", bpf.ErrNoBTF)},
		{Name: "tcx", Origin: sample.TCX, Err: refused},
		{Name: "exits", Origin: sample.Exits, Err: fmt.Errorf("load exits: %w", bpf.ErrNoBTF)},
	})
	want := []struct{ begins, costs, ends string }{
		{"the hooks disk, exits cannot be used, which costs ", sample.KVMExitsTime.Name, bpf.ErrNoBTF.Error()},
		{"the hook tcx cannot be used, which costs ", sample.NetInSegments.Name, refused.Error()},
	}
	if len(notes) != len(want) {
		t.Fatalf("notes %q", notes)
	}
	for i, w := range want {
		if !strings.HasPrefix(notes[i], w.begins) || !strings.Contains(notes[i], w.costs) || !strings.HasSuffix(notes[i], w.ends) {
			t.Errorf("note %q, want %+v", notes[i], w)
		}
	}
}
