package bird

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxECMP bounds the next hops of one route.
const maxECMP = 16

// KernelProtocol and KernelMetric mark BIRD's routes in the kernel.
const (
	KernelProtocol = 12
	KernelMetric   = 32
)

// port is a cable seen from one of its ends.
type port struct {
	link, key  string
	peer       Node
	local, far []netip.Addr // of one cable, in the order of its Ends
}

func (t Topology) ports(name string) (out []port) {
	for _, c := range t.Cables {
		p := port{key: c.Key}
		switch name {
		case c.Host:
			p.link, p.peer = c.HostLink, t.must(c.Spine)
			for _, e := range c.Ends {
				p.local, p.far = append(p.local, e.Host), append(p.far, e.Spine)
			}
		case c.Spine:
			p.link, p.peer = c.SpineLink, t.must(c.Host)
			for _, e := range c.Ends {
				p.local, p.far = append(p.local, e.Spine), append(p.far, e.Host)
			}
		default:
			continue
		}
		out = append(out, p)
	}
	return out
}

func (t Topology) must(name string) Node { n, _ := t.Node(name); return n }

// writer puts a configuration together.
type writer struct {
	strings.Builder
	t     Topology
	n     Node
	ports []port
}

func (w *writer) f(format string, args ...any) { fmt.Fprintf(&w.Builder, format+"\n", args...) }

// Config is BIRD's configuration of one node. The topology is in normal form.
//
// What keeps a lying neighbour harmless: a node announces its own addresses
// (a spine: hosts'), a spine takes from a port what belongs to the host there
// and nothing else, and a host takes single addresses inside Range that are
// not its own.
func (t Topology) Config(name string) (string, error) {
	n, ok := t.Node(name)
	if !ok {
		return "", invalid("node: %q is not in the topology", name)
	}
	w := &writer{t: t, n: n, ports: t.ports(name)}
	w.f("# Written by cairn for %s; changes are lost.", name)
	w.f("router id %v;\nlog stderr { warning, error, fatal, bug, auth, remote };\nprotocol device { scan time 10; }", n.Addrs[0])
	for _, r := range t.Range {
		w.family(r)
	}
	if !t.BFD.Off && len(w.ports) > 0 {
		w.f("protocol bfd bfd1 {\n  accept direct;")
		for _, p := range w.ports {
			w.f("  interface \"%s\" { min rx interval %d ms; min tx interval %d ms; idle tx interval %d ms; multiplier %d; };",
				p.link, t.BFD.IntervalMs, t.BFD.IntervalMs, t.BFD.IntervalMs*3, t.BFD.Multiplier)
		}
		w.f("}")
	}
	return w.String(), nil
}

