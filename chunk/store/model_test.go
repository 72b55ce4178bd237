package store

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// player issues random requests to a store and keeps the model.
type player struct {
	t     testing.TB
	seed  uint64
	rng   *rand.Rand
	s     *Store
	m     model
	epoch ids.Epoch
	ctr   uint64
	val   uint64
	now   time.Duration
}

func newPlayer(t testing.TB, seed uint64, s *Store) *player {
	return &player{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 5)), s: s, m: model{}, epoch: 1}
}

func (p *player) version() ids.Version {
	p.ctr++
	return ids.MakeVersion(p.epoch, p.ctr)
}

func (p *player) place() (ids.ChunkID, ids.Block, int) {
	b := p.rng.IntN(testBlocks)
	return ids.ChunkID(1 + p.rng.IntN(testChunks)), ids.Block(b), 1 + p.rng.IntN(min(testBlocks-b, 1+p.rng.IntN(40)))
}

// step makes one random request; it returns what the model becomes if the
// request takes effect.
func (p *player) next() (q wire.Request, after model) {
	c, b, n := p.place()
	after = p.m
	switch k := p.rng.IntN(20); {
	case k < 10:
		ver := p.version()
		if p.rng.IntN(5) == 0 && p.ctr > 20 { // a late one: some blocks keep what they have
			ver = ids.MakeVersion(p.epoch, p.ctr-uint64(p.rng.IntN(20)))
			p.ctr++
		}
		q = put(c, b, n, ver, p.val)
		after = p.write(c, b, n, state{wire.EntryData, ver, p.val})
		p.val += uint64(n)
	case k < 12:
		ver := p.version()
		q = wire.Request{Kind: wire.Zero, Volume: 1, Chunk: c, Block: b, Count: uint32(n), Version: ver}
		after = p.write(c, b, n, state{wire.EntryZero, ver, 0})
	case k < 14:
		q, after = p.install(c, b, n)
	case k < 17:
		q = wire.Request{Kind: wire.Flush, Volume: 1, Floor: ids.MakeVersion(p.epoch, p.ctr/2)}
	case k == 17 && p.rng.IntN(4) == 0:
		p.epoch++
		q = wire.Request{Kind: wire.Seal, Volume: 1}
	default:
		q = wire.Request{Kind: wire.Read, Volume: 1, Chunk: c, Block: b, Count: uint32(n)}
	}
	q.Epoch = p.epoch
	return q, after
}

func (p *player) write(c ids.ChunkID, b ids.Block, n int, s state) model {
	after := p.m.clone()
	for i := range n {
		k := blockID{c, b + ids.Block(i)}
		if after[k].ver <= s.ver {
			at := s
			if s.kind == wire.EntryData {
				at.val += uint64(i)
			}
			after[k] = at
		}
	}
	return after
}

func (p *player) install(c ids.ChunkID, b ids.Block, n int) (wire.Request, model) {
	q := wire.Request{Kind: wire.Install, Volume: 1, Chunk: c, Limit: ids.MakeVersion(p.epoch, p.ctr-min(p.ctr, uint64(p.rng.IntN(30))))}
	after := p.m.clone()
	ver := ids.MakeVersion(1, 1+uint64(p.rng.IntN(10)))
	for i := range n {
		k := blockID{c, b + ids.Block(i)}
		s := state{wire.EntryKind(p.rng.IntN(3)), ver, 0}
		if s.kind == wire.EntryHole {
			s.ver = 0
		}
		e := wire.Entry{Chunk: c, Block: k.b, Kind: s.kind, Version: s.ver}
		if s.kind == wire.EntryData {
			s.val = p.val
			p.val++
			d := blockOf(s.val)
			e.Sum = wire.BlockSum(1, c, 0, k.b, s.ver, d)
			q.Data = append(q.Data, d...)
		}
		q.Entries = append(q.Entries, e)
		if p.m[k].ver < q.Limit {
			after.set(k, s)
		}
	}
	return q, after
}

func (p *player) play(n int) {
	for range n {
		q, after := p.next()
		r := ask(p.s, q)
		if r.Status != 0 {
			p.t.Fatalf("seed %d: %s: %v", p.seed, q.Kind, r.Err())
		}
		p.m = after
		if p.rng.IntN(5) == 0 {
			p.now += 300 * time.Millisecond
			p.s.Step(p.now)
		}
	}
}

