package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func openState(t *testing.T, dir string, snap, last uint64) (*fsm, bool) {
	t.Helper()
	f, kept, err := openFSM(dir, tableBytes(""), snap, last)
	if err != nil {
		t.Fatal(err)
	}
	return f, kept
}

func shut(t *testing.T, f *fsm) {
	t.Helper()
	if err := f.close(); err != nil {
		t.Fatal(err)
	}
}

func entry(t *testing.T, index uint64, cmd *pb.Command) *raft.Log {
	t.Helper()
	b, err := proto.Marshal(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Type: raft.LogCommand, Data: b}
}

// history opens a session and registers n hosts: n + 1 entries from index 1 on.
func history(t *testing.T, n int) []*raft.Log {
	logs := []*raft.Log{entry(t, 1, &pb.Command{Session: "s", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})}
	for i := range n {
		logs = append(logs, entry(t, uint64(i)+2, &pb.Command{Session: "s", Seq: uint64(i) + 1,
			Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: fmt.Sprintf("host-%d", i)}}}}))
	}
	return logs
}

func hosts(t *testing.T, f *fsm) (n int) {
	t.Helper()
	if err := f.read(func(kv state.KV) { n = len(state.Hosts(kv)) }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestStateSurvivesAReopenAndSkipsWhatItHas(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f, kept := openState(t, dir, 0, 0)
	if !kept {
		t.Fatal("a new, empty state is nothing to doubt")
	}
	logs := history(t, 10)
	f.ApplyBatch(logs)
	hash := f.hash
	shut(t, f)
	f, kept = openState(t, dir, 0, 11)
	if !kept || f.applied != 11 || f.hash != hash {
		t.Fatalf("kept %v at %d with hash %x, want 11 and %x", kept, f.applied, f.hash, hash)
	}
	f.ApplyBatch(logs)
	if f.hash != hash || hosts(t, f) != 10 {
		t.Fatal("entries it had were applied again")
	}
	shut(t, f)
}

// A state ahead of the log, or behind the snapshot, is not this node's.
func TestStateOutsideTheLogIsWiped(t *testing.T) {
	for _, at := range []struct{ snap, last uint64 }{{0, 10}, {12, 20}} {
		dir := filepath.Join(t.TempDir(), "state")
		f, _ := openState(t, dir, 0, 0)
		f.ApplyBatch(history(t, 10))
		shut(t, f)
		f, kept := openState(t, dir, at.snap, at.last)
		if kept || f.applied != 0 || hosts(t, f) != 0 {
			t.Fatalf("snapshot %d, log end %d: kept %v at %d", at.snap, at.last, kept, f.applied)
		}
		shut(t, f)
	}
}

// TestMain is also the child that opens a state which may end its process, and
// the child that is a node.
func TestMain(m *testing.M) {
	if conf := os.Getenv("CAIRN_TEST_NODE"); conf != "" {
		childNode(conf)
	}
	dir := os.Getenv("CAIRN_TEST_STATE")
	if dir == "" {
		os.Exit(m.Run())
	}
	f, kept, err := openFSM(dir, tableBytes(""), 0, 51)
	if err == nil {
		fmt.Printf("%v %d %x\n", kept, f.applied, f.hash)
		err = f.close()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	os.Exit(0)
}

// Whatever a damaged file does to Badger — an error, a panic that ends the
// process, keys silently gone — the state is whole or wiped, at the second
// start at the latest, and the log gives it back. Tables are of a state that was
// closed; the write-ahead log and the rest of one whose process was killed.
func TestDamagedStateIsNeverServed(t *testing.T) {
	t.Parallel()
	wiped, crashed := map[string]int{}, map[string]int{}
	for kind, parts := range map[string]int{"*.sst": 16, "*.mem": 16, "*.vlog": 2, "MANIFEST": 6, "KEYREGISTRY": 2, "DISCARD": 2} {
		for part := range parts {
			dir := filepath.Join(t.TempDir(), "state")
			f, _ := openState(t, dir, 0, 0)
			f.ApplyBatch(history(t, 50))
			whole := fmt.Sprintf("true 51 %x\n", f.hash)
			hash := f.hash
			if kind != "*.sst" {
				killed := filepath.Join(t.TempDir(), "state")
				copyDir(t, dir, killed)
				shut(t, f)
				dir = killed
			} else {
				shut(t, f)
			}
			damage(t, dir, kind, part, parts)
			out, err := child(dir)
			if err != nil {
				crashed[kind]++
				if out, err = child(dir); err != nil {
					t.Fatalf("%s damaged at %d/%d: the second start failed too: %v\n%s", kind, part, parts, err, out)
				}
			}
			if out == whole {
				continue
			}
			if out != "false 0 0\n" && out != "true 0 0\n" { // all gone, or emptied: the log gives it back
				t.Fatalf("%s damaged at %d/%d: served %q, want it whole (%q) or empty", kind, part, parts, out, whole)
			}
			wiped[kind]++
			f, _ = openState(t, dir, 0, 51)
			f.ApplyBatch(history(t, 50))
			if f.hash != hash {
				t.Fatal("the log does not give the state back")
			}
			shut(t, f)
		}
	}
	t.Logf("emptied %v, ended the process %v", wiped, crashed)
	if wiped["*.sst"] == 0 || wiped["*.mem"] == 0 {
		t.Fatal("no damage was ever noticed: the test damages nothing")
	}
}

// damage flips a bit of a file of Badger's, somewhere in what it holds.
func damage(t *testing.T, dir, kind string, part, parts int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, kind))
	if err != nil || len(files) == 0 {
		t.Fatalf("no %s to damage in %s: %v", kind, dir, err)
	}
	end := max(1, dataEnd(t, files[0]))
	flip(t, files[0], end*int64(part)/int64(parts), byte(part%8))
}

func child(dir string) (string, error) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CAIRN_TEST_STATE="+dir)
	out, err := cmd.Output()
	return string(out), err
}

