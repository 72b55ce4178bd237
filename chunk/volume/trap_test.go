package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// Trap: acknowledging before an exclusion is committed. With a member gone, the
// write is answered only after metadata has put the member out.
func TestNoAcknowledgementBeforeTheExclusionIsCommitted(t *testing.T) {
	for seed := range uint64(50) {
		w := newWorld(t, seed)
		w.attach()
		w.write(1, 1)
		w.until("the first write", func() bool { return len(w.done) == 0 })
		w.until("all in sync", w.allInSync)
		w.fall(2)
		op := &Op{Kind: OpWrite, Off: ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
		w.done[op] = func(k status.Kind) {
			if k != status.OK || w.vol.Members[2].InSync {
				t.Fatalf("seed %d: answered %v while the missing member counts as in-sync: %v", seed, k, w.vol.Members[2].InSync)
			}
		}
		w.step(&Submit{[]*Op{op}})
		w.until("the second write", func() bool { return len(w.done) == 0 })
	}
}
