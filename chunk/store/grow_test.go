package store

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// growing is a disk of which size bytes are there.
type growing struct {
	*disk.Mem
	size int64
}

func (d *growing) Size() int64 { return d.size }

const grownSize = testSize + 40*testSeg

// toGrow is a closed store on a disk that has become twice as large, with
// somebody's old data in the new part.
func toGrow(t *testing.T, seed uint64) (*disk.Mem, *player) {
	t.Helper()
	d := &growing{disk.NewMem(grownSize), testSize}
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	junk := make([]byte, 30*blockBytes)
	rng := rand.New(rand.NewPCG(seed, 3))
	for i := range junk {
		junk[i] = byte(rng.Uint32())
	}
	first := make([]byte, 3*blockBytes) // a head of this store, but not of that place
	if err := disk.ReadAt(d, first, offset(logStart)); err != nil {
		t.Fatal(err)
	}
	for off := int64(testSize); off < grownSize; off += int64(len(junk)) + testSeg/3 {
		if err := disk.WriteAt(d.Mem, append(first, junk...)[:min(int64(len(junk)), grownSize-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	p := newPlayer(t, seed, open(t, d, testBoot))
	p.play(60)
	if err := p.s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := disk.SyncAll(d); err != nil {
		t.Fatal(err)
	}
	return d.Mem, p
}

// fillUp writes another chunk until the store says that it is full; it returns
// how many blocks that were.
func fillUp(t *testing.T, s *Store, epoch ids.Epoch) (n int) {
	t.Helper()
	for ; ; n += 32 {
		q := put(8, ids.Block(n), 32, ids.MakeVersion(epoch, 1), uint64(n))
		q.Epoch = epoch
		r := ask(s, q)
		if r.Status == status.NoSpace {
			return n
		}
		mustOK(t, r)
		steps(s, 2)
	}
}

// filled holds the store to what fillUp wrote.
func filled(t *testing.T, s *Store, epoch ids.Epoch, n int) {
	t.Helper()
	for b := 0; b < n; b += 32 {
		r := mustOK(t, ask(s, readOf(8, ids.Block(b), 32, epoch)))
		for i := range 32 {
			if why := compare(state{1, ids.MakeVersion(epoch, 1), uint64(b + i)}, r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why != "" {
				t.Fatalf("block %d: %s", b+i, why)
			}
		}
	}
}

// A store whose disk became larger uses all of it and keeps what it has, for
// good.
func TestGrow(t *testing.T) {
	d, p := toGrow(t, 1)
	before := open(t, d.Crash(1, 100), testBoot).Usage()
	from, to, err := Grow(d)
	if err != nil || from != 40*testSeg || to != 80*testSeg {
		t.Fatalf("grown from %d to %d: %v", from, to, err)
	}
	if _, _, err := Grow(d); status.Of(err) != status.Invalid {
		t.Errorf("grown again on the same disk: %v", err)
	}
	s := open(t, d, testBoot)
	if u := s.Usage(); u.CapacityBytes < 2*before.CapacityBytes || u.Segments != 80 || u.LiveBytes != before.LiveBytes || u.Note != "" {
		t.Fatalf("before %+v, now %+v", before, u)
	}
	verify(t, s, p.m, p.epoch, "grown")
	n := fillUp(t, s, p.epoch)
	if got := uint64(n) * blockBytes; got < before.CapacityBytes {
		t.Fatalf("it takes %d bytes more, and took %d before", got, before.CapacityBytes)
	}
	for range 2 {
		filled(t, s, p.epoch, n)
		verify(t, s, p.m, p.epoch, "grown and full")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if rep, err := Inspect(d, nil); err != nil || len(rep.Damage) > 0 {
			t.Fatalf("%v, %v", rep.Damage, err)
		}
		s = open(t, d, testBoot)
	}
}

// The power goes after every operation of growing, and one copy of the
// superblock is lost after that: what the store holds is there, whether it has
// grown or not, also what it wrote into the new part.
func TestCrashWhileGrowing(t *testing.T) {
	d, p := toGrow(t, 2)
	start := d.Ops()
	whole := d.Crash(1, 100)
	if _, _, err := Grow(whole); err != nil {
		t.Fatal(err)
	}
	total := whole.Ops()
	if total < 40 {
		t.Fatalf("%d operations after %d: the new segments are not emptied", total, start)
	}
	grown := 0
	for n := 38; n <= total+1; n++ { // what is before empties one segment more each
		for _, keep := range []int{0, 50, 100} {
			c := d.Crash(uint64(n), 100)
			c.CutAt(n)
			if _, _, err := Grow(c); err == nil && n <= total {
				t.Fatalf("operation %d failed and nobody was told", n)
			}
			c = c.Crash(uint64(n), keep)
			what := fmt.Sprintf("cut at operation %d of %d, %d %% kept", n, total, keep)
			s, err := Open(Config{Disk: c, BootID: "boot-2"})
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if s.Incarnation() != 1 || s.Usage().Note != "" {
				t.Fatalf("%s: %s", what, s.Usage().Note)
			}
			verify(t, s, p.m, p.epoch, what)
			if s.Usage().Segments == 40 {
				continue
			}
			grown++
			size := fillUp(t, s, p.epoch)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			for copies := range int64(2) {
				e := c.Crash(1, 100)
				e.Flip(copies*blockBytes+100, 1)
				s = open(t, e, "boot-2")
				filled(t, s, p.epoch, size)
				verify(t, s, p.m, p.epoch, what+", a superblock lost")
			}
		}
	}
	if grown < 4 {
		t.Fatalf("%d of the cuts left a grown store", grown)
	}
}

// A disk that is too small, or larger than a store's segments can be listed
// for, is refused in words that say so, untouched.
func TestDiskOfAWrongSize(t *testing.T) {
	for _, size := range []int64{0, 512, blockBytes, 2 * blockBytes, 1 << 20, 8 << 20} {
		d := disk.NewMem(size)
		if err := Make(d, Format{ID: testID, Incarnation: 1}); status.Of(err) != status.Invalid {
			t.Errorf("a disk of %d bytes: %v", size, err)
		}
		if _, err := Open(Config{Disk: d, BootID: testBoot}); status.Of(err) != status.NotFound {
			t.Errorf("opened on %d bytes: %v", size, err)
		}
		if d.Ops() > 0 {
			t.Errorf("a disk of %d bytes was written to", size)
		}
	}
	d, _ := toGrow(t, 3)
	if _, _, err := Grow(&growing{d, testSize - testSeg}); status.Of(err) != status.Corrupt {
		t.Errorf("grown on a disk that was cut: %v", err)
	}
	if _, _, err := Grow(&growing{d, 1 << 40}); status.Of(err) != status.TooBig {
		t.Errorf("small segments on a large disk: %v", err)
	}
	if _, _, err := Grow(disk.NewMem(testSize)); status.Of(err) != status.NotFound {
		t.Errorf("grown where there is no store: %v", err)
	}
	s := open(t, d, testBoot)
	if u := s.Usage(); u.Segments != 40 {
		t.Errorf("%d segments", u.Segments)
	}
}
