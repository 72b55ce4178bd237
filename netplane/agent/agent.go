// Package agent is the storage network of one node: its addresses and static
// routes, its routing daemon, and what happened to them.
//
// Duty: a typed topology turned into what netplane/kernel keeps and
// netplane/bird runs, routes that people add and remove (kept over a restart),
// and events in order with their cause. Floor: F4. It decides no route itself,
// opens no data connection (netplane/link does), and serves nobody: cmd/cairn
// does.
package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/netplane/kernel"
	"github.com/cairnstore/cairn/proto/status"
)

// Config says which node this is.
type Config struct {
	Dir         string // for added routes and the routing daemon's files; made if missing
	Topology    bird.Topology
	Node        string
	NamespaceFD int          // descriptor of a network namespace, which stays the caller's; 0: the process's
	Log         *slog.Logger // nil: no log
}

// Agent runs until it is closed. Its methods may be called concurrently.
type Agent struct {
	cfg    Config
	kernel *kernel.Reconciler
	bird   *bird.Daemon // nil: static routes only
	quit   chan struct{}
	wg     sync.WaitGroup
	events journal

	mu    sync.Mutex // guards the fields below, and changes
	top   bird.Topology
	added []netplane.Route
}

// Start applies the topology and returns when the routing daemon answers. A
// topology that is refused changes nothing.
func Start(cfg Config) (a *Agent, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Log = cfg.Log.With("node", cfg.Node)
	a = &Agent{cfg: cfg, quit: make(chan struct{})}
	if a.top, err = cfg.Topology.Normal(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the network's directory: %w", err)
	}
	if a.added, err = readAdded(a.file()); err != nil {
		return nil, err
	}
	want, err := Wanted(a.top, cfg.Node, a.added)
	if err != nil {
		return nil, err
	}
	if a.top.Protocol != bird.Static { // it holds the namespace: a second one is refused before it touches anything
		if a.bird, err = bird.Start(bird.Config{Dir: cfg.Dir, Topology: a.top, Node: cfg.Node, NamespaceFD: cfg.NamespaceFD, Log: cfg.Log}); err != nil {
			return nil, err
		}
	}
	if a.kernel, err = kernel.New(kernel.Config{NamespaceFD: cfg.NamespaceFD, Log: cfg.Log, Observe: a.changed}); err == nil {
		_, err = a.kernel.Apply(want)
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.wg.Go(a.watch)
	return a, nil
}

// Close stops the routing daemon. Addresses and static routes stay: what is
// under way on this host goes on.
func (a *Agent) Close() error {
	close(a.quit)
	a.wg.Wait()
	var errs []error
	if a.bird != nil {
		errs = append(errs, a.bird.Close())
	}
	if a.kernel != nil {
		errs = append(errs, a.kernel.Close())
	}
	return errors.Join(errs...)
}

func (a *Agent) file() string { return filepath.Join(a.cfg.Dir, "routes.json") }

// Wanted is what a node's kernel shall have: its addresses; a route to each
// plane address of another host over that plane's spine; with Static also the
// routes to stable addresses; refusals for all of the storage network that has
// no way now, so that nothing leaves it by the default route; and the added
// ones. Errors are Invalid.
func Wanted(t bird.Topology, node string, added []netplane.Route) (netplane.Config, error) {
	n, ok := t.Node(node)
	if !ok {
		return netplane.Config{}, status.Errorf(status.Invalid, "node: %q is not in the topology", node)
	}
	cfg := netplane.Config{Addrs: n.Addrs, Forward: n.Spine}
	ways := map[netip.Addr]netplane.Route{}
	lead := func(to []netip.Addr, src netip.Addr, hop netplane.Hop) {
		for _, a := range to {
			r, ok := ways[a]
			if !ok {
				r = netplane.Route{To: netip.PrefixFrom(a, a.BitLen()), Src: src}
			}
			r.Hops = append(r.Hops, hop)
			ways[a] = r
		}
	}
	for _, c := range t.Cables {
		if c.Host != node && c.Spine != node {
			continue
		}
		l := netplane.Link{Name: c.HostLink}
		if n.Spine {
			l.Name = c.SpineLink
		}
		for _, e := range c.Ends {
			own, far := e.Host, e.Spine
			if n.Spine {
				own, far = far, own
			}
			l.Addrs = append(l.Addrs, netip.PrefixFrom(own, common(own, far)))
			hop := netplane.Hop{Via: far, Link: l.Name}
			// From the plane's address: answers come back over the plane, too.
			lead(planes(t, c, n, own), own, hop)
			if t.Protocol == bird.Static {
				lead(behind(t, c, n, own), netip.Addr{}, hop)
			}
		}
		cfg.Links = append(cfg.Links, l)
	}
	for _, r := range ways {
		cfg.Routes = append(cfg.Routes, r)
	}
	for _, r := range fences(t) {
		cfg.Routes = append(cfg.Routes, netplane.Route{To: r, Refuse: true})
	}
	cfg.Routes = append(cfg.Routes, added...)
	return cfg.Normal()
}

// Planes wider than these are not fenced: their addresses lie too far apart to
// say that all between them belongs to the storage network.
const (
	widestFence4 = 12
	widestFence6 = 44
)

// fences are the ranges that belong to the storage network: that of the stable
// addresses, and for each spine the smallest one with all its cables.
func fences(t bird.Topology) []netip.Prefix {
	out := slices.Clone(t.Range)
	for _, four := range []bool{true, false} {
		of := map[string]netip.Prefix{}
		for _, c := range t.Cables {
			for _, e := range c.Ends {
				if e.Host.Is4() != four {
					continue
				}
				p, ok := of[c.Spine]
				if !ok {
					p = netip.PrefixFrom(e.Host, e.Host.BitLen())
				}
				bits := min(p.Bits(), common(p.Addr(), e.Host), common(p.Addr(), e.Spine))
				of[c.Spine] = netip.PrefixFrom(e.Host, bits).Masked()
			}
		}
		for _, p := range of {
			wide := p.Bits() < widestFence4
			if !four {
				wide = p.Bits() < widestFence6
			}
			if !wide && !p.IsSingleIP() && !slices.ContainsFunc(out, p.Overlaps) {
				out = append(out, p)
			}
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// planes are the plane addresses of other hosts that a host's cable leads to,
// of one family.
func planes(t bird.Topology, own bird.Cable, n bird.Node, fam netip.Addr) (out []netip.Addr) {
	for _, c := range t.Cables {
		if n.Spine || c.Spine != own.Spine || c.Host == own.Host {
			continue
		}
		for _, e := range c.Ends {
			if e.Host.Is4() == fam.Is4() {
				out = append(out, e.Host)
			}
		}
	}
	return out
}

// behind are the stable addresses of own's family that a cable leads to: from a
// spine those of its host, from a host those of the spine's other hosts.
func behind(t bird.Topology, own bird.Cable, n bird.Node, fam netip.Addr) (out []netip.Addr) {
	for _, c := range t.Cables {
		if c.Spine != own.Spine || n.Spine && c.Host != own.Host || !n.Spine && c.Host == own.Host {
			continue
		}
		h, _ := t.Node(c.Host)
		for _, a := range h.Addrs {
			if a.Is4() == fam.Is4() {
				out = append(out, a)
			}
		}
	}
	return out
}

// common is the length of the longest prefix two addresses share.
func common(a, b netip.Addr) int {
	bits := a.BitLen()
	for bits > 0 && netip.PrefixFrom(a, bits).Masked() != netip.PrefixFrom(b, bits).Masked() {
		bits--
	}
	return bits
}

// Planes are a host's data addresses of IPv4 with the names of the paths that
// lead to them: the stable one, then one per spine in the topology's order.
func Planes(t bird.Topology, node string) (addrs []netip.Addr, names []string) {
	n, _ := t.Node(node)
	if len(n.Addrs) > 0 {
		addrs, names = append(addrs, n.Addrs[0]), append(names, "stable")
	}
	for _, s := range t.Nodes {
		for _, c := range t.Cables {
			if s.Spine && c.Host == node && c.Spine == s.Name && c.Ends[0].Host.Is4() {
				addrs, names = append(addrs, c.Ends[0].Host), append(names, s.Name)
			}
		}
	}
	return addrs, names
}

// Apply changes to another topology. Sessions and routes that stay the same are
// not touched. A change from or to Static needs a restart.
func (a *Agent) Apply(t bird.Topology) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	t, err := t.Normal()
	if err != nil {
		return err
	}
	if (t.Protocol == bird.Static) != (a.bird == nil) {
		return status.Errorf(status.Unsupported, "protocol: %s cannot become %s while the node runs: start it anew", a.top.Protocol, t.Protocol)
	}
	want, err := Wanted(t, a.cfg.Node, a.added)
	if err != nil {
		return err
	}
	if a.bird != nil {
		if err := a.bird.Apply(t); err != nil {
			return err
		}
	}
	a.top = t
	a.events.add("the topology was changed", "asked for")
	_, err = a.kernel.Apply(want)
	return err
}

// AddRoute adds a route, or changes the one to the same destination. It is in
// the kernel, and kept over restarts, when this returns without error.
func (a *Agent) AddRoute(r netplane.Route) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	added := slices.DeleteFunc(slices.Clone(a.added), func(o netplane.Route) bool { return o.To == r.To })
	return a.setAdded(append(added, r), "add route "+r.String())
}

// RemoveRoute removes a route that was added. Others are status.NotFound.
func (a *Agent) RemoveRoute(to netip.Prefix) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	added := slices.DeleteFunc(slices.Clone(a.added), func(o netplane.Route) bool { return o.To == to })
	if len(added) == len(a.added) {
		return status.Errorf(status.NotFound, "no route to %v was added here: `cairn route ls` lists them; those of the topology and of the routing daemon go with their cause", to)
	}
	return a.setAdded(added, "remove route "+to.String())
}

func (a *Agent) setAdded(added []netplane.Route, what string) error {
	want, err := Wanted(a.top, a.cfg.Node, added)
	if err != nil {
		return err
	}
	if err := writeAdded(a.file(), added); err != nil {
		return err
	}
	a.added = added
	a.events.add(what, "asked for")
	_, err = a.kernel.Apply(want)
	return err
}

// addedRoute is a route in routes.json.
type addedRoute struct {
	To   netip.Prefix `json:"to"`
	Hops []hop        `json:"hops"`
}

type hop struct {
	Via  netip.Addr `json:"via,omitzero"`
	Link string     `json:"link"`
}

func readAdded(file string) ([]netplane.Route, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the added routes: %w", err)
	}
	var rs []addedRoute
	if err := json.Unmarshal(b, &rs); err != nil {
		return nil, status.Errorf(status.Corrupt, "%s is damaged (%w): move it away, and add the routes again", file, err)
	}
	var out []netplane.Route
	for _, r := range rs {
		n := netplane.Route{To: r.To}
		for _, h := range r.Hops {
			n.Hops = append(n.Hops, netplane.Hop(h))
		}
		out = append(out, n)
	}
	return out, nil
}

