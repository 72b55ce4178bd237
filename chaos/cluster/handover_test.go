package cluster

import (
	"context"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
)

// handOverPatience is how long a client dials an export that may have gone for good.
const handOverPatience = 3 * time.Second

// TestHandOver moves a volume under a verified load from host to host, handed over
// each time, with the old holder, the new one or the metadata leader killed in
// between: nothing is lost or read stale, and each block's history is linearizable.
// CAIRN_HANDOVERS says how often; 50 is what the promise is about.
func TestHandOver(t *testing.T) {
	c := startCluster(t)
	l := check.NewLoad(check.Config{Dial: check.PatientNBD(startVolume(t, c), handOverPatience), Seed: 41, Base: areaBase, Blocks: areaBlocks, Conns: 2, Depth: 8, Log: t.Logf})
	hosts := c.Names("host")
	moved := 0
	for n := range int(fromEnv(t, "CAIRN_HANDOVERS", 8)) {
		from, to := hosts[n%len(hosts)], hosts[(n+1)%len(hosts)]
		stop, done := start(t.Context(), l)
		awaitOps(t, l, done, 300)
		// The load's clients lose the export when it goes, which they take for an end.
		victim := []string{"", from, to, "leader"}[n%4]
		asked := make(chan error, 1)
		go func() {
			_, err := c.Cairn(t.Context(), "volume", "attach", volumeName, "--host", to, "--hand-over")
			asked <- err
		}()
		if victim == "leader" {
			if name, err := c.MetaLeader(); err == nil {
				victim = name
			}
		}
		if victim != "" {
			time.Sleep(time.Duration(n) * time.Millisecond) // not a wait: which moment of the hand-over is hit, another each time
			if err := c.Kill(victim); err != nil {
				t.Fatal(err)
			}
		}
		err := <-asked
		t.Logf("hand-over %d from %s to %s, %q killed: %v", n+1, from, to, victim, err)
		_ = stop() // its export is gone or going: what it was told is in the history
		if err == nil {
			moved++
		}
		var uri string
		ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
		err = c.Await(ctx, "the volume is on "+to, func(ctx context.Context) (_ bool, _ string, err error) {
			uri, err = c.Cairn(ctx, "volume", "attach", volumeName, "--host", to, "--hand-over")
			return true, "", err
		})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.PatientNBD(uri[:len(uri)-1], handOverPatience))
		readAll(t, l)
	}
	if moved == 0 {
		t.Error("no hand-over was answered at once")
	}
	waitInSync(t, c)
	readEverywhere(t, c, l)
	linearizable(t, l)
}
