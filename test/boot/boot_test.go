package boot

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestArchiveIsWhatCPIOReads(t *testing.T) {
	var a Archive
	a.Dir("m")
	a.File("init", 0o755, []byte("#!"))
	a.File("m/00.ko", 0o644, []byte("x"))
	b := a.Bytes()
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
	if err := pickModules(t.Context(), []string{"virtio_pci", "virtio_blk", "virtio_net"}, root, out); err != nil {
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
