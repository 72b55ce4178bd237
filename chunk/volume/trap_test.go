package volume

import (
	"bytes"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The traps of replication that concern the engine. Each test names the guard
// it watches: without it, it fails.

// only lets writes and zeroings reach one member.
func only(member int) func(int, *wire.Request) bool {
	return func(i int, q *wire.Request) bool {
		return i != member && (q.Kind == wire.Write || q.Kind == wire.Zero)
	}
}

// leftBehind is a volume of which a dead gateway left one write, of block 2, at
// one member.
func leftBehind(t *testing.T, seed uint64, member int, val byte) *world {
	w := filled(t, seed, 4)
	w.keep = only(member)
	w.write(2, val)
	w.until("at one member", func() bool {
		return len(w.kept) == 2 && w.stores[member].blocks[w.key(2)].en.Version.Counter() == 5
	})
	w.life++ // kill -9
	clear(w.done)
	w.block(2).busy = false
	w.kept, w.keep = nil, nil
	return w
}

// must reads a block and demands a value.
func (w *world) must(block uint64, val byte) {
	w.t.Helper()
	op := &Op{Kind: OpRead, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	w.do(op, w.ok("read"))
	w.until("read", w.idle)
	if !bytes.Equal(op.Data, bytes.Repeat([]byte{val}, ids.BlockSize)) {
		w.fail("block %d reads %d, want %d", block, op.Data[0], val)
	}
}

// Trap: flip-flop after a writer's death. What one member alone has is seen by
// all later reads, whoever serves them.
// Guard: listed copies what members lack before the attach serves.
func TestNoFlipFlopAfterAWritersDeath(t *testing.T) {
	for seed := range uint64(50) {
		w := leftBehind(t, seed, 0, 99)
		w.serving()
		w.must(2, 99)
		w.fall(0)
		w.must(2, 99)
	}
}

// Trap: a block only the dead writer's one replica had, resurrected later.
// Guards: stepAttach excludes who was not reached before the first read; a join
// gives the joiner the survivor's state below J (difference).
func TestALostWriteIsNotResurrected(t *testing.T) {
	for seed := range uint64(50) {
		w := leftBehind(t, seed, 0, 99)
		w.stores[0].up = false
		w.serving()
		w.must(2, 2)
		w.fall(0)
		w.until("in sync", w.allInSync)
		w.must(2, 2)
		w.same()
	}
}

// Trap: a joiner with newer, never acknowledged blocks, where the survivors have
// none at all.
// Guard: difference makes holes of what the survivor does not have.
func TestAJoinersUnacknowledgedBlockBecomesAHole(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.keep = only(0)
		w.write(9, 99)
		w.until("at one member", func() bool { return len(w.kept) == 2 && w.stores[0].blocks[w.key(9)].en.Version != 0 })
		w.kept, w.keep = nil, nil
		w.stores[0].up = false
		w.serving()
		w.fall(0)
		w.until("in sync", w.allInSync)
		w.must(9, 0)
		w.same()
	}
}

// Trap: a dropped tombstone. A zeroing that one member has is not undone by the
// older data of the others.
// Guard: reconciliation knows tombstones (better compares versions, whatever the
// kind; runs installs states without data).
func TestATombstoneIsReconciled(t *testing.T) {
	for seed := range uint64(50) {
		w := leftBehind(t, seed, 0, 0)
		w.serving()
		w.must(2, 0)
		w.fall(0)
		w.must(2, 0)
	}
}

// Trap: a fenced writer that still reads. Without a lease, and a member's
// confirmation, no read is answered, with one again they are, and after the fence
// none is.
// Guard: partDone holds reads while the lease is over; end answers them.
func TestNoReadIsAnsweredWithoutALease(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.lease = 200e6
		w.serving()
		w.must(2, 2)
		w.keep = func(i int, q *wire.Request) bool { return q.Kind == wire.Stat }
		w.settleFor(w.lease)
		var got []status.Kind
		read := func() {
			w.do(&Op{Kind: OpRead, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(k status.Kind) { got = append(got, k) })
		}
		read()
		w.settleFor(w.lease)
		if len(got) != 0 {
			w.fail("a read was answered %v after the lease", got)
		}
		w.step(&Lease{Until: w.now + w.lease})
		if len(got) != 1 || got[0] != status.OK {
			w.fail("the read was answered %v under a new lease", got)
		}
		w.settleFor(w.lease)
		read()
		w.settleFor(w.lease)
		w.step(&Fence{Why: "another writer", Fenced: true})
		if len(got) != 2 || got[1] != status.Fenced {
			w.fail("the read was answered %v after the fence", got)
		}
	}
}

// The same of what no store is asked for: a flush of nothing, a trim and a zeroing
// where nothing is allocated. A newer writer may have been told that it serves.
// Guard: doneLeased. Seed 5130736 of chaos/sim flushed so.
func TestNothingIsAnsweredWithoutALeaseOrAStore(t *testing.T) {
	ops := map[string]Op{"flush": {Kind: OpFlush}, "trim": {Kind: OpTrim, Off: 2 * testChunk, Len: testChunk}, "zero": {Kind: OpZero, Off: 2 * testChunk, Len: testChunk},
		"zero, durably": {Kind: OpZero, FUA: true, Off: 2 * testChunk, Len: testChunk}}
	for name, op := range ops {
		for seed := range uint64(10) {
			w := filled(t, seed, 4)
			w.lease = 200e6
			w.serving()
			w.must(2, 2)
			w.until("durable", func() bool { return !w.e.dirty() && !w.e.flush.running })
			w.keep = func(i int, q *wire.Request) bool { return q.Kind == wire.Stat }
			w.settleFor(w.lease)
			var got []status.Kind
			do := func() {
				o := op
				w.do(&o, func(k status.Kind) { got = append(got, k) })
			}
			do()
			w.settleFor(w.lease)
			if len(got) != 0 {
				w.fail("%s: answered %v after the lease", name, got)
			}
			w.step(&Lease{Until: w.now + w.lease})
			if len(got) != 1 || got[0] != status.OK {
				w.fail("%s: answered %v under a new lease", name, got)
			}
			w.settleFor(w.lease)
			do()
			w.settleFor(w.lease)
			w.step(&Fence{Why: "another writer", Fenced: true})
			if len(got) != 2 || got[1] != status.Fenced {
				w.fail("%s: answered %v after the fence", name, got)
			}
		}
	}
}

// Trap: acknowledging before an exclusion is committed. With a member gone, the
// write is answered only after metadata has put the member out.
// Guard: excluded, not exclude, takes the member out of job.need.
func TestNoAcknowledgementBeforeTheExclusionIsCommitted(t *testing.T) {
	for seed := range uint64(50) {
		w := newWorld(t, seed)
		w.attach()
		w.write(1, 1)
		w.until("the first write", w.idle)
		w.until("all in sync", w.allInSync)
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && q.Kind == wire.Write }
		w.do(&Op{Kind: OpWrite, Off: ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(k status.Kind) {
			if k != status.OK || w.vol.Members[2].InSync {
				w.fail("answered %v while the missing member counts as in-sync: %v", k, w.vol.Members[2].InSync)
			}
		})
		w.until("sent", func() bool { return len(w.kept) > 0 })
		w.fall(2)
		w.until("the second write", w.idle)
	}
}

// joining is a volume whose first member, the local one, is catching up and is
// kept from getting its copies.
func joining(t *testing.T, seed uint64) *world {
	w := filled(t, seed, 4)
	w.fall(0)
	w.write(2, 50)
	w.until("excluded", func() bool { return !w.vol.Members[0].InSync && w.idle() })
	w.keep = func(i int, q *wire.Request) bool { return i == 0 && q.Kind == wire.Install }
	w.fall(0)
	w.until("joining", func() bool { return len(w.kept) > 0 })
	return w
}

// Trap: counting a joining replica early. It serves no reads, and its acceptance
// acknowledges nothing.
// Guards: readable and job.need ask for in-sync.
func TestAJoiningReplicaDoesNotCount(t *testing.T) {
	for seed := range uint64(50) {
		w := joining(t, seed)
		w.must(2, 50)
		w.keep = func(i int, q *wire.Request) bool { return i != 0 || q.Kind == wire.Install }
		op := w.write(3, 60)
		w.until("accepted by the joiner", func() bool { return w.stores[0].blocks[w.key(3)].en.Version.Counter() == 6 })
		for range 20 {
			w.deliver()
		}
		if w.done[op] == nil {
			w.fail("a write was acknowledged that only the joiner has")
		}
		w.release()
		w.until("in sync and idle", func() bool { return w.allInSync() && w.idle() })
		w.same()
	}
}

// Trap: rebuild racing writes. A copy that comes late does not undo what was
// written since the join began.
// Guard: the limit of a transfer's Install is J.
func TestALateCopyDoesNotUndoAWrite(t *testing.T) {
	for seed := range uint64(50) {
		w := joining(t, seed)
		w.write(2, 70)
		w.until("written", func() bool { return w.idle() && w.stores[0].blocks[w.key(2)].en.Version.Counter() == 6 })
		w.release()
		w.until("in sync", w.allInSync)
		w.must(2, 70)
		w.same()
	}
}

// Trap: same epoch but a lost or restored disk. A store that comes back as
// another incarnation is not the one that was in sync.
// Guard: the incarnation check of seal.
func TestALostDiskIsNotInSync(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		s := w.stores[0]
		s.incarnation, s.blocks, s.durable = 2, map[blockKey]memBlock{}, map[blockKey]memBlock{}
		w.restart(0)
		w.must(2, 2)
		w.until("in sync", w.allInSync)
		w.must(2, 2)
		w.same()
	}
}

