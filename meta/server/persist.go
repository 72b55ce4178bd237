package server

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
	bpb "github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/ristretto/v2/z"
	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/status"
)

// Reading and writing the whole state: the check at the start, snapshots,
// backups, and what a snapshot restores.

// each calls fn with the pairs in [from, to) (to nil: to the end) in their
// order until it returns false. fn must not keep k and v.
func each(txn *badger.Txn, from, to []byte, fn func(k, v []byte) bool) error {
	opt := badger.DefaultIteratorOptions
	opt.PrefetchValues = false
	it := txn.NewIterator(opt)
	defer it.Close()
	if len(from) == 0 {
		from = []byte{1} // 0x00 is the shell's own
	}
	for it.Seek(from); it.Valid(); it.Next() {
		k := it.Item().Key()
		if to != nil && bytes.Compare(k, to) >= 0 {
			return nil
		}
		going := false
		if err := it.Item().Value(func(v []byte) error { going = fn(k, v); return nil }); err != nil {
			return err
		}
		if !going {
			return nil
		}
	}
	return nil
}

// hashAll is the state hash, and what of it is due to words, by a look at every
// pair, on all processors: both are sums, so any cut of the keys into ranges will
// do. Damage shows as an error.
func hashAll(db *badger.DB, txn *badger.Txn) (sum, words uint64, err error) {
	const perProc = 4 // so that none is left alone with the last range
	bounds := cuts(db, perProc*runtime.GOMAXPROCS(0))
	var mu sync.Mutex // guards sum, words, err and next
	var wg sync.WaitGroup
	next := 0
	work := func() {
		for {
			mu.Lock()
			i := next
			next++
			stop := i > len(bounds) || err != nil
			mu.Unlock()
			if stop {
				return
			}
			var from, to []byte
			if i > 0 {
				from = bounds[i-1]
			}
			if i < len(bounds) {
				to = bounds[i]
			}
			part, its, e := hashRange(txn, from, to)
			mu.Lock()
			sum += part
			words += its
			err = errors.Join(err, e)
			mu.Unlock()
		}
	}
	for range runtime.GOMAXPROCS(0) {
		wg.Go(work)
	}
	wg.Wait()
	return sum, words, err
}

func hashRange(txn *badger.Txn, from, to []byte) (sum, words uint64, err error) {
	err = guard("the metadata state", func() error {
		return each(txn, from, to, func(k, v []byte) bool {
			sum += state.HashPair(k, v)
			words += state.HashWords(k, v)
			return true
		})
	})
	return sum, words, err
}

// cuts returns at most n keys in order that divide the state evenly, as far as
// its tables tell.
func cuts(db *badger.DB, n int) [][]byte {
	var ends [][]byte
	for _, t := range db.Tables() {
		if len(t.Right) > 0 && t.Right[0] != keyMark[0] && t.Right[0] != '!' { // '!' begins Badger's own
			ends = append(ends, bytes.Clone(t.Right))
		}
	}
	slices.SortFunc(ends, bytes.Compare)
	ends = slices.CompactFunc(ends, bytes.Equal)
	if len(ends) <= n {
		return ends
	}
	out := make([][]byte, n)
	for i := range out {
		out[i] = ends[i*len(ends)/n]
	}
	return out
}

// A snapshot: magic (8), applied (8), then pairs of key length (4, never 0),
// value length (4), key, value; then 0 (4), count (8), state hash (8). The pairs
// are in the order of their keys, but for a few at the end of a restored one.
const snapMagic = "cairnms1"

type snapshot struct {
	f             *fsm
	db            *badger.DB // another than f's: the state was replaced meanwhile
	kv            *view
	applied, hash uint64
}

// Snapshot implements raft.FSM: a moment of the database, read later.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	f.swap.RLock()
	defer f.swap.RUnlock()
	if f.broken || f.newer.Load() {
		return nil, status.Errorf(status.Unavailable, "the metadata state is being restored: ask again")
	}
	return &snapshot{f: f, db: f.db, kv: newView(f.db), applied: f.applied, hash: f.hash}, nil
}

// Release implements raft.FSMSnapshot.
func (s *snapshot) Release() {
	s.f.swap.RLock()
	defer s.f.swap.RUnlock()
	if s.f.db == s.db {
		s.kv.close()
	}
}

// Persist implements raft.FSMSnapshot.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.write(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// A snapshot works for a piece and then rests as long as that took: commits
// want the same processors and the same disk. What it has written goes to the
// disk piece by piece (sealedSink), or the next commit would wait for all of it.
const (
	snapPiece   = 256 << 10 // bytes between two rests
	snapRestMax = 100 * time.Millisecond
)

type rests struct {
	bytes int
	since time.Time
}

func (r *rests) after(n int) {
	if r.bytes += n; r.bytes < snapPiece {
		return
	}
	time.Sleep(min(time.Since(r.since), snapRestMax))
	r.bytes, r.since = 0, time.Now()
}

// write gives up when the state is to be replaced or closed.
func (s *snapshot) write(out io.Writer) error {
	s.f.swap.RLock()
	defer s.f.swap.RUnlock()
	if s.f.db != s.db {
		return status.Errorf(status.Conflict, "the metadata state was replaced before its snapshot was written")
	}
	w := bufio.NewWriterSize(out, snapPiece)
	var sum, count uint64
	pace := rests{since: time.Now()}
	_, err := w.Write(binary.BigEndian.AppendUint64([]byte(snapMagic), s.applied))
	scanned := each(s.kv.txn, nil, nil, func(k, v []byte) bool {
		if s.f.ending.Load() > 0 {
			err = status.Errorf(status.Shutdown, "the metadata state is closed or replaced before its snapshot is written")
		}
		if err == nil {
			err = writePair(w, k, v)
		}
		sum += state.HashPair(k, v)
		count++
		pace.after(8 + len(k) + len(v))
		return err == nil
	})
	if err = errors.Join(err, scanned); err != nil {
		return err
	}
	if sum != s.hash {
		return fmt.Errorf("the state's hash is %x by a scan and %x by its changes: no snapshot is made of it", sum, s.hash)
	}
	return writeTail(w, count, sum)
}

