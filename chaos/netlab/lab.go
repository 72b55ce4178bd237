// Package netlab builds a leaf-spine storage network out of network namespaces
// on one machine, cuts it, and measures what connections notice.
//
// Duty: namespaces, cables, each node's network (by netplane/agent), cuts and
// probes. Floor: F5. The namespaces have no name and
// every process dies with this one: nothing is left, however it ends. It
// routes nothing itself.
package netlab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/proto/status"
)

// Limits of a lab.
const (
	MinSpines, MaxSpines = 1, 4
	MinHosts, MaxHosts   = 2, 8
)

// Config says what to build.
type Config struct {
	Dir      string // for the routing daemons' files; made if missing
	Spines   int
	Hosts    int
	Protocol bird.Protocol
	NoBFD    bool
	MTU      int          // of all cables; 0: 1500
	Bare     bool         // hosts get links and nothing else: what runs in them sees to the rest
	Log      *slog.Logger // nil: no log
}

// Lab is a running fabric.
type Lab struct {
	Topology bird.Topology
	cfg      Config
	nodes    map[string]*node
}

// node is one host or spine.
type node struct {
	name  string
	work  chan func()
	ended chan struct{}
	fd    netns.NsHandle
	nl    *netlink.Handle
	agent *agent.Agent // nil: somebody else's
}

// Topology is the fabric that a lab of this shape has. Plane s has the
// addresses 10.(100+s).h.0/31, the host's end is the odd one.
func Topology(protocol bird.Protocol, spines, hosts int, noBFD bool) bird.Topology {
	t := bird.Topology{Protocol: protocol, BFD: bird.BFD{Off: noBFD},
		Range: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("fd00:ca1f::/64")}}
	for h := 1; h <= hosts; h++ {
		t.Nodes = append(t.Nodes, bird.Node{Name: fmt.Sprintf("host-%d", h), ASN: uint32(4200000000 + h), Addrs: []netip.Addr{
			Stable(h), netip.MustParseAddr(fmt.Sprintf("fd00:ca1f::%x", h))}})
	}
	for s := 1; s <= spines; s++ {
		t.Nodes = append(t.Nodes, bird.Node{Name: fmt.Sprintf("spine-%d", s), Spine: true, ASN: uint32(4200001000 + s), Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 255, 1, byte(s)}), netip.MustParseAddr(fmt.Sprintf("fd00:ca1f::1:%x", s))}})
		for h := 1; h <= hosts; h++ {
			t.Cables = append(t.Cables, bird.Cable{Host: fmt.Sprintf("host-%d", h), HostLink: fmt.Sprintf("s%d", s), Spine: fmt.Sprintf("spine-%d", s),
				SpineLink: fmt.Sprintf("h%d", h), Key: "lab-secret", Ends: []bird.End{
					{Host: Plane(h, s), Spine: netip.AddrFrom4([4]byte{10, byte(100 + s), byte(h), 0})},
					{Host: netip.MustParseAddr(fmt.Sprintf("fd00:%x:%x::2", s, h)), Spine: netip.MustParseAddr(fmt.Sprintf("fd00:%x:%x::1", s, h))},
				}})
		}
	}
	return t
}

// Stable is the storage address of host h, reached over any spine.
func Stable(h int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 0, byte(h)}) }

// Plane is the address of host h that is reached over spine s alone.
func Plane(h, s int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(100 + s), byte(h), 1}) }

