package volume

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/wire"
)

// benchEngine is a serving engine whose stores answer at once and keep nothing:
// what is measured is the engine.
type benchEngine struct {
	e       *Engine
	out     Out
	now     time.Duration
	replies [testStores][]*wire.Reply
	pool    []*wire.Reply
	data    []byte
}

func newBench(b *testing.B, depth int) *benchEngine {
	v := &pb.Volume{Id: 1, Name: "v", SizeBytes: 64 << 20, ChunkBytes: 64 << 20, Epoch: 1, Revision: 1}
	c := &pb.Chunk{Index: 0, Id: 1}
	for i := range testStores {
		id := ids.StoreID{byte(i + 1)}
		v.Members = append(v.Members, &pb.Member{Store: id[:], Incarnation: 1, Host: string(rune('a' + i)), InSync: true})
		c.Stores = append(c.Stores, id[:])
	}
	x := &benchEngine{data: make([]byte, maxPieceBlock*ids.BlockSize)}
	e, err := New(0, Config{Host: "a", Volume: v, Chunks: []*pb.Chunk{c}}, &x.out)
	if err != nil {
		b.Fatal(err)
	}
	x.e = e
	for i := range testStores {
		x.step(&Up{i, 1})
	}
	x.step(&Lease{1 << 60})
	for e.State() != Serving {
		x.answer()
	}
	return x
}

func (x *benchEngine) step(ev Event) { x.e.Step(x.now, ev, &x.out) }

// answer lets every store answer what it was sent, in one batch each.
func (x *benchEngine) answer() {
	for _, s := range x.out.Sends {
		if len(x.pool) == 0 {
			x.pool = append(x.pool, &wire.Reply{})
		}
		n := len(x.pool) - 1
		r := x.pool[n]
		x.pool = x.pool[:n]
		*r = wire.Reply{Kind: s.Req.Kind, ID: s.Req.ID, Incarnation: 1, Flags: wire.FlagIntact}
		if s.Req.Kind == wire.Read {
			r.Data = x.data[:int(s.Req.Count)*ids.BlockSize]
			if len(s.Req.Into) > 0 {
				r.Data = s.Req.Into
			}
		}
		x.replies[s.Replica] = append(x.replies[s.Replica], r)
	}
	x.out.Reset()
	for i := range x.replies {
		if rs := x.replies[i]; len(rs) > 0 {
			x.replies[i] = nil
			x.step(&Replies{i, 1, rs})
			x.pool = append(x.pool, rs...)
			x.replies[i] = append(rs[:0], x.replies[i]...)
		}
	}
}

// run keeps depth operations of one block in flight.
func (x *benchEngine) run(b *testing.B, kind OpKind, depth int) {
	ops := make([]*Op, depth)
	for i := range ops {
		ops[i] = &Op{Data: make([]byte, ids.BlockSize)}
	}
	block := uint64(0)
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; {
		for _, op := range ops {
			block = (block*1103515245 + 12345) % (64 << 20 / ids.BlockSize)
			data := op.Data
			*op = Op{Kind: kind, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: data}
		}
		x.step(&Submit{ops})
		for left := depth; left > 0; {
			x.now += 100 * time.Microsecond
			x.answer()
			left -= len(x.out.Done)
		}
		done += depth
	}
}

// The figure of a write includes its checksum: compare BenchmarkSum.
func BenchmarkWrite4kDepth32(b *testing.B) { newBench(b, 32).run(b, OpWrite, 32) }
func BenchmarkZero4kDepth32(b *testing.B)  { newBench(b, 32).run(b, OpZero, 32) }
func BenchmarkRead4kDepth32(b *testing.B)  { newBench(b, 32).run(b, OpRead, 32) }
func BenchmarkWrite4kDepth1(b *testing.B)  { newBench(b, 1).run(b, OpWrite, 1) }

func BenchmarkSum(b *testing.B) {
	data := make([]byte, ids.BlockSize)
	for i := range b.N {
		wire.BlockSum(1, 1, 0, 1, ids.Version(i), data)
	}
}
