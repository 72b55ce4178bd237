package volume

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// A shrink goes: the shell lowers the limit (Limit), waits until nothing that
// was admitted before reaches beyond it (Beyond), looks at what is there with
// operations that may (Op.Tail), commits, and brings the news (Refresh). Until
// the commit's outcome is known the limit stays.
//
// Chunks beyond the end stay in the map until the undo window is over; then
// metadata forgets them (Cuts rises), and so must the engine before the volume
// can grow over the place: it takes no size that is newer than the last cut it
// has seen the map of.

// Limit bounds what operations may reach, in bytes; 0: the size does.
type Limit struct{ Bytes uint64 }

func (*Limit) event() {}

// bound is the end for an operation.
func (e *Engine) bound(op *Op) uint64 {
	if e.limit > 0 && !op.Tail {
		return min(e.size, e.limit)
	}
	return e.size
}

// Beyond counts operations in flight that reach beyond a place, without those
// that are allowed to.
func (e *Engine) Beyond(bytes uint64) (n int) {
	for _, op := range e.unfinished() {
		if op.Kind != OpFlush && !op.Tail && op.Off+op.Len > bytes {
			n++
		}
	}
	return n
}

// Cuts is the number of the last cut whose map the engine has seen.
func (e *Engine) Cuts() uint32 { return e.cuts }

// takeSize takes over size and map. whole: chunks is the map of v. A size of
// the same revision only grows: a shrink makes a new one.
func (e *Engine) takeSize(v *pb.Volume, chunks []*pb.Chunk, whole bool) {
	if v.Revision < e.sizeRevision {
		return
	}
	if v.Cuts != e.cuts {
		if !whole {
			return
		}
		if !e.forgetCut(v, chunks) {
			return
		}
		e.cuts = v.Cuts
	}
	if v.Revision > e.sizeRevision {
		e.size, e.sizeRevision = v.SizeBytes, v.Revision
	} else {
		e.size = max(e.size, v.SizeBytes)
	}
	if e.size <= e.limit {
		e.limit = 0
	}
}

// forgetCut drops the chunks that a cut took out of the map; false: something
// is still going on in one. Those the map may not have yet were made after the
// cut, and have higher ids.
func (e *Engine) forgetCut(v *pb.Volume, chunks []*pb.Chunk) bool {
	have := make(map[ids.ChunkID]bool, len(chunks))
	for _, c := range chunks {
		have[ids.ChunkID(c.Id)] = true
	}
	var gone []*chunk
	for _, c := range e.sortedChunks() {
		if c.id != 0 && c.id <= ids.ChunkID(v.CutUpto) && !have[c.id] {
			if len(c.jobs) > 0 {
				return false
			}
			gone = append(gone, c)
		}
	}
	for _, c := range gone {
		for pos := range c.replicas {
			e.vacate(c, pos)
		}
		delete(e.chunks, c.index)
	}
	return true
}
