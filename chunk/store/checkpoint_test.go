package store

import (
	"bytes"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// paged is a store with checkpoints, driven by hand.
type paged struct {
	t     *testing.T
	d     *disk.Mem
	pages *memPages
	s     *Store
	now   time.Duration
	ctr   uint64
	every int64 // CheckpointBytes
	index int64 // IndexBytes
}

func newPaged(t *testing.T, every, index int64) *paged {
	p := &paged{t: t, d: formatMem(t), pages: newMemPages(), every: every, index: index}
	p.open("boot-1")
	return p
}

func (p *paged) open(boot string) {
	p.t.Helper()
	s, err := Open(Config{Disk: p.d, BootID: boot, Pages: p.pages, CheckpointBytes: p.every, IndexBytes: p.index})
	if err != nil {
		p.t.Fatal(err)
	}
	p.s = s
}

// kill opens again what a kill leaves.
func (p *paged) kill() {
	p.t.Helper()
	p.d, p.pages = p.d.Crash(1, 100), p.pages.crash(1, 100, false)
	p.open("boot-1")
	if n := p.s.Usage().Note; n != "" {
		p.t.Fatal(n)
	}
	if why := figures(p.s); why != "" {
		p.t.Fatal(why)
	}
}

func (p *paged) step(n int) {
	for range n {
		p.now += 2 * time.Second
		p.s.Step(p.now)
	}
}

func (p *paged) write(c ids.ChunkID, b ids.Block, n int, val uint64) {
	p.t.Helper()
	p.ctr++
	mustOK(p.t, ask(p.s, put(c, b, n, ids.MakeVersion(1, p.ctr), val)))
}

func (p *paged) holds(c ids.ChunkID, b ids.Block, n int, val uint64) {
	p.t.Helper()
	r := mustOK(p.t, ask(p.s, readOf(c, b, uint32(n), 0)))
	for i := range n {
		if !bytes.Equal(r.Data[i*blockBytes:(i+1)*blockBytes], blockOf(val+uint64(i))) {
			p.t.Fatalf("chunk %d block %d has other data", c, int(b)+i)
		}
	}
}

// checkpoint makes one and no more.
func (p *paged) checkpoint() root {
	p.t.Helper()
	p.s.cfg.CheckpointBytes = 1
	before := append([]root(nil), p.s.roots...)
	for i := 0; len(p.s.roots) == 0 || len(before) > 0 && p.s.roots[0] == before[0]; i++ {
		if p.step(1); i == 1000 {
			p.t.Fatal("no checkpoint is made")
		}
	}
	p.s.cfg.CheckpointBytes = 1 << 60
	p.step(2)
	return p.s.roots[0]
}

// reads counts the bytes read from a disk.
type reads struct {
	*disk.Mem
	bytes int64
}

func (r *reads) Submit(op *disk.Op) {
	if op.Kind == disk.Read {
		for _, b := range op.Bufs {
			r.bytes += int64(len(b))
		}
	}
	r.Mem.Submit(op)
}

// With a checkpoint an opening reads the log behind it, without one all of it.
func TestOpeningReadsTheLogBehindTheCheckpoint(t *testing.T) {
	p := newPaged(t, 1<<60, 0)
	for i := range 12 {
		p.write(1, ids.Block(100*i), 100, uint64(1000*i))
	}
	r := p.checkpoint()
	p.write(2, 0, 10, 77)
	if r.count != uint64(len(p.pages.keys)) || r.count < 9 {
		t.Fatalf("a checkpoint of %d pages, %d are saved", r.count, len(p.pages.keys))
	}
	cost := func(pages Pages) int64 {
		d := &reads{Mem: p.d.Crash(1, 100)}
		s, err := Open(Config{Disk: d, BootID: testBoot, Pages: pages})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 12 {
			q := mustOK(t, ask(s, readOf(1, ids.Block(100*i), 100, 0)))
			for j := range 100 {
				if !bytes.Equal(q.Data[j*blockBytes:(j+1)*blockBytes], blockOf(uint64(1000*i+j))) {
					t.Fatalf("block %d has other data", 100*i+j)
				}
			}
		}
		return d.bytes
	}
	with, without := cost(p.pages.crash(1, 100, false)), cost(nil)
	if with*2 > without {
		t.Fatalf("%d bytes read with a checkpoint, %d without", with, without)
	}
}

// A checkpoint whose pages are not all there, or not as they were, is none: the
// one before counts, and without it the log.
func TestVoidCheckpoints(t *testing.T) {
	harm := map[string]func(vs []pageVersion) []pageVersion{
		"lost": func(vs []pageVersion) []pageVersion { return vs[:len(vs)-1] },
		"flipped": func(vs []pageVersion) []pageVersion {
			last := &vs[len(vs)-1]
			last.page = bytes.Clone(last.page)
			last.page[20] ^= 1
			return vs
		},
	}
	for name, f := range harm {
		for both := range 2 {
			p := newPaged(t, 1<<60, 0)
			p.write(1, 0, 300, 1)
			old := p.checkpoint()
			p.write(1, 10, 300, 5000)
			p.checkpoint()
			p.write(1, 20, 10, 9000)
			for k, vs := range p.pages.keys {
				if vs = f(vs); both == 1 && len(vs) > 0 {
					vs = f(vs[:1])
				}
				if p.pages.keys[k] = vs; len(vs) == 0 {
					delete(p.pages.keys, k)
				}
				break
			}
			p.kill()
			switch {
			case both == 0 && (len(p.s.roots) != 1 || p.s.roots[0] != old):
				t.Fatalf("%s: the older checkpoint is not used: %+v, want %+v", name, p.s.roots, old)
			case both == 1 && (len(p.s.roots) != 0 || p.pages.wipes != 1):
				t.Fatalf("%s: a void checkpoint is used: %+v", name, p.s.roots)
			}
			p.holds(1, 0, 10, 1)
			p.holds(1, 10, 10, 5000)
			p.holds(1, 20, 10, 9000)
			p.holds(1, 30, 280, 5020)
			p.checkpoint()
			p.kill()
			p.holds(1, 30, 280, 5020)
		}
	}
}

// A page that Pages lose while the store runs stops it: it must not answer from
// an older one. The next opening does without the checkpoint.
func TestLostPageStopsTheStore(t *testing.T) {
	p := newPaged(t, 1<<60, pageBytes)
	p.write(1, 0, 100, 1)
	p.checkpoint()
	p.write(1, 0, 100, 5000)
	p.checkpoint()
	for i := range 20 { // other pages take its place in memory
		p.write(2, ids.Block(i*128), 1, uint64(i))
		p.step(1)
	}
	key := string(p.s.vols[1].chunk(1, 0, false).pages[0].key())
	if n := len(p.pages.keys[key]); n != 2 || !p.s.vols[1].chunk(1, 0, false).pages[0].away {
		t.Fatalf("the page has %d versions, or is in memory", n)
	}
	p.pages.keys[key] = p.pages.keys[key][:1]
	if r := ask(p.s, readOf(1, 0, 1, 0)); r.Status != status.Corrupt {
		t.Fatalf("a read of it is answered %v", r.Err())
	}
	if u := p.s.Usage(); u.State == "ok" {
		t.Fatal("the store goes on")
	}
	p.d, p.pages = p.d.Crash(1, 100), p.pages.crash(1, 100, false)
	p.open("boot-1")
	p.holds(1, 0, 100, 5000)
}

// A drop is not forgotten while a checkpoint that may be used knows nothing of
// it, even when no segment is older.
func TestDropsOutliveCheckpoints(t *testing.T) {
	p := newPaged(t, 1<<60, 0)
	p.write(1, 0, 40, 1)
	p.write(2, 0, 40, 500)
	p.checkpoint()
	mustOK(t, ask(p.s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 2}))
	lsn := p.s.lsn
	for i := range 40 {
		p.write(1, 0, 40, uint64(1000*i))
		p.step(3)
	}
	for _, g := range p.s.segs {
		if g.state != segFree && g.gen < lsn {
			t.Fatalf("segment %d is as old as the drop", g.n)
		}
	}
	p.kill()
	if r := ask(p.s, readOf(2, 0, 40, 0)); r.Status != status.NotFound {
		t.Fatalf("the dropped chunk is back: %v, empty %v", r.Err(), empty(r.Data))
	}
	p.checkpoint() // two that know it
	p.checkpoint()
	for i := range 40 {
		p.write(1, 0, 40, uint64(1000*i))
		p.step(3)
	}
	if len(p.s.drops) != 0 {
		t.Fatalf("%d drops are still remembered", len(p.s.drops))
	}
	p.kill()
	if r := mustOK(t, ask(p.s, readOf(2, 0, 40, 0))); !empty(r.Data) {
		t.Fatal("the dropped chunk is back")
	}
}

