package store

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

func seal(e ids.Epoch) wire.Request { return wire.Request{Kind: wire.Seal, Volume: 1, Epoch: e} }

func readOf(c ids.ChunkID, b ids.Block, n uint32, e ids.Epoch) wire.Request {
	return wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Chunk: c, Block: b, Count: n, Epoch: e}
}

// A sealed epoch refuses everything of older ones, also after a power loss
// that kept nothing unsynced; other volumes are not concerned.
func TestSealedEpochFencesForEver(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 1, ids.MakeVersion(1, 1), 1)))
	mustOK(t, ask(s, seal(5)))
	s = open(t, d.Crash(1, 0), "boot-2")
	for _, q := range []wire.Request{put(1, 0, 1, ids.MakeVersion(4, 1), 2), {Kind: wire.Zero, Chunk: 1, Count: 1, Version: 9}, {Kind: wire.Flush},
		readOf(1, 0, 1, 0), {Kind: wire.Seal}, {Kind: wire.Newer}, {Kind: wire.Digest, Chunk: 1}, {Kind: wire.List, Chunk: 1},
		{Kind: wire.Install, Chunk: 1}, {Kind: wire.Drop}, {Kind: wire.Settle}} {
		q.Volume, q.Epoch = 1, 4
		if r := ask(s, q); r.Status != status.Fenced || r.Epoch != 5 {
			t.Errorf("%s of epoch 4: %v, epoch %d", q.Kind, r.Status, r.Epoch)
		}
	}
	mustOK(t, ask(s, seal(5)))
	other := put(1, 0, 1, ids.MakeVersion(1, 1), 1)
	other.Volume, other.Sums[0] = 2, wire.BlockSum(2, 1, 0, 0, ids.MakeVersion(1, 1), other.Data)
	mustOK(t, ask(s, other))
}

// A power loss costs a volume its intactness until it is settled; a kill and a
// clean close do not.
func TestIntactUntilThePowerGoes(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, "a")
	intact := func(when string, want bool) {
		t.Helper()
		if r := mustOK(t, ask(s, seal(1))); (r.Flags&wire.FlagIntact != 0) != want {
			t.Fatalf("%s: intact is %v", when, !want)
		}
	}
	intact("new", true)
	q := put(1, 0, 3, ids.MakeVersion(1, 1), 1)
	q.Epoch = 1
	mustOK(t, ask(s, q))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: 1, Floor: ids.MakeVersion(1, 1)}))
	d = d.Crash(1, 100)
	s = open(t, d, "a")
	intact("after a kill", true)
	d = d.Crash(1, 0)
	s = open(t, d, "b")
	intact("after a power loss", false)
	d = d.Crash(1, 100)
	s = open(t, d, "b")
	intact("after a power loss and a kill", false)
	mustOK(t, ask(s, wire.Request{Kind: wire.Settle, Volume: 1, Epoch: 1, Floor: ids.MakeVersion(1, 7)}))
	intact("settled", true)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, d.Crash(1, 0), "c")
	intact("closed, and another boot", true)
	if r := ask(s, seal(1)); r.Floor != ids.MakeVersion(1, 7) || r.Version != ids.MakeVersion(1, 1) || r.Incarnation != 1 {
		t.Fatalf("seal says floor %s, version %s, incarnation %d", r.Floor, r.Version, r.Incarnation)
	}
}

// What was dropped stays dropped over every kind of reopening. A volume is not
// brought back by a late write; a chunk may be, by its writer, with new content.
func TestDroppedStaysDropped(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	for c := ids.ChunkID(1); c <= 3; c++ {
		mustOK(t, ask(s, put(c, 0, 100, ids.MakeVersion(1, 1), 1)))
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
	check := func(s *Store, what string, live uint64, gone ...ids.ChunkID) {
		t.Helper()
		if n := s.Usage().LiveBytes / blockBytes; n != live {
			t.Fatalf("%s: %d live blocks, want %d", what, n, live)
		}
		for _, c := range gone {
			asked := []wire.Request{readOf(c, 0, 1, 0)}
			if live == 0 {
				asked = append(asked, put(c, 0, 1, ids.MakeVersion(9, 1), 1))
			}
			for _, q := range asked {
				if r := ask(s, q); r.Status != status.NotFound {
					t.Fatalf("%s: %s of dropped chunk %d: %v", what, q.Kind, c, r.Status)
				}
			}
		}
	}
	check(s, "dropped", 200, 2)
	check(open(t, d.Crash(1, 0), "boot-2"), "after a power loss", 200, 2)
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1}))
	check(s, "volume dropped", 0, 1, 2, 3)
	s = open(t, d.Crash(1, 0), "boot-2")
	check(s, "volume dropped, after a power loss", 0, 1, 3)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A chunk that was dropped because its copy moved away comes back as it is
