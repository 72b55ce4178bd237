package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/proto/status"
)

func links(l ...netplane.Link) []netplane.Link { return l }

// Two hosts on one cable need nothing but storage addresses on lo.
func TestDirectRoutesWithoutLinkAddresses(t *testing.T) {
	a, b := newHost(t).start(), newHost(t).start()
	cable(a, "to-b", b, "to-a")
	b.apply(config([]string{"10.9.0.2"}, links(named("to-a")), to("10.9.0.1/32", on("to-a"))))
	a.apply(config([]string{"10.9.0.1"}, links(named("to-b")), to("10.9.0.2/32", on("to-b"))))
	b.until("b's route", func() bool { return len(b.routes()) == 1 })
	a.until("a's route", func() bool { return len(a.routes()) == 1 })
	b.echo("10.9.0.2")
	a.talks("10.9.0.1", "10.9.0.2")
	if rep := a.apply(config([]string{"10.9.0.1"}, links(named("to-b")), to("10.9.0.2/32", on("to-b")))); len(rep.Changes)+len(rep.Problems) > 0 {
		t.Errorf("the same again does %v, %v", rep.Changes, rep.Problems)
	}
}

// No link has an address: a reaches b via the storage address of m, to which
// it has a direct route.
func TestGatewaysMayBeStorageAddresses(t *testing.T) {
	a, m, b := newHost(t).start(), newHost(t).start(), newHost(t).start()
	cable(a, "to-m", m, "to-a")
	cable(b, "to-m", m, "to-b")
	cfg := config([]string{"10.9.0.9"}, links(named("to-a"), named("to-b")), to("10.9.0.1/32", on("to-a")), to("10.9.0.2/32", on("to-b")))
	cfg.Forward = true
	m.apply(cfg)
	a.apply(config([]string{"10.9.0.1"}, links(named("to-m")), to("10.9.0.2/32", via("10.9.0.9", "to-m")), to("10.9.0.9/32", on("to-m"))))
	b.apply(config([]string{"10.9.0.2"}, links(named("to-m")), to("10.9.0.1/32", via("10.9.0.9", "to-m")), to("10.9.0.9/32", on("to-m"))))
	for _, h := range []*host{a, m, b} {
		h.until("two routes", func() bool { return len(h.routes()) == 2 })
	}
	b.echo("10.9.0.2")
	a.talks("10.9.0.1", "10.9.0.2")
	whole := a.routes()
	a.down("to-m")
	a.until("the loss", func() bool { return a.routes() == nil })
	a.up("to-m")
	a.until("the healing", func() bool { return reflect.DeepEqual(a.routes(), whole) })
	check(t, a.r.Clear()) // the direct one last
}

// threeInARow is a – m – b: m passes packets on; both families; a and b have
// no link to each other.
func threeInARow(t *testing.T) (a, m, b *host) {
	a, m, b = newHost(t).start(), newHost(t).start(), newHost(t).start()
	cable(a, "to-m", m, "to-a")
	cable(b, "to-m", m, "to-b")
	cfg := config([]string{"10.9.0.9", "fd09::9"}, links(named("to-a", "10.1.0.1/30", "fd01::1/64"), named("to-b", "10.1.0.5/30", "fd02::1/64")),
		to("10.9.0.1/32", via("10.1.0.2", "to-a")), to("fd09::1/128", via("fd01::2", "to-a")),
		to("10.9.0.2/32", via("10.1.0.6", "to-b")), to("fd09::2/128", via("fd02::2", "to-b")))
	cfg.Forward = true
	m.apply(cfg)
	a.apply(aConfig())
	b.apply(config([]string{"10.9.0.2", "fd09::2"}, links(named("to-m", "10.1.0.6/30", "fd02::2/64")),
		to("10.9.0.0/24", via("10.1.0.5", "to-m")), to("fd09::/64", via("fd02::1", "to-m"))))
	a.until("a's routes", func() bool { return len(a.routes()) == 2 })
	m.until("m's routes", func() bool { return len(m.routes()) == 4 })
	b.until("b's routes", func() bool { return len(b.routes()) == 2 })
	b.echo("10.9.0.2")
	b.echo("fd09::2")
	return a, m, b
}

