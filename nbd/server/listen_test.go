package server_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

func TestListenUnixModeAndOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := server.Socket{Path: path, Mode: 0o666}
	if os.Getuid() == 0 {
		s.UID, s.GID = 12345, 23456
	}
	l, err := server.ListenUnix(s)
	must(t, err)
	fi, err := os.Stat(path)
	must(t, err)
	st := fi.Sys().(*syscall.Stat_t)
	if fi.Mode().Perm() != 0o666 || (s.UID != 0 && (st.Uid != 12345 || st.Gid != 23456)) {
		t.Errorf("mode %v, owner %d:%d", fi.Mode(), st.Uid, st.Gid)
	}
	must(t, l.Close())
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket file stays: %v", err)
	}
	l, err = server.ListenUnix(server.Socket{Path: path})
	must(t, err)
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("default mode: %v, %v", fi.Mode(), err)
	}
	must(t, l.Close())
}

func TestListenUnixOccupied(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	live, err := server.ListenUnix(server.Socket{Path: path})
	must(t, err)
	_, err = server.ListenUnix(server.Socket{Path: path})
	wantKind(t, err, status.Exists)
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("the error is %v", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live server is gone: %v", err)
	} else {
		must(t, c.Close())
	}
	live.(*net.UnixListener).SetUnlinkOnClose(false) // as after kill -9
	must(t, live.Close())
	again, err := server.ListenUnix(server.Socket{Path: path})
	must(t, err)
	must(t, again.Close())

	must(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err = server.ListenUnix(server.Socket{Path: path})
	wantKind(t, err, status.Exists)
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file was touched: %q %v", b, err)
	}
}

func TestListenUnixBadPaths(t *testing.T) {
	dir := t.TempDir()
	longest := filepath.Join(dir, strings.Repeat("x", 106-len(dir)))
	l, err := server.ListenUnix(server.Socket{Path: longest})
	must(t, err)
	must(t, l.Close())
	_, err = server.ListenUnix(server.Socket{Path: longest + "y"})
	wantKind(t, err, status.Invalid)
	_, err = server.ListenUnix(server.Socket{Path: filepath.Join(dir, "no", "s")})
	wantKind(t, err, status.NotFound)
}

// TestListenUnixOnlyOneWins: of many that find a stale socket at once, one
// gets it, and keeps it.
func TestListenUnixOnlyOneWins(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "s")
		dead, err := server.ListenUnix(server.Socket{Path: path})
		must(t, err)
		dead.(*net.UnixListener).SetUnlinkOnClose(false)
		must(t, dead.Close())
		won := make(chan net.Listener, 8)
		for range cap(won) {
			go func() {
				l, err := server.ListenUnix(server.Socket{Path: path})
				if err != nil {
					wantKind(t, err, status.Exists)
					l = nil
				}
				won <- l
			}()
		}
		var winner net.Listener
		for range cap(won) {
			if l := <-won; l != nil {
				if winner != nil {
					t.Fatal("two have it")
				}
				winner = l
			}
		}
		c, err := net.Dial("unix", path)
		must(t, err)
		must(t, c.Close())
		must(t, winner.Close())
	}
}

// TestListenTCPFindsDeadPeers: a peer out of reach is given up before the
// client sends its requests again elsewhere.
func TestListenTCPFindsDeadPeers(t *testing.T) {
	l, err := server.ListenTCP("127.0.0.1:0")
	must(t, err)
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	a, err := l.Accept()
	must(t, err)
	raw, err := a.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		get := func(level, opt int) int {
			v, err := unix.GetsockoptInt(int(fd), level, opt)
			must(t, err)
			return v
		}
		idle, interval, count := get(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE), get(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL), get(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
		if on := get(unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 || idle+interval*count >= 10 {
			t.Errorf("keep-alive %d: dead after %d + %d × %d s", on, idle, count, interval)
		}
		if ms := get(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); ms <= 0 || ms >= 10000 {
			t.Errorf("TCP_USER_TIMEOUT is %d ms", ms)
		}
	}))
	must(t, c.Close())
	must(t, a.Close())
	must(t, l.Close())
	_, err = server.ListenTCP("256.0.0.1:0")
	wantKind(t, err, status.Unavailable)
}
