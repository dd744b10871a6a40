package cli

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/kvmeter/kvmeter/agent/client"
)

func TestHooks(t *testing.T) {
	list := []client.Hook{
		{Name: "disk", On: true, Events: 1 << 63, Misses: 1, Dropped: 2, Orphans: 3, Entries: 4, MaxEntries: 8192},
		{Name: "tcx", Fault: "CAP_NET_ADMIN is missing"},
	}
	var asked []string
	path := listen(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.String())
		switch {
		case r.Method == http.MethodGet:
			_ = json.NewEncoder(w).Encode(list)
		case strings.HasSuffix(r.URL.Path, "/disk"):
			list[0].On = r.URL.Query().Get("on") == "true"
			w.WriteHeader(http.StatusNoContent)
		default:
			http.Error(w, "this agent has no such hook", http.StatusNotFound)
		}
	})
	out, err := run(t, "", "hooks", "--socket", path)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "hooks", out)
	if out, err = run(t, "", "hooks", "--socket", path, "off", "disk", "-f", "value", "-c", "On", "-c", "Events"); err != nil || !strings.HasPrefix(out, "off 9223372036854775808\n") {
		t.Errorf("hooks off disk: %q, %v", out, err)
	}
	if want := "PUT /v1/hooks/disk?on=false"; len(asked) != 3 || asked[1] != want {
		t.Errorf("asked %q, want %q among them", asked, want)
	}
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no such hook":   {[]string{"on", "dsik"}, "this agent has no such hook"},
		"half a command": {[]string{"off"}, "hooks takes nothing, or on or off and the name of a hook"},
		"no such agent":  {[]string{"--socket", path + ".gone"}, "no agent answers at"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := run(t, "", append([]string{"hooks", "--socket", path}, tc.args...)...); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
