package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2"
)

// Backup writes a copy of the store, as it is now, into a folder that is empty
// or not there yet. The store goes on meanwhile. On the same file system the
// copy shares the files that never change and takes little space at first.
func (s *Store) Backup(ctx context.Context, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.readers.Done()
	if err := emptyFolder(dir); err != nil {
		return fmt.Errorf("back up: %w", err)
	}
	// Samples first: the catalogue that is copied later has all that they name,
	// as long as nothing is collected in between.
	s.collecting.Lock()
	defer s.collecting.Unlock()
	if err := s.db.Checkpoint(filepath.Join(dir, "samples"), pebble.WithFlushedWAL()); err != nil {
		return fmt.Errorf("back up samples: %w", err)
	}
	if err := s.catalogue.copyTo(ctx, filepath.Join(dir, "catalogue.db")); err != nil {
		return fmt.Errorf("back up catalogue: %w", err)
	}
	return syncFolder(dir)
}

// copyTo writes the file as it is now to another one.
func (c *catalogue) copyTo(ctx context.Context, path string) error {
	c.save.Lock()
	defer c.save.Unlock()
	if _, err := c.db.ExecContext(ctx, "VACUUM INTO ?", path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Restore copies a backup to where a store may be opened: a folder that is
// empty or not there yet. The backup stays as it is.
func Restore(ctx context.Context, backup, dir string) error {
	for _, name := range []string{"samples", "catalogue.db"} {
		if _, err := os.Stat(filepath.Join(backup, name)); err != nil {
			return fmt.Errorf("restore: %s is no backup: %w", backup, err)
		}
	}
	if err := emptyFolder(dir); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	err := filepath.WalkDir(backup, func(path string, e fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		name, err := filepath.Rel(backup, path)
		switch {
		case err != nil || name == ".":
			return err
		case e.IsDir():
			return os.Mkdir(filepath.Join(dir, name), 0o750)
		}
		return copyFile(path, filepath.Join(dir, name))
	})
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return errors.Join(syncFolder(filepath.Join(dir, "samples")), syncFolder(dir))
}

func emptyFolder(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.MkdirAll(dir, 0o750)
	case err != nil:
		return err
	case len(entries) > 0:
		return fmt.Errorf("%s is not empty: name a folder that is, or is not there", dir)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
