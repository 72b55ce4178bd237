package store

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// thinDisk is a memory disk over a file system with little room. A write where
// nothing was allocated finds none: that would stop the store.
type thinDisk struct {
	t    *testing.T
	mem  *disk.Mem
	room int // segments that may be allocated
	has  map[int64]bool
}

func newThin(t *testing.T, m *disk.Mem, room int) *thinDisk {
	return &thinDisk{t, m, room, map[int64]bool{0: true}} // where it was formatted
}

func (d *thinDisk) Size() int64  { return d.mem.Size() }
func (d *thinDisk) Close() error { return nil }

func (d *thinDisk) Submit(op *disk.Op) {
	seg := (op.Off - logStart*blockBytes) / testSeg
	switch op.Kind {
	case disk.Allocate:
		if !d.has[seg] && len(d.has) >= d.room {
			op.Done(status.Errorf(status.NoSpace, "no room: %w", syscall.ENOSPC))
			return
		}
		d.has[seg] = true
	case disk.Discard:
		delete(d.has, seg)
	case disk.Write:
		if op.Off >= logStart*blockBytes && !d.has[seg] {
			d.t.Errorf("a write at %d finds no room", op.Off)
		}
	}
	d.mem.Submit(op)
}

// The file system under a thin store is full: data is refused, nothing is lost,
// everything else passes, the store can be opened again, and it goes on when
// there is room — because data was dropped, or because others made some.
func TestFileSystemBelowIsFull(t *testing.T) {
	m := formatMem(t)
	d := newThin(t, m, 14)
	s := open(t, d, testBoot)
	n, ver := 0, uint64(0)
	write := func(b, count int) *wire.Reply {
		ver++
		q := put(1, ids.Block(b), count, ids.MakeVersion(1, ver), uint64(b))
		q.Epoch = 1
		return ask(s, q)
	}
	fill := func() {
		t.Helper()
		for ; n < 10000; n += 10 {
			r := write(n, 10)
			if r.Status == status.NoSpace {
				break
			}
			mustOK(t, r)
		}
	}
	check := func(what string, blocks int) {
		t.Helper()
		for b := 0; b < blocks; b += 10 {
			r := mustOK(t, ask(s, readOf(1, ids.Block(b), 10, 1)))
			if !bytes.Equal(r.Data[9*blockBytes:], blockOf(uint64(b+9))) {
				t.Fatalf("%s: block %d is not what was written", what, b+9)
			}
		}
	}
	fill()
	if u := s.Usage(); n < 200 || u.LiveBytes > u.CapacityBytes/2 || u.State == "ok" {
		t.Fatalf("full after %d blocks: %+v", n, u)
	}
	check("full", n)
	for i := range 100 { // overwriting is refused or done, trimming and sealing are done
		if r := write(i%20*10, 10); r.Status != status.NoSpace {
			mustOK(t, r)
		}
		ver++
		mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Epoch: 1, Chunk: 2, Block: ids.Block(i), Count: 5, Version: ids.MakeVersion(1, ver)}))
		mustOK(t, ask(s, wire.Request{Kind: wire.Settle, Volume: 1, Epoch: 1, Floor: ids.MakeVersion(1, ver)}))
		s.Step(time.Duration(i) * time.Second)
	}
	check("still full", n)
	s = open(t, d, testBoot) // killed and opened on the full file system
	check("opened", n)
	d.room += 4 // somebody else made room
	s.Step(1000 * time.Second)
	before := n
	fill()
	if n <= before {
		t.Fatal("nothing more fits although there is room")
	}
	check("more room", n)
	ver++
	mustOK(t, ask(s, wire.Request{Kind: wire.Zero, Volume: 1, Epoch: 1, Chunk: 1, Count: uint32(n / 2), Version: ids.MakeVersion(1, ver)}))
	steps(s, 50)
	for b := 0; b+10 <= n/2; b += 10 {
		if r := write(b, 10); r.Status != status.NoSpace || b < n/2-30 { // the tombstones take a little too
			mustOK(t, r)
		}
		s.Step(time.Duration(2000+b) * time.Second)
	}
	for b := n - n/2 + 10; b+10 <= n; b += 10 {
		r := mustOK(t, ask(s, readOf(1, ids.Block(b), 1, 1)))
		if !bytes.Equal(r.Data, blockOf(uint64(b))) {
			t.Fatalf("after trimming others, block %d is not what was written", b)
		}
	}
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Epoch: 1}))
	d.room = 100
	steps(s, 50)
	if u := s.Usage(); u.LiveBytes != 0 || u.State != "ok" || len(d.has) > s.stock()+2 {
		t.Fatalf("after the drop: %+v, %d segments allocated", u, len(d.has))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Random requests while the room below comes and goes: no write finds none,
// what is answered OK stays, over kills and power losses too.
func TestRoomComesAndGoes(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 3
	}
	refused := 0
	for seed := range seeds {
		m := formatMem(t)
		d := newThin(t, m, 10)
		p := newPlayer(t, seed, open(t, d, testBoot))
		rng := rand.New(rand.NewPCG(seed, 77))
		for range 600 {
			q, after := p.next()
			switch r := ask(p.s, q); r.Status {
			case status.OK:
				p.m = after
			case status.NoSpace:
				refused++
			default:
				t.Fatalf("seed %d: %s: %v", seed, q.Kind, r.Err())
			}
			switch rng.IntN(40) {
			case 0:
				d.room = 7 + rng.IntN(6)
			case 1:
				mem := d.mem.Crash(seed, 100)
				d = &thinDisk{t, mem, d.room, d.has}
				p.s = open(t, d, testBoot)
			}
			if rng.IntN(3) == 0 {
				p.now += 400e6
				p.s.Step(p.now)
			}
		}
		verify(t, p.s, p.m, p.epoch, "at the end")
	}
	if refused < int(seeds) {
		t.Errorf("%d requests were refused: the file system was hardly ever full", refused)
	}
}

// A file that keeps its space is opened, filled and used again while its file
// system below has no byte left: see TestFullFileSystem of chunk/disk for the
// file system's part.
func TestReservedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d, err := disk.Create(path, 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Reserve(); err != nil {
		t.Fatal(err)
	}
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	s := open(t, d, testBoot)
	for round := range uint64(20) { // many generations of segments that are never discarded
		for b := 0; b < 1000; b += 100 {
			mustOK(t, ask(s, put(1, ids.Block(b), 100, ids.MakeVersion(1, round+1), round*10000+uint64(b))))
		}
		s.Step(time.Duration(round) * time.Second)
		if round%5 == 4 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, d, testBoot)
		}
	}
	r := mustOK(t, ask(s, readOf(1, 0, 1000, 0)))
	for b := range 1000 {
		if !bytes.Equal(r.Data[b*blockBytes:(b+1)*blockBytes], blockOf(uint64(190000+b))) {
			t.Fatalf("block %d is not what was written", b)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
