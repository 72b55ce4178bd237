package netplane

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

func ip(s string) netip.Addr        { return netip.MustParseAddr(s) }
func pre(s string) netip.Prefix     { return netip.MustParsePrefix(s) }
func on(link string) Hop            { return Hop{Link: link} }
func via(addr, link string) Hop     { return Hop{Via: ip(addr), Link: link} }
func to(dst string, h ...Hop) Route { return Route{To: pre(dst), Hops: h} }

func link(name string, addrs ...string) Link {
	l := Link{Name: name}
	for _, a := range addrs {
		l.Addrs = append(l.Addrs, pre(a))
	}
	return l
}

// base is host 1 with two links.
func base(routes ...Route) Config {
	return Config{Addrs: []netip.Addr{ip("10.9.0.1"), ip("fd09::1")},
		Links: []Link{link("a", "10.1.0.1/24", "fd01::1/64"), link("b", "10.2.0.1/24")}, Routes: routes}
}

func TestNormalSortsAndFillsIn(t *testing.T) {
	c := Config{Addrs: []netip.Addr{ip("fd09::1"), ip("10.9.0.1")},
		Links: []Link{link("b", "10.2.0.1/24"), link("a", "fd01::1/64", "10.1.0.1/24")},
		Routes: []Route{to("fd09::2/128", via("fd01::2", "a")),
			{To: pre("10.9.0.2/32"), Src: ip("1.2.3.4"), Hops: []Hop{via("10.2.0.2", "b"), via("10.1.0.2", "a")}}}}
	n, err := c.Normal()
	if err != nil {
		t.Fatal(err)
	}
	want := base(to("10.9.0.2/32", via("10.1.0.2", "a"), via("10.2.0.2", "b")), to("fd09::2/128", via("fd01::2", "a")))
	want.Routes[0].Src, want.Routes[1].Src = ip("10.9.0.1"), ip("fd09::1")
	if !reflect.DeepEqual(n, want) {
		t.Errorf("got %+v\nwant %+v", n, want)
	}
	if again, err := n.Normal(); err != nil || !reflect.DeepEqual(again, n) {
		t.Errorf("not a fixed point: %+v, %v", again, err)
	}
	if c.Links[0].Name != "b" || c.Routes[1].Hops[0].Link != "b" || c.Routes[1].Src != ip("1.2.3.4") {
		t.Error("the caller's config was changed")
	}
	if _, err := (Config{}).Normal(); err != nil {
		t.Errorf("nothing wanted: %v", err)
	}
}

func TestSourceOfARoute(t *testing.T) {
	for src, want := range map[string]string{"10.1.0.1": "10.1.0.1", "10.2.0.1": "10.2.0.1", "10.1.0.2": "10.9.0.1", "fd01::1": "10.9.0.1", "10.9.0.1": "10.9.0.1"} {
		r := to("10.9.0.2/32", via("10.1.0.2", "a"))
		r.Src = ip(src)
		if n, err := base(r).Normal(); err != nil || n.Routes[0].Src != ip(want) {
			t.Errorf("source %s became %v (%v), want %s", src, n.Routes, err, want)
		}
	}
}

