package volume

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// run lets a bucket's worth of operations pass for a time in steps and returns
// how many did.
func (t *throttle) run(from, to, step time.Duration, op *Op) (n uint64) {
	for at := from; at <= to; at += step {
		t.refill(at)
		for t.start(op) {
			n++
		}
	}
	return n
}

func TestBucketsKeepTheRate(t *testing.T) {
	for _, c := range []struct {
		iops, bytes uint64
		burstMs     uint32
		op          *Op
		step        time.Duration
	}{
		{100, 0, 1000, &Op{Kind: OpRead, Len: 4096}, 50 * time.Millisecond},
		{1, 0, 1000, &Op{Kind: OpWrite, Len: 4096}, 50 * time.Millisecond},
		{0, 64 << 10, 1000, &Op{Kind: OpWrite, Len: 4 << 20}, 50 * time.Millisecond}, // larger than the burst
		{7777, 10 << 30, 100, &Op{Kind: OpRead, Len: 1 << 20}, time.Millisecond},
		{0, maxRate, 60_000, &Op{Kind: OpRead, Len: 32 << 20}, 7 * time.Millisecond},
		{50, 0, 200, &Op{Kind: OpZero, Len: 1 << 30}, 333 * time.Nanosecond * 1000},
	} {
		e := &Engine{}
		e.setQos(&pb.Qos{IopsMax: c.iops, BytesPerSecondMax: c.bytes, BurstMs: c.burstMs})
		const span = 100 * time.Second
		n := e.throttle.run(0, span, c.step, c.op)
		ops, bytes := cost(c.op)
		rate := float64(n) / span.Seconds()
		for _, x := range []struct{ limit, each uint64 }{{c.iops, ops}, {c.bytes, bytes}} {
			if x.limit == 0 || x.each == 0 {
				continue
			}
			most := float64(x.limit)*(1+float64(c.burstMs)/1000/span.Seconds())/float64(x.each) + 1/span.Seconds()
			if rate > most*1.0001 {
				t.Errorf("%+v: %.2f operations a second, at most %.2f", c, rate, most)
			}
			if c.iops == 0 || c.bytes == 0 { // one bound: it is reached
				if least := float64(x.limit) / float64(x.each) * 0.99; rate < least {
					t.Errorf("%+v: %.2f operations a second, the bound gives %.2f", c, rate, least)
				}
			}
		}
	}
}

// slowed is a serving volume with one written chunk and a bound on operations.
func slowed(t *testing.T, q *pb.Qos) *world {
	w := newWorld(t, 11)
	w.vol.Qos = q
	w.serving()
	return w
}

