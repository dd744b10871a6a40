package libvirt

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Auto stands, among sockets, for all places where a libvirt's socket may be: the
// host's own, those that containers see as their /run/libvirt, and KubeVirt's.
const Auto = "auto"

// everywhere is what Auto stands for. Of a folder's sockets the first is used.
var everywhere = append(slices.Clone(DefaultSockets),
	"/proc/[0-9]*/root/run/libvirt/libvirt-sock-ro",
	"/proc/[0-9]*/root/run/libvirt/virtqemud-sock-ro",
	"/proc/[0-9]*/root/run/libvirt/virtqemud-sock", // of an ordinary user's libvirt, as KubeVirt's
	// A pod's folder as the node has it.
	"/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock-ro",
	"/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock",
)

// patterns returns the sockets with what Auto stands for.
func patterns(sockets []string) (all []string) {
	for _, s := range sockets {
		if s == Auto {
			all = append(all, everywhere...)
		} else {
			all = append(all, s)
		}
	}
	return all
}

// CheckSockets returns an error that names the first which is no absolute path,
// pattern of such, or [Auto].
func CheckSockets(sockets []string) error {
	for _, s := range sockets {
		if s == Auto {
			continue
		}
		if _, err := filepath.Match(s, ""); err != nil {
			return fmt.Errorf("%q: %w", s, err)
		}
		if !filepath.IsAbs(s) {
			return fmt.Errorf("%q is no path from / on", s)
		}
	}
	return nil
}

// Searches reports whether among the sockets are any that are looked for where
// they may come and go.
func Searches(sockets []string) bool { return slices.ContainsFunc(patterns(sockets), isPattern) }

func isPattern(path string) bool { return strings.ContainsAny(path, `*?[`) }

// folder tells folders apart, whatever path leads to one.
type folder struct{ dev, inode uint64 }

// place is a folder with sockets of one libvirt.
type place struct {
	folder
	sockets []string // to be tried in order
}

// find looks for the folders where there are sockets that match. The first path
// that leads to a folder names it: of those by /proc that of the oldest process, which
// in a container is mostly the one that lives as long.
func find(patterns []string) (places []place) {
	index := map[folder]int{}
	for _, pattern := range patterns {
		for _, path := range expand("/", strings.TrimPrefix(pattern, "/")) {
			var s syscall.Stat_t
			if syscall.Stat(filepath.Dir(path), &s) != nil {
				continue
			}
			f := folder{s.Dev, s.Ino}
			i, known := index[f]
			switch {
			case !known:
				index[f] = len(places)
				places = append(places, place{f, []string{path}})
			case !slices.ContainsFunc(places[i].sockets, func(p string) bool { return filepath.Base(p) == filepath.Base(path) }):
				places[i].sockets = append(places[i].sockets, path)
			}
		}
	}
	return places
}

// expand returns the files below a folder that match the pattern. Unlike
// filepath.Glob it lists the folders only in which a pattern chooses.
func expand(dir, pattern string) (paths []string) {
	before, rest := "", pattern
	for {
		element, after, more := strings.Cut(rest, "/")
		if !isPattern(element) {
			before = filepath.Join(before, element)
			if rest = after; more {
				continue
			}
			path := filepath.Join(dir, before)
			if _, err := os.Stat(path); err == nil {
				paths = append(paths, path)
			}
			return paths
		}
		dir = filepath.Join(dir, before)
		entries, _ := os.ReadDir(dir) // one that may not be read has none
		slices.SortFunc(entries, func(a, b os.DirEntry) int {
			return cmp.Or(cmp.Compare(len(a.Name()), len(b.Name())), cmp.Compare(a.Name(), b.Name()))
		})
		for _, e := range entries {
			switch match, _ := filepath.Match(element, e.Name()); {
			case !match:
			case more:
				paths = append(paths, expand(filepath.Join(dir, e.Name()), after)...)
			default:
				paths = append(paths, filepath.Join(dir, e.Name()))
			}
		}
		return paths
	}
}
