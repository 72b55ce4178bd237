package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// read is one read request's life: from one replica, then from the next when
// that one fails.
type read struct {
	op    *Op
	piece piece
	c     *chunk
	first ids.Block
	count uint32
	job   *job   // the merge whose edge this is; nil for a client's read
	bad   uint16 // bit i: c.replicas[i] has answered with an error
	until uint64 // counter when the data came: later writes do not matter
	req   wire.Request
}

func (e *Engine) startRead(c *chunk, p piece, first ids.Block, count uint32) {
	e.sendRead(&read{op: p.op, piece: p, c: c, first: first, count: count})
}

// sendRead asks the local in-sync replica, else the one with the fewest
// requests outstanding. With none to ask it waits, or fails when all have.
func (e *Engine) sendRead(rd *read) {
	best, pos, hope := (*replica)(nil), 0, false
	for i, r := range rd.c.replicas {
		switch {
		case !r.inSync || rd.bad&(1<<i) != 0:
		case !r.up || !r.sealed || r.excluding:
			hope = true
		case best == nil || r.local || (!best.local && r.busy < best.busy):
			if best == nil || !best.local {
				best, pos = r, i
			}
		}
	}
	if best == nil {
		if hope {
			e.stuck = append(e.stuck, rd)
		} else {
			e.readDone(rd, nil, status.IO)
		}
		return
	}
	rd.req = wire.Request{Kind: wire.Read, Chunk: rd.c.id, Block: rd.first, Count: rd.count}
	if !best.local || rd.bad != 0 {
		rd.req.Flags = wire.FlagEntries
	} else if rd.job == nil && rd.piece.aligned() {
		// Only the in-process twin fills it, and only before Submit returns.
		rd.req.Into = rd.piece.data()
	}
	e.send(best, &rd.req, slot{read: rd, pos: pos})
}

// readReply takes a replica's answer to a read.
func (e *Engine) readReply(r *replica, rd *read, pos int, rep *wire.Reply) {
	k := rep.Status
	if k == status.OK && !e.verified(rd, rep) {
		k = status.Corrupt
	}
	switch k {
	case status.OK:
		if rd.bad != 0 {
			e.repair(rd, rep)
		}
		e.readDone(rd, rep.Data, status.OK)
	case status.Unavailable:
		e.sendRead(rd)
	case status.Corrupt, status.Poison:
		rd.bad |= 1 << pos
		e.sendRead(rd)
	default:
		rd.bad |= 1 << pos
		e.replicaFailed(r, rep)
		if e.state != Ended {
			e.sendRead(rd)
		}
	}
}

// verified checks data that crossed a wire against its checksums. Data of the
// in-process twin was checked by the store itself.
func (e *Engine) verified(rd *read, rep *wire.Reply) bool {
	if len(rep.Data) != int(rd.count)*ids.BlockSize {
		return false
	}
	if rd.req.Flags&wire.FlagEntries == 0 {
		return true
	}
	return len(rep.Entries) == int(rd.count) && e.entriesMatch(rd.c.id, rep.Entries, rep.Data)
}

// entriesMatch checks blocks, one per entry, against the entries' checksums.
func (e *Engine) entriesMatch(c ids.ChunkID, es []wire.Entry, data []byte) bool {
	for i := range es {
		b := data[i*ids.BlockSize : (i+1)*ids.BlockSize]
		switch en := &es[i]; en.Kind {
		case wire.EntryData:
			if wire.BlockSum(e.volume, c, en.Layer, en.Block, en.Version, b) != en.Sum {
				return false
			}
		case wire.EntryPoison:
			return false
		default:
			clear(b)
		}
	}
	return true
}

// readDone puts the data where it belongs and answers.
func (e *Engine) readDone(rd *read, data []byte, k status.Kind) {
	if rd.job != nil {
		e.edgeRead(rd, data, k)
		return
	}
	if k != status.OK {
		e.partDone(rd.op, k)
		return
	}
	dst := rd.piece.data()
	src := data[rd.piece.off%ids.BlockSize:]
	if &dst[0] != &src[0] {
		copy(dst, src)
	}
	rd.until = e.counter
	e.answerRead(rd)
}

