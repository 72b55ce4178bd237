package cluster

import (
	"context"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/chaos/fault"
)

// storm is what TestChaos does to the cluster. The gateway's host is a host
// like the others. Two hosts may be down at once, and so may metadata's
// majority for a moment: the client then waits, and sees no error.
const storm = `
keep 1 host
keep 2 meta
every 3s..7s    kill host
every 6s..11s   kill meta leader
every 9s..15s   pause host 200ms..2s
every 13s..20s  hold host 2s..5s
every 15s..25s  pause meta leader 1s..3s
every 17s..30s  kill meta
`

// smallStore fills several times in a minute: space is won back all the while.
const smallStore = "512M"

// fromEnv reads a number from the environment.
func fromEnv(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestChaos is verified random I/O while host processes, the gateway's own
// among them, and metadata leaders are killed, held down and paused at random:
// no wrong block, no client error, and in the end all copies are in-sync and
// equal. CAIRN_CHAOS_SECONDS sets its length, CAIRN_CHAOS_SEED replays it, and
// CAIRN_CHAOS_SCRIPT names a file of other rules (chaos/fault), as the lines a
// run has printed.
func TestChaos(t *testing.T) {
	seed := fromEnv(t, "CAIRN_CHAOS_SEED", uint64(time.Now().UnixNano()))
	length := time.Duration(fromEnv(t, "CAIRN_CHAOS_SECONDS", 60)) * time.Second
	t.Logf("CAIRN_CHAOS_SEED=%d CAIRN_CHAOS_SECONDS=%d", seed, length/time.Second)
	rules := storm
	if name := os.Getenv("CAIRN_CHAOS_SCRIPT"); name != "" {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		rules = string(text)
	}
	script, err := fault.Parse(rules)
	if err != nil {
		t.Fatal(err)
	}
	c := startCluster(t, "--store-size", smallStore)
	l := newLoad(t, startVolume(t, c), seed, 0)
	names := map[string][]string{fault.KindHost: c.Names(fault.KindHost), fault.KindMeta: c.Names(fault.KindMeta)}
	scheduler, err := fault.NewScheduler(script, seed, names)
	if err != nil {
		t.Fatal(err)
	}
	stop, done := start(t.Context(), l)
	breakFor(t, c, scheduler, length, done)
	// It heals under load, then rests.
	waitInSync(t, c)
	awaitOps(t, l, done, 2000)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	waitInSync(t, c)
	report(t, l)
	readEverywhere(t, c, l)
	linearizable(t, l)
}

// breakFor runs the faults, and ends early if the load does.
func breakFor(t *testing.T, c *Cluster, s *fault.Scheduler, length time.Duration, done <-chan error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	broke := make(chan error, 1)
	count := 0
	go func() {
		broke <- fault.Run(ctx, fault.Config{Scheduler: s, Cluster: c, Log: func(d fault.Done) {
			t.Log(d)
			if d.Note == "" {
				count++
			}
		}})
	}()
	select {
	case err := <-done:
		cancel()
		t.Fatalf("the load ended under faults: %v (and the faults: %v)", err, <-broke)
	case err := <-broke:
		if err != nil {
			t.Fatal(err)
		}
	}
	if count == 0 && length > 10*time.Second {
		t.Error("nothing was broken at all")
	}
}

// report prints what the load did and the longest wait of each kind.
func report(t *testing.T, l *check.Load) {
	st := l.Stats()
	for _, k := range st.Kinds {
		t.Logf("%-12s %7d answered, %4d cut off, longest %8.1f ms (at %.1f s)", k.Kind, k.Count, k.Unknown,
			float64(k.LongestNs)/1e6, float64(k.LongestAtNs)/1e9)
		if k.Count == 0 {
			t.Errorf("no %s was answered", k.Kind)
		}
	}
	t.Logf("%d connections lost and made again, longest outage %.1f ms; %d entries of history",
		st.Reconnects, float64(st.LongestOutageNs)/1e6, len(l.History().Ops()))
}
