package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/chaos/fault"
)

// A clone is flattened under a verified load while hosts are killed, the one that
// flattens too: asked again it goes on. Then the origin goes, and every byte that
// the clone began with, was given before or is given meanwhile is there, on each
// host.
func TestFlattenWhileHostsDie(t *testing.T) {
	const seed, origin, kills = 71, "origin", 3
	rng := rand.New(rand.NewPCG(seed, 0))
	c := startCluster(t)
	cairn := func(args ...string) {
		t.Helper()
		if _, err := c.Cairn(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	var write, read []string // 2 MiB of each 8, but for the load's area
	for at := 0; at < volumeBytes>>20; at += 8 {
		if at<<20 >= areaBase-(8<<20) && at<<20 < areaBase+(8<<20) {
			continue
		}
		what := fmt.Sprintf("-P %d %dM 2M", 1+at/8, at)
		write, read = append(write, "write "+what), append(read, "read "+what)
	}
	if err := c.CreateVolume(t.Context(), origin, volumeBytes, 3); err != nil {
		t.Fatal(err)
	}
	uri, err := c.Attach(t.Context(), origin, gateway)
	if err != nil {
		t.Fatal(err)
	}
	qemuIO(t, uri, append(write, "flush")...)
	cairn("volume", "snapshot", origin, "--name", "s")
	cairn("volume", "clone", origin+"@s", volumeName)
	qemuIO(t, uri, "write -P 250 0 256k", "write -P 250 128M 256k", "flush") // the clone must not see it
	cairn("volume", "detach", origin)
	uri = attach(t, c, gateway)
	qemuIO(t, uri, "write -P 99 3M 8k", "write -z 9M 64k", "flush") // beside what is read from the origin, and instead of it
	read[1] = "read -P 2 8M 1M"
	read = append(read, "read -P 99 3M 8k", "read -P 0 9M 64k", "read -P 2 9280k 960k")

	l := newLoad(t, uri, seed, 0)
	stop, done := start(t.Context(), l)
	awaitOps(t, l, done, 1000)
	flat := make(chan error, 1)
	var refusals []error
	go func() {
		for {
			_, err := c.Cairn(t.Context(), "volume", "flatten", volumeName)
			var said *CommandError
			if !errors.As(err, &said) {
				flat <- err
				return
			}
			refusals = append(refusals, err)
		}
	}()
	hosts := c.Names(fault.KindHost)
	for i := range kills {
		awaitOps(t, l, done, 100)
		victim := hosts[rng.IntN(len(hosts))]
		if i == 1 {
			victim = gateway
		}
		if err := c.Kill(victim); err != nil {
			t.Fatal(err)
		}
		t.Logf("killed %s", victim)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testMaxWait)
	defer cancel()
	select {
	case err := <-flat:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		t.Fatal("the clone is not flattened")
	}
	t.Logf("flattened; asked again after %v", refusals)
	awaitOps(t, l, done, 1000)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cairn("volume", "snapshot", "rm", origin+"@s", "--wait")
	cairn("volume", "rm", origin, "--now")
	waitInSync(t, c)
	for _, host := range hosts {
		if err := c.Detach(t.Context(), volumeName); err != nil {
			t.Fatal(err)
		}
		uri := attach(t, c, host)
		l.SetDial(check.NBD(uri, nil))
		readAll(t, l)
		qemuIO(t, uri, read...)
	}
	linearizable(t, l)
}
