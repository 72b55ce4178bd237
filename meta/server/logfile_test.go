package server

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
)

// The log's file has blocks everywhere soon after it has grown, and what is
// written to it while its holes are filled is there afterwards.
func TestTheLogsFileKeepsNoHoles(t *testing.T) {
	name := filepath.Join(t.TempDir(), "raft.db")
	f, err := openLogFile(name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	logs, vote := &sealedLog{LogStore: f}, sealedVote{f}
	const batches, each = 200, 8
	entry := func(i uint64) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 1500) }
	for b := range uint64(batches) {
		var batch []*raft.Log
		for i := b*each + 1; i <= (b+1)*each; i++ {
			batch = append(batch, &raft.Log{Index: i, Term: 1, Data: entry(i)})
		}
		if err := logs.StoreLogs(batch); err != nil {
			t.Fatal(err)
		}
		if err := vote.SetUint64([]byte("CurrentTerm"), b); err != nil {
			t.Fatal(err)
		}
	}
	until(t, func() string {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 < st.Size {
			return "the log's file keeps its holes"
		}
		return ""
	})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = openLogFile(name, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	logs, vote = &sealedLog{LogStore: f}, sealedVote{f}
	for i := uint64(1); i <= batches*each; i++ {
		var l raft.Log
		if err := logs.GetLog(i, &l); err != nil || !bytes.Equal(l.Data, entry(i)) {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
	if n, err := vote.GetUint64([]byte("CurrentTerm")); err != nil || n != batches-1 {
		t.Errorf("term %d: %v", n, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
