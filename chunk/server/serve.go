package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/chunk/stream"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// conn is one connection. Its reader is the goroutine of run; replies come from
// any.
type conn struct {
	s   *Server
	nc  net.Conn
	out *stream.Outbox
	in  *stream.Reader

	batch  []*wire.Request // the reader's: gathered for store, not submitted
	now    time.Duration   // the reader's: since the server's start, when the frames at hand were read
	store  Store           // of batch
	closer sync.Once

	mu    sync.Mutex // guards the fields below; taken before the outbox's own
	freed *sync.Cond // used fell, or why was set
	why   error      // it is over; nil while alive
	slots []slot     // requests outstanding; a request's ID inside is (tag, slot)
	free  []uint32
	used  int // sum of cost ≤ WindowBytes, or one request alone
}

// maxGreeting bounds the first frame, in bytes: a Hello and its longest name.
const maxGreeting = 2 << 10

// slot is one outstanding request.
type slot struct {
	id   uint64        // the client's
	cost int           // > 0 ⇔ outstanding
	at   time.Duration // it was admitted, since the server's start
	tag  uint32        // tells this use of the slot from earlier ones
}

var _ wire.Sink = (*conn)(nil)

func newConn(s *Server, nc net.Conn) (*conn, error) {
	out, err := stream.NewOutbox(nc)
	if err != nil {
		return nil, err
	}
	c := &conn{s: s, nc: nc, out: out, in: stream.NewReader(nc)}
	c.freed = sync.NewCond(&c.mu)
	return c, nil
}

// run serves the connection to its end.
func (c *conn) run() {
	err := c.greet()
	if err == nil {
		err = c.serve()
	}
	c.fail(err)
	c.mu.Lock()
	why := c.why
	c.mu.Unlock()
	c.out.Stop(why)
	switch {
	case errors.Is(why, io.EOF), errors.Is(why, errClosing):
	case errors.Is(why, syscall.ECONNRESET), errors.Is(why, syscall.EPIPE):
		c.s.log.Info("connection broken", "from", c.nc.RemoteAddr(), "why", why)
	default:
		c.s.log.Warn("connection closed", "from", c.nc.RemoteAddr(), "why", why)
	}
}

// greet takes the Hello, which must be first, and answers it.
func (c *conn) greet() error {
	if err := c.nc.SetDeadline(time.Now().Add(c.s.cfg.Handshake)); err != nil {
		return fmt.Errorf("set the deadline of the greeting: %w", err)
	}
	c.in.Limit(maxGreeting)
	f, err := c.frame()
	c.in.Limit(stream.MaxFrame)
	if err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	q, err := f.Request()
	if err == nil {
		err = c.judge(q)
	}
	if q == nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	r := &wire.Reply{Kind: wire.Hello, ID: q.ID, Status: status.Of(err), Version: wire.Version, Count64: uint64(c.s.cfg.WindowBytes)}
	if err != nil {
		r.Detail = err.Error()
	}
	c.out.Replies(r)
	c.out.Flush()
	if derr := c.out.Drained(0); derr != nil {
		return errors.Join(err, fmt.Errorf("answer the greeting: %w", derr))
	}
	if err != nil {
		return err
	}
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("lift the deadline of the greeting: %w", err)
	}
	return nil
}

// frame waits for one frame.
func (c *conn) frame() (stream.Frame, error) {
	for {
		f, ok, err := c.in.Next()
		if err != nil || ok {
			return f, err
		}
		if err := c.in.Fill(); err != nil {
			return stream.Frame{}, err
		}
	}
}

// judge says why a first request is refused.
func (c *conn) judge(q *wire.Request) error {
	switch {
	case q.Kind != wire.Hello:
		return status.Errorf(status.Invalid, "a %s request came before the greeting", q.Kind)
	case q.Version < wire.Version:
		return status.Errorf(status.Unsupported, "the client speaks protocol version %d and this server %d: use the same release on both", uint64(q.Version), wire.Version)
	case string(q.Data) != c.s.cfg.Cluster:
		return status.Errorf(status.Permission, "this chunk server belongs to cluster %q, not to %q: check the address", c.s.cfg.Cluster, q.Data)
	}
	return nil
}

// serve decodes all frames that are buffered, then waits for more. Replies that
// come while it works wait until it is through (Cork): one write for all.
func (c *conn) serve() error {
	for {
		c.out.Cork()
		c.now = time.Since(c.s.start)
		err := c.decode()
		c.submit()
		c.out.Uncork()
		if err == nil {
			err = c.in.Fill()
		}
		if err != nil {
			return err
		}
	}
}

