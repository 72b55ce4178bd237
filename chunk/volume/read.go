package volume

import (
	"slices"
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
	job   *job                // the merge whose edge this is; nil for a client's read
	bad   uint16              // bit i: what c.replicas[i] has of this is bad
	ends  [maxReplicas]uint64 // by position: the connection over which its store said that it cannot go on; 0: none
	moved uint8               // times it was asked again because of its layers
	until uint64              // counter when the data came: later writes do not matter
	legs  legs                // by position
	at    time.Duration

	// Of a clone's read that goes on in its origins (origin.go).
	buf    []byte // whole blocks
	views  int    // runs outstanding, and one while they begin
	failed status.Kind
	shown  bool // an origin had something
	again  bool // the clone became flat meanwhile: it is read again
	req    wire.Request
}

func (e *Engine) newRead() *read {
	if n := len(e.freeReads); n > 0 {
		rd := e.freeReads[n-1]
		e.freeReads = e.freeReads[:n-1]
		return rd
	}
	return &read{}
}

// freeRead keeps an answered read for the next one.
func (e *Engine) freeRead(rd *read) {
	if len(e.freeReads) < freeMax {
		*rd = read{}
		e.freeReads = append(e.freeReads, rd)
	}
}

func (e *Engine) startRead(c *chunk, p piece, first ids.Block, count uint32) {
	rd := e.newRead()
	rd.op, rd.piece, rd.c, rd.first, rd.count, rd.at = p.op, p, c, first, count, e.now
	e.sendRead(rd)
}

