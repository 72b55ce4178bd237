package volume

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const (
	testChunk  = 64 * ids.BlockSize
	testSize   = 4 * testChunk
	testStores = 3
)

// memStore is a reference store: the semantics of proto/wire over a map.
type memStore struct {
	id     ids.StoreID
	epoch  ids.Epoch
	floor  ids.Version
	blocks map[blockKey]memBlock
	up     bool
	gen    uint64
}

type memBlock struct {
	en   wire.Entry
	data []byte
}

func (s *memStore) do(q *wire.Request) *wire.Reply {
	r := &wire.Reply{Kind: q.Kind, ID: q.ID}
	if q.Epoch < s.epoch {
		r.Status, r.Epoch = status.Fenced, s.epoch
		return r
	}
	switch q.Kind {
	case wire.Seal:
		s.epoch = q.Epoch
		r.Flags, r.Floor, r.Incarnation = wire.FlagIntact, s.floor, 1
	case wire.Flush, wire.Settle:
		s.floor = max(s.floor, q.Floor)
	case wire.Write, wire.Zero:
		for i := range q.Count {
			en := wire.Entry{Chunk: q.Chunk, Block: q.Block + ids.Block(i), Version: q.Version, Kind: wire.EntryZero}
			b := memBlock{en: en}
			if q.Kind == wire.Write {
				b.en.Kind, b.en.Sum = wire.EntryData, q.Sums[i]
				b.data = bytes.Clone(q.Data[i*ids.BlockSize : (i+1)*ids.BlockSize])
			}
			k := blockKey{q.Chunk, 0, en.Block}
			if q.Version >= s.blocks[k].en.Version {
				s.blocks[k] = b
			}
		}
	case wire.Read:
		r.Data = make([]byte, int(q.Count)*ids.BlockSize)
		for i := range q.Count {
			k := blockKey{q.Chunk, 0, q.Block + ids.Block(i)}
			b := s.blocks[k]
			copy(r.Data[i*ids.BlockSize:], b.data)
			en := b.en
			en.Chunk, en.Block = q.Chunk, k.block
			r.Entries = append(r.Entries, en)
		}
	case wire.Newer, wire.List:
		for k, b := range s.blocks {
			if (q.Kind == wire.Newer && b.en.Version > q.Version) ||
				(q.Kind == wire.List && k.chunk == q.Chunk && k.block >= q.Block && k.block < q.Block+ids.Block(q.Count)) {
				r.Entries = append(r.Entries, b.en)
			}
		}
	case wire.Digest:
		r.Digests = []uint64{0}
		for k, b := range s.blocks {
			if k.chunk == q.Chunk && b.en.Version < q.Limit {
				r.Digests[0] += wire.EntryDigest(b.en)
			}
		}
	case wire.Install:
		data := q.Data
		for _, en := range q.Entries {
			b := memBlock{en: en}
			if en.Kind == wire.EntryData {
				b.data, data = bytes.Clone(data[:ids.BlockSize]), data[ids.BlockSize:]
			}
			k := blockKey{en.Chunk, 0, en.Block}
			switch {
			case s.blocks[k].en.Version >= q.Limit:
			case en.Kind == wire.EntryHole:
				delete(s.blocks, k)
			default:
				s.blocks[k] = b
			}
		}
	}
	return r
}

// world is an engine, its stores and its metadata, driven by one seed: pending
// messages are delivered in random order, links fall, gateways die.
type world struct {
	t       *testing.T
	seed    uint64
	rng     *rand.Rand
	now     time.Duration
	stores  []*memStore
	vol     *pb.Volume
	chunks  []*pb.Chunk
	e       *Engine
	out     Out
	pending []func()
	life    int
	model   map[uint64]map[byte]bool // block → values it may have
	done    map[*Op]func(status.Kind)
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), model: map[uint64]map[byte]bool{}, done: map[*Op]func(status.Kind){}}
	w.vol = &pb.Volume{Id: 1, Name: "v", SizeBytes: testSize, ChunkBytes: testChunk, Replicas: testStores, Revision: 1}
	for i := range testStores {
		s := &memStore{id: ids.StoreID{byte(i + 1)}, blocks: map[blockKey]memBlock{}, up: true}
		w.stores = append(w.stores, s)
		w.vol.Members = append(w.vol.Members, &pb.Member{Store: s.id[:], Incarnation: 1, Host: fmt.Sprint("host-", i+1), InSync: true})
	}
	return w
}

