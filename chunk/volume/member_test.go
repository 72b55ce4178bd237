package volume

import (
	"bytes"
	"slices"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Two of three lost at once: writes wait, reads go on, nobody is excluded; one
// that returns is enough.
// Guard: mayExclude asks for MinInSync members that serve.
func TestTwoOfThreeLostAtOnce(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.stores[1].up, w.stores[2].up = false, false
		w.step(&Down{1, w.stores[1].gen, "reset"})
		w.step(&Down{2, w.stores[2].gen, "reset"})
		w.connect(1)
		w.connect(2)
		op := w.write(2, 50)
		w.settleFor(4 * w.e.cfg.Stall)
		w.must2(1, 3, op)
		if w.done[op] == nil || len(w.metas) != 0 {
			w.fail("with one of three left a write was acknowledged, or somebody excluded: %v", w.metas)
		}
		w.fall(1 + int(seed%2))
		w.until("written", w.idle)
		w.must(2, 50)
		w.heal()
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// must2 reads a block while another operation stays unanswered.
func (w *world) must2(block uint64, val byte, other *Op) {
	w.t.Helper()
	op := w.do(&Op{Kind: OpRead, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, w.ok("read"))
	w.until("read", func() bool { return w.done[op] == nil })
	if op.Data[0] != val || w.done[other] == nil {
		w.fail("block %d reads %d, want %d", block, op.Data[0], val)
	}
}

// One member is out, a second goes with a write in flight: the first comes back
// and catches up although that write waits for the second, and so ends the wait.
// Guards: sources takes members that have accepted, not only what is complete;
// require counts what came with the copy.
func TestAJoinDoesNotWaitForAMissingMember(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.fall(1)
		w.until("excluded", func() bool { return !w.vol.Members[1].InSync })
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && q.Kind == wire.Write }
		op := w.write(2, 50)
		w.until("in flight", func() bool { return len(w.kept) > 0 })
		w.fall(2)
		w.kept, w.keep = nil, nil
		w.settleFor(w.e.cfg.Stall)
		if w.done[op] == nil {
			w.fail("written with one member of three")
		}
		w.fall(1)
		w.until("written", w.idle)
		w.fall(2)
		w.until("in sync", w.allInSync)
		w.must(2, 50)
		w.same()
	}
}

// While a joiner copies, what it copies from must have accepted all that is
// older than the join.
// Guard: sources.
func TestAJoinCopiesFromWhoHasEverything(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.fall(2)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		w.keep = func(i int, q *wire.Request) bool { return i == 0 && q.Kind == wire.Write } // the local one, preferred
		w.write(2, 50)
		w.until("in flight", func() bool { return len(w.kept) > 0 })
		w.fall(2)
		w.until("joining", func() bool { return w.e.replicas[2].join != nil && w.e.replicas[2].join.phase != joinSeal })
		w.settleFor(w.e.cfg.Stall / 4)
		w.release()
		w.until("in sync", func() bool { return w.allInSync() && w.idle() })
		w.same()
	}
}

// The only replica restarts with writes in flight: they are sent again and
// answered OK, nothing is excluded.
// Guards: orphaned and resume; mayExclude.
func TestTheOnlyReplicaRestarts(t *testing.T) {
	for seed := range uint64(50) {
		w := newWorld(t, seed)
		w.addStores(1)
		w.serving()
		for b := range uint64(4) {
			w.write(b, byte(10+b))
			if w.rng.IntN(2) == 0 {
				w.deliver()
			}
		}
		w.until("a chunk", func() bool { return len(w.chunks) > 0 })
		w.fall(0)
		w.flush()
		w.settleFor(3 * w.e.cfg.Stall)
		if len(w.metas) != 0 {
			w.fail("the only replica was excluded")
		}
		w.fall(0)
		w.until("answered", w.idle)
		w.readAll()
		w.until("read", w.idle)
	}
}

