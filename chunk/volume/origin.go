package volume

import (
	"fmt"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a read of a clone:
//
//  1. The clone's own chunk is read first, with the entries that say which blocks
//     no layer of it has.
//  2. Those are read from the origin's chunk at the same place, through the
//     layers from the cloned snapshot down, on any store that has them; what is
//     missing there, from the origin's origin.
//  3. What nobody has is zeros.
//
// Nothing is written to those layers any more, so no lease, seal or epoch of the
// origin matters. A store holds them whole if it was in sync, under the same
// incarnation, at any time since the snapshot: its reply names its incarnation,
// which has to be the one that metadata called in sync. It holds them until
// metadata lets them go, and then answers so. A store that cannot serve makes the
// engine ask metadata again where the layers are.
//
// A copy of a chunk that moved away is dropped, and may come back: by a late write
// of the origin's writer, or as a copy that is being made. Then it is not whole, and
// what it lacks is no hole. So a store tells with each answer which life of its copy
// the answer is from, and a life is believed once metadata, asked after it was told
// of, says that the copy counts: from then on until it is dropped the copy is whole.
// Lives are told when a connection comes up, so that a read seldom waits for this and
// a guest goes on when metadata does not; a life nobody has told of yet costs the
// first read one question.
//
// An engine without members whose one origin is the volume itself is a snapshot
// that somebody looks at (Config.ReadOnly).

// origin is a volume read through, from a snapshot on down.
type origin struct {
	volume ids.VolumeID
	head   ids.LayerID
	chain  []ids.LayerID
	size   uint64 // bytes that show from here
	chunks map[ids.ChunkIndex]*originChunk
}

type originChunk struct {
	id      ids.ChunkID
	sources []*source
}

// source is a store that holds an origin's chunk.
type source struct {
	r           *replica
	incarnation ids.Incarnation
	gen         uint64 // the connection over which life was told
	life        uint64 // of its copy, as it is whole; 0: not known
}

// testimony is lives that a store has told of, for metadata to confirm.
type testimony struct {
	by          *replica
	gen         uint64
	incarnation ids.Incarnation
	volume      ids.VolumeID
	lives       map[ids.ChunkID]uint64
	call        *MetaCall // the question that was asked after it was given; nil: not asked yet
	index       ids.ChunkIndex
	view        *view // waits for it; nil: none
}

// view is a run of blocks being read from an origin.
type view struct {
	rd    *read
	level int // 1: the origin
	first ids.Block
	count uint32
	dst   []byte // count blocks
	bad   map[ids.StoreID]bool
	looks int // times metadata was asked where the layers are
	news  int // e.originNews of its last question
}

// maxLooks bounds how often a view asks metadata where its layers are.
const maxLooks = 5

// takeOrigins enters what a clone reads through, nearest first, and confirms the
// lives of copies that were told of before call was asked; nil: nobody asked.
func (e *Engine) takeOrigins(os []*pb.OriginState, call *MetaCall) error {
	var out []*origin
	size := ^uint64(0)
	for _, s := range os {
		v := s.Volume
		if v == nil || v.ChunkBytes != uint64(e.perChunk)*ids.BlockSize {
			return status.Errorf(status.Internal, "an origin of volume %d has chunks of %d bytes, the volume of %d", e.volume, v.GetChunkBytes(), uint64(e.perChunk)*ids.BlockSize)
		}
		size = min(size, s.SizeBytes)
		o := &origin{volume: ids.VolumeID(v.Id), head: ids.LayerID(s.Layer), chain: chainOf(v.Layers, ids.LayerID(s.Layer)), size: size, chunks: map[ids.ChunkIndex]*originChunk{}}
		whole := map[ids.StoreID]source{}
		for _, m := range v.Members {
			id, err := ids.StoreIDFromBytes(m.Store)
			if err == nil && m.InSync {
				whole[id] = source{r: e.sourceFor(id, m), incarnation: ids.Incarnation(m.Incarnation)}
			}
		}
		before := e.originOf(o.volume)
		for _, c := range s.Chunks {
			i := ids.ChunkIndex(c.Index)
			oc := &originChunk{id: ids.ChunkID(c.Id)}
			for _, b := range c.Stores {
				if id, err := ids.StoreIDFromBytes(b); err == nil && whole[id].r != nil {
					n := whole[id]
					if old := before.source(i, oc.id, n.r); old != nil && old.incarnation == n.incarnation {
						n.gen, n.life = old.gen, old.life
					}
					oc.sources = append(oc.sources, &n)
				}
			}
			o.chunks[i] = oc
		}
		out = append(out, o)
	}
	e.origins = out
	e.originNews++
	if call != nil {
		e.believe(call)
	}
	e.askLives()
	e.retryViews()
	return nil
}

// originOf returns the origin that is a volume; nil if none is.
func (e *Engine) originOf(v ids.VolumeID) *origin {
	for _, o := range e.origins {
		if o.volume == v {
			return o
		}
	}
	return nil
}

// source returns a store among those of a chunk; nil if it is none, as of no origin.
func (o *origin) source(i ids.ChunkIndex, id ids.ChunkID, r *replica) *source {
	if o == nil || o.chunks[i] == nil || o.chunks[i].id != id {
		return nil
	}
	for _, s := range o.chunks[i].sources {
		if s.r == r {
			return s
		}
	}
	return nil
}

// askLives has each source tell the lives of its copies, once per connection.
func (e *Engine) askLives() {
	for _, o := range e.origins {
		asked := map[*replica]bool{}
		for _, c := range o.chunks {
			for _, s := range c.sources {
				if !s.r.up || asked[s.r] || s.r.told[o.volume] == s.r.gen {
					continue
				}
				asked[s.r] = true
				t := &testimony{by: s.r, gen: s.r.gen, incarnation: s.incarnation, volume: o.volume, lives: map[ids.ChunkID]uint64{}}
				if s.r.told == nil {
					s.r.told = map[ids.VolumeID]uint64{}
				}
				s.r.told[o.volume] = s.r.gen
				e.call(s.r, &wire.Request{Kind: wire.List, Flags: wire.FlagFrozen, Volume: o.volume}, func(rep *wire.Reply) {
					if rep.Status != status.OK || rep.Incarnation != t.incarnation {
						return // what it says of each chunk later is asked about then
					}
					for i := 0; i+1 < len(rep.Digests); i += 2 {
						t.lives[ids.ChunkID(rep.Digests[i])] = rep.Digests[i+1]
					}
					if len(t.lives) > 0 {
						e.testify(t)
					}
				})
			}
		}
	}
}

// testify has metadata asked whether the copies that a store tells of count.
func (e *Engine) testify(t *testimony) {
	e.told = append(e.told, t)
	if e.look == nil { // else after that one, which was asked before
		e.lookAgain()
		t.call = e.look
	}
}

// believe takes for whole the lives that were told before call was asked, of the
// copies that count by its answer.
func (e *Engine) believe(call *MetaCall) {
	for _, t := range e.told {
		if t.call != call || t.gen != t.by.gen || !t.by.up {
			continue
		}
		o := e.originOf(t.volume)
		switch {
		case o == nil:
		case t.view != nil:
			t.believe(o, t.index)
		default:
			for i := range o.chunks {
				t.believe(o, i)
			}
		}
	}
}

// believe takes for whole what a testimony says of a chunk, if it counts.
func (t *testimony) believe(o *origin, i ids.ChunkIndex) {
	c := o.chunks[i]
	if c == nil || t.lives[c.id] == 0 {
		return
	}
	if s := o.source(i, c.id, t.by); s != nil && s.incarnation == t.incarnation {
		s.gen, s.life = t.gen, t.lives[c.id]
	}
}

// looked goes on after a question to metadata: the views that waited for it ask
// again, and what was told since is asked about.
func (e *Engine) looked(call *MetaCall) {
	told := e.told
	e.told = nil
	for _, t := range told {
		switch {
		case t.call != call:
			e.testify(t)
		case t.view != nil:
			e.startView(t.index, t.view)
		}
	}
}

// sourceFor returns the link to a store, opened if there is none.
func (e *Engine) sourceFor(id ids.StoreID, m *pb.Member) *replica {
	if r := e.byStore[id]; r != nil {
		if r.gone && !r.foreign {
			r.foreign = true
			e.out.Links = append(e.out.Links, LinkAction{r.index, true})
		}
		if r.foreign {
			r.host, r.addr = m.Host, m.DataAddr
		}
		return r
	}
	r := &replica{index: len(e.replicas), store: id, host: m.Host, addr: m.DataAddr, local: m.Host == e.cfg.Host, gone: true, foreign: true}
	e.replicas = append(e.replicas, r)
	e.byStore[id] = r
	e.out.Links = append(e.out.Links, LinkAction{r.index, true})
	return r
}

// isSource reports whether a store holds something of an origin.
func (e *Engine) isSource(r *replica) bool {
	for _, o := range e.origins {
		for _, c := range o.chunks {
			for _, s := range c.sources {
				if s.r == r {
					return true
				}
			}
		}
	}
	return false
}

// originHas reports whether an origin may show something in a chunk.
func (e *Engine) originHas(i ids.ChunkIndex) bool {
	for _, o := range e.origins {
		if o.chunks[i] != nil && uint64(i)*uint64(e.perChunk)*ids.BlockSize < o.size {
			return true
		}
	}
	return false
}

// OriginChunks lists the chunks in which an origin may show something.
func (e *Engine) OriginChunks() (out []ids.ChunkIndex) {
	for i := ids.ChunkIndex(0); uint64(i)*uint64(e.perChunk)*ids.BlockSize < e.size; i++ {
		if e.originHas(i) {
			out = append(out, i)
		}
	}
	return out
}

// viewAll reads a piece of which the volume itself has nothing.
func (e *Engine) viewAll(c *chunk, p piece) {
	rd := e.newRead()
	rd.op, rd.piece, rd.c = p.op, p, c
	rd.first, rd.count = e.blocks(p)
	rd.buf = make([]byte, int(rd.count)*ids.BlockSize)
	e.beginViews(rd, []run{{0, rd.count}})
}

// run is consecutive blocks of a read.
type run struct{ at, n uint32 }

// holesOf lists the runs of blocks nobody has an entry for.
func holesOf(es []wire.Entry) (out []run) {
	for i := range es {
		if es[i].Kind != wire.EntryHole {
			continue
		}
		if k := len(out); k > 0 && out[k-1].at+out[k-1].n == uint32(i) {
			out[k-1].n++
		} else {
			out = append(out, run{uint32(i), 1})
		}
	}
	return out
}

// beginViews fills the holes of a read, whose data is in rd.buf, from origins.
func (e *Engine) beginViews(rd *read, holes []run) {
	rd.until = e.counter
	rd.views = 1 // until all are begun
	e.viewing = append(e.viewing, rd)
	index := ids.ChunkIndex(rd.piece.off / (uint64(e.perChunk) * ids.BlockSize))
	for _, h := range holes {
		rd.views++
		e.startView(index, &view{rd: rd, level: 1, first: rd.first + ids.Block(h.at), count: h.n,
			dst: rd.buf[h.at*ids.BlockSize : (h.at+h.n)*ids.BlockSize]})
	}
	e.viewDone(rd, status.OK)
}

// startView finds the next origin that may have a view's blocks, and asks it.
func (e *Engine) startView(i ids.ChunkIndex, v *view) {
	if len(e.origins) == 0 { // flattened meanwhile: the clone has it
		v.rd.again = true
		e.viewDone(v.rd, status.OK)
		return
	}
	for ; v.level <= len(e.origins); v.level++ {
		o := e.origins[v.level-1]
		begin := (uint64(i)*uint64(e.perChunk) + uint64(v.first)) * ids.BlockSize
		if begin >= o.size { // nor does any further one show here
			break
		}
		if n := (o.size - begin) / ids.BlockSize; n < uint64(v.count) {
			clear(v.dst[n*ids.BlockSize:])
			v.count, v.dst = uint32(n), v.dst[:n*ids.BlockSize]
		}
		if oc := o.chunks[i]; oc != nil {
			e.ask(i, o, oc, v)
			return
		}
	}
	clear(v.dst)
	e.viewDone(v.rd, status.OK)
}

// ask sends a view to a source that has not failed it: the local one, else the
// least busy one.
func (e *Engine) ask(i ids.ChunkIndex, o *origin, oc *originChunk, v *view) {
	best, left := (*source)(nil), false
	for _, s := range oc.sources {
		switch {
		case v.bad[s.r.store]:
		case !s.r.up:
			left = true
		case best == nil || !best.r.local && (s.r.local || s.r.busy < best.r.busy):
			best = s
		}
	}
	if best == nil {
		e.waitView(i, v, left)
		return
	}
	q := &wire.Request{Kind: wire.Read, Flags: wire.FlagEntries | wire.FlagFrozen, Volume: o.volume, Chunk: oc.id, Layer: o.head, Chain: o.chain, Block: v.first, Count: v.count}
	gen := best.r.gen
	e.call(best.r, q, func(rep *wire.Reply) {
		if e.state != Ended {
			e.viewReply(i, o, best, gen, v, q, rep)
		}
	})
}

// waitView keeps a view that nobody can serve now. When all sources have failed
// it, metadata is asked again where the layers are, a few times.
func (e *Engine) waitView(i ids.ChunkIndex, v *view, hope bool) {
	if !hope {
		if v.looks >= maxLooks {
			e.viewDone(v.rd, status.IO)
			return
		}
		v.looks++
		v.bad = nil
		v.news = e.originNews
		e.lookAgain()
	}
	e.stuckViews = append(e.stuckViews, stuckView{i, v, !hope})
}

type stuckView struct {
	index ids.ChunkIndex
	v     *view
	look  bool // it waits for news
}

// retryViews asks again for views that found no source.
func (e *Engine) retryViews() {
	stuck := e.stuckViews
	e.stuckViews = nil
	for _, s := range stuck {
		if s.look && s.v.news == e.originNews && e.look != nil {
			e.stuckViews = append(e.stuckViews, s)
			continue
		}
		e.startView(s.index, s.v)
	}
}

// viewReply takes a source's answer over a connection.
func (e *Engine) viewReply(i ids.ChunkIndex, o *origin, s *source, gen uint64, v *view, q *wire.Request, rep *wire.Reply) {
	k := rep.Status
	if k == status.OK && (rep.Incarnation != s.incarnation || len(rep.Entries) != int(v.count) || len(rep.Data) != int(v.count)*ids.BlockSize) {
		k = status.Unavailable
	}
	if k == status.OK && !entriesMatch(o.volume, q, rep.Entries, rep.Data) {
		k = status.Corrupt
	}
	switch {
	case k == status.OK && rep.Count64 != 0 && (s.gen != gen || s.life != rep.Count64): // an older store tells none
		e.testify(&testimony{by: s.r, gen: gen, incarnation: s.incarnation, volume: o.volume,
			lives: map[ids.ChunkID]uint64{q.Chunk: rep.Count64}, index: i, view: v})
		return
	case k == status.OK:
		e.viewed(i, v, rep)
		return
	case k == status.NotFound && rep.Count64 > 0 && rep.Incarnation == s.incarnation && v.looks > 0 && v.news < e.originNews:
		// Metadata has just said again that the chunk is there, and in sync:
		// nothing was ever written to it.
		v.level++
		e.startView(i, v)
		return
	case (k == status.Corrupt || k == status.Poison) && v.count > 1:
		half := v.count / 2
		v.rd.views++
		rest := &view{rd: v.rd, level: v.level, first: v.first + ids.Block(half), count: v.count - half, dst: v.dst[half*ids.BlockSize:]}
		v.count, v.dst = half, v.dst[:half*ids.BlockSize]
		e.startView(i, v)
		e.startView(i, rest)
		return
	case k == status.Unavailable && rep.Incarnation == 0 && !s.r.up: // the connection went
	default:
		if v.bad == nil {
			v.bad = map[ids.StoreID]bool{}
		}
		v.bad[s.r.store] = true
	}
	e.startView(i, v)
}

// viewed takes the blocks an origin has, and goes on with those it has not.
func (e *Engine) viewed(i ids.ChunkIndex, v *view, rep *wire.Reply) {
	holes := holesOf(rep.Entries)
	if len(holes) != 1 || holes[0].n != v.count {
		v.rd.shown = true
	}
	copy(v.dst, rep.Data)
	for _, h := range holes {
		v.rd.views++
		e.startView(i, &view{rd: v.rd, level: v.level + 1, first: v.first + ids.Block(h.at), count: h.n, dst: v.dst[h.at*ids.BlockSize : (h.at+h.n)*ids.BlockSize]})
	}
	e.viewDone(v.rd, status.OK)
}

// viewDone ends one view of a read; the last one ends the read.
func (e *Engine) viewDone(rd *read, k status.Kind) {
	if k != status.OK && rd.failed == status.OK {
		rd.failed = k
	}
	if rd.views--; rd.views > 0 {
		return
	}
	for i, o := range e.viewing {
		if o == rd {
			e.viewing = append(e.viewing[:i], e.viewing[i+1:]...)
			break
		}
	}
	switch {
	case e.state == Ended:
	case rd.again && rd.job != nil:
		rd.again, rd.failed, rd.shown, rd.buf, rd.bad = false, status.OK, false, nil, 0
		e.sendRead(rd)
	case rd.again:
		e.start(rd.piece)
		e.freeRead(rd)
	default:
		e.readDone(rd, rd.buf, rd.failed)
	}
}

// Origins brings what a clone reads through, as metadata has it now, or had it
// after Call was asked; nil: nobody asked.
type Origins struct {
	States []*pb.OriginState
	Call   *MetaCall
}

func (*Origins) event() {}

// readOnly makes the engine one that shows a snapshot and nothing else.
func (e *Engine) readOnly() {
	e.state, e.leaseTill = Serving, 1<<62
	e.why = fmt.Sprintf("shows layer %d of volume %d", e.origins[0].head, e.origins[0].volume)
}
