package store

import (
	"cmp"
	"errors"
	"math"
	"slices"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of compaction, one segment at a time:
//
//  1. pick: the closed segment that yields most for what moving it costs.
//  2. read: a window of it, one disk call.
//  3. copy: what the index still points to is appended anew, at its version and
//     with its checksum; the old place dies by that.
//  4. When the copies are written, the next window; after the last one nothing
//     points to the segment any more and releaseDead gives it up.
//
// A block whose checksum is wrong is copied as it is (appendBad): it stays as
// unreadable as it was until a good copy replaces it.

const (
	// windowBlocks holds the largest batch.
	windowBlocks = 1 + maxRun + 25
	// maxDrops is when compaction takes the oldest segment instead, because
	// drops are remembered as long as segments older than them exist.
	maxDrops = 4096
)

var errNoRoom = errors.New("no room to copy to")

type compaction struct {
	s       *Store
	victim  *segment
	at      uint32 // next block of it to look at
	reading bool
	blocked bool       // nothing to copy to, until a segment is freed or the clock ticks
	idle    bool       // it would not yield anything; false after any change
	staged  uint64     // LSN of the last copy; the next window waits for it
	list    []*segment // the next victims, best first, ≤ shortlist
	deaths  uint64     // blocks that died since the list was made
	barren  bool       // that look found nothing worth moving
	tight   bool       // that look was for the emptiest ones: hardly any segment is free
	wide    bool       // the store takes half as much again as what is live in it
	buf     []byte
}

func (c *compaction) busy() bool { return c.reading }

// low reports whether free segments run out: from here on compaction is driven
// by every request, not by the clock alone.
func (s *Store) low() bool {
	return s.freeSegments() <= max(reserveWrites+2, len(s.segs)/40)
}

// step goes on if it can. Without pressure only ticks of the clock drive it.
func (c *compaction) step(out *outbox, tick bool) error {
	s := c.s
	if c.reading || s.closed || !s.low() && (!tick || s.straight.active(s)) {
		return nil
	}
	if c.victim != nil && c.victim.state != segClosed {
		c.end() // everything in it died by itself
	}
	c.blocked = c.blocked && !tick
	if c.victim == nil {
		if c.idle = true; c.blocked {
			return nil
		}
		if c.victim = c.pick(tick); c.victim == nil {
			return nil
		}
		c.idle = false
		c.at, c.staged = 0, 0
		c.victim.pins.Add(1)
	}
	if s.written < c.staged {
		return nil
	}
	n := min(windowBlocks, c.victim.tail-c.at)
	if c.buf == nil {
		c.buf = make([]byte, min(windowBlocks, s.super.segBlocks)*blockBytes)
	}
	c.reading = true
	buf := c.buf[:n*blockBytes]
	out.ops = append(out.ops, &disk.Op{Kind: disk.Read, Off: offset(s.base(c.victim) + c.at), Bufs: [][]byte{buf},
		Done: func(err error) { c.got(buf, err) }})
	return nil
}

// end lets the victim go.
func (c *compaction) end() {
	c.victim.pins.Add(-1)
	c.victim = nil
}

// weight is what moving a segment's live content costs, in blocks, more or
// less: a tombstone that was partly overwritten takes several records.
func (g *segment) weight() uint32 {
	return g.live + g.live/60 + min(g.marks, 8*g.markRecords)/64 + 2
}

// shortlist is how many victims one look at all segments finds.
const shortlist = 16

// pick returns the segment to empty next, from the shortlist. That is made anew
// when it is used up or enough has died since to change it, after one that was
// of no use by ticks: a look at all segments is no part of a request on a large
// store.
func (c *compaction) pick(tick bool) *segment {
	s := c.s
	fresh := c.deaths >= uint64(s.super.segBlocks)/8
	if tight := s.freeSegments() <= reserveWrites; fresh || tight != c.tight || len(c.list) == 0 && (tick || !c.barren) {
		c.tight = tight
		c.look()
		c.deaths, c.barren = 0, false
	}
	for len(c.list) > 0 {
		g := c.list[0]
		if !g.movable() {
			c.list = c.list[1:]
			continue
		}
		c.list = c.list[1:]
		if !s.roomFor(g.weight(), reserveCopies) {
			continue
		}
		oldest := len(s.drops) > maxDrops
		if w := g.weight(); oldest || s.low() && w < c.most() || w*4 <= g.tail || c.wide && w*2 <= g.tail {
			return g
		}
	}
	c.list, c.barren = nil, true
	return nil
}

// movable reports whether a segment can be emptied.
func (g *segment) movable() bool {
	return g.state == segClosed && !g.stuck && g.written == g.tail && g.live+g.marks > 0
}

// most is the weight from which on moving a segment is not worth it: nearly all
// of it would be used up again.
func (c *compaction) most() uint32 {
	n := c.s.super.segBlocks - c.s.headBlocks()
	if !c.tight {
		n -= n / 8
	}
	return n
}

// look makes the shortlist, best first.
func (c *compaction) look() {
	s := c.s
	var used uint64
	oldest, most := len(s.drops) > maxDrops, c.most()
	c.list = c.list[:0]
	for _, g := range s.segs {
		if g.state != segFree {
			used += uint64(g.tail)
		}
		if !g.movable() || !oldest && g.weight() >= most {
			continue
		}
		switch g.score = g.yield(s.lsn); {
		case oldest:
			g.score = -float64(g.gen)
		case c.tight: // what is moved has to come back soon
			g.score = -float64(g.weight())
		}
		if len(c.list) < shortlist || g.score > c.list[len(c.list)-1].score {
			i, _ := slices.BinarySearchFunc(c.list, g.score, func(o *segment, score float64) int { return cmp.Compare(score, o.score) })
			c.list = slices.Insert(c.list, i, g)
			c.list = c.list[:min(len(c.list), shortlist)]
		}
	}
	c.wide = used > s.live+s.live/2+4*uint64(s.super.segBlocks)
}

// yield is what emptying a segment brings for what it costs. A segment nobody
// has written over for long will not get much emptier by waiting, a young one
// will (cost-benefit of log-structured file systems; the root of the age came
// out better than the age itself or the emptiest first).
func (g *segment) yield(lsn uint64) float64 {
	w := float64(g.weight())
	age := float64(lsn - min(lsn, g.last) + 1)
	return (float64(g.tail) - w) / (float64(g.tail) + w) * math.Sqrt(age)
}

// got copies what is live in a window.
func (c *compaction) got(buf []byte, err error) {
	var out outbox
	s := c.s
	s.mu.Lock()
	c.reading = false
	switch {
	case s.failed != nil || s.closed:
		c.end()
	case err != nil:
		c.victim.stuck = true
		c.end()
	default:
		if err := c.copy(buf); err == errNoRoom {
			c.blocked = true // what it holds is more scattered than it seemed
			c.end()
		} else if err != nil {
			s.fail(err, &out)
		}
	}
	s.proceed(&out)
	s.cond.Broadcast()
	s.unlock(&out)
}

// copy goes through the batches of a window; the last one, if cut, begins the
// next window.
func (c *compaction) copy(buf []byte) error {
	s, g := c.s, c.victim
	pos := uint32(0)
	blocks := uint32(len(buf) / blockBytes)
	for pos < blocks {
		b := buf[pos*blockBytes:]
		h, ok := parseBatch(b)
		if !ok || h.gen != g.gen || h.at != s.base(g)+c.at+pos {
			pos++ // damage; what it held stays where it is
			continue
		}
		if pos > 0 && pos+1+uint32(h.blocks) > blocks && c.at+blocks < g.tail {
			break
		}
		err := eachRecord(b, &h, func(r *record, data uint32) error {
			return c.copyRecord(r, h.at, data, b[blockBytes:])
		})
		if err != nil {
			return err
		}
		pos += 1 + uint32(h.blocks)
	}
	c.at += pos
	c.staged = s.lsn
	if c.at >= g.tail {
		g.stuck = g.live+g.marks > 0
		c.end()
	}
	return nil
}

// copyRecord appends the parts of a record the index still points to. at is the
// place of its batch and data that of its first block in blocks.
func (c *compaction) copyRecord(r *record, at, data uint32, blocks []byte) error {
	s := c.s
	if r.kind > kindPoison {
		return nil
	}
	v := s.vols[ids.VolumeID(r.volume)]
	if v == nil {
		return nil
	}
	ch := v.chunk(ids.ChunkID(r.chunk), ids.LayerID(r.layer), false)
	if ch == nil {
		return nil
	}
	live := func(i uint32) (bool, error) {
		e, err := s.idx.get(ch, ids.Block(r.block+i))
		want := at
		if r.kind == kindData {
			want = at + 1 + data + i
		}
		return e.loc == want && e.kind == r.kind && uint64(e.version) == r.version, err
	}
	block := func(i uint32) []byte { return blocks[(data+i)*blockBytes : (data+i+1)*blockBytes] }
	bad := func(i uint32) bool {
		return r.kind == kindData && wire.BlockSum(v.id, ch.id, ch.layer, ids.Block(r.block+i), ids.Version(r.version), block(i)) != le.Uint32(r.payload[4*i:])
	}
	for i := uint32(0); i < r.count; {
		n := uint32(0)
		for ; i+n < r.count; n++ {
			ok, err := live(i + n)
			if err != nil {
				return err
			}
			if ok && bad(i+n) {
				if n > 0 {
					break
				}
				if !s.roomFor(1, reserveCopies) {
					return errNoRoom
				}
				if err := s.appendBad(ch, ids.Block(r.block+i), ids.Version(r.version), le.Uint32(r.payload[4*i:]), block(i)); err != nil {
					return err
				}
				break
			}
			if !ok {
				break
			}
		}
		need := n
		if r.kind != kindData {
			need = 0 // one record, however many blocks
		}
		if n > 0 && !s.roomFor(need, reserveCopies) {
			return errNoRoom
		}
		if n > 0 {
			var sums []uint32
			var run []byte
			if r.kind == kindData {
				for j := range n {
					sums = append(sums, le.Uint32(r.payload[4*(i+j):]))
				}
				run = blocks[(data+i)*blockBytes : (data+i+n)*blockBytes]
			}
			s.copied += uint64(need)
			if err := s.appendRun(ch, r.kind, ids.Block(r.block+i), n, ids.Version(r.version), sums, run); err != nil {
				return err
			}
		}
		i += max(n, 1)
	}
	return nil
}