// The only replica loses power. With everything flushed the volume goes on; with
// acknowledged writes lost it ends, and tells.
// Guards: lostPower, both ways.
func TestTheOnlyReplicaLosesPower(t *testing.T) {
	for seed := range uint64(50) {
		w := newWorld(t, seed)
		w.addStores(1)
		w.serving()
		w.write(1, 10)
		w.flush()
		w.until("flushed", func() bool { return w.idle() && !w.e.flush.running && !w.e.dirty() })
		w.keep = func(_ int, q *wire.Request) bool { return q.Kind == wire.Flush || q.Kind == wire.Settle }
		w.do(&Op{Kind: OpWrite, Off: 0, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, w.ok("write"))
		if seed%2 == 0 { // accepted, not answered, and lost
			for len(w.stores[0].blocks) == 1 {
				w.deliver()
			}
			for i := range w.pending { // the answer goes with the connection
				w.pending[i] = func() {}
			}
		} else {
			w.until("written", w.idle)
		}
		w.stores[0].loseVolatile(func() bool { return false })
		w.stores[0].gen++
		w.step(&Down{0, w.stores[0].gen - 1, "power"})
		w.step(&Up{0, w.stores[0].gen})
		if w.release(); seed%2 == 1 {
			w.until("the end", func() bool { return w.e.State() == Ended })
			continue
		}
		w.until("written", w.idle)
		if len(w.stores[0].blocks) != 2 {
			w.fail("a write the replica lost was acknowledged and not sent again")
		}
		w.must(1, 10)
	}
}

// A member that lost power when all that is acknowledged was durable stays in
// sync, and gets again what it had accepted of the writes in flight.
// Guard: lostPower takes back what it had accepted.
func TestAMemberThatLostPowerGetsAgainWhatIsInFlight(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.flush()
		w.until("flushed", func() bool { return w.idle() && !w.e.flush.running && !w.e.dirty() })
		w.keep = only(0)
		w.write(2, 50)
		w.until("accepted by one", func() bool { return len(w.kept) == 2 && w.e.replicas[0].busy == 0 })
		w.stores[0].loseVolatile(func() bool { return false })
		w.restart(0)
		w.until("sealed", func() bool { return w.e.replicas[0].readable() })
		w.release()
		w.until("written", w.idle)
		if len(w.metas) != 0 {
			w.fail("it was excluded")
		}
		w.must(2, 50)
		w.same()
	}
}

