package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// What raft is configured to, and what is not used of it, are facts of safety.
func TestRaftIsUsedAsIsSafe(t *testing.T) {
	s, err := solo(t, t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := s.raftConfig(false)
	if c.BatchApplyCh || c.PreVoteDisabled || !c.ShutdownOnRemove || snapshotsKept < 2 {
		t.Fatalf("batches outlive leadership %v, no pre-vote %v, removed nodes go on %v, %d snapshots kept", c.BatchApplyCh, c.PreVoteDisabled, !c.ShutdownOnRemove, snapshotsKept)
	}
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(f, "_test.go") && (bytes.Contains(b, []byte(".LeadershipTransfer")) || bytes.Contains(b, []byte("RemovePeer("))) {
			t.Errorf("%s hands leadership over: raft's issue 696", f)
		}
	}
}

// A node that could not reach the others for a while does not make them elect
// anew when it comes back: pre-vote.
func TestACutOffNodeDisturbsNobody(t *testing.T) {
	t.Parallel()
	tr, wires := wired(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	lead := tr.leader()
	off := (lead + 1) % 3
	term := tr.nodes[lead].node().Term
	for pair, w := range wires {
		if pair[0] == off || pair[1] == off {
			w.set(true)
		}
	}
	until(t, func() string { // it has stood for election in vain
		if s := tr.nodes[off].node().State; s != "candidate" {
			return "the node that is cut off is a " + s
		}
		return ""
	})
	must(t, ctx, c, create("meanwhile"))
	for _, w := range wires {
		w.set(false)
	}
	tr.agree()
	until(t, func() string {
		if n := tr.nodes[off].node(); n.State != "follower" {
			return "it is a " + n.State
		}
		return ""
	})
	if n := tr.nodes[lead].node(); n.Term != term || !n.Leader {
		t.Fatalf("the leader of term %d is %v", term, n)
	}
}

// flip changes one bit of a file.
func flip(t *testing.T, file string, at int64, bit byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// One flipped bit anywhere in a file of a node (Badger's files:
// TestDamagedStateIsNeverServed): it comes back with the state
// the others have, by its own log or by theirs, or says what to do. It never
// serves anything else.
func TestOneFlippedBitIsNeverServed(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, func(_ int, c *Config) { c.snapEvery, c.tick = 40, 20*time.Millisecond })
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	for i := range 120 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	tr.agree()
	kinds := []string{"raft.db", "snapshots/*/state.bin", "snapshots/*/meta.json", "node.json"}
	outcomes := map[string]map[string]int{}
	for round, kind := range append(kinds, kinds[0], kinds[0], kinds[0]) {
		victim := round % 3
		before := tr.nodes[victim].dir.record().Lost
		tr.agree()
		tr.stop(victim)
		files, err := filepath.Glob(filepath.Join(tr.dirs[victim], kind))
		if err != nil || len(files) == 0 {
			t.Fatalf("no %s to damage: %v", kind, err)
		}
		st, err := os.Stat(files[0])
		if err != nil {
			t.Fatal(err)
		}
		size := st.Size()
		if kind == "raft.db" {
			size = dataEnd(t, files[0]) // it is longer than what is in it
		}
		at := size * int64(round*2654435761%1000) / 1000
		if round > len(kinds) { // in an entry that is in use
			at = flipEvery(t, files[0], fmt.Sprintf("after%d", round-1))
		} else {
			flip(t, files[0], at, byte(round%8))
		}
		t.Logf("%s of %s, byte %d of %d", filepath.Base(files[0]), tr.peers[victim].ID, at, size)
		how := tr.comesBack(victim, filepath.Join(tr.dirs[victim], "node.json"))
		if how == "mended" && tr.nodes[victim].dir.record().Lost && !before {
			how = "emptied, from the others"
		}
		if outcomes[kind] == nil {
			outcomes[kind] = map[string]int{}
		}
		outcomes[kind][how]++
		t.Log(how, tr.nodes[victim].node())
		must(t, ctx, c, create(fmt.Sprintf("after%d", round)))
		tr.agree()
	}
	t.Logf("%v", outcomes)
	if outcomes["raft.db"]["emptied, from the others"] == 0 {
		t.Fatal("no damage of the log was ever noticed")
	}
}

// flipEvery changes every copy of a text in a file, and says where the last was.
func flipEvery(t *testing.T, file, text string) (at int64) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := bytes.Index(b, []byte(text)); i >= 0; i = bytes.Index(b, []byte(text)) {
		at = int64(i)
		b[i] ^= 1
	}
	if at == 0 {
		t.Fatalf("%s does not hold %q", file, text)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return at
}

// dataEnd is where a file's last byte that is not zero stands.
func dataEnd(t *testing.T, file string) int64 {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return int64(len(bytes.TrimRight(b, "\x00")))
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// comesBack starts a damaged node; one that refuses in a sentence is given an
// empty directory, as the sentence says.
func (tr *trio) comesBack(i int, record string) string {
	tr.t.Helper()
	p := tr.peers[i]
	s, err := New(tr.config(i, listen(tr.t, p.RaftAddr), listen(tr.t, p.APIAddr)))
	if err != nil {
		if !errors.Is(err, status.Corrupt) || !strings.Contains(err.Error(), "move the directory away") {
			tr.t.Fatalf("a damaged node: %v", err)
		}
		if err := os.RemoveAll(tr.dirs[i]); err != nil {
			tr.t.Fatal(err)
		}
		tr.start(i)
		return "refused"
	}
	tr.nodes[i] = s
	return "mended"
}

// A damaged log on the cluster's only node is refused, not emptied.
func TestTheOnlyNodeIsNotEmptied(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := solo(t, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, ctx := soloClient(t, s), context.Background()
	hostUp(t, ctx, c, 1)
	for i := range 20 {
		must(t, ctx, c, create(fmt.Sprintf("volume-%d", i)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "raft.db")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.LastIndex(b, []byte("volume-7"))
	if at < 0 {
		t.Fatal("the log holds no command to damage")
	}
	flipEvery(t, file, "volume-7")
	if _, err := solo(t, dir, nil); !errors.Is(err, status.Corrupt) || !strings.Contains(err.Error(), "checksum") {
		t.Fatalf("a damaged log: %v", err)
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Contains(after, []byte("volume-6")) {
		t.Fatalf("the only copy was emptied: %v", err)
	}
}

// A vote or a term that has changed on disk is noticed.
func TestVoteHasAChecksum(t *testing.T) {
	mem := raft.NewInmemStore()
	v := sealedVote{mem}
	if err := v.SetUint64([]byte("CurrentTerm"), 7); err != nil {
		t.Fatal(err)
	}
	if err := v.Set([]byte("LastVoteCand"), []byte("meta-1")); err != nil {
		t.Fatal(err)
	}
	if n, err := v.GetUint64([]byte("CurrentTerm")); err != nil || n != 7 || v.check() != nil {
		t.Fatal(n, err, v.check())
	}
	for _, k := range []string{"CurrentTerm", "LastVoteCand"} {
		good, err := mem.Get(voteKey([]byte(k)))
		if err != nil {
			t.Fatal(err)
		}
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 4
			if err := mem.Set(voteKey([]byte(k)), bad); err != nil {
				t.Fatal(err)
			}
			if err := v.check(); !errors.Is(err, status.Corrupt) {
				t.Fatalf("%s with a flip at byte %d: %v", k, i, err)
			}
		}
		if err := mem.Set(voteKey([]byte(k)), good); err != nil {
			t.Fatal(err)
		}
	}
}

// A node whose state has come to differ from the others' finds out by the audit,
// ends, and its next start has their state.
func TestADifferentStateIsFoundAndMended(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, func(_ int, c *Config) { c.audit = 50 * time.Millisecond })
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	for i := range 10 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	victim := (tr.leader() + 1) % 3
	s := tr.nodes[victim]
	over := state.NewOverlay(state.NewMem())
	res := state.Apply(over, &pb.Command{Session: "cosmic ray", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	if res.Status != 0 {
		t.Fatal(res.Detail)
	}
	s.fsm.mu.Lock()
	err := s.fsm.commit(over, s.fsm.applied, s.fsm.hash+over.HashDelta())
	s.fsm.hash += over.HashDelta()
	s.fsm.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	must(t, ctx, c, create("after")) // an audit follows
	<-s.Done()
	if !Heals(s.Err()) || !strings.Contains(s.Err().Error(), "state hash") {
		t.Fatalf("ended with %v", s.Err())
	}
	tr.stop(victim)
	tr.start(victim)
	tr.agree()
	if n := tr.nodes[victim]; n.dir.record().Lost || n.dir.record().NeedIndex != 0 {
		t.Fatalf("more than the state was emptied: %+v", n.dir.record())
	}
}

// A node whose program words its events otherwise is not in doubt, and neither is
// one that has read its state again.
func TestOtherWordsAreNoOtherState(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, func(_ int, c *Config) { c.audit = 50 * time.Millisecond })
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	until(t, func() string {
		for _, s := range tr.nodes {
			if n := s.node(); n.FormatInUse < state.WordlessFormat {
				return fmt.Sprintf("%s uses state version %d", n.Id, n.FormatInUse)
			}
		}
		return ""
	})
	victim := (tr.leader() + 1) % 3
	f := tr.nodes[victim].fsm
	f.mu.Lock()
	kv := newView(f.db)
	over := state.NewOverlay(kv)
	var k, v []byte
	over.Scan([]byte{'e'}, nil, func(key, val []byte) bool { k, v = key, bytes.Clone(val); return false })
	e := &pb.Event{}
	if err := proto.Unmarshal(v, e); err != nil || e.What == "" {
		t.Fatal(e, err)
	}
	e.What = "the same in other words"
	b, err := proto.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	over.Set(k, b)
	hash := f.hash + over.HashDelta()
	err = f.commit(over, f.applied, hash)
	f.hash, f.words = hash, f.words+state.HashWords(k, b)-state.HashWords(k, v)
	kv.close()
	f.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	audited := func() {
		t.Helper()
		must(t, ctx, c, create(fmt.Sprintf("v%d", time.Now().UnixNano())))
		applied, _ := tr.nodes[victim].fsm.at()
		until(t, func() string {
			at, hash := tr.nodes[victim].fsm.audit()
			if at <= applied {
				return "no audit"
			}
			for _, s := range tr.nodes {
				if i, h := s.fsm.audit(); i != at {
					return "audits of several commands"
				} else if h != hash {
					t.Fatalf("the state hash of %s is %x and another %x", s.id, h, hash)
				}
			}
			return ""
		})
		tr.agree()
	}
	audited()
	tr.stop(victim)
	tr.start(victim)
	if !tr.nodes[victim].kept {
		t.Error("its state was not kept")
	}
	audited()
}

// An audit notes the hash at its own entry, however entries are batched.
func TestAuditsAreAtOneEntry(t *testing.T) {
	t.Parallel()
	logs := history(t, 30)
	b, err := proto.Marshal(&pb.Command{Op: &pb.Command_Housekeeping{Housekeeping: &pb.Housekeeping{Audit: true}}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range logs {
		if i == 12 || i == 20 {
			logs[i] = &raft.Log{Index: logs[i].Index, Type: raft.LogCommand, Data: b}
		}
	}
	var at, hash uint64
	for _, size := range []int{1, 5, 13, 31} {
		f, _ := openState(t, filepath.Join(t.TempDir(), "state"), 0, 0)
		for i := 0; i < len(logs); i += size {
			f.ApplyBatch(logs[i:min(i+size, len(logs))])
		}
		i, h := f.audit()
		if at == 0 {
			at, hash = i, h
		}
		if i != logs[20].Index || i != at || h != hash {
			t.Fatalf("in batches of %d: hash %x at %d, want %x at %d", size, h, i, hash, at)
		}
		shut(t, f)
	}
}

// When a majority of the disks is nearly full, nothing new is taken, although
// the leader has room.
func TestFullDisksOfTheOthersRefuseToo(t *testing.T) {
	t.Parallel()
	var full [3]chan struct{} // closed: this node's disk is full
	for i := range full {
		full[i] = make(chan struct{})
	}
	var left atomic.Uint64
	left.Store(20 << 20)
	tr := newTrio(t, func(i int, c *Config) {
		c.audit = 20 * time.Millisecond
		c.free = func(string) (uint64, error) {
			select {
			case <-full[i]:
				return left.Load(), nil
			default:
				return 1 << 30, nil
			}
		}
	})
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, create("a"))
	lead := tr.leader()
	close(full[(lead+1)%3])
	must(t, ctx, c, create("b")) // a majority has room
	close(full[(lead+2)%3])
	n := 0
	until(t, func() string {
		_, err := c.Do(ctx, create(fmt.Sprintf("c%d", n)))
		n++
		switch {
		case err == nil:
			return "still taken"
		case errors.Is(err, status.NoSpace) && strings.Contains(err.Error(), "a majority of the metadata nodes has 20 MiB"):
			return ""
		}
		return err.Error()
	})
	rm := func() error {
		_, err := c.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "none"}}})
		return err
	}
	if err := rm(); !errors.Is(err, status.NotFound) {
		t.Errorf("a deletion with 20 MiB left: %v", err)
	}
	left.Store(0) // not one byte is an answer too
	until(t, func() string {
		if got := tr.nodes[lead].quorumFree.Load(); got > 1 {
			return fmt.Sprintf("the leader takes a majority to have %d bytes left", got)
		}
		return ""
	})
	if err := rm(); !errors.Is(err, status.NoSpace) {
		t.Errorf("a deletion with nothing left: %v", err)
	}
}
