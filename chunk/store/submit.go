package store

import (
	"reflect"
	"slices"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The way of a request:
//
//  1. check: what comes from outside is held against its limits and, for data,
//     its checksums, before the lock is taken.
//  2. handle: fence and version rule under the lock; an append is staged
//     (append.go), a read finds its places (read.go).
//  3. proceed: the disk gets what is due.
//  4. outbox.run, after the lock: disk calls, reads from memory, replies.

// caller is one Submit's sink.
type caller struct {
	sink wire.Sink
	same bool // the sink can be compared
}

// outbox is what is to be done once the lock is released.
type outbox struct {
	ops     []*disk.Op
	reads   []*read
	saves   []func() // of index pages
	callers []*caller
	replies []*wire.Reply // replies[i] is for callers[i]
}

func (o *outbox) reply(c *caller, r *wire.Reply) {
	if c == nil {
		return
	}
	o.callers = append(o.callers, c)
	o.replies = append(o.replies, r)
}

func (o *outbox) fail(c *caller, k wire.Kind, id uint64, err error) {
	o.reply(c, &wire.Reply{Kind: k, ID: id, Status: status.Of(err), Detail: err.Error()})
}

// unlock releases the lock and does what is in the outbox.
func (s *Store) unlock(out *outbox) {
	s.mu.Unlock()
	for _, op := range out.ops {
		if op.Kind != disk.Read && s.halted.Load() { // what was before it has failed
			op.Done(errHalted)
			continue
		}
		s.disk.Submit(op)
	}
	for _, r := range out.reads {
		s.startRead(r, out)
	}
	for _, save := range out.saves {
		save()
	}
	out.deliver()
}

// errHalted ends what was to go to a disk that has failed meanwhile.
var errHalted = status.Errorf(status.IO, "the store has stopped")

// deliver hands the replies over, those of one sink together.
func (o *outbox) deliver() {
	for i := 0; i < len(o.replies); {
		j := i + 1
		for j < len(o.replies) && sameSink(o.callers[i], o.callers[j]) {
			j++
		}
		o.callers[i].sink.Replies(o.replies[i:j:j])
		i = j
	}
}

func sameSink(a, b *caller) bool {
	return a == b || a.same && b.same && a.sink == b.sink
}

// proceed ends a piece of work under the lock: writes that waited are tried
// again, the index is brought below its bound, and the disk gets work.
func (s *Store) proceed(out *outbox) {
	if s.failed == nil {
		if err := s.settleDebts(out); err != nil {
			s.fail(err, out)
		}
	}
	s.pump(out)
	s.restock(out)
	if s.closed || s.opening {
		s.cond.Broadcast()
	}
}

func (s *Store) settleDebts(out *outbox) error {
	if s.low() {
		if err := s.releaseDead(); err != nil {
			return err
		}
		if err := s.compact.step(out, false); err != nil {
			return err
		}
	}
	s.idx.trim(trimSteps)
	if err := s.retry(out); err != nil {
		return err
	}
	if err := s.stepMerges(out); err != nil {
		return err
	}
	s.idx.trim(trimSteps)
	s.savePages(out)
	return nil
}

// retry does what waited and has room now, in order; what only waits for a
// smaller reserve may pass guests' writes.
func (s *Store) retry(out *outbox) error {
	var kept []*held
	var writesWait bool
	for i, w := range s.waiting {
		data := len(w.q.Data) > 0
		if data && writesWait {
			kept = append(kept, w)
			continue
		}
		if s.admits(&w.q) == errWait {
			if !data { // what is behind it has no more room
				kept = append(kept, s.waiting[i:]...)
				break
			}
			writesWait = true
			kept = append(kept, w)
			continue
		}
		s.waitingBytes -= w.bytes()
		if err := s.handle(w.c, &w.q, out); err != nil {
			out.fail(w.c, w.q.Kind, w.q.ID, err)
			s.waiting = append(kept, s.waiting[i+1:]...)
			return err
		}
	}
	s.waiting = kept
	return nil
}

// Submit takes requests; see wire.Sink for when the replies come. It has
// copied Request.Data before it returns, and fills Request.Into only before.
func (s *Store) Submit(reqs []*wire.Request, sink wire.Sink) {
	if len(reqs) == 0 {
		return
	}
	c := &caller{sink: sink, same: reflect.TypeOf(sink).Comparable()}
	var out outbox
	var bad [64]error
	for len(reqs) > 0 {
		part := reqs[:min(len(reqs), len(bad))]
		reqs = reqs[len(part):]
		for i, q := range part {
			bad[i] = s.check(q)
		}
		s.mu.Lock()
		for i, q := range part {
			switch {
			case bad[i] != nil:
				out.fail(c, q.Kind, q.ID, bad[i])
			case s.failed != nil:
				out.fail(c, q.Kind, q.ID, s.failed)
			case s.closed:
				out.fail(c, q.Kind, q.ID, errShutdown)
			default:
				if err := s.handle(c, q, &out); err != nil {
					s.fail(err, &out)
					out.fail(c, q.Kind, q.ID, s.failed)
				}
			}
		}
		if len(reqs) > 0 {
			s.mu.Unlock()
		}
	}
	s.proceed(&out)
	s.unlock(&out)
}

// check holds a request against its limits and data against its checksums.
func (s *Store) check(q *wire.Request) error {
	if q.Store != s.super.ID && !q.Store.IsZero() {
		return status.Errorf(status.NotFound, "store %s is not here, this is %s", q.Store, s.super.ID)
	}
	if q.Kind == wire.Ping {
		return nil
	}
	if q.Volume == 0 {
		return status.Errorf(status.Invalid, "%s request without a volume", q.Kind)
	}
	switch q.Kind {
	case wire.Write, wire.Zero, wire.Read, wire.Digest, wire.List, wire.Install, wire.Merge:
		if q.Chunk == 0 && (q.Kind != wire.List || q.Flags&wire.FlagFrozen == 0) || uint64(q.Block)+uint64(q.Count) > maxChunkBlocks {
			return status.Errorf(status.Invalid, "%s request for blocks beyond any chunk", q.Kind)
		}
	}
	switch q.Kind {
	case wire.Write:
		return checkWrite(q)
	case wire.Zero:
		if q.Count == 0 || q.Version == 0 {
			return status.Errorf(status.Invalid, "zero request of no blocks or without a version")
		}
	case wire.Read:
		if q.Count == 0 || q.Count > wire.MaxIO {
			return status.Errorf(status.Invalid, "read request of %d blocks: 1 to %d are possible", q.Count, wire.MaxIO)
		}
		if !q.Chained() {
			return status.Errorf(status.Invalid, "read request with layers that do not descend, or more than %d", wire.MaxLayers)
		}
	case wire.Install:
		return checkInstall(q)
	case wire.Layers:
		return checkLayers(q)
	}
	return nil
}

func checkWrite(q *wire.Request) error {
	if q.Version == 0 || q.Count == 0 || q.Count > wire.MaxIO || len(q.Sums) != int(q.Count) || len(q.Data) != int(q.Count)*blockBytes {
		return status.Errorf(status.Invalid, "write request of %d blocks with %d checksums and %d bytes, at version %s", q.Count, len(q.Sums), len(q.Data), q.Version)
	}
	for i, sum := range q.Sums {
		b := q.Block + ids.Block(i)
		if wire.BlockSum(q.Volume, q.Chunk, q.Layer, b, q.Version, q.Data[i*blockBytes:(i+1)*blockBytes]) != sum {
			return status.Errorf(status.Corrupt, "block %d was damaged on the way to the store", b)
		}
	}
	return nil
}

func checkInstall(q *wire.Request) error {
	data := q.Data
	for i := range q.Entries {
		e := &q.Entries[i]
		if e.Chunk != q.Chunk && e.Chunk != 0 || uint64(e.Block) >= maxChunkBlocks || e.Kind > wire.EntryPoison || (e.Version == 0) != (e.Kind == wire.EntryHole) {
			return status.Errorf(status.Invalid, "install request with an entry of another chunk, an unknown kind or a wrong version")
		}
		if e.Kind != wire.EntryData {
			continue
		}
		if len(data) < blockBytes {
			return status.Errorf(status.Invalid, "install request with too little data")
		}
		if wire.BlockSum(q.Volume, q.Chunk, e.Layer, e.Block, e.Version, data[:blockBytes]) != e.Sum {
			return status.Errorf(status.Corrupt, "block %d was damaged on the way to the store", e.Block)
		}
		data = data[blockBytes:]
	}
	if len(data) != 0 {
		return status.Errorf(status.Invalid, "install request with too much data")
	}
	return nil
}

// handle does one checked request. An error stops the store.
func (s *Store) handle(c *caller, q *wire.Request, out *outbox) error {
	if q.Kind == wire.Ping {
		out.reply(c, &wire.Reply{Kind: q.Kind, ID: q.ID})
		return nil
	}
	v := s.vols[q.Volume]
	free := q.Kind == wire.Layers || q.Flags&wire.FlagFrozen != 0 && (q.Kind == wire.Read || q.Kind == wire.List)
	if v != nil && q.Epoch < v.epoch && !free {
		out.reply(c, &wire.Reply{Kind: q.Kind, ID: q.ID, Status: status.Fenced, Epoch: v.epoch,
			Detail: status.Errorf(status.Fenced, "epoch %d of volume %d is over: epoch %d was sealed", q.Epoch, q.Volume, v.epoch).Error()})
		return nil
	}
	if !free && v.superseded(c, q.Kind) {
		out.fail(c, q.Kind, q.ID, errSuperseded(q))
		return nil
	}
	if q.Kind != wire.Drop && s.dropped(q.Volume, q.Chunk, 0) && !s.returns(v, q) {
		out.fail(c, q.Kind, q.ID, status.Errorf(status.NotFound, "volume %d or its chunk %d was dropped", q.Volume, q.Chunk))
		return nil
	}
	if appends(q.Kind) {
		switch err := s.admits(q); err {
		case nil:
		case errWait:
			s.hold(c, q, out)
			return nil
		default:
			out.fail(c, q.Kind, q.ID, err)
			return nil
		}
	}
	switch q.Kind {
	case wire.Write, wire.Zero, wire.Install:
		if v != nil && v.gone(q.Layer) && q.Kind != wire.Install {
			out.fail(c, q.Kind, q.ID, status.Errorf(status.NotFound, "layer %d of volume %d was dropped", q.Layer, q.Volume))
			return nil
		}
		return s.change(c, q, out)
	case wire.Read:
		s.straight.requests++
		return s.read(c, v, q, out)
	case wire.Flush:
		return s.flush(c, q, out)
	case wire.Seal, wire.Settle:
		return s.seal(c, q, out)
	case wire.Drop:
		return s.drop(c, q, out)
	case wire.Newer, wire.Digest, wire.List, wire.Stat, wire.Damaged:
		return s.query(c, v, q, out)
	case wire.Layers:
		return s.setLayers(c, v, q, out)
	case wire.Merge:
		return s.merge(c, v, q, out)
	}
	out.fail(c, q.Kind, q.ID, status.Errorf(status.Unsupported, "a store does not answer %s requests", q.Kind))
	return nil
}

// superseded reports whether a request comes late: over another connection than
// the one that sealed the volume. The writer has given up what it sent over
// older ones, and may have made the members equal since.
func (v *vol) superseded(c *caller, k wire.Kind) bool {
	switch k {
	case wire.Seal, wire.Drop:
		return false
	}
	return v != nil && v.sealer != nil && !(c.same && v.sealer == c.sink)
}

func errSuperseded(q *wire.Request) error {
	return status.Errorf(status.Unavailable, "volume %d was sealed over a newer connection", q.Volume)
}

// appends reports whether requests of this kind need room in the log.
func appends(k wire.Kind) bool {
	switch k {
	case wire.Write, wire.Zero, wire.Install, wire.Seal, wire.Settle, wire.Drop, wire.Layers, wire.Merge:
		return true
	}
	return false
}

// vol returns a volume, made if it is new.
func (s *Store) vol(id ids.VolumeID) *vol {
	v := s.vols[id]
	if v == nil {
		v = &vol{id: id, intact: true, chunks: map[chunkKey]*chunk{}}
		s.vols[id] = v
	}
	return v
}

// held is a write that waits.
type held struct {
	c *caller
	q wire.Request
}

func (h *held) bytes() int64 {
	return int64(len(h.q.Data) + 4*len(h.q.Sums) + 32*len(h.q.Entries) + 256)
}

// hold keeps a copy of a request until there is room for it.
func (s *Store) hold(c *caller, q *wire.Request, out *outbox) {
	h := &held{c, *q}
	if s.waitingBytes+h.bytes() > maxWaiting {
		out.fail(c, q.Kind, q.ID, status.Errorf(status.NoSpace, "%d MiB of writes already wait for the disk or for space", maxWaiting>>20))
		return
	}
	h.q.Data, h.q.Sums, h.q.Entries, h.q.Into = slices.Clone(q.Data), slices.Clone(q.Sums), slices.Clone(q.Entries), nil
	s.waitingBytes += h.bytes()
	s.waiting = append(s.waiting, h)
}

// errWait says that a change has to wait, errFull that it never will fit.
var (
	errWait = status.Errorf(status.Unavailable, "the write has to wait")
	errFull = status.Errorf(status.NoSpace, "the store is full: delete or trim data, or add a store")
)

// admits decides whether a change may be staged now. Data is refused once the
// live blocks reach the capacity; everything else waits at most for compaction.
func (s *Store) admits(q *wire.Request) error {
	blocks, reserve := uint32(len(q.Data)/blockBytes), reserveSystem
	if blocks > 0 {
		reserve = reserveWrites
	}
	if q.Kind == wire.Install {
		blocks += uint32(len(q.Entries)/64) + 1
	}
	if blocks > 0 && s.live+uint64(blocks) > s.capacity && s.live+s.fresh(q) > s.capacity {
		return errFull
	}
	changes := q.Kind == wire.Write || q.Kind == wire.Zero || q.Kind == wire.Install
	if room := s.roomFor(blocks, reserve); !room && blocks > 0 && !s.waits() {
		return errStarved
	} else if !room || s.stagedBytes() > maxStaged || changes && s.idx.full() {
		return errWait
	}
	return nil
}

// fresh counts the data blocks a full store would gain by q.
func (s *Store) fresh(q *wire.Request) uint64 {
	v := s.vols[q.Volume]
	n := uint64(0)
	count := func(layer ids.LayerID, b ids.Block) {
		if v != nil {
			if c := v.chunk(q.Chunk, layer, false); c != nil {
				if e, err := s.idx.get(c, b); err == nil && e.kind == kindData {
					return // an error shows again when the change is made
				}
			}
		}
		n++
	}
	if q.Kind == wire.Write {
		for i := range q.Count {
			count(q.Layer, q.Block+ids.Block(i))
		}
	}
	for i := range q.Entries {
		if q.Entries[i].Kind == wire.EntryData {
			count(q.Entries[i].Layer, q.Entries[i].Block)
		}
	}
	return n
}

// change stages a Write, Zero or Install and answers when it is written.
func (s *Store) change(c *caller, q *wire.Request, out *outbox) error {
	v := s.vol(q.Volume)
	var err error
	switch q.Kind {
	case wire.Write:
		err = s.stageRuns(v, q, kindData)
	case wire.Zero:
		err = s.stageRuns(v, q, kindZero)
	default:
		err = s.install(v, q)
	}
	if err != nil {
		return err
	}
	s.compact.idle = false // something has died by it, perhaps
	s.straight.requests++
	s.afterAppends(c, &wire.Reply{Kind: q.Kind, ID: q.ID}, out)
	return nil
}

// stageRuns appends the runs of q whose stored version is not higher.
func (s *Store) stageRuns(v *vol, q *wire.Request, k kind) error {
	c := v.chunk(q.Chunk, q.Layer, true)
	for i := uint32(0); i < q.Count; {
		n, wins, err := s.sameFate(c, q.Block+ids.Block(i), q.Count-i, q.Version)
		if err != nil {
			return err
		}
		if wins {
			var sums []uint32
			var data []byte
			if k == kindData {
				sums, data = q.Sums[i:i+n], q.Data[int(i)*blockBytes:int(i+n)*blockBytes]
			}
			if err := s.appendRun(c, k, q.Block+ids.Block(i), n, q.Version, sums, data); err != nil {
				return err
			}
			if k == kindData {
				s.straight.wrote(s, c, n)
			}
		}
		i += n
	}
	return nil
}

// sameFate returns how many blocks from b on, at most n, a write of version ver
// would all win, or all lose.
func (s *Store) sameFate(c *chunk, b ids.Block, n uint32, ver ids.Version) (run uint32, wins bool, err error) {
	for run < n {
		at := uint32(b) + run
		p, err := s.idx.page(c, at/pageBlocks, false)
		if err != nil {
			return 0, false, err
		}
		m := min(pageBlocks-at%pageBlocks, n-run)
		if p == nil || p.top <= ver || p.slots == nil {
			ok := p == nil || p.top <= ver || p.one.version <= ver
			if run > 0 && ok != wins {
				return run, wins, nil
			}
			wins, run = ok, run+m
			continue
		}
		for j := range m {
			ok := p.slots.version[at%pageBlocks+j] <= ver
			if run > 0 && ok != wins {
				return run, wins, nil
			}
			wins, run = ok, run+1
		}
	}
	return run, wins, nil
}

// install gives blocks exactly the state of the entries, run by run.
func (s *Store) install(v *vol, q *wire.Request) error {
	data := q.Data
	for i := 0; i < len(q.Entries); {
		e := &q.Entries[i]
		c := v.chunk(q.Chunk, e.Layer, true)
		n, sums := 0, []uint32(nil)
		for ; i+n < len(q.Entries); n++ {
			o := &q.Entries[i+n]
			if o.Kind != e.Kind || o.Layer != e.Layer || o.Version != e.Version || o.Block != e.Block+ids.Block(n) {
				break
			}
			apply, err := s.installs(c, o, q)
			if err != nil {
				return err
			}
			if !apply {
				break
			}
			sums = append(sums, o.Sum)
		}
		size := 0
		if e.Kind == wire.EntryData {
			size = max(n, 1) * blockBytes
		}
		if n > 0 {
			if err := s.appendRun(c, kind(e.Kind), e.Block, uint32(n), e.Version, sums, data[:size]); err != nil {
				return err
			}
		}
		data, i = data[size:], i+max(n, 1)
	}
	return nil
}

// installs reports whether an entry is to replace what is stored. A repair
// replaces the same version only: what came later stays.
func (s *Store) installs(c *chunk, e *wire.Entry, q *wire.Request) (bool, error) {
	if c.v.gone(e.Layer) { // a peer that has not heard of it: nobody will ask for it
		return false, nil
	}
	old, err := s.idx.get(c, e.Block)
	if err != nil {
		return false, err
	}
	if q.Flags&wire.FlagRepair != 0 {
		return old.version == e.Version && old.loc != 0, nil
	}
	if e.Kind == wire.EntryHole && (old.loc == 0 || old.kind == kindHole) {
		return false, nil // never written as it is
	}
	return old.version < q.Limit, nil
}
