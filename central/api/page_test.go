package api_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"testing"

	"github.com/kvmeter/kvmeter/central/api"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
)

// Pages put together are the list, whatever their length and however many
// entries have one time.
func TestPagesAreTheList(t *testing.T) {
	onEveryEngine(t, func(t *testing.T, s store.Store) {
		var samples []sample.Sample
		var events []sample.Event
		for i := range 40 {
			smp := gauge(fmt.Sprint("s", i), fmt.Sprint("vm-", i%13), int64(i/7)*second, 1)
			smp.Project = fmt.Sprint("p", i%2)
			samples = append(samples, smp)
			events = append(events, sample.Event{ID: fmt.Sprint("e", i), Type: "x", Generated: at + int64(i/7), Traits: []sample.Trait{text("project_id", smp.Project), text("user_id", "u1")}})
		}
		if err := api.Store(t.Context(), s, api.BatchOf(recordedAt, samples)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.AppendEvents(t.Context(), events); err != nil {
			t.Fatal(err)
		}
		h := api.New(s, api.Options{})
		headers := map[string]string{"X-Roles": "member", "X-Project-Id": "p1", "X-User-Id": "u1"}
		list := func(path string) (found []string) {
			t.Helper()
			w := ask(h, http.MethodGet, path, headers, "")
			var entries []struct {
				ID       string `json:"id"`
				Message  string `json:"message_id"`
				Resource string `json:"resource_id"`
			}
			if err := json.Unmarshal(w.Body.Bytes(), &entries); err != nil {
				t.Fatalf("%s: %d %s", path, w.Code, w.Body)
			}
			for _, e := range entries {
				switch {
				case e.ID+e.Message != "":
					found = append(found, e.ID+e.Message)
				default:
					found = append(found, e.Resource)
				}
			}
			return found
		}
		for path, want := range map[string]int{"/v2/samples?": 20, "/v2/meters/load?": 20, "/v2/resources?": 13, "/v2/events?": 20, "/v2/samples?q.field=timestamp&q.op=lt&q.value=2026-01-01T10:00:04": 14} {
			whole := list(path + "&limit=1000")
			if len(whole) != want {
				t.Errorf("%s: got %d entries, want %d", path, len(whole), want)
			}
			for _, length := range []int{1, 2, 3, 7, 19, 100} {
				var all []string
				marker := ""
				for range 50 {
					page := list(fmt.Sprintf("%s&limit=%d&marker=%s", path, length, marker))
					if len(page) == 0 {
						break
					}
					all = append(all, page...)
					marker = page[len(page)-1]
				}
				if !slices.Equal(all, whole) {
					t.Errorf("%s in pages of %d: got %q, want %q", path, length, all, whole)
				}
			}
		}
		for _, path := range []string{"/v2/samples?marker=none", "/v2/samples?marker=s2", "/v2/events?marker=none", "/v2/events?marker=e2"} {
			if w := ask(h, http.MethodGet, path, headers, ""); w.Code != http.StatusBadRequest {
				t.Errorf("%s, which is not there or another project's: got %d %s", path, w.Code, w.Body)
			}
		}
		// A marker that the query does not select goes on after its time.
		if got := list("/v2/samples?marker=s39&q.field=resource&q.value=vm-1"); !slices.Equal(got, []string{"s27", "s1"}) {
			t.Errorf("after a sample of another resource: got %q", got)
		}
	})
}
