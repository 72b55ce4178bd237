package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// solo is a cluster of one node.
func solo(t *testing.T, dir string, set func(c *Config)) (*Server, error) {
	t.Helper()
	r, a := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	c := Config{ID: "meta-1", Cluster: "test", Dir: dir, RaftListener: r, APIListener: a, Placer: firstStores{}, Timeout: 50 * time.Millisecond, Log: quiet(),
		Peers: []Peer{{ID: "meta-1", RaftAddr: r.Addr().String(), APIAddr: a.Addr().String()}}}
	if set != nil {
		set(&c)
	}
	s, err := New(c)
	if err == nil {
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return s, err
}

func soloClient(t *testing.T, s *Server) *client.Client {
	c := client.New(client.Config{Addrs: []string{s.cfg.Peers[0].APIAddr}})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func attach(volume, host, session string) *pb.Attach {
	return &pb.Attach{Volume: volume, Host: host, Session: session}
}

// doFor asks for at most that long.
func doFor(c *client.Client, d time.Duration, op *pb.Attach) (*pb.Result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return c.Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: op}})
}

// With leases of an hour nothing ends by itself: whatever returns here did not
// wait, and whatever must wait is seen not to return.
func TestAttachWaitsForALeaseUnlessItIsOver(t *testing.T) {
	s, err := solo(t, t.TempDir(), func(c *Config) { c.Lease = time.Hour })
	if err != nil {
		t.Fatal(err)
	}
	c := soloClient(t, s)
	ctx := context.Background()
	hostUp(t, ctx, c, 1)
	hostUp(t, ctx, c, 2)
	must(t, ctx, c, create("v"))
	renew := func(host, session string, v *pb.Volume, release bool) *pb.RenewReply {
		t.Helper()
		req := &pb.RenewRequest{Host: host, Session: session}
		l := []*pb.Lease{{VolumeId: v.Id, Epoch: v.Epoch}}
		if release {
			req.Release = l
		} else {
			req.Leases = l
		}
		rep, err := c.Renew(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	quick := func(op *pb.Attach) *pb.Volume {
		t.Helper()
		res, err := doFor(c, patience, op)
		if err != nil {
			t.Fatalf("attach on %s: %v", op.Host, err)
		}
		return res.Volume
	}
	blocked := func(op *pb.Attach) {
		t.Helper()
		if res, err := doFor(c, 300*time.Millisecond, op); !errors.Is(err, status.Unknown) || !strings.Contains(err.Error(), "lease") {
			t.Fatalf("attach on %s did not wait for the lease: %v %v", op.Host, res, err)
		}
	}

	v := quick(attach("v", "host-1", "a"))
	if rep := renew("host-1", "a", v, false); len(rep.Volumes) != 1 || rep.LeaseMs != 3600_000 || rep.Volumes[0].SizeBytes != v.SizeBytes {
		t.Fatalf("renewal: %v", rep)
	}
	if _, err := doFor(c, patience, attach("v", "host-2", "b")); !errors.Is(err, status.Held) || !strings.Contains(err.Error(), "host-1") {
		t.Fatalf("a held volume: %v", err)
	}
	take := attach("v", "host-2", "b")
	take.Takeover = true
	blocked(take)
	if rep := renew("host-1", "a", v, false); len(rep.Refused) != 1 || len(rep.Volumes) != 0 {
		t.Fatalf("a fenced holder renewed: %v", rep)
	}
	// The attach was committed; its holder asks again under its own session.
	// Its predecessor on the other host is still covered.
	blocked(attach("v", "host-2", "b"))
	// The other host's word cannot end it any more either: its epoch is over,
	// and only time or that host's end would. A new volume goes on here.
	must(t, ctx, c, create("w"))
	w := quick(attach("w", "host-1", "a"))
	renew("host-1", "a", w, false)
	gone := attach("w", "host-1", "a2")
	gone.PredecessorGone = true
	w = quick(gone)
	renew("host-1", "a2", w, false)
	w = quick(attach("w", "host-1", "a2")) // the same process again
	renew("host-1", "a2", w, false)
	renew("host-2", "b", w, true) // not its to release
	take = attach("w", "host-2", "b")
	take.Takeover = true
	held := &pb.Volume{Id: w.Id, Epoch: w.Epoch}
	if end := s.tenure.leases.held(held, boottime()); end == 0 {
		t.Fatal("a lease was released by another host")
	}
	renew("host-1", "a2", w, true)
	w = quick(attach("w", "host-2", "b")) // no takeover needed: the lease is over
	renew("host-2", "b", w, false)
	must(t, ctx, c, &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: w.Id, Epoch: w.Epoch}}})
	w = quick(attach("w", "host-1", "a3"))
	if w.Epoch != 5 {
		t.Fatalf("epoch %d after five attaches", w.Epoch)
	}
}

