package volume

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// leaseless is a filled volume whose lease is over and which metadata answers
// nothing any more.
func leaseless(t *testing.T, seed uint64) *world {
	w := filled(t, seed, 4)
	w.lease = 200 * time.Millisecond
	w.serving()
	w.until("durable", func() bool { return !w.e.dirty() && !w.e.flush.running })
	w.hold = func(*MetaCall) bool { return true }
	w.settleFor(w.lease)
	return w
}

// peek reads a block and notes the answer.
func (w *world) peek(block uint64, got *[]status.Kind) *Op {
	op := &Op{Kind: OpRead, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	return w.do(op, func(k status.Kind) { *got = append(*got, k) })
}

// stats counts the confirmations that reached a member.
func (s *memStore) stats() (n int) {
	for i := range s.log {
		if s.log[i].Kind == wire.Stat {
			n++
		}
	}
	return n
}

// Without metadata reads go on: the members confirm them, one round for all
// that have their data when it begins.
func TestMembersConfirmReadsWithoutALease(t *testing.T) {
	for seed := range uint64(50) {
		w := leaseless(t, seed)
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && q.Kind == wire.Stat }
		var got []status.Kind
		ops := []*Op{w.peek(0, &got)}
		w.until("a round", func() bool { return len(w.kept) == 1 })
		for b := uint64(1); b < 4; b++ {
			ops = append(ops, w.peek(b, &got))
		}
		ops = append(ops, w.peek(testChunk/ids.BlockSize, &got)) // never written
		w.until("all but the confirmation", func() bool { return len(w.e.leaseHeld) == 4 && w.e.confirm.need == 1 })
		if len(got) != 0 {
			w.fail("a member was not asked, and reads were answered %v", got)
		}
		w.release()
		w.until("read", w.idle)
		for i, k := range got {
			if want := []byte{4, 3, 2, 1, 0}[i]; k != status.OK || ops[i].Data[0] != want {
				w.fail("read %d was answered %v with %d, want %d", i, k, ops[i].Data[0], want)
			}
		}
		for i, s := range w.stores {
			if n := s.stats(); n != 2 {
				w.fail("member %d was asked %d times for 1 read and then 4", i, n)
			}
		}
		if n := w.e.Info().Stats.Confirmed; n != 5 {
			w.fail("%d reads were confirmed", n)
		}
	}
}

// Trap: a read is invoked after a newer epoch serves, while a round that this
// epoch's sealed member has answered before is still under way.
// Guard: a round answers only reads that had their data when it began.
func TestAConfirmationFromBeforeTheReadDoesNotCount(t *testing.T) {
	for seed := range uint64(50) {
		w := leaseless(t, seed)
		w.keep = func(i int, q *wire.Request) bool { return i == 2 && q.Kind == wire.Stat }
		var early, late []status.Kind
		w.peek(1, &early)
		w.until("one answer outstanding", func() bool { return len(w.kept) == 1 && w.e.confirm.need == 1 })
		w.stores[1].epoch = ids.Epoch(w.vol.Epoch + 1) // the others are excluded, and it serves
		w.peek(1, &late)
		w.until("its data", func() bool { return len(w.e.leaseHeld) == 1 })
		w.release()
		w.until("answered", w.idle)
		if early[0] != status.OK || late[0] != status.Fenced {
			w.fail("the read from before the takeover was answered %v, the one after it %v", early[0], late[0])
		}
	}
}

// Trap: a newer epoch has sealed one member only, which this one does not reach.
// Guard: every required member is asked.
func TestEveryRequiredMemberConfirms(t *testing.T) {
	for seed := range uint64(50) {
		w := leaseless(t, seed)
		w.stores[1].epoch = ids.Epoch(w.vol.Epoch + 1)
		w.fall(1)
		var got []status.Kind
		w.peek(1, &got)
		w.settleFor(3 * time.Second)
		if len(got) != 0 {
			w.fail("answered %v without the member that another epoch has sealed", got)
		}
		w.fall(1)
		w.until("answered", w.idle)
		if got[0] != status.Fenced {
			w.fail("answered %v by a fenced writer", got[0])
		}
	}
}

// Trap: the only member that a newer epoch sealed is one whose addition this one
// does not know to have happened.
// Guard: such a member is required.
func TestAMemberOfUnknownAdditionConfirms(t *testing.T) {
	for seed := range uint64(50) {
		w := filled(t, seed, 4)
		w.lease = 1500 * time.Millisecond
		w.serving()
		w.fall(1)
		w.write(1, 50)
		w.until("excluded", func() bool { return !w.vol.Members[1].InSync && w.idle() })
		asked := false
		w.hold = func(m *MetaCall) bool {
			asked = asked || m.Change != nil && len(m.Change.Changes[0].Add) > 0
			return asked
		}
		w.fall(1)
		w.until("its addition is asked for", func() bool { return asked })
		w.settleFor(w.lease)
		w.stores[1].epoch = ids.Epoch(w.vol.Epoch + 1)
		var got []status.Kind
		w.peek(1, &got)
		w.until("answered", w.idle)
		if got[0] != status.Fenced {
			w.fail("answered %v by a fenced writer", got[0])
		}
	}
}

// A volume of which no chunk is known, or only what a shrink may have cut away,
// has nothing that an attach must seal: its reads wait for a lease.
func TestReadsOfAnEmptyVolumeWaitForALease(t *testing.T) {
	for _, chunk := range []uint64{0, 1} {
		for seed := range uint64(20) {
			w := newWorld(t, seed)
			w.serving()
			if chunk > 0 {
				w.write(testChunk/ids.BlockSize, 1)
				w.until("written", w.idle)
			}
			w.lease = 200 * time.Millisecond
			w.serving()
			w.until("durable", func() bool { return !w.e.dirty() && !w.e.flush.running })
			w.step(&Limit{testChunk})
			w.settleFor(w.lease)
			var got []status.Kind
			w.peek(0, &got)
			w.settleFor(time.Second)
			if len(got) != 0 {
				w.fail("answered %v", got)
			}
			w.step(&Lease{Until: w.now + w.lease})
			if len(got) != 1 || got[0] != status.OK {
				w.fail("answered %v with a lease", got)
			}
		}
	}
}
