package sample

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestVolumePrintsExactly(t *testing.T) {
	for _, tc := range []struct {
		volume    Volume
		json, api string
	}{
		{Uint(math.MaxUint64), "18446744073709551615", "18446744073709551615.0"},
		{Int(math.MinInt64), "-9223372036854775808", "-9223372036854775808.0"},
		{Uint(50), "50", "50.0"},
		{Float(50), "50.0", "50.0"},
		{Float(0.1), "0.1", "0.1"},
		{Float(1e20), "1e+20", "1e+20"},
		{Float(1e-7), "1e-07", "1e-07"},
		{Float(1e15), "1000000000000000.0", "1000000000000000.0"},
	} {
		if got := tc.volume.String(); got != tc.json {
			t.Errorf("%+v: got %s, want %s", tc.volume, got, tc.json)
		}
		if got := string(tc.volume.AppendAPI(nil)); got != tc.api {
			t.Errorf("%+v in the API: got %s, want %s", tc.volume, got, tc.api)
		}
	}
}

func TestBatchIDIsAUUIDOfVersion8(t *testing.T) {
	now := time.UnixMilli(1_790_000_000_123)
	id := NewBatchID(now)
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{8}0000$`)
	if !form.MatchString(id.String()) {
		t.Errorf("%s is not a UUID of version 8 with 16 zero bits", id)
	}
	if !id.Time().Equal(now) {
		t.Errorf("its time is %s, want %s", id.Time(), now)
	}
	if id == NewBatchID(now) {
		t.Errorf("two batches have the id %s", id)
	}
	later := NewBatchID(now.Add(time.Millisecond))
	if id.String() >= later.String() {
		t.Errorf("%s does not sort before the later %s", id, later)
	}
	derived := DeriveBatchID(id, "a:b")
	if derived != DeriveBatchID(id, "a:b") || derived == DeriveBatchID(id, "a:c") || derived == id {
		t.Errorf("derived id %s of %s", derived, id)
	}
	if !form.MatchString(derived.String()) || !derived.Time().Equal(now) {
		t.Errorf("derived id %s, time %s", derived, derived.Time())
	}
}

func TestSampleIDNamesItsBatch(t *testing.T) {
	batch := NewBatchID(time.Now())
	id := ParseID(batch.Sample(65535).String())
	got, index, ok := id.Batch()
	if got != batch || index != 65535 || !ok {
		t.Errorf("got %s, %d, %t, want %s, 65535, true", got, index, ok, batch)
	}
	for _, foreign := range []string{"m-0001", "", "5E1F0000-0000-4000-8000-000000000001"} {
		if got := ParseID(foreign); foreign != "" && (got.Text != foreign || got.String() != foreign) {
			t.Errorf("foreign id %q became %q", foreign, got)
		}
	}
}

func TestIncarnationsDifferByTheirParts(t *testing.T) {
	if IncarnationOf("ab", "c") == IncarnationOf("a", "bc") {
		t.Error("parts run into each other")
	}
	// The value is on the wire and in the store: it must never change.
	if got, want := IncarnationOf("boot", "12345").String(), "19b8fc46fea87253"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestMatcherMatchesAsCeilometerDoes(t *testing.T) {
	for _, tc := range []struct {
		patterns []string
		yes, no  []string
	}{
		{[]string{"*"}, []string{"cpu", "a/b", ""}, nil},
		{[]string{"cpu"}, []string{"cpu"}, []string{"cpu.wait", "xcpu", "CPU"}},
		{[]string{"!cpu"}, []string{"disk"}, []string{"cpu"}},
		{[]string{"*.bytes", "!disk.*"}, []string{"network.incoming.bytes"}, []string{"disk.read.bytes", "cpu"}},
		{[]string{"cpu.w?it"}, []string{"cpu.wait"}, []string{"cpu.wt"}},
		{[]string{"[cd]*"}, []string{"cpu", "disk"}, []string{"net", "[cd]x"}},
		{[]string{"[!c]*"}, []string{"disk"}, []string{"cpu"}},
		{[]string{"a[b"}, []string{"a[b"}, []string{"ab"}},
		{[]string{"[]x]"}, []string{"]", "x"}, []string{"[]x]"}},
		{[]string{"a.b"}, []string{"a.b"}, []string{"axb"}},
		{[]string{"é*"}, []string{"état"}, []string{"e"}},
	} {
		m, err := NewMatcher(tc.patterns)
		if err != nil {
			t.Errorf("%q: %v", tc.patterns, err)
			continue
		}
		for _, name := range tc.yes {
			if !m.Match(name) {
				t.Errorf("%q does not match %q", tc.patterns, name)
			}
		}
		for _, name := range tc.no {
			if m.Match(name) {
				t.Errorf("%q matches %q", tc.patterns, name)
			}
		}
	}
	for _, bad := range [][]string{nil, {}, {"cpu", "!disk"}, {"*", "cpu"}, {"[z-a]"}} {
		if _, err := NewMatcher(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestMatcherKnowsNamesFromWildcards(t *testing.T) {
	m, err := NewMatcher([]string{"cpu", "disk.*"})
	if err != nil {
		t.Fatal(err)
	}
	if !m.Named("cpu") || m.Named("disk.read") {
		t.Errorf("named: cpu %t, disk.read %t", m.Named("cpu"), m.Named("disk.read"))
	}
	all, err := NewMatcher([]string{"*"})
	if err != nil {
		t.Fatal(err)
	}
	if m.All() || !all.All() {
		t.Errorf("all: %t and %t", m.All(), all.All())
	}
}

func FuzzMatcher(f *testing.F) {
	f.Add("disk.*.[rw]*", "disk.device.read")
	f.Add("[!]-a]", "x")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		if m, err := NewMatcher([]string{pattern}); err == nil {
			m.Match(name)
		}
	})
}

func TestKeysVerifyWhatTheySigned(t *testing.T) {
	dir := t.TempDir()
	secret := "0123456789abcdef"
	next := "fedcba9876543210"
	if err := os.WriteFile(filepath.Join(dir, "node-1.key"), []byte(next+" \n\n"+secret+"\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	keys, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	body := []byte("body")
	good := Sign([]byte(secret), body)
	for name, tc := range map[string]struct {
		id, signature string
		want          error
	}{
		"the right signature":     {"node-1", good, nil},
		"that of the next secret": {"node-1", Sign([]byte(next), body), nil},
		"that of both secrets":    {"node-1", Sign([]byte(next+"\n"+secret), body), ErrBadSignature},
		"no signature":            {"node-1", "", ErrUnsigned},
		"a key nobody knows":      {"node-2", good, ErrUnknownKey},
		"another body's":          {"node-1", Sign([]byte(secret), []byte("other")), ErrBadSignature},
		"a text that is not hex":  {"node-1", "zz", ErrBadSignature},
		"the half of a signature": {"node-1", good[:32], ErrBadSignature},
	} {
		if err := keys.Verify(tc.id, tc.signature, body); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", name, err, tc.want)
		}
	}
}

func TestTheFirstSecretSigns(t *testing.T) {
	k := Keys{"one": []byte("first"), "two": []byte("first\nsecond"), "none": nil}
	for id, want := range map[string]string{"one": "first", "two": "first", "none": "", "unknown": ""} {
		if got := string(k.Secret(id)); got != want {
			t.Errorf("%s: got %q, want %q", id, got, want)
		}
	}
	if err := (Keys{"none": nil}).Verify("none", Sign(nil, []byte("body")), []byte("body")); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("a key without a secret: got %v, want %v", err, ErrUnknownKey)
	}
	t.Setenv(CredentialsVariable, t.TempDir())
	path := "$CREDENTIALS_DIRECTORY/key"
	if _, err := LoadKey("one", path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a credential that is not there: %v", err)
	}
	if err := os.WriteFile(filepath.Join(os.Getenv(CredentialsVariable), "key"), []byte("\n0123456789abcdef\nfedcba9876543210\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if k, err := LoadKey("one", path); err != nil || string(k.Secret("one")) != "0123456789abcdef" {
		t.Errorf("got %q, %v", k, err)
	}
}

func TestLoadKeysRefusesShortSecrets(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "m.key"), []byte("0123456789abcdef\nshort\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeys(dir); err == nil || strings.Contains(err.Error(), "short\n") {
		t.Errorf("a second secret of 5 bytes: error %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "m.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "n.key"), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKeys(dir); err == nil {
		t.Error("a secret of 5 bytes is accepted")
	}
	if keys, err := LoadKeys(filepath.Join(dir, "none")); err != nil || len(keys) != 0 {
		t.Errorf("a folder that is not there: got %v, %v", keys, err)
	}
}

func TestCatalogueHasEachNameOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range Catalogue {
		if seen[m.Name] {
			t.Errorf("%s is there twice", m.Name)
		}
		seen[m.Name] = true
		if m.Help == "" || len(m.Origins) == 0 || m.Resource == "" {
			t.Errorf("%s lacks help, origins or resource", m.Name)
		}
	}
}
