package volume

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// opQueue is a first-in first-out queue through Op.next; bounded by the
// operations a client may have in flight.
type opQueue struct{ head, tail *Op }

func (q *opQueue) push(op *Op) {
	if q.tail == nil {
		q.head = op
	} else {
		q.tail.next = op
	}
	q.tail = op
}

func (q *opQueue) takeAll() *Op {
	op := q.head
	q.head, q.tail = nil, nil
	return op
}

// admitAll admits a list taken from a queue.
func (e *Engine) admitAll(op *Op) {
	for op != nil {
		next := op.next
		op.next = nil
		e.submit(op)
		op = next
	}
}

// admit takes an operation in, cuts it into pieces and starts each. The door
// (nbd) has checked its bounds; they are checked again because the size may
// differ between the two.
func (e *Engine) admit(op *Op) {
	if op.Kind == OpFlush {
		e.stats.Flushes++
		op.failed = status.OK
		e.flush.next = append(e.flush.next, op)
		return
	}
	if end := e.bound(op); op.Off > end || op.Len > end-op.Off {
		e.done(op, status.Invalid)
		return
	}
	if e.cut != nil && op.Kind != OpRead {
		e.cut.ops.push(op)
		return
	}
	if op.Kind == OpWrite && len(e.full.jobs) > 0 {
		e.done(op, status.NoSpace)
		return
	}
	if e.cfg.ReadOnly && op.Kind != OpRead {
		e.done(op, status.Permission)
		return
	}
	if op.Kind == OpRead {
		e.stats.Reads++
	} else {
		e.stats.Writes++
	}
	if op.Kind == OpTrim { // whole blocks only
		end := (op.Off + op.Len) / ids.BlockSize * ids.BlockSize
		op.Off = (op.Off + ids.BlockSize - 1) / ids.BlockSize * ids.BlockSize
		op.Len = 0
		if end > op.Off {
			op.Len = end - op.Off
		}
	}
	op.parts, op.failed, op.stored = 1, status.OK, false // one for the cutting itself
	for p, ok := e.firstPiece(op); ok; p, ok = e.nextPiece(p) {
		op.parts++
		e.start(p)
	}
	e.partDone(op, status.OK)
}

// piece is the part of an operation inside one request: [off, off+n) bytes of
// the volume, in one chunk.
type piece struct {
	op  *Op
	off uint64
	n   uint64
}

func (e *Engine) firstPiece(op *Op) (piece, bool) {
	return e.nextPiece(piece{op: op, off: op.Off, n: 0})
}

// nextPiece cuts at chunk ends, data also at maxPieceBlock, and so that the
// unaligned edges of a zeroing are pieces of their own.
func (e *Engine) nextPiece(p piece) (piece, bool) {
	off, end := p.off+p.n, p.op.Off+p.op.Len
	if off >= end {
		return p, false
	}
	chunkBytes := uint64(e.perChunk) * ids.BlockSize
	stop := min(end, off-off%chunkBytes+chunkBytes)
	if p.op.Kind == OpCopy {
		stop = min(stop, off-off%(copyBlocks*ids.BlockSize)+copyBlocks*ids.BlockSize)
	} else if p.op.Kind == OpRead || p.op.Kind == OpWrite {
		stop = min(stop, off-off%ids.BlockSize+maxPieceBlock*ids.BlockSize)
	} else if off%ids.BlockSize != 0 {
		stop = min(stop, off-off%ids.BlockSize+ids.BlockSize)
	} else if whole := stop - stop%ids.BlockSize; whole > off {
		stop = whole
	}
	return piece{p.op, off, stop - off}, true
}

// blocks returns the piece's first block in its chunk and how many it touches.
func (e *Engine) blocks(p piece) (first ids.Block, count uint32) {
	chunkBytes := uint64(e.perChunk) * ids.BlockSize
	in := p.off % chunkBytes
	last := (in + p.n - 1) / ids.BlockSize
	return ids.Block(in / ids.BlockSize), uint32(last-in/ids.BlockSize) + 1
}

func (p piece) aligned() bool { return (p.off|p.n)%ids.BlockSize == 0 }

// data returns the piece's bytes of its operation's buffer.
func (p piece) data() []byte {
	at := p.off - p.op.Off
	return p.op.Data[at : at+p.n]
}

// states returns the piece's part of what its operation says of its blocks.
func (p piece) states() []byte {
	at := (p.off - p.op.Off) / ids.BlockSize
	return p.op.States[at : at+p.n/ids.BlockSize]
}

// zeros answers a piece of a read of which nothing was ever written.
func (p piece) zeros() {
	if p.op.States == nil {
		clear(p.data())
		return
	}
	for i := range p.states() {
		p.states()[i] = BlockHole
	}
}

// start begins a piece, or lets it wait for its chunk. Blocks are registers, and
// what overlaps takes turns only where it must:
//
//   - a read never waits to be sent; its answer does, while what it may have
//     seen is not yet acknowledged (answerRead)
//   - a write may overtake another: versions give one order everywhere
//   - a merge, which reads before it writes, waits for all earlier writes on its
//     blocks, and all later ones for it
func (e *Engine) start(p piece) {
	if e.state == Ended {
		e.partDone(p.op, e.endedAs)
		return
	}
	if e.cut != nil && p.op.Kind != OpRead {
		e.cut.pieces = append(e.cut.pieces, p)
		return
	}
	c := e.chunks[ids.ChunkIndex(p.off/(uint64(e.perChunk)*ids.BlockSize))]
	if c == nil || c.id == 0 {
		e.startUnallocated(c, p)
		return
	}
	first, count := e.blocks(p)
	if p.op.Kind == OpRead {
		e.startRead(c, p, first, count)
		return
	}
	p.op.stored = true
	j := e.newJob(c, p, first, count)
	j.merging = !p.aligned() || p.op.Kind == OpCopy
	for _, o := range c.jobs {
		if o != j && (o.merging || j.merging) && o.overlaps(first, count) {
			o.waiters = append(o.waiters, waiter{job: j})
			j.after++
		}
	}
	if j.after == 0 {
		e.begin(j)
	}
}

