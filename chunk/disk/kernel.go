package disk

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel is every call to the operating system that a File makes and that can
// fail. Tests put one that fails in its place, call by call.
type kernel interface {
	open(path string, flags int) (*os.File, error)
	lock(f *os.File) error
	size(f *os.File) (bytes int64, device bool, err error)
	truncate(f *os.File, bytes int64) error
	fsync(f *os.File) error
	remove(path string) error
	close(f *os.File) error
	read(fd int, bufs [][]byte, off int64) (int, error)
	write(fd int, bufs [][]byte, off int64) (int, error)
	fdatasync(fd int) error
	allocate(fd int, off, n int64) error
	punch(fd int, off, n int64) error
	blkdiscard(fd int, off, n int64) error
}

// linux is the real one.
type linux struct{}

var _ kernel = linux{}

func (linux) open(path string, flags int) (*os.File, error) { return os.OpenFile(path, flags, 0o600) }

func (linux) lock(f *os.File) error {
	return again(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
}

// size asks a block device itself: a file's length means nothing there.
func (linux) size(f *os.File) (int64, bool, error) {
	st, err := f.Stat()
	if err != nil || st.Mode().IsRegular() {
		if err != nil {
			return 0, false, err
		}
		return st.Size(), false, nil
	}
	if st.Mode()&os.ModeDevice == 0 || st.Mode()&os.ModeCharDevice != 0 {
		return 0, false, errors.New("it is neither a file nor a block device")
	}
	var n uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, true, e
	}
	return int64(n), true, nil
}

func (linux) truncate(f *os.File, n int64) error { return f.Truncate(n) }
func (linux) fsync(f *os.File) error             { return f.Sync() }
func (linux) remove(path string) error           { return os.Remove(path) }
func (linux) close(f *os.File) error             { return f.Close() }

func (linux) read(fd int, bufs [][]byte, off int64) (int, error) {
	return unix.Preadv(fd, bufs, off)
}

func (linux) write(fd int, bufs [][]byte, off int64) (int, error) {
	return unix.Pwritev(fd, bufs, off)
}

func (linux) fdatasync(fd int) error { return again(func() error { return unix.Fdatasync(fd) }) }

func (linux) allocate(fd int, off, n int64) error {
	return again(func() error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
}

func (linux) punch(fd int, off, n int64) error {
	return again(func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n) })
}

func (linux) blkdiscard(fd int, off, n int64) error {
	return again(func() error {
		r := [2]uint64{uint64(off), uint64(n)}
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r))); e != 0 {
			return e
		}
		return nil
	})
}

// again repeats a call that a signal interrupted.
func again(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
