package agent

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/proto/status"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// fabric is two hosts and two spines.
func fabric(p bird.Protocol) bird.Topology {
	t := bird.Topology{Protocol: p, Range: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16")},
		Nodes: []bird.Node{{Name: "a", ASN: 1, Addrs: []netip.Addr{ip("10.255.0.1")}}, {Name: "b", ASN: 2, Addrs: []netip.Addr{ip("10.255.0.2")}},
			{Name: "x", Spine: true, ASN: 3, Addrs: []netip.Addr{ip("10.255.1.1")}}, {Name: "y", Spine: true, ASN: 4, Addrs: []netip.Addr{ip("10.255.1.2")}}}}
	for _, c := range []string{"a s1 x ha 10.1.1.1 10.1.1.0", "b s1 x hb 10.1.2.1 10.1.2.0", "a s2 y ha 10.2.1.1 10.2.1.0", "b s2 y hb 10.2.2.9 10.2.2.14"} {
		f := strings.Fields(c)
		t.Cables = append(t.Cables, bird.Cable{Host: f[0], HostLink: f[1], Spine: f[2], SpineLink: f[3], Ends: []bird.End{{Host: ip(f[4]), Spine: ip(f[5])}}})
	}
	return t
}

func text(c netplane.Config) string {
	var b strings.Builder
	for _, l := range c.Links {
		b.WriteString(l.Name)
		for _, a := range l.Addrs {
			b.WriteString(" " + a.String())
		}
		b.WriteString("\n")
	}
	for _, r := range c.Routes {
		b.WriteString(r.String() + "\n")
	}
	return b.String()
}

// The topology gives each node its links, and a route to each plane address
// over its plane alone; without a daemon, also those to stable addresses.
func TestWanted(t *testing.T) {
	const links = "s1 10.1.1.1/31\ns2 10.2.1.1/31\n"
	const fence1, fence2, fence = "unreachable 10.1.0.0/22\n", "unreachable 10.2.0.0/22\n", "unreachable 10.255.0.0/16\n"
	const planes = fence1 + "10.1.2.1/32 src 10.1.1.1 via 10.1.1.0 dev s1\n" + fence2 + "10.2.2.9/32 src 10.2.1.1 via 10.2.1.0 dev s2\n"
	const stable = "10.255.0.2/32 src 10.255.0.1 nexthop via 10.1.1.0 dev s1 nexthop via 10.2.1.0 dev s2\n"
	extra := []netplane.Route{{To: netip.MustParsePrefix("10.7.0.0/16"), Hops: []netplane.Hop{{Link: "s2"}}}}
	for _, c := range []struct {
		protocol bird.Protocol
		node     string
		added    []netplane.Route
		want     string
	}{
		{bird.BGP, "a", nil, links + planes + fence},
		{bird.Static, "a", nil, links + planes + fence + stable},
		{bird.RIP, "a", extra, links + planes + "10.7.0.0/16 src 10.255.0.1 dev s2\n" + fence},
		{bird.BGP, "y", nil, "ha 10.2.1.0/31\nhb 10.2.2.14/29\n" + fence1 + fence2 + fence},
		{bird.Static, "x", nil, "ha 10.1.1.0/31\nhb 10.1.2.0/31\n" + fence1 + fence2 + fence + "10.255.0.1/32 src 10.255.1.1 via 10.1.1.1 dev ha\n10.255.0.2/32 src 10.255.1.1 via 10.1.2.1 dev hb\n"},
	} {
		cfg, err := Wanted(fabric(c.protocol), c.node, c.added)
		if err != nil {
			t.Fatal(err)
		}
		if got := text(cfg); got != c.want || cfg.Forward != (c.node > "w") {
			t.Errorf("%s of %s:\n%swant\n%s", c.protocol, c.node, got, c.want)
		}
	}
	if _, err := Wanted(fabric(bird.BGP), "z", nil); !errors.Is(err, status.Invalid) || !strings.HasPrefix(err.Error(), "node:") {
		t.Errorf("a stranger: %v", err)
	}
	addrs, names := Planes(fabric(bird.BGP), "b")
	if !reflect.DeepEqual(addrs, []netip.Addr{ip("10.255.0.2"), ip("10.1.2.1"), ip("10.2.2.9")}) || !reflect.DeepEqual(names, []string{"stable", "x", "y"}) {
		t.Errorf("planes of b: %v %v", addrs, names)
	}
}

