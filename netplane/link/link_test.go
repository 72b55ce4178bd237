package link

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

func TestBothEndsAreTunedAndBound(t *testing.T) {
	l, err := Listen(Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Dialer{LocalAddr: netip.MustParseAddr("127.0.0.7")}.Dial(context.Background(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if got := a.RemoteAddr().(*net.TCPAddr).IP.String(); got != "127.0.0.7" {
		t.Fatalf("came from %s", got)
	}
	for _, end := range []net.Conn{c, a} {
		raw, err := end.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			for opt, want := range map[int]int{unix.TCP_USER_TIMEOUT: UserTimeoutMs, unix.TCP_NODELAY: 1, unix.TCP_KEEPIDLE: 1} {
				if got, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, opt); err != nil || got != want {
					t.Errorf("option %d is %d (%v), want %d", opt, got, err, want)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNobodyListening(t *testing.T) {
	l, err := Listen(Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := (Dialer{}).Dial(context.Background(), l.Addr().String()); !errors.Is(err, status.Unavailable) {
		t.Fatalf("got %v", err)
	}
}
