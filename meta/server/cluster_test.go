package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// patience bounds every wait of these tests; nothing passes because it is over.
const patience = 40 * time.Second

// firstStores places every chunk on the first stores that are up: what
// placement does is tested there.
type firstStores struct{}

func (firstStores) PlaceChunks(req ChunkRequest) ([][]ids.StoreID, error) {
	var up []ids.StoreID
	for _, s := range req.Stores {
		if s.Up && len(up) < req.Replicas {
			up = append(up, s.ID)
		}
	}
	if len(up) < req.Replicas {
		return nil, status.Errorf(status.NoSpace, "%d stores are up and %d are needed", len(up), req.Replicas)
	}
	out := make([][]ids.StoreID, req.Count)
	for i := range out {
		out[i] = up
	}
	return out, nil
}

func (firstStores) PlaceVM(p *Picture, vm string) (string, string, error) {
	local := map[string]uint64{}
	for _, v := range p.VMs {
		if v.Name == vm {
			for _, c := range p.Chunks(v) {
				for _, h := range c.Hosts {
					local[h] += c.Bytes
				}
			}
		}
	}
	best := ""
	for _, h := range p.Hosts {
		if h.Up && (best == "" || local[h.Name] > local[best]) {
			best = h.Name
		}
	}
	return best, fmt.Sprintf("%d bytes there", local[best]), nil
}

// Turn binds every VM that waits to the first host that is up.
func (firstStores) Turn(p *Picture) (out []*pb.BindVM) {
	for _, vm := range p.VMs {
		if vm.GetQueue().GetStep() == state.StepQueued {
			out = append(out, &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: p.Hosts[0].Name, Desired: "running", Queue: &pb.VMQueue{Step: state.StepStarting}})
		}
	}
	return out
}

func (firstStores) Answer(*Picture, *pb.PlaceQuestion) (*pb.PlaceAnswer, error) {
	return &pb.PlaceAnswer{Text: "first"}, nil
}

func (firstStores) Leave(*Picture, []*pb.VM, int) []*pb.BindVM { return nil }
func (firstStores) CheckPolicy(p *pb.Placement) error {
	if p.GetPolicy() == "nonsense" {
		return status.Errorf(status.Invalid, "there is no such policy")
	}
	return nil
}

// trio is a metadata cluster of three nodes in this process, on real TCP.
type trio struct {
	t     *testing.T
	peers []Peer
	nodes []*Server // nil: stopped
	dirs  []string
	set   func(i int, c *Config)
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func quiet() *slog.Logger {
	var out io.Writer = io.Discard
	if os.Getenv("CAIRN_TEST_LOG") != "" {
		out = os.Stderr
	}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// newTrio starts three nodes. set may change each one's configuration.
func newTrio(t *testing.T, set func(i int, c *Config)) *trio {
	t.Helper()
	tr := &trio{t: t, nodes: make([]*Server, 3), set: set}
	var ls []net.Listener
	for i := range 3 {
		raftL, apiL := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
		ls = append(ls, raftL, apiL)
		tr.peers = append(tr.peers, Peer{ID: fmt.Sprintf("meta-%d", i+1), RaftAddr: raftL.Addr().String(), APIAddr: apiL.Addr().String()})
		tr.dirs = append(tr.dirs, filepath.Join(t.TempDir(), "meta"))
	}
	t.Cleanup(func() {
		for i := range tr.nodes {
			tr.stop(i)
		}
	})
	for i := range tr.nodes {
		tr.run(i, ls[2*i], ls[2*i+1])
	}
	return tr
}

func (tr *trio) config(i int, raftL, apiL net.Listener) Config {
	c := Config{ID: tr.peers[i].ID, Cluster: "test", Dir: tr.dirs[i], RaftListener: raftL, APIListener: apiL,
		Peers: tr.peers, Placer: firstStores{}, Timeout: 250 * time.Millisecond, Log: quiet()}
	if tr.set != nil {
		tr.set(i, &c)
	}
	return c
}

func (tr *trio) run(i int, raftL, apiL net.Listener) {
	tr.t.Helper()
	s, err := New(tr.config(i, raftL, apiL))
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.nodes[i] = s
}

// start runs a stopped node again, at its old addresses.
func (tr *trio) start(i int) {
	tr.t.Helper()
	p := tr.peers[i]
	tr.run(i, listen(tr.t, p.RaftAddr), listen(tr.t, p.APIAddr))
}

func (tr *trio) stop(i int) {
	tr.t.Helper()
	if s := tr.nodes[i]; s != nil {
		tr.nodes[i] = nil
		if err := s.Close(); err != nil {
			tr.t.Errorf("closing %s: %v", tr.peers[i].ID, err)
		}
	}
}

func (tr *trio) addrs() (out []string) {
	for _, p := range tr.peers {
		out = append(out, p.APIAddr)
	}
	return out
}

func (tr *trio) client() *client.Client {
	c := client.New(client.Config{Addrs: tr.addrs(), Who: tr.t.Name()})
	tr.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			tr.t.Error(err)
		}
	})
	return c
}

