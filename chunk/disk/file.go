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
	readers     = 16
	maxIOVector = 1024     // IOV_MAX of Linux
	largeBytes  = 64 << 10 // an operation that is worth a goroutine's waking up
)

// Bounds of the operations that wait for a worker; more are answered
// Unavailable. A store has few writes and one sync in flight; discards and
// allocations are one per segment at most, of which 16 TiB have 262,144.
var maxQueued = [lanes]int{laneWrite: 4096, laneSync: 4096, laneSpace: 1 << 19, laneRead: 4096}

// File is a Disk in a regular file or a block device. No kind of operation
// waits for another: a disk that hangs in one of them is a completion that does
// not come. ReadNow answers from the page cache.
//
// Each kind has a lane, each crew of goroutines one lane or two. Something small
// that is submitted while a member of its crew is in a Done waits for that one to
// be back: the sync behind a write wakes nobody up.
type File struct {
	k      kernel
	f      *os.File // through the page cache
	direct *os.File // around it; nil: the file system has no such way
	fd     int      // of f
	size   int64
	device bool
	wg     sync.WaitGroup

	mu     sync.Mutex // guards the fields below, and the crews
	keep   bool       // see Reserve
	crews  [crews]crew
	queue  [lanes]fifo
	busy   [lanes]int // operations under way
	closed bool
}

const (
	laneSync = iota // somebody waits for it
	laneWrite
	laneSpace
	laneRead
	lanes
)

var laneOf = [kinds]int{Read: laneRead, Write: laneWrite, Sync: laneSync, Discard: laneSpace, Allocate: laneSpace}

// width is how many operations of a lane are under way at most. One write at a
// time keeps the order.
var width = [lanes]int{laneWrite: 1, laneSync: 1, laneSpace: 1, laneRead: readers}

const (
	crewLog = iota
	crewSpace
	crewRead
	crews
)

var crewOf = [lanes]int{laneWrite: crewLog, laneSync: crewLog, laneSpace: crewSpace, laneRead: crewRead}

// crew is one goroutine more than its lanes are wide: there is one for every
// operation that may begin, while another is in a Done.
type crew struct {
	idle *sync.Cond
	done int // members in a Done: each looks for work once it is back
}

var (
	_ Disk      = (*File)(nil)
	_ Immediate = (*File)(nil)
)

// fifo is a queue of operations; taking one is O(1) on average.
type fifo struct {
	ops  []*Op
	next int
}

func (q *fifo) len() int { return len(q.ops) - q.next }

func (q *fifo) take() *Op {
	op := q.ops[q.next]
	q.ops[q.next] = nil
	if q.next++; q.next*2 >= len(q.ops) {
		q.ops, q.next = q.ops[:copy(q.ops, q.ops[q.next:])], 0
	}
	return op
}

// Create makes a sparse file of size bytes, durably, and opens it. An existing
// file is refused (errors.Is os.ErrExist).
func Create(path string, size int64) (*File, error) { return create(linux{}, path, size) }

func create(k kernel, path string, size int64) (*File, error) {
	f, err := k.open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create store file: %w", err)
	}
	err = k.truncate(f, size)
	if err == nil {
		err = k.fsync(f)
	}
	if err == nil {
		err = syncDir(k, filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("size store file %s: %w", path, err), k.close(f), k.remove(path))
	}
	d, err := start(k, f, path, os.O_RDWR)
	if err != nil {
		return nil, errors.Join(err, k.remove(path))
	}
	return d, nil
}