// A holder that does not renew loses its volume to the next who asks, who waits
// the lease out.
func TestExpiredLeaseAdmits(t *testing.T) {
	s, err := solo(t, t.TempDir(), func(c *Config) { c.Lease = 200 * time.Millisecond })
	if err != nil {
		t.Fatal(err)
	}
	c := soloClient(t, s)
	ctx := context.Background()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, create("v"))
	begin := boottime()
	if _, err := doFor(c, patience, attach("v", "host-1", "a")); err != nil {
		t.Fatal(err)
	}
	until(t, func() string {
		if _, err := doFor(c, patience, attach("v", "host-2", "b")); err != nil {
			if !errors.Is(err, status.Held) {
				t.Fatal(err)
			}
			return err.Error()
		}
		return ""
	})
	if took := boottime() - begin; took < 200*time.Millisecond+clockDrift {
		t.Fatalf("admitted after %v", took)
	}
}

// A directory that is not this node's is refused in one sentence, and unharmed.
func TestDirectoriesOfOthersAreRefused(t *testing.T) {
	dir := t.TempDir()
	s, err := solo(t, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	must(t, context.Background(), soloClient(t, s), &pb.Command{Op: &pb.Command_InitCluster{InitCluster: &pb.InitCluster{ClusterId: "c"}}})
	if _, err := solo(t, dir, nil); !errors.Is(err, status.Held) || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("an occupied directory: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "node.json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	other := func(c *Config) {
		c.ID = "meta-9"
		c.Peers[0].ID = "meta-9"
	}
	for _, x := range []struct {
		what string
		with string // replaces node.json; "-" removes it
		set  func(c *Config)
		kind status.Kind
		says string
	}{
		{"another version", strings.Replace(string(good), `"format": 2`, `"format": 7`, 1), nil, status.Unsupported, "format version 7"},
		{"another node", string(good), other, status.Conflict, "belongs to node meta-1"},
		{"another cluster", string(good), func(c *Config) { c.Cluster = "theirs" }, status.Conflict, "belongs to cluster test"},
		{"a flipped bit", strings.Replace(string(good), `"joined": true`, `"joinfd": true`, 1), nil, status.Corrupt, "checksum"},
		{"a damaged record", "{", nil, status.Corrupt, "damaged"},
		{"no record", "-", nil, status.Corrupt, "no node.json"},
	} {
		if err := os.WriteFile(file, []byte(x.with), 0o600); err != nil {
			t.Fatal(err)
		}
		if x.with == "-" {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := solo(t, dir, x.set); !errors.Is(err, x.kind) || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %v (%v)", x.what, err, status.Of(err))
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err = solo(t, dir, nil)
	if err != nil {
		t.Fatalf("after all these: %v", err)
	}
	if rep, err := soloClient(t, s).Query(context.Background(), &pb.QueryRequest{Q: &pb.QueryRequest_Cluster{Cluster: true}}); err != nil || rep.ClusterId != "c" {
		t.Fatalf("after all these: %v %v", rep, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "raft.db")); err != nil {
		t.Fatal(err)
	}
	if _, err := solo(t, dir, nil); !errors.Is(err, status.Corrupt) || !strings.Contains(err.Error(), "log") {
		t.Errorf("without its log: %v", err)
	}
}

// hungLog is a log whose writes hang while hang is set.
type hungLog struct {
	raft.LogStore
	hang atomic.Bool
	free chan struct{}
}

func (h *hungLog) StoreLogs(logs []*raft.Log) error {
	if h.hang.Load() {
		<-h.free
	}
	return h.LogStore.StoreLogs(logs)
}

// A leader with a hung disk ends itself: raft would keep it leader for ever.
func TestLeaderWithAHungDiskEnds(t *testing.T) {
	h := &hungLog{free: make(chan struct{})}
	fatal := make(chan error, 1)
	s, err := solo(t, t.TempDir(), func(c *Config) {
		c.tick = 5 * time.Millisecond
		c.logs = func(l raft.LogStore) raft.LogStore { h.LogStore = l; return h }
		c.Fatal = func(err error) { fatal <- err }
	})
	if err != nil {
		t.Fatal(err)
	}
	c := soloClient(t, s)
	hostUp(t, context.Background(), c, 1)
	h.hang.Store(true)
	defer close(h.free) // before the node is closed
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan error, 1)
	go func() {
		_, err := c.Do(ctx, create("v"))
		told <- err
	}()
	err = <-fatal
	<-s.Done()
	if !errors.Is(err, status.IO) || !errors.Is(s.Err(), status.IO) || !strings.Contains(err.Error(), "hung") {
		t.Errorf("ended with %v, %v", err, s.Err())
	}
	cancel()
	if err := <-told; !errors.Is(err, status.Unknown) {
		t.Errorf("the command in flight was told %v", err)
	}
}

// With a full disk nothing is taken that uses it up; what keeps volumes running
// goes on for a while; and a refusal uses no number.
func TestFullDiskRefusesInTime(t *testing.T) {
	var free atomic.Uint64
	free.Store(1 << 30)
	s, err := solo(t, t.TempDir(), func(c *Config) { c.free = func(string) (uint64, error) { return free.Load(), nil } })
	if err != nil {
		t.Fatal(err)
	}
	c, ctx := soloClient(t, s), context.Background()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, create("v"))
	free.Store(63 << 20)
	for range 3 {
		if _, err := c.Do(ctx, create("w")); !errors.Is(err, status.NoSpace) || !strings.Contains(err.Error(), "63 MiB") {
			t.Fatalf("with 63 MiB: %v", err)
		}
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "v"}}})
	free.Store(15 << 20)
	if _, err := c.Do(ctx, &pb.Command{Op: &pb.Command_ChangeMembers{ChangeMembers: &pb.ChangeMembers{}}}); !errors.Is(err, status.NoSpace) {
		t.Fatalf("with 15 MiB: %v", err)
	}
	free.Store(1 << 30)
	must(t, ctx, c, create("w"))
}

