package sim

import (
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const sweepEvery = 700 * time.Millisecond

// sweeps has a host's process drop the copies that metadata names no more, as
// cmd/cairn's sweep does: asked for, dropped, durable, reported; in that order,
// and one round at a time.
func (n *node) sweeps(life int) {
	n.w.after(n.w.span(sweepEvery/2, sweepEvery), func() {
		if n.life != life {
			return
		}
		if n.pausedUntil > n.w.now || n.w.meta.leader == nil {
			n.sweeps(life)
			return
		}
		held := n.held()
		waste, layers, gone := state.WasteOf(n.w.meta.kv, n.id[:]), state.LayersOf(n.w.meta.kv, held), state.Gone(n.w.meta.kv, held)
		n.w.after(n.w.span(time.Millisecond, 200*time.Millisecond), func() { n.sweep(life, waste, layers, gone) })
	})
}

// sweep drops, some time after metadata has answered.
func (n *node) sweep(life int, waste []*pb.ChunkCopy, layers []*pb.VolumeLayers, forgotten []uint64) {
	if n.life != life || !n.up() {
		return
	}
	n.tellLayers(layers)
	n.dropGone(forgotten)
	left := len(waste)
	var gone []*pb.ChunkCopy
	done := func(c *pb.ChunkCopy, k status.Kind) {
		if k == status.OK {
			gone = append(gone, c)
		}
		if left--; left > 0 || n.life != life {
			return
		}
		n.sweeps(life)
		if len(gone) > 0 {
			n.w.meta.agent(n.host).do(&pb.Command{Op: &pb.Command_DroppedCopies{DroppedCopies: &pb.DroppedCopies{Store: n.id[:], Copies: gone}}},
				func(*pb.Result, error) {})
		}
	}
	if left == 0 {
		n.sweeps(life)
	}
	for _, c := range waste {
		q := &wire.Request{Kind: wire.Drop, Store: n.id, Volume: ids.VolumeID(c.VolumeId), Chunk: ids.ChunkID(c.ChunkId), Epoch: ids.MaxEpoch}
		n.store.Submit([]*wire.Request{q}, sinkFunc(func(rs []*wire.Reply) { done(c, rs[0].Status) }))
	}
}

// sinkFunc is a wire.Sink.
type sinkFunc func([]*wire.Reply)

// Replies implements wire.Sink.
func (f sinkFunc) Replies(rs []*wire.Reply) { f(rs) }
