package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// tree is what a test knows of a volume's layers.
type tree struct {
	layers map[ids.LayerID]*layerModel
	top    ids.LayerID
	last   ids.LayerID
}

type layerModel struct {
	parent ids.LayerID
	root   bool
	into   ids.LayerID // ≠ 0: deleted, being merged
	blocks model
}

func newTree() *tree {
	return &tree{layers: map[ids.LayerID]*layerModel{0: {root: true, blocks: model{}}}}
}

func (t *tree) clone() *tree {
	c := &tree{layers: map[ids.LayerID]*layerModel{}, top: t.top, last: t.last}
	for id, l := range t.layers {
		n := *l
		n.blocks = l.blocks.clone()
		c.layers[id] = &n
	}
	return c
}

// chain lists the layers a read of head looks through.
func (t *tree) chain(head ids.LayerID) (out []ids.LayerID) {
	for id := head; ; {
		out = append(out, id)
		if t.layers[id].root {
			return out
		}
		id = t.layers[id].parent
	}
}

func (t *tree) at(head ids.LayerID, k blockID) state {
	for _, id := range t.chain(head) {
		if s, ok := t.layers[id].blocks[k]; ok {
			return s
		}
	}
	return state{}
}

func (t *tree) sorted() []ids.LayerID { return slices.Sorted(maps.Keys(t.layers)) }

// heads are the layers somebody may read from.
func (t *tree) heads() []ids.LayerID {
	return slices.DeleteFunc(t.sorted(), func(id ids.LayerID) bool { return t.layers[id].into != 0 })
}

func (t *tree) children(id ids.LayerID) (out []ids.LayerID) {
	for _, c := range t.sorted() {
		if l := t.layers[c]; !l.root && l.parent == id {
			out = append(out, c)
		}
	}
	return out
}

// drop takes a leaf away, and what only it still needed.
func (t *tree) drop(id ids.LayerID) {
	l := t.layers[id]
	delete(t.layers, id)
	if p := t.layers[l.parent]; !l.root && p.into != 0 && len(t.children(l.parent)) == 0 {
		t.drop(l.parent)
	}
}

// list is the tree as a Layers request tells it.
func (t *tree) list() wire.Request {
	q := wire.Request{Kind: wire.Layers, Volume: 1, Layer: t.last}
	for _, id := range t.sorted() {
		e := wire.Entry{Layer: id}
		if into := t.layers[id].into; into != 0 {
			e.Kind, e.Block = wire.EntryZero, ids.Block(into)
		}
		q.Entries = append(q.Entries, e)
	}
	return q
}

const (
	layerChunks = 2
	layerFirst  = 100 // the blocks used lie on both sides of a page's end
	layerBlocks = 48
)

// layerPlayer writes, cuts, rolls back, deletes and merges at random.
type layerPlayer struct {
	player
	t *tree
}

func newLayerPlayer(t testing.TB, seed uint64, s *Store) *layerPlayer {
	p := &layerPlayer{player: *newPlayer(t, seed, s), t: newTree()}
	p.rng = rand.New(rand.NewPCG(seed, 77))
	return p
}

// layerPut is a write of one block run in a layer.
func layerPut(c ids.ChunkID, l ids.LayerID, b ids.Block, n int, ver ids.Version, val uint64) wire.Request {
	q := put(c, b, n, ver, val)
	q.Layer = l
	for i := range n {
		q.Sums[i] = wire.BlockSum(1, c, l, b+ids.Block(i), ver, q.Data[i*blockBytes:(i+1)*blockBytes])
	}
	return q
}

