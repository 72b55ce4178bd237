package store

import (
	"slices"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// layersOf is a Layers request; a pair names a layer and what it is merged into.
func layersOf(last ids.LayerID, pairs ...[2]ids.LayerID) wire.Request {
	q := wire.Request{Kind: wire.Layers, Volume: 1, Layer: last}
	for _, p := range pairs {
		e := wire.Entry{Layer: p[0]}
		if p[1] != 0 {
			e.Kind, e.Block = wire.EntryZero, ids.Block(p[1])
		}
		q.Entries = append(q.Entries, e)
	}
	return q
}

func chainRead(head ids.LayerID, chain ...ids.LayerID) wire.Request {
	return wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Chunk: 1, Layer: head, Chain: chain, Count: 4, Epoch: 9}
}

// threeLayers holds block 0 in layers 0, 1 and 2, block 1 in 0 and 1, block 2 in
// 0 and a tombstone for block 3 in 1.
func threeLayers(t *testing.T, s *Store) {
	t.Helper()
	for l := range ids.LayerID(3) {
		mustOK(t, ask(s, layerPut(1, l, 0, 4-int(l)-int(l/2), ids.MakeVersion(1, uint64(l)+1), uint64(100*l))))
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: 1, Layer: 1, Block: 3, Count: 1, Version: ids.MakeVersion(1, 2)}))
	mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{1}, [2]ids.LayerID{2})))
}

// A read takes each block from the first layer that has it, a tombstone stops
// the search, and the reply names the layers.
func TestAReadLooksThroughItsChain(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	threeLayers(t, s)
	r := mustOK(t, ask(s, chainRead(2, 1, 0)))
	var from []ids.LayerID
	for i, want := range []state{{1, ids.MakeVersion(1, 3), 200}, {1, ids.MakeVersion(1, 2), 101}, {1, ids.MakeVersion(1, 2), 102}, {2, ids.MakeVersion(1, 2), 0}} {
		if why := compare(want, r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why != "" {
			t.Errorf("block %d: %s", i, why)
		}
		from = append(from, r.Entries[i].Layer)
	}
	if !slices.Equal(from, []ids.LayerID{2, 1, 1, 1}) {
		t.Errorf("blocks came from layers %v", from)
	}
	if r := mustOK(t, ask(s, chainRead(2, 0))); r.Entries[1].Layer != 0 || r.Entries[3].Kind != wire.EntryData {
		t.Errorf("without layer 1: %+v", r.Entries)
	}
	if r := ask(s, chainRead(0, 1)); r.Status != status.Invalid {
		t.Errorf("a chain that rises: %v", r.Err())
	}
}

// A read that names a dropped layer is an error, and not the layer below it; a
// write into it too. That stays so after a crash, and lists that come late change
// nothing.
func TestADroppedLayerIsNeverFallenThrough(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	threeLayers(t, s)
	mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{2})))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	for _, boot := range []string{testBoot, "boot-2"} {
		mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{1}, [2]ids.LayerID{2}))) // late
		for _, q := range []wire.Request{chainRead(2, 1, 0), chainRead(1, 0), layerPut(1, 1, 0, 1, ids.MakeVersion(1, 9), 5),
			{Kind: wire.Zero, Volume: 1, Chunk: 1, Layer: 1, Count: 1, Version: ids.MakeVersion(1, 9)}} {
			if r := ask(s, q); r.Status != status.NotFound {
				t.Errorf("%s of a dropped layer, %s: %v", q.Kind, boot, r.Err())
			}
		}
		if r := mustOK(t, ask(s, chainRead(2, 0))); r.Entries[1].Layer != 0 {
			t.Errorf("layer 1 shows in %+v", r.Entries)
		}
		put := layerPut(1, 1, 0, 1, ids.MakeVersion(1, 2), 100) // a peer that has not heard of it
		in := wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: ids.MakeVersion(2, 0), Data: put.Data,
			Entries: []wire.Entry{{Chunk: 1, Layer: 1, Kind: wire.EntryData, Version: put.Version, Sum: put.Sums[0]}}}
		mustOK(t, ask(s, in))
		if r := mustOK(t, ask(s, wire.Request{Kind: wire.List, Volume: 1, Chunk: 1, Count: 4})); slices.ContainsFunc(r.Entries, func(e wire.Entry) bool { return e.Layer == 1 }) {
			t.Errorf("layer 1 came back: %+v", r.Entries)
		}
		s = open(t, d.Crash(3, 0), "boot-2")
	}
	if s.Usage().LiveBytes != 5*blockBytes {
		t.Errorf("%d bytes live after layer 1 went", s.Usage().LiveBytes)
	}
}

