package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/wire"
)

// Blocks a scrub has found bad are repaired although nobody reads them, from
// whichever replica has a good copy; one that is bad everywhere stays an error;
// a write that comes meanwhile stays.
func TestWhatAScrubFindsIsRepaired(t *testing.T) {
	for seed := range uint64(60) {
		w := filled(t, seed, 8)
		for i, blocks := range [][]uint64{{1, 5, 7}, {3, 7}, {7}} {
			for _, b := range blocks {
				w.stores[i].bad[w.key(b)] = true
			}
			w.stores[i].tells = true
		}
		w.now += damageEvery
		w.step(&Tick{})
		for range w.rng.IntN(12) {
			w.deliver()
		}
		w.write(5, 99)
		w.until("repaired", func() bool { return w.idle() && len(w.stores[0].bad) == 1 && len(w.stores[1].bad) == 1 })
		for _, s := range w.stores {
			if !s.bad[w.key(7)] {
				w.fail("a block that is bad everywhere was repaired from nowhere")
			}
		}
		for i, s := range w.stores {
			if got := s.blocks[w.key(5)].data[0]; got != 99 {
				w.fail("store %d: block 5 holds %d: a repair has undone a write", i, got)
			}
			if en := s.blocks[w.key(1)].en; en.Kind != wire.EntryData || s.blocks[w.key(1)].data[0] != 7 {
				w.fail("store %d: block 1 holds %v", i, en)
			}
		}
		for _, r := range w.e.replicas {
			w.until("at rest", func() bool { return r.repairing == 0 })
		}
	}
}
