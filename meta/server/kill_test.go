package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// childNode is one node in a process of its own, which ends when it is killed,
// or with its parent.
func childNode(conf string) {
	fail := func(err error) {
		fmt.Println(err)
		os.Exit(2)
	}
	cfg := Config{Placer: firstStores{}, Timeout: 250 * time.Millisecond, Log: quiet(), snapEvery: 200, Fatal: fail}
	if err := json.Unmarshal([]byte(conf), &cfg); err != nil {
		fail(err)
	}
	var err error
	for _, p := range cfg.Peers {
		if p.ID == cfg.ID {
			if cfg.RaftListener, err = net.Listen("tcp", p.RaftAddr); err != nil {
				fail(err)
			}
			if cfg.APIListener, err = net.Listen("tcp", p.APIAddr); err != nil {
				fail(err)
			}
		}
	}
	if _, err := New(cfg); err != nil {
		fail(err)
	}
	fmt.Println("runs")
	select {}
}

// killable is a cluster of three processes.
type killable struct {
	t     *testing.T
	peers []Peer
	dirs  []string
	procs []*exec.Cmd // nil: dead
}

// prepare is called for each node's directory before it runs.
func newKillable(t *testing.T, prepare ...func(dir string)) *killable {
	k := &killable{t: t, procs: make([]*exec.Cmd, 3)}
	for i := range 3 {
		a, b := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
		k.peers = append(k.peers, Peer{ID: fmt.Sprintf("meta-%d", i+1), RaftAddr: a.Addr().String(), APIAddr: b.Addr().String()})
		dir := t.TempDir()
		for _, fn := range prepare {
			fn(dir)
		}
		k.dirs = append(k.dirs, filepath.Join(dir, "meta"))
		if err := errors.Join(a.Close(), b.Close()); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for i := range k.procs {
			k.kill(i)
		}
	})
	for i := range k.procs {
		k.start(i)
	}
	return k
}

func (k *killable) start(i int) {
	k.t.Helper()
	if line := k.tryStart(i); line != "runs\n" {
		k.t.Fatalf("%s: %q", k.peers[i].ID, line)
	}
}

// tryStart starts a node and returns the first line it prints: "runs", or why not.
func (k *killable) tryStart(i int) string {
	k.t.Helper()
	conf, err := json.Marshal(map[string]any{"ID": k.peers[i].ID, "Dir": k.dirs[i], "Peers": k.peers})
	if err != nil {
		k.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CAIRN_TEST_NODE="+string(conf))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		k.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	k.procs[i] = cmd
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		k.t.Errorf("%s: %v", k.peers[i].ID, err)
	}
	return line
}

// ended reports whether a node's process has ended by itself.
func (k *killable) ended(i int) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, k.procs[i].Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err != nil || info.Signo != 0
}

func (k *killable) kill(i int) {
	k.t.Helper()
	if p := k.procs[i]; p != nil {
		k.procs[i] = nil
		if err := p.Process.Kill(); err != nil {
			k.t.Errorf("killing %s: %v", k.peers[i].ID, err)
		}
		if err := p.Wait(); err == nil {
			k.t.Errorf("%s ended by itself", k.peers[i].ID)
		}
	}
}

// writer creates volumes and attaches one of its own again and again; it keeps
// what it was told.
type writer struct {
	name    string
	created []string
	epoch   uint32
}

func (w *writer) run(ctx context.Context, c *client.Client, stop *atomic.Bool) error {
	own := w.name + "-own"
	if _, err := c.Do(ctx, create(own)); err != nil {
		return fmt.Errorf("creating %s: %w", own, err)
	}
	for n := 0; !stop.Load(); n++ {
		name := fmt.Sprintf("%s-%d", w.name, n)
		if _, err := c.Do(ctx, create(name)); err != nil {
			return fmt.Errorf("creating %s: %w", name, err) // "exists" is a command done twice
		}
		w.created = append(w.created, name)
		res, err := c.Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: own, Host: "host-1", Session: w.name}}})
		if err != nil {
			return fmt.Errorf("attaching %s: %w", own, err)
		}
		if w.epoch++; res.Volume.Epoch != w.epoch {
			return fmt.Errorf("attach number %d of %s gave epoch %d: a command was lost or done twice", w.epoch, own, res.Volume.Epoch)
		}
	}
	return nil
}

const kills = 4

