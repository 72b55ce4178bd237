// Package link opens TCP connections between storage addresses, tuned so that
// a dead peer is noticed and a small frame is never held back.
//
// Duty: dial and listen, socket options, optional TLS. Floor: F1. It does not
// frame, ping or re-dial (chunk/client does): the kernel counts keepalive in
// whole seconds, so an idle peer that goes silent is noticed by keepalive in
// about 2 s, and faster only by the application's own pings.
package link

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// UserTimeoutMs is how long sent bytes may stay unacknowledged before the
// kernel gives the connection up (TCP_USER_TIMEOUT).
const UserTimeoutMs = 1200

// DefaultTimeout bounds a dial, TLS handshake included.
const DefaultTimeout = 2 * time.Second

// Dialer opens connections. The zero value dials plain TCP from any address.
type Dialer struct {
	LocalAddr netip.Addr    // source address; the zero value lets the kernel choose
	TLS       *tls.Config   // nil: plain
	Timeout   time.Duration // whole dial; 0: DefaultTimeout
}

// Dial connects to addr ("host:port"). Its errors are status.Unavailable.
func (d Dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	nd := net.Dialer{KeepAliveConfig: keepAlive()}
	if d.LocalAddr.IsValid() {
		nd.LocalAddr = &net.TCPAddr{IP: d.LocalAddr.AsSlice(), Zone: d.LocalAddr.Zone()}
	}
	c, err := nd.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot connect to %s: %w", addr, err)
	}
	if err := tune(c); err != nil {
		return nil, closeAfter(c, err)
	}
	if d.TLS == nil {
		return c, nil
	}
	conf := d.TLS
	if conf.ServerName == "" && !conf.InsecureSkipVerify {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, closeAfter(c, status.Errorf(status.Invalid, "address %q is not host:port: %w", addr, err))
		}
		conf = conf.Clone()
		conf.ServerName = host
	}
	tc := tls.Client(c, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, closeAfter(c, status.Errorf(status.Unavailable, "TLS with %s failed: %w", addr, err))
	}
	return tc, nil
}

// Config says where to listen.
type Config struct {
	Addr string      // "host:port"; port 0 lets the kernel choose
	TLS  *tls.Config // nil: plain
}

// Listen listens on c.Addr; accepted connections are tuned like dialed ones.
// A TLS handshake happens at the first read or write of the connection.
func Listen(c Config) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive()}
	l, err := lc.Listen(context.Background(), "tcp", c.Addr)
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot listen on %s: %w", c.Addr, err)
	}
	l = &listener{l}
	if c.TLS != nil {
		l = tls.NewListener(l, c.TLS)
	}
	return l, nil
}

type listener struct{ net.Listener }

// Accept returns the next connection that could be tuned: one that died before
// is not the listener's failure.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if tune(c) == nil {
			return c, nil
		}
		if err := c.Close(); err != nil {
			return nil, fmt.Errorf("close a connection that could not be tuned: %w", err)
		}
	}
}

func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 1}
}

func tune(c net.Conn) error {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return status.Errorf(status.Internal, "a %T is no TCP connection", c)
	}
	if err := tc.SetNoDelay(true); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return fmt.Errorf("reach the socket: %w", err)
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, UserTimeoutMs)
	}); err != nil {
		return fmt.Errorf("reach the socket: %w", err)
	}
	if serr != nil {
		return fmt.Errorf("set TCP_USER_TIMEOUT: %w", serr)
	}
	return nil
}

// closeAfter closes c because of err and reports both.
func closeAfter(c net.Conn, err error) error {
	if cerr := c.Close(); cerr != nil {
		return fmt.Errorf("%w (and closing it: %v)", err, cerr)
	}
	return err
}