// next makes one random request and the tree it leads to.
func (p *layerPlayer) next() (wire.Request, *tree) {
	after := p.t.clone()
	c := ids.ChunkID(1 + p.rng.IntN(layerChunks))
	b := ids.Block(layerFirst + p.rng.IntN(layerBlocks))
	n := 1 + p.rng.IntN(min(12, layerFirst+layerBlocks-int(b)))
	top := after.layers[after.top].blocks
	switch k := p.rng.IntN(30); {
	case k < 12:
		ver := p.version()
		q := layerPut(c, p.t.top, b, n, ver, p.val)
		for i := range n {
			top[blockID{c, b + ids.Block(i)}] = state{wire.EntryData, ver, p.val + uint64(i)}
		}
		p.val += uint64(n)
		return q, after
	case k < 15:
		ver := p.version()
		for i := range n {
			top[blockID{c, b + ids.Block(i)}] = state{wire.EntryZero, ver, 0}
		}
		return wire.Request{Kind: wire.Zero, Volume: 1, Chunk: c, Layer: p.t.top, Block: b, Count: uint32(n), Version: ver}, after
	case k < 18:
		return wire.Request{Kind: wire.Flush, Volume: 1}, after
	case k < 20 && len(after.layers) < 7: // snapshot
		after.last++
		after.layers[after.last] = &layerModel{parent: after.top, blocks: model{}}
		after.top = after.last
	case k == 20 && len(after.layers) > 1: // rollback: a new top over some snapshot, the old top is dropped
		heads := slices.DeleteFunc(after.heads(), func(id ids.LayerID) bool { return id == after.top })
		if len(heads) == 0 {
			break
		}
		old := after.top
		after.last++
		after.layers[after.last] = &layerModel{parent: heads[p.rng.IntN(len(heads))], blocks: model{}}
		after.drop(old)
		after.top = after.last
	case k < 24:
		p.deleteOne(after)
	case k < 27:
		return p.mergeOne(after)
	}
	return after.list(), after
}

// deleteOne deletes a snapshot: a leaf goes, one with a single child is to be
// merged into that, unless something is being merged into it itself.
func (p *layerPlayer) deleteOne(after *tree) {
	for _, id := range after.heads() {
		if id == after.top || p.rng.IntN(2) == 0 {
			continue
		}
		switch ch := after.children(id); {
		case len(ch) == 0:
			after.drop(id)
			return
		case len(ch) == 1:
			after.layers[id].into = ch[0]
			return
		}
	}
}

// mergeOne merges a chunk of a deleted layer, or takes the layer away when all
// its chunks were.
func (p *layerPlayer) mergeOne(after *tree) (wire.Request, *tree) {
	for _, id := range after.sorted() {
		l := after.layers[id]
		if l.into == 0 {
			continue
		}
		for c := ids.ChunkID(1); c <= layerChunks; c++ {
			found := false
			for k, s := range l.blocks {
				if k.c == c {
					found = true
					if _, ok := after.layers[l.into].blocks[k]; !ok {
						after.layers[l.into].blocks[k] = s
					}
					delete(l.blocks, k)
				}
			}
			if found {
				return wire.Request{Kind: wire.Merge, Volume: 1, Chunk: c, Layer: id}, after
			}
		}
		after.layers[l.into].parent, after.layers[l.into].root = l.parent, l.root
		for _, o := range after.layers {
			if id != 0 && o.into == id {
				o.into = l.into
			}
		}
		delete(after.layers, id)
		break
	}
	return after.list(), after
}

func (p *layerPlayer) play(n int) {
	for range n {
		q, after := p.next()
		q.Epoch = p.epoch
		if r := ask(p.s, q); r.Status != 0 {
			p.player.t.Fatalf("seed %d: %s: %v\n%+v", p.seed, q.Kind, r.Err(), q.Entries)
		}
		p.t = after
		if p.rng.IntN(4) == 0 {
			p.now += 300 * time.Millisecond
			p.s.Step(p.now)
		}
	}
}

