package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// joiner starts a node that waits to be added.
func joiner(t *testing.T, name, dir string) (*Server, Peer) {
	t.Helper()
	r, a := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	p := Peer{ID: name, RaftAddr: r.Addr().String(), APIAddr: a.Addr().String()}
	s, err := New(Config{ID: name, Cluster: "test", Dir: dir, RaftListener: r, APIListener: a, Peers: []Peer{p}, Join: true,
		Placer: firstStores{}, Timeout: 250 * time.Millisecond, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, p
}

// busy runs writers until it is stopped; none of their commands may fail.
func busy(t *testing.T, ctx context.Context, addrs []string, n int) (stop func() (done int)) {
	t.Helper()
	var end atomic.Bool
	var wg sync.WaitGroup
	ws := make([]*writer, n)
	errs := make([]error, n)
	cs := make([]*client.Client, n)
	for i := range ws {
		ws[i] = &writer{name: fmt.Sprintf("b%d", i)}
		cs[i] = client.New(client.Config{Addrs: addrs, Who: ws[i].name})
		wg.Go(func() { errs[i] = ws[i].run(ctx, cs[i], &end) })
	}
	return func() (done int) {
		end.Store(true)
		wg.Wait()
		for i, w := range ws {
			if err := errors.Join(errs[i], cs[i].Close()); err != nil {
				t.Error(err)
			}
			done += len(w.created)
		}
		return done
	}
}

// A cluster grows from one node to three and on to five, and shrinks again,
// leaders included, under commands of which none fails or is done twice.
func TestNodesComeAndGoUnderLoad(t *testing.T) {
	t.Parallel()
	first, err := solo(t, t.TempDir(), func(c *Config) { c.Timeout = 250 * time.Millisecond })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	c := soloClient(t, first)
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, &pb.Command{Op: &pb.Command_InitCluster{InitCluster: &pb.InitCluster{ClusterId: "test"}}})
	addrs := []string{first.cfg.Peers[0].APIAddr}
	all := map[string]*Server{"meta-1": first}
	var waiting []Peer
	for i := 2; i <= 5; i++ {
		name := fmt.Sprintf("meta-%d", i)
		s, p := joiner(t, name, filepath.Join(t.TempDir(), "meta"))
		all[name] = s
		addrs = append(addrs, p.APIAddr)
		waiting = append(waiting, p)
	}
	if n := all["meta-2"].node(); n.State != "waiting" || n.Role != "none" || n.Name != "meta-2" {
		t.Fatalf("a node that waits says %v", n)
	}
	stop := busy(t, ctx, addrs, 3)
	c = client.New(client.Config{Addrs: addrs, Who: "admin"})
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i, p := range waiting {
		nodes, err := c.AddNode(ctx, p.APIAddr)
		if err != nil || len(nodes) != i+2 {
			t.Fatalf("adding %s: %v %v", p.ID, nodes, err)
		}
		progress(t, ctx, c)
	}
	if _, err := c.AddNode(ctx, waiting[0].APIAddr); err != nil {
		t.Fatalf("adding again what is there: %v", err)
	}
	for range 2 { // the leader goes, twice; the others elect one
		var leader string
		until(t, func() string {
			nodes, err := c.Members(ctx)
			for _, n := range nodes {
				if n.Leader {
					leader = n.Name
					return ""
				}
			}
			return fmt.Sprintf("no leader: %v", err)
		})
		if _, err := c.RemoveNode(ctx, leader); err != nil {
			t.Fatalf("removing the leader %s: %v", leader, err)
		}
		progress(t, ctx, c)
		<-all[leader].Done()
		delete(all, leader)
	}
	if _, err := c.RemoveNode(ctx, "meta-9"); !errors.Is(err, status.NotFound) {
		t.Fatalf("removing nobody: %v", err)
	}
	done := stop()
	nodes, err := c.Members(ctx)
	if err != nil || len(nodes) != 3 {
		t.Fatalf("%d nodes are left: %v", len(nodes), err)
	}
	until(t, func() string {
		var hashes []string
		for _, s := range all {
			a, h := s.fsm.at()
			hashes = append(hashes, fmt.Sprintf("%d:%x", a, h))
		}
		if hashes[0] != hashes[1] || hashes[0] != hashes[2] {
			return "the states differ: " + strings.Join(hashes, " ")
		}
		return ""
	})
	t.Logf("%d volumes made meanwhile", done)
}

// A dead node is replaced by one of the same name with an empty directory,
// which is somebody else to raft; the dead one's directory starts no more.
func TestADeadNodeIsReplaced(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	for i := range 10 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	dead := (tr.leader() + 1) % 3
	name := tr.peers[dead].ID
	tr.stop(dead)
	s, p := joiner(t, name, filepath.Join(t.TempDir(), "meta"))
	if _, err := c.AddNode(ctx, p.APIAddr); !errors.Is(err, status.Exists) || !strings.Contains(err.Error(), "remove that one first") {
		t.Fatalf("a second %s: %v", name, err)
	}
	if _, err := c.RemoveNode(ctx, name); err != nil {
		t.Fatal(err)
	}
	if _, err := c.AddNode(ctx, p.APIAddr); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(s.id, name+"~") {
		t.Fatalf("it came back as %s", s.id)
	}
	other := (dead + 1) % 3 // now a majority with the new one must do
	if tr.nodes[other].node().Leader {
		other = (dead + 2) % 3
	}
	tr.stop(other)
	must(t, ctx, c, create("after"))
	left := 3 - dead - other
	if _, err := c.RemoveNode(ctx, tr.peers[left].ID); !errors.Is(err, status.Conflict) || !strings.Contains(err.Error(), tr.peers[other].ID+" is silent") {
		t.Fatalf("removing one of the last two that answer: %v", err)
	}
	until(t, func() string {
		n := 0
		if err := s.fsm.read(func(kv state.KV) { n = len(state.Volumes(kv)) }); err != nil || n != 11 {
			return fmt.Sprintf("%d volumes on the new node: %v", n, err)
		}
		return ""
	})
}

// Each node is stopped and started again, as for an upgrade, under commands of
// which none fails.
func TestRollingRestartFailsNoCommand(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	stop := busy(t, ctx, tr.addrs(), 3)
	for i := range 3 {
		tr.stop(i)
		progress(t, ctx, c)
		tr.start(i)
		until(t, func() string {
			lead := tr.nodes[tr.leader()].node()
			if n := tr.nodes[i].node(); n.Applied+5 < lead.Applied {
				return fmt.Sprintf("%s lags: %d of %d", n.Id, n.Applied, lead.Applied)
			}
			return ""
		})
	}
	t.Logf("%d volumes made meanwhile", stop())
	tr.agree()
}

// A backup is whole or refused; restored on all nodes it is the state as it
// was, fenced: no number is given out again, nothing is dropped at its word,
// and its volumes are closed until somebody vouches for them.
func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	must(t, ctx, c, &pb.Command{Op: &pb.Command_InitCluster{InitCluster: &pb.InitCluster{ClusterId: "test"}}})
	must(t, ctx, c, create("old"))
	old := must(t, ctx, c, &pb.Command{Op: &pb.Command_Attach{Attach: attach("old", "host-1", "gw-1")}}).Volume
	var b bytes.Buffer
	if err := c.Backup(ctx, &b); err != nil {
		t.Fatal(err)
	}
	since := must(t, ctx, c, create("since")).Volume // not in it
	whole := b.Bytes()
	h, err := CheckBackup(bytes.NewReader(whole))
	if err != nil || h.Cluster != "test" || h.Index == 0 {
		t.Fatalf("%+v: %v", h, err)
	}
	for i := 0; i < len(whole); i += 1 + len(whole)/200 {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x20
		if _, err := CheckBackup(bytes.NewReader(bad)); err == nil {
			t.Fatalf("a backup damaged at byte %d of %d was accepted", i, len(whole))
		}
		if _, err := CheckBackup(bytes.NewReader(whole[:i])); err == nil {
			t.Fatalf("a backup cut at byte %d was accepted", i)
		}
	}
	for i := range 3 {
		tr.stop(i)
	}
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, p := range tr.peers {
		cfg := Config{ID: p.ID, Cluster: "test", Dir: tr.dirs[i], Peers: tr.peers, Log: quiet()}
		if _, err := Restore(cfg, file); !errors.Is(err, status.Exists) {
			t.Fatalf("a restore over data: %v", err)
		}
		if err := os.RemoveAll(tr.dirs[i]); err != nil {
			t.Fatal(err)
		}
		cfg.Cluster = "theirs"
		if _, err := Restore(cfg, file); !errors.Is(err, status.Conflict) {
			t.Fatalf("a restore into another cluster: %v", err)
		}
		cfg.Cluster = "test"
		if _, err := Restore(cfg, file); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		tr.start(i)
	}
	vs := volumes(t, ctx, c)
	if len(vs) != 1 || vs[0].Name != "old" || vs[0].HolderHost != "" || vs[0].Epoch <= old.Epoch+1000 {
		t.Fatalf("restored %v", vs)
	}
	if _, err := doFor(c, patience, attach("old", "host-1", "gw-2")); !errors.Is(err, status.Held) || !strings.Contains(err.Error(), "volume trust") {
		t.Fatalf("a restored volume was opened: %v", err)
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_TrustVolume{TrustVolume: &pb.TrustVolume{Volume: "old"}}})
	if _, err := doFor(c, patience, attach("old", "host-1", "gw-2")); err != nil {
		t.Fatal(err)
	}
	fresh := must(t, ctx, c, create("fresh")).Volume
	must(t, ctx, c, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "fresh"}}})
	rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: &pb.GoneVolumes{VolumeIds: []uint64{since.Id, fresh.Id}}}})
	if err != nil || len(rep.Gone) != 1 || rep.Gone[0] != fresh.Id || fresh.Id <= since.Id {
		t.Fatalf("gone: %v of %d (forgotten by the backup) and %d (removed since): %v", rep.GetGone(), since.Id, fresh.Id, err)
	}
	tr.agree()
}
