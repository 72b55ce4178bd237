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
	for b := 0; b < blocks; b += 32 {
		write(b, min(32, blocks-b))
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
	if len(box.got) < times*blocks {
		t.Fatalf("%d of %d writes are answered", len(box.got), times*blocks)
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
	t.Logf("write amplification %.2f uniform, %.2f with nine of ten writes to a tenth", uniform, skewed)
	if uniform > 2.5 || skewed > uniform {
		t.Fatalf("write amplification is %.2f, and %.2f with most writes to a tenth", uniform, skewed)
	}
}
