package netlab

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/bird"
)

// packets are the sizes that pass between hosts, by path, over all pairs.
func (w *world) packets() map[string][]int {
	w.t.Helper()
	var v struct {
		Reach []struct {
			Path   string
			Packet int `json:"packetBytes"`
		}
	}
	must(w.t, json.Unmarshal([]byte(w.cairn("net", "show", "-o", "json")), &v))
	out := map[string][]int{}
	for _, r := range v.Reach {
		if !slices.Contains(out[r.Path], r.Packet) {
			out[r.Path] = append(out[r.Path], r.Packet)
		}
	}
	return out
}

// Jumbo packets are used where they pass; when a spine, then the other, begins to lose them,
// and everything over 1400 bytes, I/O goes on with smaller ones, without an
// exclusion; and jumbo packets are found again.
func TestBlackHole(t *testing.T) {
	w := newWorldOf(t, Config{Spines: 2, Hosts: 3, Protocol: bird.BGP, MTU: 9000})
	all := func(size int) func() bool {
		return func() bool {
			p := w.packets()
			return slices.Equal(p["spine-1"], []int{size}) && slices.Equal(p["spine-2"], []int{size})
		}
	}
	await(t, "jumbo packets everywhere", all(9000))
	w.during("calm", func() {})
	before, _ := w.members()
	for _, spine := range []string{"spine-1", "spine-2"} {
		if stall := w.during("narrow "+spine, func() { must(t, w.Do("narrow", spine)) }); stall > maxStall {
			t.Errorf("an operation took %v", stall)
		}
		await(t, "packets of 1400 bytes", func() bool { return slices.Equal(w.packets()[spine], []int{narrowBytes}) })
		if after, inSync := w.members(); after != before || inSync != 3 {
			t.Errorf("members changed from revision %d to %d, %d in sync", before, after, inSync)
		}
	}
	must(t, w.Do("heal", "all"))
	await(t, "jumbo packets again", all(9000))
}

// Routes people add: in the kernel and in ls at once, gone as fast, kept over a
// restart; events tell of them in order, and of a lost link with its effects.
func TestRoutesAndEvents(t *testing.T) {
	l := newLab(t, bird.BGP, 2, 2)
	a := l.Agent("host-1")
	to := netip.MustParsePrefix("10.255.0.99/32")
	r, err := agent.ParseRoute([]string{"10.255.0.99 nexthop via 10.101.1.0 dev s1 nexthop via 10.102.1.0 dev s2"})
	must(t, err)
	listed := func() bool {
		rep, err := l.Agent("host-1").Report()
		must(t, err)
		return slices.ContainsFunc(rep.Routes, func(r agent.Route) bool { return r.To == to.String() && r.Owner == "added" && len(r.Hops) == 2 })
	}
	has := func() bool {
		has, err := l.hasRoute("host-1", to)
		must(t, err)
		return has
	}
	began := time.Now()
	must(t, a.AddRoute(r))
	if !has() || !listed() {
		t.Error("an added route is not there")
	}
	t.Logf("added, in the kernel and listed after %v", time.Since(began))
	bad, err := agent.ParseRoute([]string{"10.255.0.98 via 10.101.1.0 dev nowhere"})
	must(t, err)
	if err := a.AddRoute(bad); err == nil {
		t.Error("a route over no link was taken")
	}
	must(t, a.Close())
	again, err := agent.Start(agent.Config{Dir: l.cfg.Dir + "/host-1", Topology: l.Topology, Node: "host-1", NamespaceFD: int(l.nodes["host-1"].fd)})
	must(t, err)
	l.nodes["host-1"].agent = again
	if !has() || !listed() {
		t.Error("the route was forgotten by a restart")
	}
	converge(t, l)
	must(t, again.RemoveRoute(to))
	if has() || listed() {
		t.Error("a removed route is there")
	}
	if err := again.RemoveRoute(to); err == nil {
		t.Error("it was removed twice")
	}
	other := Stable(2).String()
	await(t, "both hops to host-2 are known, or a lost one is no news", func() bool {
		rep, err := again.Report()
		must(t, err)
		return slices.ContainsFunc(rep.Routes, func(r agent.Route) bool { return strings.HasPrefix(r.To, other) && len(r.Hops) == 2 })
	})
	seen := again.Events(0)
	t.Cleanup(func() {
		if t.Failed() {
			for _, e := range again.Events(0) {
				t.Logf("event %+v", e)
			}
		}
	})
	must(t, l.LinkDown(1, 2))
	var effect agent.Event
	await(t, "the effect on routes", func() bool {
		ev := again.Events(seen[len(seen)-1].Seq)
		i := slices.IndexFunc(ev, func(e agent.Event) bool { return strings.HasPrefix(e.What, "route to "+other) })
		if i >= 0 {
			effect = ev[i]
		}
		return i >= 0
	})
	if !strings.Contains(effect.Cause, "s2") && !strings.Contains(effect.Cause, "spine_2") {
		t.Errorf("a lost link took a next hop, and the cause is %q: %s", effect.Cause, effect.What)
	}
	must(t, l.LinkUp(1, 2))
	converge(t, l)
}

