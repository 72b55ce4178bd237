package volume

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// What differs between two snapshots is known without reading data: it is the
// blocks that the layers between them have. One in-sync replica of each chunk is
// asked for its entries (wire.List), range by range.
//
// A block that was written with what it had counts as changed, and one that is
// being written may be in the list or not. Merging deleted layers changes nothing:
// their blocks go to a layer on the same side.

// Between lists the layers whose blocks differ between two of a volume: those
// below one of them and not below the other. chain is what a read of `to` looks
// through, newest first. ok is false if one of them is not there. from nil: all
// that `to` shows.
func Between(all []*pb.Layer, top ids.LayerID, from *ids.LayerID, to ids.LayerID) (differ, chain []ids.LayerID, ok bool) {
	has := func(l ids.LayerID) bool {
		return l == top || slices.ContainsFunc(all, func(x *pb.Layer) bool { return ids.LayerID(x.Id) == l })
	}
	if !has(to) || from != nil && !has(*from) {
		return nil, nil, false
	}
	chain = append([]ids.LayerID{to}, chainOf(all, to)...)
	if from == nil {
		return chain, chain, true
	}
	old := append([]ids.LayerID{*from}, chainOf(all, *from)...)
	for _, l := range chain {
		if !slices.Contains(old, l) {
			differ = append(differ, l)
		}
	}
	for _, l := range old {
		if !slices.Contains(chain, l) {
			differ = append(differ, l)
		}
	}
	return differ, chain, true
}

// List asks which blocks of a chunk some layers have; the answer comes in
// Out.Listed.
type List struct {
	Index  ids.ChunkIndex
	Layers []ids.LayerID // any of these
	Chain  []ids.LayerID // what a read looks through, newest first: decides what is zero
	User   any           // the shell's
}

func (*List) event() {}

// Listed answers a List.
type Listed struct {
	List   *List
	Runs   []BlockRun // by place, none touching the next of its kind
	Status status.Kind
	Why    string
}

// BlockRun is consecutive blocks of a chunk.
type BlockRun struct {
	First ids.Block
	Count uint32
	Zero  bool // they read as zeros
}

// listing is a List under way.
type listing struct {
	ev      *List
	c       *chunk
	entries map[ids.Block]wire.Entry // the newest in Chain, or any
	next    uint32                   // the next block to ask for
	asked   []*replica               // that failed this range
	why     string                   // the last one did
}

// beginList starts a List, or answers it at once.
func (e *Engine) beginList(ev *List) {
	c := e.chunks[ev.Index]
	switch {
	case e.state != Serving:
		e.out.Listed = append(e.out.Listed, Listed{List: ev, Status: status.Unavailable, Why: "the volume is " + e.state.String()})
	case c == nil || c.id == 0:
		e.out.Listed = append(e.out.Listed, Listed{List: ev})
	default:
		e.listMore(&listing{ev: ev, c: c, entries: map[ids.Block]wire.Entry{}})
	}
}

// listMore asks for the next range, or answers.
func (e *Engine) listMore(l *listing) {
	if l.next >= e.perChunk {
		e.out.Listed = append(e.out.Listed, Listed{List: l.ev, Runs: l.runs()})
		return
	}
	r := e.listSource(l)
	if e.state != Serving || r == nil {
		if l.why == "" {
			l.why = "no replica in sync can be reached"
		}
		e.out.Listed = append(e.out.Listed, Listed{List: l.ev, Status: status.Unavailable, Why: l.why})
		return
	}
	q := &wire.Request{Kind: wire.List, Chunk: l.c.id, Block: ids.Block(l.next), Count: min(wire.DigestBlocks, e.perChunk-l.next)}
	e.call(r, q, func(rep *wire.Reply) {
		if rep.Status != status.OK || !l.c.shows(r) {
			l.asked, l.why = append(l.asked, r), rep.Detail
		} else {
			l.take(rep.Entries)
			l.next, l.asked = l.next+q.Count, nil
		}
		e.listMore(l)
	})
}

// listSource is a replica that has all of the chunk and has not failed.
func (e *Engine) listSource(l *listing) (best *replica) {
	for pos, r := range l.c.replicas {
		if l.c.fills[pos] == nil && r.readable() && !slices.Contains(l.asked, r) && (best == nil || r.local) {
			best = r
		}
	}
	return best
}

// take enters what a replica has of the layers asked about. Newer layers of the
// chain hide older ones; layers beside the chain say only that a block differs.
func (l *listing) take(es []wire.Entry) {
	for _, en := range es {
		if en.Kind == wire.EntryHole || !slices.Contains(l.ev.Layers, en.Layer) {
			continue
		}
		if !slices.Contains(l.ev.Chain, en.Layer) {
			en.Layer, en.Kind = 0, wire.EntryData
			if _, ok := l.entries[en.Block]; ok {
				continue
			}
		} else if old, ok := l.entries[en.Block]; ok && old.Layer > en.Layer {
			continue
		}
		l.entries[en.Block] = en
	}
}

func (l *listing) runs() (out []BlockRun) {
	blocks := make([]ids.Block, 0, len(l.entries))
	for b := range l.entries {
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	for _, b := range blocks {
		zero := l.entries[b].Kind == wire.EntryZero
		if k := len(out); k > 0 && out[k-1].First+ids.Block(out[k-1].Count) == b && out[k-1].Zero == zero {
			out[k-1].Count++
		} else {
			out = append(out, BlockRun{b, 1, zero})
		}
	}
	return out
}

// Layers returns the volume's layers as metadata has them, none if there is only
// the top, and the top.
func (e *Engine) Layers() ([]*pb.Layer, ids.LayerID) { return e.layers.all, e.layers.top }

// Chunks lists the indexes of the chunks there are.
func (e *Engine) Chunks() (out []ids.ChunkIndex) {
	for _, c := range e.sortedChunks() {
		if c.id != 0 {
			out = append(out, c.index)
		}
	}
	return out
}
