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

// lookEvery is how often a keyring looks whether its files have changed.
const lookEvery = 5 * time.Second

// Keyring is the keys of a folder or of one file, as they are now: nodes come and go
// and change their secrets while the program runs. Where they cannot be read they
// stay as they were.
type Keyring struct {
	load    func() (sample.Keys, error)
	files   func() ([]string, error)
	log     *zap.Logger
	trouble *complaint
	keys    atomic.Pointer[sample.Keys]
	looked  atomic.Int64  // when, in nanoseconds since the epoch
	state   atomic.Uint64 // of the files when the keys were read
}

// NewKeyring reads the keys of a folder ([sample.LoadKeys]).
func NewKeyring(dir string, log *zap.Logger) (*Keyring, error) {
	return newKeyring(&Keyring{
		log:  log,
		load: func() (sample.Keys, error) { return sample.LoadKeys(dir) },
		files: func() (paths []string, err error) {
			entries, err := os.ReadDir(dir)
			for _, e := range entries {
				paths = append(paths, filepath.Join(dir, e.Name()))
			}
			return paths, err
		},
	})
}

// NewKeyFile reads the file of the key with the given id ([sample.LoadKey]).
func NewKeyFile(id, path string, log *zap.Logger) (*Keyring, error) {
	return newKeyring(&Keyring{
		log:   log,
		load:  func() (sample.Keys, error) { return sample.LoadKey(id, path) },
		files: func() ([]string, error) { return []string{sample.SecretPath(path)}, nil },
	})
}

func newKeyring(k *Keyring) (*Keyring, error) {
	k.trouble = newComplaint(k.log)
	k.looked.Store(time.Now().UnixNano())
	state, _ := k.stateOf() // what cannot be read is said below
	keys, err := k.load()
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
func (k *Keyring) Secret(id string) []byte {
	k.look()
	return k.keys.Load().Secret(id)
}

// look reads the files again if they have changed, and not more often than now and
// then.
func (k *Keyring) look() {
	last, now := k.looked.Load(), time.Now().UnixNano()
	if since := now - last; since >= 0 && since < int64(lookEvery) || !k.looked.CompareAndSwap(last, now) {
		return
	}
	state, err := k.stateOf()
	if err == nil && state == k.state.Load() {
		return
	}
	var keys sample.Keys
	if err == nil {
		keys, err = k.load()
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

// stateOf returns a number that changes with the files.
func (k *Keyring) stateOf() (uint64, error) {
	paths, err := k.files()
	if err != nil {
		return 0, fmt.Errorf("read keys: %w", err)
	}
	h := fnv.New64a()
	for _, path := range paths {
		// Followed, since a folder of secrets in a container is all links.
		info, err := os.Stat(path)
		if err != nil {
			return 0, fmt.Errorf("read keys: %w", err)
		}
		fmt.Fprintf(h, "%s %d %d\n", path, info.Size(), info.ModTime().UnixNano())
	}
	return h.Sum64(), nil
}
