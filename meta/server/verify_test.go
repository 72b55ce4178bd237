package server

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/proto/pb"
)

// waitLog is a log whose writes wait while held, and says that one does.
type waitLog struct {
	raft.LogStore
	held  *atomic.Pointer[chan struct{}] // nil: not held
	waits chan<- struct{}
}

func (w *waitLog) StoreLogs(logs []*raft.Log) error {
	if c := w.held.Load(); c != nil {
		select {
		case w.waits <- struct{}{}:
		default:
		}
		<-*c
	}
	return w.LogStore.StoreLogs(logs)
}

// While the disks of all nodes are busy with a command, a linearizable read is
// answered.
func TestAReadWaitsForNoDisk(t *testing.T) {
	t.Parallel()
	var held atomic.Pointer[chan struct{}]
	waits := make(chan struct{}, 1)
	tr := newTrio(t, func(_ int, c *Config) {
		c.logs = func(l raft.LogStore) raft.LogStore { return &waitLog{l, &held, waits} }
	})
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	free := make(chan struct{})
	held.Store(&free)
	told := make(chan error, 1)
	go func() {
		_, err := c.Do(ctx, create("v"))
		told <- err
	}()
	<-waits
	ask, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	rep, err := tr.client().Query(ask, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil || len(rep.Volumes) != 0 {
		t.Errorf("a read while every log waits for its disk: %v, %d volumes", err, len(rep.GetVolumes()))
	}
	held.Store(nil)
	close(free)
	if err := <-told; err != nil {
		t.Error(err)
	}
}

// Only the term that a majority of voters has now is confirmed; a node that
// does not run does not count, and one that knows a later term is not outvoted.
func TestATermStandsOnAMajority(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, func(_ int, c *Config) { c.Timeout = time.Second }) // nobody else is elected meanwhile
	hostUp(t, tr.ctx(), tr.client(), 1)
	tr.agree()
	at := tr.leader()
	s := tr.nodes[at]
	term := s.raft.Load().CurrentTerm()
	if !s.termStands(term) {
		t.Error("the term of all three does not stand")
	}
	for _, other := range []uint64{term - 1, term + 1} {
		if s.termStands(other) {
			t.Errorf("term %d stands and all three are in %d", other, term)
		}
	}
	// One of two is asked first; when that one is gone the other is, from then on.
	others := func() []raft.Server {
		out := slices.DeleteFunc(slices.Clone(voters(s.servers())), func(v raft.Server) bool { return string(v.ID) == s.id })
		s.lateness.order(out)
		return out
	}
	first := others()[0].ID
	gone := slices.IndexFunc(tr.nodes[:], func(n *Server) bool { return n.id == string(first) })
	tr.stop(gone)
	until(t, func() string { // the other may be late once
		if !s.termStands(term) {
			t.Error("the term of two of three does not stand")
		}
		if others()[1].ID != first {
			return fmt.Sprintf("%s is gone and still asked first", first)
		}
		return ""
	})
	tr.stop(3 - at - gone)
	if s.termStands(term) {
		t.Error("the term of one of three stands")
	}
}