func writeAdded(file string, routes []netplane.Route) error {
	rs := []addedRoute{}
	for _, r := range routes {
		n := addedRoute{To: r.To}
		for _, h := range r.Hops {
			n.Hops = append(n.Hops, hop(h))
		}
		rs = append(rs, n)
	}
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot keep the added routes: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(file+".new", file)
	}
	if err != nil {
		return fmt.Errorf("cannot keep the added routes: %w", err)
	}
	return nil
}

// ParseRoute reads "TO [via ADDR] dev LINK [nexthop via ADDR dev LINK]…", as
// ip-route(8) takes it. Errors are Invalid.
func ParseRoute(words []string) (r netplane.Route, err error) {
	words = strings.Fields(strings.Join(words, " "))
	if len(words) == 0 {
		return r, status.Errorf(status.Invalid, "a route begins with its destination: 10.255.0.2/32 via 10.101.1.0 dev s1")
	}
	if r.To, err = ParseDestination(words[0]); err != nil {
		return r, err
	}
	h, open := netplane.Hop{}, false
	for i := 1; i < len(words); i += 2 {
		if words[i] == "nexthop" {
			i--
			if open {
				r.Hops = append(r.Hops, h)
			}
			h, open = netplane.Hop{}, false
			continue
		}
		if i+1 == len(words) {
			return r, status.Errorf(status.Invalid, "%q needs a value", words[i])
		}
		switch words[i] {
		case "via":
			if h.Via, err = netip.ParseAddr(words[i+1]); err != nil {
				return r, status.Errorf(status.Invalid, "via %q is no address", words[i+1])
			}
		case "dev":
			h.Link = words[i+1]
		default:
			return r, status.Errorf(status.Invalid, "%q is not part of a route: use via, dev and nexthop", words[i])
		}
		open = true
	}
	if open {
		r.Hops = append(r.Hops, h)
	}
	return r, nil
}

// ParseDestination reads a range, or a bare address as a destination of one
// host. Errors are Invalid.
func ParseDestination(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, status.Errorf(status.Invalid, "%q is no destination: write 10.255.0.2/32", s)
	}
	return p, nil
}

// watchEvery is how often sessions and next hops are compared with before.
const watchEvery = 500 * time.Millisecond
