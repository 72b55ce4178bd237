package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/chaos/fault"
	"github.com/cairnstore/cairn/proto/status"
)

// refused wants a command to fail with status 1 and one sentence that holds
// all the words.
func refused(t *testing.T, err error, words ...string) {
	t.Helper()
	var e *CommandError
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want a refusal", err)
	}
	if e.Status != 1 || strings.Contains(e.Stderr, "\n") {
		t.Errorf("status %d, want 1 and one line: %s", e.Status, e.Stderr)
	}
	for _, w := range words {
		if !strings.Contains(e.Stderr, w) {
			t.Errorf("%q does not say %q", e.Stderr, w)
		}
	}
}

// Everything dies at one instant, under load. What was flushed is there (P2),
// and since the machine lived on, so is everything that was acknowledged.
func TestAllKilledAtOnce(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 21, 0)
	for range 2 {
		stop, done := start(t.Context(), l)
		awaitOps(t, l, done, 5000)
		if err := c.KillAll(); err != nil {
			t.Fatal(err)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		before := l.History().Ops()
		if err := c.ReleaseAll(); err != nil {
			t.Fatal(err)
		}
		if err := check.Durable(before, readAll(t, l)); err != nil {
			t.Fatal(err)
		}
	}
	waitInSync(t, c)
	readEverywhere(t, c, l)
	linearizable(t, l)
}

// A gateway that dies while one copy lags behind leaves its last writes on the
// others only. The next one makes all equal before it serves: every copy is
// read after every death, before anything is written again.
func TestCopiesAreEqualAfterAGatewaysDeath(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 26, 0)
	hosts := c.Names(fault.KindHost)
	for i, host := range hosts {
		if err := c.Detach(t.Context(), volumeName); err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.NBD(attach(t, c, host), nil))
		stop, done := start(t.Context(), l)
		awaitOps(t, l, done, 3000)
		// What a stopped process has not read when it is killed is lost to it.
		lagging := hosts[(i+1)%len(hosts)]
		paused := make(chan error, 1)
		go func() { paused <- c.Pause(lagging, testMaxWait) }()
		awaitWaiting(t, l, done, paused)
		if err := c.killAtOnce([]string{host, lagging}); err != nil {
			t.Fatal(err)
		}
		if err := <-paused; err != nil && !errors.Is(err, status.NotFound) { // it died paused
			t.Fatal(err)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		readAll(t, l) // it is back
		readEverywhere(t, c, l)
	}
	linearizable(t, l)
}

// A replica that died costs no client an error, and catches up by itself.
func TestKilledReplicaCatchesUp(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 22, 6000)
	const victim = "host-2"
	run := func() {
		t.Helper()
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	run()
	if err := c.Hold(victim); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(victim); err != nil {
		t.Fatal(err)
	}
	run()
	v, err := c.ShowVolume(t.Context(), volumeName)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range v.Members {
		if m.InSync != (m.Host != victim) {
			t.Errorf("%s is in-sync=%v after writes without %s", m.Host, m.InSync, victim)
		}
	}
	if n := l.Stats().Reconnects; n > 0 {
		t.Errorf("the client lost %d connections by the death of another host", n)
	}
	if err := c.Release(victim); err != nil {
		t.Fatal(err)
	}
	run() // it joins under load
	waitInSync(t, c)
	readEverywhere(t, c, l)
	linearizable(t, l)
}

// Creates go on while the leader is killed again and again: each is done once.
func TestLeaderKilledDuringCreates(t *testing.T) {
	c := startCluster(t)
	const workers, each = 3, 8
	var wg sync.WaitGroup
	created := make(chan string, workers*each)
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				name := fmt.Sprintf("vol-%d-%d", w, i)
				if err := c.CreateVolume(t.Context(), name, 1<<30, 3); err != nil {
					t.Error(err)
				}
				created <- name
			}
		})
	}
	go func() { wg.Wait(); close(created) }()
	var want []string
	kills := 0
	for name := range created {
		want = append(want, name)
		if len(want)%6 != 3 {
			continue
		}
		if err := killLeader(c); err != nil {
			t.Error(err)
			continue
		}
		kills++
	}
	vs, err := c.Volumes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range vs {
		got = append(got, v.Name)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) || kills == 0 {
		t.Errorf("after %d kills of the leader there are the volumes %v, want %v", kills, got, want)
	}
}