// syncDir makes the names in a directory survive a power loss.
func syncDir(k kernel, path string) error {
	d, err := k.open(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	return errors.Join(k.fsync(d), k.close(d))
}

// Open opens an existing file or block device. Held by another process, opened
// twice, or a device that is mounted: status.Held.
func Open(path string) (*File, error) { return open(linux{}, path) }

// OpenReadOnly opens an existing file or device for reading: writes fail. It is
// locked like any other, so that nobody changes it meanwhile.
func OpenReadOnly(path string) (*File, error) { return openAs(linux{}, path, os.O_RDONLY) }

func open(k kernel, path string) (*File, error) { return openAs(k, path, os.O_RDWR) }

func openAs(k kernel, path string, mode int) (*File, error) {
	f, err := k.open(path, mode)
	if err != nil {
		return nil, fmt.Errorf("open store file: %w", err)
	}
	return start(k, f, path, mode)
}

// start takes f over, also when it fails.
func start(k kernel, f *os.File, path string, mode int) (_ *File, err error) {
	d := &File{k: k, f: f, fd: int(f.Fd())}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.closeFiles())
		}
	}()
	if err := k.lock(f); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, status.Errorf(status.Held, "store %s is open in another process: stop it first", path)
	} else if err != nil {
		return nil, fmt.Errorf("lock store file %s: %w", path, err)
	}
	if d.size, d.device, err = k.size(f); err != nil {
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	// /proc names the same open file, whatever has happened to its path. On a
	// device O_EXCL keeps the kernel from mounting it, and us from a mounted one.
	flags := mode | unix.O_DIRECT
	if d.device {
		flags |= os.O_EXCL
	}
	d.direct, err = k.open(fmt.Sprintf("/proc/self/fd/%d", d.fd), flags)
	switch {
	case err == nil:
	case errors.Is(err, unix.EBUSY):
		return nil, status.Errorf(status.Held, "device %s is in use, mounted perhaps: unmount it first", path)
	case errors.Is(err, unix.EINVAL) && !d.device:
		d.direct = nil // a file system in memory
	default:
		return nil, fmt.Errorf("open %s around the page cache: %w", path, err)
	}
	members := [crews]int{1, 1, 1}
	for lane, n := range width {
		members[crewOf[lane]] += n
	}
	for c, n := range members {
		d.crews[c].idle = sync.NewCond(&d.mu)
		for range n {
			d.wg.Add(1)
			go d.work(c)
		}
	}
	return d, nil
}

// Size returns the size in bytes.
func (d *File) Size() int64 { return d.size }

// Device reports whether this is a block device.
func (d *File) Device() bool { return d.device }

// HasDirect reports whether there is a way around the page cache.
func (d *File) HasDirect() bool { return d.direct != nil }

// Reserve allocates the whole size now and gives nothing back from here on
// (Discard is answered EOPNOTSUPP): nobody else who fills the file system can
// stop this store. NoSpace when there is less room. A device is its own.
func (d *File) Reserve() error {
	if d.device {
		return nil
	}
	if err := d.k.allocate(d.fd, 0, d.size); errors.Is(err, unix.ENOSPC) {
		return status.Errorf(status.NoSpace, "the file system has no room for a store of %d bytes: make the store smaller, or thin", d.size)
	} else if err != nil {
		return status.Errorf(status.IO, "reserve %d bytes for the store: %w", d.size, err)
	}
	if err := d.k.fsync(d.f); err != nil {
		return status.Errorf(status.IO, "sync the reserved store file: %w", err)
	}
	d.mu.Lock()
	d.keep = true
	d.mu.Unlock()
	return nil
}

// Extend makes the file longer, durably, with its new part reserved or not;
// for a device the system has done it. Nothing may be in flight. NoSpace when
// there is less room than is to be reserved: the file is then as it was.
func (d *File) Extend(size int64, reserve bool) error {
	if d.device || size < d.size {
		return status.Errorf(status.Invalid, "the store's file has %d bytes and cannot be extended to %d", d.size, size)
	}
	if reserve {
		err := d.k.allocate(d.fd, d.size, size-d.size)
		if err != nil { // what it got before it failed lies behind the file's end
			err = errors.Join(err, d.k.truncate(d.f, d.size))
		}
		if errors.Is(err, unix.ENOSPC) {
			return status.Errorf(status.NoSpace, "the file system has no room for %d bytes more: make room there, or add a store", size-d.size)
		} else if err != nil {
			return status.Errorf(status.IO, "reserve %d bytes for the store: %w", size-d.size, err)
		}
	}
	if err := d.k.truncate(d.f, size); err != nil {
		return status.Errorf(status.IO, "extend the store file to %d bytes: %w", size, err)
	}
	if err := d.k.fsync(d.f); err != nil {
		return status.Errorf(status.IO, "sync the extended store file: %w", err)
	}
	d.size = size
	return nil
}