// fam is "4" or "6".
func fam(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// own is the node's address of a family.
func own(n Node, of netip.Addr) (netip.Addr, bool) {
	for _, a := range n.Addrs {
		if a.Is4() == of.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// family writes all that belongs to one address family.
func (w *writer) family(r netip.Prefix) {
	f, bits := fam(r.Addr()), r.Addr().BitLen()
	me, has := own(w.n, r.Addr())
	if has {
		w.f("protocol static own%s { ipv%s; route %v/%d unreachable; }", f, f, me, bits)
		w.f("filter to_kernel%s { if source = RTS_STATIC then reject; krt_prefsrc = %v; accept; }", f, me)
	} else {
		w.f("filter to_kernel%s { if source = RTS_STATIC then reject; accept; }", f)
	}
	w.f("protocol kernel kernel%s { scan time 10; merge paths on limit %d; metric %d; ipv%s { import none; export filter to_kernel%s; }; }", f, maxECMP, KernelMetric, f, f)
	notMine := ""
	if has {
		notMine = fmt.Sprintf(" && net != %v/%d", me, bits)
	}
	w.f("filter from_spine%s { if net ~ [ %v{%d,%d} ]%s then accept; reject; }", f, r, bits, bits, notMine)
	if w.n.Spine {
		w.f("filter announce%s { if net ~ [ %v{%d,%d} ] then accept; reject; }", f, r, bits, bits)
	} else {
		w.f("filter announce%s { if source = RTS_STATIC then accept; reject; }", f)
	}
	for i, p := range w.ports {
		if a, ok := own(p.peer, r.Addr()); ok {
			w.f("filter from_port%d_%s { if net = %v/%d then accept; reject; }", i, f, a, bits)
		} else {
			w.f("filter from_port%d_%s { reject; }", i, f)
		}
	}
	switch w.t.Protocol {
	case BGP:
		w.bgp(f)
	case RIP:
		w.rip(f)
	case OSPF:
		w.ospf(f)
	}
}

// from is the import filter of a port.
func (w *writer) from(i int, f string) string {
	if w.n.Spine {
		return fmt.Sprintf("from_port%d_%s", i, f)
	}
	return "from_spine" + f
}

func (w *writer) bfd() string {
	if w.t.BFD.Off {
		return ""
	}
	return " bfd on;"
}

func (w *writer) bgp(f string) {
	for i, p := range w.ports {
		for j, local := range p.local {
			if fam(local) != f {
				continue
			}
			key := ""
			if p.key != "" {
				key = fmt.Sprintf(" password \"%s\";", p.key)
			}
			w.f("protocol bgp %s {", session(p.peer.Name, f))
			w.f("  local %v as %d; neighbor %v as %d; interface \"%s\";", local, w.n.ASN, p.far[j], p.peer.ASN, p.link)
			// Hosts call, spines wait: two that call each other at once, as after
			// every healing, close one connection as an error, and wait for it.
			passive := ""
			if w.n.Spine {
				passive = " passive on;"
			}
			w.f("  ttl security on; hold time 9; keepalive time 3; connect retry time 1; connect delay time 1; error wait time 1,2;%s%s%s", passive, key, w.bfd())
			w.f("  ipv%s { import filter %s; export filter announce%s; import limit %d action restart; next hop self; };\n}", f, w.from(i, f), f, maxNodes)
		}
	}
}

// session is a protocol's name in BIRD: letters, digits and underscores.
func session(peer, f string) string { return "to_" + strings.ReplaceAll(peer, "-", "_") + "_" + f }

// rip: a host has one instance, which alone can make several next hops; a
// spine one per port, so that a lie is refused before it competes with what
// the other ports say.
func (w *writer) rip(f string) {
	kind, security := "rip", " ttl security on;"
	if f == "6" {
		kind = "rip ng"
	}
	iface := func(p port) {
		key := ""
		if p.key != "" && f == "4" { // RIPng leaves authentication to IPsec
			key = fmt.Sprintf(" authentication cryptographic; password \"%s\" { algorithm hmac sha256; };", p.key)
		}
		w.f("  interface \"%s\" { update time 2; timeout time 6; garbage time 6; check link on;%s%s%s };", p.link, security, key, w.bfd())
	}
	if !w.n.Spine {
		w.f("protocol %s rip%s {\n  ecmp on limit %d; ipv%s { import filter from_spine%s; export filter announce%s; };", kind, f, maxECMP, f, f, f)
		for _, p := range w.ports {
			iface(p)
		}
		w.f("}")
		return
	}
	for i, p := range w.ports {
		w.f("protocol %s %s {\n  ipv%s { import filter %s; export filter announce%s; };", kind, session(p.peer.Name, f), f, w.from(i, f), f)
		iface(p)
		w.f("}")
	}
}

// ospf: a host has one instance, a spine one per port, so that each host and its
// spines are an OSPF domain of their own, and spines pass addresses from one to
// the other. In one domain for all, anybody could announce anything to
// everybody; and a router may describe its links only once in 5 s (MinLSInterval
// of RFC 2328), so that the second of two changes went unheard for so long.
func (w *writer) ospf(f string) {
	version, security := "v2", " ttl security on;"
	if f == "6" {
		version = "v3"
	}
	iface := func(p port) {
		key := ""
		if p.key != "" {
			key = fmt.Sprintf(" authentication cryptographic; password \"%s\" { algorithm hmac sha256; };", p.key)
		}
		w.f("    interface \"%s\" { type ptp; hello 1; dead count 4; retransmit 2; check link on;%s%s%s };", p.link, security, key, w.bfd())
	}
	if !w.n.Spine {
		w.f("protocol ospf %s ospf%s {\n  ecmp on limit %d; merge external on; stub router on; ipv%s { import filter from_spine%s; export filter announce%s; };\n  area 0 {", version, f, maxECMP, f, f, f)
		for _, p := range w.ports {
			iface(p)
		}
		w.f("  };\n}")
		return
	}
	for i, p := range w.ports {
		w.f("protocol ospf %s %s {\n  ipv%s { import filter %s; export filter announce%s; };\n  area 0 {", version, session(p.peer.Name, f), f, w.from(i, f), f)
		iface(p)
		w.f("  };\n}")
	}
}