// check reads every head through its chain and holds each block against one of
// the trees (which have the same layers); "" if all fit.
func (p *layerPlayer) check(trees ...*tree) string {
	for _, head := range trees[0].heads() {
		chain := trees[0].chain(head)
		for c := ids.ChunkID(1); c <= layerChunks; c++ {
			r := ask(p.s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries | wire.FlagFrozen, Volume: 1, Chunk: c, Layer: head, Chain: chain[1:], Block: layerFirst, Count: layerBlocks})
			if r.Status == status.NotFound && r.Entries == nil && len(p.s.chunkLayers(c)) == 0 {
				r = &wire.Reply{Entries: make([]wire.Entry, layerBlocks), Data: make([]byte, layerBlocks*blockBytes)}
			}
			if r.Status != 0 {
				return fmt.Sprintf("layer %d chunk %d: %v", head, c, r.Err())
			}
			for i := range ids.Block(layerBlocks) {
				why := ""
				for _, t := range trees {
					if why = compare(t.at(head, blockID{c, layerFirst + i}), r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why == "" {
						break
					}
				}
				if why != "" {
					return fmt.Sprintf("layer %d chunk %d block %d: %s", head, c, layerFirst+i, why)
				}
			}
		}
	}
	return ""
}

func (s *Store) chunkLayers(c ids.ChunkID) []*chunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.vols[1]; v != nil {
		return v.layers(c)
	}
	return nil
}

func (p *layerPlayer) mustBe(what string) {
	p.player.t.Helper()
	if why := p.check(p.t); why != "" {
		p.player.t.Fatalf("seed %d, %s: %s", p.seed, what, why)
	}
}

// Snapshots, rollbacks, deletions and merges at random give what a tree of maps
// gives, over clean closings and kills, with and without a tiny index; and the
// space of what was deleted comes back.
func TestLayersAgainstTheModel(t *testing.T) {
	seeds := uint64(16)
	if testing.Short() {
		seeds = 6
	}
	for seed := range seeds {
		d := formatMem(t)
		pages := newMemPages()
		cfg := func() Config {
			c := Config{Disk: d, BootID: testBoot}
			if seed%2 == 1 {
				c.Pages, c.IndexBytes, c.CheckpointBytes = pages, 2*pageBytes, 256<<10
			}
			return c
		}
		s, err := Open(cfg())
		if err != nil {
			t.Fatal(err)
		}
		p := newLayerPlayer(t, seed, s)
		for round := range 8 {
			p.play(80)
			p.mustBe("running")
			if round%2 == 0 {
				if err := p.s.Close(); err != nil {
					t.Fatal(err)
				}
			} else {
				d = d.Crash(seed, 100)
			}
			if p.s, err = Open(cfg()); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if n := p.s.Usage().Note; n != "" {
				t.Fatalf("seed %d: %s", seed, n)
			}
			p.mustBe("opened again")
		}
		p.onlyTop()
	}
}

// onlyTop deletes every snapshot and merges what is left: the store then holds
// what the top shows and nothing more.
func (p *layerPlayer) onlyTop() {
	t := p.player.t
	content := map[blockID]state{}
	for c := ids.ChunkID(1); c <= layerChunks; c++ {
		for b := ids.Block(layerFirst); b < layerFirst+layerBlocks; b++ {
			if s := p.t.at(p.t.top, blockID{c, b}); s.kind == wire.EntryData {
				content[blockID{c, b}] = s
			}
		}
	}
	for len(p.t.layers) > 1 {
		after := p.t.clone()
		q, next := p.mergeOne(after)
		if len(next.layers) == len(p.t.layers) && q.Kind == wire.Layers {
			for _, id := range next.heads() {
				if ch := next.children(id); id != next.top && len(ch) == 0 {
					next.drop(id)
				} else if id != next.top && len(ch) == 1 {
					next.layers[id].into = ch[0]
				}
			}
			q = next.list()
		}
		q.Epoch = p.epoch
		mustOK(t, ask(p.s, q))
		p.t = next
	}
	for range 20 {
		p.now += time.Second
		p.s.Step(p.now)
	}
	p.mustBe("with the top alone")
	if got := p.s.Usage().LiveBytes; got != uint64(len(content))*blockBytes {
		t.Fatalf("seed %d: %d bytes live, want %d blocks", p.seed, got, len(content))
	}
}

