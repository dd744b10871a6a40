package bus

import (
	"fmt"
	"strings"
	"testing"
)

// TestTheNewestSnapshotThatIsWholeCounts has records as GENERATION.SEQ, with /PARTS
// where they are part of a snapshot.
func TestTheNewestSnapshotThatIsWholeCounts(t *testing.T) {
	for name, tc := range map[string]struct {
		records, want string
		missing       int64
	}{
		"nothing":                                   {"", "", 0},
		"a snapshot and what followed":              {"1.0/2 1.1/2 1.0 1.1", "1.0/2 1.1/2 1.0 1.1", 0},
		"an older one and its followers":            {"1.0/1 1.0 2.0/1 2.0", "2.0/1 2.0", 0},
		"a newer one that is cut short":             {"1.0/1 1.0 2.0/3 2.1/3", "1.0/1 1.0", 0},
		"a newer one that is cut short, and later":  {"1.0/1 1.0 2.0/3 2.1/3 1.1 3.0/2", "1.0/1 1.0 1.1", 0},
		"what was sent twice":                       {"1.0/1 1.0 1.0 1.1 1.1", "1.0/1 1.0 1.1", 0},
		"what came in another order":                {"1.1 1.0 1.0/1", "1.0/1 1.0 1.1", 0},
		"what is missing is told":                   {"1.0/1 1.1 1.4", "1.0/1 1.1 1.4", 3},
		"what followed an empty queue, without one": {"0.0 0.1", "0.0 0.1", 0},
	} {
		t.Run(name, func(t *testing.T) {
			var all []record
			for text := range strings.FieldsSeq(tc.records) {
				r := record{body: []byte(text)}
				if _, err := fmt.Sscanf(text, "%d.%d/%d", &r.generation, &r.seq, &r.parts); err != nil && r.parts == 0 && !strings.Contains(text, "/") {
					_, err = fmt.Sscanf(text, "%d.%d", &r.generation, &r.seq)
					if err != nil {
						t.Fatal(err)
					}
				}
				all = append(all, r)
			}
			got, missing := latest(all)
			var texts []string
			for _, b := range got {
				texts = append(texts, string(b))
			}
			if strings.Join(texts, " ") != tc.want || missing != tc.missing {
				t.Errorf("got %q and %d missing, want %q and %d", texts, missing, tc.want, tc.missing)
			}
		})
	}
}
