package store

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"

	"github.com/cairnstore/cairn/chunk/disk"
)

// The way of an append:
//
//  1. append: a record finds its place in the open batch (a new batch, group or
//     segment begins when it must); from here on the index knows where it is.
//  2. pump: when no write is in flight, the oldest group goes to the disk as
//     one write. What arrives meanwhile gathers in the next one.
//  3. wrote: its requests are answered, and step 2 again.
//
// One write is in flight at a time, so groups reach the disk in LSN order.

const (
	// groupBytes is when a group takes no further batch.
	groupBytes = 1 << 20
	// largeGroup is the mean size from which on groups go around the page cache.
	largeGroup = 512 << 10
	// maxStaged bounds the bytes staged and not written; writes beyond it wait.
	maxStaged = 32 << 20
	// maxWaiting bounds the bytes of writes that wait; more are refused.
	maxWaiting = 128 << 20
	// keptBuffers bounds the free group buffers kept for reuse.
	keptBuffers = 4
)

// group is consecutive batches of one segment that are written at once.
type group struct {
	seg     *segment
	start   uint32 // first block, in the segment
	buf     []byte
	heads   []int // where in buf its batches begin
	first   uint64
	last    uint64 // LSNs of its batches
	done    []answer
	waiting []*read // reads of what is in it
	op      disk.Op
}

// answer is a reply that is due when its group is written.
type answer struct {
	c   *caller
	rep *wire.Reply
}

// staged is a record's place: in memory, for the caller to fill before the next
// append, and on the disk.
type staged struct {
	payload []byte
	data    []byte // the blocks of a data record
	loc     uint32 // see entry
}

// append stages r with payload bytes behind it.
func (s *Store) append(r *record, payload int) (staged, error) {
	blocks := uint32(0)
	if r.kind == kindData {
		blocks = r.count
	}
	if err := s.makeRoom(recordFixed+payload, blocks); err != nil {
		return staged{}, err
	}
	g, b := s.group, &s.batch
	head := g.heads[len(g.heads)-1]
	out := staged{loc: s.base(g.seg) + g.start + uint32(head/blockBytes)}
	if blocks > 0 {
		out.loc = s.base(g.seg) + g.seg.tail
		n := len(g.buf)
		g.buf = grow(g.buf, int(blocks)*blockBytes)
		out.data = g.buf[n:]
		g.seg.tail += blocks
		b.blocks += uint16(blocks)
	}
	at := g.buf[head+batchFixed+int(b.used) : head+blockBytes]
	out.payload = r.encode(at)[:payload]
	b.used += uint16(recordFixed + payload)
	b.records++
	return out, nil
}

// grow lengthens b by n bytes without clearing them. It stays aligned, as a
// way around the page cache demands.
func grow(b []byte, n int) []byte {
	if cap(b)-len(b) < n {
		longer := disk.Aligned(max(2*cap(b), len(b)+n))
		return longer[:copy(longer, b)+n]
	}
	return b[:len(b)+n]
}

// runRoom returns how many of n blocks a data record could take now at most
// without a new batch; 0: a new batch is due.
func (s *Store) runRoom(n uint32) uint32 {
	if s.group == nil || s.open == nil {
		return 0
	}
	room := batchRoom - int(s.batch.used) - recordFixed
	return min(n, uint32(max(room/4, 0)), s.super.segBlocks-s.open.tail)
}

// makeRoom begins a batch, a group and a segment as needed, so that a record
// of size bytes and its blocks fit.
func (s *Store) makeRoom(size int, blocks uint32) error {
	if s.open != nil && s.group != nil && batchRoom-int(s.batch.used) >= size && s.super.segBlocks-s.open.tail >= blocks {
		return nil
	}
	s.endBatch()
	if s.open == nil || s.super.segBlocks-s.open.tail < 1+blocks {
		if err := s.openSegment(); err != nil {
			return err
		}
		if batchRoom-int(s.batch.used) >= size {
			return nil // behind the head's last table
		}
		s.endBatch()
	}
	s.beginBatch()
	return nil
}

// beginBatch starts a batch in the open segment, with the floors that changed.
func (s *Store) beginBatch() {
	if s.group != nil && len(s.group.buf) >= groupBytes {
		s.group = nil
	}
	if s.group == nil {
		s.group = &group{seg: s.open, start: s.open.tail, buf: s.takeBuffer(), first: s.lsn + 1}
		s.queue = append(s.queue, s.group)
	}
	g := s.group
	s.lsn++
	head := len(g.buf)
	g.buf = grow(g.buf, blockBytes)
	g.heads = append(g.heads, head)
	g.last = s.lsn
	s.batch = batchHead{life: s.life, mark: s.super.mark(), gen: s.open.gen, lsn: s.lsn, at: s.base(s.open) + s.open.tail}
	s.batch.begin(g.buf[head:])
	g.seg.tail++
	if s.inHead {
		s.batch.flags = flagHead // and the head has all floors
	} else {
		s.addFloors()
	}
}

