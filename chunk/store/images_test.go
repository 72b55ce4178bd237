package store

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Crash images: a workload runs once on a small store, and before every disk
// operation and in the middle of every batch of index pages an image is taken
// of what a power loss (none, half or all of the unsynced sectors kept) or a
// kill would leave. Each is opened and read in full.

const (
	imageSegs   = 14
	imageChunks = 2
	imageLayers = 2
	imageFirst  = 100 // blocks, over the border of two index pages
	imageBlocks = 48
	regs        = imageChunks * imageLayers * imageBlocks
)

// track is what one block may be: since[0] is durable, or as good, the last one
// is what was asked for last.
type track struct {
	since []state
	// answered is the first of since that a kill may not lose.
	answered int
}

// camera runs a workload and takes images.
type camera struct {
	t            testing.TB
	name         string
	seed         uint64
	rng          *rand.Rand
	only         int  // take only the images before this operation; 0: all
	quiet        bool // take none
	light        bool // every third image
	d            *hooked
	pages        *memPages
	cfg          Config
	s            *Store
	in           *inbox
	id           uint64
	regs         [regs]track
	epoch        ids.Epoch   // asked for
	sealed, kept ids.Epoch   // answered, as good as durable
	second       ids.ChunkID // the id of the second chunk: it changes with every drop
	gone         []ids.ChunkID
	ctr          uint64
	val          uint64
	now          time.Duration
	op           int
	shots        *atomic.Int64
	loaded       *atomic.Int64 // openings that began with a checkpoint
	busy         bool          // an image is being looked at
}

// hooked calls before each operation, and remembers what is not synced.
type hooked struct {
	*disk.Mem
	before func()
	writes [][2]int64 // sectors, from and to
}

func (h *hooked) Submit(op *disk.Op) {
	if op.Kind == disk.Read || op.Kind == disk.Allocate {
		h.Mem.Submit(op)
		return
	}
	h.before()
	switch n := op.Len; op.Kind {
	case disk.Sync:
		h.writes = h.writes[:0]
	default:
		for _, b := range op.Bufs {
			n += int64(len(b))
		}
		h.writes = append(h.writes, [2]int64{op.Off / disk.SectorBytes, (op.Off + n) / disk.SectorBytes})
	}
	h.Mem.Submit(op)
}

// Ways to keep what is not synced: by sector, by block, whole writes, or the
// last write alone.
const (
	keepNone = iota
	keepSectors
	keepBlocks
	keepWrites
	keepLast
	keepAll
	keepKill // all of it, and the system has not lost power
	keepWays
)

var wayNames = [keepWays]string{"nothing kept", "half the sectors kept", "half the blocks kept", "half the writes kept", "the last write kept", "all kept", "killed"}

// crash is the disk after a power loss.
func (h *hooked) crash(seed uint64, way int) *disk.Mem {
	half := func(n int64) bool { return rand.NewPCG(seed, uint64(n)).Uint64()&64 != 0 }
	return h.Mem.CrashKeeping(func(s int64) bool {
		switch way {
		case keepNone:
			return false
		case keepSectors:
			return half(s)
		case keepBlocks:
			return half(s / (blockBytes / disk.SectorBytes))
		case keepWrites, keepLast:
			for i, w := range h.writes {
				if w[0] <= s && s < w[1] && (way == keepWrites && half(int64(i)) || way == keepLast && i == len(h.writes)-1) {
					return true
				}
			}
			return false
		}
		return true
	})
}

func bootOf(way int) string {
	if way == keepKill {
		return testBoot
	}
	return "boot-2"
}

func reg(c ids.ChunkID, l ids.LayerID, b ids.Block) int {
	return (int(c-1)*imageLayers+int(l))*imageBlocks + int(b-imageFirst)
}

// chunk is the real id of a chunk.
func (c *camera) chunk(ch ids.ChunkID) ids.ChunkID {
	if ch == 2 {
		return c.second
	}
	return ch
}

