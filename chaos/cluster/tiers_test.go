package cluster

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// shelf is a cluster whose hosts have a fast and a slow store each, with a volume
// of two copies on the fast ones: its first chunks are full of a pattern.
type shelf struct {
	*Cluster
	t   *testing.T
	uri string
}

const (
	shelfChunks = 6
	shelfWait   = 2 * testMaxWait // planned every five seconds, told with a heartbeat, seen ten seconds later
)

// newShelf fills the volume, forgets that it was ever used, and lets the leader
// cool above a level that the volume exceeds.
func newShelf(t *testing.T) *shelf {
	t.Helper()
	c := startCluster(t, "--stores", "2", "--slow-stores", "1", "--store-size", "2G")
	s := &shelf{Cluster: c, t: t}
	if err := c.CreateVolume(t.Context(), volumeName, shelfChunks*chunkBytes, 2); err != nil {
		t.Fatal(err)
	}
	s.uri = attach(t, c, gateway)
	for i := range shelfChunks {
		s.io("write", i)
	}
	s.qemu("flush")
	sum := 0
	for _, n := range s.fast() {
		sum += n
	}
	if sum != 2*shelfChunks {
		t.Fatalf("%d of %d new copies are on fast stores", sum, 2*shelfChunks)
	}
	// The gateway's counts go with the attachment; the leader's with the next report.
	if err := c.Detach(t.Context(), volumeName); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shelf) cairn(args ...string) string {
	s.t.Helper()
	out, err := s.Cairn(s.t.Context(), args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *shelf) qemu(commands ...string) {
	s.t.Helper()
	qemuIO(s.t, s.uri, commands...)
}

// qemuIO runs commands of qemu-io, none of which may fail.
func qemuIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.CommandContext(t.Context(), "qemu-io", append(args, uri)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io %v: %v\n%s", commands, err, out)
	}
}

// io reads or writes a chunk; each has its own byte.
func (s *shelf) io(what string, chunk int) {
	s.t.Helper()
	s.qemu(fmt.Sprintf("%s -P %d %dM 64M", what, 'a'+chunk, 64*chunk))
}

type shelfCopy struct {
	Host, Store     string
	InSync, Filling bool
}

// copies returns each chunk's copies, those that count.
func (s *shelf) copies(ctx context.Context) (out [][]shelfCopy, err error) {
	var chunks []struct{ Copies []shelfCopy }
	if err := s.query(ctx, &chunks, "volume", "map", volumeName); err != nil {
		return nil, err
	}
	for _, c := range chunks {
		if c.Copies = slices.DeleteFunc(c.Copies, func(x shelfCopy) bool { return x.Filling }); len(c.Copies) != 2 || c.Copies[0].Host == c.Copies[1].Host {
			s.t.Fatalf("a chunk has the copies %v: two, on two hosts", c.Copies)
		}
		out = append(out, c.Copies)
	}
	return out, nil
}

// slow returns the slow stores.
func (s *shelf) slow(ctx context.Context) (map[string]bool, error) {
	var stores []struct{ ID, Class string }
	out := map[string]bool{}
	err := s.query(ctx, &stores, "store", "ls")
	for _, st := range stores {
		out[st.ID[:8]] = st.Class == "slow" // as the map names it
	}
	return out, err
}

// fast counts the copies on each host's fast store.
func (s *shelf) fast() map[string]int {
	s.t.Helper()
	slow, err := s.slow(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	chunks, err := s.copies(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	out := map[string]int{}
	for _, c := range chunks {
		for _, x := range c {
			if !slow[x.Store] {
				out[x.Host]++
			}
		}
	}
	return out
}

func (s *shelf) await(what string, ok func(ctx context.Context) (bool, string, error)) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), shelfWait)
	defer cancel()
	if err := s.Await(ctx, what, ok); err != nil {
		s.t.Fatal(err)
	}
}

// rest waits until the leader plans nothing more, nothing is on its way, and no
// fast store has more than so many copies.
func (s *shelf) rest(most int) {
	s.t.Helper()
	s.await("chunks are where they belong", func(ctx context.Context) (bool, string, error) {
		plan, err := s.Cairn(ctx, "place", "rebalance", "--dry-run")
		if err != nil {
			return false, "", err
		}
		n := s.fast()
		ok := strings.Contains(plan, "nothing is worth moving")
		for _, x := range n {
			ok = ok && x <= most
		}
		return ok, fmt.Sprintf("%v\n%s", n, plan), nil
	})
}

