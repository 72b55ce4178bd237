package netlab

import (
	"fmt"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/cairnstore/cairn/proto/status"
)

// The hosts of a lab have another network beside the storage network, as real
// ones do, with the default route: whatever the storage network fails to keep
// to itself would leave there, and is counted.
const (
	lanNode  = "lan"
	lanLink  = "lan0"
	lanRules = `table inet lan {
 chain out {
  type filter hook output priority 0;
  oifname "lan0" meta l4proto { tcp, udp } counter
 }
}
`
)

func lanAddr(h int) *net.IPNet {
	return &net.IPNet{IP: net.IPv4(192, 168, 77, byte(h)), Mask: net.CIDRMask(24, 32)}
}

// layLAN joins all hosts by a bridge in a namespace of its own.
func (l *Lab) layLAN() error {
	hub, err := newNode(lanNode)
	if err != nil {
		return err
	}
	l.nodes[lanNode] = hub
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}}
	if err := hub.nl.LinkAdd(bridge); err != nil {
		return err
	}
	if err := hub.nl.AddrAdd(bridge, &netlink.Addr{IPNet: lanAddr(254)}); err != nil {
		return err
	}
	if err := hub.nl.LinkSetUp(bridge); err != nil {
		return err
	}
	for h := 1; h <= l.cfg.Hosts; h++ {
		if err := l.joinLAN(hub, bridge, h); err != nil {
			return fmt.Errorf("host-%d: %w", h, err)
		}
	}
	return nil
}

func (l *Lab) joinLAN(hub *node, bridge netlink.Link, h int) error {
	n, port := l.nodes[fmt.Sprintf("host-%d", h)], fmt.Sprintf("h%d", h)
	if err := n.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: lanLink}, PeerName: port, PeerNamespace: netlink.NsFd(hub.fd)}); err != nil {
		return err
	}
	far, err := hub.nl.LinkByName(port)
	if err != nil {
		return err
	}
	if err := hub.nl.LinkSetMaster(far, bridge); err != nil {
		return err
	}
	if err := hub.nl.LinkSetUp(far); err != nil {
		return err
	}
	near, err := n.nl.LinkByName(lanLink)
	if err != nil {
		return err
	}
	if err := n.nl.AddrAdd(near, &netlink.Addr{IPNet: lanAddr(h)}); err != nil {
		return err
	}
	if err := n.nl.LinkSetUp(near); err != nil {
		return err
	}
	if err := n.nl.RouteAdd(&netlink.Route{LinkIndex: near.Attrs().Index, Gw: lanAddr(254).IP}); err != nil {
		return err
	}
	return n.nft(lanRules)
}

var counted = regexp.MustCompile(`counter packets (\d+) bytes`)

// Leaked is how many TCP and UDP packets a host has sent beside the storage
// network.
func (l *Lab) Leaked(host string) (packets int, err error) {
	err = l.In(host, func() error {
		out, err := exec.Command("/usr/sbin/nft", "list", "chain", "inet", "lan", "out").CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft on %s: %s: %w", host, strings.TrimSpace(string(out)), err)
		}
		m := counted.FindSubmatch(out)
		if m == nil {
			return status.Errorf(status.Internal, "nft on %s has no counter: %s", host, out)
		}
		packets, err = strconv.Atoi(string(m[1]))
		return err
	})
	return packets, err
}
