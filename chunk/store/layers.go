package store

import (
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Every (layer, block) of a chunk is a register of its own: joins, digests and
// compaction need not know what a layer is. Reads name the chain of layers they
// look through (read.go).
//
// What a store has to know of layers is which ones there are: a list, and the
// highest id ever given. Ids are never given twice and layers only ever go, so a
// list may come late, again and from anybody: what is missing from it, up to its
// highest id, is gone for good. A read that names such a layer is an error: going
// on to the next layer would be another block's content.

// layerMark is one living layer.
type layerMark struct {
	id   ids.LayerID
	into ids.LayerID // > id: it is being merged into this one (merge.go); 0: it is not
}

// told reports whether the store has a list of the volume's layers.
func (v *vol) told() bool { return len(v.marks) > 0 }

func (v *vol) mark(id ids.LayerID) (layerMark, bool) {
	i, ok := slices.BinarySearchFunc(v.marks, id, func(m layerMark, id ids.LayerID) int { return int(int64(m.id) - int64(id)) })
	if !ok {
		return layerMark{}, false
	}
	return v.marks[i], true
}

// gone reports whether a layer was dropped.
func (v *vol) gone(id ids.LayerID) bool {
	if !v.told() || id > v.lastLayer {
		return false
	}
	_, lives := v.mark(id)
	return !lives
}

// checkChain refuses a read through a layer that is gone, or that has given part
// of what it held to one the read does not look at first, unless it is raw. Both
// lists are sorted: O(their lengths).
func (v *vol) checkChain(layer ids.LayerID, chain []ids.LayerID, raw bool) error {
	if v == nil || !v.told() {
		return nil
	}
	i, before := len(v.marks)-1, ids.LayerID(0)
	for d := 0; d <= len(chain); d++ {
		if d > 0 {
			before, layer = layer, chain[d-1]
		}
		if layer > v.lastLayer {
			continue
		}
		for i >= 0 && v.marks[i].id > layer {
			i--
		}
		if i < 0 || v.marks[i].id != layer {
			return status.Errorf(status.NotFound, "layer %d of volume %d was dropped", layer, v.id)
		}
		// The layer before may be above into: that has given everything to it since.
		if into := v.marks[i].into; into != 0 && !raw && (d == 0 || before < into) {
			return status.Errorf(status.NotFound, "layer %d of volume %d is being merged into layer %d and cannot be read by itself", layer, v.id, into)
		}
	}
	return nil
}

// setLayers takes a list of layers into the log and into force.
func (s *Store) setLayers(c *caller, v *vol, q *wire.Request, out *outbox) error {
	if v != nil && v.takeLayers(q.Layer, marksOf(q.Entries)) {
		r := record{kind: kindLayers, volume: uint64(v.id), layer: uint32(v.lastLayer), count: uint32(len(v.marks))}
		st, err := s.append(&r, markBytes*len(v.marks))
		if err != nil {
			return err
		}
		putMarks(st.payload, v.marks)
		s.dropLayers(v, out)
		if err := s.forget(500); err != nil {
			return err
		}
	}
	s.afterAppends(c, &wire.Reply{Kind: q.Kind, ID: q.ID}, out)
	return nil
}

// takeLayers enters a list; it reports whether that changed anything. Of ids that
// were known before, only those stay that are on both lists.
func (v *vol) takeLayers(last ids.LayerID, marks []layerMark) bool {
	if len(marks) == 0 || v.told() && last < v.lastLayer {
		return false
	}
	kept := make([]layerMark, 0, len(marks))
	for _, m := range marks {
		if old, ok := v.mark(m.id); ok {
			m.into = max(m.into, old.into)
		} else if v.gone(m.id) {
			continue
		}
		kept = append(kept, m)
	}
	if len(kept) == 0 || v.told() && last == v.lastLayer && slices.Equal(kept, v.marks) {
		return false
	}
	v.marks, v.lastLayer = kept, last
	return true
}

// dropLayers takes the layers that are gone out of the volume; forget does the
// rest.
func (s *Store) dropLayers(v *vol, out *outbox) {
	s.abortMerges(func(m *merge) bool { return m.v == v && v.gone(m.layer) }, status.NotFound, "the layer was dropped", out)
	s.leaving = append(s.leaving, v.forget(func(c *chunk) bool { return v.gone(c.layer) })...)
}

// marksOf reads the entries of a Layers request, which check has looked at.
func marksOf(es []wire.Entry) []layerMark {
	marks := make([]layerMark, len(es))
	for i, e := range es {
		marks[i].id = e.Layer
		if e.Kind == wire.EntryZero {
			marks[i].into = ids.LayerID(e.Block)
		}
	}
	return marks
}

// checkLayers holds a list of layers to its form: rising ids, and into a living
// layer above.
func checkLayers(q *wire.Request) error {
	bad := func(why string) error {
		return status.Errorf(status.Invalid, "layers request with %s", why)
	}
	if len(q.Entries) == 0 || len(q.Entries) > wire.MaxLayers {
		return bad("no layer or too many")
	}
	for i := range q.Entries {
		e := &q.Entries[i]
		switch {
		case e.Layer > q.Layer:
			return bad("a layer above the highest")
		case i > 0 && e.Layer <= q.Entries[i-1].Layer:
			return bad("layers out of order")
		case e.Kind == wire.EntryZero && !slices.ContainsFunc(q.Entries[i+1:], func(o wire.Entry) bool { return o.Layer == ids.LayerID(e.Block) }):
			return bad("a merge into a layer that does not live above")
		}
	}
	return nil
}

// markBytes is one layer in a kindLayers record: id 4 | into 4.
const markBytes = 8

func putMarks(b []byte, marks []layerMark) {
	for i, m := range marks {
		le.PutUint32(b[markBytes*i:], uint32(m.id))
		le.PutUint32(b[markBytes*i+4:], uint32(m.into))
	}
}

// marksIn reads a kindLayers record.
func marksIn(r *record) []layerMark {
	marks := make([]layerMark, r.count)
	for i := range marks {
		marks[i] = layerMark{ids.LayerID(le.Uint32(r.payload[markBytes*i:])), ids.LayerID(le.Uint32(r.payload[markBytes*i+4:]))}
	}
	return marks
}

// applyLayers enters what the log says of a volume's layers.
func (s *Store) applyLayers(id ids.VolumeID, last ids.LayerID, marks []layerMark) {
	if v := s.vol(id); v.takeLayers(last, marks) {
		s.dropLayers(v, nil) // nothing is being merged while the log is read
	}
}

// layerEntries counts the layers a head has to repeat.
func (s *Store) layerEntries() int {
	n := 0
	for _, v := range s.vols {
		n += len(v.marks)
	}
	return n
}
