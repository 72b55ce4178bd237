package store

import (
	"maps"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// A rescue appends anew what lies in a batch whose records are damaged. The
// index knows it still; the next opening would not, and report damage. It goes
// through the whole index, a few pages per step, which is dear and rare. When
// all is appended the gap is entered as known and a new head says so: the head
// comes later in the log than what was appended, so where it counts, that does
// too. What can be in the lost records beside blocks — epochs, drops, segments
// given up, checkpoints — the head repeats.
type rescue struct {
	seg     *segment
	gen     uint64
	first   uint32 // block of the disk: first of the damaged batch
	end     uint32 // first behind it
	gap     gap
	data    []byte // [first, end)
	chunks  []*chunk
	page    int // next page of chunks[0]
	starved int // steps without room
}

const (
	rescuePages = 256  // looked at per step
	rescueTries = 3000 // steps it waits for room
)

// lost begins the rescue of what lies from the current place of the segment to
// its next good batch. A gap that is known already is passed over.
func (c *scrubber) lost(s *Store, buf []byte) {
	n, next := uint32(1), uint64(0)
	for ; n < uint32(len(buf)/blockBytes); n++ {
		if h, ok := c.batch(s, buf[n*blockBytes:], n); ok {
			next = h.lsn
			break
		}
	}
	g := c.seg
	lost := gap{g.gen, max(c.lsn+1, g.gen), g.last}
	if next > 0 {
		lost.to = next - 1
	}
	first := s.base(g) + c.at
	c.at += n
	if next == 0 && c.at < g.tail { // it goes on in the next window: known then, or lost too
		lost.to = 0
	}
	if lost.to > 0 && lost.to < lost.from {
		return // no LSN is missing: what is here was never a batch
	}
	for _, known := range s.gaps {
		if known.gen == lost.gen && known.from == lost.from {
			return
		}
	}
	c.BadHeads++
	r := &rescue{seg: g, gen: g.gen, first: first, end: first + n, gap: lost, data: append([]byte(nil), buf[:n*blockBytes]...)}
	for _, id := range slices.Sorted(maps.Keys(s.vols)) {
		r.chunks = append(r.chunks, s.vols[id].order...)
	}
	c.rescue = r
}

// step looks at a few pages, or ends the rescue.
func (r *rescue) step(s *Store) error {
	if r.seg.gen != r.gen || r.seg.state != segClosed {
		s.scrub.rescue = nil // everything in it has died meanwhile
		return nil
	}
	for n := rescuePages; n > 0 && len(r.chunks) > 0; n-- {
		ch := r.chunks[0]
		if r.page >= len(ch.pages) {
			r.chunks, r.page = r.chunks[1:], 0
			continue
		}
		ok, err := r.rescuePage(s, ch, uint32(r.page))
		if err != nil {
			return err
		}
		if !ok {
			return r.wait(s)
		}
		r.page++
	}
	if len(r.chunks) > 0 {
		return nil
	}
	if !s.roomFor(0, reserveSystem) {
		return r.wait(s)
	}
	s.scrub.rescue = nil
	if r.gap.to == 0 {
		return nil // the next window tells how far the gap goes
	}
	s.gaps = append(s.gaps, r.gap)
	return s.newSegment()
}

// wait gives up when there is no room for long.
func (r *rescue) wait(s *Store) error {
	if r.starved++; r.starved > rescueTries {
		s.scrub.Unrescued++
		s.scrub.rescue = nil
	}
	return nil
}

// rescuePage appends what a page has in the range; false: there is no room now.
func (r *rescue) rescuePage(s *Store, ch *chunk, n uint32) (bool, error) {
	if ch.pages[n] == nil {
		return true, nil
	}
	p, err := s.idx.page(ch, n, false)
	if err != nil || p == nil {
		return err == nil, err
	}
	in := func(e entry) bool { return e.loc >= r.first && e.loc < r.end }
	for i := uint32(0); i < pageBlocks; {
		e := p.at(i)
		m := uint32(1)
		for i+m < pageBlocks && e.kind != kindData && p.at(i+m) == e {
			m++
		}
		if !in(e) {
			i += m
			continue
		}
		need := uint32(0)
		if e.kind == kindData {
			need = 1
		}
		if !s.roomFor(need, reserveCopies) {
			return false, nil
		}
		if err := r.append(s, ch, ids.Block(n*pageBlocks+i), m, e); err != nil {
			return false, err
		}
		i += m
	}
	return true, nil
}

// append appends a run of equal tombstones, or one block of data: one whose data
// is bad too stays as unreadable as it is, and is noted.
func (r *rescue) append(s *Store, ch *chunk, b ids.Block, n uint32, e entry) error {
	if e.kind != kindData {
		return s.appendRun(ch, e.kind, b, n, e.version, nil, nil)
	}
	d := r.data[(e.loc-r.first)*blockBytes : (e.loc-r.first+1)*blockBytes]
	if wire.BlockSum(ch.v.id, ch.id, ch.layer, b, e.version, d) == e.sum {
		return s.appendRun(ch, kindData, b, 1, e.version, []uint32{e.sum}, d)
	}
	if err := s.appendBad(ch, b, e.version, e.sum, d); err != nil {
		return err
	}
	now, err := s.idx.get(ch, b)
	if err != nil {
		return err
	}
	return s.scrub.note(s, badKey{ch.v.id, ch.id, ch.layer, b}, now.kind, now.loc)
}

// appendBad appends a block whose data does not match its checksum: it stays as
// unreadable as it is. The record says so, or recovery would take it for a torn
// tail and cut the log there.
func (s *Store) appendBad(c *chunk, b ids.Block, ver ids.Version, sum uint32, data []byte) error {
	r := record{kind: kindData, flags: flagBad, volume: uint64(c.v.id), chunk: uint64(c.id), layer: uint32(c.layer), block: uint32(b), count: 1, version: uint64(ver)}
	st, err := s.append(&r, 4)
	if err != nil {
		return err
	}
	le.PutUint32(st.payload, sum)
	copy(st.data, data)
	return s.index(c, b, 1, entry{version: ver, loc: st.loc, kind: kindData}, func(uint32) uint32 { return sum })
}
