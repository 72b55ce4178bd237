package sim

import (
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/wire"
)

// The times of chunk/client.
const (
	pingEvery    = 300 * time.Millisecond
	silentPings  = 4
	dialTimeout  = time.Second
	backoffFirst = 10 * time.Millisecond
	backoffMax   = 500 * time.Millisecond
	quickEvery   = time.Second
)

// path is the network between one gateway's host and one store's host. A
// blocked direction holds what is sent, in order, until it opens again.
type path struct {
	toServer, toClient time.Duration // blocked until
	slow               time.Duration // added to each way
}

// link keeps a connection from a gateway to a replica alive, as chunk/client
// does. It belongs to one peer; closed links do nothing any more.
type link struct {
	p      *peer
	n      *node
	conn   *conn // live
	gen    uint64
	closed bool
	lost   bool
	delay  time.Duration
	quick  time.Duration // when a lost connection was last dialled again at once
}

func (l *link) w() *world   { return l.n.w }
func (l *link) path() *path { return l.p.a.g.paths[l.n.index] }

// event runs f in the gateway's process, while the link lives.
func (l *link) event(f func()) {
	l.p.a.g.event(func() {
		if !l.closed {
			f()
		}
	})
}

// dial tries once after d, and again until the link closes.
func (l *link) dial(d time.Duration) {
	w := l.w()
	w.after(d, func() {
		l.event(func() {
			w.after(w.span(50*time.Microsecond, time.Millisecond), func() { l.arrive(w.now + dialTimeout) })
		})
	})
}

// arrive is the SYN at the server, if it gets there.
func (l *link) arrive(deadline time.Duration) {
	w, n, p := l.w(), l.n, l.path()
	if l.closed {
		return
	}
	blocked := max(p.toServer, p.toClient) > w.now || n.pausedUntil > w.now || n.dark
	switch {
	case blocked:
		w.after(deadline-w.now, func() { l.event(func() { l.failed("timeout") }) })
	case !n.up():
		w.after(w.span(50*time.Microsecond, time.Millisecond), func() { l.event(func() { l.failed("refused") }) })
	default:
		c := &conn{l: l, n: n, life: n.life}
		n.served = append(n.served, c)
		w.after(w.span(50*time.Microsecond, time.Millisecond), func() { l.event(func() { l.ready(c) }) })
	}
}

func (l *link) failed(why string) {
	if !l.lost {
		l.lost = true
		l.p.lost(why)
	}
	if !l.closed {
		l.delay = min(max(2*l.delay, backoffFirst), backoffMax)
		l.dial(l.delay)
	}
}

func (l *link) ready(c *conn) {
	if c.serverDead {
		l.failed("reset")
		return
	}
	l.gen++
	c.gen = l.gen
	l.conn, l.lost, l.delay = c, false, 0
	l.watch(c, 0)
	l.p.upped(c.gen)
}

// watch ends a connection that brought nothing for a while.
func (l *link) watch(c *conn, silent int) {
	l.w().after(pingEvery, func() {
		l.event(func() {
			if l.conn != c {
				return
			}
			now, p := l.w().now, l.path()
			if max(p.toServer, p.toClient, c.n.pausedUntil) <= now && !c.serverDead {
				silent = -1
			}
			if silent++; silent >= silentPings {
				l.down(c, "silent")
				return
			}
			l.watch(c, silent)
		})
	})
}

// down is the end of a connection as the client sees it.
func (l *link) down(c *conn, why string) {
	if l.conn != c {
		return
	}
	l.conn = nil
	c.cut()
	l.p.downed(c.gen, why)
	if l.closed {
		return
	}
	w := l.w()
	if w.now-l.quick >= quickEvery || l.quick == 0 {
		l.delay, l.quick = 0, w.now
	} else {
		l.delay = min(max(2*l.delay, backoffFirst), backoffMax)
	}
	l.dial(l.delay)
}

// close lets go; what was sent may still arrive.
func (l *link) close() {
	if l.closed {
		return
	}
	l.closed = true
	if c := l.conn; c != nil {
		l.conn = nil
		c.cut()
	}
}

// send puts requests on the connection gen, copied, as chunk/stream does.
func (l *link) send(gen uint64, reqs []*wire.Request) {
	if l.conn == nil || l.conn.gen != gen {
		return
	}
	for _, q := range reqs {
		l.conn.toServer = append(l.conn.toServer, copyRequest(q))
	}
	l.conn.pumpServer()
}