// Leaders and followers are killed with -9 in the middle of commands of several
// clients. Every command is done once: not twice, and none that was answered is
// lost.
func TestKilledLeadersLoseAndDoubleNothing(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	k := newKillable(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	var addrs []string
	for _, p := range k.peers {
		addrs = append(addrs, p.APIAddr)
	}
	c := client.New(client.Config{Addrs: addrs, Who: "test"})
	hostUp(t, ctx, c, 1)

	var stop atomic.Bool
	var wg sync.WaitGroup
	writers := make([]*writer, 4)
	errs := make(chan error, len(writers))
	for i := range writers {
		w := &writer{name: fmt.Sprintf("w%d", i)}
		writers[i] = w
		cl := c
		if i > 0 { // three share nothing, one shares the test's
			cl = client.New(client.Config{Addrs: addrs, Who: w.name})
			defer func() {
				if err := cl.Close(); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Go(func() {
			if err := w.run(ctx, cl, &stop); err != nil {
				errs <- err
			}
		})
	}
	for range kills {
		victim := rng.IntN(3)
		if rng.IntN(4) > 0 { // mostly the leader
			until(t, func() string {
				for i, n := range c.Nodes(ctx) {
					if n.Leader {
						victim = i
						return ""
					}
				}
				return "no leader"
			})
		}
		k.kill(victim)
		progress(t, ctx, c) // the other two go on
		k.start(victim)
	}
	stop.Store(true)
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}

	have := map[string]uint32{}
	for _, v := range volumes(t, ctx, c) {
		have[v.Name] = v.Epoch
	}
	done := 0
	for _, w := range writers {
		for _, name := range w.created {
			if _, ok := have[name]; !ok {
				t.Errorf("volume %s was created and is not there", name)
			}
			delete(have, name)
		}
		if e := have[w.name+"-own"]; e != w.epoch {
			t.Errorf("%s is at epoch %d after %d attaches", w.name, e, w.epoch)
		}
		delete(have, w.name+"-own")
		done += 2 * len(w.created)
	}
	for name := range have {
		if name[0] == 'w' {
			t.Errorf("volume %s is there and nobody was told", name)
		}
	}
	agree(t, ctx, c)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d commands over %d kills", done, kills)
}

// agree waits until every node has come to the same state.
func agree(t *testing.T, ctx context.Context, c *client.Client) {
	t.Helper()
	until(t, func() string {
		nodes := c.Nodes(ctx)
		for _, n := range nodes {
			if n.Applied != nodes[0].Applied || n.StateHash != nodes[0].StateHash || n.Applied == 0 {
				return fmt.Sprintf("states differ: %v", nodes)
			}
		}
		return ""
	})
}

// progress returns once some commands have been answered from now on.
func progress(t *testing.T, ctx context.Context, c *client.Client) {
	t.Helper()
	name := fmt.Sprintf("p%d", time.Now().UnixNano())
	must(t, ctx, c, create(name))
	for range 20 {
		must(t, ctx, c, &pb.Command{Op: &pb.Command_RenameVolume{RenameVolume: &pb.RenameVolume{Volume: name, Name: name}}})
	}
}

// What the client says when nobody answers, and that it can be told apart.
func TestClientSaysWhyThereIsNoAnswer(t *testing.T) {
	dead := listen(t, "127.0.0.1:0")
	addr := dead.Addr().String()
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	c := client.New(client.Config{Addrs: []string{addr}})
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if _, err := c.Query(context.Background(), &pb.QueryRequest{}); !errors.Is(err, status.Shutdown) {
			t.Errorf("a closed client: %v", err)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	for what, err := range map[string]error{
		"query": func() error { _, err := c.Query(ctx, &pb.QueryRequest{}); return err }(),
		"do":    func() error { _, err := c.Do(ctx, create("v")); return err }(),
	} {
		want := "no metadata node of " + addr + " answers: is the cluster up?"
		if err == nil || err.Error() != want || !errors.Is(err, status.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v (%v)", what, err, status.Of(err))
		}
	}
	if n := c.Nodes(ctx); len(n) != 1 || n[0].State != "unreachable" || n[0].Addr != addr {
		t.Errorf("nodes: %v", n)
	}
	if _, err := client.New(client.Config{}).Query(ctx, &pb.QueryRequest{}); !errors.Is(err, status.Invalid) {
		t.Errorf("a client without addresses: %v", err)
	}
}
