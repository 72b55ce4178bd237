package volume

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// moveState is where copies of chunks are to go. Who decides what: this engine
// that a copy must go, or that one is missing or too many; the metadata leader
// where to; metadata itself that it has happened.
type moveState struct {
	fills   []*fill          // every copy being made, planned ones too; ≤ fillsPlanned
	wishes  []*pb.ChunkWish  // of placement, not planned yet; ≤ wishesMax
	plan    []*pb.ChunkMove  // to be asked for with the next command
	unclear []ids.ChunkIndex // chunks whose state is to be asked for
	next    time.Duration    // no plan before
	wait    time.Duration    // how long it is put off when there is nowhere to go
	look    bool             // something may be due: look through the chunks
	why     string           // the last failure
}

const (
	planEvery    = time.Second
	planWaitMax  = time.Minute
	fillsPlanned = 32 // what is planned late is planned with what is known then
	movesAtOnce  = 64 // of one command
)

// noteVolume takes what the holder of an unchanged membership may not have heard.
func (e *Engine) noteVolume(v *pb.Volume) {
	if int(v.Replicas) != e.copies && v.Replicas > 0 {
		e.copies, e.moves.look, e.moves.next, e.moves.wait = int(v.Replicas), true, e.now, 0
	}
	for _, m := range v.Members {
		for _, r := range e.replicas {
			if !r.gone && bytes.Equal(m.Store, r.store[:]) && r.leaving != m.Leaving {
				r.leaving, e.moves.look, e.moves.next, e.moves.wait = m.Leaving, true, e.now, 0
			}
		}
	}
}

// bad reports whether a replica's copies are to be made elsewhere.
func (e *Engine) bad(r *replica) bool {
	return r.leaving || !r.inSync && e.now-r.outSince >= e.cfg.Grace
}

// planMoves looks for copies that are missing, too many, or in the wrong place.
func (e *Engine) planMoves() {
	m := &e.moves
	if e.state != Serving || e.now < m.next || e.member.call != nil {
		return
	}
	m.next = e.now + planEvery
	look := m.look || len(m.fills) > 0
	for _, r := range e.replicas {
		look = look || !r.gone && e.bad(r)
	}
	m.plan = nil
	if !look {
		return
	}
	m.look = false
	for _, f := range m.fills {
		if !f.asked && !e.useful(f) {
			m.plan = append(m.plan, &pb.ChunkMove{Index: uint32(f.c.index), To: f.r.store[:], Step: pb.ChunkMove_CANCEL})
		}
	}
	planned := len(m.fills)
	for _, c := range e.sortedChunks() {
		if planned >= fillsPlanned || len(m.plan) >= movesAtOnce {
			m.look = true
			break
		}
		if c.id == 0 {
			continue
		}
		mv := e.planChunk(c)
		if mv == nil {
			m.look = m.look || c.count() != e.copies
			continue
		}
		m.look = true // until there is nothing left to do
		if mv.Step == pb.ChunkMove_PLAN {
			planned++
		}
		m.plan = append(m.plan, mv)
	}
	e.planWishes(planned)
}

// useful reports whether a copy is still wanted, and its store able to take it.
func (e *Engine) useful(f *fill) bool {
	if e.bad(f.r) {
		return false
	}
	if f.replaces == nil {
		return f.c.count() < e.copies
	}
	return f.c.heldBy(f.replaces) && (f.wish || f.replaces.leaving || !f.replaces.inSync)
}

// planChunk decides the next move of a chunk, or nil.
func (e *Engine) planChunk(c *chunk) *pb.ChunkMove {
	mv := &pb.ChunkMove{Index: uint32(c.index)}
	more := 0
	for _, f := range c.fills {
		if f != nil && f.replaces == nil {
			more++
		}
	}
	switch n := c.count(); {
	case n > e.copies && !c.filling():
		if r := e.spare(c); r != nil {
			mv.From, mv.Step = r.store[:], pb.ChunkMove_DONE
			return mv
		}
		return nil
	case n+more < e.copies && e.room(c):
		return mv
	}
	for pos, r := range c.replicas {
		replaced := slices.ContainsFunc(c.fills, func(f *fill) bool { return f != nil && f.replaces == r })
		if r.index >= 0 && c.fills[pos] == nil && e.bad(r) && !replaced && e.room(c) {
			mv.From = r.store[:]
			return mv
		}
	}
	return nil
}

// room reports whether a chunk has a position for one more copy.
func (e *Engine) room(c *chunk) bool {
	return len(c.replicas) < maxPlaces || len(c.jobs) == 0 && slices.Contains(c.replicas, e.nobody)
}

// spare chooses a copy that can go when there are too many: one that is of no
// use, or else one that is not local; never so that too few in sync are left.
func (e *Engine) spare(c *chunk) *replica {
	var best *replica
	well := 0
	for _, r := range c.replicas {
		if r.index < 0 {
			continue
		}
		if r.readable() {
			well++
		}
		worth := func(r *replica) int {
			switch {
			case !r.inSync:
				return 0
			case r.leaving:
				return 1
			case !r.local:
				return 2
			}
			return 3
		}
		if best == nil || worth(r) <= worth(best) {
			best = r
		}
	}
	if best != nil && best.readable() {
		well--
	}
	if well < MinInSync(e.copies) {
		return nil
	}
	return best
}