// addFloors puts floors that are not in the log yet into a new batch, as many
// as a quarter of it holds.
func (s *Store) addFloors() {
	g, b := s.group, &s.batch
	head := g.heads[len(g.heads)-1]
	for len(s.floors) > 0 && int(b.used) < batchRoom/4 {
		v := s.floors[len(s.floors)-1]
		s.floors = s.floors[:len(s.floors)-1]
		if v.logged >= v.floor || s.vols[v.id] != v {
			continue
		}
		r := v.record()
		r.encode(g.buf[head+batchFixed+int(b.used) : head+blockBytes])
		b.used += recordFixed
		b.records++
		v.logged = v.floor
	}
}

// record is what the log says of a volume.
func (v *vol) record() record {
	r := record{kind: kindVolume, volume: uint64(v.id), version: uint64(v.floor), layer: uint32(v.epoch)}
	if v.intact {
		r.flags = flagIntact
	}
	return r
}

// endBatch closes the batch that takes records, if there is one.
func (s *Store) endBatch() {
	if s.group == nil || s.batch.lsn == 0 {
		return
	}
	s.batch.end(s.group.buf[s.group.heads[len(s.group.heads)-1]:])
	s.batch = batchHead{used: batchRoom}
}

// openSegment closes the open segment and begins the next with its head.
func (s *Store) openSegment() error {
	if s.headBlocks() > s.super.segBlocks/2 {
		return status.Errorf(status.TooBig, "the store's tables of %d volumes and %d segments do not fit into a segment's head", len(s.vols), len(s.segs))
	}
	g, err := s.takeFree()
	if err != nil {
		return err
	}
	if old := s.open; old != nil {
		old.state, old.last = segClosed, s.lsn
		if old.live == 0 && old.marks == 0 {
			s.dead = append(s.dead, old)
		}
	}
	s.pruneDrops()
	s.pruneGaps()
	s.group = nil
	s.chooseWay(g)
	g.state, g.gen, g.life, g.tail, g.written, g.markRecords, g.stuck = segOpen, s.lsn+1, s.life, 0, 0, 0, false
	s.open = g
	return s.writeHead()
}

// chooseWay decides how a segment is written. Where nearly every write is
// flushed at once, a way around the page cache saves the sync from writing the
// page cache out, and where writes are large it saves the copy; where neither,
// the page cache answers sooner, and reads later.
func (s *Store) chooseWay(g *segment) {
	g.direct = s.groups > 0 && (s.flushes*2 > s.groups || (s.logged-s.openFrom)/int64(s.groups) >= largeGroup)
	s.groups, s.flushes, s.openFrom = 0, 0, s.logged
}

// takeBuffer takes a group buffer, reused if there is one.
func (s *Store) takeBuffer() []byte {
	if n := len(s.buffers); n > 0 {
		b := s.buffers[n-1]
		s.buffers = s.buffers[:n-1]
		return b[:0]
	}
	return disk.Aligned(groupBytes / 4)[:0]
}

// pump sends the oldest group, if the disk is idle, and syncs that are due.
func (s *Store) pump(out *outbox) {
	if s.failed != nil {
		return
	}
	if s.writing == nil && len(s.queue) > 0 {
		g := s.queue[0]
		s.queue = s.queue[1:]
		if g == s.group {
			s.endBatch()
			s.group = nil
		}
		for _, h := range g.heads {
			finishBatch(g.buf[h:], s.durable, s.written)
		}
		s.writing, s.marked = g, s.durable
		s.logged += int64(len(g.buf))
		s.groups++
		g.op = disk.Op{Kind: disk.Write, Direct: g.seg.direct, Off: offset(s.base(g.seg) + g.start), Bufs: [][]byte{g.buf},
			Done: func(err error) { s.wrote(g, err) }}
		out.ops = append(out.ops, &g.op)
	}
	s.startSync(out)
}

