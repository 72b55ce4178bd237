package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const raggedBlocks = 512

// raggedStore holds raggedBlocks blocks of a chunk, each written several times,
// one by one and in no order; values[b] is what block b holds.
func raggedStore(t *testing.T, d disk.Disk) (s *Store, values []uint64) {
	t.Helper()
	s = open(t, d, testBoot)
	rng := rand.New(rand.NewPCG(3, 4))
	values = make([]uint64, raggedBlocks)
	for n := range uint64(3 * raggedBlocks) {
		b := rng.IntN(raggedBlocks)
		if n < raggedBlocks {
			b = int(n)
		}
		values[b] = n + 1
		mustOK(t, ask(s, put(1, ids.Block(b), 1, ids.MakeVersion(1, n+1), n+1)))
		if n%(2*quietRequests) == 0 {
			s.Step(0)
		}
	}
	return s, values
}

// runs counts the runs the blocks lie in.
func (s *Store) runs(t *testing.T) (n int) {
	t.Helper()
	last := uint32(0)
	for b := range ids.Block(raggedBlocks) {
		at := s.find(1, b)
		if at != last+1 {
			n++
		}
		last = at
	}
	return n
}

func holds(t *testing.T, s *Store, values []uint64) {
	t.Helper()
	for b, v := range values {
		r := mustOK(t, ask(s, readOf(1, ids.Block(b), 1, 0)))
		if why := compare(state{wire.EntryData, ids.MakeVersion(1, v), v}, r.Entries[0], r.Data); why != "" {
			t.Fatalf("block %d: %s", b, why)
		}
	}
}

// What was overwritten in no order lies in order once the store has been quiet,
// at the cost of no more than one copy of what was written; while it is busy,
// nothing is moved.
func TestStraightening(t *testing.T) {
	d := disk.NewMem(logStart*blockBytes + 200*testSeg)
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	s, values := raggedStore(t, d)
	ragged := s.runs(t)
	if ragged < raggedBlocks/3 {
		t.Fatalf("%d runs: nothing to put in order", ragged)
	}
	for i := range 20 { // busy
		for range quietRequests + 1 {
			ask(s, readOf(1, 0, 1, 0))
		}
		s.Step(time.Duration(i))
	}
	if s.straight.moved > 0 {
		t.Fatalf("%d blocks were moved while guests read", s.straight.moved)
	}
	steps(s, 200)
	if n := s.runs(t); n > raggedBlocks/straightRun {
		t.Errorf("%d runs of %d after a quiet time, %d before", n, raggedBlocks, ragged)
	}
	moved := s.straight.moved
	if moved < raggedBlocks/2 || moved > 3*raggedBlocks {
		t.Errorf("%d blocks were moved, of %d written", moved, 3*raggedBlocks)
	}
	holds(t, s, values)
	steps(s, 200)
	if s.straight.moved != moved {
		t.Errorf("%d blocks were moved again", s.straight.moved-moved)
	}
	s = open(t, d.Crash(1, 100), testBoot)
	if s.Usage().Note != "" {
		t.Fatal(s.Usage().Note)
	}
	holds(t, s, values)
}

// What is overwritten, trimmed or dropped while its window is being read stays
// so, and a block that is bad is not given a good checksum.
func TestChangedWhileBeingStraightened(t *testing.T) {
	mem := disk.NewMem(logStart*blockBytes + 200*testSeg)
	if err := Make(mem, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	s, values := raggedStore(t, mem)
	mem.Flip(offset(s.find(1, 300))+9, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d := &lateReads{Mem: mem}
	s = open(t, struct{ disk.Disk }{d}, testBoot)
	for n := range ids.Block(3 * raggedBlocks / 2) { // a new life has no list and no credit
		if b := 2 * n % raggedBlocks; b != 300 {
			values[b] += 10000
			mustOK(t, ask(s, put(1, b, 1, ids.MakeVersion(1, values[b]), values[b])))
		}
	}
	credit := uint64(3 * raggedBlocks / 2)
	d.late = true
	changed := uint64(0)
	for i := range 2000 {
		s.Step(time.Duration(i) * time.Second)
		if !s.straight.reading {
			d.release() // compaction's
			continue
		}
		for _, b := range []ids.Block{s.straight.first + 3, s.straight.first + 8} { // of the window
			values[b] += 20000
			mustOK(t, ask(s, put(1, b, 1, ids.MakeVersion(1, values[b]), values[b])))
			changed++
		}
		d.release()
	}
	d.late = false
	if changed < 2 || s.straight.moved == 0 {
		t.Fatalf("%d blocks were changed while their window was read, %d moved", changed, s.straight.moved)
	}
	if s.straight.moved > credit+changed {
		t.Errorf("%d blocks were moved, guests wrote %d", s.straight.moved, credit+changed)
	}
	if r := ask(s, readOf(1, 300, 1, 0)); values[300] < 10000 && r.Status != status.Corrupt {
		t.Errorf("a bad block was read: %v", r.Status)
	}
	values[300] += 50000
	mustOK(t, ask(s, put(1, 300, 1, ids.MakeVersion(1, values[300]), values[300])))
	holds(t, s, values)
	d.late = true
	for i := range 100 {
		s.Step(time.Duration(i) * time.Hour)
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 1}))
	d.release()
	steps(s, 20)
	if n := s.Usage().LiveBytes; n != 0 {
		t.Errorf("%d bytes live after all was dropped", n)
	}
}

// lateReads keeps reads until they are released.
type lateReads struct {
	*disk.Mem
	late bool
	held []*disk.Op
}

func (d *lateReads) Submit(op *disk.Op) {
	if d.late && op.Kind == disk.Read {
		d.held = append(d.held, op)
		return
	}
	d.Mem.Submit(op)
}

func (d *lateReads) release() {
	for len(d.held) > 0 {
		op := d.held[0]
		d.held = d.held[1:]
		d.Mem.Submit(op)
	}
}
