package volume

import (
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// fill is a copy of one chunk being made on another store, which is an in-sync
// member: of the chunks it has, which this one is not yet.
//
//	wait → copy what is older than from, while new writes go to it too →
//	required → everything answered → told the layers → flush → ask metadata: it takes the other's place
//
// It is what a join is for one chunk, with the same rules, and the same care for
// an outcome that is unknown: once asked for it stays required until metadata has
// said how the chunk is now. Progress is not kept anywhere: a fill that begins
// again compares digests and sends what is left.
type fill struct {
	c        *chunk
	pos      int
	r        *replica // gets the copy
	replaces *replica // goes when the copy counts; nil: it is one more
	phase    fillPhase
	from     ids.Version // once it copies it is sent every write ≥ from
	source   *replica    // while it copies
	mark     uint64      // counter when it became required
	required bool        // counted for writes; for flushes every in-sync member is
	asked    bool        // metadata was asked to let it count, and may have
	unclear  bool        // its store went out of sync after it was asked for: whether it counts metadata will say
	wish     bool        // placement wants it
	over     bool        // it counts, or was given up
	tries    int         // that failed
	after    time.Duration
}

type fillPhase uint8

const (
	fillWait fillPhase = iota
	fillCopy
	fillSettle
	fillFlush
	fillAsk
)

const (
	fillsAtOnce = 8  // of a volume
	fillsPerEnd = 2  // of one store, as the target or as the source
	maxPlaces   = 16 // positions of a chunk: bits of job.need
)

// takes reports whether the copy is sent a write.
func (f *fill) takes(v ids.Version) bool { return f.phase >= fillCopy && v >= f.from }

// required reports whether a position must accept a new write.
func (c *chunk) required(pos int) bool {
	if f := c.fills[pos]; f != nil {
		return f.required
	}
	return c.replicas[pos].required()
}

// heldBy reports whether a replica has a copy that counts, when it is in sync.
func (c *chunk) heldBy(r *replica) bool {
	for pos, o := range c.replicas {
		if o == r && c.fills[pos] == nil {
			return true
		}
	}
	return false
}

// shows reports whether a replica has a copy that counts, and is sure to: metadata
// was not asked to let it go. Once it has, the store drops the copy when it hears of
// that, perhaps before this engine does, and a late write may bring a part of it
// back: what such a copy does not have is no hole.
func (c *chunk) shows(r *replica) bool {
	return c.heldBy(r) && c.giving != r && !slices.ContainsFunc(c.fills, func(f *fill) bool { return f != nil && f.asked && f.replaces == r })
}

// count is how many copies count.
func (c *chunk) count() int {
	n := 0
	for pos, r := range c.replicas {
		if r.index >= 0 && c.fills[pos] == nil {
			n++
		}
	}
	return n
}

// filling reports whether any copy is being made.
func (c *chunk) filling() bool {
	return slices.ContainsFunc(c.fills, func(f *fill) bool { return f != nil })
}

// stepFills moves every fill as far as it can go.
func (e *Engine) stepFills() {
	if len(e.moves.fills) == 0 || e.state != Serving {
		return
	}
	active := 0
	for _, f := range e.moves.fills {
		if f.phase == fillCopy {
			active++
		}
	}
	for _, f := range slices.Clone(e.moves.fills) {
		switch f.phase {
		case fillWait:
			if active < fillsAtOnce && e.beginFill(f) {
				active++
			}
		case fillSettle:
			if e.answeredUpTo(f.r, f.c, f.mark) {
				e.flushFill(f)
			}
		}
	}
}

// beginFill starts copying if the target and a source are free.
func (e *Engine) beginFill(f *fill) bool {
	if f.over || e.reclaim != nil || !f.r.readable() || e.now < f.after || f.r.filling >= fillsPerEnd || f.c.id == 0 {
		return false
	}
	from := ids.MakeVersion(e.epoch, e.counter+1)
	sources := e.sources(f.c, from)
	slices.SortStableFunc(sources, func(a, b *replica) int { return a.filling - b.filling })
	if len(sources) == 0 || sources[0].filling >= fillsPerEnd {
		return false
	}
	f.phase, f.from, f.source, f.mark = fillCopy, from, sources[0], 0
	f.r.filling++
	f.source.filling++
	try := f.tries
	live := func() bool { return !f.over && f.phase == fillCopy && f.tries == try }
	e.compareChunk(&catchUp{r: f.r, from: from, live: live, copied: func(uint64) {},
		fail: func(why string) { e.failFill(f, why) },
		done: func() { e.requireFill(f) }}, f.c, sources)
	return true
}

// endCopy gives back what a copying fill had taken.
func (f *fill) endCopy() {
	if f.phase == fillCopy {
		f.r.filling--
		f.source.filling--
		f.source = nil
	}
}

// requireFill counts the copy from now on, for what is in flight too.
func (e *Engine) requireFill(f *fill) {
	f.endCopy()
	f.required, f.phase, f.mark = true, fillSettle, e.counter
	for _, j := range e.inFlight.all() {
		if j.c != f.c {
			continue
		}
		j.need |= 1 << f.pos
		if j.version < f.from {
			j.have |= 1 << f.pos // it came with the copy
		}
		e.sendJob(j, f.pos)
	}
}

// flushFill makes the copy durable. Every flush of a client since it became
// required covers it, because its store is an in-sync member.
func (e *Engine) flushFill(f *fill) {
	f.phase = fillFlush
	try := f.tries
	e.tellLast(f.r, func(rep *wire.Reply) {
		switch {
		case f.over || f.phase != fillFlush || f.tries != try:
		case rep.Status != status.OK:
			e.failFill(f, rep.Err().Error())
		default:
			e.flushTold(f, try)
		}
	})
}

func (e *Engine) flushTold(f *fill, try int) {
	e.call(f.r, &wire.Request{Kind: wire.Flush, Floor: e.floor}, func(rep *wire.Reply) {
		switch {
		case f.over || f.phase != fillFlush || f.tries != try:
		case rep.Status == status.OK:
			f.phase = fillAsk // startMoves asks
		case rep.Status == status.Unavailable:
			e.failFill(f, rep.Detail)
		default:
			f.r.doubt = rep.Status != status.Shutdown
			e.failFill(f, rep.Detail)
			e.replicaFailed(f.r, rep)
		}
	})
}

// failFill lets a fill begin again after a while. One that was asked for stays
// as it is: it may count already.
func (e *Engine) failFill(f *fill, why string) {
	if f.over || f.asked || f.phase == fillWait {
		return
	}
	f.endCopy()
	f.phase, f.required = fillWait, false
	f.after = e.now + min(joinBackoff<<min(f.tries, 8), joinBackoffMax)
	f.tries++
	e.moves.why = why
	e.releasePos(f.c, f.pos)
}

// failFills ends the fills of a replica whose connection went.
func (e *Engine) failFills(r *replica, why string) {
	for _, f := range slices.Clone(e.moves.fills) {
		if f.r == r || f.source == r {
			e.failFill(f, why)
		}
	}
}

// unasked: a replica is out of sync by a commit, so that copies on it that were
// asked for do not count now, whatever became of the asking. How the chunk is
// then is asked anew.
func (e *Engine) unasked(r *replica) {
	for _, f := range slices.Clone(e.moves.fills) {
		if f.r == r {
			if f.asked {
				f.unclear = true
				e.moves.unclear = append(e.moves.unclear, f.c.index)
			}
			f.asked = false
			e.failFill(f, "it is out of sync")
		}
	}
}

// releasePos completes what only waited for a position.
func (e *Engine) releasePos(c *chunk, pos int) {
	for _, j := range e.inFlight.all() {
		if j.c == c {
			j.need &^= 1 << pos
			e.check(j)
		}
	}
}

// adoptChunk takes a chunk as metadata has it: a new one, or one whose copies
// have changed by our own command.
func (e *Engine) adoptChunk(c *pb.Chunk) error {
	hold, err := e.replicasOf(c, c.Stores)
	if err != nil {
		return err
	}
	if len(hold) > maxReplicas {
		return status.Errorf(status.Unsupported, "chunk %d has %d replicas: at most %d are possible", c.Id, len(hold), maxReplicas)
	}
	ck := e.chunks[ids.ChunkIndex(c.Index)]
	if ck == nil {
		ck = &chunk{index: ids.ChunkIndex(c.Index)}
		e.chunks[ck.index] = ck
	}
	fresh := ck.id == 0
	ck.id, ck.giving = ids.ChunkID(c.Id), nil
	for pos, r := range ck.replicas {
		switch f := ck.fills[pos]; {
		case r == e.nobody:
		case slices.Contains(hold, r):
			if f != nil && !e.counts(f) {
				return nil
			}
		case f != nil && slices.ContainsFunc(c.Filling, func(p *pb.Filling) bool { return string(p.Store) == string(r.store[:]) }):
		default:
			e.vacate(ck, pos)
		}
	}
	for _, r := range hold {
		if slices.Contains(ck.replicas, r) {
			continue
		}
		if !fresh {
			e.end("metadata counts a copy of chunk that this writer has not made")
			return nil
		}
		ck.replicas, ck.fills = append(ck.replicas, r), append(ck.fills, nil)
	}
	for _, f := range ck.fills {
		if f != nil {
			f.unclear = false
		}
	}
	return e.adoptFills(ck, c)
}

// unclear reports whether a replica may have a copy that counts and was not
// finished: it must not join before that is known.
func (e *Engine) unclear(r *replica) bool {
	return slices.ContainsFunc(e.moves.fills, func(f *fill) bool { return f.r == r && f.unclear })
}

func (e *Engine) replicasOf(c *pb.Chunk, stores [][]byte) ([]*replica, error) {
	var out []*replica
	for _, b := range stores {
		id, err := ids.StoreIDFromBytes(b)
		if err != nil {
			return nil, status.Errorf(status.Internal, "chunk %d: %w", c.Id, err)
		}
		r := e.byStore[id]
		if r == nil || r.gone {
			return nil, status.Errorf(status.Internal, "chunk %d names store %s, which is no member of the volume", c.Id, id.Short())
		}
		out = append(out, r)
	}
	return out, nil
}

// adoptFills enters copies that are planned and not known here yet.
func (e *Engine) adoptFills(ck *chunk, c *pb.Chunk) error {
	for _, p := range c.Filling {
		to, err := e.replicasOf(c, [][]byte{p.Store})
		if err != nil {
			return err
		}
		var replaces []*replica
		if len(p.Replaces) > 0 {
			if replaces, err = e.replicasOf(c, [][]byte{p.Replaces}); err != nil {
				replaces = nil // it has left
			}
		}
		if slices.Contains(ck.replicas, to[0]) {
			continue
		}
		pos := e.placeIn(ck, to[0])
		if pos < 0 {
			e.moves.unclear = append(e.moves.unclear, ck.index)
			continue
		}
		f := &fill{c: ck, pos: pos, r: to[0], wish: p.Wish}
		if len(replaces) > 0 {
			f.replaces = replaces[0]
		}
		ck.fills[pos] = f
		e.moves.fills = append(e.moves.fills, f)
	}
	return nil
}

// placeIn gives a replica a position of a chunk, or −1: not while operations are
// in flight that know all the positions there can be.
func (e *Engine) placeIn(c *chunk, r *replica) int {
	if len(c.jobs) == 0 {
		if pos := slices.Index(c.replicas, e.nobody); pos >= 0 {
			c.replicas[pos] = r
			return pos
		}
	}
	if len(c.replicas) >= maxPlaces {
		return -1
	}
	c.replicas, c.fills = append(c.replicas, r), append(c.fills, nil)
	return len(c.replicas) - 1
}

// counts makes a fill a copy like any other; false if it was never asked to be.
func (e *Engine) counts(f *fill) bool {
	if !f.asked && !(f.unclear && !f.r.inSync) {
		e.end("metadata counts a copy that this writer has not finished")
		return false
	}
	f.over = true
	f.c.fills[f.pos] = nil
	e.moves.fills = slices.DeleteFunc(e.moves.fills, func(o *fill) bool { return o == f })
	e.stats.Moved++
	return true
}

// vacate empties a position: its copy has left, or is given up.
func (e *Engine) vacate(c *chunk, pos int) {
	if f := c.fills[pos]; f != nil {
		f.endCopy()
		f.over, f.phase = true, fillWait
		e.moves.fills = slices.DeleteFunc(e.moves.fills, func(o *fill) bool { return o == f })
	}
	c.replicas[pos], c.fills[pos] = e.nobody, nil
	e.releasePos(c, pos)
}
