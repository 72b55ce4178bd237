package bird

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// place is a network namespace of the test's own with one link, gone with its
// descriptor.
type place struct {
	t  *testing.T
	fd netns.NsHandle
	nl *netlink.Handle
}

func newPlace(t *testing.T) *place {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run by `make test-int` as root")
	}
	p := &place{t: t}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		var err error
		if p.fd, err = netns.New(); err == nil {
			p.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		}
		done <- err
	}()
	check(t, <-done)
	t.Cleanup(func() { p.nl.Close(); check(t, p.fd.Close()) })
	check(t, p.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "s1"}, PeerName: "far"}))
	for _, name := range []string{"lo", "s1", "far"} {
		l, err := p.nl.LinkByName(name)
		check(t, err)
		check(t, p.nl.LinkSetUp(l))
		if name == "s1" {
			a, err := netlink.ParseAddr("10.101.1.1/31")
			check(t, err)
			check(t, p.nl.AddrAdd(l, a))
		}
	}
	return p
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (p *place) start(dir string, top Topology) (*Daemon, error) {
	return Start(Config{Dir: dir, Topology: top, Node: "host-1", NamespaceFD: int(p.fd)})
}

// stale puts a route as a killed BIRD leaves it.
func (p *place) stale() {
	l, err := p.nl.LinkByName("s1")
	check(p.t, err)
	check(p.t, p.nl.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(10, 255, 0, 77), Mask: net.CIDRMask(32, 32)},
		Protocol: KernelProtocol, Priority: KernelMetric, Scope: unix.RT_SCOPE_LINK}))
}

func (p *place) routes() int {
	rs, err := p.nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: KernelProtocol}, netlink.RT_FILTER_PROTOCOL)
	check(p.t, err)
	return len(rs)
}

func await(t *testing.T, what string, ok func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(began) > 20*time.Second {
			t.Fatalf("%s did not happen", what)
		}
		<-tick.C
	}
	return time.Since(began)
}

func TestMissingBinary(t *testing.T) {
	_, err := Start(Config{Dir: t.TempDir(), Topology: fabric(BGP), Node: "host-1", Binary: "/nowhere/bird"})
	if !errors.Is(err, status.Unavailable) || !strings.Contains(err.Error(), "bird2") {
		t.Errorf("got %v", err)
	}
}

// Refused: nothing is started, written for good, or held.
func TestRefusedBeforeAnything(t *testing.T) {
	p, dir := newPlace(t), t.TempDir()
	bad := fabric(BGP)
	bad.Cables[0].Ends[0].Host = ip("10.255.0.9")
	if _, err := p.start(dir, bad); !errors.Is(err, status.Invalid) || !strings.HasPrefix(err.Error(), "cable[0].end") {
		t.Fatalf("got %v", err)
	}
	if left, err := filepath.Glob(dir + "/*"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	d, err := p.start(dir, fabric(BGP))
	check(t, err)
	if err := d.Apply(bad); !errors.Is(err, status.Invalid) {
		t.Errorf("applied: %v", err)
	}
	if st, err := d.Status(); err != nil || st.Restarts != 0 || len(st.Sessions) == 0 {
		t.Errorf("after a refused change: %+v, %v", st, err)
	}
	check(t, d.Close())
}

// What a killed BIRD left is gone once another runs; what this one has is gone
// once it is closed.
func TestLeftovers(t *testing.T) {
	p, dir := newPlace(t), t.TempDir()
	sock, err := net.Listen("unix", filepath.Join(dir, "bird.ctl"))
	check(t, err)
	sock.(*net.UnixListener).SetUnlinkOnClose(false)
	check(t, sock.Close())
	p.stale()
	d, err := p.start(dir, fabric(BGP))
	check(t, err)
	await(t, "the stale route goes", func() bool { return p.routes() == 0 })
	p.stale()
	check(t, d.Close())
	if n := p.routes(); n != 0 {
		t.Errorf("%d routes left after the end", n)
	}
	if _, err := os.Stat(filepath.Join(dir, "bird.ctl")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	check(t, d.Close()) // again: nothing
}

// Dead, wedged, and without its socket: noticed within a second and started
// again. A second one is refused all the while.
func TestComesBack(t *testing.T) {
	p, dir := newPlace(t), t.TempDir()
	d, err := p.start(dir, fabric(BGP))
	check(t, err)
	defer func() { check(t, d.Close()) }()
	for i, hurt := range []func(pid int) error{
		func(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) },
		func(pid int) error { return syscall.Kill(pid, syscall.SIGSTOP) },
		func(int) error { return os.Remove(filepath.Join(dir, "bird.ctl")) },
	} {
		st, err := d.Status()
		check(t, err)
		check(t, hurt(st.Pid))
		took := await(t, "a restart", func() bool { now, _ := d.Status(); return now.Restarts == i+1 })
		t.Logf("case %d noticed in %v", i, took)
		await(t, "a new BIRD", func() bool {
			now, err := d.Status()
			return err == nil && now.Pid != 0 && now.Pid != st.Pid && now.Why != "" && len(now.Sessions) > 0
		})
		if _, err := p.start(t.TempDir(), fabric(BGP)); !errors.Is(err, status.Held) {
			t.Errorf("a second one: %v", err)
		}
	}
}

// The bound of noticing a wedged BIRD, of which the test above shows one case.
func TestNoticedWithinASecond(t *testing.T) {
	if watchEvery+answerIn > time.Second {
		t.Errorf("a wedged BIRD is noticed after %v", watchEvery+answerIn)
	}
}

// A changed topology is taken softly: the sessions that stay are not touched.
func TestSoftChange(t *testing.T) {
	p := newPlace(t)
	top := fabric(BGP)
	top.Cables[0].Key = ""
	d, err := p.start(t.TempDir(), top)
	check(t, err)
	defer func() { check(t, d.Close()) }()
	before, err := d.Status()
	check(t, err)
	grown := fabric(BGP)
	grown.Cables[0].Key = ""
	grown.Nodes = append(grown.Nodes, Node{Name: "spine-2", Spine: true, ASN: 4200001002, Addrs: []netip.Addr{ip("10.255.1.2")}})
	grown.Cables = append(grown.Cables, Cable{Host: "host-1", HostLink: "s2", Spine: "spine-2", SpineLink: "h1", Ends: []End{{Host: ip("10.102.1.1"), Spine: ip("10.102.1.0")}}})
	check(t, d.Apply(grown))
	after, err := d.Status()
	check(t, err)
	if after.Pid != before.Pid || len(after.Sessions) != len(before.Sessions)+1 {
		t.Errorf("sessions %+v, then %+v", before.Sessions, after.Sessions)
	}
	for _, s := range before.Sessions {
		for _, n := range after.Sessions {
			if n.Name == s.Name && n.Since != s.Since {
				t.Errorf("session %+v became %+v", s, n)
			}
		}
	}
}

func TestKeysNeedTheKernel(t *testing.T) {
	ok, err := canMD5()
	check(t, err)
	top, err := fabric(BGP).Normal()
	check(t, err)
	if err := top.checkMD5("host-1"); (err == nil) != ok || err != nil && !errors.Is(err, status.Unsupported) {
		t.Errorf("the kernel signs: %v; the check says %v", ok, err)
	}
	if err := top.checkMD5("host-2"); err != nil {
		t.Errorf("host-2 has no key: %v", err)
	}
}