func (tr *trio) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	tr.t.Cleanup(cancel)
	return ctx
}

// until asks again and again, and fails with what was last wrong. It counts
// ticks, not time: a process that is stopped for a while misses them, and so does
// what it waits for.
func until(t *testing.T, what func() string) {
	t.Helper()
	const step = 10 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	wrong := ""
	for range patience / step {
		if wrong = what(); wrong == "" {
			return
		}
		<-tick.C
	}
	t.Fatal(wrong)
}

// leader waits for a leader and returns its number.
func (tr *trio) leader() (at int) {
	tr.t.Helper()
	until(tr.t, func() string {
		for i, s := range tr.nodes {
			if s != nil && s.node().Leader {
				at = i
				return ""
			}
		}
		return "no leader"
	})
	return at
}

// agree waits until all running nodes have the same state.
func (tr *trio) agree() {
	tr.t.Helper()
	until(tr.t, func() string {
		var seen []string
		for _, s := range tr.nodes {
			if s != nil {
				applied, hash := s.fsm.at()
				seen = append(seen, fmt.Sprintf("%d:%x", applied, hash))
			}
		}
		for _, x := range seen {
			if x != seen[0] {
				return "the nodes' states differ: " + strings.Join(seen, " ")
			}
		}
		return ""
	})
}

// ---- commands

func create(name string) *pb.Command {
	return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: 1 << 30}}}
}

func storeID(i int) []byte { return append(make([]byte, 15), byte(i)) }

// hostUp registers host-i with a store and sends a heartbeat.
func hostUp(t *testing.T, ctx context.Context, c *client.Client, i int) {
	t.Helper()
	h := fmt.Sprintf("host-%d", i)
	must(t, ctx, c, &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: h, DataAddr: h + ":1", Cpus: 4, MemoryBytes: 8 << 30}}}})
	must(t, ctx, c, &pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(i), Incarnation: 1, Host: h, CapacityBytes: 1 << 40}}}})
	beatHost(t, ctx, c, i)
}

func beatHost(t *testing.T, ctx context.Context, c *client.Client, i int) {
	t.Helper()
	_, err := c.Renew(ctx, &pb.RenewRequest{Host: fmt.Sprintf("host-%d", i), Session: fmt.Sprintf("gw-%d", i),
		Usage: []*pb.StoreUsage{{Store: storeID(i), CapacityBytes: 1 << 40, State: "ok"}}})
	if err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, ctx context.Context, c *client.Client, cmd *pb.Command) *pb.Result {
	t.Helper()
	res, err := c.Do(ctx, cmd)
	if err != nil {
		t.Fatalf("%v: %v", cmd.Op, err)
	}
	return res
}

func volumes(t *testing.T, ctx context.Context, c *client.Client) []*pb.Volume {
	t.Helper()
	rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		t.Fatal(err)
	}
	return rep.Volumes
}

// ---- tests

func TestThreeNodesElectServeAndAgree(t *testing.T) {
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	for i := 1; i <= 3; i++ {
		hostUp(t, ctx, c, i)
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_InitCluster{InitCluster: &pb.InitCluster{ClusterId: "here"}}})
	for i := range 20 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	if got := volumes(t, ctx, c); len(got) != 20 || got[0].Replicas != 3 {
		t.Fatalf("%d volumes, the first with %d replicas", len(got), got[0].GetReplicas())
	}
	v := must(t, ctx, c, &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: "v3", Host: "host-2", Session: "gw-2"}}}).Volume
	res := must(t, ctx, c, &pb.Command{Op: &pb.Command_Allocate{Allocate: &pb.Allocate{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Indices: []uint32{0, 5}, PreferHost: "host-2"}}})
	if len(res.Chunks) != 2 || len(res.Chunks[0].Stores) != 3 {
		t.Fatalf("allocated %v", res.Chunks)
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: "vm", Volume: "v3", Desired: "stopped"}}}})
	rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_PlaceVm{PlaceVm: &pb.PlaceVM{Vm: "vm"}}})
	if err != nil || !strings.HasPrefix(rep.PlaceReason, fmt.Sprint(2*ids.DefaultChunkBytes)) {
		t.Fatalf("placed at %q because %q: %v", rep.GetPlaceHost(), rep.GetPlaceReason(), err)
	}
	rep, err = c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Cluster{Cluster: true}})
	if err != nil || rep.ClusterId != "here" || len(rep.Nodes) != 3 {
		t.Fatalf("cluster %v: %v", rep, err)
	}
	rep, err = c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: &pb.GoneVolumes{VolumeIds: []uint64{v.Id, 1 << 40}}}})
	if err != nil || len(rep.Gone) != 0 {
		t.Fatalf("volumes taken for gone: %v: %v", rep.GetGone(), err)
	}
	must(t, ctx, c, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "v4"}}})
	rep, err = c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: &pb.GoneVolumes{VolumeIds: []uint64{v.Id, v.Id + 1}}}})
	if err != nil || len(rep.Gone) != 1 || rep.Gone[0] != v.Id+1 {
		t.Fatalf("gone: %v: %v", rep.GetGone(), err)
	}
	tr.agree()
	leaders := 0
	for _, n := range c.Nodes(ctx) {
		if n.Leader {
			leaders++
		}
		if n.State != "leader" && n.State != "follower" || n.LeaderAddr == "" {
			t.Errorf("node %v", n)
		}
	}
	if leaders != 1 {
		t.Fatalf("%d leaders", leaders)
	}
}

