package store

import (
	"cmp"
	"slices"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a scrub, one segment after the other:
//
//  1. read: a window of it around the page cache, as the pace allows. If that
//     fails, block by block: what the disk cannot give reads as zeros here.
//  2. judge: every batch against its checksum, every data block against the one
//     in its record. A bad block the index does not point to is nobody's.
//  3. A bad block of data is noted: gateways ask for those of their volumes
//     (wire.Damaged) and repair them from a good replica.
//  4. A bad batch has lost records, which only the index knows now. Everything
//     that lies in it is appended anew (rescue.go), and the gap is entered as
//     known, so that the next opening does not take it for damage.
//
// At the end of a pass both copies of the superblock are read, and a bad one is
// written over by the good one.

const (
	// maxBad bounds the bad blocks that are remembered; more are counted only.
	maxBad = 1 << 16
	// scrubBurst bounds what a pause in the steps saves up.
	scrubBurst = time.Second
	// maxPace, in bytes per second, is more than any disk gives; a second of it
	// in nanoseconds is still a number.
	maxPace = 4 << 30
)

// Scrub tells how a scrub fares. It covers the pass that runs, or the last one.
type Scrub struct {
	Running   bool
	Segment   uint32 // the next to be read; a pass that was cut goes on from here
	Segments  uint32 // of the store
	ReadBytes uint64
	Blocks    uint64 // of data that were verified
	BadBlocks uint64 // of data, in use
	BadHeads  uint64 // batches whose records were damaged, and are written anew
	Repaired  uint64 // superblock copies
	Unrescued uint64 // bad batches that could not be written anew: no room; the next pass tries again
	Passes    uint64 // that were finished since the store was opened
}

// Bad is a block that cannot be read and is still in use: its data are not what was
// written, or it has no good copy left (poison).
type Bad struct {
	Volume  ids.VolumeID
	Chunk   ids.ChunkID
	Layer   ids.LayerID
	Block   ids.Block
	Version ids.Version
}

type badKey struct {
	v ids.VolumeID
	c ids.ChunkID
	l ids.LayerID
	b ids.Block
}

// scrubber is the state of a pass.
type scrubber struct {
	Scrub
	pace    int64 // bytes per second; 0: none runs
	credit  int64 // bytes that may be read now
	last    time.Duration
	busy    bool // a read, or a rescue, is under way
	seg     *segment
	gen     uint64 // of seg when it was begun
	at      uint32 // next block of it
	lsn     uint64 // last good one before at
	buf     []byte
	rescue  *rescue
	bad     map[badKey]entry
	sealing bool // the open segment was closed for this pass
}

// StartScrub begins a pass at a segment (0: a whole one) with a pace in bytes
// per second. One that runs goes on, at the new pace.
func (s *Store) StartScrub(from uint32, bytesPerSecond int64) error {
	if bytesPerSecond <= 0 {
		return status.Errorf(status.Invalid, "a scrub of %d bytes per second never ends: name a pace", bytesPerSecond)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &s.scrub
	c.pace = min(bytesPerSecond, maxPace)
	if c.Running {
		return nil
	}
	if from >= uint32(len(s.segs)) {
		from = 0
	}
	passes := c.Passes
	c.Scrub = Scrub{Running: true, Segment: from, Segments: uint32(len(s.segs)), Passes: passes}
	c.seg, c.sealing, c.credit = nil, false, 0
	return nil
}

// ScrubStatus tells how the scrub fares.
func (s *Store) ScrubStatus() Scrub {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.scrub.Scrub
}

// BadBlocks lists the blocks that are known to be bad and still in use.
func (s *Store) BadBlocks() []Bad {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Bad
	for k, e := range s.scrub.bad {
		if s.stillBad(k, e) {
			out = append(out, Bad{k.v, k.c, k.l, k.b, e.version})
		}
	}
	slices.SortFunc(out, func(a, b Bad) int {
		return cmp.Or(cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Chunk, b.Chunk), cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Block, b.Block))
	})
	return out
}

// stillBad reports whether the index still points to what was bad; else it is
// forgotten: the block was overwritten, repaired or dropped.
func (s *Store) stillBad(k badKey, e entry) bool {
	if v := s.vols[k.v]; v != nil {
		if c := v.chunk(k.c, k.l, false); c != nil {
			if now, err := s.idx.get(c, k.b); err == nil && now == e {
				return true
			}
		}
	}
	delete(s.scrub.bad, k)
	return false
}

