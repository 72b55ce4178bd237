package volume

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// catchUp is one replica being given, chunk by chunk, the state that others have
// below a version: what a join and the filling of a new copy have in common. It
// keeps no progress: digests tell what is there already, so that it goes on after
// any interruption with what is left.
type catchUp struct {
	r      *replica
	from   ids.Version // below it the source's state is taken, even where that is older or a hole
	live   func() bool // whether anybody still waits for this
	fail   func(why string)
	copied func(bytes uint64)
	done   func() // a chunk is equal
}

// pair asks the same of the one that catches up and a source and continues with
// both answers; a failure of either ends it, and a source whose copy has moved away
// meanwhile: it was dropped, and may be back with what was sent late.
func (e *Engine) pair(k *catchUp, c *chunk, s *replica, q wire.Request, then func(mine, theirs *wire.Reply)) {
	var a, b *wire.Reply
	got := func() {
		if !k.live() || a == nil || b == nil {
			return
		}
		for _, rep := range []*wire.Reply{a, b} {
			if err := rep.Err(); err != nil {
				k.fail(err.Error())
				return
			}
		}
		if !c.shows(s) {
			k.fail("the copy that was asked may have moved away")
			return
		}
		then(a, b)
	}
	qa, qb := q, q
	qa.Flags |= wire.FlagFilled
	e.call(k.r, &qa, func(rep *wire.Reply) { a = rep; got() })
	e.call(s, &qb, func(rep *wire.Reply) { b = rep; got() })
}

// compareChunk compares digests per 4 MiB and copies the ranges that differ.
func (e *Engine) compareChunk(k *catchUp, c *chunk, sources []*replica) {
	q := wire.Request{Kind: wire.Digest, Chunk: c.id, Count: e.perChunk, Limit: k.from}
	e.pair(k, c, sources[0], q, func(mine, theirs *wire.Reply) {
		var ranges []int
		for i := range max(len(mine.Digests), len(theirs.Digests)) {
			if i >= len(mine.Digests) || i >= len(theirs.Digests) || mine.Digests[i] != theirs.Digests[i] {
				ranges = append(ranges, i)
			}
		}
		e.copyRanges(k, c, sources, ranges)
	})
}

// copyRanges lists and copies one range after the other.
func (e *Engine) copyRanges(k *catchUp, c *chunk, sources []*replica, ranges []int) {
	if slices.ContainsFunc(sources, func(s *replica) bool { return !c.shows(s) }) {
		k.fail("a copy that was read from may have moved away")
		return
	}
	if len(ranges) == 0 {
		k.done()
		return
	}
	first := uint32(ranges[0]) * wire.DigestBlocks
	q := wire.Request{Kind: wire.List, Chunk: c.id, Block: ids.Block(first), Count: min(wire.DigestBlocks, e.perChunk-first)}
	e.pair(k, c, sources[0], q, func(mine, theirs *wire.Reply) {
		t := &transfer{from: sources, to: []*replica{k.r}, limit: k.from, paced: true, runs: runs(difference(k.from, mine.Entries, theirs.Entries)),
			live: k.live,
			hope: func() bool {
				for pos, o := range c.replicas {
					if c.fills[pos] == nil && o.inSync && !slices.Contains(sources, o) {
						return true
					}
				}
				return false
			}}
		t.ended = func(f *failure) {
			e.stats.CopiedBytes += t.bytes
			k.copied(t.bytes)
			if f != nil {
				k.fail(f.rep.Err().Error())
				return
			}
			e.copyRanges(k, c, sources, ranges[1:])
		}
		e.runTransfer(t)
	})
}

// difference lists what the joiner is to be given of the survivor's states below
// from: data to be read, and states without data. Sorted by layer and block within
// each.
func difference(from ids.Version, joiner, survivor []wire.Entry) []wire.Entry {
	mine := byPlace(joiner)
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
	slices.SortFunc(data, comparePlaces)
	slices.SortFunc(direct, comparePlaces)
	return append(direct, data...)
}
