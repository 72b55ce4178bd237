package volume

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// holds reports whether a member has a copy of a block that counts.
func (w *world) holds(block uint64, i int) bool {
	c := w.chunkAt(uint32(block / (testChunk / ids.BlockSize)))
	return c != nil && slices.ContainsFunc(c.Stores, func(id []byte) bool { return bytes.Equal(id, w.stores[i].id[:]) })
}

// move is what metadata does with MoveChunks, in the words of this world: the
// next spare store gets the copies.
func (w *world) move(op *pb.MoveChunks) (*pb.Result, error) {
	if op.Epoch != w.vol.Epoch {
		return nil, status.Errorf(status.Fenced, "epoch %d is over", op.Epoch)
	}
	if op.Revision != w.vol.Revision {
		return nil, status.Errorf(status.Conflict, "revision %d is not the current one", op.Revision)
	}
	res := &pb.Result{}
	changed := false
	for _, mv := range op.Moves {
		c := w.chunkAt(mv.Index)
		changed = w.moveOne(c, mv) || changed
		if !slices.Contains(res.Chunks, c) {
			res.Chunks = append(res.Chunks, c)
		}
	}
	for i, m := range w.vol.Members {
		used := slices.ContainsFunc(w.chunks, func(c *pb.Chunk) bool {
			return slices.ContainsFunc(c.Stores, func(id []byte) bool { return bytes.Equal(id, m.Store) }) ||
				slices.ContainsFunc(c.Filling, func(f *pb.Filling) bool { return bytes.Equal(f.Store, m.Store) })
		})
		w.left[i] = w.left[i] || changed && len(w.chunks) > 0 && !used
	}
	if changed {
		w.vol.Revision++
		w.moves = append(w.moves, op)
	}
	res.Volume = w.known()
	return res, nil
}

func (w *world) moveOne(c *pb.Chunk, mv *pb.ChunkMove) bool {
	at := slices.IndexFunc(c.Filling, func(f *pb.Filling) bool { return bytes.Equal(f.Store, mv.To) })
	switch {
	case mv.Step == pb.ChunkMove_PLAN && len(c.Filling) == 0 && len(w.spare) > 0:
		s := w.stores[w.spare[0]]
		if len(w.vol.Members) == w.spare[0] {
			w.vol.Members = append(w.vol.Members, &pb.Member{Store: s.id[:], Incarnation: uint64(s.incarnation), Host: fmt.Sprint("host-", w.spare[0]+1), InSync: true})
		}
		c.Filling = append(c.Filling, &pb.Filling{Store: s.id[:], Replaces: mv.From})
	case mv.Step == pb.ChunkMove_DONE && len(mv.To) == 0 && len(c.Stores) > int(w.copies):
		c.Stores = slices.DeleteFunc(slices.Clone(c.Stores), func(id []byte) bool { return bytes.Equal(id, mv.From) })
	case mv.Step == pb.ChunkMove_DONE && at >= 0:
		c.Stores = slices.DeleteFunc(slices.Clone(c.Stores), func(id []byte) bool { return bytes.Equal(id, c.Filling[at].Replaces) })
		c.Stores = append(c.Stores, mv.To)
		c.Filling = nil
	case mv.Step == pb.ChunkMove_CANCEL && at >= 0:
		c.Filling = nil
	default:
		return false
	}
	return true
}

// moving is a volume with four written blocks whose last member is to give its
// chunks to a fourth store.
func moving(t *testing.T, seed uint64) *world {
	w := filled(t, seed, 4)
	w.stores = append(w.stores, newMemStore(3))
	w.spare = []int{3}
	w.leaving[2] = true
	w.step(&Refresh{Volume: w.known()})
	return w
}

func (w *world) moved() bool { return w.left[2] && w.e.Info().Caring == "" && w.idle() }

// target lets nothing of one kind reach the store that gets the copies.
func target(k wire.Kind) func(int, *wire.Request) bool {
	return func(i int, q *wire.Request) bool { return i == 3 && q.Kind == k }
}

