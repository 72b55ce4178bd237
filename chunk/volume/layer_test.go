package volume

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// What metadata does with layers (meta/state has the real one).

func (w *world) layer(id uint32) *pb.Layer {
	for _, l := range w.vol.Layers {
		if l.Id == id {
			return l
		}
	}
	return nil
}

func (w *world) above(id uint32) (out []*pb.Layer) {
	for _, l := range w.vol.Layers {
		if l.HasParent && l.Parent == id {
			out = append(out, l)
		}
	}
	return out
}

func (w *world) reap() {
	for n := -1; n != len(w.vol.Layers); {
		n = len(w.vol.Layers)
		for i, l := range w.vol.Layers {
			if l.State == pb.LayerState_LAYER_STATE_DELETED && len(w.above(l.Id)) == 0 {
				w.vol.Layers = slices.Delete(w.vol.Layers, i, i+1)
				break
			}
		}
	}
}

func (w *world) giveUpOpen() {
	for _, l := range w.vol.Layers {
		if l.State == pb.LayerState_LAYER_STATE_OPEN && l.Id != w.vol.Top {
			l.State = pb.LayerState_LAYER_STATE_DELETED
		}
	}
	w.reap()
}

// prepare makes the next layer over the engine's top.
func (w *world) prepare() *pb.Volume {
	if len(w.vol.Layers) == 0 {
		w.vol.Layers = []*pb.Layer{{State: pb.LayerState_LAYER_STATE_OPEN}}
	}
	if cur := uint32(w.e.layers.top); w.vol.Top == cur {
		w.giveUpOpen()
		w.vol.LastLayer++
		w.vol.Top = w.vol.LastLayer
		w.vol.Layers = append(w.vol.Layers, &pb.Layer{Id: w.vol.Top, HasParent: true, Parent: cur, State: pb.LayerState_LAYER_STATE_OPEN})
	}
	return w.known()
}

func (w *world) prune(p *pb.PruneLayer) (*pb.Result, error) {
	l := w.layer(p.Layer)
	switch {
	case p.Epoch != w.vol.Epoch:
		return nil, status.Errorf(status.Fenced, "epoch %d is over", p.Epoch)
	case l == nil:
		return &pb.Result{Volume: w.known()}, nil
	case p.Revision != w.vol.Revision, slices.ContainsFunc(w.vol.Members, func(m *pb.Member) bool { return !m.InSync }):
		return nil, status.Errorf(status.Conflict, "not at revision %d", p.Revision)
	}
	ch := w.above(p.Layer)
	if len(ch) != 1 || l.State != pb.LayerState_LAYER_STATE_DELETED {
		w.fail("layer %d is pruned: %v", p.Layer, w.vol.Layers)
	}
	ch[0].HasParent, ch[0].Parent = l.HasParent, l.Parent
	w.vol.Layers = slices.DeleteFunc(w.vol.Layers, func(o *pb.Layer) bool { return o == l })
	w.prunes++
	return &pb.Result{Volume: w.known()}, nil
}

// tell brings a store the list of layers, as the sweep of its host does.
func (w *world) tell(i int) {
	list := w.known()
	if len(list.Layers) == 0 || !w.stores[i].up {
		return
	}
	v := &pb.VolumeLayers{Last: list.LastLayer}
	for _, l := range list.Layers {
		ref := &pb.LayerRef{Id: l.Id}
		if ch := w.above(l.Id); l.State == pb.LayerState_LAYER_STATE_DELETED && len(ch) == 1 {
			ref.Merging, ref.Into = true, ch[0].Id
		}
		v.Layers = append(v.Layers, ref)
	}
	w.stores[i].layers(&wire.Request{Layer: ids.LayerID(v.Last), Entries: LayerEntries(v)})
}

// snapshotModel is what a snapshot showed when it was cut, by block of the volume.
type snapshotModel struct {
	layer uint32
	shows map[uint64]byte
}

// shows reads the volume at a layer from one store.
func (w *world) shows(s *memStore, blocks map[blockKey]memBlock, head uint32) map[uint64]byte {
	chain := chainOf(w.vol.Layers, ids.LayerID(head))
	out := map[uint64]byte{}
	for b := range uint64(testHot) {
		k := w.key(b)
		if k.chunk == 0 {
			continue
		}
		if _, m := lookup(blocks, k.chunk, k.block, ids.LayerID(head), chain); len(m.data) > 0 && m.data[0] != 0 {
			out[b] = m.data[0]
		}
	}
	return out
}

