package cluster

import (
	"context"
	"errors"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
)

// The tests run real clusters. What they measure and break is real; each ends
// with no process left (Close), or fails.

// Names and sizes of the volume under test. Its area lies across the border of
// the first two chunks.
const (
	volumeName  = "v"
	volumeBytes = 256 << 20
	chunkBytes  = 64 << 20
	areaBlocks  = 2048
	areaBase    = chunkBytes - areaBlocks/2*check.BlockBytes
	gateway     = "host-1"
)

// testMaxWait bounds every wait of a test for the cluster.
const testMaxWait = 2 * time.Minute

// startCluster starts a cluster, with further arguments of `cairn up`, that is
// stopped at the test's end; if the test failed, the end of every log is
// printed.
func startCluster(t *testing.T, args ...string) *Cluster {
	t.Helper()
	if os.Getenv("CAIRN_BIN") == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run by `make test-int`")
	}
	c, err := Start(t.Context(), Config{Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Tail())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// startVolume creates the volume with three replicas and attaches it.
func startVolume(t *testing.T, c *Cluster) (uri string) {
	t.Helper()
	if err := c.CreateVolume(t.Context(), volumeName, volumeBytes, 3); err != nil {
		t.Fatal(err)
	}
	return attach(t, c, gateway)
}

func attach(t *testing.T, c *Cluster, host string) (uri string) {
	t.Helper()
	uri, err := c.Attach(t.Context(), volumeName, host)
	if err != nil {
		t.Fatal(err)
	}
	return uri
}

// newLoad prepares a load on the volume; ops 0: until told to stop.
func newLoad(t *testing.T, uri string, seed uint64, ops int) *check.Load {
	return check.NewLoad(check.Config{Dial: check.NBD(uri, nil), Seed: seed, Base: areaBase, Blocks: areaBlocks, Ops: ops, Log: t.Logf})
}

// start runs the load beside the test; stop ends it and returns its outcome.
// done has that outcome if the load ends by itself.
func start(ctx context.Context, l *check.Load) (stop func() error, done <-chan error) {
	ctx, cancel := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- l.Run(ctx) }()
	return func() error { cancel(); return <-ran }, ran
}

// awaitOps waits until n more operations were answered.
func awaitOps(t *testing.T, l *check.Load, done <-chan error, n int) {
	t.Helper()
	count := func() (sum int) {
		for _, k := range l.Stats().Kinds {
			sum += k.Count
		}
		return sum
	}
	for want := count() + n; count() < want; {
		select {
		case err := <-done:
			t.Fatalf("the load ended early: %v", err)
		case <-time.After(pollEvery):
		}
	}
}

// awaitWaiting waits until most of the load's clients wait for an answer. Both
// the load and the pause that makes them wait must last until then.
func awaitWaiting(t *testing.T, l *check.Load, done, paused <-chan error) {
	t.Helper()
	for l.Waiting() < 24 { // of 32
		select {
		case err := <-done:
			t.Fatalf("the load ended early: %v", err)
		case err := <-paused:
			t.Fatalf("the pause ended early: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

func waitInSync(t *testing.T, c *Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
	defer cancel()
	if err := c.WaitInSync(ctx, volumeName); err != nil {
		t.Fatal(err)
	}
}

func readAll(t *testing.T, l *check.Load) map[uint64]check.Value {
	t.Helper()
	held, err := l.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// readEverywhere moves the volume to each host in turn and reads every block
// there: the local copy serves, so all copies are read.
func readEverywhere(t *testing.T, c *Cluster, l *check.Load) {
	t.Helper()
	for _, host := range c.Names("host") {
		if err := c.Detach(t.Context(), volumeName); err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.NBD(attach(t, c, host), nil))
		readAll(t, l)
	}
}

// linearizable checks the load's whole history.
func linearizable(t *testing.T, l *check.Load) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
	defer cancel()
	err := check.Linearizable(ctx, l.History())
	if err == nil {
		return
	}
	if dir := os.Getenv("CAIRN_CHAOS_KEEP"); dir != "" {
		name := dir + "/history-" + strconv.Itoa(os.Getpid()) + ".json"
		err = errors.Join(err, l.History().Save(name))
		t.Logf("the history is in %s", name)
	}
	t.Fatal(err)
}
