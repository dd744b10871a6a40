package collectors

import (
	"errors"
	"slices"
	"testing"
)

func TestReplaceRemovesWhatIsNotThereAnyMore(t *testing.T) {
	refuse := errors.New("no")
	f := Followed{}
	for _, tc := range []struct {
		ids, gone []uint32
	}{
		{[]uint32{1, 2, 3}, nil},
		{[]uint32{3, 4}, []uint32{1, 2}},
		{[]uint32{3, 4}, nil},
		{nil, []uint32{3, 4}},
	} {
		var gone []uint32
		err := f.Replace(slices.Values(tc.ids), func(id uint32) error {
			gone = append(gone, id)
			return refuse
		})
		slices.Sort(gone)
		if !slices.Equal(gone, tc.gone) || len(f) != len(tc.ids) || (err != nil) != (len(gone) > 0) {
			t.Errorf("of %v, %v went, %v, and %d stayed; want %v to go", tc.ids, gone, err, len(f), tc.gone)
		}
	}
}
