package cluster

import (
	"context"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/chaos/check"
)

// A disk that fails one sync is not asked again: its store is out, says why,
// and nobody's I/O fails.
func TestAFailedSyncEndsAStore(t *testing.T) {
	t.Setenv("CAIRN_DISK_RULES", "host-2: sync #40 fails EIO")
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 51, 0)
	stop, done := start(t.Context(), l)
	ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
	defer cancel()
	var stores []struct{ Host, State string }
	err := c.Await(ctx, "the store on host-2 has failed and is excluded", func(ctx context.Context) (bool, string, error) {
		if err := c.query(ctx, &stores, "store", "ls"); err != nil {
			return false, "", err
		}
		v, err := c.ShowVolume(ctx, volumeName)
		failed := false
		for _, s := range stores {
			failed = failed || s.Host == "host-2" && strings.Contains(s.State, "failed") && strings.Contains(s.State, "input/output error")
		}
		for _, m := range v.Members {
			failed = failed && m.InSync == (m.Host != "host-2")
		}
		return failed, strings.Join([]string{v.State, stores[0].State}, " "), err
	})
	if err != nil {
		t.Fatal(err)
	}
	awaitOps(t, l, done, 3000)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := l.Stats().Reconnects; n > 0 {
		t.Errorf("the client lost %d connections by the death of another host's disk", n)
	}
	readAll(t, l)
	linearizable(t, l)
}

// The disk under the gateway's own store, which all reads go to first, gets
// writes wrong, loses some and puts some elsewhere: no client ever sees it.
func TestARottenDiskUnderTheGateway(t *testing.T) {
	rot := "" // each rule with its host: the other disks are well
	for _, rule := range []string{"write 2% flips 35000", "write 1% lost", "write 1% misdirected 256K"} {
		rot += gateway + ": " + rule + "\n"
	}
	t.Setenv("CAIRN_DISK_RULES", rot)
	c := startCluster(t)
	l := check.NewLoad(check.Config{Dial: check.NBD(startVolume(t, c), nil), Seed: 52, Base: areaBase, Blocks: areaBlocks, Ops: 20_000, Log: t.Logf})
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	readAll(t, l)
	var out struct {
		Volumes []struct{ Name string }
	}
	if err := c.query(t.Context(), &out, "status"); err != nil { // it is all still manageable
		t.Fatal(err)
	}
	if err := c.Detach(t.Context(), volumeName); err != nil {
		t.Fatal(err)
	}
	l.SetDial(check.NBD(attach(t, c, "host-2"), nil))
	readAll(t, l)
	linearizable(t, l)
}
