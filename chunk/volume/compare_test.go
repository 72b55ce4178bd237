package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/wire"
)

// What a disk has lost without a trace is found by comparing copies, and given
// back from whichever has the newest; writes that come meanwhile stay, and a
// block whose newest copy cannot be read is an error, not an older one.
func TestComparingFindsWhatADiskHasLost(t *testing.T) {
	for seed := range uint64(100) {
		w := filled(t, seed, 8)
		older := map[uint64]memBlock{} // as the first writes left them
		for b := range uint64(8) {
			older[b] = w.stores[0].blocks[w.key(b)]
			w.write(b, byte(50+b))
		}
		w.until("written", w.idle)
		w.write(6, 0)
		w.until("zeroed", w.idle)
		delete(w.stores[0].blocks, w.key(1)) // never written there
		w.stores[1].blocks[w.key(1)] = older[1]
		w.stores[2].blocks[w.key(2)] = older[2]
		w.stores[1].blocks[w.key(6)] = older[6] // the tombstone is lost
		w.stores[0].blocks[w.key(3)] = older[3]
		w.stores[1].bad[w.key(3)], w.stores[2].bad[w.key(3)] = true, true
		w.stores[2].blocks[w.key(4)] = older[4] // and is overwritten meanwhile
		w.e.compareAt = w.now
		w.step(&Tick{})
		for range w.rng.IntN(10) {
			w.deliver()
		}
		w.write(4, 99)
		w.write(5, 98)
		w.until("compared", func() bool { w.step(&Tick{}); return w.idle() && w.e.compare == nil })
		want := map[uint64]byte{0: 50, 1: 51, 2: 52, 4: 99, 5: 98, 7: 57}
		for i, s := range w.stores {
			for b, v := range want {
				if got := s.blocks[w.key(b)]; got.en.Kind != wire.EntryData || got.data[0] != v {
					w.fail("store %d: block %d holds %v, not %d", i, b, got.en, v)
				}
			}
			if got := s.blocks[w.key(6)].en.Kind; got != wire.EntryZero {
				w.fail("store %d: trimmed block 6 is of kind %d", i, got)
			}
		}
		if got := w.stores[0].blocks[w.key(3)].en.Kind; got != wire.EntryPoison {
			w.fail("a block without a good copy is of kind %d on the store that had an older one", got)
		}
		if n := w.e.stats.Stale; n < 5 || n > 6 { // block 4 may have been overwritten first
			w.fail("%d blocks counted as lost", n)
		}
	}
}