// Trap: power loss of an in-sync member before the floor. What it accepted and
// lost is not read from it.
// Guard: the FlagIntact check of seal, while serving.
func TestAMemberThatLostPowerIsNotRead(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.e.cfg.Flush = 1 << 60
		w.write(2, 50)
		w.until("written", w.idle)
		if w.e.dirty() { // a FUA write would have made it durable
			w.stores[0].loseVolatile(func() bool { return false })
			w.restart(0)
		}
		w.must(2, 50)
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// Trap: the same at attach: two members lost power, the one that did not is
// away. The attach waits for it, and does not promote a stale copy (P5).
// Guard: insufficient asks for a member that is intact, or for all.
func TestAttachWaitsForWhoHoldsEverything(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.e.cfg.Flush = 1 << 60
		w.write(2, 50)
		w.until("written", w.idle)
		w.life++
		for i, s := range w.stores {
			s.up = i != 1
			if i != 1 {
				s.loseVolatile(func() bool { return false })
			}
		}
		w.attach()
		w.settleFor(4 * w.e.cfg.SealWait)
		if w.e.State() != Attaching || w.e.Info().Why == "" {
			w.fail("it serves without the member that holds everything")
		}
		w.fall(1)
		w.until("serving", func() bool { return w.e.State() == Serving })
		w.must(2, 50)
	}
}

