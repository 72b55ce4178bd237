package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// slowDisk completes operations when the test says, in any order. A sync
// covers what was complete when it was submitted, and no more. What is being
// read may be neither written nor given back meanwhile.
type slowDisk struct {
	*disk.Mem
	t       *testing.T
	pending []func()
	reading map[*disk.Op]bool
}

// hide keeps the memory disk's ReadNow from the store.
type hide struct{ d *slowDisk }

func (h hide) Submit(op *disk.Op) { h.d.Submit(op) }
func (h hide) Size() int64        { return h.d.Size() }
func (h hide) Close() error       { return nil }

func (d *slowDisk) Submit(op *disk.Op) {
	if op.Kind == disk.Sync {
		err := disk.SyncAll(d.Mem)
		d.pending = append(d.pending, func() { op.Done(err) })
		return
	}
	from, to := extent(op)
	for r := range d.reading {
		if a, b := extent(r); op.Kind != disk.Read && from < b && a < to {
			d.t.Fatalf("%s of bytes %d to %d while they are being read", op.Kind, max(a, from), min(b, to))
		}
	}
	if op.Kind == disk.Read {
		if d.reading == nil {
			d.reading = map[*disk.Op]bool{}
		}
		d.reading[op] = true
	}
	d.pending = append(d.pending, func() { delete(d.reading, op); d.Mem.Submit(op) })
}

func extent(op *disk.Op) (from, to int64) {
	n := op.Len
	for _, b := range op.Bufs {
		n += int64(len(b))
	}
	return op.Off, op.Off + n
}

// complete completes one pending operation.
func (d *slowDisk) complete(rng *rand.Rand) bool {
	n := len(d.pending)
	if n == 0 {
		return false
	}
	i := rng.IntN(n)
	f := d.pending[i]
	d.pending[i] = d.pending[n-1]
	d.pending = d.pending[:n-1]
	f()
	return true
}

// flight is what a request in flight must bring.
type flight struct {
	q     wire.Request
	least map[blockID]ids.Version // read: answered when it was sent
	acked map[blockID]ids.Version // flush: likewise
}

// swarm keeps many requests in flight over a slow disk.
type swarm struct {
	t       *testing.T
	seed    uint64
	rng     *rand.Rand
	s       *Store
	d       *slowDisk
	ctr     uint64
	id      uint64
	flying  map[uint64]*flight
	acked   map[blockID]ids.Version // highest answered write
	durable map[blockID]ids.Version // highest answered write before an answered flush was sent
	zero    map[ids.Version]bool
}

const swarmBlocks = 60

func (w *swarm) Replies(rs []*wire.Reply) {
	for _, r := range rs {
		f := w.flying[r.ID]
		if f == nil {
			w.t.Fatalf("seed %d: request %d answered twice", w.seed, r.ID)
		}
		delete(w.flying, r.ID)
		if r.Status != status.OK {
			w.t.Fatalf("seed %d: %s: %v", w.seed, r.Kind, r.Err())
		}
		switch f.q.Kind {
		case wire.Write, wire.Zero:
			for i := range f.q.Count {
				k := blockID{f.q.Chunk, f.q.Block + ids.Block(i)}
				w.acked[k] = max(w.acked[k], f.q.Version)
			}
		case wire.Flush:
			for k, v := range f.acked {
				w.durable[k] = max(w.durable[k], v)
			}
		case wire.Read:
			for i, e := range r.Entries {
				w.check(blockID{e.Chunk, e.Block}, e, r.Data[i*blockBytes:(i+1)*blockBytes], f.least)
			}
		}
	}
}

// check holds one block against what it must be at least.
func (w *swarm) check(k blockID, e wire.Entry, data []byte, least map[blockID]ids.Version) {
	w.t.Helper()
	if e.Version < least[k] || e.Version.Counter() > w.ctr {
		w.t.Fatalf("seed %d: block %v is at %s, answered was %s", w.seed, k, e.Version, least[k])
	}
	want := state{wire.EntryData, e.Version, uint64(e.Version)<<8 | uint64(k.b)}
	if e.Version == 0 {
		want.kind = wire.EntryHole
	} else if w.zero[e.Version] {
		want.kind = wire.EntryZero
	}
	if why := compare(want, e, data); why != "" {
		w.t.Fatalf("seed %d: block %v: %s", w.seed, k, why)
	}
}

func (w *swarm) send() {
	var qs []*wire.Request
	for range 1 + w.rng.IntN(8) {
		w.id++
		c, b := ids.ChunkID(1+w.rng.IntN(2)), ids.Block(w.rng.IntN(swarmBlocks))
		n := 1 + w.rng.IntN(min(12, swarmBlocks-int(b)))
		f := &flight{q: wire.Request{ID: w.id, Volume: 1, Epoch: 1, Chunk: c, Block: b, Count: uint32(n)}}
		switch q := &f.q; w.rng.IntN(8) {
		case 0:
			q.Kind, q.Version = wire.Zero, w.version()
			w.zero[q.Version] = true
		case 1:
			q.Kind, f.acked = wire.Flush, clone(w.acked)
		case 2, 3:
			q.Kind, q.Flags, f.least = wire.Read, wire.FlagEntries, clone(w.acked)
			q.Into = make([]byte, n*blockBytes)
		default:
			q.Kind, q.Version = wire.Write, w.version()
			for i := range n {
				d := blockOf(uint64(q.Version)<<8 | uint64(b) + uint64(i))
				q.Data = append(q.Data, d...)
				q.Sums = append(q.Sums, wire.BlockSum(1, c, 0, b+ids.Block(i), q.Version, d))
			}
		}
		w.flying[w.id] = f
		qs = append(qs, &f.q)
	}
	w.s.Submit(qs, w)
	for _, q := range qs { // both are the caller's again
		clear(q.Data)
		clear(q.Into)
	}
}