// begin sends a job on its way once nothing it must wait for is left.
func (e *Engine) begin(j *job) {
	if j.merging {
		e.merge(j)
	} else {
		e.issue(j)
	}
}

// startUnallocated reads zeros, trims nothing, and lets a write wait for its
// chunk.
func (e *Engine) startUnallocated(c *chunk, p piece) {
	index := ids.ChunkIndex(p.off / (uint64(e.perChunk) * ids.BlockSize))
	shows := e.originHas(index)
	if shows && p.op.States != nil { // the origin's blocks count as data
		clear(p.states())
		e.partDone(p.op, status.OK)
		return
	}
	if shows && p.op.Kind == OpRead {
		e.viewAll(c, p)
		return
	}
	if p.op.Kind != OpWrite && !(shows && (p.op.Kind == OpZero || p.op.Kind == OpCopy)) {
		if p.op.Kind == OpRead {
			p.zeros()
		}
		e.partDone(p.op, status.OK)
		return
	}
	if c == nil {
		c = &chunk{index: index}
		e.chunks[index] = c
		e.alloc.wanted = append(e.alloc.wanted, index)
	}
	e.alloc.pieces[index] = append(e.alloc.pieces[index], p)
}

// partDone finishes one piece; the last one finishes the operation.
func (e *Engine) partDone(op *Op, k status.Kind) {
	if k != status.OK && op.failed == status.OK {
		op.failed = k
	}
	if op.parts--; op.parts > 0 {
		return
	}
	switch {
	case op.Kind != OpRead && op.FUA && op.failed == status.OK:
		e.flush.next = append(e.flush.next, op)
	case op.stored || op.failed != status.OK:
		e.done(op, op.failed)
	default:
		e.doneLeased(op)
	}
}

// doneLeased answers what no store of this epoch has answered for since it was
// invoked: a read, a flush of nothing, a trim of what is not allocated. Without a
// lease a newer writer may serve already: then it waits for one, or is confirmed.
func (e *Engine) doneLeased(op *Op) {
	if e.now >= e.leaseTill {
		e.leaseHeld = append(e.leaseHeld, op)
		return
	}
	e.done(op, op.failed)
}

// allocState is the allocation of chunks: one command at a time, which takes
// all the indices that have gathered. Bounded by the operations in flight.
type allocState struct {
	wanted []ids.ChunkIndex
	pieces map[ids.ChunkIndex][]piece // what waits for each
	call   *MetaCall
}

// allocMax bounds the chunks of one command.
const allocMax = 64

func (e *Engine) startAllocate() {
	if len(e.alloc.wanted) == 0 || e.metaBusy() || e.state == Attaching {
		return
	}
	a := &pb.Allocate{VolumeId: uint64(e.volume), Epoch: uint32(e.epoch), Revision: e.revision, PreferHost: e.cfg.Host}
	n := min(len(e.alloc.wanted), allocMax)
	for _, i := range e.alloc.wanted[:n] {
		a.Indices = append(a.Indices, uint32(i))
	}
	e.alloc.wanted = e.alloc.wanted[n:]
	e.alloc.call = &MetaCall{Allocate: a}
	e.out.Meta = append(e.out.Meta, e.alloc.call)
}

// allocated takes the answer of an allocation. Until it is definite nothing was
// sent to any replica, so an index is simply asked for again: one that has a
// chunk already is answered with it.
func (e *Engine) allocated(ev *MetaDone) {
	a := ev.Call.Allocate
	e.alloc.call = nil
	e.takeNews()
	switch k := status.Of(ev.Err); k {
	case status.OK:
	case status.Unavailable, status.Unknown, status.Timeout, status.Shutdown, status.Conflict:
		e.holdMeta(k)
		for _, i := range a.Indices {
			e.alloc.wanted = append(e.alloc.wanted, ids.ChunkIndex(i))
		}
		return
	default:
		for _, i := range a.Indices {
			e.unwant(ids.ChunkIndex(i), k)
		}
		return
	}
	if v := ev.Result.GetVolume(); v != nil && v.Revision > e.revision {
		e.adoptMembers(v)
	}
	for _, c := range ev.Result.GetChunks() {
		if err := e.adoptChunk(c); err != nil {
			e.unwant(ids.ChunkIndex(c.Index), status.Of(err))
			continue
		}
		waiting := e.alloc.pieces[ids.ChunkIndex(c.Index)]
		delete(e.alloc.pieces, ids.ChunkIndex(c.Index))
		for _, p := range waiting {
			e.start(p)
		}
	}
	for _, i := range a.Indices { // an answer that leaves one out is asked again
		if c := e.chunks[ids.ChunkIndex(i)]; c != nil && c.id == 0 {
			e.holdMeta(status.Internal)
			e.alloc.wanted = append(e.alloc.wanted, ids.ChunkIndex(i))
		}
	}
}

// unwant fails everything that waited for a chunk that cannot be had.
func (e *Engine) unwant(i ids.ChunkIndex, k status.Kind) {
	delete(e.chunks, i)
	waiting := e.alloc.pieces[i]
	delete(e.alloc.pieces, i)
	for _, p := range waiting {
		e.partDone(p.op, k)
	}
}
