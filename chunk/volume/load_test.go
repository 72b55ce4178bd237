package volume

import (
	"bytes"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

func (w *world) block(b uint64) *register {
	r := w.blocks[b]
	if r == nil {
		r = &register{may: map[byte]bool{0: true}, hist: []byte{0}}
		w.blocks[b] = r
	}
	return r
}

// do submits an operation and tells how it ended.
func (w *world) do(op *Op, then func(status.Kind)) *Op {
	w.done[op] = then
	w.step(&Submit{[]*Op{op}})
	return op
}

// ok is how an operation has to end.
func (w *world) ok(what string) func(status.Kind) {
	return func(k status.Kind) {
		if k != status.OK && w.e.State() != Ended {
			w.fail("%s: %v", what, k)
		}
	}
}

// write writes one value all over a block; one write of a block at a time.
func (w *world) write(block uint64, val byte) *Op {
	r := w.block(block)
	r.may[val], r.busy, r.shaken, r.life = true, true, false, w.life
	r.hist, r.all = append(r.hist, val), append(r.all, val)
	since := len(r.all)
	op := &Op{Kind: OpWrite, FUA: w.rng.IntN(4) == 0, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: bytes.Repeat([]byte{val}, ids.BlockSize)}
	if val == 0 {
		op.Kind, op.Data = OpZero, nil
	}
	admitted := false
	defer func() { admitted = w.e.State() == Serving && w.e.cut == nil }()
	return w.do(op, func(k status.Kind) {
		r.busy = false
		if w.e.State() == Ended {
			return // unanswered: it may have happened or not
		}
		if k == status.NoSpace { // refused before anything was sent
			if admitted {
				w.fail("block %d: a write was admitted, and failed for want of space", block)
			}
			delete(r.may, val)
			r.hist = slices.DeleteFunc(r.hist, func(v byte) bool { return v == val })
			return
		}
		if k != status.OK {
			w.fail("write of block %d failed: %v", block, k)
		}
		if r.over++; r.shaken { // what had accepted it may have lost it before it was answered
			r.shaken = false
			return
		}
		clear(r.may)
		r.may[val] = true
		w.everywhere(block, r, val, since, op.FUA)
		if op.FUA {
			r.hist = []byte{val}
		}
	})
}

// everywhere checks what an answer promises, given the value and how many others
// had been written before the answer was asked for: every member that metadata counts
// as in-sync has accepted the value or a later one (P3), durably if it was
// flushed (P2). One that admits to have lost something is not relied on for
// what is not durable.
func (w *world) everywhere(block uint64, r *register, val byte, since int, durable bool) {
	w.t.Helper()
	later := r.all[since:]
	for i, m := range w.vol.Members {
		s, held := w.stores[i], w.stores[i].blocks
		if durable {
			held = s.durable
		}
		k := w.key(block)
		_, b := lookup(held, k.chunk, k.block, w.e.layers.top, w.e.layers.chain)
		got := byte(0)
		if len(b.data) > 0 {
			got = b.data[0]
		}
		if m.InSync && w.holds(block, i) && (durable || s.intact) && got != val && !slices.Contains(later, got) {
			w.fail("block %d: answered with %d (durable: %v), but in-sync member %d holds %d", block, val, durable, i, got)
		}
	}
}

// key is where a store keeps a block of the volume.
func (w *world) key(block uint64) blockKey {
	const per = testChunk / ids.BlockSize
	for _, c := range w.chunks {
		if uint64(c.Index) == block/per {
			return blockKey{ids.ChunkID(c.Id), 0, ids.Block(block % per)}
		}
	}
	return blockKey{}
}

// flush makes what is complete when it begins the least a power loss may leave.
func (w *world) flush() *Op {
	last, since := map[uint64]byte{}, map[uint64]int{}
	for b, r := range w.blocks {
		if !r.busy && len(r.may) == 1 {
			for v := range r.may {
				last[b], since[b] = v, len(r.all)
			}
		}
	}
	return w.do(&Op{Kind: OpFlush}, func(k status.Kind) {
		if w.ok("flush")(k); k != status.OK {
			return
		}
		for b, v := range last {
			r := w.blocks[b]
			w.everywhere(b, r, v, since[b], true)
			if i := slices.Index(r.hist, v); i >= 0 {
				r.hist = r.hist[i:]
			}
		}
	})
}

func (w *world) read(block uint64) *Op { return w.look(block, nil) }

// describe asks how a block is stored: a hole is as good as reading zeros.
func (w *world) describe(block uint64) *Op { return w.look(block, []byte{BlockHole + 1}) }

func (w *world) look(block uint64, states []byte) *Op {
	r := w.block(block)
	over, since := r.over, len(r.all)
	op := &Op{Kind: OpRead, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize), States: states}
	was := map[byte]bool{}
	for v := range r.may {
		was[v] = true
	}
	return w.do(op, func(k status.Kind) {
		if k == status.IO && w.hopeless(block) {
			return
		}
		if w.ok("read")(k); k != status.OK {
			return
		}
		if states != nil && states[0] == BlockData {
			return
		}
		if states != nil && states[0] != BlockHole {
			w.fail("block %d is not described", block)
		}
		val := op.Data[0]
		if !r.may[val] && !was[val] && !slices.Contains(r.all[since:], val) || !bytes.Equal(op.Data, bytes.Repeat([]byte{val}, ids.BlockSize)) {
			w.fail("block %d reads %d, allowed %v, at first %v, written meanwhile %v", block, val, r.may, was, r.all[since:])
		}
		if r.over == over && since == len(r.all) {
			clear(r.may)
			r.may[val] = true // stable from the first read on
			if r.life < w.life {
				r.hist = []byte{val} // the attach made it durable
			}
		}
	})
}

// readAll reads every block that was used.
func (w *world) readAll() {
	for b := range uint64(testHot) {
		if !w.block(b).busy {
			w.read(b)
		}
	}
}

// lostPower: from now on a block may hold what a power loss may leave.
func (w *world) lostPower() {
	for _, r := range w.blocks {
		for _, v := range r.hist {
			r.may[v] = true
		}
		r.all = append(r.all, r.hist...) // for reads under way
		r.shaken = r.busy
	}
}

// someLoad submits a few random operations; val is the last value used.
func (w *world) someLoad(val byte) byte {
	for range 1 + w.rng.IntN(6) {
		b := uint64(w.rng.IntN(testHot))
		if w.block(b).busy {
			continue
		}
		switch w.rng.IntN(8) {
		case 0:
			w.read(b)
		case 1:
			w.describe(b)
		case 2:
			w.write(b, 0)
		case 3:
			w.flush()
		default:
			val = val%250 + 1
			w.write(b, val)
		}
	}
	return val
}
