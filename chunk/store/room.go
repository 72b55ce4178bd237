package store

import (
	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Room below the store. A store file may be thin, and the file system under it
// full, of other people's data too. A write that finds no room there would stop
// the store, so none is ever in that place: a segment becomes free to be opened
// only once the disk has promised room for all of it, and enough of those are
// kept that every reserve is of promised room. When the disk has none to give
// the store is starved: data is refused as if it were full, tombstones and
// drops pass, and what they set free keeps its room and is used again.

// stock is how many free segments have room behind them, if there are as many:
// the reserves, the largest request, and some to open meanwhile.
func (s *Store) stock() int {
	usable := s.super.segBlocks - s.headBlocks() - 1
	return reserveWrites + 2 + int((wire.MaxIO+usable-1)/usable)
}

// freeSegments counts those that may be had, with room behind them or not yet.
func (s *Store) freeSegments() int {
	if s.starved {
		return len(s.free)
	}
	return len(s.free) + len(s.bare)
}

// restock asks the disk for room behind one more segment, one at a time; beyond
// the stock for what waits: an install may need more.
func (s *Store) restock(out *outbox) {
	if s.allocating || s.starved && !s.probe || s.closed || s.failed != nil || len(s.bare) == 0 || len(s.free) >= s.stock() && len(s.waiting) == 0 {
		return
	}
	g := s.bare[0]
	s.bare = s.bare[1:]
	s.allocating, s.probe = true, false
	op := s.allocateOp(g)
	op.Done = func(err error) { s.allocated(g, err) }
	out.ops = append(out.ops, op)
}

func (s *Store) allocateOp(g *segment) *disk.Op {
	return &disk.Op{Kind: disk.Allocate, Off: offset(s.base(g)), Len: offset(s.super.segBlocks)}
}

// allocated ends restock.
func (s *Store) allocated(g *segment, err error) {
	var out outbox
	s.mu.Lock()
	s.allocating = false
	switch {
	case err == nil:
		s.free = append(s.free, g)
		s.starved, s.compact.blocked = false, false
	case status.Of(err) == status.NoSpace:
		s.bare = append(s.bare, g)
		s.starved = true // asked again when the clock ticks
	default:
		s.bare = append(s.bare, g)
		s.fail(status.Errorf(status.IO, "allocate room on the disk: %w", err), &out)
	}
	s.proceed(&out)
	s.unlock(&out)
}

// backFree finds room behind n segments, when the store opens. Not finding all
// is fine; NoSpace if there is none for any.
func (s *Store) backFree(n int) error {
	var bare []*segment
	var full error
	for i, g := range s.bare {
		if len(s.free) >= n {
			bare = append(bare, s.bare[i:]...)
			break
		}
		switch err := disk.AllocateAt(s.disk, offset(s.base(g)), offset(s.super.segBlocks)); {
		case err == nil:
			s.free = append(s.free, g)
		case status.Of(err) == status.NoSpace:
			full = err
			bare = append(bare, g)
		default:
			return status.Errorf(status.IO, "allocate room on the disk: %w", err)
		}
	}
	s.bare = bare
	if len(s.free) == 0 && full != nil {
		return status.Errorf(status.NoSpace, "the store cannot be opened: %w", full)
	}
	return nil
}

// errStarved answers data that the file system below has no room for.
var errStarved = status.Errorf(status.NoSpace, "the file system under the store is full: make room there, or trim data")

// waits reports whether what has no room now may have it later: not if the disk
// has none to give, nothing is on its way back and compaction yields nothing.
func (s *Store) waits() bool {
	return !s.starved || !s.compact.idle || s.discards > 0 || len(s.dead) > 0 || len(s.free) > reserveWrites
}