// Copies move to another store while they are written, read and flushed; then
// the old store is no member any more, and the new one alone has everything.
func TestCopiesMoveToAnotherStore(t *testing.T) {
	for seed := range uint64(100) {
		w := moving(t, seed)
		w.flaky = seed%2 == 1
		val := byte(100)
		for range 10 {
			val = w.someLoad(val)
			for range 20 {
				w.deliver()
			}
		}
		w.flaky = false
		w.until("moved", w.moved)
		w.readAll()
		w.until("read", w.idle)
		w.fall(0)
		w.fall(1)
		w.readAll()
		w.until("read from the new copy", w.idle)
	}
}

// Trap: rebuild racing writes. A chunk comes back to a store that has dropped it, and a
// write overtakes what announces it: the store refuses that write, and the copy begins
// again.
// Guard: failFill in accepted.
func TestARefusedWriteIsCopiedAgain(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.stores = append(w.stores, newMemStore(3))
		w.stores[3].dropped = map[ids.ChunkID]bool{w.key(1).chunk: true}
		w.spare, w.leaving[2] = []int{3}, true
		w.keep = target(wire.Digest)
		w.step(&Refresh{Volume: w.known()})
		w.until("announced", func() bool { return len(w.kept) > 0 })
		w.write(1, 77)
		w.until("written", w.idle)
		w.settleFor(100 * time.Millisecond)
		w.release()
		w.until("moved", w.moved)
		w.fall(0)
		w.fall(1)
		w.must(1, 77)
	}
}

// Trap: rebuild racing writes. A copy counts only when it has everything that
// was acknowledged, durably: it is asked for after its flush.
// Guards: answeredUpTo and flushFill.
func TestANewCopyIsDurableBeforeItCounts(t *testing.T) {
	for seed := range uint64(50) {
		for _, kind := range []wire.Kind{wire.Flush, wire.Write} {
			w := moving(t, seed)
			w.keep = target(wire.Install)
			w.until("copying", func() bool { return len(w.kept) > 0 })
			copies := w.kept
			w.kept, w.keep = nil, target(kind)
			w.write(2, 90)
			if kind == wire.Write {
				w.until("held", func() bool { return len(w.kept) > 0 })
			}
			w.pending = append(w.pending, copies...)
			w.until("held", func() bool { return len(w.kept) > 0 })
			w.settleFor(w.e.cfg.Stall / 4)
			if w.left[2] {
				w.fail("the copy counts before it has answered a %s", kind)
			}
			if kind == wire.Write {
				w.until("required", func() bool { return w.e.moves.fills[0].required })
				later := w.write(3, 91)
				w.settleFor(w.e.cfg.Stall / 4)
				if w.done[later] == nil {
					w.fail("a write is acknowledged that a required copy has not accepted")
				}
			}
			w.release()
			w.until("moved", w.moved)
			w.must(2, 90)
		}
	}
}

// A copy that is being made is not read: its blocks may be missing.
// Guard: sendRead passes by what fills.
func TestANewCopyIsNotReadBeforeItCounts(t *testing.T) {
	for seed := range uint64(50) {
		w := moving(t, seed)
		w.keep = target(wire.Install)
		w.until("copying", func() bool { return len(w.kept) > 0 })
		w.fall(0) // the local one, preferred
		w.fall(1)
		w.must(2, 2)
		for _, q := range w.stores[3].log {
			if q.Kind == wire.Read {
				w.fail("it was read")
			}
		}
		w.fall(0)
		w.fall(1)
		w.release()
		w.until("moved", w.moved)
	}
}

// An outcome that is unknown leaves the copy required, whether it counts or not.
// Guard: failFill leaves alone what was asked for.
func TestAMoveOfUnknownOutcomeKeepsTheCopyRequired(t *testing.T) {
	for seed := range uint64(50) {
		w := moving(t, seed)
		var held *MetaCall
		w.hold = func(m *MetaCall) bool {
			if held == nil && m.Move != nil && m.Move.Moves[0].Step == pb.ChunkMove_DONE {
				held = m
				return true
			}
			return false
		}
		w.until("asked", func() bool { return held != nil })
		if seed%2 == 0 {
			if _, err := w.commit(held); err != nil {
				t.Fatal(err)
			}
		}
		w.fall(3)
		op := w.write(2, 91)
		w.settleFor(w.e.cfg.Stall / 4)
		if w.done[op] == nil {
			w.fail("acknowledged without a copy that may count")
		}
		w.step(&MetaDone{Call: held, Err: status.Errorf(status.Unknown, "leadership lost")})
		w.until("written", w.idle) // by its exclusion, or without it
		w.fall(3)
		w.until("moved", func() bool { return w.moved() && w.allWell() })
		w.must(2, 91)
	}
}