func TestParseRoute(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1 dev s1":                 "10.0.0.1/32 dev s1",
		"10.0.0.0/24 via 10.1.0.1 dev s1": "10.0.0.0/24 via 10.1.0.1 dev s1",
		"10.0.0.1/32 nexthop via 10.1.0.1 dev s1 nexthop via 10.2.0.1 dev s2": "10.0.0.1/32 nexthop via 10.1.0.1 dev s1 nexthop via 10.2.0.1 dev s2",
		"fd00::1 via fe80::1 dev s1":                                          "fd00::1/128 via fe80::1 dev s1",
		"10.0.0.1":                                                            "10.0.0.1/32",
		"":                                                                    "!", "x dev s1": "!", "10.0.0.1 dev": "!", "10.0.0.1 via x dev s1": "!", "10.0.0.1 metric 4": "!",
	} {
		r, err := ParseRoute([]string{in})
		if want == "!" {
			if !errors.Is(err, status.Invalid) {
				t.Errorf("%q: %v", in, err)
			}
		} else if err != nil || r.String() != want {
			t.Errorf("%q: %v, %v", in, r, err)
		}
	}
}

// Added routes survive; a damaged file is an error, not an empty one.
func TestAddedAreKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "routes.json")
	if rs, err := readAdded(file); err != nil || rs != nil {
		t.Fatalf("%v %v", rs, err)
	}
	r, err := ParseRoute([]string{"10.0.0.1 nexthop via 10.1.0.1 dev s1 nexthop dev s2"})
	if err != nil {
		t.Fatal(err)
	}
	if err := writeAdded(file, []netplane.Route{r}); err != nil {
		t.Fatal(err)
	}
	if rs, err := readAdded(file); err != nil || !reflect.DeepEqual(rs, []netplane.Route{r}) {
		t.Errorf("%+v %v", rs, err)
	}
	if err := os.WriteFile(file, []byte("[{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readAdded(file); !errors.Is(err, status.Corrupt) {
		t.Errorf("damaged: %v", err)
	}
}

// An effect names the last thing that had a cause of its own, and old events go.
func TestJournal(t *testing.T) {
	a := &Agent{cfg: Config{Node: "n"}}
	a.Note("link s1 is without carrier", "seen in the kernel")
	a.compare(map[string]string{"3 route to 10.0.0.1/32": "via x, via y", "2 session to_x": "up Established"},
		map[string]string{"3 route to 10.0.0.1/32": "via y", "2 session to_x": "start Idle Error: BFD session down"})
	ev := a.Events(0)
	if len(ev) != 3 || ev[1].Cause != "BFD session down" || ev[1].What != "session to_x: start Idle Error: BFD session down, was up Established" ||
		ev[2].Cause != "#2: "+ev[1].What || ev[2].What != "route to 10.0.0.1/32: via y, was via x, via y" || ev[0].Node != "n" {
		t.Errorf("%+v", ev)
	}
	for range maxEvents + 10 {
		a.Note("again", "")
	}
	if ev := a.Events(0); len(ev) != maxEvents || ev[len(ev)-1].Seq != maxEvents+13 {
		t.Errorf("%d events up to %d", len(ev), ev[len(ev)-1].Seq)
	}
	if ev := a.Events(maxEvents + 11); len(ev) != 2 || ev[0].Seq != maxEvents+12 {
		t.Errorf("%+v", ev)
	}
	if ev := a.Events(1 << 40); len(ev) != 0 {
		t.Errorf("%+v", ev)
	}
}

func TestRoutesOfOneDestinationAreOne(t *testing.T) {
	in := []netplane.Installed{
		{Route: netplane.Route{To: netip.MustParsePrefix("fd00::2/128"), Hops: []netplane.Hop{{Via: ip("fe80::2"), Link: "b"}}}, Protocol: bird.KernelProtocol, Metric: 32},
		{Route: netplane.Route{To: netip.MustParsePrefix("10.0.0.0/8"), Hops: []netplane.Hop{{Link: "eth0"}}}, Protocol: 4},
		{Route: netplane.Route{To: netip.MustParsePrefix("fd00::2/128"), Hops: []netplane.Hop{{Via: ip("fe80::1"), Link: "a"}}}, Protocol: bird.KernelProtocol, Metric: 32},
		{Route: netplane.Route{To: netip.MustParsePrefix("10.7.0.0/16"), Hops: []netplane.Hop{{Link: "a"}}}, Protocol: netplane.Protocol, Metric: 176},
	}
	got := routes(in, []netplane.Route{{To: netip.MustParsePrefix("10.7.0.0/16")}})
	want := []Route{{"10.7.0.0/16", "added", 176, []string{"dev a"}}, {"fd00::2/128", "bird", 32, []string{"via fe80::2 dev b", "via fe80::1 dev a"}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}
