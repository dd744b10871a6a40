// Package file writes samples to a file, one line each, as Ceilometer's file
// publisher does: a Python dict literal, or with the option json a JSON object.
//
//	file:///path?json&max_bytes=N&backup_count=M
//
// With both max_bytes and backup_count set, a line that would make the file
// reach N bytes goes to a new one, and the old ones are kept as path.1 to path.M.
//
// Lines are synced before they count as taken. A batch that is delivered twice is
// written twice: readers tell by the samples' ids.
package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/notifier/wire"
	"github.com/kvmeter/kvmeter/sample"
)

type file struct {
	path    string
	max     int64 // bytes; 0: never rotated
	backups int
	style   *wire.Style
	writer  *wire.Writer // guarded by mu

	mu   sync.Mutex
	f    *os.File
	size int64
	buf  []byte // not yet written
}

// Check says what is wrong with a URL, and whether its folder is missing. It opens
// no file.
func Check(u *url.URL, d publisher.Deps) error {
	p, err := parse(u, d)
	if err == nil {
		_, err = os.Stat(filepath.Dir(p.path))
	}
	return err
}

// New opens the file of a URL for appending.
func New(u *url.URL, d publisher.Deps) (publisher.Publisher, error) {
	p, err := parse(u, d)
	if err != nil {
		return nil, err
	}
	return p, p.open()
}

func parse(u *url.URL, d publisher.Deps) (*file, error) {
	if u.Host != "" || u.Path == "" || u.Path == "/" {
		return nil, errors.New("it needs a path, as in file:///var/log/kvmeter/samples.log (three slashes)")
	}
	o := publisher.NewOptions(u)
	p := &file{path: u.Path, style: wire.Python}
	if o.Has("json") {
		p.style = wire.JSON
	}
	maxBytes, backups := o.Int("max_bytes", 0), o.Int("backup_count", 0)
	if err := o.Done(d.Log); err != nil {
		return nil, err
	}
	if maxBytes > 0 && backups > 0 {
		p.max, p.backups = int64(maxBytes), min(backups, 10_000)
	}
	p.writer = wire.NewWriter(p.style)
	return p, nil
}

// open opens the file for appending. It ends a line that was cut short when its
// writer died, so that the next one does not continue it; the sample comes again.
func (p *file) open() error {
	f, err := os.OpenFile(p.path, os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		err = syncDir(filepath.Dir(p.path))
	}
	var size int64
	if err == nil {
		size, err = endLine(f, info.Size())
	}
	if err != nil {
		_ = f.Close()
		return err
	}
	p.f, p.size = f, size
	return nil
}

func endLine(f *os.File, size int64) (int64, error) {
	if size == 0 {
		return 0, nil
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], size-1); err != nil || last[0] == '\n' {
		return size, err
	}
	n, err := f.WriteString("\n")
	return size + int64(n), err
}

// syncDir makes the names in a folder survive a power loss.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Publish writes and syncs the samples of all parts.
func (p *file) Publish(ctx context.Context, parts []publisher.Part) error {
	return p.write(func() error {
		for i := range parts {
			if err := ctx.Err(); err != nil {
				return err
			}
			p.writer.Reset()
			for s := range parts[i].Batch.Samples() {
				start := len(p.buf)
				p.buf = p.writer.Sample(p.buf, &s)
				if err := p.line(start); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// PublishEvents writes and syncs events.
func (p *file) PublishEvents(_ context.Context, events []sample.Event) error {
	return p.write(func() error {
		for i := range events {
			start := len(p.buf)
			p.buf = wire.Event(p.buf, p.style, &events[i])
			if err := p.line(start); err != nil {
				return err
			}
		}
		return nil
	})
}

func (p *file) write(lines func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.buf = p.buf[:0]
	err := lines()
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return fmt.Errorf("write to the file: %w", err)
	}
	return nil
}

// line ends the line that begins at start in buf, and moves it to the next file
// where this one has no room for it.
func (p *file) line(start int) error {
	p.buf = append(p.buf, '\n')
	if p.max == 0 || p.size+int64(start) == 0 || p.size+int64(len(p.buf)) < p.max {
		return nil
	}
	last := append([]byte(nil), p.buf[start:]...)
	p.buf = p.buf[:start]
	if err := p.flush(); err != nil {
		return err
	}
	if err := p.rotate(); err != nil {
		return err
	}
	p.buf = append(p.buf, last...)
	return nil
}

// flush writes and syncs what is in buf. When it fails nothing of it is left in
// the file, or the file is opened again, so that no line continues half of one.
func (p *file) flush() error {
	if p.f == nil {
		if err := p.open(); err != nil {
			return err
		}
	}
	if len(p.buf) == 0 {
		return nil
	}
	_, err := p.f.Write(p.buf)
	if err == nil {
		err = p.f.Sync()
	}
	if err != nil {
		if cut := p.f.Truncate(p.size); cut != nil {
			err = errors.Join(err, cut, p.f.Close())
			p.f = nil
		}
		return err
	}
	p.size += int64(len(p.buf))
	p.buf = p.buf[:0]
	return nil
}

func (p *file) rotate() error {
	f := p.f
	p.f = nil // whatever comes, flush opens it again
	if err := f.Close(); err != nil {
		return err
	}
	for n := p.backups; n > 0; n-- {
		from := p.path
		if n > 1 {
			from = fmt.Sprintf("%s.%d", p.path, n-1)
		}
		if err := os.Rename(from, fmt.Sprintf("%s.%d", p.path, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return p.open()
}

// Close closes the file.
func (p *file) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.f == nil {
		return nil
	}
	return p.f.Close()
}