func aConfig() netplane.Config {
	return config([]string{"10.9.0.1", "fd09::1"}, links(named("to-m", "10.1.0.2/30", "fd01::2/64")),
		to("10.9.0.2/32", via("10.1.0.1", "to-m")), to("fd09::2/128", via("fd01::1", "to-m")))
}

func talkBothFamilies(a *host) {
	a.t.Helper()
	a.talks("10.9.0.1", "10.9.0.2")
	a.talks("fd09::1", "fd09::2")
}

func TestStaticRoutesThroughAMiddleHost(t *testing.T) {
	a, m, _ := threeInARow(t)
	talkBothFamilies(a)
	want := []string{
		"10.9.0.1/32 src 10.9.0.9 via 10.1.0.2 dev to-a", "10.9.0.2/32 src 10.9.0.9 via 10.1.0.6 dev to-b",
		"fd09::1/128 src fd09::9 via fd01::2 dev to-a", "fd09::2/128 src fd09::9 via fd02::2 dev to-b"}
	if got := m.routes(); !reflect.DeepEqual(got, want) {
		t.Errorf("m has %q, want %q", got, want)
	}
}

// The kernel drops the routes (and IPv6 addresses) of a link that goes down,
// and restores none; the reconciler does, at both ends.
func TestLinkFlapHeals(t *testing.T) {
	a, m, b := threeInARow(t)
	for _, end := range []struct {
		h    *host
		name string
	}{{m, "to-b"}, {a, "to-m"}, {b, "to-m"}} {
		whole := end.h.routes()
		end.h.down(end.name)
		end.h.until("the loss", func() bool {
			return len(end.h.routes()) < len(whole) && strings.Contains(strings.Join(end.h.r.Status().Problems, "\n"), "link "+end.name+" is down")
		})
		if err := a.talk("10.9.0.1", "10.9.0.2"); err == nil {
			t.Fatal("the link is down and the hosts still talk")
		}
		end.h.up(end.name)
		end.h.until("the healing", func() bool { return reflect.DeepEqual(end.h.routes(), whole) })
		for _, h := range []*host{a, m, b} { // the other end saw its carrier go and come
			h.until("no problem left", func() bool { return len(h.r.Status().Problems) == 0 && h.r.Status().Err == nil })
		}
		talkBothFamilies(a)
	}
}

// A link without carrier takes its hop out of a route of two; with neither
// left, traffic fails at once instead of vanishing.
func TestTheOtherHopCarriesOn(t *testing.T) {
	a, b := newHost(t).start(), newHost(t).start()
	cable(a, "one", b, "one")
	cable(a, "two", b, "two")
	b.apply(config([]string{"10.9.0.2"}, links(named("one", "10.1.0.2/30"), named("two", "10.2.0.2/30")),
		to("10.9.0.1/32", via("10.1.0.1", "one"), via("10.2.0.1", "two"))))
	rep := a.apply(config([]string{"10.9.0.1"}, links(named("one", "10.1.0.1/30"), named("two", "10.2.0.1/30")),
		to("10.9.0.2/32", via("10.1.0.2", "one"), via("10.2.0.2", "two"))))
	const both = "10.9.0.2/32 src 10.9.0.1 nexthop via 10.1.0.2 dev one nexthop via 10.2.0.2 dev two"
	routes := func(want ...string) func() bool {
		return func() bool { return slices.Equal(a.routes(), want) }
	}
	a.until("two hops", routes(both))
	if !strings.Contains(fmt.Sprint(rep.Changes), "set net/ipv4/fib_multipath_hash_policy to 1") {
		t.Errorf("connections are not spread over the hops: %v", rep.Changes)
	}
	b.echo("10.9.0.2")
	a.talks("10.9.0.1", "10.9.0.2")
	b.down("one")
	a.until("one hop", routes("10.9.0.2/32 src 10.9.0.1 via 10.2.0.2 dev two"))
	b.until("b's one hop", func() bool {
		return slices.Equal(b.routes(), []string{"10.9.0.1/32 src 10.9.0.2 via 10.2.0.1 dev two"})
	})
	a.talks("10.9.0.1", "10.9.0.2")
	b.down("two")
	a.until("no hop", routes())
	if err := a.talk("10.9.0.1", "10.9.0.2"); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("without a hop: %v", err)
	}
	b.up("one")
	b.up("two")
	a.until("two hops again", routes(both))
}

