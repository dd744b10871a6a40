package ebpf

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bpf"
)

func TestOpenRefusesAnUnknownOrigin(t *testing.T) {
	_, err := Open(zap.NewNop(), Options{Origin: "kprobe"})
	if err == nil || !strings.Contains(err.Error(), `"kprobe"`) {
		t.Errorf("got %v, want an error that names it", err)
	}
}

func TestTheIteratorIsTriedOnlyWhereItMayLoad(t *testing.T) {
	for err, want := range map[error]bool{
		bpf.ErrNoTaskIterator:                         true,
		errors.New("the verifier says no"):            true,
		bpf.ErrNoBTF:                                  false,
		bpf.ErrNoCapability:                           false,
		bpf.ErrRefused:                                false,
		fmt.Errorf("walk: %w", bpf.ErrPIDNamespace):   false,
		fmt.Errorf("walk: %w", bpf.ErrNoTaskIterator): true,
	} {
		if got := worthIter(err); got != want {
			t.Errorf("%v: got %v, want %v", err, got, want)
		}
	}
}