func TestNormalRefuses(t *testing.T) {
	many := func(n int) (c Config) {
		c = base()
		for i := range n {
			c.Routes = append(c.Routes, Route{To: netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32), Hops: []Hop{on("a")}})
		}
		return c
	}
	hops := make([]Hop, MaxHops+1)
	links := make([]Link, MaxLinks+1)
	for i, c := range []struct {
		cfg  Config
		kind status.Kind
		text string
	}{
		{Config{Addrs: []netip.Addr{ip("127.0.0.1")}}, status.Invalid, "127.0.0.1 cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("0.0.0.0")}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("224.0.0.1")}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("255.255.255.255")}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("fe80::1")}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("::ffff:10.0.0.1")}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{{}}}, status.Invalid, "cannot be a storage address"},
		{Config{Addrs: []netip.Addr{ip("10.9.0.1"), ip("10.9.0.2")}}, status.Invalid, "are both storage addresses"},
		{Config{Links: []Link{link("lo")}}, status.Invalid, "lo is not a link"},
		{Config{Links: []Link{link("")}}, status.Invalid, `"" is not the name`},
		{Config{Links: []Link{link("a/../../x")}}, status.Invalid, "is not the name"},
		{Config{Links: []Link{link("..")}}, status.Invalid, "is not the name"},
		{Config{Links: []Link{link("sixteen-letters-")}}, status.Invalid, "is not the name"},
		{Config{Links: []Link{link("a"), link("a")}}, status.Invalid, "link a is listed twice"},
		{Config{Links: links}, status.TooBig, "65 links are too many"},
		{Config{Links: []Link{{Name: "a", Addrs: make([]netip.Prefix, MaxAddrs+1)}}}, status.TooBig, "link a has 9 addresses"},
		{Config{Links: []Link{link("a", "127.0.0.1/8")}}, status.Invalid, "cannot be an address of link a"},
		{Config{Links: []Link{{Name: "a", Addrs: make([]netip.Prefix, 1)}}}, status.Invalid, "cannot be an address of link a"},
		{Config{Links: []Link{link("a", "10.1.0.1/24"), link("b", "10.1.0.1/16")}}, status.Invalid, "address 10.1.0.1 is listed twice"},
		{Config{Addrs: []netip.Addr{ip("10.9.0.1")}, Links: []Link{link("a", "10.9.0.1/24")}}, status.Invalid, "address 10.9.0.1 is listed twice"},
		{base(to("0.0.0.0/0", on("a"))), status.Invalid, "0.0.0.0/0 is no destination"},
		{base(to("10.9.0.2/24", on("a"))), status.Invalid, "10.9.0.2/24 is no destination"},
		{base(to("127.0.0.0/8", on("a"))), status.Invalid, "is no destination"},
		{base(Route{Hops: []Hop{on("a")}}), status.Invalid, "is no destination"},
		{base(to("10.9.0.1/32", on("a"))), status.Invalid, "is one to our own storage address"},
		{base(to("10.9.0.2/32")), status.Invalid, "has 0 hops"},
		{base(Route{To: pre("10.9.0.0/16"), Refuse: true, Hops: []Hop{on("a")}}), status.Invalid, "it can do one of both"},
		{base(Route{To: pre("10.9.0.2/32"), Hops: hops}), status.Invalid, "has 17 hops"},
		{base(to("10.9.0.2/32", on("a"), on("a"))), status.Invalid, "has the hop dev a twice"},
		{base(to("10.9.0.2/32", on("c"))), status.Invalid, `over link "c", which is not listed`},
		{base(to("10.9.0.2/32", on("a")), to("10.9.0.2/32", on("b"))), status.Invalid, "two routes to 10.9.0.2/32"},
		{base(to("fd09::2/128", on("a"))), status.Invalid, "needs the neighbour's address on that link"},
		{base(to("10.9.0.2/32", via("fd01::2", "a"))), status.Invalid, "of the same family"},
		{base(to("10.9.0.2/32", via("224.0.0.1", "a"))), status.Invalid, "of the same family"},
		{base(to("10.9.0.2/32", via("10.9.0.1", "a"))), status.Invalid, "which is our own address"},
		{base(to("10.9.0.2/32", via("10.2.0.1", "a"))), status.Invalid, "which is our own address"},
		{many(MaxRoutes + 1), status.TooBig, "65537 routes are too many"},
	} {
		if _, err := c.cfg.Normal(); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("case %d: got %v, want %v with %q", i, err, c.kind, c.text)
		}
	}
	if _, err := many(MaxRoutes).Normal(); err != nil {
		t.Errorf("as many as possible: %v", err)
	}
	if _, err := base(to("10.9.0.0/16", via("10.1.0.2", "a")), to("fd09::/64", on("a")), to("fd0a::/64", via("fe80::1", "a"))).Normal(); err != nil {
		t.Errorf("ranges around our own address, and a link-local gateway: %v", err)
	}
}