// New builds a fabric and starts its routing; Converged waits for that to work.
func New(cfg Config) (*Lab, error) {
	if cfg.Spines < MinSpines || cfg.Spines > MaxSpines || cfg.Hosts < MinHosts || cfg.Hosts > MaxHosts {
		return nil, status.Errorf(status.Invalid, "a lab has %d to %d spines and %d to %d hosts, not %d and %d", MinSpines, MaxSpines, MinHosts, MaxHosts, cfg.Spines, cfg.Hosts)
	}
	if os.Geteuid() != 0 {
		return nil, status.Errorf(status.Permission, "a lab is made of network namespaces: run it as root")
	}
	t, err := Topology(cfg.Protocol, cfg.Spines, cfg.Hosts, cfg.NoBFD).Normal()
	if err != nil {
		return nil, err
	}
	l := &Lab{Topology: t, cfg: cfg, nodes: map[string]*node{}}
	if err := l.build(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) build() error {
	for _, n := range l.Topology.Nodes {
		nd, err := newNode(n.Name)
		if err != nil {
			return err
		}
		l.nodes[n.Name] = nd
	}
	for _, c := range l.Topology.Cables {
		a, b := l.nodes[c.Host], l.nodes[c.Spine]
		if err := a.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: c.HostLink, MTU: l.cfg.MTU}, PeerName: c.SpineLink, PeerMTU: uint32(l.cfg.MTU), PeerNamespace: netlink.NsFd(b.fd)}); err != nil {
			return fmt.Errorf("cannot lay a cable from %s to %s: %w", c.Host, c.Spine, err)
		}
	}
	if err := l.layLAN(); err != nil {
		return fmt.Errorf("cannot lay the other network: %w", err)
	}
	for _, n := range l.Topology.Nodes {
		if l.cfg.Bare && !n.Spine {
			continue
		}
		a, err := agent.Start(agent.Config{Dir: filepath.Join(l.cfg.Dir, n.Name), Topology: l.Topology, Node: n.Name, NamespaceFD: int(l.nodes[n.Name].fd), Log: l.cfg.Log})
		if err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
		l.nodes[n.Name].agent = a
	}
	return nil
}

func newNode(name string) (*node, error) {
	n := &node{name: name, work: make(chan func()), ended: make(chan struct{})}
	made := make(chan error)
	go func() {
		defer close(n.ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with the node
		fd, err := netns.New()
		n.fd = fd
		made <- err
		if err == nil {
			for f := range n.work {
				f()
			}
		}
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("cannot make a network namespace for %s: %w", name, err)
	}
	return n, n.in(func() (err error) {
		if n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		lo, err := n.nl.LinkByName("lo")
		if err != nil {
			return err
		}
		return n.nl.LinkSetUp(lo)
	})
}

// in runs f on the node's thread. Processes f starts live in its namespace.
func (n *node) in(f func() error) error {
	done := make(chan error)
	n.work <- func() { done <- f() }
	return <-done
}

// Close takes the fabric down.
func (l *Lab) Close() error {
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, n := range l.nodes {
		wg.Go(func() {
			err := n.close()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wg.Wait()
	l.nodes = nil
	return errors.Join(errs...)
}

func (n *node) close() error {
	var errs []error
	if n.agent != nil {
		errs = append(errs, n.agent.Close())
	}
	if n.nl != nil {
		n.nl.Close()
	}
	close(n.work)
	<-n.ended
	return errors.Join(append(errs, n.fd.Close())...)
}

// In runs f on a thread inside a node's namespace: sockets made and processes
// started there belong to the node.
func (l *Lab) In(name string, f func() error) error {
	n := l.nodes[name]
	if n == nil {
		return status.Errorf(status.NotFound, "the lab has no node %q", name)
	}
	return n.in(f)
}

// Agent is what keeps a node's network; nil for a host of a bare lab.
func (l *Lab) Agent(name string) *agent.Agent { return l.nodes[name].agent }

// Hops returns a node's next hops in the kernel by storage address.
func (l *Lab) Hops(name string) (map[netip.Prefix]int, error) {
	out := map[netip.Prefix]int{}
	owner := bird.KernelProtocol
	if l.Topology.Protocol == bird.Static {
		owner = netplane.Protocol
	}
	routes, err := l.nodes[name].routesOf(owner)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue // a default route
		}
		a, _ := netip.AddrFromSlice(r.Dst.IP)
		a = a.Unmap()
		if bits, _ := r.Dst.Mask.Size(); bits == a.BitLen() {
			out[netip.PrefixFrom(a, bits)] += max(1, len(r.MultiPath))
		}
	}
	return out, nil
}

// routesOf are a node's routes of one rtnetlink protocol, of both families.
func (n *node) routesOf(protocol int) (out []netlink.Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := n.nl.RouteListFiltered(family, &netlink.Route{Protocol: netlink.RouteProtocol(protocol)}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return nil, fmt.Errorf("list the routes of %s: %w", n.name, err)
		}
		out = append(out, rs...)
	}
	return out, nil
}

// Converged waits until every host reaches every other over all spines, in
// both families, and returns how long that took.
func (l *Lab) Converged(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		missing, err := l.missing()
		if err != nil || missing == "" {
			return time.Since(start), err
		}
		select {
		case <-ctx.Done():
			return 0, status.Errorf(status.Timeout, "the fabric has not converged: %s", missing)
		case <-t.C:
		}
	}
}

