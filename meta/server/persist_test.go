package server

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// What no longer fits is not believed: neither a snapshot of a state that was
// replaced, nor one that is half written when the node closes.
func TestASnapshotGivesUpWhenItsStateGoes(t *testing.T) {
	f, _ := openState(t, filepath.Join(t.TempDir(), "state"), 0, 0)
	f.ApplyBatch(history(t, 3))
	take := func() raft.FSMSnapshot {
		s, err := f.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	whole := &memSink{}
	first := take()
	if err := first.Persist(whole); err != nil {
		t.Fatal(err)
	}
	first.Release()
	stale := take()
	if err := f.Restore(io.NopCloser(bytes.NewReader(whole.Bytes()))); err != nil {
		t.Fatal(err)
	}
	sink := &memSink{}
	if err := stale.Persist(sink); status.Of(err) != status.Conflict || !sink.cancelled {
		t.Errorf("a snapshot of a state that was replaced: %v, cancelled %v", err, sink.cancelled)
	}
	stale.Release()
	late := take()
	f.halt()
	sink = &memSink{}
	if err := late.Persist(sink); status.Of(err) != status.Shutdown || !sink.cancelled {
		t.Errorf("a snapshot while the node closes: %v, cancelled %v", err, sink.cancelled)
	}
	late.Release()
	shut(t, f)
}

// A read does not wait for the batch that is being applied: nothing of it was
// answered yet.
func TestReadsWaitForNoBatch(t *testing.T) {
	f, _ := openState(t, filepath.Join(t.TempDir(), "state"), 0, 0)
	defer shut(t, f)
	f.ApplyBatch(history(t, 3))
	f.mu.Lock() // as ApplyBatch does
	read := make(chan error, 1)
	n := 0
	go func() { read <- f.read(func(kv state.KV) { n = len(state.Hosts(kv)) }) }()
	var err error
	select {
	case err = <-read:
	case <-time.After(patience):
		err = errors.New("it waits for the batch")
	}
	f.mu.Unlock()
	if err != nil || n != 3 {
		t.Fatalf("%d hosts: %v", n, err)
	}
}

// cutLog notes what is cut.
type cutLog struct {
	raft.LogStore
	cuts [][2]uint64
}

func (c *cutLog) DeleteRange(lo, hi uint64) error {
	c.cuts = append(c.cuts, [2]uint64{lo, hi})
	return c.LogStore.DeleteRange(lo, hi)
}

// The log's beginning is cut in pieces, so that commits get their turn; its end
// at once, so that a crash leaves no gap.
func TestTheLogIsCutWithoutAGap(t *testing.T) {
	fresh := func() (*cutLog, *sealedLog) {
		c := &cutLog{LogStore: raft.NewInmemStore()}
		s := &sealedLog{LogStore: c}
		var logs []*raft.Log
		for i := range uint64(2000) {
			logs = append(logs, &raft.Log{Index: i + 1})
		}
		if err := s.StoreLogs(logs); err != nil {
			t.Fatal(err)
		}
		return c, s
	}
	for _, x := range []struct {
		lo, hi uint64
		want   [][2]uint64
	}{
		{1, 1500, [][2]uint64{{1, 512}, {513, 1024}, {1025, 1500}}},
		{1, 512, [][2]uint64{{1, 512}}},
		{1, 1024, [][2]uint64{{1, 512}, {513, 1024}}},
		{2, 2000, [][2]uint64{{2, 2000}}},
	} {
		c, s := fresh()
		if err := s.DeleteRange(x.lo, x.hi); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(c.cuts, x.want) {
			t.Errorf("%d to %d: cut %v, want %v", x.lo, x.hi, c.cuts, x.want)
		}
		first, err := s.FirstIndex()
		if want := map[uint64]uint64{1: x.hi + 1, 2: 1}[x.lo]; err != nil || first != want {
			t.Errorf("%d to %d: the log begins at %d (%v), want %d", x.lo, x.hi, first, err, want)
		}
	}
}

// Pairs out of order, as a restored backup ends with, are there too.
func TestASnapshotRestoresPairsOutOfOrder(t *testing.T) {
	f, _ := openState(t, filepath.Join(t.TempDir(), "state"), 0, 0)
	defer shut(t, f)
	pairs := [][2]string{{"h1", "a"}, {"h3", "b"}, {"h2", "c"}, {"a", "d"}}
	var file bytes.Buffer
	file.WriteString(snapMagic + "\x00\x00\x00\x00\x00\x00\x00\x07")
	var sum uint64
	w := bufio.NewWriter(&file)
	for _, p := range pairs {
		sum += state.HashPair([]byte(p[0]), []byte(p[1]))
		if err := writePair(w, []byte(p[0]), []byte(p[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeTail(w, uint64(len(pairs)), sum); err != nil {
		t.Fatal(err)
	}
	if err := f.Restore(io.NopCloser(&file)); err != nil {
		t.Fatal(err)
	}
	if err := f.read(func(kv state.KV) {
		if got := state.HashAll(kv); got != sum {
			t.Errorf("hash %x, want %x", got, sum)
		}
		for _, p := range pairs {
			if got := kv.Get([]byte(p[0])); string(got) != p[1] {
				t.Errorf("%s is %q", p[0], got)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
}

// An older program may not join a newer state, and a newer state's backup is
// not restored by an older program.
func TestVersionsThatDoNotFitAreRefused(t *testing.T) {
	s := &Server{}
	rep := &pb.NodeReply{Id: "meta-4~1", Name: "meta-4", Role: "none", Format: 2}
	if err := s.admit(nil, rep, 2); err != nil {
		t.Errorf("the same version: %v", err)
	}
	rep.Format = 3
	if err := s.admit(nil, rep, 2); err != nil {
		t.Errorf("a newer program applies older commands: %v", err)
	}
	rep.Format = 1
	if err := s.admit(nil, rep, 2); status.Of(err) != status.Unsupported {
		t.Errorf("an older program: %v", err)
	}
	var file bytes.Buffer
	if err := writeHeader(&file, BackupHeader{Cluster: "c", Format: int(state.Format) + 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := CheckBackup(&file); status.Of(err) != status.Unsupported {
		t.Errorf("a newer backup: %v", err)
	}
}
