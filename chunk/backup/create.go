package backup

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

const (
	workers   = 4               // pieces under way at a time
	saveEvery = 2 * time.Second // of a running backup's index
)

// Begin notes that a backup is being made; the caller has locked its volume. From
// here on it can be gone on with.
func (r *Repo) Begin(ctx context.Context, x *Index) error {
	x.Version = Version
	if x.Chunks == nil {
		x.Chunks = map[uint32]string{}
	}
	if x.Done == nil {
		x.Done = map[uint32]bool{}
	}
	return r.putIndex(ctx, "running", x)
}

// Drop forgets a backup that was not completed.
func (r *Repo) Drop(ctx context.Context, x *Index) error {
	return r.b.Remove(ctx, "running/"+x.Volume+"/"+x.ID)
}

// Dirty is the pieces of a volume that are to be read: of each chunk a bit each.
type Dirty map[uint32]uint64

// Add marks a range of bytes.
func (d Dirty) Add(off, n uint64) {
	if n == 0 {
		return
	}
	for p := off / PieceBytes; p <= (off+n-1)/PieceBytes; p++ {
		d[uint32(p/ChunkPieces)] |= 1 << (p % ChunkPieces)
	}
}

// Bytes is how much is to be read at most.
func (d Dirty) Bytes() (n int64) {
	for _, m := range d {
		n += int64(bits.OnesCount64(m)) * PieceBytes
	}
	return n
}

// Create reads the dirty pieces of a snapshot, takes all others from base (nil: they
// are zeros) and completes the backup x, which Begin has noted; what x has done
// already is not done again. step is told of bytes that are dealt with.
func (r *Repo) Create(ctx context.Context, x, base *Index, dirty Dirty, from io.ReaderAt, step func(int64)) error {
	if base != nil && base.SizeBytes != x.SizeBytes { // a piece over either end changes
		end := min(base.SizeBytes, x.SizeBytes)
		if end%PieceBytes != 0 {
			dirty.Add(end, 1)
		}
		for c := range base.Chunks { // what a smaller one leaves out is not read
			if x.SizeBytes == end && uint64(c)*ChunkBytes < end && uint64(c+1)*ChunkBytes > end {
				dirty.Add(end, uint64(c+1)*ChunkBytes-end)
			}
		}
	}
	chunks := map[uint32]bool{}
	for c := range dirty {
		chunks[c] = true
	}
	if base != nil {
		for c, list := range base.Chunks {
			if !chunks[c] && uint64(c)*ChunkBytes < x.SizeBytes {
				x.Chunks[c] = list
			}
		}
	}
	saved := time.Now()
	for _, c := range slices.Sorted(maps.Keys(chunks)) {
		todo := int64(bits.OnesCount64(dirty[c])) * PieceBytes
		if !x.Done[c] && uint64(c)*ChunkBytes < x.SizeBytes {
			if err := r.createChunk(ctx, x, base, c, dirty[c], from); err != nil {
				return err
			}
			x.Done[c] = true
		}
		step(todo)
		if time.Since(saved) >= saveEvery {
			if err := r.putIndex(ctx, "running", x); err != nil {
				return err
			}
			saved = time.Now()
		}
	}
	full := *x
	full.Done = nil
	if err := r.putIndex(ctx, "volumes", &full); err != nil {
		return err
	}
	return r.Drop(ctx, x)
}

