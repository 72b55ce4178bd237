package client

import (
	"sync"

	"github.com/cairnstore/cairn/proto/wire"
)

// Submitter is a store in this process.
type Submitter interface {
	Submit(reqs []*wire.Request, sink wire.Sink)
}

// localGen is the only connection of a local link.
const localGen = 1

type local struct {
	s Submitter
	h Handler

	mu     sync.Mutex // guards the fields below
	idle   *sync.Cond
	closed bool
	inside int // calls of the store or the handler that have not returned
}

var (
	_ Link      = (*local)(nil)
	_ wire.Sink = (*local)(nil)
)

// Local returns the in-process twin of Dial over s. Up(1) comes before Local
// returns, Replies from whatever goroutine the store answers on, possibly
// inside Send. Nothing is copied: Request.Data is the store's until Submit
// returns, and Request.Into works.
func Local(s Submitter, h Handler) Link {
	l := &local{s: s, h: h}
	l.idle = sync.NewCond(&l.mu)
	h.Up(localGen)
	return l
}

// enter begins a call that Close waits for; false after Close.
func (l *local) enter() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.inside++
	return true
}

func (l *local) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inside--; l.inside == 0 && l.closed {
		l.idle.Broadcast()
	}
}

// Send implements Link.
func (l *local) Send(gen uint64, reqs []*wire.Request) {
	if gen != localGen || !l.enter() {
		return
	}
	defer l.leave()
	l.s.Submit(reqs, l)
}

// Replies implements wire.Sink. Answers that come after Close are dropped.
func (l *local) Replies(rs []*wire.Reply) {
	if !l.enter() {
		return
	}
	defer l.leave()
	l.h.Replies(localGen, rs)
}

// Close implements Link.
func (l *local) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for l.inside > 0 {
		l.idle.Wait()
	}
}