// decode takes every whole frame of what is buffered.
func (c *conn) decode() error {
	for {
		f, ok, err := c.in.Next()
		if err != nil {
			return fmt.Errorf("garbage: %w", err)
		}
		if !ok {
			return nil
		}
		q, err := f.Request()
		if err != nil {
			return fmt.Errorf("garbage: %w", err)
		}
		if err := c.take(q); err != nil {
			return err
		}
	}
}

// take answers a request, or adds it to the batch for its store.
func (c *conn) take(q *wire.Request) error {
	switch q.Kind {
	case wire.Ping:
		c.out.Replies(&wire.Reply{Kind: wire.Ping, ID: q.ID})
		return c.room()
	case wire.Hello:
		return status.Errorf(status.Invalid, "a second greeting")
	}
	st := c.s.stores[q.Store]
	if st == nil {
		c.out.Replies(&wire.Reply{Kind: q.Kind, ID: q.ID, Status: status.NotFound,
			Detail: fmt.Sprintf("this chunk server has no store %s: the volume's map is old, or a disk is missing", q.Store)})
		return c.room()
	}
	if st != c.store {
		c.submit()
		c.store = st
	}
	if err := c.admit(q); err != nil {
		return err
	}
	c.batch = append(c.batch, q)
	return nil
}

// room waits while the client leaves more replies unread than the window.
func (c *conn) room() error {
	if c.out.Pending() <= c.s.cfg.WindowBytes {
		return nil
	}
	return c.wait(func() error { return c.out.Drained(c.s.cfg.WindowBytes) })
}

// wait lets f wait, with everything gathered so far on its way.
func (c *conn) wait(f func() error) error {
	c.submit()
	c.out.Uncork()
	err := f()
	c.out.Cork()
	return err
}

// admit gives a request a slot, waiting while the window is full.
func (c *conn) admit(q *wire.Request) error {
	if err := c.room(); err != nil {
		return err
	}
	cost := stream.Cost(q)
	if !c.tryAdmit(q, cost) {
		return c.wait(func() error { return c.waitAdmit(q, cost) })
	}
	return nil
}

func (c *conn) tryAdmit(q *wire.Request, cost int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used > 0 && c.used+cost > c.s.cfg.WindowBytes {
		return false
	}
	c.slot(q, cost)
	return true
}

func (c *conn) waitAdmit(q *wire.Request, cost int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.why == nil && c.used > 0 && c.used+cost > c.s.cfg.WindowBytes {
		c.freed.Wait()
	}
	if c.why != nil {
		return c.why
	}
	c.slot(q, cost)
	return nil
}

// slot enters an outstanding request, which gets the number it has inside.
func (c *conn) slot(q *wire.Request, cost int) {
	i := len(c.slots)
	if n := len(c.free); n > 0 {
		i = int(c.free[n-1])
		c.free = c.free[:n-1]
	} else {
		c.slots = append(c.slots, slot{})
	}
	tag := c.slots[i].tag + 1
	c.slots[i] = slot{q.ID, cost, c.now, tag}
	c.used += cost
	q.ID = uint64(tag)<<32 | uint64(i)
}

// submit hands the batch to its store.
func (c *conn) submit() {
	if len(c.batch) == 0 {
		return
	}
	c.store.Submit(c.batch, c)
	clear(c.batch)
	c.batch = c.batch[:0]
}

// Replies implements wire.Sink. The reply to a request that is not outstanding
// is dropped with a log line: the store has answered twice.
func (c *conn) Replies(rs []*wire.Reply) {
	now := time.Since(c.s.start)
	c.mu.Lock()
	for _, r := range rs {
		i, tag := uint32(r.ID), uint32(r.ID>>32)
		if int(i) >= len(c.slots) || c.slots[i].cost == 0 || c.slots[i].tag != tag {
			c.s.log.Error("a store answered a request that nobody waits for", "kind", r.Kind, "slot", i)
			continue
		}
		s := c.slots[i]
		c.slots[i] = slot{tag: tag}
		c.free = append(c.free, i)
		c.used -= s.cost
		r.ID, r.Took = s.id, uint64((now - s.at).Microseconds()) // the store's queue and disk
		c.out.Replies(r)
	}
	c.freed.Signal()
	c.mu.Unlock()
	c.out.Flush()
}

// fail ends the connection because of err, at once and once.
func (c *conn) fail(err error) {
	c.closer.Do(func() {
		cerr := c.nc.Close()
		if cerr != nil {
			err = fmt.Errorf("%w (and closing it: %v)", err, cerr)
		}
		c.mu.Lock()
		c.why = err
		c.freed.Broadcast()
		c.mu.Unlock()
		c.out.Fail(err)
	})
}
