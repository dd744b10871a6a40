package lab

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
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

func TestArchiveIsWhatCPIOReads(t *testing.T) {
	var a archive
	a.dir("m")
	a.file("init", 0o755, []byte("#!"))
	a.file("m/00.ko", 0o644, []byte("x"))
	b := a.bytes()
	if len(b)%4 != 0 {
		t.Errorf("got %d bytes, want whole words", len(b))
	}
	const header = 110
	var names []string
	for at := 0; at < len(b); {
		if !bytes.HasPrefix(b[at:], []byte("070701")) {
			t.Fatalf("no header at %d", at)
		}
		size, name := field(t, b, at, 6), field(t, b, at, 11)
		names = append(names, string(b[at+header:at+header+name-1]))
		at += (header + name + 3) / 4 * 4
		at += (size + 3) / 4 * 4
	}
	if got, want := strings.Join(names, " "), "m init m/00.ko TRAILER!!!"; got != want {
		t.Errorf("got entries %q, want %q", got, want)
	}
}

// field reads the n-th number of a header.
func field(t *testing.T, b []byte, at, n int) int {
	t.Helper()
	var v int
	for _, c := range b[at+6+8*n : at+6+8*n+8] {
		d := strings.IndexByte("0123456789abcdef", c)
		if d < 0 {
			t.Fatalf("no hex digit: %q", c)
		}
		v = v*16 + d
	}
	return v
}

func FuzzModuleDependencies(f *testing.F) {
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = dependencies(b)
	})
}

func TestModulesAreReadHoweverTheyAreCompressed(t *testing.T) {
	want := module(t, "virtio")
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"a.ko": want, "a.ko.zst": enc.EncodeAll(want, nil)} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := readModule(t.Context(), path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: got %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
}

func TestModulesOfADebianPackageComeAfterWhatTheyNeed(t *testing.T) {
	root, out := t.TempDir(), t.TempDir()
	for name, needs := range map[string]string{
		"virtio_pci": "virtio,virtio_ring", "virtio_blk": "virtio-ring", "virtio": "", "virtio_ring": "virtio", "unrelated": "",
	} {
		if err := os.WriteFile(filepath.Join(root, name+".ko"), module(t, needs), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := pickModules(t.Context(), root, out); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(out, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, filepath.Base(f))
	}
	want := "00-virtio.ko 01-virtio_ring.ko 02-virtio_pci.ko 03-virtio_blk.ko"
	if strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// module is the least ELF file that says what it depends on.
func module(t *testing.T, needs string) []byte {
	t.Helper()
	const names = "\x00.modinfo\x00.shstrtab\x00"
	info := "license=GPL\x00depends=" + needs + "\x00"
	b := new(bytes.Buffer)
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	le := func(size int, v uint64) {
		for range size {
			b.WriteByte(byte(v))
			v >>= 8
		}
	}
	le(2, 1)                                         // relocatable
	le(2, 62)                                        // x86-64
	le(4, 1)                                         // version
	le(8, 0)                                         // no entry
	le(8, 0)                                         // no program headers
	le(8, uint64(64+len(info)+len(names)))           // section headers
	le(4, 0)                                         // flags
	for _, v := range []uint64{64, 0, 0, 64, 3, 2} { // sizes and counts; names are in section 2
		le(2, v)
	}
	b.WriteString(info + names)
	section := func(name, kind, offset, size uint64) {
		le(4, name)
		le(4, kind)
		le(8, 0)
		le(8, 0)
		le(8, offset)
		le(8, size)
		le(8, 0)
		le(8, 1)
		le(8, 0)
	}
	section(0, 0, 0, 0)
	section(1, 1, 64, uint64(len(info)))
	section(10, 3, uint64(64+len(info)), uint64(len(names)))
	return b.Bytes()
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
