package volume

import (
	"cmp"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// join is a member that was out catching up:
//
//	seal → (new writes go to it too) → per chunk: compare digests and copy from a
//	member that has accepted all that is older → required → flush and settle →
//	add by a commit → in-sync
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
		if r.inSync {
			continue
		}
		if r.join == nil && r.up && e.now >= r.joinAfter {
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
			if slices.Contains(c.replicas, r) {
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
			e.compareChunk(r, jn, c, sources)
		}
		if r.join == jn && jn.active == 0 && len(jn.queue) == 0 {
			e.require(r, jn)
		}
	case joinSettle:
		if e.answeredUpTo(r, jn.mark) {
			jn.phase = joinSettling
			e.settleJoin(r, jn)
		}
	}
}

// sources lists the in-sync replicas of a chunk that have accepted every write
// issued below from, the local one first.
func (e *Engine) sources(c *chunk, from ids.Version) []*replica {
	var out []*replica
	for pos, r := range c.replicas {
		if !r.readable() || r.merging > 0 || slices.ContainsFunc(c.jobs, func(j *job) bool {
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
			if o != r {
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

// answeredUpTo reports whether the replica has answered every write up to mark.
func (e *Engine) answeredUpTo(r *replica, mark uint64) bool {
	for i := range r.slots {
		if j := r.slots[i].job; j != nil && j.version.Counter() <= mark {
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
		r.join.dead = true
		return
	}
	r.join = nil
	r.joinAfter = e.now + min(joinBackoff<<min(r.joinTries, 8), joinBackoffMax)
	r.joinTries++
	e.letGo(r)
}

// pair asks the same of the joiner and a survivor and continues with both
// answers; a failure of either gives the join up.
func (e *Engine) pair(r *replica, jn *join, s *replica, q wire.Request, then func(joiner, survivor *wire.Reply)) {
	var a, b *wire.Reply
	got := func() {
		if r.join != jn || jn.phase != joinCopy || a == nil || b == nil {
			return
		}
		for _, rep := range []*wire.Reply{a, b} {
			if rep.Status != status.OK {
				e.abortJoin(r, rep.Err().Error())
				return
			}
		}
		then(a, b)
	}
	qa, qb := q, q
	e.call(r, &qa, func(rep *wire.Reply) { a = rep; got() })
	e.call(s, &qb, func(rep *wire.Reply) { b = rep; got() })
}

// compareChunk compares digests per 4 MiB and copies the ranges that differ.
func (e *Engine) compareChunk(r *replica, jn *join, c *chunk, sources []*replica) {
	q := wire.Request{Kind: wire.Digest, Chunk: c.id, Count: e.perChunk, Limit: jn.from}
	e.pair(r, jn, sources[0], q, func(joiner, survivor *wire.Reply) {
		var ranges []int
		for i := range max(len(joiner.Digests), len(survivor.Digests)) {
			if i >= len(joiner.Digests) || i >= len(survivor.Digests) || joiner.Digests[i] != survivor.Digests[i] {
				ranges = append(ranges, i)
			}
		}
		e.copyRanges(r, jn, c, sources, ranges)
	})
}

// copyRanges lists and copies one range after the other.
func (e *Engine) copyRanges(r *replica, jn *join, c *chunk, sources []*replica, ranges []int) {
	if len(ranges) == 0 {
		jn.active--
		e.stepJoin(r, jn)
		return
	}
	first := uint32(ranges[0]) * wire.DigestBlocks
	q := wire.Request{Kind: wire.List, Chunk: c.id, Block: ids.Block(first), Count: min(wire.DigestBlocks, e.perChunk-first)}
	e.pair(r, jn, sources[0], q, func(joiner, survivor *wire.Reply) {
		t := &transfer{from: sources, to: []*replica{r}, limit: jn.from, runs: runs(difference(jn.from, joiner.Entries, survivor.Entries)),
			live: func() bool { return r.join == jn && jn.phase == joinCopy },
			hope: func() bool {
				return slices.ContainsFunc(c.replicas, func(o *replica) bool { return o.inSync && !slices.Contains(sources, o) })
			}}
		t.ended = func(f *failure) {
			r.joinedBytes += t.bytes
			if f != nil {
				e.abortJoin(r, f.rep.Err().Error())
				return
			}
			e.copyRanges(r, jn, c, sources, ranges[1:])
		}
		e.runTransfer(t)
	})
}

// difference lists what the joiner is to be given of the survivor's states below
// from: data to be read, and states without data. Sorted by layer and block within
// each.
func difference(from ids.Version, joiner, survivor []wire.Entry) []wire.Entry {
	type place struct {
		layer ids.LayerID
		block ids.Block
	}
	mine := map[place]wire.Entry{}
	for _, en := range joiner {
		mine[place{en.Layer, en.Block}] = en
	}
	var data, direct []wire.Entry
	for _, en := range survivor {
		m, ok := mine[place{en.Layer, en.Block}]
		delete(mine, place{en.Layer, en.Block})
		switch {
		case en.Version >= from || (ok && m.Version >= from):
		case ok && m.Version == en.Version && m.Kind == en.Kind && m.Sum == en.Sum:
		case ok && m.Version == en.Version && en.Kind == wire.EntryPoison: // the joiner has the last good copy
		case en.Kind == wire.EntryData:
			data = append(data, en)
		default:
			direct = append(direct, en)
		}
	}
	for _, m := range mine { // the survivor has a hole
		if m.Version < from {
			direct = append(direct, wire.Entry{Chunk: m.Chunk, Layer: m.Layer, Block: m.Block, Kind: wire.EntryHole})
		}
	}
	byPlace := func(a, b wire.Entry) int { return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Block, b.Block)) }
	slices.SortFunc(data, byPlace)
	slices.SortFunc(direct, byPlace)
	return append(direct, data...)
}