// brought: nothing of the old copy is in it, over every kind of reopening.
func TestADroppedChunkComesBack(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 3, ids.MakeVersion(1, 1), 1)))
	mustOK(t, ask(s, put(2, 0, 100, ids.MakeVersion(1, 2), 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
	for i := 0; i < 1000 && len(s.leaving) > 0; i++ {
		s.Step(0)
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Digest, Flags: wire.FlagFilled, Volume: 1, Chunk: 2, Count: 200}))
	mustOK(t, ask(s, put(2, 7, 1, ids.MakeVersion(1, 1), 5))) // older than what was dropped
	check := func(s *Store, what string) {
		t.Helper()
		r := ask(s, wire.Request{Kind: wire.List, Volume: 1, Chunk: 2, Count: 200})
		if len(r.Entries) != 1 || r.Entries[0].Block != 7 || r.Entries[0].Version != ids.MakeVersion(1, 1) {
			t.Fatalf("%s: it has %v", what, r.Entries)
		}
	}
	check(s, "brought back")
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	check(open(t, d.Crash(1, 0), "boot-2"), "after a power loss")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	check(open(t, d.Crash(1, 0), "boot-2"), "closed and opened")
}

// What is written late, of before a chunk was dropped, does not bring it back:
// nobody would ever drop that again. Neither does it when the store was opened
// again, nor after the chunk came back and was dropped once more.
func TestALateWriteBringsNoChunkBack(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 3, ids.MakeVersion(1, 1), 1)))
	for range 2 {
		mustOK(t, ask(s, wire.Request{Kind: wire.Digest, Flags: wire.FlagFilled, Volume: 1, Chunk: 2, Count: 200}))
		mustOK(t, ask(s, put(2, 0, 100, ids.MakeVersion(1, 2), 1)))
		mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
		for i := 0; i < 1000 && len(s.leaving) > 0; i++ {
			s.Step(0)
		}
		for range 2 {
			late := []wire.Request{put(2, 7, 1, ids.MakeVersion(1, 9), 5), {Kind: wire.Zero, Volume: 1, Chunk: 2, Count: 5, Version: ids.MakeVersion(1, 9)},
				{Kind: wire.Install, Volume: 1, Chunk: 2, Limit: ids.MakeVersion(1, 9), Entries: []wire.Entry{{Chunk: 2, Kind: wire.EntryZero, Version: 5}}}}
			for _, q := range late {
				if r := ask(s, q); r.Status != status.NotFound {
					t.Fatalf("a late %s: %v", q.Kind, r.Status)
				}
			}
			if u := s.Usage(); u.LiveBytes != 3*blockBytes {
				t.Fatalf("%d bytes live", u.LiveBytes)
			}
			mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
			s = open(t, d.Crash(1, 0), testBoot)
		}
	}
}