// createChunk reads the marked pieces of a chunk, writes those that are new, and
// the list.
func (r *Repo) createChunk(ctx context.Context, x, base *Index, c uint32, marked uint64, from io.ReaderAt) error {
	names, err := r.list(ctx, base, c)
	if err != nil {
		return fmt.Errorf("backup %s cannot be built upon: %w; `--full` makes one that stands alone", base.Name(), err)
	}
	var mu sync.Mutex // guards x.Written and x.Read
	err = each(ctx, marked, func(ctx context.Context, p int) error {
		off := uint64(c)*ChunkBytes + uint64(p)*PieceBytes
		if off >= x.SizeBytes {
			names[p] = ""
			return nil
		}
		buf := make([]byte, min(PieceBytes, x.SizeBytes-off))
		if _, err := from.ReadAt(buf, int64(off)); err != nil {
			return fmt.Errorf("snapshot %s of volume %s cannot be read at byte %d: %w", x.Snapshot, x.Volume, off, err)
		}
		name, fresh := "", false
		if !isZero(buf) {
			var err error
			if name, fresh, err = r.put(ctx, buf); err != nil {
				return err
			}
		}
		names[p] = name
		mu.Lock()
		defer mu.Unlock()
		x.Read += uint64(len(buf))
		if fresh {
			x.Written += uint64(len(buf))
		}
		return nil
	})
	if err != nil {
		return err
	}
	list, err := r.putList(ctx, names)
	if err != nil {
		return err
	}
	if delete(x.Chunks, c); list != "" {
		x.Chunks[c] = list
	}
	return nil
}

var zeros [PieceBytes]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

