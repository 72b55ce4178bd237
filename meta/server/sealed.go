package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/cairnstore/cairn/proto/status"
)

// Neither raft-boltdb nor raft's snapshot store notices every flipped bit: the
// log's entries, the vote and a snapshot's description have no checksum. Here
// each gets one, checked whenever it is read, and the whole log is read once at
// the start. What does not fit is status.Corrupt: the node is in doubt (heal.go)
// and nothing of it is served.
//
//	an entry      crc32c (4) over index, term, type and data, in Extensions
//	vote, term    under "sealed:"+key: value, crc32c (4) over key and value
//	a snapshot    a file "sum" beside meta.json: crc32c of that, 8 hex digits

// sealedLog is raft's log with checksums. It also turns bbolt's panics over a
// damaged page into errors.
type sealedLog struct {
	raft.LogStore
	doubt func(error)  // told of damage; may be nil
	room  func() error // whether commands may be stored; nil: always
}

var _ raft.LogStore = (*sealedLog)(nil)

func sumOf(l *raft.Log) uint32 {
	var h [17]byte
	binary.BigEndian.PutUint64(h[:], l.Index)
	binary.BigEndian.PutUint64(h[8:], l.Term)
	h[16] = byte(l.Type)
	return crc32.Update(crc32.Checksum(h[:], castagnoli), castagnoli, l.Data)
}

// guard makes a panic of fn an error.
func guard(what string, fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = status.Errorf(status.Corrupt, "%s is damaged: %v", what, r)
		}
	}()
	return fn()
}

// GetLog implements raft.LogStore.
func (s *sealedLog) GetLog(index uint64, l *raft.Log) error {
	err := guard("the metadata log", func() error { return s.LogStore.GetLog(index, l) })
	if err == nil && (l.Index != index || len(l.Extensions) != 4 || binary.BigEndian.Uint32(l.Extensions) != sumOf(l)) {
		err = status.Errorf(status.Corrupt, "entry %d of the metadata log has a wrong checksum", index)
	}
	if status.Of(err) == status.Corrupt && s.doubt != nil {
		s.doubt(err)
	}
	l.Extensions = nil
	return err
}

// StoreLog implements raft.LogStore.
func (s *sealedLog) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. The entries are raft's: copies are sealed.
// What raft needs to elect somebody is always stored (room.go).
func (s *sealedLog) StoreLogs(logs []*raft.Log) error {
	if s.room != nil && slices.ContainsFunc(logs, func(l *raft.Log) bool { return l.Type == raft.LogCommand }) {
		if err := s.room(); err != nil {
			return err
		}
	}
	sealed := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		c.Extensions = binary.BigEndian.AppendUint32(nil, sumOf(l))
		sealed[i] = &c
	}
	return s.LogStore.StoreLogs(sealed)
}

// cutPiece is how many entries are forgotten in one transaction: bbolt writes
// one at a time, and commits wait for it.
const cutPiece = 512

// DeleteRange implements raft.LogStore. What a snapshot has made superfluous, at
// the log's beginning, goes in pieces from there; a crash leaves a log that
// begins in between. At the log's end all goes at once: in between there must
// not be a gap.
func (s *sealedLog) DeleteRange(lo, hi uint64) error {
	first, err := s.FirstIndex()
	if err != nil {
		return err
	}
	for lo == first && hi-lo >= cutPiece && hi > lo {
		if err := s.LogStore.DeleteRange(lo, lo+cutPiece-1); err != nil {
			return err
		}
		lo += cutPiece
		first = lo
	}
	return s.LogStore.DeleteRange(lo, hi)
}

