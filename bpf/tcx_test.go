package bpf

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/kvmeter/kvmeter/gen"
)

func TestGoAndCAgreeOnPackets(t *testing.T) {
	spec, err := gen.LoadTCX()
	if err != nil {
		t.Fatal(err)
	}
	if got := spec.Maps[gen.TCXMapNics].MaxEntries; got != maxNICs {
		t.Errorf("nics holds %d, want %d", got, maxNICs)
	}
	if got := spec.Variables[gen.TCXVarMaybe].Size(); got != maybeBits/8 {
		t.Errorf("maybe has %d bytes, want %d", got, maybeBits/8)
	}
	for name, want := range map[string]uintptr{
		gen.TCXMapTraffics: unsafe.Sizeof(gen.TCXTraffic{}),
		gen.TCXMapSizes:    unsafe.Sizeof(gen.TCXHistogram{}),
	} {
		if got := spec.Maps[name].ValueSize; got != uint32(want) {
			t.Errorf("an entry of %s is %d bytes in C, %d in Go", name, got, want)
		}
	}
	if got := len(gen.TCXHistogram{}.Packets[0]); got != Sizes {
		t.Errorf("there are %d sizes in C, %d in Go", got, Sizes)
	}
}

func TestReasonNames(t *testing.T) {
	got := reasonNames([]btf.EnumValue{
		{Name: "SKB_NOT_DROPPED_YET", Value: 0},
		{Name: "SKB_CONSUMED", Value: 1},
		{Name: "SKB_DROP_REASON_NOT_SPECIFIED", Value: 2},
		{Name: "SKB_DROP_REASON_NO_SOCKET", Value: 3},
		{Name: "SKB_DROP_REASON_FULL_RING", Value: 5},
		{Name: "SKB_DROP_REASON_MAX", Value: 6},
		{Name: "SKB_DROP_REASON_SUBSYS_MASK", Value: 0xffff0000},
	})
	want := []string{"reason_1", "not_specified", "no_socket", "reason_4", "full_ring", "other"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// answer is a netlink message of that kind.
func answer(kind uint16, seq uint32, body ...byte) []byte {
	b := make([]byte, nlHeaderSize, nlHeaderSize+len(body))
	binary.NativeEndian.PutUint32(b, uint32(nlHeaderSize+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return append(b, body...)
}

func errno(n int32) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(n))
}

func TestAnswerToAFilter(t *testing.T) {
	enoent := -int32(unix.ENOENT)
	for name, tc := range map[string]struct {
		in   []byte
		err  error
		done bool
	}{
		"0 is success":                           {answer(unix.NLMSG_ERROR, 7, errno(0)...), nil, true},
		"a negative number is an error":          {answer(unix.NLMSG_ERROR, 7, errno(enoent)...), unix.ENOENT, true},
		"an answer to another request is not it": {answer(unix.NLMSG_ERROR, 6, errno(enoent)...), nil, false},
		"it may come after others":               {append(answer(unix.RTM_NEWTFILTER, 7, 1, 2, 3, 4), answer(unix.NLMSG_ERROR, 7, errno(0)...)...), nil, true},
		"nothing":                                {nil, nil, false},
		"half a header":                          {answer(unix.NLMSG_ERROR, 7)[:9], errTCAnswer, true},
		"half a message":                         {answer(unix.NLMSG_ERROR, 7, errno(0)...)[:18], errTCAnswer, true},
		"no number":                              {answer(unix.NLMSG_ERROR, 7, 1, 2), errTCAnswer, true},
	} {
		t.Run(name, func(t *testing.T) {
			if err, done := tcAnswer(tc.in, 7); !errors.Is(err, tc.err) || err != nil && tc.err == nil || done != tc.done {
				t.Errorf("got %v, %t; want %v, %t", err, done, tc.err, tc.done)
			}
		})
	}
}

func FuzzTCAnswer(f *testing.F) {
	f.Add(answer(unix.NLMSG_ERROR, 7, errno(-2)...))
	f.Add(append(answer(unix.RTM_NEWTFILTER, 7, 1, 2, 3, 4), answer(unix.NLMSG_ERROR, 7, errno(0)...)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		err, done := tcAnswer(b, 7)
		if err != nil && !done {
			t.Errorf("goes on after %v", err)
		}
	})
}
