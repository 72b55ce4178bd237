package store

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// The way of a checkpoint:
//
//  1. begin: everything up to LSN from is in the index; the pages changed since
//     they were saved are counted.
//  2. save: batch by batch they go to Pages, while requests go on. A page may
//     reflect later records too: replay from there gives the same.
//  3. When those pages are out, the root is appended to the log: the version of
//     the last batch, from, and how many pages Pages now holds with the sum over
//     their hashes. A page reflects no record behind the root; so where the root
//     counts, everything its pages reflect counts too.
//  4. When the root is durable, Pages may forget what only the checkpoint before
//     the last one needs.
//
// Recovery takes the newest root whose pages are all there and replays the log
// behind from; failing that, the one before; failing that, it reads the whole
// log. A checkpoint needs no segment: where the index as of from points into
// one that was given up since, a record behind from says so. What no record
// says is what was forgotten: drops are therefore remembered until no kept
// checkpoint is older (pruneDrops), and none begins while dropped pages are
// still being taken out of the index.
//
// The same batches make room in memory: a page that is saved may leave.

const (
	// saveBatch is how many pages are saved at once.
	saveBatch = 128
	// defaultCheckpointBytes: an opening replays up to twice as much, and what
	// is logged while pages are saved; a replayed GiB of 4 KiB writes takes about
	// a second of CPU.
	defaultCheckpointBytes = 512 << 20
	// savePace: a tick saves at least this many pages, and this part of all.
	savePace     = 512
	savePacePart = 16
)

// root is a checkpoint: a record in the log and in the heads of segments.
type root struct {
	at    uint64 // version of its last batch
	from  uint64 // what the pages lack is in batches above it
	count uint64 // of pages
	sum   uint64 // over their hashes
}

func (r *root) record() record {
	return record{kind: kindRoot, volume: r.at, chunk: r.from, version: r.sum, layer: uint32(r.count >> 32), block: uint32(r.count)}
}

func rootOf(r *record) root {
	return root{at: r.volume, from: r.chunk, sum: r.version, count: uint64(r.layer)<<32 | uint64(r.block)}
}

// checkpoint is the one under way, if any.
type checkpoint struct {
	on           bool
	from         uint64
	pages, gone  uint64 // done when as many have left the index's queues
	credit       int    // pages that may be saved before the next tick
	loggedBefore int64  // bytes of the log when the last one began
}

// checkpointDue reports whether enough was logged since the last one.
func (s *Store) checkpointDue() bool {
	return s.idx.pages != nil && !s.ckpt.on && len(s.leaving) == 0 && s.logged-s.ckpt.loggedBefore >= s.cfg.CheckpointBytes
}

// beginCheckpoint fixes what the checkpoint has to hold. The batch that takes
// records now is replayed whole.
func (s *Store) beginCheckpoint() {
	x := &s.idx
	s.ckpt = checkpoint{on: true, from: s.lsn - 1, pages: x.pagesOut + uint64(len(x.queue)), gone: x.goneOut + uint64(len(x.gone)), loggedBefore: s.logged}
}

// checkpointStep is the tick's part: it begins and ends checkpoints, and lets
// pages be saved.
func (s *Store) checkpointStep() error {
	if s.checkpointDue() {
		s.beginCheckpoint()
	}
	if s.ckpt.on {
		s.ckpt.credit = max(savePace, (len(s.idx.queue)+len(s.idx.gone))/savePacePart)
	}
	s.idx.broken = nil // try again
	return s.endCheckpoint()
}

// endCheckpoint logs the root once all pages are saved.
func (s *Store) endCheckpoint() error {
	x := &s.idx
	if !s.ckpt.on || x.busy || x.pagesOut < s.ckpt.pages || x.goneOut < s.ckpt.gone || !s.roomFor(0, reserveSystem) {
		return nil
	}
	s.ckpt.on = false
	if len(s.roots) > 0 && s.roots[0].at == x.at { // nothing has changed: the older root says less
		x.at++
	}
	r := root{at: x.at, from: s.ckpt.from, count: x.count, sum: x.sum}
	rec := r.record()
	if _, err := s.append(&rec, 0); err != nil {
		return err
	}
	s.roots = append([]root{r}, s.roots...)
	s.syncs = append(s.syncs, syncWait{lsn: s.lsn, then: func(*outbox) { s.keepRoots(r) }})
	return nil
}

// keepRoots lets go of the checkpoints before the last one of r, which is
// durable.
func (s *Store) keepRoots(r root) {
	if i := slices.Index(s.roots, r); i >= 0 && i+2 <= len(s.roots) {
		s.roots = s.roots[:i+2]
		s.idx.pages.Keep(s.roots[i+1].at)
	}
}

