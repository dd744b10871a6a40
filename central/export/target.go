package export

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// target keeps files by names with slashes. A file is there as a whole or not
// at all.
type target interface {
	// open returns an error that is [fs.ErrNotExist] where there is no such file.
	open(ctx context.Context, name string) (*file, error)
	// create makes or replaces a file with what write writes, unless that fails.
	create(ctx context.Context, name string, write func(io.Writer) error) error
}

type file struct {
	io.ReaderAt
	io.Closer
	size int64
}

// folder is a folder of this host.
type folder string

func (d folder) open(_ context.Context, name string) (*file, error) {
	f, err := os.Open(filepath.Join(string(d), filepath.FromSlash(name)))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{f, f, info.Size()}, nil
}

// create writes beside the file, under a name that readers of the folder pass
// over, syncs it and renames it.
func (d folder) create(_ context.Context, name string, write func(io.Writer) error) error {
	name = filepath.Join(string(d), filepath.FromSlash(name))
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	partial := filepath.Join(dir, "."+filepath.Base(name)+".partial")
	f, err := os.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(partial, name)
	}
	if err != nil {
		_ = os.Remove(partial)
		return err
	}
	return syncDir(dir)
}

// syncDir makes a rename in the folder last.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// An upload has at most 10,000 parts, of which one is held in memory.
const partBytes = 32 << 20

// bucket is a bucket of S3.
type bucket struct {
	client       *minio.Client
	name, prefix string
}

func newBucket(cfg S3, name, prefix string) (*bucket, error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || path.Clean("/"+u.Path) != "/" {
		return nil, fmt.Errorf("export.s3.endpoint %s: write https://HOST or https://HOST:PORT", cfg.Endpoint)
	}
	keys := credentials.NewEnvAWS()
	if cfg.Credentials != "" {
		keys = credentials.NewFileAWSCredentials(cfg.Credentials, "")
	}
	client, err := minio.New(u.Host, &minio.Options{Creds: keys, Secure: u.Scheme == "https", Region: cfg.Region, MaxRetries: 3})
	if err != nil {
		return nil, fmt.Errorf("export.s3: %w", err)
	}
	return &bucket{client, name, prefix}, nil
}

func (b *bucket) open(ctx context.Context, name string) (*file, error) {
	o, err := b.client.GetObject(ctx, b.name, path.Join(b.prefix, name), minio.GetObjectOptions{})
	if err != nil {
		return nil, err
	}
	info, err := o.Stat()
	if err != nil {
		o.Close()
		if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
			err = fs.ErrNotExist
		}
		return nil, err
	}
	return &file{o, o, info.Size}, nil
}

// create uploads while write writes; S3 shows the object when all of it is there.
func (b *bucket) create(ctx context.Context, name string, write func(io.Writer) error) error {
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(write(w))
	}()
	_, err := b.client.PutObject(ctx, b.name, path.Join(b.prefix, name), r, -1, minio.PutObjectOptions{
		ContentType: "application/vnd.apache.parquet", PartSize: partBytes,
		// Services that know neither signed chunks nor trailers check this.
		DisableContentSha256: true, SendContentMd5: true,
	})
	r.CloseWithError(err) // write fails where the upload did
	<-written
	return err
}
