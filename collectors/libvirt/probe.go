package libvirt

import (
	"context"
	"fmt"
)

// Probe asks the first of the sockets on which a libvirt daemon answers for its
// version, and returns both in words.
func Probe(ctx context.Context, o Options) (string, error) {
	k, err := dial(ctx, o.Sockets, o.Timeout)
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