// Trap: reading a write in flight. What a read has seen of it is not told before
// the write is acknowledged.
// Guard: answerRead waits for jobs issued before the data came.
func TestAWriteInFlightIsNotRead(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.keep = only(0)
		write := w.do(&Op{Kind: OpWrite, Off: 2 * ids.BlockSize, Len: ids.BlockSize, Data: bytes.Repeat([]byte{99}, ids.BlockSize)}, w.ok("write"))
		w.until("at one member", func() bool { return len(w.kept) == 2 && w.stores[0].blocks[w.key(2)].en.Version.Counter() == 5 })
		w.do(&Op{Kind: OpRead, Off: 2 * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, func(status.Kind) {
			if w.done[write] != nil {
				w.fail("a read was answered before the write it may have seen")
			}
		})
		for range 60 {
			w.deliver()
		}
		w.release()
		w.until("answered", w.idle)
	}
}

// Trap: sub-4K read-modify-write races. Two writes of parts of one block, in
// flight together, both last.
// Guard: start lets a merge wait for what overlaps.
func TestPartsOfABlockWrittenTogetherBothLast(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		for i := range 8 {
			op := &Op{Kind: OpWrite, Off: 2*ids.BlockSize + uint64(i)*512, Len: 512, Data: bytes.Repeat([]byte{byte(10 + i)}, 512)}
			w.do(op, w.ok("write"))
		}
		w.until("written", w.idle)
		op := &Op{Kind: OpRead, Off: 2 * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		w.do(op, w.ok("read"))
		w.until("read", w.idle)
		for i := range 8 {
			if op.Data[i*512] != byte(10+i) {
				w.fail("part %d reads %d", i, op.Data[i*512])
			}
		}
	}
}

