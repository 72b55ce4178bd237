package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/cairnstore/cairn/proto/status"
)

// Config says where to listen.
type Config struct {
	Addr string      // "host:port", or several with commas; port 0 lets the kernel choose
	TLS  *tls.Config // nil: plain
	DSCP int         // class of service of what accepted connections send
	Echo bool        // answer probes on the same ports, over UDP
}

// Listen listens on all of c.Addr; accepted connections are tuned like dialed
// ones. A TLS handshake happens at the first read or write of the connection.
func Listen(c Config) (_ net.Listener, err error) {
	m := &listener{dscp: c.DSCP, accepted: make(chan accepted), closed: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.closeAll())
		}
	}()
	lc := net.ListenConfig{KeepAliveConfig: keepAlive()}
	for _, addr := range SplitAddrs(c.Addr) {
		l, err := lc.Listen(context.Background(), "tcp", addr)
		if err != nil {
			return nil, status.Errorf(status.Unavailable, "cannot listen on %s: %w", addr, err)
		}
		m.tcp = append(m.tcp, l)
		if !c.Echo {
			continue
		}
		e, err := newEcho(l.Addr().(*net.TCPAddr).AddrPort())
		if err != nil {
			return nil, status.Errorf(status.Unavailable, "cannot answer probes on %s: %w", addr, err)
		}
		m.echo = append(m.echo, e)
	}
	for _, e := range m.echo {
		m.wg.Go(e.serve)
	}
	if len(m.tcp) > 1 {
		for _, l := range m.tcp {
			m.wg.Go(func() { m.gather(l) })
		}
	}
	if c.TLS != nil {
		return tls.NewListener(m, c.TLS), nil
	}
	return m, nil
}

// listener is one or more TCP listeners as one.
type listener struct {
	tcp      []net.Listener
	echo     []*echo
	dscp     int
	accepted chan accepted // with more than one
	closed   chan struct{}
	once     sync.Once
	wg       sync.WaitGroup
}

type accepted struct {
	c   net.Conn
	err error
}

// gather hands over what one of several listeners accepts. Errors pass too: who
// accepts decides what they mean.
func (m *listener) gather(l net.Listener) {
	for {
		c, err := l.Accept()
		select {
		case m.accepted <- accepted{c, err}:
		case <-m.closed:
			if c != nil {
				_ = c.Close() // nothing was written
			}
			return
		}
	}
}

func (m *listener) next() (net.Conn, error) {
	if len(m.tcp) == 1 {
		return m.tcp[0].Accept()
	}
	select {
	case a := <-m.accepted:
		return a.c, a.err
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// Accept returns the next connection that could be tuned: one that died before
// is not the listener's failure.
func (m *listener) Accept() (net.Conn, error) {
	for {
		c, err := m.next()
		if err != nil {
			return nil, err
		}
		if tune(c.(*net.TCPConn), m.dscp) == nil { // "tcp" gives no other
			return c, nil
		}
		if err := c.Close(); err != nil {
			return nil, fmt.Errorf("close a connection that could not be tuned: %w", err)
		}
	}
}

// Addr is the first address.
func (m *listener) Addr() net.Addr { return m.tcp[0].Addr() }

// Close ends all of it and waits for the goroutines.
func (m *listener) Close() (err error) {
	m.once.Do(func() {
		close(m.closed)
		err = m.closeAll()
		m.wg.Wait()
	})
	return err
}

func (m *listener) closeAll() error {
	var errs []error
	for _, l := range m.tcp {
		errs = append(errs, l.Close())
	}
	for _, e := range m.echo {
		errs = append(errs, e.conn.Close())
	}
	return errors.Join(errs...)
}

// echo sends probes back as they came. It answers nothing else, and never with
// more than it got.
type echo struct{ conn *net.UDPConn }

func newEcho(at netip.AddrPort) (*echo, error) {
	c, err := probeSocket(at)
	if err != nil {
		return nil, err
	}
	return &echo{c}, nil
}

func (e *echo) serve() {
	b := make([]byte, maxProbe+1)
	for {
		n, from, err := e.conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || !isProbe(b[:n]) {
			continue
		}
		// One that cannot go back whole is lost, which is what the probe is about.
		_, _ = e.conn.WriteToUDPAddrPort(b[:n], from)
	}
}