// answerRead answers unless a write that was issued before the data came is
// still in flight on these blocks: what it may have shown could yet be lost.
func (e *Engine) answerRead(rd *read) {
	for _, j := range rd.c.jobs {
		if !j.merging && j.version.Counter() <= rd.until && j.overlaps(rd.first, rd.count) {
			j.waiters = append(j.waiters, waiter{op: rd.op, read: rd})
			return
		}
	}
	e.partDone(rd.op, status.OK)
}

// repair writes good blocks over the bad copies, at the version they have.
func (e *Engine) repair(rd *read, rep *wire.Reply) {
	var es []wire.Entry
	var data []byte
	for i, en := range rep.Entries {
		if en.Kind == wire.EntryData {
			es = append(es, en)
			data = append(data, rep.Data[i*ids.BlockSize:(i+1)*ids.BlockSize]...)
		}
	}
	if len(es) == 0 {
		return
	}
	for i, r := range rd.c.replicas {
		if rd.bad&(1<<i) == 0 || !r.writable() || !r.inSync {
			continue
		}
		q := &wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Chunk: rd.c.id, Entries: es, Data: data, Limit: ids.MakeVersion(e.epoch, e.counter)}
		e.call(r, q, func(rep *wire.Reply) {
			if rep.Status == status.OK {
				e.stats.Repaired += uint64(len(es))
			}
		})
	}
}

// retryStuck asks again for reads that found no replica.
func (e *Engine) retryStuck() {
	stuck := e.stuck
	e.stuck = nil
	for _, rd := range stuck {
		e.sendRead(rd)
	}
}

// flushState groups flushes: one round at a time, all that come meanwhile
// share the next.
type flushState struct {
	next, now []*Op // bounded by the operations in flight
	wanted    bool  // a round without an operation: the floor is to move
	running   bool
	stale     bool // the members changed: the round is issued again
	round     uint64
	need      map[*replica]bool // false: not sent yet
	target    ids.Version       // what the round makes durable
	dirty     uint64            // bytes completed since the last round began
	lastAt    time.Duration
}

func (e *Engine) dirty() bool { return e.flush.dirty > 0 }

func (e *Engine) autoFlush() {
	if e.flush.dirty > 0 && e.now-e.flush.lastAt >= e.cfg.Flush {
		e.flush.wanted = true
	}
}

// startFlush begins a round when one is wanted. Its target is what is complete
// now: everything below the lowest version in flight.
func (e *Engine) startFlush() {
	f := &e.flush
	if f.running || e.state == Attaching || (len(f.next) == 0 && !f.wanted) {
		return
	}
	f.now, f.next, f.wanted = f.next, nil, false
	if f.dirty == 0 {
		e.flushed()
		return
	}
	f.running, f.dirty = true, 0
	e.beginRound()
}

func (e *Engine) beginRound() {
	f := &e.flush
	f.stale, f.round, f.lastAt = false, f.round+1, e.now
	f.target = min(e.inFlight.lowest()-1, ids.MakeVersion(e.epoch, e.counter))
	f.need = map[*replica]bool{}
	for _, r := range e.replicas {
		if r.required() {
			f.need[r] = false
		}
	}
	e.sendFlushes()
}

// sendFlushes sends the round to required replicas it has not reached yet.
func (e *Engine) sendFlushes() {
	f := &e.flush
	if !f.running {
		return
	}
	for _, r := range e.replicas {
		if sent, ok := f.need[r]; !ok || sent || !r.writable() {
			continue
		}
		f.need[r] = true
		round := f.round
		e.call(r, &wire.Request{Kind: wire.Flush, Floor: e.floor}, func(rep *wire.Reply) {
			if !f.running || f.round != round {
				return
			}
			switch rep.Status {
			case status.OK:
				delete(f.need, r)
				e.roundDone()
			case status.Unavailable:
				f.need[r] = false
			default:
				e.replicaFailed(r, rep)
			}
		})
	}
}

// roundDone ends the round once every required replica is durable.
func (e *Engine) roundDone() {
	f := &e.flush
	if !f.running || len(f.need) > 0 {
		return
	}
	if f.stale {
		e.beginRound()
		return
	}
	f.running = false
	e.floor = max(e.floor, f.target)
	e.flushed()
}

func (e *Engine) flushed() {
	ops := e.flush.now
	e.flush.now = nil
	for _, op := range ops {
		e.done(op, status.OK)
	}
}
