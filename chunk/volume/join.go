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
//	seal → (new writes go to it too) → drain what is older → compare digests and
//	copy → required → flush and settle → add by a commit → in-sync
//
// Below the join's version it takes the survivor's state, even where that is
// older or a hole; from it on, the higher version wins.
type join struct {
	phase    joinPhase
	from     ids.Version // J: it receives every write ≥ from
	queue    []*chunk    // not compared yet
	active   int         // chunks being compared, ≤ joinChunks
	required bool        // counted for writes and flushes, not readable yet
	mark     uint64      // counter when it became required
	dead     bool        // failed while its addition was being committed
}

type joinPhase uint8

const (
	joinSeal joinPhase = iota
	joinDrain
	joinCopy
	joinSettle
	joinSettling
	joinAdd
)

const (
	joinChunks  = 2
	joinBackoff = 300 * time.Millisecond
)

// stepJoins moves every join as far as it can go.
func (e *Engine) stepJoins() {
	if e.state != Serving {
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
	e.call(r, &wire.Request{Kind: wire.Seal}, func(rep *wire.Reply) {
		if r.join != jn {
			return
		}
		if rep.Status != status.OK {
			e.abortJoin(r, rep.Err().Error())
			return
		}
		r.incarnation = rep.Incarnation
		r.sealed = true
		jn.phase, jn.from = joinDrain, ids.MakeVersion(e.epoch, e.counter+1)
	})
}

func (e *Engine) stepJoin(r *replica, jn *join) {
	switch jn.phase {
	case joinDrain:
		if e.inFlight.lowest() < jn.from {
			return
		}
		jn.phase = joinCopy
		for _, c := range e.chunks {
			if slices.Contains(c.replicas, r) {
				jn.queue = append(jn.queue, c)
			}
		}
		slices.SortFunc(jn.queue, func(a, b *chunk) int { return int(a.index) - int(b.index) })
		e.stepJoin(r, jn)
	case joinCopy:
		for jn.active < joinChunks && len(jn.queue) > 0 && r.join == jn {
			c := jn.queue[0]
			jn.queue = jn.queue[1:]
			jn.active++
			e.compareChunk(r, jn, c)
		}
		if jn.active == 0 && len(jn.queue) == 0 && r.join == jn {
			e.require(r, jn)
		}
	case joinSettle:
		if e.answeredUpTo(r, jn.mark) {
			jn.phase = joinSettling
			e.settleJoin(r, jn)
		}
	}
}

// require counts the joiner from now on, for what is in flight too.
func (e *Engine) require(r *replica, jn *join) {
	jn.required, jn.phase, jn.mark = true, joinSettle, e.counter
	for _, j := range e.inFlight.all() {
		for pos, o := range j.c.replicas {
			if o == r {
				j.need |= 1 << pos
				e.sendJob(j, pos)
				e.check(j)
			}
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
	r.inSync, r.intact, r.join = true, true, nil
	e.stats.Joined++
	if dead || !r.up {
		e.exclude(r, r.why)
		return
	}
	e.resume(r)
}

// abortJoin gives a join up. One whose addition is being committed stays
// required until the outcome is known.
func (e *Engine) abortJoin(r *replica, why string) {
	if r.join == nil {
		return
	}
	r.why = why
	if e.member.adding == r {
		r.join.dead = true
		return
	}
	r.join = nil
	r.joinAfter = e.now + joinBackoff
	e.letGo(r)
}

// survivor picks the in-sync replica a joiner copies a chunk from.
func (e *Engine) survivor(c *chunk) *replica {
	var best *replica
	for _, r := range c.replicas {
		if r.inSync && r.up && r.sealed && !r.excluding && (best == nil || r.local) {
			best = r
		}
	}
	return best
}

// pair asks the same of the joiner and a survivor and continues with both
// answers; a failure of either gives the join up.
func (e *Engine) pair(r *replica, jn *join, s *replica, q wire.Request, then func(joiner, survivor *wire.Reply)) {
	var a, b *wire.Reply
	got := func() {
		if r.join != jn || a == nil || b == nil {
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
func (e *Engine) compareChunk(r *replica, jn *join, c *chunk) {
	s := e.survivor(c)
	if s == nil {
		e.abortJoin(r, "no in-sync replica to copy from can be reached")
		return
	}
	q := wire.Request{Kind: wire.Digest, Chunk: c.id, Count: e.perChunk, Limit: jn.from}
	e.pair(r, jn, s, q, func(joiner, survivor *wire.Reply) {
		var ranges []int
		for i := range max(len(joiner.Digests), len(survivor.Digests)) {
			if i >= len(joiner.Digests) || i >= len(survivor.Digests) || joiner.Digests[i] != survivor.Digests[i] {
				ranges = append(ranges, i)
			}
		}
		e.copyRanges(r, jn, s, c, ranges)
	})
}

func (e *Engine) copyRanges(r *replica, jn *join, s *replica, c *chunk, ranges []int) {
	if len(ranges) == 0 {
		jn.active--
		e.stepJoin(r, jn)
		return
	}
	first := uint32(ranges[0]) * wire.DigestBlocks
	q := wire.Request{Kind: wire.List, Chunk: c.id, Block: ids.Block(first), Count: min(wire.DigestBlocks, e.perChunk-first)}
	e.pair(r, jn, s, q, func(joiner, survivor *wire.Reply) {
		copies, direct := difference(jn.from, joiner.Entries, survivor.Entries)
		next := func() { e.copyRanges(r, jn, s, c, ranges[1:]) }
		e.install(r, jn, c, direct, nil, func() { e.copyRuns(r, jn, s, c, copies, next) })
	})
}

// difference compares what joiner and survivor hold below from. copies are
// blocks to read from the survivor; direct are states without data.
func difference(from ids.Version, joiner, survivor []wire.Entry) (copies []ids.Block, direct []wire.Entry) {
	mine := map[ids.Block]wire.Entry{}
	for _, en := range joiner {
		mine[en.Block] = en
	}
	for _, en := range survivor {
		m, ok := mine[en.Block]
		delete(mine, en.Block)
		switch {
		case en.Version >= from || (ok && m.Version >= from):
		case ok && m.Version == en.Version && m.Kind == en.Kind && m.Sum == en.Sum:
		case en.Kind == wire.EntryData:
			copies = append(copies, en.Block)
		default:
			direct = append(direct, en)
		}
	}
	for _, m := range mine { // the survivor has a hole
		if m.Version < from {
			direct = append(direct, wire.Entry{Chunk: m.Chunk, Layer: m.Layer, Block: m.Block, Kind: wire.EntryHole})
		}
	}
	slices.Sort(copies)
	return copies, direct
}

// copyRuns reads runs of blocks from the survivor and installs them.
func (e *Engine) copyRuns(r *replica, jn *join, s *replica, c *chunk, blocks []ids.Block, then func()) {
	if len(blocks) == 0 {
		then()
		return
	}
	n := 1
	for n < len(blocks) && n < copyWindow && blocks[n] == blocks[0]+ids.Block(n) {
		n++
	}
	q := &wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Chunk: c.id, Block: blocks[0], Count: uint32(n)}
	e.call(s, q, func(rep *wire.Reply) {
		if r.join != jn {
			return
		}
		if rep.Status == status.OK && (len(rep.Entries) != n || len(rep.Data) != n*ids.BlockSize || !e.entriesMatch(c.id, rep.Entries, rep.Data)) {
			rep = &wire.Reply{Kind: wire.Read, Status: status.Corrupt, Detail: "the survivor's blocks do not match their checksums"}
		}
		if rep.Status != status.OK {
			e.abortJoin(r, rep.Err().Error())
			return
		}
		var es []wire.Entry
		var data []byte
		for i, en := range rep.Entries {
			if en.Version >= jn.from {
				continue // overwritten meanwhile: the joiner gets that write itself
			}
			es = append(es, en)
			if en.Kind == wire.EntryData {
				data = append(data, rep.Data[i*ids.BlockSize:(i+1)*ids.BlockSize]...)
			}
		}
		e.install(r, jn, c, es, data, func() { e.copyRuns(r, jn, s, c, blocks[n:], then) })
	})
}

// install gives the joiner the survivor's state of some blocks.
func (e *Engine) install(r *replica, jn *join, c *chunk, es []wire.Entry, data []byte, then func()) {
	if len(es) == 0 {
		then()
		return
	}
	q := &wire.Request{Kind: wire.Install, Chunk: c.id, Limit: jn.from, Entries: es, Data: data}
	e.call(r, q, func(rep *wire.Reply) {
		if r.join != jn {
			return
		}
		if rep.Status != status.OK {
			e.abortJoin(r, rep.Err().Error())
			return
		}
		r.joinedBytes += uint64(len(data))
		then()
	})
}

func sortKeys(ks []blockKey) {
	slices.SortFunc(ks, func(a, b blockKey) int {
		if a.chunk != b.chunk {
			if a.chunk < b.chunk {
				return -1
			}
			return 1
		}
		if a.layer != b.layer {
			return int(a.layer) - int(b.layer)
		}
		return int(a.block) - int(b.block)
	})
}
