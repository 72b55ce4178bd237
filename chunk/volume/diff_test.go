package volume

import (
	"slices"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

func TestLayersBetween(t *testing.T) {
	// 0 ← 1 ← 3 (top); 0 ← 2, which a rollback to 0 has left beside
	all := []*pb.Layer{{Id: 0}, {Id: 1, HasParent: true}, {Id: 2, HasParent: true}, {Id: 3, HasParent: true, Parent: 1}}
	at := func(l ids.LayerID) *ids.LayerID { return &l }
	for _, c := range []struct {
		from   *ids.LayerID
		to     ids.LayerID
		differ []ids.LayerID
		ok     bool
	}{
		{at(0), 3, []ids.LayerID{3, 1}, true},
		{at(1), 3, []ids.LayerID{3}, true},
		{at(3), 1, []ids.LayerID{3}, true},
		{at(2), 1, []ids.LayerID{1, 2}, true},
		{at(1), 1, nil, true},
		{nil, 1, []ids.LayerID{1, 0}, true},
		{at(7), 1, nil, false},
		{nil, 7, nil, false},
	} {
		differ, _, ok := Between(all, 3, c.from, c.to)
		if !slices.Equal(differ, c.differ) || ok != c.ok {
			t.Errorf("from %v to %d: %v %v, want %v %v", c.from, c.to, differ, ok, c.differ, c.ok)
		}
	}
}

// A list comes from any replica in sync, says which layer hides which, and is an
// error, not empty, when nobody can be asked.
func TestListOfAChunk(t *testing.T) {
	w := newWorld(t, 5)
	w.serving()
	for _, b := range []uint64{0, 1, 2, 5} {
		w.write(b, 7)
	}
	w.until("the writes", w.idle)
	answers := map[*Op][]status.Kind{}
	zero := &Op{Kind: OpZero, Off: ids.BlockSize, Len: ids.BlockSize}
	w.tally(zero, answers)
	w.until("the zeroing", func() bool { return len(answers[zero]) > 0 })
	list := func(layers, chain []ids.LayerID) Listed {
		t.Helper()
		ev := &List{Layers: layers, Chain: chain}
		var got []Listed
		w.listed = func(l Listed) { got = append(got, l) }
		w.step(ev)
		w.until("the list", func() bool { return len(got) > 0 })
		if len(got) != 1 || got[0].List != ev {
			t.Fatalf("answers: %+v", got)
		}
		return got[0]
	}
	want := []BlockRun{{0, 1, false}, {1, 1, true}, {2, 1, false}, {5, 1, false}}
	if l := list([]ids.LayerID{0}, []ids.LayerID{0}); !slices.Equal(l.Runs, want) || l.Status != status.OK {
		t.Fatalf("listed %+v, want %v", l, want)
	}
	if l := list([]ids.LayerID{1}, []ids.LayerID{1, 0}); len(l.Runs) > 0 || l.Status != status.OK {
		t.Fatalf("of a layer that has nothing: %+v", l)
	}
	l := &listing{ev: &List{Layers: []ids.LayerID{1, 2, 3}, Chain: []ids.LayerID{3, 1}}, entries: map[ids.Block]wire.Entry{}}
	l.take([]wire.Entry{{Layer: 1, Block: 4, Kind: wire.EntryZero}, {Layer: 1, Block: 5, Kind: wire.EntryData}, {Layer: 2, Block: 6, Kind: wire.EntryZero},
		{Layer: 3, Block: 5, Kind: wire.EntryZero}, {Layer: 0, Block: 9, Kind: wire.EntryData}, {Layer: 1, Block: 8}})
	if got, want := l.runs(), []BlockRun{{4, 2, true}, {6, 1, false}}; !slices.Equal(got, want) {
		t.Fatalf("layers hide each other: %v, want %v", got, want)
	}
	w.keep = func(_ int, q *wire.Request) bool { return q.Kind == wire.List } // hung, until their links go
	var got []Listed
	w.listed = func(l Listed) { got = append(got, l) }
	w.step(&List{Layers: []ids.LayerID{0}, Chain: []ids.LayerID{0}})
	for i := range w.e.replicas {
		w.step(&Down{Replica: i, Gen: w.e.replicas[i].gen, Why: "the test"})
	}
	w.until("an answer without replicas", func() bool { return len(got) > 0 })
	if got[0].Status != status.Unavailable || got[0].Why == "" {
		t.Fatalf("without replicas: %+v", got[0])
	}
}