// wrote ends the write in flight.
func (s *Store) wrote(g *group, err error) {
	var out outbox
	s.mu.Lock()
	s.writing = nil
	if err != nil {
		s.fail(status.Errorf(status.IO, "write to the disk: %w", err), &out)
	}
	if s.failed != nil {
		g.abandon(s.failed, &out)
		s.cond.Broadcast()
	} else {
		s.written = g.last
		g.seg.written = g.start + uint32(len(g.buf)/blockBytes)
		for _, a := range g.done {
			out.reply(a.c, a.rep)
		}
		for _, r := range g.waiting {
			if err := s.look(s.vols[r.vol], r, &out); err != nil {
				s.fail(err, &out)
				out.fail(r.c, wire.Read, r.id, err)
			}
		}
		if len(s.buffers) < keptBuffers {
			s.buffers = append(s.buffers, g.buf)
		}
		s.proceed(&out)
	}
	s.unlock(&out)
}

// abandon answers everything that waited for the group.
func (g *group) abandon(err error, out *outbox) {
	for _, a := range g.done {
		*a.rep = wire.Reply{Kind: a.rep.Kind, ID: a.rep.ID, Status: status.Of(err), Detail: err.Error()}
		out.reply(a.c, a.rep)
	}
	for _, r := range g.waiting {
		out.fail(r.c, wire.Read, r.id, err)
	}
	g.done, g.waiting = nil, nil
}

// fail stops the store for good: a disk that failed once is not trusted, and a
// failed sync may have dropped what it was to keep.
func (s *Store) fail(err error, out *outbox) {
	if s.failed == nil {
		s.failed = err
		s.halted.Store(true)
	}
	for _, g := range s.queue {
		g.abandon(s.failed, out)
	}
	s.queue, s.group = nil, nil
	for _, w := range s.syncs {
		if w.rep != nil {
			out.fail(w.c, w.rep.Kind, w.rep.ID, s.failed)
		}
	}
	s.syncs = nil
	for _, w := range s.waiting {
		out.fail(w.c, w.q.Kind, w.q.ID, s.failed)
	}
	s.waiting, s.waitingBytes = nil, 0
	s.abortMerges(func(*merge) bool { return true }, status.Of(s.failed), s.failed.Error(), out)
	s.cond.Broadcast()
}

// afterAppends answers rep once everything staged so far is written.
func (s *Store) afterAppends(c *caller, rep *wire.Reply, out *outbox) {
	switch {
	case len(s.queue) > 0:
		g := s.queue[len(s.queue)-1]
		g.done = append(g.done, answer{c, rep})
	case s.writing != nil:
		s.writing.done = append(s.writing.done, answer{c, rep})
	default:
		out.reply(c, rep)
	}
}

// unwritten returns the group that holds a block not yet on the disk.
func (s *Store) unwritten(loc uint32) *group {
	g := s.segOf(loc)
	if loc-s.base(g) < g.written {
		return nil
	}
	in := func(o *group) bool {
		at := loc - s.base(g)
		return o != nil && o.seg == g && at >= o.start && at < o.start+uint32(len(o.buf)/blockBytes)
	}
	if in(s.writing) {
		return s.writing
	}
	for _, o := range s.queue {
		if in(o) {
			return o
		}
	}
	return nil
}

// stagedBytes is what is staged and not written.
func (s *Store) stagedBytes() int64 {
	var n int64
	for _, g := range s.queue {
		n += int64(len(g.buf))
	}
	if s.writing != nil {
		n += int64(len(s.writing.buf))
	}
	return n
}

// appendRun stages n blocks of one chunk that share a version, as few records
// as will do, and points the index at them. sums and data are nil unless k is
// kindData.
func (s *Store) appendRun(c *chunk, k kind, block ids.Block, n uint32, ver ids.Version, sums []uint32, data []byte) error {
	for n > 0 {
		m := n
		if k == kindData {
			if m = s.runRoom(n); m == 0 {
				if err := s.makeRoom(recordFixed+4, 1); err != nil {
					return err
				}
				m = s.runRoom(n)
			}
		}
		r := record{kind: k, volume: uint64(c.v.id), chunk: uint64(c.id), layer: uint32(c.layer), block: uint32(block), count: m, version: uint64(ver)}
		payload := 0
		if k == kindData {
			payload = 4 * int(m)
		}
		st, err := s.append(&r, payload)
		if err != nil {
			return err
		}
		e := entry{version: ver, loc: st.loc, kind: k}
		if k != kindData {
			s.segOf(st.loc).markRecords++
		}
		if k == kindData {
			for i, sum := range sums[:m] {
				le.PutUint32(st.payload[4*i:], sum)
			}
			copy(st.data, data)
		}
		run := sums
		if err := s.index(c, block, m, e, func(i uint32) uint32 { return run[i] }); err != nil {
			return err
		}
		block, n = block+ids.Block(m), n-m
		if k == kindData {
			sums, data = sums[m:], data[int(m)*blockBytes:]
		}
	}
	return nil
}
