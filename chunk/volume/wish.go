package volume

import (
	"bytes"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// wishesMax bounds the moves placement wants of one volume.
const wishesMax = 64

// Wish brings moves of copies that placement wants: nothing is wrong with the
// copies that go. It replaces earlier wishes that are not planned yet. They come
// after all repairs, and one that is not possible is forgotten.
type Wish struct{ Moves []*pb.ChunkWish }

func (*Wish) event() {}

func (e *Engine) wish(ev *Wish) {
	m := &e.moves
	m.wishes = m.wishes[:0]
	for _, w := range ev.Moves[:min(len(ev.Moves), wishesMax)] {
		if e.wished(w) {
			m.wishes = append(m.wishes, w)
		}
	}
	if len(m.wishes) > 0 {
		m.look = true
	}
}

// wished reports whether a wish can be planned: its copy is there, in sync, and
// nothing else happens to the chunk.
func (e *Engine) wished(w *pb.ChunkWish) bool {
	c := e.chunks[ids.ChunkIndex(w.Index)]
	if c == nil || c.id == 0 || c.filling() || c.count() != e.copies || !e.room(c) {
		return false
	}
	from := false
	for _, r := range c.replicas {
		from = from || r.index >= 0 && bytes.Equal(r.store[:], w.From) && r.inSync && !e.bad(r)
		if r.index >= 0 && bytes.Equal(r.store[:], w.To) {
			return false
		}
	}
	return from
}

// planWishes adds what is wished for to a plan, if there is room in it.
func (e *Engine) planWishes(planned int) {
	m := &e.moves
	m.wishes = slices.DeleteFunc(m.wishes, func(w *pb.ChunkWish) bool { return !e.wished(w) })
	m.look = m.look || len(m.wishes) > 0 // until metadata was asked: another call may have the turn
	for _, w := range m.wishes {
		if planned >= fillsPlanned || len(m.plan) >= movesAtOnce {
			return
		}
		planned++
		m.plan = append(m.plan, &pb.ChunkMove{Index: w.Index, From: w.From, To: w.To, Step: pb.ChunkMove_PLAN, Wish: true})
	}
}

// forget drops the wishes that were asked for and answered: planned now, or not
// possible.
func (e *Engine) forget(asked []*pb.ChunkMove) {
	e.moves.wishes = slices.DeleteFunc(e.moves.wishes, func(w *pb.ChunkWish) bool {
		return slices.ContainsFunc(asked, func(mv *pb.ChunkMove) bool { return mv.Index == w.Index })
	})
}
