package store

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// steps lets background work happen.
func steps(s *Store, n int) {
	for i := range n {
		s.Step(time.Duration(i) * 10 * time.Second)
	}
}

// A store at its capacity is overwritten many times over: compaction keeps up,
// data stays right, also over a reopening.
func TestEndlessOverwriting(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	blocks := int(s.capacity) - 5
	rng := rand.New(rand.NewPCG(4, 4))
	vals := make([]uint64, blocks)
	ctr := uint64(0)
	write := func(b int) {
		ctr++
		vals[b] = ctr
		mustOK(t, ask(s, put(1, ids.Block(b), 1, ids.MakeVersion(1, ctr), ctr)))
	}
	for b := range blocks {
		write(b)
	}
	check := func(what string) {
		t.Helper()
		for b := range blocks {
			if r := mustOK(t, ask(s, readOf(1, ids.Block(b), 1, 0))); !bytes.Equal(r.Data, blockOf(vals[b])) {
				t.Fatalf("%s: block %d is not what was written", what, b)
			}
		}
	}
	for round := range 3 {
		for range 2 * blocks {
			write(rng.IntN(blocks))
		}
		check("running")
		d = d.Crash(uint64(round), 100)
		s = open(t, d, testBoot)
		if n := s.Usage().Note; n != "" {
			t.Fatal(n)
		}
		check("reopened")
	}
}

// Full means full: data is refused, everything else still passes, and after a
// trim there is room again.
func TestFullStore(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	n, ver := 0, uint64(0)
	for {
		ver++
		r := ask(s, put(1, ids.Block(n), 10, ids.MakeVersion(1, ver), 1))
		if r.Status == status.NoSpace {
			break
		}
		mustOK(t, r)
		n += 10
	}
	if u := s.Usage(); u.LiveBytes < u.CapacityBytes-10*blockBytes || u.LiveBytes > u.CapacityBytes {
		t.Fatalf("full at %d of %d bytes", u.LiveBytes, u.CapacityBytes)
	}
	ver++
	mustOK(t, ask(s, put(1, 0, 10, ids.MakeVersion(1, ver), 7))) // an overwrite needs no more
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	mustOK(t, ask(s, seal(1)))
	ver++
	mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Epoch: 1, Chunk: 1, Block: 20, Count: 10, Version: ids.MakeVersion(1, ver)}))
	ver++
	q := put(1, ids.Block(n), 10, ids.MakeVersion(1, ver), 1)
	q.Epoch = 1
	mustOK(t, ask(s, q))
	for range 500 { // seals and tombstones never run out of room
		ver++
		mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Epoch: 1, Chunk: 2, Block: ids.Block(ver % 100), Count: 10, Version: ids.MakeVersion(1, ver)}))
		mustOK(t, ask(s, wire.Request{Kind: wire.Settle, Volume: 1, Epoch: 1, Floor: ids.MakeVersion(1, ver)}))
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Epoch: 1}))
	steps(s, 5)
	if u := s.Usage(); u.LiveBytes != 0 || u.UsedBytes > u.CapacityBytes/8 {
		t.Fatalf("after the drop: %+v", u)
	}
}

// What is trimmed is given back: segments in use, and bytes of the disk.
func TestTrimGivesSpaceBack(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 600, ids.MakeVersion(1, 1), 1)))
	before := s.Usage().UsedBytes
	mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: 1, Block: 5, Count: 590, Version: ids.MakeVersion(1, 2)}))
	steps(s, 30)
	u := s.Usage()
	if u.UsedBytes > before/4 || u.LiveBytes != 10*blockBytes {
		t.Fatalf("used %d before the trim, %d after", before, u.UsedBytes)
	}
	used := uint64(0)
	b := make([]byte, blockBytes)
	for at := int64(0); at < testSize; at += blockBytes {
		if err := disk.ReadAt(d, b, at); err != nil {
			t.Fatal(err)
		}
		if !empty(b) {
			used += blockBytes
		}
	}
	if used > before/4 {
		t.Fatalf("%d bytes of the disk are not empty", used)
	}
	s = open(t, d.Crash(1, 0), "boot-2")
	if r := mustOK(t, ask(s, readOf(1, 0, 6, 0))); r.Entries[4].Kind != wire.EntryData || r.Entries[5].Kind == wire.EntryHole && used == 0 {
		t.Fatalf("after a power loss: %+v", r.Entries)
	}
}

// A large store that holds little keeps room behind few free segments only:
// what is kept for reuse goes by what is in use, not by what there could be.
func TestALargeStoreGivesSpaceBack(t *testing.T) {
	d := disk.NewMem(logStart*blockBytes + 2000*testSeg)
	if err := Make(d, Format{ID: testID, Incarnation: 1, Cluster: "c", SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	s := open(t, d, testBoot)
	for c := range ids.ChunkID(5) {
		mustOK(t, ask(s, put(c+1, 0, 600, ids.MakeVersion(1, uint64(c)+1), 1)))
	}
	for c := range ids.ChunkID(5) {
		mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: c + 1, Count: 600, Version: ids.MakeVersion(1, 9)}))
	}
	steps(s, 100)
	if kept := len(s.free); kept > s.stock() {
		t.Fatalf("%d free segments keep their room, %d are wanted", kept, s.stock())
	}
}

// A segment that holds little but one tombstone of a whole chunk is emptied
// like any other: the tombstone is one record, however many blocks it covers.
func TestWideTombstonesAreMoved(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	ver := ids.Version(1)
	for c := ids.ChunkID(10); c < 60; c++ {
		ver++
		mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: c, Count: maxChunkBlocks, Version: ver}))
		ver++
		mustOK(t, ask(s, put(1, 0, 50, ver, 1))) // a segment is full of what dies next
	}
	steps(s, 200)
	if u := s.Usage(); u.UsedBytes > 6*testSeg {
		t.Fatalf("50 tombstones and 50 blocks take %d bytes", u.UsedBytes)
	}
	if r := mustOK(t, ask(s, readOf(10, maxChunkBlocks-1, 1, 0))); r.Entries[0].Kind != wire.EntryZero || r.Entries[0].Version != 2 {
		t.Fatalf("the first tombstone: %+v", r.Entries[0])
	}
}
