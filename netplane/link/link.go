// Package link opens TCP connections between storage addresses, over whichever
// path works, and ends those whose path has stopped working.
//
// Duty: dial and listen, socket options, optional TLS; the choice among several
// addresses of one peer, the probes that tell which of them work, how fast and
// with which packet size (paths.go), and the guard that closes a connection
// whose bytes are no longer acknowledged (guard.go). Floor: F1. It does not
// frame, nor dial again: who owns a connection does that when it ends, and
// finds another path.
//
// An address is "host:port", or several of one peer with commas between: first
// the stable one that routing reaches over any spine, then one per plane.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// UserTimeoutMs is how long sent bytes may stay unacknowledged before the
// kernel gives the connection up (TCP_USER_TIMEOUT).
const UserTimeoutMs = 1200

// DefaultTimeout bounds a dial, TLS handshake included.
const DefaultTimeout = 2 * time.Second

// stagger is the wait before the next way is tried beside those under way; one
// more try of the same address takes another way where routing has several.
const stagger = 40 * time.Millisecond

// maxTries bounds the connections one dial has under way.
const maxTries = 12

// Dialer opens connections. The zero value dials plain TCP from any address.
type Dialer struct {
	LocalAddr netip.Addr    // source address; the zero value lets the kernel, or Paths, choose
	TLS       *tls.Config   // nil: plain
	Timeout   time.Duration // whole dial; 0: DefaultTimeout
	DSCP      int           // class of service, 0 to 63
	Paths     *Paths        // what is known of paths; nil: nothing
	Prefer    uint64        // dialers with different numbers prefer different ones of equal paths
}

// candidate is one way to a peer.
type candidate struct {
	addr  string
	local netip.Addr
	mss   int   // 0: the kernel's
	path  *path // nil: not probed
}

// SplitAddrs returns the addresses of one peer.
func SplitAddrs(list string) []string {
	out := strings.Split(list, ",")
	for i := range out {
		out[i] = strings.TrimSpace(out[i])
	}
	return out
}

// CheckAddrs refuses a list that is not one to eight different "host:port".
// Errors are Invalid.
func CheckAddrs(list string) error {
	seen := map[string]bool{}
	for _, a := range SplitAddrs(list) {
		host, port, err := net.SplitHostPort(a)
		if err != nil || host == "" || port == "" {
			return status.Errorf(status.Invalid, "%q is not host:port", a)
		}
		if seen[a] {
			return status.Errorf(status.Invalid, "%s is listed twice", a)
		}
		seen[a] = true
	}
	if len(seen) > maxAddrs {
		return status.Errorf(status.Invalid, "%d addresses are too many: a host has at most %d", len(seen), maxAddrs)
	}
	return nil
}

// maxAddrs bounds the addresses of one peer.
const maxAddrs = 8

// Dial connects to one of addr's addresses: the best by what is known, the next
// ones beside it when it does not answer soon. Its errors are
// status.Unavailable.
func (d Dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := d.race(ctx, d.candidates(addr))
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot connect to %s: %w", addr, err)
	}
	if d.TLS == nil {
		return c, nil
	}
	conf := d.TLS
	if conf.ServerName == "" && !conf.InsecureSkipVerify {
		host, _, err := net.SplitHostPort(SplitAddrs(addr)[0])
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

func (d Dialer) candidates(addr string) []candidate {
	if d.Paths != nil {
		return d.Paths.order(addr, d.Prefer)
	}
	var out []candidate
	for _, a := range SplitAddrs(addr) {
		out = append(out, candidate{addr: a, local: d.LocalAddr})
	}
	return out
}

type attempt struct {
	way int
	c   *Conn
	err error
}

// race dials the ways one after the other, each a moment after the last, and
// again those that have not answered, until one answers or all have failed.
func (d Dialer) race(ctx context.Context, ways []candidate) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan attempt)
	running, failed, errs := 0, make([]bool, len(ways)), []error(nil)
	try := func(i int) {
		running++
		go func() {
			c, err := d.one(ctx, ways[i])
			results <- attempt{i, c, err}
		}()
	}
	// What is still under way when this returns ends by itself, unused.
	defer func() {
		cancel()
		go func() {
			for range running {
				if late := <-results; late.c != nil {
					late.c.abort()
				}
			}
		}()
	}()
	next, tries := 0, 0
	t := time.NewTicker(stagger)
	defer t.Stop()
	start := func() {
		for range ways {
			i := next % len(ways)
			next++
			if !failed[i] {
				tries++
				try(i)
				return
			}
		}
	}
	start()
	for {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				return r.c, nil
			}
			errs = append(errs, r.err)
			failed[r.way] = true
			if next < len(ways) {
				start()
			} else if running == 0 {
				return nil, errors.Join(errs...)
			}
		case <-t.C:
			if tries < maxTries {
				start()
			}
		case <-ctx.Done():
			return nil, errors.Join(append(errs, errors.New("no answer"))...)
		}
	}
}

// one dials one way.
func (d Dialer) one(ctx context.Context, w candidate) (*Conn, error) {
	nd := net.Dialer{KeepAliveConfig: keepAlive(), Control: func(_, _ string, raw syscall.RawConn) error {
		return control(raw, func(fd int) error {
			if w.mss > 0 {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, w.mss); err != nil {
					return fmt.Errorf("set TCP_MAXSEG: %w", err)
				}
			}
			return setDSCP(fd, d.DSCP)
		})
	}}
	if w.local.IsValid() {
		nd.LocalAddr = &net.TCPAddr{IP: w.local.AsSlice(), Zone: w.local.Zone()}
	}
	nc, err := nd.DialContext(ctx, "tcp", w.addr)
	if err != nil {
		return nil, err
	}
	tc := nc.(*net.TCPConn) // what "tcp" gives
	if err := tune(tc, 0); err != nil {
		return nil, closeAfter(nc, err)
	}
	c, err := guarded(tc, w)
	if err != nil {
		return nil, closeAfter(nc, err)
	}
	return c, nil
}

func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 1}
}

func tune(tc *net.TCPConn, dscp int) error {
	if err := tc.SetNoDelay(true); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return fmt.Errorf("reach the socket: %w", err)
	}
	return control(raw, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, UserTimeoutMs); err != nil {
			return fmt.Errorf("set TCP_USER_TIMEOUT: %w", err)
		}
		return setDSCP(fd, dscp)
	})
}

// setDSCP marks what the socket sends; the class stands in the upper six bits.
func setDSCP(fd, dscp int) error {
	if dscp == 0 {
		return nil
	}
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("read SO_DOMAIN: %w", err)
	}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, dscp<<2)
	} else {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TOS, dscp<<2)
	}
	if err != nil {
		return fmt.Errorf("set the class of service: %w", err)
	}
	return nil
}

// control runs f on a socket's descriptor.
func control(raw syscall.RawConn, f func(fd int) error) error {
	var err error
	if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return fmt.Errorf("reach the socket: %w", cerr)
	}
	return err
}

// closeAfter closes c because of err and reports both.
func closeAfter(c net.Conn, err error) error {
	if cerr := c.Close(); cerr != nil {
		return fmt.Errorf("%w (and closing it: %v)", err, cerr)
	}
	return err
}
