package store

import (
	"slices"
	"sync/atomic"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// What was overwritten here and there lies all over the log, in the order it
// was written, and a sequential read becomes many small ones. While the store
// has little else to do, such places are put in order:
//
//  1. wrote: a chunk that short writes went to is put on a list. Each block that
//     guests write is credit for one that may be moved: so straightening never
//     writes more than they did.
//  2. seek: with the clock, once the store has been quiet for a while, the next
//     window of a listed chunk whose blocks lie in short runs.
//  3. read: its data, each block held against its checksum.
//  4. copy: what is still as it was is appended anew, in order of its address,
//     at its version; the old places die by that, and whole segments with them.
//
// Copies of compaction are in the order of the segment they come from. Sorting
// one segment by address was tried on paper: a window of 1 MiB of a large volume
// has a few blocks in each segment, so that its runs hardly get longer.

const (
	straightWindow  = 256  // blocks put in order at once, at most half a segment
	straightRun     = 16   // shorter runs than that on average are worth it
	quietTicks      = 5    // of the clock, before it begins
	quietRequests   = 32   // for data, in a tick that is quiet
	straightPerTick = 4096 // blocks read for it
)

type straightener struct {
	list     []*chunk // short writes went to; each once, see chunk.ragged
	requests int      // for data, since the last tick
	quiet    int      // ticks with few of them, up to now
	credit   int64    // blocks that may be moved, ≤ the capacity
	moved    uint64   // blocks, since the opening
	budget   int      // blocks that may be read before the next tick
	c        *chunk   // the one that is gone through
	at       uint32   // next block of it to look at
	first    ids.Block
	ents     []entry // of the window's blocks
	buf      []byte
	left     atomic.Int32
	failed   atomic.Bool
	reading  bool
}

// wrote notes n blocks of new data in a chunk.
func (t *straightener) wrote(s *Store, c *chunk, n uint32) {
	t.credit = min(t.credit+int64(n), int64(s.capacity))
	if n < straightRun*4 && !c.ragged {
		c.ragged = true
		t.list = append(t.list, c)
	}
}

// tick is the clock's part.
func (t *straightener) tick(s *Store, out *outbox) error {
	if t.quiet++; t.requests > quietRequests {
		t.quiet = 0
	}
	t.requests, t.budget = 0, straightPerTick
	if t.quiet == quietTicks {
		slices.SortFunc(t.list, func(a, b *chunk) int {
			if a.v.id != b.v.id {
				return int(int64(a.v.id) - int64(b.v.id))
			}
			return a.compare(chunkKey{b.id, b.layer})
		})
	}
	return t.seek(s, out)
}

// active reports whether there is something to put in order, and the time and
// the room for it. Compaction without need waits meanwhile: what it would move
// is moved anyway, and in order.
func (t *straightener) active(s *Store) bool {
	return (t.c != nil || len(t.list) > 0) && t.quiet >= quietTicks && t.credit >= straightWindow && !s.closed && s.failed == nil &&
		len(s.merges) == 0 && len(s.waiting) == 0 && s.freeSegments() > max(2*reserveWrites, len(s.segs)/8) && s.roomFor(2*straightWindow, reserveWrites)
}

// may reports whether the next window may be read now.
func (t *straightener) may(s *Store) bool {
	return !t.reading && t.budget > 0 && s.stagedBytes() <= maxStaged/4 && t.active(s)
}

// seek finds the next window that is worth it, and reads it.
func (t *straightener) seek(s *Store, out *outbox) error {
	size := min(uint32(straightWindow), s.super.segBlocks/2)
	for t.may(s) {
		if t.c == nil {
			if len(t.list) == 0 {
				return nil
			}
			t.c, t.at = t.list[0], 0
			t.list = t.list[1:]
			t.c.ragged = false // what comes from now on lists it again
		}
		if t.at >= uint32(len(t.c.pages)*pageBlocks) || !t.c.lives(s) {
			t.c = nil
			continue
		}
		if t.c.pages[t.at/pageBlocks] == nil && t.at%pageBlocks == 0 {
			t.at += max(size, pageBlocks)
			continue
		}
		t.budget -= int(size)
		t.first = ids.Block(t.at)
		t.at += size
		if cap(t.ents) < int(size) {
			t.ents = make([]entry, size)
		}
		t.ents = t.ents[:size]
		clear(t.ents)
		if err := s.entries(t.c, t.first, t.ents); err != nil {
			return err
		}
		if t.worth(s) {
			t.read(s, out)
		}
	}
	return nil
}

// lives reports whether the store still has c.
func (c *chunk) lives(s *Store) bool {
	return s.vols[c.v.id] == c.v && c.v.chunks[chunkKey{c.id, c.layer}] == c
}

// worth reports whether the window's data lies in short runs, all of it on the
// disk.
func (t *straightener) worth(s *Store) bool {
	blocks, runs, last := 0, 0, uint32(0)
	for _, e := range t.ents {
		if e.kind != kindData {
			continue
		}
		if s.unwritten(e.loc) != nil {
			return false
		}
		if blocks++; e.loc != last+1 {
			runs++
		}
		last = e.loc
	}
	return blocks*4 >= len(t.ents) && (runs-1)*straightRun > blocks
}

// read reads the window's data, one call per run.
func (t *straightener) read(s *Store, out *outbox) {
	if need := len(t.ents) * blockBytes; cap(t.buf) < need {
		t.buf = make([]byte, need)
	}
	var ops []*disk.Op
	done := func(err error) { t.got(s, err) }
	for i := 0; i < len(t.ents); {
		n := 1
		for i+n < len(t.ents) && t.ents[i].kind == kindData && t.ents[i+n].kind == kindData && t.ents[i+n].loc == t.ents[i].loc+uint32(n) {
			n++
		}
		if t.ents[i].kind == kindData {
			ops = append(ops, &disk.Op{Kind: disk.Read, Off: offset(t.ents[i].loc), Bufs: [][]byte{t.buf[i*blockBytes : (i+n)*blockBytes]}, Done: done})
		}
		i += n
	}
	for _, e := range t.ents {
		if e.kind == kindData {
			s.segOf(e.loc).pins.Add(1)
		}
	}
	t.reading = true
	s.reading++
	t.failed.Store(false)
	t.left.Store(int32(len(ops)))
	out.ops = append(out.ops, ops...)
}

// got counts the window's reads; the last one copies. A window with a block that
// cannot be read, or is bad, stays as it is: that is for scrubs and reads.
func (t *straightener) got(s *Store, err error) {
	if err != nil {
		t.failed.Store(true)
	}
	if t.left.Add(-1) > 0 {
		return
	}
	good := !t.failed.Load() && t.sound()
	var out outbox
	s.mu.Lock()
	t.reading = false
	s.reading--
	for _, e := range t.ents {
		if e.kind == kindData {
			s.segOf(e.loc).pins.Add(-1)
		}
	}
	if good && s.failed == nil && !s.closed && t.c.lives(s) && s.roomFor(2*straightWindow, reserveWrites) {
		err := t.copy(s)
		if err == nil {
			err = t.seek(s, &out)
		}
		if err != nil {
			s.fail(err, &out)
		}
	}
	s.proceed(&out)
	s.cond.Broadcast()
	s.unlock(&out)
}

// sound holds the window's data against its checksums.
func (t *straightener) sound() bool {
	for i, e := range t.ents {
		if e.kind == kindData && wire.BlockSum(t.c.v.id, t.c.id, t.c.layer, t.first+ids.Block(i), e.version, t.buf[i*blockBytes:(i+1)*blockBytes]) != e.sum {
			return false
		}
	}
	return true
}

// copy appends what is still as it was when it was looked up.
func (t *straightener) copy(s *Store) error {
	now := make([]entry, len(t.ents))
	if err := s.entries(t.c, t.first, now); err != nil {
		return err
	}
	same := func(i int) bool { return now[i].kind == kindData && now[i] == t.ents[i] }
	for i := 0; i < len(now); {
		n := 0
		var sums []uint32
		for i+n < len(now) && same(i+n) && now[i+n].version == now[i].version {
			sums = append(sums, now[i+n].sum)
			n++
		}
		if n > 0 {
			if err := s.appendRun(t.c, kindData, t.first+ids.Block(i), uint32(n), now[i].version, sums, t.buf[i*blockBytes:(i+n)*blockBytes]); err != nil {
				return err
			}
			s.copied, t.moved = s.copied+uint64(n), t.moved+uint64(n)
			t.credit -= int64(n)
		}
		i += max(n, 1)
	}
	return nil
}