func clone(m map[blockID]ids.Version) map[blockID]ids.Version {
	c := map[blockID]ids.Version{}
	for k, v := range m {
		c[k] = v
	}
	return c
}

func (w *swarm) version() ids.Version {
	w.ctr++
	return ids.MakeVersion(1, w.ctr)
}

// Many requests in flight over a disk that completes in any order, through
// many generations of segments: no answer is lost, reads see what was answered,
// a kill keeps what was answered and a power loss what was flushed.
func TestManyRequestsOverASlowDisk(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		d := disk.NewMem(logStart*blockBytes + 16*testSeg)
		if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
			t.Fatal(err)
		}
		w := &swarm{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 3)), acked: map[blockID]ids.Version{},
			durable: map[blockID]ids.Version{}, zero: map[ids.Version]bool{}}
		for life := range 4 {
			w.life(d, life)
			keep, boot := 100, life
			least := w.acked
			if life%2 == 1 {
				keep, boot = w.rng.IntN(101), life+1
				least = w.durable
			}
			d = d.Crash(seed, keep)
			w.afterwards(d, boot, least)
		}
	}
}

func bootName(n int) string { return "boot-" + string(rune('a'+n)) }

// life runs a store for a while and leaves it as it stands. Boots are numbered
// so that a kill is followed by the same one.
func (w *swarm) life(m *disk.Mem, n int) {
	w.d = &slowDisk{Mem: m, t: w.t}
	s := w.open(m, n)
	s.disk = hide{w.d}
	if w.rng.IntN(2) == 0 {
		s.now = nil
	}
	w.s, w.flying = s, map[uint64]*flight{}
	now := time.Duration(0)
	for range 150 {
		if len(w.flying) < 60 {
			w.send()
		}
		for range w.rng.IntN(6) {
			w.d.complete(w.rng)
		}
		if w.rng.IntN(4) == 0 {
			now += 400 * time.Millisecond
			s.Step(now)
		}
	}
	if w.rng.IntN(2) == 0 {
		return // with everything in flight
	}
	for w.d.complete(w.rng) {
	}
	if len(w.flying) > 0 {
		w.t.Fatalf("seed %d: %d requests were never answered", w.seed, len(w.flying))
	}
}

func (w *swarm) open(m *disk.Mem, n int) *Store {
	s, err := Open(Config{Disk: m, BootID: bootName(n)})
	if err != nil {
		w.t.Fatalf("seed %d: %v", w.seed, err)
	}
	if note := s.Usage().Note; note != "" {
		w.t.Fatalf("seed %d: %s", w.seed, note)
	}
	return s
}

// afterwards reads everything once; from then on that is what must be there.
func (w *swarm) afterwards(m *disk.Mem, boot int, least map[blockID]ids.Version) {
	s := w.open(m, boot)
	found := map[blockID]ids.Version{}
	for c := ids.ChunkID(1); c <= 2; c++ {
		r := mustOK(w.t, ask(s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Epoch: 1, Chunk: c, Count: swarmBlocks}))
		for i, e := range r.Entries {
			k := blockID{c, e.Block}
			w.check(k, e, r.Data[i*blockBytes:(i+1)*blockBytes], least)
			found[k] = e.Version
		}
	}
	w.acked, w.durable = found, clone(found)
}

// A segment that compaction is reading dies, is given up, and its place is
// wanted again: not before the read is done.
func TestVictimIsHeldWhileItIsRead(t *testing.T) {
	d := &slowDisk{Mem: formatMem(t), t: t}
	s := open(t, d.Mem, testBoot)
	for i := range 8 {
		mustOK(t, ask(s, put(1, ids.Block(i*50), 50, ids.MakeVersion(1, uint64(i+1)), uint64(i*1000))))
	}
	for i := range 3 { // most of the first ones
		mustOK(t, ask(s, put(1, ids.Block(i*50), 48, ids.MakeVersion(1, uint64(9+i)), 1)))
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	s.disk, s.now = hide{d}, nil
	s.Step(time.Second)
	victim := s.compact.victim
	if victim == nil || len(d.reading) != 1 {
		t.Fatalf("compaction reads nothing: %+v", victim)
	}
	read := d.pending[0]
	d.pending = d.pending[1:]
	drain := func() {
		for len(d.pending) > 0 {
			f := d.pending[0]
			d.pending = d.pending[1:]
			f()
		}
	}
	if drain(); len(d.reading) != 1 {
		t.Fatal("that was not the read")
	}
	box := newInbox()
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 200 { // the log goes round over all that is free
		q := put(1, ids.Block(50*rng.IntN(8)), 50, ids.MakeVersion(1, uint64(100+i)), uint64(i))
		if i < 8 {
			q = put(1, ids.Block(i*50), 50, ids.MakeVersion(1, uint64(100+i)), uint64(i))
		}
		q.ID = uint64(i + 1)
		s.Submit([]*wire.Request{&q}, box)
		drain()
		if i%4 == 0 {
			s.Step(time.Duration(i+2) * time.Second)
			drain()
		}
	}
	if victim.live+victim.marks > 0 || victim.state != segLeaving {
		t.Fatalf("the victim is in state %d with %d live blocks", victim.state, victim.live)
	}
	read()
	drain()
	for i := range 20 {
		s.Step(time.Duration(1000+i) * time.Second)
		drain()
	}
	if len(box.got) != 200 || victim.state == segLeaving {
		t.Fatalf("%d of 200 are answered, the victim is in state %d", len(box.got), victim.state)
	}
	if why := figures(s); why != "" {
		t.Fatal(why)
	}
}