func copyRequest(q *wire.Request) *wire.Request {
	c := *q
	c.Sums, c.Entries, c.Data, c.Into = slices.Clone(q.Sums), slices.Clone(q.Entries), slices.Clone(q.Data), nil
	return &c
}

// conn is one connection: two ordered streams.
type conn struct {
	l    *link
	n    *node
	gen  uint64
	life int // of the server's process

	clientGone bool // nothing goes back; what is in toServer still arrives
	serverDead bool

	tap                wire.Sink // takes the replies to a checker's question
	toServer           []*wire.Request
	toClient           []*wire.Reply
	serverBusy, comeIn bool // a delivery is under way
}

var _ wire.Sink = (*conn)(nil)

// cut ends the client's side: a part of what was sent is with the server
// already, and is served, soon or late.
func (c *conn) cut() {
	w := c.n.w
	c.clientGone = true
	c.toClient = nil
	c.toServer = c.toServer[:w.rng.IntN(len(c.toServer)+1)]
	c.pumpServer()
}

// reset tells the client that the server's process is gone, as its kernel does.
// A machine without power says nothing until it is back.
func (c *conn) reset() {
	if c.clientGone {
		return
	}
	l := c.l
	c.n.w.after(c.n.w.span(50*time.Microsecond, 2*time.Millisecond), func() {
		l.event(func() { l.down(c, "reset") })
	})
}

// pumpServer delivers what waits, in order, some together.
func (c *conn) pumpServer() {
	if c.serverBusy || len(c.toServer) == 0 || c.serverDead {
		return
	}
	c.serverBusy = true
	w, p := c.n.w, c.l.path()
	in := w.span(30*time.Microsecond, 400*time.Microsecond) + p.slow
	if w.chance(200) || c.clientGone && w.chance(2) {
		in = w.span(time.Millisecond, 300*time.Millisecond)
	}
	c.arriveServer(in)
}

func (c *conn) arriveServer(in time.Duration) {
	w := c.n.w
	w.after(in, func() {
		if c.serverDead || c.n.life != c.life {
			return
		}
		until := c.n.pausedUntil
		if !c.clientGone {
			until = max(until, c.l.path().toServer)
		}
		if until > w.now {
			c.arriveServer(until - w.now + w.span(time.Microsecond, 200*time.Microsecond))
			return
		}
		k := 1 + w.rng.IntN(min(len(c.toServer), 8)+1)
		k = min(k, len(c.toServer))
		batch := c.toServer[:k:k]
		c.toServer = c.toServer[k:]
		c.serverBusy = false
		if k > 0 {
			c.n.submit(c, batch)
		}
		if c.clientGone && len(c.toServer) == 0 {
			c.n.drop(c)
		}
		c.pumpServer()
	})
}

// Replies implements wire.Sink: the store's answers.
func (c *conn) Replies(rs []*wire.Reply) {
	if c.tap != nil {
		c.tap.Replies(rs)
		return
	}
	if c.clientGone || c.serverDead {
		return
	}
	for _, r := range rs {
		r := *r
		r.Data = slices.Clone(r.Data)
		c.toClient = append(c.toClient, &r)
	}
	c.pumpClient()
}

func (c *conn) pumpClient() {
	if c.comeIn || len(c.toClient) == 0 {
		return
	}
	c.comeIn = true
	w := c.n.w
	c.arriveClient(w.span(30*time.Microsecond, 400*time.Microsecond) + c.l.path().slow)
}

func (c *conn) arriveClient(in time.Duration) {
	w := c.n.w
	w.after(in, func() {
		if until := c.l.path().toClient; until > w.now && !c.clientGone {
			c.arriveClient(until - w.now + w.span(time.Microsecond, 200*time.Microsecond))
			return
		}
		c.comeIn = false
		if c.clientGone || len(c.toClient) == 0 {
			return
		}
		batch := c.toClient
		c.toClient = nil
		l := c.l
		l.event(func() {
			if l.conn == c {
				l.p.replies(c.gen, batch)
			}
		})
	})
}

func (c *conn) String() string { return fmt.Sprintf("%s gen %d", c.n.name, c.gen) }
