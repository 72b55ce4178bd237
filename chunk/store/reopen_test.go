package store

import (
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// A store that falls again and again, each time soon after it was opened, leaves
// a short segment behind each time, with nothing dead in it. They must not stop
// compaction, and it must not run out of segments to open with.
func TestManyShortLives(t *testing.T) {
	d := formatMem(t)
	for life := range uint64(150) {
		s := open(t, d, testBoot)
		mustOK(t, ask(s, put(1, ids.Block(3*life), 3, ids.MakeVersion(1, life+1), life)))
		d = d.Crash(life, 100)
	}
	s := open(t, d, testBoot)
	rep := mustOK(t, ask(s, wire.Request{Kind: wire.List, Volume: 1, Epoch: 1, Chunk: 1, Count: 450}))
	if len(rep.Entries) != 450 {
		t.Fatalf("%d of 450 blocks are left", len(rep.Entries))
	}
}
