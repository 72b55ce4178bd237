package client

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// node is a metadata node without raft: the real state machine behind a real
// connection, and a script of what goes wrong on the way.
type node struct {
	pb.UnimplementedMetaServer
	addr string

	mu    sync.Mutex // guards all below
	kv    *state.Mem
	wrong []wrong // taken by the next commands that are not OpenSession, in order
	seen  int     // commands that arrived
	late  []*pb.Command
}

// wrong is one thing that goes wrong.
type wrong func(n *node, cmd *pb.Command) (*pb.Result, error)

// refuse answers without doing anything.
func refuse(k status.Kind) wrong {
	return func(*node, *pb.Command) (*pb.Result, error) {
		return &pb.Result{Status: uint32(k), Detail: "refused", Refused: true}, nil
	}
}

// doneUnheard does the command and loses the answer.
func doneUnheard(n *node, cmd *pb.Command) (*pb.Result, error) {
	state.Apply(n.kv, cmd)
	return nil, errors.New("the line is cut")
}

// delayed keeps the command for later and says nothing.
func delayed(n *node, cmd *pb.Command) (*pb.Result, error) {
	n.late = append(n.late, cmd)
	return &pb.Result{Status: uint32(status.Unknown), Detail: "leadership lost"}, nil
}

// forget drops every session, as an hour would.
func forget(n *node, cmd *pb.Command) (*pb.Result, error) {
	old := &pb.Command{Session: "other", TimeUnixNs: 2 * state.SessionAgeNs, Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}}
	state.Apply(n.kv, old)
	return state.Apply(n.kv, cmd), nil
}

func (n *node) Do(_ context.Context, cmd *pb.Command) (*pb.Result, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen++
	if cmd.GetOpenSession() == nil && len(n.wrong) > 0 {
		w := n.wrong[0]
		n.wrong = n.wrong[1:]
		return w(n, cmd)
	}
	return state.Apply(n.kv, cmd), nil
}

// deliver lets every delayed command arrive.
func (n *node) deliver() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, cmd := range n.late {
		state.Apply(n.kv, cmd)
	}
	n.late = nil
}

func (n *node) vms() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(state.VMs(n.kv))
}

// commands is how many have arrived.
func (n *node) commands() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.seen
}

func serve(t *testing.T, m pb.MetaServer) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterMetaServer(s, m)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func newNode(t *testing.T, w ...wrong) (*node, *Client) {
	n := &node{kv: state.NewMem(), wrong: w}
	n.addr = serve(t, n)
	return n, dial(t, n.addr)
}

func dial(t *testing.T, addrs ...string) *Client {
	c := New(Config{Addrs: addrs, Who: "test"})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func vm(name string) *pb.Command {
	return &pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: name, Desired: "stopped"}}}}
}

// Whatever goes wrong on the way, a command takes effect once, and its outcome
// is told as it was.
func TestOutcomes(t *testing.T) {
	for _, x := range []struct {
		what  string
		wrong []wrong
		kind  status.Kind
		vms   int // after the command, and after every late copy
	}{
		{"nothing goes wrong", nil, status.OK, 1},
		{"done, but the answer is lost", []wrong{doneUnheard}, status.OK, 1},
		{"lost twice", []wrong{doneUnheard, doneUnheard}, status.OK, 1},
		{"not the leader", []wrong{refuse(status.Unavailable), refuse(status.Unavailable)}, status.OK, 1},
		{"refused", []wrong{refuse(status.NoSpace)}, status.NoSpace, 0},
		{"unknown, then refused: it may be on its way and must not arrive", []wrong{delayed, refuse(status.NoSpace)}, status.NoSpace, 0},
		{"unknown, then refused, and the settling is refused for a while", []wrong{delayed, refuse(status.NoSpace), refuse(status.NoSpace)}, status.NoSpace, 0},
		{"done unheard, then refused: it was done", []wrong{doneUnheard, refuse(status.NoSpace)}, status.OK, 1},
		{"unknown, then done", []wrong{delayed}, status.OK, 1},
		{"the session expired before", []wrong{forget}, status.OK, 1},
		{"done unheard, then the session expired: nobody can know", []wrong{doneUnheard, forget}, status.Unknown, 1},
	} {
		n, c := newNode(t, x.wrong...)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		_, err := c.Do(ctx, vm("a"))
		n.deliver()
		if status.Of(err) != x.kind || n.vms() != x.vms {
			t.Errorf("%s: %v (%v) and %d VMs, want %v and %d", x.what, err, status.Of(err), n.vms(), x.kind, x.vms)
		}
		// The next command of the same client is not mistaken for it.
		if _, err := c.Do(ctx, vm("b")); err != nil || n.vms() != x.vms+1 {
			t.Errorf("%s: then another command: %v and %d VMs", x.what, err, n.vms())
		}
		if _, err := c.Do(ctx, vm("b")); !errors.Is(err, status.Exists) {
			t.Errorf("%s: then one the state machine refuses: %v", x.what, err)
		}
		cancel()
	}
}