func newCamera(t testing.TB, name string, seed uint64, shots, loaded *atomic.Int64) *camera {
	c := &camera{t: t, name: name, seed: seed, rng: rand.New(rand.NewPCG(seed, 77)), in: newInbox(), epoch: 1, second: 2, shots: shots, loaded: loaded}
	for i := range c.regs {
		c.regs[i].since = []state{{}}
	}
	c.d = &hooked{Mem: disk.NewMem(logStart*blockBytes + imageSegs*testSeg), before: c.shoot}
	if err := Make(c.d.Mem, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	c.pages = newMemPages()
	c.pages.hook = c.shoot
	// One page of memory: they come and go. The checkpoint's pace varies.
	c.cfg = Config{Disk: c.d, BootID: testBoot, Pages: c.pages, IndexBytes: pageBytes, CheckpointBytes: 1 + int64(seed%3)*(200<<10)}
	s, err := Open(c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.s = s
	return c
}

// ask sends a request over the camera's own connection.
func (c *camera) ask(s *Store, q wire.Request) *wire.Reply {
	c.id++
	q.ID = c.id
	s.Submit([]*wire.Request{&q}, c.in)
	r := c.in.got[q.ID]
	if r == nil {
		c.fail("%s was not answered", q.Kind)
	}
	delete(c.in.got, q.ID)
	return r
}

func (c *camera) fail(format string, args ...any) {
	c.t.Helper()
	c.t.Fatalf("workload %s, operation %d: %s\nagain: CAIRN_CRASH='%s %d' go test -run TestCrashImages ./chunk/store",
		c.name, c.op, fmt.Sprintf(format, args...), c.name, c.op)
}

// expect says what a request will have done, before it is sent.
func (c *camera) expect(ch ids.ChunkID, l ids.LayerID, b ids.Block, s state, wins bool) {
	if wins {
		t := &c.regs[reg(ch, l, b)]
		t.since = append(t.since, s)
	}
}

func (t *track) last() state { return t.since[len(t.since)-1] }

// done answers: a kill loses none of it now. all: a power loss neither.
func (c *camera) done(all bool) {
	for i := range c.regs {
		t := &c.regs[i]
		if all {
			t.since = append(t.since[:0], t.last())
		}
		t.answered = len(t.since) - 1
	}
	c.sealed = c.epoch
	if all {
		c.kept = c.epoch
	}
}

// send sends a request that is to succeed, unless its chunk was dropped.
func (c *camera) send(q wire.Request, all bool) {
	q.Volume, q.Epoch = 1, c.epoch
	r := c.ask(c.s, q)
	if r.Status != status.OK {
		c.fail("%s: %v", q.Kind, r.Err())
	}
	c.done(all)
}

func (c *camera) version() ids.Version {
	c.ctr++
	return ids.MakeVersion(c.epoch, c.ctr)
}

func (c *camera) write(ch ids.ChunkID, l ids.LayerID, b ids.Block, n int) {
	id := c.chunk(ch)
	q := wire.Request{Kind: wire.Write, Chunk: id, Layer: l, Block: b, Count: uint32(n), Version: c.version()}
	for i := range ids.Block(n) {
		c.val++
		d := blockOf(c.val)
		q.Data = append(q.Data, d...)
		q.Sums = append(q.Sums, wire.BlockSum(1, id, l, b+i, q.Version, d))
		c.expect(ch, l, b+i, state{wire.EntryData, q.Version, c.val}, true)
	}
	c.send(q, false)
}

// zero may go beyond the camera's blocks.
func (c *camera) zero(ch ids.ChunkID, l ids.LayerID, b ids.Block, n int) {
	q := wire.Request{Kind: wire.Zero, Chunk: c.chunk(ch), Layer: l, Block: b, Count: uint32(n), Version: c.version()}
	for i := max(b, imageFirst); i < min(b+ids.Block(n), imageFirst+imageBlocks); i++ {
		c.expect(ch, l, i, state{wire.EntryZero, q.Version, 0}, true)
	}
	c.send(q, false)
}

// install sets blocks to data, a tombstone and a hole in turn, at an old version.
func (c *camera) install(ch ids.ChunkID, l ids.LayerID, b ids.Block, n int) {
	id := c.chunk(ch)
	q := wire.Request{Kind: wire.Install, Chunk: id, Limit: ids.MakeVersion(c.epoch, c.ctr+1)}
	for i := range ids.Block(n) {
		s := state{wire.EntryKind(i % 3), ids.MakeVersion(1, 1), 0}
		switch s.kind {
		case wire.EntryHole:
			s.ver = 0
		case wire.EntryData:
			c.val++
			s.val = c.val
			d := blockOf(s.val)
			q.Data = append(q.Data, d...)
			q.Entries = append(q.Entries, wire.Entry{Chunk: id, Layer: l, Block: b + i, Kind: s.kind, Version: s.ver, Sum: wire.BlockSum(1, id, l, b+i, s.ver, d)})
		}
		if s.kind != wire.EntryData {
			q.Entries = append(q.Entries, wire.Entry{Chunk: id, Layer: l, Block: b + i, Kind: s.kind, Version: s.ver})
		}
		old := c.regs[reg(ch, l, b+i)].last()
		c.expect(ch, l, b+i, s, old.ver < q.Limit && (s.kind != wire.EntryHole || old.kind != wire.EntryHole))
	}
	c.send(q, false)
}

func (c *camera) drop(ch ids.ChunkID) {
	for i := range imageLayers * imageBlocks {
		c.expect(ch, ids.LayerID(i/imageBlocks), imageFirst+ids.Block(i%imageBlocks), state{}, true)
	}
	c.send(wire.Request{Kind: wire.Drop, Chunk: c.chunk(ch)}, true)
	c.gone = append(c.gone, c.second)
	c.second++
}

func (c *camera) step() {
	c.now += 2 * time.Second
	c.s.Step(c.now)
	c.s.Step(c.now + time.Millisecond)
}

// acts are the requests of workloads, by letter.
var acts = map[byte]func(c *camera){
	'a': func(c *camera) { c.write(1, 0, 110, 1) },
	'b': func(c *camera) { c.write(1, 0, 120, 20) },
	'c': func(c *camera) { c.write(1, 1, 100, 48) },
	'd': func(c *camera) { c.zero(1, 0, 125, 6) },
	'e': func(c *camera) { c.zero(1, 1, 0, 256) },
	'f': func(c *camera) { c.install(2, 0, 110, 9) },
	'g': func(c *camera) {
		c.send(wire.Request{Kind: wire.Flush, Floor: ids.MakeVersion(c.epoch, c.ctr)}, true)
	},
	'h': func(c *camera) { c.epoch++; c.send(wire.Request{Kind: wire.Seal}, true) },
	'i': func(c *camera) { c.drop(2) },
	'j': (*camera).step,
	'k': func(c *camera) { // fills segments, kills them, and lets compaction work
		c.write(2, 0, 100, 48)
		c.write(2, 1, 101, 40)
		c.write(2, 0, 104, 44)
		c.write(1, 0, 100, 30)
		c.step()
	},
	'l': func(c *camera) { c.write(1, 1, 130, 3); c.step(); c.step() },
	'm': func(c *camera) {
		c.send(wire.Request{Kind: wire.Settle, Floor: ids.MakeVersion(c.epoch, c.ctr)}, true)
	},
}

const letters = "abcdefghijklm"

// random does one random request.
func (c *camera) random() {
	l, b := ids.LayerID(c.rng.IntN(imageLayers)), imageFirst+ids.Block(c.rng.IntN(imageBlocks))
	n := 1 + c.rng.IntN(imageFirst+imageBlocks-int(b))
	ch := ids.ChunkID(1 + c.rng.IntN(imageChunks))
	switch k := c.rng.IntN(32); {
	case k < 14:
		c.write(ch, l, b, n)
	case k < 17:
		c.zero(ch, l, b, n)
	case k < 19:
		c.install(ch, l, b, n)
	case k < 20:
		c.zero(ch, l, 0, 128*(1+c.rng.IntN(2)))
	case k < 22:
		acts['g'](c)
	case k == 22 && c.rng.IntN(3) == 0:
		acts['h'](c)
	case k == 23 && c.rng.IntN(4) == 0:
		c.drop(2)
	case k == 24:
		acts['m'](c)
	default:
		c.step()
	}
}

// run plays a workload: letters, or r and a seed.
func (c *camera) run() {
	if !strings.HasPrefix(c.name, "r") {
		for i := range len(c.name) { // what a shorter workload has done is not done again
			c.quiet = i+1 < len(c.name) && c.only == 0
			acts[c.name[i]](c)
		}
		return
	}
	for range 25 {
		c.random()
	}
}

// shoot takes the images of this moment.
func (c *camera) shoot() {
	if c.busy || c.s == nil {
		return
	}
	c.op++
	if c.quiet || c.only > 0 && c.op != c.only || c.light && c.op%3 != 0 {
		return
	}
	c.busy = true
	in, id := c.in, c.id
	seed := c.seed*10007 + uint64(c.op)
	for way := range keepWays {
		switch {
		case way >= keepSectors && way <= keepWrites && int(seed%3)+keepSectors != way: // one of them
		case way == keepLast && len(c.d.writes) < 2:
		default:
			c.in = newInbox()
			c.look(way, seed*16+uint64(way))
		}
	}
	c.in, c.id, c.busy = in, id, false
}

// look opens one image and holds it against what it may be.
func (c *camera) look(way int, seed uint64) {
	keep := [keepWays]int{0, 50, 50, 50, 50, 100, 100}[way]
	rng := rand.New(rand.NewPCG(seed, 8))
	d, pages := c.d.crash(seed, way), c.pages.crash(seed, keep, rng.IntN(3) == 0)
	boot, what := bootOf(way), wayNames[way]
	if rng.IntN(16) == 0 {
		c.crashAgain(d, pages, way, seed)
	}
	s := c.open(d, pages, boot, what)
	first := c.read(s, way == keepKill, what)
	if r := c.ask(s, wire.Request{Kind: wire.Seal, Volume: 1, Epoch: 1000}); r.Status != status.OK || r.Flags&wire.FlagIntact != 0 && boot != testBoot && r.Version > 0 {
		c.fail("%s: sealed with %+v", what, r)
	}
	c.shots.Add(1)
	if rng.IntN(4) != 0 {
		return
	}
	d, pages = d.Crash(seed+1, 0), pages.crash(seed+1, 0, rng.IntN(2) == 0)
	s = c.open(d, pages, boot, what+", and again")
	if again := c.read(s, false, what+", and again"); again != first {
		c.fail("%s: the first read was not stable", what)
	}
	c.goOn(s, d, pages, boot, &first, what)
}

// crashAgain loses power before each operation of an image's recovery. After a
// kill the page cache still had what the image has, so d is unsynced.
func (c *camera) crashAgain(d *disk.Mem, pages *memPages, way int, seed uint64) {
	h := &hooked{Mem: d.Crash(seed, 100)}
	if way == keepKill {
		h = &hooked{Mem: c.d.Mem.CrashKeeping(func(int64) bool { return false })}
		h.writes = append(h.writes, c.d.rewrite(h.Mem)...)
	}
	pages = pages.crash(seed, 100, false)
	cfg := c.cfg
	n := uint64(0)
	h.before = func() {
		n++
		for _, again := range []int{keepNone, keepBlocks, keepWrites, keepLast, keepAll} {
			what := fmt.Sprintf("%s, operation %d of recovery, %s", wayNames[way], n, wayNames[again])
			c.read(c.open(h.crash(seed+n, again), pages.crash(seed+n, 50, false), "boot-3", what), false, what)
			c.shots.Add(1)
		}
	}
	cfg.Disk, cfg.Pages, cfg.BootID = h, pages, bootOf(way)
	if _, err := Open(cfg); err != nil {
		c.fail("%s, recovery that crashes later: %v", wayNames[way], err)
	}
}

// rewrite writes what is not synced in h to a copy of its durable state.
func (h *hooked) rewrite(to *disk.Mem) [][2]int64 {
	for _, w := range h.writes {
		b := make([]byte, (w[1]-w[0])*disk.SectorBytes)
		if err := disk.ReadAt(h.Mem, b, w[0]*disk.SectorBytes); err != nil {
			panic(err)
		}
		if err := disk.WriteAt(to, b, w[0]*disk.SectorBytes); err != nil {
			panic(err)
		}
	}
	return h.writes
}

func (c *camera) open(d *disk.Mem, pages *memPages, boot, what string) *Store {
	cfg := c.cfg
	cfg.Disk, cfg.Pages, cfg.BootID = d, pages, boot
	s, err := Open(cfg)
	if err != nil {
		c.fail("%s: %v", what, err)
	}
	if n := s.Usage().Note; n != "" {
		c.fail("%s: recovery takes a crash for damage: %s", what, n)
	}
	if len(s.roots) > 0 {
		c.loaded.Add(1)
	}
	if why := figures(s); why != "" {
		c.fail("%s: %s", what, why)
	}
	return s
}

type content [regs]state

// read reads everything. A kill loses nothing that was answered.
func (c *camera) read(s *Store, kill bool, what string) (got content) {
	for ch := ids.ChunkID(1); ch <= imageChunks; ch++ {
		for l := range ids.LayerID(imageLayers) {
			r := c.ask(s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Epoch: 2000, Chunk: c.chunk(ch), Layer: l, Block: imageFirst, Count: imageBlocks})
			if r.Status == status.NotFound && ch == 2 { // it is about to be dropped
				r = &wire.Reply{Entries: make([]wire.Entry, imageBlocks), Data: make([]byte, imageBlocks*blockBytes)}
			} else if r.Status != status.OK {
				c.fail("%s: chunk %d, layer %d: %v", what, ch, l, r.Err())
			}
			for i := range ids.Block(imageBlocks) {
				n := reg(ch, l, imageFirst+i)
				t := &c.regs[n]
				may := t.since
				if kill {
					may = may[t.answered:]
				}
				var ok bool
				if got[n], ok = among(may, r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); !ok {
					c.fail("%s: chunk %d, layer %d, block %d holds %+v, may be %+v", what, ch, l, imageFirst+i, r.Entries[i], may)
				}
			}
		}
	}
	for _, ch := range c.gone {
		for l := range ids.LayerID(imageLayers) {
			r := c.ask(s, wire.Request{Kind: wire.Read, Volume: 1, Epoch: 2000, Chunk: ch, Layer: l, Block: imageFirst, Count: imageBlocks})
			if r.Status != status.NotFound && (r.Status != status.OK || !empty(r.Data)) {
				c.fail("%s: the dropped chunk %d is back: %v", what, ch, r.Err())
			}
		}
	}
	if r := c.ask(s, wire.Request{Kind: wire.Read, Volume: 1, Epoch: c.kept - min(c.kept, 1), Chunk: 1, Count: 1}); c.kept > 1 && r.Status != status.Fenced {
		c.fail("%s: epoch %d was sealed, but %d is answered", what, c.kept, c.kept-1)
	}
	return got
}

// isBlockOf is bytes.Equal(data, blockOf(v)) without making it.
func isBlockOf(data []byte, v uint64) bool {
	rng := rand.New(rand.NewPCG(v, 9))
	for i := 0; i < blockBytes; i += 512 {
		if le.Uint64(data[i:]) != v || le.Uint64(data[i+8:]) != rng.Uint64() || !empty(data[i+16:i+512]) {
			return false
		}
	}
	return true
}

func among(may []state, e wire.Entry, data []byte) (state, bool) {
	for _, s := range may {
		if s.kind == e.Kind && s.ver == e.Version && (s.kind == wire.EntryData && isBlockOf(data, s.val) || s.kind != wire.EntryData && empty(data)) {
			return s, true
		}
	}
	return state{}, false
}

// goOn writes to a recovered store, with background work, and opens it again.
func (c *camera) goOn(s *Store, d *disk.Mem, pages *memPages, boot string, want *content, what string) {
	rng := rand.New(rand.NewPCG(uint64(c.op), 5))
	for i := range 8 {
		b := imageFirst + ids.Block(rng.IntN(imageBlocks-4))
		q := wire.Request{Kind: wire.Write, Volume: 1, Epoch: 1000, Chunk: 1, Block: b, Count: 4, Version: ids.MakeVersion(1000, uint64(i+1))}
		for j := range ids.Block(4) {
			d := blockOf(uint64(1000000 + i))
			q.Data = append(q.Data, d...)
			q.Sums = append(q.Sums, wire.BlockSum(1, 1, 0, b+j, q.Version, d))
			want[reg(1, 0, b+j)] = state{wire.EntryData, q.Version, uint64(1000000 + i)}
		}
		if r := c.ask(s, q); r.Status != status.OK {
			c.fail("%s: writing on: %v", what, r.Err())
		}
		s.Step(time.Duration(i) * 2 * time.Second)
	}
	if err := s.Close(); err != nil {
		c.fail("%s: close: %v", what, err)
	}
	s = c.open(d, pages, boot, what+", closed")
	old := c.regs
	for i := range c.regs {
		c.regs[i] = track{since: []state{want[i]}}
	}
	c.read(s, false, what+", closed")
	c.regs = old
}

// figures recounts what the store believes of its segments.
func figures(s *Store) string {
	live, marks := make([]uint32, len(s.segs)), make([]uint32, len(s.segs))
	total := uint64(0)
	for _, v := range s.vols {
		mine := uint64(0)
		for _, c := range v.order {
			for n := range c.pages {
				p, err := s.idx.page(c, uint32(n), false)
				if err != nil {
					return err.Error()
				}
				for i := uint32(0); p != nil && i < pageBlocks; i++ {
					e := p.at(i)
					switch {
					case e.loc == 0:
					case e.version > v.high:
						return "a block is above its volume's highest version"
					case e.kind == kindData:
						live[s.segOf(e.loc).n]++
						mine++
					default:
						marks[s.segOf(e.loc).n]++
					}
				}
			}
		}
		if mine != v.live {
			return fmt.Sprintf("volume %d has %d live blocks, not %d", v.id, mine, v.live)
		}
		total += mine
	}
	for i, g := range s.segs {
		if g.live != live[i] || g.marks != marks[i] || (live[i]+marks[i] > 0 && (g.state == segFree || g.state == segLeaving)) {
			return fmt.Sprintf("segment %d in state %d has %d live blocks and %d marks, not %d and %d", i, g.state, live[i], marks[i], g.live, g.marks)
		}
	}
	if total != s.live {
		return fmt.Sprintf("%d live blocks, not %d", total, s.live)
	}
	return ""
}

// workloads lists all of up to three letters, and random ones.
func workloads(random int) (names []string) {
	names = append(names, "")
	for from := 0; len(names[from]) < 3; from++ {
		for _, l := range letters {
			names = append(names, names[from]+string(l))
		}
	}
	for i := range random {
		names = append(names, "r"+strconv.Itoa(i))
	}
	return names[1:]
}

func TestCrashImages(t *testing.T) {
	var shots, loaded atomic.Int64
	if again := os.Getenv("CAIRN_CRASH"); again != "" {
		name, op, _ := strings.Cut(again, " ")
		only, err := strconv.Atoi(op)
		if err != nil {
			t.Fatalf("CAIRN_CRASH is %q: it takes a workload and an operation, such as 'abc 7'", again)
		}
		c := newCamera(t, name, seedOf(name), &shots, &loaded)
		c.only = only
		c.run()
		return
	}
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	names, least := workloads(500), int64(200000)
	if testing.Short() {
		names, least = append(workloads(0)[:13+13*13], workloads(12)[13+13*13+13*13*13:]...), 2000
	}
	const shards = 4
	t.Run("all", func(t *testing.T) {
		for n := range shards {
			t.Run(strconv.Itoa(n), func(t *testing.T) {
				t.Parallel()
				for i := n; i < len(names); i += shards {
					c := newCamera(t, names[i], seedOf(names[i]), &shots, &loaded)
					c.light = testing.Short()
					c.run()
				}
			})
		}
	})
	t.Logf("%d images of %d workloads, %d openings from a checkpoint", shots.Load(), len(names), loaded.Load())
	if shots.Load() < least || loaded.Load() < shots.Load()/10 {
		t.Fatalf("that are less than %d, or hardly any from a checkpoint", least)
	}
}

// seedOf varies what a name does not say: which sectors are kept, and how often
// checkpoints are made.
func seedOf(name string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	return h % 1000003
}