// cutNow begins a cut; news of it are taken by takeCuts.
func (w *world) cutNow() {
	w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Duration(50+w.rng.IntN(2000))*time.Millisecond})
}

// takeCuts looks at what became of cuts: at the moment one is held its layer is
// durable on every member in sync, and shows what was acknowledged.
func (w *world) takeCuts(snaps *[]*snapshotModel) {
	news := w.cuts
	w.cuts = nil
	for _, n := range news {
		if n.State != CutHeld {
			continue
		}
		var first map[uint64]byte
		for i, m := range w.vol.Members {
			if !m.InSync {
				continue
			}
			s := w.stores[i]
			got := w.shows(s, s.durable, uint32(n.Layer))
			if first == nil {
				first = got
			}
			if !maps.Equal(got, first) {
				w.fail("the cut at layer %d is not durable on member %d: %v and %v", n.Layer, i, got, first)
			}
			for b, r := range w.blocks {
				if !r.may[got[b]] && !r.busy {
					w.fail("the cut at layer %d shows %d in block %d, allowed %v", n.Layer, got[b], b, r.may)
				}
			}
		}
		if l := w.layer(uint32(n.Layer)); w.rng.IntN(4) > 0 && l.State == pb.LayerState_LAYER_STATE_OPEN && first != nil {
			l.State, l.Name = pb.LayerState_LAYER_STATE_SNAPSHOT, fmt.Sprint("s", n.Layer)
			*snaps = append(*snaps, &snapshotModel{l.Id, first})
		}
		if w.rng.IntN(3) > 0 {
			w.step(&Release{n.Cut})
		}
	}
}

// checkSnaps holds every snapshot against every member in sync.
func (w *world) checkSnaps(snaps []*snapshotModel) {
	for i, m := range w.vol.Members {
		if !m.InSync {
			continue
		}
		for _, s := range snaps {
			if got := w.shows(w.stores[i], w.stores[i].blocks, s.layer); !maps.Equal(got, s.shows) {
				w.fail("snapshot %d shows %v on member %d, at its cut %v\n%v", s.layer, got, i, s.shows, w.vol.Layers)
			}
		}
	}
}

// Snapshots are cut, named or forgotten, deleted and merged, while stores fall,
// hang, lose power and are told of layers by others, gateways die and metadata
// gives no clear answers: each shows for ever, on every member in sync, what was
// acknowledged at its cut, and in the end only the layers that are needed are left.
func TestSnapshotsShowTheirCut(t *testing.T) {
	seeds := uint64(250)
	if testing.Short() {
		seeds = 60
	}
	cuts, prunes := 0, 0
	for seed := range seeds {
		w := newWorld(t, seed)
		w.flaky = seed%2 == 1
		w.attach()
		var snaps []*snapshotModel
		w.onCuts = func() { w.takeCuts(&snaps) }
		val := byte(0)
		for range 60 {
			val = w.someLoad(val)
			for range w.rng.IntN(60) {
				w.deliver()
			}
			switch i := w.rng.IntN(testStores); w.rng.IntN(18) {
			case 0:
				w.fall(i)
			case 1:
				w.hang(i)
			case 2:
				w.attach()
			case 3:
				if w.rng.IntN(3) == 0 {
					w.powerLoss(i)
				}
			case 4, 5, 6:
				if len(w.vol.Layers) < 8 {
					w.cutNow()
				}
			case 7, 8:
				if len(snaps) > 0 {
					k := w.rng.IntN(len(snaps))
					w.layer(snaps[k].layer).State = pb.LayerState_LAYER_STATE_DELETED
					snaps = slices.Delete(snaps, k, k+1)
					w.reap()
					w.step(&Refresh{Volume: w.known()})
				}
			case 9, 10, 11:
				w.tell(i)
			case 12, 13, 14:
				w.heal()
				w.settleFor(w.e.cfg.Stall)
			}
			if w.e.State() == Ended {
				w.attach()
			}
			w.checkSnaps(snaps)
		}
		w.flaky = false
		w.whole()
		w.giveUpOpen()
		w.attach()
		w.until("merged", func() bool {
			for i := range w.stores {
				w.tell(i)
			}
			return w.e.State() == Serving && w.allInSync() && !w.e.Info().Merging && len(w.vol.Layers) <= len(snaps)+1
		})
		w.readAll()
		w.until("read", w.idle)
		w.checkSnaps(snaps)
		w.same()
		cuts, prunes = cuts+len(snaps), prunes+w.prunes
	}
	if cuts < int(seeds)/2 || prunes < int(seeds) {
		t.Fatalf("only %d snapshots were left and %d layers merged in %d runs", cuts, prunes, seeds)
	}
}