// After Open a command is sent and nothing before it.
func TestOpen(t *testing.T) {
	n, c := newNode(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := errors.Join(c.Open(ctx), c.Open(ctx)); err != nil || n.commands() != 1 {
		t.Fatalf("opened twice with %d commands: %v", n.commands(), err)
	}
	if _, err := c.Do(ctx, vm("a")); err != nil || n.commands() != 2 || n.vms() != 1 {
		t.Errorf("it and a command took %d: %v", n.commands(), err)
	}
}

// A caller that gives up is told that it does not know; and once the next
// command of the session has been answered, the old one has been done or never
// will be.
func TestCallerGivesUp(t *testing.T) {
	for _, x := range []struct {
		what string
		then wrong
		vms  int
	}{
		{"its command is on its way", delayed, 2},
		{"its command was done", doneUnheard, 3},
	} {
		n, c := newNode(t)
		ctx := context.Background()
		if _, err := c.Do(ctx, vm("first")); err != nil {
			t.Fatal(err)
		}
		gone, cancel := context.WithCancel(ctx)
		n.mu.Lock()
		n.wrong = []wrong{func(n *node, cmd *pb.Command) (*pb.Result, error) {
			cancel()
			return x.then(n, cmd)
		}}
		n.mu.Unlock()
		if _, err := c.Do(gone, vm("a")); !errors.Is(err, status.Unknown) || !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: given up: %v", x.what, err)
		}
		if _, err := c.Do(ctx, vm("b")); err != nil {
			t.Fatal(err)
		}
		n.deliver()
		if got := n.vms(); got != x.vms {
			t.Errorf("%s: %d VMs after the next command, want %d", x.what, got, x.vms)
		}
		c.mu.Lock()
		if len(c.free) != 1 {
			t.Errorf("%d sessions for one command at a time", len(c.free))
		}
		c.mu.Unlock()
	}
}

// follower answers nothing but where the leader is.
type follower struct {
	pb.UnimplementedMetaServer
	leader string
	mu     sync.Mutex
	asked  int
}

func (f *follower) Query(context.Context, *pb.QueryRequest) (*pb.QueryReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return &pb.QueryReply{Status: uint32(status.Unavailable), Detail: "not the leader", Leader: f.leader}, nil
}

type leader struct{ pb.UnimplementedMetaServer }

func (leader) Query(context.Context, *pb.QueryRequest) (*pb.QueryReply, error) {
	return &pb.QueryReply{ClusterId: "found"}, nil
}

// The client follows a hint even to an address it was not given, and then
// stays with the leader.
func TestHintIsFollowed(t *testing.T) {
	f := &follower{leader: serve(t, leader{})}
	c := dial(t, serve(t, f))
	for range 5 {
		rep, err := c.Query(context.Background(), &pb.QueryRequest{})
		if err != nil || rep.ClusterId != "found" {
			t.Fatalf("%v %v", rep, err)
		}
	}
	if f.asked != 1 {
		t.Errorf("the follower was asked %d times", f.asked)
	}
}

// At most maxSessions commands are in flight; the next waits and can give up.
func TestCommandsInFlightAreBounded(t *testing.T) {
	hold, arrived := make(chan struct{}), make(chan struct{}, maxSessions)
	h := &holder{hold: hold, arrived: arrived}
	c := dial(t, serve(t, h))
	var wg sync.WaitGroup
	for range maxSessions {
		wg.Go(func() {
			if _, err := c.Do(context.Background(), vm("a")); err != nil {
				t.Error(err)
			}
		})
	}
	for range maxSessions {
		<-arrived
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Do(ctx, vm("b")); !errors.Is(err, status.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one too many: %v", err)
	}
	close(hold)
	wg.Wait()
}

type holder struct {
	pb.UnimplementedMetaServer
	hold    chan struct{}
	arrived chan struct{}
}

func (h *holder) Do(_ context.Context, cmd *pb.Command) (*pb.Result, error) {
	if cmd.GetOpenSession() == nil {
		select {
		case h.arrived <- struct{}{}:
		default: // asked again
		}
		<-h.hold
	}
	return &pb.Result{}, nil
}
