package volume

import (
	"bytes"
	"math"
	"slices"
	"testing"

	"github.com/anishathalye/porcupine"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	sectorBytes = 512
	sectorCount = 6 * ids.BlockSize / sectorBytes // the range the load uses
)

// sectorOp is what an operation did to one sector.
type sectorOp struct {
	write bool
	val   byte // written, or read
}

// sectorModel is one sector: a register, 0 at first.
var sectorModel = porcupine.Model{
	Init: func() any { return byte(0) },
	Step: func(state, in, _ any) (bool, any) {
		if op := in.(sectorOp); op.write {
			return true, op.val
		} else {
			return op.val == state.(byte), state
		}
	},
}

// history is what every operation did, by sector, on a clock of submissions and
// answers.
type history struct {
	clock   int64
	sectors [sectorCount][]porcupine.Operation
}

// track submits an operation and records it, answered or not.
func (h *history) track(w *world, op *Op, val byte) {
	first, end := int(op.Off/sectorBytes), int((op.Off+op.Len)/sectorBytes)
	if op.Kind == OpTrim { // whole blocks
		const per = ids.BlockSize / sectorBytes
		first, end = (first+per-1)/per*per, end/per*per
	}
	h.clock++
	call, at := h.clock, make([]int, sectorCount)
	if op.Kind != OpRead {
		for s := first; s < end; s++ {
			at[s] = len(h.sectors[s])
			h.sectors[s] = append(h.sectors[s], porcupine.Operation{Input: sectorOp{true, val}, Call: call, Return: math.MaxInt64})
		}
	}
	w.do(op, func(k status.Kind) {
		if w.ok("operation")(k); k != status.OK {
			return
		}
		h.clock++
		for s := first; s < end; s++ {
			if op.Kind != OpRead {
				h.sectors[s][at[s]].Return = h.clock
				continue
			}
			got := op.Data[s*sectorBytes-int(op.Off):][:sectorBytes]
			if !bytes.Equal(got, bytes.Repeat(got[:1], sectorBytes)) {
				w.fail("sector %d is torn", s)
			}
			h.sectors[s] = append(h.sectors[s], porcupine.Operation{Input: sectorOp{false, got[0]}, Call: call, Return: h.clock})
		}
	})
}

// any submits a random operation of any size and place.
func (h *history) any(w *world, val byte) {
	first := w.rng.IntN(sectorCount)
	n := 1 + w.rng.IntN(min(sectorCount-first, 20))
	op := &Op{Off: uint64(first) * sectorBytes, Len: uint64(n) * sectorBytes}
	switch w.rng.IntN(8) {
	case 0, 1, 2:
		op.Kind, op.Data = OpRead, make([]byte, op.Len)
	case 3:
		op.Kind, val = OpZero, 0
	case 4:
		op.Kind, val = OpTrim, 0
	default:
		op.Kind, op.FUA, op.Data = OpWrite, w.rng.IntN(4) == 0, bytes.Repeat([]byte{val}, int(op.Len))
	}
	h.track(w, op, val)
}

// Operations of any size and place, many at once and overlapping, are
// linearizable sector by sector, while stores fall and hang and gateways die
// (P1; traps: sub-4K read-modify-write races, reordering, reading a write in
// flight).
func TestOverlappingOperationsAreLinearizable(t *testing.T) {
	for seed := range uint64(400) {
		w := newWorld(t, seed)
		w.flaky = seed%4 == 3
		w.attach()
		h := &history{}
		for i := range 120 {
			if len(w.done) < 12 {
				h.any(w, byte(i+1))
			}
			for range w.rng.IntN(12) {
				w.deliver()
			}
			if seed%2 == 1 {
				switch i := w.rng.IntN(testStores); w.rng.IntN(40) {
				case 0:
					w.fall(i)
				case 1:
					w.attach()
				case 2, 3:
					w.heal()
				}
			}
		}
		w.whole()
		w.same()
		for s := range h.sectors {
			slices.SortStableFunc(h.sectors[s], func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
			if !porcupine.CheckOperations(sectorModel, h.sectors[s]) {
				w.fail("sector %d is not linearizable: %+v", s, h.sectors[s])
			}
		}
	}
}
