package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Probe asks each libvirt daemon that it finds for its version, and returns in words
// what they say. It is an error if one of them does not answer, or there is none.
func Probe(ctx context.Context, o Options) (string, error) {
	places := find(patterns(o.Sockets))
	if len(places) == 0 {
		err := noSocket(o.Sockets)
		if Searches(o.Sockets) {
			err = fmt.Errorf("there is no libvirt now where the setting libvirt has them looked for: %s (to find those in containers needs CAP_SYS_PTRACE)", strings.Join(o.Sockets, ", "))
		}
		return "", err
	}
	var words []string
	var errs []error
	for _, p := range places {
		said, err := probe(ctx, p.sockets, o)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		words = append(words, said)
	}
	return strings.Join(words, ", "), errors.Join(errs...)
}

func probe(ctx context.Context, sockets []string, o Options) (string, error) {
	k, err := dial(ctx, sockets, o.Timeout)
	if err != nil {
		return "", err
	}
	defer k.close()
	var version uint64
	if err := k.call(ctx, func() (err error) {
		version, err = k.ConnectGetLibVersion()
		return err
	}); err != nil {
		return "", fmt.Errorf("ask libvirt at %s for its version: %w", k.path, err)
	}
	return fmt.Sprintf("libvirt %d.%d.%d at %s", version/1e6, version/1e3%1e3, version%1e3, k.path), nil
}
