package volume

import (
	"bytes"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// cloned is a volume with a snapshot, some of whose blocks were overwritten
// since, and a clone of the snapshot on stores of its own. The clone's world ends
// with the stores of the origin.
func cloned(t *testing.T, seed uint64) (origin, clone *world, shows []byte) {
	t.Helper()
	o := filled(t, seed, 12)
	o.write(testChunk/ids.BlockSize+3, 99) // in another chunk
	o.until("written", o.idle)
	cutOf(o, "gold")
	shows = make([]byte, testSize)
	for b := range uint64(testSize / ids.BlockSize) {
		if k := o.key(b); k.chunk != 0 {
			_, m := lookup(o.stores[0].blocks, k.chunk, k.block, 0, nil)
			copy(shows[b*ids.BlockSize:], m.data)
		}
	}
	o.write(1, 201) // the clone must not see these
	o.write(30, 202)
	o.until("written", o.idle)
	c := newWorld(t, seed)
	c.vol.Id, c.vol.Epoch = 2, o.vol.Epoch
	for i, s := range c.stores {
		s.id = ids.StoreID{byte(i + 51)}
		c.vol.Members[i].Store = s.id[:]
	}
	c.stores = append(c.stores, o.stores...)
	c.origins = func() []*pb.OriginState {
		return []*pb.OriginState{{Volume: o.known(), Layer: 0, SizeBytes: testSize, Chunks: o.chunks}}
	}
	c.vol.Origin = &pb.Origin{VolumeId: 1}
	c.serving()
	return o, c, shows
}

// cutOf takes a snapshot of a world's volume.
func cutOf(w *world, name string) *pb.Layer {
	w.cuts = nil
	w.step(&Cut{Volume: w.prepare(), Until: w.now + time.Hour})
	w.until("held", func() bool { return len(w.cuts) > 0 })
	w.step(&Release{w.cuts[0].Cut})
	l := w.layer(uint32(w.cuts[0].Layer))
	l.State, l.Name, l.SizeBytes = pb.LayerState_LAYER_STATE_SNAPSHOT, name, testSize
	return l
}

// reads reads a range and compares it.
func (w *world) reads(off, n uint64, want []byte) {
	w.t.Helper()
	op := &Op{Kind: OpRead, Off: off, Len: n, Data: bytes.Repeat([]byte{0xee}, int(n))}
	w.do(op, w.ok("read"))
	w.until("read", func() bool { return w.done[op] == nil })
	if !bytes.Equal(op.Data, want[off:off+n]) {
		i := slices.IndexFunc(slices.Collect(func(yield func(int) bool) {
			for i := range op.Data {
				if !yield(i) {
					return
				}
			}
		}), func(i int) bool { return op.Data[i] != want[off+uint64(i)] })
		w.fail("byte %d reads %d, want %d", off+uint64(i), op.Data[i], want[off+uint64(i)])
	}
}

// A clone shows its snapshot but for what was written to it, in whole blocks or
// parts, while stores of either fall, hang and return; flattened, it shows the
// same without its origin.
func TestACloneShowsItsSnapshotAndItsWrites(t *testing.T) {
	seeds := uint64(60)
	if testing.Short() {
		seeds = 15
	}
	for seed := range seeds {
		_, w, want := cloned(t, seed)
		w.reads(0, testSize, want)
		for range 40 {
			off := w.rng.Uint64N(testSize/2/512) * 512
			n := 512 * (1 + w.rng.Uint64N(24))
			op := &Op{Kind: OpWrite, Off: off, Len: n}
			switch w.rng.IntN(5) {
			case 0:
				op.Kind = OpZero
				clear(want[off : off+n])
			case 1, 2:
				off, n = w.rng.Uint64N(testHot)*ids.BlockSize, ids.BlockSize*(1+w.rng.Uint64N(3))
				op.Off, op.Len = off, n
				fallthrough
			default:
				op.Data = bytes.Repeat([]byte{byte(1 + w.rng.IntN(200))}, int(n))
				copy(want[off:], op.Data)
			}
			w.do(op, w.ok("write"))
			switch i := w.rng.IntN(6); w.rng.IntN(8) {
			case 0:
				if i == 0 || i >= 3 && w.upOf(3) > 1 || !w.stores[i].up {
					w.fall(i)
				}
			case 1:
				if i >= 4 {
					w.hang(i)
				}
			}
			w.until("written", func() bool { return w.done[op] == nil })
			w.reads(w.rng.Uint64N(testHot/2)*ids.BlockSize, 8*ids.BlockSize, want)
			w.heal()
		}
		w.whole()
		w.reads(0, testSize, want)
		copied := w.do(&Op{Kind: OpCopy, Off: 0, Len: testSize}, w.ok("copy"))
		w.until("copied", func() bool { return w.done[copied] == nil })
		w.vol.Origin, w.origins = nil, nil
		w.step(&Refresh{Volume: w.known()})
		for i := 3; i < 6; i++ {
			w.stores[i].blocks = nil
		}
		w.reads(0, testSize, want)
	}
}

func (w *world) upOf(from int) (n int) {
	for _, s := range w.stores[from:] {
		if s.up && !s.hung {
			n++
		}
	}
	return n
}

// The origin's layers move under a clone: a snapshot below is deleted, merged and
// dropped, a store comes back as another one. The clone asks where things are and
// goes on; it never takes a store's word that is not what was in sync.
func TestACloneFollowsItsOrigin(t *testing.T) {
	for seed := range uint64(20) {
		o, w, _ := cloned(t, seed)
		above := cutOf(o, "above") // of layer 1: what was overwritten
		o.write(2, 203)
		o.until("written", o.idle)
		want := make([]byte, testSize)
		for b := range uint64(testSize / ids.BlockSize) {
			if k := o.key(b); k.chunk != 0 {
				_, m := lookup(o.stores[0].blocks, k.chunk, k.block, ids.LayerID(above.Id), []ids.LayerID{0})
				copy(want[b*ids.BlockSize:], m.data)
			}
		}
		w.origins = func() []*pb.OriginState {
			return []*pb.OriginState{{Volume: o.known(), Layer: above.Id, SizeBytes: testSize, Chunks: o.chunks}}
		}
		w.step(&Origins{States: w.originStates()})
		w.reads(0, testSize, want)
		o.layer(0).State = pb.LayerState_LAYER_STATE_DELETED
		o.step(&Refresh{Volume: o.known()})
		o.until("merged", func() bool { return o.layer(0) == nil })
		for i := range o.stores {
			o.tell(i)
		}
		w.reads(0, testSize, want)
		// One store lost its disk and came back empty under its id; metadata has
		// not heard of it. Then another is empty too: nothing is invented.
		w.stores[3].incarnation, w.stores[3].blocks = 2, map[blockKey]memBlock{}
		w.reads(0, testSize, want)
		w.stores[4].incarnation, w.stores[5].incarnation = 2, 2
		op := w.do(&Op{Kind: OpRead, Off: 0, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(k status.Kind) {
			if k != status.IO {
				w.fail("read from other stores than were in sync: %v", k)
			}
		})
		w.until("refused", func() bool { return w.done[op] == nil })
	}
}

// A snapshot is looked at without a lease, and not written to.
func TestASnapshotIsReadOnly(t *testing.T) {
	o, _, want := cloned(t, 3)
	w := newWorld(t, 3)
	w.stores, w.vol.Members = o.stores, nil
	w.lease = 1
	w.origins = func() []*pb.OriginState {
		return []*pb.OriginState{{Volume: o.known(), Layer: 0, SizeBytes: testSize, Chunks: o.chunks}}
	}
	e, err := New(w.now, Config{Host: "host-1", Volume: w.known(), Origins: w.originStates(), ReadOnly: true}, &w.out)
	if err != nil {
		t.Fatal(err)
	}
	w.e = e
	w.drain()
	w.reads(0, testSize, want)
	for _, k := range []OpKind{OpWrite, OpZero, OpTrim} {
		op := w.do(&Op{Kind: k, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(k status.Kind) {
			if k != status.Permission {
				w.fail("a write to a snapshot: %v", k)
			}
		})
		w.until("refused", func() bool { return w.done[op] == nil })
	}
	w.do(&Op{Kind: OpFlush}, w.ok("flush"))
	w.until("flushed", w.idle)
	if len(w.metas) > 0 {
		w.fail("%v", w.metas)
	}
}

// A copy of an origin's chunk moved away, was dropped, and is back in part: by a late
// write, or as it is being made. What it lacks is no hole, whatever the clone knew of
// it; once metadata counts it again, it is read again. While metadata does not answer,
// what was known to be whole is read on.
func TestACopyOfAnOriginThatCameBackInPartIsNotRead(t *testing.T) {
	for seed := range uint64(20) {
		o, w, want := cloned(t, seed)
		w.reads(0, testSize, want)
		w.hold = func(m *MetaCall) bool {
			w.fail("metadata is asked %+v though every copy is known to be whole", m)
			return true
		}
		w.reads(0, testSize, want)
		w.hold = nil
		moved := o.chunks[0]
		all := slices.Clone(moved.Stores)
		moved.Stores = all[2:] // of three: the clone is not told
		kept := map[*memStore]map[blockKey]memBlock{}
		for _, s := range o.stores {
			if bytes.Equal(s.id[:], all[2]) {
				continue
			}
			s.lives[ids.ChunkID(moved.Id)]++
			kept[s] = maps.Clone(s.blocks)
			n := 0
			maps.DeleteFunc(s.blocks, func(k blockKey, _ memBlock) bool {
				n++
				return k.chunk == ids.ChunkID(moved.Id) && (k.layer == 0 || n%2 == 0) // what is left is of the top, as a late write
			})
		}
		w.reads(0, testSize, want)
		for s, blocks := range kept {
			s.blocks = blocks
		}
		moved.Stores = all[:2]
		w.step(&Origins{States: w.originStates()})
		w.reads(0, testSize, want)
	}
}

// A read that waits for an origin goes on in the clone when that is flattened.
func TestAReadGoesOnWhenItsCloneIsFlattened(t *testing.T) {
	_, w, want := cloned(t, 5)
	w.keep = func(_ int, q *wire.Request) bool { return q.Kind == wire.Read && q.Flags&wire.FlagFrozen != 0 }
	op := &Op{Kind: OpRead, Off: 0, Len: testSize, Data: bytes.Repeat([]byte{0xee}, testSize)}
	w.do(op, w.ok("read"))
	w.until("it asks the origin", func() bool { return len(w.kept) > 0 })
	w.settleFor(time.Millisecond)
	w.keep = nil
	copied := w.do(&Op{Kind: OpCopy, Off: 0, Len: testSize}, w.ok("copy"))
	w.until("copied", func() bool { return w.done[copied] == nil })
	w.vol.Origin, w.origins = nil, nil
	w.step(&Refresh{Volume: w.known()})
	for i := 3; i < 6; i++ {
		w.fall(i)
	}
	w.until("read", func() bool { return w.done[op] == nil })
	if !bytes.Equal(op.Data, want) {
		w.fail("what was read is not what the clone shows")
	}
}
