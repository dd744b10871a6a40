package store

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/kvmeter/kvmeter/sample"
)

// CheckBatch returns why a batch can never be stored, or nil.
func CheckBatch(b *sample.Batch) error {
	if err := b.Check(); err != nil {
		return err
	}
	for i := range b.Rows {
		if offset := b.Rows[i].Offset; (b.Base+offset < b.Base) != (offset < 0) {
			return fmt.Errorf("row %d: time %d + %d µs is out of range", i, b.Base, offset)
		}
	}
	return nil
}

// SortMeters puts meters into the order that [Store.Meters] promises.
func SortMeters(ms []Meter) {
	slices.SortFunc(ms, func(a, b Meter) int {
		return cmp.Or(
			strings.Compare(a.Name, b.Name), strings.Compare(a.Resource, b.Resource),
			strings.Compare(string(a.Kind), string(b.Kind)), strings.Compare(a.Unit, b.Unit),
		)
	})
}
