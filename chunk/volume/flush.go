package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// flushState groups flushes: one round at a time, all that come meanwhile
// share the next.
type flushState struct {
	next, now []*Op // bounded by the operations in flight
	wanted    bool  // a round without an operation: the floor is to move
	running   bool
	stale     bool // the members changed: the round is issued again
	round     uint64
	need      map[*replica]bool // false: not sent yet
	target    ids.Version       // what the round makes durable
	legs      []leg             // by replica index: of this round
	dirty     uint64            // bytes completed since the last round began
	lastAt    time.Duration
}

func (e *Engine) dirty() bool { return e.flush.dirty > 0 }

func (e *Engine) autoFlush() {
	if e.flush.dirty > 0 && e.now-e.flush.lastAt >= e.cfg.Flush {
		e.flush.wanted = true
	}
}

// startFlush begins a round when one is wanted. Its target is what is complete
// now: everything below the lowest version in flight.
func (e *Engine) startFlush() {
	f := &e.flush
	if f.running || e.state == Attaching || (len(f.next) == 0 && !f.wanted) {
		return
	}
	f.now, f.next, f.wanted = f.next, nil, false
	if f.dirty == 0 {
		for _, op := range f.now {
			e.doneLeased(op)
		}
		f.now = nil
		return
	}
	f.running, f.dirty = true, 0
	e.beginRound()
}

func (e *Engine) beginRound() {
	f := &e.flush
	f.stale, f.round, f.lastAt = false, f.round+1, e.now
	f.target = min(e.inFlight.lowest()-1, ids.MakeVersion(e.epoch, e.counter))
	f.need = map[*replica]bool{}
	f.legs = append(f.legs[:0], make([]leg, len(e.replicas))...)
	for _, r := range e.replicas {
		if r.required() {
			f.need[r] = false
		}
	}
	e.sendFlushes()
}

// sendFlushes sends the round to required replicas it has not reached yet.
func (e *Engine) sendFlushes() {
	f := &e.flush
	if !f.running {
		return
	}
	for _, r := range e.replicas {
		if sent, ok := f.need[r]; !ok || sent || !r.writable() {
			continue
		}
		f.need[r] = true
		f.legs[r.index] = leg{sent: e.now}
		round := f.round
		e.call(r, &wire.Request{Kind: wire.Flush, Floor: e.floor}, func(rep *wire.Reply) {
			if !f.running || f.round != round {
				return
			}
			f.legs[r.index].answered(e.now-f.legs[r.index].sent, rep.Took, r.local)
			switch rep.Status {
			case status.OK:
				delete(f.need, r)
				e.roundDone()
			case status.Unavailable:
				f.need[r] = false
			default:
				// A failed flush is never tried again: what it covered may be gone
				// from the store's memory as well.
				f.need[r] = false
				r.doubt = r.inSync && rep.Status != status.Shutdown
				e.replicaFailed(r, rep)
			}
		})
	}
}

// roundDone ends the round once every required replica is durable.
func (e *Engine) roundDone() {
	f := &e.flush
	if !f.running || len(f.need) > 0 {
		return
	}
	if f.stale {
		e.beginRound()
		return
	}
	f.running = false
	for range f.now {
		e.pace.guest(e.now, e.now-f.lastAt)
	}
	e.floor = max(e.floor, f.target)
	e.flushed()
}

func (e *Engine) flushed() {
	ops := e.flush.now
	e.flush.now = nil
	e.cause = cause{round: e.flush.legs, replicas: e.replicas}
	for _, op := range ops {
		e.done(op, status.OK)
	}
	e.cause = cause{}
}
