package bus

import "sync"

// inbox holds deliveries until they are taken. It is bounded by how many the broker
// hands out before the first is acked, and by their bytes.
type inbox struct {
	some chan struct{} // holds a token when there may be some

	mu    sync.Mutex
	room  *sync.Cond
	ds    []*incoming
	bytes int
	over  bool // nobody takes any more
}

// maxWaiting is of how many bytes deliveries may wait before no more are read.
const maxWaiting = 64 << 20

func newInbox() *inbox {
	b := &inbox{some: make(chan struct{}, 1)}
	b.room = sync.NewCond(&b.mu)
	return b
}

// add adds deliveries.
func (b *inbox) add(ds []*incoming) {
	b.mu.Lock()
	b.ds = append(b.ds, ds...)
	for _, d := range ds {
		b.bytes += len(d.Body)
	}
	b.mu.Unlock()
	select {
	case b.some <- struct{}{}:
	default:
	}
}

// await waits until there is room for more.
func (b *inbox) await() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.bytes >= maxWaiting && !b.over {
		b.room.Wait()
	}
}

// len returns how many there are.
func (b *inbox) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.ds)
}

// take appends all to ds.
func (b *inbox) take(ds []*incoming) []*incoming {
	b.mu.Lock()
	defer b.mu.Unlock()
	ds = append(ds, b.ds...)
	clear(b.ds)
	b.ds, b.bytes = b.ds[:0], 0
	b.room.Signal()
	return ds
}

// close says that nobody takes any more.
func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.room.Signal()
}
