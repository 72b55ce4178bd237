package volume

import (
	"bytes"
	"cmp"
	"maps"
	"slices"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// memStore is a reference store: the semantics of proto/wire over a map, and
// what can go wrong with it.
type memStore struct {
	tells       bool // it was scrubbed: it knows what is bad
	id          ids.StoreID
	incarnation ids.Incarnation
	epoch       ids.Epoch
	floor       ids.Version
	blocks      map[blockKey]memBlock // as reads see them
	durable     map[blockKey]memBlock // as of the last flush
	bad         map[blockKey]bool     // a bit of it flipped on disk
	lastLayer   ids.LayerID
	marks       map[ids.LayerID]ids.LayerID // living layers, and what each is merged into (0: nothing); nil: not told
	lives       map[ids.ChunkID]uint64      // drops of a chunk
	dropped     map[ids.ChunkID]bool        // and not announced again: nothing is written to it
	intact      bool
	page        int // entries of one Newer reply

	up      bool
	hung    bool // takes requests and does not answer
	full    bool // no room for data
	gen     uint64
	session uint64 // connection that sealed last: requests of earlier ones are refused
	held    []func()
	log     []wire.Request // what it was asked, without data
	tamper  func(q *wire.Request, r *wire.Reply)
}

type memBlock struct {
	en   wire.Entry
	data []byte
}

func newMemStore(i int) *memStore {
	return &memStore{id: ids.StoreID{byte(i + 1)}, incarnation: 1, blocks: map[blockKey]memBlock{}, durable: map[blockKey]memBlock{},
		bad: map[blockKey]bool{}, lives: map[ids.ChunkID]uint64{}, intact: true, page: 3, up: true}
}

// loseVolatile is a power loss: of each block that was not flushed some state
// since then is left.
func (s *memStore) loseVolatile(keep func() bool) {
	for _, k := range slices.SortedFunc(maps.Keys(s.blocks), compareKeys) {
		b := s.blocks[k]
		if d, ok := s.durable[k]; (d.en != b.en || !ok) && !keep() {
			if ok {
				s.blocks[k] = d
			} else {
				delete(s.blocks, k)
			}
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.durable), compareKeys) {
		d := s.durable[k]
		if _, ok := s.blocks[k]; !ok && !keep() {
			s.blocks[k] = d // an Install that made it a hole was lost
		}
	}
	s.intact = false
}

func (s *memStore) put(k blockKey, b memBlock) {
	delete(s.bad, k)
	if b.en.Kind == wire.EntryHole {
		delete(s.blocks, k)
	} else {
		s.blocks[k] = b
	}
}

func (s *memStore) do(q *wire.Request) *wire.Reply {
	r := &wire.Reply{Kind: q.Kind, ID: q.ID}
	lean := *q
	lean.Data = nil
	s.log = append(s.log, lean)
	if q.Epoch < s.epoch && q.Kind != wire.Ping && q.Flags&wire.FlagFrozen == 0 {
		r.Status, r.Epoch = status.Fenced, s.epoch
		return r
	}
	switch {
	case q.Flags&wire.FlagFilled != 0:
		delete(s.dropped, q.Chunk)
	case s.dropped[q.Chunk] && (q.Kind == wire.Write || q.Kind == wire.Zero || q.Kind == wire.Install):
		r.Status = status.NotFound
		return r
	}
	switch q.Kind {
	case wire.Seal:
		s.epoch = q.Epoch
		r.Floor, r.Incarnation = s.floor, s.incarnation
		if s.intact {
			r.Flags = wire.FlagIntact
		}
	case wire.Stat:
		r.Epoch = s.epoch
	case wire.Flush, wire.Settle:
		s.floor = max(s.floor, q.Floor)
		s.durable = maps.Clone(s.blocks)
		s.intact = s.intact || q.Kind == wire.Settle
	case wire.Write, wire.Zero:
		s.write(q, r)
	case wire.Read:
		s.read(q, r)
	case wire.Newer, wire.List:
		if r.Incarnation = s.incarnation; q.Kind == wire.List && q.Chunk == 0 {
			s.listLives(r)
		} else {
			s.list(q, r)
		}
	case wire.Digest:
		r.Digests = make([]uint64, (q.Count+wire.DigestBlocks-1)/wire.DigestBlocks)
		for k, b := range s.blocks {
			if k.chunk == q.Chunk && b.en.Version < q.Limit {
				r.Digests[k.block/wire.DigestBlocks] += wire.EntryDigest(b.en)
			}
		}
	case wire.Install:
		s.install(q, r)
	case wire.Damaged:
		for _, k := range slices.SortedFunc(maps.Keys(s.bad), compareKeys) {
			if s.tells {
				r.Entries = append(r.Entries, s.blocks[k].en)
			}
		}
	case wire.Layers:
		s.layers(q)
	case wire.Merge:
		s.merge(q, r)
	}
	if s.tamper != nil {
		s.tamper(q, r)
	}
	return r
}

func (s *memStore) listLives(r *wire.Reply) {
	for _, k := range slices.SortedFunc(maps.Keys(s.blocks), compareKeys) {
		if n := len(r.Digests); n == 0 || r.Digests[n-2] != uint64(k.chunk) {
			r.Digests = append(r.Digests, uint64(k.chunk), 1+s.lives[k.chunk])
		}
	}
}

func (s *memStore) hasChunk(c ids.ChunkID) bool {
	for k := range s.blocks {
		if k.chunk == c {
			return true
		}
	}
	return false
}

func (s *memStore) gone(l ids.LayerID) bool {
	_, lives := s.marks[l]
	return s.marks != nil && l <= s.lastLayer && !lives
}

func (s *memStore) layers(q *wire.Request) {
	if s.marks != nil && q.Layer < s.lastLayer {
		return
	}
	marks := map[ids.LayerID]ids.LayerID{}
	for _, en := range q.Entries {
		if !s.gone(en.Layer) {
			marks[en.Layer] = s.marks[en.Layer]
			if en.Kind == wire.EntryZero {
				marks[en.Layer] = max(marks[en.Layer], ids.LayerID(en.Block))
			}
		}
	}
	s.marks, s.lastLayer = marks, q.Layer
	for _, m := range []map[blockKey]memBlock{s.blocks, s.durable} {
		maps.DeleteFunc(m, func(k blockKey, _ memBlock) bool { return s.gone(k.layer) })
	}
}

func (s *memStore) merge(q *wire.Request, r *wire.Reply) {
	into := s.marks[q.Layer]
	if into == 0 {
		r.Status = status.NotFound
		return
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.blocks), compareKeys) {
		if k.chunk != q.Chunk || k.layer != q.Layer {
			continue
		}
		b, to := s.blocks[k], blockKey{k.chunk, into, k.block}
		if s.bad[k] {
			r.Status, r.Block = status.Corrupt, k.block
			return
		}
		if _, shadowed := s.blocks[to]; !shadowed {
			b.en.Layer = into
			if b.en.Kind == wire.EntryData {
				b.en.Sum = wire.BlockSum(q.Volume, k.chunk, into, k.block, b.en.Version, b.data)
			}
			s.blocks[to] = b
		}
		// A log keeps the order: a power loss that leaves the old layer empty
		// leaves what took its place.
		if _, ok := s.durable[k]; ok {
			s.durable[to] = s.blocks[to]
		}
		delete(s.blocks, k)
		delete(s.durable, k)
	}
}

