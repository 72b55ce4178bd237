package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
)

// wire is one direction of the network between two nodes: what one dials to
// reach the other. Cut, it takes connections and lets nothing through, as a
// network does that loses every packet.
type wire struct {
	t      *testing.T
	l      net.Listener
	target string
	broken atomic.Int64 // connections that did not end by themselves
	wg     sync.WaitGroup

	mu     sync.Mutex // guards all below
	conns  map[net.Conn]bool
	cut    bool
	closed bool
}

func newWire(t *testing.T, target string) *wire {
	w := &wire{t: t, l: listen(t, "127.0.0.1:0"), target: target, conns: map[net.Conn]bool{}}
	w.wg.Go(func() {
		for {
			c, err := w.l.Accept()
			if err != nil {
				return
			}
			if w.keep(c) {
				w.wg.Go(func() { w.carry(c) })
			}
		}
	})
	t.Cleanup(func() {
		w.mu.Lock()
		w.closed = true
		w.mu.Unlock()
		w.set(true)
		if err := w.l.Close(); err != nil {
			t.Error(err)
		}
		w.wg.Wait()
	})
	return w
}

func (w *wire) keep(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.cut {
		w.end(c)
		return false
	}
	w.conns[c] = true
	return true
}

// set cuts or mends; a cut ends what is under way.
func (w *wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
	if cut {
		for c := range w.conns {
			w.end(c) // and its carriers
		}
		clear(w.conns)
	}
}

func (w *wire) carry(in net.Conn) {
	out, err := net.Dial("tcp", w.target)
	if err != nil || !w.keep(out) {
		w.end(in)
		return
	}
	pass := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		w.end(to, from) // with or without err: the other end learns of it so
		if err != nil {
			w.broken.Add(1)
		}
	}
	w.wg.Go(func() { pass(out, in) })
	pass(in, out)
}

// end closes connections; one that is closed already is fine.
func (w *wire) end(conns ...net.Conn) {
	for _, c := range conns {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			w.t.Error(err)
		}
	}
}

// wired is a trio in which each direction of raft's traffic between two nodes is
// a wire of its own.
func wired(t *testing.T, set func(i int, c *Config)) (*trio, map[[2]int]*wire) {
	wires := map[[2]int]*wire{}
	var once sync.Once
	tr := newTrio(t, func(i int, c *Config) {
		once.Do(func() {
			for a := range 3 {
				for b := range 3 {
					if a != b {
						wires[[2]int{a, b}] = newWire(t, c.Peers[b].RaftAddr)
					}
				}
			}
		})
		peers := append([]Peer(nil), c.Peers...)
		for j := range peers {
			if j != i {
				peers[j].RaftAddr = wires[[2]int{i, j}].l.Addr().String()
			}
		}
		c.Peers = peers
		if set != nil {
			set(i, c)
		}
	})
	return tr, wires
}

// The leader is cut off, from both sides or one, while clients go on. The one
// that was cut off answers no read and renews no lease once another leads, and
// at the end all have one history: the case of raft's issue 695, which only a
// real network shows.
func TestCutOffLeaderAnswersNothing(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	tr, wires := wired(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)

	var stop atomic.Bool
	var wg sync.WaitGroup
	errs := make(chan error, 2)
	for i := range 2 {
		wg.Go(func() {
			if err := (&writer{name: fmt.Sprintf("w%d", i)}).run(ctx, c, &stop); err != nil {
				errs <- err
			}
		})
	}
	for round := range 5 {
		cut := tr.leader()
		both := rng.IntN(3) > 0
		for pair, w := range wires {
			if pair[0] == cut || both && pair[1] == cut {
				w.set(true)
			}
		}
		// The others elect one, and its first commit makes the old state stale.
		name := fmt.Sprintf("round-%d", round)
		must(t, ctx, c, create(name))
		old := client.New(client.Config{Addrs: []string{tr.peers[cut].APIAddr}})
		ask, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		rep, err := old.Query(ask, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
		if err == nil && !slices.ContainsFunc(rep.Volumes, func(v *pb.Volume) bool { return v.Name == name }) {
			t.Errorf("round %d: the node that was cut off answered without what was committed", round)
		}
		cancel()
		for _, w := range wires {
			w.set(false)
		}
		if err := old.Close(); err != nil {
			t.Error(err)
		}
		progress(t, ctx, c)
	}
	stop.Store(true)
	wg.Wait()
	broken := int64(0)
	for _, w := range wires {
		broken += w.broken.Load()
	}
	if broken == 0 {
		t.Error("no connection was ever cut")
	}
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	tr.agree()
}