// The drop outlives the segment that recorded it, as long as an older segment
// still has what was dropped.
func TestDropOutlivesItsSegment(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(2, 0, 10, 1, 1)))
	mustOK(t, ask(s, put(1, 0, 45, 1, 1))) // lives on beside it
	mustOK(t, ask(s, put(3, 0, 60, 1, 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
	told := s.open
	gen := told.gen
	for i := ids.Version(2); told.gen == gen && told.state != segFree; i++ {
		mustOK(t, ask(s, put(3, 0, 60, i, 1)))
		s.Step(0)
	}
	s = open(t, d.Crash(1, 100), testBoot)
	if u := s.Usage(); u.LiveBytes != 105*blockBytes {
		t.Fatalf("%d live blocks, want 105", u.LiveBytes/blockBytes)
	}
}

// A repair heals the same version and never turns a newer write back.
func TestRepairHealsTheSameVersionOnly(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	v1, v2 := ids.MakeVersion(1, 1), ids.MakeVersion(1, 2)
	mustOK(t, ask(s, put(1, 0, 2, v1, 10)))
	d.Flip(offset(s.find(1, 0)), 3)
	if r := ask(s, readOf(1, 0, 2, 0)); r.Status != status.Corrupt || r.Block != 0 || r.Data != nil {
		t.Fatalf("a flipped bit: %v at block %d", r.Status, r.Block)
	}
	mustOK(t, ask(s, put(1, 1, 1, v2, 20)))
	fix := put(1, 0, 2, v1, 10)
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Volume: 1, Chunk: 1, Limit: v2 + 1, Data: fix.Data,
		Entries: []wire.Entry{{Chunk: 1, Version: v1, Block: 0, Sum: fix.Sums[0], Kind: wire.EntryData}, {Chunk: 1, Version: v1, Block: 1, Sum: fix.Sums[1], Kind: wire.EntryData}}}))
	r := mustOK(t, ask(s, readOf(1, 0, 2, 0)))
	if !bytes.Equal(r.Data[:blockBytes], blockOf(10)) || !bytes.Equal(r.Data[blockBytes:], blockOf(20)) || r.Entries[1].Version != v2 {
		t.Fatalf("after the repair: %+v", r.Entries)
	}
}

// find returns where a block of volume 1 is on the disk.
func (s *Store) find(c ids.ChunkID, b ids.Block) uint32 {
	e, err := s.idx.get(s.vols[1].chunk(c, 0, false), b)
	if err != nil {
		panic(err)
	}
	return e.loc
}

// A read without data tells how each block is stored, also of one that has no
// good copy or that is not on the disk yet, and does not touch the disk.
func TestReadWithoutData(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 3, 5, 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: 9, Entries: []wire.Entry{{Chunk: 1, Block: 1, Version: 5, Kind: wire.EntryPoison}}}))
	mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: 1, Block: 3, Count: 1, Version: 6}))
	q := readOf(1, 0, 5, 0)
	q.Flags |= wire.FlagNoData
	r := mustOK(t, ask(s, q))
	var kinds []wire.EntryKind
	for _, e := range r.Entries {
		kinds = append(kinds, e.Kind)
	}
	if want := []wire.EntryKind{wire.EntryData, wire.EntryPoison, wire.EntryData, wire.EntryZero, wire.EntryHole}; !slices.Equal(kinds, want) || len(r.Data) > 0 {
		t.Errorf("%v and %d bytes of data, not %v and none", kinds, len(r.Data), want)
	}
	q.Chunk = 2
	if r := mustOK(t, ask(s, q)); len(r.Entries) != 5 || r.Entries[4].Kind != wire.EntryHole {
		t.Errorf("of a chunk that is not there: %v", r.Entries)
	}
}

// A copy that has moved away says nothing of what its chunk holds: taken for an
// empty one, it would empty whoever catches up from it. Only the copy that is
// being filled again may be.
func TestADroppedChunkIsNoSource(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	mustOK(t, ask(s, put(1, 0, 3, 5, 1)))
	mustOK(t, ask(s, put(2, 0, 3, 5, 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 1}))
	steps(s, 5)
	for _, k := range []wire.Kind{wire.Digest, wire.List} {
		q := wire.Request{Kind: k, Volume: 1, Chunk: 1, Count: 10, Limit: 9}
		if r := ask(s, q); r.Status != status.NotFound {
			t.Errorf("%s of a dropped chunk: %v", k, r.Status)
		}
		q.Flags = wire.FlagFilled
		if r := mustOK(t, ask(s, q)); len(r.Entries) > 0 {
			t.Errorf("%s of a chunk that comes back: %v", k, r.Entries)
		}
	}
	mustOK(t, ask(s, put(1, 0, 3, 7, 2)))
	mustOK(t, ask(s, wire.Request{Kind: wire.List, Volume: 1, Chunk: 1, Count: 10}))
}