var movedLine = regexp.MustCompile(`placement moves (\d+) chunks of volume ` + volumeName + ` \((cool|warm|even|move data)\)`)

// moves counts what the event log says placement has moved, by step.
func (s *shelf) moves() map[string]int {
	s.t.Helper()
	out := map[string]int{}
	for _, m := range movedLine.FindAllStringSubmatch(s.cairn("events"), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			s.t.Fatal(err)
		}
		out[m[2]] += n
	}
	return out
}

// A volume that nobody has attached leaves the fast stores, by maintenance
// sessions; what is read comes back to its reader's, and nothing else moves. The
// level is two chunks of a store's 1.4 GiB.
func TestColdDataMovesAndComesBack(t *testing.T) {
	s := newShelf(t)
	s.cairn("place", "policy", "--rebalance", "data", "--cool-after", "5s", "--cool-above", "10")
	s.rest(2)
	cooled := s.moves()
	if n := cooled["cool"]; n < 2*shelfChunks-3*2 || n > 2*shelfChunks || len(cooled) != 1 {
		t.Errorf("moved %v; %d copies were above the level", cooled, 2*shelfChunks-3*2)
	}
	s.uri = attach(t, s.Cluster, gateway)
	slow, err := s.slow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	local := func(ctx context.Context, chunk int) (store string, err error) {
		chunks, err := s.copies(ctx)
		if err != nil {
			return "", err
		}
		for _, x := range chunks[chunk] {
			if x.Host == gateway {
				store = x.Store
			}
		}
		return store, nil
	}
	hot := -1
	for i := range shelfChunks {
		if st, err := local(t.Context(), i); err != nil {
			t.Fatal(err)
		} else if slow[st] {
			hot = i
		}
	}
	if hot < 0 {
		t.Fatalf("no chunk is on the slow store of %s", gateway)
	}
	s.await("the chunk that is read is back on a fast store", func(ctx context.Context) (bool, string, error) {
		s.io("read", hot)
		st, err := local(ctx, hot)
		return err == nil && !slow[st], st, err
	})
	for i := range shelfChunks {
		s.io("read", i)
	}
	if n := s.moves(); n["warm"] < 1 || n["warm"] > shelfChunks || n["cool"] > cooled["cool"]+n["warm"]+2 {
		t.Errorf("moved %v, after %v: more than came back, and what they put out", n, cooled)
	}
}

// The host whose maintenance session moves a volume's chunks is killed in the
// middle, once as they cool and once as another host is drained: another session
// ends it, and every byte is there.
func TestMaintenanceIsKilledAsItMoves(t *testing.T) {
	t.Setenv("CAIRN_DISK_RULES", "write slow 15ms") // so that a copy is on its way for long enough to be seen
	s := newShelf(t)
	kill := func() {
		t.Helper()
		var by string
		s.await("a maintenance session copies", func(ctx context.Context) (bool, string, error) {
			var chunks []struct{ Copies []shelfCopy }
			if err := s.query(ctx, &chunks, "volume", "map", volumeName); err != nil {
				return false, "", err
			}
			v, err := s.ShowVolume(ctx, volumeName)
			for _, c := range chunks {
				if slices.ContainsFunc(c.Copies, func(x shelfCopy) bool { return x.Filling }) {
					by = v.Holder
				}
			}
			return by != "", fmt.Sprintf("%+v", v), err
		})
		if err := s.Kill(by); err != nil {
			t.Fatal(err)
		}
	}
	s.cairn("place", "policy", "--rebalance", "data", "--cool-after", "5s", "--cool-above", "10", "--bytes-at-once", "256M")
	kill()
	s.rest(2)
	s.cairn("place", "policy", "--rebalance", "off")
	s.cairn("host", "drain", gateway)
	kill()
	s.await("nothing is left on the drained host", func(ctx context.Context) (bool, string, error) {
		chunks, err := s.copies(ctx)
		for _, c := range chunks {
			if c[0].Host == gateway || c[1].Host == gateway {
				return false, fmt.Sprintf("%v", chunks), err
			}
		}
		return err == nil, "", err
	})
	for _, host := range s.Names("host") {
		s.uri = attach(t, s.Cluster, host)
		for i := range shelfChunks {
			s.io("read", i)
		}
		if err := s.Detach(t.Context(), volumeName); err != nil {
			t.Fatal(err)
		}
	}
}
