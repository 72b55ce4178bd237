package volume

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// tally submits an operation and counts its answers.
func (w *world) tally(op *Op, answers map[*Op][]status.Kind) {
	answers[op] = nil
	var again func(k status.Kind)
	again = func(k status.Kind) {
		answers[op] = append(answers[op], k)
		w.done[op] = again
	}
	w.done[op] = again
	w.step(&Submit{[]*Op{op}})
}

// Whatever an operation was waiting for, the end of the epoch answers it, once,
// and not with OK.
func TestTheEndAnswersEveryOperationOnce(t *testing.T) {
	for seed := range uint64(400) {
		w := newWorld(t, seed)
		w.attach()
		w.until("serving", func() bool { return w.e.Info().State == Serving })
		w.write(0, 1)
		w.until("a first chunk", w.idle)
		answers := map[*Op][]status.Kind{}
		for i := range uint64(12) {
			op := &Op{Off: i * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
			switch (i + seed) % 7 {
			case 0:
				op.Kind = OpRead
			case 1:
				op.Kind = OpWrite
			case 2:
				op.Kind, op.FUA = OpWrite, true
			case 3: // spans chunks, the later ones not allocated yet
				op.Kind, op.Off, op.Len, op.Data = OpWrite, testChunk-ids.BlockSize, 2*testChunk, make([]byte, 2*testChunk)
			case 4: // merges
				op.Kind, op.Off, op.Len, op.Data = OpWrite, op.Off+100, 700, make([]byte, 700)
			case 5:
				op.Kind, op.Len, op.Data = OpFlush, 0, nil
			case 6: // waits for its chunk and nothing else
				op.Kind, op.Off = OpWrite, testSize-ids.BlockSize
			}
			w.tally(op, answers)
		}
		for range w.rng.IntN(60) {
			w.deliver()
		}
		before := map[*Op]int{}
		for op, ks := range answers {
			before[op] = len(ks)
		}
		if seed%2 == 0 {
			w.step(&Fence{Why: "over"})
		} else {
			for _, s := range w.stores {
				s.epoch = 99 // another gateway has sealed them
			}
			w.tally(&Op{Kind: OpWrite, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, answers)
		}
		w.until("the end", func() bool { return w.e.Info().State == Ended })
		for range 200 {
			w.deliver()
		}
		for op, ks := range answers {
			if len(ks) != 1 || (before[op] == 0 && seed%2 == 0 && ks[0] == status.OK) {
				t.Fatalf("seed %d: kind %d of [%d,+%d) was answered %v", seed, op.Kind, op.Off, op.Len, ks)
			}
		}
	}
}

// Detaching waits for everything, also for what waits for its chunk.
func TestDetachDrains(t *testing.T) {
	for seed := range uint64(100) {
		w := newWorld(t, seed)
		w.attach()
		w.until("serving", func() bool { return w.e.Info().State == Serving })
		answers := map[*Op][]status.Kind{}
		for i := range uint64(4) {
			w.tally(&Op{Kind: OpWrite, Off: i * testChunk, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, answers)
		}
		w.step(&Detach{})
		w.until("the end", func() bool { return w.e.Info().State == Ended })
		for op, ks := range answers {
			if len(ks) != 1 || ks[0] != status.OK {
				t.Fatalf("seed %d: kind %d of [%d,+%d) was answered %v", seed, op.Kind, op.Off, op.Len, ks)
			}
		}
	}
}

// Operations of any size and place do to the volume what they do to an array
// of bytes.
func TestAnyByteRange(t *testing.T) {
	for seed := range uint64(60) {
		w := newWorld(t, seed)
		w.attach()
		model := make([]byte, testSize)
		for i := range 60 {
			off := uint64(w.rng.IntN(testSize))
			n := 1 + uint64(w.rng.IntN(min(testSize-int(off), 3*testChunk/2)))
			if w.rng.IntN(2) == 0 {
				n = min(n, 1+uint64(w.rng.IntN(9000)))
			}
			op := &Op{Off: off, Len: n}
			switch kind := w.rng.IntN(5); kind {
			case 0, 1:
				op.Kind, op.Data = OpWrite, bytes.Repeat([]byte{byte(i + 1)}, int(n))
				copy(model[off:], op.Data)
			case 2:
				op.Kind = OpZero
				clear(model[off : off+n])
			case 3:
				op.Kind = OpTrim
				from, to := (off+ids.BlockSize-1)/ids.BlockSize*ids.BlockSize, (off+n)/ids.BlockSize*ids.BlockSize
				if to > from {
					clear(model[from:to])
				}
			case 4:
				op.Kind, op.Data = OpRead, bytes.Repeat([]byte{0xee}, int(n))
			}
			what := fmt.Sprintf("seed %d step %d: kind %d of [%d,+%d)", seed, i, op.Kind, off, n)
			w.done[op] = func(k status.Kind) {
				if k != status.OK {
					t.Fatalf("%s: %v", what, k)
				}
				if op.Kind == OpRead && !bytes.Equal(op.Data, model[off:off+n]) {
					t.Fatalf("%s: wrong bytes", what)
				}
			}
			w.step(&Submit{[]*Op{op}})
			w.until(what, func() bool { return len(w.done) == 0 })
		}
	}
}
