package cluster

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/chaos/check"
)

// copyStore copies a store file whose host does not run, holes and all.
func copyStore(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp %s %s: %v: %s", from, to, err, out)
	}
}

// A host's store file is put back as it was some time ago, while everything is
// down: of all the volume's copies, all in sync, one is old. It is known again,
// not one stale block is read from it, and it catches up. Once after everything
// was stopped in order, once after everything was killed.
func TestARestoredStoreIsNotBelieved(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 41, 4000)
	const victim = "host-2"
	file := filepath.Join(c.Dir(), victim, "store-1")
	old := filepath.Join(t.TempDir(), "old")
	run := func() {
		t.Helper()
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	run()
	if err := c.Down(); err != nil {
		t.Fatal(err)
	}
	copyStore(t, file, old)
	if err := c.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Detach(t.Context(), volumeName); err != nil {
		t.Fatal(err)
	}
	l.SetDial(check.NBD(attach(t, c, victim), nil))
	run()
	waitInSync(t, c)
	for round, stop := range []func() error{c.Down, c.KillAll} {
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		copyStore(t, old, file)
		start := c.ReleaseAll
		if round == 0 {
			start = func() error { return c.Up(t.Context()) }
		}
		if err := start(); err != nil {
			t.Fatal(err)
		}
		var uri string // of the victim, whose own copy serves, if it counts
		if err := c.Await(t.Context(), victim+" serves", func(ctx context.Context) (ok bool, state string, err error) {
			if uri, err = c.Attach(ctx, volumeName, victim); err != nil {
				return false, err.Error(), nil
			}
			return true, "", nil
		}); err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.NBD(uri, nil))
		readAll(t, l)
		waitInSync(t, c)
		readAll(t, l)
		run()
		waitInSync(t, c)
	}
	readEverywhere(t, c, l)
	linearizable(t, l)
	events, err := c.Cairn(t.Context(), "events")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(events, "another incarnation"); n != 2 {
		t.Errorf("the restored store was recognised %d times, want 2:\n%s", n, events)
	}
}