func writePair(w *bufio.Writer, k, v []byte) error {
	h := binary.BigEndian.AppendUint32(w.AvailableBuffer(), uint32(len(k)))
	_, err := w.Write(binary.BigEndian.AppendUint32(h, uint32(len(v))))
	for _, b := range [][]byte{k, v} {
		if err == nil {
			_, err = w.Write(b)
		}
	}
	return err
}

func writeTail(w *bufio.Writer, count, sum uint64) error {
	tail := binary.BigEndian.AppendUint64(make([]byte, 4), count)
	if _, err := w.Write(binary.BigEndian.AppendUint64(tail, sum)); err != nil {
		return err
	}
	return w.Flush()
}

// Restore implements raft.FSM: it replaces the state by a snapshot, which is
// marked whole only after its hash was right.
func (f *fsm) Restore(rc io.ReadCloser) (err error) {
	defer func() { err = errors.Join(err, rc.Close()) }()
	defer f.own()()
	f.broken = true // raft would go on applying entries to what is left
	if err := f.wipe(); err != nil {
		return err
	}
	// Nothing has a mark before the last one is set: an empty mark and any pairs
	// are a state that is not trusted.
	applied, hash, words, err := load(f.db, bufio.NewReaderSize(rc, 1<<20), f.room)
	if err != nil {
		return fmt.Errorf("restoring a metadata snapshot: %w", err)
	}
	kv := newView(f.db)
	used := state.FormatOf(kv)
	kv.close()
	if kv.err != nil {
		return kv.err
	}
	if used > f.knows {
		f.outdated(used)
		return tooNew(used, f.knows)
	}
	if err := setMark(f.db, mark(applied, hash, 0)); err != nil {
		return err
	}
	f.applied, f.hash, f.words, f.format, f.broken = applied, hash, words, used, false
	f.news.begin(applied)
	return nil
}

// load writes a snapshot's pairs as finished tables, which takes them in order;
// those that are not go in afterwards. room may end it between two pieces.
func load(db *badger.DB, r io.Reader, room func() error) (applied, sum, words uint64, err error) {
	sw := db.NewStreamWriter()
	if err := sw.Prepare(); err != nil {
		sw.Cancel()
		return 0, 0, 0, err
	}
	const piece = 1 << 20
	buf := z.NewBuffer(piece+piece/4, "meta")
	defer func() { err = errors.Join(err, buf.Release()) }()
	var last []byte
	var late [][2][]byte
	write := func() error {
		defer buf.Reset()
		if room != nil {
			if err := room(); err != nil {
				return err
			}
		}
		return sw.Write(buf)
	}
	applied, sum, err = readPairs(r, func(k, v []byte) error {
		words += state.HashWords(k, v)
		if bytes.Compare(k, last) <= 0 {
			late = append(late, [2][]byte{k, v})
			return nil
		}
		last = k
		badger.KVToBuffer(&bpb.KV{Key: k, Value: v, Version: 1}, buf)
		if buf.LenNoPadding() < piece {
			return nil
		}
		return write()
	})
	if err == nil {
		err = write()
	}
	if err != nil {
		sw.Cancel()
		return 0, 0, 0, err
	}
	if err := sw.Flush(); err != nil {
		return 0, 0, 0, err
	}
	wb := db.NewWriteBatch()
	defer wb.Cancel()
	for _, kv := range late {
		if err := wb.Set(kv[0], kv[1]); err != nil {
			return 0, 0, 0, err
		}
	}
	return applied, sum, words, wb.Flush()
}

// readPairs reads a snapshot to its end and compares its hash. What fn was
// given counts only if the result is no error.
func readPairs(r io.Reader, fn func(k, v []byte) error) (applied, sum uint64, err error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, err
	}
	if string(head[:8]) != snapMagic {
		return 0, 0, status.Errorf(status.Unsupported, "it is of another format (%q)", head[:8])
	}
	for count := uint64(0); ; count++ {
		var n [8]byte
		if _, err := io.ReadFull(r, n[:4]); err != nil {
			return 0, 0, err
		}
		klen := binary.BigEndian.Uint32(n[:])
		if klen == 0 {
			var tail [16]byte
			if _, err := io.ReadFull(r, tail[:]); err != nil {
				return 0, 0, err
			}
			if binary.BigEndian.Uint64(tail[:]) != count || binary.BigEndian.Uint64(tail[8:]) != sum {
				return 0, 0, status.Errorf(status.Corrupt, "its hash is wrong")
			}
			return binary.BigEndian.Uint64(head[8:]), sum, nil
		}
		if _, err := io.ReadFull(r, n[4:]); err != nil {
			return 0, 0, err
		}
		vlen := binary.BigEndian.Uint32(n[4:])
		if klen > 1<<16 || vlen > 1<<26 {
			return 0, 0, status.Errorf(status.Corrupt, "it has a pair of %d and %d bytes", klen, vlen)
		}
		kv := make([]byte, klen+vlen)
		if _, err := io.ReadFull(r, kv); err != nil {
			return 0, 0, err
		}
		k, v := kv[:klen:klen], kv[klen:]
		sum += state.HashPair(k, v)
		if err := fn(k, v); err != nil {
			return 0, 0, err
		}
	}
}
