package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

// memory is a Bucket that dies at its n-th operation.
type memory struct {
	mu      sync.Mutex
	objects map[string][]byte
	left    int // operations until it dies; < 0: never
}

var errDead = errors.New("the process was killed here")

func newMemory() *memory { return &memory{objects: map[string][]byte{}, left: -1} }

// op runs with the lock held; false: dead.
func (m *memory) op(f func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left == 0 {
		return errDead
	}
	if m.left > 0 {
		m.left--
	}
	f()
	return nil
}

func (m *memory) Put(_ context.Context, name string, data []byte) error {
	return m.op(func() { m.objects[name] = bytes.Clone(data) })
}

func (m *memory) Get(_ context.Context, name string) (b []byte, err error) {
	if err := m.op(func() { b = bytes.Clone(m.objects[name]) }); err != nil {
		return nil, err
	}
	if b == nil {
		return nil, status.Errorf(status.NotFound, "there is no %s", name)
	}
	return b, nil
}

func (m *memory) Has(_ context.Context, name string) (ok bool, err error) {
	err = m.op(func() { _, ok = m.objects[name] })
	return ok, err
}

func (m *memory) List(_ context.Context, prefix string, each func(string) error) error {
	var names []string
	err := m.op(func() {
		for n := range m.objects {
			if strings.HasPrefix(n, prefix) {
				names = append(names, n)
			}
		}
	})
	for _, n := range names {
		if err == nil {
			err = each(n)
		}
	}
	return err
}

func (m *memory) Remove(_ context.Context, name string) error {
	return m.op(func() { delete(m.objects, name) })
}

func (m *memory) String() string { return "memory" }

// disk is a volume that is written to, and what differs since its last backup.
type disk struct {
	data  []byte
	dirty Dirty
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) { return copy(p, d.data[off:]), nil }

func (d *disk) write(off int, b []byte) {
	copy(d.data[off:], b)
	d.dirty.Add(uint64(off), uint64(len(b)))
}

// image is what Restore writes to.
type image []byte

func (m image) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }

func restored(t *testing.T, r *Repo, x *Index) []byte {
	t.Helper()
	m := make(image, x.SizeBytes)
	if err := r.Restore(context.Background(), x, nil, m, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	return m
}

// Backups of a disk that is written to, grown, shrunk and zeroed each show what the
// disk was; they are removed in any order, and the others stay whole; when the last
// is gone nothing is left.
func TestBackupsShowWhatWas(t *testing.T) {
	ctx := context.Background()
	seeds := uint64(3)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(seed, 1))
		b := newMemory()
		r, err := Open(ctx, b, true)
		if err != nil {
			t.Fatal(err)
		}
		d := &disk{data: make([]byte, 2*ChunkBytes+5*PieceBytes+8192), dirty: Dirty{}}
		shows := map[string][]byte{}
		var base *Index
		for i := range 5 {
			for range rng.IntN(6) {
				buf := bytes.Repeat([]byte{byte(rng.IntN(4))}, 1+rng.IntN(2*PieceBytes))
				d.write(rng.IntN(len(d.data)-len(buf)), buf)
			}
			switch rng.IntN(4) {
			case 0:
				d.data = append(d.data, make([]byte, rng.IntN(ChunkBytes)/4096*4096)...)
			case 1: // what is cut off reads as zeros after growing again
				n := max(ChunkBytes, (len(d.data)-rng.IntN(ChunkBytes))/4096*4096)
				d.data = append([]byte(nil), d.data[:n]...)
			}
			x := &Index{Volume: "v", ID: fmt.Sprint(i), SizeBytes: uint64(len(d.data))}
			if base != nil {
				x.Base = base.ID
			}
			if err := r.Begin(ctx, x); err != nil {
				t.Fatal(err)
			}
			if err := r.Create(ctx, x, base, d.dirty, d, func(int64) {}); err != nil {
				t.Fatal(err)
			}
			if base, err = r.Find(ctx, "v"); err != nil || base.ID != x.ID {
				t.Fatalf("the last backup is %+v, %v", base, err)
			}
			d.dirty = Dirty{}
			shows[base.Name()] = bytes.Clone(d.data)
		}
		for len(shows) > 0 {
			xs, err := r.Backups(ctx, "")
			if err != nil || len(xs) != len(shows) {
				t.Fatalf("%d backups, %v", len(xs), err)
			}
			for _, x := range xs {
				if !bytes.Equal(restored(t, r, x), shows[x.Name()]) {
					t.Fatalf("seed %d: %s shows something else", seed, x.Name())
				}
			}
			if bad, _, err := r.Verify(ctx, xs, func(int64) {}); err != nil || len(bad) > 0 {
				t.Fatalf("seed %d: bad %+v, %v", seed, bad, err)
			}
			name := xs[rng.IntN(len(xs))].Name()
			if _, err := r.Remove(ctx, []string{name}); err != nil {
				t.Fatal(err)
			}
			delete(shows, name)
		}
		if len(b.objects) != 1 {
			t.Fatalf("seed %d: %d objects are left", seed, len(b.objects))
		}
	}
}