// foreign adds a route of another protocol, by hand.
func (h *host) foreign(dst string, metric int, link string) {
	h.t.Helper()
	h.add(dst, metric, link, unix.RTPROT_STATIC)
}

func (h *host) add(dst string, metric int, link string, protocol netlink.RouteProtocol) {
	h.t.Helper()
	n, err := netlink.ParseIPNet(dst)
	check(h.t, err)
	check(h.t, h.nl.RouteAdd(&netlink.Route{Dst: n, LinkIndex: h.link(link).Attrs().Index, Protocol: protocol, Priority: metric, Scope: unix.RT_SCOPE_LINK}))
}

func TestForeignRoutesStay(t *testing.T) {
	a, b := newHost(t).start(), newHost(t)
	cable(a, "x", b, "x")
	b.up("x")
	a.up("x")
	a.foreign("10.8.0.0/24", 0, "x")
	a.foreign("10.9.0.2/32", 0, "x")
	a.foreign("10.9.0.3/32", netplane.Metric, "x")
	cfg := config([]string{"10.9.0.1"}, links(named("x")), to("10.9.0.2/32", on("x")), to("10.9.0.3/32", on("x")), to("10.9.0.4/32", on("x")))
	rep := a.apply(cfg)
	wantProblems := []string{
		"the route to 10.9.0.2/32 has no effect while one of protocol 4 with metric 0 is there",
		"the route to 10.9.0.3/32 cannot be installed: one of protocol 4 with metric 176 is there already; remove that"}
	if !reflect.DeepEqual(rep.Problems, wantProblems) {
		t.Errorf("problems %q, want %q", rep.Problems, wantProblems)
	}
	foreign := []string{"foreign 10.8.0.0/24 dev x", "foreign 10.9.0.2/32 dev x", "foreign 10.9.0.3/32 dev x"}
	want := append([]string{"10.9.0.2/32 src 10.9.0.1 dev x", "10.9.0.4/32 src 10.9.0.1 dev x"}, foreign...)
	sorted := func() []string { return slices.Sorted(slices.Values(a.routes())) }
	if got := sorted(); !reflect.DeepEqual(got, want) {
		t.Errorf("routes %q, want %q", got, want)
	}
	check(t, a.r.Clear())
	if got := sorted(); !reflect.DeepEqual(got, foreign) {
		t.Errorf("after Clear %q, want %q", got, foreign)
	}
	// When the one in the way goes, ours takes the place.
	a.apply(cfg)
	n, err := netlink.ParseIPNet("10.9.0.3/32")
	check(t, err)
	check(t, a.nl.RouteDel(&netlink.Route{Dst: n, Priority: netplane.Metric, Protocol: unix.RTPROT_STATIC, Scope: unix.RT_SCOPE_LINK}))
	a.until("the free place", func() bool { return slices.Contains(a.routes(), "10.9.0.3/32 src 10.9.0.1 dev x") })
}

