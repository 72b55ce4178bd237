package store

import (
	"fmt"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// What a 4 KiB read costs by the length of its chain, and by where the block is:
// in the top, or in the oldest layer below as many others that have the chunk.
func BenchmarkChainRead(b *testing.B) {
	for _, n := range []int{1, 8, 60} {
		for _, where := range []string{"top", "bottom"} {
			b.Run(fmt.Sprintf("layers=%d/%s", n, where), func(b *testing.B) { benchChain(b, n, where == "bottom") })
		}
	}
}

func benchChain(b *testing.B, n int, bottom bool) {
	d := disk.NewMem(256 << 20)
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: 1 << 20}); err != nil {
		b.Fatal(err)
	}
	s := open(b, d, testBoot)
	const chunks, blocks = 64, 8
	put := func(l ids.LayerID, c ids.ChunkID, at ids.Block) {
		mustOK(b, ask(s, layerPut(c, l, at, blocks, ids.MakeVersion(1, uint64(l)+1), 1)))
	}
	for c := ids.ChunkID(1); c <= chunks; c++ {
		for l := range n {
			put(ids.LayerID(l), c, 100) // every layer has something of the chunk, and of the page
		}
		put(0, c, 0)
		if !bottom {
			put(ids.LayerID(n-1), c, 0)
		}
	}
	q := wire.Request{Kind: wire.Read, Volume: 1, Layer: ids.LayerID(n - 1), Count: 1, Into: make([]byte, blockBytes)}
	for l := n - 2; l >= 0; l-- {
		q.Chain = append(q.Chain, ids.LayerID(l))
	}
	list := wire.Request{Kind: wire.Layers, Volume: 1, Layer: ids.LayerID(n - 1)}
	for l := range n {
		list.Entries = append(list.Entries, wire.Entry{Layer: ids.LayerID(l)})
	}
	mustOK(b, ask(s, list))
	sink := &chainSink{}
	reqs := []*wire.Request{&q}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		q.Chunk, q.Block, q.ID = ids.ChunkID(1+i*7%chunks), ids.Block(i%blocks), uint64(i)
		s.Submit(reqs, sink)
	}
	if sink.bad > 0 || sink.good != b.N {
		b.Fatalf("%d of %d reads were not answered well", b.N-sink.good, b.N)
	}
}

type chainSink struct{ good, bad int }

func (k *chainSink) Replies(rs []*wire.Reply) {
	for _, r := range rs {
		if r.Err() != nil {
			k.bad++
		} else {
			k.good++
		}
	}
}