// Operations beyond the rate wait in order; flushes pass them; what waits is
// drained by a detach, and answered by the end of the epoch.
func TestBoundedOperationsWaitInOrder(t *testing.T) {
	w := slowed(t, &pb.Qos{IopsMax: 4})
	answers := map[*Op][]status.Kind{}
	var ops []*Op
	for i := range uint64(12) {
		op := &Op{Kind: OpRead, Off: i * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		ops = append(ops, op)
		w.tally(op, answers)
	}
	done := func() (n int) {
		for i, op := range ops {
			if len(answers[op]) == 0 {
				for _, later := range ops[i:] {
					if len(answers[later]) > 0 {
						t.Fatal("one that came later was answered first")
					}
				}
				break
			}
			n++
		}
		return n
	}
	if n := done(); n != 4 { // a burst is a second's worth; unwritten blocks are answered at once
		t.Fatalf("%d operations passed at once, want 4", n)
	}
	flush := &Op{Kind: OpFlush}
	w.tally(flush, answers)
	w.until("a flush that does not wait for them", func() bool { return len(answers[flush]) == 1 })
	began := w.now
	w.until("all of them", func() bool { return done() == len(ops) })
	if took := w.now - began; took < 1700*time.Millisecond || took > 2500*time.Millisecond {
		t.Fatalf("8 operations, one of them on credit, at 4 a second took %v", took)
	}
	w.vol.Qos = nil // its bound is taken away: it holds no more
	w.step(&Refresh{Volume: w.known()})
	for i := range uint64(50) {
		op := &Op{Kind: OpRead, Off: i * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		w.tally(op, answers)
		if len(answers[op]) != 1 {
			t.Fatal("an operation waits without a bound")
		}
	}
	w.step(&Share{IOPS: 1})
	for i := range uint64(5) {
		w.tally(&Op{Kind: OpRead, Off: i * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, answers)
	}
	w.step(&Detach{})
	w.until("the detach drains them", func() bool { return w.e.State() == Ended })
	for op, ks := range answers {
		if len(ks) != 1 || ks[0] != status.OK {
			t.Fatalf("%+v was answered %v", op, ks)
		}
	}

	w = slowed(t, &pb.Qos{BytesPerSecondMax: 64 << 10})
	answers = map[*Op][]status.Kind{}
	for i := range uint64(40) {
		w.tally(&Op{Kind: OpRead, Off: i * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, answers)
	}
	w.step(&Fence{Why: "the test"})
	ok, refused := 0, 0
	for op, ks := range answers {
		if len(ks) != 1 {
			t.Fatalf("%+v was answered %v", op, ks)
		}
		if ks[0] == status.OK {
			ok++
		} else {
			refused++
		}
	}
	if ok != 16 || refused != 24 {
		t.Fatalf("%d passed and %d were refused at the end, want 16 and 24", ok, refused)
	}
}

// A limit refuses what begins after it, says what is still on its way, and lets
// the look at the tail through. The size follows the news of its revision; a cut
// chunk is forgotten before the volume can grow over it.
func TestLimitAndCut(t *testing.T) {
	w := newWorld(t, 3)
	w.serving()
	last := uint64(testSize/ids.BlockSize - 1)
	w.write(0, 7)
	w.write(last, 9)
	w.until("two chunks", w.idle)
	if len(w.chunks) != 2 {
		t.Fatalf("%d chunks", len(w.chunks))
	}
	slow := &Op{Kind: OpWrite, Off: last * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	answers := map[*Op][]status.Kind{}
	w.tally(slow, answers)
	w.step(&Limit{Bytes: testChunk})
	if w.e.Beyond(testChunk) != 1 {
		t.Fatal("the write beyond the limit is not seen")
	}
	late := &Op{Kind: OpWrite, Off: testChunk - ids.BlockSize, Len: 2 * ids.BlockSize, Data: make([]byte, 2*ids.BlockSize)}
	w.tally(late, answers)
	if len(answers[late]) != 1 || answers[late][0] != status.Invalid {
		t.Fatalf("a write over the limit: %v", answers[late])
	}
	w.until("it is drained", func() bool { return w.e.Beyond(testChunk) == 0 })
	tail := &Op{Kind: OpRead, Tail: true, Off: last * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	w.tally(tail, answers)
	w.until("the look at the tail", func() bool { return len(answers[tail]) == 1 })
	if answers[tail][0] != status.OK {
		t.Fatalf("the look at the tail: %v", answers[tail])
	}

	before := w.known()
	w.vol.SizeBytes, w.vol.ShrunkFrom, w.vol.Revision = testChunk, testSize, w.vol.Revision+1
	w.step(&Refresh{Volume: w.known()})
	w.step(&Refresh{Volume: before}) // comes late
	if w.e.Size() != testChunk {
		t.Fatalf("size %d after the shrink", w.e.Size())
	}
	var cut *pb.Chunk
	for i, c := range w.chunks {
		if c.Index > 0 {
			cut, w.chunks = c, append(w.chunks[:i:i], w.chunks[i+1:]...)
			break
		}
	}
	w.vol.ShrunkFrom, w.vol.Cuts, w.vol.CutUpto, w.vol.Revision = 0, 1, cut.Id, w.vol.Revision+1
	w.vol.SizeBytes = testSize // final, and grown again: both in one news
	w.step(&Refresh{Volume: w.known()})
	if w.e.Size() != testChunk {
		t.Fatal("the volume grew over a chunk that is cut")
	}
	w.step(&Refresh{Volume: w.known(), Chunks: w.chunks, Whole: true})
	if w.e.Size() != testSize || w.e.Cuts() != 1 || w.e.chunks[ids.ChunkIndex(cut.Index)] != nil {
		t.Fatalf("size %d, cuts %d, chunk %v", w.e.Size(), w.e.Cuts(), w.e.chunks[ids.ChunkIndex(cut.Index)])
	}
	again := &Op{Kind: OpRead, Off: last * ids.BlockSize, Len: ids.BlockSize, Data: []byte(strings.Repeat("x", ids.BlockSize))}
	w.tally(again, answers)
	w.until("a read of it", func() bool { return len(answers[again]) == 1 })
	if !bytes.Equal(again.Data, make([]byte, ids.BlockSize)) {
		t.Fatal("what was cut is read after growing again")
	}
}