// lookup finds a block through its layers.
func lookup(blocks map[blockKey]memBlock, chunk ids.ChunkID, b ids.Block, head ids.LayerID, chain []ids.LayerID) (blockKey, memBlock) {
	k := blockKey{chunk, head, b}
	for _, below := range chain {
		if _, ok := blocks[k]; ok {
			break
		}
		if _, ok := blocks[blockKey{chunk, below, b}]; ok {
			k.layer = below
		}
	}
	return k, blocks[k]
}

func (s *memStore) write(q *wire.Request, r *wire.Reply) {
	if s.gone(q.Layer) {
		r.Status = status.NotFound
		return
	}
	if s.full && q.Kind == wire.Write {
		r.Status = status.NoSpace
		return
	}
	for i := range q.Count {
		en := wire.Entry{Chunk: q.Chunk, Layer: q.Layer, Block: q.Block + ids.Block(i), Version: q.Version, Kind: wire.EntryZero}
		b := memBlock{en: en}
		if q.Kind == wire.Write {
			b.en.Kind, b.en.Sum = wire.EntryData, q.Sums[i]
			b.data = bytes.Clone(q.Data[i*ids.BlockSize : (i+1)*ids.BlockSize])
			if wire.BlockSum(q.Volume, q.Chunk, q.Layer, en.Block, q.Version, b.data) != b.en.Sum {
				r.Status = status.Corrupt
				return
			}
		}
		if k := (blockKey{q.Chunk, q.Layer, en.Block}); q.Version >= s.blocks[k].en.Version {
			s.put(k, b)
		}
	}
}

