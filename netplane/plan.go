package netplane

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// State is what the kernel has.
type State struct {
	Links   []LinkState
	Routes  []Installed       // of the main table, anybody's
	Sysctls map[string]string // those of Settings that exist
}

// LinkState is a link as the kernel has it.
type LinkState struct {
	Name    string
	Up      bool // switched on
	Carrier bool // somebody is at the other end
	Addrs   []netip.Prefix
}

// Installed is a route as the kernel has it.
type Installed struct {
	Route
	Protocol int
	Metric   int
}

// The kernel settings Plan looks at, as paths below /proc/sys: a link's name
// may hold dots.
const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
	// Hash policy 1 takes the ports into account: by default all connections
	// between two hosts would take the same one of several hops.
	hash4 = "net/ipv4/fib_multipath_hash_policy"
	hash6 = "net/ipv6/fib_multipath_hash_policy"
	// At 2 a connection begins with small packets and finds out what passes: a
	// path that loses big ones without a word (a wrong MTU, an ICMP filter)
	// slows connections instead of stopping them. At 1 it would notice after
	// three timeouts, and storage connections are given up before.
	mtuProbing = "net/ipv4/tcp_mtu_probing" // of both families
)

// dad is duplicate address detection on a link. It keeps the link-local
// address, and with it all forwarding, back for 1 to 2 s each time the link
// comes up.
func dad(link string) string { return "net/ipv6/conf/" + link + "/accept_dad" }

// Settings are the kernel settings a State must tell for a config.
func Settings(want Config) []string {
	names := []string{forward4, forward6, hash4, hash6, mtuProbing}
	for _, l := range want.Links {
		names = append(names, dad(l.Name))
	}
	return names
}

// Op is what a change does.
type Op string

// The operations, in the order a plan has them: nothing refers to what comes
// after it, and what still carries traffic is removed last.
const (
	SetSysctl    Op = "set"
	SetUp        Op = "set up"
	AddAddr      Op = "add address"
	AddRoute     Op = "add route"     // must fail when there is one
	ReplaceRoute Op = "replace route" // of our own
	RemoveRoute  Op = "remove route"
	RemoveAddr   Op = "remove address"
)

// Change is one step.
type Change struct {
	Op     Op
	Link   string       // SetUp, AddAddr, RemoveAddr
	Addr   netip.Prefix // AddAddr, RemoveAddr
	Route  Route        // of the route operations
	Metric int          // of the route
	Sysctl string       // SetSysctl
	Value  string
}

// String is the change for a person.
func (c Change) String() string {
	switch c.Op {
	case SetSysctl:
		return fmt.Sprintf("set %s to %s", c.Sysctl, c.Value)
	case SetUp:
		return "set link " + c.Link + " up"
	case AddAddr:
		return fmt.Sprintf("add address %v to %s", c.Addr, c.Link)
	case RemoveAddr:
		return fmt.Sprintf("remove address %v from %s", c.Addr, c.Link)
	}
	return fmt.Sprintf("%s %v", c.Op, c.Route)
}

// String is the route as ip-route(8) would take it.
func (r Route) String() string {
	var b strings.Builder
	if r.Refuse {
		b.WriteString("unreachable ")
	}
	b.WriteString(r.To.String())
	if r.Src.IsValid() {
		b.WriteString(" src " + r.Src.String())
	}
	for _, h := range r.Hops {
		if len(r.Hops) > 1 {
			b.WriteString(" nexthop")
		}
		b.WriteString(" " + h.String())
	}
	return b.String()
}

// String is "via ADDR dev LINK".
func (h Hop) String() string {
	if !h.Via.IsValid() {
		return "dev " + h.Link
	}
	return fmt.Sprintf("via %v dev %s", h.Via, h.Link)
}

// Memory is what must be remembered from one Plan to the next, because the
// kernel does not tell it: addresses do not say whose they are, links not
// whether they were ever switched on for us. The zero value remembers nothing.
type Memory struct {
	addrs map[linkAddr]bool // wanted by some config, and not removed yet
	on    map[string]bool   // links of the config that have been up
}

type linkAddr struct {
	link string
	addr netip.Prefix
}