// check reads every entry.
func (s *sealedLog) check() error {
	return guard("the metadata log", func() error {
		first, err := s.FirstIndex()
		if err != nil {
			return err
		}
		last, err := s.LastIndex()
		if err != nil {
			return err
		}
		for i := first; i <= last && i > 0; i++ {
			var l raft.Log
			if err := s.GetLog(i, &l); errors.Is(err, raft.ErrLogNotFound) {
				return status.Errorf(status.Corrupt, "entry %d of the metadata log is missing between %d and %d", i, first, last)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
}

// sealedVote is raft's small store of term and vote, with checksums.
type sealedVote struct{ raft.StableStore }

var _ raft.StableStore = sealedVote{}

func voteKey(key []byte) []byte { return append([]byte("sealed:"), key...) }

// Set implements raft.StableStore.
func (s sealedVote) Set(key, val []byte) error {
	k := voteKey(key)
	sum := crc32.Update(crc32.Checksum(k, castagnoli), castagnoli, val)
	return s.StableStore.Set(k, binary.BigEndian.AppendUint32(append([]byte(nil), val...), sum))
}

// Get implements raft.StableStore.
func (s sealedVote) Get(key []byte) (val []byte, err error) {
	k := voteKey(key)
	err = guard("the metadata vote", func() error { val, err = s.StableStore.Get(k); return err })
	if err != nil {
		return nil, err
	}
	n := len(val) - 4
	if n < 0 || binary.BigEndian.Uint32(val[n:]) != crc32.Update(crc32.Checksum(k, castagnoli), castagnoli, val[:n]) {
		return nil, status.Errorf(status.Corrupt, "%s of this metadata node has a wrong checksum", key)
	}
	return val[:n:n], nil
}

// SetUint64 implements raft.StableStore.
func (s sealedVote) SetUint64(key []byte, val uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, val))
}

// GetUint64 implements raft.StableStore.
func (s sealedVote) GetUint64(key []byte) (uint64, error) {
	b, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, status.Errorf(status.Corrupt, "%s of this metadata node has %d bytes instead of 8", key, len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}

// check reads term and vote.
func (s sealedVote) check() error {
	for _, key := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand"} {
		if _, err := s.Get([]byte(key)); err != nil && err.Error() != raftboltdb.ErrKeyNotFound.Error() {
			return err // raft, too, knows that one by its text
		}
	}
	return nil
}

// sealedSnaps is raft's snapshot store, whose listing leaves out snapshots with
// a damaged description. Their contents have a checksum of raft's and end with
// the state's hash.
type sealedSnaps struct {
	*raft.FileSnapshotStore
	dir  string       // with the snapshots
	room func() error // whether one may be stored
}

var _ raft.SnapshotStore = (*sealedSnaps)(nil)

func (s *sealedSnaps) sum(id string) (string, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, id, "meta.json"))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%08x", crc32.Checksum(b, castagnoli)), nil
}

// sound compares a snapshot's description with its checksum. Crash points: one
// without the file was cut off between the two, and is as raft left it.
func (s *sealedSnaps) sound(id string) error {
	want, err := os.ReadFile(filepath.Join(s.dir, id, "sum"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	got, err := s.sum(id)
	if err != nil {
		return err
	}
	if got != string(want) {
		return status.Errorf(status.Corrupt, "the description of metadata snapshot %s has a wrong checksum", id)
	}
	return nil
}

// List implements raft.SnapshotStore.
func (s *sealedSnaps) List() ([]*raft.SnapshotMeta, error) {
	all, err := s.FileSnapshotStore.List()
	var out []*raft.SnapshotMeta
	for _, m := range all {
		if s.sound(m.ID) == nil {
			out = append(out, m)
		}
	}
	return out, err
}

// Open implements raft.SnapshotStore.
func (s *sealedSnaps) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if err := s.sound(id); err != nil {
		return nil, nil, err
	}
	return s.FileSnapshotStore.Open(id)
}

// Create implements raft.SnapshotStore.
func (s *sealedSnaps) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, ci uint64, t raft.Transport) (raft.SnapshotSink, error) {
	if err := s.room(); err != nil {
		return nil, err
	}
	sink, err := s.FileSnapshotStore.Create(v, index, term, c, ci, t)
	if err != nil {
		return nil, err
	}
	// raft renames the directory when the snapshot is whole; until then its name ends so.
	data, err := os.OpenFile(filepath.Join(s.dir, sink.ID()+".tmp", "state.bin"), os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, sink.Cancel())
	}
	return &sealedSink{SnapshotSink: sink, s: s, data: data}, nil
}

// syncPiece is how much of a snapshot may wait to be written to the disk: a
// commit's sync, on the same file system, may have to wait for it.
const syncPiece = 4 << 20

type sealedSink struct {
	raft.SnapshotSink
	s     *sealedSnaps
	data  *os.File // the same file as raft's, for syncing it
	bytes int      // since the last sync
	ended bool     // raft closes a sink twice
}

// Write implements io.Writer.
func (k *sealedSink) Write(b []byte) (int, error) {
	n, err := k.SnapshotSink.Write(b)
	if k.bytes += n; k.bytes >= syncPiece && err == nil {
		k.bytes = 0
		err = k.data.Sync()
	}
	return n, err
}

// Cancel implements raft.SnapshotSink.
func (k *sealedSink) Cancel() error {
	if k.ended {
		return nil
	}
	k.ended = true
	return errors.Join(k.SnapshotSink.Cancel(), k.data.Close())
}

// Close implements io.Closer: the snapshot is whole, and then sealed.
func (k *sealedSink) Close() error {
	if k.ended {
		return nil
	}
	k.ended = true
	if err := errors.Join(k.SnapshotSink.Close(), k.data.Close()); err != nil {
		return err
	}
	sum, err := k.s.sum(k.ID())
	if errors.Is(err, os.ErrNotExist) {
		return nil // newer ones are there: raft has removed it at once
	}
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(k.s.dir, k.ID(), "sum"), []byte(sum), 0o600)
}
