package backup

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// tempDir is where files are written before they are renamed to their places; a
// file's name there tells whose it is.
const tempDir = ".tmp"

// tempStale is when a file that a process of another machine writes is nobody's.
const tempStale = 24 * time.Hour

// Dir is a Bucket in a directory, perhaps of a mounted disk or share.
type Dir struct{ path string }

var _ Bucket = (*Dir)(nil)

// OpenDir names a directory; create makes it, and clears away what a killed process
// was writing there.
func OpenDir(path string, create bool) (*Dir, error) {
	if create {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make the directory for backups: %w", err)
		}
	}
	if st, err := os.Stat(path); err != nil {
		return nil, status.Errorf(status.NotFound, "there is no directory %s with backups: %v", path, err)
	} else if !st.IsDir() {
		return nil, status.Errorf(status.Invalid, "%s is not a directory", path)
	}
	d := &Dir{path}
	if create {
		return d, d.clear()
	}
	return d, nil
}

// tempOwner begins the names of this machine's processes' files; a pid follows.
func tempOwner() string {
	sum := sha256.Sum256([]byte(machine()))
	return fmt.Sprintf("%x-", sum[:4])
}

// clear removes files that killed processes have left half-written.
func (d *Dir) clear() error {
	files, err := os.ReadDir(filepath.Join(d.path, tempDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look for files that were being written: %w", err)
	}
	for _, f := range files {
		st, err := f.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has got its place
		}
		if err != nil {
			return fmt.Errorf("cannot look for files that were being written: %w", err)
		}
		old := time.Since(st.ModTime()) > tempStale
		if rest, ours := strings.CutPrefix(f.Name(), tempOwner()); ours {
			pid, _, _ := strings.Cut(rest, "-")
			n, err := strconv.Atoi(pid)
			old = err != nil || errors.Is(syscall.Kill(n, 0), syscall.ESRCH)
		}
		if old {
			if err := os.Remove(filepath.Join(d.path, tempDir, f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("cannot remove a file that was being written: %w", err)
			}
		}
	}
	return nil
}

func (d *Dir) String() string { return d.path }

// Put implements Bucket: a file of another name is written, synced and renamed.
func (d *Dir) Put(_ context.Context, name string, data []byte) (err error) {
	at := filepath.Join(d.path, filepath.FromSlash(name))
	if err := d.makeDirs(filepath.Dir(at)); err != nil {
		return fmt.Errorf("cannot write the backup: %w", err)
	}
	temp := filepath.Join(d.path, tempDir)
	if err := d.makeDirs(temp); err != nil {
		return fmt.Errorf("cannot write the backup: %w", err)
	}
	f, err := os.CreateTemp(temp, fmt.Sprintf("%s%d-*", tempOwner(), os.Getpid()))
	if err != nil {
		return fmt.Errorf("cannot write the backup: %w", err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), at)
	}
	if err != nil {
		return fmt.Errorf("cannot write the backup: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return syncDir(filepath.Dir(at))
}

// makeDirs makes directories that survive a power loss.
func (d *Dir) makeDirs(path string) error {
	if _, err := os.Stat(path); err == nil || path == d.path {
		return err
	}
	if err := d.makeDirs(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Get implements Bucket.
func (d *Dir) Get(_ context.Context, name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(d.path, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, status.Errorf(status.NotFound, "there is no %s/%s", d.path, name)
	}
	return b, err
}

// Has implements Bucket.
func (d *Dir) Has(_ context.Context, name string) (bool, error) {
	_, err := os.Stat(filepath.Join(d.path, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// List implements Bucket. Files that a killed process has left half-written are no
// objects.
func (d *Dir) List(ctx context.Context, prefix string, each func(string) error) error {
	root := filepath.Join(d.path, filepath.FromSlash(prefix[:strings.LastIndex(prefix, "/")+1]))
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && e.Name() == tempDir {
			return fs.SkipDir
		}
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(d.path, p)
		if err != nil {
			return err
		}
		if n := filepath.ToSlash(rel); strings.HasPrefix(n, prefix) {
			if err := ctx.Err(); err != nil {
				return err
			}
			return each(n)
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remove implements Bucket.
func (d *Dir) Remove(_ context.Context, name string) error {
	at := filepath.Join(d.path, filepath.FromSlash(name))
	if err := os.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