// Writes that come while a cut is held wait for its release, and are not in it;
// reads and flushes go on.
func TestHeldWritesAreNotInTheSnapshot(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Hour})
		w.until("held", func() bool { return len(w.cuts) > 0 })
		n := w.cuts[0]
		if n.State != CutHeld || n.Layer != 0 || n.Size != testSize {
			w.fail("%+v", n)
		}
		before := w.shows(w.stores[1], w.stores[1].durable, 0)
		op := w.write(1, 77)
		w.flush()
		w.must2(0, w.onlyValue(0), op)
		w.settleFor(time.Second)
		if w.done[op] == nil {
			w.fail("written while the cut was held")
		}
		w.step(&Release{n.Cut})
		if r := w.cuts[1]; r.State != CutReleased || r.Late || r.For < time.Second {
			w.fail("%+v", r)
		}
		w.until("written", w.idle)
		w.must(1, 77)
		if got := w.shows(w.stores[1], w.stores[1].blocks, 0); !maps.Equal(got, before) {
			w.fail("the cut layer changed: %v, it was %v", got, before)
		}
		if _, b := lookup(w.stores[1].blocks, w.key(1).chunk, w.key(1).block, 1, nil); !bytes.Equal(b.data[:1], []byte{77}) {
			w.fail("the new layer holds %v", b.en)
		}
	}
}

func (w *world) onlyValue(b uint64) byte {
	for v := range w.block(b).may {
		return v
	}
	return 0
}

// A cut that cannot be durable in time is given up, and one nobody releases ends
// by itself and says so: either way the writes that waited go on.
func TestACutEndsInTime(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.keep = func(i int, q *wire.Request) bool { return q.Kind == wire.Write || q.Kind == wire.Flush }
		first := w.write(2, 60)
		w.step(&Cut{Volume: w.prepare(), Until: w.now + 300*time.Millisecond})
		op := w.write(1, 77)
		w.settleFor(400 * time.Millisecond)
		if len(w.cuts) != 1 || w.cuts[0].State != CutGivenUp || w.done[first] == nil || w.e.layers.top != 0 {
			w.fail("%+v", w.cuts)
		}
		w.release()
		w.until("written", func() bool { return w.done[op] == nil && w.done[first] == nil })
		w.cuts = nil
		w.step(&Cut{Volume: w.prepare(), Until: w.now + 300*time.Millisecond})
		w.until("released", func() bool { return len(w.cuts) == 2 })
		if w.cuts[0].State != CutHeld || w.cuts[1].State != CutReleased || !w.cuts[1].Late {
			w.fail("%+v", w.cuts)
		}
		w.write(1, 78)
		w.until("written", w.idle)
		w.must(1, 78)
	}
}

// A store that has heard of a layer's end before its gateway has is asked again
// with what metadata says, and not excluded.
func TestALayerThatWentUnheard(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		var snaps []*snapshotModel
		for len(snaps) == 0 {
			w.cutNow()
			w.until("held", func() bool { return len(w.cuts) > 0 })
			w.takeCuts(&snaps)
			w.until("released", func() bool { return w.e.cut == nil })
		}
		w.layer(snaps[0].layer).State = pb.LayerState_LAYER_STATE_DELETED
		lost := 0
		w.hold = func(m *MetaCall) bool { // metadata does it, and its answer gets lost
			if m.Prune == nil || lost > 0 {
				return false
			}
			lost++
			if _, err := w.prune(m.Prune); err != nil {
				w.fail("%v", err)
			}
			w.pending = append(w.pending, func() {
				w.tell(0)
				w.tell(1)
				w.read(1)
				w.step(&MetaDone{Call: m, Err: status.Errorf(status.Unknown, "leadership lost")})
			})
			return true
		}
		w.step(&Refresh{Volume: w.known()})
		w.until("pruned", func() bool { return lost > 0 && len(w.vol.Layers) <= 2 && w.idle() })
		w.readAll()
		w.until("read", w.idle)
		if len(w.metas) > 0 {
			w.fail("somebody was excluded: %v", w.metas)
		}
	}
}

