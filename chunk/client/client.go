// Package client keeps a connection to one store of a chunk server alive, for
// one volume: requests go out in order, replies come back in batches.
//
// Duty: dialling again and again, the Hello, pings, the window, and telling
// when a connection is gone; and the in-process twin for a store in the same
// process. Floor: F3. It does not decide what a lost connection means, keeps no
// request to send it again, and sorts nothing: that is chunk/volume.
//
// # Stages (the functions stand in this order, over the files)
//
//  1. run       dial, say Hello, report, again after the end     (client.go)
//  2. Send      a request is encoded into the outbox, or held back (conn.go)
//  3. serve     replies are decoded and handed over in batches    (conn.go)
//  4. watch     pings, and the end of a silent peer               (conn.go)
package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/stream"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Handler takes what happens to a link. Its calls come from the link's own
// goroutine, one at a time; only Replies of a Local link come from whoever
// answers, also several at once and from inside Send. No call may close the
// link: Close waits for it.
type Handler interface {
	// Up says that connection gen is ready. Generations rise from 1.
	Up(gen uint64)
	// Down says that connection gen is gone, with all its answers, and that
	// nothing of it touches a request any more.
	Down(gen uint64, why string)
	// Lost says that the store could not be reached by one more attempt, which
	// has tried every path. It comes once between two connections; the link
	// keeps trying.
	Lost(why string)
	// Replies brings answers. The slice is the link's, the replies and all they
	// hold are the handler's.
	Replies(gen uint64, rs []*wire.Reply)
}

// Link is a connection to one store that is made again whenever it ends.
type Link interface {
	// Send sends requests in order. It never waits for the network, and has
	// copied all it needs when it returns. Requests are dropped unless gen is
	// the live connection. Request.ID must be unique among those unanswered,
	// and not the highest number. Request.Into counts for a Local link only: a
	// late reply must not land in a buffer that is used anew.
	Send(gen uint64, reqs []*wire.Request)
	// Close ends the link and returns when its goroutines have ended: no
	// handler call, and no touch of a request, comes after it.
	Close()
}

// Bounds of time. A peer that goes silent is noticed 5 pings after its last byte
// at the latest: 1.5 s.
const (
	defaultPing    = 300 * time.Millisecond
	silentPings    = 4
	defaultAttempt = time.Second // one dial and Hello
	backoffFirst   = 10 * time.Millisecond
	backoffMax     = 500 * time.Millisecond
	quickEvery     = time.Second // a lost connection is dialled again at once, but no more often
	// maxConnect bounds the wait for a peer's kernel, which tries all paths over
	// and over: one that has not answered by then is not reachable.
	maxConnect = 500 * time.Millisecond
)

// defaultHold bounds what waits in a link: its outbox and what is held back by
// the window. The engine's own bound on operations in flight is below it; a
// link that exceeds it ends its connection.
const defaultHold = 256 << 20

// Config says whom to reach.
type Config struct {
	Addr    string        // of the chunk server, "host:port", or one for each path with commas (netplane/link)
	Cluster string        // must be the server's
	Dialer  link.Dialer   // source address and TLS; its Timeout is Attempt's unless set
	Attempt time.Duration // bounds one dial and Hello (default 1 s)
	Ping    time.Duration // between pings (default 300 ms); a peer that is silent for 4 of them is dead
	// HoldBytes bounds the bytes waiting in this link (default 256 MiB).
	HoldBytes int
}

type dialed struct {
	cfg    Config
	h      Handler
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex // guards conn
	conn *conn      // live, between Up and Down
}

var _ Link = (*dialed)(nil)

var errClosed = errors.New("link closed")

