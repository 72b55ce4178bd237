package volume

import (
	"slices"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// flip damages a stored block, if it is there and good everywhere.
func (w *world) flip(i int, block uint64) bool {
	k := w.key(block)
	for _, s := range w.stores {
		if s.bad[k] || s.blocks[k].en != w.stores[i].blocks[k].en {
			return false
		}
	}
	if b, ok := w.stores[i].blocks[k]; !ok || b.en.Kind != wire.EntryData {
		return false
	}
	w.stores[i].bad[k] = true
	return true
}

// hopeless reports whether every copy that counts is bad.
func (w *world) hopeless(block uint64) bool {
	for i, m := range w.vol.Members {
		k := w.key(block)
		if m.InSync && w.stores[i].up && !w.stores[i].bad[k] && w.stores[i].blocks[k].en.Kind != wire.EntryPoison {
			return false
		}
	}
	return true
}

// A bad copy is never returned: a good one is, and takes its place, while stores
// fall and gateways die.
func TestFlippedBlocksAreServedAndRepaired(t *testing.T) {
	flipped, repaired := 0, uint64(0)
	for seed := range uint64(400) {
		w := newWorld(t, seed)
		w.flaky = seed%2 == 1
		w.attach()
		val := byte(0)
		for range 60 {
			val = w.someLoad(val)
			for range w.rng.IntN(40) {
				w.deliver()
			}
			i, whole := w.rng.IntN(testStores), w.e.State() == Serving && w.allInSync() && w.down() < 0
			switch w.rng.IntN(8) {
			case 0: // one member at a time may be missing: another has a good copy
				if d := w.down(); d >= 0 {
					w.fall(d)
				} else if whole {
					w.fall(i)
				}
			case 1:
				repaired += w.e.Info().Stats.Repaired
				w.attach()
			default:
				if whole && w.flip(i, uint64(w.rng.IntN(testHot))) {
					flipped++
				}
			}
		}
		w.converge()
		repaired += w.e.Info().Stats.Repaired
	}
	if flipped < 700 || repaired < 50 {
		t.Fatalf("only %d blocks flipped and %d repaired", flipped, repaired)
	}
}

// filled is a serving volume whose first n blocks hold n, n-1, …, 1.
func filled(t *testing.T, seed uint64, n int) *world {
	w := newWorld(t, seed)
	w.serving()
	for b := range n {
		w.write(uint64(b), byte(n-b))
	}
	w.until("filled", w.idle)
	return w
}

// One long read over copies that are each bad somewhere else is served from all
// of them, and exactly the bad blocks are repaired.
func TestEachReplicaMayHaveABadBlock(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 8)
		w.flip(0, 1)
		w.flip(1, 4)
		w.flip(2, 6)
		w.flip(0, 6)
		op := &Op{Kind: OpRead, Off: 100, Len: 8*ids.BlockSize - 300, Data: make([]byte, 8*ids.BlockSize-300)}
		w.do(op, w.ok("read"))
		w.until("read", w.idle)
		for i, b := range op.Data {
			if want := byte(8 - (i+100)/ids.BlockSize); b != want {
				w.fail("byte %d is %d, want %d", i, b, want)
			}
		}
		w.until("repaired", func() bool { return len(w.stores[0].bad) == 0 })
		if n := len(w.stores[1].bad); n != 1 {
			w.fail("store 1 has %d bad blocks, want the one that nobody read from it", n)
		}
	}
}

// A repair that comes late leaves a newer write alone.
// Guard: the limit of the repair's Install is just above the version it has.
func TestALateRepairDoesNotUndoAWrite(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.flip(0, 2)
		w.keep = func(i int, q *wire.Request) bool { return i != 0 && q.Kind == wire.Read }
		w.read(2)
		w.until("asked another", func() bool { return len(w.kept) == 1 })
		read := w.kept[0]
		w.kept, w.keep = nil, func(i int, q *wire.Request) bool { return i != 0 && q.Kind == wire.Write }
		w.write(2, 77)
		w.write(3, 78)
		w.until("at one member", func() bool { return len(w.kept) == 4 && w.stores[0].blocks[w.key(2)].data[0] == 77 })
		w.pending = append(w.pending, read)
		w.until("repair sent", func() bool {
			return slices.ContainsFunc(w.stores[0].log, func(q wire.Request) bool { return q.Kind == wire.Install })
		})
		w.release()
		w.until("answered", w.idle)
		w.must(2, 77)
		w.same()
	}
}

