package store

import (
	"errors"
	"sync/atomic"
	"syscall"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// segState is where a segment is in its life:
//
//	free → open → closed → leaving (given up in the log) → free, once that is
//	durable, nobody reads it any more and its bytes are discarded
type segState uint8

const (
	segFree segState = iota
	segOpen
	segClosed
	segLeaving
)

// segment is one slice of the log. 0 ≤ written ≤ tail ≤ segBlocks;
// live ≤ tail counts data blocks, marks counts blocks whose newest record is a
// tombstone, a hole or a poison mark in it.
type segment struct {
	n       uint32
	state   segState
	life    uint32
	gen     uint64 // LSN of its first batch
	last    uint64 // LSN of its last batch, once closed
	tail    uint32 // blocks handed out
	written uint32 // blocks on the disk
	live    uint32
	marks   uint32
	direct  bool // written around the page cache: all of it, or nothing
	// markRecords is how many records those marks began as.
	markRecords uint32
	score       float64 // of the last look for victims

	pins  atomic.Int32 // reads in flight
	stuck bool         // compaction could not read it
	stale bool         // recovery: not in the log, but not empty
}

// segOf returns the segment that holds a block of the disk.
func (s *Store) segOf(loc uint32) *segment {
	return s.segs[(loc-logStart)/s.super.segBlocks]
}

// base returns the first block of a segment.
func (s *Store) base(g *segment) uint32 { return logStart + g.n*s.super.segBlocks }

func offset(block uint32) int64 { return int64(block) * blockBytes }

// count adds (or takes away) one entry from the figures of its segment and
// volume.
func (s *Store) count(v *vol, e entry, d int32) {
	if e.loc == 0 {
		return
	}
	g := s.segOf(e.loc)
	if e.kind == kindData {
		g.live = uint32(int32(g.live) + d)
		v.live = uint64(int64(v.live) + int64(d))
		s.live = uint64(int64(s.live) + int64(d))
	} else {
		g.marks = uint32(int32(g.marks) + d)
	}
	if d < 0 {
		s.compact.deaths++
	}
	if d < 0 && g.live == 0 && g.marks == 0 && g.state == segClosed {
		s.dead = append(s.dead, g)
	}
}

// index points [block, block+n) at a record: data blocks lie at loc, loc+1, …;
// for the other kinds loc is the batch. sums are nil unless kind is data.
func (s *Store) index(c *chunk, block ids.Block, n uint32, e entry, sum func(i uint32) uint32) error {
	c.v.high = max(c.v.high, e.version)
	if e.kind == kindPoison {
		s.scrub.poisoned(c, block, n, e)
	}
	for i := uint32(0); i < n; {
		b := uint32(block) + i
		p, err := s.idx.page(c, b/pageBlocks, true)
		if err != nil {
			return err
		}
		first := b % pageBlocks
		m := min(pageBlocks-first, n-i)
		for j := first; j < first+m; j++ {
			s.count(c.v, p.at(j), -1)
		}
		if m == pageBlocks && e.kind != kindData {
			s.idx.fill(p, e)
			s.segOf(e.loc).marks += m
			i += m
			continue
		}
		for j := range m {
			at := e
			if e.kind == kindData {
				at.loc, at.sum = e.loc+i+j, sum(i+j)
			}
			s.count(c.v, at, 1)
			s.idx.set(p, first+j, at)
		}
		i += m
	}
	return nil
}

// forget drops chunks from the index, a bounded number of pages at a time.
func (s *Store) forget(pages int) error {
	for pages > 0 && len(s.leaving) > 0 {
		c := s.leaving[0]
		for len(c.pages) > 0 && pages > 0 {
			n := len(c.pages) - 1
			if c.pages[n] != nil {
				p, err := s.idx.page(c, uint32(n), false)
				if err != nil {
					return err
				}
				for i := range uint32(pageBlocks) {
					s.count(c.v, p.at(i), -1)
				}
				s.idx.drop(p)
				pages--
			}
			c.pages = c.pages[:n]
		}
		if len(c.pages) == 0 {
			s.leaving = s.leaving[1:]
		}
		s.idx.trim(trimSteps)
	}
	return nil
}

// roomFor reports whether an append of n data blocks leaves reserve segments
// free. Where fewer are, what is left of the open one is not for it either: it
// was opened out of the reserve, by what may use that.
func (s *Store) roomFor(n uint32, reserve int) bool {
	if s.open != nil && s.super.segBlocks-s.open.tail >= n+n/64+2 {
		return len(s.free) >= reserve
	}
	usable := s.super.segBlocks - s.headBlocks() - 1
	usable -= usable / 60
	return len(s.free)-int((n+usable-1)/usable) >= reserve
}

// headBlocks is what a segment's head takes now, or a little more.
func (s *Store) headBlocks() uint32 {
	const perBatch = (batchRoom - recordFixed) / tableEntry
	n := len(s.segs) + len(s.vols) + s.layerEntries() + len(s.drops) + len(s.gaps)
	return uint32(n/perBatch + 4)
}

// takeFree takes a free segment.
func (s *Store) takeFree() (*segment, error) {
	if len(s.free) == 0 {
		return nil, status.Errorf(status.Internal, "the log has no free segment left: its reserve was used up")
	}
	g := s.free[0]
	s.free = s.free[1:]
	return g, nil
}

// releaseDead gives up closed segments nothing points to: a record says so, a
// sync makes what superseded them and the record durable, a second one the mark
// that says so, then their bytes go back. It is called with the lock held, between requests.
func (s *Store) releaseDead() error {
	var gone []*segment
	for len(s.dead) > 0 && s.roomFor(0, 1) {
		g := s.dead[0]
		s.dead = s.dead[1:]
		if g.state != segClosed || g.live != 0 || g.marks != 0 {
			continue // listed twice
		}
		r := record{kind: kindFree, block: g.n, version: g.gen}
		if _, err := s.append(&r, 0); err != nil {
			return err
		}
		g.state = segLeaving
		gone = append(gone, g)
	}
	if len(gone) > 0 {
		s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(out *outbox) { s.discardMarked(gone, out) }})
	}
	return nil
}