// allWell reports whether every member is in sync.
func (w *world) allWell() bool {
	for i, m := range w.vol.Members {
		if !w.left[i] && !m.InSync {
			return false
		}
	}
	return true
}

// What an unfinished copy, or one that has moved away, still holds is no news at
// an attach: it may never have been acknowledged.
// Guard: listNewer passes by what does not count.
func TestAnUnfinishedCopyIsNotReconciled(t *testing.T) {
	for seed := range uint64(50) {
		w := moving(t, seed)
		w.keep = target(wire.Flush)
		w.until("copying", func() bool { return len(w.kept) > 0 })
		writes := 0
		w.keep = func(i int, q *wire.Request) bool {
			if i < 3 && q.Kind == wire.Write {
				writes++
			}
			return i < 3 || q.Kind == wire.Flush
		}
		w.write(2, 92) // reaches the unfinished copy alone
		w.until("there", func() bool { return writes == 3 && w.stores[3].blocks[w.key(2)].en.Version.Counter() == 5 })
		w.life++ // kill -9
		clear(w.done)
		w.kept, w.keep = nil, nil
		w.block(2).busy = false
		w.serving()
		w.must(2, 2)
		w.until("moved", w.moved)
		w.must(2, 2)
	}
}

// A member that is out for longer than the grace is replaced; one that is back
// sooner is not, and joins.
func TestAMemberOutForLongIsReplaced(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.grace = 5 * time.Second
		w.stores = append(w.stores, newMemStore(3))
		w.spare = []int{3}
		w.serving()
		w.fall(2)
		w.write(1, 77)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync && w.idle() })
		if seed%2 == 0 {
			w.settleFor(4 * time.Second)
			w.fall(2)
			w.until("in sync", func() bool { return w.allWell() && w.e.Info().Caring == "" })
			if len(w.moves) > 0 {
				w.fail("copies moved though the member was back in time")
			}
			continue
		}
		w.until("replaced", w.moved)
		w.must(1, 77)
	}
}

// The number of copies changes while the volume serves.
func TestTheNumberOfCopiesChanges(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.stores = append(w.stores, newMemStore(3))
		w.spare = []int{3}
		w.copies = 4
		w.step(&Refresh{Volume: w.known()})
		w.write(3, 50)
		w.until("four copies", func() bool { return len(w.chunks[0].Stores) == 4 && w.e.Info().Caring == "" && w.idle() })
		w.same()
		w.copies = 2
		w.step(&Refresh{Volume: w.known()})
		w.write(3, 51)
		w.until("two copies", func() bool { return len(w.chunks[0].Stores) == 2 && w.e.Info().Caring == "" && w.idle() })
		w.must(3, 51)
	}
}

// A join that was interrupted goes on with what is left, whoever was restarted:
// the member's connection, or the gateway.
func TestASecondJoinSendsTheRest(t *testing.T) {
	for seed := range uint64(20) {
		w := newWorld(t, seed)
		w.serving()
		for b := range uint64(testHot) {
			w.write(b, byte(b+1))
			w.until("written", w.idle)
		}
		w.fall(2)
		for b := range uint64(testHot) {
			w.write(b, byte(b+100))
			w.until("written", w.idle)
		}
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		got := 0
		for _, b := range w.stores[2].blocks {
			got += len(b.data)
		}
		installs := 0
		w.keep = func(i int, q *wire.Request) bool {
			if i == 2 && q.Kind == wire.Install && len(q.Data) > 0 {
				installs++
				return installs > 1 // the first arrives
			}
			return false
		}
		w.fall(2)
		w.until("half way", func() bool { return installs > 0 })
		w.settleFor(100 * time.Millisecond)
		w.kept, w.keep = nil, nil
		first := installedBytes(w.stores[2])
		if seed%2 == 0 {
			w.restart(2)
		} else {
			w.serving()
		}
		w.until("in sync", w.allInSync)
		w.same()
		if sent, all := installedBytes(w.stores[2])-first, testHot*ids.BlockSize; first == 0 || sent > all-first {
			w.fail("the first join brought %d bytes and the second %d, of %d", first, sent, all)
		}
	}
}