// deletedSnapshot leaves one deleted layer below the top, named and deleted, and
// new values in some blocks above it.
func deletedSnapshot(t *testing.T, seed uint64) *world {
	t.Helper()
	w := filled(t, seed, 6)
	w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Hour})
	w.until("held", func() bool { return len(w.cuts) > 0 })
	w.step(&Release{w.cuts[0].Cut})
	w.layer(0).State = pb.LayerState_LAYER_STATE_DELETED
	w.write(2, 90)
	w.until("written", w.idle)
	return w
}

// Metadata takes a layer away after it gave no clear answer; the layer below it
// is deleted meanwhile. Its blocks must not go into the one that is about to go.
// Guard: nothing else is merged until the answer is known.
func TestNothingIsMergedIntoALayerThatMayBeGone(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		var snaps []*snapshotModel
		for len(snaps) < 2 {
			w.cutNow()
			w.until("held", func() bool { return len(w.cuts) > 0 })
			w.takeCuts(&snaps)
			w.until("released", func() bool { return w.e.cut == nil })
		}
		w.giveUpOpen()
		w.layer(snaps[1].layer).State = pb.LayerState_LAYER_STATE_DELETED
		var late *MetaCall
		w.hold = func(m *MetaCall) bool {
			if m.Prune == nil || late != nil {
				return false
			}
			late = m
			w.pending = append(w.pending, func() {
				w.step(&MetaDone{Call: m, Err: status.Errorf(status.Unknown, "leadership lost")})
			})
			return true
		}
		w.step(&Refresh{Volume: w.known()})
		w.until("asked", func() bool { return late != nil })
		w.layer(snaps[0].layer).State = pb.LayerState_LAYER_STATE_DELETED
		w.step(&Refresh{Volume: w.known()})
		var next *MetaCall
		w.hold = func(m *MetaCall) bool {
			if m.Prune == nil {
				return false
			}
			next = m
			return true
		}
		w.settleFor(2 * reclaimRetry)
		w.hold = nil
		if _, err := w.prune(late.Prune); err != nil {
			w.fail("%v", err)
		}
		w.step(&MetaDone{Call: next, Err: status.Errorf(status.Unavailable, "no leader")})
		w.until("merged", func() bool {
			for i := range w.stores {
				w.tell(i)
			}
			return len(w.vol.Layers) <= 1 && w.idle()
		})
		w.readAll()
		w.until("read", w.idle)
		w.same()
	}
}

// A member comes back while others still have to answer a merge: what they are
// about to change is not copied from them.
// Guard: sources takes none with a merge to answer.
func TestAJoinWaitsForMerges(t *testing.T) {
	for seed := range uint64(30) {
		w := deletedSnapshot(t, seed)
		asked := map[int]int{}
		w.keep = func(i int, q *wire.Request) bool {
			if q.Kind == wire.Digest || q.Kind == wire.List {
				asked[i]++
			}
			return q.Kind == wire.Merge && i < 2
		}
		w.step(&Refresh{Volume: w.known()})
		w.until("merging", func() bool { return len(w.kept) >= 2 })
		w.fall(2)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		w.fall(2)
		w.settleFor(w.e.cfg.Stall / 2)
		if asked[0]+asked[1] > 0 {
			w.fail("compared with a member that is about to merge: %v", asked)
		}
		w.release()
		w.until("merged and in sync", func() bool { return w.allInSync() && len(w.vol.Layers) == 1 && w.idle() })
		w.readAll()
		w.until("read", w.idle)
		for i := range w.stores {
			w.tell(i)
		}
		w.same()
	}
}

// While a member was away a layer was dropped by the others, and the engine has not
// heard of it: what the member catches up has nothing of that layer. It is told before
// it counts, or a late read of the layer would fall through it.
// Guard: tellLast, with what metadata says after the copying.
func TestAMemberThatReturnsHearsOfLayersThatWent(t *testing.T) {
	for seed := range uint64(30) {
		w := filled(t, seed, 6)
		w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Hour})
		w.until("held", func() bool { return len(w.cuts) > 0 })
		w.step(&Release{w.cuts[0].Cut})
		w.vol.LastLayer++ // a branch that the volume was rolled back from
		w.vol.Layers = append(w.vol.Layers, &pb.Layer{Id: w.vol.LastLayer, HasParent: true, State: pb.LayerState_LAYER_STATE_SNAPSHOT})
		w.step(&Refresh{Volume: w.known()})
		for i := range w.stores {
			w.tell(i)
		}
		w.fall(2)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		w.vol.Layers = w.vol.Layers[:len(w.vol.Layers)-1]
		w.tell(0)
		w.tell(1)
		w.fall(2)
		w.until("in sync", w.allInSync)
		if !w.stores[2].gone(ids.LayerID(w.vol.LastLayer)) {
			w.fail("it is in sync, and has not heard that layer %d is gone", w.vol.LastLayer)
		}
	}
}

