package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	// replyTimeout bounds a wait for the kernel's answer; it normally takes
	// microseconds.
	replyTimeout = 5 * time.Second
	// dumpTries bounds how often a list is asked for again because it changed
	// while it was being read.
	dumpTries = 10
)

// namespace is the network namespace everything happens in.
type namespace struct {
	fd netns.NsHandle // our own descriptor
}

// openNamespace opens the namespace a Config names.
func openNamespace(cfg Config) (namespace, error) {
	if cfg.Namespace != "" && cfg.NamespaceFD != 0 {
		return namespace{}, status.Errorf(status.Invalid, "a namespace is given by name (%s) or by descriptor (%d), not both", cfg.Namespace, cfg.NamespaceFD)
	}
	switch {
	case cfg.Namespace != "":
		fd, err := netns.GetFromName(cfg.Namespace)
		if err != nil {
			return namespace{}, status.Errorf(status.NotFound, "cannot open network namespace %s: %w; ip netns shows which there are", cfg.Namespace, err)
		}
		return namespace{fd}, nil
	case cfg.NamespaceFD != 0:
		fd, err := unix.FcntlInt(uintptr(cfg.NamespaceFD), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return namespace{}, status.Errorf(status.Invalid, "descriptor %d is no network namespace: %w", cfg.NamespaceFD, err)
		}
		return namespace{netns.NsHandle(fd)}, nil
	}
	fd, err := netns.Get()
	if err != nil {
		return namespace{}, fmt.Errorf("open the current network namespace: %w", err)
	}
	return namespace{fd}, nil
}

// in runs f on a thread that is in the namespace. The thread ends with it, so
// that no other goroutine ever finds itself in a strange namespace.
func (ns namespace) in(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is not reused
		if err := unix.Setns(int(ns.fd), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

func (ns namespace) close() error {
	if err := unix.Close(int(ns.fd)); err != nil {
		return fmt.Errorf("close the network namespace: %w", err)
	}
	return nil
}

// handle reads and changes the kernel's state.
type handle struct {
	ns namespace
	nl *netlink.Handle
}

func openHandle(ns namespace) (*handle, error) {
	h := &handle{ns: ns}
	err := ns.in(func() (err error) {
		h.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	if err := h.nl.SetSocketTimeout(replyTimeout); err != nil {
		h.nl.Close()
		return nil, fmt.Errorf("set a timeout on the netlink socket: %w", err)
	}
	return h, nil
}

// state reads all that netplane.Plan looks at, and the links' indices.
func (h *handle) state(settings []string) (netplane.State, map[string]int, error) {
	st := netplane.State{}
	links, err := dump(h.nl.LinkList)
	if err != nil {
		return st, nil, fmt.Errorf("list links: %w", err)
	}
	index, names := map[string]int{}, map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		index[a.Name], names[a.Index] = a.Index, a.Name
		st.Links = append(st.Links, netplane.LinkState{Name: a.Name, Up: a.RawFlags&unix.IFF_UP != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0})
	}
	if err := h.addrs(&st, names); err != nil {
		return st, nil, err
	}
	if err := h.routes(&st, names); err != nil {
		return st, nil, err
	}
	st.Sysctls, err = h.sysctls(settings)
	return st, index, err
}

// dump asks for a list again while it changes under the reader.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for range dumpTries - 1 {
		if out, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return list()
}

func (h *handle) addrs(st *netplane.State, names map[int]string) error {
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	of := map[string][]netip.Prefix{}
	for _, a := range addrs {
		if p, ok := prefix(a.IPNet); ok {
			of[names[a.LinkIndex]] = append(of[names[a.LinkIndex]], p)
		}
	}
	for i := range st.Links {
		st.Links[i].Addrs = of[st.Links[i].Name]
	}
	return nil
}

func (h *handle) routes(st *netplane.State, names map[int]string) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) { return h.nl.RouteListFiltered(family, &netlink.Route{}, 0) })
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			to, ok := prefix(r.Dst)
			if !ok {
				continue // a default route: never ours
			}
			in := netplane.Installed{Protocol: int(r.Protocol), Metric: r.Priority, Route: netplane.Route{To: to, Src: addr(r.Src)}}
			if r.Type == unix.RTN_UNREACHABLE {
				in.Refuse, in.Src = true, netip.Addr{}
			} else if len(r.MultiPath) == 0 {
				in.Hops = []netplane.Hop{{Via: addr(r.Gw), Link: names[r.LinkIndex]}}
			}
			for _, nh := range r.MultiPath {
				in.Hops = append(in.Hops, netplane.Hop{Via: addr(nh.Gw), Link: names[nh.LinkIndex]})
			}
			st.Routes = append(st.Routes, in)
		}
	}
	return nil
}

