package lab

import (
	"encoding/xml"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestDomainXML(t *testing.T) {
	for name, tc := range map[string]struct {
		number int
		spec   GuestSpec
	}{
		"a Linux guest has its kernel and the metadata of Nova": {
			1, GuestSpec{},
		},
		"a Linux guest has the disks and NICs asked for": {
			18, GuestSpec{VCPUs: 2, NICs: 2, Disks: []Disk{
				{Format: "qcow2", Cache: "none", AIO: "io_uring"},
				{Cache: "writeback", SizeMiB: 256},
			}, Name: `a "b" <c> & d`, Flavor: "m1.small", User: "eve", Project: "red"},
		},
		"a KVM guest has the ROM and an IDE disk": {
			2, GuestSpec{Kind: KVM, Mode: "disk"},
		},
		"a guest may have neither disks nor NICs": {
			3, GuestSpec{Kind: KVM, Disks: []Disk{}, NICs: -1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := tc.spec.withDefaults(tc.number)
			if err != nil {
				t.Fatal(err)
			}
			l := &Lab{dir: "/tmp/lab", id: labID("/tmp/lab")}
			g := l.guest(tc.number, spec)
			got, err := domain{
				ID: l.identity(tc.number), Spec: spec, NICs: g.NICs(), Disks: spec.disks(g.dir()),
				Images: images{Kernel: "/c/vmlinuz", Initrd: "/c/initrd", ROM: "/c/rom"},
				Bridge: l.bridge(), Emulator: "/usr/bin/qemu-system-x86_64",
				Console: g.Console(), Serial: g.socket(), Created: "2026-01-02 03:04:05",
			}.render()
			if err != nil {
				t.Fatal(err)
			}
			if err := xml.Unmarshal([]byte(got), new(struct{})); err != nil {
				t.Errorf("not XML: %v", err)
			}
			golden := filepath.Join("testdata", strings.ReplaceAll(name, " ", "-")+".xml")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

func TestSpecsThatCannotWorkAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		spec GuestSpec
		want string
	}{
		"an unknown kind":                {GuestSpec{Kind: "xen"}, "linux and kvm"},
		"an unknown mode":                {GuestSpec{Kind: KVM, Mode: "dance"}, "idle, burn, pulse, disk"},
		"a mode for a Linux guest":       {GuestSpec{Mode: "burn"}, "Exec"},
		"an unknown disk format":         {GuestSpec{Disks: []Disk{{Format: "vmdk"}}}, "raw and qcow2"},
		"more NICs than it brings up":    {GuestSpec{NICs: 9}, "at most 8"},
		"more disks than IDE has places": {GuestSpec{Kind: KVM, Disks: make([]Disk, 5)}, "at most 4"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tc.spec.withDefaults(1)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestNamesOfTwoLabsNeverCollide(t *testing.T) {
	seen := map[string]string{}
	for _, dir := range []string{"/tmp/a", "/tmp/b"} {
		l := &Lab{dir: dir, id: labID(dir)}
		names := []string{l.bridge()}
		for number := range 300 {
			g := l.guest(number+1, GuestSpec{NICs: 3})
			names = append(names, g.UUID)
			for _, n := range g.NICs() {
				names = append(names, n.Tap, n.Port, n.MAC)
			}
		}
		for _, n := range names {
			if other, taken := seen[n]; taken {
				t.Errorf("%s is in %s and %s", n, dir, other)
			}
			seen[n] = dir
		}
	}
	for n := range seen {
		if (strings.HasPrefix(n, "tap") || strings.HasPrefix(n, "kmbr")) && len(n) > 15 {
			t.Errorf("device name %s has more than 15 characters", n)
		}
	}
}

func TestEqualNamesGiveEqualOwners(t *testing.T) {
	if a, b := hexID("project", "red"), hexID("project", "red"); a != b || len(a) != 32 {
		t.Errorf("got project ids %s and %s, want one of 32 hex digits", a, b)
	}
	if a, b := hexID("project", "red"), hexID("user", "red"); a == b {
		t.Errorf("project and user of one name share the id %s", a)
	}
}