// sendRead asks the local in-sync replica, else the one with the fewest
// requests outstanding. With none to ask it waits, or fails when all have.
func (e *Engine) sendRead(rd *read) {
	best, pos, hope := (*replica)(nil), 0, false
	for i, r := range rd.c.replicas {
		switch {
		case rd.c.fills[i] != nil:
			hope = hope || rd.c.fills[i].asked // it may count by now
		case !r.inSync || rd.bad&(1<<i) != 0 || r.up && rd.ends[i] == r.gen:
		case !r.readable() || !rd.c.shows(r):
			hope = true
		case best == nil || (!best.local && (r.local || r.busy < best.busy)):
			best, pos = r, i
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
	rd.req = wire.Request{Kind: wire.Read, Chunk: rd.c.id, Layer: e.layers.top, Chain: e.layers.chain, Block: rd.first, Count: rd.count}
	if rd.states() {
		rd.req.Flags = wire.FlagEntries | wire.FlagNoData
	} else if !best.local || rd.bad != 0 || len(e.origins) > 0 {
		rd.req.Flags = wire.FlagEntries
	} else if rd.job == nil && rd.piece.aligned() {
		// Only the in-process twin fills it, and only before Submit returns.
		rd.req.Into = rd.piece.data()
	}
	rd.legs[pos] = leg{sent: e.now}
	e.send(best, &rd.req, slot{read: rd, pos: pos})
}

// resendRead asks another replica because the connection went before the answer
// came. The old request may still be with that connection: it is left alone.
func (e *Engine) resendRead(rd *read) {
	again := *rd
	again.req = wire.Request{}
	e.sendRead(&again)
}

// readReply takes a replica's answer to a read.
func (e *Engine) readReply(r *replica, rd *read, pos int, rep *wire.Reply) {
	k := rep.Status
	if k == status.OK && !e.verified(rd, rep) {
		k = status.Corrupt
	}
	if k == status.OK && !rd.c.shows(r) { // perhaps dropped meanwhile, and back with what was sent late
		e.sendRead(rd)
		return
	}
	switch k {
	case status.OK:
		if rd.states() {
			e.describe(rd, rep.Entries)
			return
		}
		e.countRead(r, rd)
		if rd.bad != 0 {
			e.repair(rd, rep)
		}
		if holes := e.holesIn(rep); len(holes) > 0 {
			rd.buf = rep.Data
			e.beginViews(rd, holes)
			return
		}
		e.readDone(rd, rep.Data, status.OK)
		return
	case status.Corrupt, status.Poison:
		if rd.count > 1 && rd.job == nil {
			e.splitRead(rd)
			return
		}
	case status.NotFound:
		if e.layersMoved(rd) {
			return
		}
		fallthrough
	default: // its store cannot go on; back over another connection it is asked again
		if rd.c.replicas[pos] == r { // or its copy has moved away, and it has dropped it
			e.replicaFailed(r, rep)
		}
		if e.state == Ended {
			return
		}
		if k != status.NotFound {
			rd.ends[pos] = r.gen
			e.sendRead(rd)
			return
		}
	}
	if rd.c.replicas[pos] == r {
		rd.bad |= 1 << pos
	}
	e.sendRead(rd)
}

// states says whether a read asks how its blocks are stored.
func (rd *read) states() bool { return rd.job == nil && rd.op.States != nil }

// describe answers a read that asks how its blocks are stored. What a clone does
// not have itself counts as data if its origin may have it.
func (e *Engine) describe(rd *read, es []wire.Entry) {
	shows := e.originHas(rd.c.index)
	for i, out := 0, rd.piece.states(); i < len(out); i++ {
		out[i] = BlockData
		if k := es[i].Kind; k == wire.EntryZero || k == wire.EntryHole && !shows {
			out[i] = BlockHole
		}
	}
	rd.until = e.counter
	e.answerRead(rd)
}

// holesIn lists what a clone does not have itself.
func (e *Engine) holesIn(rep *wire.Reply) []run {
	if len(e.origins) == 0 {
		return nil
	}
	return holesOf(rep.Entries)
}

// layersMoved deals with a store that knows of a layer's end before this engine
// does: the read is asked again with the chain of now, or of after the next news.
func (e *Engine) layersMoved(rd *read) bool {
	if !slices.Equal(rd.req.Chain, e.layers.chain) || rd.req.Layer != e.layers.top {
		e.sendRead(rd)
		return true
	}
	if rd.moved >= movedTries { // another epoch's writer may have given up even the top
		return false
	}
	rd.moved++
	e.lookAgain()
	e.stuck = append(e.stuck, rd)
	return true
}

// movedTries bounds how often a read is asked again with the chain that metadata
// gives.
const movedTries = 3

// countRead counts where a client's read was served.
func (e *Engine) countRead(r *replica, rd *read) {
	if rd.job != nil {
		return
	}
	e.stats.ReadBlocks += uint64(rd.count)
	if r.local {
		e.stats.LocalBlocks += uint64(rd.count)
	}
}

// splitRead reads the halves by themselves, down to the blocks that are bad:
// each replica may have a bad one the others can serve, and only those are to be
// repaired.
func (e *Engine) splitRead(rd *read) {
	half := rd.count / 2
	p := rd.piece
	cut := p.off - p.off%ids.BlockSize + uint64(half)*ids.BlockSize
	rd.op.parts++
	e.startRead(rd.c, piece{p.op, p.off, cut - p.off}, rd.first, half)
	e.startRead(rd.c, piece{p.op, cut, p.off + p.n - cut}, rd.first+ids.Block(half), rd.count-half)
	e.freeRead(rd)
}

// verified checks data that crossed a wire against its checksums. Data of the
// in-process twin was checked by the store itself.
func (e *Engine) verified(rd *read, rep *wire.Reply) bool {
	if rd.states() {
		return len(rep.Entries) == int(rd.count) && !slices.ContainsFunc(rep.Entries, func(en wire.Entry) bool {
			return !names(rd.req.Layer, rd.req.Chain, en.Layer)
		})
	}
	if len(rep.Data) != int(rd.count)*ids.BlockSize {
		return false
	}
	if rd.req.Flags&wire.FlagEntries == 0 {
		return true
	}
	return len(rep.Entries) == int(rd.count) && entriesMatch(e.volume, &rd.req, rep.Entries, rep.Data)
}

// entriesMatch checks the blocks of a read, one per entry, against the entries'
// checksums, under the identity that was asked for: a block of another place, or
// of a layer that was not asked for, does not pass for this one.
func entriesMatch(vol ids.VolumeID, q *wire.Request, es []wire.Entry, data []byte) bool {
	for i := range es {
		b := data[i*ids.BlockSize : (i+1)*ids.BlockSize]
		en := &es[i]
		en.Chunk, en.Block = q.Chunk, q.Block+ids.Block(i)
		if !names(q.Layer, q.Chain, en.Layer) {
			return false
		}
		switch en.Kind {
		case wire.EntryData:
			if wire.BlockSum(vol, q.Chunk, en.Layer, en.Block, en.Version, b) != en.Sum {
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
		e.freeRead(rd)
		return
	}
	if k != status.OK {
		e.cause = cause{legs: &rd.legs, replicas: rd.c.members()}
		e.partDone(rd.op, k)
		e.cause = cause{}
		e.freeRead(rd)
		return
	}
	dst := rd.piece.data()
	src := data[rd.piece.off%ids.BlockSize:]
	if &dst[0] != &src[0] {
		copy(dst, src)
	}
	if rd.buf == nil {
		rd.until = e.counter
	}
	e.answerRead(rd)
}

// answerRead answers unless a write that was issued before the data came is
// still in flight on these blocks: what it may have shown could yet be lost.
func (e *Engine) answerRead(rd *read) {
	for _, j := range rd.c.under() {
		if j.version != 0 && j.version.Counter() <= rd.until && j.overlaps(rd.first, rd.count) {
			j.waiters = append(j.waiters, waiter{read: rd})
			return
		}
	}
	e.pace.guest(e.now, e.now-rd.at)
	e.cause = cause{legs: &rd.legs, replicas: rd.c.members()}
	e.partDone(rd.op, status.OK)
	e.cause = cause{}
	e.freeRead(rd)
}

// repair writes a good block over the bad copies, at the version it has: a bad
// copy of that or an older version goes, a newer write stays. Only single
// blocks come here (splitRead).
func (e *Engine) repair(rd *read, rep *wire.Reply) {
	en := rep.Entries[0]
	if en.Version == 0 {
		return // a hole has no version to go by
	}
	var data []byte
	if en.Kind == wire.EntryData {
		data = append(data, rep.Data...)
	}
	for i, r := range rd.c.replicas {
		if rd.bad&(1<<i) == 0 || !r.readable() {
			continue
		}
		q := &wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Chunk: rd.c.id, Entries: []wire.Entry{en},
			Data: data, Limit: en.Version + 1}
		e.call(r, q, func(rep *wire.Reply) {
			if rep.Status == status.OK {
				e.stats.Repaired++
			}
		})
	}
}

// retryStuck asks again for reads that found no replica.
func (e *Engine) retryStuck() {
	stuck := e.stuck
	e.stuck = nil
	for _, rd := range stuck {
		if rd.moved > 0 && e.look != nil {
			e.stuck = append(e.stuck, rd)
			continue
		}
		e.sendRead(rd)
	}
}
