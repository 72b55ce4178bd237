package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

const (
	readers     = 4
	maxReads    = 4096 // reads waiting for a worker; more are answered Unavailable
	maxIOVector = 1024 // IOV_MAX of Linux
)

// File is a Disk in a regular file or a block device, buffered by the page
// cache. Writes, syncs, discards and reads have goroutines of their own, so
// that none waits for another kind; ReadNow answers from the page cache.
type File struct {
	f    *os.File
	fd   int
	size int64
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	cond   [lanes]*sync.Cond
	queue  [lanes][]*Op // writes and syncs: bounded by the store, one of each
	closed bool
}

const (
	laneWrite = iota
	laneSync
	laneDiscard
	laneRead
	lanes
)

// workers is how many goroutines serve each lane. One writer keeps the order.
var workers = [lanes]int{laneWrite: 1, laneSync: 1, laneDiscard: 1, laneRead: readers}

var (
	_ Disk      = (*File)(nil)
	_ Immediate = (*File)(nil)
)

// Create makes a sparse file of size bytes, durably, and opens it. An existing
// file is refused (errors.Is os.ErrExist).
func Create(path string, size int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create store file: %w", err)
	}
	if err := errors.Join(f.Truncate(size), f.Sync(), syncDir(filepath.Dir(path))); err != nil {
		return nil, errors.Join(fmt.Errorf("size store file %s: %w", path, err), f.Close(), os.Remove(path))
	}
	return start(f, path)
}

// syncDir makes the names in a directory survive a power loss.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Open opens an existing file or block device. Held by another process or
// opened twice: status.Held.
func Open(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open store file: %w", err)
	}
	return start(f, path)
}

func start(f *os.File, path string) (*File, error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		held := status.Errorf(status.Held, "store %s is open in another process: stop it first", path)
		return nil, errors.Join(held, f.Close())
	}
	size, err := f.Seek(0, io.SeekEnd) // works for block devices too
	if err != nil {
		return nil, errors.Join(fmt.Errorf("size of %s: %w", path, err), f.Close())
	}
	d := &File{f: f, fd: int(f.Fd()), size: size}
	for lane, n := range workers {
		d.cond[lane] = sync.NewCond(&d.mu)
		for range n {
			d.wg.Add(1)
			go d.work(lane)
		}
	}
	return d, nil
}

// Size returns the size in bytes.
func (d *File) Size() int64 { return d.size }

// Close finishes what was submitted and closes the file.
func (d *File) Close() error {
	d.mu.Lock()
	d.closed = true
	for _, c := range d.cond {
		c.Broadcast()
	}
	d.mu.Unlock()
	d.wg.Wait()
	return d.f.Close()
}

// Submit starts op.
func (d *File) Submit(op *Op) {
	if op.Kind != Sync && (op.Off < 0 || op.Off+total(op.Bufs)+op.Len > d.size) {
		op.Done(status.Errorf(status.Invalid, "disk access at %d is beyond the end at %d", op.Off, d.size))
		return
	}
	lane := [...]int{Read: laneRead, Write: laneWrite, Sync: laneSync, Discard: laneDiscard}[op.Kind]
	d.mu.Lock()
	full := lane == laneRead && len(d.queue[lane]) >= maxReads
	if d.closed || full {
		d.mu.Unlock()
		op.Done(status.Errorf(status.Unavailable, "disk is closed or has %d reads waiting", maxReads))
		return
	}
	d.queue[lane] = append(d.queue[lane], op)
	d.cond[lane].Signal()
	d.mu.Unlock()
}

// ReadNow reads if the page cache has all of it.
func (d *File) ReadNow(b []byte, off int64) bool {
	n, err := unix.Preadv2(d.fd, [][]byte{b}, off, unix.RWF_NOWAIT)
	return err == nil && n == len(b)
}

func (d *File) work(lane int) {
	defer d.wg.Done()
	for {
		d.mu.Lock()
		for len(d.queue[lane]) == 0 && !d.closed {
			d.cond[lane].Wait()
		}
		if len(d.queue[lane]) == 0 {
			d.mu.Unlock()
			return
		}
		op := d.queue[lane][0]
		d.queue[lane] = append(d.queue[lane][:0], d.queue[lane][1:]...)
		d.mu.Unlock()
		op.Done(explain(op, d.run(op)))
	}
}

// explain gives a system's error a kind and a place.
func explain(op *Op, err error) error {
	what := [...]string{Read: "read", Write: "write", Sync: "sync", Discard: "discard"}[op.Kind]
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return status.Errorf(status.NoSpace, "%s at %d: the file system under the store is full: %w", what, op.Off, err)
	default:
		return status.Errorf(status.IO, "%s at %d: %w", what, op.Off, err)
	}
}

func (d *File) run(op *Op) error {
	switch op.Kind {
	case Sync:
		for {
			if err := unix.Fdatasync(d.fd); !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	case Discard:
		return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, op.Off, op.Len)
	case Read:
		return d.transfer(op, unix.Preadv)
	default:
		return d.transfer(op, unix.Pwritev)
	}
}

// transfer repeats a vectored call until every byte moved.
func (d *File) transfer(op *Op, call func(int, [][]byte, int64) (int, error)) error {
	bufs, off := append([][]byte(nil), op.Bufs...), op.Off
	for len(bufs) > 0 {
		n, err := call(d.fd, bufs[:min(len(bufs), maxIOVector)], off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		off += int64(n)
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 {
			bufs[0] = bufs[0][n:]
		}
	}
	return nil
}