func (w *world) attach() {
	w.life++
	w.pending = nil
	clear(w.done)
	w.vol.Epoch++
	v := &pb.Volume{Id: 1, Name: "v", SizeBytes: testSize, ChunkBytes: testChunk, Epoch: w.vol.Epoch, Revision: w.vol.Revision}
	for _, m := range w.vol.Members {
		v.Members = append(v.Members, &pb.Member{Store: m.Store, Incarnation: 1, Host: m.Host, InSync: m.InSync})
	}
	e, err := New(w.now, Config{Host: "host-1", Volume: v, Chunks: w.chunks}, &w.out)
	if err != nil {
		w.t.Fatal(err)
	}
	w.e = e
	w.drain()
	w.step(&Lease{Until: 1 << 60})
}

func (w *world) step(ev Event) {
	w.e.Step(w.now, ev, &w.out)
	w.drain()
}

// drain turns actions into pending deliveries.
func (w *world) drain() {
	life := w.life
	later := func(f func()) {
		w.pending = append(w.pending, func() {
			if life == w.life {
				f()
			}
		})
	}
	out := w.out
	w.out = Out{}
	for _, l := range out.Links {
		if l.Open {
			later(func() { w.connect(l.Replica) })
		}
	}
	for _, s := range out.Sends {
		i := s.Replica
		st := w.stores[i]
		gen, q := st.gen, *s.Req
		later(func() {
			if !st.up || st.gen != gen {
				return
			}
			rep := st.do(&q)
			later(func() { w.step(&Replies{i, gen, []*wire.Reply{rep}}) })
		})
	}
	for _, m := range out.Meta {
		later(func() { w.meta(m) })
	}
	for _, d := range out.Done {
		if f := w.done[d.Op]; f != nil {
			delete(w.done, d.Op)
			f(d.Status)
		}
	}
}

func (w *world) connect(i int) {
	s := w.stores[i]
	if !s.up {
		w.step(&Lost{i, "refused"})
		return
	}
	s.gen++
	w.step(&Up{i, s.gen})
}

func (w *world) meta(m *MetaCall) {
	res := &pb.Result{}
	switch {
	case m.Allocate != nil:
		for _, i := range m.Allocate.Indices {
			c := &pb.Chunk{Index: i, Id: uint64(i) + 100}
			for _, s := range w.stores {
				c.Stores = append(c.Stores, s.id[:])
			}
			w.chunks = append(w.chunks, c)
			res.Chunks = append(res.Chunks, c)
		}
	case m.Change != nil:
		ch := m.Change.Changes[0]
		mr := &pb.MemberResult{}
		if ch.Epoch != w.vol.Epoch || ch.Revision != w.vol.Revision {
			mr.Status = uint32(status.Conflict)
		} else {
			w.vol.Revision++
			for _, mem := range w.vol.Members {
				for _, x := range ch.Exclude {
					mem.InSync = mem.InSync && !bytes.Equal(x, mem.Store)
				}
				mem.InSync = mem.InSync || bytes.Equal(ch.Add, mem.Store)
			}
		}
		mr.Revision = w.vol.Revision
		res.Members = append(res.Members, mr)
	}
	w.step(&MetaDone{Call: m, Result: res})
}

// deliver lets one random pending thing happen, and time pass a little.
func (w *world) deliver() {
	if n := len(w.pending); n > 0 && w.rng.IntN(8) > 0 {
		i := w.rng.IntN(n)
		f := w.pending[i]
		w.pending[i] = w.pending[n-1]
		w.pending = w.pending[:n-1]
		f()
		return
	}
	w.now += time.Duration(w.rng.IntN(20)) * time.Millisecond
	w.step(&Tick{})
}

func (w *world) write(block uint64, val byte) {
	data := bytes.Repeat([]byte{val}, ids.BlockSize)
	may := w.model[block]
	if may == nil {
		may = map[byte]bool{0: true}
		w.model[block] = may
	}
	may[val] = true
	op := &Op{Kind: OpWrite, FUA: w.rng.IntN(4) == 0, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: data}
	if val == 0 {
		op.Kind, op.Data = OpZero, nil
	}
	w.done[op] = func(k status.Kind) {
		if k != status.OK {
			w.t.Fatalf("seed %d: write of block %d failed: %v", w.seed, block, k)
		}
		w.model[block] = map[byte]bool{val: true} // one write of a block at a time: it is the value now
	}
	w.step(&Submit{[]*Op{op}})
}

