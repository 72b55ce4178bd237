package client

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/chunk/stream"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// pingID is the number of the link's own pings.
const pingID = ^uint64(0)

// conn is one connection, from its dial to its end.
type conn struct {
	gen  uint64
	nc   net.Conn
	out  *stream.Outbox
	in   *stream.Reader
	most int // bytes it may hold

	received atomic.Uint64 // fills that brought bytes
	waiting  atomic.Bool   // the reader waits for bytes

	failing sync.Once

	mu     sync.Mutex     // guards the fields below; taken before the outbox's own
	why    error          // it is over; nil while alive
	costs  map[uint64]int // of requests sent and unanswered, by ID
	used   int            // sum of costs ≤ window, or one request alone
	window int
	held   []heldFrame // in order, not sent: the window is full
	heldN  int         // bytes of held
}

// heldFrame is an encoded request that waits for the window.
type heldFrame struct {
	id    uint64
	cost  int
	bytes []byte
}

func newConn(gen uint64, nc net.Conn, most int) (*conn, error) {
	out, err := stream.NewOutbox(nc)
	if err != nil {
		return nil, err
	}
	return &conn{gen: gen, nc: nc, out: out, in: stream.NewReader(nc), most: most, costs: map[uint64]int{}, window: stream.Window}, nil
}

// hello greets the server and takes its answer.
func (c *conn) hello(cluster string) error {
	c.out.Requests(&wire.Request{Kind: wire.Hello, Version: ids.Version(wire.Version), Data: []byte(cluster)})
	c.out.Flush()
	for {
		f, ok, err := c.in.Next()
		switch {
		case err != nil:
			return err
		case !ok:
			if err := c.in.Fill(); err != nil {
				return fmt.Errorf("no answer to the greeting: %w", err)
			}
			continue
		}
		r, err := f.Reply()
		if err != nil {
			return err
		}
		if r.Kind != wire.Hello {
			return status.Errorf(status.Invalid, "a %s reply where the greeting's answer belongs", r.Kind)
		}
		c.window = window(r.Count64)
		return r.Err()
	}
}

// send encodes requests into the outbox, or holds them back while the window is
// full, and flushes.
func (c *conn) send(reqs []*wire.Request) {
	c.mu.Lock()
	for _, q := range reqs {
		if c.why != nil {
			break
		}
		cost := stream.Cost(q)
		if len(c.held) == 0 && c.fits(cost) {
			c.charge(q.ID, cost)
			c.out.Requests(q)
		} else {
			b := append(wire.AppendRequest(make([]byte, 0, cost), q), q.Data...)
			c.held = append(c.held, heldFrame{q.ID, cost, b})
			c.heldN += len(b)
		}
	}
	over := c.heldN + c.out.Pending()
	c.mu.Unlock()
	if over > c.most {
		c.fail(status.Errorf(status.TooBig, "%d bytes wait to be sent, over the limit of %d", over, c.most))
		return
	}
	c.out.Flush()
}

// fits reports whether a request may go out now.
func (c *conn) fits(cost int) bool { return c.used == 0 || c.used+cost <= c.window }

// charge enters a request that goes out. Should its number be in use, one of the
// two answers will be one too many, and end the connection.
func (c *conn) charge(id uint64, cost int) {
	c.used += cost - c.costs[id]
	c.costs[id] = cost
}

// serve hands over replies until the connection ends, and returns why it did.
func (c *conn) serve(h Handler) error {
	var batch []*wire.Reply
	for {
		f, ok, err := c.in.Next()
		if err != nil {
			return fmt.Errorf("garbage from the server: %w", err)
		}
		if ok {
			r, err := f.Reply()
			if err != nil {
				return fmt.Errorf("garbage from the server: %w", err)
			}
			batch = append(batch, r)
			continue
		}
		if batch, err = c.settle(batch); err != nil {
			return err
		}
		if len(batch) > 0 {
			h.Replies(c.gen, batch)
			clear(batch)
			batch = batch[:0]
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

func (c *conn) fill() error {
	c.waiting.Store(true)
	err := c.in.Fill()
	c.waiting.Store(false)
	c.received.Add(1)
	if errors.Is(err, io.EOF) {
		return errors.New("the server closed the connection")
	}
	return err
}

// settle frees the window of what was answered, drops the answers to pings, and
// sends what was held back.
func (c *conn) settle(batch []*wire.Reply) ([]*wire.Reply, error) {
	keep := batch[:0]
	c.mu.Lock()
	for _, r := range batch {
		cost, ok := c.costs[r.ID]
		if !ok {
			if r.Kind == wire.Ping && r.ID == pingID {
				continue
			}
			c.mu.Unlock()
			return nil, status.Errorf(status.Invalid, "a %s reply with number %d that nobody asked for", r.Kind, r.ID)
		}
		delete(c.costs, r.ID)
		c.used -= cost
		keep = append(keep, r)
	}
	released := false
	for len(c.held) > 0 && c.fits(c.held[0].cost) {
		f := c.held[0]
		c.held[0] = heldFrame{}
		c.held, c.heldN, released = c.held[1:], c.heldN-len(f.bytes), true
		c.charge(f.id, f.cost)
		c.out.Frames(f.bytes)
	}
	c.mu.Unlock()
	if released {
		c.out.Flush()
	}
	return keep, nil
}

// watch pings, also while requests are outstanding: a store that is slow to
// answer is not a dead peer. It ends a connection that brought no byte since
// silentPings pings. It counts its own ticks and not the clock, so that a
// process which was suspended itself does not blame its peers. While an answer
// is awaited it also pings between: only what is sent can go unacknowledged, and
// show the link layer that the path is gone.
func (c *conn) watch(every time.Duration, quit <-chan struct{}) {
	t := time.NewTicker(every / ticksPerPing)
	defer t.Stop()
	var seen, last uint64
	silent := 0 // pings sent since the last byte
	for tick := 1; ; tick++ {
		select {
		case <-quit:
			return
		case <-t.C:
		}
		if tick%ticksPerPing != 0 {
			if now := c.received.Load(); now == last && c.waiting.Load() && c.awaits() {
				c.ping()
			} else {
				last = now
			}
			continue
		}
		got := c.received.Load()
		if got != seen || !c.waiting.Load() {
			seen, silent = got, 0
		}
		if silent == silentPings {
			c.fail(status.Errorf(status.Timeout, "no byte for %v after a ping", silentPings*every))
			return
		}
		silent++
		if err := c.out.Err(); err != nil {
			c.fail(fmt.Errorf("cannot send: %w", err))
			return
		}
		c.ping()
	}
}

// ticksPerPing is how often watch looks between two pings.
const ticksPerPing = 3

func (c *conn) ping() {
	c.out.Requests(&wire.Request{Kind: wire.Ping, ID: pingID})
	c.out.Flush()
}

// awaits reports whether a request is unanswered.
func (c *conn) awaits() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used > 0
}

// fail ends the connection because of err, at once and once. Sends that come
// later do nothing; those that have begun have ended when it returns.
func (c *conn) fail(err error) {
	c.failing.Do(func() {
		c.mu.Lock()
		c.why, c.held, c.heldN = err, nil, 0
		c.mu.Unlock()
		c.out.Fail(err)
		if cerr := c.nc.Close(); cerr != nil {
			c.mu.Lock()
			c.why = fmt.Errorf("%w (and closing it: %v)", err, cerr)
			c.mu.Unlock()
		}
	})
}

// end waits until nobody writes, and returns why the connection is over. It has
// failed before.
func (c *conn) end() error {
	c.mu.Lock()
	why := c.why
	c.mu.Unlock()
	c.out.Stop(why)
	return why
}
