package collectors

import (
	"errors"
	"iter"
)

// Followed is the IDs that a hook follows.
type Followed map[uint32]bool

// Replace makes them ids, and calls remove for those that are no longer there.
func (f Followed) Replace(ids iter.Seq[uint32], remove func(id uint32) error) error {
	for id := range f {
		f[id] = false
	}
	for id := range ids {
		f[id] = true
	}
	var errs []error
	for id, wanted := range f {
		if !wanted {
			errs = append(errs, remove(id))
			delete(f, id)
		}
	}
	return errors.Join(errs...)
}

// IDs returns those of the targets themselves.
func IDs(targets []Target) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for _, t := range targets {
			if !yield(t.ID) {
				return
			}
		}
	}
}