// A block no copy of which is good is an error, the others are not, until it is
// overwritten.
func TestABlockWithoutAGoodCopyIsAnErrorUntilOverwritten(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		for i := range w.stores {
			w.stores[i].bad[w.key(2)] = true
		}
		got := map[uint64]status.Kind{}
		for b := range uint64(4) {
			op := &Op{Kind: OpRead, Off: b * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
			w.do(op, func(k status.Kind) { got[b] = k })
		}
		part := &Op{Kind: OpWrite, Off: 2*ids.BlockSize + 7, Len: 9, Data: make([]byte, 9)}
		w.do(part, func(k status.Kind) { got[4] = k })
		w.until("read", w.idle)
		if got[2] != status.IO || got[4] != status.IO || got[0] != status.OK || got[1] != status.OK || got[3] != status.OK {
			w.fail("answers %v", got)
		}
		w.write(2, 99)
		w.until("written", w.idle)
		w.read(2)
		w.until("read", w.idle)
	}
}

// A bad block on the only survivor does not stop a member from joining: it gets
// poison there, and with the survivor's next write it is whole.
// Guard: fetch gives poison after the last try.
func TestABadBlockOnTheSurvivorDoesNotStopAJoin(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 6)
		w.fall(2)
		w.fall(1)
		w.attach() // the two are put out: the one left has everything
		w.until("serving", func() bool { return w.e.State() == Serving })
		for b := range uint64(6) {
			w.write(b, byte(50+b))
		}
		w.until("written", w.idle)
		w.stores[0].bad[w.key(3)] = true
		w.fall(1)
		w.fall(2)
		w.until("in sync", w.allInSync)
		if en := w.stores[1].blocks[w.key(3)].en; en.Kind != wire.EntryPoison || en.Version != w.stores[0].blocks[w.key(3)].en.Version {
			w.fail("the joiner holds %+v", en)
		}
		w.write(3, 99)
		w.until("written", w.idle)
		w.readAll()
		w.until("read", w.idle)
		w.same()
	}
}

// A joiner keeps the last good copy of a block that is poison where it joins.
// Guard: the poison case of difference.
func TestAJoinDoesNotPoisonTheLastGoodCopy(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 6)
		w.fall(2)
		w.until("out", func() bool { return !w.vol.Members[2].InSync })
		for _, s := range w.stores[:2] {
			b := s.blocks[w.key(3)]
			b.en.Kind, b.en.Sum, b.data = wire.EntryPoison, 0, nil
			s.blocks[w.key(3)] = b
		}
		w.fall(2)
		w.until("in sync", w.allInSync)
		w.read(3)
		w.until("read", w.idle)
		w.until("repaired", func() bool { return w.stores[0].blocks[w.key(3)].en.Kind == wire.EntryData })
	}
}

// A block that was flipped on the member that alone has a write which the dead
// gateway left behind becomes poison everywhere: it is not turned back.
// Guard: fetch gives poison after the last try, in attach.
func TestAttachDoesNotTurnBackABadBlock(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.keep = func(i int, q *wire.Request) bool { return i != 1 && q.Kind == wire.Write }
		w.write(2, 99)
		w.until("at one member", func() bool { return w.stores[1].blocks[w.key(2)].en.Version.Counter() == 5 && len(w.kept) == 2 })
		w.stores[1].bad[w.key(2)] = true
		w.kept, w.keep = nil, nil
		w.serving()
		for i, s := range w.stores {
			if i != 1 && s.blocks[w.key(2)].en.Kind != wire.EntryPoison {
				w.fail("member %d holds %+v", i, s.blocks[w.key(2)].en)
			}
		}
		if !slices.Equal([]bool{w.vol.Members[0].InSync, w.vol.Members[1].InSync, w.vol.Members[2].InSync}, []bool{true, true, true}) {
			w.fail("a member was excluded for a bad block")
		}
	}
}

// A store that answers with another place's block, checksum and all, is not
// believed.
// Guard: entriesMatch computes with the identity that was asked for.
func TestAMisdirectedBlockIsNotBelieved(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 8)
		w.fall(0) // the local one, which checks by itself
		w.until("out", func() bool { return !w.vol.Members[0].InSync })
		w.stores[1].tamper = func(q *wire.Request, r *wire.Reply) {
			if q.Kind == wire.Read && q.Block == 3 {
				other := *q
				other.Block = 5
				w.stores[1].tamper = nil
				*r = *w.stores[1].do(&other)
				r.ID = q.ID
			}
		}
		for range 4 {
			w.read(3)
		}
		w.until("read", w.idle)
	}
}
