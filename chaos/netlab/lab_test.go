package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/bird"
)

const patience = 30 * time.Second

func newLab(t *testing.T, p bird.Protocol, spines, hosts int) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run by `make test-int` as root")
	}
	l, err := New(Config{Dir: t.TempDir(), Spines: spines, Hosts: hosts, Protocol: p})
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	converge(t, l)
	return l
}

func converge(t *testing.T, l *Lab) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	took, err := l.Converged(ctx)
	if err != nil {
		for _, n := range l.Topology.Nodes {
			if l.Agent(n.Name) == nil {
				continue
			}
			rep, rerr := l.Agent(n.Name).Report()
			t.Logf("%+v %v", rep, rerr)
		}
		t.Fatal(err)
	}
	t.Logf("converged in %v", took)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await looks again until ok.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.After(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-end:
			t.Fatalf("%s did not happen", what)
		case <-tick.C:
		}
	}
}

// Every protocol finds all paths, and after each cut and healing finds them
// again without a broken TCP connection.
func TestCutsHeal(t *testing.T) {
	for _, p := range []bird.Protocol{bird.BGP, bird.RIP, bird.OSPF} {
		t.Run(string(p), func(t *testing.T) {
			l := newLab(t, p, 2, 3)
			probe, err := l.Probe(1, 2, 4, 2)
			must(t, err)
			cut := func(name string, down, heal func() error) {
				probe.Take()
				must(t, down())
				await(t, name+" noticed", func() bool {
					hops, err := l.Hops("host-1")
					must(t, err)
					return hops[netip.PrefixFrom(Stable(2), 32)] == 1
				})
				must(t, heal())
				converge(t, l)
				t.Logf("%s: %+v", name, probe.Take())
			}
			cut("link down", func() error { return l.LinkDown(2, 1) }, func() error { return l.LinkUp(2, 1) })
			cut("silent spine", func() error { return l.Silence(2) }, func() error { return l.Heal(2) })
			if _, err := probe.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A dead and a wedged BIRD come back by themselves, and routes with them.
func TestBirdComesBack(t *testing.T) {
	l := newLab(t, bird.BGP, 2, 2)
	for i, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
		st, err := l.Agent("host-1").Report()
		must(t, err)
		must(t, syscall.Kill(st.BIRD.Pid, sig))
		await(t, fmt.Sprintf("a new BIRD after %v", sig), func() bool {
			now, err := l.Agent("host-1").Report()
			return err == nil && now.BIRD.Pid != 0 && now.BIRD.Pid != st.BIRD.Pid && now.BIRD.Restarts == i+1
		})
		converge(t, l)
	}
}

// A host that says it has another's address changes nobody's route.
func TestLiarIsNotBelieved(t *testing.T) {
	for _, p := range []bird.Protocol{bird.BGP, bird.RIP, bird.OSPF} {
		t.Run(string(p), func(t *testing.T) {
			l := newLab(t, p, 2, 3)
			before, err := l.Hops("host-1")
			must(t, err)
			lie := l.Topology
			lie.Nodes = append([]bird.Node(nil), lie.Nodes...)
			// It claims host 2's address as a second one of its own, and one nobody has.
			text := lie
			text.Nodes[2].Addrs = []netip.Addr{Stable(2), netip.MustParseAddr("fd00:ca1f::77")}
			text.Nodes[1].Addrs = []netip.Addr{Stable(7)}
			must(t, l.Agent("host-3").Apply(text))
			await(t, "the lie takes host 3's own address away", func() bool {
				hops, err := l.Hops("host-1")
				must(t, err)
				return hops[netip.PrefixFrom(Stable(3), 32)] == 0
			})
			after, err := l.Hops("host-1")
			must(t, err)
			to := netip.PrefixFrom(Stable(2), 32)
			if after[to] != before[to] {
				t.Errorf("%d next hops to host 2 before the lie, %d after", before[to], after[to])
			}
			for dst := range after {
				if _, had := before[dst]; !had {
					t.Errorf("the lie brought a route to %v", dst)
				}
			}
			probe, err := l.Probe(1, 2, 1, 1)
			must(t, err)
			if _, err := probe.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A second routing daemon in one namespace is refused, and changes nothing.
func TestSecondIsRefused(t *testing.T) {
	l := newLab(t, bird.BGP, 1, 2)
	_, err := agent.Start(agent.Config{Dir: t.TempDir(), Topology: l.Topology, Node: "host-1", NamespaceFD: int(l.nodes["host-1"].fd)})
	if err == nil {
		t.Fatal("a second one started")
	}
	t.Log(err)
	converge(t, l)
}

// A wrong key never makes a session, and takes no other down.
func TestWrongKey(t *testing.T) {
	l := newLab(t, bird.BGP, 2, 2)
	wrong := l.Topology
	wrong.Cables = append([]bird.Cable(nil), wrong.Cables...)
	wrong.Cables[0].Key = "another" // host-1 to spine-1
	must(t, l.Agent("host-1").Apply(wrong))
	await(t, "one path is left", func() bool {
		hops, err := l.Hops("host-1")
		must(t, err)
		return hops[netip.PrefixFrom(Stable(2), 32)] == 1
	})
	must(t, l.Agent("host-1").Apply(l.Topology))
	converge(t, l)
}