// startMoves asks metadata for what is due: copies that are finished, plans, and
// how a chunk is whose state is not known.
func (e *Engine) startMoves() {
	m := &e.moves
	if e.state != Serving || e.metaBusy() || len(m.plan)+len(m.unclear)+len(m.fills) == 0 {
		return
	}
	op := &pb.MoveChunks{VolumeId: uint64(e.volume), Epoch: uint32(e.epoch), Revision: e.revision}
	for _, f := range m.fills {
		if f.phase == fillAsk && len(op.Moves) < movesAtOnce {
			f.asked = true
			e.member.moving = append(e.member.moving, f)
			op.Moves = append(op.Moves, &pb.ChunkMove{Index: uint32(f.c.index), To: f.r.store[:], ToIncarnation: uint64(f.r.incarnation), Step: pb.ChunkMove_DONE})
		}
	}
	n := min(len(m.unclear), movesAtOnce)
	for _, ix := range m.unclear[:n] { // naming nobody, it changes nothing
		op.Moves = append(op.Moves, &pb.ChunkMove{Index: uint32(ix), Step: pb.ChunkMove_CANCEL})
	}
	m.unclear = m.unclear[n:]
	for _, mv := range m.plan {
		if id, err := ids.StoreIDFromBytes(mv.From); err == nil && mv.Step == pb.ChunkMove_DONE {
			e.chunks[ids.ChunkIndex(mv.Index)].giving = e.byStore[id]
		}
	}
	op.Moves = append(op.Moves, m.plan...)
	if len(op.Moves) == 0 {
		return
	}
	m.plan = nil
	e.member.call = &MetaCall{Move: op}
	e.out.Meta = append(e.out.Meta, e.member.call)
}

// moved takes the answer: the chunks as they are now. Anything but OK leaves what
// was asked for in doubt, and it is asked for again.
func (e *Engine) moved(ev *MetaDone) {
	asked := e.member.moving
	e.member.call, e.member.moving = nil, nil
	if k := status.Of(ev.Err); k != status.OK {
		if k == status.NoSpace { // no store can take what is planned
			e.moves.wait = min(max(2*e.moves.wait, 2*planEvery), planWaitMax)
			e.moves.next = e.now + e.moves.wait
		}
		e.moves.look = true
		for _, mv := range ev.Call.Move.Moves { // perhaps done: a plan too
			e.moves.unclear = append(e.moves.unclear, ids.ChunkIndex(mv.Index))
		}
		e.holdMeta(k)
		e.takeNews()
		return
	}
	if v := ev.Result.GetVolume(); v != nil {
		e.adoptMembers(v)
		e.noteVolume(v)
	}
	e.forget(ev.Call.Move.Moves)
	for _, c := range ev.Result.GetChunks() {
		if err := e.adoptChunk(c); err != nil && e.state != Ended {
			e.end("metadata answered a move with a chunk that cannot be: " + err.Error())
		}
		if e.state == Ended {
			return
		}
	}
	for _, f := range asked {
		if !f.over { // refused
			f.asked = false
			e.failFill(f, "metadata does not let it count")
		}
	}
	e.retryStuck()
	e.takeNews()
}

// dropMembers lets go of members that have nothing of the volume any more.
func (e *Engine) dropMembers(ms []*pb.Member) {
	for _, r := range e.replicas {
		if r.gone || slices.ContainsFunc(ms, func(m *pb.Member) bool { return bytes.Equal(m.Store, r.store[:]) }) {
			continue
		}
		r.gone, r.inSync, r.excluding, r.doubt, r.join, r.leaving = true, false, false, false, nil, false
		for _, c := range e.sortedChunks() {
			for pos, o := range c.replicas {
				if o == r {
					e.vacate(c, pos)
				}
			}
		}
		e.letGo(r)
		if e.isSource(r) {
			r.foreign = true
			e.out.Links = append(e.out.Links, LinkAction{r.index, true})
		}
	}
}

// comeBack makes a store a member again that was one before.
func (e *Engine) comeBack(r *replica, m *pb.Member) {
	r.gone, r.inSync, r.leaving, r.host, r.addr = false, m.InSync, m.Leaving, m.Host, m.DataAddr
	r.incarnation, r.outSince, r.joinAfter, r.joinTries = ids.Incarnation(m.Incarnation), e.now, 0, 0
	e.out.Links = append(e.out.Links, LinkAction{r.index, true})
}

// caring says what is being repaired, or ought to be; "": nothing.
func (e *Engine) caring() string {
	for _, f := range e.moves.fills {
		return fmt.Sprintf("chunk %d, a copy of which is being made on %s (%d in all; %s)", f.c.index, f.r.host, len(e.moves.fills), e.moves.why)
	}
	if n := len(e.moves.wishes); n > 0 {
		return fmt.Sprintf("%d copies that placement wants elsewhere", n)
	}
	for _, r := range e.replicas {
		switch {
		case !r.gone && !r.inSync:
			return fmt.Sprintf("the member on %s, which is out of sync", r.host)
		case !r.gone && r.leaving:
			return fmt.Sprintf("the chunks on %s, which are to go elsewhere", r.host)
		}
	}
	for _, c := range e.chunks {
		if n := c.count(); c.id != 0 && n != e.copies {
			return fmt.Sprintf("chunks with %d copies instead of %d", n, e.copies)
		}
	}
	return ""
}