func (l *Lab) missing() (string, error) {
	for _, from := range l.Topology.Nodes {
		if from.Spine {
			continue
		}
		hops, err := l.Hops(from.Name)
		if err != nil {
			return "", err
		}
		for _, to := range l.Topology.Nodes {
			for _, a := range to.Addrs {
				if n := hops[netip.PrefixFrom(a, a.BitLen())]; !to.Spine && to.Name != from.Name && n != l.cfg.Spines {
					return fmt.Sprintf("%s has %d of %d next hops to %v", from.Name, n, l.cfg.Spines, a), nil
				}
			}
		}
	}
	return "", nil
}

// LinkDown switches a host's link to a spine off, LinkUp on again.
func (l *Lab) LinkDown(host, spine int) error { return l.setLink(host, spine, false) }

// LinkUp undoes LinkDown.
func (l *Lab) LinkUp(host, spine int) error { return l.setLink(host, spine, true) }

func (l *Lab) setLink(host, spine int, up bool) error {
	nl := l.nodes[fmt.Sprintf("host-%d", host)].nl
	k, err := nl.LinkByName(fmt.Sprintf("s%d", spine))
	if err != nil {
		return fmt.Errorf("host-%d has no link to spine-%d: %w", host, spine, err)
	}
	if up {
		return nl.LinkSetUp(k)
	}
	return nl.LinkSetDown(k)
}

// Silence has a spine drop all it gets and sends; its links stay up.
func (l *Lab) Silence(spine int) error {
	return l.nft(spine, "table inet cut {\n chain in {\n type filter hook prerouting priority -300; policy drop;\n }\n chain out {\n type filter hook output priority -300; policy drop;\n }\n}\n")
}

// DropData has a spine drop what it should pass on, and answer all else: no
// routing protocol sees that.
func (l *Lab) DropData(spine int) error {
	return l.nft(spine, "table inet cut {\n chain pass {\n type filter hook forward priority -300; policy drop;\n }\n}\n")
}

// narrowBytes is the longest packet a narrow spine passes on.
const narrowBytes = 1400

// Narrow has a spine drop long packets it should pass on, without a word: a
// black hole for data that small packets do not see.
func (l *Lab) Narrow(spine int) error {
	// Between namespaces the kernel passes on many segments as one long packet,
	// which the rule would take for what it looks like.
	for _, c := range l.Topology.Cables {
		n := l.nodes[c.Host]
		k, err := n.nl.LinkByName(c.HostLink)
		if err != nil {
			return err
		}
		if err := n.nl.LinkSetGSOMaxSegs(k, 1); err != nil {
			return fmt.Errorf("%s: send segments one by one: %w", c.Host, err)
		}
	}
	return l.nft(spine, fmt.Sprintf("table inet cut {\n chain pass {\n type filter hook forward priority -300;\n meta length > %d drop\n }\n}\n", narrowBytes))
}

// Heal ends Silence, DropData and Narrow, if there is any.
func (l *Lab) Heal(spine int) error {
	return l.nft(spine, "table inet cut {\n}\ndelete table inet cut\n")
}

func (l *Lab) nft(spine int, rules string) error {
	n := l.nodes[fmt.Sprintf("spine-%d", spine)]
	if n == nil {
		return status.Errorf(status.NotFound, "the lab has no spine %d", spine)
	}
	return n.nft(rules)
}

func (n *node) nft(rules string) error {
	return n.in(func() error {
		cmd := exec.Command("/usr/sbin/nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft on %s: %s: %w", n.name, strings.TrimSpace(string(out)), err)
		}
		return nil
	})
}