// The power goes, or the process is killed, before every disk operation of such
// a history: what is found is the state after some request that was not flushed
// away, all snapshots together.
func TestCrashWithLayers(t *testing.T) {
	seeds, step := uint64(4), 7
	if testing.Short() {
		seeds, step = 1, 23
	}
	for seed := range seeds {
		ops := 0
		for cut := 1 + int(seed)%step; ; cut += step {
			d, pages := formatMem(t), newMemPages()
			cfg := func(d *disk.Mem, pages *memPages, boot string) Config {
				c := Config{Disk: d, BootID: boot}
				if seed%2 == 1 { // with checkpoints
					c.Pages, c.IndexBytes, c.CheckpointBytes = pages, 8*pageBytes, 64<<10
				}
				return c
			}
			s, err := Open(cfg(d, pages, testBoot))
			if err != nil {
				t.Fatal(err)
			}
			p := newLayerPlayer(t, seed, s)
			base := d.Ops()
			d.CutAt(base + cut)
			trees := p.cutRun(260)
			if d.Ops() < base+cut {
				ops = cut
				break
			}
			for _, keep := range []int{0, 50, 100} {
				q := *p
				q.openAgain(cfg(d.Crash(seed*1000+uint64(cut), keep), pages.crash(seed+uint64(cut), keep, keep == 50), "boot-2"))
				q.recoveredTree(trees, fmt.Sprintf("cut %d keep %d", cut, keep))
			}
			q := *p
			q.openAgain(cfg(d.Crash(seed, 100), pages.crash(seed, 100, false), testBoot))
			q.recoveredTree(trees[max(0, len(trees)-2):], fmt.Sprintf("cut %d killed", cut))
		}
		if ops < 60 {
			t.Fatalf("seed %d: only %d disk operations were cut", seed, ops)
		}
	}
}

// openAgain opens what a crash left.
func (p *layerPlayer) openAgain(cfg Config) {
	s, err := Open(cfg)
	if err != nil {
		p.player.t.Fatalf("seed %d: %v", p.seed, err)
	}
	if n := s.Usage().Note; n != "" {
		p.player.t.Fatalf("seed %d: recovery takes a crash for damage: %s", p.seed, n)
	}
	p.s = s
}

// cutRun plays until the disk stops answering and returns the trees since the
// last answered flush.
func (p *layerPlayer) cutRun(n int) []*tree {
	since := []*tree{p.t.clone()}
	for range n {
		q, after := p.next()
		q.Epoch = p.epoch
		if r := ask(p.s, q); r.Status != 0 {
			return append(since, after)
		}
		p.t = after
		if since = append(since, after); q.Kind == wire.Flush {
			since = []*tree{after}
		}
		if p.rng.IntN(4) == 0 {
			p.now += 600 * time.Millisecond
			p.s.Step(p.now)
		}
	}
	return since
}

// recoveredTree finds the tree that the store shows, or two neighbours of the
// same layers when a request was cut, and goes on from there.
func (p *layerPlayer) recoveredTree(trees []*tree, what string) {
	why := ""
	for i, t := range trees {
		set := []*tree{t}
		if i+1 < len(trees) && slices.Equal(t.sorted(), trees[i+1].sorted()) && slices.Equal(t.heads(), trees[i+1].heads()) {
			set = append(set, trees[i+1])
		}
		if why = p.check(set...); why == "" {
			mustOK(p.player.t, ask(p.s, wire.Request{Kind: wire.Seal, Volume: 1, Epoch: 1000}))
			return
		}
	}
	p.player.t.Fatalf("seed %d, %s: none of %d states: %s", p.seed, what, len(trees), why)
}