// Killed at every single operation, a backup is gone on with, shows what it is to,
// and the one before it is whole at any time.
func TestKilledAtEveryStep(t *testing.T) {
	ctx := context.Background()
	step := 1
	if testing.Short() {
		step = 4
	}
	for n := 0; ; n += step {
		b := newMemory()
		r, err := Open(ctx, b, true)
		if err != nil {
			t.Fatal(err)
		}
		d := &disk{data: make([]byte, ChunkBytes+3*PieceBytes), dirty: Dirty{}}
		backup := func(id string, base *Index) error {
			x := &Index{Volume: "v", ID: id, SizeBytes: uint64(len(d.data))}
			if running, err := r.Running(ctx, "v"); err != nil {
				return err
			} else if len(running) > 0 {
				x = running[0]
			}
			if err := r.Begin(ctx, x); err != nil {
				return err
			}
			return r.Create(ctx, x, base, d.dirty, d, func(int64) {})
		}
		d.write(5, []byte("one"))
		d.write(ChunkBytes+PieceBytes-1, []byte("two"))
		if err := backup("1", nil); err != nil {
			t.Fatal(err)
		}
		first := bytes.Clone(d.data)
		base, err := r.Find(ctx, "v@1")
		if err != nil {
			t.Fatal(err)
		}
		d.dirty = Dirty{}
		d.write(6, []byte("six"))
		d.write(ChunkBytes+2*PieceBytes, []byte("seven"))
		b.left = n
		err = backup("2", base)
		b.left = -1
		if err == nil {
			if n < 10 {
				t.Fatalf("a backup of %d operations", n)
			}
			return
		}
		if !errors.Is(err, errDead) {
			t.Fatal(err)
		}
		if !bytes.Equal(restored(t, r, base), first) {
			t.Fatalf("killed at operation %d: the first backup shows something else", n)
		}
		running, err := r.Running(ctx, "v")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Remove(ctx, nil); (err == nil) != (len(running) == 0) {
			t.Fatalf("killed at operation %d, %d running: removing says %v", n, len(running), err)
		}
		if err := backup("2", base); err != nil {
			t.Fatalf("killed at operation %d, gone on with: %v", n, err)
		}
		xs, err := r.Backups(ctx, "v")
		if err != nil || len(xs) != 2 || !bytes.Equal(restored(t, r, xs[1]), d.data) || !bytes.Equal(restored(t, r, xs[0]), first) {
			t.Fatalf("killed at operation %d: %d backups, %v", n, len(xs), err)
		}
	}
}