// A layer that is being merged is read behind its child only.
func TestALayerBeingMergedIsNoHead(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	threeLayers(t, s)
	if r := ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 1}); r.Status != status.NotFound {
		t.Fatalf("a merge nobody announced: %v", r.Err())
	}
	mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{1, 2}, [2]ids.LayerID{2})))
	before := mustOK(t, ask(s, chainRead(2, 1, 0)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 1}))
	for _, q := range []wire.Request{chainRead(1, 0), chainRead(1)} {
		if r := ask(s, q); r.Status != status.NotFound {
			t.Errorf("read of %d %v: %v", q.Layer, q.Chain, r.Err())
		}
	}
	raw := chainRead(1)
	raw.Flags |= wire.FlagRaw
	if r := mustOK(t, ask(s, raw)); r.Entries[1].Kind != wire.EntryHole {
		t.Errorf("what is left of layer 1: %+v", r.Entries)
	}
	for _, q := range []wire.Request{chainRead(2, 1, 0), chainRead(2, 0)} {
		r := mustOK(t, ask(s, q))
		if !slices.Equal(r.Data, before.Data) || r.Entries[1].Layer != 2 || r.Entries[1].Version != before.Entries[1].Version || r.Entries[3].Kind != wire.EntryZero {
			t.Errorf("chain %v after the merge: %+v", q.Chain, r.Entries)
		}
	}
	if s.Usage().LiveBytes != 7*blockBytes { // 4 + 3, and nothing in layer 1
		t.Errorf("%d bytes live after the merge", s.Usage().LiveBytes)
	}
}

// The merge of a deleted layer passes in a full store, whose space comes back by
// it: it may use a reserve for that.
func TestAFullStoreMerges(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	const blocks, shadowed = 420, 300
	v1, v2 := ids.MakeVersion(1, 1), ids.MakeVersion(1, 2)
	mustOK(t, ask(s, layerPut(1, 0, 0, blocks, v1, 1000)))
	mustOK(t, ask(s, layersOf(1, [2]ids.LayerID{0}, [2]ids.LayerID{1})))
	mustOK(t, ask(s, layerPut(1, 1, 0, shadowed, v2, 5000)))
	for b, k := ids.Block(0), status.OK; k == status.OK; b++ {
		k = ask(s, layerPut(2, 1, b, 1, v2, 9)).Status
	}
	full := s.Usage().LiveBytes
	mustOK(t, ask(s, layersOf(1, [2]ids.LayerID{0, 1}, [2]ids.LayerID{1})))
	mustOK(t, ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 0}))
	if got := s.Usage().LiveBytes; got != full-shadowed*blockBytes {
		t.Errorf("%d bytes live after the merge, of %d before", got, full)
	}
	steps(s, 100) // compaction
	mustOK(t, ask(s, layerPut(2, 1, 5000, shadowed, v2, 9)))
	for _, s := range []*Store{s, open(t, d.Crash(1, 0), testBoot)} {
		q := chainRead(1)
		q.Count = blocks
		r := mustOK(t, ask(s, q))
		for b := range blocks {
			want := state{wire.EntryData, v1, 1000 + uint64(b)}
			if b < shadowed {
				want = state{wire.EntryData, v2, 5000 + uint64(b)}
			}
			if why := compare(want, r.Entries[b], r.Data[b*blockBytes:(b+1)*blockBytes]); why != "" {
				t.Fatalf("block %d: %s", b, why)
			}
		}
	}
}