// damaged answers a gateway that asks for the bad blocks of its volume.
func (s *Store) damaged(q *wire.Request, rep *wire.Reply) {
	for k, e := range s.scrub.bad {
		if k.v == q.Volume && e.kind == kindData && s.stillBad(k, e) { // poison has no good copy anywhere
			rep.Entries = append(rep.Entries, wire.Entry{Chunk: k.c, Layer: k.l, Block: k.b, Version: e.version, Kind: wire.EntryData, Sum: e.sum})
		}
	}
	slices.SortFunc(rep.Entries, func(a, b wire.Entry) int {
		return cmp.Or(cmp.Compare(a.Chunk, b.Chunk), cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Block, b.Block))
	})
	if n := int(q.Count); n > 0 && len(rep.Entries) > n {
		rep.Entries, rep.Flags = rep.Entries[:n], rep.Flags|wire.FlagMore
	}
}

// step goes on as far as the pace allows; it is driven by the clock.
func (c *scrubber) step(s *Store, now time.Duration, out *outbox) error {
	dt := min(max(now-c.last, 0), scrubBurst)
	if c.last = now; !c.Running {
		return nil
	}
	c.credit = min(c.credit+int64(dt)*c.pace/int64(time.Second), max(c.pace, windowBlocks*blockBytes))
	return c.more(s, out)
}

// more goes on while there is credit.
func (c *scrubber) more(s *Store, out *outbox) error {
	if c.busy || s.closed || !c.Running {
		return nil
	}
	if c.rescue != nil {
		return c.rescue.step(s)
	}
	for c.credit > 0 {
		if c.seg == nil || c.seg.gen != c.gen || c.seg.state != segClosed || c.at >= c.seg.tail {
			if more, err := c.next(s, out); !more || err != nil {
				return err
			}
			continue
		}
		c.read(s, out)
		return nil
	}
	return nil
}

// next goes to the next segment that is in use, or ends the pass.
func (c *scrubber) next(s *Store, out *outbox) (bool, error) {
	c.seg = nil
	for ; c.Segment < c.Segments; c.Segment++ {
		g := s.segs[c.Segment]
		if g.state == segOpen && !c.sealing && g.tail > s.headBlocks() && s.roomFor(0, reserveWrites) {
			c.sealing = true // once, or an idle store would be closing segments all the time
			if err := s.newSegment(); err != nil {
				return false, err
			}
		}
		if g.state == segClosed && g.written < g.tail {
			return false, nil // in a moment
		}
		if g.state == segClosed {
			c.seg, c.gen, c.at, c.lsn = g, g.gen, 0, 0
			c.Segment++
			return true, nil
		}
	}
	c.busy = true
	b := make([]byte, 2*blockBytes)
	out.ops = append(out.ops, &disk.Op{Kind: disk.Read, Bufs: [][]byte{b}, Done: func(err error) { s.scrubbedSuper(b, err) }})
	return false, nil
}

// read reads the next window.
func (c *scrubber) read(s *Store, out *outbox) {
	n := min(windowBlocks, c.seg.tail-c.at)
	if c.buf == nil {
		c.buf = disk.Aligned(int(min(windowBlocks, s.super.segBlocks)) * blockBytes)
	}
	c.busy = true
	c.credit -= int64(n) * blockBytes
	c.ReadBytes += uint64(n) * blockBytes
	c.seg.pins.Add(1)
	buf, off := c.buf[:n*blockBytes], offset(s.base(c.seg)+c.at)
	out.ops = append(out.ops, &disk.Op{Kind: disk.Read, Direct: true, Off: off, Bufs: [][]byte{buf}, Done: func(err error) {
		if err != nil {
			s.readEach(buf, off)
			return
		}
		s.scrubbed(buf)
	}})
}

// readEach reads a window block by block, because it cannot be read at once.
func (s *Store) readEach(buf []byte, off int64) {
	b := buf
	var next func()
	next = func() {
		if len(b) == 0 {
			s.scrubbed(buf)
			return
		}
		block, at := b[:blockBytes], off+int64(len(buf)-len(b))
		b = b[blockBytes:]
		s.disk.Submit(&disk.Op{Kind: disk.Read, Direct: true, Off: at, Bufs: [][]byte{block}, Done: func(err error) {
			if err != nil {
				clear(block)
			}
			next()
		}})
	}
	next()
}

// scrubbed judges a window.
func (s *Store) scrubbed(buf []byte) {
	var out outbox
	s.mu.Lock()
	c := &s.scrub
	g := c.seg
	c.busy = false
	g.pins.Add(-1)
	if s.failed == nil && !s.closed && g.gen == c.gen && g.state == segClosed {
		err := c.judge(s, buf)
		if err == nil && c.rescue == nil {
			err = c.more(s, &out)
		}
		if err != nil {
			s.fail(err, &out)
		}
	}
	s.proceed(&out)
	s.cond.Broadcast()
	s.unlock(&out)
}

