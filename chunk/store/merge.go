package store

import (
	"sync/atomic"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a merge, of one chunk of a layer whose snapshot was deleted into the
// only layer that still looks through it:
//
//  1. gather: the next blocks of the layer that its child has no entry for.
//     Tombstones and poison are appended under the child's name at once.
//  2. read: the data of a window; every block is held against its checksum and
//     gets one with the child's name. A bad block ends the merge: what it held
//     may be good on a peer, and is repaired there.
//  3. copy: what is as it was is appended at its version; the next window, when
//     that is written.
//  4. end: the layer's blocks of the chunk are set back to holes. The log keeps
//     the order, so that after any crash either the old entry or the new is there.
//     It is answered when that is durable: metadata then lets the layer go, and a
//     copy that came back from a power loss in it would be nobody's.
//
// One window of one merge is under way at a time. A merge that was cut short is
// asked for again and finds what it did.

const (
	mergeWindow = 128  // data blocks of one window
	mergeScan   = 8192 // blocks looked at in one go
	maxMerges   = 64   // that wait for their turn

	// A merge gives back at its end what it takes, and what was shadowed with it:
	// so it may go beyond the capacity, by one part in so many. A chunk fits into
	// that from stores of 1 GiB on.
	mergeReserve = 8
)

type merge struct {
	c       *caller
	id      uint64 // of the request
	v       *vol
	layer   ids.LayerID
	from    *chunk
	into    *chunk
	at      ids.Block // next block to look at
	staged  uint64    // LSN of the last copy; the next window waits for it
	blocks  []ids.Block
	ents    []entry // of blocks
	buf     []byte
	left    atomic.Int32
	failed  atomic.Bool
	reading bool
	over    bool // it was answered; what it reads is of no use
}

// merge takes a Merge request.
func (s *Store) merge(c *caller, v *vol, q *wire.Request, out *outbox) error {
	rep := &wire.Reply{Kind: q.Kind, ID: q.ID}
	if v == nil {
		s.durably(c, rep, out)
		return nil
	}
	mark, lives := v.mark(q.Layer)
	if !lives || mark.into == 0 {
		out.fail(c, q.Kind, q.ID, status.Errorf(status.NotFound, "layer %d of volume %d is not being merged", q.Layer, q.Volume))
		return nil
	}
	from := v.chunk(q.Chunk, q.Layer, false)
	if from == nil || from.empty() {
		s.durably(c, rep, out)
		return nil
	}
	if len(s.merges) >= maxMerges {
		out.fail(c, q.Kind, q.ID, status.Errorf(status.Unavailable, "%d merges already wait for their turn", maxMerges))
		return nil
	}
	m := &merge{c: c, id: q.ID, v: v, layer: q.Layer, from: from, into: v.chunk(q.Chunk, mark.into, true)}
	s.merges = append(s.merges, m)
	return nil
}

// empty reports whether every block of c is a hole, as far as that can be seen
// without its pages: spilled ones count as full.
func (c *chunk) empty() bool {
	for _, p := range c.pages {
		if p != nil && (p.slots != nil || p.away || p.one.kind != kindHole) {
			return false
		}
	}
	return true
}

// stepMerges goes on with the first merge, as far as it can.
func (s *Store) stepMerges(out *outbox) error {
	for len(s.merges) > 0 && !s.closed {
		m := s.merges[0]
		if m.reading || s.written < m.staged || !s.roomFor(mergeWindow, reserveWrites) || s.stagedBytes() > maxStaged/4 {
			return nil
		}
		done, err := s.gather(m)
		if err != nil {
			return err
		}
		switch {
		case len(m.blocks) > 0:
			if s.live+uint64(len(m.blocks)) > s.capacity+s.capacity/mergeReserve {
				s.endMerge(m, status.NoSpace, errFull.Error(), out)
				continue
			}
			s.readMerge(m, out)
			return nil
		case done:
			if err := s.emptyLayer(m); err != nil {
				return err
			}
			m.over = true
			s.merges = s.merges[1:]
			s.durably(m.c, &wire.Reply{Kind: wire.Merge, ID: m.id}, out)
		default:
			m.staged = s.lsn // what was scanned had no data: go on after what is staged
			if s.written < s.lsn {
				return nil
			}
		}
	}
	return nil
}

// gather looks for the next window. done: the end of the chunk was reached.
func (s *Store) gather(m *merge) (done bool, err error) {
	m.blocks, m.ents = m.blocks[:0], m.ents[:0]
	end := ids.Block(len(m.from.pages) * pageBlocks)
	for scanned := 0; m.at < end && len(m.blocks) < mergeWindow && scanned < mergeScan; scanned++ {
		if m.at%pageBlocks == 0 && m.from.pages[m.at/pageBlocks] == nil {
			m.at += pageBlocks
			continue
		}
		e, err := s.idx.get(m.from, m.at)
		if err != nil {
			return false, err
		}
		wanted := e.kind != kindHole
		if wanted {
			if wanted, err = s.unshadowed(m, m.at); err != nil {
				return false, err
			}
		}
		switch {
		case !wanted:
			m.at++
		case e.kind == kindData && s.unwritten(e.loc) != nil:
			m.staged = s.lsn // a repair, just now
			return false, nil
		case e.kind == kindData:
			m.blocks, m.ents = append(m.blocks, m.at), append(m.ents, e)
			m.at++
		default:
			n, err := s.sameMarks(m, e, end)
			if err != nil {
				return false, err
			}
			if err := s.appendRun(m.into, e.kind, m.at, n, e.version, nil, nil); err != nil {
				return false, err
			}
			m.at += ids.Block(n)
			m.staged = s.lsn
		}
	}
	return m.at >= end, nil
}

// unshadowed reports whether the child has no entry for a block.
func (s *Store) unshadowed(m *merge, b ids.Block) (bool, error) {
	e, err := s.idx.get(m.into, b)
	return e.kind == kindHole, err
}

// sameMarks counts the unshadowed blocks from m.at on with the mark e.
func (s *Store) sameMarks(m *merge, e entry, end ids.Block) (n uint32, err error) {
	for b := m.at; b < end && n < mergeScan; b++ {
		o, err := s.idx.get(m.from, b)
		if err != nil {
			return 0, err
		}
		ok, err := s.unshadowed(m, b)
		if err != nil {
			return 0, err
		}
		if !ok || o.kind != e.kind || o.version != e.version {
			break
		}
		n++
	}
	return n, nil
}

// readMerge reads the window's blocks, one call per run of neighbours.
func (s *Store) readMerge(m *merge, out *outbox) {
	if need := len(m.blocks) * blockBytes; cap(m.buf) < need {
		m.buf = make([]byte, need)
	}
	m.buf = m.buf[:len(m.blocks)*blockBytes]
	var ops []*disk.Op
	for i := 0; i < len(m.ents); {
		n := 1
		for i+n < len(m.ents) && m.ents[i+n].loc == m.ents[i].loc+uint32(n) {
			n++
		}
		ops = append(ops, &disk.Op{Kind: disk.Read, Off: offset(m.ents[i].loc), Bufs: [][]byte{m.buf[i*blockBytes : (i+n)*blockBytes]},
			Done: func(err error) { s.gotMerge(m, err) }})
		i += n
	}
	for _, e := range m.ents {
		s.segOf(e.loc).pins.Add(1)
	}
	m.reading = true
	s.reading++
	m.failed.Store(false)
	m.left.Store(int32(len(ops)))
	out.ops = append(out.ops, ops...)
}

// gotMerge counts the window's reads; the last one copies.
func (s *Store) gotMerge(m *merge, err error) {
	if err != nil {
		m.failed.Store(true)
	}
	if m.left.Add(-1) > 0 {
		return
	}
	sums, bad := m.verify()
	var out outbox
	s.mu.Lock()
	m.reading = false
	s.reading--
	for _, e := range m.ents {
		s.segOf(e.loc).pins.Add(-1)
	}
	switch {
	case m.over || s.failed != nil || s.closed:
	case bad >= 0 || m.failed.Load():
		rep := &wire.Reply{Kind: wire.Merge, ID: m.id, Status: status.Corrupt, Block: m.blocks[max(bad, 0)]}
		rep.Detail = status.Errorf(status.Corrupt, "layer %d cannot be merged: its block %d cannot be read", m.layer, rep.Block).Error()
		s.removeMerge(m)
		out.reply(m.c, rep)
	default:
		if err := s.copyMerge(m, sums); err != nil {
			s.fail(err, &out)
		}
	}
	s.proceed(&out)
	s.cond.Broadcast()
	s.unlock(&out)
}

// verify makes the checksums of the window's blocks under the child's name; bad
// is the first one whose own is wrong, or -1.
func (m *merge) verify() (sums []uint32, bad int) {
	for i, b := range m.blocks {
		data, e := m.buf[i*blockBytes:(i+1)*blockBytes], &m.ents[i]
		if wire.BlockSum(m.v.id, m.from.id, m.from.layer, b, e.version, data) != e.sum {
			return nil, i
		}
		sums = append(sums, wire.BlockSum(m.v.id, m.from.id, m.into.layer, b, e.version, data))
	}
	return sums, -1
}

// copyMerge appends what is still as it was when it was gathered.
func (s *Store) copyMerge(m *merge, sums []uint32) error {
	fits := func(i int) (bool, error) {
		e, err := s.idx.get(m.from, m.blocks[i])
		if err != nil || e.version != m.ents[i].version || e.kind != kindData || e.sum != m.ents[i].sum {
			return false, err
		}
		return s.unshadowed(m, m.blocks[i])
	}
	for i := 0; i < len(m.blocks); {
		n := 0
		for ; i+n < len(m.blocks); n++ {
			if n > 0 && (m.blocks[i+n] != m.blocks[i]+ids.Block(n) || m.ents[i+n].version != m.ents[i].version) {
				break
			}
			ok, err := fits(i + n)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
		}
		if n > 0 {
			err := s.appendRun(m.into, kindData, m.blocks[i], uint32(n), m.ents[i].version, sums[i:i+n], m.buf[i*blockBytes:(i+n)*blockBytes])
			if err != nil {
				return err
			}
		}
		i += max(n, 1)
	}
	m.staged = s.lsn
	return nil
}

// emptyLayer sets the layer's blocks of the chunk back to holes: in the log the
// records stand behind the copies.
func (s *Store) emptyLayer(m *merge) error {
	for n := 0; n < len(m.from.pages); {
		k := 0
		for n+k < len(m.from.pages) && m.from.pages[n+k] != nil {
			k++
		}
		if k > 0 {
			if err := s.appendRun(m.from, kindHole, ids.Block(n*pageBlocks), uint32(k*pageBlocks), 0, nil, nil); err != nil {
				return err
			}
		}
		n += max(k, 1)
	}
	return nil
}

// endMerge answers a merge that cannot go on.
func (s *Store) endMerge(m *merge, k status.Kind, why string, out *outbox) {
	s.removeMerge(m)
	out.reply(m.c, &wire.Reply{Kind: wire.Merge, ID: m.id, Status: k, Detail: why})
}

func (s *Store) removeMerge(m *merge) {
	m.over = true
	for i, o := range s.merges {
		if o == m {
			s.merges = append(s.merges[:i:i], s.merges[i+1:]...)
			return
		}
	}
}

// abortMerges ends the merges that match.
func (s *Store) abortMerges(match func(*merge) bool, k status.Kind, why string, out *outbox) {
	for _, m := range append([]*merge(nil), s.merges...) {
		if match(m) {
			s.endMerge(m, k, why, out)
		}
	}
}
