package boot

import (
	"bytes"
	"fmt"
)

// Archive is a cpio archive of the kind that the kernel unpacks as its first
// file system (newc, Documentation/driver-api/early-userspace/buffer-format.rst).
type Archive struct {
	buf   bytes.Buffer
	inode int
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeChar = 0o020000
)

// Dir adds a folder that everybody may enter. Those above it come first.
func (a *Archive) Dir(name string) { a.entry(name, modeDir|0o755, nil, 0, 0) }

// File adds a file.
func (a *Archive) File(name string, perm int, content []byte) {
	a.entry(name, modeFile|perm, content, 0, 0)
}

// Console adds /dev/console, which the kernel opens as standard input, output
// and error before init runs. The folder dev comes first.
func (a *Archive) Console() { a.entry("dev/console", modeChar|0o600, nil, 5, 1) }

// Bytes ends the archive and returns it.
func (a *Archive) Bytes() []byte {
	a.entry("TRAILER!!!", 0, nil, 0, 0)
	return a.buf.Bytes()
}

func (a *Archive) entry(name string, mode int, content []byte, major, minor int) {
	a.inode++
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(content)
	a.pad()
}

func (a *Archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}