// Want remembers a config that is about to be planned for.
func (m *Memory) Want(c Config) {
	if m.addrs == nil {
		m.addrs = map[linkAddr]bool{}
	}
	maps.Copy(m.addrs, addrsOf(c))
	on := map[string]bool{}
	for _, l := range c.Links {
		on[l.Name] = m.on[l.Name]
	}
	m.on = on
}

// Saw remembers which links are up.
func (m *Memory) Saw(have State) {
	for _, l := range have.Links {
		if _, ours := m.on[l.Name]; ours && l.Up {
			m.on[l.Name] = true
		}
	}
}

// addrsOf is every address of a config on its link.
func addrsOf(c Config) map[linkAddr]bool {
	out := map[linkAddr]bool{}
	for _, l := range append([]Link{{Name: "lo", Addrs: hostPrefixes(c.Addrs)}}, c.Links...) {
		for _, a := range l.Addrs {
			out[linkAddr{l.Name, a}] = true
		}
	}
	return out
}

// Plan returns the changes from what the kernel has to what is wanted, in
// order, and what keeps the rest from being had, each one sentence. The config
// is in normal form, and the memory has been told of it.
//
// Hops over a link that is missing, down or without carrier are left out, and
// routes without hops removed, so that traffic fails at once or takes another
// way. A link is switched on when it is new in the config, never again: who
// switches it off afterwards means it. Routes of other protocols are never
// touched, nor addresses that no config ever had.
func Plan(want Config, mem *Memory, have State) (changes []Change, problems []string) {
	p := planner{want: want, have: have, links: map[string]*LinkState{}}
	for i := range have.Links {
		p.links[have.Links[i].Name] = &have.Links[i]
	}
	p.sysctls()
	p.addresses(mem)
	add, remove := p.routes()
	p.changes = append(p.changes, add...)
	p.changes = append(p.changes, remove...)
	p.oldAddresses(mem)
	return p.changes, p.problems
}

type planner struct {
	want     Config
	have     State
	links    map[string]*LinkState
	changes  []Change
	problems []string
}

func (p *planner) add(c Change) { p.changes = append(p.changes, c) }

func (p *planner) problem(format string, args ...any) {
	p.problems = append(p.problems, fmt.Sprintf(format, args...))
}

// sysctls asks for settings; they are never set back, since others may rely on
// them by then.
func (p *planner) sysctls() {
	need := map[string]string{}
	for _, a := range p.want.Addrs {
		switch {
		case p.want.Forward && a.Is4():
			need[forward4] = "1"
		case p.want.Forward:
			need[forward6] = "1"
		}
	}
	for _, r := range p.want.Routes {
		switch {
		case len(r.Hops) > 1 && r.To.Addr().Is4():
			need[hash4] = "1"
		case len(r.Hops) > 1:
			need[hash6] = "1"
		}
	}
	if len(p.want.Links) > 0 && !p.want.Forward {
		need[mtuProbing] = "2"
	}
	for _, l := range p.want.Links {
		if p.links[l.Name] != nil && slices.ContainsFunc(l.Addrs, func(a netip.Prefix) bool { return a.Addr().Is6() }) {
			need[dad(l.Name)] = "0"
		}
	}
	for _, name := range Settings(p.want) {
		have, ok := p.have.Sysctls[name]
		switch {
		case need[name] == "" || need[name] == have:
		case !ok:
			p.problem("this kernel has no setting %s, which should be %s", name, need[name])
		default:
			p.add(Change{Op: SetSysctl, Sysctl: name, Value: need[name]})
		}
	}
}

// addresses wants lo with the storage addresses and the links with theirs.
func (p *planner) addresses(mem *Memory) {
	var links []Link
	if len(p.want.Addrs) > 0 {
		links = append(links, Link{Name: "lo", Addrs: hostPrefixes(p.want.Addrs)})
	}
	for _, l := range append(links, p.want.Links...) {
		have := p.links[l.Name]
		if have == nil {
			p.problem("link %s does not exist: create it, or take it out of the configuration", l.Name)
			continue
		}
		up := have.Up
		if !up && !mem.on[l.Name] {
			p.add(Change{Op: SetUp, Link: l.Name})
			up = true
		}
		for _, a := range l.Addrs {
			// An IPv6 address given to a link that is down is taken away again.
			if !slices.Contains(have.Addrs, a) && (up || a.Addr().Is4()) {
				p.add(Change{Op: AddAddr, Link: l.Name, Addr: a})
			}
		}
	}
}