// sysctls reads the settings that exist. /proc/sys/net shows those of the
// reading thread's namespace.
func (h *handle) sysctls(settings []string) (map[string]string, error) {
	out := map[string]string{}
	err := h.ns.in(func() error {
		for _, name := range settings {
			value, err := os.ReadFile(sysctlFile(name))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("read setting %s: %w", name, err)
			}
			out[name] = strings.TrimSpace(string(value))
		}
		return nil
	})
	return out, err
}

func sysctlFile(name string) string { return filepath.Join("/proc/sys", name) }

// apply makes one change. What is so already is no error: others change the
// network at the same time, and the next look settles it.
func (h *handle) apply(c netplane.Change, index map[string]int) error {
	var err error
	switch c.Op {
	case netplane.SetSysctl:
		err = h.ns.in(func() error { return os.WriteFile(sysctlFile(c.Sysctl), []byte(c.Value), 0o644) })
	case netplane.SetUp:
		err = h.nl.LinkSetUp(linkOf(c.Link, index))
	case netplane.AddAddr:
		a := &netlink.Addr{IPNet: ipNet(c.Addr)}
		if c.Addr.Addr().Is6() {
			// Duplicate address detection would hold it back for a second or
			// more after every link failure.
			a.Flags = unix.IFA_F_NODAD
		}
		if err = h.nl.AddrAdd(linkOf(c.Link, index), a); errors.Is(err, unix.EEXIST) {
			err = nil
		}
	case netplane.RemoveAddr:
		if err = h.nl.AddrDel(linkOf(c.Link, index), &netlink.Addr{IPNet: ipNet(c.Addr)}); errors.Is(err, unix.EADDRNOTAVAIL) {
			err = nil
		}
	case netplane.AddRoute: // exclusive: it never replaces a route that came meanwhile
		err = h.nl.RouteAdd(routeOf(c, index))
	case netplane.ReplaceRoute:
		err = h.nl.RouteReplace(routeOf(c, index))
	case netplane.RemoveRoute:
		if err = h.nl.RouteDel(routeOf(c, index)); errors.Is(err, unix.ESRCH) {
			err = nil
		}
	default:
		return status.Errorf(status.Internal, "%q is no change this can make", c.Op)
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return status.Errorf(status.Permission, "cannot %v: %w; it needs root or CAP_NET_ADMIN", c, err)
	}
	if err != nil {
		return status.Errorf(status.Unavailable, "cannot %v: %w", c, err)
	}
	return nil
}

func linkOf(name string, index map[string]int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, Index: index[name]}}
}

func routeOf(c netplane.Change, index map[string]int) *netlink.Route {
	r := &netlink.Route{Dst: ipNet(c.Route.To), Protocol: netplane.Protocol, Priority: c.Metric, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}
	if c.Op == netplane.RemoveRoute {
		// Destination, metric and protocol say enough, and the hops may be over
		// links that are gone. The widest scope matches any.
		r.Type, r.Scope = 0, unix.RT_SCOPE_NOWHERE
		return r
	}
	if c.Route.Refuse {
		r.Type = unix.RTN_UNREACHABLE
		return r
	}
	if c.Route.Src.IsValid() {
		r.Src = c.Route.Src.AsSlice()
	}
	direct := true
	for _, h := range c.Route.Hops {
		direct = direct && !h.Via.IsValid()
	}
	if direct && c.Route.To.Addr().Is4() {
		r.Scope = unix.RT_SCOPE_LINK // lets other routes go via this address
	}
	if len(c.Route.Hops) == 1 {
		r.LinkIndex, r.Gw = index[c.Route.Hops[0].Link], ip(c.Route.Hops[0].Via)
		return r
	}
	for _, h := range c.Route.Hops {
		r.MultiPath = append(r.MultiPath, &netlink.NexthopInfo{LinkIndex: index[h.Link], Gw: ip(h.Via)})
	}
	return r
}

func ip(a netip.Addr) net.IP {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip) // none: the zero Addr
	return a.Unmap()
}

// prefix is false for no destination, and for everything.
func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	bits, _ := n.Mask.Size()
	p := netip.PrefixFrom(addr(n.IP), bits)
	return p, p.IsValid() && bits > 0
}
