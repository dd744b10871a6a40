package libvirt

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"

	"github.com/kvmeter/kvmeter/collectors"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// readable shows metadata as the JSON that it is.
type readable struct {
	collectors.Definition
	Metadata json.RawMessage

	CPUMetadata, DisksMetadata map[string]any // what they have more

	NICs  []readableNIC
	Disks []readableDisk
}

type readableNIC struct {
	collectors.NIC
	Metadata json.RawMessage
}

type readableDisk struct {
	collectors.Disk
	Metadata json.RawMessage
}

// beyond returns what a JSON object has more than another that it has all of.
func beyond(t *testing.T, object, base []byte) map[string]any {
	t.Helper()
	var all, less map[string]any
	if err := errors.Join(json.Unmarshal(object, &all), json.Unmarshal(base, &less)); err != nil {
		t.Fatal(err)
	}
	for key, v := range less {
		if !reflect.DeepEqual(all[key], v) {
			t.Errorf("%s is %v, and %v in the other", key, all[key], v)
		}
		delete(all, key)
	}
	return all
}

func TestParse(t *testing.T) {
	files, err := filepath.Glob("testdata/*.xml")
	if err != nil || len(files) < 4 {
		t.Fatalf("testdata: %d files, %v", len(files), err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			d, err := parse(text, golibvirt.DomainRunning, &Options{Host: "compute-1"})
			if err != nil {
				t.Fatal(err)
			}
			shown := readable{Definition: *d, Metadata: d.Metadata, CPUMetadata: beyond(t, d.CPUMetadata, d.Metadata), DisksMetadata: beyond(t, d.DisksMetadata, d.Metadata)}
			for _, n := range d.NICs {
				shown.NICs = append(shown.NICs, readableNIC{n, n.Metadata})
			}
			for _, k := range d.Disks {
				shown.Disks = append(shown.Disks, readableDisk{k, k.Metadata})
			}
			got, err := json.MarshalIndent(shown, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := strings.TrimSuffix(path, ".xml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("definition (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseRefusesWhatIsNoDomain(t *testing.T) {
	for name, text := range map[string]string{
		"an empty text":            "",
		"no XML":                   "domain",
		"a domain without a UUID":  "<domain><name>a</name></domain>",
		"a domain without a name":  "<domain><uuid>c0ffee00-1111-4222-8333-444455557777</uuid></domain>",
		"an element that is open":  "<domain><name>a</name><uuid>u</uuid>",
		"an entity that is no one": "<domain><name>&x;</name></domain>",
	} {
		t.Run(name, func(t *testing.T) {
			if d, err := parse([]byte(text), golibvirt.DomainRunning, &Options{Host: "h"}); err == nil {
				t.Errorf("parse = %+v, want an error", d)
			}
		})
	}
}

// TestParseOfOddTexts: names that are no text cost themselves only, and a hundred disks
// and NICs are a hundred.
func TestParseOfOddTexts(t *testing.T) {
	many := "<domain><name>m</name><uuid>U</uuid><devices>"
	for i := range 100 {
		many += fmt.Sprintf("<disk type='file'><source file='/d%d'/><target dev='vd%d'/></disk><interface type='bridge'><mac address='52:54:00:00:00:%02x'/><target dev='tap%d'/></interface>", i, i, i, i)
	}
	for name, tc := range map[string]struct {
		text        string
		name        string
		disks, nics int
	}{
		"a name in Latin-1":          {"<domain><name>gr\xfc\xdfe</name><uuid>u</uuid><title>\xff</title></domain>", "gr\ufffd\ufffde", 0, 0},
		"a name with a control code": {"<domain><name>a\x01b\x00</name><uuid>u</uuid></domain>", "a\ufffdb\ufffd", 0, 0},
		"an attribute that is none":  {"<domain><name>a</name><uuid>u</uuid><devices><disk><source file='/\xfe'/><target dev='vd\xff'/></disk></devices></domain>", "a", 1, 0},
		"a hundred disks and NICs":   {many + "</devices></domain>", "m", 100, 100},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := parse([]byte(tc.text), golibvirt.DomainRunning, &Options{Host: "h", OwnerProject: "title"})
			if err != nil {
				t.Fatal(err)
			}
			if d.Name != tc.name || len(d.Disks) != tc.disks || len(d.NICs) != tc.nics {
				t.Errorf("name %q, %d disks, %d NICs", d.Name, len(d.Disks), len(d.NICs))
			}
			if tc.disks == 100 && d.Disks[99].Image() != "/d99" {
				t.Errorf("the last disk is %+v", d.Disks[99])
			}
			for _, metadata := range [][]byte{d.Metadata, d.DisksMetadata} {
				if !json.Valid(metadata) || !utf8.Valid(metadata) {
					t.Errorf("metadata %q", metadata)
				}
			}
		})
	}
}

func TestMetadataFollowsTheState(t *testing.T) {
	text, err := os.ReadFile("testdata/nova-tcg.xml")
	if err != nil {
		t.Fatal(err)
	}
	for state, want := range map[golibvirt.DomainState][2]string{
		golibvirt.DomainRunning:     {"running", "active"},
		golibvirt.DomainBlocked:     {"running", "active"},
		golibvirt.DomainPaused:      {"paused", "paused"},
		golibvirt.DomainShutdown:    {"shutdown", "stopped"},
		golibvirt.DomainCrashed:     {"crashed", "error"},
		golibvirt.DomainPmsuspended: {"suspended", "suspended"},
		golibvirt.DomainNostate:     {"pending", "building"},
	} {
		d, err := parse(text, state, &Options{Host: "h"})
		if err != nil {
			t.Fatal(err)
		}
		var m struct{ State, Status string }
		if err := json.Unmarshal(d.Metadata, &m); err != nil {
			t.Fatal(err)
		}
		if got := [2]string{m.State, m.Status}; got != want {
			t.Errorf("state %d: got %v, want %v", state, got, want)
		}
	}
}

// FuzzParse: whatever libvirt says, a definition has an identity, resource ids
// and metadata that is a JSON object.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.xml")
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, int32(1))
	}
	f.Add([]byte("<domain><name>\xff\x01</name><uuid>u</uuid><title>t</title><metadata><a b='c'/></metadata></domain>"), int32(3))
	f.Fuzz(func(t *testing.T, text []byte, state int32) {
		d, err := parse(text, golibvirt.DomainState(state), &Options{Host: "host", OwnerProject: "title", OwnerUser: "metadata/a/@b", UserMetadata: "metadata/a"})
		if err != nil {
			return
		}
		if !utf8.ValidString(d.UUID + d.Name + d.Display + d.Project + d.User) {
			t.Errorf("what is no text: %+v", d)
		}
		if d.UUID == "" || d.Name == "" {
			t.Errorf("definition without identity: %+v", d)
		}
		object := func(data []byte) {
			var m map[string]any
			if err := json.Unmarshal(data, &m); err != nil || m["instance_id"] == nil {
				t.Errorf("metadata %q: %v", data, err)
			}
		}
		object(d.Metadata)
		for _, n := range d.NICs {
			object(n.Metadata)
			if n.Device == "" || n.Resource == "" {
				t.Errorf("NIC %+v", n)
			}
		}
		for _, k := range d.Disks {
			object(k.Metadata)
			if k.Device == "" || k.Resource == "" {
				t.Errorf("disk %+v", k)
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	text, err := os.ReadFile("testdata/nova-full.xml")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parse(text, golibvirt.DomainRunning, &Options{Host: "h"}); err != nil {
			b.Fatal(err)
		}
	}
}