// Trap: retrying a failed flush. A member whose flush failed is not asked again
// over a new connection, though too few would be left to exclude it at once: the
// client's flush waits until another has caught up, and is done without it.
// Guard: replica.doubt, set where a flush fails.
func TestAFailedFlushIsNotTriedAgain(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.fall(2)
		w.until("excluded", func() bool { return !w.vol.Members[2].InSync })
		w.e.cfg.Flush = 1 << 60
		w.do(&Op{Kind: OpWrite, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}, w.ok("write"))
		w.until("written", func() bool { return w.idle() && !w.e.flush.running })
		failed := false
		w.stores[1].tamper = func(q *wire.Request, r *wire.Reply) {
			if q.Kind == wire.Flush && !failed {
				failed = true
				r.Status = status.IO
			}
		}
		op := w.do(&Op{Kind: OpFlush}, w.ok("flush"))
		w.settleFor(6 * bounceEvery)
		if !failed || w.done[op] == nil {
			w.fail("the flush was answered though a member that is in sync failed it")
		}
		w.fall(2)
		w.until("flushed", w.idle)
		if w.vol.Members[1].InSync && w.e.Info().Stats.Excluded < 2 {
			w.fail("the member whose flush failed was never excluded")
		}
		w.until("in sync", w.allInSync)
	}
}

