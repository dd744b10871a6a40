package bus

import (
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/sample"
)

// lookEvery is how often a keyring looks whether its folder has changed.
const lookEvery = 5 * time.Second

// Keyring is the keys of a folder, as it is now: nodes come and go and change
// their secrets while the program runs. Where the folder cannot be read the keys
// stay as they were.
type Keyring struct {
	dir     string
	log     *zap.Logger
	trouble *complaint
	keys    atomic.Pointer[sample.Keys]
	looked  atomic.Int64  // when, in nanoseconds since the epoch
	state   atomic.Uint64 // of the folder when the keys were read
}

// NewKeyring reads the keys of a folder ([sample.LoadKeys]).
func NewKeyring(dir string, log *zap.Logger) (*Keyring, error) {
	k := &Keyring{dir: dir, log: log, trouble: newComplaint(log)}
	k.looked.Store(time.Now().UnixNano())
	state, _ := folderState(dir) // what cannot be read is said below
	keys, err := sample.LoadKeys(dir)
	if err != nil {
		return nil, err
	}
	k.state.Store(state)
	k.keys.Store(&keys)
	return k, nil
}

// Len returns the number of keys.
func (k *Keyring) Len() int { return len(*k.keys.Load()) }

// Verify implements [Keys].
func (k *Keyring) Verify(id, signature string, body []byte) error {
	k.look()
	return k.keys.Load().Verify(id, signature, body)
}

// Secret implements [Keys].
func (k *Keyring) Secret(id string) []byte { return k.keys.Load().Secret(id) }

// look reads the folder again if it has changed, and not more often than now and
// then.
func (k *Keyring) look() {
	last, now := k.looked.Load(), time.Now().UnixNano()
	if since := now - last; since >= 0 && since < int64(lookEvery) || !k.looked.CompareAndSwap(last, now) {
		return
	}
	state, err := folderState(k.dir)
	if err == nil && state == k.state.Load() {
		return
	}
	var keys sample.Keys
	if err == nil {
		keys, err = sample.LoadKeys(k.dir)
	}
	if err != nil {
		k.trouble.say("keys can't be read again; those read before hold", err)
		return
	}
	k.trouble.over("keys can be read again")
	k.log.Info("keys have changed", zap.Int("before", k.Len()), zap.Int("now", len(keys)))
	k.state.Store(state)
	k.keys.Store(&keys)
}

// folderState returns a number that changes with the files of a folder.
func folderState(dir string) (uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("read keys: %w", err)
	}
	h := fnv.New64a()
	for _, e := range entries {
		// Followed, since a folder of secrets in a container is all links.
		info, err := os.Stat(filepath.Join(dir, e.Name()))
		if err != nil {
			return 0, fmt.Errorf("read keys: %w", err)
		}
		fmt.Fprintf(h, "%s %d %d\n", e.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return h.Sum64(), nil
}
