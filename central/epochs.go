package central

import (
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// epochs finds nodes whose batches of two epochs are of the same time: two agents
// speak for one node. An agent that starts anew with another epoch, or sends what
// waited of one before, does not look like that. It is not safe for concurrent use.
type epochs struct {
	nodes map[string][]epochSpan // the newest last
}

// epochSpan is the time that an epoch's batches with samples are of, in µs since
// the Unix epoch.
type epochSpan struct {
	epoch    uint64
	from, to int64
	told     bool
}

// How much is remembered; a node of two agents shows it again soon.
const (
	epochsOfNode = 4
	epochNodes   = 100_000
)

// epochsApart is how long two epochs must be live together: a clock that is set
// a little at the restart of an agent is no second agent.
const epochsApart = 10 * time.Minute

// see takes in a batch that was stored, and returns what is wrong with its node,
// once for two epochs.
func (e *epochs) see(b *sample.Batch) error {
	if b.IDs != nil || b.Len() == 0 {
		return nil
	}
	if e.nodes == nil || len(e.nodes) >= epochNodes {
		e.nodes = map[string][]epochSpan{}
	}
	spans := e.nodes[b.Node]
	i := 0
	for i < len(spans) && spans[i].epoch != b.Epoch {
		i++
	}
	if i == len(spans) {
		if len(spans) == epochsOfNode {
			spans, i = append(spans[:0], spans[1:]...), i-1
		}
		spans = append(spans, epochSpan{epoch: b.Epoch, from: b.Base, to: b.Base})
		e.nodes[b.Node] = spans
	}
	s := &spans[i]
	s.from, s.to = min(s.from, b.Base), max(s.to, b.Base)
	for k := range spans {
		o := &spans[k]
		if k == i || s.told && o.told || min(s.to, o.to)-max(s.from, o.from) < epochsApart.Microseconds() {
			continue
		}
		s.told, o.told = true, true
		return fmt.Errorf("node %q counts its batches in two epochs at once, %016x and %016x: two agents have this name, or one was copied with its spool; give each host its own name (node)", b.Node, o.epoch, s.epoch)
	}
	return nil
}

// watch tells of nodes with two live epochs.
func (w *ingestWorker) watch(b *sample.Batch) {
	if err := w.epochs.see(b); err != nil {
		w.in.m.epochs.Inc()
		w.in.deps.Log.Error("two agents speak for one node", zap.String("node", b.Node), zap.Error(err))
	}
}