// Trap: an unknown outcome when a Raft leader falls. A member whose addition may
// have happened stays required until it is known, though it is gone again.
// Guard: abortJoin keeps a joiner whose addition was asked for.
func TestAnAdditionOfUnknownOutcomeKeepsTheMemberRequired(t *testing.T) {
	for seed := range uint64(50) {
		w := joining(t, seed)
		w.hold = func(m *MetaCall) bool { return m.Change != nil }
		w.release()
		w.until("asked for", func() bool { return w.e.member.adding != nil })
		call := w.e.member.call
		w.fall(0)
		if r := w.change(call.Change.Changes[0]); r.Status != 0 { // it happens …
			w.fail("not added: %v", r)
		}
		w.step(&MetaDone{Call: call, Err: status.Errorf(status.Unknown, "leadership lost")}) // … and nobody knows
		op := w.write(2, 90)
		w.settleFor(4 * metaRetry)
		if w.done[op] == nil {
			w.fail("a write was acknowledged that a member lacks which metadata counts as in-sync")
		}
		w.hold = nil
		w.meta(w.e.member.call)
		w.until("written", w.idle)
		w.fall(0)
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// Trap: a member that metadata made in-sync behind the engine's back is excluded
// before anything more is acknowledged.
// Guard: adoptMembers.
func TestAMemberAddedUnknownToTheEngineIsExcluded(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.fall(0)
		w.write(2, 50)
		w.until("excluded", func() bool { return !w.vol.Members[0].InSync && w.idle() })
		w.until("quiet", func() bool { return !w.e.metaBusy() })
		w.change(&pb.MemberChange{Epoch: w.vol.Epoch, Revision: w.vol.Revision, Add: w.stores[0].id[:], AddIncarnation: 1})
		w.step(&Refresh{Volume: w.known()})
		w.write(2, 60) // checks that in-sync members have it
		w.until("written", w.idle)
		w.fall(0)
		w.until("in sync", w.allInSync)
		w.same()
	}
}

// Trap: double attach. Once the second gateway serves, the first answers nothing
// with OK, and writes of the first change nothing.
// Guard: replies ends the engine when a store says Fenced.
func TestOnlyTheLastAttachAnswers(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		first := w.e
		var lateReqs []Send
		w.serving()
		var out Out
		op := &Op{Kind: OpWrite, Off: 2 * ids.BlockSize, Len: ids.BlockSize, Data: bytes.Repeat([]byte{99}, ids.BlockSize)}
		first.Step(w.now, &Submit{[]*Op{op}}, &out)
		lateReqs = append(lateReqs, out.Sends...)
		if len(lateReqs) != testStores {
			w.fail("the first gateway sent %d requests", len(lateReqs))
		}
		out = Out{}
		for _, s := range lateReqs {
			rep := w.stores[s.Replica].do(s.Req)
			first.Step(w.now, &Replies{s.Replica, s.Gen, []*wire.Reply{rep}}, &out)
		}
		if len(out.Done) != 1 || out.Done[0].Status != status.Fenced || first.State() != Ended {
			w.fail("the first gateway is %v and answered %v", first.State(), out.Done)
		}
		w.must(2, 2)
	}
}

// Trap: a floor that one member logs before all are durable. The attach is cut
// off between two members' settling, the unsettled one loses power; the next
// attach must still see what it lacks.
// Guard: flushAttach flushes everywhere before it settles anybody.
func TestAFloorIsNotLoggedBeforeAllAreDurable(t *testing.T) {
	for seed := range uint64(50) {
		w := leftBehind(t, seed, 0, 99)
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && (q.Kind == wire.Flush || q.Kind == wire.Settle) }
		w.attach()
		w.until("flushing", func() bool { return w.e.attach != nil && w.e.attach.phase >= attachFlush && len(w.kept) > 0 })
		for range 60 {
			w.deliver()
		}
		w.life++ // the gateway dies here
		w.kept, w.keep = nil, nil
		w.stores[2].loseVolatile(func() bool { return false })
		w.serving()
		w.same()
	}
}

// Trap: counting a joiner before it is durable. The moment it is in-sync for
// metadata, everything flushed is durable on it.
// Guards: settleJoin before the addition, and answeredUpTo before that.
func TestAJoinerIsDurableBeforeItCounts(t *testing.T) {
	for seed := range uint64(50) {
		w := joining(t, seed)
		w.keep = func(i int, q *wire.Request) bool { return i == 0 && (q.Kind == wire.Install || q.Kind == wire.Write) }
		w.write(3, 60)
		w.flush()
		w.until("flushed", func() bool { return w.idle() && len(w.kept) > 1 })
		w.pending, w.kept = append(w.pending, w.kept[0]), w.kept[1:] // the copy
		w.keep = func(i int, q *wire.Request) bool { return i == 0 && q.Kind == wire.Write }
		w.settleFor(w.e.cfg.Stall / 2)
		if w.vol.Members[0].InSync {
			w.fail("it was added with a write outstanding")
		}
		w.release()
		w.until("added", func() bool { return w.vol.Members[0].InSync })
		for b, v := range map[uint64]byte{0: 4, 1: 3, 2: 50, 3: 60} {
			if d := w.stores[0].durable[w.key(b)].data; len(d) == 0 || d[0] != v {
				w.fail("block %d is not durable on the new member", b)
			}
		}
	}
}
