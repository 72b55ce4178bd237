package kernel

import (
	"errors"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
)

// The notices that the kernel really sends, one per kind of change: those
// about others' routes to places we have no route to must not wake anybody.
func TestWhatMatters(t *testing.T) {
	a, b := newHost(t), newHost(t)
	cable(a, "x", b, "x")
	b.up("x")
	a.up("x")
	a.add("10.7.0.0/24", netplane.Metric, "x", netplane.Protocol)
	w := &watch{}
	w.setRoutes([]netplane.Route{to("10.9.0.2/32", on("x"))})
	for _, c := range []struct {
		name   string
		groups []uint
		change func()
		want   bool
	}{
		{"another's route elsewhere", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() { a.add("10.8.0.0/24", 0, "x", 12) }, false},
		{"another's route in the place of ours", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() { a.add("10.9.0.2/32", 0, "x", 12) }, true},
		{"another's route beside ours", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() { a.add("10.9.0.0/24", 0, "x", 12) }, false},
		{"a new route under our number", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() { a.add("10.6.0.0/24", 0, "x", netplane.Protocol) }, true},
		{"a lost route under our number", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() {
			n, err := netlink.ParseIPNet("10.7.0.0/24")
			check(t, err)
			check(t, a.nl.RouteDel(&netlink.Route{Dst: n, Scope: unix.RT_SCOPE_NOWHERE}))
		}, true},
		{"an address", []uint{unix.RTNLGRP_IPV4_IFADDR}, func() {
			addr, err := netlink.ParseAddr("10.1.0.1/24")
			check(t, err)
			check(t, a.nl.AddrAdd(a.link("x"), addr))
		}, true},
		{"a local route that comes with it", []uint{unix.RTNLGRP_IPV4_ROUTE}, func() {
			addr, err := netlink.ParseAddr("10.2.0.1/32")
			check(t, err)
			check(t, a.nl.AddrAdd(a.link("x"), addr))
		}, false},
		{"a link", []uint{unix.RTNLGRP_LINK}, func() { a.down("x") }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i, got := range notices(t, a, w, c.groups, c.change) {
				if got != c.want {
					t.Errorf("notice %d matters: %v, want %v", i, got, c.want)
				}
			}
		})
	}
}

// notices makes a change and says of each notice about it whether it matters.
// The kernel sends them before it answers the change, so there is no waiting.
func notices(t *testing.T, h *host, w *watch, groups []uint, change func()) (matter []bool) {
	t.Helper()
	var s *nl.NetlinkSocket
	check(t, h.ns.in(func() (err error) {
		s, err = nl.SubscribeAt(netns.None(), netns.None(), unix.NETLINK_ROUTE, groups...)
		return err
	}))
	defer s.Close()
	change()
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.GetFd(), buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		check(t, err)
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		check(t, err)
		for _, m := range msgs {
			matter = append(matter, w.matters(m))
		}
	}
	if len(matter) == 0 {
		t.Fatal("the kernel said nothing")
	}
	return matter
}
