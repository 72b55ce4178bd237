package volume

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// layers is what the engine knows of its volume's layers. Writes go to top; reads
// look through top and then chain. The top is the one of the attach until a cut
// moves it (cut.go), whatever metadata has prepared meanwhile.
type layers struct {
	top    ids.LayerID
	chain  []ids.LayerID // below top, newest first; replaced, never changed
	all    []*pb.Layer   // as metadata has them; empty: there is only the top
	last   ids.LayerID   // the highest id metadata has given
	pruned []ids.LayerID // news that still have one of these are old
}

// maxPruned bounds what is remembered of pruned layers.
const maxPruned = 64

// chainOf lists what stands below a layer, newest first.
func chainOf(all []*pb.Layer, head ids.LayerID) []ids.LayerID {
	byID := map[ids.LayerID]*pb.Layer{}
	for _, l := range all {
		byID[ids.LayerID(l.Id)] = l
	}
	var out []ids.LayerID
	for l := byID[head]; l != nil && l.HasParent && len(out) < len(all); {
		out = append(out, ids.LayerID(l.Parent))
		l = byID[ids.LayerID(l.Parent)]
	}
	return out
}

// begin takes the layers of an attach.
func (l *layers) begin(v *pb.Volume) {
	l.top = ids.LayerID(v.Top)
	l.take(v)
}

// take enters the layers as metadata has them. Older news, from before a cut or a
// pruning of this engine, are ignored.
func (l *layers) take(v *pb.Volume) {
	ids32 := func(x *pb.Layer) ids.LayerID { return ids.LayerID(x.Id) }
	if ids.LayerID(v.LastLayer) < l.last {
		return
	}
	hasTop := len(v.Layers) == 0 && ids.LayerID(v.Top) == l.top
	for _, x := range v.Layers {
		hasTop = hasTop || ids32(x) == l.top
		if slices.Contains(l.pruned, ids32(x)) {
			return
		}
	}
	if !hasTop {
		return
	}
	l.all, l.last = v.Layers, ids.LayerID(v.LastLayer)
	if chain := chainOf(l.all, l.top); !slices.Equal(chain, l.chain) {
		l.chain = chain
	}
}

// prune notes that a layer is gone.
func (l *layers) prune(id ids.LayerID) {
	l.pruned = append(l.pruned, id)
	if n := len(l.pruned); n > maxPruned {
		l.pruned = l.pruned[n-maxPruned:]
	}
}

// names reports whether a layer is one that a read looks through.
func names(head ids.LayerID, chain []ids.LayerID, l ids.LayerID) bool {
	return l == head || slices.Contains(chain, l)
}
