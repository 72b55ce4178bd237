package server

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A backup is one file:
//
//	magic "cairnmb1" (8), length of the header (4), header (JSON), crc32c of the
//	header (4), then a snapshot as raft keeps it, which ends with its own hash
//
// Version 1 is the first.
const backupMagic = "cairnmb1"

// BackupHeader says what a backup is of.
type BackupHeader struct {
	Cluster string    `json:"cluster"`
	Time    time.Time `json:"time"`
	Index   uint64    `json:"index"`  // of the last command in it
	Term    uint64    `json:"term"`   // of the leader that made it
	Hash    string    `json:"hash"`   // of the state
	Format  int       `json:"format"` // state version
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const backupPiece = 256 << 10

// pieces sends what is written to it.
type pieces struct {
	send func(*pb.BackupPiece) error
}

// Write implements io.Writer.
func (p pieces) Write(b []byte) (int, error) {
	return len(b), p.send(&pb.BackupPiece{Data: bytes.Clone(b)})
}

// Backup implements pb.MetaServer.
func (s *Server) Backup(_ *pb.BackupRequest, out pb.Meta_BackupServer) error {
	if err := s.backup(out); err != nil {
		return out.Send(&pb.BackupPiece{Status: uint32(status.Of(err)), Detail: err.Error(), Leader: s.leaderAPI()})
	}
	return nil
}

func (s *Server) backup(out pb.Meta_BackupServer) error {
	t, err := s.lead()
	if err != nil {
		return err
	}
	snap, err := s.fsm.Snapshot()
	if err != nil {
		return err
	}
	defer snap.Release()
	sn := snap.(*snapshot)
	h := BackupHeader{Time: time.Now().UTC(), Index: sn.applied, Term: t.term, Hash: fmt.Sprintf("%016x", sn.hash), Format: int(state.FormatOf(sn.kv)),
		Cluster: state.ClusterID(sn.kv)}
	if err := s.still(t); err != nil {
		return err
	}
	w := bufio.NewWriterSize(pieces{out.Send}, backupPiece)
	if err := writeHeader(w, h); err != nil {
		return err
	}
	if err := sn.write(w); err != nil {
		return err
	}
	return w.Flush()
}

func writeHeader(w io.Writer, h BackupHeader) error {
	j, err := json.Marshal(h)
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32([]byte(backupMagic), uint32(len(j)))
	b = binary.BigEndian.AppendUint32(append(b, j...), crc32.Checksum(j, castagnoli))
	_, err = w.Write(b)
	return err
}

func damaged(err error) error {
	return status.Errorf(status.Corrupt, "the backup is damaged or cut off (%w): use another copy", err)
}

func readHeader(r io.Reader) (h BackupHeader, err error) {
	var head [12]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return h, damaged(err)
	}
	n := binary.BigEndian.Uint32(head[8:])
	if string(head[:8]) != backupMagic || n > 1<<16 {
		return h, status.Errorf(status.Unsupported, "this is no backup of metadata, or one of another version")
	}
	b := make([]byte, n+4)
	if _, err := io.ReadFull(r, b); err != nil {
		return h, damaged(err)
	}
	if binary.BigEndian.Uint32(b[n:]) != crc32.Checksum(b[:n], castagnoli) {
		return h, damaged(errors.New("its header's checksum is wrong"))
	}
	if err := json.Unmarshal(b[:n], &h); err != nil {
		return h, damaged(err)
	}
	if h.Format > int(state.Format) {
		return h, status.Errorf(status.Unsupported, "the backup is of state version %d and this program knows %d: use the program that made it, or a newer one", h.Format, state.Format)
	}
	return h, nil
}

// CheckBackup reads a whole backup and says what it is of.
func CheckBackup(r io.Reader) (BackupHeader, error) {
	br := bufio.NewReaderSize(r, 1<<20)
	h, err := readHeader(br)
	if err != nil {
		return h, err
	}
	applied, sum, err := readPairs(br, func(_, _ []byte) error { return nil })
	if err != nil {
		return h, damaged(err)
	}
	if got := fmt.Sprintf("%016x", sum); got != h.Hash || applied != h.Index {
		return h, damaged(fmt.Errorf("its state has the hash %s and not %s", got, h.Hash))
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
		return h, damaged(errors.New("something follows its end"))
	}
	return h, nil
}

// Restore makes a new directory for a node out of a backup. Each node of
// cfg.Peers is given the same file: they then begin with the same state, as if
// each had just taken it as a snapshot. The state is changed on the way so that
// nothing given out since the backup is given out again (state.Restorer).
//
// Crash points: the directory gets its record last; without it, a start refuses
// and the restore is begun again with an empty directory.
func Restore(cfg Config, file string) (h BackupHeader, err error) {
	if entries, err := os.ReadDir(cfg.Dir); err == nil && len(entries) > 0 {
		return h, status.Errorf(status.Exists, "%s is not empty: a backup is restored into a new directory", cfg.Dir)
	}
	f, err := os.Open(file)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if h, err = CheckBackup(f); err != nil {
		return h, err
	}
	if cfg.Cluster != "" && h.Cluster != "" && cfg.Cluster != h.Cluster {
		return h, status.Errorf(status.Conflict, "the backup is of cluster %s and the configuration of cluster %s: use the right one", h.Cluster, cfg.Cluster)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return h, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return h, err
	}
	if err := restoreRaft(cfg, h, f); err != nil {
		return h, err
	}
	d := &nodeDir{path: cfg.Dir, rec: record{Format: formatVersion, ID: cfg.ID, Cluster: cfg.Cluster, Joined: true}}
	return h, d.save()
}

// restoreRaft writes the snapshot and the term into an empty directory.
func restoreRaft(cfg Config, h BackupHeader, f io.Reader) (err error) {
	br := bufio.NewReaderSize(f, 1<<20)
	if _, err := readHeader(br); err != nil {
		return err
	}
	bolt, err := raftboltdb.NewBoltStore(filepath.Join(cfg.Dir, "raft.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bolt.Close()) }()
	if err := (sealedVote{bolt}).SetUint64([]byte("CurrentTerm"), h.Term); err != nil {
		return err
	}
	snaps, err := raft.NewFileSnapshotStoreWithLogger(cfg.Dir, snapshotsKept, raftLogger(cfg.Log))
	if err != nil {
		return err
	}
	var c raft.Configuration
	for _, p := range cfg.Peers {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(p.ID), Address: joinAddr(p)})
	}
	_, encode := raft.NewInmemTransport("") // only writes the peers of an old format
	sink, err := snaps.Create(raft.SnapshotVersionMax, h.Index, h.Term, c, h.Index, encode)
	if err != nil {
		return err
	}
	if err := rewrite(sink, br, h); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// rewrite copies the state, changed by state.Restored.
func rewrite(out io.Writer, in io.Reader, h BackupHeader) error {
	w := bufio.NewWriterSize(out, 1<<20)
	var sum, count uint64
	if _, err := w.Write(binary.BigEndian.AppendUint64([]byte(snapMagic), h.Index)); err != nil {
		return err
	}
	pair := func(k, v []byte) error {
		sum += state.HashPair(k, v)
		count++
		return writePair(w, k, v)
	}
	re := state.Restorer{MadeUnixNs: h.Time.UnixNano()}
	if _, _, err := readPairs(in, func(k, v []byte) error {
		if k, v = re.Pair(k, v); k == nil {
			return nil
		}
		return pair(k, v)
	}); err != nil {
		return damaged(err)
	}
	if err := pair(re.Mark()); err != nil {
		return err
	}
	return writeTail(w, count, sum)
}