// discardMarked discards segments once a durable batch says that the record
// which gives them up is durable. Without that mark recovery would take the
// LSNs they held for a gap in a tail it has to verify, and cut the log there.
func (s *Store) discardMarked(gone []*segment, out *outbox) {
	if err := s.makeRoom(batchRoom, 0); err != nil {
		s.fail(err, out)
		return
	}
	s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(out *outbox) { s.discard(gone, out) }})
}

// discard gives the bytes of given-up segments back; those still being read
// wait for the next step.
func (s *Store) discard(gone []*segment, out *outbox) {
	for _, g := range gone {
		if g.pins.Load() > 0 || s.closed {
			s.pinned = append(s.pinned, g)
			continue
		}
		if len(s.free) < max(s.stock(), (len(s.segs)-len(s.free)-len(s.bare))/6) { // it keeps its room and is used again as it is
			s.freed(g, &s.free)
			continue
		}
		s.discards++
		out.ops = append(out.ops, s.discardOp(g))
	}
}

// freed ends a segment's use.
func (s *Store) freed(g *segment, list *[]*segment) {
	g.state, g.tail, g.written = segFree, 0, 0
	*list = append(*list, g)
	s.compact.blocked = false
}

func (s *Store) discardOp(g *segment) *disk.Op {
	op := &disk.Op{Kind: disk.Discard, Off: offset(s.base(g)), Len: offset(g.tail)}
	op.Done = func(err error) {
		var out outbox
		s.mu.Lock()
		s.discards--
		if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) { // a disk that cannot is merely not thin
			s.fail(status.Errorf(status.IO, "discard on the disk: %w", err), &out)
		}
		s.freed(g, &s.bare)
		s.proceed(&out)
		s.unlock(&out)
	}
	return op
}