// Whatever is deleted by hand comes back; what a new config leaves out goes.
func TestDriftAndChange(t *testing.T) {
	a, b := newHost(t).start(), newHost(t)
	cable(a, "x", b, "x")
	cable(a, "y", b, "y")
	b.up("x")
	b.up("y")
	x, y := named("x", "10.1.0.1/24", "fd01::1/64"), named("y", "10.2.0.1/24")
	full := func() bool { return len(a.routes()) == 2 }
	cfg := config([]string{"10.9.0.1"}, links(x, y), to("10.9.0.2/32", via("10.1.0.2", "x")), to("10.9.0.3/32", via("10.2.0.2", "y")))
	a.apply(cfg)
	a.until("routes", full)
	// 10.9.0.2 is reached via a gateway, so it cannot be one: an honest error.
	wrong := cfg
	wrong.Routes = append(slices.Clone(cfg.Routes), to("10.7.0.0/16", via("10.9.0.2", "x")))
	if _, err := a.r.Apply(wrong); !errors.Is(err, status.Unavailable) || !strings.Contains(err.Error(), "add route 10.7.0.0/16 src 10.9.0.1 via 10.9.0.2 dev x") {
		t.Errorf("a hop that is no neighbour: %v", err)
	}
	n, err := netlink.ParseIPNet("10.9.0.2/32")
	check(t, err)
	a.apply(cfg)
	check(t, a.nl.RouteDel(&netlink.Route{Dst: n, Protocol: netplane.Protocol}))
	a.until("the route is back", full)
	lo, err := netlink.ParseAddr("10.9.0.1/32")
	check(t, err)
	check(t, a.nl.AddrDel(a.link("lo"), lo))        // takes the routes with that source along
	a.add("10.6.0.0/24", 0, "x", netplane.Protocol) // under our number, but not ours
	a.until("the stray route is gone", full)
	a.until("the address is back", func() bool { return slices.Equal(a.addrs("lo"), []string{"10.9.0.1/32"}) && full() })

	a.apply(config([]string{"10.9.0.8"}, links(x), to("10.9.0.2/32", via("10.1.0.9", "x"))))
	if got := a.routes(); !reflect.DeepEqual(got, []string{"10.9.0.2/32 src 10.9.0.8 via 10.1.0.9 dev x"}) {
		t.Errorf("routes %q", got)
	}
	if lo, y := a.addrs("lo"), a.addrs("y"); !reflect.DeepEqual(lo, []string{"10.9.0.8/32"}) || y != nil {
		t.Errorf("addresses %v on lo, %v on y", lo, y)
	}
	check(t, a.r.Clear())
	if lo, x, routes := a.addrs("lo"), a.addrs("x"), a.routes(); lo != nil || x != nil || routes != nil {
		t.Errorf("Clear leaves %v on lo, %v on x, routes %v", lo, x, routes)
	}
}

// Routes outlive the process that set them, and the next one knows them.
func TestRoutesSurviveARestart(t *testing.T) {
	a, b := newHost(t).start(), newHost(t)
	cable(a, "x", b, "x")
	b.up("x")
	cfg := config([]string{"10.9.0.1"}, links(named("x")), to("10.9.0.2/32", on("x")), to("10.9.0.3/32", on("x")))
	a.apply(cfg)
	a.until("routes", func() bool { return len(a.routes()) == 2 })
	check(t, a.r.Close())
	if _, err := a.r.Apply(cfg); !errors.Is(err, status.Shutdown) {
		t.Errorf("after Close: %v", err)
	}
	if len(a.routes()) != 2 {
		t.Fatalf("Close took routes away: %v", a.routes())
	}
	a.start()
	cfg.Routes = cfg.Routes[:1]
	rep := a.apply(cfg)
	if got := fmt.Sprint(rep.Changes); got != "[remove route 10.9.0.3/32 src 10.9.0.1 dev x]" {
		t.Errorf("after the restart: %v", got)
	}
}

// A link that appears later is used then; one switched off by hand stays off.
func TestLinksComeAndGo(t *testing.T) {
	a, b := newHost(t).start(), newHost(t)
	rep := a.apply(config([]string{"10.9.0.1"}, links(named("x", "10.1.0.1/24")), to("10.9.0.2/32", via("10.1.0.2", "x"))))
	if got := strings.Join(rep.Problems, "; "); !strings.Contains(got, "link x does not exist") || !strings.Contains(got, "link x is missing: hops of 1 routes wait for it") {
		t.Errorf("problems %q", got)
	}
	cable(a, "x", b, "x")
	b.up("x")
	a.until("the new link is used", func() bool { return len(a.routes()) == 1 })
	a.down("x")
	a.until("it is off", func() bool { return strings.Contains(strings.Join(a.r.Status().Problems, ""), "link x is down") })
	if a.link("x").Attrs().RawFlags&unix.IFF_UP != 0 {
		t.Error("the link was switched on against somebody's will")
	}
	check(t, a.nl.LinkDel(a.link("x")))
	a.until("it is gone", func() bool { return strings.Contains(strings.Join(a.r.Status().Problems, ""), "link x is missing") })
	cable(a, "x", b, "x2")
	b.up("x2")
	a.up("x")
	a.until("its successor is used", func() bool { return len(a.routes()) == 1 })
}