func TestPoisonIsReportedUntilOverwritten(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 3, 5, 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: 9, Entries: []wire.Entry{{Chunk: 1, Block: 1, Version: 5, Kind: wire.EntryPoison}}}))
	want := []Bad{{1, 1, 0, 1, 5}} // nobody need read it first
	for range 2 {
		if r := ask(s, readOf(1, 0, 3, 0)); r.Status != status.Poison || r.Block != 1 {
			t.Fatalf("poison: %v at %d", r.Status, r.Block)
		}
		if got := s.BadBlocks(); !slices.Equal(got, want) {
			t.Fatalf("bad: %+v", got)
		}
		if r := mustOK(t, ask(s, wire.Request{Kind: wire.Damaged, Volume: 1})); len(r.Entries) > 0 {
			t.Fatalf("to be repaired, and there is no good copy: %+v", r.Entries)
		}
		d = d.Crash(1, 100)
		s = open(t, d, testBoot)
	}
	s.scrub.bad = nil // as after a start that had no need to read the log
	scrub(t, s, 0)
	if got := s.BadBlocks(); !slices.Equal(got, want) {
		t.Fatalf("bad after a scrub: %+v", got)
	}
	mustOK(t, ask(s, put(1, 1, 1, 6, 4)))
	mustOK(t, ask(s, readOf(1, 0, 3, 0)))
	if got := s.BadBlocks(); len(got) > 0 {
		t.Fatalf("written over, and bad: %+v", got)
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Volume: 1, Chunk: 2, Limit: 9, Entries: []wire.Entry{{Chunk: 2, Block: 1, Version: 5, Kind: wire.EntryPoison}}}))
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
	if got := s.BadBlocks(); len(got) > 0 {
		t.Fatalf("dropped, and bad: %+v", got)
	}
}

// Layers are apart: the format keeps them although nothing makes them yet.
func TestLayersAreApart(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 1, 5, 1)))
	q := put(1, 0, 1, 7, 2)
	q.Layer, q.Sums[0] = 3, wire.BlockSum(1, 1, 3, 0, 7, q.Data)
	mustOK(t, ask(s, q))
	s = open(t, d.Crash(1, 100), testBoot)
	for layer, want := range map[ids.LayerID]uint64{0: 1, 3: 2} {
		q := readOf(1, 0, 1, 0)
		q.Layer = layer
		if r := mustOK(t, ask(s, q)); !bytes.Equal(r.Data, blockOf(want)) {
			t.Fatalf("layer %d holds other data", layer)
		}
	}
	if r := mustOK(t, ask(s, wire.Request{Kind: wire.List, Volume: 1, Chunk: 1, Count: 10})); len(r.Entries) != 2 || r.Entries[1].Layer != 3 {
		t.Fatalf("list: %+v", r.Entries)
	}
}

// Requests that are wrong are refused and change nothing.
func TestWrongRequestsAreRefused(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	torn := put(1, 0, 2, 5, 1)
	torn.Data[5000] ^= 1
	short := put(1, 0, 2, 5, 1)
	short.Data = short.Data[:blockBytes]
	foreign := put(1, 0, 1, 5, 1)
	foreign.Store = ids.StoreID{9}
	far := put(1, maxChunkBlocks, 1, 5, 1)
	for _, c := range []struct {
		name string
		q    wire.Request
		want status.Kind
	}{
		{"damaged on the way", torn, status.Corrupt},
		{"too little data", short, status.Invalid},
		{"another store", foreign, status.NotFound},
		{"beyond any chunk", far, status.Invalid},
		{"no volume", wire.Request{Kind: wire.Flush}, status.Invalid},
		{"no chunk", wire.Request{Kind: wire.Read, Volume: 1, Count: 1}, status.Invalid},
		{"no version", wire.Request{Kind: wire.Zero, Volume: 1, Chunk: 1, Count: 1}, status.Invalid},
		{"a huge read", wire.Request{Kind: wire.Read, Volume: 1, Chunk: 1, Count: wire.MaxIO + 1}, status.Invalid},
		{"hello", wire.Request{Kind: wire.Hello, Volume: 1}, status.Unsupported},
		{"a damaged install", wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: 9, Data: blockOf(1),
			Entries: []wire.Entry{{Chunk: 1, Version: 5, Kind: wire.EntryData, Sum: 1}}}, status.Corrupt},
		{"an install without its data", wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: 9,
			Entries: []wire.Entry{{Chunk: 1, Version: 5, Kind: wire.EntryData, Sum: 1}}}, status.Invalid},
	} {
		if r := ask(s, c.q); r.Status != c.want || r.Detail == "" {
			t.Errorf("%s: %v %q, want %v", c.name, r.Status, r.Detail, c.want)
		}
	}
	if u := s.Usage(); u.LiveBytes != 0 || u.State != "ok" {
		t.Fatalf("something was kept: %+v", u)
	}
}

