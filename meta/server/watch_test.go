package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

func changeOf(id uint64) *pb.Change { return &pb.Change{What: &pb.Change_Volume{Volume: id}} }

// A watcher gets every change after its revision once and in order, or is told
// that it missed some.
func TestNewsAreWholeOrSaidNotToBe(t *testing.T) {
	var n news
	n.begin(10)
	if rep, _ := n.since(9); !rep.Resync || rep.Revision != 10 {
		t.Fatalf("from before the beginning: %v", rep)
	}
	_, wake := n.since(10)
	n.add(11, []*pb.Change{changeOf(1), changeOf(2)})
	<-wake
	n.add(12, nil)
	if rep, _ := n.since(10); rep.Resync || len(rep.Changes) != 2 || rep.Revision != 12 {
		t.Fatalf("two changes: %v", rep)
	}
	if rep, _ := n.since(11); rep.Resync || len(rep.Changes) != 0 || rep.Revision != 12 {
		t.Fatalf("no change: %v", rep)
	}
	rev := uint64(12)
	for range newsKept { // three to a revision: the ring overflows in the middle of one
		rev++
		n.add(rev, []*pb.Change{changeOf(rev), changeOf(rev), changeOf(rev)})
	}
	if rep, _ := n.since(12); !rep.Resync {
		t.Fatal("what was overwritten was not said to be missed")
	}
	oldest := n.from
	seen := map[uint64]int{}
	for at := oldest; at < rev; {
		rep, _ := n.since(at)
		if rep.Resync || rep.Revision <= at || len(rep.Changes) > newsBatch+2 {
			t.Fatalf("at %d: %d changes up to %d, resync %v", at, len(rep.Changes), rep.Revision, rep.Resync)
		}
		for _, c := range rep.Changes {
			seen[c.GetVolume()]++
		}
		at = rep.Revision
	}
	for r := oldest + 1; r <= rev; r++ {
		if seen[r] != 3 {
			t.Fatalf("revision %d: %d of 3 changes", r, seen[r])
		}
	}
}

// Telling a change does not copy what was told before: that was a quarter of a MiB for
// each batch of commands, on each node.
func TestNewsAreAddedInPlace(t *testing.T) {
	var n news
	rev, one := uint64(0), []*pb.Change{changeOf(1)}
	add := func() { rev++; n.add(rev, one) }
	for range 3 * newsKept {
		add()
	}
	if a := testing.AllocsPerRun(newsKept, add); a >= 1 {
		t.Errorf("%v allocations for each change", a)
	}
}

// A watcher that follows the cluster hears of every event although the nodes it
// listens to are stopped under it, one after the other.
func TestWatchGoesOnOverNodes(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	until(t, func() string { // by the leader itself, and an event of its own
		if n := tr.nodes[tr.leader()].node(); n.FormatInUse != state.Format {
			return fmt.Sprintf("state version %d is in use", n.FormatInUse)
		}
		return ""
	})
	var mu sync.Mutex
	var heard []uint64
	var before atomic.Uint64
	before.Store(^uint64(0) >> 1)
	resyncs, gone := 0, 0
	wctx, stop := context.WithCancel(ctx)
	started := make(chan struct{})
	ended := make(chan error, 1)
	wc := client.New(client.Config{Addrs: tr.addrs()})
	go func() {
		ended <- wc.Watch(wctx, 0, func(rep *pb.WatchReply) error {
			mu.Lock()
			defer mu.Unlock()
			if rep.Resync {
				if resyncs++; resyncs == 1 {
					close(started)
				}
			}
			for _, x := range rep.Changes {
				if e := x.GetEvent(); e > before.Load() { // the node may have lagged when it began
					heard = append(heard, e)
				}
				if x.Gone && x.GetVolume() > 0 {
					gone++
				}
			}
			return nil
		})
	}()
	<-started
	rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Events{Events: &pb.Events{}}})
	if err != nil {
		t.Fatal(err)
	}
	first := rep.Events[len(rep.Events)-1].Seq + 1
	before.Store(first - 1)
	const n = 20
	for round := range 3 {
		for i := range n {
			must(t, ctx, c, create(fmt.Sprintf("r%d-%d", round, i)))
		}
		must(t, ctx, c, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: fmt.Sprintf("r%d-0", round)}}})
		tr.stop(round)
		must(t, ctx, c, create(fmt.Sprintf("r%d-down", round)))
		tr.start(round)
	}
	want := 3 * (n + 2)
	until(t, func() string {
		mu.Lock()
		defer mu.Unlock()
		if len(heard) < want {
			return fmt.Sprintf("heard of %d events of %d (%d resyncs)", len(heard), want, resyncs)
		}
		return ""
	})
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("the watch ended with %v", err)
	}
	if err := wc.Close(); err != nil {
		t.Error(err)
	}
	if !slices.IsSorted(heard) || heard[0] != first || heard[len(heard)-1] != first+uint64(want)-1 || len(heard) != want {
		t.Fatalf("events %v, want %d from %d on, in order", heard, want, first)
	}
	if gone != 3 {
		t.Errorf("heard of %d removals of 3", gone)
	}
	if resyncs != 1 {
		t.Logf("%d resyncs", resyncs)
	}
}
