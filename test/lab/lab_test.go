package lab

import (
	"bufio"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFoldersThatCannotWorkAreRefused(t *testing.T) {
	for name, tc := range map[string]struct{ dir, want string }{
		"too long for a Unix socket":     {"/" + strings.Repeat("x", maxDirLen), "too long"},
		"inside libvirt's own folder":    {"/var/lib/libvirt/lab", "does not see"},
		"libvirt's own folder":           {"/run/libvirt", "does not see"},
		"a name that begins like theirs": {"/run/libvirt-lab", ""},
		"a good one":                     {"/tmp/lab", ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkDir(tc.dir)
			if tc.want == "" && err != nil {
				t.Errorf("got error %v, want none", err)
			}
			if tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestTheSameFolderIsTheSameLab(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	a, err := New(dir, Options{Cache: "x"})
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	b, err := New(".", Options{Cache: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if a.ID() != b.ID() || len(a.ID()) != 8 {
		t.Errorf("got ids %s and %s, want the same 8 digits", a.ID(), b.ID())
	}
}

func TestClosingALabThatNeverRanLeavesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	l, err := New(dir, Options{Cache: "x"})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder: got %v, want none", err)
	}
}

func TestGuestsAreFoundAndNumbersNotUsedTwice(t *testing.T) {
	l, err := New(t.TempDir(), Options{Cache: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if guests, err := l.Guests(); err != nil || len(guests) != 0 {
		t.Fatalf("got %v, %v in a new lab, want no guest", guests, err)
	}
	for range 3 {
		if _, err := l.newGuest(t.Context(), GuestSpec{Project: "red"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(l.guest(3, GuestSpec{}).dir()); err != nil {
		t.Fatal(err)
	}
	g, err := l.newGuest(t.Context(), GuestSpec{})
	if err != nil {
		t.Fatal(err)
	}
	if g.Number() != 4 || g.Name != "instance-00000004" {
		t.Errorf("got guest %d %s after the third was destroyed, want 4", g.Number(), g.Name)
	}
	for _, which := range []string{"2", "instance-00000002", l.identity(2).UUID} {
		if g, err := l.Guest(which); err != nil || g.Number() != 2 || g.Spec.Project != "red" {
			t.Errorf("%s: got %+v, %v, want guest 2", which, g, err)
		}
	}
	if _, err := l.Guest("3"); err == nil {
		t.Error("a destroyed guest was found")
	}
	if guests, err := l.Guests(); err != nil || len(guests) != 3 {
		t.Errorf("got %d guests, %v, want 3", len(guests), err)
	}
}

func TestOnlyTheLabsOwnProcessesBelongToIt(t *testing.T) {
	const id = "0123abcd"
	for name, tc := range map[string]struct {
		args    []string
		environ string
		want    bool
	}{
		"a daemon with the lab's id":              {[]string{"libvirtd"}, "A=1\x00KVMETER_LAB_ID=0123abcd\x00", true},
		"a daemon of another lab":                 {[]string{"libvirtd"}, "KVMETER_LAB_ID=0123abce\x00", false},
		"an id that only begins alike":            {[]string{"libvirtd"}, "KVMETER_LAB_ID=0123abcdef\x00", false},
		"a guest of the lab":                      {[]string{"qemu", "-uuid", "0123abcd-0000-4000-8000-000000000001"}, "", true},
		"a guest of the machine":                  {[]string{"qemu", "-uuid", "ffffffff-0000-4000-8000-000000000001"}, "", false},
		"an editor of a file with the id":         {[]string{"vi", "0123abcd-notes"}, "", false},
		"a search for the guest":                  {[]string{"grep", "0123abcd-0000-4000-8000-000000000001"}, "", false},
		"arguments that end where a UUID is due":  {[]string{"qemu", "-uuid"}, "", false},
		"a variable whose name only ends in ours": {[]string{"x"}, "XKVMETER_LAB_ID=0123abcd\x00", false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := belongs(id, tc.args, []byte(tc.environ)); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
}

func TestAnswers(t *testing.T) {
	for name, tc := range map[string]struct {
		in, want string
		err      error
	}{
		"text and success":                      {"@t1 - a\r\n@t1 - b\n@t1 DONE 0\n", "a\nb", nil},
		"success without text":                  {"@t1 DONE 0\n", "", nil},
		"failure carries the text":              {"@t1 - no disk\n@t1 DONE 1\n", "no disk", ErrCommand},
		"an earlier command's answer is no one": {"@t0 - old\n@t0 DONE 1\n@t1 - new\n@t1 DONE 0\n", "new", nil},
		"noise and half lines are skipped":      {"LAB\n@t\n@t1\n@t1 DONE x\n@t1 DONE\nDONE 0\n@t1 DONE 0\n", "", nil},
		"the guest's end is an error":           {"@t1 - half\n", "half", errAny},
		"a cut line is no answer":               {"@t1 DONE 0", "", errAny},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := answer(bufio.NewReader(strings.NewReader(tc.in)), "t1")
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			if (err == nil) != (tc.err == nil) || tc.err == ErrCommand && !errors.Is(err, ErrCommand) {
				t.Errorf("got error %v, want %v", err, tc.err)
			}
		})
	}
}

var errAny = errors.New("any error")

func FuzzAnswer(f *testing.F) {
	f.Add("@t1 - a\n@t1 DONE 0\n")
	f.Add("@t1 DONE 99999999999999999999\n@t1 -\n")
	f.Fuzz(func(t *testing.T, in string) {
		_, err := answer(bufio.NewReader(strings.NewReader(in)), "t1")
		if err == nil && !strings.Contains(in, "@t1 DONE ") {
			t.Errorf("%q was taken for success", in)
		}
	})
}

func TestUDPFrame(t *testing.T) {
	nic := NIC{MAC: "fa:16:01:02:03:04", IP: "198.18.0.7"}
	f, err := udpFrame(nic, 100)
	if err != nil {
		t.Fatal(err)
	}
	if len(f) != 142 {
		t.Errorf("got %d bytes, want 42 of headers and 100", len(f))
	}
	if got := net.HardwareAddr(f[:6]).String(); got != nic.MAC {
		t.Errorf("got destination %s, want %s", got, nic.MAC)
	}
	var sum uint32
	for i := 14; i < 34; i += 2 {
		sum += uint32(f[i])<<8 | uint32(f[i+1])
	}
	if sum = sum>>16 + sum&0xffff; sum != 0xffff {
		t.Errorf("header sums up to %#x, want 0xffff", sum)
	}
	for _, size := range []int{-1, 1473} {
		if _, err := udpFrame(nic, size); err == nil {
			t.Errorf("size %d was taken", size)
		}
	}
}

func TestMissingCommandsAreNamedWithTheirPackages(t *testing.T) {
	err := checkCommands("sh", "no-such-command")
	if err == nil || !strings.Contains(err.Error(), "needs no-such-command: apt-get install") {
		t.Errorf("got %v, want the missing command and what to install", err)
	}
	if err := checkCommands("sh"); err != nil {
		t.Errorf("got %v, want none", err)
	}
}