// killLeader kills the metadata leader, waiting for one if there is none.
func killLeader(c *Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), testMaxWait)
	defer cancel()
	return c.Await(ctx, "a leader was killed", func(context.Context) (bool, string, error) {
		name, err := c.MetaLeader()
		if err != nil {
			return false, "", err
		}
		err = c.Kill(name)
		if errors.Is(err, status.NotFound) {
			return false, err.Error(), nil // it was killed a moment ago
		}
		return err == nil, "", err
	})
}

// A held volume is refused to others, naming the holder, and goes on serving.
func TestDoubleAttachIsRefused(t *testing.T) {
	c := startCluster(t)
	uri := startVolume(t, c)
	l := newLoad(t, uri, 24, 1000)
	_, err := c.Attach(t.Context(), volumeName, "host-2")
	refused(t, err, volumeName, gateway)
	if again := attach(t, c, gateway); again != uri {
		t.Errorf("attached where it is, it got the URI %s, and had %s", again, uri)
	}
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := l.Stats().Reconnects; n > 0 {
		t.Errorf("the refused attach cost the holder's client %d connections", n)
	}
	linearizable(t, l)
}

// Down and up again: all data is there. A second up on the same directory is
// refused and harms nothing.
func TestDataSurvivesDownAndUp(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 25, 6000)
	_, err := c.Cairn(t.Context(), "up", "--processes")
	refused(t, err, c.Dir(), "already up")
	_, err = c.Cairn(t.Context(), "up")
	refused(t, err, c.Dir(), "already up")
	for range 2 {
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.Down(); err != nil {
			t.Fatal(err)
		}
		left, err := c.processes()
		if err != nil || len(left) > 0 {
			t.Fatalf("after `cairn down` there are still %v (%v)", left, err)
		}
		if err := c.Up(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.NBD(attach(t, c, gateway), nil))
		readAll(t, l)
	}
	readEverywhere(t, c, l)
	linearizable(t, l)
}

// Names, pids, pause and hold do what they say.
func TestFaultsAct(t *testing.T) {
	c := startCluster(t)
	want := map[string][]string{fault.KindHost: {"host-1", "host-2", "host-3"}, fault.KindMeta: {"meta-1", "meta-2", "meta-3"}}
	for kind, names := range want {
		if got := c.Names(kind); !slices.Equal(got, names) {
			t.Errorf("nodes of kind %s: %v, want %v", kind, got, names)
		}
	}
	running := func() int {
		t.Helper()
		pids, err := c.Pids()
		if err != nil {
			t.Fatal(err)
		}
		return len(pids)
	}
	if n := running(); n != 7 {
		t.Errorf("%d processes run, want cairn up and six nodes", n)
	}
	if err := c.Hold("host-3"); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill("host-3"); err != nil {
		t.Fatal(err)
	}
	if n := running(); n != 6 {
		t.Errorf("%d processes run with a held host down, want 6", n)
	}
	if err := c.Kill("host-3"); !errors.Is(err, status.NotFound) {
		t.Errorf("killing what is down: %v, want not found", err)
	}
	if got := c.Names(fault.KindHost); len(got) != 3 {
		t.Errorf("a host that is down has no name any more: %v", got)
	}
	if err := c.Release("host-3"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
	defer cancel()
	err := c.Await(ctx, "host-3 runs again", func(context.Context) (bool, string, error) {
		pids, err := c.Pids()
		return len(pids) == 7, fmt.Sprint(pids), err
	})
	if err != nil {
		t.Fatal(err)
	}
}