// Dial returns a link that has begun to connect.
func Dial(cfg Config, h Handler) Link {
	if cfg.Attempt <= 0 {
		cfg.Attempt = defaultAttempt
	}
	if cfg.Dialer.Timeout <= 0 {
		cfg.Dialer.Timeout = cfg.Attempt
		if cfg.Dialer.TLS == nil { // no process has a say in it
			cfg.Dialer.Timeout = min(cfg.Attempt, maxConnect)
		}
	}
	if cfg.Ping <= 0 {
		cfg.Ping = defaultPing
	}
	if cfg.HoldBytes <= 0 {
		cfg.HoldBytes = defaultHold
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &dialed{cfg: cfg, h: h, ctx: ctx, cancel: cancel, done: make(chan struct{})}
	go d.run()
	return d
}

// run is the link's goroutine.
func (d *dialed) run() {
	defer close(d.done)
	var delay time.Duration
	var quick time.Time // when a lost connection was last dialled again at once
	lost := false
	for gen := uint64(1); d.pause(delay); {
		c, err := d.connect(gen)
		if d.ctx.Err() != nil {
			return // connect ends what it made when the link closes
		}
		if err != nil {
			if !lost {
				lost = true
				d.h.Lost(err.Error())
			}
			delay = next(delay)
			continue
		}
		why := d.live(c)
		if d.ctx.Err() != nil {
			return
		}
		d.h.Down(gen, why.Error())
		gen, lost = gen+1, false
		if now := time.Now(); now.Sub(quick) >= quickEvery {
			delay, quick = 0, now
		} else {
			delay = next(delay)
		}
	}
}

// next doubles a delay between the bounds, less up to a quarter so that links
// which lost the same server do not come back in step.
func next(d time.Duration) time.Duration {
	d = min(max(2*d, backoffFirst), backoffMax)
	return d - rand.N(d/4)
}

// pause waits for d, and reports whether the link is still wanted.
func (d *dialed) pause(delay time.Duration) bool {
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-d.ctx.Done():
		}
	}
	return d.ctx.Err() == nil
}

// connect makes connection gen: dialled and greeted.
func (d *dialed) connect(gen uint64) (*conn, error) {
	start := time.Now()
	nc, err := d.cfg.Dialer.Dial(d.ctx, d.cfg.Addr)
	if err != nil {
		return nil, err
	}
	c, err := newConn(gen, nc, d.cfg.HoldBytes)
	if err != nil {
		return nil, closeAfter(nc, err)
	}
	stop := context.AfterFunc(d.ctx, func() { c.fail(errClosed) })
	defer stop()
	err = nc.SetDeadline(start.Add(d.cfg.Attempt))
	if err == nil {
		err = c.hello(d.cfg.Cluster)
	}
	if err == nil {
		err = nc.SetDeadline(time.Time{})
	}
	if err == nil && !stop() {
		err = errClosed
	}
	if err != nil {
		c.fail(err)
		return nil, status.Errorf(status.Unavailable, "chunk server %s: %w", d.cfg.Addr, c.end())
	}
	return c, nil
}

// live serves connection c to its end and returns why it ended. When it
// returns, no goroutine reads, writes or sends over it.
func (d *dialed) live(c *conn) error {
	stop := context.AfterFunc(d.ctx, func() { c.fail(errClosed) })
	defer stop()
	d.setConn(c)
	d.h.Up(c.gen)
	watched := make(chan struct{})
	quit := make(chan struct{})
	go func() {
		defer close(watched)
		c.watch(d.cfg.Ping, quit)
	}()
	c.fail(c.serve(d.h))
	d.setConn(nil)
	close(quit)
	<-watched
	return c.end()
}

func (d *dialed) setConn(c *conn) {
	d.mu.Lock()
	d.conn = c
	d.mu.Unlock()
}

// Send implements Link.
func (d *dialed) Send(gen uint64, reqs []*wire.Request) {
	d.mu.Lock()
	c := d.conn
	d.mu.Unlock()
	if c != nil && c.gen == gen {
		c.send(reqs)
	}
}

// Close implements Link.
func (d *dialed) Close() {
	d.cancel()
	<-d.done
}

// closeAfter closes nc because of err and reports both.
func closeAfter(nc net.Conn, err error) error {
	if cerr := nc.Close(); cerr != nil {
		return status.Errorf(status.Of(err), "%w (and closing it: %v)", err, cerr)
	}
	return err
}

// window is what a server lets a connection have outstanding: its own word,
// as far as it makes sense.
func window(granted uint64) int {
	if granted == 0 || granted > stream.Window {
		return stream.Window
	}
	return int(granted)
}
