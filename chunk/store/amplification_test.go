package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// amplification overwrites a full store of 256 segments, in batches as deep load
// makes them, and returns log bytes per byte written.
func amplification(t *testing.T, times int, at func(rng *rand.Rand, blocks int) int) float64 {
	t.Helper()
	const seg = 256 * blockBytes
	d := disk.NewMem(logStart*blockBytes + 256*seg)
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: seg}); err != nil {
		t.Fatal(err)
	}
	s := open(t, d, testBoot)
	blocks := int(s.capacity) - 64
	rng := rand.New(rand.NewPCG(1, 1))
	data := blockOf(1)
	ctr := uint64(0)
	box := newInbox()
	write := func(b, n int) {
		ctr++
		q := &wire.Request{ID: ctr, Kind: wire.Write, Volume: 1, Chunk: 1, Block: ids.Block(b), Count: uint32(n), Version: ids.MakeVersion(1, ctr)}
		for i := range n {
			q.Data = append(q.Data, data...)
			q.Sums = append(q.Sums, wire.BlockSum(1, 1, 0, q.Block+ids.Block(i), q.Version, data))
		}
		s.Submit([]*wire.Request{q}, box)
	}
	slow := &slowDisk{Mem: d, t: t}
	s.disk, s.now = hide{slow}, nil
	drain := func() {
		for len(slow.pending) > 0 {
			f := slow.pending[0]
			slow.pending = slow.pending[1:]
			f()
		}
	}
	for range blocks / 4 {
		write(rng.IntN(blocks), 1)
		drain()
	}
	for b := 0; b < blocks; b += 128 {
		write(b, min(128, blocks-b))
		drain()
	}
	before := s.Usage().LogBytes
	for i := range times * blocks {
		write(at(rng, blocks), 1)
		if i%32 == 31 {
			drain()
		}
		if i%4096 == 0 {
			s.Step(time.Duration(i) * time.Millisecond)
			drain()
		}
	}
	drain()
	for i := 0; uint64(len(box.got)) < ctr; i++ {
		if i == 100 {
			t.Fatalf("%d of %d writes are answered, %d segments are free", len(box.got), ctr, s.Usage().FreeSegments)
		}
		s.Step(time.Hour + time.Duration(i)*time.Second)
		drain()
	}
	return float64(s.Usage().LogBytes-before) / float64(times*blocks) / blockBytes
}

// A full store is overwritten: what compaction costs stays below what the
// capacity was chosen for, and where most writes go to few blocks it is less.
func TestWriteAmplification(t *testing.T) {
	times := 6
	if testing.Short() {
		times = 2
	}
	uniform := amplification(t, times, func(rng *rand.Rand, n int) int { return rng.IntN(n) })
	skewed := amplification(t, times, func(rng *rand.Rand, n int) int {
		if rng.IntN(10) > 0 {
			return rng.IntN(n / 10)
		}
		return rng.IntN(n)
	})
	narrow := amplification(t, times, func(rng *rand.Rand, n int) int { return rng.IntN(n / 10) })
	t.Logf("write amplification %.2f uniform, %.2f with nine of ten writes to a tenth, %.2f with all of them there", uniform, skewed, narrow)
	if uniform > 2.5 || skewed > uniform || narrow > skewed {
		t.Fatal("it is more than 2.5, or rises where writes go to fewer blocks")
	}
}

// The segment that compaction opens out of the reserve is for its copies: if
// writes filled the rest of it, emptying a segment could use up more than it
// gives back, and in the end nothing could be moved any more.
func TestWritesLeaveTheReserveAlone(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	all, bare := s.free, s.bare
	s.free, s.bare = all[:reserveWrites-1], nil
	if s.roomFor(1, reserveWrites) || !s.roomFor(1, reserveCopies) || !s.roomFor(0, reserveSystem) {
		t.Fatal("writes may use what was opened out of the reserve, or copies may not")
	}
	s.free = all[:1] // one that is dead already comes back
	box := newInbox()
	q := put(1, 0, 1, ids.MakeVersion(1, 1), 1)
	q.ID = 1
	s.Submit([]*wire.Request{&q}, box)
	if len(box.got) != 0 {
		t.Fatalf("a write is answered %v", box.got[1].Err())
	}
	s.free, s.bare = all, bare
	s.Step(time.Second)
	if mustOK(t, box.got[1]); !s.roomFor(1, reserveWrites) {
		t.Fatal("a write that waited has no room when there is some")
	}
}