// A node that has lost its memory neither votes nor stands for election before
// it has caught up, so that with one that lags it cannot undo what was
// committed.
func TestNodeWithoutMemoryElectsNobody(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	tr.agree()
	first := tr.leader()
	lags, loses := (first+1)%3, (first+2)%3
	tr.stop(lags)
	for _, name := range []string{"a", "b", "c"} {
		must(t, ctx, c, create(name)) // confirmed by the leader and the one that will forget
	}
	index := tr.nodes[first].node().LastIndex
	tr.stop(loses)
	tr.stop(first)
	// The loser has asked its peers, and then its directory holds this.
	if err := os.RemoveAll(tr.dirs[loses]); err != nil {
		t.Fatal(err)
	}
	d, err := openDir(tr.dirs[loses], tr.peers[loses].ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	d.rec.Joined, d.rec.NeedIndex, d.rec.AboveTerm = true, index, 2
	if err := errors.Join(d.save(), d.close()); err != nil {
		t.Fatal(err)
	}
	tr.start(loses)
	tr.start(lags)
	until(t, func() string { // the one that lags has asked for its vote again and again
		for _, i := range []int{lags, loses} {
			if tr.nodes[i].node().Leader {
				t.Fatalf("%s was elected by a node without memory", tr.peers[i].ID)
			}
		}
		if tr.nodes[loses].trans.vote.refusals.Load() < 5 {
			return "the lagging node does not stand for election"
		}
		if term := tr.nodes[loses].votingTerm(); term != 0 {
			t.Fatalf("a node that may have forgotten its vote confirms term %d", term)
		}
		return ""
	})
	tr.start(first)
	if got := volumes(t, ctx, c); len(got) != 3 {
		t.Fatalf("%d volumes, three were committed", len(got))
	}
	tr.agree()
}

// Close leaves no goroutine.
func TestCloseLeavesNothingRunning(t *testing.T) {
	before := runtime.NumGoroutine()
	tr := newTrio(t, nil)
	c := client.New(client.Config{Addrs: tr.addrs()})
	hostUp(t, tr.ctx(), c, 1)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for i := range 3 {
		tr.stop(i)
	}
	until(t, func() string { // raft's own tell it to end, and do so at once
		if n := runtime.NumGoroutine(); n > before {
			buf := make([]byte, 1<<20)
			return string(buf[:runtime.Stack(buf, true)])
		}
		return ""
	})
}

// The record of a directory is the documented one.
func TestRecordOnDisk(t *testing.T) {
	b, err := json.Marshal(record{Format: 2, ID: "meta-1", Cluster: "c", Joined: true, NeedIndex: 5, AboveTerm: 2})
	if want := `{"format":2,"id":"meta-1","cluster":"c","joined":true,"need_index":5,"above_term":2}`; err != nil || string(b) != want {
		t.Fatalf("%s, want %s", b, want)
	}
}

// With a damaged snapshot and no state a node either comes back whole, by an
// older snapshot and the log, or says what to do.
func TestDamagedSnapshotsAreNeverServed(t *testing.T) {
	t.Parallel()
	const n = 120
	whole, refused := 0, 0
	for _, damage := range []int{1, snapshotsKept} { // the newest, all
		dir := t.TempDir()
		set := func(c *Config) { c.snapEvery = 25 }
		s, err := solo(t, dir, set)
		if err != nil {
			t.Fatal(err)
		}
		c, ctx := soloClient(t, s), context.Background()
		hostUp(t, ctx, c, 1)
		for i := range n {
			must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
			if i%40 == 39 {
				if err := s.raft.Load().Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
					t.Fatal(err)
				}
			}
		}
		snaps, err := s.snaps.List()
		if err != nil || len(snaps) < 2 {
			t.Fatalf("%d snapshots: %v", len(snaps), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(dir, "state")); err != nil {
			t.Fatal(err)
		}
		for _, m := range snaps[:min(damage, len(snaps))] {
			file := filepath.Join(dir, "snapshots", m.ID, "state.bin")
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 4
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err = solo(t, dir, set)
		if err != nil {
			if !errors.Is(err, status.Corrupt) || !strings.Contains(err.Error(), "move the directory away") {
				t.Fatalf("%d damaged: %v", damage, err)
			}
			refused++
			continue
		}
		if got := volumes(t, ctx, soloClient(t, s)); len(got) != n {
			t.Fatalf("%d damaged: %d volumes of %d", damage, len(got), n)
		}
		whole++
	}
	if refused == 0 {
		t.Error("a node without any snapshot and with a cut log started")
	}
	t.Logf("%d came back whole, %d refused", whole, refused)
}
