package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/proto/pb"
)

// usedHost is a host with a store of 100 bytes.
func usedHost(name string, up bool, used uint64, rate float64) *pb.HostState {
	seen := int64(0)
	if !up {
		seen = silentFor.Milliseconds()
	}
	return &pb.HostState{Host: &pb.Host{Name: name}, Up: up, LastSeenMs: seen, Stores: []*pb.StoreState{{Store: &pb.Store{CapacityBytes: 100}, Up: up,
		Usage: &pb.StoreUsage{UsedBytes: used}, FillBytesPerSecond: rate, WatchedMs: 600_000}}}
}

// Each change is told once, also by a leader that has only read what the one
// before it told; a value at the edge of a threshold is not told again and again.
func TestNewsAreToldOnce(t *testing.T) {
	w := &warned{silent: map[string]int64{}}
	var log []string
	for _, step := range []struct {
		up   bool
		used uint64
		rate float64
		want []string // the beginnings
	}{
		{true, 74, 0, nil},
		{true, 75, 0.01, []string{"the pool is past 75 %: 75 % of it is used, and at the rate of the last half hour it is full in 42m0s"}},
		{true, 74, 0, nil},
		{true, 76, 0, nil},
		{true, 96, 0, []string{"the pool is past 95 %: 96 % of it is used, and it does not fill now"}},
		{false, 96, 0, []string{"host h does not answer: "}},
		{false, 96, 0, nil},
		{true, 90, 0, []string{"host h answers again", "the pool is below 95 % again"}},
		{true, 72, 0, []string{"the pool is below 75 % again: 72 % of it is used"}},
		{true, 85, 0, []string{"the pool is past 85 %"}},
		{true, 80, 0, []string{"the pool is below 85 % again"}},
		{true, 80, 0, nil},
	} {
		next := &warned{silent: map[string]int64{}} // another leader
		for _, what := range log {
			next.hear(what, 1)
		}
		hosts := []*pb.HostState{usedHost("h", step.up, step.used, step.rate)}
		got := w.news(hosts)
		if other := next.news(hosts); !slices.Equal(got, other) {
			t.Errorf("at %d %%: the leader tells %q, a new one %q", step.used, got, other)
		}
		same := len(got) == len(step.want)
		for i := range step.want {
			same = same && strings.HasPrefix(got[i], step.want[i])
		}
		if !same {
			t.Errorf("at %d %%, up %v: told %q, want %q", step.used, step.up, got, step.want)
		}
		for _, what := range got {
			w.hear(what, 1)
		}
		log = append(log, got...)
	}
}

// A new leader that has not heard of every host takes none for empty, and none for
// one that answers again.
func TestNoNewsOfAPoolThatIsNotKnown(t *testing.T) {
	w := &warned{silent: map[string]int64{}, step: 95}
	heard, not := usedHost("h", true, 96, 0), usedHost("i", true, 96, 0)
	not.LastSeenMs, not.Stores[0].Usage = -1, nil
	w.silent["i"] = 1
	if got := w.news([]*pb.HostState{not, heard}); len(got) > 0 {
		t.Errorf("told %q", got)
	}
	delete(w.silent, "i")
	not.Up = false
	if got := w.news([]*pb.HostState{not, heard}); len(got) != 1 || !strings.HasPrefix(got[0], "host i does not answer") {
		t.Errorf("told %q", got)
	}
}

// The thresholds of the pool come into the event log of a real cluster, once,
// whoever leads; who asks for the hosts hears since when.
func TestPoolThresholdsAreEvents(t *testing.T) {
	t.Parallel()
	tr := newTrio(t, nil)
	ctx, c := tr.ctx(), tr.client()
	hostUp(t, ctx, c, 1)
	told := func() (out []string) {
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Events{Events: &pb.Events{}}})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range rep.Events {
			if strings.HasPrefix(e.What, "the pool") {
				out = append(out, e.Who+": "+e.What)
			}
		}
		return out
	}
	beat := func(percent uint64) {
		_, err := c.Renew(ctx, &pb.RenewRequest{Host: "host-1", Session: "gw-1",
			Usage: []*pb.StoreUsage{{Store: storeID(1), CapacityBytes: 1 << 40, UsedBytes: percent*(1<<40)/100 + 1<<20, State: "ok"}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, percent := range []uint64{75, 85, 95} {
		until(t, func() string {
			beat(percent)
			if got := told(); len(got) <= i || !strings.HasPrefix(got[i], fmt.Sprintf("the metadata leader: the pool is past %d %%", percent)) {
				return fmt.Sprintf("at %d %% of the pool the event log has %q", percent, got)
			}
			return ""
		})
		if i == 1 { // who comes next has only the log
			tr.stop(tr.leader())
		}
	}
	until(t, func() string {
		rep, err := c.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}})
		if err != nil {
			t.Fatal(err)
		}
		if m := rep.PoolMark; m.GetPercent() != 95 || m.UnixNs == 0 {
			return fmt.Sprintf("the pool's mark is %v", m)
		}
		return ""
	})
	if got := told(); len(got) != 3 {
		t.Errorf("the event log has %q", got)
	}
}

// A leader says since when a node is silent only if it can know: its own peers'
// last answers, and the last word of the leader before; what a peer told an
// earlier tenure says nothing.
func TestSinceWhenANodeIsSilent(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	r := &reach{heard: map[raft.ServerID]time.Time{"asked": at(20), "before": at(3), "long ago": at(3)}}
	r.follows("long ago", "me")
	r.follows("before", "me")
	r.follows("", "me")
	r.follows("me", "me")
	for id, want := range map[raft.ServerID]time.Time{"asked": at(20), "before": at(9), "long ago": {}, "never": {}} {
		if got := r.last(id, at(10), at(9)); !got.Equal(want) {
			t.Errorf("%s was heard of at %v, want %v", id, got, want)
		}
	}
}