// A write or sync that fails stops the store: nothing is answered OK any more,
// nothing is tried again.
func TestFailedDiskStopsTheStore(t *testing.T) {
	for _, first := range []wire.Request{put(1, 0, 1, 5, 1), {Kind: wire.Flush, Volume: 1}} {
		d := formatMem(t)
		s := open(t, d, testBoot)
		if first.Kind == wire.Flush {
			mustOK(t, ask(s, put(1, 0, 1, 4, 1)))
		}
		d.FailAt(d.Ops() + 1)
		for _, q := range []wire.Request{first, {Kind: wire.Flush, Volume: 1}, put(1, 1, 1, 6, 1), readOf(1, 0, 1, 0), seal(2)} {
			if r := ask(s, q); r.Status != status.IO {
				t.Fatalf("%s after the failure: %v", q.Kind, r.Status)
			}
		}
		ops := d.Ops()
		s.Step(1e12)
		if err := s.Close(); !errors.Is(err, status.IO) {
			t.Fatalf("close: %v", err)
		}
		if d.Ops() != ops || s.Usage().State == "ok" {
			t.Fatalf("the store goes on: %d operations more, state %q", d.Ops()-ops, s.Usage().State)
		}
	}
}

func TestFormatKeepsWhatIsThere(t *testing.T) {
	d := formatMem(t)
	if err := Make(d, Format{ID: ids.NewStoreID(), Incarnation: 1, SegmentBytes: testSeg}); !errors.Is(err, status.Exists) {
		t.Fatalf("formatted twice: %v", err)
	}
	for _, f := range []Format{{}, {ID: testID}, {ID: testID, Incarnation: 1, SegmentBytes: 5000}, {ID: testID, Incarnation: 1}} {
		if err := Make(disk.NewMem(1<<20), f); !errors.Is(err, status.Invalid) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	if _, err := Open(Config{Disk: disk.NewMem(1 << 20), BootID: "b"}); !errors.Is(err, status.NotFound) {
		t.Errorf("no store: %v", err)
	}
	if _, err := Open(Config{Disk: d, BootID: "b", Cluster: "other"}); !errors.Is(err, status.Invalid) {
		t.Errorf("another cluster: %v", err)
	}
	if _, err := Open(Config{Disk: d}); !errors.Is(err, status.Invalid) {
		t.Errorf("no boot id: %v", err)
	}
}

// The store over a real file: written, closed, opened again; the file is thin.
func TestStoreInAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d, err := disk.Create(path, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if err := Make(d, Format{ID: testID, Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	for life := range 3 {
		s := open(t, d, testBoot)
		if life > 0 {
			if r := mustOK(t, ask(s, readOf(1, 0, 500, 0))); !bytes.Equal(r.Data[499*blockBytes:], blockOf(uint64(life*1000+499))) {
				t.Fatalf("life %d: other data", life)
			}
		}
		mustOK(t, ask(s, put(1, 0, 500, ids.MakeVersion(1, uint64(life+1)), uint64(life+1)*1000)))
		mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
		if life < 2 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if d, err = disk.Open(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
