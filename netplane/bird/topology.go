// Package bird runs BIRD 2 as the routing daemon of one node of the storage
// network.
//
// Duty: a typed topology, checked at the door and turned into a configuration
// that BIRD itself has checked; one supervised process in one network
// namespace; soft reconfiguration, and its state read over the control socket.
// Floor: F3. It sets no address and no static route (netplane/kernel does),
// and chooses no path for a connection (netplane/link).
package bird

import (
	"net/netip"
	"regexp"
	"slices"

	"github.com/cairnstore/cairn/proto/status"
)

// Protocol is how nodes tell each other what they reach.
type Protocol string

// The protocols. BGP is the default: its filters work per port, so a node that
// lies reaches no further than its own spine.
const (
	BGP  Protocol = "bgp"
	OSPF Protocol = "ospf"
	RIP  Protocol = "rip"
	// Static: no daemon; every host knows the ways to every other from the
	// topology (netplane/agent). Only links without carrier are noticed.
	Static Protocol = "static"
)

// Limits of a topology.
const (
	maxNodes  = 4096
	maxCables = 65536
	maxEnds   = 2 // one of each family
)

// Topology is a leaf-spine fabric: hosts, spines, and the cables between them.
// All nodes are configured from the same one.
type Topology struct {
	Protocol Protocol       `toml:"protocol" json:"protocol"` // "": BGP
	Range    []netip.Prefix `toml:"range" json:"range"`       // storage addresses are inside; at most one of each family
	Nodes    []Node         `toml:"node" json:"nodes"`
	Cables   []Cable        `toml:"cable" json:"cables"`
	BFD      BFD            `toml:"bfd" json:"bfd"`
}

// Node is a host or a spine.
type Node struct {
	Name  string       `toml:"name" json:"name"`
	Spine bool         `toml:"spine" json:"spine"` // passes on packets of others
	ASN   uint32       `toml:"asn" json:"asn"`     // for BGP; private ones start at 4200000000
	Addrs []netip.Addr `toml:"addrs" json:"addrs"` // stable storage addresses; the IPv4 one is needed, it is the router's identity
}

// Cable joins a host and a spine.
type Cable struct {
	Host      string `toml:"host" json:"host"`
	HostLink  string `toml:"host_link" json:"hostLink"` // interface at the host's end
	Spine     string `toml:"spine" json:"spine"`
	SpineLink string `toml:"spine_link" json:"spineLink"`
	Ends      []End  `toml:"end" json:"ends"`
	Key       string `toml:"key" json:"-"` // shared secret of both ends (BGP: MD5, else cryptographic); "": none
}

// End is the pair of addresses of a cable, of one family.
type End struct {
	Host  netip.Addr `toml:"host" json:"host"`
	Spine netip.Addr `toml:"spine" json:"spine"`
}

// BFD notices a silent neighbour. The zero value means 100 ms × 3.
type BFD struct {
	Off        bool `toml:"off" json:"off"`
	IntervalMs int  `toml:"interval_ms" json:"intervalMs"`
	Multiplier int  `toml:"multiplier" json:"multiplier"`
}

var (
	nodeName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,30}$`)
	linkName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,15}$`)
	keyText  = regexp.MustCompile(`^[!#-~]{1,64}$`) // printable, no blank, no quote
)

// Normal returns the topology checked, with defaults filled in. Errors are
// Invalid and begin with the field.
func (t Topology) Normal() (Topology, error) {
	if t.Protocol == "" {
		t.Protocol = BGP
	}
	if t.BFD.IntervalMs == 0 {
		t.BFD.IntervalMs = 100
	}
	if t.BFD.Multiplier == 0 {
		t.BFD.Multiplier = 3
	}
	switch {
	case t.Protocol != BGP && t.Protocol != OSPF && t.Protocol != RIP && t.Protocol != Static:
		return t, invalid("protocol: %q is none of bgp, ospf, rip, static", t.Protocol)
	case t.BFD.IntervalMs < 10 || t.BFD.IntervalMs > 10_000:
		return t, invalid("bfd.interval_ms: %d is not between 10 and 10000", t.BFD.IntervalMs)
	case t.BFD.Multiplier < 2 || t.BFD.Multiplier > 50:
		return t, invalid("bfd.multiplier: %d is not between 2 and 50", t.BFD.Multiplier)
	case len(t.Nodes) > maxNodes:
		return t, invalid("node: %d are too many, at most %d", len(t.Nodes), maxNodes)
	case len(t.Cables) > maxCables:
		return t, invalid("cable: %d are too many, at most %d", len(t.Cables), maxCables)
	}
	if err := t.checkRange(); err != nil {
		return t, err
	}
	taken := map[netip.Addr]string{}
	if err := t.checkNodes(taken); err != nil {
		return t, err
	}
	return t, t.checkCables(taken)
}