// installedBytes is the data a store was given by joins and copies.
func installedBytes(s *memStore) int {
	n := 0
	for _, q := range s.log {
		if q.Kind == wire.Install {
			for _, en := range q.Entries {
				if en.Kind == wire.EntryData {
					n += ids.BlockSize
				}
			}
		}
	}
	return n
}

// A read reaches a copy after it has moved away, was dropped, and came back with a
// write that was sent late: what it does not have any more is no hole.
func TestACopyThatMovedAwayIsNotRead(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 4)
		w.write(testChunk/ids.BlockSize, 9) // another chunk keeps the member
		w.until("written", w.idle)
		w.stores = append(w.stores, newMemStore(3))
		w.spare = []int{3}
		w.keep = func(i int, q *wire.Request) bool {
			return i == 0 && (q.Kind == wire.Read && q.Flags&wire.FlagRaw == 0 || q.Kind == wire.Write && q.Chunk != w.key(1).chunk)
		}
		read, states := w.read(1), w.describe(2)
		w.leaving[0] = true
		w.step(&Refresh{Volume: w.known()})
		w.until("moved", func() bool { return !w.holds(1, 0) && !w.e.chunks[0].heldBy(w.e.replicas[0]) })
		for k := range w.stores[0].blocks {
			if k.chunk == w.key(1).chunk {
				delete(w.stores[0].blocks, k)
			}
		}
		w.release()
		w.until("read", func() bool { return w.done[read] == nil && w.done[states] == nil })
	}
}

// Trap: a copy that has moved away is dropped before the engine hears that it
// moved, and a late write brings a part of it back: what it does not show is no
// hole.
// Guard: shows, for reads and for what joins copy.
func TestACopyThatMayHaveLeftIsNotRead(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.stores = append(w.stores, newMemStore(3))
		w.spare, w.leaving[0] = []int{3}, true
		var held *MetaCall
		w.hold = func(m *MetaCall) bool {
			if held != nil || m.Move == nil || m.Move.Moves[0].Step != pb.ChunkMove_DONE {
				return held != nil
			}
			held = m
			return true
		}
		w.step(&Refresh{Volume: w.known()})
		w.until("asked for", func() bool { return held != nil })
		w.keep = func(i int, q *wire.Request) bool { return i == 0 && q.Kind == wire.Read }
		var got []status.Kind
		early := w.peek(2, &got)
		res, err := w.commit(held)
		if err != nil || !w.holds(2, 3) || w.holds(2, 0) {
			w.fail("not moved: %v", err)
		}
		clear(w.stores[0].blocks)
		w.release()
		w.until("read", w.idle)
		if early.Data[0] != 2 || got[0] != status.OK {
			w.fail("a dropped copy was read: %d, %v", early.Data[0], got)
		}
		w.hold = nil
		w.step(&MetaDone{Call: held, Result: res})
		w.must(2, 2)
	}
}

// A wish that finds another call's turn, for longer than plans are made anew, is
// asked for after it.
func TestAWishOutlivesAnotherCallsTurn(t *testing.T) {
	w := filled(t, 1, 4)
	w.stores = append(w.stores, newMemStore(3))
	w.spare = []int{3}
	var held *MetaCall
	w.hold = func(m *MetaCall) bool {
		if m.Allocate == nil {
			return false
		}
		held = m
		return true
	}
	w.write(testChunk/ids.BlockSize, 7) // a chunk that is not there yet
	w.until("allocating", func() bool { return held != nil })
	c := w.chunks[0]
	w.step(&Wish{Moves: []*pb.ChunkWish{{Index: c.Index, From: c.Stores[2], To: w.stores[3].id[:]}}})
	w.settleFor(3 * planEvery)
	w.hold = nil
	w.toEngine(func() { w.meta(held) })
	w.until("moved", func() bool {
		return slices.ContainsFunc(w.chunkAt(c.Index).Stores, func(id []byte) bool { return bytes.Equal(id, w.stores[3].id[:]) })
	})
}
