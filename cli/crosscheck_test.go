package cli

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"

	"github.com/kvmeter/kvmeter/agent/client"
)

// checked is what an agent answers that has checked two of three domains.
func checked() *client.Crosscheck {
	at := time.Date(2026, 1, 1, 14, 3, 7, 0, time.UTC)
	old := at.Add(-24 * time.Hour)
	uuid := "5e1f7a3c-0d49-4c4e-8ad1-0c5b3a2f6f10"
	nic := "instance-00000001-" + uuid + "-tap1d2c3b4a59"
	return &client.Crosscheck{
		Node: "compute-1", Interval: 600, Notes: []string{"libvirt does not answer: there is no socket"},
		Domains: []client.CheckedGuest{
			{UUID: uuid, Name: "instance-00000001", Display: "web-frontend-production-1", Time: &at, Comparisons: []client.Comparison{
				{Meter: "cpu", Resource: uuid, Unit: "ns", Verdict: "agrees", Figures: &client.Figures{Ours: 16959981037, Theirs: 16970000000, Difference: 10018963, Relative: 10018963.0 / 16970000000, Tolerance: 40000000}},
				{Meter: "network.incoming.bytes", Resource: nic, Device: "tap1d2c3b4a59", Unit: "B", Verdict: "differs", Figures: &client.Figures{Ours: 18446744073709551614, Theirs: 18446744073709551615, Difference: 1, Relative: 5.4e-20}},
				{Meter: "cpu.wait", Resource: uuid, Unit: "ns", Verdict: "not comparable", Why: "libvirt does not tell it of each vCPU"},
			}},
			{UUID: "b", Name: "a\x1b[31mb", Time: &old, Comparisons: []client.Comparison{
				{Meter: "cpu.process", Resource: "b", Unit: "ns", Verdict: "not comparable", Why: "libvirt: QEMU's monitor is busy or stuck"},
			}},
			{UUID: "c", Name: "instance-00000003"},
		},
	}
}

func TestComparisonsFitTheTerminal(t *testing.T) {
	now := time.Date(2026, 1, 1, 15, 0, 0, 0, time.UTC)
	for _, width := range []int{0, 80, 132} {
		name := map[int]string{0: "crosscheck-plain", 80: "crosscheck-80", 132: "crosscheck-132"}[width]
		got := string(appendComparisons(nil, checked(), now, width))
		for line := range strings.Lines(got) {
			if w := runewidth.StringWidth(strings.TrimSuffix(line, "\n")); width > 0 && w > width {
				t.Errorf("line of %d columns: %q", w, line)
			}
		}
		golden(t, name, got)
	}
}

// checkingAgent answers as an agent does, and keeps what it was asked.
func checkingAgent(t *testing.T) (path string, asked *[]string) {
	t.Helper()
	path, asked = filepath.Join(t.TempDir(), "agent.sock"), new([]string)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.Method+" "+r.URL.String())
		if r.URL.Query().Get("domain") == "zz" {
			http.Error(w, `there is no domain "zz" on this host`, http.StatusNotFound)
			return
		}
		_ = json.NewEncoder(w).Encode(checked())
	})}}
	s.Start()
	t.Cleanup(s.Close)
	return path, asked
}

func TestCrosscheckAsksTheAgent(t *testing.T) {
	path, asked := checkingAgent(t)
	for name, tc := range map[string]struct{ line, asked string }{
		"crosscheck-csv":    {"-f csv", "GET /v1/crosscheck"},
		"crosscheck-json":   {"--domain web1 -f json", "GET /v1/crosscheck?domain=web1"},
		"crosscheck-value":  {"--now --domain a&b -f value -c domain -c meter -c verdict", "POST /v1/crosscheck?domain=a%26b"},
		"crosscheck-column": {"--now -c meter -c relative", "POST /v1/crosscheck"},
	} {
		t.Run(name, func(t *testing.T) {
			*asked = nil
			got, err := run(t, "", append([]string{"crosscheck", "--socket", path}, strings.Fields(tc.line)...)...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, got)
			if len(*asked) != 1 || (*asked)[0] != tc.asked {
				t.Errorf("asked %q, want %s", *asked, tc.asked)
			}
		})
	}
}

func TestCrosscheckSaysWhatIsWrong(t *testing.T) {
	path, _ := checkingAgent(t)
	gone := filepath.Join(t.TempDir(), "gone.sock")
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no agent":       {[]string{"--socket", gone}, "no agent answers at " + gone + " (no such file or directory): start one with"},
		"no such domain": {[]string{"--socket", path, "--domain", "zz"}, `there is no domain "zz" on this host`},
		"no such format": {[]string{"-f", "xml"}, `there is no output format "xml"; there are table, json, csv, value`},
		"no such column": {[]string{"--socket", path, "-c", "zz"}, `there is no column "zz"; there are Domain, Meter,`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := run(t, "", append([]string{"crosscheck"}, tc.args...)...); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}