func (s *memStore) read(q *wire.Request, r *wire.Reply) {
	data := make([]byte, int(q.Count)*ids.BlockSize)
	if r.Incarnation = s.incarnation; q.Flags&wire.FlagFrozen != 0 && !s.hasChunk(q.Chunk) {
		r.Status, r.Count64 = status.NotFound, 1
		return
	}
	if q.Flags&wire.FlagFrozen != 0 {
		r.Count64 = 1 + s.lives[q.Chunk]
	}
	before := ids.LayerID(0)
	for d, l := range append([]ids.LayerID{q.Layer}, q.Chain...) {
		if into := s.marks[l]; s.gone(l) || into != 0 && q.Flags&wire.FlagRaw == 0 && (d == 0 || before < into) {
			r.Status = status.NotFound
			return
		}
		before = l
	}
	for i := range q.Count {
		k, b := lookup(s.blocks, q.Chunk, q.Block+ids.Block(i), q.Layer, q.Chain)
		if q.Flags&wire.FlagNoData == 0 && (s.bad[k] || b.en.Kind == wire.EntryPoison) {
			r.Status, r.Block, r.Entries = status.Corrupt, k.block, nil
			if !s.bad[k] {
				r.Status = status.Poison
			}
			return
		}
		copy(data[i*ids.BlockSize:], b.data)
		b.en.Chunk, b.en.Layer, b.en.Block = q.Chunk, k.layer, k.block
		r.Entries = append(r.Entries, b.en)
	}
	r.Data = data
}

func (s *memStore) list(q *wire.Request, r *wire.Reply) {
	from := blockKey{q.Chunk, q.Layer, q.Block}
	for k, b := range s.blocks {
		if q.Kind == wire.Newer && b.en.Version > q.Version && compareKeys(k, from) >= 0 ||
			q.Kind == wire.List && k.chunk == q.Chunk && k.block >= q.Block && k.block < q.Block+ids.Block(q.Count) {
			r.Entries = append(r.Entries, b.en)
		}
	}
	slices.SortFunc(r.Entries, func(a, b wire.Entry) int {
		return compareKeys(blockKey{a.Chunk, a.Layer, a.Block}, blockKey{b.Chunk, b.Layer, b.Block})
	})
	if q.Kind == wire.Newer && len(r.Entries) > s.page {
		r.Entries, r.Flags = r.Entries[:s.page], wire.FlagMore
	}
}

func compareKeys(a, b blockKey) int {
	return cmp.Or(cmp.Compare(a.chunk, b.chunk), cmp.Compare(a.layer, b.layer), cmp.Compare(a.block, b.block))
}

func (s *memStore) install(q *wire.Request, r *wire.Reply) {
	data := q.Data
	if s.full && len(data) > 0 {
		r.Status = status.NoSpace
		return
	}
	for _, en := range q.Entries {
		b := memBlock{en: en}
		if en.Kind == wire.EntryData {
			b.data, data = bytes.Clone(data[:ids.BlockSize]), data[ids.BlockSize:]
			if wire.BlockSum(q.Volume, en.Chunk, en.Layer, en.Block, en.Version, b.data) != en.Sum {
				r.Status = status.Corrupt
				return
			}
		}
		if k := (blockKey{en.Chunk, en.Layer, en.Block}); !s.gone(en.Layer) && s.blocks[k].en.Version < q.Limit {
			s.put(k, b)
		}
	}
}