// A change of the topology that concerns others loses no packet, and the
// routing daemon is not started again.
func TestUnrelatedChangeLosesNothing(t *testing.T) {
	l := newLab(t, bird.BGP, 2, 3)
	probe, err := l.Probe(1, 2, 8, 4)
	must(t, err)
	grown := Topology(bird.BGP, 2, 4, false)
	for _, n := range l.Topology.Nodes {
		if n.Spine {
			continue // it has no link to the new host
		}
		must(t, l.Agent(n.Name).Apply(grown))
	}
	r, err := agent.ParseRoute([]string{"10.255.0.99 via 10.101.1.0 dev s1"})
	must(t, err)
	for range 5 {
		must(t, l.Agent("host-1").AddRoute(r))
		must(t, l.Agent("host-1").RemoveRoute(r.To))
	}
	if lost := probe.Lost(); lost != 0 {
		t.Errorf("%d packets lost", lost)
	}
	if _, err := probe.Stop(); err != nil {
		t.Error(err)
	}
	for _, n := range l.Topology.Nodes {
		rep, err := l.Agent(n.Name).Report()
		must(t, err)
		if rep.BIRD.Restarts != 0 {
			t.Errorf("%s was started again: %s", n.Name, rep.BIRD.Why)
		}
	}
}

// 64 connections between two hosts use both spines.
func TestFlowsSpread(t *testing.T) {
	l := newLab(t, bird.BGP, 2, 2)
	m := &measurement{cfg: MeasureConfig{Spines: 2, Talk: logWriter{t}}, lab: l, f: &Figures{}}
	var err error
	m.probe, err = l.Probe(1, 2, 1, 0)
	must(t, err)
	must(t, m.spread(t.Context()))
	if _, err := m.probe.Stop(); err != nil {
		t.Error(err)
	}
	if m.f.SpreadPct < 20 || m.f.SpreadPct > 80 { // 64 fair coins: 30 to 70 in 999 of 1000
		t.Errorf("%.0f %% of 64 flows went over spine-1", m.f.SpreadPct)
	}
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

// A lab leaves nothing: no process, no namespace anybody could name.
func TestNothingIsLeft(t *testing.T) {
	l, err := New(Config{Dir: t.TempDir(), Spines: 1, Hosts: 2, Protocol: bird.RIP})
	must(t, err)
	var pids []int
	for _, n := range l.Topology.Nodes {
		rep, err := l.Agent(n.Name).Report()
		must(t, err)
		pids = append(pids, rep.BIRD.Pid)
	}
	must(t, l.Close())
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err == nil {
			t.Errorf("process %d is left", pid)
		}
	}
}