func (t Topology) checkRange() error {
	if len(t.Range) == 0 || len(t.Range) > 2 {
		return invalid("range: %d are given, one of each family is possible", len(t.Range))
	}
	for i, p := range t.Range {
		if !p.IsValid() || p != p.Masked() || p.Bits() == 0 || p.Addr().IsMulticast() || p.Addr().IsLoopback() {
			return invalid("range[%d]: %v is no range of unicast addresses", i, p)
		}
		if i > 0 && p.Addr().Is4() == t.Range[0].Addr().Is4() {
			return invalid("range[%d]: %v and %v are of the same family", i, t.Range[0], p)
		}
	}
	return nil
}

func (t Topology) checkNodes(taken map[netip.Addr]string) error {
	asns, names := map[uint32]string{}, map[string]bool{}
	for i, n := range t.Nodes {
		if !nodeName.MatchString(n.Name) || names[n.Name] {
			return invalid("node[%d].name: %q is not a new name of a-z, 0-9 and - (at most 31)", i, n.Name)
		}
		names[n.Name] = true
		if t.Protocol == BGP {
			if other, used := asns[n.ASN]; n.ASN == 0 || used {
				return invalid("node[%d].asn: %d of %s must not be 0, nor another's (%s)", i, n.ASN, n.Name, other)
			}
			asns[n.ASN] = n.Name
		}
		if len(n.Addrs) == 0 || len(n.Addrs) > 2 || !n.Addrs[0].Is4() || len(n.Addrs) == 2 && !n.Addrs[1].Is6() {
			return invalid("node[%d].addrs: %s needs an IPv4 storage address, and may have an IPv6 one after it", i, n.Name)
		}
		for _, a := range n.Addrs {
			if a.Zone() != "" || !slices.ContainsFunc(t.Range, func(p netip.Prefix) bool { return p.Contains(a) }) {
				return invalid("node[%d].addrs: %v of %s is outside range %v", i, a, n.Name, t.Range)
			}
			if other := taken[a]; other != "" {
				return invalid("node[%d].addrs: %v of %s is %s's already", i, a, n.Name, other)
			}
			taken[a] = n.Name
		}
	}
	return nil
}

func (t Topology) checkCables(taken map[netip.Addr]string) error {
	links := map[[2]string]bool{}
	for i, c := range t.Cables {
		if n, ok := t.Node(c.Host); !ok || n.Spine {
			return invalid("cable[%d].host: %q is not a host of this topology", i, c.Host)
		}
		if n, ok := t.Node(c.Spine); !ok || !n.Spine {
			return invalid("cable[%d].spine: %q is not a spine of this topology", i, c.Spine)
		}
		for _, e := range [][2]string{{c.Host, c.HostLink}, {c.Spine, c.SpineLink}} {
			if !linkName.MatchString(e[1]) || e[1] == "lo" || links[e] {
				return invalid("cable[%d].link: %q of %s is not the name of a link that is free", i, e[1], e[0])
			}
			links[e] = true
		}
		if c.Key != "" && !keyText.MatchString(c.Key) {
			return invalid("cable[%d].key: use 1 to 64 printable characters without blanks and quotes", i)
		}
		if len(c.Ends) == 0 || len(c.Ends) > maxEnds || len(c.Ends) == 2 && c.Ends[0].Host.Is4() == c.Ends[1].Host.Is4() {
			return invalid("cable[%d].end: one pair of addresses of each family is possible", i)
		}
		for _, e := range c.Ends {
			for _, a := range []netip.Addr{e.Host, e.Spine} {
				if !a.IsValid() || a.Zone() != "" || a.IsMulticast() || a.IsUnspecified() || a.Is4() != e.Host.Is4() {
					return invalid("cable[%d].end: %v cannot be an address of it", i, a)
				}
				if slices.ContainsFunc(t.Range, func(p netip.Prefix) bool { return p.Contains(a) }) {
					return invalid("cable[%d].end: %v is inside range, which holds stable addresses only", i, a)
				}
				if other := taken[a]; other != "" {
					return invalid("cable[%d].end: %v is %s's already", i, a, other)
				}
				taken[a] = c.Host + "-" + c.Spine
			}
		}
	}
	return nil
}

// Node finds a node by name.
func (t Topology) Node(name string) (Node, bool) {
	for _, n := range t.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

func invalid(format string, args ...any) error {
	return status.Errorf(status.Invalid, format, args...)
}