// Everything is there after all nodes were stopped, and a node alone answers
// nothing.
func TestRestartFromTheDirectories(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	for i := range 10 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	tr.agree()
	_, hash := tr.nodes[0].fsm.at()
	for i := range 3 {
		tr.stop(i)
	}
	tr.start(1)
	if _, err := tr.nodes[1].lead(); !errors.Is(err, status.Unavailable) {
		t.Fatalf("a node alone leads: %v", err)
	}
	if !tr.nodes[1].kept {
		t.Error("a state closed cleanly was not trusted")
	}
	tr.start(0)
	tr.start(2)
	if got := volumes(t, ctx, c); len(got) != 10 {
		t.Fatalf("%d volumes after the restart", len(got))
	}
	tr.agree()
	if _, now := tr.nodes[2].fsm.at(); now != hash {
		t.Errorf("state hash %x, before %x", now, hash)
	}
}

// A node that lost its directory gets everything from the others, by snapshot
// and log.
func TestWipedNodeIsSyncedBySnapshot(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, func(_ int, c *Config) { c.snapEvery, c.tick = 20, 20*time.Millisecond })
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	lost := (tr.leader() + 1) % 3
	tr.stop(lost)
	if err := os.RemoveAll(tr.dirs[lost]); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		must(t, ctx, c, create(fmt.Sprintf("v%d", i)))
	}
	until(t, func() string { // the log before the snapshot is gone, so that only a snapshot helps
		if first, err := tr.nodes[tr.leader()].bolt.FirstIndex(); err != nil || first < 20 {
			return fmt.Sprintf("the log begins at %d: %v", first, err)
		}
		return ""
	})
	tr.start(lost)
	tr.agree()
	until(t, func() string {
		if tr.nodes[lost].node().State != "follower" {
			return "the wiped node does not follow"
		}
		return ""
	})
	until(t, func() string { // and it may vote again
		b, err := os.ReadFile(filepath.Join(tr.dirs[lost], "node.json"))
		if err != nil || strings.Contains(string(b), "need_index") {
			return fmt.Sprintf("after catching up its record is %s: %v", b, err)
		}
		return ""
	})
	other := (lost + 1) % 3 // now a majority with the wiped node must do
	tr.stop(other)
	must(t, ctx, c, create("after"))
	var n int
	if err := tr.nodes[lost].fsm.read(func(kv state.KV) { n = len(state.Volumes(kv)) }); err != nil || n < 100 {
		t.Fatalf("%d volumes on the wiped node: %v", n, err)
	}
}

// Whoever waits for a command is answered when the node closes: raft itself
// forgets what its state machine has not come to.
func TestClosingAnswersWhoeverWaits(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	leader := tr.nodes[tr.leader()]
	b, err := proto.Marshal(&pb.Command{Op: &pb.Command_Housekeeping{Housekeeping: &pb.Housekeeping{}}})
	if err != nil {
		t.Fatal(err)
	}
	leader.fsm.mu.Lock() // a state machine that hangs
	const waiting = 30
	answered := make(chan error, waiting)
	for i := range waiting {
		before := leader.raft.Load().LastIndex()
		go func() {
			_, err := leader.commit(b)
			answered <- err
		}()
		until(t, func() string { // one batch each
			if leader.raft.Load().LastIndex() == before {
				return fmt.Sprintf("command %d is not in the log", i)
			}
			return ""
		})
	}
	closed := make(chan error, 1)
	go func() { closed <- leader.Close() }()
	<-leader.done
	for range waiting {
		select {
		case err := <-answered:
			if err == nil {
				t.Error("a command was done that the state machine never saw")
			}
		case <-time.After(patience):
			leader.fsm.mu.Unlock()
			t.Fatal("a command that waited when the node closed was never answered")
		}
	}
	leader.fsm.mu.Unlock()
	if err := <-closed; err != nil {
		t.Error(err)
	}
}