// A bad block ends a merge and stays what it was: its peers may have it whole.
func TestABadBlockStopsAMerge(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	threeLayers(t, s)
	mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{1, 2}, [2]ids.LayerID{2})))
	v := s.vols[1]
	e, err := s.idx.get(v.chunk(1, 1, false), 2)
	if err != nil {
		t.Fatal(err)
	}
	d.Flip(offset(e.loc)+7, 3)
	if r := ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 1}); r.Status != status.Corrupt {
		t.Fatalf("the merge of a bad block: %v", r.Err())
	}
	q := chainRead(2, 1, 0)
	q.Count = 3
	if r := ask(s, q); r.Status != status.Corrupt || r.Block != 2 {
		t.Fatalf("the bad block reads %v at %d", r.Err(), r.Block)
	}
	good := layerPut(1, 1, 2, 1, ids.MakeVersion(1, 2), 102)
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Volume: 1, Chunk: 1, Data: good.Data, Limit: good.Version + 1,
		Entries: []wire.Entry{{Chunk: 1, Layer: 1, Block: 2, Kind: wire.EntryData, Version: good.Version, Sum: good.Sums[0]}}}))
	mustOK(t, ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 1}))
	if r := mustOK(t, ask(s, chainRead(2, 0))); compare(state{1, ids.MakeVersion(1, 2), 102}, r.Entries[2], r.Data[2*blockBytes:3*blockBytes]) != "" {
		t.Fatalf("after the repair: %+v", r.Entries)
	}
}

// A seal ends the merges under way: whoever sealed compares members first. What
// was read for one by then changes nothing.
func TestASealEndsMerges(t *testing.T) {
	d := &slowDisk{Mem: formatMem(t)}
	s := open(t, d.Mem, testBoot)
	s.disk, s.now = hide{d}, nil
	box := newInbox()
	id := uint64(0)
	send := func(q wire.Request) uint64 {
		id++
		q.ID = id
		s.Submit([]*wire.Request{&q}, box)
		return id
	}
	settle := func() {
		for len(d.pending) > 0 {
			f := d.pending[0]
			d.pending = d.pending[1:]
			f()
		}
	}
	send(layerPut(1, 0, 0, 4, ids.MakeVersion(1, 1), 1))
	send(layersOf(1, [2]ids.LayerID{0, 1}, [2]ids.LayerID{1}))
	settle()
	m := send(wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 0})
	if box.got[m] != nil || !s.merges[0].reading {
		t.Fatal("the merge does not wait for its read")
	}
	reads := d.pending
	d.pending = nil
	send(seal(2))
	settle()
	if r := box.got[m]; r == nil || r.Status != status.Unavailable {
		t.Fatalf("after the seal: %+v", r)
	}
	d.pending = reads
	settle()
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.vols[1].chunk(1, 1, false); c != nil && !c.empty() || s.reading != 0 {
		t.Fatalf("the ended merge went on; %d being read", s.reading)
	}
}

// Frozen layers are read by anybody, whatever was sealed; the reply says whose
// data it is, and a chunk the store never had is no answer.
func TestFrozenLayersNeedNoSeal(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	threeLayers(t, s)
	mustOK(t, ask(s, seal(7)))
	box := newInbox()
	q := chainRead(1, 0)
	q.ID, q.Epoch, q.Flags = 1, 0, q.Flags|wire.FlagFrozen
	s.Submit([]*wire.Request{&q}, box)
	if r := box.got[1]; r == nil || r.Err() != nil || r.Incarnation != 1 || r.Entries[0].Layer != 1 {
		t.Fatalf("frozen read: %+v", r)
	}
	q.Flags &^= wire.FlagFrozen
	s.Submit([]*wire.Request{&q}, box)
	if r := box.got[1]; r.Status != status.Fenced {
		t.Fatalf("the same without saying so: %v", r.Err())
	}
	q.Flags, q.Chunk = q.Flags|wire.FlagFrozen, 5
	s.Submit([]*wire.Request{&q}, box)
	if r := box.got[1]; r.Status != status.NotFound {
		t.Fatalf("a chunk it never had: %v", r.Err())
	}
}

