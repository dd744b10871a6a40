//go:build lab

package bpf

import (
	"errors"
	"testing"

	"github.com/kvmeter/kvmeter/gen"
)

// TestWhatEndedUnseenIsForgotten: while it was detached, requests may have ended
// whose addresses are others' by the time it is attached again.
func TestWhatEndedUnseenIsForgotten(t *testing.T) {
	d, err := LoadDisk()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := errors.Join(d.Attach(), d.Detach()); err != nil {
		t.Fatal(err)
	}
	busy := d.maps.Maps[gen.DiskMapBusy]
	d.shared.of[0].Flights[7][1].Key = 1
	if err := busy.Put(uint32(3), uint64(1)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Attach(), d.Detach()); err != nil {
		t.Fatal(err)
	}
	var n uint64
	if err := busy.Lookup(uint32(3), &n); err != nil || n != 0 {
		t.Errorf("%d are in flight still, %v", n, err)
	}
	if f := d.shared.of[0].Flights[7][1]; f.Key != 0 {
		t.Errorf("%+v is in flight still", f)
	}
}