// No checkpoint begins while a dropped volume is taken out of the index: it
// would have pages of it, and be behind the drop.
func TestNoCheckpointOfWhatIsLeaving(t *testing.T) {
	p := newPaged(t, 1<<60, 0)
	for c := ids.ChunkID(1); c <= 3; c++ { // 2,048 pages each
		p.ctr++
		mustOK(t, ask(p.s, wire.Request{Kind: wire.Zero, Volume: 1, Chunk: c, Count: maxChunkBlocks, Version: ids.MakeVersion(1, p.ctr)}))
	}
	p.checkpoint()
	mustOK(t, ask(p.s, wire.Request{Kind: wire.Drop, Volume: 1}))
	p.s.cfg.CheckpointBytes = 1
	old := p.s.roots[0]
	for i := 0; p.s.roots[0] == old; i++ {
		if p.step(1); i == 1000 {
			t.Fatal("no checkpoint is made")
		}
	}
	if n := p.s.roots[0].count; n != 0 {
		t.Fatalf("the checkpoint behind the drop has %d pages", n)
	}
	p.kill()
	if len(p.s.vols) != 0 {
		t.Fatal("the volume is back")
	}
}

// While pages cannot be saved, changes wait rather than fill the memory; reads
// and seals pass, and all goes on when there is room again.
func TestChangesWaitForPages(t *testing.T) {
	const limit = 8 * pageBytes
	p := newPaged(t, 1<<60, limit)
	p.pages.fails = true
	box := newInbox()
	for i := range 200 {
		q := put(1, ids.Block(i*128), 1, ids.MakeVersion(1, uint64(i+1)), uint64(i))
		q.ID = uint64(i + 1)
		p.s.Submit([]*wire.Request{&q}, box)
	}
	waiting := 200 - len(box.got)
	if held := int64(len(p.s.idx.ring)) * pageBytes; waiting < 50 || held > limit+limit/4+65*pageBytes {
		t.Fatalf("%d changes wait, %d bytes of pages are in memory", waiting, held)
	}
	mustOK(t, ask(p.s, readOf(1, 0, 1, 0)))
	p.step(3)
	if len(box.got) != 200-waiting {
		t.Fatal("changes were answered though no page could be saved")
	}
	p.pages.fails = false
	for i := 0; len(box.got) < 200; i++ {
		if p.step(1); i == 1000 {
			t.Fatalf("%d changes are not answered", 200-len(box.got))
		}
	}
	for _, r := range box.got {
		mustOK(t, r)
	}
	for i := range 200 {
		p.holds(1, ids.Block(i*128), 1, uint64(i))
	}
	if held := int64(len(p.s.idx.ring)) * pageBytes; held > limit+limit/4+65*pageBytes {
		t.Fatalf("%d bytes of pages are in memory", held)
	}
	p.checkpoint()
	p.kill()
	for i := range 200 {
		p.holds(1, ids.Block(i*128), 1, uint64(i))
	}
}

