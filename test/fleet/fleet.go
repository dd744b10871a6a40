// Package fleet makes the batches that the agents of many hosts would send, for
// benchmarks of what takes them.
package fleet

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/kvmeter/kvmeter/sample"
)

// Fleet makes the batches of nodes with domains, each domain with twenty
// meters, every ten seconds. It reuses its memory.
type Fleet struct {
	*rand.Rand
	enc     *sample.Encoder
	Nodes   []*Node
	Now     int64 // of the current tick, in µs since the Unix epoch
	Step    int64 // µs between two batches of a node
	Columns []Column
	next    int // node
}

// Node is one compute host.
type Node struct {
	Batch  sample.Batch
	offset int64
	body   []byte
	state  [][]float64 // by column and domain
}

// Column is one meter that every domain has.
type Column struct {
	Ref  sample.MeterRef
	tag  sample.Tag
	step func(f *Fleet, last float64) float64
}

const (
	// Step is the time between two batches of a node, unless the fleet says otherwise, in µs.
	Step = 10 * int64(1e6)
	// Start is the first tick, in µs since the Unix epoch: 2026-01-01.
	Start = int64(1767225600) * 1e6
)

// New makes a fleet, always the same one.
func New(nodes, domains int) (*Fleet, error) {
	enc, err := sample.NewEncoder()
	if err != nil {
		return nil, err
	}
	f := &Fleet{Rand: rand.New(rand.NewPCG(1, 2)), enc: enc, Now: Start, Step: Step}
	add := func(n int, name string, kind sample.Kind, unit string, tag sample.Tag, step func(*Fleet, float64) float64) {
		for i := range n {
			f.Columns = append(f.Columns, Column{sample.MeterRef{Name: fmt.Sprint(name, i), Kind: kind, Unit: unit}, tag, step})
		}
	}
	add(1, "cpu", sample.Cumulative, "ns", sample.U64, func(f *Fleet, v float64) float64 { return v + float64(f.Int64N(8e9)) })
	add(4, "bytes", sample.Cumulative, "B", sample.U64, func(f *Fleet, v float64) float64 { return v + 4096*float64(f.IntN(5000)) })
	add(5, "idle", sample.Cumulative, "request", sample.U64, func(f *Fleet, v float64) float64 {
		if f.IntN(50) > 0 {
			return v
		}
		return v + float64(f.IntN(100))
	})
	add(4, "gauge", sample.Gauge, "MB", sample.U64, func(f *Fleet, v float64) float64 {
		if f.IntN(5) > 0 {
			return v
		}
		return max(0, v+float64(f.IntN(21))-10)
	})
	add(2, "percent", sample.Gauge, "%", sample.F64, func(f *Fleet, _ float64) float64 { return float64(f.IntN(10000)) / 100 })
	add(2, "double", sample.Gauge, "W", sample.F64, func(f *Fleet, _ float64) float64 { return 100 + 50*f.Float64() })
	add(2, "constant", sample.Gauge, "vcpu", sample.U64, func(_ *Fleet, v float64) float64 { return v })
	for n := range nodes {
		node := &Node{offset: f.Int64N(Step)}
		b := &node.Batch
		b.Node, b.Epoch = fmt.Sprintf("compute-%04d", n), f.Uint64()
		full := make([]byte, (domains+7)/8)
		for d := range domains {
			full[d/8] |= 1 << (d % 8)
			b.Rows = append(b.Rows, sample.Row{
				Resource: fmt.Sprintf("%08x-%04x-4%03x-a%03x-%012x", f.Uint32(), f.IntN(1<<16), f.IntN(1<<12), f.IntN(1<<12), f.Int64N(1<<48)),
				Source:   "openstack", Project: fmt.Sprintf("%032x", n*domains/50), User: fmt.Sprintf("%032x", d),
				Incarnation: sample.Incarnation(f.Uint64()), Metadata: metadata(f, n, d),
			})
		}
		for i := range f.Columns {
			c := &f.Columns[i]
			b.Meters = append(b.Meters, c.Ref)
			b.Columns = append(b.Columns, sample.Column{Meter: i, Origin: sample.Walk, Tag: c.tag, Bitmap: full, Values: make([]uint64, domains)})
			state := make([]float64, domains)
			for d := range state {
				state[d] = float64(f.IntN(1 << 20))
			}
			node.state = append(node.state, state)
		}
		f.Nodes = append(f.Nodes, node)
	}
	return f, nil
}

// metadata is some 640 bytes of JSON as Nova's domains have it.
func metadata(f *Fleet, n, d int) []byte {
	return fmt.Appendf(nil, `{"display_name":"web-%d-%d","name":"instance-%08x","host":"%064x","instance_id":"%032x","flavor":{"id":"%d","name":"m1.size%d",`+
		`"vcpus":%d,"ram":%d,"disk":%d,"ephemeral":0,"swap":0},"status":"active","state":"running","task_state":"","image":{"id":"%032x","name":"debian-12"},`+
		`"image_ref":"%032x","architecture":"x86_64","OS-EXT-SRV-ATTR:host":"compute-%04d","vcpus":%d,"memory_mb":%d,"disk_gb":%d,"root_gb":%d,"ephemeral_gb":0}`,
		n, d, n*100+d, f.Uint64(), f.Uint64(), d%8, d%8, 1<<(d%4), 2048<<(d%4), 20*(d%8), d%5, d%5, n, 1<<(d%4), 2048<<(d%4), 20*(d%8), 20*(d%8))
}

// Next makes the next batch, of each node in turn. It is good until the node's next one.
func (f *Fleet) Next() (body []byte, b *sample.Batch, err error) {
	node := f.Nodes[f.next]
	if f.next++; f.next == len(f.Nodes) {
		f.next = 0
		defer func() { f.Now += f.Step }()
	}
	b = &node.Batch
	b.Base = f.Now + node.offset
	b.ID = sample.NewBatchID(time.UnixMicro(b.Base))
	b.Seq++
	for d := range b.Rows {
		b.Rows[d].Offset = int64(d)*200 + f.Int64N(500)
	}
	for i := range f.Columns {
		state, values := node.state[i], b.Columns[i].Values
		for d := range state {
			state[d] = f.Columns[i].step(f, state[d])
			if f.Columns[i].tag == sample.F64 {
				values[d] = sample.Float(state[d]).Bits
			} else {
				values[d] = uint64(state[d])
			}
		}
	}
	node.body, err = f.enc.Encode(node.body[:0], b)
	return node.body, b, err
}
