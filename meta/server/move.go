package server

import (
	"bytes"
	"slices"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// placeMoves fills in where planned copies go, on this leader's knowledge.
func (s *Server) placeMoves(t *tenure, op *pb.MoveChunks) error {
	var bad error
	err := s.fsm.read(func(kv state.KV) {
		v := state.VolumeByID(kv, op.VolumeId)
		if v == nil || len(op.Moves) > state.MaxMoves {
			return
		}
		bad = PlaceMoves(kv, s.cfg.Placer, op, t.storeViews(kv, v, boottime()))
	})
	if err == nil {
		err = bad
	}
	return err
}

// PlaceMoves has the placer choose the store of each planned copy: one that is
// up, in sync or no member yet, and in no failure domain the chunk is in; one that
// placement wished for keeps its store if it is such a one. A plan
// that finds none is left out; when nothing is left to ask for, that is
// status.NoSpace.
func PlaceMoves(kv state.KV, placer Placer, op *pb.MoveChunks, stores []StoreView) error {
	v := state.VolumeByID(kv, op.VolumeId)
	if v == nil {
		return nil
	}
	var kept []*pb.ChunkMove
	var last error
	for _, mv := range op.Moves {
		if mv.Step != pb.ChunkMove_PLAN {
			kept = append(kept, mv)
			continue
		}
		c := state.ChunkAt(kv, v.Id, mv.Index)
		if c == nil {
			continue
		}
		if mv.Wish {
			if !slices.ContainsFunc(placesFor(kv, v, c, mv.From, stores), func(s StoreView) bool { return bytes.Equal(s.ID[:], mv.To) }) {
				mv = &pb.ChunkMove{Index: mv.Index, Step: pb.ChunkMove_CANCEL} // naming nobody: the answer says how the chunk is
			}
			kept = append(kept, mv)
			continue
		}
		prefer := ""
		if !v.Maintenance { // a guest there reads it
			prefer = v.HolderHost
		}
		req := ChunkRequest{Volume: ids.VolumeID(v.Id), Count: 1, Replicas: 1, ChunkBytes: v.ChunkBytes, PreferHost: prefer, Slow: onSlow(kv, c, mv.From), Stores: placesFor(kv, v, c, mv.From, stores)}
		places, err := placer.PlaceChunks(req)
		if err != nil || len(places) != 1 || len(places[0]) != 1 {
			last = err
			continue
		}
		to := places[0][0]
		mv.To = bytes.Clone(to[:])
		for i := range stores {
			if stores[i].ID == to {
				stores[i].UsedBytes += v.ChunkBytes // the next ones of this command see it
			}
		}
		kept = append(kept, mv)
	}
	if op.Moves = kept; len(kept) == 0 {
		return status.Errorf(status.NoSpace, "no store can take a further copy of chunks of volume %s: every host with room has one already (%w)", v.Name, last)
	}
	return nil
}

// onSlow reports whether a copy that goes, or one that is to be joined by another,
// is on a slow store.
func onSlow(kv state.KV, c *pb.Chunk, from []byte) bool {
	if len(from) == 0 && len(c.Stores) > 0 {
		from = c.Stores[0]
	}
	return state.ClassOf(state.StoreByID(kv, from)) == state.ClassSlow
}

// placesFor lists the stores that may get a copy of c in the place of from.
func placesFor(kv state.KV, v *pb.Volume, c *pb.Chunk, from []byte, stores []StoreView) []StoreView {
	taken := map[string]bool{}
	take := func(id []byte) {
		if !bytes.Equal(id, from) {
			taken[state.Label(state.HostByName(kv, state.StoreByID(kv, id).GetHost()), v.Domain)] = true
		}
	}
	for _, id := range c.Stores {
		take(id)
	}
	for _, f := range c.Filling {
		take(f.Store)
	}
	var out []StoreView
	for _, s := range stores {
		h := state.HostByName(kv, s.Host)
		if s.Up && !taken[s.Domain] && (!s.Member || s.InSync) && !bytes.Equal(s.ID[:], from) && !h.GetDrained() && !state.HasWaste(kv, s.ID[:], v.Id, c.Id) {
			out = append(out, s)
		}
	}
	return out
}
