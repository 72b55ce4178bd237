package store

import (
	"sync/atomic"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a read:
//
//  1. read, under the lock: the entries of its blocks, each from the first layer
//     of the chain that has one; the segments are pinned.
//     A block that is not on the disk yet makes the read wait for its group.
//  2. startRead, after it: one disk call per run of neighbours; from memory at
//     once if the disk can, else later into a buffer of the read's own.
//  3. finishRead: every block is held against its checksum before it leaves.

// read is one read request on its way.
type read struct {
	c      *caller
	id     uint64
	flags  uint16
	vol    ids.VolumeID
	chunk  ids.ChunkID
	layer  ids.LayerID
	block  ids.Block
	buf    []byte // where the data goes
	into   bool   // buf is the caller's, valid during its Submit only
	ents   []entry
	few    [4]entry // ents of a small read
	chain  []ids.LayerID
	depth  []uint8  // of each entry: 0 layer, i chain[i-1]; nil without a chain
	fewDep [4]uint8 // depth of a small read
	left   atomic.Int32
	failed atomic.Pointer[error]
	s      *Store
	life   uint64 // of the chunk, for a frozen read
}

// read finds the blocks of a read.
func (s *Store) read(c *caller, v *vol, q *wire.Request, out *outbox) error {
	r := &read{c: c, s: s, id: q.ID, flags: q.Flags, vol: q.Volume, chunk: q.Chunk, layer: q.Layer, block: q.Block, chain: q.Chain}
	small := int(q.Count) <= len(r.few)
	if small {
		r.ents = r.few[:q.Count]
	} else {
		r.ents = make([]entry, q.Count)
	}
	switch {
	case len(q.Chain) == 0:
	case small:
		r.depth = r.fewDep[:q.Count]
	default:
		r.depth = make([]uint8, q.Count)
	}
	if n := int(q.Count) * blockBytes; len(q.Into) >= n {
		r.buf, r.into = q.Into[:n], true
	}
	return s.look(v, r, out)
}

// look fills the entries of a read, or lets it wait for a group.
func (s *Store) look(v *vol, r *read, out *outbox) error {
	clear(r.ents)
	if err := v.checkChain(r.layer, r.chain, r.flags&wire.FlagRaw != 0); err != nil {
		out.fail(r.c, wire.Read, r.id, err)
		return nil
	}
	if r.flags&wire.FlagFrozen != 0 && (v == nil || len(v.layers(r.chunk)) == 0) {
		why := status.Errorf(status.NotFound, "nothing of chunk %d of volume %d is here", r.chunk, r.vol)
		out.reply(r.c, &wire.Reply{Kind: wire.Read, ID: r.id, Status: status.NotFound, Count64: 1, Incarnation: s.incarnation, Detail: why.Error()})
		return nil
	}
	if r.flags&wire.FlagFrozen != 0 {
		r.life = s.lifeOf(v, r.chunk)
	}
	if err := s.resolve(v, r); err != nil {
		return err
	}
	if r.flags&wire.FlagEntries != 0 && r.flags&wire.FlagNoData != 0 {
		out.reply(r.c, r.withEntries(&wire.Reply{Kind: wire.Read, ID: r.id}))
		return nil
	}
	for i := range r.ents {
		e := &r.ents[i]
		if e.kind == kindPoison {
			out.reply(r.c, &wire.Reply{Kind: wire.Read, ID: r.id, Status: status.Poison, Block: r.block + ids.Block(i),
				Detail: status.Errorf(status.Poison, "no good copy of block %d is left until it is overwritten", r.block+ids.Block(i)).Error()})
			return nil
		}
		if e.kind != kindData {
			continue
		}
		if g := s.unwritten(e.loc); g != nil {
			r.into, r.buf = false, nil // it is answered after its Submit
			g.waiting = append(g.waiting, r)
			return nil
		}
	}
	for i := range r.ents {
		if e := &r.ents[i]; e.kind == kindData {
			s.segOf(e.loc).pins.Add(1)
		}
	}
	out.reads = append(out.reads, r)
	return nil
}

// resolve fills the entries of a read.
func (s *Store) resolve(v *vol, r *read) error {
	if v == nil {
		return nil
	}
	if r.depth == nil {
		if ch := v.chunk(r.chunk, r.layer, false); ch != nil {
			return s.entries(ch, r.block, r.ents)
		}
		return nil
	}
	clear(r.depth)
	layers, layer := v.layers(r.chunk), r.layer // ascending; the chain descends
	left := len(r.ents)
	for d := 0; d <= len(r.chain) && left > 0; d++ {
		if d > 0 {
			layer = r.chain[d-1]
		}
		for len(layers) > 0 && layers[len(layers)-1].layer > layer {
			layers = layers[:len(layers)-1]
		}
		if len(layers) == 0 {
			break
		}
		ch := layers[len(layers)-1]
		if ch.layer != layer {
			continue
		}
		n, err := s.fill(ch, r, uint8(d))
		if err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// fill gives the blocks of a read that no layer above had an entry for those of
// ch; it returns how many it had.
func (s *Store) fill(ch *chunk, r *read, depth uint8) (found int, err error) {
	for i := uint32(0); i < uint32(len(r.ents)); {
		at := uint32(r.block) + i
		p, err := s.idx.page(ch, at/pageBlocks, false)
		if err != nil {
			return found, err
		}
		m := min(pageBlocks-at%pageBlocks, uint32(len(r.ents))-i)
		for j := i; p != nil && j < i+m; j++ {
			if r.ents[j].kind != kindHole {
				continue
			}
			if e := p.at(at%pageBlocks + j - i); e.kind != kindHole {
				r.ents[j], r.depth[j] = e, depth
				found++
			}
		}
		i += m
	}
	return found, nil
}

// layerOf returns the layer entry i was found in.
func (r *read) layerOf(i int) ids.LayerID {
	if r.depth == nil || r.depth[i] == 0 {
		return r.layer
	}
	return r.chain[r.depth[i]-1]
}

// entries copies the entries of consecutive blocks.
func (s *Store) entries(c *chunk, b ids.Block, es []entry) error {
	for i := uint32(0); i < uint32(len(es)); {
		at := uint32(b) + i
		p, err := s.idx.page(c, at/pageBlocks, false)
		if err != nil {
			return err
		}
		m := min(pageBlocks-at%pageBlocks, uint32(len(es))-i)
		if p != nil {
			for j := range m {
				es[i+j] = p.at(at%pageBlocks + j)
			}
		}
		i += m
	}
	return nil
}

// startRead reads the runs of a read whose segments are pinned.
func (s *Store) startRead(r *read, out *outbox) {
	if r.into && s.now != nil && r.eachRun(func(off int64, b []byte) bool { return s.now.ReadNow(b, off) }) {
		s.finishRead(r, out)
		return
	}
	asked := r.into && len(r.ents) == 1 // and it was not there
	r.buf, r.into = make([]byte, len(r.ents)*blockBytes), false
	var ops []*disk.Op
	r.eachRun(func(off int64, b []byte) bool {
		if s.now == nil || asked || !s.now.ReadNow(b, off) {
			ops = append(ops, &disk.Op{Kind: disk.Read, Off: off, Bufs: [][]byte{b}, Done: r.gotRun})
		}
		return true
	})
	if len(ops) == 0 {
		s.finishRead(r, out)
		return
	}
	r.left.Store(int32(len(ops)))
	for _, op := range ops {
		s.disk.Submit(op)
	}
}

// eachRun calls f for each run of data blocks that lie one behind the other,
// until it returns false.
func (r *read) eachRun(f func(off int64, b []byte) bool) bool {
	for i := 0; i < len(r.ents); {
		if r.ents[i].kind != kindData {
			i++
			continue
		}
		n := 1
		for i+n < len(r.ents) && r.ents[i+n].kind == kindData && r.ents[i+n].loc == r.ents[i].loc+uint32(n) {
			n++
		}
		if !f(offset(r.ents[i].loc), r.buf[i*blockBytes:(i+n)*blockBytes]) {
			return false
		}
		i += n
	}
	return true
}

// gotRun counts the runs of a read that went to the disk.
func (r *read) gotRun(err error) {
	if err != nil {
		r.failed.Store(&err)
	}
	if r.left.Add(-1) == 0 {
		var out outbox
		r.s.finishRead(r, &out)
		out.deliver()
	}
}

// finishRead verifies and answers. A block the disk could not give is answered
// like a damaged one: a good copy from another replica heals both.
func (s *Store) finishRead(r *read, out *outbox) {
	rep := &wire.Reply{Kind: wire.Read, ID: r.id, Data: r.buf}
	if e := r.failed.Load(); e != nil {
		rep = r.corrupt(0, (*e).Error())
	}
	for i := range r.ents {
		e := &r.ents[i]
		b := r.block + ids.Block(i)
		data := r.buf[i*blockBytes : (i+1)*blockBytes]
		if e.kind != kindData {
			clear(data)
			continue
		}
		s.segOf(e.loc).pins.Add(-1)
		if rep.Status == status.OK && wire.BlockSum(r.vol, r.chunk, r.layerOf(i), b, e.version, data) != e.sum {
			s.badSums.Add(1)
			rep = r.corrupt(i, "its checksum is wrong")
		}
	}
	if rep.Status == status.OK && r.flags&wire.FlagEntries != 0 {
		r.withEntries(rep)
	} else if r.flags&wire.FlagFrozen != 0 {
		rep.Incarnation, rep.Count64 = s.incarnation, r.life
	}
	out.reply(r.c, rep)
}

// withEntries adds what the index says of each block.
func (r *read) withEntries(rep *wire.Reply) *wire.Reply {
	rep.Entries = make([]wire.Entry, len(r.ents))
	for i, e := range r.ents {
		rep.Entries[i] = wire.Entry{Chunk: r.chunk, Layer: r.layerOf(i), Block: r.block + ids.Block(i), Version: e.version, Sum: e.sum, Kind: wire.EntryKind(e.kind)}
	}
	if r.flags&wire.FlagFrozen != 0 {
		rep.Incarnation, rep.Count64 = r.s.incarnation, r.life
	}
	return rep
}

func (r *read) corrupt(i int, why string) *wire.Reply {
	err := status.Errorf(status.Corrupt, "block %d of chunk %d cannot be read: %s", r.block+ids.Block(i), r.chunk, why)
	return &wire.Reply{Kind: wire.Read, ID: r.id, Status: status.Corrupt, Block: r.block + ids.Block(i), Detail: err.Error()}
}