// A layer went, by another's word, after an attach has listed what it held: the
// attach lists again, and nobody is excluded for it.
func TestALayerGoesWhileAttaching(t *testing.T) {
	for seed := range uint64(30) {
		w := filled(t, seed, 6)
		w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Hour})
		w.until("held", func() bool { return len(w.cuts) > 0 })
		w.step(&Release{w.cuts[0].Cut})
		w.write(2, 90)
		w.until("written", w.idle)
		k := blockKey{w.key(3).chunk, 7, 3} // only one member has it, of a layer that is given up
		data := bytes.Repeat([]byte{5}, ids.BlockSize)
		ver := ids.MakeVersion(w.e.epoch, 1<<20)
		w.stores[0].blocks[k] = memBlock{wire.Entry{Chunk: k.chunk, Layer: 7, Block: k.block, Version: ver, Kind: wire.EntryData,
			Sum: wire.BlockSum(1, k.chunk, 7, k.block, ver, data)}, data}
		w.vol.LastLayer = 8
		told := false
		w.keep = func(i int, q *wire.Request) bool {
			if q.Kind == wire.Read && q.Layer == 7 && !told {
				told = true
				w.tell(0)
			}
			return false
		}
		w.serving()
		if !told || len(w.metas) > 0 || !w.allInSync() {
			w.fail("told %v, changes %v", told, w.metas)
		}
	}
}

// News that are older than what the engine did itself change no chain.
func TestOldNewsOfLayers(t *testing.T) {
	vol := func(top, last uint32, layers ...[2]uint32) *pb.Volume {
		v := &pb.Volume{Top: top, LastLayer: last}
		for i, l := range layers {
			v.Layers = append(v.Layers, &pb.Layer{Id: l[0], HasParent: i > 0, Parent: l[1]})
		}
		return v
	}
	var l layers
	l.begin(vol(3, 3, [2]uint32{0}, [2]uint32{2, 0}, [2]uint32{3, 2}))
	want := func(when string, chain ...ids.LayerID) {
		t.Helper()
		if !slices.Equal(l.chain, chain) {
			t.Fatalf("%s: chain %v, want %v", when, l.chain, chain)
		}
	}
	want("attached", 2, 0)
	l.take(vol(4, 4, [2]uint32{0}, [2]uint32{2, 0}, [2]uint32{3, 2}, [2]uint32{4, 3}))
	want("a layer is prepared", 2, 0)
	l.prune(2)
	l.take(vol(4, 4, [2]uint32{0}, [2]uint32{3, 0}, [2]uint32{4, 3}))
	want("pruned", 0)
	l.take(vol(4, 4, [2]uint32{0}, [2]uint32{2, 0}, [2]uint32{3, 2}, [2]uint32{4, 3}))
	want("news from before the pruning", 0)
	l.take(vol(3, 3, [2]uint32{0}, [2]uint32{3, 0}))
	want("news from before the preparation", 0)
	l.take(vol(9, 9, [2]uint32{0}, [2]uint32{9, 0}))
	want("news without the top", 0)
}

// A snapshot is prepared, and another writer attaches before this one has gone over
// to the new layer: its top is given up and merged. Its reads wait for the news that
// the epoch is over; none is an I/O error, and nobody is excluded for it.
func TestATopThatAnotherWriterGaveUp(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.prepare()
		w.vol.Epoch++
		w.giveUpOpen()
		for i := range w.stores {
			w.tell(i)
		}
		got := status.OK
		op := &Op{Kind: OpRead, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		w.done[op] = func(k status.Kind) { got = k }
		w.step(&Submit{Ops: []*Op{op}})
		w.until("answered", func() bool { return w.done[op] == nil })
		if got != status.Fenced || len(w.metas) > 0 {
			w.fail("answered %s; %v", got, w.metas)
		}
	}
}
