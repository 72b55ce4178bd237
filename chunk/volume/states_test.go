package volume

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// What was written is data, what was never written or zeroed since is a hole,
// block by block, also below a snapshot and where a store falls meanwhile.
func TestHowBlocksAreStored(t *testing.T) {
	for seed := range uint64(30) {
		w := filled(t, seed, 6)
		want := bytes.Repeat([]byte{BlockHole}, testHot)
		for b := range 6 {
			want[b] = BlockData
		}
		if seed%2 == 1 { // a layer below
			w.step(&Cut{Volume: w.prepare(), Until: w.now + 1e9})
			w.until("held", func() bool { return len(w.cuts) > 0 })
			w.step(&Release{w.cuts[0].Cut})
		}
		w.write(2, 0)
		w.write(8, 70)
		want[2], want[8] = BlockHole, BlockData
		w.until("written", w.idle)
		if seed%3 == 0 {
			w.fall(int(seed) % testStores)
		}
		op := &Op{Kind: OpRead, Len: testHot * ids.BlockSize, States: make([]byte, testHot)}
		w.do(op, w.ok("status"))
		w.until("described", w.idle)
		if !bytes.Equal(op.States, want) {
			w.fail("described as %v, it is %v", op.States, want)
		}
		for _, s := range w.stores {
			for _, q := range s.log {
				if q.Kind == wire.Read && q.Flags&wire.FlagNoData == 0 {
					w.fail("data was read: %+v", q)
				}
			}
		}
	}
}

// A block nobody has a good copy of is data, and no error.
func TestABadBlockIsData(t *testing.T) {
	w := filled(t, 1, 6)
	for _, s := range w.stores {
		s.bad[blockKey{w.key(3).chunk, 0, w.key(3).block}] = true
	}
	op := &Op{Kind: OpRead, Off: 2 * ids.BlockSize, Len: 3 * ids.BlockSize, States: []byte{9, 9, 9}}
	w.do(op, w.ok("status"))
	w.until("described", w.idle)
	if !bytes.Equal(op.States, []byte{BlockData, BlockData, BlockData}) {
		t.Errorf("%v", op.States)
	}
}

// Each store that has a block says that its disk has failed, and is back over a new
// connection while the last one to be asked hangs: when that one is excluded, the
// read is answered by those that are back.
func TestAStoreThatIsBackIsReadAgain(t *testing.T) {
	w := filled(t, 4, 4)
	fails := func(q *wire.Request, r *wire.Reply) {
		if q.Kind == wire.Read {
			*r = wire.Reply{Kind: q.Kind, ID: q.ID, Status: status.IO, Detail: "the disk failed"}
		}
	}
	w.hang(2)
	w.stores[0].tamper, w.stores[1].tamper = fails, fails
	op := &Op{Kind: OpRead, Off: ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	w.do(op, w.ok("read"))
	told := func(i int) bool {
		return slices.ContainsFunc(w.stores[i].log, func(q wire.Request) bool { return q.Kind == wire.Read })
	}
	w.until("both have failed", func() bool { return told(0) && told(1) })
	w.settleFor(time.Millisecond)
	w.stores[0].tamper, w.stores[1].tamper = nil, nil
	w.restart(0)
	w.restart(1)
	w.until("read", func() bool { return w.done[op] == nil })
}
