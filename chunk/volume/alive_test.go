package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

// two is a volume of two replicas with a few blocks written, flushed or not.
func two(t *testing.T, seed uint64) *world {
	w := newWorld(t, seed)
	w.addStores(2)
	w.serving()
	for b := range uint64(4) {
		w.write(b, byte(10+b))
		w.until("written", w.idle)
	}
	return w
}

// silent takes a machine's power: nothing says so, and what was not flushed is
// gone. Only a new connection will show it.
func (w *world) silent(i int) {
	w.hang(i)
	w.stores[i].loseVolatile(func() bool { return w.rng.IntN(2) == 0 })
}

// back lets the machine that was silent start again.
func (w *world) back(i int) {
	s := w.stores[i]
	s.hung, s.held = false, nil // what was sent to it is lost
	w.step(&Down{i, s.gen, "no byte after a ping"})
	w.connect(i)
}

// Trap: the last good copy is excluded for a lesser fault while the other, whose
// machine has lost its power, looks as good as ever: nothing has been asked of it.
// Whatever comes back first, and without anybody's help, everything acknowledged
// is there.
// Guard: mayPropose.
func TestTheLastGoodCopyIsNotExcluded(t *testing.T) {
	for seed := range uint64(100) {
		w := two(t, seed)
		w.until("idle links", func() bool { return w.e.replicas[0].busy == 0 && !w.e.flush.running })
		dead, kept := int(seed%2), int(1-seed%2)
		w.silent(dead)
		w.fall(kept) // its process ends
		w.settleFor(w.e.cfg.Stall / 2)
		if len(w.metas) != 0 {
			w.fail("the last good copy was excluded: %v", w.metas)
		}
		if seed%4 < 2 {
			w.back(dead)
			w.settleFor(w.e.cfg.Stall)
			w.fall(kept)
		} else {
			w.fall(kept)
			w.settleFor(w.e.cfg.Stall)
			w.back(dead)
		}
		w.until("in sync", w.allInSync)
		for b := range uint64(4) {
			w.must(b, byte(10+b))
		}
		w.same()
	}
}

// The same while a volume is attached: the member that was sealed is asked again
// before the one that was not reached is excluded.
// Guard: stillThere.
func TestAnAttachKeepsTheLastGoodCopy(t *testing.T) {
	for seed := range uint64(100) {
		w := two(t, seed)
		dead, kept := int(seed%2), int(1-seed%2)
		w.stores[kept].hung = true // it is slow to answer the seal
		w.attach()
		w.until("one is sealed", func() bool { return w.e.replicas[dead].sealed })
		w.silent(dead)
		w.settleFor(w.e.cfg.SealWait + w.e.cfg.Stall/4)
		if len(w.metas) != 0 {
			w.fail("the last good copy was excluded: %v", w.metas)
		}
		w.hang(kept)
		w.back(dead)
		w.until("serving", func() bool { return w.e.State() == Serving })
		w.until("in sync", w.allInSync)
		for b := range uint64(4) {
			w.must(b, byte(10+b))
		}
		w.same()
	}
}

// One of two fails and the other is there: the exclusion takes one question more,
// and writes go on. When the other one's connection breaks under that question,
// the next one is the question.
func TestAnExclusionAsksFirst(t *testing.T) {
	for seed := range uint64(50) {
		w := two(t, seed)
		w.until("idle links", func() bool { return w.e.replicas[0].busy == 0 && !w.e.flush.running })
		w.fall(1)
		if seed%2 == 0 {
			w.restart(0)
		}
		w.do(&Op{Kind: OpWrite, Off: 0, Len: 4096, Data: make([]byte, 4096)}, func(k status.Kind) {
			if k != status.OK {
				w.fail("the write ends with %v", k)
			}
		})
		w.until("written", w.idle)
		if len(w.metas) != 1 || w.vol.Members[1].InSync {
			w.fail("it was not excluded: %v", w.metas)
		}
		w.fall(1)
		w.until("in sync", w.allInSync)
		w.same()
	}
}