func (w *world) flush() {
	op := &Op{Kind: OpFlush}
	w.done[op] = func(k status.Kind) {
		if k != status.OK {
			w.t.Fatalf("seed %d: flush failed: %v", w.seed, k)
		}
	}
	w.step(&Submit{[]*Op{op}})
}

func (w *world) read(block uint64) {
	op := &Op{Kind: OpRead, Off: block * ids.BlockSize, Len: ids.BlockSize, Data: make([]byte, ids.BlockSize)}
	w.done[op] = func(k status.Kind) {
		if k != status.OK {
			w.t.Fatalf("seed %d: read of block %d failed: %v", w.seed, block, k)
		}
		may := w.model[block]
		val := op.Data[0]
		if may == nil && val != 0 || may != nil && !may[val] || !bytes.Equal(op.Data, bytes.Repeat([]byte{val}, ids.BlockSize)) {
			w.t.Fatalf("seed %d: block %d reads %d, allowed %v", w.seed, block, val, may)
		}
		w.model[block] = map[byte]bool{val: true} // stable from the first read on
	}
	w.step(&Submit{[]*Op{op}})
}

func (w *world) until(what string, ok func() bool) {
	for range 200_000 {
		if ok() {
			return
		}
		w.deliver()
	}
	w.t.Fatalf("seed %d: never: %s; engine %+v", w.seed, what, w.e.Info())
}

// fall takes a store's process away and brings it back later.
func (w *world) fall(i int) {
	s := w.stores[i]
	if s.up {
		s.up = false
		w.step(&Down{i, s.gen, "reset"})
		w.connect(i)
		return
	}
	s.up = true
	w.connect(i)
}

// No block is lost, invented or turned back while stores fall and return and
// gateways die with writes in flight; in the end all members are in sync and
// hold the same.
func TestStoresFallAndGatewaysDie(t *testing.T) {
	for seed := range uint64(300) {
		w := newWorld(t, seed)
		w.attach()
		val := byte(0)
		for range 60 {
			w.until("idle", func() bool { return len(w.done) == 0 })
			used := map[uint64]bool{}
			for range 1 + w.rng.IntN(6) {
				b := uint64(w.rng.IntN(testSize / ids.BlockSize / 8))
				if used[b] {
					continue
				}
				used[b] = true
				switch w.rng.IntN(8) {
				case 0, 1:
					w.read(b)
				case 2:
					w.write(b, 0)
				case 3:
					w.flush()
				default:
					val = val%250 + 1
					w.write(b, val)
				}
			}
			for range w.rng.IntN(40) {
				w.deliver()
			}
			switch down := w.down(); w.rng.IntN(10) {
			case 0: // at most one member is missing, so service goes on
				if down < 0 {
					w.until("all in sync", w.allInSync)
					down = w.rng.IntN(testStores)
				}
				w.fall(down)
			case 1:
				w.attach() // the gateway dies; unanswered writes may or may not be there
				w.until("serving", func() bool { return w.e.Info().State == Serving })
			}
		}
		if d := w.down(); d >= 0 {
			w.fall(d)
		}
		w.until("all in sync and idle", func() bool { return w.allInSync() && len(w.done) == 0 })
		w.same()
	}
}

func (w *world) allInSync() bool {
	for _, r := range w.e.Info().Replicas {
		if r.State != "in-sync" {
			return false
		}
	}
	return true
}

func (w *world) down() int {
	for i, s := range w.stores {
		if !s.up {
			return i
		}
	}
	return -1
}

func (w *world) same() {
	for _, s := range w.stores[1:] {
		for k, b := range w.stores[0].blocks {
			if o := s.blocks[k]; o.en != b.en || !bytes.Equal(o.data, b.data) {
				w.t.Fatalf("seed %d: %v differs between members: %+v and %+v", w.seed, k, b.en, o.en)
			}
		}
		if len(s.blocks) != len(w.stores[0].blocks) {
			w.t.Fatalf("seed %d: members hold %d and %d blocks", w.seed, len(w.stores[0].blocks), len(s.blocks))
		}
	}
}
