package volume

import (
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// join is a member that was out catching up:
//
//	seal → (new writes go to it too) → per chunk: compare digests and copy from a
//	member that has accepted all that is older → required → told the layers →
//	flush and settle → add by a commit → in-sync
//
// Below the join's version it takes the survivor's state, even where that is
// older or a hole; from it on, the higher version wins. A write below it that is
// still in flight, because another member is missing, comes with the copy: it
// does not hold up the join, which may be what it waits for.
type join struct {
	phase    joinPhase
	from     ids.Version // J: it receives every write ≥ from
	queue    []*chunk    // not compared yet
	active   int         // chunks being compared, ≤ joinChunks
	required bool        // counted for writes and flushes, not readable yet
	mark     uint64      // counter when it became required
	asked    bool        // its addition was asked for, and may happen until settled
	dead     bool        // failed since
}

type joinPhase uint8

const (
	joinSeal joinPhase = iota
	joinCopy
	joinSettle
	joinSettling
	joinAdd
)

const (
	joinChunks     = 2
	joinBackoff    = 300 * time.Millisecond // doubles with each failure
	joinBackoffMax = 5 * time.Second
)

// stepJoins moves every join as far as it can go. While draining too: the last
// flush may wait for a member that only goes when another one has come.
func (e *Engine) stepJoins() {
	if e.state != Serving && e.state != Draining {
		return
	}
	for _, r := range e.replicas {
		if r.inSync || r.gone {
			continue
		}
		if r.join == nil && r.up && e.now >= r.joinAfter && !e.unclear(r) {
			e.beginJoin(r)
		}
		if r.join != nil {
			e.stepJoin(r, r.join)
		}
	}
}

func (e *Engine) beginJoin(r *replica) {
	jn := &join{}
	r.join, r.joinedBytes, r.sealed, r.lastReply = jn, 0, false, e.now
	e.call(r, &wire.Request{Kind: wire.Seal, Count: uint32(r.gen)}, func(rep *wire.Reply) {
		if r.join != jn {
			return
		}
		if rep.Status != status.OK {
			e.abortJoin(r, rep.Err().Error())
			return
		}
		r.incarnation = rep.Incarnation
		r.sealed = true
		jn.phase, jn.from = joinCopy, ids.MakeVersion(e.epoch, e.counter+1)
		for _, c := range e.sortedChunks() { // later ones have nothing below from
			if c.heldBy(r) {
				jn.queue = append(jn.queue, c)
			}
		}
	})
}

func (e *Engine) stepJoin(r *replica, jn *join) {
	switch jn.phase {
	case joinCopy:
		for r.join == jn && jn.active < joinChunks && len(jn.queue) > 0 {
			c := jn.queue[0]
			sources := e.sources(c, jn.from)
			if len(sources) == 0 {
				break // until a write in flight is accepted, or a member is back
			}
			jn.queue = jn.queue[1:]
			jn.active++
			e.compareChunk(e.joinCatchUp(r, jn), c, sources)
		}
		if r.join == jn && jn.active == 0 && len(jn.queue) == 0 {
			e.require(r, jn)
		}
	case joinSettle:
		if e.answeredUpTo(r, nil, jn.mark) {
			jn.phase = joinSettling
			e.tellLast(r, func(rep *wire.Reply) {
				switch {
				case r.join != jn:
				case rep.Status != status.OK:
					e.abortJoin(r, rep.Err().Error())
				default:
					e.settleJoin(r, jn)
				}
			})
		}
	}
}

// sources lists the in-sync replicas of a chunk that have accepted every write
// issued below from, the local one first.
func (e *Engine) sources(c *chunk, from ids.Version) []*replica {
	var out []*replica
	for pos, r := range c.replicas {
		if c.fills[pos] != nil || !r.readable() || r.merging > 0 || !c.shows(r) || slices.ContainsFunc(c.jobs, func(j *job) bool {
			return j.version != 0 && j.version < from && j.have&(1<<pos) == 0
		}) {
			continue
		}
		if r.local {
			out = slices.Insert(out, 0, r)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// require counts the joiner from now on, for what is in flight too. What is in
// flight from before the join came with the copy.
func (e *Engine) require(r *replica, jn *join) {
	jn.required, jn.phase, jn.mark = true, joinSettle, e.counter
	for _, j := range e.inFlight.all() {
		for pos, o := range j.c.replicas {
			if o != r || j.c.fills[pos] != nil {
				continue
			}
			j.need |= 1 << pos
			if j.version < jn.from {
				j.have |= 1 << pos
			}
			e.sendJob(j, pos)
		}
	}
	if e.flush.running {
		e.flush.stale = true
	}
}

// answeredUpTo reports whether the replica has answered every write up to mark,
// of one chunk or, with nil, of all.
func (e *Engine) answeredUpTo(r *replica, c *chunk, mark uint64) bool {
	for i := range r.slots {
		if j := r.slots[i].job; j != nil && (c == nil || j.c == c) && j.version.Counter() <= mark {
			return false
		}
	}
	return true
}

func (e *Engine) settleJoin(r *replica, jn *join) {
	e.call(r, &wire.Request{Kind: wire.Settle, Floor: e.floor}, func(rep *wire.Reply) {
		if r.join != jn {
			return
		}
		if rep.Status != status.OK {
			e.abortJoin(r, rep.Err().Error())
			return
		}
		jn.phase = joinAdd // startChange commits it
	})
}

// added: the commit says it is in-sync.
func (e *Engine) added(r *replica) {
	dead := r.join != nil && r.join.dead
	r.inSync, r.intact, r.join, r.joinTries = true, true, nil, 0
	e.stats.Joined++
	if dead || !r.up || !r.sealed {
		e.exclude(r, r.why)
		return
	}
	e.resume(r)
}

// abortJoin gives a join up. One whose addition was asked for stays required
// until it is settled whether that happened.
func (e *Engine) abortJoin(r *replica, why string) {
	if r.join == nil {
		return
	}
	r.why = why
	if r.join.asked {
		r.join.dead, r.suspected = true, e.newDoubt()
		return
	}
	r.join = nil
	r.joinAfter = e.now + min(joinBackoff<<min(r.joinTries, 8), joinBackoffMax)
	r.joinTries++
	e.letGo(r)
}

// joinCatchUp is what the copying of a join needs to know of it.
func (e *Engine) joinCatchUp(r *replica, jn *join) *catchUp {
	return &catchUp{r: r, from: jn.from,
		live:   func() bool { return r.join == jn && jn.phase == joinCopy },
		fail:   func(why string) { e.abortJoin(r, why) },
		copied: func(n uint64) { r.joinedBytes += n },
		done: func() {
			jn.active--
			e.stepJoin(r, jn)
		}}
}
