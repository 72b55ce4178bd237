package netplane

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func normal(t testing.TB, c Config) Config {
	t.Helper()
	n, err := c.Normal()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bare is a machine with lo and two links, none of them on, and the settings
// of a fresh kernel.
func bare() State {
	st := State{Links: []LinkState{{Name: "lo", Carrier: true}, {Name: "a"}, {Name: "b"}}, Sysctls: map[string]string{}}
	for _, s := range Settings(base()) {
		st.Sysctls[s] = "0"
	}
	st.Sysctls[dad("a")], st.Sysctls[dad("b")] = "1", "1"
	return st
}

// kernel is a State that takes changes as the kernel would, and refuses what
// the kernel would refuse.
type kernel struct {
	State
	carrier map[string]bool // links whose cable is plugged in
}

func (k *kernel) link(name string) *LinkState {
	i := slices.IndexFunc(k.Links, func(l LinkState) bool { return l.Name == name })
	if i < 0 {
		return nil
	}
	return &k.Links[i]
}

func (k *kernel) apply(c Change) error {
	l := k.link(c.Link)
	switch c.Op {
	case SetSysctl:
		k.Sysctls[c.Sysctl] = c.Value
		return nil
	case SetUp:
		l.Up, l.Carrier = true, k.carrier[c.Link]
		return nil
	case AddAddr:
		if slices.Contains(l.Addrs, c.Addr) {
			return fmt.Errorf("%v: it exists", c)
		}
		l.Addrs = append(slices.Clone(l.Addrs), c.Addr)
		return nil
	case RemoveAddr: // takes the routes with that source along
		l.Addrs = slices.DeleteFunc(slices.Clone(l.Addrs), func(p netip.Prefix) bool { return p == c.Addr })
		k.Routes = slices.DeleteFunc(slices.Clone(k.Routes), func(r Installed) bool { return r.Src == c.Addr.Addr() })
		return nil
	}
	same := slices.IndexFunc(k.Routes, func(r Installed) bool { return r.To == c.Route.To && r.Metric == c.Metric })
	switch {
	case (c.Op == AddRoute) != (same < 0):
		return fmt.Errorf("%v: %d is there", c, same)
	case same >= 0 && k.Routes[same].Protocol != Protocol:
		return fmt.Errorf("%v: it is somebody else's", c)
	}
	if same >= 0 {
		k.Routes = slices.Delete(slices.Clone(k.Routes), same, same+1)
	}
	if c.Op == RemoveRoute {
		return nil
	}
	if c.Route.Src.IsValid() && !slices.Contains(k.link("lo").Addrs, netip.PrefixFrom(c.Route.Src, c.Route.Src.BitLen())) {
		return fmt.Errorf("%v: the source is not ours", c)
	}
	for _, h := range c.Route.Hops {
		if l := k.link(h.Link); l == nil || !l.Up {
			return fmt.Errorf("%v: the link is not up", c)
		}
	}
	k.Routes = append(k.Routes, Installed{Route: c.Route, Protocol: Protocol, Metric: c.Metric})
	return nil
}

// settle plans and applies until nothing is left, at most as often as the
// shell does.
func (k *kernel) settle(t interface{ Fatalf(string, ...any) }, want Config, mem *Memory) (done []string, problems []string) {
	mem.Want(want)
	for range 4 {
		mem.Saw(k.State)
		changes, problems := Plan(want, mem, k.State)
		if len(changes) == 0 {
			return done, problems
		}
		for _, c := range changes {
			if err := k.apply(c); err != nil {
				t.Fatalf("%v\nafter %s", err, strings.Join(done, "\n"))
			}
			done = append(done, c.String())
		}
	}
	t.Fatalf("never settles:\n%s", strings.Join(done, "\n"))
	return nil, nil
}

func newKernel() *kernel {
	return &kernel{State: bare(), carrier: map[string]bool{"lo": true, "a": true, "b": true}}
}

// From nothing to two ways, to other addresses, and back to nothing, in
// order: what is used is there before, and goes after.
func TestPlanInOrder(t *testing.T) {
	k, mem := newKernel(), &Memory{}
	steps := func(what string, c Config, want ...string) {
		t.Helper()
		got, problems := k.settle(t, normal(t, c), mem)
		if !reflect.DeepEqual(got, want) || problems != nil {
			t.Errorf("%s: got %v\n%s\nwant\n%s", what, problems, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	c := base(to("10.9.0.2/32", via("10.1.0.2", "a"), via("10.2.0.2", "b")), to("10.9.0.3/32", on("b")), to("fd09::2/128", via("fd01::2", "a")))
	c.Forward = true
	steps("new", c,
		"set net/ipv4/ip_forward to 1", "set net/ipv6/conf/all/forwarding to 1", "set net/ipv4/fib_multipath_hash_policy to 1", "set net/ipv6/conf/a/accept_dad to 0",
		"set link lo up", "add address 10.9.0.1/32 to lo", "add address fd09::1/128 to lo",
		"set link a up", "add address 10.1.0.1/24 to a", "add address fd01::1/64 to a", "set link b up", "add address 10.2.0.1/24 to b",
		"add route 10.9.0.3/32 src 10.9.0.1 dev b",
		"add route 10.9.0.2/32 src 10.9.0.1 nexthop via 10.1.0.2 dev a nexthop via 10.2.0.2 dev b",
		"add route fd09::2/128 src fd09::1 via fd01::2 dev a")
	steps("again", c)
	c.Addrs[0] = ip("10.9.0.7")
	c.Routes = c.Routes[:2]
	c.Links[1] = link("b", "10.2.0.9/24")
	c.Forward = false // an end of connections, and no middle any more: it looks for the packet size itself
	steps("renumbered", c, "set net/ipv4/tcp_mtu_probing to 2",
		"add address 10.9.0.7/32 to lo", "add address 10.2.0.9/24 to b",
		"replace route 10.9.0.3/32 src 10.9.0.7 dev b",
		"replace route 10.9.0.2/32 src 10.9.0.7 nexthop via 10.1.0.2 dev a nexthop via 10.2.0.2 dev b",
		"remove route fd09::2/128 src fd09::1 via fd01::2 dev a",
		"remove address 10.2.0.1/24 from b", "remove address 10.9.0.1/32 from lo")
	steps("nothing", Config{},
		"remove route 10.9.0.2/32 src 10.9.0.7 nexthop via 10.1.0.2 dev a nexthop via 10.2.0.2 dev b",
		"remove route 10.9.0.3/32 src 10.9.0.7 dev b",
		"remove address 10.1.0.1/24 from a", "remove address fd01::1/64 from a", "remove address 10.2.0.9/24 from b",
		"remove address 10.9.0.7/32 from lo", "remove address fd09::1/128 from lo")
}

func TestPlanSaysWhatIsMissing(t *testing.T) {
	c := base(to("10.9.0.2/32", via("10.1.0.2", "a")), to("10.9.0.3/32", via("10.2.0.2", "b")), to("10.9.0.4/32", via("10.2.0.2", "b"), via("10.1.0.2", "a")))
	c.Links = append(c.Links, link("x"))
	k, mem := newKernel(), &Memory{}
	k.carrier["b"] = false
	delete(k.Sysctls, hash4)
	_, problems := k.settle(t, normal(t, c), mem)
	want := []string{"this kernel has no setting " + hash4 + ", which should be 1",
		"link x does not exist: create it, or take it out of the configuration", "link b is without carrier: hops of 2 routes wait for it"}
	if !reflect.DeepEqual(problems, want) {
		t.Errorf("problems %q, want %q", problems, want)
	}
	if len(k.Routes) != 2 {
		t.Errorf("routes %v", k.Routes)
	}
}

// Who switches a link off after it has been on means it; a new config that has
// it anew is meant, too.
func TestLinksAreSwitchedOnOnce(t *testing.T) {
	k, mem := newKernel(), &Memory{}
	c := normal(t, base())
	k.settle(t, c, mem)
	k.link("a").Up = false
	if done, _ := k.settle(t, c, mem); done != nil {
		t.Errorf("did %q", done)
	}
	without := c
	without.Links = c.Links[1:]
	k.settle(t, without, mem)
	if done, _ := k.settle(t, c, mem); !slices.Contains(done, "set link a up") {
		t.Errorf("did %q", done)
	}
}

// From any state of the kernel: changes are all possible in their order, they
// settle, others' routes and addresses stay, and what is there then is exactly
// what is wanted over working links.
func TestPlanProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k, mem := newKernel(), &Memory{}
		strangerAddr := pre("192.168.7.7/24")
		k.link("a").Addrs = []netip.Prefix{strangerAddr}
		for _, name := range []string{"a", "b"} {
			k.carrier[name] = rapid.Bool().Draw(t, "carrier")
			k.link(name).Up = rapid.Bool().Draw(t, "up")
			k.link(name).Carrier = k.link(name).Up && k.carrier[name]
		}
		dst := rapid.SampledFrom([]string{"10.9.0.2/32", "10.9.0.3/32", "10.9.0.0/24", "fd09::/64"})
		hop := func(to string) Hop {
			h := on(rapid.SampledFrom([]string{"a", "b"}).Draw(t, "link"))
			if rapid.Bool().Draw(t, "via") {
				h.Via = ip(rapid.SampledFrom([]string{"10.1.0.2", "10.1.0.3"}).Draw(t, "gateway"))
				if strings.HasPrefix(to, "fd") {
					h.Via = ip("fd01::2")
				}
			}
			return h
		}
		var strangers []Installed
		for range rapid.IntRange(0, 4).Draw(t, "installed") {
			to := dst.Draw(t, "installed to")
			r := Installed{Route: Route{To: pre(to), Hops: []Hop{hop(to)}}, Protocol: rapid.SampledFrom([]int{4, 12, Protocol}).Draw(t, "protocol"),
				Metric: rapid.SampledFrom([]int{0, 32, Metric, 1024}).Draw(t, "metric")}
			if slices.ContainsFunc(k.Routes, func(o Installed) bool { return o.To == r.To && o.Metric == r.Metric }) {
				continue
			}
			k.Routes = append(k.Routes, r)
			if r.Protocol != Protocol {
				strangers = append(strangers, r)
			}
		}
		for range rapid.IntRange(1, 3).Draw(t, "configs") {
			c := base()
			for _, to := range rapid.SliceOfNDistinct(dst, 0, 4, rapid.ID).Draw(t, "to") {
				r := Route{To: pre(to)}
				for range rapid.IntRange(1, 2).Draw(t, "hops") {
					if h := hop(to); !slices.Contains(r.Hops, h) {
						r.Hops = append(r.Hops, h)
					}
				}
				c.Routes = append(c.Routes, r)
			}
			want, err := c.Normal()
			if err != nil {
				t.Fatal(err)
			}
			k.settle(t, want, mem)
			k.verify(t, want, strangers)
		}
		if !slices.Contains(k.link("a").Addrs, strangerAddr) {
			t.Fatal("somebody else's address is gone")
		}
	})
}

// verify compares the routes with the wanted ones, independently of Plan.
func (k *kernel) verify(t *rapid.T, want Config, strangers []Installed) {
	var got, foreign []Installed
	for _, r := range k.Routes {
		if r.Protocol == Protocol {
			got = append(got, r)
		} else {
			foreign = append(foreign, r)
		}
	}
	if !reflect.DeepEqual(foreign, strangers) {
		t.Fatalf("others' routes were %v and are %v", strangers, foreign)
	}
	expected := map[netip.Prefix][]Hop{}
	for _, r := range want.Routes {
		taken := slices.ContainsFunc(strangers, func(s Installed) bool { return s.To == r.To && s.Metric == Metric })
		for _, h := range r.Hops {
			if l := k.link(h.Link); !taken && l.Up && l.Carrier {
				expected[r.To] = append(expected[r.To], h)
			}
		}
	}
	if len(got) != len(expected) {
		t.Fatalf("routes %v, want %v", got, expected)
	}
	for _, r := range got {
		if !reflect.DeepEqual(r.Hops, expected[r.To]) || r.Metric != Metric || r.Src.Is4() != r.To.Addr().Is4() {
			t.Fatalf("route %v with metric %d, want hops %v", r.Route, r.Metric, expected[r.To])
		}
	}
}