func TestNamespaceByName(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run by `make test-int` as root")
	}
	name := fmt.Sprintf("cairn-test-%d", os.Getpid())
	made := make(chan error, 1)
	a := newHost(t)
	go func() {
		made <- a.ns.in(func() error {
			ns, err := netns.NewNamed(name)
			if err != nil {
				return err
			}
			return ns.Close()
		})
	}()
	err := <-made
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	check(t, err)
	r, err := New(Config{Namespace: name})
	check(t, err)
	t.Cleanup(func() { check(t, r.Close()) })
	rep, err := r.Apply(config([]string{"10.9.0.1"}, nil))
	check(t, err)
	if got := fmt.Sprint(rep.Changes); got != "[set link lo up add address 10.9.0.1/32 to lo]" {
		t.Errorf("did %s", got)
	}
	a.until("nothing", func() bool { return a.addrs("lo") == nil }) // not here, nor in the test's own
}

func TestBadInput(t *testing.T) {
	if _, err := New(Config{Namespace: "no-such-namespace"}); !errors.Is(err, status.NotFound) {
		t.Errorf("unknown name: %v", err)
	}
	if _, err := New(Config{NamespaceFD: 1 << 20}); !errors.Is(err, status.Invalid) {
		t.Errorf("unknown descriptor: %v", err)
	}
	if _, err := New(Config{Namespace: "x", NamespaceFD: 1}); !errors.Is(err, status.Invalid) {
		t.Errorf("both: %v", err)
	}
	null, err := os.Open("/dev/null")
	check(t, err)
	defer null.Close()
	if _, err := New(Config{NamespaceFD: int(null.Fd())}); err == nil {
		t.Error("a file is no namespace")
	}
	a := newHost(t).start()
	if _, err := a.r.Apply(config([]string{"127.0.0.1"}, nil)); !errors.Is(err, status.Invalid) {
		t.Errorf("bad config: %v", err)
	}
	if got := a.addrs("lo"); got != nil {
		t.Errorf("a bad config changed lo: %v", got)
	}
}

// What has no way is refused at once, in both families, and nothing is left of
// it afterwards; narrower routes go first.
func TestNoWayIsRefused(t *testing.T) {
	a, b := newHost(t), newHost(t)
	cable(a, "x", b, "x")
	a.start()
	b.start()
	fence := func(to string) netplane.Route { return netplane.Route{To: netip.MustParsePrefix(to), Refuse: true} }
	a.apply(config([]string{"10.9.0.1", "fd09::1"}, []netplane.Link{named("x", "10.1.0.1/30", "fd01::1/64")},
		fence("10.9.0.0/16"), fence("fd09::/64"), to("10.9.0.2/32", via("10.1.0.2", "x")), to("fd09::2/128", via("fd01::2", "x"))))
	b.apply(config([]string{"10.9.0.2", "fd09::2"}, []netplane.Link{named("x", "10.1.0.2/30", "fd01::2/64")},
		to("10.9.0.1/32", via("10.1.0.1", "x")), to("fd09::1/128", via("fd01::1", "x"))))
	b.echo("10.9.0.2")
	b.echo("fd09::2")
	a.until("all routes", func() bool { return len(a.r.Status().Problems) == 0 && len(a.routes()) == 4 })
	talkBothFamilies(a)
	for from, nobody := range map[string]string{"10.9.0.1": "10.9.7.7", "fd09::1": "fd09::77"} {
		if err := a.talk(from, nobody); !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("to %s: %v", nobody, err)
		}
	}
	if rep := a.apply(config([]string{"10.9.0.1", "fd09::1"}, []netplane.Link{named("x", "10.1.0.1/30", "fd01::1/64")})); len(rep.Changes) != 4 || len(a.routes()) != 0 {
		t.Errorf("changes %v, left %v", rep.Changes, a.routes())
	}
}