// A batch of pages takes as long as it takes: requests go on meanwhile, a page
// changed meanwhile is saved again, and the root waits for it all.
func TestRequestsGoOnDuringACheckpoint(t *testing.T) {
	p := newPaged(t, 1<<60, 0)
	p.write(1, 0, 300, 1)
	p.pages.hang = true
	p.s.cfg.CheckpointBytes = 1
	p.step(1)
	if p.pages.flying == nil {
		t.Fatal("no page is being saved")
	}
	p.write(1, 0, 100, 4000)
	p.step(2)
	if len(p.s.roots) != 0 {
		t.Fatal("the root did not wait")
	}
	p.holds(1, 0, 100, 4000)
	p.pages.complete()
	if len(p.s.roots) != 1 {
		t.Fatal("no root")
	}
	p.kill()
	if len(p.s.roots) != 1 {
		t.Fatal("the checkpoint was not used")
	}
	p.holds(1, 0, 100, 4000)
	p.holds(1, 100, 200, 101)
}

// Every opening takes a life number no opening before it had: with a segment's
// gen it tells uses of a segment apart.
func TestLivesDiffer(t *testing.T) {
	p := newPaged(t, 1, 0)
	seen := map[uint32]bool{}
	for i := range 30 {
		if seen[p.s.life] {
			t.Fatalf("life %d comes twice", p.s.life)
		}
		seen[p.s.life] = true
		p.write(1, 0, 50, uint64(i))
		if i%3 == 0 {
			p.step(4)
		}
		p.d, p.pages = p.d.Crash(uint64(i), 50*(i%3)), p.pages.crash(uint64(i), 50, false)
		p.open(bootName(i % 20))
		for _, g := range p.s.segs {
			if g.state != segFree && g != p.s.open && g.life >= p.s.life {
				t.Fatalf("opening %d has life %d, segment %d is of life %d", i, p.s.life, g.n, g.life)
			}
		}
	}
}
