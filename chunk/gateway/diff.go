package gateway

import (
	"context"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	diffDepth  = 4    // chunks asked about at a time
	diffRanges = 4096 // of one answer
)

// Diff tells emit, in order and in parts, which ranges of a volume attached here
// differ between two of its snapshots; to "" is the volume as it is now. from ""
// is everything `to` shows that may not be zeros, a clone's origin by whole chunks.
// No data is read.
func (g *Gateway) Diff(ctx context.Context, name, from, to string, emit func([]*pb.Range) error) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if err := v.refresh(ctx); err != nil { // a snapshot gets its name behind the engine's back
		return err
	}
	d, err := v.diff(from, to)
	if err != nil {
		return err
	}
	type asked struct {
		index ids.ChunkIndex
		done  chan volume.Listed // nil: an origin shows in it
	}
	var under []asked
	for len(under) > 0 || len(d.todo) > 0 {
		for len(under) < diffDepth && len(d.todo) > 0 {
			a := asked{index: d.todo[0]}
			if d.todo = d.todo[1:]; !d.origin[a.index] {
				a.done = make(chan volume.Listed, 1)
				v.step(&volume.List{Index: a.index, Layers: d.layers, Chain: d.chain, User: a.done})
			}
			under = append(under, a)
		}
		a := under[0]
		under = under[1:]
		begin := uint64(a.index) * v.chunkBytes
		if a.done == nil {
			d.add(begin, v.chunkBytes, false)
			continue
		}
		select {
		case l := <-a.done:
			if l.Status != status.OK {
				return status.Errorf(l.Status, "what differs in volume %s from byte %d on cannot be told: %s", name, begin, l.Why)
			}
			for _, r := range l.Runs {
				d.add(begin+uint64(r.First)*ids.BlockSize, uint64(r.Count)*ids.BlockSize, r.Zero)
			}
		case <-v.ended:
			return status.Errorf(status.Unavailable, "volume %s was let go meanwhile: ask again", name)
		case <-ctx.Done():
			return status.Errorf(status.Timeout, "what differs in volume %s cannot be told in time: %s", name, v.Info().Why)
		}
		if len(d.ranges) >= diffRanges { // the last one may still grow
			n := len(d.ranges) - 1
			if err := emit(d.ranges[:n]); err != nil {
				return err
			}
			d.ranges = append([]*pb.Range(nil), d.ranges[n])
		}
	}
	return emit(d.ranges)
}

// diff is one list being made.
type diff struct {
	layers, chain []ids.LayerID
	size          uint64 // bytes of `to`
	todo          []ids.ChunkIndex
	origin        map[ids.ChunkIndex]bool
	ranges        []*pb.Range // not emitted yet
}

// diff finds the layers and chunks to ask about.
func (v *Volume) diff(from, to string) (*diff, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	all, top := v.engine.Layers()
	d := &diff{size: v.engine.Size(), todo: v.engine.Chunks(), origin: map[ids.ChunkIndex]bool{}}
	layer := func(snapshot string) (*pb.Layer, error) {
		for _, l := range all {
			if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == snapshot {
				return l, nil
			}
		}
		return nil, status.Errorf(status.NotFound, "volume %s has no snapshot %q: `cairn volume snapshot ls %s` lists them", v.name, snapshot, v.name)
	}
	end := top
	if to != "" {
		l, err := layer(to)
		if err != nil {
			return nil, err
		}
		end, d.size = ids.LayerID(l.Id), l.SizeBytes
	}
	var begin *ids.LayerID
	if from != "" {
		l, err := layer(from)
		if err != nil {
			return nil, err
		}
		id := ids.LayerID(l.Id)
		begin = &id
	} else if shown := v.engine.OriginChunks(); len(shown) > 0 {
		for _, i := range shown {
			d.origin[i] = true
		}
		d.todo = mergeIndexes(d.todo, shown)
	}
	var ok bool
	if d.layers, d.chain, ok = volume.Between(all, top, begin, end); !ok {
		return nil, status.Errorf(status.Conflict, "the layers of volume %s have changed: ask again", v.name)
	}
	return d, nil
}

// mergeIndexes is two rising lists as one.
func mergeIndexes(a, b []ids.ChunkIndex) (out []ids.ChunkIndex) {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] < b[0]:
			out, a = append(out, a[0]), a[1:]
		case a[0] > b[0]:
			out, b = append(out, b[0]), b[1:]
		default:
			out, a, b = append(out, a[0]), a[1:], b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// add appends a range, cut at the end and joined to the one before it.
func (d *diff) add(off, n uint64, zero bool) {
	if off >= d.size {
		return
	}
	n = min(n, d.size-off)
	if k := len(d.ranges); k > 0 {
		if l := d.ranges[k-1]; l.Offset+l.Length == off && l.Zero == zero {
			l.Length += n
			return
		}
	}
	d.ranges = append(d.ranges, &pb.Range{Offset: off, Length: n, Zero: zero})
}
