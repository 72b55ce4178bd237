package volume

import (
	"testing"
)

// No block is lost, invented or turned back while stores fall and return and
// gateways die with writes in flight; in the end all members are in sync and
// hold the same.
func TestStoresFallAndGatewaysDie(t *testing.T) {
	for seed := range uint64(300) {
		w := newWorld(t, seed)
		w.flaky = seed%2 == 1
		w.attach()
		val := byte(0)
		for range 60 {
			val = w.someLoad(val)
			for range w.rng.IntN(40) {
				w.deliver()
			}
			switch w.rng.IntN(10) {
			case 0:
				w.fall(w.rng.IntN(testStores))
			case 1:
				w.attach() // unanswered writes may or may not be there
			}
		}
		w.converge()
	}
}

// The same, with everything else that can happen to a store: it hangs, is full,
// loses power, alone or with all others.
func TestAnythingHappens(t *testing.T) {
	for seed := range uint64(700) {
		w := newWorld(t, seed)
		w.flaky = seed%2 == 1
		w.attach()
		val := byte(0)
		for range 80 {
			val = w.someLoad(val)
			for range w.rng.IntN(60) {
				w.deliver()
			}
			switch i := w.rng.IntN(testStores); w.rng.IntN(16) {
			case 0, 1:
				w.fall(i)
			case 2:
				w.hang(i)
			case 3:
				w.attach()
			case 4:
				w.stores[i].full = !w.stores[i].full
			case 5:
				w.powerLoss(i)
			case 6:
				if w.rng.IntN(4) == 0 {
					for i := range w.stores {
						w.powerLoss(i)
					}
				}
			case 7:
				w.settleFor(3 * w.e.cfg.Stall)
			case 8, 9, 10:
				w.heal()
				w.settleFor(w.e.cfg.Stall)
			}
			if w.e.State() == Ended {
				w.attach()
			}
		}
		w.converge()
	}
}

// powerLoss takes a store away as a power cut does.
func (w *world) powerLoss(i int) {
	s := w.stores[i]
	if s.up {
		w.fall(i)
	}
	s.loseVolatile(func() bool { return w.rng.IntN(2) == 0 })
	w.checkPower()
}

// checkPower: when no in-sync member is left that lost nothing, what was not
// flushed may be gone.
func (w *world) checkPower() {
	for i, m := range w.vol.Members {
		if m.InSync && w.stores[i].intact {
			return
		}
	}
	w.lostPower()
}

// converge heals everything: the volume serves, all members are in sync and the
// same, and every block holds what it may.
func (w *world) converge() {
	w.t.Helper()
	w.whole()
	w.readAll()
	w.until("read", w.idle)
	w.same()
}

// whole heals everything and waits until all members are in sync.
func (w *world) whole() {
	w.t.Helper()
	w.heal()
	w.until("in sync and idle", func() bool {
		if w.e.State() == Ended {
			w.attach()
		}
		return w.e.State() == Serving && w.allInSync() && w.idle()
	})
}