// oldAddresses removes those of earlier configs that are wanted no more.
func (p *planner) oldAddresses(mem *Memory) {
	wanted := addrsOf(p.want)
	var old []Change
	for a := range mem.addrs {
		if have := p.links[a.link]; have != nil && slices.Contains(have.Addrs, a.addr) && !wanted[a] {
			old = append(old, Change{Op: RemoveAddr, Link: a.link, Addr: a.addr})
		}
	}
	slices.SortFunc(old, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Link, b.Link), comparePrefix(a.Addr, b.Addr))
	})
	p.changes = append(p.changes, old...)
}

func hostPrefixes(addrs []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addrs {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

// routes compares wanted routes with ours in the kernel. Direct ones are added
// first and removed last: a neighbour's address may be reachable by them only.
func (p *planner) routes() (add, remove []Change) {
	ours, others := map[netip.Prefix][]Installed{}, map[netip.Prefix][]Installed{}
	for _, r := range p.have.Routes {
		if r.Protocol == Protocol {
			ours[r.To] = append(ours[r.To], r)
		} else {
			others[r.To] = append(others[r.To], r)
		}
	}
	waiting := map[string]int{}
	for _, r := range p.want.Routes {
		r.Hops = p.usable(r.Hops, waiting)
		if len(r.Hops) == 0 && !r.Refuse || !p.free(r, others[r.To]) {
			continue // if there is an old one of ours, it is removed below
		}
		same := slices.IndexFunc(ours[r.To], func(o Installed) bool { return o.Metric == Metric })
		switch {
		case same < 0:
			add = append(add, Change{Op: AddRoute, Route: r, Metric: Metric})
		case !equal(ours[r.To][same].Route, r):
			add = append(add, Change{Op: ReplaceRoute, Route: r, Metric: Metric})
			fallthrough
		default:
			ours[r.To] = slices.Delete(ours[r.To], same, same+1)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(waiting)) {
		p.problem("link %s is %s: hops of %d routes wait for it", name, p.why(name), waiting[name])
	}
	for _, list := range ours {
		for _, r := range list {
			remove = append(remove, Change{Op: RemoveRoute, Route: r.Route, Metric: r.Metric})
		}
	}
	slices.SortStableFunc(add, func(a, b Change) int { return rank(a) - rank(b) })
	slices.SortFunc(remove, func(a, b Change) int {
		if d := rank(b) - rank(a); d != 0 {
			return d
		}
		return comparePrefix(a.Route.To, b.Route.To)
	})
	return add, remove
}

// rank is 0 for a route straight onto links, else 1.
func rank(c Change) int {
	for _, h := range c.Route.Hops {
		if h.Via.IsValid() {
			return 1
		}
	}
	return 0
}

// usable are the hops whose links work; the others' links are counted.
func (p *planner) usable(hops []Hop, waiting map[string]int) []Hop {
	var out []Hop
	for _, h := range hops {
		if l := p.links[h.Link]; l != nil && l.Up && l.Carrier {
			out = append(out, h)
		} else {
			waiting[h.Link]++
		}
	}
	return out
}

func (p *planner) why(link string) string {
	switch l := p.links[link]; {
	case l == nil:
		return "missing"
	case !l.Up:
		return "down"
	}
	return "without carrier"
}

// free says whether a route may be installed beside those of others.
func (p *planner) free(r Route, others []Installed) bool {
	for _, o := range others {
		if o.Metric == Metric {
			p.problem("the route to %v cannot be installed: one of protocol %d with metric %d is there already; remove that", r.To, o.Protocol, Metric)
			return false
		}
		if o.Metric < Metric {
			p.problem("the route to %v has no effect while one of protocol %d with metric %d is there", r.To, o.Protocol, o.Metric)
		}
	}
	return true
}

// equal compares routes whatever the order of their hops.
func equal(a, b Route) bool {
	return a.To == b.To && a.Src == b.Src && a.Refuse == b.Refuse && slices.Equal(slices.SortedFunc(slices.Values(a.Hops), compareHop), b.Hops)
}
