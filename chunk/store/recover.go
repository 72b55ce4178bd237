package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// The way of recovery:
//
//  1. findUses: the segments' first batches, and the heads among them.
//  2. survey: the newest head and what follows it give the log's course; the
//     batches there say up to where it must be whole (bound), and up to where
//     it is (cut). A gap below bound is damage; the first one above is the end.
//  3. restore: the newest checkpoint whose pages are all there (checkpoint.go).
//  4. replay what is behind it, in LSN order: the newest record of a block wins.
//  5. A new segment with a new head, durable before anything is answered: it
//     says where the log was cut, so that the next recovery cuts it there too.
//
// A kill (same boot id) keeps all that was written, so bound is then the
// highest written mark, after a power loss the highest durable one. Above
// bound, a batch whose data does not match its checksums ends the log: it was
// never promised, nor was anything behind it.
//
// Damage means that records are lost which may have been the newest of any
// block, or a sealed epoch. They are not known by name, so the store takes a
// new incarnation: gateways then do not count it as in sync and compare it,
// block by block, with a good replica before they read from it.

var errDone = errors.New("done")

// course is what recovery knows of the log.
type course struct {
	w       window
	uses    []use  // all, by gen
	chain   []use  // those in the log, by gen
	head    *head  // newest complete head below cut
	bound   uint64 // up to here the log must be whole
	cut     uint64 // first LSN that does not count
	top     uint64 // highest LSN seen anywhere
	life    uint32 // highest life seen anywhere
	damage  string // the first damage found
	clean   bool   // the log ends with a clean close
	sameRun bool   // the system has not lost power since the newest head
	roots   []root // of the checkpoints below cut, newest first
	from    uint64 // up to here the index is a checkpoint's; 0: none
	read    int64  // bytes of log behind it
}

// recover rebuilds the store from its log and makes it ready for requests.
func (s *Store) recover() error {
	c := &course{w: window{d: s.disk}, cut: 1<<64 - 1}
	defer c.w.release()
	c.uses = s.findUses(&c.w)
	if err := s.survey(c); err != nil {
		return err
	}
	if err := s.restore(c); err != nil {
		return err
	}
	if err := s.replay(c); err != nil {
		return err
	}
	// What is built on below has to stay: some of it may be in the page cache.
	if err := disk.SyncAll(s.disk); err != nil {
		return status.Errorf(status.IO, "sync the disk: %w", err)
	}
	s.adopt(c)
	if err := s.backFree(s.stock()); err != nil {
		return err
	}
	if err := s.firstHead(); err != nil {
		return err
	}
	return s.replenish()
}

// survey fixes chain, bound and cut.
func (s *Store) survey(c *course) error {
	for _, u := range c.uses {
		c.life = max(c.life, u.life)
	}
	for {
		if err := s.chooseHead(c); err != nil {
			return err
		}
		gap, err := s.measure(c)
		if err != nil {
			return err
		}
		if gap >= c.cut {
			return nil
		}
		// Once more, without what is behind the cut. If the head is, it was
		// never durable, and what an older head names is still there.
		c.cut = gap
	}
}

// chooseHead takes the newest complete head below cut and lists the log's
// segments: those the head names, its own, and those begun later.
func (s *Store) chooseHead(c *course) error {
	c.head, c.chain, c.roots = nil, nil, nil
	for i := len(c.uses) - 1; i >= 0 && c.head == nil; i-- {
		if c.uses[i].gen < c.cut {
			c.head = s.readHead(&c.w, c.uses[i])
		}
	}
	if c.head == nil {
		return status.Errorf(status.Corrupt, "store %s has no readable segment head left: rebuild it from its peers", s.super.ID)
	}
	if c.head.beyond {
		return status.Errorf(status.Corrupt, "the log of store %s names segments its superblock does not know: rebuild it from its peers", s.super.ID)
	}
	c.sameRun = c.head.boot == s.cfg.BootID
	inUse := c.head.segments
	later := []use{c.head.use}
	for _, u := range c.uses {
		if u.gen > c.head.gen && u.gen < c.cut {
			later = append(later, u)
		}
	}
	// What was given up behind the head may be reused or empty by now.
	gone := map[use]bool{}
	for _, u := range later {
		err := s.scan(&c.w, u, func(h *batchHead, _ uint32, b []byte) error {
			if h.lsn >= c.cut {
				return errDone
			}
			return eachRecord(b, h, func(r *record, _ uint32) error {
				switch r.kind {
				case kindFree:
					gone[use{seg: s.segs[r.block%uint32(len(s.segs))], gen: r.version}] = true
				case kindRoot:
					c.roots = append(c.roots, rootOf(r)) // again, if the head has it
				}
				return nil
			})
		})
		if err != nil && err != errDone {
			return err
		}
	}
	for _, u := range inUse {
		later = append(later, u)
	}
	for _, u := range later {
		if !gone[use{seg: u.seg, gen: u.gen}] {
			c.chain = append(c.chain, u)
		}
	}
	slices.SortFunc(c.roots, func(a, b root) int { return cmp.Compare(b.at, a.at) })
	c.roots = slices.Compact(c.roots)
	slices.SortFunc(c.chain, func(a, b use) int { return cmp.Compare(a.gen, b.gen) })
	return nil
}

