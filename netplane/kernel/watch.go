package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/netplane"
)

// watch turns the kernel's notices into kicks. Notices carry too little to act
// on, and may be lost; a kick makes the reconciler look at everything.
type watch struct {
	kick   chan struct{} // holds at most one: any number of notices is one kick
	socket *nl.NetlinkSocket
	routes atomic.Pointer[routeSet]
	closed atomic.Bool
	ended  sync.WaitGroup
	failed error // why reading ended; read after ended
}

// watchBuffer is room for a burst of notices (every link going down at once).
// An overflow is a notice too.
const watchBuffer = 1 << 20

func startWatch(ns namespace) (*watch, error) {
	var socket *nl.NetlinkSocket
	err := ns.in(func() (err error) {
		socket, err = nl.SubscribeAt(netns.None(), netns.None(), unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
			unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch the kernel's network: %w", err)
	}
	if err := socket.SetReceiveBufferSize(watchBuffer, false); err != nil {
		socket.Close()
		return nil, fmt.Errorf("enlarge the watch's buffer: %w", err)
	}
	w := &watch{kick: make(chan struct{}, 1), socket: socket}
	w.setRoutes(nil)
	w.ended.Go(w.read)
	return w, nil
}

// setRoutes says which destinations are ours: notices about others' routes are
// many on a host with a full routing table, and mean nothing here.
func (w *watch) setRoutes(routes []netplane.Route) {
	set := newRouteSet(routes)
	w.routes.Store(&set)
}

func (w *watch) close() error {
	w.closed.Store(true)
	w.socket.Close()
	w.ended.Wait()
	return w.failed
}

// read ends when the socket is closed. Any other error but an overflow ends it
// too, and leaves the work to the audit.
func (w *watch) read() {
	for {
		msgs, _, err := w.socket.Receive()
		switch {
		case err != nil && w.closed.Load():
			return
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			w.poke()
			continue
		case err != nil:
			w.failed = fmt.Errorf("watch the kernel's network: %w", err)
			return
		}
		for _, m := range msgs {
			if w.matters(m) {
				w.poke()
				break
			}
		}
	}
}

func (w *watch) poke() {
	select {
	case w.kick <- struct{}{}:
	default: // one is waiting already
	}
}

// matters is false for notices about others' routes.
func (w *watch) matters(m syscall.NetlinkMessage) bool {
	if m.Header.Type != unix.RTM_NEWROUTE && m.Header.Type != unix.RTM_DELROUTE {
		return true
	}
	if len(m.Data) < unix.SizeofRtMsg {
		return false
	}
	msg := nl.DeserializeRtMsg(m.Data)
	if msg.Table != unix.RT_TABLE_MAIN {
		return false
	}
	if msg.Protocol == netplane.Protocol {
		return true
	}
	attrs, err := nl.ParseRouteAttr(m.Data[msg.Len():])
	if err != nil {
		return true // look rather than miss something
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_DST {
			dst, ok := netip.AddrFromSlice(a.Value)
			return ok && (*w.routes.Load())[netip.PrefixFrom(dst, int(msg.Dst_len))]
		}
	}
	return false
}
