package kernel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/link"
)

// host is a network namespace of the test's own. It has no name: it is gone
// with its last descriptor, however the test ends.
type host struct {
	t  *testing.T
	ns namespace
	nl *netlink.Handle
	r  *Reconciler
	// reports of passes that had news; a test that falls behind loses none
	reports chan Report
}

// patience is how long a test waits for something that should happen within
// milliseconds.
const patience = 20 * time.Second

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run by `make test-int` as root")
	}
	h := &host{t: t, reports: make(chan Report, 1000)}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread stays in its namespace and ends
		fd, err := netns.New()
		h.ns = namespace{fd}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, h.ns.close()) })
	handle, err := openHandle(h.ns)
	check(t, err)
	h.nl = handle.nl
	t.Cleanup(h.nl.Close)
	return h
}

// start starts the host's reconciler.
func (h *host) start() *host {
	h.t.Helper()
	r, err := New(Config{NamespaceFD: int(h.ns.fd), Observe: func(rep Report) { h.reports <- rep }})
	check(h.t, err)
	h.r = r
	h.t.Cleanup(func() { check(h.t, r.Close()) })
	return h
}

func (h *host) apply(cfg netplane.Config) Report {
	h.t.Helper()
	rep, err := h.r.Apply(cfg)
	check(h.t, err)
	return rep
}

// until waits for a state of the kernel, looking after each report.
func (h *host) until(what string, ok func() bool) {
	h.t.Helper()
	late := time.After(patience)
	for !ok() {
		select {
		case <-h.reports:
		case <-late:
			h.t.Fatalf("%s did not happen; status %+v, routes %v", what, h.r.Status(), h.routes())
		}
	}
}

// cable joins two hosts by a veth pair whose ends have the given names.
func cable(a *host, aName string, b *host, bName string) {
	a.t.Helper()
	check(a.t, a.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(b.ns.fd)}))
}

func (h *host) link(name string) netlink.Link {
	h.t.Helper()
	l, err := h.nl.LinkByName(name)
	check(h.t, err)
	return l
}

func (h *host) down(name string) { h.t.Helper(); check(h.t, h.nl.LinkSetDown(h.link(name))) }
func (h *host) up(name string)   { h.t.Helper(); check(h.t, h.nl.LinkSetUp(h.link(name))) }

// routes are the texts of our routes in the kernel, and those of protocols
// made by hand.
func (h *host) routes() []string {
	h.t.Helper()
	hd := handle{ns: h.ns, nl: h.nl}
	st, _, err := hd.state(nil)
	check(h.t, err)
	var out []string
	for _, r := range st.Routes {
		switch r.Protocol {
		case netplane.Protocol:
			out = append(out, r.Route.String())
		case unix.RTPROT_STATIC:
			out = append(out, "foreign "+r.Route.String())
		}
	}
	return out
}

// addrs are the addresses on a link but for the kernel's own.
func (h *host) addrs(name string) []string {
	h.t.Helper()
	list, err := h.nl.AddrList(h.link(name), netlink.FAMILY_ALL)
	check(h.t, err)
	var out []string
	for _, a := range list {
		if !a.IP.IsLoopback() && !a.IP.IsLinkLocalUnicast() {
			out = append(out, a.IPNet.String())
		}
	}
	return out
}

// echo serves at a storage address of h until the test ends.
func (h *host) echo(addr string) {
	h.t.Helper()
	var l net.Listener
	check(h.t, h.ns.in(func() (err error) {
		l, err = link.Listen(link.Config{Addr: net.JoinHostPort(addr, "7000")})
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, err := io.Copy(c, c)
				if cerr := c.Close(); err == nil && cerr != nil && !errors.Is(cerr, net.ErrClosed) {
					fmt.Fprintln(os.Stderr, cerr)
				}
			}()
		}
	}()
	h.t.Cleanup(func() { check(h.t, l.Close()); <-ended })
}

// talks connects two storage addresses. A refusal fails at once; silence is asked
// again: the kernel tells IPv6 of a new carrier up to a second late, at each hop,
// and until then loses what it should have asked its neighbours.
func (h *host) talks(from, to string) {
	h.t.Helper()
	for late := time.Now().Add(patience); ; {
		err := h.talk(from, to)
		var silent net.Error
		if err == nil {
			return
		}
		if !errors.As(err, &silent) || !silent.Timeout() || time.Now().After(late) {
			h.t.Fatal(err)
		}
	}
}

// talk connects from one storage address of h to another host's and gets an
// answer that comes from there.
func (h *host) talk(from, to string) error {
	var c net.Conn
	err := h.ns.in(func() (err error) {
		// By hand: package link dials on goroutines of its own, outside the namespace.
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 2 * time.Second}
		c, err = d.Dial("tcp", net.JoinHostPort(to, "7000"))
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != "hello" {
		return fmt.Errorf("got %q back", buf)
	}
	return nil
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// config is a Config with the given storage addresses.
func config(addrs []string, links []netplane.Link, routes ...netplane.Route) netplane.Config {
	cfg := netplane.Config{Links: links, Routes: routes}
	for _, a := range addrs {
		cfg.Addrs = append(cfg.Addrs, netip.MustParseAddr(a))
	}
	return cfg
}

func named(name string, addrs ...string) netplane.Link {
	l := netplane.Link{Name: name}
	for _, a := range addrs {
		l.Addrs = append(l.Addrs, netip.MustParsePrefix(a))
	}
	return l
}

func to(dst string, hops ...netplane.Hop) netplane.Route {
	return netplane.Route{To: netip.MustParsePrefix(dst), Hops: hops}
}

func on(link string) netplane.Hop { return netplane.Hop{Link: link} }

func via(addr, link string) netplane.Hop {
	return netplane.Hop{Via: netip.MustParseAddr(addr), Link: link}
}
