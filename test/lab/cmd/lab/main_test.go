package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/test/lab"
)

func TestParseDisks(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want []lab.Disk
		err  string
	}{
		"none leaves the choice to the lab": {nil, nil, ""},
		"a format alone":                    {[]string{"qcow2"}, []lab.Disk{{Format: "qcow2"}}, ""},
		"all there is": {
			[]string{"raw,writeback,threads,256", "raw,none"},
			[]lab.Disk{{Format: "raw", Cache: "writeback", AIO: "threads", SizeMiB: 256}, {Format: "raw", Cache: "none"}},
			"",
		},
		"a size that is none": {[]string{"raw,none,native,big"}, nil, `"big" is no size`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseDisks(tc.args)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got error %v, want one with %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

func TestPackagesAreOneLine(t *testing.T) {
	var out strings.Builder
	c := command()
	c.SetOut(&out)
	c.SetArgs([]string{"packages"})
	if err := c.Execute(); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "libvirt-daemon ") {
		t.Errorf("got %q, want one line of packages", got)
	}
}
