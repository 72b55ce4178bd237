package server

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// A TCP connection whose other end cannot be reached is dead before the client
// sends its requests again elsewhere (see Config.Unread): what its old socket
// still delivers when the network comes back finds no connection. Keep-alive covers a connection at rest,
// TCP_USER_TIMEOUT one with replies on the way.
const (
	aliveIdle     = 3 * time.Second
	aliveInterval = time.Second
	aliveCount    = 4
	userTimeout   = aliveIdle + aliveCount*aliveInterval
)

// ListenTCP listens on host:port; a port of 0 lets the kernel choose.
func ListenTCP(addr string) (net.Listener, error) {
	lc := net.ListenConfig{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: aliveIdle, Interval: aliveInterval, Count: aliveCount},
		Control: func(_, _ string, rc syscall.RawConn) error {
			var serr error
			err := rc.Control(func(fd uintptr) { // accepted connections inherit it
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
			})
			return errors.Join(err, serr)
		},
	}
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot listen for NBD clients on %s: %w", addr, err)
	}
	return l, nil
}

const (
	lockPatience = 3 * time.Second
	lockPoll     = 2 * time.Millisecond
)

// maxSocketPath is what fits into a sockaddr_un beside its final zero.
const maxSocketPath = 107

// Socket says where a unix socket is and who may open it.
type Socket struct {
	Path string
	Mode fs.FileMode // permission bits; 0: 0660
	UID  int         // owner; 0: as the process
	GID  int         // group; 0: as the process
}

// ListenUnix listens on a unix socket. A socket file nobody answers on is
// replaced; one that a live server answers on, or a file of another sort, is
// left alone and reported (status.Exists). Closing the listener removes it.
func ListenUnix(s Socket) (net.Listener, error) {
	if len(s.Path) > maxSocketPath {
		return nil, status.Errorf(status.Invalid, "the socket path %q has %d bytes, and a unix socket's may have %d: choose a shorter directory", s.Path, len(s.Path), maxSocketPath)
	}
	if s.Mode == 0 {
		s.Mode = 0o660
	}
	unlock, err := lockDir(filepath.Dir(s.Path))
	if err != nil {
		return nil, err
	}
	l, err := s.listen()
	if uerr := unlock(); uerr != nil && err == nil {
		return nil, errors.Join(uerr, l.Close())
	}
	return l, err
}

func (s Socket) listen() (net.Listener, error) {
	if err := s.clear(); err != nil {
		return nil, err
	}
	// The mode is on the socket before it has a name, so that nobody gets in
	// between bind and chmod.
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var cerr error
		if err := rc.Control(func(fd uintptr) { cerr = unix.Fchmod(int(fd), uint32(s.Mode.Perm())) }); err != nil {
			return err
		}
		return cerr
	}}
	l, err := lc.Listen(context.Background(), "unix", s.Path)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, status.Errorf(status.Exists, "the socket %s is in use: another server has just taken it", s.Path)
	}
	if err != nil {
		return nil, status.Errorf(status.IO, "cannot listen on the socket %s: %w", s.Path, err)
	}
	err = os.Chmod(s.Path, s.Mode.Perm())
	if err == nil && (s.UID > 0 || s.GID > 0) {
		err = os.Lchown(s.Path, orKeep(s.UID), orKeep(s.GID))
	}
	if err != nil {
		return nil, errors.Join(status.Errorf(status.Permission, "cannot set mode and owner of the socket %s: %w", s.Path, err), l.Close())
	}
	return l, nil
}

// orKeep is an id as chown(2) wants it.
func orKeep(id int) int {
	if id <= 0 {
		return -1
	}
	return id
}

// clear removes a stale socket file.
func (s Socket) clear() error {
	fi, err := os.Lstat(s.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return status.Errorf(status.IO, "cannot look at the socket %s: %w", s.Path, err)
	case fi.Mode()&fs.ModeSocket == 0:
		return status.Errorf(status.Exists, "%s is there and is no socket: remove it or choose another path", s.Path)
	}
	c, err := net.Dial("unix", s.Path)
	switch {
	case err == nil:
		return errors.Join(status.Errorf(status.Exists, "the socket %s is in use: a server answers on it; stop that one or choose another path", s.Path), c.Close())
	case !errors.Is(err, syscall.ECONNREFUSED):
		return status.Errorf(status.Exists, "the socket %s is there and cannot be tried: %w", s.Path, err)
	}
	if err := os.Remove(s.Path); err != nil {
		return status.Errorf(status.IO, "cannot remove the stale socket %s: %w", s.Path, err)
	}
	return nil
}

// lockDir keeps others out between the look at a socket file and its
// replacement: two servers that both find it stale must not both take it.
func lockDir(dir string) (unlock func() error, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, status.Errorf(status.NotFound, "cannot open the socket's directory: %w", err)
	}
	// Polled, because whoever holds it may be this process for good.
	for end := time.Now().Add(lockPatience); ; time.Sleep(lockPoll) {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if (!errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR)) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(status.Errorf(status.Unavailable, "the directory %s is locked by another process, so its sockets cannot be looked at: %w", dir, err), d.Close())
	}
	return d.Close, nil // the lock goes with the descriptor
}
