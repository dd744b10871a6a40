package rtnl

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// removal is RTM_DELLINK of an interface with these attributes.
func removal(family byte, index int32, attrs ...[]byte) []byte {
	body := append([]byte{family, 0, 0, 0}, int32Bytes(index)...)
	body = append(body, make([]byte, 8)...)
	return message(unix.RTM_DELLINK, 0, 0, append(body, slices.Concat(attrs...)...)...)
}

func attribute(kind uint16, value ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(attrSize+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

// stats64 are counters 1, 2, 3 and so on.
func stats64() []byte {
	var b []byte
	for i := range uint64(counters) {
		b = binary.NativeEndian.AppendUint64(b, i+1)
	}
	return attribute(unix.IFLA_STATS64, b...)
}

func TestRemovals(t *testing.T) {
	name := attribute(unix.IFLA_IFNAME, []byte("vnet7\x00")...)
	vnet7 := Removed{Name: "vnet7", Link: Link{
		Index: 9, RxPackets: 1, TxPackets: 2, RxBytes: 3, TxBytes: 4, RxErrors: 5, TxErrors: 6, RxDropped: 7, TxDropped: 8,
	}}
	whole := removal(unix.AF_UNSPEC, 9, name, stats64())
	for title, tc := range map[string]struct {
		in   []byte
		want []Removed
		err  error
	}{
		"nothing":                               {},
		"an interface with what it had counted": {in: whole, want: []Removed{vnet7}},
		"two in one message":                    {in: slices.Concat(whole, whole), want: []Removed{vnet7, vnet7}},
		"a port that leaves its bridge":         {in: removal(unix.AF_BRIDGE, 9, name, stats64())},
		"one without counters":                  {in: removal(unix.AF_UNSPEC, 9, name)},
		"another message":                       {in: message(unix.RTM_NEWLINK, 0, 0, 1, 2, 3)},
		"counters too short":                    {in: removal(unix.AF_UNSPEC, 9, attribute(unix.IFLA_STATS64, 1, 2, 3)), err: errTruncated},
		"an interface without a number":         {in: removal(unix.AF_UNSPEC, 0, name, stats64()), err: errIndex},
		"half a head":                           {in: whole[:headerSize-1], err: errTruncated},
		"half a message":                        {in: whole[:headerSize+ifinfoSize+8], err: errTruncated},
		"a message without an interface":        {in: message(unix.RTM_DELLINK, 0, 0, 1, 2, 3), err: errTruncated},
	} {
		t.Run(title, func(t *testing.T) {
			var got []Removed
			err := removals(tc.in, func(r Removed) { got = append(got, r) })
			if !errors.Is(err, tc.err) || !slices.Equal(got, tc.want) {
				t.Errorf("got %+v, %v; want %+v, %v", got, err, tc.want, tc.err)
			}
		})
	}
}

func FuzzRemovals(f *testing.F) {
	f.Add(removal(unix.AF_UNSPEC, 9, attribute(unix.IFLA_IFNAME, []byte("vnet7\x00")...), stats64()))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = removals(b, func(r Removed) {
			if r.Index <= 0 {
				t.Errorf("an interface has index %d", r.Index)
			}
		})
	})
}
