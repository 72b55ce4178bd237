package volume

import (
	"testing"

	"github.com/cairnstore/cairn/proto/wire"
)

// Of the same write an attach keeps the copy that can be read: a member whose
// block went bad while it was copied gets the good one.
// Guard: better prefers what is not poison.
func TestAnAttachPrefersTheCopyThatCanBeRead(t *testing.T) {
	for seed := range uint64(30) {
		w := filled(t, seed, 4)
		w.write(2, 60)
		w.until("written", func() bool {
			return w.idle() && w.stores[0].blocks[w.key(2)].en.Version == w.stores[1].blocks[w.key(2)].en.Version
		})
		b := w.stores[0].blocks[w.key(2)]
		b.en.Kind, b.en.Sum, b.data = wire.EntryPoison, 0, nil
		w.stores[0].blocks[w.key(2)] = b
		w.serving()
		if got := w.stores[0].blocks[w.key(2)].en.Kind; got != wire.EntryData && w.e.floor > b.en.Version {
			w.fail("the bad copy stayed: kind %d", got)
		}
		w.must(2, 60)
	}
}