// Each flipped bit, lost object and foreign version is named; nothing of it is
// written.
func TestDamageIsNamed(t *testing.T) {
	ctx := context.Background()
	dir, err := OpenDir(t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, dir, true)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{data: make([]byte, 3*PieceBytes), dirty: Dirty{}}
	d.write(PieceBytes, []byte("something"))
	x := &Index{Volume: "v", ID: "1", SizeBytes: uint64(len(d.data))}
	if err := errors.Join(r.Begin(ctx, x), r.Create(ctx, x, nil, d.dirty, d, func(int64) {})); err != nil {
		t.Fatal(err)
	}
	var names []string
	if err := dir.List(ctx, "", func(n string) error { names = append(names, n); return nil }); err != nil || len(names) != 4 {
		t.Fatalf("objects %v, %v", names, err)
	}
	for _, n := range names {
		good, err := dir.Get(ctx, n)
		if err != nil {
			t.Fatal(err)
		}
		check := func(what string) {
			t.Helper()
			names := func(err error) bool { return err != nil && strings.Contains(err.Error(), n) }
			bad := false
			if again, err := Open(ctx, dir, false); err != nil {
				bad = names(err)
			} else if xs, err := again.Backups(ctx, ""); err != nil {
				bad = names(err)
			} else {
				m := make(image, len(d.data))
				bad = names(again.Restore(ctx, x, nil, m, func(int64) {})) && bytes.Equal(m, make([]byte, len(m)))
				found, _, err := again.Verify(ctx, xs, func(int64) {})
				bad = bad && err == nil && len(found) == 1 && strings.Contains(found[0].Why, n)
			}
			if !bad {
				t.Errorf("%s: %s is not named", n, what)
			}
		}
		flipped := bytes.Clone(good)
		flipped[len(flipped)/2] ^= 4
		if n == formatName {
			flipped = bytes.Replace(good, []byte(formatName), []byte("cairn-bäckup"), 1)
		}
		if err := dir.Put(ctx, n, flipped); err != nil {
			t.Fatal(err)
		}
		check("a flipped bit")
		if strings.HasPrefix(n, "data/") {
			if err := dir.Remove(ctx, n); err != nil {
				t.Fatal(err)
			}
			check("a lost object")
		}
		if err := dir.Put(ctx, n, good); err != nil {
			t.Fatal(err)
		}
	}
	if err := dir.Put(ctx, formatName, []byte(`{"format":"cairn-backup","version":2}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, dir, true); status.Of(err) != status.Unsupported {
		t.Fatalf("a version of the future: %v", err)
	}
	other := newMemory()
	other.objects["photo.jpg"] = []byte("x")
	if _, err := Open(ctx, other, true); status.Of(err) != status.Exists {
		t.Fatalf("a bucket with something else: %v", err)
	}
}

// half is where a restore writes until it is killed.
type half struct {
	image
	left atomic.Int64
}

func (h *half) WriteAt(p []byte, off int64) (int, error) {
	if h.left.Add(-1) < 0 {
		return 0, errDead
	}
	return h.image.WriteAt(p, off)
}

func (m image) ReadAt(p []byte, off int64) (int, error) { return copy(p, m[off:]), nil }

// A restore that was killed goes on: what it had written is not fetched again, what
// has been damaged since is written again, and the whole is what was backed up.
func TestKilledRestoreGoesOn(t *testing.T) {
	ctx := context.Background()
	b := newMemory()
	r, err := Open(ctx, b, true)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{data: make([]byte, ChunkBytes+9*PieceBytes+4096), dirty: Dirty{}}
	for p := range len(d.data) / PieceBytes {
		if p%3 != 0 {
			d.write(p*PieceBytes+7, []byte(fmt.Sprint("piece ", p)))
		}
	}
	x := &Index{Volume: "v", ID: "1", SizeBytes: uint64(len(d.data))}
	if err := errors.Join(r.Begin(ctx, x), r.Create(ctx, x, nil, d.dirty, d, func(int64) {})); err != nil {
		t.Fatal(err)
	}
	const most = 20
	h := &half{image: make(image, len(d.data))}
	h.left.Store(most)
	if err := r.Restore(ctx, x, nil, h, func(int64) {}); !errors.Is(err, errDead) {
		t.Fatalf("killed while it restored: %v", err)
	}
	for p := range len(d.data) / PieceBytes { // written, and then bad
		if h.image[p*PieceBytes+7] != 0 {
			h.image[p*PieceBytes+8]++
			break
		}
	}
	h.left.Store(1000)
	if err := r.Restore(ctx, x, h.image, h, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	all := 0
	for _, m := range d.dirty {
		all += bits.OnesCount64(m)
	}
	if !bytes.Equal(h.image, d.data) {
		t.Fatal("it shows something else")
	}
	if wrote := 1000 - int(h.left.Load()); wrote != all-most+1 {
		t.Fatalf("%d pieces were written then, of %d after %d", wrote, all, most)
	}
}
