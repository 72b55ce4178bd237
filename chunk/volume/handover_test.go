package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// handing is a volume whose hand-over has been asked for, and the answer held
// back; a read came after that.
func handing(t *testing.T, seed uint64) (w *world, call *MetaCall, read *Op, got *status.Kind) {
	w = filled(t, seed, 4)
	w.write(1, 41)
	w.hold = func(m *MetaCall) bool {
		if m.HandOver != nil {
			call = m
		}
		return m.HandOver != nil
	}
	w.step(&HandOver{Host: "host-2", Session: "s"})
	w.write(2, 42)
	w.until("asked", func() bool { return call != nil })
	if w.e.dirty() || w.e.inFlight.len > 0 {
		w.fail("asked before everything was flushed")
	}
	got = new(status.Kind)
	*got = status.Internal
	read = &Op{Kind: OpRead, Off: 3 * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	w.do(read, func(k status.Kind) { *got = k })
	w.settleFor(w.e.cfg.Stall / 4)
	if w.done[read] == nil {
		w.fail("a read was answered while the volume may be another's: %s", *got)
	}
	return w, call, read, got
}

// Handed over, the old writer ends and has answered nothing since it asked.
func TestHandedOver(t *testing.T) {
	for seed := range uint64(20) {
		w, call, read, got := handing(t, seed)
		w.hold = nil
		w.vol.Epoch++
		clear(w.done) // what waits is refused, and may be asked again elsewhere
		w.done[read] = func(k status.Kind) { *got = k }
		w.step(&MetaDone{Call: call, Result: &pb.Result{Volume: w.known()}})
		if w.e.State() != Ended || *got == status.OK {
			w.fail("the old writer is %s and answered a read with %s", w.e.State(), *got)
		}
	}
}

// A refusal, or giving up before it was asked, has it serve on; an unknown
// outcome has it wait and ask again.
func TestNotHandedOver(t *testing.T) {
	for seed := range uint64(20) {
		w, call, _, got := handing(t, seed)
		if seed%2 == 0 {
			again := false
			w.hold = func(m *MetaCall) bool { again = again || m.HandOver != nil; return m.HandOver != nil }
			w.step(&MetaDone{Call: call, Err: status.Errorf(status.Unknown, "leadership lost")})
			w.step(&HandOver{}) // too late to give up
			w.until("asked again", func() bool { return again })
			if w.e.State() != Draining || *got == status.OK {
				w.fail("with an unknown outcome it is %s, and a read %s", w.e.State(), *got)
			}
			continue
		}
		w.step(&MetaDone{Call: call, Err: status.Errorf(status.Invalid, "no such host")})
		w.until("served on", w.idle)
		if w.e.State() != Serving || *got != status.OK {
			w.fail("refused, and it is %s; a read %s", w.e.State(), *got)
		}
		w.must(2, 42)
	}
	w := filled(t, 1, 4)
	w.step(&HandOver{Host: "host-2", Session: "s"})
	w.step(&HandOver{})
	w.write(1, 50)
	w.until("written", w.idle)
	if w.e.State() != Serving {
		w.fail("given up, and it is %s", w.e.State())
	}
}

// A hand-over is given up when the volume is another writer's already: the old one
// stays ended, and sends nothing of what its clients have back.
func TestAHandOverGivenUpTooLate(t *testing.T) {
	w := filled(t, 1, 4)
	w.fall(0)
	w.write(1, 41) // waits, so that nothing is asked yet
	w.step(&HandOver{Host: "host-2", Session: "s"})
	clear(w.done)
	w.step(&Fence{Why: "metadata has given the volume to another writer", Fenced: true})
	w.step(&HandOver{})
	if w.e.State() != Ended {
		w.fail("given up after its end, and it is %s", w.e.State())
	}
}