// A store that answers nothing is excluded once others progress, and catches up
// later; when all stand still nobody is, nor when this process slept.
// Guards: watchStalls: moving, stillUntil, slept, and the sign of life.
func TestStalls(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.until("idle links", func() bool { return w.e.replicas[1].busy == 0 && !w.e.flush.running && !w.e.dirty() })
		for i := range w.stores {
			w.hang(i)
		}
		w.write(2, 50)
		w.settleFor(6 * w.e.cfg.Stall)
		if len(w.metas) != 0 {
			w.fail("somebody was excluded though nobody answers: %v", w.metas)
		}
		for i := range w.stores {
			w.hang(i)
		}
		w.until("quiet", func() bool { return w.idle() && !w.e.flush.running && !w.e.dirty() })
		w.keep = func(i int, q *wire.Request) bool { return i != 0 }
		w.write(2, 51)
		w.now += 10 * w.e.cfg.Stall // suspended with requests on their way; then one answer comes first
		for w.e.replicas[0].busy > 0 {
			f := w.pending[0]
			w.pending = w.pending[1:]
			f()
		}
		w.step(&Tick{})
		if !w.allInSync() {
			w.fail("a member was given up because this process slept")
		}
		w.settleFor(w.e.cfg.Stall / 4)
		w.release()
		if len(w.metas) != 0 {
			w.fail("somebody was excluded because this process slept: %v", w.metas)
		}
		w.until("quiet", func() bool { return w.idle() && !w.e.flush.running && !w.e.dirty() })
		w.e.cfg.Flush = 1 << 60
		w.hang(0)
		w.read(1) // only the hung one owes anything; the others tell that they live
		w.until("read", w.idle)
		w.until("excluded", func() bool { return !w.vol.Members[0].InSync })
		w.hang(0)
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// A member that stands still in the middle of an attach does not stop it.
// Guard: watchStalls bounces it while attaching.
func TestAttachGoesOnWithoutAMemberThatHangs(t *testing.T) {
	for seed := range uint64(50) {
		w := leftBehind(t, seed, 0, 99)
		kind := [...]wire.Kind{wire.Newer, wire.Install, wire.Flush, wire.Settle}[seed%4]
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && q.Kind == kind }
		w.serving()
		w.must(2, 99)
		w.release()
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// A link that flaps, in every phase of attach, exclusion and join, stops nothing.
func TestALinkThatFlaps(t *testing.T) {
	for seed := range uint64(200) {
		w := filled(t, seed, 4)
		if seed%2 == 0 {
			w.attach()
		}
		for n := range 60 {
			i := int(seed) % testStores
			if w.stores[i].up && w.rng.IntN(3) == 0 {
				w.fall(i)
			} else if w.stores[i].up {
				w.restart(i)
			} else {
				w.fall(i)
			}
			if b := uint64(n % 8); !w.block(b).busy {
				w.write(b, byte(100+n))
			}
			for range w.rng.IntN(20) {
				w.deliver()
			}
		}
		w.converge()
	}
}

// Detaching goes on without a member that is lost.
func TestDetachWhileAMemberIsLost(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.write(2, 50)
		w.fall(1)
		w.write(3, 51)
		w.step(&Detach{})
		w.until("the end", func() bool { return w.e.State() == Ended })
		if !w.idle() || w.vol.Members[1].InSync {
			w.fail("detached with %d operations unanswered, lost member in-sync %v", len(w.done), w.vol.Members[1].InSync)
		}
		w.heal()
		w.serving()
		w.must(2, 50)
		w.must(3, 51)
	}
}

// A volume that grows, and gets chunks, while a member joins: all of it is there.
func TestAVolumeGrowsWhileAMemberJoins(t *testing.T) {
	for seed := range uint64(50) {
		w := joining(t, seed)
		w.vol.SizeBytes += testChunk
		w.step(&Refresh{Volume: w.known()})
		op := &Op{Kind: OpWrite, Off: testSize + 5, Len: 2 * ids.BlockSize, Data: bytes.Repeat([]byte{7}, 2*ids.BlockSize)}
		w.do(op, w.ok("write beyond the old end"))
		w.until("written", w.idle)
		w.release()
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// A change that meets a conflict waits for news and is decided anew: metadata is
// not asked the same again and again.
// Guards: holdMeta, takeNews.
func TestAConflictWaitsForNews(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.until("quiet", func() bool { return !w.e.metaBusy() })
		calls := 0
		w.hold = func(m *MetaCall) bool { calls++; return true }
		w.fall(2)
		w.until("asked", func() bool { return calls == 1 })
		w.vol.Revision++ // somebody else's change
		call := w.e.member.call
		w.step(&MetaDone{Call: call, Result: &pb.Result{Members: []*pb.MemberResult{w.change(call.Change.Changes[0])}}})
		for range 20 {
			w.step(&Tick{})
		}
		if calls != 1 {
			w.fail("metadata was asked %d times without news", calls)
		}
		w.hold = nil
		w.step(&Refresh{Volume: w.known()})
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
	}
}

// With a store full, writes that were sent wait, new ones are refused, zeroing
// goes on; with room again all is as before and nothing was lost.
// Guards: isFull, retryFull; admit.
func TestAFullStore(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		for _, s := range w.stores {
			s.full = true
		}
		sent := w.write(2, 50)
		w.until("found full", func() bool { return len(w.e.full.jobs) > 0 })
		for range 5 {
			w.settleFor(spaceRetry)
			var got status.Kind
			w.do(&Op{Kind: OpWrite, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(k status.Kind) { got = k })
			if got != status.NoSpace {
				w.fail("a new write was answered %v", got)
			}
		}
		zero := w.write(3, 0)
		w.until("zeroed", func() bool { return w.done[zero] == nil })
		w.settleFor(2 * spacePatience)
		if w.done[sent] == nil || len(w.metas) != 0 {
			w.fail("a write that no store has room for ended, or somebody was excluded")
		}
		for _, s := range w.stores {
			s.full = false
		}
		w.until("written", w.idle)
		w.write(1, 51)
		w.until("written", w.idle)
		w.readAll()
		w.until("read", w.idle)
		w.same()
	}
}

// A detach cannot end while a write waits for room. It can be given up, and the
// volume serves on; forced, it answers that write with a failure and lets go, and
// what was acknowledged is there for the next writer.
// Guards: Stay; detach by force.
func TestADetachOnAFullStore(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		for _, s := range w.stores {
			s.full = true
		}
		var got status.Kind
		sent := w.write(2, 50)
		waits := w.done[sent]
		w.done[sent] = func(k status.Kind) { got = k; waits(k) }
		w.until("found full", func() bool { return len(w.e.full.jobs) > 0 })
		w.step(&Detach{})
		w.settleFor(2 * spacePatience)
		if in := w.e.Info(); in.State != Draining || in.Full != 1 || len(in.FullOn) == 0 {
			w.fail("with a write that waits for room, a detach is %v", in.State)
		}
		if seed%2 == 0 {
			w.step(&Stay{})
			w.readAll()
			w.until("read", func() bool { return len(w.done) == 1 })
			if w.e.State() != Serving || got != status.OK {
				w.fail("after a detach that was given up it is %v", w.e.State())
			}
			zero := w.write(3, 0)
			w.until("zeroed", func() bool { return w.done[zero] == nil })
		}
		lets := 0
		w.hold = func(m *MetaCall) bool {
			if m.Detach != nil {
				lets++
			}
			return false
		}
		w.step(&Detach{Force: true})
		if w.e.State() != Ended || got != status.Shutdown || lets != 1 {
			w.fail("detached by force it is %v, its write was answered %v, and metadata told %d times", w.e.State(), got, lets)
		}
		for _, s := range w.stores {
			s.full = false
		}
		w.serving()
		w.readAll()
		w.until("read", w.idle)
		w.write(1, 51)
		w.until("written", w.idle)
		w.same()
	}
}

// A store that alone is full is excluded after a while, and is back when it has
// room.
// Guard: retryFull excludes it.
func TestAStoreAloneFull(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.stores[1].full = true
		w.write(2, 50)
		w.until("written", w.idle)
		if w.vol.Members[1].InSync {
			w.fail("written, with the full store in sync")
		}
		w.write(1, 51)
		w.until("written", w.idle)
		w.settleFor(3 * joinBackoffMax)
		w.stores[1].full = false
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// A request belongs to its connection until it is answered: one that the
// connection took with it is never used again.
// Guards: orphaned, resendRead.
func TestARequestIsNotUsedAgainBeforeItsAnswer(t *testing.T) {
	w := filled(t, 1, 4)
	w.until("quiet", func() bool { return !w.e.flush.running && !w.e.dirty() })
	var out Out
	submit := func(kind OpKind, block uint64) {
		op := &Op{Kind: kind, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		w.e.Step(w.now, &Submit{[]*Op{op}}, &out)
	}
	submit(OpWrite, 40)
	submit(OpRead, 41)
	var reqs []*wire.Request
	var were []wire.Request
	for _, s := range out.Sends {
		if s.Replica == 0 {
			reqs, were = append(reqs, s.Req), append(were, *s.Req)
		}
	}
	if len(reqs) != 2 {
		t.Fatalf("%d requests for the local replica, want a write and a read", len(reqs))
	}
	w.e.Step(w.now, &Down{0, w.stores[0].gen, "reset"}, &out)
	w.stores[0].gen++
	w.out = Out{}
	w.step(&Up{0, w.stores[0].gen})
	for b := range uint64(40) {
		w.write(b%8+8, byte(b))
		w.read(b % 8)
		w.until("done", func() bool { return len(w.done) < 2 })
	}
	for i, q := range reqs {
		if q.ID != were[i].ID || q.Kind != were[i].Kind || q.Block != were[i].Block || !slices.Equal(q.Sums, were[i].Sums) {
			t.Fatalf("a request of the connection that went was used again: %+v, was %+v", *q, were[i])
		}
	}
}

// What a joiner, or an attach, copies goes in runs, not block by block, and only
// what differs.
func TestCopiesGoInRuns(t *testing.T) {
	for seed := range uint64(20) {
		w := filled(t, seed, 8)
		w.fall(2)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		n := uint64(40 * ids.BlockSize)
		w.do(&Op{Kind: OpWrite, Off: 16 * ids.BlockSize, Len: n, Data: make([]byte, n)}, w.ok("write"))
		w.until("written", w.idle)
		installs := func(s *memStore) (requests, blocks int) {
			for _, q := range s.log {
				if q.Kind == wire.Install {
					requests++
					blocks += len(q.Entries)
				}
			}
			return requests, blocks
		}
		w.fall(2)
		w.until("in sync", w.allInSync)
		if r, b := installs(w.stores[2]); r != (40+pieceBlocks-1)/pieceBlocks || b != 40 {
			w.fail("the join took %d requests for %d blocks", r, b)
		}
		w.keep = only(0)
		w.do(&Op{Kind: OpWrite, Off: 16 * ids.BlockSize, Len: n, Data: make([]byte, n)}, w.ok("write"))
		w.until("at one member", func() bool { return len(w.kept) == 2 && w.e.replicas[0].busy == 0 })
		w.life++
		w.kept, w.keep = nil, nil
		w.serving()
		if r, b := installs(w.stores[1]); r != 1 || b != 40 {
			w.fail("the attach took %d requests for %d blocks", r, b)
		}
	}
}