// tail is a batch above what is known to be whole.
type tail struct {
	seg *segment
	lsn uint64
	at  uint32
}

// measure sets bound from the marks in the log and returns the first LSN above
// it that is missing or torn.
func (s *Store) measure(c *course) (gap uint64, err error) {
	var tails []tail
	marks := uint64(0)
	// Not the chain alone: a segment that was given up above bound is still on
	// the disk, and its LSNs are no gap. The newest knows the highest marks.
	for i, u := range slices.Backward(c.uses) {
		if i+1 < len(c.uses) && c.uses[i+1].gen-1 <= marks {
			break // judged by replay
		}
		err := s.scan(&c.w, u, func(h *batchHead, at uint32, _ []byte) error {
			// What an earlier life had written may be gone with the power since:
			// the sync before this life's first head covers what is left of it.
			if marks = max(marks, h.durable); c.sameRun && u.life >= c.head.life {
				marks = max(marks, h.written)
			}
			c.top = max(c.top, h.lsn)
			tails = append(tails, tail{u.seg, h.lsn, at})
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	c.bound = max(c.bound, marks)
	slices.SortFunc(tails, func(a, b tail) int { return cmp.Compare(a.lsn, b.lsn) })
	next := c.bound + 1
	for _, t := range tails {
		if t.lsn <= c.bound {
			continue
		}
		c.w.count = 0
		h, b, ok := s.valid(&c.w, t.seg, t.at)
		if t.lsn != next || !ok || !s.intactData(&c.w, t.seg, t.at, b, &h) {
			break
		}
		next++
	}
	return next, nil
}

// replay applies the log behind the checkpoint to the index.
func (s *Store) replay(c *course) error {
	for k, lsn := range c.head.drops {
		s.drops[k] = lsn
	}
	for _, l := range c.head.layers {
		s.applyLayers(l.id, l.last, l.marks)
	}
	s.incarnation = max(c.head.incarnation, s.super.Incarnation)
	s.gaps = c.head.gaps
	for k, lsn := range s.drops {
		if lsn > c.from { // the record may be gone, the pages are not
			s.applyDrop(k, lsn)
		}
	}
	for i, u := range c.chain {
		if u.gen == c.head.gen {
			for j := range c.head.volumes {
				s.applyVolume(&c.head.volumes[j])
			}
		}
		last := u.last
		if last == 0 && i+1 < len(c.chain) {
			last = c.chain[i+1].gen - 1
		}
		if u.last > 0 && u.last <= c.from && u.gen < c.head.gen { // the checkpoint has it
			u.seg.gen, u.seg.life, u.seg.last, u.seg.tail, u.seg.state = u.gen, u.life, u.last, u.tail, segClosed
			continue
		}
		expect := u.gen
		if u.gen < c.head.gen {
			expect = max(expect, c.from+1)
		}
		err := s.scan(&c.w, use{seg: u.seg, gen: u.gen, life: u.life, last: last, headed: true}, func(h *batchHead, at uint32, b []byte) error {
			if h.lsn >= c.cut {
				return errDone
			}
			s.missing(c, expect, h.lsn-1, u)
			expect = max(expect, h.lsn+1)
			u.seg.tail = at + 1 + uint32(h.blocks)
			return s.replayBatch(c, u, h, at, b)
		})
		if err != nil && err != errDone {
			return err
		}
		if last == 0 {
			last = c.bound
		}
		s.missing(c, expect, min(last, c.cut-1), u)
		u.seg.gen, u.seg.life, u.seg.last, u.seg.state = u.gen, u.life, min(last, c.cut-1), segClosed
		if u.last == 0 && i+1 == len(c.chain) {
			u.seg.last = c.cut - 1
		}
	}
	for len(s.leaving) > 0 {
		if err := s.forget(1 << 20); err != nil {
			return err
		}
	}
	return nil
}

// gap is a range of LSNs of the segment begun at gen that is known to be lost.
type gap struct{ gen, from, to uint64 }

// missing notes a gap in what was to be whole, once: a new one is damage.
func (s *Store) missing(c *course, from, to uint64, u use) {
	g := gap{u.gen, from, to}
	known := func(o gap) bool { return o.gen == g.gen && o.from <= from && to <= o.to }
	if from > to || slices.ContainsFunc(s.gaps, known) {
		return
	}
	s.gaps = append(s.gaps, g)
	if c.damage == "" {
		c.damage = fmt.Sprintf("batches %d to %d of segment %d are damaged", from, to, u.seg.n)
	}
}

// replayBatch applies the records of one batch.
func (s *Store) replayBatch(c *course, u use, h *batchHead, at uint32, b []byte) error {
	c.clean = false
	if s.idx.over() {
		s.shrink()
	}
	if h.lsn > c.from {
		c.read += offset(1 + uint32(h.blocks))
	}
	return eachRecord(b, h, func(r *record, data uint32) error {
		v, ch := ids.VolumeID(r.volume), ids.ChunkID(r.chunk)
		switch {
		case r.kind <= kindPoison:
			if h.lsn <= c.from || s.dropped(v, ch, h.lsn) || s.vol(v).gone(ids.LayerID(r.layer)) {
				return nil
			}
			e := entry{version: ids.Version(r.version), loc: h.at, kind: r.kind}
			if r.kind == kindData {
				e.loc = h.at + 1 + data
			} else {
				u.seg.markRecords++
			}
			return s.index(s.vol(v).chunk(ch, ids.LayerID(r.layer), true), ids.Block(r.block), r.count, e,
				func(i uint32) uint32 { return le.Uint32(r.payload[4*i:]) })
		case r.kind == kindVolume && !s.dropped(v, 0, h.lsn):
			s.applyVolume(r)
		case r.kind == kindLayers && !s.dropped(v, 0, h.lsn):
			s.applyLayers(v, ids.LayerID(r.layer), marksIn(r))
		case r.kind == kindDrop:
			if h.lsn > c.from {
				s.applyDrop(dropKey{v, ch}, h.lsn)
			} else {
				s.drops[dropKey{v, ch}] = max(s.drops[dropKey{v, ch}], h.lsn)
			}
		case r.kind == kindClean:
			c.clean = true
		}
		return nil
	})
}

// applyVolume enters what the log says of a volume; epochs and floors only
// rise.
func (s *Store) applyVolume(r *record) {
	v := s.vol(ids.VolumeID(r.volume))
	v.epoch = max(v.epoch, ids.Epoch(r.layer))
	v.floor = max(v.floor, ids.Version(r.version))
	v.logged = v.floor
	v.intact = r.flags&flagIntact != 0
}

// adopt takes what recovery found as the store's state.
func (s *Store) adopt(c *course) {
	s.replayed = c.read
	s.ckpt.loggedBefore = -c.read
	if c.from == 0 { // a checkpoint would have been of use
		s.ckpt.loggedBefore = -s.cfg.CheckpointBytes
	}
	s.lsn, s.recovered = max(c.top, c.bound, c.cut-1), c.cut-1
	// Not lsn: what says that there is a gap is not durable yet. It is written
	// before anything that claims so.
	s.written, s.durable = s.lsn, c.cut-1
	s.life = c.life + 1
	lost := !c.sameRun && !c.clean
	if c.damage != "" {
		s.note, lost = c.damage+": the store takes a new incarnation and has to be compared with its peers", true
		s.incarnation++
	}
	for _, v := range s.vols {
		v.intact = v.intact && !lost
	}
	s.free, s.bare, s.dead, s.pinned = nil, nil, nil, nil
	for _, g := range s.segs {
		g.written = g.tail
		switch {
		case g.state == segFree && g.stale:
			g.stale, g.state, g.tail = false, segLeaving, s.super.segBlocks
			s.pinned = append(s.pinned, g) // discarded once the head is durable
		case g.state == segFree:
			s.bare = append(s.bare, g)
		case g.live+g.marks == 0:
			s.dead = append(s.dead, g)
		}
	}
	if n := len(s.pinned); n > 0 { // the last one to be tried: it has room behind it, or most of it
		s.freed(s.pinned[n-1], &s.bare)
		s.pinned = s.pinned[:n-1]
	}
}

// replenish compacts until a few segments are free, if that is possible. Every
// opening takes one: a store that is opened again and again, and falls each time
// before compaction gets anywhere, would otherwise run out, and open no more.
func (s *Store) replenish() error {
	s.mu.Lock()
	s.opening = true
	defer func() { s.opening = false; s.mu.Unlock() }()
	for s.failed == nil && s.freeSegments() <= reserveSystem {
		var out outbox
		lsn := s.lsn
		err := s.releaseDead()
		if err == nil {
			err = s.compact.step(&out, true)
		}
		if err != nil {
			s.fail(err, &out)
		}
		s.proceed(&out)
		idle := s.lsn == lsn && !s.compact.reading && s.discards == 0
		s.unlock(&out)
		s.mu.Lock()
		for s.failed == nil && (s.writing != nil || s.syncing || s.compact.reading || s.discards > 0) {
			s.cond.Wait()
		}
		if idle {
			break // nothing is left that would yield
		}
	}
	return s.failed
}

// firstHead opens a segment and waits until its head is durable.
func (s *Store) firstHead() error {
	var out outbox
	s.mu.Lock()
	err := s.openSegment()
	done := false
	if err == nil {
		s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(out *outbox) {
			done = true
			stale := s.pinned
			s.pinned = nil
			s.discard(stale, out)
		}})
		s.pump(&out)
	}
	s.unlock(&out)
	s.mu.Lock()
	defer s.mu.Unlock()
	for err == nil && s.failed == nil && !done {
		s.cond.Wait()
	}
	if err != nil {
		return err
	}
	return s.failed
}