// judge goes through the batches of a window, up to the first that is cut off by
// its end or damaged: that one begins the next window.
func (c *scrubber) judge(s *Store, buf []byte) error {
	blocks := uint32(len(buf) / blockBytes)
	for pos := uint32(0); pos < blocks; {
		b := buf[pos*blockBytes:]
		h, ok := c.batch(s, b, pos)
		switch {
		case !ok && pos > 0:
			c.at += pos
			return nil
		case !ok:
			c.lost(s, buf)
			return nil
		case pos+1+uint32(h.blocks) > blocks:
			if pos == 0 { // it says it is larger than what is left of the segment
				c.lost(s, buf)
				return nil
			}
			c.at += pos
			return nil
		}
		if err := c.blocks(s, b, &h, pos); err != nil {
			return err
		}
		c.lsn = h.lsn
		pos += 1 + uint32(h.blocks)
	}
	c.at += blocks
	return nil
}

// batch parses the batch at pos of the window, if there is one of this segment.
func (c *scrubber) batch(s *Store, b []byte, pos uint32) (batchHead, bool) {
	h, ok := parseBatch(b)
	return h, ok && h.mark == s.super.mark() && h.gen == c.gen && h.at == s.base(c.seg)+c.at+pos && h.lsn > c.lsn
}

// blocks holds the data of a batch against its checksums.
func (c *scrubber) blocks(s *Store, b []byte, h *batchHead, pos uint32) error {
	first := s.base(c.seg) + c.at + pos + 1
	return eachRecord(b, h, func(r *record, data uint32) error {
		if r.kind != kindData && r.kind != kindPoison {
			return nil
		}
		for i := range r.count {
			k := badKey{ids.VolumeID(r.volume), ids.ChunkID(r.chunk), ids.LayerID(r.layer), ids.Block(r.block + i)}
			if r.kind == kindPoison {
				if err := c.note(s, k, kindPoison, h.at); err != nil {
					return err
				}
				continue
			}
			sum := le.Uint32(r.payload[4*i:])
			d := b[(1+data+i)*blockBytes : (2+data+i)*blockBytes]
			if wire.BlockSum(k.v, k.c, k.l, k.b, ids.Version(r.version), d) == sum {
				c.Blocks++
				continue
			}
			if err := c.note(s, k, kindData, first+data+i); err != nil {
				return err
			}
		}
		return nil
	})
}

// note remembers a bad block if the index points to it.
func (c *scrubber) note(s *Store, k badKey, of kind, loc uint32) error {
	v := s.vols[k.v]
	if v == nil {
		return nil
	}
	ch := v.chunk(k.c, k.l, false)
	if ch == nil {
		return nil
	}
	e, err := s.idx.get(ch, k.b)
	if err != nil || e.loc != loc || e.kind != of {
		return err
	}
	if of == kindData {
		c.BadBlocks++
	}
	c.remember(k, e)
	return nil
}

func (c *scrubber) remember(k badKey, e entry) {
	if c.bad == nil {
		c.bad = map[badKey]entry{}
	}
	if len(c.bad) < maxBad {
		c.bad[k] = e
	}
}

// poisoned remembers blocks without a good copy: they are bad until they are written
// over, as the store knows at once, or from its next scrub on if it was restarted.
func (c *scrubber) poisoned(ch *chunk, block ids.Block, n uint32, e entry) {
	for i := range n {
		c.remember(badKey{ch.v.id, ch.id, ch.layer, block + ids.Block(i)}, e)
	}
}

// scrubbedSuper ends a pass: a bad copy of the superblock is written anew.
func (s *Store) scrubbedSuper(b []byte, err error) {
	var out outbox
	s.mu.Lock()
	c := &s.scrub
	c.busy = false
	c.Running = false
	c.Passes++
	if s.failed == nil && !s.closed {
		good := s.super.encode()
		for i := range int64(2) {
			if err == nil && slices.Equal(b[i*blockBytes:(i+1)*blockBytes], good) {
				continue
			}
			c.Repaired++
			out.ops = append(out.ops, &disk.Op{Kind: disk.Write, Off: i * blockBytes, Bufs: [][]byte{good}, Done: s.rewroteSuper})
			break // the other one, if it is bad too, in the next pass: one of them is always whole
		}
	}
	s.cond.Broadcast()
	s.unlock(&out)
}

// rewroteSuper stops a store whose superblock cannot be written. It is durable
// with the next sync: until then the other copy is whole.
func (s *Store) rewroteSuper(err error) {
	if err == nil {
		return
	}
	var out outbox
	s.mu.Lock()
	s.fail(status.Errorf(status.IO, "write the superblock: %w", err), &out)
	s.unlock(&out)
}

// newSegment goes on in another segment, with a new head, before the open one is
// full.
func (s *Store) newSegment() error {
	s.endBatch()
	return s.openSegment()
}
