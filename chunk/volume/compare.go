package volume

import (
	"cmp"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// A write that a disk has lost without a trace, or put elsewhere, leaves a copy
// that is sound in itself: no checksum tells. So the in-sync copies of a chunk
// are compared, one chunk after the other for ever:
//
//	1 compareNext    fixes a version; waits until every copy has all below it
//	2 compareDigests asks for digests per 4 MiB below it
//	3 compareRanges  lists the ranges that differ
//	4 mend           gives copies that are behind what the newest one has
//
// The newest state of a block is the right one: below the version all copies
// were given the same. What was written since is left out. While a deleted layer
// is merged nothing is compared: copies may then hold a block under either layer.

// compareEvery is the pause between two chunks: a TiB takes a day.
const compareEvery = 5 * time.Second

// comparing is the chunk that is compared now.
type comparing struct {
	c      *chunk
	limit  ids.Version // below it all copies are to be equal
	among  []*replica  // nil: some have not accepted all below limit yet
	ranges []int       // that differ, by number
}

// compareNext begins with the next chunk when it is time, or goes on waiting.
func (e *Engine) compareNext() {
	if e.state != Serving || e.reclaiming() || len(e.replicas) < 2 {
		e.compare = nil
		return
	}
	if e.compareAt == 0 {
		e.compareAt = e.now + compareEvery
	}
	if e.compare == nil && e.now >= e.compareAt {
		e.compareAt = e.now + compareEvery
		if cs := e.sortedChunks(); len(cs) > 0 {
			e.compare = &comparing{c: cs[e.compared%len(cs)], limit: ids.MakeVersion(e.epoch, e.counter+1)}
			e.compared++
		}
	}
	cp := e.compare
	if cp != nil && slices.ContainsFunc(cp.among, func(r *replica) bool { return !r.readable() }) {
		e.compare = nil
		return
	}
	if cp == nil || cp.among != nil {
		return
	}
	readable := 0
	for pos, r := range cp.c.replicas {
		if cp.c.fills[pos] == nil && r.readable() {
			readable++
		}
	}
	if among := e.sources(cp.c, cp.limit); readable < 2 {
		e.compare = nil
	} else if len(among) == readable {
		cp.among = among
		e.compareDigests(cp)
	}
}

// ask asks all copies the same and continues with their answers, in the order
// of among; a failure ends the comparison, until the chunk's next turn.
func (cp *comparing) ask(e *Engine, q wire.Request, then func(reps []*wire.Reply)) {
	reps, left := make([]*wire.Reply, len(cp.among)), len(cp.among)
	for i, r := range cp.among {
		mine := q
		e.call(r, &mine, func(rep *wire.Reply) {
			reps[i] = rep
			if left--; left > 0 || e.compare != cp {
				return
			}
			if e.state != Serving || e.reclaiming() || slices.ContainsFunc(reps, func(rep *wire.Reply) bool { return rep.Status != status.OK }) {
				e.compare = nil
				return
			}
			then(reps)
		})
	}
}

func (e *Engine) compareDigests(cp *comparing) {
	cp.ask(e, wire.Request{Kind: wire.Digest, Chunk: cp.c.id, Count: e.perChunk, Limit: cp.limit}, func(reps []*wire.Reply) {
		for i := range int(e.perChunk+wire.DigestBlocks-1) / wire.DigestBlocks {
			if slices.ContainsFunc(reps, func(rep *wire.Reply) bool { return digestOf(rep, i) != digestOf(reps[0], i) }) {
				cp.ranges = append(cp.ranges, i)
			}
		}
		e.compareRanges(cp)
	})
}

func digestOf(rep *wire.Reply, i int) uint64 {
	if i < len(rep.Digests) {
		return rep.Digests[i]
	}
	return 0
}

// compareRanges lists one range after the other, and mends it.
func (e *Engine) compareRanges(cp *comparing) {
	if len(cp.ranges) == 0 {
		e.compare = nil
		return
	}
	first := uint32(cp.ranges[0]) * wire.DigestBlocks
	cp.ranges = cp.ranges[1:]
	q := wire.Request{Kind: wire.List, Chunk: cp.c.id, Block: ids.Block(first), Count: min(wire.DigestBlocks, e.perChunk-first)}
	cp.ask(e, q, func(reps []*wire.Reply) {
		lists := make([]map[place]wire.Entry, len(reps))
		for i, rep := range reps {
			lists[i] = byPlace(rep.Entries)
		}
		e.mend(cp, newest(cp.limit, lists), lists, 0)
	})
}

// mend gives the i-th copy, and then the others, what they are behind in.
func (e *Engine) mend(cp *comparing, best map[place]wire.Entry, lists []map[place]wire.Entry, i int) {
	if i == len(cp.among) {
		e.compareRanges(cp)
		return
	}
	r, lost := cp.among[i], behind(best, lists[i])
	e.stats.Stale += uint64(len(lost))
	others := slices.DeleteFunc(slices.Clone(cp.among), func(o *replica) bool { return o == r })
	t := &transfer{from: others, to: []*replica{r}, limit: cp.limit, paced: true, runs: runs(lost),
		live: func() bool { return e.compare == cp && e.state == Serving && r.readable() }}
	t.ended = func(f *failure) {
		if f != nil || !t.live() {
			e.compare = nil
			return
		}
		e.mend(cp, best, lists, i+1)
	}
	e.runTransfer(t)
}

// place is where a block's state lies within a chunk.
type place struct {
	layer ids.LayerID
	block ids.Block
}

func comparePlaces(a, b wire.Entry) int {
	return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Block, b.Block))
}

func byPlace(es []wire.Entry) map[place]wire.Entry {
	out := make(map[place]wire.Entry, len(es))
	for _, en := range es {
		out[place{en.Layer, en.Block}] = en
	}
	return out
}

// newest is the newest state of each block, data before poison; blocks that
// any copy has from limit on are left out.
func newest(limit ids.Version, lists []map[place]wire.Entry) map[place]wire.Entry {
	best := map[place]wire.Entry{}
	for _, l := range lists {
		for p, en := range l {
			b, ok := best[p]
			if !ok || en.Version > b.Version || en.Version == b.Version && b.Kind == wire.EntryPoison {
				best[p] = en
			}
		}
	}
	for p, en := range best {
		if en.Version >= limit {
			delete(best, p)
		}
	}
	return best
}

// behind lists the states that a copy lacks: what has no data, then what has,
// each by place. Two different ones of one version are not its business: whichever
// is wrong, fails its checksum.
func behind(best, mine map[place]wire.Entry) []wire.Entry {
	var direct, data []wire.Entry
	for p, en := range best {
		m, ok := mine[p]
		switch {
		case ok && m.Version >= en.Version && (m.Kind != wire.EntryPoison || en.Kind == wire.EntryPoison):
		case en.Kind == wire.EntryData:
			data = append(data, en)
		default:
			direct = append(direct, en)
		}
	}
	slices.SortFunc(direct, comparePlaces)
	slices.SortFunc(data, comparePlaces)
	return append(direct, data...)
}
