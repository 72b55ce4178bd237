// Package netplane decides what a host's kernel must have for the storage
// network: its storage address, its links, its direct and static routes.
//
// Duty: the wanted network (Config), checked at the door, and the ordered
// changes that lead to it from what the kernel has (Plan). Floor: F2. It
// touches no kernel (netplane/kernel does), speaks no routing protocol
// (netplane/bird), and opens no connection (netplane/link).
package netplane

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// Protocol is the rtnetlink protocol number of every route of ours, and of no
// other route: it is how they are told apart. It is not among the numbers that
// the kernel's rtnetlink.h or iproute2's rt_protos name (12 is BIRD, 186 BGP).
const Protocol = 176

// Metric is that of our routes. Nobody else's route has the same destination
// and metric by accident, so ours never replace another's; BIRD's (32) and
// hand-made ones (0) come first, and ours stand in when those go.
const Metric = 176

// Limits of a Config.
const (
	MaxLinks  = 64
	MaxAddrs  = 8 // of one link
	MaxRoutes = 65536
	MaxHops   = 16 // of one route
)

// Config is the wanted network of one host.
type Config struct {
	Addrs   []netip.Addr // own storage addresses: one IPv4, one IPv6, or both; on lo, they outlive any link
	Links   []Link
	Routes  []Route
	Forward bool // pass on packets of other hosts
}

// Link is a network interface of the storage network. It must exist.
type Link struct {
	Name  string
	Addrs []netip.Prefix // may be none: storage addresses are enough between IPv4 neighbours
}

// Route says how a storage address, or a range of them, is reached.
type Route struct {
	To   netip.Prefix
	Hops []Hop // more than one: the kernel spreads connections over those that are up
	// Refuse makes it the way to nowhere: what no narrower route leads on is
	// refused at once, instead of leaving by the default route. It has no hops.
	Refuse bool
	// Src is the address our own connections along the route come from.
	// Config: an address of one of our links; anything else becomes our storage
	// address of the family.
	Src netip.Addr
}

// Hop is a way to go: to a neighbour's address on a link, or, without Via,
// straight onto the link.
type Hop struct {
	Via  netip.Addr
	Link string
}

// Normal returns the config checked and in normal form: sorted, and with every
// Src filled in. Errors are Invalid and name the entry.
func (c Config) Normal() (Config, error) {
	n := Config{Forward: c.Forward, Addrs: slices.SortedFunc(slices.Values(c.Addrs), netip.Addr.Compare)}
	if err := checkOwn(n.Addrs); err != nil {
		return Config{}, err
	}
	links, err := normalLinks(c.Links, n.Addrs)
	if err != nil {
		return Config{}, err
	}
	n.Links = links
	if len(c.Routes) > MaxRoutes {
		return Config{}, status.Errorf(status.TooBig, "%d routes are too many: at most %d", len(c.Routes), MaxRoutes)
	}
	seen := make(map[netip.Prefix]bool, len(c.Routes))
	for _, r := range c.Routes {
		if r, err = n.normalRoute(r); err != nil {
			return Config{}, err
		}
		if seen[r.To] {
			return Config{}, invalid("there are two routes to %v: put both ways into one", r.To)
		}
		seen[r.To] = true
		n.Routes = append(n.Routes, r)
	}
	slices.SortFunc(n.Routes, func(a, b Route) int { return comparePrefix(a.To, b.To) })
	return n, nil
}

func checkOwn(addrs []netip.Addr) error {
	for i, a := range addrs { // sorted: IPv4 before IPv6
		if !unicast(a) || a.IsLinkLocalUnicast() {
			return invalid("%v cannot be a storage address: it must be an ordinary unicast address", a)
		}
		if i > 0 && addrs[i-1].Is4() == a.Is4() {
			return invalid("%v and %v are both storage addresses: a host has one of each family", addrs[i-1], a)
		}
	}
	return nil
}

