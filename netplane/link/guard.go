package link

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// The guard looks at every dialed connection and ends those whose path has
// stopped working. It asks the kernel what the peer's kernel acknowledged: a
// peer whose process hangs still acknowledges, a path that lost its way does
// not. A connection that is ended is dialed again by its owner, over another
// path; that costs milliseconds, waiting for routing may cost seconds.
//
// It counts its own looks, not the clock: a process that was suspended does not
// blame its paths.
const (
	lookEvery = 50 * time.Millisecond
	// stillLooks without progress end a connection: 500 ms, more than one lost
	// packet with its retransmission takes (200 ms), and half of what a volume
	// lets a replica stand still.
	stillLooks = 10
	// doubtLooks do when the probes say that this path is silent and another
	// of the same peer is not.
	doubtLooks = 4
	// While acknowledgements come, though none says anything new (big packets are
	// lost and small ones are not), the probes' word does not count.
	freshAckMs = 300
)

// Conn is a dialed TCP connection under guard.
type Conn struct {
	*net.TCPConn
	raw  syscall.RawConn
	way  candidate
	why  atomic.Pointer[error] // of the guard, when it ended the connection
	gone sync.Once

	// Of the guard's goroutine.
	acked uint64
	still int
}

var guardian = guard{conns: map[*Conn]struct{}{}}

// guard is the process's one.
type guard struct {
	mu      sync.Mutex // guards the fields below
	conns   map[*Conn]struct{}
	running bool
}

func guarded(tc *net.TCPConn, way candidate) (*Conn, error) {
	raw, err := tc.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reach the socket: %w", err)
	}
	c := &Conn{TCPConn: tc, raw: raw, way: way}
	if way.path != nil {
		way.path.conns.Add(1)
	}
	g := &guardian
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[c] = struct{}{}
	if !g.running {
		g.running = true
		go g.run()
	}
	return c, nil
}

// run looks until there is nothing to look at.
func (g *guard) run() {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	var all []*Conn
	for range t.C {
		all = all[:0]
		g.mu.Lock()
		for c := range g.conns {
			all = append(all, c)
		}
		g.running = len(all) > 0
		g.mu.Unlock()
		if len(all) == 0 {
			return
		}
		for _, c := range all {
			if err := c.look(); err != nil {
				c.giveUp(err)
			}
		}
		clear(all)
	}
}

// look says why the connection is to be given up, or nil.
func (c *Conn) look() error {
	var info *unix.TCPInfo
	if err := control(c.raw, func(fd int) (err error) {
		info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err
	}); err != nil {
		return nil // closed meanwhile
	}
	// Bytes that wait although the peer would take them: this host's own kernel
	// has no way for them. With a closed window it is the peer's process that
	// takes nothing, which is no matter of paths.
	waits := info.Unacked > 0 || info.Notsent_bytes > 0 && info.Snd_wnd > info.Snd_mss
	if !waits || info.Bytes_acked != c.acked {
		c.acked, c.still = info.Bytes_acked, 0
		return nil
	}
	c.still++
	limit := stillLooks
	if info.Last_ack_recv >= freshAckMs && c.way.path.doubtful() {
		limit = doubtLooks
	}
	if c.still < limit {
		return nil
	}
	c.way.path.failed()
	return status.Errorf(status.Timeout, "path to %v: nothing was acknowledged for %v", c.RemoteAddr(), time.Duration(c.still)*lookEvery)
}

// giveUp ends the connection: its reader and writer get err.
func (c *Conn) giveUp(err error) {
	c.why.CompareAndSwap(nil, &err)
	c.abort()
}

// abort closes without trying to deliver what was not.
func (c *Conn) abort() {
	_ = c.SetLinger(0) // on a socket that is closed already it fails, and need not matter
	_ = c.Close()
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.gone.Do(func() {
		guardian.mu.Lock()
		delete(guardian.conns, c)
		guardian.mu.Unlock()
		if c.way.path != nil {
			c.way.path.conns.Add(-1)
		}
	})
	if err := c.TCPConn.Close(); err != nil && c.why.Load() == nil {
		return err
	}
	return nil // the guard has closed it before
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	return n, c.cause(err)
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	return n, c.cause(err)
}

// cause puts the guard's reason in the place of "closed".
func (c *Conn) cause(err error) error {
	if err != nil {
		if why := c.why.Load(); why != nil {
			return *why
		}
	}
	return err
}