// each does something for every marked piece, several at a time; the first error
// ends it.
func each(ctx context.Context, marked uint64, do func(ctx context.Context, piece int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	slots := make(chan struct{}, workers)
	var wg sync.WaitGroup
	for m := marked; m != 0 && ctx.Err() == nil; m &= m - 1 {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := do(ctx, bits.TrailingZeros64(m)); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// Restore writes all of a backup that is not zeros. Every object is held against
// its checksum before a byte of it is written; the first that fails ends it. What a
// restore of the same backup that was cut short has written is read from there (nil:
// there was none), and not fetched and written again if its checksum holds.
func (r *Repo) Restore(ctx context.Context, x *Index, there io.ReaderAt, to io.WriterAt, step func(int64)) error {
	for _, c := range slices.Sorted(maps.Keys(x.Chunks)) {
		names, err := r.list(ctx, x, c)
		if err != nil {
			return fmt.Errorf("backup %s cannot be restored: %w", x.Name(), err)
		}
		err = each(ctx, marks(names), func(ctx context.Context, p int) error {
			off := uint64(c)*ChunkBytes + uint64(p)*PieceBytes
			if there != nil && off < x.SizeBytes {
				old := make([]byte, min(PieceBytes, x.SizeBytes-off))
				if _, err := there.ReadAt(old, int64(off)); err != nil {
					return fmt.Errorf("what was restored before cannot be read at byte %d: %w", off, err)
				}
				if nameOf(old) == names[p] {
					step(int64(len(old)))
					return nil
				}
			}
			data, err := r.piece(ctx, x, names[p], off)
			if err != nil {
				return fmt.Errorf("backup %s cannot be restored: its bytes from %d on: %w", x.Name(), off, err)
			}
			_, err = to.WriteAt(data, int64(off))
			step(int64(len(data)))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// marks are the pieces that are not zeros.
func marks(names []string) (m uint64) {
	for i, n := range names {
		if n != "" {
			m |= 1 << i
		}
	}
	return m
}

// piece reads a piece, which must be as long as its place.
func (r *Repo) piece(ctx context.Context, x *Index, name string, off uint64) ([]byte, error) {
	data, err := r.object(ctx, name)
	if err != nil {
		return nil, err
	}
	if off >= x.SizeBytes || uint64(len(data)) != min(PieceBytes, x.SizeBytes-off) {
		return nil, status.Errorf(status.Corrupt, "%s/%s has %d bytes, which do not fit there", r.b, objectPath(name), len(data))
	}
	return data, nil
}

// Bytes is how much of a backup is not zeros, at most.
func (x *Index) Bytes() int64 { return int64(len(x.Chunks)) * ChunkBytes }

// Bad is an object that a backup needs and that is not what it was.
type Bad struct {
	Backup string // VOLUME@ID
	Offset uint64 // of the volume
	Why    string // names the object
}

// Verify reads everything some backups need, each object once, and returns what is
// bad; an error is a bucket that cannot be read.
func (r *Repo) Verify(ctx context.Context, xs []*Index, step func(int64)) (bad []Bad, objects int, err error) {
	seen := map[string]error{} // objects that were read; not nil: bad
	var mu sync.Mutex          // guards bad, seen
	look := func(x *Index, off uint64, name string, read func() error) error {
		mu.Lock()
		was, ok := seen[name]
		mu.Unlock()
		if !ok {
			if was = read(); was != nil && status.Of(was) != status.Corrupt {
				return was
			}
		}
		mu.Lock()
		defer mu.Unlock()
		seen[name] = was
		if was != nil {
			bad = append(bad, Bad{x.Name(), off, was.Error()})
		}
		return nil
	}
	for _, x := range xs {
		for _, c := range slices.Sorted(maps.Keys(x.Chunks)) {
			var names []string
			begin := uint64(c) * ChunkBytes
			if err := look(x, begin, "list "+x.Chunks[c], func() error { _, err := r.list(ctx, x, c); return err }); err != nil {
				return bad, len(seen), err
			}
			if seen["list "+x.Chunks[c]] == nil {
				if names, err = r.list(ctx, x, c); err != nil {
					return bad, len(seen), err
				}
			}
			err := each(ctx, marks(names), func(ctx context.Context, p int) error {
				off := begin + uint64(p)*PieceBytes
				return look(x, off, names[p], func() error { _, err := r.piece(ctx, x, names[p], off); return err })
			})
			if err != nil {
				return bad, len(seen), err
			}
			step(ChunkBytes)
		}
	}
	slices.SortFunc(bad, func(a, b Bad) int {
		return cmp.Or(cmp.Compare(a.Backup, b.Backup), cmp.Compare(a.Offset, b.Offset))
	})
	return bad, len(seen), nil
}

// Remove takes backups away (VOLUME@ID each, complete or not), and all objects that
// no other backup needs; with no names only those. The caller has locked the whole
// repository. It is refused while another backup is not complete. freed counts
// objects.
func (r *Repo) Remove(ctx context.Context, names []string) (freed int, err error) {
	running, err := r.Running(ctx, "")
	if err != nil {
		return 0, err
	}
	var gone []string
	for _, x := range running {
		if !slices.Contains(names, x.Name()) {
			return 0, status.Errorf(status.Conflict, "backup %s is not complete: `cairn volume backup %s %s` goes on with it, `cairn volume backup rm %s %s` drops it", x.Name(), x.Volume, r.b, r.b, x.Name())
		}
		gone = append(gone, "running/"+x.Volume+"/"+x.ID)
	}
	for _, n := range names {
		if slices.ContainsFunc(running, func(x *Index) bool { return x.Name() == n }) {
			continue
		}
		x, err := r.Find(ctx, n)
		if err != nil {
			return 0, err
		}
		gone = append(gone, "volumes/"+x.Volume+"/"+x.ID)
	}
	for _, g := range gone {
		if err := r.b.Remove(ctx, g); err != nil {
			return 0, err
		}
	}
	return r.sweep(ctx)
}

// sweep removes the objects that no index names. A list that cannot be read ends
// it: what it names is not known.
func (r *Repo) sweep(ctx context.Context) (freed int, err error) {
	all, err := r.Backups(ctx, "")
	if err != nil {
		return 0, fmt.Errorf("nothing is cleared away while it is not known what is needed: %w", err)
	}
	needed, lists := map[string]bool{}, map[string]bool{}
	for _, x := range all {
		for c, l := range x.Chunks {
			if lists[l] {
				continue
			}
			lists[l], needed[objectPath(l)] = true, true
			names, err := r.list(ctx, x, c)
			if err != nil {
				return 0, fmt.Errorf("nothing is cleared away while it is not known what is needed: %w", err)
			}
			for _, n := range names {
				if n != "" {
					needed[objectPath(n)] = true
				}
			}
		}
	}
	var drop []string
	if err := r.b.List(ctx, "data/", func(n string) error {
		if !needed[n] {
			drop = append(drop, n)
		}
		return nil
	}); err != nil {
		return 0, err
	}
	for _, n := range drop {
		if err := r.b.Remove(ctx, n); err != nil {
			return freed, err
		}
		freed++
	}
	return freed, nil
}
