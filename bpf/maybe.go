package bpf

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// maybeBits is INDEX_BITS in tcx.bpf.c and PID_BITS in runqueue.bpf.c.
const maybeBits = 65536

// maybe is a program's variable of that name: bits by which it tells, mostly,
// what it need not look up. A number's bit is the number modulo maybeBits.
type maybe struct {
	variable *ebpf.Variable
	words    [maybeBits / 64]uint64
	users    map[int]int // how many numbers have a bit, if any
}

func newMaybe(v *ebpf.Variable) *maybe {
	return &maybe{variable: v, users: map[int]int{}}
}

func (m *maybe) add(n int) error    { return m.count(n, 1) }
func (m *maybe) remove(n int) error { return m.count(n, -1) }

func (m *maybe) count(n, by int) error {
	bit := n % maybeBits
	m.users[bit] += by
	m.words[bit/64] |= 1 << (bit % 64)
	if m.users[bit] == 0 {
		delete(m.users, bit)
		m.words[bit/64] &^= 1 << (bit % 64)
	}
	if err := m.variable.Set(m.words); err != nil {
		return fmt.Errorf("write what is watched: %w", err)
	}
	return nil
}