// checkQueries compares Newer, List, Digest and Stat with the model.
func (p *player) checkQueries() {
	t := p.t
	live := uint64(0)
	for _, s := range p.m {
		if s.kind == wire.EntryData {
			live++
		}
	}
	if r := mustOK(t, ask(p.s, wire.Request{Kind: wire.Stat, Volume: 1, Epoch: p.epoch})); r.Count64 != live {
		t.Fatalf("seed %d: stat %d, want %d", p.seed, r.Count64, live)
	}
	if u := p.s.Usage(); u.LiveBytes != live*blockBytes || u.State != "ok" {
		t.Fatalf("seed %d: usage %+v, want %d live blocks", p.seed, u, live)
	}
	floor := ids.MakeVersion(p.epoch, p.ctr/2)
	var all []wire.Entry
	q := wire.Request{Kind: wire.Newer, Volume: 1, Epoch: p.epoch, Version: floor, Count: uint32(1 + p.rng.IntN(50))}
	for {
		r := mustOK(t, ask(p.s, q))
		all = append(all, r.Entries...)
		if r.Flags&wire.FlagMore == 0 {
			break
		}
		last := r.Entries[len(r.Entries)-1]
		q.Chunk, q.Layer, q.Block = last.Chunk, last.Layer, last.Block+1
	}
	var newer, below int
	digest := map[ids.ChunkID]uint64{}
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for _, e := range mustOK(t, ask(p.s, wire.Request{Kind: wire.List, Volume: 1, Epoch: p.epoch, Chunk: c, Count: testBlocks})).Entries {
			want := p.m[blockID{c, e.Block}]
			if want.kind != e.Kind || want.ver != e.Version || e.Chunk != c {
				t.Fatalf("seed %d: list gives %+v, want %+v", p.seed, e, want)
			}
			below++
			if e.Version > floor {
				if newer >= len(all) || all[newer] != e {
					t.Fatalf("seed %d: newer lacks %+v at %d of %d", p.seed, e, newer, len(all))
				}
				newer++
			} else {
				digest[c] += wire.EntryDigest(e)
			}
		}
	}
	if newer != len(all) || below != len(p.m) {
		t.Fatalf("seed %d: newer has %d entries, want %d; list has %d, want %d", p.seed, len(all), newer, below, len(p.m))
	}
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		r := mustOK(t, ask(p.s, wire.Request{Kind: wire.Digest, Volume: 1, Epoch: p.epoch, Chunk: c, Count: testBlocks, Limit: floor + 1}))
		if !slices.Equal(r.Digests, []uint64{digest[c]}) {
			t.Fatalf("seed %d: digest %v, want %d", p.seed, r.Digests, digest[c])
		}
	}
}

// Random requests give what the model gives, over clean closings, kills and
// power losses that keep everything, with and without a tiny index.
func TestRandomRequestsAgainstTheModel(t *testing.T) {
	seeds := uint64(30)
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		d := formatMem(t)
		pages := newMemPages()
		cfg := func(d disk.Disk) Config {
			c := Config{Disk: d, BootID: testBoot}
			if seed%2 == 1 {
				c.Pages, c.IndexBytes, c.CheckpointBytes = pages, 2*pageBytes, 1<<20
			}
			return c
		}
		s, err := Open(cfg(d))
		if err != nil {
			t.Fatal(err)
		}
		p := newPlayer(t, seed, s)
		for round := range 8 {
			p.play(60)
			verify(t, p.s, p.m, p.epoch, "running")
			p.checkQueries()
			if round%2 == 0 {
				if err := p.s.Close(); err != nil {
					t.Fatal(err)
				}
			} else {
				d = d.Crash(seed, 100)
			}
			if p.s, err = Open(cfg(d)); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if n := p.s.Usage().Note; n != "" {
				t.Fatalf("seed %d: %s", seed, n)
			}
			verify(t, p.s, p.m, p.epoch, "reopened")
			p.checkQueries()
		}
		if seed%2 == 1 && (pages.saves == 0 || pages.gets == 0) {
			t.Fatalf("seed %d: the pages were not used: %d saves, %d gets", seed, pages.saves, pages.gets)
		}
	}
}