// Close finishes what was submitted and closes the file.
func (d *File) Close() error {
	d.mu.Lock()
	d.closed = true
	for c := range d.crews {
		d.crews[c].idle.Broadcast()
	}
	d.mu.Unlock()
	d.wg.Wait()
	return d.closeFiles()
}

func (d *File) closeFiles() error {
	err := d.k.close(d.f)
	if d.direct != nil {
		err = errors.Join(err, d.k.close(d.direct))
	}
	return err
}

// Submit starts op.
func (d *File) Submit(op *Op) {
	if err := op.inside(d.size); err != nil {
		op.Done(err)
		return
	}
	lane := laneOf[op.Kind]
	d.mu.Lock()
	q := &d.queue[lane]
	if d.closed || q.len() >= maxQueued[lane] {
		d.mu.Unlock()
		op.Done(status.Errorf(status.Unavailable, "the disk is closed or has %d operations of this kind waiting", maxQueued[lane]))
		return
	}
	q.ops = append(q.ops, op)
	if c := &d.crews[crewOf[lane]]; d.busy[lane] < width[lane] && (c.done == 0 || total(op.Bufs) >= largeBytes) {
		c.idle.Signal()
	}
	d.mu.Unlock()
}

// ready returns a lane of a crew that has something to begin with.
func (d *File) ready(crew int) (lane int, ok bool) {
	for lane := range d.queue {
		if crewOf[lane] == crew && d.queue[lane].len() > 0 && d.busy[lane] < width[lane] {
			return lane, true
		}
	}
	return 0, false
}

// ReadNow reads if the page cache has all of it.
func (d *File) ReadNow(b []byte, off int64) bool {
	n, err := unix.Preadv2(d.fd, [][]byte{b}, off, unix.RWF_NOWAIT)
	return err == nil && n == len(b)
}

// work is a member of a crew.
func (d *File) work(crew int) {
	defer d.wg.Done()
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		lane, ok := d.ready(crew)
		if !ok && d.closed {
			return
		}
		if !ok {
			d.crews[crew].idle.Wait()
			continue
		}
		op, keep := d.queue[lane].take(), d.keep
		d.busy[lane]++
		if _, more := d.ready(crew); more {
			d.crews[crew].idle.Signal()
		}
		d.mu.Unlock()
		err := explain(op, d.run(op, keep))
		d.mu.Lock()
		d.busy[lane]--
		d.crews[crew].done++
		d.mu.Unlock()
		op.Done(err)
		d.mu.Lock()
		d.crews[crew].done--
	}
}

// explain gives a system's error a kind and a place.
func explain(op *Op, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return status.Errorf(status.NoSpace, "%s at %d: the file system under the store is full: %w", op.Kind, op.Off, err)
	default:
		return status.Errorf(status.IO, "%s at %d: %w", op.Kind, op.Off, err)
	}
}

func (d *File) run(op *Op, keep bool) error {
	switch op.Kind {
	case Sync:
		return d.k.fdatasync(d.fd)
	case Discard:
		if keep {
			return unix.EOPNOTSUPP
		}
		if d.device {
			return d.k.blkdiscard(d.fd, op.Off, op.Len)
		}
		return d.k.punch(d.fd, op.Off, op.Len)
	case Allocate:
		if keep || d.device {
			return nil
		}
		if err := d.k.allocate(d.fd, op.Off, op.Len); !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		return nil // such a file system has no better promise to give
	case Read:
		return d.transfer(op, d.k.read)
	default:
		return d.transfer(op, d.k.write)
	}
}

// transfer repeats a vectored call until every byte moved.
func (d *File) transfer(op *Op, call func(int, [][]byte, int64) (int, error)) error {
	fd := d.fd
	if op.Direct && d.direct != nil && op.aligned() {
		fd = int(d.direct.Fd())
	}
	bufs, off, own := op.Bufs, op.Off, false
	for len(bufs) > 0 {
		n, err := call(fd, bufs[:min(len(bufs), maxIOVector)], off)
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
			if !own {
				bufs, own = append([][]byte(nil), bufs...), true // op.Bufs stay as they are
			}
			bufs[0] = bufs[0][n:]
			fd = d.fd // the rest may begin anywhere
		}
	}
	return nil
}