// unicast says whether a may be a host's. Zones and IPv4-mapped IPv6 would be
// two spellings of one address.
func unicast(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() &&
		a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func normalLinks(links []Link, own []netip.Addr) ([]Link, error) {
	if len(links) > MaxLinks {
		return nil, status.Errorf(status.TooBig, "%d links are too many: at most %d", len(links), MaxLinks)
	}
	var out []Link
	names, addrs := map[string]bool{}, map[netip.Addr]bool{}
	for _, a := range own {
		addrs[a] = true
	}
	for _, l := range links {
		// dev_valid_name of the kernel: at most 15 bytes, no slash, colon or blank.
		if l.Name == "" || len(l.Name) > 15 || l.Name == "." || l.Name == ".." || strings.ContainsAny(l.Name, "/: \t\n\v\f\r\x00") {
			return nil, invalid("%q is not the name of a link", l.Name)
		}
		if l.Name == "lo" {
			return nil, invalid("lo is not a link to anybody: list the storage address instead")
		}
		if names[l.Name] {
			return nil, invalid("link %s is listed twice", l.Name)
		}
		names[l.Name] = true
		if len(l.Addrs) > MaxAddrs {
			return nil, status.Errorf(status.TooBig, "link %s has %d addresses: at most %d", l.Name, len(l.Addrs), MaxAddrs)
		}
		l.Addrs = slices.SortedFunc(slices.Values(l.Addrs), comparePrefix)
		for _, p := range l.Addrs {
			if !p.IsValid() || !unicast(p.Addr()) || p.Bits() == 0 {
				return nil, invalid("%v cannot be an address of link %s", p, l.Name)
			}
			if addrs[p.Addr()] {
				return nil, invalid("address %v is listed twice", p.Addr())
			}
			addrs[p.Addr()] = true
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b Link) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// normalRoute checks a route against the config's addresses and links.
func (c Config) normalRoute(r Route) (Route, error) {
	if !r.To.IsValid() || r.To.Bits() == 0 || r.To != r.To.Masked() || !unicast(r.To.Addr()) {
		return Route{}, invalid("%v is no destination: use one address or a range, not everything, without bits after the prefix", r.To)
	}
	src := r.Src
	r.Src = netip.Addr{}
	for _, a := range c.Addrs {
		// A range may contain it: the kernel looks for own addresses first.
		if r.To.Addr() == a && r.To.IsSingleIP() {
			return Route{}, invalid("the route to %v is one to our own storage address", r.To)
		}
		if a.Is4() == r.To.Addr().Is4() {
			r.Src = a
		}
	}
	if src.IsValid() && src.Is4() == r.To.Addr().Is4() && slices.ContainsFunc(c.Links, func(l Link) bool {
		return slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Addr() == src })
	}) {
		r.Src = src
	}
	if r.Refuse {
		if len(r.Hops) > 0 {
			return Route{}, invalid("the route to %v refuses what it is given, and has hops: it can do one of both", r.To)
		}
		r.Src, r.Hops = netip.Addr{}, nil
		return r, nil
	}
	if len(r.Hops) == 0 || len(r.Hops) > MaxHops {
		return Route{}, invalid("the route to %v has %d hops: 1 to %d are possible", r.To, len(r.Hops), MaxHops)
	}
	r.Hops = slices.SortedFunc(slices.Values(r.Hops), compareHop)
	for i, h := range r.Hops {
		if i > 0 && h == r.Hops[i-1] {
			return Route{}, invalid("the route to %v has the hop %v twice", r.To, h)
		}
		if err := c.checkHop(r, h); err != nil {
			return Route{}, err
		}
	}
	return r, nil
}

func (c Config) checkHop(r Route, h Hop) error {
	if !slices.ContainsFunc(c.Links, func(l Link) bool { return l.Name == h.Link }) {
		return invalid("the route to %v goes over link %q, which is not listed", r.To, h.Link)
	}
	if !h.Via.IsValid() {
		// A neighbour answers ARP for any address it has, but neighbour
		// solicitations only for addresses of that very link, so an address on
		// its lo is never found.
		if r.To.Addr().Is6() && r.To.IsSingleIP() {
			return invalid("the route to %v over %s needs the neighbour's address on that link (via): an IPv6 address on lo is not answered for on a link", r.To, h.Link)
		}
		return nil
	}
	if !unicast(h.Via) || h.Via.Is4() != r.To.Addr().Is4() {
		return invalid("the route to %v cannot go via %v: it must be a unicast address of the same family", r.To, h.Via)
	}
	if slices.Contains(c.Addrs, h.Via) || slices.ContainsFunc(c.Links, func(l Link) bool {
		return slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Addr() == h.Via })
	}) {
		return invalid("the route to %v goes via %v, which is our own address", r.To, h.Via)
	}
	return nil
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func compareHop(a, b Hop) int {
	return cmp.Or(cmp.Compare(a.Link, b.Link), a.Via.Compare(b.Via))
}

func invalid(format string, args ...any) error {
	return status.Errorf(status.Invalid, format, args...)
}
