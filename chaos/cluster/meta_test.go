package cluster

import (
	"testing"
	"time"
)

// withoutMeta is how long there is no metadata node: well beyond a lease.
const withoutMeta = 20 * time.Second

// All metadata nodes are killed, and stay away for longer than a lease, under a
// verified load: guests go on reading, and writing what is allocated, and notice
// nothing; and go on when metadata is back.
func TestGuestsGoOnWithoutMetadata(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 33, 0)
	stop, done := start(t.Context(), l)
	awaitOps(t, l, done, 3000) // every place has been allocated
	waitInSync(t, c)
	nodes := c.Names("meta")
	for _, n := range nodes {
		if err := c.Hold(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.killAtOnce(nodes); err != nil {
		t.Fatal(err)
	}
	from := l.History().NowNs()
	for end := time.Now().Add(withoutMeta); time.Now().Before(end); {
		awaitOps(t, l, done, 100)
	}
	longest := l.History().Longest(from, l.History().NowNs())
	for _, n := range nodes {
		if err := c.Release(n); err != nil {
			t.Fatal(err)
		}
	}
	awaitOps(t, l, done, 1000)
	waitInSync(t, c)
	t.Logf("%v without metadata: longest operation %v", withoutMeta, longest.Round(time.Millisecond))
	if longest > 2*time.Second {
		t.Errorf("an operation took %v while there was no metadata", longest)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, k := range l.Stats().Kinds {
		if k.Unknown+k.Refused > 0 {
			t.Errorf("%s: %d cut off, %d refused", k.Kind, k.Unknown, k.Refused)
		}
	}
	readAll(t, l)
	linearizable(t, l)
}
