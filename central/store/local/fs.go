package local

import "github.com/cockroachdb/pebble/v2/vfs"

// OpenOn is [Open] with another file system than the disk's under the samples:
// for simulations, which crash it. The catalogue is in the folder on disk.
func OpenOn(fs vfs.FS, dir string, options Options) (*Store, error) {
	options.fs = fs
	return Open(dir, options)
}