// savePages starts a batch if one is due: memory is short, or a checkpoint is
// under way and the tick allows it.
func (s *Store) savePages(out *outbox) {
	x := &s.idx
	if x.pages == nil || x.busy || x.broken != nil || s.closed || s.failed != nil || len(x.queue)+len(x.gone) == 0 {
		return
	}
	if !x.over() && !(s.ckpt.on && s.ckpt.credit > 0 && (x.pagesOut < s.ckpt.pages || x.goneOut < s.ckpt.gone)) {
		return
	}
	batch := x.take(saveBatch)
	s.ckpt.credit -= len(batch)
	at := x.at
	out.saves = append(out.saves, func() { x.pages.Save(at, batch, s.savedPages) })
}

// savedPages ends a batch.
func (s *Store) savedPages(err error) {
	var out outbox
	s.mu.Lock()
	s.idx.saved(err)
	if err != nil { // what it was to hold is behind its end of the queue again
		s.ckpt.on = false
	}
	if s.failed == nil && !s.closed {
		s.idx.trim(s.idx.round())
		if err := s.endCheckpoint(); err != nil {
			s.fail(err, &out)
		}
		s.proceed(&out)
	}
	s.cond.Broadcast()
	s.unlock(&out)
}

// shrink brings the index below its limit during recovery, when nothing else
// runs. If pages cannot be saved, they stay in memory.
func (s *Store) shrink() {
	x := &s.idx
	x.trim(x.round())
	for x.over() && x.broken == nil && len(x.queue)+len(x.gone) > 0 {
		batch := x.take(2 * saveBatch)
		done := make(chan error, 1)
		x.pages.Save(x.at, batch, func(err error) { done <- err })
		x.saved(<-done)
		x.trim(x.round())
	}
}

// restore loads the newest checkpoint that is whole. Without one the index
// starts empty, and Pages too.
func (s *Store) restore(c *course) error {
	if s.idx.pages == nil {
		return nil
	}
	for i, r := range c.roots {
		if s.load(r) == nil {
			c.from, s.roots = r.from, slices.Clone(c.roots[i:])
			return nil
		}
		s.vols = map[ids.VolumeID]*vol{}
		s.idx.reset()
		s.live = 0
		for _, g := range s.segs {
			g.live, g.marks, g.markRecords = 0, 0, 0
		}
	}
	if err := s.idx.pages.Wipe(); err != nil {
		return status.Errorf(status.IO, "empty the index's pages: %w", err)
	}
	return nil
}

// reset makes the index empty.
func (x *index) reset() {
	*x = index{limit: x.limit, pages: x.pages, mark: x.mark, blocks: x.blocks}
}

// load fills the index with a checkpoint. Pages newer than it are of a life
// that ended: they are saved over, or deleted, before the next root.
func (s *Store) load(r root) error {
	x := &s.idx
	var count, sum uint64
	var lastMark uint32
	top, err := x.pages.Load(r.at, func(sp SavedPage, newer bool) error {
		if sp.Page == nil {
			x.gone = append(x.gone, gone{key: sp.Key})
			return nil
		}
		k, ok := parseKey(sp.Key)
		if !ok {
			return errPage
		}
		v := s.vol(k.volume)
		p := &page{c: v.chunk(k.chunk, k.layer, true), n: k.n, known: true, clean: true, hash: pageHash(x.mark, sp.Key, sp.Page)}
		if err := p.decode(sp.Key, sp.Page, x.blocks); err != nil {
			return err
		}
		p.c.place(k.n)
		p.c.pages[k.n] = p
		v.high = max(v.high, p.top)
		count++
		sum += p.hash
		s.countPage(v, p, &lastMark)
		if p.slots != nil {
			x.ring = append(x.ring, p)
		}
		if newer {
			x.changed(p)
		}
		if x.over() && !p.queue && p.slots != nil { // straight out again
			p.slots, p.away = nil, true
			x.ring = x.ring[:len(x.ring)-1]
		}
		return nil
	})
	if err != nil {
		return err
	}
	if count != r.count || sum != r.sum {
		return errPage
	}
	x.at, x.count, x.sum = max(top, r.at), count, sum
	s.shrink()
	return nil
}

// countPage adds a loaded page to the figures. How many records its marks began
// as is not known; neighbours that share one are taken for one.
func (s *Store) countPage(v *vol, p *page, lastMark *uint32) {
	n := uint32(1)
	if p.slots != nil {
		n = pageBlocks
	}
	for i := range n {
		e := p.at(i)
		if e.loc == 0 {
			continue
		}
		if e.kind != kindData && e.loc != *lastMark {
			*lastMark = e.loc
			s.segOf(e.loc).markRecords++
		}
		if n == 1 {
			s.segOf(e.loc).marks += pageBlocks
		} else {
			s.count(v, e, 1)
		}
	}
}
