package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// confirm is how reads, and what else no store has answered for (doneLeased), are
// answered once the lease is over, because metadata does not answer: every required member says, after the read was invoked, that
// no newer epoch has sealed the volume there. One round at a time serves all
// reads that had their data when it began; those that get theirs meanwhile share
// the next one.
//
// It proves that no newer epoch served when these reads were invoked. To serve,
// or to change the members, a newer epoch must have sealed a member that has a
// chunk this one knows, as metadata saw the members then: nothing but this
// writer's commands had changed those, and a member whose addition has an unknown
// outcome is required. That one would have answered Fenced. So a volume of which
// no chunk is known cannot be confirmed, and its reads wait for a lease.
// (docs/PROTOCOL.md, P4; docs/adr/0022.)
type confirm struct {
	reads []*Op // of the round under way; bounded by the operations in flight
	need  int   // members that have not answered it; 0: none is under way
	round uint64
	after time.Duration // no round begins before
}

// confirmRetry is how long reads wait when a member could not confirm them.
const confirmRetry = 50 * time.Millisecond

// startConfirm begins a round when reads wait for one and every required member
// can be asked.
func (e *Engine) startConfirm() {
	c := &e.confirm
	if c.need > 0 || len(e.leaseHeld) == 0 || e.now < e.leaseTill || e.now < c.after || !e.confirmable() {
		return
	}
	c.reads, e.leaseHeld = e.leaseHeld, nil
	c.round++
	round := c.round
	for _, r := range e.replicas {
		if !r.required() {
			continue
		}
		c.need++
		e.call(r, &wire.Request{Kind: wire.Stat}, func(rep *wire.Reply) {
			if c.need == 0 || c.round != round {
				return
			}
			if rep.Status != status.OK || rep.Epoch != e.epoch {
				e.unconfirmed()
				if rep.Status != status.OK && rep.Status != status.Unavailable {
					e.replicaFailed(r, rep)
				}
				return
			}
			if c.need--; c.need == 0 {
				reads := c.reads
				c.reads = nil
				e.stats.Confirmed += uint64(len(reads))
				e.readsDone(reads)
			}
		})
	}
}

// confirmable reports whether a round may begin: all required members are sealed
// and connected, and a chunk that no shrink can have taken away is known.
func (e *Engine) confirmable() bool {
	if e.state != Serving && e.state != Draining {
		return false
	}
	any := false
	for _, r := range e.replicas {
		if r.required() {
			if any = true; !r.up || !r.sealed {
				return false
			}
		}
	}
	end := e.size
	if e.limit > 0 {
		end = min(end, e.limit)
	}
	for _, c := range e.chunks {
		if any && c.id != 0 && uint64(c.index)*uint64(e.perChunk)*ids.BlockSize < end {
			return true
		}
	}
	return false
}

// unconfirmed ends the round in vain: its reads wait for the next, or a lease.
func (e *Engine) unconfirmed() {
	c := &e.confirm
	e.leaseHeld = append(c.reads, e.leaseHeld...)
	c.reads, c.need, c.after = nil, 0, e.now+confirmRetry
}

func (e *Engine) readsDone(reads []*Op) {
	for _, op := range reads {
		e.done(op, op.failed)
	}
}
