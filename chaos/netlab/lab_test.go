package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
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

// lies is what a host's BIRD says when somebody else wrote its configuration:
// everything is announced, a default route, another's address and nobody's.
const lies = `
protocol static lies4 { ipv4 { preference 300; }; route 0.0.0.0/0 unreachable; route 10.255.0.2/32 unreachable; route 10.255.0.77/32 unreachable; }
protocol static lies6 { ipv6 { preference 300; }; route ::/0 unreachable; route fd00:ca1f::2/128 unreachable; route fd00:ca1f::77/128 unreachable; }
`

// A host that announces a default route, another's address and nobody's changes
// nobody's routes, with every protocol; its own address is believed all the
// while, which shows that it is heard.
func TestLiarIsNotBelieved(t *testing.T) {
	for _, p := range []bird.Protocol{bird.BGP, bird.RIP, bird.OSPF} {
		t.Run(string(p), func(t *testing.T) {
			l := newLab(t, p, 2, 3)
			before, err := l.routeTexts("host-1")
			must(t, err)
			n := l.nodes["host-3"]
			must(t, n.agent.Close())
			n.agent = nil
			await(t, "the honest host gone", func() bool {
				hops, err := l.Hops("host-1")
				must(t, err)
				return hops[netip.PrefixFrom(Stable(3), 32)] == 0
			})
			text, err := l.Topology.Config("host-3")
			must(t, err)
			for _, f := range []string{"4", "6"} {
				honest := "filter announce" + f + " { if source = RTS_STATIC then accept; reject; }"
				if !strings.Contains(text, honest) {
					t.Fatalf("no such filter in\n%s", text)
				}
				text = strings.Replace(text, honest, "filter announce"+f+" { accept; }", 1)
			}
			dir := t.TempDir()
			must(t, os.WriteFile(dir+"/bird.conf", []byte(text+lies), 0o600))
			liar := exec.Command("/usr/sbin/bird", "-f", "-c", dir+"/bird.conf", "-s", dir+"/bird.ctl")
			liar.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			must(t, l.In("host-3", liar.Start))
			defer func() {
				must(t, liar.Process.Kill())
				_ = liar.Wait() // killed
			}()
			await(t, "the liar is heard", func() bool {
				hops, err := l.Hops("host-1")
				must(t, err)
				return hops[netip.PrefixFrom(Stable(3), 32)] == 2 && hops[netip.MustParsePrefix("fd00:ca1f::3/128")] == 2
			})
			after, err := l.routeTexts("host-1")
			must(t, err)
			if !slices.Equal(before, after) {
				t.Errorf("host-1's routes were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
			}
			probe, err := l.Probe(1, 2, 1, 1)
			must(t, err)
			if lost := probe.Lost(); lost != 0 {
				t.Errorf("%d packets to the host whose address was claimed are lost", lost)
			}
			if _, err := probe.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// routeTexts are BIRD's routes of a node in the kernel, default routes included.
func (l *Lab) routeTexts(node string) (out []string, err error) {
	rs, err := l.nodes[node].routesOf(bird.KernelProtocol)
	for _, r := range rs {
		hops := []string{r.Gw.String()}
		for _, h := range r.MultiPath {
			hops = append(hops, h.Gw.String())
		}
		slices.Sort(hops)
		out = append(out, fmt.Sprintf("%v by %v", r.Dst, hops))
	}
	slices.Sort(out)
	return out, err
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