// The record that dropped a layer goes with its segment; the heads of later ones
// remember, and what older segments still hold of the layer does not come back.
func TestDroppedLayersOutliveTheirRecord(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	threeLayers(t, s)
	mustOK(t, ask(s, layerPut(3, 2, 0, 40, ids.MakeVersion(1, 9), 1))) // these stay
	first := s.open
	for s.open == first {
		mustOK(t, ask(s, layerPut(2, 2, 0, 10, ids.MakeVersion(1, 10), 1)))
	}
	mustOK(t, ask(s, layersOf(2, [2]ids.LayerID{0}, [2]ids.LayerID{2})))
	second := s.open
	for i := uint64(0); second.state != segFree; i++ {
		mustOK(t, ask(s, layerPut(2, 2, 0, 10, ids.MakeVersion(2, 10+i), 1)))
		mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
		s.Step(0)
		if i > 500 {
			t.Fatalf("the record's segment is in state %d with %d live blocks", second.state, second.live)
		}
	}
	if first.state != segClosed {
		t.Fatalf("the first segment is in state %d", first.state)
	}
	live := s.Usage().LiveBytes
	for _, keep := range []int{0, 100} {
		s := open(t, d.Crash(5, keep), "boot-2")
		if r := ask(s, chainRead(2, 1, 0)); r.Status != status.NotFound {
			t.Errorf("layer 1 after its record went: %v", r.Err())
		}
		if got := s.Usage().LiveBytes; got != live {
			t.Errorf("%d bytes live, %d before", got, live)
		}
	}
}

// A merge is answered when it is durable: metadata then lets the layer go, and what
// a power loss brought back to it would be lost. So is one that finds nothing to do.
func TestAMergeIsDurableWhenItIsAnswered(t *testing.T) {
	for _, times := range []int{1, 2} {
		d := formatMem(t)
		s := open(t, d, testBoot)
		mustOK(t, ask(s, layerPut(1, 0, 0, 4, ids.MakeVersion(1, 1), 100)))
		mustOK(t, ask(s, layersOf(1, [2]ids.LayerID{0, 1}, [2]ids.LayerID{1})))
		mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
		for range times {
			mustOK(t, ask(s, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 0}))
		}
		d.PowerLoss(1, 0)
		s = open(t, d, "boot-2")
		mustOK(t, ask(s, layersOf(1, [2]ids.LayerID{1})))
		r := mustOK(t, ask(s, chainRead(1)))
		if why := compare(state{1, ids.MakeVersion(1, 1), 103}, r.Entries[3], r.Data[3*blockBytes:]); why != "" {
			t.Errorf("merged %d times: %s", times, why)
		}
	}
}

// A frozen read tells which life of the chunk's copy it is of: another one after a
// drop, however the chunk came back.
func TestACopyHasAnotherLifeAfterADrop(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	threeLayers(t, s)
	frozen := func(c ids.ChunkID) uint64 {
		q := wire.Request{Kind: wire.Read, Flags: wire.FlagEntries | wire.FlagFrozen, Volume: 1, Chunk: c, Layer: 2, Count: 1}
		plain := q
		plain.Flags &^= wire.FlagEntries
		r, p := mustOK(t, ask(s, q)), mustOK(t, ask(s, plain))
		list := mustOK(t, ask(s, wire.Request{Kind: wire.List, Flags: wire.FlagFrozen, Volume: 1}))
		lives := map[uint64]uint64{}
		for i := 0; i < len(list.Digests); i += 2 {
			lives[list.Digests[i]] = list.Digests[i+1]
		}
		if r.Count64 == 0 || p.Count64 != r.Count64 || lives[uint64(c)] != r.Count64 {
			t.Fatalf("chunk %d: a read with entries tells life %d, one without %d, the list %v", c, r.Count64, p.Count64, list.Digests)
		}
		return r.Count64
	}
	mustOK(t, ask(s, layerPut(7, 2, 0, 1, ids.MakeVersion(1, 8), 5)))
	other, first := frozen(7), frozen(1)
	mustOK(t, ask(s, layerPut(1, 2, 3, 1, ids.MakeVersion(1, 9), 5)))
	if again := frozen(1); again != first {
		t.Errorf("life %d became %d without a drop", first, again)
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 1, Epoch: ids.MaxEpoch}))
	for s.Step(0); len(s.leaving) > 0; {
		s.Step(0)
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Digest, Flags: wire.FlagFilled, Volume: 1, Chunk: 1, Count: 4, Limit: ids.MakeVersion(2, 0)}))
	mustOK(t, ask(s, layerPut(1, 2, 3, 1, ids.MakeVersion(1, 10), 6))) // a copy that comes back
	if again := frozen(1); again == first {
		t.Errorf("life %d goes on after the drop", first)
	}
	if again := frozen(7); again != other {
		t.Errorf("life %d of another chunk became %d", other, again)
	}
}