// Another process's state is refused, not wiped.
func TestStateInUseIsRefusedUnharmed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f, _ := openState(t, dir, 0, 0)
	f.ApplyBatch(history(t, 3))
	if _, _, err := openFSM(dir, tableBytes(""), 0, 4); !errors.Is(err, status.Held) {
		t.Fatalf("second open: %v", err)
	}
	if hosts(t, f) != 3 {
		t.Fatal("the second open harmed the state")
	}
	shut(t, f)
}

type memSink struct {
	bytes.Buffer
	cancelled bool
}

func (*memSink) Close() error    { return nil }
func (*memSink) ID() string      { return "mem" }
func (s *memSink) Cancel() error { s.cancelled = true; return nil }

func TestSnapshotGivesTheStateBackOrNothing(t *testing.T) {
	t.Parallel()
	f, _ := openState(t, filepath.Join(t.TempDir(), "a"), 0, 0)
	f.ApplyBatch(history(t, 20))
	snap, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	hash := f.hash
	f.ApplyBatch(history(t, 25)[21:]) // goes on meanwhile
	sink := &memSink{}
	if err := snap.Persist(sink); err != nil || sink.cancelled {
		t.Fatal(err)
	}
	snap.Release()
	shut(t, f)
	whole := sink.Bytes()

	dir := filepath.Join(t.TempDir(), "b")
	g, _ := openState(t, dir, 0, 0)
	if err := g.Restore(io.NopCloser(bytes.NewReader(whole))); err != nil {
		t.Fatal(err)
	}
	if g.hash != hash || g.applied != 21 || hosts(t, g) != 20 {
		t.Fatalf("restored %d hosts at %d", hosts(t, g), g.applied)
	}
	for i := 0; i < len(whole); i += 1 + len(whole)/100 {
		if i >= 8 && i < 16 {
			continue // the applied index: raft keeps it, with its own checksum, beside the file
		}
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if err := g.Restore(io.NopCloser(bytes.NewReader(bad))); err == nil {
			t.Fatalf("a snapshot damaged at byte %d was accepted", i)
		}
	}
	if err := g.Restore(io.NopCloser(bytes.NewReader(whole[:len(whole)-1]))); err == nil {
		t.Fatal("a cut snapshot was accepted")
	}
	shut(t, g)
	if g, kept := openState(t, dir, 21, 21); kept {
		t.Fatal("a half restored state was kept")
	} else {
		shut(t, g)
	}
}

// What a batch changed is told in the order of the keys, so of its events in the
// order in which they happened.
func TestABatchTellsItsEventsInOrder(t *testing.T) {
	f, _ := openState(t, t.TempDir(), 0, 0)
	defer shut(t, f)
	f.ApplyBatch(history(t, 60))
	rep, _ := f.news.since(0)
	var events []uint64
	for _, c := range rep.Changes {
		if e := c.GetEvent(); e > 0 {
			events = append(events, e)
		}
	}
	if len(events) < 20 || !slices.IsSorted(events) {
		t.Fatalf("events %v, want at least 20 in order", events)
	}
}

// Nodes have tables of different sizes, each the same at every start.
func TestTablesAreOfTheNodesOwnSize(t *testing.T) {
	seen := map[int64]string{}
	for _, id := range []string{"meta-1", "meta-2", "meta-3", "meta-4", "meta-5"} {
		n := tableBytes(id)
		if n != tableBytes(id) || n < 8<<20 || n >= 9<<20 || seen[n] != "" {
			t.Errorf("%s has %d bytes, %q has as many", id, n, seen[n])
		}
		seen[n] = id
	}
}
